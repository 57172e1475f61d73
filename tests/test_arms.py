"""Arms: what they are called, that all run the same trials, that a stop loses nothing, and what the table says."""

from __future__ import annotations

import json

import numpy as np
import pytest

from wallwm_jax.console import UserError
from wallwm_jax.evaluation import arms, statistics
from wallwm_jax.evaluation.actors import Acting, Move
from wallwm_jax.evaluation.arms import Arm, Records
from wallwm_jax.evaluation.closed_loop import EpisodeResult
from wallwm_jax.evaluation.environments import Situation, SubtaskResult, Trial

# Paired statistics


@pytest.mark.parametrize(("only_first", "only_second", "p_value"), [(1, 8, 20 / 512), (0, 5, 2 / 32), (3, 3, 1.0)])
def test_mcnemar_is_the_binomial_of_the_trials_that_differ(only_first, only_second, p_value):
    both, neither = [True] * 4, [False] * 7
    first = both + neither + [True] * only_first + [False] * only_second
    second = both + neither + [False] * only_first + [True] * only_second
    found = statistics.mcnemar(first, second)
    assert (found.only_first, found.only_second) == (only_first, only_second)
    assert found.p_value == pytest.approx(p_value)
    assert statistics.mcnemar(both, both).p_value == 1.0
    with pytest.raises(ValueError, match="4 outcomes beside 7"):
        statistics.mcnemar(both, neither)


def test_the_paired_bootstrap_has_the_interval_of_the_mean_difference():
    """Alike episodes leave no doubt; a fair coin over 400 episodes has the normal interval, 0.5 +- 1.96 x 0.025."""
    sure = statistics.paired_rate_difference([(3, 4)] * 20, [(1, 4)] * 20)
    assert (sure.difference, sure.low, sure.high) == (0.5, 0.5, 0.5)
    coin = statistics.paired_rate_difference([(1, 1)] * 400, [(1, 1), (0, 1)] * 200)
    assert coin.difference == 0.5
    assert (coin.low, coin.high) == pytest.approx((0.451, 0.549), abs=0.004)
    together = statistics.paired_rate_difference([(1, 1), (0, 1)] * 50, [(1, 1), (0, 1)] * 50)
    assert (together.low, together.high) == (0.0, 0.0)  # the same episodes are drawn of both


def test_the_bootstrap_weighs_episodes_by_their_attempts_and_one_episode_has_no_interval():
    found = statistics.paired_rate_difference([(4, 4), (0, 1)], [(0, 4), (0, 1)])
    assert found.difference == pytest.approx(4 / 5)
    assert statistics.paired_rate_difference([(1, 2)], [(0, 2)]) == statistics.Difference(0.5, None, None)
    with pytest.raises(ValueError, match="0 episodes beside 0"):
        statistics.paired_rate_difference([], [])


# Arms by name


def test_an_arm_is_a_name_and_how_it_acts():
    assert arms.parse_arm("event:run=runs/a") == Arm("event", "runs/a", Acting())
    arm = arms.parse_arm("unified, latents:run=runs/a,mode=unified,text=runs/s,execute=16")
    assert arm.acting == Acting(mode="unified", text="runs/s", execute=16) and arm.file == "unified-latents.json"
    assert arms.parse_arm("own:run=a,level=action,own_duration").acting == Acting(level="action", own_duration=True)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("run=a", "write name:run=DIR"),
        ("x:mode=unified", "write name:run=DIR"),
        ("x:run=a,speed=3", "unknown 'speed'"),
        ("x:run=a,mode=unified,execute=some", "--arm=x.*'some'"),
        ("x:run=a,own_duration=perhaps", "'perhaps' is not a value"),
        ("x:run=a,text=event", "--text=event is for --mode=unified"),
    ],
)
def test_an_arm_that_cannot_be_is_an_error_that_shows_the_form(text, words):
    with pytest.raises(UserError, match=words):
        arms.parse_arm(text)


# Acting on the same trials


class Pool:
    """Every episode is one move and tries two subtasks; gripper 1 achieves both, 0.5 the first."""

    slots = 2

    def start(self, trials, *, level, film=(), recent=0):
        self.trials = trials
        return {slot: Situation({}, np.eye(4)[None], np.zeros(1)) for slot in trials}

    def play(self, commands):
        return {slot: self._end(float(grippers[0, 0])) for slot, (_, grippers) in commands.items()}

    def _end(self, gripper):
        won = SubtaskResult("a", "press", gripper >= 0.5, 1, 9), SubtaskResult("b", "press", gripper == 1.0, 1, 9)
        return Situation({}, np.eye(4)[None], np.zeros(1), over=True, success=gripper == 1.0, subtasks=won, steps=9)


class Doer:
    """Closes the gripper as `grip(seed)` says, and logs what it does; may be stopped after so many groups."""

    level, recent = "subtask", 0

    def __init__(self, name, log, grip=lambda seed: 1.0):
        self.name, self.log, self.grip, self.left = name, log, grip, 1000

    def begin(self, situations):
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1

    def act(self, situations, seeds):
        self.log.append((self.name, sorted(seeds.values())))
        poses = np.eye(4)[None, None]
        return {slot: Move("go", poses, np.full((1, 1), self.grip(seed))) for slot, seed in seeds.items()}

    def follow(self, moves, situations):
        pass


def trials(count):
    return [Trial("switch-3x3", seed) for seed in range(count)]


def records(directory, names=("left", "right"), **settings):
    return Records(directory, {name: {"file": f"{name}.json", "settings": {"run": name, **settings}} for name in names})


def doers(log, **grips):
    return {name: Doer(name, log, grip) for name, grip in grips.items()}


def test_all_arms_run_a_group_before_any_runs_the_next_and_a_killed_comparison_goes_on(tmp_path):
    log: list = []
    actors = doers(log, left=lambda seed: 1.0, right=lambda seed: 0.5)
    actors["right"].left = 1
    with pytest.raises(KeyboardInterrupt):
        arms.run_arms(actors, Pool(), trials(5), records(tmp_path), deadline=np.inf)
    assert log == [("left", [0, 1]), ("right", [0, 1]), ("left", [2, 3])]
    assert {name: len(found) for name, found in records(tmp_path).paired(trials(5)).items()} == {"left": 2, "right": 2}
    log.clear()
    actors["right"].left = 1000
    again = records(tmp_path)
    assert arms.run_arms(actors, Pool(), trials(5), again, deadline=np.inf)
    assert log == [("right", [2, 3]), ("left", [4]), ("right", [4])]
    paired = again.paired(trials(5))
    assert [result.trial.seed for result in paired["right"]] == [0, 1, 2, 3, 4]
    assert {result.success for result in paired["left"]} == {True} != {result.success for result in paired["right"]}
    assert records(tmp_path).paired(trials(5)) == paired  # as written
    log.clear()
    assert arms.run_arms(actors, Pool(), trials(5), again, deadline=np.inf) and not log


def test_no_group_is_begun_after_the_deadline_and_more_episodes_and_arms_may_follow(tmp_path):
    log: list = []
    kept = records(tmp_path)
    actors = doers(log, left=lambda seed: 1.0, right=lambda seed: 1.0)
    assert not arms.run_arms(actors, Pool(), trials(2), kept, deadline=0.0) and not log
    assert arms.compare(kept.paired(trials(2)))["episodes"] == 0
    assert arms.run_arms(actors, Pool(), trials(2), kept, deadline=np.inf)
    log.clear()
    more = records(tmp_path, ("left", "right", "new"))
    actors |= doers(log, new=lambda seed: 1.0)
    assert arms.run_arms(actors, Pool(), trials(3), more, deadline=np.inf)
    assert log == [("new", [0, 1]), ("left", [2]), ("right", [2]), ("new", [2])]


def test_trials_of_other_settings_are_refused(tmp_path):
    made = records(tmp_path, step=7)
    arms.run_arms(doers([], left=lambda seed: 1.0, right=lambda seed: 1.0), Pool(), trials(2), made, deadline=np.inf)
    with pytest.raises(UserError, match=r"left\.json' were made with another step; give another --out"):
        records(tmp_path, step=8)
    assert json.loads((tmp_path / "left.json").read_text())["settings"] == {"run": "left", "step": 7}
    with pytest.raises(UserError, match="do not differ in letters and digits"):
        Records(tmp_path, {name: {"file": "x.json", "settings": {}} for name in ("x", "X!")})


def test_the_table_has_rates_and_paired_differences():
    """Ten episodes of two subtasks: the first arm wins all, the second half of the subtasks and no episode."""

    def result(trial, *won):
        subtasks = tuple(SubtaskResult("a", "press", one, 1, 9) for one in won)
        return EpisodeResult(trial, all(won), subtasks, 9)

    paired = {
        "all": [result(trial, True, True) for trial in trials(10)],
        "half": [result(trial, True, False) for trial in trials(10)],
    }
    found = arms.compare(paired)
    assert found["episodes"] == 10 and found["arms"]["half"]["subtask"]["rate"] == 0.5
    assert found["pairs"] == [
        {
            "first": "all",
            "second": "half",
            "subtask": {"difference": 0.5, "low": 0.5, "high": 0.5},
            "episode": {"only_first": 10, "only_second": 0, "p_value": pytest.approx(2 / 1024)},
        }
    ]
    text = arms.table(found)
    assert "| half | 50 % [30, 70] of 20 | 1.00 | 0 % [0, 28] of 10 |" in text
    assert "| all - half | +50 points [+50, +50] | 10, 0, p = 0.002 |" in text
    assert arms.table(arms.compare({name: results[:1] for name, results in paired.items()})).count("+50 points |") == 1
