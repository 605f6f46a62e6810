"""A tiny batch and configs for one training step."""

from functools import partial

import jax
import numpy as np
from conftest import TINY

from beagle_jax.config import EarlyStage, LateStage, TrainConfig
from beagle_jax.data.loader import Batch
from beagle_jax.model.beagle import BeagleSpec

SPEC = BeagleSpec.from_target(TINY)
B, L, D = 3, 14, TINY.hidden_size
# Rows this short would get noise of width 7 at the default scale, without its limit.
NOISY = TrainConfig(batch=B, row_tokens=L, loss_rows=8, noise_scale=0.01, noise_shortest=1)
CLEAN = NOISY.changed(noise="none")
EARLY = EarlyStage(steps=10, learning_rate=1e-3, warmup=0, window=3)
LATE = LateStage(steps=10, learning_rate=1e-3, warmup=0, window=4, simulation_steps=3)


def three_rows(*begin: int) -> Batch:
    """Makes rows of 14, 9 and 5 tokens that are supervised from these positions on.

    The second row has a question between two answers.
    """
    rng = np.random.default_rng(5)
    length_B = np.array([14, 9, 5], np.int32)
    live_BL = np.arange(L) < length_B[:, None]
    counted_BL = (
        live_BL
        & (np.arange(L) >= np.array(begin)[:, None])
        & (np.arange(L) < length_B[:, None] - 1)
    )
    counted_BL[1, 5:7] = False
    states_BLD = rng.standard_normal((B, L, D)).astype(np.float32) * live_BL[..., None]
    tokens_BL = rng.integers(0, TINY.vocab_size, (B, L)).astype(np.int32) * live_BL
    return Batch(tokens_BL, states_BLD, counted_BL, length_B[:, None], np.zeros((B, 1), np.int32))


# The programs here are small and run once or twice: compiling them without optimisation halves the
# time.
quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
