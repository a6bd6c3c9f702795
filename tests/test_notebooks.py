"""The notebooks run from top to bottom."""

from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "experiments" / "notebooks").glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, monkeypatch):
  why = "notebooks need nbclient and ipykernel: pip install -e '.[test]'"
  pytest.importorskip("ipykernel", reason=why)
  nbclient = pytest.importorskip("nbclient", reason=why)
  nbformat = pytest.importorskip("nbformat", reason=why)
  monkeypatch.setenv("PYTHONPATH", str(path.parents[2]))
  notebook = nbformat.read(path, as_version=4)
  assert not any(cell.get("outputs") for cell in notebook.cells)  # results are run, not kept
  nbclient.NotebookClient(
    notebook, timeout=300, resources={"metadata": {"path": str(path.parent)}}
  ).execute()
  figures = [
    o
    for cell in notebook.cells
    for o in cell.get("outputs", ())
    if "image/png" in o.get("data", {})
  ]
  assert len(figures) == (path.stem == "first_look")
