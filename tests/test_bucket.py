"""Runs in a bucket: what their addresses may be, that nothing is lost, and that others read them there."""

import json
import re
import signal
from pathlib import Path

import jax
import pytest
from bucket import emulated_bucket, locked_store, when_written
from etils import epath
from fault_runs import Run, curve, finished, write_config
from training_setup import STEPS, training_config, use_prepared_steps

from wallwm_jax import checkpoints
from wallwm_jax.config import require_directory
from wallwm_jax.console import UserError, write_text
from wallwm_jax.data.event_store import open_store
from wallwm_jax.paths import file_sizes, open_path, open_run, use_compile_cache
from wallwm_jax.train import run
from wallwm_jax.training.checkpoint import load_params, load_start, prepare_workdir
from wallwm_jax.training.integrity import damage, delete_unfinished, seal
from wallwm_jax.training.mirror import Mirror
from wallwm_jax.training.telemetry import read_metrics
from wallwm_jax.training.train_state import flatten


@pytest.fixture(scope="module")
def bucket():
    with emulated_bucket() as address:
        yield address


# Addresses


def test_a_path_on_a_disk_stays_what_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert open_path("runs/a") == tmp_path / "runs" / "a"
    assert open_path(tmp_path) == tmp_path
    (tmp_path / "d" / "e").mkdir(parents=True)
    (tmp_path / "d" / "e" / "f").write_bytes(b"12345")
    assert file_sizes(tmp_path / "d") == {"e/f": 5}
    assert file_sizes(tmp_path / "nothing") == {}


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("s3://runs/a", "only gs://BUCKET/... can be"),
        ("gs://", "names no bucket"),
        ("GS://runs/a", "only gs://BUCKET"),
        ("gs:/runs/a", "only gs://BUCKET"),
        (Path("gs://runs/a"), "only gs://BUCKET"),
    ],
)
def test_of_object_stores_only_buckets_are_taken(address, message):
    with pytest.raises(UserError, match=message):
        open_path(address)


def test_without_the_extra_a_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs the extra gcs: pip install 'wallwm_jax\[gcs\]'"):
        prepare_workdir("gs://runs/a", resume=False, overwrite=False)


def test_event_stores_stay_on_disks():
    for read in (open_store, lambda path: require_directory(path, "store", "build it")):
        with pytest.raises(UserError, match=r"store 'gs://runs/store' is an address .* mount the bucket \(gcsfuse\)"):
            read("gs://runs/store")
    with pytest.raises(UserError, match=r"store 'gs:/runs/store' is an address"):
        open_store("gs:/runs/store")


def test_a_bucket_that_is_not_there_is_said_before_anything_is_computed(bucket):
    with pytest.raises(UserError, match=r"cannot use 'gs://elsewhere/a' .*: the bucket does not exist"):
        prepare_workdir("gs://elsewhere/a", resume=False, overwrite=False)
    with pytest.raises(UserError, match="workdir 'gs://elsewhere/a' does not exist"):
        open_run("gs://elsewhere/a")
    with pytest.raises(UserError, match=r"'gs://runs/nothing' is not the workdir of a training run"):
        load_params(f"{bucket}/nothing")


def test_without_credentials_the_line_says_which_are_needed(bucket):
    with locked_store(), pytest.raises(UserError, match=r"service account.* roles/storage\.objectUser"):
        prepare_workdir("gs://runs/a", resume=False, overwrite=False)


def test_a_workdir_in_a_bucket_that_holds_a_run_needs_a_word(bucket):
    workdir = prepare_workdir(f"{bucket}/word", resume=False, overwrite=False)
    assert prepare_workdir(f"{bucket}/word", resume=False, overwrite=False) == workdir  # looking has left nothing
    for name in ("metrics.jsonl", "checkpoints/5/manifest.json", "notes.txt"):
        (workdir / name).write_text("x")
    with pytest.raises(UserError, match=r"workdir 'gs://runs/word' exists; add --resume"):
        prepare_workdir(workdir, resume=False, overwrite=False)
    prepare_workdir(workdir, resume=False, overwrite=True)
    assert file_sizes(workdir) == {"notes.txt": 1}


def test_tensorflow_beside_us_changes_nothing(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)  # all is installed
    assert type(epath.Path("gs://runs/a")._backend).__name__ == "_FileSystemSpecBackend"


def test_what_is_compiled_is_kept_in_the_bucket_but_not_the_caches_of_xla(bucket, monkeypatch, tmp_path):
    """XLA would open gs:// as a file of a GPU's autotuning, and fail."""
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_enable_xla_caches")
    before = {name: getattr(jax.config, name) for name in names}
    try:
        use_compile_cache(tmp_path)
        assert [getattr(jax.config, name) for name in names] == [f"{tmp_path}/compile_cache", before[names[1]]]
        use_compile_cache(f"{bucket}/compiled")
        assert [getattr(jax.config, name) for name in names] == ["gs://runs/compiled/compile_cache", "none"]
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


# Checkpoints in a bucket that fails now and then


def test_a_bucket_that_cannot_be_read_now_is_not_a_damaged_checkpoint(bucket):
    step = open_path(f"{bucket}/reading/checkpoints/2")
    (step / "ema" / "a").write_text("12345")
    assert damage(step) == "manifest.json is missing"
    with pytest.raises(FileNotFoundError, match="none of state"):
        seal(step.parent, 4, ["state"])
    seal(step.parent, 2, ["ema"])
    assert damage(step) == ""
    with locked_store(), pytest.raises(UserError, match=r"cannot use 'gs://runs/reading/checkpoints/2'"):
        damage(step)
    (step / "manifest.json").write_bytes(b"\xff{")
    assert damage(step) == "manifest.json is torn"


def test_what_cannot_be_deleted_after_a_failed_save_ends_no_run(bucket, capsys):
    with locked_store():
        delete_unfinished(epath.Path(f"{bucket}/a/checkpoints"))
    assert "warning: cannot use 'gs://runs/a/checkpoints'" in capsys.readouterr().err


# Files that grow


def test_what_is_appended_is_copied_and_another_machine_goes_on_with_it(bucket):
    workdir = open_path(f"{bucket}/mirror")
    with Mirror(workdir) as first:
        metrics = first.local / "metrics.jsonl"
        metrics.write_text("1\n")
        write_text(first.local / "goodput.json", "{}")
        (first.local / "tensorboard").mkdir()
        (first.local / "tensorboard" / "events.1").write_bytes(b"\0\1")
        assert first.upload()
        assert file_sizes(workdir) == {"metrics.jsonl": 2, "goodput.json": 2, "tensorboard/events.1": 2}
        with metrics.open("a") as file:
            file.write("2\n")
    assert (workdir / "metrics.jsonl").read_text() == "1\n2\n"  # copied at the end
    assert not first.local.exists()
    (workdir / "goodput.json").write_text("{'another': 1}")
    with Mirror(workdir, fetch=["metrics.jsonl", "run_card.json"]) as second:
        assert (second.local / "metrics.jsonl").read_text() == "1\n2\n"
        assert [path.name for path in second.local.iterdir()] == ["metrics.jsonl"]
    assert (workdir / "goodput.json").read_text() == "{'another': 1}"  # what has not changed is not written again


def test_a_store_that_fails_ends_no_run_and_its_files_stay(bucket, capsys):
    mirror = Mirror(open_path(f"{bucket}/failing"))
    with locked_store(), mirror:
        (mirror.local / "metrics.jsonl").write_text("1\n")
        assert not mirror.upload() and not mirror.upload()
    assert (mirror.local / "metrics.jsonl").read_text() == "1\n"
    warning = capsys.readouterr().err
    assert warning.count("warning: cannot use 'gs://runs/failing'") == 1
    assert warning.endswith(f"not all reports of the run are in the bucket; they are in {mirror.local}\n")


def test_no_error_of_a_library_ends_a_run_for_its_reports(bucket, capsys, monkeypatch):
    mirror = Mirror(open_path(f"{bucket}/strange"))
    (mirror.local / "metrics.jsonl").write_text("1\n")

    def fail(*_, **__):
        raise RuntimeError("strange")

    with monkeypatch.context() as patch:
        patch.setattr("gcsfs.GCSFileSystem._call", fail)
        assert not mirror.upload()
    assert "warning: cannot use 'gs://runs/strange' (strange)" in capsys.readouterr().err
    assert mirror.upload()


def test_on_a_disk_the_workdir_itself_is_written_to(tmp_path):
    with Mirror(open_path(tmp_path), fetch=["metrics.jsonl"]) as mirror:
        (mirror.local / "metrics.jsonl").write_text("1\n")
        assert mirror.upload()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


# Whole runs


@pytest.mark.extended
def test_a_damaged_checkpoint_in_a_bucket_is_set_aside_and_the_run_goes_on(
    bucket, clustered_store, tmp_path, monkeypatch, capfd
):
    use_prepared_steps(monkeypatch, clustered_store)
    config, workdir = training_config(clustered_store), open_path(f"{bucket}/damaged")
    run(config, tmp_path)
    run(config, str(workdir))
    assert curve(workdir) == curve(tmp_path)
    found = checkpoints.report(str(workdir))
    assert [(one["step"], one["whole"]) for one in found["checkpoints"]] == [(2, True), (4, True), (STEPS, True)]

    sizes = file_sizes(workdir / "checkpoints" / str(STEPS) / "state")
    largest = workdir / "checkpoints" / str(STEPS) / "state" / max(sizes, key=sizes.get)
    largest.write_bytes(largest.read_bytes()[:100])
    (workdir / "checkpoints" / "4" / "commit_success.txt").unlink()  # as if killed inside that save
    assert [one["whole"] for one in checkpoints.report(str(workdir))["checkpoints"]] == [True, False]
    run(config, str(workdir), resume=True)
    assert re.search(r"checkpoint of step 6 is damaged \(state/\S+ has 100 of \d+ bytes\)", capfd.readouterr().err)
    found = checkpoints.report(str(workdir))
    assert [one["step"] for one in found["checkpoints"]] == [2, 4, STEPS]
    assert list(found["not_used"]) == ["6.damaged"]
    assert curve(workdir) == curve(tmp_path)


@pytest.mark.fault
def test_a_run_killed_in_a_bucket_goes_on_bit_for_bit_on_another_machine(bucket, clustered_store, tmp_path):
    """SIGKILL inside the save of step 4; nothing but the bucket is left to go on from."""
    config, workdir = write_config(tmp_path, clustered_store, steps=STEPS, save_every=2), f"{bucket}/killed"
    finished(config, tmp_path / "run")

    first = Run(config, workdir)
    when_written("killed/checkpoints/4/", first.kill)
    assert [code for code, _ in first.end()] == [-signal.SIGKILL]
    steps = [line["step"] for line in read_metrics(workdir)]
    assert steps == list(range(len(steps))) and len(steps) >= 4  # training goes on while a thread saves

    (output,) = finished(config, workdir, "--resume")
    assert "restore step 2" in output
    assert curve(workdir) == curve(tmp_path / "run")
    goodput = json.loads((epath.Path(workdir) / "goodput.json").read_text())
    assert len(goodput["starts"]) == 2
    ours, theirs = load_params(workdir), load_params(tmp_path / "run")
    assert {path: leaf.tobytes() for path, leaf in flatten(ours.params).items()} == {
        path: leaf.tobytes() for path, leaf in flatten(theirs.params).items()
    }
    assert load_start(workdir)[1] == f"step {STEPS}"
    assert any(name.startswith("tensorboard/") for name in file_sizes(open_path(workdir)))
