"""Checks of arguments that callers from Python pass: numbers, stop strings, parts of a decoder."""

from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

import jax.numpy as jnp
import numpy as np

from beagle_jax.errors import UserError


def whole_number(name: str, value: Any, least: int | None = None) -> int:
    """Returns an int. Numbers of numpy and jax, and floats without a fraction, are accepted.

    Raises:
        UserError: the value is no whole number, or smaller than `least`.
    """
    number = _number(value)
    if number is None or number != number or number in (float("inf"), float("-inf")):
        number = None
    if number is None or int(number) != number or (least is not None and number < least):
        expected = "a whole number" if least is None else f"a whole number of at least {least}"
        raise UserError(f"{name} is {value!r:.80}; expected {expected}")
    return int(number)


def real_number(name: str, value: Any, expected: str) -> float:
    """Returns a float. Numbers of numpy and jax are accepted.

    Raises:
        UserError: the value is no number.
    """
    number = _number(value)
    if number is None:
        raise UserError(f"{name} is {value!r:.80}; expected {expected}")
    return float(number)


def _number(value: Any) -> Any:
    """A number of Python; None for anything else, True and False included."""
    if hasattr(value, "dtype") and np.ndim(value) == 0 and jnp.issubdtype(value.dtype, np.number):
        value = np.asarray(value).item()
    return value if isinstance(value, Real) and not isinstance(value, bool) else None


def yes_or_no(name: str, value: Any) -> bool:
    """Returns a bool. Raises UserError for any other value."""
    if not isinstance(value, bool | np.bool_):
        raise UserError(f"{name} is {value!r:.80}; expected True or False")
    return bool(value)


def template_variables(value: Any) -> dict[str, Any]:
    """Returns variables of a chat template. Raises UserError if they are no mapping of names."""
    if not isinstance(value, Mapping) or not all(str(name).isidentifier() for name in value):
        raise UserError(
            f"template_variables is {value!r:.80}; expected a mapping of names, such as "
            "{'enable_thinking': False}"
        )
    return dict(value)


def stop_strings(stop: Any) -> tuple[str, ...]:
    """Returns stop strings of any container.

    Raises:
        UserError: they are no strings, or one of them is empty.
    """
    listed = tuple(stop) if isinstance(stop, Iterable) and not isinstance(stop, str | bytes) else ()
    good = all(isinstance(part, str) and part for part in listed)
    if isinstance(stop, str | bytes) or not isinstance(stop, Iterable) or not good:
        shown = stop if not listed else list(listed)
        raise UserError(f"stop is {shown!r:.80}; expected a list of strings, none of them empty")
    return tuple(str(part) for part in listed)
