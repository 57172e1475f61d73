"""Notebooks run top to bottom on a small store; the one that needs a run makes a tiny one, and gets a staircase."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from vlm_setup import save_random_staircase

from configs import ocbench_quickstart

ROOT = Path(__file__).parent.parent


@pytest.mark.extended
@pytest.mark.parametrize("notebook", sorted(path.name for path in (ROOT / "notebooks").glob("*.ipynb")))
def test_runs_top_to_bottom(notebook, clustered_store, history_store, tmp_path, monkeypatch):
    rollouts = notebook.startswith("03")
    monkeypatch.setenv("WALLWM_STORE", str(history_store.path if rollouts else clustered_store))
    monkeypatch.setenv("WALLWM_WORKDIR", str(tmp_path / "run"))
    monkeypatch.setenv("WALLWM_STEPS", "3")
    if rollouts:
        text_width = ocbench_quickstart.get_config().model.text.width  # of the model that the notebook trains
        save_random_staircase(history_store.path, tmp_path / "staircase", text_width)
        monkeypatch.setenv("WALLWM_STAIRCASE", str(tmp_path / "staircase"))
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", str(int(rollouts)))
    monkeypatch.setenv("WALLWM_TOPOLOGY", "")  # compile for CPU devices; the TPU compiler takes minutes
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    content = nbformat.read(ROOT / "notebooks" / notebook, as_version=4)
    nbformat.validate(content)
    client = NotebookClient(content, timeout=900, kernel_name="python3", resources={"metadata": {"path": "notebooks"}})
    client.execute(cwd=str(ROOT / "notebooks"))
    pictures = sum(
        "image/png" in output.get("data", {}) for cell in content.cells for output in cell.get("outputs", [])
    )
    assert pictures >= 4
    printed = "".join(output.get("text", "") for cell in content.cells for output in cell.get("outputs", []))
    assert not rollouts or f"2 latents of width {text_width} from step 1 of {tmp_path / 'staircase'}" in printed
