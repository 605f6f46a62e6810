"""The notebooks: clean, small, installing first; and executed end to end on a toy target with a draft of its own."""

import ast
import os
from pathlib import Path

import nbformat
import pytest
from convert_cases import make_place
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def code(path: Path) -> list[str]:
    return [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def test_all_four_are_here():
    assert [path.stem for path in NOTEBOOKS] == ["a_quick_start", "b_masks_and_stages", "c_trees", "d_your_own"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_valid_installs_first_and_is_small(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    first, *rest = code(path)
    assert '"pip", "install"' in first and 'find_spec("beagle_jax")' in first
    for source in [first, *rest]:
        ast.parse(source)
    for cell in notebook.cells:
        assert len(str(cell.get("outputs", ""))) < 1_000_000
        assert not any(output.output_type == "error" for output in cell.get("outputs", []))


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> dict[str, str]:
    place = make_place(tmp_path_factory.mktemp("notebooks"))
    return {"BEAGLE_SHORT": "1", "BEAGLE_TARGET": str(place.folder / "target"), "BEAGLE_DRAFT": str(place.folder / "whole")}


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, toy, tmp_path, monkeypatch):
    for name, value in (toy | {"BEAGLE_FOLDER": str(tmp_path), "PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", os.path.expanduser("~/.cache/beagle_jax/xla_tests"))
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=280, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}).execute()
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
