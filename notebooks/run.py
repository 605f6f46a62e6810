"""Runs the notebooks in full and stores in them what they print and draw.

    python notebooks/run.py                     # all four: half an hour on two CPU cores
    python notebooks/run.py b_masks_and_stages  # one of them

Needs the `test` extra. Run it after each change of a notebook's code, which tests/test_notebooks.py
checks. The first cell, which installs, is excepted.
"""

import hashlib
import os
import sys
from collections.abc import Iterable
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

HERE = Path(__file__).resolve().parent


def main(names: list[str]) -> None:
    """Runs and rewrites notebooks. names: their stems; none: all four."""
    os.environ["PYTHONWARNINGS"] = (
        "ignore:IProgress not found"  # tqdm would like a widget for its bars; text is what is kept
    )
    for path in sorted(HERE.glob("*.ipynb")):
        if not names or path.stem in names:
            notebook = nbformat.read(path, as_version=4)
            NotebookClient(
                notebook,
                timeout=None,
                record_timing=False,
                resources={"metadata": {"path": str(HERE.parent)}},
            ).execute()
            for cell in code_cells(notebook):
                cell.outputs = tidy(cell.outputs)
            notebook.metadata["outputs_of"] = digest(notebook)
            nbformat.write(notebook, path)
            print(path.name)


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    """Returns the code cells in order."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def digest(notebook: NotebookNode) -> str:
    """Returns the SHA-256 of all code after the first cell, which installs.

    A notebook's metadata hold it as `outputs_of`: the code that wrote the outputs.
    """
    return hashlib.sha256(
        "\n\n".join(cell.source for cell in code_cells(notebook)[1:]).encode()
    ).hexdigest()


def tidy(outputs: Iterable[NotebookNode]) -> list[NotebookNode]:
    """Joins the pieces of each stream, and removes paths of this machine.

    Of each progress bar only the last state remains.
    """
    streams: dict[str, NotebookNode] = {}
    tidied = []
    for output in outputs:
        if output.output_type != "stream":
            tidied.append(output)
        elif output.name in streams:
            streams[output.name].text += output.text
        else:
            streams[output.name] = output
            tidied.append(output)
    for stream in streams.values():
        lines = [_last_state(line) for line in stream.text.split("\n")]
        text = "\n".join(line for line in lines if line is not None)
        stream.text = text.replace(str(HERE.parent), ".").replace(str(Path.home()), "~")
    return [output for output in tidied if output.output_type != "stream" or output.text.strip()]


def _last_state(line: str) -> str | None:
    """Returns the last state of a line that was overwritten.

    None if it was cleared at the end, as by bars that leave nothing.
    """
    *before, last = [state.rstrip() for state in line.split("\r")]
    if last or not before:
        return last
    return before[-1] or None


if __name__ == "__main__":
    main(sys.argv[1:])
