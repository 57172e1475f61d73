"""Safetensors folders, read and written one tensor at a time.

The public library maps a whole shard into memory to read it and holds one to write it; converting within a bounded
memory, and back to the very same bytes, needs each tensor's place in its file and the file's own header. A file is
8 bytes of header length (little endian), a JSON header (name: dtype, shape, offsets), and the values.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from wallwm_jax.console import UserError

SUFFIX = ".safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
CONFIG = "config.json"

_DTYPES: dict[str, Any] = {
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F16": np.float16,
    "F32": np.float32,
    "F64": np.float64,
}
_LENGTH = struct.Struct("<Q")
_MAX_HEADER = 100_000_000  # as the format's own limit


@dataclass(frozen=True)
class Place:
    """Where a tensor is: in `file` from byte `start` on."""

    file: str
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


class Folder:
    """The tensors of one model: a single file, or shards with their index.

    Attributes:
      directory: where the files are.
      headers: the text of every file's header, padding included, by file name.
      places: every tensor's place, in the order of the files.
      config: the config.json beside them, {} if there is none.
    """

    def __init__(self, directory: Path, headers: Mapping[str, str]):
        """Describes the files that `headers` belong to; reads no file but config.json.

        Raises:
          UserError: a header that is not one, or a tensor that stands in two files.
        """
        self.directory, self.headers = directory, dict(headers)
        self.places: dict[str, Place] = {}
        for file, header in headers.items():
            for name, place in _parse(header, file, str(directory / file)).items():
                if name in self.places:
                    raise UserError(f"tensor {name!r} is both in {self.places[name].file!r} and in {file!r}")
                self.places[name] = place
        config = directory / CONFIG
        self.config: dict[str, Any] = _read_json(config) if config.is_file() else {}

    @classmethod
    def open(cls, directory: Path) -> Folder:
        """Reads the headers of the folder's one file, or of the shards that its index names.

        Raises:
          UserError: no safetensors there, several without an index, or a shard that is missing, cut short or not as its
            index says.
        """
        index = sorted(directory.glob(f"*{INDEX_SUFFIX}"))
        files = sorted(path.name for path in directory.glob(f"*{SUFFIX}"))
        if len(index) > 1:
            raise UserError(
                f"{str(directory)!r} holds several indices: {', '.join(path.name for path in index)}; keep one"
            )
        if not index:
            if len(files) != 1:
                raise UserError(_what_is_there(directory, files))
            return cls(directory, {files[0]: _read_header(directory / files[0])})
        weight_map = _read_json(index[0]).get("weight_map", {})
        headers = {}
        for file in sorted(set(weight_map.values())):
            if file not in files:
                raise UserError(f"shard {str(directory / file)!r} is missing; {index[0].name} names it")
            headers[file] = _read_header(directory / file)
        folder = cls(directory, headers)
        for name, file in weight_map.items():
            if name not in folder.places or folder.places[name].file != file:
                raise UserError(f"tensor {name!r} is not in {file!r}, where {index[0].name} says it is")
        return folder

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor."""
        return {name: place.shape for name, place in self.places.items()}

    def read(self, name: str) -> np.ndarray:
        """One tensor, in memory of its own."""
        place = self.places[name]
        file = self.directory / place.file
        values = np.fromfile(file, place.dtype, place.size, offset=_data_start(self.headers[place.file]) + place.start)
        if values.size != place.size:
            raise UserError(f"{str(file)!r} ended inside tensor {name!r}; was it changed meanwhile?")
        return values.reshape(place.shape)

    def create(self) -> None:
        """Makes the files with their headers; `write` then fills in the values."""
        for file, header in self.headers.items():
            encoded = header.encode()
            with open(self.directory / file, "wb") as stream:
                stream.write(_LENGTH.pack(len(encoded)) + encoded)
                stream.truncate(len(encoded) + _LENGTH.size + _data_size(header))

    def write(self, name: str, values: np.ndarray) -> None:
        """Fills in one tensor, in its dtype and shape."""
        place = self.places[name]
        if values.dtype != place.dtype or values.shape != place.shape:
            raise ValueError(f"{name}: {values.dtype}{values.shape} is not {place.dtype}{place.shape}")
        with open(self.directory / place.file, "r+b") as stream:
            stream.seek(_data_start(self.headers[place.file]) + place.start)
            np.ascontiguousarray(values).tofile(stream)


def _data_start(header: str) -> int:
    return _LENGTH.size + len(header.encode())


def _data_size(header: str) -> int:
    entries = json.loads(header)
    return max((entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"), default=0)


def _read_header(path: Path) -> str:
    """The text of a file's header, after checking that the file is as long as the header says."""
    size = path.stat().st_size
    with open(path, "rb") as stream:
        start = stream.read(_LENGTH.size)
        length = _LENGTH.unpack(start)[0] if len(start) == _LENGTH.size else _MAX_HEADER + 1
        raw = stream.read(length) if length <= min(_MAX_HEADER, size) else b""
    try:
        header = raw.decode()
        expected = _data_start(header) + _data_size(header)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise UserError(f"{str(path)!r} is no safetensors file, or a damaged one; download it again") from None
    if size != expected:
        raise UserError(f"{str(path)!r} has {size} bytes, its header says {expected}; download it again")
    return header


def _parse(header: str, file: str, where: str) -> dict[str, Place]:
    places = {}
    for name, entry in sorted(
        ((name, entry) for name, entry in json.loads(header).items() if name != "__metadata__"),
        key=lambda item: item[1]["data_offsets"],
    ):
        if entry["dtype"] not in _DTYPES:
            raise UserError(f"{where}: tensor {name!r} has dtype {entry['dtype']}; supported: {', '.join(_DTYPES)}")
        start, end = entry["data_offsets"]
        place = Place(file, np.dtype(_DTYPES[entry["dtype"]]), tuple(entry["shape"]), start)
        if end - start != place.size * place.dtype.itemsize:
            raise UserError(f"{where}: tensor {name!r} does not fill its place; the file is damaged")
        places[name] = place
    return places


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except ValueError:
        raise UserError(f"{str(path)!r} is no JSON; download it again") from None


def _what_is_there(directory: Path, files: list[str]) -> str:
    if files:
        return f"{str(directory)!r} holds {len(files)} {SUFFIX} files and no *{INDEX_SUFFIX}; add it, or keep one file"
    pickles = sorted(path.name for path in directory.glob("*.pth"))
    if pickles:
        return (
            f"{str(directory)!r} holds {pickles[0]!r} and no safetensors; a .pth runs code when it is opened, so it is "
            "not read: take the safetensors of the same weights (the diffusers repository has them)"
        )
    return f"{str(directory)!r} holds no *{SUFFIX} file"
