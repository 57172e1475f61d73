r"""How good the watchdog is: calibrates it on recorded windows, and measures it on perturbed episodes of OCBench.

    python -m wallwm_jax.evaluation.watchdog --workdir=runs/quickstart/train --store=runs/quickstart/store \
        --episodes=12 --out=runs/quickstart/watchdog.json

Needs the calibration of `python -m wallwm_jax.serve --calibrate`. The expert acts, the model predicts each event from
the observation at its start, and the watchdog compares. In each episode one event of at least a whole latent goes
wrong, and the episode ends there; the events before it are what must not set off the alarm. Perturbations, in turn:

    held         arm and gripper are told to stay as they were when the event began
    misled       the arm goes the mirrored way
    open         the gripper is forced open from the event's start; an event in which the expert has it closed
    displaced    halfway, an object is moved by 10 cm; families with loose objects

Recall, precision and false alarms with Wilson 95 % intervals, recall also by perturbation. `--level` chooses the
events. With `--mode=unified` a chunk stands in an event's place everywhere above: the model predicts one chunk after
another from the past and the task's instruction, and `--level` only says by which events' verbs chunks are named.
"""

from __future__ import annotations

import functools
import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import flags

from wallwm_jax.console import UserError, progress, run_command, write_text
from wallwm_jax.data.event_store import EventStore, WindowRecord, open_store
from wallwm_jax.evaluation.open_loop import recorded_chunk_request, recorded_request
from wallwm_jax.evaluation.statistics import success_rate
from wallwm_jax.events.schema import Span
from wallwm_jax.events.windows import GROUP, KINDS
from wallwm_jax.inference.event_mode import EventMode, EventRequest
from wallwm_jax.inference.policy import MODES, Policy, request
from wallwm_jax.inference.unified_mode import ChunkRequest, History, UnifiedMode
from wallwm_jax.paths import open_run, use_compile_cache
from wallwm_jax.serving.watchdog import CALIBRATION_FILE, Calibration, EventWatch, load_calibrations

if TYPE_CHECKING:
    from wallwm_jax.sources.simulator.ocbench_env import OCBenchEnv

PERTURBATIONS = ("held", "misled", "open", "displaced")

_DISPLACEMENT = 0.1  # metres
_DRAWS = 8  # episodes tried until one can be perturbed as asked
_CLOSED = 0.5  # closing fraction from which a gripper holds something
_WINDOWS = {"event": "event", "unified": "history"}  # what each mode decodes


def calibrate(
    policy: Policy, store: EventStore, *, mode: str = "event", events: int, false_alarm_rate: float
) -> Calibration:
    """Finds the threshold on recorded, successful events or chunks of `store`, usually its heldout split.

    Args:
      policy: of the run to watch over.
      store: with event windows; in mode "unified" with those with history, whose words say what to do.
      mode: of decoding.
      events: how many of the windows, evenly spread over the split.
      false_alarm_rate: share of these that may set off the alarm.

    Raises:
      UserError: no such windows, or a rate outside (0, 1).
    """
    if not 0.0 < false_alarm_rate < 1.0:
        raise UserError(f"a false alarm rate of {false_alarm_rate} is not between 0 and 1")
    kind = _WINDOWS[mode]
    chosen = np.flatnonzero(store.index["kind"] == KINDS.index(kind))
    if not len(chosen):
        raise UserError(
            f"split {store.split!r} of {str(store.path)!r} has no {kind} windows, on which mode {mode!r} is "
            "calibrated; build it with such --windows, or choose another --mode"
        )
    chosen = chosen[np.unique(np.linspace(0, len(chosen) - 1, events).round().astype(int))]
    worst: list[float] = []
    distances: list[float] = []
    for window in progress(chosen, total=len(chosen), unit=mode, label="calibrate"):
        record = store.read(int(window))
        watch = _watch_recorded(policy, store, record, mode)
        videos = {view: store.video(record, view, policy.event_mode.codec) for view in record.frames}
        stride, now = int(store.meta["video_stride"]), GROUP * record.history
        for step in range(stride, min(watch.steps, record.num_actions - record.past_actions) + 1, stride):
            judged = watch.observe(step, {view: video[now + step // stride] for view, video in videos.items()})
        if judged.worst is not None:
            worst.append(judged.worst)
            distances += list(watch.distances())
    if not worst:
        raise UserError(f"none of {len(chosen)} {kind} windows of {str(store.path)!r} has a predicted change")
    return Calibration(
        step=policy.step,
        threshold=float(np.quantile(worst, 1.0 - false_alarm_rate)),
        false_alarm_rate=false_alarm_rate,
        spread=float(np.mean(distances)),
        events=len(worst),
        store=store.path.name,
    )


def _watch_recorded(policy: Policy, store: EventStore, record: WindowRecord, mode: str) -> EventWatch:
    if mode == "event":
        return predict(policy.event_mode, recorded_request(store, record), seed=record.index)
    assert policy.unified_mode is not None  # or the mode would not be served
    words = store.caption(record.caption_id)
    return predict_chunk(policy.unified_mode, recorded_chunk_request(record), words, seed=record.index)


def predict(mode: EventMode, asked: EventRequest, *, seed: int) -> EventWatch:
    """Predicts an event and watches over it."""
    asked = mode.encode(asked)
    (plan,) = mode.plan([asked], seeds=[seed], video=True)
    return EventWatch(
        mode,
        {view: frame[None] for view, frame in asked.frames.items()},
        plan.latents,
        steps=len(plan.actions),
        seconds=plan.duration_s,
        quantiles_s=mode.durations([asked])[0],
    )


def predict_chunk(mode: UnifiedMode, asked: ChunkRequest, instruction: str, *, seed: int) -> EventWatch:
    """Predicts a chunk and watches over it."""
    chunk = mode.plan(asked, mode.encode_text(instruction), seed=seed, video=True)
    assert chunk.latents is not None  # asked for
    return EventWatch(
        mode.engine,
        asked.frames,
        {view: film[mode.history :] for view, film in chunk.latents.items()},
        steps=mode.chunk,
        seconds=mode.chunk / float(mode.engine.store["action_hz"]),
    )


@dataclass(frozen=True)
class Watched:
    """One event, or chunk, that was watched: how it was perturbed ("" not at all), its largest score, and the alarm."""

    env_id: str
    verb: str
    perturbation: str
    steps: int
    score: float
    alarm: bool


def watch_episode(
    env: OCBenchEnv,
    blind: OCBenchEnv,
    policy: Policy,
    calibration: Calibration,
    perturbation: str,
    *,
    mode: str,
    seed: int,
    level: str,
) -> list[Watched]:
    """The expert acts an episode until one event of `level`, or one chunk, drawn by the seed, is perturbed.

    It is recorded in `blind`, the same environment without views, and played in `env`. Empty where the expert fails or
    no event can be perturbed so.
    """
    from wallwm_jax.sources.simulator import expert
    from wallwm_jax.sources.simulator.ocbench_demos import controller_factory

    rollout = expert.roll_out(blind, controller_factory(env.env_id), seed, 1)
    engine, unified = policy.event_mode, policy.unified_mode if mode == "unified" else None
    stride, least = int(engine.store["video_stride"]), int(engine.store["actions_per_latent"])
    spans = expert.spans(rollout) if rollout.success else {level: []}
    events = _chunks(spans, level, unified.chunk) if unified else spans[level]
    fit = [
        number
        for number, event in enumerate(events)
        if least <= event.length <= (unified.chunk if unified else engine.max_actions)
        and (perturbation != "open" or (rollout.command_grippers[event.start : event.end] > _CLOSED).mean() > 0.5)
    ]
    if not fit or (perturbation == "displaced" and not _loose_objects(blind)):
        return []
    chosen = int(np.random.default_rng(seed).choice(fit))
    observation, watched = env.reset(seed), []
    history = History(unified) if unified else None
    if history:
        history.observe(observation)
    for number, event in enumerate(events[: chosen + 1]):
        wrong = perturbation if number == chosen else ""
        stretch = slice(event.start, event.end)
        poses, grippers = rollout.command_poses[stretch].copy(), rollout.command_grippers[stretch].copy()
        if wrong == "held":
            poses[:], grippers[:] = observation.pose, observation.gripper
        if wrong == "misled":
            poses[..., :2, 3] = 2.0 * observation.pose[:, :2, 3] - poses[..., :2, 3]
        if wrong == "open":
            grippers[:] = 0.0
        noise = seed % 2**31 + number
        if unified and history:
            watch = predict_chunk(unified, history.request(), event.caption, seed=noise)
        else:
            watch = predict(engine, request(observation, event.caption, event.length / env.clock_hz), seed=noise)
        for step, command in enumerate(zip(poses, grippers), 1):
            if wrong == "displaced" and step == (event.length + 1) // 2:
                _displace(env)
            told = step % stride == 0 or step == event.length
            observation, _, _ = env.step(*command, render=told)
            if history:
                history.observe(observation, command)
            if told:
                judged = watch.observe(step, observation.frames)
        if judged.worst is not None:
            alarm = judged.worst > calibration.threshold
            watched.append(Watched(env.env_id, event.verb, wrong, event.length, judged.worst, alarm))
    return watched


def _chunks(spans: Mapping[str, Sequence[Span]], level: str, steps: int) -> list[Span]:
    """The whole chunks of an episode under its instruction, each with the verb of the event that goes on where it
    begins."""
    ends = [event.end for event in spans[level]]
    return [
        replace(spans["task"][0], start=start, end=start + steps, verb=spans[level][bisect_right(ends, start)].verb)
        for start in range(0, (ends[-1] if ends else 0) - steps + 1, steps)
    ]


def summarize(watched: Sequence[Watched]) -> dict[str, Any]:
    """Precision, recall and false alarms with Wilson intervals, recall by perturbation."""
    wrong = [event for event in watched if event.perturbation]
    right = [event for event in watched if not event.perturbation]
    alarms = [event for event in watched if event.alarm]
    caught = sum(event.alarm for event in wrong)
    return {
        "recall": success_rate(caught, len(wrong)).to_json(),
        "precision": success_rate(caught, len(alarms)).to_json(),
        "false_alarms": success_rate(len(alarms) - caught, len(right)).to_json(),
        "by_perturbation": {
            name: success_rate(sum(e.alarm for e in group), len(group)).to_json()
            for name in PERTURBATIONS
            if (group := [event for event in wrong if event.perturbation == name])
        },
        "events": [asdict(event) for event in watched],
    }


def _loose_objects(env: OCBenchEnv) -> list[int]:
    """Addresses in `qpos` of the scene's free bodies."""
    import mujoco

    model = env.env.unwrapped._model
    return [int(model.jnt_qposadr[j]) for j in range(model.njnt) if model.jnt_type[j] == mujoco.mjtJoint.mjJNT_FREE]


def _displace(env: OCBenchEnv) -> None:
    """Moves the first loose object, away from the base."""
    (address, *_) = _loose_objects(env)
    env.env.unwrapped._data.qpos[address] += _DISPLACEMENT


def _print(result: dict[str, Any]) -> None:
    rows = {name: result[name] for name in ("recall", "precision", "false_alarms")}
    rows |= {f"recall, {name}": rate for name, rate in result["by_perturbation"].items()}
    for name, rate in rows.items():
        interval = f"[{100 * rate['low']:.0f}, {100 * rate['high']:.0f}]"
        print(f"{name:<22}{100 * rate['rate']:>4.0f} % {interval:>10} of {rate['episodes']}")


def _define_flags() -> None:
    flags.DEFINE_string("workdir", "", "Run of wallwm_jax.train, its watchdog calibrated.")
    flags.DEFINE_string("store", "", "Event store that the run was trained on; says which environments.")
    flags.DEFINE_string("out", "", "JSON file for the figures and every event.")
    flags.DEFINE_integer("episodes", 12, "Perturbed episodes.", 1)
    flags.DEFINE_list("families", [], "OCBench families or environment ids; none takes those of the store.")
    flags.DEFINE_enum("mode", "event", MODES, "Decoding mode: whole events, or chunks.")
    flags.DEFINE_enum("level", "action", ["subtask", "action"], "Level of the events.")
    flags.DEFINE_integer("seed", 30_000, "Of the episodes.")


def main(_: list[str]) -> int:
    """The command; see the module docstring."""

    from wallwm_jax.sources.simulator.ocbench_demos import attempt_seed, environments, recorded_environments
    from wallwm_jax.sources.simulator.ocbench_env import OCBenchEnv

    values = flags.FLAGS
    workdir = open_run(values.workdir)
    if not values.out:
        raise UserError("no --out given; pass a JSON file for the figures")
    use_compile_cache(workdir)
    store = open_store(values.store, "heldout")
    policy = Policy.from_checkpoint(workdir)
    if values.mode not in policy.modes:
        raise UserError(f"{str(workdir)!r} was not trained on windows with history, so it has no --mode=unified")
    calibration = load_calibrations(workdir / CALIBRATION_FILE, policy.step).get(values.mode)
    if calibration is None:
        raise UserError(
            f"the watchdog of {str(workdir)!r} is not calibrated in mode {values.mode!r}; calibrate it by "
            "python -m wallwm_jax.serve --calibrate"
        )
    asked = [env_id for family in values.families for env_id in environments(family)]
    env_ids = asked or recorded_environments(store.meta["sources"])
    if not env_ids:
        raise UserError(f"event store {str(store.path)!r} was not recorded in OCBench; name --families")
    mode, used = policy.event_mode, {episode["seed"] for episode in store.episodes}
    size = int(store.meta["size"][0])
    make = functools.cache(lambda env_id: (OCBenchEnv(env_id, mode.views, size), OCBenchEnv(env_id, ())))
    watched: list[Watched] = []
    for number in progress(range(values.episodes), total=values.episodes, unit="episode", label="watch"):
        perturbation = PERTURBATIONS[number % len(PERTURBATIONS)]
        jobs = (
            (env_id, seed)
            for draw in range(_DRAWS)
            for env_id in [env_ids[(number // len(PERTURBATIONS) + draw) % len(env_ids)]]
            if (seed := attempt_seed(env_id, values.seed + draw, number)) not in used
        )
        events = (
            watch_episode(
                *make(env_id), policy, calibration, perturbation, mode=values.mode, seed=seed, level=values.level
            )
            for env_id, seed in jobs
        )
        watched += next(filter(None, events), [])
    result = {"workdir": str(workdir), "mode": values.mode, "calibration": asdict(calibration), **summarize(watched)}
    write_text(Path(values.out), json.dumps(result, indent=1) + "\n")
    _print(result)
    return 0


if __name__ == "__main__":
    _define_flags()
    run_command(main)
