"""Training commands as real processes, for tests that kill them: one process or several, on any number of devices."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from etils import epath
from training_setup import subprocess_environment

from wallwm_jax.training.telemetry import read_metrics

TIMING = ("step_s", "input_wait_s")
PATIENCE_S = 300


def write_config(directory: Path, store: Path, **train: object) -> Path:
    """A config file: that of `training_setup` for the video stage, which compiles soonest, with these `train` knobs."""
    path = directory / "config.py"
    path.write_text(
        "from training_setup import training_config\n\n\ndef get_config():\n"
        f"    config = training_config({str(store)!r}, 'video').copy_and_resolve_references().unlock()\n"
        f"    config.train.update({train!r})\n    return config.lock()\n"
    )
    return path


class Run:
    """A started training run of `processes` processes with `devices` devices each."""

    def __init__(self, config: Path, workdir: Path | str, *arguments: str, processes: int = 1, devices: int = 1):
        """Starts it. Threads are pinned: each process computes on one, so that sums are always taken in one order."""
        self.workdir = epath.Path(workdir)
        self._logs = [tempfile.NamedTemporaryFile("w+") for _ in range(processes)]  # noqa: SIM115 - until the test ends
        command = [sys.executable, "-m", "wallwm_jax.train", f"--config={config}", f"--workdir={workdir}", *arguments]
        environment = {
            **subprocess_environment(),
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} --xla_cpu_multi_thread_eigen=false",
        }
        if processes > 1:
            command.append("--distributed")
            environment |= {"JAX_COORDINATOR_ADDRESS": f"localhost:{_free_port()}", "JAX_NUM_PROCESSES": str(processes)}
        self.processes = [
            subprocess.Popen(
                command,
                env={**environment, "JAX_PROCESS_ID": str(index)} if processes > 1 else environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
            for index, log in enumerate(self._logs)
        ]

    def wait_for(self, condition: Callable[[], bool], poll_s: float = 0.002) -> None:
        """Returns as soon as `condition` holds; fails if the run ends before, or nothing happens for long."""
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            ended = any(process.poll() is not None for process in self.processes)
            assert not ended and time.monotonic() < deadline, self._outputs()
            time.sleep(poll_s)

    def steps_done(self) -> int:
        """Lines of metrics.jsonl so far."""
        path = self.workdir / "metrics.jsonl"
        return path.read_text().count("\n") if path.is_file() else 0

    def is_compiled(self) -> bool:
        """Whether the first process has its train step and begins."""
        return "==> train" in self._outputs()[0]

    def is_saving(self) -> bool:
        """Whether a checkpoint is being written at this moment."""
        return any((self.workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*"))

    def signal(self, number: signal.Signals, process: int = 0) -> None:
        """Sends a signal to one process."""
        self.processes[process].send_signal(number)

    def kill(self) -> None:
        """SIGKILL to all, and waits until they are gone."""
        for process in self.processes:
            process.kill()
        self.end()

    def kill_inside_a_save(self, newest: int = 1) -> None:
        """SIGKILL to the one process with a checkpoint half written, when that of step `newest` or a later is whole.

        A small save may end between a look and a signal, so the process is stopped and looked at again, then killed.
        """
        (process,) = self.processes

        def is_time() -> bool:
            return self.is_saving() and max(saved_steps(self.workdir), default=0) >= newest

        while True:
            self.wait_for(is_time, 0.0)
            process.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
            if is_time():
                break
            process.send_signal(signal.SIGCONT)
        self.kill()

    def end(self) -> list[tuple[int, str]]:
        """Waits for all; (exit code, output) of each."""
        codes = [process.wait(timeout=PATIENCE_S) for process in self.processes]
        return list(zip(codes, self._outputs()))

    def _outputs(self) -> list[str]:
        return [Path(log.name).read_text() for log in self._logs]


def finished(config: Path, workdir: Path | str, *arguments: str, processes: int = 1, devices: int = 1) -> list[str]:
    """Runs to the end, which must be a good one; the output of each process."""
    ends = Run(config, workdir, *arguments, processes=processes, devices=devices).end()
    assert [code for code, _ in ends] == [0] * processes, [output[:1500] + output[-1500:] for _, output in ends]
    return [output for _, output in ends]


def curve(workdir: Path) -> Sequence[dict[str, float]]:
    """The lines of metrics.jsonl without what depends on the clock; floats as written, in full."""
    return [{name: value for name, value in line.items() if name not in TIMING} for line in read_metrics(workdir)]


def saved_steps(workdir: Path) -> list[int]:
    """Steps that have a checkpoint."""
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return server.getsockname()[1]
