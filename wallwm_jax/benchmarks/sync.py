"""Lags and faults planted into OCBench episodes: how many lags are recovered, which faults are caught, what is kept.

The thresholds of `events.sync` and `events.clean` were set on other episodes (seed 5); these are of another seed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from wallwm_jax.benchmarks.planted_faults import FAULTS, Fault, late_pictures
from wallwm_jax.benchmarks.timing import Result, host, machine_line
from wallwm_jax.console import phase, progress
from wallwm_jax.events.preparing import PrepareOptions, prepare
from wallwm_jax.events.schema import Episode, EpisodeError
from wallwm_jax.events.sync import synchronise

FAMILIES = ("chamber", "block", "switch", "hanoi")
LAGS_S = (-0.9, -0.6, -0.4, -0.2, -0.1, 0.0, 0.1, 0.2, 0.3, 0.5, 0.9)
_SEED = 11


def measure(episodes: int = 4) -> Result:
    """Records `episodes` of each family and measures; see `measure_on`.

    Raises:
      UserError: the simulator is not installed.
    """
    from wallwm_jax.sources.simulator.ocbench_demos import demonstrations

    with phase("record demonstrations"):
        recorded = list(demonstrations(FAMILIES, episodes, _SEED, workers=2))
    return measure_on(recorded)


def measure_on(episodes: Sequence[Episode]) -> Result:
    """Plants every lag and every fault into every episode, one at a time.

    Returns:
      `lags` (planted seconds → recovered within one video frame, quarantined, errors), `recovered` and `believed_right`
      (shares of all, and of those not quarantined), `faults` (name → caught by one of its rules, dropped, rules that
      were tripped), `rules` (name → precision, recall), and what became of the unchanged episodes, `clean`.
    """
    frame_s = episodes[0].video_stride / episodes[0].clock_hz
    planted_lags = progress(LAGS_S, unit="lag", label="planted lags")
    lags = {f"{planted:+.1f}": _lag_row(episodes, planted, frame_s) for planted in planted_lags}
    rows, tried = list(lags.values()), len(LAGS_S) * len(episodes)
    recovered = sum(row["recovered"] for row in rows)
    rng, faults = np.random.default_rng(0), {}
    for name, (rules, plant) in progress(FAULTS.items(), total=len(FAULTS), unit="fault", label="planted faults"):
        found = _found([_planted(plant, episode, rng) for episode in episodes])
        faults[name] = {"rules": list(rules), "caught": sum(any(rule in trip for rule in rules) for trip in found[0])}
        faults[name] |= {"planted": len(episodes), "dropped": len(episodes) - found[1], "found": _count(found[0])}
    trips, kept = _found(episodes)
    alarms = _count(trips)
    return {
        "machine": host(),
        "episodes": len(episodes),
        "frame_s": frame_s,
        "recovered": recovered / tried,
        "believed_right": recovered / max(tried - sum(row["quarantined"] for row in rows), 1),
        "lags": lags,
        "clean": {"episodes": len(episodes), "kept": kept, "found": alarms},
        "faults": faults,
        "rules": _rules(faults, alarms),
    }


def _lag_row(episodes: Sequence[Episode], planted: float, frame_s: float) -> Result:
    """One planted lag: how many estimates are believed and within one video frame of it, and all errors in seconds."""
    recovered, quarantined, errors = 0, 0, []
    for episode in episodes:
        steps = round(planted * episode.clock_hz)
        result = synchronise(late_pictures(episode, steps))
        errors.append(result.lag.seconds - steps / episode.clock_hz)
        quarantined += result.episode is None
        recovered += result.episode is not None and abs(errors[-1]) <= frame_s
    return {"recovered": recovered, "quarantined": quarantined, "errors_s": errors}


def _planted(plant: Fault, episode: Episode, rng: np.random.Generator) -> Episode | EpisodeError:
    try:
        return plant(episode, rng)
    except EpisodeError as error:  # what a source does that meets such a recording
        return error


def _found(episodes: Sequence[Episode | EpisodeError]) -> tuple[list[set[str]], int]:
    """The rules that each episode trips, and how many are kept."""
    trips, kept = [], 0
    for episode in episodes:
        prepared = prepare([episode], PrepareOptions(clean=True, sync=True))
        kept += sum(1 for _ in prepared)
        trips.append({finding.rule for finding in prepared.summary.findings})
    return trips, kept


def _count(trips: Sequence[set[str]]) -> dict[str, int]:
    """Rule → episodes that trip it."""
    return dict(Counter(rule for trip in trips for rule in sorted(trip)))


def _rules(faults: Mapping[str, Result], alarms: Mapping[str, int]) -> dict[str, dict[str, float]]:
    """Precision and recall of each rule that a fault is meant for, the first that it names."""
    rules = {}
    for rule in dict.fromkeys(row["rules"][0] for row in faults.values()):
        meant = [row for row in faults.values() if row["rules"][0] == rule]
        caught = sum(row["found"].get(rule, 0) for row in meant)
        precision = caught / max(caught + alarms.get(rule, 0), 1)
        rules[rule] = {"precision": precision, "recall": caught / sum(row["planted"] for row in meant)}
    return rules


def table(result: Result) -> str:
    """The figures as lines for people."""
    count = result["episodes"]
    lines = [
        machine_line(result["machine"]),
        f"{count} OCBench episodes, {result['frame_s']:g} s per video frame",
        f"{'planted lag, s':<28}{'within a frame':>16}{'quarantined':>13}{'median error, s':>17}",
    ]
    for planted, row in result["lags"].items():
        error = float(np.median(np.abs(row["errors_s"])))
        lines.append(f"{planted:<28}{row['recovered']:>10} / {count:<3}{row['quarantined']:>13}{error:>17.3f}")
    lines += [
        f"{'all lags':<28}{result['recovered']:>16.1%}; of those believed {result['believed_right']:.1%}",
        f"{'planted fault':<28}{'caught':>16}{'dropped':>13}  rules tripped (episodes)",
    ]
    for name, row in result["faults"].items():
        tripped = ", ".join(f"{rule} {number}" for rule, number in sorted(row["found"].items()))
        lines.append(f"{name:<28}{row['caught']:>10} / {row['planted']:<3}{row['dropped']:>13}  {tripped}")
    clean = result["clean"]
    alarms = ", ".join(f"{rule} {number}" for rule, number in clean["found"].items()) or "no finding"
    lines.append(f"{'none':<28}{clean['kept']:>10} / {clean['episodes']:<3} kept; {alarms}")
    lines.append(f"{'rule':<28}{'precision':>16}{'recall':>13}")
    for rule, row in result["rules"].items():
        lines.append(f"{rule:<28}{row['precision']:>16.2f}{row['recall']:>13.2f}")
    lines.append("recall: over the faults that should trip the rule; precision: those against unchanged episodes")
    return "\n".join(lines)
