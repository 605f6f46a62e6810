"""The shapes of a target without its weights, for `plan`."""

import math
from pathlib import Path

from beagle_jax.config import TargetConfig
from beagle_jax.errors import UserError
from beagle_jax.json_file import read_json
from beagle_jax.model.target import TargetSpec
from beagle_jax.model.tensors import param_table
from beagle_jax.weights.hf import download
from beagle_jax.weights.target import open_source


def planned_spec(config: TargetConfig) -> TargetSpec:
    """Returns the architecture from `target.shape`, else from the source's config.

    Of a hub repository only the config is downloaded.
    """
    if config.shape:
        return TargetSpec.from_hf_config(
            read_json(
                Path(config.shape), "target.shape names a config.json of Hugging Face's form"
            ),
            config.shape,
        )
    cache_dir = Path(config.cache_dir).expanduser()
    if config.source.startswith("hf:"):
        folder = download(config.source.removeprefix("hf:"), cache_dir, ["config.json"])
        return TargetSpec.from_hf_config(
            read_json(folder / "config.json", "a Hugging Face model folder holds it"), config.source
        )
    return TargetSpec.from_hf_config(open_source(config.source, cache_dir).config(), config.source)


def check_shape(config: TargetConfig, spec: TargetSpec) -> None:
    """Checks that the loaded target has the shapes that `target.shape` describes.

    Raises:
      UserError: some differ. The message names one of them.
    """
    if config.shape is None:
        return
    planned, loaded = param_table(planned_spec(config)), param_table(spec)
    different = [name for name in planned | loaded if planned.get(name) != loaded.get(name)]
    if different:
        name = different[0]
        sizes = [
            f"{list(table[name][1])}" if name in table else "absent" for table in (planned, loaded)
        ]
        raise UserError(
            f"{config.shape}: target.shape does not describe {config.source}: {name} is "
            f"{sizes[0]} there and {sizes[1]} in the target ({len(different)} tensors differ); "
            "correct the file or remove the key"
        )


def parameter_count(spec: TargetSpec) -> int:
    """Counts the numbers in all tensors of a target."""
    return sum(math.prod(shape) for _, shape in param_table(spec).values())
