"""The files of a run that grow: written on this machine, and copied to the workdir where that is an object store.

Objects cannot be appended to, so metrics.jsonl, TensorBoard's events, reports and profiles are copied whole: every
half minute, before each checkpoint, and at the end. While the bucket takes them, a checkpoint thus has the metrics of
its steps, and what a kill loses belongs to steps that come again. A resumed run begins with what was copied, on any
machine; what could not be copied at the end stays on this one, which a line says.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

from etils import epath

from wallwm_jax.paths import disk_errors, is_remote, unreachable

_EVERY_S = 30.0


class Mirror:
    """A directory for the files of a run, and its way to the workdir; one per process, for use in a `with` block.

    Attributes:
      local: where to write and read; the workdir itself if that is on a disk.
    """

    def __init__(self, workdir: epath.Path, *, fetch: Sequence[str] = ()):
        """Makes the local directory.

        Args:
          workdir: of the run.
          fetch: names of files that go on where an earlier start ended.

        Raises:
          UserError: they are there and cannot be read.
        """
        self._remote = workdir if is_remote(workdir) else None
        self._copied: dict[str, tuple[int, int]] = {}  # what each file was when it was copied
        self._lock, self._ended, self._warned = threading.Lock(), threading.Event(), False
        self._thread = threading.Thread(target=self._copy_on, name="mirror", daemon=True)
        self.local = Path(workdir)
        if self._remote is None:
            return
        self.local = Path(tempfile.mkdtemp(prefix="wallwm_jax."))
        try:
            for name in fetch:
                if (self._remote / name).exists():
                    (self.local / name).write_bytes((self._remote / name).read_bytes())
                    self._copied[name] = _version(self.local / name)
        except disk_errors() as error:
            raise unreachable(self._remote, error) from error

    def upload(self) -> bool:
        """Copies what has changed since; returns whether all of it is there. A failure is a warning, once in a row."""
        if self._remote is None:
            return True
        with self._lock:
            try:
                for name, version, content in self._changed():
                    (self._remote / name).write_bytes(content)
                    self._copied[name] = version
                self._warned = False
                return True
            except Exception as error:  # whatever the libraries raise: reports end no run
                if not self._warned:
                    print(f"warning: {unreachable(self._remote, error)}; meanwhile see {self.local}", file=sys.stderr)
                self._warned = True
                return False

    def __enter__(self) -> Mirror:
        if self._remote is not None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._remote is None:
            return
        self._ended.set()
        self._thread.join()
        if self.upload():
            shutil.rmtree(self.local, ignore_errors=True)
        else:
            print(f"warning: not all reports of the run are in the bucket; they are in {self.local}", file=sys.stderr)

    def _changed(self) -> Iterator[tuple[str, tuple[int, int], bytes]]:
        """Name, version and content of each file that is another than when it was copied."""
        for path in sorted(self.local.rglob("*")):
            name = path.relative_to(self.local).as_posix()
            with contextlib.suppress(FileNotFoundError, IsADirectoryError):  # renamed while we look
                version = _version(path)  # before reading: what is appended meanwhile is copied next time
                if not name.endswith(".partial") and self._copied.get(name) != version:
                    yield name, version, path.read_bytes()

    def _copy_on(self) -> None:
        while not self._ended.wait(_EVERY_S):
            self.upload()


def _version(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_mtime_ns, found.st_size
