"""The run card: what trained where, with which code, for every start of a run.

    workdir/run_card.json    {"starts": [...]}, the newest last

A start holds its time and first step; fingerprints of config and store; the code's commit; versions; devices,
processes, mesh and torus; the compiler's flags; parameters. Nothing of it names a host.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from wallwm_jax.config import fingerprint
from wallwm_jax.console import write_text
from wallwm_jax.training.goodput import read_starts
from wallwm_jax.training.train_state import TrainState, count

RUN_CARD_FILE = "run_card.json"
_PACKAGES = ("jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
_FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")


def add_start(workdir: Path, config: ConfigDict, mesh: Mesh, state: TrainState, *, store: str, first_step: int) -> str:
    """Appends this start to the run card and returns it as lines for people; for the first process only.

    Args:
      workdir: of the run.
      config: the resolved config.
      mesh: over all devices of the run.
      state: or its shapes.
      store: fingerprint of the event store.
      first_step: index of the first step to come.
    """
    start = {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "step": first_step,
        "stage": config.train.stage,
        "config": fingerprint(config.to_dict()),
        "store": store,
        "code": _code(Path(__file__)),
        "versions": {"python": platform.python_version(), **_versions()},
        "devices": {
            "kind": mesh.devices.flat[0].device_kind,
            "count": mesh.size,
            "processes": jax.process_count(),
            "mesh": dict(mesh.shape),
            **_torus(mesh.devices.flat),
        },
        "flags": {name: os.environ[name] for name in _FLAGS if os.environ.get(name)},
        "parameters": {
            "trained": {group: count(tree) for group, tree in state.trainable.items()},
            "frozen": count(state.frozen),
        },
    }
    path = workdir / RUN_CARD_FILE
    earlier = read_starts(path)
    write_text(path, json.dumps({"starts": [*earlier, start]}, indent=1) + "\n")
    return _describe(start, earlier[-1] if earlier else start)


def _torus(devices: Iterable[Any]) -> dict[str, Any]:
    """Slices and extents of each one's torus, in chips; nothing where the devices have no coordinates."""
    places: dict[int, list[Sequence[int]]] = {}
    for device in devices:
        if coordinates := getattr(device, "coords", None):
            places.setdefault(getattr(device, "slice_index", 0), []).append(coordinates)
    extents = [[max(axis) - min(axis) + 1 for axis in zip(*one)] for one in places.values()]
    return {"slices": len(extents), "extents": extents[0]} if extents else {}


def _describe(start: dict[str, Any], before: dict[str, Any]) -> str:
    """A start in a few indented lines, and which of its parts are others than at the start before."""
    trained, code, devices = start["parameters"]["trained"], start["code"], start["devices"]
    groups = ", ".join(f"{name} {size:,}" for name, size in trained.items())
    commit = f"{code['commit'][:12]}{' with changes' if code['dirty'] else ''}" if code else "not from a git checkout"
    mesh = " x ".join(f"{axis} {size}" for axis, size in devices["mesh"].items() if size > 1)
    torus = "x".join(map(str, devices.get("extents", ())))
    flags = [f"    {name}={value}" for name, value in start["flags"].items()]
    changed = [part for part in ("code", "versions", "devices", "flags") if start[part] != before.get(part)]
    return "\n".join(
        [
            f"    config {start['config']}, store {start['store']}, code {commit}",
            f"    {', '.join(f'{name} {version}' for name, version in start['versions'].items())}",
            *([f"    mesh {mesh}"] if mesh else []),
            *([f"    {devices['slices']} slices of {torus} chips"] if torus else []),
            *flags,
            *([f"    changed since the last start: {', '.join(changed)}"] if changed else []),
            f"    training {sum(trained.values()):,} parameters ({groups}); {start['parameters']['frozen']:,} frozen",
        ]
    )


def _versions() -> dict[str, str]:
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _code(file: Path) -> dict[str, Any] | None:
    """Commit of the checkout that tracks `file`, and whether tracked files differ from it; None outside of any."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(file.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", file.name)  # a checkout around an installed package is not its code
        return {
            "commit": git("rev-parse", "HEAD"),
            "dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
        }
    except (OSError, subprocess.SubprocessError):
        return None
