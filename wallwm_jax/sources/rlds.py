"""RLDS sets (Open X-Embodiment's format) on disk as `RecordedSet`: ArrayRecord or TFRecord files, without TensorFlow.

    <name>/<version>/{dataset_info.json, features.json, <name>-<split>.array_record-00000-of-00008 ...}

An episode is one record with a nested `steps` data set. TFDS parses records of either file format itself (protobuf, no
TensorFlow); of the files it opens only ArrayRecord so, hence the dozen lines below that find the records of a TFRecord
file and check their sums. Rows have no times in RLDS: the embodiment's `control_hz` is believed.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from google.protobuf.message import DecodeError
from tensorboardX.record_writer import masked_crc32c

from wallwm_jax.console import UserError
from wallwm_jax.events.schema import LEFT_OUT
from wallwm_jax.sources.columns import BadRecording
from wallwm_jax.sources.embodiment import Embodiment
from wallwm_jax.sources.labels import Label, runs
from wallwm_jax.sources.recorded import Recording

_HEADER, _SUM = struct.Struct("<QI"), struct.Struct("<I")  # TFRecord: length, its checksum, the record, its checksum


class RldsSet:
    """All splits of an RLDS set, one after the other.

    Args:
      path: the folder of one version, or one that holds a single version.

    Raises:
      UserError: it is no RLDS set, or its files are of another format than ArrayRecord and TFRecord.
    """

    fps: float | None = None

    def __init__(self, path: str | Path) -> None:
        root = Path(path).expanduser()
        versions = (
            [root] if (root / "features.json").is_file() else [file.parent for file in root.glob("*/features.json")]
        )
        if len(versions) != 1:
            raise UserError(
                f"{str(path)!r} is no RLDS set: {len(versions)} folders there hold a features.json; give the folder of "
                "one version, such as bridge/1.0.0"
            )
        self.path = str(versions[0])
        try:
            info = _builder(self.path).info
            self.name = f"rlds/{info.name}"
            self._shards = _shards(self.path, info)
            self._kinds = _kinds(self.path, info)
        except UserError:
            raise
        except ImportError as error:
            raise _needs_tensorflow(self.path, error) from None
        except Exception as error:  # of many kinds, whatever is wrong with dataset_info.json or features.json
            raise UserError(f"{self.path!r} is no RLDS set that TFDS can open: {error!r}") from None
        self._ends = np.cumsum([length for _, _, length in self._shards])

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def check(self, embodiment: Embodiment) -> None:
        """Raises `UserError` where the set has not the columns and pictures that a description names."""
        pictures = sorted(key for key, kind in self._kinds.items() if kind == "Image")
        texts = sorted(key for key, kind in self._kinds.items() if kind == "Text")
        numbers = sorted(key for key, kind in self._kinds.items() if kind == "numbers")
        cameras = {camera.column for camera in embodiment.cameras.values()}
        for what, named, present in (
            ("numbers", embodiment.columns, numbers),
            ("pictures", cameras, pictures),
            ("text", {embodiment.task}, texts),
        ):
            for key in sorted(named - set(present)):
                raise UserError(
                    f"{self.path} has no {what} {key!r}, which the embodiment names; "
                    f"it has {', '.join(present) or 'none'}"
                )

    def picture_rate(self, number: int, key: str) -> float | None:
        """None: an RLDS set does not state it."""
        return None

    def recording(self, number: int, embodiment: Embodiment) -> Recording:
        """Rows of one episode, no picture decoded; raises `BadRecording`."""
        shard = int(np.searchsorted(self._ends, number, side="right"))
        file, split, length = self._shards[shard]
        place = number - int(self._ends[shard]) + length
        try:
            return self._recording(number, embodiment, file, split, place)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise BadRecording("steps", f"of record {place} cannot be used: {error!r}", file) from None

    def _recording(self, number: int, embodiment: Embodiment, file: str, split: str, place: int) -> Recording:
        read = _array_record if "array_record" in Path(file).name else _tf_record
        rewordings = sorted(
            key for key, kind in self._kinds.items() if kind == "Text" and key.startswith(f"{embodiment.task}_")
        )
        cameras = {camera.column for camera in embodiment.cameras.values()}
        wanted = frozenset({*embodiment.columns, *cameras, embodiment.task, *rewordings})
        columns = _parse(self.path, wanted, read(file, place), file)
        rows = len(next(iter(columns.values()), ()))
        if not rows:
            raise BadRecording("steps", "no rows", file)
        times = np.arange(rows) / embodiment.control_hz
        tasks = runs(_texts(columns, embodiment.task, file), times)
        reworded, notes = [], []
        for key in rewordings:
            try:
                reworded.append(_texts(columns, key, file)[0])
            except BadRecording as error:  # what is said besides is an extra
                notes.append(f"{key} {LEFT_OUT}: {error.what}")
        first = tasks[0]
        wordings = tuple(dict.fromkeys(text for text in reworded if text.strip() and text != first.caption))
        return Recording(
            name=f"{self.name.partition('/')[2]}/{split}_{number:06d}",
            file=f"{file} record {place}",
            times=times,
            columns={key: columns[key] for key in embodiment.columns if key in columns},
            labels={"task": [Label(first.start_s, first.caption, first.end_s, wordings), *tasks[1:]]},
            pictures=functools.partial(_pictures, columns, file),
            notes=tuple(notes),
        )


def _needs_tensorflow(path: str, error: ImportError) -> UserError:
    return UserError(
        f"{path} has features that TFDS reads with TensorFlow only ({error}); install tensorflow-cpu beside this "
        "package, or leave them out of the set"
    )


@functools.lru_cache(maxsize=4)
def _builder(path: str) -> Any:
    import tensorflow_datasets as tfds

    return tfds.builder_from_directory(path)


def _shards(path: str, info: Any) -> list[tuple[str, str, int]]:
    """(file, split, number of its records) of every file."""
    kind = info.file_format and info.file_format.value
    if kind not in ("array_record", "tfrecord"):
        raise UserError(
            f"{path} holds files of format {kind}; ArrayRecord and TFRecord are read, and "
            "`tfds convert_format` makes ArrayRecord of others"
        )
    shards = [
        (str(file), split, int(length))
        for split, entry in info.splits.items()
        for file, length in zip(entry.filepaths, entry.shard_lengths)
    ]
    for file, _, length in shards:
        if length < 0:
            raise UserError(f"{path}: dataset_info.json: {Path(file).name} has {length} records")
    if not any(length for *_, length in shards):
        raise UserError(f"{path}: dataset_info.json names no records in any split")
    return shards


def _kinds(path: str, info: Any) -> dict[str, str]:
    """What each leaf of a step holds; see `_flat`."""
    if "steps" not in info.features:
        raise UserError(f"{path} has no nested `steps`; it is a TFDS set, but no RLDS set: {list(info.features)}")
    steps = info.features["steps"]
    stored = dict(_leaves(info.features.get_serialized_info()["steps"]))
    ragged = {key: "lists of any length" for key, spec in stored.items() if spec.shape.count(None) > 1}
    return {**dict(_flat(getattr(steps, "feature", steps))), **ragged}


def _flat(features: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Paths of all leaves of a step's features, and what they hold: "Image", "Text" or "numbers"."""
    for key, feature in features.items():
        if hasattr(feature, "items"):
            yield from _flat(feature, f"{prefix}{key}/")
        elif type(feature).__name__ == "Image":
            yield prefix + key, "Image"
        else:
            yield prefix + key, "Text" if np.dtype(feature.np_dtype).kind in "OSU" else "numbers"


@functools.lru_cache(maxsize=4)
def _wanted(path: str, wanted: frozenset[str]) -> tuple[Any, Any]:
    """TFDS features of the wanted leaves of a step alone, and decoders that leave their pictures encoded."""
    import tensorflow_datasets as tfds

    def chosen(features: Any, prefix: str = "") -> dict[str, Any]:
        entries = {
            key: chosen(value, f"{prefix}{key}/") if hasattr(value, "items") else value
            for key, value in features.items()
        }
        return {
            key: value
            for key, value in entries.items()
            if (value if isinstance(value, dict) else prefix + key in wanted)
        }

    def skip(entries: dict[str, Any]) -> dict[str, Any]:
        inner = {key: skip(value) if isinstance(value, dict) else value for key, value in entries.items()}
        return {
            key: value if isinstance(value, dict) else tfds.decode.SkipDecoding()
            for key, value in inner.items()
            if isinstance(value, tfds.features.Image) or (isinstance(value, dict) and value)
        }

    steps = _builder(path).info.features["steps"]
    step = chosen(getattr(steps, "feature", steps))
    return tfds.features.FeaturesDict({"steps": type(steps)(step)}), {"steps": skip(step)}


def _parse(path: str, wanted: frozenset[str], record: bytes, file: str) -> dict[str, np.ndarray]:
    """Wanted columns of one record: path of the leaf → `[N, ...]`; pictures stay encoded."""
    try:
        features, decoders = _wanted(path, wanted)
        steps = features.deserialize_example_np(record, decoders=decoders)["steps"]
        if isinstance(steps, Mapping):  # `steps` is a Sequence: already one array per leaf
            return dict(_leaves(steps))
        rows = [dict(_leaves(step)) for step in steps]
    except ImportError as error:
        raise _needs_tensorflow(path, error) from None
    except (AttributeError, DecodeError, ValueError, KeyError, TypeError, IndexError) as error:
        raise BadRecording("steps", f"the record cannot be parsed: {error!r}", file) from None
    except Exception as error:  # no fault of this record
        raise UserError(
            f"TFDS cannot parse the records of {path}: {error!r}; is features.json that of this set?"
        ) from None
    return {key: np.array([row[key] for row in rows]) for key in (rows[0] if rows else ())}


def _leaves(step: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in step.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}/")
        else:
            yield prefix + key, value


def _texts(columns: Mapping[str, np.ndarray], key: str, file: str) -> list[str]:
    try:
        return [value.decode() if isinstance(value, bytes) else str(value) for value in columns[key].tolist()]
    except UnicodeDecodeError as error:
        raise BadRecording(key, f"is no UTF-8 text: {error}", file) from None


def _pictures(columns: Mapping[str, np.ndarray], file: str, key: str, rows: Sequence[int]) -> Iterator[np.ndarray]:
    for row in rows:
        stored = columns[key][row]
        encoded = np.frombuffer(stored if isinstance(stored, bytes) else b"", np.uint8)
        picture = cv2.imdecode(encoded, cv2.IMREAD_COLOR) if len(encoded) else None
        if picture is None:
            raise BadRecording(key, f"no picture at row {row}", file)
        yield cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)


def _array_record(file: str, place: int) -> bytes:
    try:
        return _array_records(file)[place]
    except (OSError, ValueError, RuntimeError, IndexError) as error:
        raise BadRecording("record", f"cannot be read: {' '.join(str(error).split())}", file) from None


@functools.lru_cache(maxsize=8)
def _array_records(file: str) -> Any:
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    if not Path(file).is_file():
        raise FileNotFoundError("the file is missing")
    return ArrayRecordDataSource([file])


def _tf_record(file: str, place: int) -> bytes:
    try:
        starts = _starts(file)
        if place >= len(starts):
            raise BadRecording("record", f"the file ends after {len(starts)} records", file)
        with open(file, "rb") as stream:
            stream.seek(starts[place])
            length, _ = _HEADER.unpack(stream.read(_HEADER.size))
            record, end = stream.read(length), stream.read(_SUM.size)
    except OSError as error:
        raise BadRecording("record", f"cannot be read: {error}", file) from None
    if len(record) < length or len(end) < _SUM.size or _SUM.unpack(end)[0] != masked_crc32c(record):
        raise BadRecording("record", "is damaged: its checksum is wrong", file)
    return record


@functools.lru_cache(maxsize=64)
def _starts(file: str) -> list[int]:
    """Where the whole records of a TFRecord file begin."""
    starts, place, size = [], 0, Path(file).stat().st_size
    with open(file, "rb") as stream:
        while place + _HEADER.size <= size:
            stream.seek(place)
            header = stream.read(_HEADER.size)
            length, checksum = _HEADER.unpack(header)
            if checksum != masked_crc32c(header[:8]):
                break
            starts.append(place)
            place += _HEADER.size + length + _SUM.size
    return starts
