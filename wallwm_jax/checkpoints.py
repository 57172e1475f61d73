r"""Shows the checkpoints of a run: which there are, whether they are whole, what is inside. Changes nothing.

    python -m wallwm_jax.checkpoints runs/a

    step           written     size    state     ema  whole
      12  2026-11-23 00:22  14.3 MB  10.6 MB  3.6 MB  yes
      15  2026-11-23 00:22  14.3 MB  10.6 MB  3.6 MB  no: state/d/3f91c0 has 4096 of 8713 bytes

Below that stand, for the newest: parameters and dtypes of each group, the event store that it was trained on, and
what its config has otherwise than the run's last start (or than a config file: --config=configs/wan5b.py:video).
The workdir may be gs://BUCKET/... too.

A size is compared with the manifest that was written with the checkpoint, which takes a moment. To read all arrays
and compare their checksums, as resuming does with the one that it takes:

    python -m wallwm_jax.checkpoints runs/a --verify

The same for a script; exit code 3 if a checkpoint is damaged, 0 if all are whole:

    python -m wallwm_jax.checkpoints runs/a --json

A damaged checkpoint needs no repair: --resume goes on from the newest whole one, and renames the damaged ones to
<step>.damaged. To go on from an older one instead, move the newer ones away.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from absl import flags

from wallwm_jax.config import define_config_flag, to_json
from wallwm_jax.console import UserError, run_command
from wallwm_jax.paths import file_sizes, open_path
from wallwm_jax.training.starting import config_changes

DAMAGED_EXIT = 3


def report(workdir: str | Path, config: dict[str, Any] | None = None, *, verify: bool = False) -> dict[str, Any]:
    """What the command prints, as plain JSON.

    Args:
      workdir: of a run.
      config: the resolved config to compare with; None takes that of the run's last start.
      verify: also read the arrays.

    Raises:
      UserError: not the workdir of a run.
    """
    from wallwm_jax.training.checkpoint import CHECKPOINTS, CONFIG_FILE, FROZEN, describe_checkpoints

    run = open_path(workdir)
    found = describe_checkpoints(run, verify=verify)
    if config is None and (run / CONFIG_FILE).is_file():
        config = json.loads((run / CONFIG_FILE).read_text())
    steps = {str(one.step) for one in found}
    others = [path for path in sorted((run / CHECKPOINTS).iterdir()) if path.is_dir() and path.name not in steps]
    return {
        "workdir": str(run),
        "checkpoints": [
            {
                "step": one.step,
                "written": one.written,
                "whole": not one.damage,
                "damage": one.damage,
                "bytes": sum(one.item_bytes.values()),
                "items": one.item_bytes,
                "arrays": one.arrays,
                "store": one.assets.get("store", {}).get("fingerprint", ""),
                "frozen_checksum": one.assets.get("frozen_checksum", ""),
                "config_changes": {knob: list(pair) for knob, pair in config_changes(one.config, config or {}).items()},
            }
            for one in found
        ],
        "frozen_bytes": sum(file_sizes(run / FROZEN).values()),
        "not_used": {path.name: sum(file_sizes(path).values()) for path in others},
    }


def table(found: dict[str, Any]) -> str:
    """The report as a person reads it."""
    rows = [("step", "written", "size", "state", "ema", "whole")]
    for one in found["checkpoints"]:
        whole = "yes" if one["whole"] else f"no: {one['damage']}"
        items = (_size(one["items"][name]) for name in ("state", "ema"))
        rows.append((str(one["step"]), one["written"][:16].replace("T", " "), _size(one["bytes"]), *items, whole))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)) + f"  {row[5]}" for row in rows]
    if found["frozen_bytes"]:
        lines.append(f"frozen parameters: {_size(found['frozen_bytes'])}")
    lines += [f"not used: {name}, {_size(size)}" for name, size in found["not_used"].items()]
    if found["checkpoints"]:
        newest = found["checkpoints"][-1]
        lines += ["", f"step {newest['step']}, trained on event store {newest['store'] or '?'}"]
        for name, dtypes in newest["arrays"].items():
            lines.append(f"  {name:<18}" + ", ".join(f"{number:,} {dtype}" for dtype, number in dtypes.items()))
        for knob, (before, now) in newest["config_changes"].items():
            lines.append(f"  config: {knob} was {before} and is now {now}")
    return "\n".join(lines)


def _size(number: float) -> str:
    power = min(4, int(math.log(max(number, 1), 1000)))
    return f"{number / 1000**power:.{1 if power else 0}f} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def main(arguments: list[str]) -> int:
    """The command."""
    import jax

    if len(arguments) < 2:
        raise UserError("no workdir given; pass the directory of a training run")
    jax.config.update("jax_platforms", "cpu")  # the devices may be busy with the run itself
    values = flags.FLAGS
    config = json.loads(to_json(values.config)) if values.config is not None else None
    found = report(arguments[1], config, verify=values.verify)
    print(json.dumps(found, indent=1) if values.json else table(found))
    return 0 if all(one["whole"] for one in found["checkpoints"]) else DAMAGED_EXIT


if __name__ == "__main__":
    define_config_flag()
    flags.DEFINE_bool("verify", False, "Read all arrays and compare their checksums")
    flags.DEFINE_bool("json", False, "Print JSON")
    run_command(main, positional=1)
