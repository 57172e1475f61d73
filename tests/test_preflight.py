"""Preflight: the FLOPs formula, the projection's arithmetic, and a real compilation with its exit codes."""

import dataclasses
import functools
import json
import math
import re
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from random_batch import tiny_config
from training_setup import subprocess_environment

from configs import wan14b
from wallwm_jax.benchmarks import decoding_cost, muon, preflight, preflight_peer
from wallwm_jax.console import UserError
from wallwm_jax.data.packing import batch_spec
from wallwm_jax.models import layers
from wallwm_jax.models import world_action_model as wam
from wallwm_jax.models.model_flops import RowShape, forward_flops, training_flops
from wallwm_jax.parallel import sharding
from wallwm_jax.parallel.aot import Statistics, Traffic, statistics, topology_devices
from wallwm_jax.parallel.chips import CHIPS, chip_of
from wallwm_jax.parallel.mesh import AXES, make_mesh
from wallwm_jax.parallel.presets import mesh_preset


def sized_config(view_attention=True):
    """Widths at which products, not borders, are the work."""
    config = tiny_config()
    with config.unlocked():
        config.model.update(width=256, heads=2, depth=3, ffn=512, action_width=128, action_heads=2, action_ffn=256)
        config.model.update(latent_shape=(12, 14), latent_channels=48, patch=(2, 2), max_latents=17, max_views=4)
        config.model.update(view_attention=view_attention, compute_dtype="float32", remat="none")
        config.model.text.update(kind="features", width=64, pad_to=0)
        config.data.update(rows=1, latents_per_row=17, actions_per_row=128, events_per_row=1, text_length=32)
        config.data.views = ("a", "b", "c")
        config.objective.action_draws = 1
    return config


def products(jaxpr, times=1):
    """FLOPs of all dot_general in a jaxpr, those of a scan as often as it runs."""
    total = 0
    for equation in jaxpr.eqns:
        inner = times * equation.params.get("length", 1) if equation.primitive.name == "scan" else times
        if equation.primitive.name == "dot_general":
            (left, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            contracted = 1
            for axis in left:
                contracted *= shape[axis]
            total += 2 * times * equation.outvars[0].aval.size * contracted
        for value in equation.params.values():
            for sub in value if isinstance(value, tuple | list) else [value]:
                inside = getattr(sub, "jaxpr", sub if hasattr(sub, "eqns") else None)
                if inside is not None:
                    total += products(inside, inner)
    return total


def forward(config, run_actions):
    """The forward pass of one row without noise, and the shapes of its arguments, parameters and batch."""
    shapes = {name: jax.ShapeDtypeStruct(*spec) for name, spec in batch_spec(config, 1).items()}
    params = wam.abstract_params(config.model)

    def run(params, batch):
        text = wam.encode_text(params, config.model, batch)
        return wam.forward(
            params,
            config.model,
            batch,
            noisy_latents=batch["latents"],
            video_sigma=jnp.zeros((1, 1)),
            noisy_actions=batch["actions"][None],
            action_sigma=jnp.zeros((1, 1, 1)),
            text=text,
            run_actions=run_actions,
        )

    return run, (params, shapes)


def multiplied(config, run_actions):
    """FLOPs of the products of a forward pass, as traced."""
    run, shapes = forward(config, run_actions)
    return products(jax.make_jaxpr(run)(*shapes).jaxpr)


@pytest.mark.parametrize("view_attention", [True, False])
def test_the_formula_is_what_the_program_multiplies(view_attention):
    """One event that fills its row, so that dense attention and attention inside events are the same."""
    config = sized_config(view_attention)
    row = RowShape.of(config, 3)
    assert dataclasses.astuple(row) == (3, 17, 1, 128, 32)
    parts = forward_flops(config.model, row)
    video = multiplied(config, run_actions=False)
    both = multiplied(config, run_actions=True)
    assert parts["video"] == pytest.approx(video, rel=0.03)
    keys = training_flops(config, row, "action") - parts["video"]  # three times one draw and the keys of the video
    assert keys / 3 == pytest.approx(both - video, rel=0.03)
    assert training_flops(config, row, "video") == 3 * parts["video"]
    assert training_flops(config, row, "joint") == pytest.approx(3 * both, rel=0.03)


@pytest.mark.tpu
def test_the_formula_is_what_the_compiler_counts():
    """Of both towers' forward pass, whose float32 attention runs outside kernels and pads nothing."""
    pytest.importorskip("libtpu", reason="needs the tpu extra")
    config = sized_config()
    run, arguments = forward(config, run_actions=True)
    chip = jax.sharding.SingleDeviceSharding(topology_devices("v5p:2x2x1")[0])
    found = statistics(jax.jit(run, in_shardings=chip).lower(*arguments).compile())
    assert not found.kernel_flops
    assert training_flops(config, RowShape.of(config, 3), "joint") == pytest.approx(3 * found.flops, rel=0.002)


def test_more_draws_cost_only_their_own_stream():
    config = sized_config()
    row = RowShape.of(config, 3)
    one = training_flops(config, row, "action")
    config.objective.action_draws = 6
    assert training_flops(config, row, "action") - one == pytest.approx(15 * forward_flops(config.model, row)["action"])


def test_the_projection_adds_its_parts():
    work = Counter({(459e12, 1e12): 1, (459e9, 2.77e12): 2})  # the second kernel waits for HBM
    found = Statistics(flops=1e12, product_cycles=1.75e9, cycles=3.5e9, kernel_work=work, hbm=5.54e12)
    found.traffic["all-gather", 4] = Traffic(10, 9e11, 1.8e11)
    found.traffic["dcn-all-reduce", 2] = Traffic(1, 6.25e9, 6.25e9)
    times = preflight.project(found, chip_of("v5p:2x2x1*2"), 459e12)
    assert (times["product_seconds"], times["other_seconds"], times["exchange_seconds"]) == (1.0, 1.0, 2.0)
    assert [p.seconds for p in times["projections"]] == pytest.approx([6 + 1 / 0.42, 6 + 1 / 0.6, 7.0])
    assert times["kernel_seconds"] == pytest.approx(2 + 1 / 0.42)
    assert times["projections"][-1].mfu == pytest.approx(1 / 7)
    assert times["compute_seconds"] == pytest.approx((1 + 459 + 0.918) / 459)
    assert (times["hbm_seconds"], times["ici_seconds"], times["dcn_seconds"]) == (2.0, 5.0, 1.0)


def test_what_runs_beside_products_is_waited_for_only_where_it_takes_longer():
    chip = chip_of("v5p:2x2x1")
    waited = functools.partial(preflight._waited, "all-gather", chip=chip)
    assert waited(Traffic(1, 1.8e11, 0.0, beside=0.25 * chip.clock)) == pytest.approx(0.75)
    assert waited(Traffic(1, 1.8e11, 0.9e11, beside=2 * chip.clock)) == pytest.approx(0.5)
    assert waited(Traffic(1, 1.8e11, 0.0)) == 0.0
    between = Counter({(0.9e11, 0.125 * chip.clock, 0.125 * chip.flops): 1, (0.9e11, 2 * chip.clock, 0.0): 1})
    assert waited(Traffic(2, 1.8e11, 0.0, overlapped=between)) == pytest.approx(
        0.25
    )  # one ends early, which helps no other


def test_groups_are_named_by_their_axes():
    sizes = {"slice": 1, "data": 4, "fsdp": 32, "context": 1, "tensor": 2}
    names = [preflight._axes(sizes, chips) for chips in (32, 4, 128, 256, 7)]
    assert names == ["fsdp", "data", "data x fsdp", "data x fsdp x tensor", "7 chips"]


def test_an_unknown_generation_is_an_error():
    with pytest.raises(UserError, match="the generation is one of v5e, v5p, v6e, tpu7x"):
        chip_of("v4:2x2x1")
    assert set(CHIPS) == {"v5e", "v5p", "v6e", "tpu7x"}


def command(*arguments):
    line = [sys.executable, "-m", "wallwm_jax.preflight", *arguments]
    return subprocess.run(line, env=subprocess_environment(), capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--stderrthreshold=info", "give --views=N"),
        ("--history=2", "--history is for --program=unified_mode, not train_step"),
    ],
)
def test_the_command_says_what_is_missing_or_has_no_use(argument, message):
    done = command("--config=configs/wan5b.py:video", "--topology=v5p:2x2x1", argument)
    assert done.returncode == 2 and message in done.stderr


STUBBED = """
import sys

import jax

from wallwm_jax.benchmarks import preflight
from wallwm_jax.parallel.aot import Statistics

taken = Statistics(flops=4e14, cycles=1e9, arguments=int(sys.argv.pop(1)))
preflight.topology_devices = lambda _: jax.devices()[:4]
preflight.statistics = lambda _: taken
jax.stages.Lowered.compile = lambda _: None

from wallwm_jax import preflight as command

command._define_flags()
command.run_command(command.main)
"""


@pytest.mark.parametrize(("filled", "code", "verdict"), [(0.89, 0, "11 % free: fits"), (0.91, 3, "DOES NOT FIT")])
def test_the_command_ends_with_whether_it_fits(filled, code, verdict):
    """The real step of the quickstart's config, traced; in place of the compiler one that says what memory it takes."""
    arguments = [
        str(int(filled * CHIPS["v5p"].hbm)),
        "--config=configs/ocbench_quickstart.py",
        "--topology=v5p:2x2x1",
        "--config.data.rows=4",
        "--config.optim.name=adamw",
        "--views=2",
    ]
    environment = subprocess_environment() | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    line = [sys.executable, "-c", STUBBED, *arguments]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == code, done.stderr
    assert verdict in done.stdout and "bound by compute" in done.stdout


def test_the_peers_time_outside_kernels_follows_from_its_first_and_last_mfu():
    """The projection in the middle, which does not enter, comes out as printed."""
    peak = CHIPS["v5p"].flops
    for peer, seconds in {"720p": 8.60, "480p": 11.62}.items():
        step = preflight_peer.PEERS[peer]
        assert step.outside_kernels == pytest.approx(seconds, abs=0.005)
        at_peak = step.model_flops / (step.mfu[-1] * peak)
        middle = step.outside_kernels + (at_peak - step.outside_kernels) / preflight.ETAS[1]
        assert step.model_flops / (middle * peak) == pytest.approx(step.mfu[1], abs=0.001)


def test_a_step_is_compared_with_the_peers_of_the_same_work():
    report = SimpleNamespace(
        executed_flops=6422e12,
        product_seconds=4.0,
        other_seconds=3.0,
        exchange_seconds=1.6,
        collectives={"a": {"received": 100e9}, "b": {"received": 110.4e9}},
        projections=[SimpleNamespace(mfu=mfu) for mfu in (0.370, 0.383, 0.477)],
        table=lambda: "the report",
        to_json=lambda: {"chips": 4},
    )
    found = preflight_peer.Compared(report, "720p")
    assert found.ratios["executed_flops"] == pytest.approx(0.900, abs=1e-3)
    assert found.ratios["seconds_outside_kernels"] == pytest.approx(1.0, abs=1e-3)
    assert found.ratios["received"] == pytest.approx(0.8)
    assert found.ratios["mfu"] == pytest.approx([1.25, 1.0, 0.9])
    best = (1 - 263e9 / 1.8e11 / (4893e12 / (mfu * 459e12)) for mfu in (0.296, 0.383, 0.530))  # of its time
    assert found.ratios["mfu_at_best"] == pytest.approx([a * b for a, b in zip((1.25, 1.0, 0.9), best)])
    assert found.table().startswith("the report\npeer") and "1.25, 1.00, 0.90 times its MFU" in found.table()
    compared = found.to_json()
    assert compared["chips"] == 4 and compared["peer"]["name"] == "720p"
    assert compared["peer"]["received"] == pytest.approx(0.8) and compared["peer"]["its"]["received"] == 263e9


def test_the_peer_is_refused_where_the_model_needs_other_work():
    shapes = {"rows": 1, "latents_per_row": 21, "events_per_row": 1, "actions_per_row": 160, "text_length": 512}
    config = wan14b.get_config("video").copy_and_resolve_references()
    with config.unlocked():
        config.data.update(**shapes)
        config.model.update(max_latents=21, latent_shape=(90, 160), view_attention=False)
    preflight_peer.check_same_work(config, "v5p:2x2x1", 1, "720p")
    with pytest.raises(UserError, match=r"--peer=480p .* needs 5035 TFLOP .* this config needs 4893"):
        preflight_peer.check_same_work(config, "v5p:2x2x1", 1, "480p")
    with pytest.raises(UserError, match="compiled for v5p"):
        preflight_peer.check_same_work(config, "v6e:2x2", 1, "720p")


@pytest.fixture(scope="module")
def small_step():
    """The 5B layout's kinds of layers at small sizes, parameters over fsdp, rows over data and fsdp of four chips.

    Compiled once: its config, the report, and the statistics that the report is made of.
    """
    pytest.importorskip("libtpu", reason="needs the tpu extra")
    config = sized_config()
    with config.unlocked():
        config.model.update(compute_dtype="bfloat16", remat="full")
        config.data.update(rows=4, events_per_row=8)
        config.objective.action_draws = 2
        config.mesh.update(data=2, fsdp=2)
        config.train.stage = "joint"
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preflight, "statistics", lambda program: found.append(statistics(program)) or found[0])
        return config, preflight.inspect(config, "v5p:2x2x1"), *found


def shapes(moved):
    """Of all arrays in a `Traffic`."""
    found = {sizes for arrays in moved.arrays for sizes in re.findall(r"\[([\d,]*)\]", arrays)}
    return {tuple(int(size) for size in sizes.split(",") if size) for sizes in found}


@pytest.mark.tpu
def test_the_train_step_runs_attention_kernels_once_per_layer_and_pass(small_step):
    config, _, found = small_step
    runs = {name: count for name, count in found.kernels.items() if "splash" in name}
    assert set(runs.values()) == {config.model.depth}, found.table()
    assert len(runs) == 3, found.table()  # forward, recomputed and backward, of the actions' to the video
    of_video = 2 * config.model.depth  # along views and across them; the captions are too short
    assert found.kernels["resident_attention_fwd"] == 2 * of_video  # computed twice
    assert found.kernels["resident_attention_dkv"] == of_video
    assert found.received["all-reduce"] > 0 and found.memory < 2 << 30


@pytest.mark.tpu
def test_the_train_step_all_reduces_no_weight_that_fsdp_splits(small_step):
    """Of the video tower's attention and feed-forward: halves over data, whole ones never; nor of the keys and values
    `[256, 2, 64]` that the actions read of the video."""
    _, _, found = small_step
    reduced = {shape for (kind, _), moved in found.traffic.items() if kind == "all-reduce" for shape in shapes(moved)}
    assert {(128, 256), (256, 128), (512, 128), (128, 512)} <= reduced
    assert not {(256, 2, 128), (2, 128, 256), (256, 256), (512, 256), (256, 512), (256, 2, 64)} & reduced


@pytest.mark.tpu
def test_a_small_step_fits_and_a_tiny_chip_does_not(small_step):
    _, report, _ = small_step
    assert report.fits and report.chips == 4
    found = json.loads(json.dumps(report.to_json()))
    assert found["fits"] and 0 < found["projected_mfu"] < found["projected_mfu_bound"] < 1
    assert found["executed_flops"] > 1.2 * found["model_flops"]  # the forward is computed twice
    assert found["parameters"] < found["total"] and found["replicated"] < 0.2
    assert found["activations"] < found["temporaries"] and found["parameters"] < found["peak"] <= found["total"]
    resources = {name: found[f"{name}_seconds"] for name in ("compute", "hbm", "ici")}
    assert found["bound_by"] == "memory" and resources["hbm"] == max(resources.values())
    assert found["hbm_seconds"] == pytest.approx(found["hbm_bytes"] / CHIPS["v5p"].hbm_bandwidth)
    assert found["hbm_bytes"] > found["parameters"] and found["dcn_seconds"] == 0
    assert any(name.endswith("over data or fsdp") for name in found["collectives"])  # two chips each
    assert "fits" in report.table() and "MFU" in report.table()
    small = dataclasses.replace(report, hbm=1.05 * report.total)
    assert not small.fits and "DOES NOT FIT" in small.table()


WIDTH, LAYERS = 1024, 4
WEIGHT = WIDTH * 4 * WIDTH


def gradient_of_blocks(mesh):
    """Statistics of four feed-forward blocks, forward and backward, on a mesh; 256 tokens per device."""

    def placed(shape, *names):
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding.named(names, shape, mesh))

    def loss(kernels, x):
        def block(x, kernel):
            up, down = (part.astype(jnp.bfloat16) for part in kernel)
            hidden = jnp.tanh(
                layers.affine(layers._PLAIN, layers.Layout(("embed", "mlp")), x, up, jnp.zeros(len(down), x.dtype))
            )
            x += layers.affine(
                layers._PLAIN, layers.Layout(("mlp", "embed")), hidden, down, jnp.zeros(len(up), x.dtype)
            )
            return sharding.constrain(x, "batch", "tokens", None), None

        return jnp.mean(jax.lax.scan(jax.checkpoint(block), x, kernels)[0].astype(jnp.float32) ** 2)

    kernels = (
        placed((LAYERS, WIDTH, 4 * WIDTH), "layers", "embed", "mlp"),
        placed((LAYERS, 4 * WIDTH, WIDTH), "layers", "mlp", "embed"),
    )
    shape = (256 * mesh.size // mesh.shape["context"], mesh.shape["context"], WIDTH)
    where = sharding.named(("batch", "tokens", None), shape, mesh)
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=where)
    outputs = jax.tree.map(lambda leaf: leaf.sharding, kernels)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return statistics(jax.jit(jax.grad(loss), out_shardings=outputs).lower(kernels, x).compile())


@pytest.mark.tpu
@pytest.mark.parametrize(
    "topology",
    [
        "v5p:4x4x8",
        "v5p:8x8x8",
        "v5e:16x16",
        "v6e:16x16",
        "tpu7x:4x4x4",
    ],
)
def test_on_no_preset_does_a_weight_travel_by_all_reduce(topology):
    """A block's feed-forward, forward and backward on the preset's mesh: gathers and reduce-scatters of its weights."""
    pytest.importorskip("libtpu", reason="needs the tpu extra")
    mesh = make_mesh(mesh_preset(topology), topology_devices(topology))
    found = gradient_of_blocks(mesh)
    weights, shards = 2 * LAYERS * WEIGHT, mesh.shape["fsdp"]
    assert found.received["all-gather"] >= 0.9 * 2 * weights * (1 - 1 / shards)  # in bfloat16, at least once
    assert found.received["reduce-scatter"] >= 0.9 * 2 * weights * (1 - 1 / shards)
    copies = mesh.shape["data"]  # sums over copies of the shards remain
    assert found.received["all-reduce"] <= 1.1 * 2 * 4 * weights / shards * (1 - 1 / copies) + 1e4


@pytest.mark.tpu
@pytest.mark.parametrize(
    ("axes", "reduced"),
    [
        pytest.param({"data": 2, "fsdp": 2, "context": 2}, WEIGHT // 4, id="shards over data"),
        pytest.param({"fsdp": 4, "tensor": 2}, 512 * WIDTH, id="outputs over tensor"),
        pytest.param({"fsdp": 4, "context": 2}, 0, id="context on the third side"),
    ],
)
def test_where_context_or_tensor_split_a_row_weights_travel_by_gather_and_scatter(axes, reduced):
    """What is all-reduced: over data the shards of a block's gradients, over tensor its outputs `[512, 1, D]`."""
    pytest.importorskip("libtpu", reason="needs the tpu extra")
    mesh = make_mesh({**dict.fromkeys(AXES, 1), **axes}, topology_devices("v5p:2x2x2"))
    found = gradient_of_blocks(mesh)
    local, shards = 2 * LAYERS * WEIGHT / mesh.shape["tensor"], mesh.shape["fsdp"] * mesh.shape["context"]
    assert found.received["all-gather"] >= 0.9 * 2 * 2 * local * (1 - 1 / shards)  # forward and again backward
    assert found.received["reduce-scatter"] >= 0.9 * 2 * local * (1 - 1 / shards)
    reduces = (shapes(moved) for (kind, _), moved in found.traffic.items() if kind == "all-reduce")
    sizes = {math.prod(shape) for found_shapes in reduces for shape in found_shapes}
    assert {size for size in sizes if size > WIDTH} == ({reduced} if reduced else set())


@pytest.mark.tpu
def test_between_slices_only_sums_of_shards_travel():
    """Slices hold the same parameters: a gradient is scattered inside a slice, its shard summed with the other's."""
    pytest.importorskip("libtpu", reason="needs the tpu extra")
    devices = topology_devices("v5p:2x2x1*2")
    assert {device.slice_index for device in devices} == {0, 1}
    mesh = make_mesh({**dict.fromkeys(AXES, 1), "slice": 2, "fsdp": 4}, devices)
    assert [{device.slice_index for device in part.flat} for part in mesh.devices] == [{0}, {1}]
    found = gradient_of_blocks(mesh)
    weights = 2 * LAYERS * WEIGHT
    assert found.received["reduce-scatter"] >= 0.9 * 2 * weights * 3 / 4
    between = {kind: size for kind, size in found.received.items() if kind.startswith("dcn-")}
    assert set(between) == {"dcn-all-reduce"}
    assert 4 * weights / 4 <= between["dcn-all-reduce"] <= 1.3 * 4 * weights / 4  # one layer is peeled off the loop


@pytest.mark.tpu
def test_muon_alone_and_the_decoding_modes_are_answered_too(small_step):
    config, report, _ = small_step
    config = config.copy_and_resolve_references()
    result = muon.measure_config(config, "v5p:2x2x1")
    assert result["muon"]["matrices"] == report.muon.matrices
    assert result["muon"]["plan"]["bytes_received_per_chip"] == pytest.approx(
        result["muon"]["bytes_received_per_chip"], rel=0.05
    )
    with config.unlocked():
        config.mesh.update(data=1, fsdp=1, tensor=2)
        config.sampling.update(buckets=(5,), steps=3, video_steps=2)
    per_latent = config.model.actions_per_latent
    event = decoding_cost.inspect_event_mode(config, "v5p:2x2x1")
    chunk = decoding_cost.inspect_unified_mode(config, "v5p:2x2x1", history=1, fixed_steps=4 * per_latent - 1)
    for cost, latents, actions in ((event, 5, 4 * per_latent), (chunk, 6, 4 * per_latent - 1)):
        (program,) = cost.programs
        assert cost.fits and cost.chips == 2 and (program.latents, program.actions) == (latents, actions)
        assert program.received > 0 and program.seconds[0] >= program.seconds[-1] > 0
        assert f"{latents:>7}{actions:>9}" in cost.table()
    assert chunk.programs[0].executed_flops > event.programs[0].executed_flops
    with pytest.raises(UserError, match=r"latents\) exceed config\.model\.max_latents"):
        decoding_cost.inspect_unified_mode(config, "v5p:2x2x1", history=99)
