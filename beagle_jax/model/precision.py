"""Precision of matrix products: chosen here from dtype and backend, for the programs that need it.

To decode in float32 is to write the very tokens of plain decoding, whatever the tree: a product
must not depend on how many rows it has. On a TPU jax multiplies float32 matrices as bfloat16, on
newer GPUs as TF32, unless it is told otherwise. `exact` tells it, for one program: nothing else in
the process computes at another precision than before.
"""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp

P = ParamSpec("P")
R = TypeVar("R")


def precision_for(dtypes: Iterable[jnp.dtype]) -> str | None:
    """The precision of products of arrays of these dtypes; None leaves it to jax.

    "highest" for float32 on an accelerator. None on a CPU, whose products keep all bits anyway;
    beside any narrower float, whose rounding is the coarser one; and where the user has set
    `jax_default_matmul_precision`, which stands.
    """
    floats = {dtype for dtype in dtypes if jnp.issubdtype(dtype, jnp.floating)}
    rounds = floats == {jnp.dtype("float32")} and jax.default_backend() != "cpu"
    # mypy: jax adds its settings when it is imported
    requested = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    return "highest" if rounds and requested is None else None


def exact(function: Callable[P, R]) -> Callable[P, R]:
    """Traces or runs a function at the precision that its arguments' dtypes need.

    Stands below `jax.jit`. What the function calls, other jitted functions too, computes at that
    precision as part of this program.
    """

    @wraps(function)
    def scoped(*args: P.args, **kwargs: P.kwargs) -> R:
        precision = precision_for(_dtypes((args, kwargs)))
        with jax.default_matmul_precision(precision) if precision else nullcontext():
            return function(*args, **kwargs)

    return scoped


def _dtypes(tree: Any) -> set[jnp.dtype]:
    """Dtypes of all arrays in a tree; static arguments are leaves without one."""
    return {leaf.dtype for leaf in jax.tree.leaves(tree) if hasattr(leaf, "dtype")}
