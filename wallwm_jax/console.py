"""What every command shares: errors a person can act on, progress bars, phase lines, whole files, start and stop."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from absl import app, flags
from etils import epath
from tqdm import tqdm

T = TypeVar("T")

TRY_AGAIN = 75
"""Exit code of a run that nothing is wrong with (EX_TEMPFAIL): it lost a peer, or hung. With --resume it goes on."""


class UserError(Exception):
    """Bad input: the message says what is wrong, where, and what to do. Commands print it in one line, exit code 2."""


def progress(items: Iterable[T], *, total: int | None = None, unit: str = "it", label: str = "") -> Iterator[T]:
    """Iterates with a progress bar on standard error; one line every ten seconds where there is no terminal."""
    interactive = sys.stderr.isatty()
    yield from tqdm(
        items,
        total=total,
        unit=unit,
        desc=label,
        dynamic_ncols=interactive,
        mininterval=0.2 if interactive else 10.0,
        maxinterval=10.0,
        file=sys.stderr,
    )


@contextlib.contextmanager
def phase(name: str, seconds: dict[str, float] | None = None) -> Iterator[None]:
    """Prints one line when a phase of work begins and one when it ends; adds its length to `seconds[name]`."""
    print(f"==> {name}", flush=True)
    start = time.monotonic()
    yield
    spent = time.monotonic() - start
    if seconds is not None:
        seconds[name] = seconds.get(name, 0.0) + spent
    print(f"    {name}: done in {spent:.1f} s", flush=True)


def write_text(path: Path | epath.Path, text: str) -> None:
    """Replaces a file at once, so that nobody ever reads half of it; for files that one process writes."""
    temporary = path.with_name(f"{path.name}.partial")
    temporary.write_text(text)
    temporary.replace(path)


def run_command(main: Callable[[list[str]], int | None], *, positional: int = 0) -> None:
    """Starts a command: parses absl flags, turns `UserError` into one line on standard error and exit code 2.

    `main` gets the program's name and up to `positional` arguments that are not flags; more are a usage error.
    """

    def guarded(argv: list[str]) -> int | None:
        logging.getLogger().setLevel(logging.WARNING)
        if len(argv) > 1 + positional:
            raise app.UsageError(f"unexpected arguments: {' '.join(argv[1 + positional :])}")
        try:
            return main(argv)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130

    app.run(guarded, flags_parser=_parse_flags)


def _parse_flags(argv: list[str]) -> list[str]:
    """Parses flags as absl does, but a bad flag, config path or config key is one line, exit code 2."""
    try:
        return flags.FLAGS(argv)
    except (flags.Error, KeyError, AttributeError, TypeError, ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())} (see --help)", file=sys.stderr)
        sys.exit(2)
