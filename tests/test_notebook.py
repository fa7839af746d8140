"""The notebook of docs/ runs from its first cell to its last, on a short recipe."""

import json
import os
from pathlib import Path

import pytest

nbclient = pytest.importorskip("nbclient", reason="nbclient and ipykernel come with the extra dev")
nbformat = pytest.importorskip("nbformat", reason="nbformat comes with nbclient")

REPOSITORY = Path(__file__).parents[1]
NOTEBOOK = REPOSITORY / "docs" / "fmbench.ipynb"


@pytest.fixture
def notebook():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    return notebook


def test_it_is_kept_without_outputs(notebook):
    for cell in notebook.cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


@pytest.mark.slow
def test_it_trains_draws_and_predicts(notebook, tmp_path, monkeypatch):
    monkeypatch.setenv("FMBENCH_NOTEBOOK_ENTRY", "mlp")
    monkeypatch.setenv(
        "FMBENCH_NOTEBOOK_OVERRIDES", json.dumps({"num_epochs": 2, "batch_size": 60, "data.source": "sample"})
    )
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    )
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    done = nbclient.NotebookClient(
        notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    outputs = [output for cell in done.cells for output in cell.get("outputs", [])]
    said = "".join(output["text"] for output in outputs if output.get("name") == "stdout")
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    record = json.loads((tmp_path / "workdirs" / "notebook" / "record.json").read_text())
    assert said.count(f"{record['test_accuracy']:.2%} of the test images") == 2  # trained, and predicted
    assert len(pictures) == 2
    assert (tmp_path / "trials" / "runs").is_dir()
