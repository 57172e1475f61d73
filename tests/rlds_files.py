"""Writes RLDS sets for tests with TFDS itself: ArrayRecord files, or the same records framed as TFRecord."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
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

    class Arm(tfds.core.GeneratorBasedBuilder):
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
    records = ArrayRecordDataSource([str(file)])
    target = file.with_name(file.name.replace("array_record", "tfrecord"))
    with target.open("wb") as stream:
        for number in range(len(records)):
            record = records[number]
            header = struct.pack("<Q", len(record))
            stream.write(header + struct.pack("<I", masked_crc32c(header)))
            stream.write(record + struct.pack("<I", masked_crc32c(record)))
    file.unlink()
    info = version / "dataset_info.json"
    content = json.loads(info.read_text())
    content["fileFormat"] = "tfrecord"
    for split in content["splits"]:
        split["filepathTemplate"] = split["filepathTemplate"].replace("array_record", "tfrecord")
    info.write_text(json.dumps(content))
    return target


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
