"""Whether what is read is what was written: a manifest of files and their sizes, and a checksum of arrays.

The manifest is written last, before a directory gets its final name. A file that was truncated, or lost in a copy, no
longer fits it, which is seen without reading it. Bits that changed inside a file are found by the checksum, which the
devices compute where the arrays live: it costs one pass over the memory and does not depend on the mesh.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from wallwm_jax.parallel.distributed import this_host
from wallwm_jax.paths import delete_tree, disk_errors, file_sizes, is_remote, unreachable
from wallwm_jax.training.train_state import flatten

PyTree = Any

MANIFEST = "manifest.json"
UNFINISHED = ".orbax-checkpoint-tmp"
_FINISHED = "commit_success.txt"


def is_finished(directory: epath.Path) -> bool:
    """Whether Orbax has finished writing it: on a disk it has its name only then, in a bucket a last object says so."""
    return directory.exists() and (not is_remote(directory) or (directory / _FINISHED).exists())


def unfinished(directory: epath.Path) -> list[epath.Path]:
    """The steps in `directory` that are being written, or were when a save ended early."""
    paths = list(directory.iterdir()) if directory.is_dir() else []
    if is_remote(directory):
        return [path for path in paths if path.name.isdigit() and not is_finished(path)]
    return [path for path in paths if UNFINISHED in path.name]


def delete_unfinished(directory: epath.Path) -> None:
    """Deletes what saves that ended early left in `directory`, as far as that can be done, while none is under way."""
    if not this_host().is_first:
        return
    try:
        for rest in unfinished(directory):
            delete_tree(rest)
    except disk_errors() as error:
        print(f"warning: {unreachable(directory, error)}; unfinished saves may be left", file=sys.stderr, flush=True)


def seal(directory: epath.Path, step: int, parts: Sequence[str], **notes: Any) -> None:
    """Writes the manifest of `step`, which is being written in `directory`: in a bucket, under its final name.

    Raises:
      FileNotFoundError: it is not there.
    """
    writing = [directory / str(step)]
    if not is_remote(directory):
        writing = [path for path in unfinished(directory) if path.name.partition(UNFINISHED)[0] == str(step)]
    if not writing:
        raise FileNotFoundError(f"no unfinished step {step} in {str(directory)!r}")
    for path in writing:
        write_manifest(path, parts, **notes)


def write_manifest(directory: epath.Path, parts: Sequence[str], **notes: Any) -> None:
    """Notes the size in bytes of each file in the entries `parts` of `directory`, and `notes`, plain JSON.

    Raises:
      FileNotFoundError: there are no such files.
    """
    files = {name: size for name, size in file_sizes(directory).items() if name.split("/")[0] in parts}
    if not files:
        raise FileNotFoundError(f"none of {', '.join(parts)} in {str(directory)!r}")
    (directory / MANIFEST).write_text(json.dumps({"files": files, **notes}, indent=1, sort_keys=True))


def read_manifest(directory: epath.Path) -> dict[str, Any]:
    """The "files" and the notes of a directory; empty where there is no manifest, or a torn one.

    Raises:
      UserError: the bucket it is in cannot be read now, which says nothing of the manifest.
    """
    try:
        text = (directory / MANIFEST).read_bytes()
    except FileNotFoundError:
        return {}
    except disk_errors() as error:
        if is_remote(directory):
            raise unreachable(directory, error) from error
        return {}
    try:
        return json.loads(text)
    except ValueError:
        return {}


def damage(directory: epath.Path, parts: Sequence[str] = ()) -> str:
    """What is wrong with the files of `directory`, in a few words; "" if all are there with their sizes.

    Args:
      directory: that once was finished; on a disk there is nothing to compare without a manifest.
      parts: look only at these entries of it; none means all.

    Raises:
      UserError: the bucket it is in cannot be read now.
    """
    manifest = read_manifest(directory)
    try:
        found = file_sizes(directory)
    except disk_errors() as error:
        if is_remote(directory):
            raise unreachable(directory, error) from error
        raise
    if not manifest and MANIFEST in found:
        return f"{MANIFEST} is torn"
    if not manifest and is_remote(directory):
        return f"{MANIFEST} is missing"
    for name, size in sorted(manifest.get("files", {}).items()):
        if parts and name.split("/")[0] not in parts:
            continue
        if name not in found:
            return f"{name} is missing"
        if found[name] != size:
            return f"{name} has {found[name]} of {size} bytes"
    return ""


def changed_bits(directory: epath.Path, arrays: PyTree) -> str:
    """What is wrong with `arrays`, read from `directory`, by the "checksum" in its manifest; "" if nothing."""
    noted = read_manifest(directory).get("checksum")
    return "its arrays are not those that were saved" if noted and checksum(arrays) != noted else ""


def checksum(tree: PyTree) -> str:
    """Sixteen hex digits that change with any bit, path, shape or dtype of the arrays; the same for every sharding."""
    return Checksum(tree).digits()


class Checksum:
    """A checksum on its way: the devices add up while the host goes on. It holds none of the arrays."""

    def __init__(self, tree: PyTree):
        """Starts; the arrays may be donated right after."""
        self._shapes = {path: (leaf.shape, str(leaf.dtype)) for path, leaf in flatten(tree).items()}
        self._sums = _summing(jax.default_backend())(tree)

    def digits(self) -> str:
        """Waits for the devices; sixteen hex digits."""
        sums = flatten(jax.device_get(self._sums))
        lines = [f"{path} {self._shapes[path]} {int(value)}" for path, value in sorted(sums.items())]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


@functools.cache
def _summing(platform: str) -> jax.stages.Wrapped:
    """`_bit_sum` of all leaves in one program; on CPU it is compiled quickly rather than well."""
    options = {"xla_backend_optimization_level": 0} if platform == "cpu" else {}
    return jax.jit(lambda tree: jax.tree.map(_bit_sum, tree), compiler_options=options)


def _bit_sum(leaf: jax.Array) -> jax.Array:
    """Sum modulo 2^32 of the array's bits times odd weights that depend on the position; keeps the sharding."""
    width = jnp.uint16 if leaf.dtype.itemsize == 2 else jnp.uint32
    bits = jax.lax.bitcast_convert_type(leaf, width).astype(jnp.uint32)
    position = jnp.zeros((), jnp.uint32)
    for axis in range(leaf.ndim):
        stride = math.prod(leaf.shape[axis + 1 :]) % 2**32
        position += np.uint32(stride) * jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
    return jnp.sum(bits * (2 * position + 1), dtype=jnp.uint32)
