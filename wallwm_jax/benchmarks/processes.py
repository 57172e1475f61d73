"""What processes of this host have used so far, from /proc; imports nothing, so that worker processes stay small."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path


def cpu_seconds(children: Sequence[int] = ()) -> float:
    """Processor time that this process and the running processes `children` have spent."""
    ticks = 0
    for pid in children:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])  # utime, stime
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def memory(pid: int) -> int:
    """Bytes of a process; memory that it shares counts by its share."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def peak_memory() -> int:
    """The most bytes that this process has held, mapped files included; `getrusage` counts its parent's, too."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
