"""Captions edited by people: out as a table, in again, as CSV for spreadsheets or JSON lines for programs.

One row per event: `source`, `episode`, `level`, `index` and its `start` and `end` say which one it is, `caption` and
`paraphrases` are what a person edits (in CSV the paraphrases are a JSON list), `confidence` and `provenance` say where
the present caption comes from. Rows may be left out, reordered and sorted; a row whose span is not the one of this
version of the events is refused, for its words were written about something else.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from wallwm_jax.console import UserError, write_text
from wallwm_jax.events.captioners import Caption, Spans, with_captions
from wallwm_jax.events.schema import LEVELS, Episode

COLUMNS = (
    "source",
    "episode",
    "level",
    "index",
    "start",
    "end",
    "caption",
    "paraphrases",
    "confidence",
    "provenance",
)
_NEEDED = COLUMNS[:7]

Events = Iterable[tuple[str, str, Spans]]
"""Source, episode id and spans of each episode."""


@dataclass(frozen=True)
class Change:
    """One caption that an edit changed."""

    source: str
    episode: str
    level: str
    index: int
    before: str
    after: str

    def __str__(self) -> str:
        return f"{self.episode} {self.level} {self.index}: {self.before!r} -> {self.after!r}"


def write_edits(path: str | Path, events: Events) -> int:
    """Writes every event as a row of `path`, `.csv` or `.jsonl`; returns how many.

    Raises:
      UserError: another ending.
    """
    path, rows = _table(path), []
    for source, episode, spans in events:
        for level in LEVELS:
            for index, span in enumerate(spans.get(level, ())):
                where = (source, episode, level, index, span.start, span.end)
                told = (span.caption, list(span.paraphrases), span.confidence, span.provenance)
                rows.append(dict(zip(COLUMNS, (*where, *told))))
    if path.suffix == ".jsonl":
        write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        return len(rows)
    out = io.StringIO(newline="")
    table = csv.DictWriter(out, COLUMNS)
    table.writeheader()
    table.writerows(row | {"paraphrases": json.dumps(row["paraphrases"], ensure_ascii=False)} for row in rows)
    write_text(path, "\ufeff" + out.getvalue())  # the mark by which spreadsheets know UTF-8
    return len(rows)


def read_edits(path: str | Path) -> dict[tuple[str, str, str, int], dict[str, Any]]:
    """Rows of an edited table by source, episode, level and index, each with start, end, caption, paraphrases (absent:
    the present ones stay) and "line", where it stands.

    Raises:
      UserError: no such file, a line that cannot be read, columns that are missing, an empty caption, an event twice.
    """
    path = _table(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read edits {str(path)!r} ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"edits {str(path)!r} are not UTF-8 ({error}); save them as UTF-8") from None
    edits: dict[tuple[str, str, str, int], dict[str, Any]] = {}
    for line, raw in _csv_rows(path, text) if path.suffix == ".csv" else _json_rows(path, text):
        where = f"line {line} of {str(path)!r}"
        row = _checked(raw, where)
        key = row["source"], row["episode"], row["level"], row["index"]
        if key in edits:
            raise UserError(f"{where}: {_name(*key)} stands there twice, first in line {edits[key]['line']}")
        edits[key] = row | {"line": line}
    if not edits:
        raise UserError(f"edits {str(path)!r} have no rows")
    return edits


class HumanCaptioner:
    """Puts edited captions in place; `changes` says which differ from what was there.

    Where nothing was changed, confidence and provenance stay; an edited caption has confidence 1.
    """

    def __init__(self, edits: Mapping[tuple[str, str, str, int], Mapping[str, Any]], author: str = "") -> None:
        """Args:
        edits: of `read_edits`.
        author: named in the provenance of what they changed, "human:<author>".
        """
        self.changes: list[Change] = []
        self._left, self._provenance = dict(edits), f"human:{author}" if author else "human"

    def caption(self, episodes: Iterable[Episode]) -> Iterator[Episode]:
        """See `Captioner`. Raises `UserError` as `revise` and `finish` do."""
        for episode in episodes:
            yield replace(episode, spans=self.revise(episode.source, episode.episode_id, episode.spans))
        self.finish()

    def revise(self, source: str, episode: str, spans: Spans) -> Spans:
        """The spans of one episode with their edits.

        Raises:
          UserError: an edit was made for other spans than these.
        """
        captions: dict[tuple[str, int], Caption] = {}
        for level, row in spans.items():
            for index, span in enumerate(row):
                edit = self._left.pop((source, episode, level, index), None)
                if edit is None:
                    continue
                if (edit["start"], edit["end"]) != (span.start, span.end):
                    raise UserError(
                        f"line {edit['line']} of the edits: {_name(source, episode, level, index)} is "
                        f"[{edit['start']}, {edit['end']}) there and [{span.start}, {span.end}) now; the edits were "
                        "made for another version of the events: write them out again and redo them"
                    )
                paraphrases = edit.get("paraphrases", span.paraphrases)
                if (edit["caption"], paraphrases) != (span.caption, span.paraphrases):
                    captions[level, index] = Caption(edit["caption"], paraphrases, 1.0, self._provenance)
                    before, after = span.caption, edit["caption"]
                    if before == after:
                        before, after = (f"{before} | {' | '.join(p)}" for p in (span.paraphrases, paraphrases))
                    self.changes.append(Change(source, episode, level, index, before, after))
        return with_captions(spans, captions)

    def finish(self) -> None:
        """Raises `UserError` where edits are left whose event was in no episode."""
        if self._left:
            key, edit = next(iter(self._left.items()))
            raise UserError(
                f"line {edit['line']} of the edits: there is no {_name(*key)} ({len(self._left)} such rows); the edits "
                "were made for other events: write them out again and redo them"
            )


def _table(path: str | Path) -> Path:
    path = Path(path).expanduser()
    if path.suffix not in (".csv", ".jsonl"):
        raise UserError(f"edits are a .csv or a .jsonl file, not {str(path)!r}")
    return path


def _name(source: str, episode: str, level: str, index: int) -> str:
    return f"{level} {index} of episode {episode!r} of {source!r}"


def _csv_rows(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    header = text.partition("\n")[0]
    delimiter = ";" if header.count(";") > header.count(",") else ","  # as spreadsheets write in half of Europe
    table = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        for row in table:
            yield table.line_num, row
    except csv.Error as error:
        raise UserError(f"line {table.line_num} of {str(path)!r} is no CSV ({error}); is a quote missing?") from None


def _json_rows(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    for line, content in enumerate(text.split("\n"), 1):
        if content.strip():
            try:
                yield line, json.loads(content)
            except ValueError as error:
                raise UserError(f"line {line} of {str(path)!r} is not JSON ({error})") from None


def _checked(raw: Any, where: str) -> dict[str, Any]:
    """A row with its types; a CSV row is all text."""
    missing = [name for name in _NEEDED if raw.get(name) is None] if isinstance(raw, dict) else list(_NEEDED)
    if missing:
        raise UserError(f"{where} lacks {', '.join(missing)}; an edit needs {', '.join(_NEEDED)}")
    row = {name: raw[name] for name in _NEEDED}
    try:
        row |= {name: int(raw[name]) for name in ("index", "start", "end")}
    except (ValueError, TypeError):
        raise UserError(f"{where}: index, start and end are whole numbers, not {raw!r}") from None
    paraphrases = raw.get("paraphrases")
    try:
        listed = json.loads(paraphrases) if isinstance(paraphrases, str) and paraphrases else paraphrases or []
    except ValueError:
        listed = None
    texts = [row["caption"], *(listed if isinstance(listed, list) else [None])]
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise UserError(f"{where}: the caption is text, the paraphrases a JSON list of texts, and none is empty")
    return row | ({} if paraphrases is None else {"paraphrases": tuple(texts[1:])})
