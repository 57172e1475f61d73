"""Notebooks run top to bottom on a small store; the one that needs a run makes a tiny one."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent


@pytest.mark.extended
@pytest.mark.parametrize("notebook", sorted(path.name for path in (ROOT / "notebooks").glob("*.ipynb")))
def test_runs_top_to_bottom(notebook, clustered_store, history_store, tmp_path, monkeypatch):
    rollouts = notebook.startswith("03")
    monkeypatch.setenv("WALLWM_STORE", str(history_store.path if rollouts else clustered_store))
    monkeypatch.setenv("WALLWM_WORKDIR", str(tmp_path / "run"))
    monkeypatch.setenv("WALLWM_STEPS", "3")
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", str(int(rollouts)))
    monkeypatch.setenv("WALLWM_TOPOLOGY", "")  # compile for CPU devices; the TPU compiler takes minutes
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    content = nbformat.read(ROOT / "notebooks" / notebook, as_version=4)
    nbformat.validate(content)
    client = NotebookClient(content, timeout=300, kernel_name="python3", resources={"metadata": {"path": "notebooks"}})
    client.execute(cwd=str(ROOT / "notebooks"))
    pictures = sum(
        "image/png" in output.get("data", {}) for cell in content.cells for output in cell.get("outputs", [])
    )
    assert pictures >= 4
