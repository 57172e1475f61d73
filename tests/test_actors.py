"""Who acts in closed loop: what event and unified mode are told, and which settings do not go together."""

from __future__ import annotations

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import save_run

from wallwm_jax.console import UserError
from wallwm_jax.evaluation import closed_loop
from wallwm_jax.evaluation.actors import Acting, ChunkActor, EventActor, open_actor
from wallwm_jax.evaluation.environments import Situation, SubtaskResult, Trial
from wallwm_jax.inference.event_mode import EventPlan
from wallwm_jax.inference.latent_conditioner import LatentConditioner, check_alignment
from wallwm_jax.inference.unified_mode import Chunk, History
from wallwm_jax.models import language_pathway

CHUNK, STRIDE, PAST = 6, 2, 4


class Mode:
    """Unified mode without a model: the commands of a chunk say at which step of the episode they were planned."""

    chunk, stride, past_frames = CHUNK, STRIDE, PAST

    def __init__(self):
        self.requests, self.told, self.encoded, self.seeds = [], [], [], []

    def encode_text(self, text):
        self.encoded.append(text)
        return text

    def from_latents(self, latents):
        return "latents", tuple(latents.tolist())

    def plan_all(self, requests, conditionings, *, seeds):
        self.requests.append(requests)
        self.told.append(list(conditionings))
        self.seeds.append(list(seeds))
        return [self._chunk(request) for request in requests]

    def _chunk(self, request):
        poses = np.tile(np.eye(4), (CHUNK, 1, 1, 1))
        poses[:, 0, 0, 3] = request.pose[0, 0, 3] + np.arange(CHUNK)
        return Chunk(np.zeros((CHUNK, 32)), poses, np.zeros((CHUNK, 1)), None)


class Pool:
    """Episodes of so many control steps; pictures and poses say at which step they are, subtasks end every 8 steps."""

    def __init__(self, slots=2, steps=20):
        self.slots, self.steps = slots, steps

    def start(self, trials, *, level, film=(), recent=0):
        self.level, self.film, self.recent = level, film, recent
        self.at = dict.fromkeys(trials, 0)
        return {slot: self._situation(slot, 0) for slot in trials}

    def play(self, commands):
        return {slot: self._situation(slot, len(poses)) for slot, (poses, _) in commands.items()}

    def _situation(self, slot, played):
        first, self.at[slot] = self.at[slot], min(self.at[slot] + played, self.steps)
        now, over = self.at[slot], self.at[slot] == self.steps
        shown = [step for step in range(first + 1, now + 1) if step % STRIDE == 0]
        done = now // 8
        return Situation(
            frames={} if over else {"front": picture(now)},
            pose=placed(now)[None],
            gripper=np.zeros(1),
            caption=f"event {done}",
            over=over,
            subtasks=tuple(SubtaskResult(f"event {number}", "press", True, 1, 8) for number in range(done)),
            steps=now,
            film={"front": [picture(step) for step in (shown if slot in self.film else shown[-self.recent :])]},
            instruction=f"task {slot}",
        )


def picture(step):
    return np.full((2, 2, 3), step, np.uint8)


def placed(step):
    pose = np.eye(4)
    pose[0, 3] = step
    return pose


def trials(count):
    return [Trial("switch-3x3", 100 * seed) for seed in range(count)]


def seen(request):
    """Steps of the frames, of the commands' plans, of the pose; and the number of the chunk."""
    frames = request.frames["front"][:, 0, 0, 0].tolist()
    return frames, request.command_poses[:, 0, 0, 3].tolist(), request.pose[0, 0, 3], request.number


@pytest.mark.parametrize("films", [0, 1])
def test_a_chunk_sees_the_frames_and_commands_that_led_to_it(films):
    """Chunks of 6 steps, of which 4 are played; frames of every second step, the first one held before it."""
    pool, mode = Pool(), Mode()
    results, reels = closed_loop.run_actor(pool, ChunkActor(mode, execute=4), trials(3), label="test", films=films)
    assert pool.recent == 1 + PAST and pool.level == "subtask" and [result.steps for result in results] == [20] * 3
    first, second, third, fourth, fifth = (requests[0] for requests in mode.requests[:5])
    assert seen(first) == ([0] * 5, [], 0.0, 1)
    assert seen(second) == ([0, 0, 0, 2, 4], [0, 1, 2, 3], 4.0, 1)
    assert seen(third) == ([0, 2, 4, 6, 8], [0, 1, 2, 3, 4, 5, 6, 7], 8.0, 2)  # the chunk numbers count whole chunks
    assert seen(fourth) == ([4, 6, 8, 10, 12], [4, 5, 6, 7, 8, 9, 10, 11], 12.0, 3)
    assert seen(fifth)[3] == 3
    assert [len(requests) for requests in mode.requests] == [2] * 5 + [1] * 5
    assert mode.seeds[1] == [4, 104]
    assert [len(reel.frames["front"]) for reel in reels] == [11] * films
    assert [reel.captions for reel in reels] == [["event 0"] + ["task 0"] * 10] * films


def test_a_whole_chunk_is_played_where_nothing_else_is_said_and_no_late_group_is_begun():
    mode = Mode()
    results, _ = closed_loop.run_actor(Pool(), ChunkActor(mode), trials(6), label="test", deadline=0.0)
    assert [seen(requests[0])[2] for requests in mode.requests] == [0.0, 6.0, 12.0, 18.0] and len(results) == 2


def test_an_instruction_lasts_and_an_events_words_are_told_for_each_chunk():
    mode = Mode()
    closed_loop.run_actor(Pool(), ChunkActor(mode), trials(2), label="test")
    assert set(mode.encoded) == {"task 0", "task 1"} and mode.told == [["task 0", "task 1"]] * 4
    mode = Mode()
    closed_loop.run_actor(Pool(), ChunkActor(mode, "event"), trials(1), label="test")
    assert mode.told == [["event 0"], ["event 0"], ["event 1"], ["event 2"]]
    assert list(dict.fromkeys(mode.encoded)) == ["event 0", "event 1", "event 2"]


class Conditioner:
    """Latents that count the questions."""

    def __init__(self):
        self.asked = []

    def latents(self, requests):
        self.asked += requests
        return [np.full(3, len(self.asked) + number) for number in range(len(requests))]


def test_latents_are_asked_for_with_what_has_been_achieved_and_what_was_seen_where_the_last_subtask_began():
    mode, conditioner = Mode(), Conditioner()
    closed_loop.run_actor(Pool(1), ChunkActor(mode, conditioner), trials(1), label="test")
    assert [told[0][0] for told in mode.told] == ["latents"] * 4
    asked = conditioner.asked
    assert [request.done for request in asked] == [(), (), ("event 0",), ("event 0", "event 1")]
    assert [int(request.frames["front"][0, 0, 0]) for request in asked] == [0, 6, 12, 18]
    before = [request.previous_frames for request in asked]
    assert before[:2] == [None, None] and [int(frames["front"][0, 0, 0]) for frames in before[2:]] == [0, 12]
    assert {request.instruction for request in asked} == {"task 0"} and asked[0].level == "subtask"


def test_steps_together_make_the_history_that_steps_one_by_one_make():
    one, together = History(Mode()), History(Mode())

    def observation(step):
        return SimpleNamespace(frames={"front": picture(step)}, pose=placed(step)[None], gripper=np.zeros(1))

    for history in (one, together):
        history.observe(observation(0))
    step = 0
    for count in (4, 12, 2):
        poses, grippers = np.stack([placed(step + i)[None] for i in range(count)]), np.zeros((count, 1))
        for i, command in enumerate(zip(poses, grippers), step + 1):
            one.observe(observation(i), command)
        shown = [picture(i) for i in range(step + 2, step + count + 1, 2)]
        together.follow(poses, grippers, {"front": shown[-1 - PAST :]}, observation(step + count))
        step += count
        left, right = one.request(), together.request()
        assert seen(left) == seen(right)
    with pytest.raises(UserError, match="4 control steps came with 1 frames; the history needs 2"):
        together.follow(np.zeros((4, 1, 4, 4)), np.zeros((4, 1)), {"front": [picture(0)]}, observation(0))
    with pytest.raises(UserError, match="an episode begins with an observation"):
        History(Mode()).follow(np.zeros((2, 1, 4, 4)), np.zeros((2, 1)), {"front": [picture(0)]}, observation(0))


class Events:
    """Event mode without a model; its twin has other parameters."""

    def __init__(self, params=None):
        self.params, self.seconds = params, []

    def with_params(self, params):
        twin = Events(params)
        twin.seconds = self.seconds
        return twin

    def plan(self, requests, *, seeds):
        self.seconds.append([request.duration_s for request in requests])
        return [EventPlan(np.zeros((3, 32), np.float32), 0.3, None, 5) for _ in requests]


def test_the_untrained_twin_takes_the_planners_durations():
    mode = Events()
    actor = EventActor(mode, own_duration=True)
    for acting in (actor, actor.untrained("random")):
        acting.begin({})
        acting.act({0: Situation({}, np.eye(4)[None], np.zeros(1), "go", "press", 0.5)}, {0: 1})
    assert mode.seconds == [[None], [0.5]] and actor.mode.params is None


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"mode": "dream"}, "mode 'dream' is none of event and unified"),
        ({"level": "task"}, "level 'task' is neither"),
        ({"text": "event"}, "--text=event is for --mode=unified"),
        ({"execute": 8}, "--execute=8 is for --mode=unified"),
        ({"mode": "unified", "planner": "runs/vlm"}, "--planner=runs/vlm is for --mode=event"),
        ({"mode": "unified", "own_duration": True}, "--own_duration is for --mode=event"),
        ({"mode": "unified", "text": "runs/s", "level": "action"}, "take --level=subtask"),
    ],
)
def test_settings_that_do_not_go_together_are_errors(settings, words):
    with pytest.raises(UserError, match=words):
        Acting(**settings).check()
    Acting(mode="unified", text="event", level="action", execute=8).check()


@pytest.mark.parametrize("execute", [CHUNK + 2, 3, -2])
def test_a_part_of_a_chunk_ends_where_it_can_look(execute):
    with pytest.raises(UserError, match="give a multiple of 2 up to 6, or 0 for all"):
        ChunkActor(Mode(), execute=execute)


def test_what_is_aligned_to_another_text_space_is_refused(history_store):
    """Frozen encoders are stored in bfloat16; what differs by its rounding is the same encoder."""
    from history_windows import configured

    config, leaf = configured(history_store), jnp.asarray([1.0, 0.3001, -2.0])
    room, width = language_pathway.text_shape(config)

    def aligned(text, store=None, **about):
        said = dict(text=text, stage="vlm_text", shape=(room, width), text_weights="") | about
        engine = SimpleNamespace(params={"text": {"table": leaf}} if store is None else {}, store=store or {})
        check_alignment(SimpleNamespace(**said), SimpleNamespace(engine=engine, config=config), "runs/s")

    aligned({"table": leaf.astype(jnp.bfloat16).astype(jnp.float32)})
    for other in ({"table": leaf + 0.5}, {"table": leaf[:2]}, {"tables": leaf}, None):
        with pytest.raises(UserError, match=r"'runs/s' was aligned to the text encoder of another model; .* vlm_text"):
            aligned(other)
    for shape in ((room + 1, width), (room, width + 2)):
        with pytest.raises(UserError, match=rf"gives up to {shape[0]} features of width {shape[1]} .* up to {room} of"):
            aligned({"table": leaf}, shape=shape)
    stored = {"text_weights": {"folder": "weights", "fingerprint": "a1"}}
    aligned(None, stored, text_weights="a1")
    with pytest.raises(UserError, match="another model"):
        aligned(None, stored, text_weights="b2")


def test_a_run_without_what_is_asked_of_it_is_an_error(history_store, tmp_path):
    from history_windows import configured

    save_run(tmp_path / "run", history_store, configured(history_store))
    with pytest.raises(UserError, match=r"stage 'joint' .* needs a run of stage 'staircase' or 'vlm_text'"):
        LatentConditioner.from_checkpoint(tmp_path / "run")
    event = SimpleNamespace(config=SimpleNamespace(data=SimpleNamespace(window_kind="event")), store={})
    with pytest.raises(UserError, match=r"unified mode needs a model trained with data\.window_kind"):
        open_actor(SimpleNamespace(event_mode=event, unified_mode=None), Acting(mode="unified"))
