"""Preview of training rows: their text, with supervised tokens highlighted."""

from collections.abc import Sequence
from itertools import groupby
from typing import TextIO

from transformers import PreTrainedTokenizerBase

from beagle_jax.data.template import Row, decoded
from beagle_jax.terminal import coloured

# Green and grey, each in two shades, so that neighbouring tokens can be distinguished.
_SUPERVISED, _READ = ("1;32", "32"), ("2;37", "37")


def preview(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, stream: TextIO) -> str:
    """Returns the text of the rows with the supervised tokens highlighted.

    They are green on a terminal; elsewhere, or with NO_COLOR, they stand between >> and <<.
    """
    colours = coloured("x", "1", stream) != "x"
    blocks = []
    for number, row in enumerate(rows, 1):
        count = sum(row.supervised)
        note = f"{count} supervised" if count else "the target will answer"
        text = _in_colour(row, tokenizer, stream) if colours else _in_marks(row, tokenizer)
        blocks.append(f"--- row {number}: {len(row.tokens)} tokens, {note}\n{text}")
    return "\n".join(blocks)


def _in_colour(row: Row, tokenizer: PreTrainedTokenizerBase, stream: TextIO) -> str:
    pieces = []
    for place, (token, supervised) in enumerate(zip(row.tokens, row.supervised, strict=True)):
        shade = (_SUPERVISED if supervised else _READ)[place % 2]
        pieces.append(coloured(decoded(tokenizer, [token]), shade, stream))
    return "".join(pieces)


def _in_marks(row: Row, tokenizer: PreTrainedTokenizerBase) -> str:
    pieces = []
    for supervised, run in groupby(
        zip(row.tokens, row.supervised, strict=True), key=lambda pair: pair[1]
    ):
        text = decoded(tokenizer, [token for token, _ in run])
        pieces.append(f">>{text}<<" if supervised else text)
    return "".join(pieces)
