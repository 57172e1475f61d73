"""Sweeps: which runs there are, what their commands are, how they are compared, and that a stopped sweep goes on."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from training_setup import subprocess_environment

from configs import base, ocbench_staircase
from wallwm_jax.console import UserError
from wallwm_jax.evaluation import sweeps
from wallwm_jax.evaluation.statistics import mean_interval
from wallwm_jax.sweep import shell_lines

SHIPPED = (
    "muon_adamw.py:rates",
    "muon_adamw.py:seeds",
    "view_attention.py",
    "latent_ties.py:runs/vlm,runs/towers",
    "window_kinds.py",
    "long_tail.py:runs/heldout",
    "long_tail.py:all:runs/heldout",
)


def small(**changes):
    settings = {"config": "c.py", "arms": {"a 1": {"optim.lr": 1e-3}, "b 2": {"optim.lr": 2e-3}}, "seeds": (0, 1)}
    return sweeps.Sweep(**{**settings, **changes})


def write_run(out, run, losses, report=None):
    """A finished run as its commands leave it."""
    directory = out / run.directory
    (directory / "train").mkdir(parents=True)
    lines = [json.dumps({"step": step, "loss": float(loss)}) for step, loss in enumerate(losses)]
    (directory / "train" / "metrics.jsonl").write_text("\n".join(lines))
    if report is not None:
        (directory / "report").mkdir()
        (directory / "report" / "report.json").write_text(json.dumps(report))
    (directory / "done.json").write_text("[]")


def test_every_arm_runs_with_every_seed_seed_by_seed():
    runs = sweeps.plan(small())
    assert [(run.arm, run.seed) for run in runs] == [("a 1", 0), ("b 2", 0), ("a 1", 1), ("b 2", 1)]
    assert len({run.directory for run in runs}) == 4


def test_the_commands_of_a_run_train_evaluate_and_report_on_one_store(tmp_path):
    sweep = small(overrides={"train.steps": 7}, evaluate=("--episodes=0",))
    train, evaluate, report = sweeps.commands(sweep, sweeps.plan(sweep)[3], tmp_path, "the store")
    assert train[0] == "wallwm_jax.train" and "--resume" in train
    assert {"--config=c.py", "--config.train.steps=7", "--config.optim.lr=0.002", "--config.seed=1"} <= set(train)
    assert evaluate[0] == "wallwm_jax.evaluate" and evaluate[-1] == "--episodes=0"
    assert report[0] == "wallwm_jax.evaluation.report" and "--store=the store" in report
    line = shell_lines(sweep, tmp_path, "the store")[3]
    assert line.count("python -m") == 3 and "'--store=the store'" in line and line.endswith("done.json")


def test_a_launch_script_gets_all_of_a_run_under_its_name(tmp_path):
    sweep = small()
    plain = shell_lines(sweep, tmp_path, "the store")
    lines = shell_lines(sweep, tmp_path, "the store", "bash launch/local.sh up --name={name} --dry-run")
    for line, run, alone in zip(lines, sweeps.plan(sweep), plain, strict=True):
        words = shlex.split(line)
        name = {"a 1": "a-1", "b 2": "b-2"}[run.arm] + f"-seed-{run.seed}"
        assert words[:6] == ["bash", "launch/local.sh", "up", f"--name={name}", "--dry-run", "--"]
        assert words[6:] == ["bash", "-c", alone]
    printed = subprocess.run(
        shlex.split(lines[0]), cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True
    ).stdout
    assert "wallwm_jax.train" in printed and "done.json" in printed and printed.count("--name") == 0


def test_the_final_loss_is_the_mean_of_the_last_twentieth():
    losses = np.arange(100.0, 0.0, -1.0)
    assert sweeps.smoothed(losses)[-1] == np.mean([5, 4, 3, 2, 1])
    assert sweeps.smoothed(losses)[0] == 100.0


def test_steps_to_reach_is_the_first_step_not_above_the_references_end():
    slow, fast = np.linspace(2.0, 1.005, 101), np.linspace(2.0, 0.0, 101)
    assert sweeps.steps_to_reach(slow, slow) == 101
    assert sweeps.steps_to_reach(fast, slow) == 52  # where its mean of five passes 1.0249
    assert sweeps.steps_to_reach(slow, fast) is None


def test_runs_are_compared_seed_by_seed_with_intervals(tmp_path):
    sweep = small(reference="b 2")
    for run in sweeps.plan(sweep):
        end = {"a 1": 0.0, "b 2": 1.005}[run.arm]
        write_run(tmp_path, run, np.linspace(2.0, end, 101) + run.seed)
    results = sweeps.collect(sweep, tmp_path)
    row = results.arms["a 1"]
    assert row["steps to b 2's final loss"]["values"] == [52, 52]
    less = row["below b 2's, seed by seed"]
    assert less["mean"] == pytest.approx(0.9849) and less["high"] - less["low"] == pytest.approx(0.0, abs=1e-9)
    assert set(results.arms["b 2"]) == {"final loss"}  # the reference is not held against itself
    assert row["final loss"]["values"] == pytest.approx([0.04, 1.04])
    assert row["final loss"]["mean"] == pytest.approx(0.54)
    assert row["final loss"]["high"] - row["final loss"]["mean"] == pytest.approx(12.706 * 0.5, rel=1e-3)
    assert results.finished == results.planned == 4
    assert "| a 1 | 0.54 [" in results.table()
    assert results.picture().startswith(b"\x89PNG")


def test_success_rates_of_the_seeds_are_pooled(tmp_path):
    sweep = small(evaluate=())
    for run in sweeps.plan(sweep)[:3]:
        rate = {"rate": 0.25 if run.seed else 0.75, "episodes": 20, "low": 0, "high": 1}
        report = {
            "open_loop": {"model": 0.2, "baselines": {"x": 0.4, "y": 0.8}},
            "success": {"trained": {"subtask": rate}},
        }
        write_run(tmp_path, run, np.ones(20), report)
    results = sweeps.collect(sweep, tmp_path)
    pooled = results.arms["a 1"]["subtasks achieved"]
    assert (pooled["rate"], pooled["episodes"]) == (0.5, 40) and 0.35 < pooled["low"] < 0.36
    assert results.arms["b 2"]["times the better baseline"]["values"] == [0.5]
    assert (results.finished, results.planned) == (3, 4)


def test_figures_of_a_measure_are_collected_by_name(tmp_path):
    sweep = small(measure="the.module")
    train, measure = sweeps.commands(sweep, sweeps.plan(sweep)[0], tmp_path, "the store")
    assert measure == ["the.module", train[2].removeprefix("--").replace("workdir", "--workdir"), "--store=the store",
                       f"--out={tmp_path / 'a-1' / 'seed-0' / 'figures.json'}"]  # fmt: skip
    for run in sweeps.plan(sweep):
        write_run(tmp_path, run, np.ones(20))
        found = {"events": 3, "figures": {"gap closed": 0.5 + run.seed}}
        (tmp_path / run.directory / "figures.json").write_text(json.dumps(found))
    results = sweeps.collect(sweep, tmp_path)
    assert (
        results.arms["b 2"]["gap closed"]["values"] == [0.5, 1.5] and results.arms["b 2"]["gap closed"]["mean"] == 1.0
    )


def test_errors_are_paired_event_by_event_over_the_seeds_that_both_arms_have(tmp_path):
    sweep = small(measure="the.module", measure_store="another", paired_with="b 2")
    assert sweeps.commands(sweep, sweeps.plan(sweep)[0], tmp_path, "the store")[1][2] == "--store=another"
    episodes, harder = ["x", "x", "y", "z"], np.array([0.0, 1.0, 2.0, 3.0])
    for run in sweeps.plan(sweep)[:3]:  # the second seed has one arm
        write_run(tmp_path, run, np.ones(20))
        values = harder + (0.5 if run.arm == "b 2" else [0.4, 0.4, 0.3, 0.1])
        errors = {"windows": [0, 1, 4, 7], "episodes": episodes, "values": [*values]}
        found = {"figures": {"error": values.mean()}, "paired": {"error": errors}}
        (tmp_path / run.directory / "figures.json").write_text(json.dumps(found))
    results = sweeps.collect(sweep, tmp_path)
    assert set(results.pairs) == {"a 1"}
    pair = results.pairs["a 1"]["error"]
    assert pair["difference"] == pytest.approx(np.mean([0.1, 0.1, 0.2, 0.4]))
    assert pair["low"] == pytest.approx(0.1) and pair["high"] == pytest.approx(0.4)  # three episodes, hardness apart
    assert results.table().splitlines()[-1] == "| a 1 | +0.2000 [+0.1000, +0.4000] |"
    found["paired"]["error"]["windows"] = [0, 1, 4, 8]
    (tmp_path / sweeps.plan(sweep)[0].directory / "figures.json").write_text(json.dumps(found))
    with pytest.raises(UserError, match="measured on different events"):
        sweeps.collect(sweep, tmp_path)


def test_a_sweep_pairs_arms_that_it_measures():
    with pytest.raises(UserError, match="'c 3' is none of the arms"):
        small(paired_with="c 3")
    with pytest.raises(UserError, match="measure="):
        small(paired_with="b 2")


def test_the_arms_of_the_window_kinds_see_as_many_latents():
    sweep = sweeps.load_sweep("configs/sweeps/window_kinds.py")
    assert len(sweep.arms) == 6
    filled = {"event": 33.3, "fixed": 34.3, "random": 33.3}
    for knobs in sweep.arms.values():
        settings = {**sweep.overrides, **knobs}
        seen = settings["train.steps"] * filled[settings["data.window_kind"]]
        assert seen == pytest.approx(240 * 33.3, rel=2e-3)


def test_a_loss_that_some_seed_never_reaches_has_no_mean(tmp_path):
    sweep = small(reference="b 2")
    for run in sweeps.plan(sweep):
        write_run(tmp_path, run, np.linspace(2.0, 1.5 if run.arm == "a 1" and run.seed else 1.0, 40))
    results = sweeps.collect(sweep, tmp_path)
    assert results.arms["a 1"]["steps to b 2's final loss"]["mean"] is None
    assert "reached by 1 of 2" in results.table()
    json.dumps(results.to_json(), allow_nan=False)


def test_mean_and_interval_of_known_values():
    assert mean_interval([3.0]) == (3.0, None, None)
    mean, low, high = mean_interval([1.0, 2.0, 3.0])
    assert mean == 2.0 and high - 2.0 == pytest.approx(4.3027 / np.sqrt(3), rel=1e-4) and 2.0 - low == high - 2.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": {}}, "at least one arm"),
        ({"reference": "c"}, "none of the arms a 1, b 2"),
        ({"arms": {"a 1": {}, "a-1": {}}}, "rename one"),
    ],
)
def test_a_sweep_that_cannot_be_run_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        small(**changes)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_sweeps_change_knobs_that_exist_to_values_of_their_kind(name):
    sweep = sweeps.load_sweep(f"configs/sweeps/{name}")
    for arm in sweep.arms.values():
        for knob, value in {**sweep.overrides, **arm}.items():
            section, leaf = knob.split(".")
            assert isinstance(value, type(base.get_config()[section][leaf])), knob


def test_the_flat_control_of_latents_differs_from_its_arm_in_the_entries_alone_and_is_as_much_work():
    arms = sweeps.load_sweep("configs/sweeps/latent_ties.py").arms
    (entries,) = set(arms["all, flat"].items()) - set(arms["all"].items())
    vlm = ocbench_staircase.get_config().vlm
    assert entries[0] == "vlm.entry_depths" and len(set(entries[1][1:])) == 1
    work = [sum(vlm.language.depth - depth for depth in depths) for depths in (entries[1], vlm.entry_depths)]
    assert work[0] == work[1] and len(entries[1]) == len(vlm.entry_depths)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("configs/sweeps/none.py", "does not exist"),
        ("configs/sweeps/muon_adamw.py", "missing a required argument"),
        ("configs/sweeps/muon_adamw.py:speed", "the part is rates or seeds"),
        ("configs/base.py", "has no get_sweep"),
    ],
)
def test_a_wrong_sweep_file_is_an_error_that_names_the_fix(path, message):
    with pytest.raises(UserError, match=message):
        sweeps.load_sweep(path)


@pytest.mark.extended
def test_a_sweep_runs_goes_on_and_says_what_failed(clustered_store, tmp_path):
    """The command with two real arms, one of which cannot train; called again it makes only what is missing."""
    (tmp_path / "config.py").write_text(
        "from training_setup import training_config\n\n"
        f"def get_config():\n    return training_config({str(clustered_store)!r})\n"
    )
    (tmp_path / "sweep.py").write_text(
        "from wallwm_jax.evaluation.sweeps import Sweep\n\n"
        "def get_sweep():\n"
        f"    return Sweep({str(tmp_path / 'config.py')!r}, {{'good': {{}}, 'bad': {{'train.log_every': 0}}}})\n"
    )
    command = [sys.executable, "-m", "wallwm_jax.sweep", str(tmp_path / "sweep.py"), f"--store={clustered_store}"]
    command.append(f"--out={tmp_path / 'out'}")
    first = subprocess.run(command, env=subprocess_environment(), capture_output=True, text=True, timeout=300)
    assert first.returncode == 1
    assert "failed: bad/seed-0: wallwm_jax.train ended with code 2: error: train.log_every=0" in first.stderr
    assert "| 1 of 2 runs | final loss |" in first.stdout
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["finished"] == 1 and results["arms"]["good"]["final loss"]["mean"] > 0
    assert (tmp_path / "out" / "results.png").stat().st_size > 1000

    (tmp_path / "out" / "good" / "seed-0" / "done.json").write_text("[]")
    again = subprocess.run(command, env=subprocess_environment(), capture_output=True, text=True, timeout=300)
    assert again.returncode == 2 and "was made by other commands" in again.stderr
