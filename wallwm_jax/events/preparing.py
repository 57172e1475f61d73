"""From a source's recordings to episodes worth learning from: cleaned, then synchronised, everything counted.

    prepared = prepare(episodes, PrepareOptions(clean=True, sync=True))
    for episode in prepared: ...
    prepared.summary.counts("dropped")      # rule → episodes

Cleaning comes first, because a frozen camera or a jump would mislead the lag. A source that meets a recording of which
no `Episode` can be made yields the `EpisodeError` in its place, so that it is counted like any other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from wallwm_jax.events.clean import DROPPED, NOTED, REPAIRED, RULES, Finding, Limits, clean, explanation
from wallwm_jax.events.motion import Motion
from wallwm_jax.events.schema import LEFT_OUT, Episode, EpisodeError
from wallwm_jax.events.sync import Synchronised, SyncLimits, synchronise

_EXAMPLES = 3  # of each rule that keep their pictures
_STRIP = 7  # frames of an example

EXPLANATIONS = {
    "invalid_episode": "No episode could be made of the recording: a value is not finite, or lengths do not fit.",
    "failed_demonstration": "The scripted expert missed its goal; it was asked for a further one.",
    "labels_left_out": "Some labels of the recording could not be used; the episode goes on without them.",
    **{rule.__name__: explanation(rule) for rule in RULES},
    "lag_corrected": "Pictures and actions were apart; they were moved together, ends without a partner cut off.",
    "lag_unclear": "Pictures and actions do not tell how far they are apart.",
    "lag_too_long": "Pictures and actions are farther apart than a camera's delay can be.",
    "cameras_disagree": "One camera has another lag than the rest.",
    "lag_drifts": "The first and the second half have different lags: frames were lost in between.",
}
"""Every rule that an episode meets, in that order, with what it says in a sentence."""


@dataclass(frozen=True)
class PrepareOptions:
    """What `prepare` does; nothing by default.

    Attributes:
      clean: run the rules of `events.clean`.
      sync: estimate lags, remove those that are clear, quarantine what is not.
      limits, sync_limits: their thresholds.
    """

    clean: bool = False
    sync: bool = False
    limits: Limits = field(default_factory=Limits)
    sync_limits: SyncLimits = field(default_factory=SyncLimits)


@dataclass(frozen=True)
class Example:
    """What a finding looks like: frames around it, and for lags the motion of pictures and hands over time.

    Attributes:
      finding: that it is of.
      view: whose pictures these are.
      frames: their positions among the stored frames. pictures: the JPEG of each.
      seconds, change, travel: `[n]` for lags, else None: time of each frame pair, how much the pictures changed, how
        far the hands went, each over its own largest.
    """

    finding: Finding
    view: str
    frames: tuple[int, ...]
    pictures: tuple[bytes, ...]
    seconds: np.ndarray | None = None
    change: np.ndarray | None = None
    travel: np.ndarray | None = None


@dataclass
class Summary:
    """What happened so far.

    Attributes:
      options: of the preparation.
      taken, kept: source → episodes that came in and went on.
      findings: all of them, in order.
      lags: (source, seconds, whether it was believed) of each episode that was synchronised.
      examples: the first few of each rule, with pictures.
    """

    options: PrepareOptions
    taken: Counter[str] = field(default_factory=Counter)
    kept: Counter[str] = field(default_factory=Counter)
    findings: list[Finding] = field(default_factory=list)
    lags: list[tuple[str, float, bool]] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)

    def add_lost(self, source: str, count: int, reasons: Sequence[str]) -> None:
        """Counts recordings of which no episode could be made; each reason begins with the recording's name, those
        without one are demonstrations that failed."""
        self.taken[source] += count
        self.findings += [
            Finding("invalid_episode", reason.partition(": ")[0], source, reason, {}, DROPPED) for reason in reasons
        ]
        failed = [f"attempt {number}" for number in range(count - len(reasons))]
        self.findings += [Finding("failed_demonstration", name, source, "no success", {}, DROPPED) for name in failed]

    def counts(self, action: str) -> dict[str, int]:
        """Rule → episodes with a finding of this action; an episode that two rules drop counts for both."""
        seen = {
            (finding.rule, finding.source, finding.episode) for finding in self.findings if finding.action == action
        }
        found = Counter(rule for rule, *_ in seen)
        return {rule: found[rule] for rule in EXPLANATIONS if rule in found}


class Prepared(Iterator[Episode]):
    """The episodes that are kept, one at a time; `summary` tells what happened up to the last one taken."""

    def __init__(self, episodes: Iterable[Episode | EpisodeError], options: PrepareOptions) -> None:
        self.summary = Summary(options)
        self._kept = self._run(episodes)

    def __next__(self) -> Episode:
        return next(self._kept)

    def _run(self, episodes: Iterable[Episode | EpisodeError]) -> Iterator[Episode]:
        summary = self.summary
        for episode in episodes:
            if isinstance(episode, EpisodeError):
                number = summary.taken.total()
                summary.taken["unknown"] += 1
                name = f"recording {number}"
                summary.findings.append(Finding("invalid_episode", name, "unknown", str(episode), {}, DROPPED))
                continue
            summary.taken[episode.source] += 1
            summary.findings += [
                Finding("labels_left_out", episode.episode_id, episode.source, told, {}, NOTED)
                for told in episode.provenance
                if LEFT_OUT in told
            ]
            kept = self._prepare(episode)
            if kept is not None:
                summary.kept[kept.source] += 1
                yield kept

    def _prepare(self, episode: Episode) -> Episode | None:
        options, motion = self.summary.options, None
        if options.clean:
            cleaned = clean(episode, options.limits)
            for finding in cleaned.findings:
                self._note(finding, episode)
            if cleaned.motion is None:
                return None
            motion = cleaned.motion
            episode = motion.episode
        if options.sync:
            motion = motion or Motion(episode)
            result = synchronise(motion, options.sync_limits)
            self.summary.lags.append((episode.source, result.lag.seconds, result.episode is not None))
            if result.verdict != "in_sync":
                self._note(_lag_finding(result, episode), episode, motion)
            if result.episode is None:
                return None
            episode = result.episode
        return episode

    def _note(self, finding: Finding, episode: Episode, motion: Motion | None = None) -> None:
        summary = self.summary
        summary.findings.append(finding)
        if sum(example.finding.rule == finding.rule for example in summary.examples) < _EXAMPLES:
            summary.examples.append(_example(finding, episode, motion))


def prepare(episodes: Iterable[Episode | EpisodeError], options: PrepareOptions) -> Prepared:
    """Cleans and synchronises episodes as they come; what is not kept is in the summary with its reason."""
    return Prepared(episodes, options)


def _lag_finding(result: Synchronised, episode: Episode) -> Finding:
    shifted, lag = result.verdict == "shifted", result.lag
    return Finding(
        rule="lag_corrected" if shifted else result.verdict,
        episode=episode.episode_id,
        source=episode.source,
        where=result.reason,
        evidence={"lag, s": lag.seconds, "confidence": lag.confidence, "correlation": lag.correlation},
        action=REPAIRED if shifted else DROPPED,
        frame=episode.num_frames // 2,
    )


def _example(finding: Finding, episode: Episode, motion: Motion | None) -> Example:
    view = finding.view or next(iter(episode.frames))
    first = max(0, min(finding.frame - _STRIP // 2, episode.num_frames - _STRIP))
    frames = tuple(range(first, min(first + _STRIP, episode.num_frames)))
    pictures = tuple(episode.frames[view][frame] for frame in frames)
    if motion is None:
        return Example(finding, view, frames, pictures)
    change = np.mean([change / max(change.max(), 1e-9) for change in motion.changes.values()], axis=0)
    travel = motion.travel()
    seconds = motion.frame_s * (np.arange(len(change)) + 0.5)
    return Example(
        finding, view, frames, pictures, seconds, change / max(change.max(), 1e-9), travel / max(travel.max(), 1e-9)
    )
