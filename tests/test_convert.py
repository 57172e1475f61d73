"""Weight conversion: every tensor lands where it belongs, comes back byte for byte, and each mistake is named."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from weight_files import TINY_QWEN3_5, TINY_UMT5, TINY_WAN, qwen3_5_shapes, umt5_shapes, wan_shapes, write_weights

from configs import base
from wallwm_jax.console import UserError
from wallwm_jax.models import world_action_model as wam
from wallwm_jax.models.convert import rules, stream, wan
from wallwm_jax.models.convert.safetensors_files import Folder
from wallwm_jax.models.vlm import vlm
from wallwm_jax.models.vlm.vlm import VLMConfig
from wallwm_jax.parallel.mesh import make_mesh
from wallwm_jax.training.checkpoint import load_start
from wallwm_jax.training.train_state import flatten, take_over
from wallwm_jax.training.train_step import build_train_step


def same_files(ours: Path, theirs: Path) -> None:
    files = sorted(path.name for path in theirs.iterdir())
    assert sorted(path.name for path in ours.iterdir()) == files
    for name in files:
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name


def write_wan(directory: Path, layout: str = "diffusers", **options) -> Folder:
    return write_weights(directory, wan_shapes(layout, TINY_WAN[layout]), TINY_WAN[layout], **options)


def write_umt5(directory: Path, **extra: tuple[int, ...]) -> Folder:
    folder = write_weights(directory, {**umt5_shapes(), **extra}, TINY_UMT5, dtype="BF16")
    (directory / "spiece.model").write_bytes(b"pieces")
    return folder


@pytest.mark.parametrize(
    ("layout", "dtype", "shards"), [("diffusers", "BF16", 3), ("original", "F32", 1), ("original", "BF16", 2)]
)
def test_wan_round_trip_is_byte_identical(tmp_path, layout, dtype, shards):
    folder = write_wan(tmp_path / "source", layout, dtype=dtype, shards=shards)
    summary = stream.import_weights("wan", tmp_path / "source", tmp_path / "ours")
    assert (summary.tensors, summary.layout) == (len(folder.places), layout)

    loaded = stream.load(tmp_path / "ours", "wan")
    table = wan.table(folder.shapes(), folder.config)
    expected = table.to_params({name: folder.read(name) for name in folder.places})
    assert jax.tree.structure(loaded.params) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(loaded.params), expected)
    assert loaded.params["video"]["blocks"]["ffn"]["up"]["kernel"].shape == (3, 16, 20)
    assert str(loaded.params["video"]["head"]["bias"].dtype) == {"BF16": "bfloat16", "F32": "float32"}[dtype]
    assert (loaded.layout, loaded.sizes["heads"], loaded.sizes["text_width"]) == (layout, 2, 10)

    stream.export_weights("wan", tmp_path / "ours", tmp_path / "back")
    same_files(tmp_path / "back", tmp_path / "source")


def test_large_parameters_are_written_in_blocks_and_stay_the_same(tmp_path, monkeypatch):
    folder = write_wan(tmp_path / "source")
    monkeypatch.setattr(stream, "BLOCK_BYTES", 600)
    stream.import_weights("wan", tmp_path / "source", tmp_path / "ours")
    table = wan.table(folder.shapes(), folder.config)
    expected = table.to_params({name: folder.read(name) for name in folder.places})
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(stream.load(tmp_path / "ours", "wan").params), expected)
    stream.export_weights("wan", tmp_path / "ours", tmp_path / "back")
    same_files(tmp_path / "back", tmp_path / "source")


def test_a_chunk_is_at_most_64_mib_and_never_spans_layers():
    assert stream.chunk_shape((30, 3072), 4, stacked=True) == (30, 3072)
    assert stream.chunk_shape((30, 1536, 8960), 2, stacked=True) == (1, 1536, 8960)
    assert stream.chunk_shape((40, 5120, 13824), 4, stacked=True) == (1, 1213, 13824)
    assert stream.chunk_shape((256384, 4096), 2, stacked=False) == (8192, 4096)
    assert stream.chunk_shape((3, 3, 3, 1024, 1024), 4, stacked=False) == (1, 3, 3, 1024, 1024)


def test_converted_weights_fit_the_model(tmp_path):
    folder = write_wan(tmp_path / "source")
    stream.import_weights("wan", tmp_path / "source", tmp_path / "ours")
    loaded = stream.load(tmp_path / "ours", "wan")
    config = base.get_config().model.copy_and_resolve_references()
    with config.unlocked():
        sizes = dict(loaded.sizes)
        config.text.update(dict(kind="features", width=sizes.pop("text_width"), heads=1))
        config.update(dict(sizes, view_attention=False, latent_shape=(4, 4)))
    expected = jax.tree.map(lambda leaf: leaf.shape, wam.abstract_params(config)["video"])
    assert jax.tree.map(lambda leaf: leaf.shape, loaded.params["video"]) == expected
    assert sum(leaf.size for leaf in jax.tree.leaves(loaded.params)) == sum(p.size for p in folder.places.values())


def test_a_run_starts_from_converted_weights_as_the_single_view_tower(tmp_path):
    """The cross-view branch is copied from the within-view attention; only its output and the cameras are new."""
    write_wan(tmp_path / "source", dtype="BF16")
    stream.import_weights("wan", tmp_path / "source", tmp_path / "ours")
    config = base.get_config().copy_and_resolve_references()
    with config.unlocked():
        sizes = dict(stream.load(tmp_path / "ours", "wan").sizes)
        config.model.text.update(dict(kind="features", width=sizes.pop("text_width"), heads=1))
        config.model.update(dict(sizes, latent_shape=(4, 4)))
        config.train.update(stage="video", init_from=str(tmp_path / "ours"))
    built = build_train_step(config, make_mesh({"slice": 1, "data": 1, "fsdp": 1, "context": 1, "tensor": 1}))
    params, what = load_start(tmp_path / "ours")
    state, result = take_over(built.init(), params, what)
    assert what == "converted weights" and result.dropped == ()
    branch = "video/blocks/view_attention/attention/output"
    assert set(result.new) == {f"{branch}/kernel", f"{branch}/bias", "video/cameras/angles"}
    ours, blocks = flatten(state.trainable), "video/blocks"
    for name in result.new:
        assert not np.asarray(ours[name]).any()
    for name in ("query/kernel", "key/bias", "value/kernel", "query_norm/scale"):
        np.testing.assert_array_equal(
            ours[f"{blocks}/view_attention/attention/{name}"], ours[f"{blocks}/self_attention/{name}"]
        )
    np.testing.assert_array_equal(ours[f"{blocks}/view_attention/modulation"], ours[f"{blocks}/modulation"][:, :3])
    assert ours[f"{blocks}/modulation"].dtype == np.float32 and np.asarray(ours[f"{blocks}/modulation"]).any()


def test_rotary_pairs_become_halves_within_each_head():
    assert rules.rope_halves(2, 6) == (0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11)
    take = rules.Take(rules.rope_halves(2, 6), 0)
    np.testing.assert_array_equal(take.invert(take.apply(np.arange(12))), np.arange(12))


def test_the_table_lists_every_tensor(tmp_path):
    folder = write_wan(tmp_path / "source", dtype="BF16", shards=2)
    stream.import_weights("wan", tmp_path / "source", tmp_path / "ours")
    table = {row["name"]: row for row in stream.read_table(tmp_path / "ours")}
    assert table.keys() == folder.places.keys()
    row = table["blocks.2.attn1.to_k.weight"]
    assert (row["shape"], row["dtype"], row["layer"]) == ("16x16", "bfloat16", "2")
    assert row["parameter"] == "video/blocks/self_attention/key/kernel"
    assert len({row["checksum"] for row in table.values()}) == len(table)
    assert table["proj_out.bias"]["layer"] == ""


def test_umt5_with_its_tokenizer_and_tied_embedding(tmp_path):
    source = tmp_path / "repository" / "text_encoder"
    tied = "encoder.embed_tokens.weight"
    folder = write_umt5(source, **{tied: (40, 12)})
    (tmp_path / "repository" / "tokenizer").mkdir()
    shutil.move(source / "spiece.model", tmp_path / "repository" / "tokenizer")
    with pytest.raises(UserError, match=f"'{tied}' must equal 'shared.weight'"):
        stream.import_weights("umt5", tmp_path / "repository", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
    folder.write(tied, folder.read("shared.weight"))
    stream.import_weights("umt5", tmp_path / "repository", tmp_path / "ours")  # finds text_encoder/ and tokenizer/
    assert (tmp_path / "ours" / "spiece.model").read_bytes() == b"pieces"
    params = stream.load(tmp_path / "ours", "umt5").params
    assert params["blocks"]["position_bias"].shape == (3, 8, 2)
    assert params["embedding"].dtype == ml_dtypes.bfloat16
    stream.export_weights("umt5", tmp_path / "ours", tmp_path / "back")
    (tmp_path / "back" / "spiece.model").unlink()
    same_files(tmp_path / "back", source)


def write_qwen3_5(directory: Path, config=TINY_QWEN3_5, *, mtp: bool = True, **options) -> Folder:
    folder = write_weights(directory, qwen3_5_shapes(config, mtp), config, **options)
    for name in ("tokenizer.json", "chat_template.jinja"):
        (directory / name).write_text(name)
    return folder


@pytest.mark.parametrize(("mtp", "tied", "shards"), [(True, False, 3), (False, True, 1)])
def test_qwen3_5_round_trip_is_byte_identical_with_the_head_that_is_not_used(tmp_path, mtp, tied, shards):
    config = TINY_QWEN3_5 | {"tie_word_embeddings": tied}
    dtype = lambda name: "F32" if "A_log" in name else "BF16"  # noqa: E731
    folder = write_qwen3_5(tmp_path / "source", config, mtp=mtp, dtype=dtype, shards=shards)
    ahead = [name for name in folder.places if name.startswith("mtp.")]
    assert len(ahead) == 15 * mtp
    assert ("lm_head.weight" in folder.places) is not tied
    summary = stream.import_weights("qwen3_5", tmp_path / "source", tmp_path / "ours")
    assert summary.parameters == sum(place.size for place in folder.places.values())
    loaded = stream.load(tmp_path / "ours", "qwen3_5")
    vlm_config = VLMConfig.from_sizes(loaded.sizes)
    assert (vlm_config.language.tied, vlm_config.language.mrope_section, vlm_config.image_id) == (tied, (2, 1, 1), 30)
    model = {part: loaded.params[part] for part in ("language", "vision")}
    expected = jax.tree.map(lambda leaf: leaf.shape, vlm.abstract_params(vlm_config))
    assert jax.tree.map(lambda leaf: leaf.shape, model) == expected
    assert ("mtp" in loaded.params) is mtp
    stream.export_weights("qwen3_5", tmp_path / "ours", tmp_path / "back")
    same_files(tmp_path / "back", tmp_path / "source")


def test_qwen3_5_is_refused_with_a_missing_left_over_or_misshapen_tensor(tmp_path):
    shapes = qwen3_5_shapes()
    name = "model.visual.blocks.1.attn.qkv.bias"
    for number, (change, message) in enumerate([
        ({name: None}, f"missing tensor {name!r}"),
        ({"mtp.layers.0.self_attn.k_norm.weight": None}, r"missing tensor 'mtp\.layers\.0\.self_attn\.k_norm"),
        ({"model.visual.deepstack.weight": (3,)}, r"left-over tensor 'model\.visual\.deepstack\.weight'"),
        ({"mtp.fc.weight": (12, 12)}, r"'mtp\.fc\.weight' has shape \[12, 12\], expected \[12, 24\]"),
        ({"model.visual.patch_embed.proj.weight": (8, 3, 1, 2, 2)}, r"expected \[8, 3, 2, 2, 2\]"),
    ]):  # fmt: skip
        changed = {key: shape for key, shape in (shapes | change).items() if shape is not None}
        write_weights(tmp_path / str(number), changed, TINY_QWEN3_5)
        with pytest.raises(UserError, match=message):
            stream.import_weights("qwen3_5", tmp_path / str(number), tmp_path / "ours")
    write_weights(tmp_path / "bare", shapes, TINY_QWEN3_5)
    with pytest.raises(UserError, match=r"'tokenizer\.json' is neither in"):
        stream.import_weights("qwen3_5", tmp_path / "bare", tmp_path / "ours")
    with pytest.raises(UserError, match="model_type = 'qwen3_5_text' is not supported, only 'qwen3_5'"):
        qwen3_5_shapes(TINY_QWEN3_5 | {"model_type": "qwen3_5_text"})
    with pytest.raises(UserError, match="16 wide do not fit a language model of width 12"):
        qwen3_5_shapes(TINY_QWEN3_5 | {"vision_config": TINY_QWEN3_5["vision_config"] | {"out_hidden_size": 16}})
    assert not (tmp_path / "ours").exists()


def rename(header: str, old: str, new: str) -> str:
    assert f'"{old}"' in header
    return header.replace(f'"{old}"', f'"{new}"')


def rewrite_header(directory: Path, change) -> None:
    """Changes the text of the one file's header in place; values stay."""
    file = directory / "model.safetensors"
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = change(raw[8 : 8 + length].decode()).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + length :])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: rename(h, "blocks.1.attn2.to_q.bias", "x"), r"missing tensor 'blocks\.1\.attn2\.to_q\.bias'"),
        (
            lambda h: h.replace("[20,16]", "[16,20]", 1),
            r"'blocks\.0\.ffn\.net\.0\.proj\.weight' has shape \[16, 20\], exp",
        ),
        (lambda h: h.replace('"F32"', '"I32"', 1), "has dtype I32; supported: BF16"),
        (lambda h: h.replace("[20,16]", "[21,16]", 1), "does not fill its place"),
        (lambda h: h[:-30], "no safetensors file, or a damaged one"),
    ],
)
def test_a_wrong_header_is_an_error_that_names_the_tensor(tmp_path, change, message):
    write_wan(tmp_path / "source")
    rewrite_header(tmp_path / "source", change)
    with pytest.raises(UserError, match=message):
        stream.import_weights("wan", tmp_path / "source", tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_left_over_tensor_is_named(tmp_path):
    shapes = {**wan_shapes("diffusers", TINY_WAN["diffusers"]), "blocks.0.attn2.add_k_proj.weight": (16, 16)}
    write_weights(tmp_path / "source", shapes, TINY_WAN["diffusers"])
    with pytest.raises(UserError, match=r"left-over tensor 'blocks\.0\.attn2\.add_k_proj\.weight'"):
        stream.import_weights("wan", tmp_path / "source", tmp_path / "ours")


def test_layers_of_different_dtypes_are_named(tmp_path):
    odd = "blocks.1.ffn.net.2.weight"
    write_wan(tmp_path / "source", dtype=lambda name: "BF16" if name == odd else "F32")
    with pytest.raises(UserError, match=r"'blocks\.1\.ffn\.net\.2\.weight' is bfloat16, but 'blocks\.0\.ffn"):
        stream.import_weights("wan", tmp_path / "source", tmp_path / "ours")


def test_damaged_folders_are_named(tmp_path):
    source, out = tmp_path / "source", tmp_path / "ours"
    with pytest.raises(UserError, match="does not exist"):
        stream.import_weights("wan", source, out)
    folder = write_wan(source, shards=3)
    last = sorted(folder.headers)[-1]
    raw = (source / last).read_bytes()
    (source / last).write_bytes(raw[:-1])
    with pytest.raises(UserError, match=rf"{last}' has {len(raw) - 1} bytes, its header says {len(raw)}"):
        stream.import_weights("wan", source, out)
    (source / last).unlink()
    with pytest.raises(UserError, match=rf"shard '.*{last}' is missing"):
        stream.import_weights("wan", source, out)
    (source / "model.safetensors.index.json").unlink()
    with pytest.raises(UserError, match=r"holds 2 \.safetensors files and no \*\.safetensors\.index\.json"):
        stream.import_weights("wan", source, out)
    for file in source.glob("*.safetensors"):
        file.unlink()
    (source / "weights.pth").touch()
    with pytest.raises(UserError, match=r"holds 'weights\.pth' and no safetensors"):
        stream.import_weights("wan", source, out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_other_models_are_refused(tmp_path):
    write_umt5(tmp_path / "umt5")
    with pytest.raises(UserError, match="no Wan transformer"):
        stream.import_weights("wan", tmp_path / "umt5", tmp_path / "ours")
    config = dict(TINY_WAN["diffusers"])
    for change, message in (
        ({"added_kv_proj_dim": 8}, "added_kv_proj_dim = 8 is not supported"),
        ({"in_channels": 36}, "36 input and 6 output channels"),
        ({"patch_size": [2, 2, 2]}, "only one latent frame per patch"),
        ({"num_layers": None}, "config.json has no 'num_layers'"),
    ):
        with pytest.raises(UserError, match=message):
            wan_shapes("diffusers", config | change)


def test_what_exists_is_kept_and_other_kinds_are_refused(tmp_path):
    write_wan(tmp_path / "source")
    stream.import_weights("wan", tmp_path / "source", tmp_path / "ours")
    before = (tmp_path / "ours" / "tensors.tsv").read_bytes()
    with pytest.raises(UserError, match="already exists"):
        stream.import_weights("wan", tmp_path / "source", tmp_path / "ours")
    assert (tmp_path / "ours" / "tensors.tsv").read_bytes() == before
    with pytest.raises(UserError, match="converted weights of 'wan', not of 'umt5'"):
        stream.load(tmp_path / "ours", "umt5")
    with pytest.raises(UserError, match="holds no converted weights"):
        stream.load(tmp_path / "source", "wan")


def test_going_back_refuses_changed_parameters(tmp_path):
    write_wan(tmp_path / "source")
    stream.import_weights("wan", tmp_path / "source", tmp_path / "ours")
    leaf = stream._open_leaf(tmp_path / "ours" / "params", "video/blocks/modulation")
    leaf[1, 0, 0].write(7.0).result()
    with pytest.raises(
        UserError, match=r"'video/blocks/modulation' .* changed or damaged: tensor 'blocks\.1\.scale_sh"
    ):
        stream.export_weights("wan", tmp_path / "ours", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_the_public_library_reads_and_writes_the_same_files(tmp_path):
    numpy_files = pytest.importorskip("safetensors.numpy", reason="needs the parity extra")
    folder = write_wan(tmp_path / "source")
    theirs = numpy_files.load_file(tmp_path / "source" / "model.safetensors")
    assert theirs.keys() == folder.places.keys()
    for name, value in theirs.items():
        np.testing.assert_array_equal(folder.read(name), value)
    shutil.copytree(tmp_path / "source", tmp_path / "theirs")
    numpy_files.save_file(theirs, tmp_path / "theirs" / "model.safetensors", {"format": "pt"})
    stream.import_weights("wan", tmp_path / "theirs", tmp_path / "ours")
    stream.export_weights("wan", tmp_path / "ours", tmp_path / "back")
    same_files(tmp_path / "back", tmp_path / "theirs")


def run_command(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "wallwm_jax.convert", *map(str, arguments)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_the_command(tmp_path):
    write_wan(tmp_path / "source")
    done = run_command("wan", f"--source={tmp_path / 'source'}", f"--out={tmp_path / 'ours'}")
    assert done.returncode == 0, done.stderr
    assert "diffusers layout" in done.stdout
    again = run_command("wan", f"--source={tmp_path / 'source'}", f"--out={tmp_path / 'ours'}")
    assert (again.returncode, len(again.stderr.strip().splitlines())) == (2, 1)
    assert "already exists" in again.stderr


# Prints resident memory before, and its peak (VmHWM; ru_maxrss would count the process that started this one).
_MEASURED = """
import re, sys
from wallwm_jax.models.convert import stream
def read(field): return int(re.search(field + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
start = read("VmRSS")
getattr(stream, sys.argv[1])("wan", sys.argv[2], sys.argv[3])
print(start, read("VmHWM"))
"""


@pytest.mark.slow
def test_a_billion_parameters_take_the_memory_of_a_few_tensors(tmp_path):
    """Sizes of Wan 2.1 T2V-1.3B in bfloat16: 2.8 GB in 3 shards, the largest 1.9 GB."""
    config = dict(TINY_WAN["diffusers"]) | dict(
        num_attention_heads=12, attention_head_dim=128, in_channels=16, out_channels=16, text_dim=4096, freq_dim=256,
        ffn_dim=8960, num_layers=30,
    )  # fmt: skip
    folder = write_weights(tmp_path / "source", wan_shapes("diffusers", config), config, dtype="BF16", shards=3)
    assert sum(place.size for place in folder.places.values()) == 1_418_996_800
    largest = max((tmp_path / "source" / file).stat().st_size for file in folder.headers)
    for function, source, out in (("import_weights", "source", "ours"), ("export_weights", "ours", "back")):
        command = [sys.executable, "-c", _MEASURED, function, str(tmp_path / source), str(tmp_path / out)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        start, peak = map(int, done.stdout.split()[-2:])
        print(
            f"{function}: {start / 1e6:.0f} MB before, peak {peak / 1e6:.0f} MB, largest shard {largest / 1e6:.0f} MB"
        )
        assert peak - start <= 0.25 * largest
        if function == "import_weights":
            conversion = json.loads((tmp_path / "ours" / "conversion.json").read_text())
            assert conversion["sizes"]["depth"] == 30
    same_files(tmp_path / "back", tmp_path / "source")
