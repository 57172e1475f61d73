"""Writes event stores: episodes in, one record per window out, with index, captions, statistics and metadata.

    with atomic_directory("stores/demo", overwrite=False) as directory:
        summary = write_store(directory, episodes, StoreOptions())

Episodes are taken one at a time, so a store may be far larger than memory. See `wallwm_jax.data.event_store` for the
layout.
"""

from __future__ import annotations

import contextlib
import glob
import io
import json
import os
import re
import shutil
import socket
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import ml_dtypes
import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource

from wallwm_jax.config import fingerprint
from wallwm_jax.console import UserError, progress
from wallwm_jax.data import event_store
from wallwm_jax.data.caption_files import CAPTIONS, EPISODES, Wordings, parent_of, places, save_captions, span_entry
from wallwm_jax.data.normalization import Stats, StatsAccumulator, StreamingMoments, floor_deviation
from wallwm_jax.data.record_files import RecordFiles, record_features
from wallwm_jax.events.actions import ACTION_DIM, relative_actions, state_vector
from wallwm_jax.events.schema import LEVELS, Episode
from wallwm_jax.events.windows import GROUP, KINDS, Window, cut_windows
from wallwm_jax.models.codecs import Codec, get_codec
from wallwm_jax.models.codecs.wan_codec import WanCodec
from wallwm_jax.models.text import TEXT_ENCODERS

if TYPE_CHECKING:
    from wallwm_jax.models.text.umt5 import CaptionEncoder

_BATCHES = 8  # of videos that wait for a codec: sorted by length, a batch holds little padding


@dataclass(frozen=True)
class StoreOptions:
    """What a store holds.

    Attributes:
      codec: name for `get_codec`. Where it is one whose latents are stored, videos are encoded here and only keyframes
        are kept as pictures.
      codec_weights: folder of its converted weights, for the codecs that have some.
      codec_batch: videos that the codec encodes together, over all local devices.
      compute_dtype: of the codec, float32 or bfloat16.
      text_encoder: "bytes" (the model learns to read) or "umt5": every wording of a caption is encoded here.
      text_weights: folder of the text encoder's converted weights.
      kinds, levels, fixed_steps, history: as `cut_windows` takes them.
      prune_static: seconds of the longest pause that event windows keep, see `events.windows`; 0 keeps all.
      heldout_fraction: share of the episodes that only evaluation sees; see `HeldoutChoice`.
      seed: of the places of random windows and of the sample for latent statistics.
      latent_sample: windows whose frames are decoded for `latent_mean` and `latent_std`.

    Raises:
      UserError: an unknown codec, text encoder, kind or level, weights that are missing, or a fraction outside [0, 1).
    """

    codec: str = "haar8"
    codec_weights: str = ""
    codec_batch: int = 8
    compute_dtype: str = "float32"
    text_encoder: str = "bytes"
    text_weights: str = ""
    kinds: tuple[str, ...] = ("event", "fixed")
    levels: tuple[str, ...] = ("subtask", "action")
    fixed_steps: int = 32
    history: int = 1
    prune_static: float = 0.0
    heldout_fraction: float = 0.15
    seed: int = 0
    latent_sample: int = 256

    def __post_init__(self) -> None:
        self.open_codec()
        if self.text_encoder not in TEXT_ENCODERS:
            raise UserError(f"unknown text encoder {self.text_encoder!r}; choose of {', '.join(TEXT_ENCODERS)}")
        described = (
            ("codec", self.codec, "wan_vae", self.codec_weights, get_codec(self.codec).stored),
            ("text encoder", self.text_encoder, "umt5", self.text_weights, self.text_encoder != "bytes"),
        )
        for what, name, kind, weights, needed in described:
            if needed and not weights:
                flag = "--codec_weights" if what == "codec" else "--text_weights"
                raise UserError(
                    f"{what} {name!r} needs its weights: {flag}=DIR, made by `python -m wallwm_jax.convert {kind}`"
                )
            if weights and not needed:
                raise UserError(f"{what} {name!r} has no weights, but {weights!r} was given")
            if weights:
                from wallwm_jax.models.convert.stream import read_conversion

                read_conversion(weights, kind)
        for what, chosen, known in (("window kind", self.kinds, KINDS), ("level", self.levels, LEVELS)):
            unknown = [name for name in chosen if name not in known]
            if unknown or not chosen:
                raise UserError(f"unknown {what} {unknown[0] if chosen else ''!r}; choose of {', '.join(known)}")
        if self.prune_static < 0.0:
            raise UserError(f"prune_static is {self.prune_static}; give seconds, or 0 to keep every frame")
        if not 0.0 <= self.heldout_fraction < 1.0:
            raise UserError(f"heldout_fraction is {self.heldout_fraction}, must be at least 0 and below 1")

    def open_codec(self) -> Codec:
        """The codec, with its weights where it has some."""
        return get_codec(self.codec, self.codec_weights, compute_dtype=self.compute_dtype, batch=self.codec_batch)


@dataclass
class StoreSummary:
    """What a build wrote.

    Attributes:
      episodes: (source, split) → episodes.
      windows: (kind, level) → windows of both splits.
      without_window: episodes that were left out: shorter than a video stride, or no event on the levels asked for.
    """

    episodes: Counter[tuple[str, str]] = field(default_factory=Counter)
    windows: Counter[tuple[str, str]] = field(default_factory=Counter)
    without_window: int = 0


@contextlib.contextmanager
def atomic_directory(target: str | Path, *, overwrite: bool) -> Iterator[Path]:
    """Yields a temporary directory beside `target` that takes its place when the block ends without an exception.

    Until then `target` is untouched, and `open_store` refuses the temporary directory in any other process. What
    killed builds of the same target left behind on this host is deleted first.

    Raises:
      UserError: `target` exists and `overwrite` is off, or it is something else than an event store.
    """
    target = Path(target).expanduser().absolute()
    name, host = glob.escape(target.name), re.sub(r"\W", "_", socket.gethostname())
    for replaced in target.parent.glob(f".{name}.replaced-{host}-*"):  # killed in the middle of taking its place
        if target.exists():
            shutil.rmtree(replaced)
        else:
            os.replace(replaced, target)
    is_store = (target / "store.json").is_file()
    if target.exists() and not (overwrite and is_store):
        remedy = (
            "give --overwrite to replace it, or another path" if is_store else "it is no event store: give another path"
        )
        raise UserError(f"{str(target)!r} already exists; {remedy}")
    target.parent.mkdir(parents=True, exist_ok=True)
    for leftover in target.parent.glob(f".{name}.partial-{host}-*"):
        if not _is_alive(int(leftover.name.rsplit("-", 1)[1])):
            shutil.rmtree(leftover)
    temporary = target.with_name(f".{target.name}.partial-{host}-{os.getpid()}")
    temporary.mkdir()
    try:
        (temporary / event_store.UNFINISHED).write_text(str(os.getpid()))
        yield temporary
        (temporary / event_store.UNFINISHED).unlink()
        replaced = target.with_name(f".{target.name}.replaced-{host}-{os.getpid()}")
        if target.exists():
            os.replace(target, replaced)
        os.replace(temporary, target)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_store(directory: Path, episodes: Iterable[Episode], options: StoreOptions) -> StoreSummary:
    """Writes a complete store of `episodes` into an existing, empty directory; clusters are left at -1.

    The first episode sets the clock, the frame size and the views; a later episode may lack views, not add them.

    Raises:
      UserError: no window at all, or episodes that do not fit together.
    """
    writer = _Writer(directory, options)
    for episode in episodes:
        writer.add(episode)
    writer.finish()
    return writer.summary


class HeldoutChoice:
    """Decides, episode by episode and without knowing how many come, which are held out.

    The share of all episodes so far stays within half an episode of `fraction` wherever sources allow it, and among
    sources the turn goes to the one that is furthest behind. It depends on nothing but the order of the sources.
    """

    def __init__(self, fraction: float) -> None:
        self._fraction = fraction
        self._owed: dict[str, float] = {}  # per source: fraction * episodes - held out

    def split_of(self, source: str) -> str:
        """The split of the next episode, which is one of `source`."""
        self._owed[source] = self._owed.get(source, 0.0) + self._fraction
        tolerance = 1e-9
        due = sum(self._owed.values()) >= 0.5 - tolerance and self._owed[source] >= max(self._owed.values()) - tolerance
        if not due or not self._fraction:
            return "train"
        self._owed[source] -= 1.0
        return "heldout"


class _Writer:
    """State of one build."""

    def __init__(self, directory: Path, options: StoreOptions) -> None:
        self.summary = StoreSummary()
        self._directory, self._options = directory, options
        self._codec, self._text = options.open_codec(), _open_text_encoder(options)
        self._cells: tuple[int, int, int] | None = None  # [h, w, C] where latents are stored
        self._waiting: list[_Waiting] = []
        self._choice = HeldoutChoice(options.heldout_fraction)
        self._splits: dict[str, str] = {}  # of recordings that others may be derived from
        self._first: Episode | None = None
        self._frame_keys: dict[str, str] = {}
        self._records: RecordFiles | None = None
        self._index: dict[str, bytearray] = {}  # rows of INDEX_DTYPE end to end
        self._captions = Wordings()
        self._embodiments: dict[str, int] = {}
        self._sources: dict[str, int] = {}
        self._episodes: list[dict[str, Any]] = []
        self._actions = StatsAccumulator(ACTION_DIM)
        self._states = StatsAccumulator(ACTION_DIM)

    def add(self, episode: Episode) -> None:
        options = self._options
        if self._first is None:
            self._begin(episode)
        self._check_fits(episode)
        windows = cut_windows(
            episode,
            options.kinds,
            levels=options.levels,
            fixed_steps=options.fixed_steps,
            history=options.history,
            longest_pause_s=options.prune_static,
            seed=options.seed,
        )
        if not windows:
            self.summary.without_window += 1
            return
        split = self._splits.get(episode.derived_from) or self._choice.split_of(episode.source)
        self._splits[episode.derived_from or episode.episode_id] = split
        self._waiting.append(_Waiting(episode, len(self._episodes), windows, split))
        self._episodes.append(_episode_entry(episode, len(self._episodes), split))
        self.summary.episodes[episode.source, split] += 1
        videos = sum(len(entry.windows) * len(entry.episode.frames) for entry in self._waiting)
        if not self._codec.stored or videos >= _BATCHES * self._options.codec_batch:
            self._write_waiting()

    def _write_waiting(self) -> None:
        """Writes the windows of the episodes that wait, after encoding their videos together."""
        latents = self._encode_waiting() if self._codec.stored else {}
        for entry in self._waiting:
            for number, window in enumerate(entry.windows):
                self._add_window(
                    entry.episode, entry.number, window, entry.split, latents.get((entry.number, number), {})
                )
        self._waiting = []

    def _encode_waiting(self) -> dict[tuple[int, int], dict[str, np.ndarray]]:
        """(episode, window) → view → bfloat16 latents `[1 + N, h, w, C]`; similar lengths run together."""
        assert isinstance(self._codec, WanCodec)
        jobs = [
            (window.num_latents, entry, number, view)
            for entry in self._waiting
            for number, window in enumerate(entry.windows)
            for view in entry.episode.frames
        ]
        jobs.sort(key=lambda job: job[0])
        videos = (_video(entry.episode, entry.windows[number], view) for _, entry, number, view in jobs)
        encoded = progress(self._codec.encode_videos(videos), total=len(jobs), unit="video", label="encode videos")
        latents: dict[tuple[int, int], dict[str, np.ndarray]] = {}
        for video, (_, entry, number, view) in zip(encoded, jobs):
            latents.setdefault((entry.number, number), {})[view] = video.astype(ml_dtypes.bfloat16)
        return latents

    def _begin(self, episode: Episode) -> None:
        self._first = episode
        self._frame_keys = {view: re.sub(r"\W", "_", view) for view in episode.frames}
        if len(set(self._frame_keys.values())) < len(self._frame_keys):
            raise UserError(f"view names {list(self._frame_keys)} differ only in punctuation; rename one")
        if any(side % stride for side, stride in zip(episode.size, self._codec.stride[1:])):
            raise UserError(
                f"frames of {episode.size[0]}x{episode.size[1]} pixels do not divide into cells of codec "
                f"{self._codec.name!r}, {self._codec.stride[1]}x{self._codec.stride[2]}; choose another size"
            )
        self._cells = event_store.latent_cells(self._codec, episode.size)
        keys, pruned = list(self._frame_keys.values()), self._options.prune_static > 0
        features = record_features(keys, episode.size, self._cells, pruned)
        self._records = RecordFiles(self._directory / event_store.RECORDS, features)

    def _check_fits(self, episode: Episode) -> None:
        assert self._first is not None
        first, name = self._first, f"episode {episode.episode_id!r} of {episode.source!r}"
        for what in ("clock_hz", "video_stride", "size"):
            if getattr(episode, what) != getattr(first, what):
                raise UserError(
                    f"{name} has {what} {getattr(episode, what)}, the store {getattr(first, what)}; "
                    "a store has one clock and one frame size: resample the source first"
                )
        extra = sorted(set(episode.frames) - set(first.frames))
        if extra:
            raise UserError(f"{name} has views {extra} that the first episode lacks ({sorted(first.frames)})")

    def _add_window(
        self, episode: Episode, number: int, window: Window, split: str, latents: Mapping[str, np.ndarray]
    ) -> None:
        assert self._records is not None
        steps = window.action_steps
        actions, action_valid = relative_actions(
            episode.command_poses[steps], episode.command_grippers[steps], episode.poses[window.start]
        )
        state, state_valid = state_vector(episode.poses[window.start], episode.grippers[window.start])
        if split == "train":
            self._actions.add(actions[window.past_actions :], action_valid)
            self._states.add(state, state_valid)
        arrays = {
            "actions": actions,
            "action_valid": action_valid,
            "state": state,
            "state_valid": state_valid,
            "geometry": _geometry(episode, window, list(self._frame_keys)),
            **self._caption_ids(episode, window),
        }
        kept, arrays["keyframes"] = np.arange(len(window.frame_indices)), window.keyframes
        pictures: dict[str, Any] = {}
        if self._cells:
            kept, arrays["keyframes"] = np.unique(window.keyframes, return_inverse=True)
            nothing = np.zeros((0, *self._cells), ml_dtypes.bfloat16)
            pictures["latents"] = {
                key: latents.get(view, nothing).view(np.uint16) for view, key in self._frame_keys.items()
            }
        pictures["frames"] = {
            key: [io.BytesIO(episode.frames[view][window.frame_indices[place]]) for place in kept]
            if view in episode.frames
            else []
            for view, key in self._frame_keys.items()
        }
        example: dict[str, Any] = {
            **pictures,
            "kind": KINDS.index(window.kind),
            "level": LEVELS.index(window.level),
            "episode": number,
            "event_index": window.event_index,
            "start": window.start,
            "span_start": window.span_start,
            "span_end": window.span_end,
            "num_latents": window.num_latents,
            "duration_s": window.duration_s,
        }
        for name, (dtype, shape) in event_store.RECORD_ARRAYS.items():
            example[name] = np.asarray(arrays[name], dtype).reshape([-1 if size is None else size for size in shape])
        if self._options.prune_static:
            example[event_store.TIME_WARP] = window.frame_indices[-window.num_frames :].astype(np.int32)
        row = (
            example["kind"],
            example["level"],
            window.num_latents,
            window.num_actions,
            window.duration_s,
            number,
            window.event_index,
            self._embodiments.setdefault(episode.embodiment, len(self._embodiments)),
            self._sources.setdefault(episode.source, len(self._sources)),
            -1,
            -1,
            self._records.write(split, example),
        )
        self._index.setdefault(split, bytearray()).extend(np.array(row, event_store.INDEX_DTYPE).tobytes())
        self.summary.windows[window.kind, window.level] += 1

    def _caption_ids(self, episode: Episode, window: Window) -> dict[str, list[int]]:
        spans = episode.spans
        starts = {level: [span.start for span in row] for level, row in spans.items()}
        around, after = places(starts, window.level, window.span_start, window.span_end)
        named = [
            [self._captions.add(spans[level][index].caption) if index >= 0 else -1 for level, index in zip(LEVELS, row)]
            for row in (around, after)
        ]
        own = window.event_index if window.kind == "event" else 0
        span = spans[window.level][own]
        if self._text:
            self._captions.add_variants(span.caption, span.paraphrases, parent_of(spans, around), window.duration_s)
        return {
            "level_caption_ids": named[0],
            "next_caption_ids": named[1],
            "paraphrase_ids": [self._captions.add(text) for text in span.paraphrases],
            "previous_caption_ids": [self._captions.add(past.caption) for past in spans[window.level][:own]],
        }

    def finish(self) -> None:
        """Closes the records and writes everything beside them."""
        self._write_waiting()
        if self._records is None or "train" not in self._index or self._first is None:
            raise UserError(
                "no episode gave a window for the train split: they are shorter than a video stride, or have no events "
                "on the chosen levels (--levels, --segment)"
            )
        splits: dict[str, Any] = {}
        for split, shards in self._records.close().items():
            index = np.frombuffer(self._index[split], event_store.INDEX_DTYPE)
            event_store.write_index(self._directory / f"index-{split}.npy", index)
            splits[split] = {
                "windows": len(index),
                "episodes": sum(entry["split"] == split for entry in self._episodes),
                "shards": shards,
                "fingerprint": f"{zlib.crc32(index.tobytes()):08x}",
            }
        features = None
        if self._text:
            self._captions.add("")
            features = self._text.encode(list(self._captions.ids))
        save_captions(self._directory / CAPTIONS, list(self._captions.ids), features)
        (self._directory / EPISODES).write_text(json.dumps(self._episodes))
        mean, std, sampled = self._latent_stats(splits["train"])
        counts = {f"{kind}_{level}": count for (kind, level), count in sorted(self.summary.windows.items())}
        Stats(self._actions.result(), self._states.result(), mean, std, {**counts, "latent_sample": sampled}).save(
            self._directory / "stats.json"
        )
        meta = self._meta(splits)
        meta["fingerprint"] = fingerprint(meta)
        (self._directory / "store.json").write_text(json.dumps(meta, indent=2) + "\n")

    def _latent_stats(self, train: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, int]:
        """Mean and deviation `[C]` of the future latents of a random sample of train windows.

        Latent 0 is left out: it is given, never predicted, and its temporal details are zero by construction. Codecs
        with published statistics keep those: Wan's transformers expect them.
        """
        if isinstance(self._codec, WanCodec):
            return self._codec.latent_mean, self._codec.latent_std, 0
        rng = np.random.default_rng([self._options.seed, 1])
        chosen = np.sort(rng.permutation(train["windows"])[: self._options.latent_sample])
        records = ArrayRecordDataSource(event_store.shard_instructions(self._directory, train))
        assert self._first is not None
        stride, pruned = self._first.video_stride, self._options.prune_static > 0
        layout = event_store.RecordLayout(self._frame_keys, None, stride, pruned)
        moments = StreamingMoments(self._codec.channels)
        for number in progress(chosen.tolist(), unit="window", label="latent statistics"):
            record = event_store.parse_record(records[number], number, layout)
            for view in record.frames:
                moments.add(self._codec.encode(record.video(view))[1:])
        return moments.mean.astype(np.float32), floor_deviation(moments.std), len(chosen)

    def _meta(self, splits: dict[str, Any]) -> dict[str, Any]:
        first, options = self._first, self._options
        assert first is not None
        views = list(self._frame_keys)
        return {
            "schema_version": event_store.SCHEMA_VERSION,
            "codec": options.codec,
            **_describe_weights("codec_weights", "wan_vae", options.codec_weights),
            "text_encoder": options.text_encoder,
            **_describe_weights("text_weights", "umt5", options.text_weights),
            **({"text_width": self._text.config.width} if self._text else {}),
            "clock_hz": first.clock_hz,
            "video_fps": first.clock_hz / first.video_stride,
            "action_hz": first.clock_hz,
            "video_stride": first.video_stride,
            "actions_per_latent": GROUP * first.video_stride,
            "size": list(first.size),
            "views": views,
            "cameras": {view: 1 + number for number, view in enumerate(views)},
            "frame_keys": self._frame_keys,
            "embodiments": list(self._embodiments),
            "sources": list(self._sources),
            "kinds": list(options.kinds),
            "levels": list(options.levels),
            "fixed_steps": options.fixed_steps if {"fixed", "history"} & set(options.kinds) else None,
            "history_latents": options.history if "history" in options.kinds else 0,
            **({"prune_static": options.prune_static} if options.prune_static else {}),
            "heldout_fraction": options.heldout_fraction,
            "seed": options.seed,
            "splits": splits,
        }


@dataclass(frozen=True)
class _Waiting:
    """An episode whose windows are not written yet."""

    episode: Episode
    number: int
    windows: Sequence[Window]
    split: str


def _open_text_encoder(options: StoreOptions) -> CaptionEncoder | None:
    if options.text_encoder == "bytes":
        return None
    from wallwm_jax.models.text.umt5 import CaptionEncoder

    return CaptionEncoder.from_directory(options.text_weights)


def _describe_weights(name: str, kind: str, folder: str) -> dict[str, dict[str, str]]:
    """What `store.json` says of a build's weights: where they were, and their fingerprint."""
    if not folder:
        return {}
    from wallwm_jax.models.convert.stream import weights_fingerprint

    path = str(Path(folder).expanduser().absolute())
    return {name: {"folder": path, "fingerprint": weights_fingerprint(folder, kind)}}


def _video(episode: Episode, window: Window, view: str) -> np.ndarray:
    """Frames `[1 + 4(M + N), H, W, 3]` uint8 of a window, the last one held to the end."""
    frames = []
    for position in window.frame_indices:
        picture = cv2.imdecode(np.frombuffer(episode.frames[view][position], np.uint8), cv2.IMREAD_COLOR)
        if picture is None:
            raise UserError(f"frame {position} of view {view!r} of episode {episode.episode_id!r} is no JPEG picture")
        frames.append(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB))
    count = 1 + GROUP * (window.num_latents - 1)
    return np.stack(frames + [frames[-1]] * (count - len(frames)))


def _geometry(episode: Episode, window: Window, views: list[str]) -> np.ndarray:
    """`[V, M + 1 + N, 21]`: calibration of each view at the last frame of each latent; zeros where there is none."""
    height, width = episode.size
    frames = window.latent_frame_indices
    geometry = np.zeros((len(views), len(frames), event_store.GEOMETRY_DIM), np.float32)
    for number, view in enumerate(views):
        camera = episode.cameras.get(view)
        if camera is None:
            continue
        k = camera.intrinsics
        geometry[number, :, :4] = k[0, 0] / width, k[1, 1] / height, k[0, 2] / width, k[1, 2] / height
        geometry[number, :, 4:9] = camera.distortion
        geometry[number, :, 9:] = np.asarray(camera.extrinsics)[frames, :3, :].reshape(len(frames), 12)
    return geometry


def _episode_entry(episode: Episode, number: int, split: str) -> dict[str, Any]:
    return {
        "id": number,
        "name": episode.episode_id,
        "source": episode.source,
        "embodiment": episode.embodiment,
        "seed": episode.seed,
        "success": bool(episode.success),
        "split": split,
        "num_steps": episode.num_steps,
        "num_frames": episode.num_frames,
        "views": list(episode.frames),
        "provenance": list(episode.provenance),
        "derived_from": episode.derived_from,
        "spans": {
            level: [span_entry(span) for span in episode.spans[level]] for level in LEVELS if level in episode.spans
        },
    }


def _is_alive(process: int) -> bool:
    """Whether a process id of this host is running."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
