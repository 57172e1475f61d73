"""Several processes as one run: start-up from the environment, who am I, a barrier that gives up with a message, and
the end of all when one is lost.

A pod needs no settings: JAX finds its peers on TPU pods, Slurm and Kubernetes. Anywhere else set
JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID, the same command in every
process.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost

from wallwm_jax.console import TRY_AGAIN, UserError

_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


@dataclass(frozen=True)
class Host:
    """This process among those of the run."""

    index: int
    count: int

    @property
    def is_first(self) -> bool:
        """True for the one process that prints, logs and writes small files."""
        return self.index == 0


def initialize(start_timeout_s: int = 300) -> Host:
    """Joins the other processes of this run; call it before any other use of JAX.

    Raises:
      UserError: some but not all of the three variables are set, one is not a number, or the peers did not show up.
    """
    given = [name for name in _VARIABLES if os.environ.get(name)]
    if given and len(given) < len(_VARIABLES):
        missing = ", ".join(name for name in _VARIABLES if name not in given)
        raise UserError(f"{given[0]} is set but {missing} is not; set all three, or none on a TPU pod")
    try:
        if given:
            jax.distributed.initialize(
                os.environ[_VARIABLES[0]],
                num_processes=int(os.environ[_VARIABLES[1]]),
                process_id=int(os.environ[_VARIABLES[2]]),
                initialization_timeout=start_timeout_s,
            )
        else:
            jax.distributed.initialize(initialization_timeout=start_timeout_s)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"the processes of this run did not find each other: {' '.join(str(error).split())[:200]}; "
            f"outside a TPU pod set {', '.join(_VARIABLES)}"
        ) from error
    return this_host()


def this_host() -> Host:
    """Index and number of the processes of this run; (0, 1) when there is only one."""
    return Host(jax.process_index(), jax.process_count())


def barrier(name: str, timeout_s: int = 300) -> None:
    """Waits until every process has come to the barrier `name`; each name can be used once in a run.

    Raises:
      UserError: some process did not come within `timeout_s` seconds.
    """
    host = this_host()
    if host.count == 1:
        return
    try:
        multihost.get_barrier_sync_fn()(key=name, timeout_ms=1000 * timeout_s)
    except jax.errors.JaxRuntimeError as error:
        raise UserError(
            f"process {host.index} of {host.count} waited {timeout_s} s at barrier {name!r} for the others; "
            f"look at the last lines of their logs ({str(error).splitlines()[0][:160]})"
        ) from error


def first_says(value: float) -> float:
    """The first process's `value`, in all of them: for decisions that depend on its clock or its view of the disk."""
    return value if this_host().count == 1 else multihost_utils.broadcast_one_to_all(np.asarray(value)).item()


@contextlib.contextmanager
def end_together(doing: Callable[[], str]) -> Iterator[None]:
    """Where several processes form the run and JAX fails inside the block, ends this one at once: a peer is lost.

    Nothing may be waited for then, neither a checkpoint half written nor JAX's own farewell, since both need the peer.
    The exit code is `console.TRY_AGAIN`.

    Args:
      doing: names what is being done, for the message.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        host = this_host()
        if host.count == 1:
            raise
        print(
            f"error: process {host.index} of {host.count} failed in phase {doing()!r}, most likely because another "
            f"process of the run has ended; look at the last lines of their logs, then start all again with --resume "
            f"({' '.join(str(error).split())[:300]})",
            file=sys.stderr,
        )
        leave(TRY_AGAIN)


def leave(code: int) -> NoReturn:
    """Ends this process without the farewell to the others, for which JAX waits minutes when one of them is gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
