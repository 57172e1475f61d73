"""What a run tells of itself: where its time went, its MFU, traces on request, the compiled step, the run card."""

import json
import os
import signal
import subprocess
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_setup import traced_steps

from configs import wan5b
from wallwm_jax.parallel.chips import CHIPS, peak_flops
from wallwm_jax.training import goodput as goodput_module
from wallwm_jax.training import run_card, telemetry
from wallwm_jax.training.goodput import Goodput
from wallwm_jax.training.profiling import Profiler
from wallwm_jax.training.telemetry import Telemetry, ideal_step_s, read_metrics


class Clock:
    """Stands in for the module `time`: seconds pass when the test says so."""

    def __init__(self):
        self.now = 1000.0

    def sleep(self, seconds):
        self.now += seconds

    def monotonic(self):
        return self.now

    time = perf_counter = monotonic


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(goodput_module, "time", clock)
    monkeypatch.setattr(telemetry, "time", clock)
    return clock


# Goodput


def test_every_second_belongs_to_one_span(tmp_path, clock):
    since = clock.now
    clock.sleep(4)
    goodput = Goodput(tmp_path, since=since)
    clock.sleep(1)
    with goodput.span("compile"):
        clock.sleep(10)
    goodput.begin(0, useful_s=0.0, lost_steps=0)
    with goodput.span("step"):
        for _ in range(3):
            with goodput.span("data"):
                clock.sleep(1)
            clock.sleep(20)
            goodput.step_done(20.0)
        with pytest.raises(OSError), goodput.span("checkpoint"):
            clock.sleep(2)
            raise OSError
    found = goodput.totals()
    assert found["spans"] == {"init": 4, "other": 1, "compile": 10, "step": 60, "data": 3, "checkpoint": 2}
    assert (found["wall_s"], found["useful_s"], found["goodput"]) == (80, 60, 60 / 80)


def test_goodput_spans_all_starts_and_counts_no_step_twice(tmp_path, clock, capsys):
    """Killed 35 s into its first start, after 3 steps of 10 s; up again 25 s later, at the checkpoint of step 1."""
    first = Goodput(tmp_path)
    first.begin(0, useful_s=0.0, lost_steps=0)
    with first.span("init"):
        clock.sleep(5)
    with first.span("step"):
        for _ in range(3):
            clock.sleep(10)
            first.step_done(10.0)
    clock.sleep(25)

    second = Goodput(tmp_path)
    with second.span("restore"):
        clock.sleep(8)
    second.begin(1, useful_s=10.0, lost_steps=2)
    with second.span("step"):
        for _ in range(5):
            clock.sleep(10)
            second.step_done(10.0)
    clock.sleep(2)
    second.close()

    written = json.loads((tmp_path / "goodput.json").read_text())
    spans = {"init": 5, "other": 2, "step": 80, "restore": 8}
    assert {name: written["spans"][name] for name in spans} == spans
    assert [start["first_step"] for start in written["starts"]] == [0, 1]
    assert (written["wall_s"], written["down_s"], written["lost_steps"]) == (120, 25, 2)
    assert (written["useful_s"], written["goodput"]) == (60, 0.5)
    assert capsys.readouterr().out == (
        "    goodput 50.0 % of 0:02:00 in 2 starts, 2 steps repeated: "
        "step 66.7 %, down 20.8 %, restore 6.7 %, init 4.2 %, other 1.7 %\n"
    )


def test_a_damaged_file_costs_the_history_and_not_the_run(tmp_path, clock):
    for name, content in (("torn", '{"starts": [{"beg'), ("empty", ""), ("strange", "[]")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "goodput.json").write_text(content)
        assert len(Goodput(tmp_path / name).totals()["starts"]) == 1


def test_a_start_that_found_nothing_to_do_leaves_no_trace(tmp_path, capsys):
    Goodput(tmp_path).close()
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr().out == ""


# MFU


def test_mfu_is_on_every_line_of_a_known_device(tmp_path, clock, capsys):
    """Steps that would take 0.2 s at the peak take 1 s, of which 0.1 s is waiting."""
    goodput = Goodput(tmp_path)
    lines = Telemetry(tmp_path, goodput, first_step=0, last_step=2, log_every=1, ideal_step_s=0.2)
    lines.start()
    for step in range(2):
        lines.record(step, {"loss": np.float32(1), "grad_norm": np.float32(1), "events": np.int32(5)}, 0.1)
        clock.sleep(1.0)
    lines.flush()
    lines.close()
    assert [line["mfu"] for line in read_metrics(tmp_path)] == pytest.approx([0.2, 0.2])
    assert "1000 ms/step  MFU 20.0 %  input wait 10.0 %  goodput 90.0 %  left 0:01" in capsys.readouterr().out


def test_peaks_are_of_one_device_by_the_name_jax_gives_it():
    assert peak_flops("TPU v5 lite") == CHIPS["v5e"].flops == 197e12
    assert peak_flops("TPU v5p") == peak_flops("TPU v5") == CHIPS["v5p"].flops
    assert peak_flops("TPU7x") == CHIPS["tpu7x"].flops
    assert peak_flops("NVIDIA H100 80GB HBM3") == peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("cpu") is None
    assert peak_flops("NVIDIA H100 80GB HBM3 MIG 1g.10gb") is None


def test_the_ideal_step_is_what_preflight_calls_needed_at_the_peak_of_all_devices():
    """docs/preflight.md: 145.8 TFLOP per chip, 128 rows on 128 chips of 459 TFLOP/s."""
    config = wan5b.get_config("video").unlock()
    config.data.update(views=("left", "right", "top"), rows=128)
    pod = SimpleNamespace(devices=np.full((128,), SimpleNamespace(device_kind="TPU v5")), size=128)
    assert ideal_step_s(config, pod) == pytest.approx(145.8 / 459, rel=5e-4)
    here = SimpleNamespace(devices=np.array(jax.devices()[:1]), size=1)
    assert ideal_step_s(config, here) is None


# Profiles


@pytest.mark.parametrize(
    ("asked_by", "steps"), [("touch", [12, 13, 14]), ("echo 2", [12, 13]), ("kill -USR1", [12, 13, 14])]
)
def test_a_run_is_traced_on_request(tmp_path, asked_by, steps):
    """Asked while step 11 runs; six steps from 10 on."""
    request, state = tmp_path / "profile", jnp.ones(8)
    function = jax.jit(lambda state, batch: (state + batch, {"loss": jnp.sum(state)}))
    with Profiler(tmp_path) as profiler:
        step = profiler.around(function, 10)
        for number in range(10, 16):
            state, _ = step(state, 1.0)
            if number == 11:
                if asked_by == "kill -USR1":
                    os.kill(os.getpid(), signal.SIGUSR1)
                else:
                    request.write_text("2\n" if asked_by == "echo 2" else "")
    assert not request.exists()
    assert [path.name for path in (tmp_path / "profiles").iterdir()] == ["step_12"]
    assert traced_steps(tmp_path / "profiles" / "step_12") == steps
    assert (tmp_path / "profiles" / "step_12" / "memory_0.prof").stat().st_size > 0
    assert float(state[0]) == 7.0  # a trace changes no result


def test_a_trace_ends_with_its_run(tmp_path):
    (tmp_path / "profile").write_text("100")
    before = signal.getsignal(signal.SIGUSR1)
    with Profiler(tmp_path) as profiler:
        profiler.around(lambda state, batch: (state, {}), 0)(0, 0)
    assert traced_steps(tmp_path / "profiles" / "step_0") == [0]
    assert signal.getsignal(signal.SIGUSR1) == before


@pytest.mark.parametrize("content", ["many", "0", "-1", "1.5"])
def test_a_request_that_is_no_number_is_refused_and_training_goes_on(tmp_path, content, capsys):
    (tmp_path / "profile").write_text(content)
    with Profiler(tmp_path) as profiler:
        assert profiler.around(lambda state, batch: (state + 1, {}), 0)(0, 0) == (1, {})
    assert f"held '{content}'; write a number of steps, or nothing" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_only_the_first_process_answers_to_the_file(tmp_path):
    (tmp_path / "profile").write_text("")
    with Profiler(tmp_path, watches=False) as profiler:
        profiler.around(lambda state, batch: (state, {}), 0)(0, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["profile"]


# Run card


def test_a_card_says_what_changed_between_two_starts(tmp_path, monkeypatch):
    config = wan5b.get_config("video")
    mesh = SimpleNamespace(devices=np.array(jax.devices()[:1]), size=1, shape={"fsdp": 1, "tensor": 1})
    state = SimpleNamespace(trainable={"video": {"kernel": np.zeros((30, 40))}}, frozen={"text": np.zeros(7)})

    def start(step):
        return run_card.add_start(tmp_path, config, mesh, state, store="77060b4a", first_step=step)

    monkeypatch.delenv("XLA_FLAGS", raising=False)
    printed = start(0)
    assert "training 1,200 parameters (video 1,200); 7 frozen" in printed and "changed" not in printed
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--a=1")
    printed = start(500)
    assert "LIBTPU_INIT_ARGS=--a=1" in printed and "changed since the last start: flags\n" in printed
    starts = json.loads((tmp_path / "run_card.json").read_text())["starts"]
    assert [(start["step"], start["flags"]) for start in starts] == [(0, {}), (500, {"LIBTPU_INIT_ARGS": "--a=1"})]


def test_the_card_has_the_torus_where_devices_tell_it():
    """Two slices of 2x4 chips; one chip of two cores; a CPU."""
    chips = [SimpleNamespace(coords=[x, y, 0], slice_index=i) for i in range(2) for x in range(2) for y in range(4)]
    assert run_card._torus(chips) == {"slices": 2, "extents": [2, 4, 1]}
    assert run_card._torus([SimpleNamespace(coords=[3, 0, 1])] * 2) == {"slices": 1, "extents": [1, 1, 1]}
    assert run_card._torus(jax.devices()) == {}


def test_the_card_names_the_commit_of_the_checkout_that_tracks_the_code(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(
            ["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True, text=True
        ).stdout.strip()

    file = tmp_path / "code.py"
    file.write_text("one")
    assert run_card._code(file) is None  # no checkout
    git("init")
    assert run_card._code(file) is None  # installed into somebody else's checkout
    git("add", "code.py")
    git("commit", "-m", "one")
    commit = git("rev-parse", "HEAD")
    (tmp_path / "notes.txt").write_text("untracked")
    assert run_card._code(file) == {"commit": commit, "dirty": False}
    file.write_text("two")
    assert run_card._code(file) == {"commit": commit, "dirty": True}
