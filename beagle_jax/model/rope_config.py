"""Reads the rotary embedding of a Hugging Face config.

Scaling is chosen once, from the context that the config names (`max_position_embeddings`), and
never from the longest position of a batch: a text is the same whatever it is decoded with.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from beagle_jax.errors import UserError
from beagle_jax.model.layers import RopeFactors, RopeScaling

# The keys that each rope type needs; other types are errors.
_KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "longrope": ("short_factor", "long_factor"),
    "yarn": ("factor",),
    "dynamic": ("factor",),
}
_OLDER = {"su": "longrope"}  # older names of types


class Rope(NamedTuple):
    """Base, scaling and width of a rotary embedding."""

    theta: float
    scaling: RopeScaling | RopeFactors | None
    rotary_dim: int | None  # None: whole heads


class _Config(NamedTuple):
    config: Mapping[str, Any]
    rope: Mapping[str, Any]  # its part on the rotary embedding
    where: str
    width: int  # numbers of a head that are rotated
    context: int  # longest context, in tokens
    theta: float

    @property
    def original(self) -> float:
        """The context before scaling."""
        key = "original_max_position_embeddings"
        value: float = self.config.get(key) or self.rope.get(key) or self.context
        return value


def read_rope(
    config: Mapping[str, Any],
    rope: Mapping[str, Any],
    where: str,
    *,
    head_dim: int,
    context: int,
    theta: float,
    may_be_partial: bool,
) -> Rope:
    """Returns the rotary embedding that a config asks for.

    Args:
      config: the whole config; old files have some of the keys there.
      rope: its part on the rotary embedding; {} if there is none.
      where: the config's source, for messages.
      head_dim: width of a head.
      context: the longest context, in tokens.
      theta: the base if the config names none.
      may_be_partial: whether the family rotates a part of each head if asked to.

    Raises:
      UserError: the type is unknown or lacks a key, or its numbers do not fit the heads.
    """
    kind = rope.get("rope_type", rope.get("type", "default"))
    kind = _OLDER.get(kind, kind)
    if kind not in _KEYS:
        raise UserError(
            f"{where}: rope type {kind!r} is not supported; expected one of "
            f"{', '.join(map(repr, _KEYS))}"
        )
    if missing := [key for key in _KEYS[kind] if key not in rope]:
        raise UserError(
            f"{where}: rope type {kind!r} lacks {', '.join(missing)}; give a complete config.json"
        )
    share = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if share != 1.0 and not may_be_partial:
        raise UserError(
            f"{where}: partial_rotary_factor is {share}; this version rotates whole heads (1.0) "
            f"of {config['model_type']!r}"
        )
    width = int(head_dim * share)
    if width % 2 or not 0 < width <= head_dim:
        raise UserError(
            f"{where}: partial_rotary_factor {share} rotates {width} of {head_dim} numbers of a "
            "head; expected an even number"
        )
    outer: float = config.get("rope_theta", theta)
    given = _Config(config, rope, where, width, context, float(rope.get("rope_theta", outer)))
    rotary_dim = None if width == head_dim else width
    if kind == "dynamic":  # its base grows only past the context; within it, it is theta
        return Rope(given.theta, None, rotary_dim)
    if kind in ("yarn", "longrope"):
        factors = _yarn(given) if kind == "yarn" else _longrope(given)
        return Rope(given.theta, factors, rotary_dim)
    values = [float(rope[key]) for key in _KEYS[kind]]
    return Rope(given.theta, RopeScaling(*values) if values else None, rotary_dim)


def _yarn(given: _Config) -> RopeFactors:
    """Returns YaRN's divisors: fast pairs stay, slow ones are slowed, those between are blended."""
    rope, half = given.rope, given.width // 2
    factor = float(rope["factor"])

    def pair_of(rotations: float) -> float:
        """The pair that turns so many times in the original context."""
        turns = math.log(given.original / (rotations * 2 * math.pi))
        return given.width * turns / (2 * math.log(given.theta))

    low, high = pair_of(rope.get("beta_fast") or 32), pair_of(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, given.width - 1)
    span = (high - low) or 0.001
    slowed = [min(max((pair - low) / span, 0.0), 1.0) for pair in range(half)]
    factors = tuple(1 / (share / factor + 1 - share) for share in slowed)
    return RopeFactors(factors, _yarn_scale(rope, factor))


def _yarn_scale(rope: Mapping[str, Any], factor: float) -> float:
    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    weight, of_all = rope.get("mscale"), rope.get("mscale_all_dim")
    return scale(weight) / scale(of_all) if weight and of_all else scale(1.0)


def _longrope(given: _Config) -> RopeFactors:
    """Returns longrope's divisors: the long ones if the context exceeds the original one."""
    rope = given.rope
    key = "long_factor" if given.context > given.original else "short_factor"
    factors = tuple(map(float, rope[key]))
    if len(factors) != given.width // 2:
        raise UserError(
            f"{given.where}: {key} has {len(factors)} numbers, expected {given.width // 2}, one "
            "per rotary pair"
        )
    if rope.get("attention_factor") is not None:
        return RopeFactors(factors, float(rope["attention_factor"]))
    factor = float(rope.get("factor") or given.context / given.original)
    if factor <= 1:
        return RopeFactors(factors)
    return RopeFactors(factors, math.sqrt(1 + math.log(factor) / math.log(given.original)))
