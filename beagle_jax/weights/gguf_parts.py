"""The files of a GGUF model that was split: NAME-00001-of-00003.gguf and those beside it."""

import re
from collections.abc import Sequence
from pathlib import Path

from beagle_jax.errors import UserError
from beagle_jax.weights.gguf_metadata import Metadata

_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_MERGE = "or merge them into one file with llama.cpp's gguf-split --merge"


def part_paths(path: Path) -> list[Path]:
    """All parts of the model, in order, from the path of any of them; of other names, the path
    alone. Raises UserError naming the parts that are missing.
    """
    match = _PART.fullmatch(path.name)
    if match is None:
        return [path]
    count = int(match["count"])
    paths = [
        path.with_name(f"{match['stem']}-{number:05d}-of-{match['count']}.gguf")
        for number in range(1, count + 1)
    ]
    missing = [part.name for part in paths if not part.is_file()]
    if path not in paths or missing:
        raise UserError(
            f"{path}: this is one part of {count}, and {', '.join(missing) or 'its number'} is not "
            f"beside it; put all parts into one folder, {_MERGE}"
        )
    return paths


def check_parts(parts: Sequence[Metadata]) -> None:
    """Raises UserError unless the parts say of themselves what their names do.

    Their split.tensors.count is not looked at: every tensor is held against the config by its name.
    """
    for number, part in enumerate(parts):
        told = part.get("split.no", 0), part.get("split.count", 1) or 1
        if told != (number, len(parts)):
            raise UserError(
                f"{part.path}: by its metadata this is part {told[0] + 1} of {told[1]}, by its "
                f"name part {number + 1} of {len(parts)}; give the parts the names that they were "
                f"written under, NAME-{told[0] + 1:05d}-of-{told[1]:05d}.gguf, {_MERGE}"
            )
