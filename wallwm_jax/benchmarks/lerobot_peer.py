"""The loader's public twin: LeRobot's dataset behind PyTorch's DataLoader, on the same windows in the same batches.

Runs as a process of its own, without JAX; needs `lerobot`, whose requirements would replace others: pip install
--no-deps lerobot==0.4.4 torchvision accelerate, and datasets. A window is one item: with `delta_timestamps` for exactly
its frames of every camera and its actions. Items of a batch are laid end to end, as our rows are, without padding.
"""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from wallwm_jax.benchmarks.processes import cpu_seconds, memory
from wallwm_jax.console import UserError

Window = tuple[int, int, int]
"""Row of the set at which a window begins, its frames and its actions."""

_NEEDS = (
    "it needs pip install --no-deps lerobot==0.4.4 torchvision accelerate, torch, av and datasets, or leave --peer out"
)


@dataclass(frozen=True)
class Job:
    """What the twin loads.

    Attributes:
      root: the set, of version 3.
      stride: rows between two frames.
      workers: processes; 0 loads in this one.
      warm_up: batches before those that are timed.
      batches: windows of each batch; those after the timed ones keep the workers busy.
      steps: batches that are timed.
    """

    root: str
    stride: int
    workers: int
    warm_up: int
    steps: int
    batches: Sequence[Sequence[Window]]


def check() -> None:
    """Raises `UserError` where LeRobot is not installed."""
    if importlib.util.find_spec("lerobot") is None:
        raise UserError(f"--peer: LeRobot is not installed; {_NEEDS}")


def run(job: Job) -> dict[str, Any]:
    """Times the twin.

    Returns:
      `what` was timed with which video decoder, `first_batch_seconds`, `seconds` of each timed batch, their
      `cpu_seconds` and `frames` (of all cameras) together, and `worker_bytes`, one per worker.

    Raises:
      UserError: LeRobot is not installed, or failed.
    """
    line = [sys.executable, "-m", __name__]
    home = str(Path(job.root).with_name("huggingface"))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": home, "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run(line, input=json.dumps(asdict(job)), env=environment, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise UserError(f"--peer failed: {reason}; {_NEEDS}")
    return json.loads(done.stdout.splitlines()[-1])


class _Windows:
    """The windows of a set as PyTorch's DataLoader takes them."""

    def __init__(self, data: Any, stride: int) -> None:
        self._data, self._stride = data, stride

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, window: Window) -> dict[str, Any]:
        row, frames, actions = window
        pictures = [self._stride * number for number in range(frames)]
        cameras = dict.fromkeys(self._data.meta.video_keys, pictures)
        self._data.delta_indices = {**cameras, "action": list(range(actions))}  # what delta_timestamps becomes
        return self._data[row]


def _end_to_end(items: list[dict[str, Any]]) -> dict[str, Any]:
    import torch

    lined_up = [key for key in items[0] if key == "action" or key.startswith("observation.images.")]
    lined_up = [key for key in lined_up if not key.endswith("_is_pad")]
    batch: dict[str, Any] = {key: torch.cat([item[key] for item in items]) for key in lined_up}
    batch["observation.state"] = torch.stack([item["observation.state"] for item in items])
    return {**batch, "task": [item["task"] for item in items]}


def _decoder(package: Any) -> str:
    """LeRobot's preferred video decoder, else ours by PyAV; its own way to PyAV left torchvision with 0.25."""
    try:
        import torchcodec
    except (ImportError, RuntimeError):  # RuntimeError: no FFmpeg
        import av

        package.decode_video_frames = _by_pyav
        return f"av {av.__version__}, read by wallwm_jax"
    return f"torchcodec {torchcodec.__version__}"


def _by_pyav(path: Path, times: list[float], tolerance_s: float, _: str | None = None) -> Any:
    import numpy as np
    import torch

    from wallwm_jax.sources.lerobot.video import pictures_at

    frames = np.stack(list(pictures_at(Path(path), "frames", times, max(tolerance_s, 1e-3))))
    return torch.from_numpy(frames).permute(0, 3, 1, 2).to(torch.float32) / 255


def _measure(job: Job) -> dict[str, Any]:
    import torch
    from lerobot import __version__
    from lerobot.datasets import lerobot_dataset

    torch.set_num_threads(1)  # in this process, too: waiting threads would count as processor time
    decoder = _decoder(lerobot_dataset)
    data = lerobot_dataset.LeRobotDataset("peer", root=job.root)
    windows: Any = _Windows(data, job.stride)
    batch_sampler: Any = job.batches
    begun = time.perf_counter()
    batches = iter(
        torch.utils.data.DataLoader(
            windows, batch_sampler=batch_sampler, num_workers=job.workers, collate_fn=_end_to_end
        )
    )
    next(batches)
    first = time.perf_counter() - begun
    for _ in range(job.warm_up - 1):
        next(batches)
    mine = [child.pid for child in multiprocessing.active_children() if child.pid]
    seconds, frames, cpu = [], 0, cpu_seconds(mine)
    for _ in range(job.steps):
        begun = time.perf_counter()
        batch = next(batches)
        seconds.append(time.perf_counter() - begun)
        frames += sum(len(batch[key]) for key in data.meta.video_keys)
    cpu, sizes = cpu_seconds(mine) - cpu, [memory(pid) for pid in mine]
    return {
        "what": f"lerobot {__version__}, torch {torch.__version__}, {decoder}",
        "first_batch_seconds": first,
        "seconds": seconds,
        "cpu_seconds": cpu,
        "frames": frames,
        "worker_bytes": sizes,
    }


if __name__ == "__main__":
    print(json.dumps(_measure(Job(**json.load(sys.stdin)))))
