"""Paths of runs, which may be addresses in an object store: gs://bucket/run. Event stores stay on disks and mounts.

An object store has neither renames nor appending, and needs none where a file is written at once: an object appears
whole, or not at all. What is appended to is written on this machine and copied (`training.mirror`); a checkpoint is
whole once Orbax has put a last object beside it. Reading and writing objects takes the extra `gcs` (gcsfs).
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sys
from pathlib import Path

import fsspec
from etils import epath

from wallwm_jax.console import UserError

COMPILE_CACHE = "compile_cache"

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|(gs|s3|az|hf):/")  # with one slash it has been through `pathlib`
_GCS = "gs://"

os.environ.setdefault("EPATH_USE_TF", "false")  # where TensorFlow is installed, its own file system would be taken

# Others write, too: TensorStore, other hosts. A listing that was true a minute ago is worth nothing.
for _protocol in ("gs", "gcs"):
    fsspec.config.conf.setdefault(_protocol, {})["use_listings_cache"] = False


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path is the address of an object store."""
    return _SCHEME.match(os.fspath(path)) is not None


def open_path(path: str | os.PathLike[str]) -> epath.Path:
    """A path of a run as an absolute path, with the operations of `pathlib`, on this machine or in a bucket.

    Raises:
      UserError: another kind of store than gs://, no bucket in the address, the extra `gcs` is not installed, or the
        store cannot be read, such as without credentials.
    """
    text = os.fspath(path)
    if not is_remote(text):
        return epath.Path(Path(text).expanduser().absolute())
    if not text.startswith(_GCS):
        raise UserError(f"{text!r}: of object stores only gs://BUCKET/... can be read and written; mount others")
    if not text.removeprefix(_GCS).strip("/"):
        raise UserError(f"{text!r} names no bucket; write gs://BUCKET/...")
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError(f"{text!r} needs the extra gcs: pip install 'wallwm_jax[gcs]'")
    address = epath.Path(text)
    try:
        address.exists()
    except disk_errors() as error:
        raise unreachable(address, error) from error
    return address


def open_run(workdir: str | os.PathLike[str]) -> epath.Path:
    """The workdir of a run that is there, from the flag --workdir.

    Raises:
      UserError: none was given, it is not there, or see `open_path`.
    """
    remedy = "pass --workdir=DIR, the workdir of wallwm_jax.train"
    if not os.fspath(workdir):
        raise UserError(f"no workdir given; {remedy}")
    directory = open_path(workdir)
    if not directory.is_dir():
        raise UserError(f"workdir {str(directory)!r} does not exist; {remedy}")
    return directory


def use_compile_cache(workdir: str | os.PathLike[str]) -> None:
    """Has JAX keep what it compiles in a workdir, for later starts; JAX_COMPILATION_CACHE_DIR goes before.

    Raises:
      UserError: see `open_path`.
    """
    import jax

    directory = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(open_path(workdir) / COMPILE_CACHE)
    jax.config.update("jax_compilation_cache_dir", directory)
    if is_remote(directory):  # XLA's own caches, of a GPU's autotuning, are on disks only: compiling would fail
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")


def require_local(path: str | os.PathLike[str], what: str) -> None:
    """Raises `UserError` on the address of an object store, which would silently become a folder named "gs:"."""
    if is_remote(path):
        raise UserError(
            f"{what} {os.fspath(path)!r} is an address in an object store, where only workdirs of runs may be; give a "
            "directory: copy the data to a disk, or mount the bucket (gcsfuse)"
        )


def check_writable(directory: epath.Path) -> None:
    """Writes an object below an address and deletes it again, so that a run does not find out hours later.

    Raises:
      UserError: the bucket does not exist, or these credentials may not do what a run does.
    """
    if not is_remote(directory):
        return
    probe = directory / "writable.partial"
    try:
        from google.cloud import storage

        storage.Client().get_bucket(str(directory).removeprefix(_GCS).split("/")[0])  # Orbax asks before it deletes
        probe.write_text("")
        probe.unlink()
    except disk_errors() as error:
        raise unreachable(directory, error) from error


def unreachable(path: epath.Path, error: Exception) -> UserError:
    """What keeps us from an address, and what to do, from the error of a library."""
    code = getattr(error, "code", None)
    words = " ".join(str(error).split())[:160] or type(error).__name__
    if isinstance(error, FileNotFoundError) or code == 404:
        remedy = "the bucket does not exist; make it, or correct the address"
    elif code in (401, 403) or "auth" in type(error).__module__:
        remedy = (
            "give this machine a service account, or run `gcloud auth application-default login`; it needs "
            "roles/storage.objectUser and storage.buckets.get on the bucket"
        )
    else:
        remedy = "look whether the store can be reached from this machine, then try again"
    return UserError(f"cannot use {str(path)!r} ({words}): {remedy}")


def file_sizes(directory: epath.Path | Path) -> dict[str, int]:
    """Bytes of each file below `directory`, by its relative path; one listing, no matter how many files."""
    files, root = fsspec.core.url_to_fs(os.fspath(directory))
    return {os.path.relpath(path, root): found["size"] for path, found in files.find(root, detail=True).items()}


def delete_tree(directory: epath.Path) -> None:
    """Deletes a directory and what is in it, as far as that can be done."""
    if not is_remote(directory):
        shutil.rmtree(directory, ignore_errors=True)
        return
    try:
        directory.rmtree(missing_ok=True)
    except disk_errors() as error:
        print(f"warning: {str(directory)!r} could not be deleted: {error}", file=sys.stderr, flush=True)


def disk_errors(*others: type[Exception]) -> tuple[type[Exception], ...]:
    """What Orbax, TensorStore and gcsfs raise when files cannot be read or written, or hold something else."""
    errors: tuple[type[Exception], ...] = (OSError, ValueError, LookupError, *others)
    if "gcsfs" not in sys.modules:  # nobody has touched a bucket
        return errors
    import aiohttp
    from gcsfs.retry import ChecksumError, HttpError, NonRetryableError
    from google.api_core.exceptions import GoogleAPIError
    from google.auth.exceptions import GoogleAuthError

    gcsfs = (HttpError, ChecksumError, NonRetryableError)
    return (*errors, *gcsfs, aiohttp.ClientError, GoogleAPIError, GoogleAuthError)
