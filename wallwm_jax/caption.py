r"""Captions the events of a store anew. Videos, actions and spans stay as they are; only words change.

What people say: write the captions out as a table, edit it, and put it back (CSV for spreadsheets, or JSON lines):

    python -m wallwm_jax.caption out   --store=runs/store --file=captions.csv
    python -m wallwm_jax.caption human --store=runs/store --file=captions.csv --author=ada --dry_run
    python -m wallwm_jax.caption human --store=runs/store --file=captions.csv --author=ada

What the motion says, for robots whose data knows no objects ("lower the open gripper by about 10 cm"):

    python -m wallwm_jax.caption templates --store=runs/store --levels=subtask,action

What a vision-language model says, of a picture per event, through any OpenAI-compatible server. Look at some of the
pictures before you pay for all of them:

    python -m wallwm_jax.caption sheets --store=runs/store --episodes=2 --out=sheets
    OPENAI_API_KEY=... python -m wallwm_jax.caption vlm --store=runs/store --endpoint=https://api.openai.com/v1 \
        --model=gpt-5-mini --prices=0.25,2.0 --max_cost=5

Answers are kept in a journal (--journal), so a run that was stopped, or reached --max_cost or --max_tokens, goes on
where it was, and asks nothing twice; until all events are answered the store keeps its captions (--partial uses what
there is). An event without a valid answer keeps its caption with confidence 0.1.

--dry_run shows what would change (vlm asks all the same, and keeps the answers). The new captions are a layer beside
the old ones, in use from one moment to the next; to go back, delete "captions" in store.json. Runs that have the store
open see the old ones, and a run that is resumed notices that the store changed. Text features are computed again where
the store has them, and the store is clustered again, since what is said is part of what is clustered (--nocluster
leaves the clusters; a store that is clustered by your own vectors of its captions needs it).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from absl import app, flags

from wallwm_jax.console import TRY_AGAIN, UserError, phase, run_command
from wallwm_jax.events.schema import LEVELS

if TYPE_CHECKING:
    from wallwm_jax.events.captioners import Captioner, Spans

_PARTS = {
    "out": ("file",),
    "human": ("file", "author"),
    "templates": ("levels",),
    "sheets": ("levels", "out", "episodes"),
    "vlm": (
        "levels",
        "endpoint",
        "model",
        "journal",
        "prices",
        "max_cost",
        "max_tokens",
        "concurrency",
        "key_name",
        "partial",
    ),
}
_SHOWN = 20  # changes that are printed


def _define_flags() -> None:
    flags.DEFINE_string("store", None, "Event store, made by python -m wallwm_jax.build_events", required=True)
    flags.DEFINE_string("file", "", "out, human: table of captions, .csv or .jsonl")
    flags.DEFINE_string("author", "", "human: who edited, for the provenance")
    flags.DEFINE_list("levels", ["subtask", "action", "segment"], "templates, sheets, vlm: levels to caption")
    flags.DEFINE_string("out", "sheets", "sheets: folder for the pictures")
    flags.DEFINE_integer("episodes", 1, "sheets: episodes to draw", 1)
    flags.DEFINE_string("endpoint", "", "vlm: address of the server, up to and with /v1")
    flags.DEFINE_string("model", "", "vlm: name of the model there")
    flags.DEFINE_string("key_name", "OPENAI_API_KEY", "vlm: environment variable with the key; unset for none")
    flags.DEFINE_string(
        "journal", "", "vlm: JSON lines of finished answers; by default captions/journal.jsonl in the store"
    )
    flags.DEFINE_list("prices", ["0", "0"], "vlm: price of a million tokens, in and out, in any currency")
    flags.DEFINE_float("max_cost", 0.0, "vlm: stop before the answers cost more than this; 0 is no limit", 0.0)
    flags.DEFINE_integer("max_tokens", 0, "vlm: stop before more tokens than these are used; 0 is no limit", 0)
    flags.DEFINE_integer("concurrency", 8, "vlm: questions on their way at a time", 1)
    flags.DEFINE_bool("partial", False, "vlm: use the answers even where the limit left events without one")
    flags.DEFINE_bool("dry_run", False, "Show what would change, and change nothing")
    flags.DEFINE_bool("cluster", True, "Cluster the store again afterwards, if it was")
    flags.DEFINE_string("text_weights", "", "Weights of the frozen text encoder; by default those of the build")


def main(argv: list[str]) -> int:
    """The command; see the module docstring."""
    values = flags.FLAGS
    if len(argv) != 2 or argv[1] not in _PARTS:
        raise app.UsageError(f"say who captions: python -m wallwm_jax.caption {{{','.join(_PARTS)}}} --store=...")
    part = argv[1]
    for name in {name for names in _PARTS.values() for name in names} - set(_PARTS[part]):
        if values[name].present:
            raise UserError(f"--{name} is not for {part}, which takes --{', --'.join(_PARTS[part])}")
    unknown = [level for level in values.levels if level not in LEVELS]
    if unknown:
        raise UserError(f"unknown level {unknown[0]!r}; choose of {', '.join(LEVELS)}")
    if part == "out":
        return _write_out(values.store, values.file)
    if part == "sheets":
        return _draw_sheets(values.store, values.levels, values.episodes, Path(values.out))
    if not values.dry_run and _clusters_follow(values):
        from wallwm_jax.data.clusters import check_cluster_again

        check_cluster_again(values.store)
    if part == "vlm":
        return _ask(values)
    if part == "human":
        return _put_back(values)
    from wallwm_jax.events.captioners.templates import TemplateCaptioner

    said = _captioned(values.store, TemplateCaptioner(values.levels))
    return _apply(values, _events(values.store), said, "templates")


def _write_out(store: str, file: str) -> int:
    from wallwm_jax.events.captioners.human import write_edits

    if not file:
        raise UserError("say where to: --file=captions.csv or --file=captions.jsonl")
    rows = write_edits(file, ((source, name, spans) for source, name, spans in _events(store)))
    print(f"{file}: {rows} captions")
    return 0


def _put_back(values: flags.FlagValues) -> int:
    from wallwm_jax.events.captioners.human import HumanCaptioner, read_edits

    if not values.file:
        raise UserError("say which table was edited: --file=captions.csv or --file=captions.jsonl")
    captioner = HumanCaptioner(read_edits(values.file), values.author)
    before = list(_events(values.store))
    spans = [captioner.revise(source, name, spans) for source, name, spans in before]
    captioner.finish()
    if not captioner.changes:
        print("nothing changed")
        return 0
    return _apply(values, before, spans, f"human:{values.author}" if values.author else "human")


def _events(store: str) -> Iterator[tuple[str, str, Spans]]:
    from wallwm_jax.data.event_store import open_store
    from wallwm_jax.data.recaption import stored_spans

    for entry, spans in zip(open_store(store).episodes, stored_spans(store)):
        yield entry["source"], entry["name"], spans


def _captioned(store: str, captioner: Captioner) -> list[Spans]:
    from wallwm_jax.data.recaption import read_episodes

    with phase("caption the events"):
        return [episode.spans for episode in captioner.caption(read_episodes(store))]


def _clusters_follow(values: flags.FlagValues) -> bool:
    """Whether the store is clustered again after its captions."""
    from wallwm_jax.data.event_store import open_store

    return values.cluster and bool((open_store(values.store).index["cluster_vl"] >= 0).any())


def _apply(
    values: flags.FlagValues, before: Iterable[tuple[str, str, Spans]], spans: list[Spans], captioner: str
) -> int:
    """Shows the changes, and writes them unless it is a dry run."""
    from wallwm_jax.data.clusters import cluster_again
    from wallwm_jax.data.recaption import write_layer

    for line in _changes(before, spans):
        print(f"  {line}")
    if values.dry_run:
        return 0
    with phase("write captions"):
        summary = write_layer(values.store, spans, captioner, text_weights=values.text_weights)
    if _clusters_follow(values):
        with phase("cluster windows"):
            cluster_again(values.store)
    told = ", ".join(f"{count} on level {level}" for level, count in summary.changed.items() if count)
    print(f"{values.store}: captions changed: {told or 'none'}; {summary.wordings} wordings")
    return 0


def _changes(before: Iterable[tuple[str, str, Spans]], after: list[Spans]) -> Iterator[str]:
    """Lines that say what is otherwise, the first `_SHOWN` of them."""
    lines = [
        f"{name} {level} {index}: {old.caption!r} -> {new.caption!r}"
        if old.caption != new.caption
        else f"{name} {level} {index}: {old.caption!r}, other paraphrases"
        for (_, name, spans), revised in zip(before, after)
        for level, row in spans.items()
        for index, (old, new) in enumerate(zip(row, revised[level]))
        if (old.caption, old.paraphrases) != (new.caption, new.paraphrases)
    ]
    yield from lines[:_SHOWN]
    yield f"{len(lines)} captions change" + (
        f", {len(lines) - _SHOWN} of them not shown" if len(lines) > _SHOWN else ""
    )


def _draw_sheets(store: str, levels: list[str], episodes: int, out: Path) -> int:
    from wallwm_jax.data.event_store import open_store
    from wallwm_jax.data.recaption import read_episodes
    from wallwm_jax.events.captioners.contact_sheet import contact_sheet

    chosen = range(min(episodes, len(open_store(store).episodes)))
    out.mkdir(parents=True, exist_ok=True)
    drawn = 0
    for number, episode in zip(chosen, read_episodes(store, chosen)):
        for level in (level for level in levels if level in episode.spans):
            for index, span in enumerate(episode.spans[level]):
                (out / f"{number:04d}-{level}-{index:03d}.jpg").write_bytes(contact_sheet(episode, span))
                drawn += 1
    print(f"{out}: {drawn} contact sheets")
    return 0


def _ask(values: flags.FlagValues) -> int:
    from wallwm_jax.data.event_store import open_store

    try:
        from wallwm_jax.events.captioners.vlm import VlmCaptioner, VlmOptions
    except ImportError as error:
        raise UserError(f"{error}; asking a model needs pip install 'wallwm_jax[captions]'") from None

    open_store(values.store)  # before anything is asked or written
    try:
        prices = tuple(float(price) for price in values.prices)
        price_in, price_out = prices
    except ValueError:
        raise UserError(f"--prices={','.join(values.prices)}: two numbers are needed, in and out") from None
    if values.max_cost and not any(prices):
        raise UserError("--max_cost needs --prices=IN,OUT, of a million tokens")
    options = VlmOptions(
        endpoint=values.endpoint,
        model=values.model,
        key=os.environ.get(values.key_name, ""),
        levels=tuple(values.levels),
        concurrency=values.concurrency,
        prices=(price_in, price_out),
        max_cost=values.max_cost,
        max_tokens=values.max_tokens,
    )
    journal = Path(values.journal or Path(values.store) / "captions" / "journal.jsonl")
    captioner = VlmCaptioner(options, journal)
    spans = _captioned(values.store, captioner)
    done = captioner.summary
    print(
        f"{done.captioned} events captioned ({done.resumed} of them before), {done.invalid} without a valid answer, "
        f"{done.left} left; {done.asked} requests ({done.retried} after a fault, {done.corrected} corrections); "
        f"{sum(done.tokens):,} tokens, cost {done.cost:.2f}; journal {journal}"
    )
    if done.left and not values.partial:
        print("the limit is reached and the store as it was: raise the limit and run again, or give --partial")
        return TRY_AGAIN
    return _apply(values, _events(values.store), spans, f"vlm:{values.model}")


if __name__ == "__main__":
    _define_flags()
    run_command(main, positional=1)
