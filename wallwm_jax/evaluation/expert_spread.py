"""The floor of the open-loop error: how far OCBench's experts are apart when nothing but their chance differs.

The experts draw approach angles, curves, resting poses and more at random, which no observation tells. Here an expert
acts several times from the same state; the error of the other runs' median on a run is about what the best possible
prediction has, and that of a median that knows the run itself is below it.

    python -m wallwm_jax.evaluation.expert_spread --store=runs/quickstart/store

prints both, in all and by verb, weighed by how often a verb occurs among the held-out windows. Only the first subtask
of an episode is looked at, since later ones begin where earlier chance has led.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from absl import flags

from wallwm_jax.console import UserError, progress, run_command
from wallwm_jax.data.embedders import resample
from wallwm_jax.data.event_store import EventStore, open_store
from wallwm_jax.data.normalization import Stats
from wallwm_jax.evaluation.statistics import normalized_error
from wallwm_jax.events.actions import relative_actions
from wallwm_jax.events.schema import LEVELS
from wallwm_jax.events.windows import KINDS

if TYPE_CHECKING:
    from wallwm_jax.sources.simulator.expert import Rollout

Kind = tuple[str, str]  # level and verb of an event


def spread(trajectories: Sequence[np.ndarray]) -> list[tuple[float, float]]:
    """Per trajectory `[T, D]` its mean absolute error to the median of the others, and to the median of all."""
    errors = []
    for number, true in enumerate(trajectories):
        same_length = np.stack([resample(other, len(true)) for other in trajectories])
        valid = np.ones(true.shape[1], bool)
        medians = (np.median(part, 0) for part in (np.delete(same_length, number, 0), same_length))
        others, everything = (normalized_error(median, true, valid) for median in medians)
        errors.append((others, everything))
    return errors


def measure(env_ids: Sequence[str], stats: Stats, *, scenes: int, runs: int, seed: int) -> dict[Kind, np.ndarray]:
    """(level, verb) → `[n, 2]` errors as of `spread`, of `runs` expert runs in each of `scenes` per environment.

    Runs that do not succeed are left out, as they are from a store.
    """
    from wallwm_jax.sources.simulator import expert
    from wallwm_jax.sources.simulator.ocbench_demos import attempt_seed, controller_factory
    from wallwm_jax.sources.simulator.ocbench_env import OCBenchEnv

    errors: dict[Kind, list[tuple[float, float]]] = defaultdict(list)
    environments = {env_id: OCBenchEnv(env_id, ()) for env_id in env_ids}
    jobs = [(env_id, scene) for env_id in env_ids for scene in range(scenes)]
    for env_id, scene in progress(jobs, total=len(jobs), unit="scene", label="experts"):
        factory, scene_seed = controller_factory(env_id), attempt_seed(env_id, seed, scene)
        same: dict[tuple[Kind, int, str], list[np.ndarray]] = defaultdict(list)
        for run in range(runs):
            rollout = expert.roll_out(environments[env_id], factory, scene_seed, 1, expert_seed=seed + run)
            if rollout.success:
                for event, actions in _first_events(rollout, stats):
                    same[event].append(actions)
        for (kind, _, _), trajectories in same.items():
            if len(trajectories) > 2:
                errors[kind] += spread(trajectories)
    return {kind: np.array(rows) for kind, rows in errors.items()}


def _first_events(rollout: Rollout, stats: Stats) -> Iterator[tuple[tuple[Kind, int, str], np.ndarray]]:
    """The first subtask and its actions: (kind, how many of this kind came before, the subtask's caption), and the
    normalised trajectory."""
    from wallwm_jax.sources.simulator import expert

    spans = expert.spans(rollout)
    first, seen = spans["subtask"][0], Counter[Kind]()
    for level in ("subtask", "action"):
        for span in spans[level]:
            if span.end > first.end:
                break
            stretch, pose = slice(span.start, span.end), rollout.observations[span.start].pose
            actions, valid = relative_actions(rollout.command_poses[stretch], rollout.command_grippers[stretch], pose)
            kind = level, span.verb
            yield (kind, seen[kind], first.caption), stats.normalize_actions(actions)[:, valid]
            seen[kind] += 1


def _occurrences(store: EventStore) -> Counter[Kind]:
    """How many windows of the split show an event of each level and verb."""
    index = store.index
    events = np.flatnonzero(index["kind"] == KINDS.index("event"))
    found: Counter[Kind] = Counter()
    for window in events.tolist():
        span = store.span(window)
        assert span is not None
        found[LEVELS[index[window]["level"]], span["verb"]] += 1
    return found


def _define_flags() -> None:
    flags.DEFINE_string("store", None, "Event store of OCBench: its environments, statistics and held-out verbs.")
    flags.DEFINE_integer("scenes", 3, "Scenes per environment.", 1)
    flags.DEFINE_integer("runs", 8, "Expert runs per scene.", 3)
    flags.DEFINE_integer("seed", 77, "Of scenes and experts.")
    flags.mark_flag_as_required("store")


def main(_: list[str]) -> int:
    """The command; see the module docstring."""
    values = flags.FLAGS
    from wallwm_jax.sources.simulator.ocbench_demos import recorded_environments

    store = open_store(values.store, "heldout")
    env_ids = recorded_environments(store.meta["sources"])
    if not env_ids:
        raise UserError(f"event store {values.store!r} was not recorded in OCBench ({store.meta['sources']})")
    errors = measure(env_ids, store.stats, scenes=values.scenes, runs=values.runs, seed=values.seed)
    counts = _occurrences(store)
    print("level    verb       windows  runs  others' median  own among them")
    for kind in sorted(errors, key=lambda kind: -counts[kind]):
        means = "".join(f"{mean:>16.3f}" for mean in errors[kind].mean(0))
        print(f"{kind[0]:<8} {kind[1]:<10} {counts[kind]:>7} {len(errors[kind]):>5}{means}")
    weights = [counts[kind] for kind in errors]
    others, everything = np.average([rows.mean(0) for rows in errors.values()], axis=0, weights=weights)
    share = sum(weights) / sum(counts.values())
    print(f"all, {100 * share:.0f} % of the windows: the floor is about {others:.3f}, not below {everything:.3f}")
    return 0


if __name__ == "__main__":
    _define_flags()
    run_command(main)
