"""Columns of a recording, named as in `observation.state[3:6]`, and the error that says where one is bad."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from wallwm_jax.console import UserError

_SELECTOR = re.compile(r"(?P<key>[^\[\]]+)(\[(?P<first>\d+)(?P<range>:(?P<last>\d+))?\])?")


class BadRecording(Exception):
    """An episode that cannot be used: which field of it, what is wrong there, and in which file."""

    def __init__(self, field: str, what: str, file: str = "") -> None:
        super().__init__(field, what, file)
        self.field, self.what, self.file = field, what, file

    def __str__(self) -> str:
        return ": ".join(part for part in (self.file, self.field, self.what) if part)


@dataclass(frozen=True)
class Column:
    """Some dimensions of one column: all of `key`, or `[first, last)` of them."""

    key: str
    first: int = 0
    last: int | None = None

    @classmethod
    def parse(cls, text: str) -> Column:
        """Reads `key`, `key[i]` or `key[i:j]`; raises `UserError` for anything else."""
        match = _SELECTOR.fullmatch(text)
        if match is None:
            raise UserError(f"{text!r} names no column; write key, key[i] or key[i:j]")
        if match["first"] is None:
            return cls(match["key"])
        first = int(match["first"])
        last = int(match["last"]) if match["range"] else first + 1
        if last <= first:
            raise UserError(f"{text!r} names no dimensions: {last} is not above {first}")
        return cls(match["key"], first, last)

    def __str__(self) -> str:
        return self.key if self.last is None else f"{self.key}[{self.first}:{self.last}]"

    def of(self, columns: Mapping[str, np.ndarray], width: int) -> np.ndarray:
        """`[N, width]` float64, all finite.

        Raises:
          BadRecording: the column is missing, has other dimensions, or holds values that are not finite.
        """
        if self.key not in columns:
            raise BadRecording(self.key, f"is missing; there are {', '.join(sorted(columns)) or 'no columns'}")
        values = columns[self.key].reshape(len(columns[self.key]), -1)
        chosen = values[:, self.first : self.last]
        if chosen.shape[1] != width or (self.last or 0) > values.shape[1]:
            raise BadRecording(str(self), f"{chosen.shape[1]} of {values.shape[1]} dimensions, expected {width}")
        try:
            chosen = chosen.astype(np.float64)
        except (TypeError, ValueError):
            raise BadRecording(self.key, f"holds {values.dtype}, not numbers") from None
        bad = np.argwhere(~np.isfinite(chosen))
        if len(bad):
            row, dimension = bad[0]
            value = chosen[row, dimension]
            raise BadRecording(str(self), f"is {value} at row {row}, dimension {self.first + dimension}")
        return chosen
