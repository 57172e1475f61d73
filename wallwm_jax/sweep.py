r"""Runs a sweep: arms of overrides times seeds, as training runs of their own, and collects what they found.

Muon against AdamW at four learning rates each, one run at a time:

    python -m wallwm_jax.sweep configs/sweeps/muon_adamw.py:rates --store=runs/quickstart/store --out=runs/sweeps/rates

Stopped or killed, the same command goes on: finished runs are kept, a broken-off one resumes from its checkpoint.
--seeds=0,1 takes other seeds than the file's. --slots=4 runs four at a time on this machine. --commands prints one
shell line per run instead, for other machines that share --out; a call with the same --out then finds those runs
finished. --launcher puts each run on a slice of its own instead ({name} is the run's, OUT is then on all of them):

    python -m wallwm_jax.sweep configs/sweeps/x.py --store=/mnt/bucket/store --out=/mnt/bucket/x --launcher="bash \
        launch/tpu_queued.sh up --name={name} --topology=v6e:2x2 --capacity=spot --project=P --zone=Z" | bash

A run that fails is named with the last lines of its log.txt, the others go on; exit code 1.

--out then holds results.json, results.md (a table with 95 % intervals) and results.png.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from absl import app, flags

from wallwm_jax.console import UserError, progress, run_command, write_text
from wallwm_jax.paths import require_local

if TYPE_CHECKING:
    from wallwm_jax.evaluation.sweeps import Run, Sweep


def run_sweep(sweep: Sweep, out: Path, store: str, slots: int) -> list[Run]:
    """Makes all runs that are not finished; returns those that failed.

    Raises:
      UserError: a run in `out` was made by other commands.
    """
    from wallwm_jax.evaluation import sweeps

    runs = sweeps.plan(sweep)
    todo = [run for run in runs if not _finished(sweep, run, out, store)]
    failed = []
    with ThreadPoolExecutor(slots) as pool:
        futures = {pool.submit(_execute, sweep, run, out, store): run for run in todo}
        print(f"==> {len(runs)} runs, {len(runs) - len(todo)} of them finished; logs in {out}/*/seed-*/log.txt")
        try:
            for future in progress(as_completed(futures), total=len(todo), unit="run"):
                if error := future.result():
                    failed.append(futures[future])
                    print(f"failed: {futures[future].directory}: {error}", file=sys.stderr, flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return failed


def shell_lines(sweep: Sweep, out: Path, store: str, launcher: str = "") -> list[str]:
    """One line per run that does all of it and leaves the mark of a finished run.

    With `launcher`, the words of a launch script with {name} in them, the line hands all of that to the script.
    """
    from wallwm_jax.evaluation import sweeps

    lines = []
    for run in sweeps.plan(sweep):
        commands = sweeps.commands(sweep, run, out, store)
        done = out / run.directory / "done.json"
        mark = f"printf %s {shlex.quote(json.dumps(commands))} > {shlex.quote(str(done))}"
        line = " && ".join([*(shlex.join(["python", "-m", *command]) for command in commands), mark])
        if launcher:
            name = re.sub(r"[^a-z0-9]+", "-", run.directory.lower()).strip("-")
            line = f"{launcher.replace('{name}', name)} -- bash -c {shlex.quote(line)}"
        lines.append(line)
    return lines


def _finished(sweep: Sweep, run: Run, out: Path, store: str) -> bool:
    from wallwm_jax.evaluation import sweeps

    mark = out / run.directory / "done.json"
    if not mark.is_file():
        return False
    if json.loads(mark.read_text()) != sweeps.commands(sweep, run, out, store):
        raise UserError(f"{run.directory} in {str(out)!r} was made by other commands; give another --out, or delete it")
    return True


def _execute(sweep: Sweep, run: Run, out: Path, store: str) -> str:
    """Runs the commands of one run; "" or why it failed."""
    from wallwm_jax.evaluation import sweeps

    directory = out / run.directory
    directory.mkdir(parents=True, exist_ok=True)
    environment = {"JAX_COMPILATION_CACHE_DIR": str(out.absolute() / "compile_cache"), **os.environ}
    commands = sweeps.commands(sweep, run, out, store)
    with (directory / "log.txt").open("a") as log:
        for command in commands:
            code = subprocess.call(
                [sys.executable, "-m", *command], stdout=log, stderr=subprocess.STDOUT, env=environment
            )
            if code:
                log.flush()
                last = (directory / "log.txt").read_text().strip().splitlines()[-1:] or [""]
                return f"{command[0]} ended with code {code}: {last[0]}"
    write_text(directory / "done.json", json.dumps(commands))
    return ""


def _define_flags() -> None:
    flags.DEFINE_string("store", "", "Event store that every run trains on, and is evaluated on.")
    flags.DEFINE_string("out", "", "Directory of the sweep; made if absent.")
    flags.DEFINE_list("seeds", [], "Seeds of each arm, instead of the sweep's.")
    flags.DEFINE_integer("slots", 1, "Runs at a time.", 1)
    flags.DEFINE_bool("commands", False, "Print one shell line per run, and run nothing.")
    flags.DEFINE_string("launcher", "", "Print one launch command per run: a launch script up to its --, with {name}.")


def main(argv: list[str]) -> int:
    """The command; see the module docstring."""
    from wallwm_jax.config import require_directory
    from wallwm_jax.evaluation import sweeps

    values = flags.FLAGS
    if len(argv) != 2:
        raise app.UsageError(
            "name one sweep file: python -m wallwm_jax.sweep configs/sweeps/x.py --store=... --out=..."
        )
    sweep = sweeps.load_sweep(argv[1])
    if values.seeds:
        if not all(seed.isdecimal() for seed in values.seeds):
            raise UserError(f"--seeds={','.join(values.seeds)}: give whole numbers, for example --seeds=0,1,2")
        sweep = replace(sweep, seeds=tuple(int(seed) for seed in values.seeds))
    store = str(require_directory(values.store, "store", "pass --store=DIR, made by python -m wallwm_jax.build_events"))
    if sweep.measure_store:
        require_directory(sweep.measure_store, "store to measure on", "build it as the docstring of the sweep says")
    if not values.out:
        raise UserError("no --out given; pass a directory for the runs and the results")
    require_local(values.out, "out")
    out = Path(values.out).expanduser()
    if values.launcher and "{name}" not in values.launcher:
        raise UserError(f"--launcher={values.launcher!r} would give all runs one name; put {{name}} in it")
    if values.commands or values.launcher:
        print("\n".join(shell_lines(sweep, out, store, values.launcher)))
        return 0
    failed = run_sweep(sweep, out, store, values.slots)
    results = sweeps.collect(sweep, out)
    write_text(out / "results.json", json.dumps(results.to_json(), indent=1))
    write_text(out / "results.md", results.table())
    (out / "results.png").write_bytes(results.picture())
    print(results.table())
    print(f"results: {out / 'results.md'}, {out / 'results.png'}")
    return 1 if failed else 0


if __name__ == "__main__":
    _define_flags()
    run_command(main, positional=1)
