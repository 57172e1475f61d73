"""Config files: `configs/*.py` with `get_config(arg)` returning a locked `ConfigDict`; each knob stands in `base.py`.

`define_config_flag` is the one flag that commands share: `--config=configs/x.py[:argument]`, and
`--config.section.key=value` to override one knob. A key that does not exist is an error, with the nearest name.
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from wallwm_jax.console import UserError
from wallwm_jax.paths import require_local


def define_config_flag(default: str | None = None) -> flags.FlagHolder[ConfigDict]:
    """Registers `--config`, a file with `get_config()` or `get_config(argument)`, locked against unknown keys."""
    return config_flags.DEFINE_config_file(
        "config", default, "Config file, with an argument after a colon: configs/wan5b.py:video", lock_config=True
    )


def to_json(config: ConfigDict) -> str:
    """The resolved config as sorted, indented JSON (tuples become lists)."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True)


def fingerprint(value: Mapping[str, Any]) -> str:
    """Twelve hex digits that change with any value inside; the same on every host and Python run."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:12]


def require_directory(path: str, what: str, remedy: str) -> Path:
    """Returns `path` as an existing directory, or raises `UserError` with the remedy."""
    if not path:
        raise UserError(f"no {what} given; {remedy}")
    require_local(path, what)
    directory = Path(path).expanduser()
    if not directory.is_dir():
        raise UserError(f"{what} {str(directory)!r} does not exist; {remedy}")
    return directory


def settings(pairs: Sequence[str]) -> dict[str, Any]:
    """{"steps": 20} of --sampling=steps=20; values are Python literals, or words. Raises UserError: no `=`."""
    found = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise UserError(f"--sampling={pair}: write name=value, for example --sampling=steps=20")
        try:
            found[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[name] = value
    return found
