"""Pictures of an MP4 at exact times, by PyAV."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path

import av
import cv2
import numpy as np
from av.container import InputContainer

from wallwm_jax.sources.columns import BadRecording

_SEEK_S = 2.0  # pictures further ahead are sought from a key frame, nearer ones are decoded up to


def pictures_at(path: Path, field: str, times: Sequence[float], tolerance_s: float) -> Iterator[np.ndarray]:
    """RGB pictures `[H, W, 3]` uint8 shown at `times`, which rise.

    Args:
      field: what the video shows, for messages.
      times: seconds on the file's clock.
      tolerance_s: how far a picture's own time may be from the one that is asked for; half a frame.

    Raises:
      BadRecording: the file is missing, no video, damaged, or has no picture at one of the times.
    """
    try:
        container = _open(path)
        stream = container.streams.video[0]
        frame: av.VideoFrame | None = None
        frames: Iterator[av.VideoFrame] = iter(())
        for wanted in times:
            at = -np.inf if frame is None else _time(frame)
            if at < wanted - tolerance_s - _SEEK_S or at > wanted + tolerance_s:
                assert stream.time_base is not None
                start = max(wanted - tolerance_s, 0.0)
                container.seek(int(start / stream.time_base), stream=stream, backward=True)
                frames, frame = container.decode(stream), None
            while frame is None or _time(frame) < wanted - tolerance_s:
                frame = next(frames, None)
                if frame is None:
                    raise BadRecording(field, f"video ends before {wanted:.3f} s, where a picture is due", str(path))
            if _time(frame) > wanted + tolerance_s:
                raise BadRecording(
                    field, f"no picture at {wanted:.3f} s; the next one is at {_time(frame):.3f} s", str(path)
                )
            if frame.is_corrupt:
                raise BadRecording(field, f"the picture at {wanted:.3f} s is damaged", str(path))
            yield _rgb(frame)
    except (av.error.FFmpegError, OSError, IndexError) as error:
        raise BadRecording(field, f"is no readable video ({error})", str(path)) from None


def frame_rate(path: Path, field: str) -> float:
    """Pictures per second that the file itself states; raises `BadRecording` where it cannot be read."""
    try:
        rate = _open(path).streams.video[0].average_rate
    except (av.error.FFmpegError, OSError, IndexError) as error:
        raise BadRecording(field, f"is no readable video ({error})", str(path)) from None
    return float(rate or 0)


@functools.lru_cache(maxsize=8)
def _open(path: Path) -> InputContainer:
    container = av.open(str(path))
    for stream in container.streams.video:
        if stream.codec_context is None:
            raise OSError("its codec is not known")
        stream.codec_context.thread_count = 1  # workers are processes
    return container


def _time(frame: av.VideoFrame) -> float:
    """Seconds; a frame without time comes before every other."""
    return -np.inf if frame.time is None else frame.time


def _rgb(frame: av.VideoFrame) -> np.ndarray:
    if frame.format.name == "yuv420p" and not (frame.width % 2 or frame.height % 2):
        return cv2.cvtColor(frame.to_ndarray(), cv2.COLOR_YUV2RGB_I420)  # twice as fast as FFmpeg's own conversion
    return frame.to_ndarray(format="rgb24")
