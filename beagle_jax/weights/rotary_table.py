"""Stored tables of rotary frequencies, `rotary_emb.inv_freq`.

Old checkpoints hold one in each layer. Frequencies are computed from the config, never loaded, so a
stored table is only compared with them.
"""

import re
from collections.abc import Iterable
from dataclasses import asdict

import numpy as np

from beagle_jax.errors import UserError
from beagle_jax.model.draft import DraftSpec
from beagle_jax.model.layers import RopeFactors, RopeScaling, rope_frequencies

NAME = re.compile(r"(.*\.)?rotary_emb\.inv_freq")


def agrees(
    stored: np.ndarray,
    head_dim: int,
    thetas: Iterable[float],
    scaling: RopeScaling | RopeFactors | None,
) -> bool:
    """Returns whether a stored table has the frequencies of one of these bases.

    It may be from before or after scaling. bfloat16 is the coarsest dtype that it is stored in.
    """
    if stored.shape != (head_dim // 2,):
        return False
    return any(
        np.allclose(
            stored.astype(np.float32),
            rope_frequencies(head_dim, theta, given),
            rtol=2**-8,
            atol=2**-23,
        )
        for theta in thetas
        for given in {None, scaling}
    )


def check_tables(tensors: Iterable[tuple[str, np.ndarray]], spec: DraftSpec, where: object) -> None:
    """Compares a published draft's tables with its config; other tensors are ignored.

    Raises:
      UserError: a table holds other frequencies.
    """
    settings = asdict(spec)  # not every kind has all of these
    size, theta, scaling = (settings.get(key) for key in ("head_dim", "rope_theta", "rope_scaling"))
    for name, array in tensors:
        if NAME.fullmatch(name) and not (size and theta and agrees(array, size, (theta,), scaling)):
            raise UserError(
                f"{where}: {name} holds frequencies that differ from the config's (rope_theta "
                f"{theta}, scaling {scaling}, heads of {size}); correct config.json, or remove the "
                "tensor if it is a leftover"
            )
