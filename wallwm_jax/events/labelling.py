"""Events for recordings whose source names none: cut by `events.segment`, worded by the template captioner.

labelled = Labelled(episodes, "auto")
for episode in labelled: ...
labelled.count
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from wallwm_jax.events.captioners.templates import TemplateCaptioner
from wallwm_jax.events.schema import Episode
from wallwm_jax.events.segment import segment

WHICH = ("auto", "always", "never")


class Labelled(Iterator[Episode]):
    """The episodes, one at a time, with events on every level; `count` tells how many were cut here so far."""

    def __init__(self, episodes: Iterable[Episode], which: str) -> None:
        """`which` is one of `WHICH`: "auto" cuts episodes with nothing below the task level, "always" all of them."""
        self.count = 0
        self._which = which
        self._labelled = self._run(episodes)

    def __next__(self) -> Episode:
        return next(self._labelled)

    def _run(self, episodes: Iterable[Episode]) -> Iterator[Episode]:
        captioner = TemplateCaptioner()
        for episode in episodes:
            if self._which == "always" or (self._which == "auto" and set(episode.spans) == {"task"}):
                self.count += 1
                found = segment(episode)
                (worded,) = captioner.caption([found])
                spans = {  # the verbs are those of segmentation, which knows what the gripper holds
                    level: [replace(said, verb=cut.verb) for said, cut in zip(worded.spans[level], row)]
                    for level, row in found.spans.items()
                }
                provenance = (*episode.provenance, "events found in its motion")
                episode = replace(found, spans=spans, provenance=provenance)
            yield episode
