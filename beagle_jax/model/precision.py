"""Precision of matrix products, chosen from dtype and backend for single programs.

Decoding in float32 must write exactly the tokens of plain decoding, whatever the tree, so a product
must not depend on its number of rows. By default, jax multiplies float32 matrices as bfloat16 on
TPUs and as TF32 on newer GPUs. `exact` changes this for one program; the rest of the process
computes as before.
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
    """Returns the precision for products of these dtypes; None leaves it to jax.

    It is "highest" for float32 on an accelerator. It is None on a CPU, whose products keep all bits
    anyway; if a narrower float is present, because its rounding dominates; and if the user has set
    `jax_default_matmul_precision`.
    """
    floats = {dtype for dtype in dtypes if jnp.issubdtype(dtype, jnp.floating)}
    rounds = floats == {jnp.dtype("float32")} and jax.default_backend() != "cpu"
    # mypy does not see the settings, because jax adds them at import
    requested = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    return "highest" if rounds and requested is None else None


def exact(function: Callable[P, R]) -> Callable[P, R]:
    """Wraps a function to run at the precision that its arguments' dtypes need.

    Apply it inside `jax.jit`. Functions that it calls, jitted ones too, use the same precision as
    part of this program.
    """

    @wraps(function)
    def scoped(*args: P.args, **kwargs: P.kwargs) -> R:
        precision = precision_for(_dtypes((args, kwargs)))
        with jax.default_matmul_precision(precision) if precision else nullcontext():
            return function(*args, **kwargs)

    return scoped


def _dtypes(tree: Any) -> set[jnp.dtype]:
    """Returns the dtypes of all arrays in a tree; static arguments have none."""
    return {leaf.dtype for leaf in jax.tree.leaves(tree) if hasattr(leaf, "dtype")}
