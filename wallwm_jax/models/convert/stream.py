"""Converts weights tensor by tensor: safetensors to an Orbax checkpoint and back, in the memory of a few tensors.

    OUT/params/           Orbax checkpoint of the nested parameters; layers stacked on a leading axis
       /tensors.tsv       one line per tensor: name, dtype, shape, checksum, parameter, layer
       /conversion.json   kind, layout, sizes, and the headers of the source's files
       /config.json ...   small files of the source, as they were

Orbax writes the tree's structure with empty leaves; each leaf is then filled slice by slice through TensorStore, which
reads and writes the same format, so that no stacked leaf is ever in memory. Going back gives the same files, byte for
byte, and checks every checksum on the way.
"""

from __future__ import annotations

import contextlib
import csv
import fcntl
import hashlib
import itertools
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from wallwm_jax.console import UserError, progress
from wallwm_jax.models.convert import qwen3_5, umt5, wan, wan_vae
from wallwm_jax.models.convert.rules import Rule, Table
from wallwm_jax.models.convert.safetensors_files import CONFIG, INDEX_SUFFIX, SUFFIX, Folder
from wallwm_jax.paths import open_path

KINDS: dict[str, ModuleType] = {"wan": wan, "wan_vae": wan_vae, "umt5": umt5, "qwen3_5": qwen3_5}
PARAMS = "params"
TENSORS = "tensors.tsv"
CONVERSION = "conversion.json"
BLOCK_BYTES = 64 << 20  # a stored chunk, and what is written at once

_CODECS = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]  # weights do not compress
_COLUMNS = ("name", "dtype", "shape", "checksum", "parameter", "layer")


@dataclass(frozen=True)
class Loaded:
    """A conversion: `params` nested arrays in the source's dtype, `sizes` of the module, `layout` of the source."""

    params: dict[str, Any]
    sizes: dict[str, Any]
    layout: str


@dataclass(frozen=True)
class Summary:
    """What a conversion did: number of `tensors`, values in `parameters`, `bytes` of them, the source's `layout`."""

    tensors: int
    parameters: int
    bytes: int
    layout: str


def import_weights(kind: str, source: str | Path, out: str | Path) -> Summary:
    """Converts a folder of safetensors into a checkpoint at `out`, which appears when it is complete.

    Args:
      kind: one of `KINDS`.
      source: folder of the weights, or a repository that has them in its usual sub-folder.
      out: must not exist.

    Raises:
      UserError: a missing, left-over or misshapen tensor, a damaged file, another model, or `out` exists.
    """
    module = KINDS[kind]
    folder = _open_source(Path(source).expanduser(), module)
    table = module.table(folder.shapes(), folder.config)
    table.check(folder.shapes(), f"{kind} weights {str(folder.directory)!r}")
    dtypes = {rule.path: _dtype(rule, folder) for rule in table.rules}
    companions = _companions(folder.directory, module)
    with _new_directory(Path(out)) as directory:
        _create_tree(
            directory / PARAMS, [(rule.path, dtypes[rule.path], len(rule.target_shape())) for rule in table.rules]
        )
        checksums: dict[str, str] = {}
        for rule in progress(table.rules, unit="parameter", label=f"import {kind}"):
            _import_rule(rule, dtypes[rule.path], folder, directory, checksums)
        for name, same_as in table.aliases:
            if name in folder.places:
                checksums[name] = _checksum(folder.read(name))
                if checksums[name] != checksums[same_as]:
                    raise UserError(f"tensor {name!r} must equal {same_as!r}, and does not; is this another model?")
        _write_table(directory, table, folder, checksums)
        for path in companions:
            shutil.copyfile(path, directory / path.name)
        text = json.dumps(
            dict(kind=kind, layout=table.layout, sizes=table.sizes, headers=folder.headers), indent=1, sort_keys=True
        )
        (directory / CONVERSION).write_text(text + "\n")
    return _summary(table, folder)


def export_weights(kind: str, source: str | Path, out: str | Path) -> Summary:
    """Writes the safetensors that a checkpoint of `import_weights` came from, byte for byte, to a new folder `out`.

    Raises:
      UserError: `source` is no conversion of this kind, a parameter is damaged, or `out` exists.
    """
    module, source = KINDS[kind], Path(source).expanduser()
    conversion = read_conversion(source, kind)
    expected = {row["name"]: row["checksum"] for row in read_table(source)}
    with _new_directory(Path(out)) as directory:
        for path in _companions(source, module):
            shutil.copyfile(path, directory / path.name)
        folder = Folder(directory, conversion["headers"])
        table = module.table(folder.shapes(), folder.config)
        folder.create()
        where = {name: (rule, layer) for rule in table.rules for layer, name in enumerate(rule.names())}
        where |= {name: where[same_as] for name, same_as in table.aliases if name in folder.places}
        for name in progress(list(folder.places), unit="tensor", label=f"export {kind}"):
            rule, layer = where[name]
            stored = _open_leaf(source / PARAMS, rule.path)
            value = np.asarray((stored[layer] if rule.layers else stored).read().result())
            value = np.ascontiguousarray(rule.transform.invert(value))
            if _checksum(value) != expected[name]:
                raise UserError(f"parameter {rule.path!r} in {str(source)!r} was changed or damaged: tensor {name!r}")
            folder.write(name, value)
    return _summary(table, folder)


def load(directory: str | Path, kind: str, sharding: Any = None) -> Loaded:
    """Reads a conversion.

    Args:
      directory: made by `import_weights`.
      kind: what it must be.
      sharding: where the arrays go: one `jax.sharding.Sharding` for all, or a tree of them; None is this process's
        first device.

    Raises:
      UserError: no conversion there, or one of another kind.
    """
    conversion, place = read_conversion(directory, kind), open_path(directory) / PARAMS
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    with ocp.StandardCheckpointer() as reader:
        tree = dict(reader.metadata(place).item_metadata.tree)
        if isinstance(sharding, jax.sharding.Sharding):
            sharding = jax.tree.map(lambda _: sharding, tree)
        abstract = jax.tree.map(
            lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), tree, sharding
        )
        params = reader.restore(place, abstract)
    return Loaded(params, conversion["sizes"], conversion["layout"])


def read_conversion(directory: str | Path, kind: str) -> dict[str, Any]:
    """`conversion.json` of a conversion of this kind: kind, layout, sizes, headers.

    Raises:
      UserError: no conversion there, or one of another kind.
    """
    path = open_path(directory) / CONVERSION
    if not path.is_file():
        raise UserError(
            f"{str(directory)!r} holds no converted weights; make them with python -m wallwm_jax.convert {kind} "
            "--source=DIR --out=DIR"
        )
    conversion = json.loads(path.read_text())
    if conversion["kind"] != kind:
        raise UserError(f"{str(directory)!r} holds converted weights of {conversion['kind']!r}, not of {kind!r}")
    return conversion


def weights_fingerprint(directory: str | Path, kind: str) -> str:
    """Twelve hex digits that change with any tensor of a conversion of this kind.

    Raises:
      UserError: no conversion there, or one of another kind.
    """
    read_conversion(directory, kind)
    return hashlib.sha256((open_path(directory) / TENSORS).read_bytes()).hexdigest()[:12]


def same_weights(built_with: Mapping[str, str], weights: str, kind: str, flag: str) -> str:
    """`weights`, or the folder that a store was built with, after checking that it holds what the store was built with.

    Raises:
      UserError: no converted weights of this kind there, or others; it names `flag`.
    """
    folder = weights or built_with["folder"]
    try:
        found = weights_fingerprint(folder, kind)
    except UserError as error:
        raise UserError(f"{error}; or say where they are now with {flag}=DIR") from None
    if found != built_with["fingerprint"]:
        raise UserError(
            f"{folder!r} holds weights {found}, but the event store was built with {built_with['fingerprint']} "
            f"({built_with['folder']}); give those with {flag}=DIR"
        )
    return folder


def read_table(directory: str | Path) -> list[dict[str, str]]:
    """The per-tensor table: one dict per tensor of the source with name, dtype, shape, checksum, parameter, layer."""
    with open(Path(directory) / TENSORS, newline="") as stream:
        return list(csv.DictReader(stream, delimiter="\t"))


def _open_source(directory: Path, module: ModuleType) -> Folder:
    if not directory.is_dir():
        raise UserError(f"weights folder {str(directory)!r} does not exist; give the folder of the downloaded weights")
    nested = directory / module.FOLDER
    if not any(directory.glob(f"*{SUFFIX}")) and nested.is_dir():
        directory = nested
    return Folder.open(directory)


def _companions(directory: Path, module: ModuleType) -> list[Path]:
    """Small files that travel with the weights; a tokenizer is looked for in the usual places around them."""
    found = [*directory.glob(f"*{INDEX_SUFFIX}"), *directory.glob(CONFIG)]
    for name in module.COMPANIONS:
        nearby = [directory, directory / "tokenizer", directory.parent / "tokenizer", directory / "google" / "umt5-xxl"]
        paths = [folder / name for folder in nearby if (folder / name).is_file()]
        if not paths:
            raise UserError(
                f"{name!r} is neither in {str(directory)!r} nor in a folder 'tokenizer' beside it; copy it there"
            )
        found.append(paths[0])
    optional = [directory / name for name in getattr(module, "OPTIONAL", ())]
    return found + [path for path in optional if path.is_file()]


def _dtype(rule: Rule, folder: Folder) -> np.dtype:
    """The one dtype of a parameter's tensors."""
    names = rule.names()
    first = folder.places[names[0]].dtype
    for name in names:
        if folder.places[name].dtype != first:
            raise UserError(
                f"tensor {name!r} is {folder.places[name].dtype}, but {names[0]!r} is {first}; layers that are stacked "
                "must share a dtype"
            )
    return first


def _create_tree(directory: Path, leaves: list[tuple[str, np.dtype, int]]) -> None:
    """An Orbax checkpoint with a leaf of one value per (path, dtype, rank)."""
    tree: dict[str, Any] = {}
    for path, dtype, rank in leaves:
        *parents, last = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = np.zeros((1,) * rank, dtype)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True)) as writer:
        writer.save(directory.absolute(), args=ocp.args.PyTreeSave(tree))


def _open_leaf(directory: Path, path: str, **create: Any) -> ts.TensorStore:
    """One leaf of an Orbax checkpoint as a TensorStore; `create` replaces it."""
    spec = {
        "driver": "zarr3",
        "kvstore": {
            "driver": "ocdbt",
            "base": f"file://{directory.absolute()}/",
            "path": path.replace("/", ".") + "/",
        },
        "context": {"cache_pool": {"total_bytes_limit": 0}},
    }
    return ts.open(spec, open=not create, create=bool(create), delete_existing=bool(create), **create).result()


def _import_rule(rule: Rule, dtype: np.dtype, folder: Folder, directory: Path, checksums: dict[str, str]) -> None:
    """Writes one parameter: a small one at once, a large one chunk by chunk of each layer."""
    shape = rule.target_shape()
    chunk = chunk_shape(shape, dtype.itemsize, stacked=rule.layers > 0)
    stored = _open_leaf(
        directory / PARAMS,
        rule.path,
        dtype=dtype,
        shape=shape,
        chunk_layout=ts.ChunkLayout(chunk_shape=chunk),
        codec=ts.CodecSpec({"driver": "zarr3", "codecs": _CODECS}),
    )

    def layers() -> Iterator[np.ndarray]:
        for name in rule.names():
            tensor = folder.read(name)
            checksums[name] = _checksum(tensor)
            yield rule.transform.apply(tensor)

    if chunk == shape:
        stored.write(np.stack(list(layers())) if rule.layers else next(layers())).result()
        return
    for layer, array in enumerate(layers()):
        target = stored[layer] if rule.layers else stored
        for block in _blocks(array.shape, chunk[1:] if rule.layers else chunk):
            target[block].write(array[block]).result()


def chunk_shape(shape: tuple[int, ...], itemsize: int, *, stacked: bool) -> tuple[int, ...]:
    """The stored chunk of a parameter: all of it if that is at most `BLOCK_BYTES`, else (`stacked`: one layer, and) cut
    along the first axes as far as needed."""
    if math.prod(shape) * itemsize <= BLOCK_BYTES:
        return shape
    if stacked:
        return (1, *chunk_shape(shape[1:], itemsize, stacked=False))
    chunk = list(shape)
    for axis in range(len(shape)):
        others = math.prod(chunk) // chunk[axis] * itemsize
        if others * chunk[axis] <= BLOCK_BYTES:
            break
        chunk[axis] = max(1, BLOCK_BYTES // others)
    return tuple(chunk)


def _blocks(shape: tuple[int, ...], chunk: tuple[int, ...]) -> Iterator[tuple[slice, ...]]:
    for corner in itertools.product(*(range(0, size, step) for size, step in zip(shape, chunk))):
        yield tuple(slice(start, min(start + step, size)) for start, step, size in zip(corner, chunk, shape))


def _write_table(directory: Path, table: Table, folder: Folder, checksums: Mapping[str, str]) -> None:
    where = {name: (rule, layer) for rule in table.rules for layer, name in enumerate(rule.names())}
    where |= {name: where[same_as] for name, same_as in table.aliases if name in folder.places}
    with open(directory / TENSORS, "w", newline="") as stream:
        writer = csv.writer(stream, delimiter="\t", lineterminator="\n")
        writer.writerow(_COLUMNS)
        for name, place in folder.places.items():
            rule, layer = where[name]
            shape = "x".join(map(str, place.shape))
            writer.writerow((name, place.dtype, shape, checksums[name], rule.path, layer if rule.layers else ""))


def _summary(table: Table, folder: Folder) -> Summary:
    size = sum(place.size * place.dtype.itemsize for place in folder.places.values())
    return Summary(len(folder.places), table.parameters(), size, table.layout)


def _checksum(array: np.ndarray) -> str:
    """Sixteen hex digits of the SHA-256 of a contiguous array's bytes."""
    return hashlib.sha256(array.reshape(-1).view(np.uint8).data).hexdigest()[:16]


@contextlib.contextmanager
def _new_directory(target: Path) -> Iterator[Path]:
    """Yields a temporary directory beside `target` that becomes it when the block ends without an exception.

    What a killed conversion to the same target left is deleted; one that still runs is an error.
    """
    target = target.expanduser().absolute()
    if target.exists():
        raise UserError(f"{str(target)!r} already exists; give a new path, or delete it first")
    target.parent.mkdir(parents=True, exist_ok=True)
    lock_file, temporary = (target.with_name(f".{target.name}.{suffix}") for suffix in ("lock", "partial"))
    with open(lock_file, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"another process is writing {str(target)!r}; wait for it, or give another path") from None
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            yield temporary
            os.replace(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            lock_file.unlink(missing_ok=True)
