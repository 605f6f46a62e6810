"""The notebooks: small, with outputs of a full run, and executed on a toy target."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
from importlib.metadata import metadata
from pathlib import Path

import nbformat
import pytest
from convert_cases import make_place
from nbclient import NotebookClient
from nbformat.v4 import new_output
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PICTURES = {"a_quick_start": 1, "b_masks_and_stages": 3, "c_trees": 3, "d_your_own": 0}
PRECISION = "JAX_DEFAULT_MATMUL_PRECISION"


def runner():
    spec = importlib.util.spec_from_file_location("run_notebooks", ROOT / "notebooks" / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RUN = runner()


def read(path: Path):
    return nbformat.read(path, as_version=4)


def test_all_four_are_here():
    assert [path.stem for path in NOTEBOOKS] == list(PICTURES)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_valid_and_installs_first(path):
    nbformat.validate(read(path))
    first, *rest = [cell.source for cell in RUN.code_cells(read(path))]
    assert re.search(r'"pip",\s+"install",', first) and "REPOSITORY" in first
    for source in [first, *rest]:
        ast.parse(source)


# What is kept of a full run


def check_outputs(path: Path, notebook) -> None:
    cells = RUN.code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), (
        "not every cell was run, in order"
    )
    assert notebook.metadata.get("outputs_of") == RUN.digest(notebook), (
        "the outputs are of other code: python notebooks/run.py"
    )
    outputs = [output for cell in cells for output in cell.outputs]
    assert outputs and not any(output.output_type == "error" for output in outputs)
    assert all(len(str(output)) < 1_000_000 for output in outputs)
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= PICTURES[path.stem]
    text = "\n".join(output.text for output in outputs if output.output_type == "stream")
    assert text.startswith("0.") and "short form" not in text
    assert not re.search(r"/(?:home|root|tmp|usr|work|mnt)/|\r|Warning|Traceback", text)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_outputs_of_a_full_run_are_there(path):
    check_outputs(path, read(path))


def wiped(notebook):
    RUN.code_cells(notebook)[1].execution_count = None


def changed(notebook):
    RUN.code_cells(notebook)[1].source += "\nprint()"


def failed(notebook):
    RUN.code_cells(notebook)[0].outputs.append(
        new_output("error", ename="E", evalue="", traceback=[])
    )


def large(notebook):
    RUN.code_cells(notebook)[0].outputs.append(
        new_output("stream", name="stdout", text="x" * 1_000_000)
    )


def short(notebook):
    RUN.code_cells(notebook)[0].outputs.append(
        new_output("stream", name="stdout", text="short form")
    )


@pytest.mark.parametrize("spoil", [wiped, changed, failed, large, short])
def test_planted_bugs_in_outputs(spoil):
    notebook = read(NOTEBOOKS[1])
    spoil(notebook)
    with pytest.raises(AssertionError):
        check_outputs(NOTEBOOKS[1], notebook)


def test_bars_are_kept_as_they_ended_and_paths_without_the_machine():
    pieces = [
        "loading:   0%|",
        "\rloading:  50%|",
        "\rloading: 100%|\n",
        "\rgone: 5%|",
        "\r        \r",
        f"at {ROOT}/runs\n",
        "\rwiped: 9%|\r   \r",
    ]
    outputs = [new_output("stream", name="stderr", text=text) for text in pieces]
    outputs.insert(2, new_output("stream", name="stdout", text="one\n"))
    tidied = RUN.tidy(outputs)
    assert [(output.name, output.text) for output in tidied] == [
        ("stderr", "loading: 100%|\nat ./runs"),
        ("stdout", "one\n"),
    ]


# The first cell


def install(
    monkeypatch,
    place: Path,
    *,
    devices=(),
    path: Path = NOTEBOOKS[0],
    repository: str = "",
    installed: bool = False,
) -> list[list[str]]:
    """Returns the commands that a notebook's first cell runs.

    In a folder where beagle_jax is installed or not, on a machine with these device files.
    """
    source = RUN.code_cells(read(path))[0].source.partition("import beagle_jax\n")[0]
    assert source.count('REPOSITORY = ""') == 1
    ran, exists = [], os.path.exists
    monkeypatch.chdir(place)
    monkeypatch.setenv(PRECISION, "")  # so that it is gone again after the test
    monkeypatch.delenv(PRECISION)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: installed or None)
    monkeypatch.setattr(
        os.path,
        "exists",
        lambda name: name in devices if str(name).startswith("/dev/") else exists(name),
    )
    monkeypatch.setattr(subprocess, "run", lambda command, check: ran.append(command))
    monkeypatch.setattr(sys, "path", list(sys.path))
    exec(source.replace('REPOSITORY = ""', f"REPOSITORY = {repository!r}"), {})
    return ran


def test_where_it_is_installed_nothing_is(monkeypatch, tmp_path):
    assert install(monkeypatch, tmp_path, installed=True) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.parametrize(
    ("devices", "extra"),
    [
        ((), ""),
        (("/dev/nvidia0",), "[cuda12]"),
        (("/dev/accel0",), "[tpu]"),
        (("/dev/vfio/0",), "[tpu]"),
    ],
)
def test_a_clone_is_installed_as_it_is_with_the_jax_of_the_runtime(
    path, devices, extra, monkeypatch
):
    [pip] = install(monkeypatch, ROOT / "notebooks", devices=devices, path=path)
    assert pip[1:5] == ["-m", "pip", "install", "--quiet"] and pip[-2:] == ["--editable", str(ROOT)]
    requirement, bounds = (
        Requirement(pip[5]),
        re.search(r"^jax(\S+)", (ROOT / "requirements.txt").read_text(), re.M).group(1),
    )
    assert (
        requirement.specifier == Requirement(f"jax{bounds}").specifier
        and "".join(f"[{extra_name}]" for extra_name in requirement.extras) == extra
    )
    assert requirement.extras <= set(metadata("jax").get_all("Provides-Extra"))
    assert pip[6:-2] == (["torch"] if path.stem == "d_your_own" else [])
    # Losslessness in float32 is shown on every runtime: where float32 would be multiplied in fewer
    # bits, it is asked for.
    assert os.environ.get(PRECISION) == ("highest" if devices else None)


@pytest.mark.parametrize("how", ["field", "variable"])
def test_elsewhere_the_project_is_cloned_from_the_address_given(how, monkeypatch, tmp_path):
    address = "https://example.org/x"
    monkeypatch.setenv("BEAGLE_REPOSITORY", address if how == "variable" else "")
    clone, pip = install(monkeypatch, tmp_path, repository=address if how == "field" else "")
    assert (
        clone == ["git", "clone", "--depth", "1", address, str(tmp_path / "beagle_jax_clone")]
        and pip[-1] == clone[-1]
    )


def test_a_clone_that_was_made_before_is_used_again(monkeypatch, tmp_path):
    (tmp_path / "beagle_jax_clone" / "beagle_jax").mkdir(parents=True)
    (tmp_path / "beagle_jax_clone" / "beagle_jax" / "__init__.py").touch()
    [pip] = install(monkeypatch, tmp_path)
    assert pip[-1] == str(tmp_path / "beagle_jax_clone")


def test_without_an_address_one_message_says_what_to_give(monkeypatch, tmp_path):
    monkeypatch.delenv("BEAGLE_REPOSITORY", raising=False)
    with pytest.raises(
        SystemExit,
        match="Type the address that `git clone` takes into REPOSITORY, at the top of this cell",
    ):
        install(monkeypatch, tmp_path)


def test_a_session_with_older_modules_loaded_is_to_be_restarted(monkeypatch):
    monkeypatch.setattr(sys.modules["numpy"], "__version__", "1.0")
    with pytest.raises(SystemExit, match=r"an older numpy. Restart it"):
        install(monkeypatch, ROOT / "notebooks")


def test_an_accelerator_is_left_to_the_notebook_that_holds_it():
    """A TPU serves one process: a second one that asks for it fails."""
    started = [
        call
        for path in NOTEBOOKS
        for cell in RUN.code_cells(read(path))
        for call in ast.walk(ast.parse(cell.source))
        if isinstance(call, ast.Call)
        and ast.unparse(call.func) == "subprocess.run"
        and "beagle_jax." in ast.unparse(call)
    ]
    assert started and all("'JAX_PLATFORMS': 'cpu'" in ast.unparse(call) for call in started)


# Executed


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> dict[str, str]:
    place = make_place(tmp_path_factory.mktemp("notebooks"))
    return {
        "BEAGLE_SHORT": "1",
        "BEAGLE_TARGET": str(place.folder / "target"),
        "BEAGLE_DRAFT": str(place.folder / "whole"),
    }


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, toy, tmp_path, monkeypatch):
    for name, value in (
        toy | {"BEAGLE_FOLDER": str(tmp_path), "PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"}
    ).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(
        "JAX_COMPILATION_CACHE_DIR", os.path.expanduser("~/.cache/beagle_jax/xla_tests")
    )
    notebook = read(path)
    NotebookClient(
        notebook, timeout=280, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}
    ).execute()
    assert all(cell.execution_count for cell in RUN.code_cells(notebook))
