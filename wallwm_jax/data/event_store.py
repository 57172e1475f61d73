"""The event store: one checked record per window, beside a memory-mapped index, captions, statistics and episodes.

A store is a directory, made by `wallwm_jax.build_events`:

    store.json           what the store is: codec, text encoder, clock, views, camera table, splits, schema version
    index-<split>.npy    one row of `INDEX_DTYPE` per window, followed by the CRC-32 of the file's bytes before it
    tfds/events/1.0.0/   the records, ArrayRecord files that `tfds.data_source("events", data_dir=store / "tfds")` opens
    captions.npz         every distinct caption once
    text_features.npy    of stores with a frozen text encoder: its bfloat16 features of every caption, end to end
    stats.json           `wallwm_jax.data.normalization.Stats`
    episodes.json        per episode: source, seed, success, split, spans of all levels
    captions/            of stores that were captioned again: see `wallwm_jax.data.caption_files`

A record holds the window's frames as JPEG where the codec is cheap (haar), else bfloat16 latents and only keyframes.
Reading needs neither JAX nor TensorFlow, is safe from several threads, and a store can be pickled into processes.
"""

from __future__ import annotations

import functools
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import simplejpeg
from array_record.python.array_record_data_source import ArrayRecordDataSource

from wallwm_jax.config import fingerprint
from wallwm_jax.console import UserError
from wallwm_jax.data.caption_files import CAPTIONS, EPISODES, TEXT_FEATURES, SpanCaptions, load_captions
from wallwm_jax.data.normalization import Stats
from wallwm_jax.events.actions import ACTION_DIM
from wallwm_jax.events.schema import LEVELS
from wallwm_jax.events.windows import GROUP, KINDS
from wallwm_jax.models.codecs import Codec, get_codec, to_uint8
from wallwm_jax.models.codecs.haar import HaarCodec
from wallwm_jax.paths import require_local

SCHEMA_VERSION = 1
GEOMETRY_DIM = 21  # fx/W fy/H cx/W cy/H, k1 k2 p1 p2 k3, world-from-camera 3x4 row-major
RECORDS = Path("tfds", "events", "1.0.0")
UNFINISHED = "UNFINISHED"  # a file in the directory of a build that has not ended, holding the builder's process id

INDEX_DTYPE = np.dtype(
    [
        ("kind", np.int8),  # index into KINDS
        ("level", np.int8),  # index into LEVELS
        ("length", np.int16),  # latents, M + 1 + N
        ("num_actions", np.int16),  # those of the history and T
        ("duration_s", np.float32),  # true seconds of the span, uncapped
        ("episode", np.int32),
        ("event_index", np.int32),  # in its level of its episode
        ("embodiment", np.int16),  # index into meta["embodiments"]
        ("source", np.int16),  # index into meta["sources"]
        ("cluster_vl", np.int32),  # -1 until wallwm_jax.data.clusters ran
        ("cluster_action", np.int32),
        ("checksum", np.uint32),  # CRC-32 of the serialised record
    ]
)

# Arrays of a record: name → dtype and shape, stored as bytes. V counts the views of the store.
RECORD_ARRAYS: dict[str, tuple[type, tuple[int | None, ...]]] = {
    "actions": (np.float32, (None, ACTION_DIM)),
    "action_valid": (np.uint8, (ACTION_DIM,)),
    "state": (np.float32, (ACTION_DIM,)),
    "state_valid": (np.uint8, (ACTION_DIM,)),
    "geometry": (np.float32, (None, GEOMETRY_DIM)),  # [V * (1 + N), 21]
    "keyframes": (np.int32, (4,)),
    "level_caption_ids": (np.int32, (len(LEVELS),)),
    "next_caption_ids": (np.int32, (len(LEVELS),)),
    "paraphrase_ids": (np.int32, (None,)),
    "previous_caption_ids": (np.int32, (None,)),
}
TIME_WARP = "kept_frames"  # [n] int32, only in stores whose pauses are pruned: `Window.kept`
RECORD_INTEGERS = ("kind", "level", "episode", "event_index", "start", "span_start", "span_end", "num_latents")


class BadRecord(Exception):
    """A record that cannot be trusted. `index` is its window, `episode_id` its episode, `reason` what was seen."""

    def __init__(self, index: int, episode_id: int, reason: str) -> None:
        super().__init__(index, episode_id, reason)
        self.index, self.episode_id, self.reason = index, episode_id, reason

    def __str__(self) -> str:
        return f"window {self.index} of episode {self.episode_id}: {self.reason}"


@dataclass(frozen=True)
class WindowRecord:
    """One window as stored. Caption ids refer to `EventStore.caption`; -1 is none. `V` follows `meta["views"]`.

    Attributes:
      index: number of the window in its split.
      kind, level: of `KINDS` and `LEVELS`.
      episode_id, event_index: its place; `episode_id` is an index into `EventStore.episodes`.
      start: control step of the observation.
      span_start, span_end: the true stretch in control steps, neither snapped nor capped.
      duration_s: its true length in seconds, uncapped.
      frame_steps: `[n]` control step of each of its frames from the observation on, without the held padding; one
        video stride apart but where a pause was pruned. `video_stride` actions lead to each but the first.
      frames: view name → `n` JPEG frames, without the held padding; a view that the episode lacks is absent. In a
        store of latents only the distinct keyframes.
      latents: view name → `[1 + N, h, w, C]` bfloat16, of the codec and not normalised; None in a store of frames.
      num_latents: `1 + N`; history windows have their `history` M before, in frames, latents and geometry, too.
      history: latents before that of the observation.
      past_actions: how many of the actions are the history's.
      actions: `[past_actions + T, 32]` float32, canonical, not normalised. action_valid: `[32]` bool.
      state: `[32]` float32 at the observation, not normalised. state_valid: `[32]` bool.
      geometry: `[V, 1 + N, 21]` float32 at the last frame of each latent; zeros for a view without calibration.
      keyframes: `[4]` int32, positions in `frames` at 0, 25, 50 and 75 %.
      level_caption_ids: `[4]` int32 by level: of the window itself and of all coarser levels around it.
      next_caption_ids: `[4]` int32 by level: of the first event that starts at or after the window's end.
      paraphrase_ids: other wordings of the window's own caption.
      previous_caption_ids: of all events before it on its level, in time order; events only.
    """

    index: int
    kind: str
    level: str
    episode_id: int
    event_index: int
    start: int
    span_start: int
    span_end: int
    duration_s: float
    frame_steps: np.ndarray
    frames: dict[str, list[bytes]]
    latents: dict[str, np.ndarray] | None
    num_latents: int
    history: int
    past_actions: int
    actions: np.ndarray
    action_valid: np.ndarray
    state: np.ndarray
    state_valid: np.ndarray
    geometry: np.ndarray
    keyframes: np.ndarray
    level_caption_ids: np.ndarray
    next_caption_ids: np.ndarray
    paraphrase_ids: tuple[int, ...]
    previous_caption_ids: tuple[int, ...]

    @property
    def num_actions(self) -> int:
        """Commands of history and future."""
        return len(self.actions)

    @property
    def caption_id(self) -> int:
        """The caption of the window's own level."""
        return int(self.level_caption_ids[LEVELS.index(self.level)])

    @property
    def parent_caption_id(self) -> int:
        """The caption of the nearest coarser level; -1 for the task level."""
        coarser = self.level_caption_ids[: LEVELS.index(self.level)]
        present = coarser[coarser >= 0]
        return int(present[-1]) if len(present) else -1

    def video(self, view: str) -> np.ndarray:
        """Decoded frames of a view, `[1 + 4N, H, W, 3]` uint8 RGB, the last one held to the end.

        Raises:
          KeyError: the episode has no such view.
          ValueError: the store holds latents; see `EventStore.video`.
          BadRecord: a frame is not a JPEG picture.
        """
        if self.latents is not None:
            raise ValueError("this record holds latents and keyframes, not its whole video")
        count, first = len(self.frames[view]), self._decode(view, 0)
        video = np.empty((1 + GROUP * (self.num_latents - 1), *first.shape), np.uint8)
        video[0] = first
        for position in range(1, count):
            self._decode(view, position, video[position])
        video[count:] = video[count - 1]
        return video

    def picture(self, view: str, position: int) -> np.ndarray:
        """One decoded frame `[H, W, 3]` uint8 RGB; `position` counts the window's own frames, as `keyframes` do."""
        return self._decode(view, position)

    def _decode(self, view: str, position: int, out: np.ndarray | None = None) -> np.ndarray:
        what = f"frame {position} of view {view!r} is not a JPEG picture"
        try:
            picture = simplejpeg.decode_jpeg(self.frames[view][position], buffer=out)
        except ValueError as error:
            raise BadRecord(self.index, self.episode_id, f"{what}, or larger than the first ({error})") from None
        if out is not None and picture.shape != out.shape:
            raise BadRecord(self.index, self.episode_id, f"{what} of the first one's size")
        return picture


class EventStore:
    """One split of an event store, open for reading; made by `open_store`.

    Attributes:
      path, split: where and which.
      meta: the content of `store.json`.
      stats: normalisation statistics of the train split.
      index: memory-mapped array of `INDEX_DTYPE`, one row per window.
      captions: every distinct caption; caption ids are positions in it.
      codec: of the latents; those of Wan know their layout here, but cannot encode or decode.
    """

    def __init__(self, path: Path, split: str, meta: dict[str, Any], index: np.ndarray) -> None:
        self.path, self.split, self.meta, self.index = path, split, meta, index
        self.stats = Stats.load(path / "stats.json")
        self._words = captions_folder(path, meta)
        self._layer = SpanCaptions(self._words) if self._words != path else None
        self.captions = load_captions(self._words / CAPTIONS)
        self.codec = get_codec(meta["codec"])
        self._layout = RecordLayout.of(meta)
        self._records = ArrayRecordDataSource(shard_instructions(path, meta["splits"][split]))
        example_type()  # now: its package replaces Python's importer while it loads, which must not meet other threads

    def __len__(self) -> int:
        return len(self.index)

    def __reduce__(self) -> tuple[Any, ...]:
        return open_store, (str(self.path), self.split)

    def read(self, index: int) -> WindowRecord:
        """The record of window `index`, verified against its checksum.

        Raises:
          IndexError: no such window.
          BadRecord: the record cannot be read, or differs from what was written.
        """
        if not 0 <= index < len(self.index):
            raise IndexError(f"window {index} of {len(self.index)}")
        row = self.index[index]
        try:
            serialized = self._records[index]
        except Exception as error:  # array_record raises whatever its C++ side reports
            raise BadRecord(index, int(row["episode"]), f"unreadable ({' '.join(str(error).split())})") from None
        if zlib.crc32(serialized) != row["checksum"]:
            raise BadRecord(index, int(row["episode"]), "the checksum differs from the index")
        try:
            record = parse_record(serialized, index, self._layout)
        except Exception as error:  # protobuf's and numpy's, of whatever lacks or has another length
            raise BadRecord(index, int(row["episode"]), f"no window of this store ({error!r})") from None
        return record if self._layer is None else replace(record, **self._layer.ids(record))

    def read_latents(self, record: WindowRecord, out: Mapping[str, np.ndarray]) -> None:
        """Writes the normalised latents of a record, as stored or of its frames.

        Args:
          record: of a window.
          out: view → where its latents go, `[M + 1 + N, h, w, C]` float32, contiguous.

        Raises:
          KeyError: the episode has no such view.
          BadRecord: a frame is not a JPEG picture; nothing was written anywhere then.
        """
        if record.latents is not None:
            for view, place in out.items():
                np.subtract(record.latents[view], self.stats.latent_mean, out=place)
                np.divide(place, self.stats.latent_std, out=place)
            return
        videos = [record.video(view) for view in out]
        for video, place in zip(videos, out.values()):
            self._normalized_codec.encode(video, out=place)

    @functools.cached_property
    def _normalized_codec(self) -> HaarCodec:
        assert isinstance(self.codec, HaarCodec)
        return self.codec.normalized(self.stats.latent_mean, self.stats.latent_std)

    def video(self, record: WindowRecord, view: str, codec: Codec) -> np.ndarray:
        """Frames `[1 + 4N, H, W, 3]` uint8 of a record: as stored, or what `codec` decodes of the stored latents."""
        return record.video(view) if record.latents is None else to_uint8(codec.decode(record.latents[view]))

    @property
    def has_text_features(self) -> bool:
        """Whether captions are stored as features of a frozen text encoder."""
        return "text_width" in self.meta

    def text_tokens(self, text: str) -> int | None:
        """How many features a wording has; None where the store does not have it. Needs a frozen text encoder."""
        row = self._wordings.get(text)
        return None if row is None else int(self._text_places[row, 1] - self._text_places[row, 0])

    def text_features(self, text: str) -> np.ndarray:
        """Features `[n, Dt]` bfloat16 of a wording that the store has; needs a frozen text encoder.

        Raises:
          KeyError: the store does not have it; see `text_tokens`.
          UserError: the features are damaged.
        """
        row = self._wordings[text]
        start, end, checksum = self._text_places[row]
        features = self._text_table[start:end]
        if zlib.crc32(features.tobytes()) != checksum:
            raise UserError(
                f"text features of caption {row} ({text!r}) of event store {str(self.path)!r} are damaged; build again"
            )
        return features.view(ml_dtypes.bfloat16)

    @functools.cached_property
    def _wordings(self) -> dict[str, int]:
        return {text: row for row, text in enumerate(self.captions)}

    @functools.cached_property
    def _text_places(self) -> np.ndarray:
        """`[captions, 3]`: first row, end and CRC-32 of each caption's features."""
        with np.load(self._words / CAPTIONS) as captions:
            return captions["features"]

    @functools.cached_property
    def _text_table(self) -> np.ndarray:
        return np.load(self._words / TEXT_FEATURES, mmap_mode="r")

    def channel_weights(self) -> np.ndarray:
        """`[C]` float32: loss weight of each latent channel. Those of the Wan codecs count alike, as in their training;
        of the others the deviation decides, or the model would learn the noise of the finest bands."""
        return np.ones(self.codec.channels, np.float32) if self.codec.stored else self.stats.channel_weights()

    def caption(self, caption_id: int) -> str:
        """The text of a caption id; "" for -1."""
        return self.captions[caption_id] if caption_id >= 0 else ""

    @property
    def fingerprint(self) -> str:
        """Changes with any record, statistic of the build, or cluster of this split: what a resumed run must match."""
        described = {name: value for name, value in self.meta.items() if name != "fingerprint"}
        with open(self.path / f"index-{self.split}.npy", "rb") as file:
            file.seek(-4, os.SEEK_END)
            return f"{fingerprint(described)}-{file.read().hex()}"

    @functools.cached_property
    def episodes(self) -> list[dict[str, Any]]:
        """All episodes of the store (both splits), by episode id: id, name, source, embodiment, seed, success, split,
        num_steps, num_frames, views, provenance, derived_from, and `spans`: level → list of {start, end, caption, verb,
        parent, success, paraphrases, confidence, provenance}; stores of earlier builds lack derived_from and the last
        three.
        """
        return json.loads((self._words / EPISODES).read_text())

    def span(self, index: int) -> dict[str, Any] | None:
        """The event of window `index` as in `episodes`: its caption, verb and true steps; None for other windows."""
        row = self.index[index]
        if KINDS[row["kind"]] != "event":
            return None
        return self.episodes[row["episode"]]["spans"][LEVELS[row["level"]]][row["event_index"]]

    def event_at(self, episode: int, level: str, step: int) -> dict[str, Any] | None:
        """The event of a level that goes on at a control step of an episode, as in `episodes`; None where none does."""
        spans = self.episodes[episode]["spans"].get(level, ())
        return next((span for span in spans if span["start"] <= step < span["end"]), None)

    def events_within(self, record: WindowRecord, level: str) -> list[dict[str, Any]]:
        """The events of a level that go on in a window, as in `episodes`: those of which it shows at least half, or
        which fill at least half of it. At least one, where the episode has the level."""
        start, end = record.span_start, record.span_end
        spans = self.episodes[record.episode_id]["spans"].get(level, ())
        shared = [min(span["end"], end) - max(span["start"], start) for span in spans]
        least = [min(span["end"] - span["start"], end - start) / 2 for span in spans]
        return [span for span, steps, needed in zip(spans, shared, least) if steps >= needed]


def open_store(path: str | Path, split: str = "train") -> EventStore:
    """Opens one split of an event store, after checking everything but the records themselves.

    Raises:
      UserError: no store there, an unfinished build, another schema version, an unknown split, a missing or damaged
        part; the message says which and what to do.
    """
    require_local(path, "event store")
    path = Path(path).expanduser()
    meta = _read_meta(path)
    if split not in meta["splits"]:
        raise UserError(f"event store {str(path)!r} has no split {split!r}; it has {', '.join(meta['splits'])}")
    index = _read_index(path / f"index-{split}.npy")
    windows = meta["splits"][split]["windows"]
    if len(index) != windows:
        raise UserError(
            f"index {str(path / f'index-{split}.npy')!r} has {len(index)} rows, the store {windows} windows"
        )
    for shard in meta["splits"][split]["shards"]:
        if not (path / RECORDS / shard["file"]).is_file():
            raise UserError(f"event store {str(path)!r} lacks the records {shard['file']!r}; build it again")
    if "text_width" in meta:
        _check_text_features(captions_folder(path, meta), meta)
    return EventStore(path, split, meta, index)


def captions_folder(path: Path, meta: Mapping[str, Any]) -> Path:
    """Where the captions in use are: the store itself, or the layer of its last re-caption."""
    return path / meta["captions"]["folder"] if "captions" in meta else path


def write_clusters(path: str | Path, split: str, cluster_vl: np.ndarray, cluster_action: np.ndarray) -> None:
    """Puts cluster ids `[windows]` int32 into the index of a split; all or nothing. Open stores keep the old ones."""
    target = Path(path) / f"index-{split}.npy"
    index = np.array(_read_index(target))
    index["cluster_vl"], index["cluster_action"] = cluster_vl, cluster_action
    write_index(target, index)


def write_index(path: Path, index: np.ndarray) -> None:
    """Writes an index with its CRC-32 behind it, replacing an older one at once."""
    temporary = path.with_suffix(f".{os.getpid()}.partial")
    with open(temporary, "wb") as file:
        np.save(file, index.astype(INDEX_DTYPE, copy=False))
    content = temporary.read_bytes()
    with open(temporary, "ab") as file:
        file.write(zlib.crc32(content).to_bytes(4, "little"))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def shard_instructions(path: Path, split: Mapping[str, Any]) -> list[str]:
    """Record files of a split with their lengths, in the order of the index, as `ArrayRecordDataSource` takes them."""
    return [f"{path / RECORDS / shard['file']}[0:{shard['windows']}]" for shard in split["shards"]]


@dataclass(frozen=True)
class RecordLayout:
    """How the records of a store are read: view name → its key in them, the `[h, w, C]` of stored latents, control
    steps between frames, whether pauses are pruned, and the past of history windows in latents and actions."""

    keys: Mapping[str, str]
    cells: tuple[int, int, int] | None
    stride: int
    pruned: bool
    history: int = 0
    history_actions: int = 0

    @classmethod
    def of(cls, meta: Mapping[str, Any]) -> RecordLayout:
        """That of the store which `meta` describes."""
        history = meta.get("history_latents", 0)
        cells = latent_cells(get_codec(meta["codec"]), meta["size"])
        stride, pruned = meta["video_stride"], "prune_static" in meta
        return cls(meta["frame_keys"], cells, stride, pruned, history, history * meta["actions_per_latent"])


def latent_cells(codec: Codec, size: Sequence[int]) -> tuple[int, int, int] | None:
    """`[h, w, C]` of the latents that stores of this codec hold for frames of `size`; None where they hold frames."""
    return (size[0] // codec.stride[1], size[1] // codec.stride[2], codec.channels) if codec.stored else None


def parse_record(serialized: bytes, index: int, layout: RecordLayout) -> WindowRecord:
    """A serialised record as a `WindowRecord`; ten times faster than the general deserialiser of TFDS."""
    fields = example_type().FromString(serialized).features.feature
    arrays: dict[str, Any] = {
        name: np.frombuffer(fields[name].bytes_list.value[0], dtype).reshape([-1 if n is None else n for n in shape])
        for name, (dtype, shape) in RECORD_ARRAYS.items()
    }
    integers = {name: fields[name].int64_list.value[0] for name in RECORD_INTEGERS}
    frames = {view: list(fields[f"frames/{key}"].bytes_list.value) for view, key in layout.keys.items()}
    frames = {view: pictures for view, pictures in frames.items() if pictures}
    latents = None
    if layout.cells:
        stored = {view: fields[f"latents/{layout.keys[view]}"].bytes_list.value[0] for view in frames}
        latents = {
            view: np.frombuffer(data, ml_dtypes.bfloat16).reshape(-1, *layout.cells) for view, data in stored.items()
        }
    kind = KINDS[integers["kind"]]
    has_past = kind == "history"
    past_actions = min(layout.history_actions, integers["start"]) if has_past else 0
    if layout.pruned:
        frame_steps = layout.stride * np.frombuffer(fields[TIME_WARP].bytes_list.value[0], np.int32)
    else:
        frame_steps = np.arange(0, len(arrays["actions"]) - past_actions + 1, layout.stride) + integers["start"]
    return WindowRecord(
        index=index,
        kind=kind,
        level=LEVELS[integers["level"]],
        episode_id=integers["episode"],
        event_index=integers["event_index"],
        start=integers["start"],
        span_start=integers["span_start"],
        span_end=integers["span_end"],
        duration_s=fields["duration_s"].float_list.value[0],
        frame_steps=frame_steps,
        frames=frames,
        latents=latents,
        num_latents=integers["num_latents"],
        history=layout.history if has_past else 0,
        past_actions=past_actions,
        actions=arrays["actions"],
        action_valid=arrays["action_valid"].astype(bool),
        state=arrays["state"],
        state_valid=arrays["state_valid"].astype(bool),
        geometry=arrays["geometry"].reshape(len(layout.keys), integers["num_latents"], GEOMETRY_DIM),
        keyframes=arrays["keyframes"],
        level_caption_ids=arrays["level_caption_ids"],
        next_caption_ids=arrays["next_caption_ids"],
        paraphrase_ids=tuple(arrays["paraphrase_ids"].tolist()),
        previous_caption_ids=tuple(arrays["previous_caption_ids"].tolist()),
    )


@functools.cache
def example_type() -> Any:
    """The protocol buffer class of a serialised record, `tf.train.Example`."""
    from tensorflow_datasets.proto import tf_example_pb2  # the definition alone, without TensorFlow

    return tf_example_pb2.Example


def _read_meta(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise UserError(f"event store {str(path)!r} does not exist; make one with python -m wallwm_jax.build_events")
    builder = path / UNFINISHED
    if builder.exists() and builder.read_text() != str(os.getpid()):
        raise UserError(f"event store {str(path)!r} is an unfinished build; delete it and build again")
    try:
        meta = json.loads((path / "store.json").read_text())
        version = meta["schema_version"]
    except FileNotFoundError:
        raise UserError(f"{str(path)!r} is not an event store: it has no store.json") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{str(path / 'store.json')!r} is damaged ({error!r}); build the store again") from None
    if version != SCHEMA_VERSION:
        raise UserError(
            f"event store {str(path)!r} has schema version {version}, this code reads {SCHEMA_VERSION}; "
            "build it again with this version"
        )
    return meta


def _check_text_features(path: Path, meta: Mapping[str, Any]) -> None:
    try:
        table = np.load(path / TEXT_FEATURES, mmap_mode="r")
        with np.load(path / CAPTIONS) as captions:
            rows, width = int(captions["features"][-1, 1]), int(meta["text_width"])
    except Exception as error:  # a damaged zip raises from several modules
        raise UserError(
            f"text features of event store {str(path)!r} are missing or damaged ({error}); build it again"
        ) from None
    if table.shape != (rows, width) or table.dtype != np.uint16:
        raise UserError(
            f"text features {str(path / TEXT_FEATURES)!r} are {table.dtype} {list(table.shape)}, the store has "
            f"{rows} rows of {width} values; build it again"
        )


def _read_index(path: Path) -> np.ndarray:
    try:
        content: Any = np.memmap(path, np.uint8, mode="r")
        intact = len(content) > 4 and zlib.crc32(content[:-4]) == int.from_bytes(content[-4:].tobytes(), "little")
        index = np.load(path, mmap_mode="r") if intact else None
    except (OSError, ValueError) as error:
        raise UserError(f"index {str(path)!r} is missing or damaged ({error}); build the store again") from None
    if index is None or index.dtype != INDEX_DTYPE:
        raise UserError(f"index {str(path)!r} is damaged: its checksum or layout is wrong; build the store again")
    return index
