"""The records of a store under construction: ArrayRecord files and the TFDS metadata that describes them.

Written directly and not by a TFDS builder, whose writer sorts small keys in memory and is not the same byte for byte.
"""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter

from wallwm_jax.data import event_store

SHARD_BYTES = 256 << 20
SPLITS = ("train", "heldout")


class RecordFiles:
    """The ArrayRecord files of a build and the TFDS metadata beside them; records keep the order of writing."""

    def __init__(self, root: Path, features: tfds.features.FeaturesDict) -> None:
        root.mkdir(parents=True)
        self._root, self._features = root, features
        self._writers: dict[str, ArrayRecordWriter] = {}
        self._shards: dict[str, list[dict[str, Any]]] = {}
        self._example_type = event_store.example_type()

    def write(self, split: str, example: dict[str, Any]) -> int:
        """Appends a record and returns its CRC-32."""
        message = self._example_type.FromString(self._features.serialize_example(example))
        serialized = message.SerializeToString(deterministic=True)  # the order of a map differs from run to run
        shards = self._shards.setdefault(split, [])
        if not shards or shards[-1]["bytes"] >= SHARD_BYTES:
            self._finish_shard(split)
            shards.append({"file": f"events-{split}.array_record-{len(shards):05d}", "windows": 0, "bytes": 0})
            self._writers[split] = ArrayRecordWriter(str(self._root / shards[-1]["file"]), "group_size:1")
        self._writers[split].write(serialized)
        shards[-1]["windows"] += 1
        shards[-1]["bytes"] += len(serialized)
        return zlib.crc32(serialized)

    def close(self) -> dict[str, list[dict[str, Any]]]:
        """Closes the files, names them as TFDS does, writes its metadata; returns split → files with their sizes."""
        infos = []
        for split in sorted(self._shards, key=SPLITS.index):
            shards = self._shards[split]
            self._finish_shard(split)
            for shard in shards:
                name = f"{shard['file']}-of-{len(shards):05d}"
                os.rename(self._root / shard["file"], self._root / name)
                shard["file"] = name
            lengths, size = [shard["windows"] for shard in shards], sum(shard["bytes"] for shard in shards)
            template = tfds.core.ShardedFileTemplate(
                dataset_name="events", data_dir=self._root, split=split, filetype_suffix="array_record"
            )
            infos.append(tfds.core.SplitInfo(split, lengths, size, filename_template=template))
        tfds.folder_dataset.write_metadata(
            data_dir=self._root,
            features=self._features,
            split_infos=infos,
            check_data=False,
            description="Windows of robot episodes; one record per event or fixed stretch.",
        )
        return {info.name: self._shards[info.name] for info in infos}

    def _finish_shard(self, split: str) -> None:
        writer = self._writers.pop(split, None)
        if writer is not None:
            writer.close()


def record_features(
    frame_keys: list[str], size: tuple[int, int], cells: tuple[int, int, int] | None, pruned: bool
) -> tfds.features.FeaturesDict:
    picture = tfds.features.Image(shape=(*size, 3), encoding_format="jpeg")
    as_bytes = tfds.features.Encoding.BYTES
    time_warp = tfds.features.Tensor(shape=(None,), dtype=np.int32, encoding=as_bytes)
    latents = tfds.features.Tensor(shape=(None, *(cells or ())), dtype=np.uint16, encoding=as_bytes)  # bits of bfloat16
    return tfds.features.FeaturesDict(
        {
            **({"latents": tfds.features.FeaturesDict({key: latents for key in frame_keys})} if cells else {}),
            "frames": tfds.features.FeaturesDict({key: tfds.features.Sequence(picture) for key in frame_keys}),
            **{name: tfds.features.Scalar(np.int32) for name in event_store.RECORD_INTEGERS},
            "duration_s": tfds.features.Scalar(np.float32),
            **{
                name: tfds.features.Tensor(shape=shape, dtype=dtype, encoding=as_bytes)
                for name, (dtype, shape) in event_store.RECORD_ARRAYS.items()
            },
            **({event_store.TIME_WARP: time_warp} if pruned else {}),
        }
    )
