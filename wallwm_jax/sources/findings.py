"""What the linter of recorded sets looks at, and what it says."""

from __future__ import annotations

from dataclasses import dataclass, field

from wallwm_jax.sources.embodiment import Embodiment, Motion
from wallwm_jax.sources.recorded import RecordedSet, Recording


@dataclass(frozen=True)
class Finding:
    """Something that does not fit: which check, where, the numbers that say so, and what to change."""

    check: str
    where: str
    evidence: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.check}: {self.where}\n    evidence: {self.evidence}\n    remedy:   {self.remedy}"


@dataclass(frozen=True)
class Sample:
    """Episodes that are looked at: their numbers in the set, their rows, and what the description makes of them."""

    dataset: RecordedSet
    embodiment: Embodiment
    numbers: list[int] = field(default_factory=list)
    recordings: list[Recording] = field(default_factory=list)
    motions: list[Motion] = field(default_factory=list)
