"""What measurements share: seconds of repeated calls as quartiles, and the machine that they were taken on."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax
import numpy as np

Result = dict[str, Any]


@dataclass(frozen=True)
class Seconds:
    """Spread of the seconds that one call took, over `count` calls."""

    median: float
    q25: float
    q75: float
    p95: float
    min: float
    max: float
    count: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Seconds:
        """Of one measurement per call."""
        q25, median, q75, p95 = np.quantile(seconds, (0.25, 0.5, 0.75, 0.95)).tolist()
        return cls(median, q25, q75, p95, min(seconds), max(seconds), len(seconds))

    def to_json(self) -> dict[str, float]:
        """All fields by name."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{_short(self.median)} s [{_short(self.q25)}, {_short(self.q75)}]"


def host() -> Result:
    """The processor that this process runs on and how many of its cores it may use."""
    return {"processor": _processor(), "cores": len(os.sched_getaffinity(0)), "jax": jax.__version__}


def machine() -> Result:
    """`host`, the devices of JAX and the flags that their compiler was given."""
    return {
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        **host(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def machine_line(found: Result) -> str:
    """`machine` or `host` in one line for people."""
    devices = f"{found['devices']} x {found['device']}; " if "device" in found else ""
    compiler = f"; libtpu {found['libtpu']}" if "libtpu" in found else ""
    flags = f"; XLA_FLAGS {found['xla_flags']}" if found.get("xla_flags") else ""
    return f"{devices}{found['cores']} cores of {found['processor']}; jax {found['jax']}{compiler}{flags}"


def _processor() -> str:
    with open("/proc/cpuinfo") as lines:
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _short(seconds: float) -> str:
    return f"{seconds:.3g}" if seconds < 100 else f"{seconds:.0f}"
