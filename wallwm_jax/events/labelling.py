"""Events on the levels that a recording's source does not name: cut by `events.segment`, worded by templates.

labelled = Labelled(episodes, "auto")
for episode in labelled: ...
labelled.count
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from wallwm_jax.events.captioners.templates import TemplateCaptioner
from wallwm_jax.events.schema import LEVELS, Episode
from wallwm_jax.events.segment import segment

WHICH = ("auto", "always", "never")


class Labelled(Iterator[Episode]):
    """The episodes, one at a time, with events on every level, also on those that their source does not name.

    `count` tells how many were cut here so far; the provenance of such an episode, which levels were found and which
    given.
    """

    def __init__(self, episodes: Iterable[Episode], which: str) -> None:
        """`which` is one of `WHICH`: "always" takes nothing but the task as given, "never" cuts nothing."""
        self.count = 0
        self._which = which
        self._labelled = self._run(episodes)

    def __next__(self) -> Episode:
        return next(self._labelled)

    def _run(self, episodes: Iterable[Episode]) -> Iterator[Episode]:
        for episode in episodes:
            given = [level for level in LEVELS if level in episode.spans]
            if self._which == "always":
                given = ["task"]
            found = [level for level in LEVELS if level not in given]
            if found and self._which != "never":
                self.count += 1
                episode = self._cut(episode, given, found)
            yield episode

    def _cut(self, episode: Episode, given: Sequence[str], levels: Sequence[str]) -> Episode:
        cut = segment(episode, keep=given)
        (worded,) = TemplateCaptioner(levels).caption([cut])
        spans = {  # the verbs are those of segmentation, which knows what the gripper holds
            level: [replace(said, verb=of.verb) for said, of in zip(worded.spans[level], row)]
            for level, row in cut.spans.items()
        }
        told = f"{', '.join(levels)} found in its motion, {', '.join(given)} given"
        return replace(cut, spans=spans, provenance=(*episode.provenance, told))
