"""Writes RLDS sets for tests with TFDS itself: ArrayRecord files, or the same records framed as TFRecord."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter
from recorded_motion import FRONT, HEIGHT, WIDTH, WRIST, Raw
from tensorboardX.record_writer import masked_crc32c

DESCRIPTION_CHANGES = {
    "observation.images.front": "observation/image",
    "observation.images.wrist": "observation/wrist_image",
    "observation.state[": "observation/state[",
}


def write_set(folder: Path, raws: Sequence[Raw]) -> Path:
    """Writes an ArrayRecord set of one split; returns the folder of its version."""
    import tensorflow_datasets as tfds

    picture = tfds.features.Image(shape=(HEIGHT, WIDTH, 3), encoding_format="jpeg")
    step = {
        "observation": {
            "image": picture,
            "wrist_image": picture,
            "state": tfds.features.Tensor(shape=(7,), dtype=np.float32),
        },
        "action": tfds.features.Tensor(shape=(7,), dtype=np.float32),
        "language_instruction": tfds.features.Text(),
        "language_instruction_2": tfds.features.Text(),
        "is_last": np.bool_,
    }

    class Arm(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = "test_arm"
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict({"steps": tfds.features.Dataset(step)})
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for number, raw in enumerate(raws):
                yield number, {"steps": [_step(raw, row) for row in range(len(raw.times))]}

    builder = Arm(data_dir=str(folder), file_format="array_record")
    builder.download_and_prepare()
    return Path(builder.data_dir)


def to_tfrecord(version: Path) -> Path:
    """Rewrites a set's files as TFRecord, in place; returns the only file."""
    (file,) = version.glob("*.array_record*")
    target = file.with_name(file.name.replace("array_record", "tfrecord"))
    write_records(target, records_of(file))
    file.unlink()
    info = version / "dataset_info.json"
    content = json.loads(info.read_text())
    content["fileFormat"] = "tfrecord"
    for split in content["splits"]:
        split["filepathTemplate"] = split["filepathTemplate"].replace("array_record", "tfrecord")
    info.write_text(json.dumps(content))
    return target


def records_of(file: Path) -> list[bytes]:
    """The records of a file of either format."""
    if "array_record" in file.name:
        records = ArrayRecordDataSource([str(file)])
        return [records[number] for number in range(len(records))]
    content, place, out = file.read_bytes(), 0, []
    while place < len(content):
        (length,) = struct.unpack_from("<Q", content, place)
        out.append(content[place + 12 : place + 12 + length])
        place += 16 + length
    return out


def write_records(file: Path, records: Sequence[bytes]) -> None:
    """Writes a file of the format that its name says."""
    if "array_record" in file.name:
        writer = ArrayRecordWriter(str(file), "group_size:1")
        for record in records:
            writer.write(record)
        writer.close()
        return
    with file.open("wb") as stream:
        for record in records:
            header = struct.pack("<Q", len(record))
            stream.write(header + struct.pack("<I", masked_crc32c(header)))
            stream.write(record + struct.pack("<I", masked_crc32c(record)))


def entries(content: Any) -> Iterator[tuple[Any, Any]]:
    """(holder, key or place) of everything inside a JSON value."""
    keys = content if isinstance(content, dict) else range(len(content)) if isinstance(content, list) else ()
    for key in keys:
        yield content, key
        yield from entries(content[key])


def _step(raw: Raw, row: int) -> dict:
    return {
        "observation": {
            "image": io.BytesIO(_jpeg(raw.pictures[FRONT][row])),
            "wrist_image": io.BytesIO(_jpeg(raw.pictures[WRIST][row])),
            "state": raw.state[row].astype(np.float32),
        },
        "action": raw.action[row].astype(np.float32),
        "language_instruction": raw.task,
        "language_instruction_2": f"please {raw.task}",
        "is_last": row == len(raw.times) - 1,
    }


def _jpeg(picture: np.ndarray) -> bytes:
    return cv2.imencode(".jpg", picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()
