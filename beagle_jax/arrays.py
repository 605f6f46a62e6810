"""The type of arrays that may be on the host or on a device."""

import jax
import numpy as np

# What jnp functions and jitted functions take: numpy arrays, jax arrays, and tracers.
AnyArray = jax.Array | np.ndarray
