"""Evaluation: intervals and errors by hand, baselines and metrics of the open loop, rules of closed-loop episodes."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from ml_collections import ConfigDict

from wallwm_jax.console import UserError
from wallwm_jax.data.clusters import cluster_store, load_clusters
from wallwm_jax.data.event_store import BadRecord, open_store
from wallwm_jax.evaluation import closed_loop, environments, event_errors, expert_spread, statistics
from wallwm_jax.evaluation.actors import EventActor
from wallwm_jax.evaluation.closed_loop import EpisodeResult, Film
from wallwm_jax.evaluation.environments import Rules, Situation, SubtaskResult, Trial
from wallwm_jax.evaluation.open_loop import evaluate_open_loop
from wallwm_jax.events.actions import relative_actions, valid_dimensions
from wallwm_jax.events.planning_text import Plan
from wallwm_jax.inference.event_mode import EventPlan
from wallwm_jax.models.codecs import get_codec

# ---------------------------------------------------------------- statistics


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [(8, 10, 0.4902, 0.9433), (0, 8, 0.0, 0.3244), (8, 8, 0.6756, 1.0), (50, 100, 0.4038, 0.5962)],
)
def test_wilson_intervals_match_published_values(successes, trials, low, high):
    rate = statistics.success_rate(successes, trials)
    assert rate.rate == successes / trials and rate.episodes == trials
    assert (rate.low, rate.high) == pytest.approx((low, high), abs=1e-4)


def test_no_trials_say_nothing_and_impossible_counts_are_refused():
    assert statistics.success_rate(0, 0).to_json() == {"rate": 0.0, "low": 0.0, "high": 1.0, "episodes": 0}
    with pytest.raises(ValueError, match="3 successes among 2 trials"):
        statistics.success_rate(3, 2)


def test_psnr_of_a_constant_difference():
    black = np.zeros((4, 4, 3), np.uint8)
    assert statistics.psnr(black + 255, black) == 0.0
    assert statistics.psnr(black + 51, black) == pytest.approx(20 * np.log10(5))
    assert statistics.psnr(black, black) == 99.0


def test_physical_errors_are_millimetres_and_degrees():
    turned = np.eye(4)
    turned[:2, :2] = [[0, -1], [1, 0]]  # 90 degrees about z
    turned[:3, 3] = [0.003, 0.004, 0.0]
    poses = np.stack([np.eye(4), turned])[:, None]
    still = np.tile(np.eye(4), (2, 1, 1))[:, None]
    moved, valid = relative_actions(poses, np.array([[0.0], [1.0]]), np.eye(4)[None])
    held, _ = relative_actions(still, np.zeros((2, 1)), np.eye(4)[None])
    error = statistics.physical_error(moved, held, valid)
    assert error.translation_mm == pytest.approx(2.5)  # mean of 0 and 5
    assert error.rotation_degrees == pytest.approx(45.0)
    assert error.gripper == pytest.approx(0.5)


# ---------------------------------------------------------------- open loop


@pytest.fixture(scope="module")
def store(small_store, tmp_path_factory):
    path = tmp_path_factory.mktemp("clustered") / "store"
    shutil.copytree(small_store, path)
    cluster_store(path, scale=1.0)
    return open_store(path, "heldout")


class Oracle:
    """Stands in for event mode: answers with the recorded event, `offset` metres too far along x."""

    def __init__(self, store, offset=0.0, seconds=None):
        self.store, self.stats, self.offset, self.seconds = store, store.stats, offset, seconds
        self.batch_size = 4
        self.config = SimpleNamespace(model=SimpleNamespace(duration_quantiles=(0.1, 0.5, 0.9)))
        self.codec = get_codec(store.meta["codec"])

    def _record(self, request):
        fits = [
            record
            for record in map(self.store.read, range(len(self.store)))
            if record.kind == "event"
            and np.array_equal(record.state, request.state)
            and self.store.caption(record.caption_id) == request.caption
        ]
        return fits[0]

    def plan(self, requests, *, seeds, video=False):
        plans = []
        for request in requests:
            record = self._record(request)
            actions = record.actions.copy()
            actions[:, 0] += self.offset
            actions = actions[: round(request.duration_s * 10)]
            latents = {view: self.codec.encode(record.video(view)) for view in record.frames}
            plans.append(EventPlan(actions, request.duration_s, latents if video else None, 17))
        return plans

    def durations(self, requests):
        seconds = [self._record(request).duration_s if self.seconds is None else self.seconds for request in requests]
        return np.array(seconds)[:, None] * [0.5, 1.0, 2.0]

    def decode(self, plan):
        decoded = {view: (self.codec.decode(latents) + 1) * 127.5 for view, latents in plan.latents.items()}
        return {view: np.clip(video + 0.5, 0, 255).astype(np.uint8) for view, video in decoded.items()}


def test_a_perfect_prediction_has_no_error_and_a_shifted_one_exactly_its_shift(store):
    perfect = evaluate_open_loop(Oracle(store), store, levels=["subtask", "action"], limit=12).to_json()
    assert perfect["windows"] == 12 and perfect["model"] == 0.0
    assert perfect["model_predicted_duration"] < 0.02  # true durations are not snapped to frames
    assert perfect["final_frame_psnr"]["model"] > 60 > perfect["final_frame_psnr"]["copy_first_frame"]
    assert perfect["duration"]["mean_absolute_error_s"] < 1e-6 and perfect["duration"]["inside_outer_quantiles"] == 1.0
    shifted = evaluate_open_loop(Oracle(store, 0.02), store, levels=["subtask", "action"], limit=12).to_json()
    assert shifted["physical"]["model"]["translation_mm"] == pytest.approx(20.0, rel=1e-4)
    _, scale = store.stats.action.affine()
    assert shifted["model"] == pytest.approx(0.02 / scale[0] / 10, rel=1e-4)  # one of ten valid dimensions
    assert shifted["baselines"] == perfect["baselines"]


def test_baselines_are_the_observed_pose_and_the_cluster_mean(store):
    result = evaluate_open_loop(Oracle(store), store, levels=["action"], limit=1000)
    chosen = np.flatnonzero((store.index["kind"] == 0) & (store.index["level"] == 2))
    assert len(result.rows) == len(chosen) and {row["level"] for row in result.rows} == {"action"}
    valid, clusters = valid_dimensions(1), load_clusters(store.path)
    still, mean = [], []
    for window in chosen:
        record = store.read(int(window))
        hold = np.zeros_like(record.actions)
        hold[:, [3, 7]], hold[:, 9] = 1.0, record.state[9]
        cluster = clusters.mean_actions(int(store.index[window]["cluster_vl"]), record.num_actions)
        true = store.stats.normalize_actions(record.actions)
        for errors, actions in ((still, hold), (mean, cluster)):
            errors.append(np.abs(store.stats.normalize_actions(actions) - true)[:, valid].mean())
    summary = result.to_json()
    assert summary["baselines"] == pytest.approx({"hold_still": np.mean(still), "cluster_mean": np.mean(mean)})
    assert sum(row["windows"] for row in summary["by_verb"].values()) == len(chosen)


def test_errors_on_events_are_those_of_the_open_loop_by_level_and_family(store):
    oracle = Oracle(store, 0.02)
    oracle.config.data = ConfigDict(dict(levels={"subtask": 0.5, "action": 0.5}, window_kind="event"))
    errors = event_errors.measure(oracle, store, windows=1000)
    rows = evaluate_open_loop(oracle, store, levels=["subtask", "action"], limit=1000).rows
    assert len(errors) == len(rows) == (store.index["kind"] == 0).sum()
    figures = event_errors.summarize(errors)["figures"]
    assert set(figures) == {"action error", "action error, subtask", "action error, action"}
    assert figures["action error"] == pytest.approx(np.mean([row["model"]["error"] for row in rows]))
    assert {error.family for error in errors} == {"synthetic/squares"}
    assert len(event_errors.measure(oracle, store, windows=3)) == 3


def test_families_are_apart_and_paired_with_their_episodes():
    events = (("a", "hanoi", 0.1), ("a", "hanoi", 0.3), ("b", "block", 0.4))
    errors = [
        event_errors.EventError(window, name, family, "action", value)
        for window, (name, family, value) in enumerate(events)
    ]
    found = event_errors.summarize(errors)
    figures = {"action error": 0.8 / 3, "action error, block": 0.4, "action error, hanoi": 0.2}
    assert found["figures"] == pytest.approx(figures)
    assert found["paired"]["action error, hanoi"] == {"windows": [0, 1], "episodes": ["a", "a"], "values": [0.1, 0.3]}
    assert event_errors.family_of("ocbench/hanoi-cpu-lite-single-task1-v0") == "hanoi"
    assert event_errors.family_of("ocbench-recovery/chamber-cpu-lite-easy-task1-v0") == "chamber"
    assert event_errors.family_of("metaworld/door-open") == "metaworld/door-open"


@pytest.mark.parametrize(
    ("kind", "caption", "instructed"),
    [("event", "own", False), ("event", "events", False), ("event", "instruction", True),
     ("fixed", "own", True), ("random", "events", False), ("fixed", "instruction", True)],
)  # fmt: skip
def test_a_model_is_told_what_it_learned_to_read(kind, caption, instructed):
    assert event_errors.told_instructions(ConfigDict({"window_kind": kind, "caption": caption})) == instructed


def test_a_prediction_that_is_too_short_is_held_to_the_end(store):
    short = evaluate_open_loop(Oracle(store, seconds=0.2), store, levels=["subtask"], limit=3).to_json()
    assert short["model"] == 0.0 < short["model_predicted_duration"]


def test_time_is_up_after_at_least_one_batch(store):
    mode = Oracle(store)
    result = evaluate_open_loop(mode, store, levels=["subtask", "action"], limit=100, out_of_time=lambda: True)
    assert 1 <= len(result.rows) <= mode.batch_size
    with pytest.raises(UserError, match="has no event windows of levels"):
        evaluate_open_loop(mode, store, levels=["segment"])


def test_a_record_that_cannot_be_read_is_left_out_and_named(store, monkeypatch):
    chosen = np.flatnonzero((store.index["kind"] == 0) & (store.index["level"] == 1))
    read = type(store).read

    def damaged(self, window):
        if window == chosen[0]:
            raise BadRecord(window, 5, "the checksum differs from the index")
        return read(self, window)

    mode = Oracle(store)
    monkeypatch.setattr(type(store), "read", damaged)
    mode._record = lambda request: next(
        record
        for record in (read(store, int(window)) for window in chosen)
        if np.array_equal(record.state, request.state)
    )
    result = evaluate_open_loop(mode, store, levels=["subtask"])
    assert len(result.rows) == len(chosen) - 1
    assert result.bad_records == [f"window {chosen[0]} of episode 5: the checksum differs from the index"]


# ---------------------------------------------------------------- closed loop: the rules, without a simulator


class Goals:
    """A world of numbered goals: command gripper 1 achieves the present one. Its planner names action, then retract."""

    views, clock_hz = ("front",), 10.0

    def __init__(self, goals=3):
        self.goals, self.done_goals, self.success, self.rendered = goals, 0, False, 0
        self.retracted = True

    def reset(self, seed):
        self.done_goals, self.success = 0, False
        return self.observe(render=True)

    def observe(self, *, render):
        self.rendered += render
        frames = {"front": np.full((2, 2, 3), self.done_goals, np.uint8)} if render else {}
        return SimpleNamespace(frames=frames, pose=np.eye(4)[None], gripper=np.zeros(1))

    def step(self, pose, gripper, *, render):
        if gripper[0] == 1.0:
            self.done_goals, self.retracted = self.done_goals + 1, False
        if gripper[0] == 0.5:
            self.retracted = True
        self.success = self.done_goals >= self.goals
        return self.observe(render=render), self.success, self.success


class GoalPlanner:
    instruction = "reach all goals"

    def __init__(self, env, durations):
        self.env = env

    def reset(self):
        pass

    def next_event(self, level):
        env, goal = self.env, self.env.done_goals
        if env.success:
            return None
        if level == "action" and not env.retracted:
            return self._event(f"retract from {goal - 1}", "retract", f"goal {goal - 1}", lambda: env.retracted)
        event = self._event(f"goal {goal}", "press", "all goals", lambda: env.done_goals > goal)
        if level == "subtask":
            return event
        return self._event(f"do {goal}", "press", f"goal {goal}", event.is_done)

    def _event(self, caption, verb, parent, is_done):
        return SimpleNamespace(caption=caption, verb=verb, parent_caption=parent, duration_s=0.5, is_done=is_done)


@pytest.fixture
def episode(monkeypatch):
    monkeypatch.setattr(environments, "ScriptedPlanner", GoalPlanner)

    def make(**rules):
        shown = {name: rules.pop(name) for name in ("film", "recent") if name in rules}
        return environments.Episode(Goals(), Trial("goals", 0), Rules(**rules), video_stride=2, **shown)

    return make


def act(episode, *grippers):
    return episode.play(np.tile(np.eye(4), (len(grippers), 1, 1, 1)), np.array(grippers, float)[:, None])


def test_each_achieved_subtask_counts_once_and_the_episode_ends_with_success(episode):
    now = episode()
    assert now.situation().caption == "goal 0"
    assert act(now, 0, 0).subtasks == ()
    second = act(now, 0, 1)
    assert second.caption == "goal 1" and second.subtasks == (SubtaskResult("goal 0", "press", True, 2, 4),)
    act(now, 1)
    end = act(now, 0, 1, 0, 0)  # stops at the step that succeeds
    assert end.over and end.success and end.steps == 7 and not end.frames
    assert [subtask.success for subtask in end.subtasks] == [True, True, True]


def test_a_subtask_that_outlasts_its_budget_fails_the_episode(episode):
    now = episode(patience=3.0)  # 3 x 0.5 s = 15 steps
    act(now, 1)
    assert not act(now, *[0] * 14).over
    end = act(now, 0)
    assert end.over and not end.success
    assert [(subtask.caption, subtask.success) for subtask in end.subtasks] == [("goal 0", True), ("goal 1", False)]


def test_the_step_limit_cuts_an_event(episode):
    now = episode(max_steps=10, patience=100.0)
    end = act(now, *[0] * 64)
    assert end.over and end.steps == 10 and end.subtasks[0].steps == 10


def test_actions_belong_to_their_subtask_and_finishing_ones_cost_no_new_one(episode):
    now = episode(level="action")
    assert now.situation().caption == "do 0"
    retract = act(now, 1)
    assert retract.caption == "retract from 0" and len(retract.subtasks) == 1
    following = act(now, 0.5)
    assert following.caption == "do 1" and [s.caption for s in following.subtasks] == ["goal 0"]
    stuck = act(now, 1)  # achieved, but the hand never comes away
    for _ in range(30):
        stuck = act(now, 0) if not stuck.over else stuck
    assert stuck.over and [subtask.success for subtask in stuck.subtasks] == [True, True]
    assert stuck.subtasks[1].steps == 15


def test_pictures_are_rendered_where_the_policy_looks_and_where_a_film_is_made(episode):
    now = episode()
    env = now._env
    before = env.rendered
    act(now, 0, 0, 0, 0)
    assert env.rendered == before + 1
    filmed = episode(film=True)
    assert len(act(filmed, 0, 0, 0, 0, 0).film["front"]) == 2  # steps 2 and 4
    assert len(act(filmed, 0, 0, 0).film["front"]) == 2  # steps 6 and 8
    remembering = episode(recent=2)
    assert len(act(remembering, *[0] * 8).film["front"]) == 2  # steps 6 and 8
    assert remembering._env.rendered == 1 + 2 + 1  # at the start, these, and where the policy looks


# ---------------------------------------------------------------- closed loop: groups, results, trials


class FakePool:
    """Episodes that end after `length` events; slot parity decides success."""

    def __init__(self, slots, length=2):
        self.slots, self.length, self.left, self.started = slots, length, {}, []

    def start(self, trials, *, level, film=(), recent=0):
        self.trials = trials
        self.left = {slot: self.length for slot in trials}
        self.started.append([trial.seed for trial in trials.values()])
        return {slot: self._situation(slot) for slot in trials}

    def play(self, commands):
        for slot, (poses, grippers) in commands.items():
            assert poses.shape == (3, 1, 4, 4) and grippers.shape == (3, 1)
            self.left[slot] -= 1
        return {slot: self._situation(slot, film={"front": [np.zeros((2, 2, 3), np.uint8)]}) for slot in commands}

    def end(self, slots):
        return {slot: dataclasses.replace(self._situation(slot), over=True) for slot in slots}

    def _situation(self, slot, film=None):
        over, won = self.left[slot] == 0, self.trials[slot].seed % 2 == 0
        results = (SubtaskResult("a", "press", True, 1, 3), SubtaskResult("b", "place", won, 1, 3)) if over else ()
        frames = {} if over else {"front": np.zeros((2, 2, 3), np.uint8)}
        steps = 3 * (self.length - self.left[slot])
        return Situation(
            frames, np.eye(4)[None], np.zeros(1), "next", "press", 0.3, over, over and won, results, steps, film or {}
        )


class FakeMode:
    def __init__(self):
        self.calls = []

    def plan(self, requests, *, seeds):
        self.calls.append([(request.caption, request.duration_s) for request in requests])
        return [EventPlan(np.zeros((3, 32), np.float32), 0.3, None, 5) for _ in requests]


def trials(count):
    return [Trial("switch-3x3", seed) for seed in range(count)]


def test_groups_move_in_lock_step_and_every_trial_is_run():
    pool, mode = FakePool(2), FakeMode()
    results, films = closed_loop.run_actor(pool, EventActor(mode), trials(5), label="test", films=1)
    assert pool.started == [[0, 1], [2, 3], [4]]
    assert [len(call) for call in mode.calls] == [2, 2, 2, 2, 1, 1] and mode.calls[0][0] == ("next", 0.3)
    assert [result.success for result in results] == [True, False, True, False, True]
    assert len(films) == 1 and films[0].captions == ["next"] * 3 and films[0].result is results[0]
    closed_loop.run_actor(pool, EventActor(mode, own_duration=True), trials(1), label="test")
    assert mode.calls[-1] == [("next", None)]


class FakePlanner:
    """Names "first", tries it again, then takes the task for done."""

    def __init__(self):
        self.told = []

    def plan(self, requests):
        self.told.append([(request.done, request.level, request.previous_frames is None) for request in requests])
        done = len(self.told) == 3
        return [Plan("" if done else "first", 0.5, done) for _ in requests]


def test_a_planner_names_the_events_and_ends_the_episode():
    """What it is told of the past is what it named itself, an event that it tries again once."""
    pool, mode, planner = FakePool(2, length=5), FakeMode(), FakePlanner()
    results, films = closed_loop.run_actor(pool, EventActor(mode, planner=planner), trials(2), label="test", films=1)
    assert planner.told == [[((), "subtask", True)] * 2] + [[(("first",), "subtask", False)] * 2] * 2
    assert mode.calls == [[("first", 0.5)] * 2] * 2
    assert [result.steps for result in results] == [6, 6] and not any(result.success for result in results)
    assert films[0].captions == ["next", "first", "first"]


def test_no_group_is_started_that_would_not_be_finished_in_time():
    pool = FakePool(2)
    results, _ = closed_loop.run_actor(pool, EventActor(FakeMode()), trials(6), label="test", deadline=0.0)
    assert len(results) == 2 and pool.started == [[0, 1]]


def test_summary_counts_subtasks_and_episodes():
    results = [
        EpisodeResult(trial, won, (SubtaskResult("a", "press", True, 1, 3), SubtaskResult("b", "place", won, 1, 3)), 6)
        for trial, won in zip(trials(4), (True, False, False, True))
    ]
    summary = closed_loop.summarize(results)
    assert summary["subtask"]["rate"] == 6 / 8 and summary["subtask"]["episodes"] == 8
    assert summary["episode"]["rate"] == 2 / 4 and summary["progress"] == 1.5
    assert summary["by_verb"] == {"press": [4, 4], "place": [2, 4]} and summary["by_family"] == {"switch": [6, 8]}


def test_the_best_film_is_the_success_with_most_subtasks():
    won = EpisodeResult(Trial("a", 0), True, (), 50)
    quick = dataclasses.replace(won, steps=30)
    lost = EpisodeResult(Trial("a", 0), False, (SubtaskResult("a", "press", True, 1, 3),), 10)
    films = [Film(lost), Film(won), Film(quick)]
    assert closed_loop.best_film(films) is films[2] and closed_loop.best_film([]) is None


def test_trials_take_environments_in_turn_and_avoid_recorded_seeds():
    drawn = closed_loop.held_out_trials(["a", "b"], 4, 9, lambda env, seed, number: seed + number, used={10})
    assert [(trial.env_id, trial.seed) for trial in drawn] == [("a", 9), ("b", 11), ("a", 12), ("b", 13)]


def test_typical_durations_are_medians_of_the_training_episodes(store):
    durations = closed_loop.typical_durations(store)
    lengths = [
        (span["end"] - span["start"]) / 10
        for episode in store.episodes
        if episode["split"] == "train"
        for span in episode["spans"]["action"]
        if span["verb"] == "reach"
    ]
    assert durations["action", "reach"] == np.median(lengths)


# ---------------------------------------------------------------- with the simulator


@pytest.fixture
def simulator():
    pytest.importorskip("ocbench")
    from wallwm_jax.sources.simulator import rendering

    try:
        rendering.check_rendering()
    except UserError as error:
        pytest.skip(str(error))


@pytest.mark.usefixtures("simulator")
def test_expert_commands_through_canonical_actions_succeed_and_episodes_judge_them(monkeypatch):
    from wallwm_jax.sources.simulator import expert
    from wallwm_jax.sources.simulator.ocbench_demos import attempt_seed, controller_factory
    from wallwm_jax.sources.simulator.ocbench_env import OCBenchEnv

    env_id = "block-cpu-lite-single-task1-v0"
    env = OCBenchEnv(env_id, ())
    trial = Trial(env_id, attempt_seed("block", 3, 0))
    for level in ("subtask", "action"):
        end = environments.replay_expert(env, trial, level)
        assert end.over and end.success and [subtask.success for subtask in end.subtasks] == [True]
    rollout = expert.roll_out(env, controller_factory(env_id), trial.seed, 1)
    with monkeypatch.context() as patched:  # where the expert itself fails there is nothing to replay
        patched.setattr(expert, "roll_out", lambda *_: dataclasses.replace(rollout, success=False))
        assert environments.replay_expert(env, trial, "subtask") is None
    episode = environments.Episode(env, trial, Rules(), video_stride=2)
    assert episode.situation().caption == expert.spans(rollout)["subtask"][0].caption
    assert episode.situation().instruction == expert.spans(rollout)["task"][0].caption
    given_up = environments.Episode(env, trial, Rules(), video_stride=2).end()
    assert given_up.over and not given_up.success and [subtask.success for subtask in given_up.subtasks] == [False]
    episode = environments.Episode(env, trial, Rules(), video_stride=2)
    end = episode.play(rollout.command_poses, rollout.command_grippers)
    assert end.over and end.success and end.subtasks[0].success and end.subtasks[0].events == 1


def test_the_spread_of_equal_trajectories_is_zero_and_of_a_stray_one_its_distance():
    still, moved = np.zeros((5, 3)), np.ones((8, 3))
    assert expert_spread.spread([still, np.zeros((9, 3)), np.zeros((2, 3))]) == [(0.0, 0.0)] * 3
    assert expert_spread.spread([still, still, moved, still])[2] == (1.0, 1.0)
    others, everything = expert_spread.spread([still, still, moved])[0]
    assert (others, everything) == (0.5, 0.0)  # the median of one still and one moved lies between


@pytest.mark.usefixtures("simulator")
def test_experts_spread_in_a_scene_although_nothing_but_their_chance_differs(store):
    errors = expert_spread.measure(["block-cpu-lite-single-task1-v0"], store.stats, scenes=1, runs=4, seed=1)
    assert {("subtask", "place"), ("action", "reach"), ("action", "carry")} <= errors.keys()
    assert all((rows[:, 0] >= rows[:, 1]).mean() > 0.7 for rows in errors.values())
    assert errors["action", "carry"][:, 0].mean() > 0.01


@pytest.mark.usefixtures("simulator")
@pytest.mark.parametrize("family", ["chamber", "switch", "block"])
def test_a_robot_that_holds_still_achieves_nothing(family):
    from wallwm_jax.sources.simulator.ocbench_demos import FAMILIES, attempt_seed
    from wallwm_jax.sources.simulator.ocbench_env import OCBenchEnv

    env_id = FAMILIES[family][0]
    env = OCBenchEnv(env_id, ())
    for level, number in itertools.product(("subtask", "action"), range(2)):
        trial = Trial(env_id, attempt_seed(env_id, 7, number))
        now = environments.Episode(env, trial, Rules(level), video_stride=2)
        situation = now.situation()
        while not situation.over:
            poses, grippers = (np.repeat(part[None], 10, 0) for part in (situation.pose, situation.gripper))
            situation = now.play(poses, grippers)
        assert not situation.success and not any(subtask.success for subtask in situation.subtasks), situation.subtasks
