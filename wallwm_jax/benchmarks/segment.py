"""Segmentation against the true events of scripted experts: boundary F1 per family and level, beside two baselines.

The recording goes in without its labels. The rules of `events.segment` and the numbers of its `Options` were chosen on
the `TUNED` families of OCBench; the headline is the mean over the `HELD_OUT` ones. Boundaries are the starts of spans,
the first of an episode excepted, matched one to one within min(0.3 s, a quarter of the median true span of that level
and family). The baselines are equal parts of about the mean true length, which no recording tells, and the gripper
command alone: where it begins and ends to change for actions, where it has opened for subtasks.

MetaWorld tasks are reported without a bar, those whose experts go through the same stages in most episodes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from wallwm_jax.benchmarks.timing import Result, host, machine_line
from wallwm_jax.console import phase
from wallwm_jax.events.phases import Options, gripper_changes
from wallwm_jax.events.schema import Episode
from wallwm_jax.events.segment import boundaries, match_boundaries, segment, tolerance_s

TUNED = ("chamber", "block")
HELD_OUT = ("switch", "hanoi")
LEVELS = ("subtask", "action")
BINS_S = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # edges of the histograms of lengths, seconds
CONSISTENT = 0.8  # least share of a MetaWorld task's episodes with its commonest sequence of stages
LOOKAHEAD_S = 1.0  # of the streaming mode
_METAWORLD_EPISODES = 10
_SEED = 20_000
_VIEW, _SIZE = "front_pixels", 32

# A method gives an episode's boundaries per level, in steps, told the mean true length per level, in seconds.
Method = Callable[[Episode, Mapping[str, float]], Mapping[str, Sequence[int]]]


def measure(
    episodes: int = 20, tasks: Sequence[str] = (), *, families: Sequence[str] = (*HELD_OUT, *TUNED), streamed: int = 3
) -> Result:
    """Records and segments `episodes` of each family.

    Args:
      episodes: successful episodes per OCBench family.
      tasks: MetaWorld tasks, ten episodes of each; inconsistent ones are named and left out.
      families: of OCBench; those that are held out make the headline.
      streamed: episodes per held-out family that are segmented in streaming mode, too, which is slow.

    Raises:
      UserError: no episodes, an unknown family or task, a simulator that is not installed.
    """
    from wallwm_jax.sources.simulator import ocbench_demos

    recorded: dict[str, list[Episode]] = {}
    for family in families:
        with phase(f"{episodes} episodes of {family}"):
            stream = ocbench_demos.demonstrations([family], episodes, _SEED, size=_SIZE, views=[_VIEW], workers=0)
            recorded[family] = list(stream)
    with phase("segment"):
        scored = {family: score(found) for family, found in recorded.items()}
    held = [family for family in families if family in HELD_OUT]
    result: Result = {
        "machine": host(),
        "options": dataclasses.asdict(Options()),
        "seed": _SEED,
        "tuned_on": list(TUNED),
        "held_out": held,
        **_headline(scored, held, "found"),
        "baselines": {name: _headline(scored, held, name) for name in ("windows", "gripper")},
        "families": scored,
    }
    found = {"found": _segmented(Options())}
    result["worse_recordings"] = {
        name: _headline({family: score([change(e) for e in recorded[family]], found) for family in held}, held, "found")
        for name, change in _WORSE.items()
    }
    if streamed and held:
        with phase(f"segment as a stream, {LOOKAHEAD_S:g} s ahead"):
            late = {"found": _segmented(Options(lookahead_s=LOOKAHEAD_S))}
            streams = {family: score(recorded[family][:streamed], late) for family in held}
        result["streaming"] = {"lookahead_s": LOOKAHEAD_S, "episodes": streamed, **_headline(streams, held, "found")}
    if tasks:
        result["metaworld"] = _metaworld(tasks)
    return result


def table(result: Result) -> str:
    """The figures as lines for people."""
    lines = [
        machine_line(result["machine"]),
        f"{'':<40}{'':<9}{'spans':>6}{'tolerance':>11}{'F1':>7}{'precision':>11}{'recall':>8}{'false/span':>12}"
        f"{'F1 windows':>12}{'F1 gripper':>12}",
    ]
    for family, entry in {**result["families"], **result.get("metaworld", {}).get("tasks", {})}.items():
        role = (
            "held out" if family in result["held_out"] else "tuned on" if family in result["tuned_on"] else "metaworld"
        )
        label = f"{family}, {role}"
        for level in (level for level in LEVELS if level in entry):
            row = entry[level]
            found = row["found"]
            lines.append(
                f"{label:<40}{level:<9}{row['spans']:>6}{row['tolerance_s']:>9.2f} s{found['f1']:>7.3f}"
                f"{found['precision']:>11.3f}{found['recall']:>8.3f}{found['over_segmentation']:>12.3f}"
                f"{row['windows']['f1']:>12.3f}{row['gripper']['f1']:>12.3f}"
            )
            label = ""
    means = {"held out, mean": result}
    means |= {f"  {name}": row for part in ("baselines", "worse_recordings") for name, row in result[part].items()}
    for name, row in means.items() if result["held_out"] else ():
        lines.append(f"{name:<40}action F1 {row['action_f1']:.3f}, subtask {row['subtask_f1']:.3f}")
    if "streaming" in result:
        row = result["streaming"]
        lines.append(
            f"{'  as a stream':<40}action F1 {row['action_f1']:.3f}, subtask {row['subtask_f1']:.3f}, "
            f"{row['lookahead_s']:g} s ahead, {row['episodes']} episodes per family"
        )
    for task, share in result.get("metaworld", {}).get("inconsistent", {}).items():
        lines.append(f"{task}, metaworld: left out, {100 * share:.0f} % of its episodes go through the same stages")
    return "\n".join(lines)


def score(episodes: Sequence[Episode], methods: Mapping[str, Method] | None = None) -> Result:
    """Boundaries of some methods against the episodes' own, counted over all of them.

    Args:
      episodes: with true spans, of one family.
      methods: by name; by default the segmentation and both baselines.

    Returns:
      Level → spans, tolerance_s, lengths_true (a histogram), and per method precision, recall, f1, over_segmentation
      (false boundaries per true span) and lengths.
    """
    methods = methods or {"found": _segmented(Options()), "windows": _windows, "gripper": _gripper}
    seconds = {
        level: [span.length / episode.clock_hz for episode in episodes for span in episode.spans[level]]
        for level in LEVELS
        if all(level in episode.spans for episode in episodes)
    }
    means = {level: float(np.mean(lengths)) for level, lengths in seconds.items()}
    cuts = {name: [method(episode, means) for episode in episodes] for name, method in methods.items()}
    result: Result = {"episodes": len(episodes)}
    for level, lengths in seconds.items():
        tolerance = tolerance_s(lengths)
        row: Result = {"spans": len(lengths), "tolerance_s": tolerance, "lengths_true": histogram(lengths)}
        for name, found in cuts.items():
            pairs = [(episode, cut[level]) for episode, cut in zip(episodes, found)]
            matched = sum(len(match_boundaries(cut, boundaries(e, level), tolerance * e.clock_hz)) for e, cut in pairs)
            count = sum(len(cut) for _, cut in pairs)
            row[name] = rates(matched, len(lengths) - len(episodes), count)
            row[name]["over_segmentation"] = (count - matched) / len(lengths)
            row[name]["lengths"] = histogram(
                [length / e.clock_hz for e, cut in pairs for length in np.diff([0, *cut, e.num_steps])]
            )
        result[level] = row
    return result


def rates(matched: int, true: int, found: int) -> dict[str, float]:
    """precision, recall and F1; all 1 where there was nothing to find and nothing was found."""
    if not true and not found:
        return {"precision": 1.0, "recall": 1.0, "f1": 1.0}
    return {
        "precision": matched / found if found else 0.0,
        "recall": matched / true if true else 0.0,
        "f1": 2 * matched / (true + found),
    }


def histogram(seconds: Sequence[float]) -> list[int]:
    """How many lengths lie below the first of `BINS_S`, between each two, and above the last."""
    return np.bincount(np.digitize(seconds, BINS_S), minlength=len(BINS_S) + 1).tolist()


def _segmented(options: Options) -> Method:
    def method(episode: Episode, _: Mapping[str, float]) -> Mapping[str, Sequence[int]]:
        found = segment(_unlabelled(episode), options)
        return {level: boundaries(found, level) for level in LEVELS}

    return method


def _unlabelled(episode: Episode) -> Episode:
    """The recording alone: no span but the task, no success, no seed."""
    task = [dataclasses.replace(episode.spans["task"][0], success=None)]
    return dataclasses.replace(episode, spans={"task": task}, seed=None)


def _windows(episode: Episode, means: Mapping[str, float]) -> Mapping[str, Sequence[int]]:
    counts = {level: max(1, round(episode.num_steps / episode.clock_hz / mean)) for level, mean in means.items()}
    return {
        level: [round(episode.num_steps * part / count) for part in range(1, count)] for level, count in counts.items()
    }


def _gripper(episode: Episode, _: Mapping[str, float]) -> Mapping[str, Sequence[int]]:
    changes = [
        change
        for arm in range(episode.command_grippers.shape[1])
        for change in gripper_changes(episode.command_grippers[:, arm], Options().gripper_change)
    ]
    return {
        "subtask": sorted({change.end for change in changes if not change.closes}),
        "action": sorted({edge for change in changes for edge in (change.onset, change.end)}),
    }


def _without_commands(episode: Episode) -> Episode:
    """As sources have it that know no command: the next measured pose stands for it."""
    return dataclasses.replace(episode, command_poses=episode.poses[1:], command_grippers=episode.grippers[1:])


def _noisy(episode: Episode) -> Episode:
    """With white noise of a millimetre per axis on commanded and measured positions."""
    rng = np.random.default_rng(_SEED)
    poses, commands = episode.poses.copy(), episode.command_poses.copy()
    for positions in (poses[..., :3, 3], commands[..., :3, 3]):
        positions += 1e-3 * rng.normal(size=positions.shape)
    return dataclasses.replace(episode, poses=poses, command_poses=commands)


_WORSE = {"without commands": _without_commands, "with 1 mm of noise": _noisy}


def _headline(scored: Mapping[str, Result], families: Sequence[str], method: str) -> dict[str, float | None]:
    """Mean F1 over the families, per level; None without any."""
    return {
        f"{level}_f1": float(np.mean([scored[family][level][method]["f1"] for family in families]))
        if families
        else None
        for level in ("action", "subtask")
    }


def _metaworld(tasks: Sequence[str]) -> Result:
    from wallwm_jax.sources.simulator import metaworld_demos

    result: Result = {"tasks": {}, "inconsistent": {}}
    for task in tasks:
        with phase(f"{_METAWORLD_EPISODES} episodes of {task}"):
            consistency = metaworld_demos.stage_consistency(task, _SEED, _METAWORLD_EPISODES)
            if consistency < CONSISTENT or task not in metaworld_demos.STAGED:
                result["inconsistent"][task] = consistency
                continue
            stream = metaworld_demos.demonstrations([task], _METAWORLD_EPISODES, _SEED, size=_SIZE, workers=0)
            result["tasks"][task] = {"consistency": consistency, **score(list(stream))}
    return result
