"""Checks that tokens have a row in the target's embedding.

JAX does not fail on an id beyond an array: it reads another row.
"""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from beagle_jax.data.template import Row
from beagle_jax.errors import UserError


def check_ids(
    rows: Sequence[Row],
    vocab_size: int | None,
    where: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Checks the tokens of rows.

    vocab_size: rows of the target's embedding; None: not known, nothing is checked. where: place of
    the rows, for the message. tokenizer: gives the text of a wrong token.

    Raises:
        UserError: a token has no embedding. The message names row and token.
    """
    if vocab_size is None:
        return
    for number, row in enumerate(rows):
        if not row.tokens or (max(row.tokens) < vocab_size and min(row.tokens) >= 0):
            continue
        place = next(at for at, token in enumerate(row.tokens) if not 0 <= token < vocab_size)
        token = row.tokens[place]
        spelt = f" ({tokenizer.convert_ids_to_tokens(token)!r})" if tokenizer else ""
        at = where if len(rows) == 1 else f"{where}, row {number}"
        raise UserError(
            f"{at}: token {token}{spelt} at position {place} has no row in the target's "
            f"embedding, which ends at {vocab_size - 1}; take it out of the text, or use the "
            "target's own tokenizer"
        )
