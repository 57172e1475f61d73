"""Looking into a run that goes on: traces of some steps when asked for, and the compiled step as text.

    touch WORKDIR/profile          # trace the next 3 steps of the first process
    echo 10 > WORKDIR/profile      # the next 10
    kill -USR1 PID                 # the next 3 of that process

WORKDIR/profiles/step_N then holds the trace (xprof, or TensorBoard with its plug-in, opens it) and memory_0.prof of
process 0: what lies in device memory after these steps, and which line made it (pprof opens it).
"""

from __future__ import annotations

import itertools
import json
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import jax

from wallwm_jax.console import write_text

REQUEST_FILE = "profile"
PROFILES = "profiles"
HLO = "hlo"
_STEPS = 3

Step = Callable[[Any, Any], tuple[Any, Any]]


class Profiler:
    """Traces steps on request; a context, in which `kill -USR1` is a request, too."""

    def __init__(self, workdir: Path, *, watches: bool = True):
        """Nothing is traced until asked.

        Args:
          workdir: of the run.
          watches: whether this process answers to the file; the first one does.
        """
        self._workdir, self._watches = workdir, watches
        self._signalled = False
        self._target: Path | None = None  # of the trace that runs
        self._left = 0
        self._before: Any = None

    def __enter__(self) -> Profiler:
        if threading.current_thread() is threading.main_thread():  # Python allows signal handlers nowhere else
            self._before = signal.signal(signal.SIGUSR1, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._target is not None:
            self._stop()
        if self._before is not None:
            signal.signal(signal.SIGUSR1, self._before)

    def around(self, step: Step, first_step: int) -> Step:
        """`step(state, batch) -> (state, metrics)`, traced when asked for.

        Args:
          step: the train step.
          first_step: number of the first call, which names the trace.
        """
        numbers = itertools.count(first_step)

        def traced(state: Any, batch: Any) -> tuple[Any, Any]:
            number = next(numbers)
            if self._target is None and (self._signalled or self._watches):
                self._start_if_asked(number)
            with jax.profiler.StepTraceAnnotation("train", step_num=number):
                state, metrics = step(state, batch)
            if self._target is not None:
                self._left -= 1
                if self._left <= 0:
                    jax.block_until_ready(metrics)  # the devices' part of the last step belongs into the trace
                    self._stop()
            return state, metrics

        return traced

    def _start_if_asked(self, number: int) -> None:
        request = self._workdir / REQUEST_FILE
        steps = str(_STEPS)
        if self._watches and request.exists():
            steps = request.read_text().strip() or steps
            request.unlink(missing_ok=True)  # first of all: a trace that ends the run must not come again
        elif not self._signalled:
            return
        self._signalled = False
        if not steps.isdigit() or int(steps) < 1:
            print(f"warning: {str(request)!r} held {steps[:40]!r}; write a number of steps, or nothing", flush=True)
            return
        target = self._workdir / PROFILES / f"step_{number}"
        try:
            jax.profiler.start_trace(target)
        except RuntimeError as error:  # such as a trace that runs already; no run ends over a profile
            print(f"warning: no profile: {error}", flush=True)
            return
        self._target, self._left = target, int(steps)

    def _stop(self) -> None:
        target, self._target = self._target, None
        assert target is not None
        try:
            jax.profiler.stop_trace()
            jax.profiler.save_device_memory_profile(target / f"memory_{jax.process_index()}.prof")
            print(f"    profile: {target}", flush=True)
        except (OSError, RuntimeError) as error:
            print(f"warning: no profile: {error}", flush=True)

    def _on_signal(self, *_: Any) -> None:
        self._signalled = True


def dump_program(compiled: jax.stages.Compiled, workdir: Path) -> None:
    """Writes a compiled step to `workdir/hlo`.

    step.hlo.txt is what runs, after all of the compiler's passes; memory.json the bytes it needs on a device; cost.json
    the compiler's own estimate, which counts the body of a loop once (`wallwm_jax.preflight` counts each turn).
    """
    directory = workdir / HLO
    directory.mkdir(exist_ok=True)
    memory = compiled.memory_analysis()
    sizes = {name: getattr(memory, name) for name in dir(memory) if name.endswith("_in_bytes")}
    write_text(directory / "step.hlo.txt", compiled.as_text() or "")
    write_text(directory / "memory.json", json.dumps(sizes, indent=1) + "\n")
    write_text(directory / "cost.json", json.dumps(compiled.cost_analysis(), indent=1, sort_keys=True) + "\n")
    print(f"    compiled step: {directory}", flush=True)
