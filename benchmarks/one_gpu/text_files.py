"""Training text in files that are small enough to commit. Loads no jax.

`part-gpu-KIND-NNN.npz`, KIND `greedy` or `drawn`, holds rows end to end, each a prompt and its
answer, in the format of experiments/text:

    tokens                          uint16 (uint32 for a larger vocabulary)
    prompt_tokens, answer_tokens    int32, lengths of each row's two parts
    prompt_id                       str; for rows written here, digits of the prompt's SHA-256
"""

import hashlib
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from beagle_jax.errors import UserError
from beagle_jax.files import whole

_ROWS_A_FILE = 40_000  # about 10 MB


class Text(NamedTuple):
    """One prompt and its answer, as tokens."""

    prompt: list[int]
    answer: list[int]
    prompt_id: str


def prompt_id(prompt: Sequence[int]) -> str:
    """Returns a name for a prompt that depends on its tokens alone."""
    return hashlib.sha256(np.array(prompt, np.int32).tobytes()).hexdigest()[:16]


def read_text(path: Path) -> list[Text]:
    """Reads the rows of a file.

    Raises: UserError for a file of another format.
    """
    try:
        with np.load(path) as arrays:
            tokens, names = arrays["tokens"].tolist(), arrays["prompt_id"].tolist()
            prompts, answers = arrays["prompt_tokens"].tolist(), arrays["answer_tokens"].tolist()
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path}: not a file of training text ({error}); expected the arrays tokens, "
            "prompt_tokens, answer_tokens and prompt_id; move it away, or get it anew"
        ) from error
    if sum(prompts) + sum(answers) != len(tokens) or not (
        len(prompts) == len(answers) == len(names)
    ):
        raise UserError(
            f"{path}: {len(prompts)} prompts and {len(answers)} answers have lengths that add up "
            f"to {sum(prompts) + sum(answers)}, and there are {len(tokens)} tokens and "
            f"{len(names)} ids; the file is damaged, get it anew"
        )
    rows, start = [], 0
    for prompt, answer, name in zip(prompts, answers, names, strict=True):
        middle, end = start + prompt, start + prompt + answer
        rows.append(Text(tokens[start:middle], tokens[middle:end], name))
        start = end
    return rows


def save_text(path: Path, rows: Sequence[Text]) -> None:
    """Writes the rows; an interrupted write leaves no partial file."""
    flat = [token for row in rows for token in row.prompt + row.answer]
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as partial, partial.open("wb") as stream:
        np.savez_compressed(
            stream,
            tokens=np.array(flat, np.uint16 if max(flat) < 2**16 else np.uint32),
            prompt_tokens=np.array([len(row.prompt) for row in rows], np.int32),
            answer_tokens=np.array([len(row.answer) for row in rows], np.int32),
            prompt_id=np.array([row.prompt_id for row in rows]),
        )


def text_files(out: Path, folder: str) -> list[Path]:
    """Returns all files of training text: those in `folder` and those written here."""
    return sorted([*Path(folder).glob("part-*.npz"), *(out / "text").glob("part-*.npz")])


def rows_of(paths: Sequence[Path]) -> Iterator[Text]:
    """Reads the rows of several files."""
    return (row for path in paths for row in read_text(path))


def collect(out: Path) -> dict[str, int]:
    """Joins the writer's files in OUT/work/text into a few files of OUT/text.

    Returns the number of answers and answer tokens of all that was written here.
    """
    total = {"answers": 0, "answer_tokens": 0}
    for kind in ("greedy", "drawn"):
        written = list(rows_of(sorted((out / "work" / "text").glob(f"part-{kind}*.npz"))))
        # Files are joined in the order of writing, so that full files stay as they are.
        for number, first in enumerate(range(0, len(written), _ROWS_A_FILE)):
            rows = written[first : first + _ROWS_A_FILE]
            save_text(out / "text" / f"part-gpu-{kind}-{number:03d}.npz", rows)
        total["answers"] += len(written)
        total["answer_tokens"] += sum(len(row.answer) for row in written)
    return total
