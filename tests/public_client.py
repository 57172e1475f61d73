"""Runs `openpi_robot.py` where `openpi-client` is, which asks for numpy < 2: OPENPI_PYTHON names the interpreter."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from wallwm_jax.serving.client import Client


def check_public_client(port: int, *, steps: int, **fields: object) -> None:
    """It is told what this package's client is told by the same server, whose replies have so many `steps`."""
    python = os.environ.get("OPENPI_PYTHON", sys.executable)
    if subprocess.run([python, "-c", "import openpi_client"], capture_output=True).returncode:
        pytest.skip("openpi-client is not installed; name an interpreter that has it in OPENPI_PYTHON")
    script = Path(__file__).parent / "openpi_robot.py"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([python, script, str(port)], capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    with contextlib.closing(Client("127.0.0.1", port)) as robot:
        frames = {view: np.full((64, 64, 3), 128, np.uint8) for view in robot.metadata["views"]}
        state = np.array([[0.4, 0.1, 0.2, 1, 0, 0, 0, 0.2]])
        own = robot.infer({"images": frames, "state": state, "prompt": "reach", **fields})
    assert found["views"] == robot.metadata["views"]
    np.testing.assert_array_equal(np.array(found["actions"], np.float32), own["actions"])
    assert found["steps"] == steps and found["broker"] == found["actions"][:3]
    assert "prompt says the next event in words" in found["error"]
