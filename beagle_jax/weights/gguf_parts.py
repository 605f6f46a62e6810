"""Finds the parts of a split GGUF model: NAME-00001-of-00003.gguf and so on."""

import re
from collections.abc import Sequence
from pathlib import Path

from beagle_jax.errors import BadFile
from beagle_jax.weights.gguf_metadata import Metadata

_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_MERGE = "or merge them into one file with llama.cpp's gguf-split --merge"


def part_paths(path: Path) -> list[Path]:
    """Returns the paths of all parts in order, given the path of any part.

    A file whose name has no part number is the only part.

    Raises:
      UserError: parts are missing. The message names them.
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
        raise BadFile(
            path,
            f"this is one part of {count}, and {', '.join(missing) or 'its number'} is not "
            f"beside it; put all parts into one folder, {_MERGE}",
        )
    return paths


def check_parts(parts: Sequence[Metadata]) -> None:
    """Checks that the metadata of each part agrees with its file name.

    `split.tensors.count` is not checked: every tensor is checked against the config by its name.

    Raises:
      UserError: a part's metadata gives another number or count.
    """
    for number, part in enumerate(parts):
        stated = part.get("split.no", 0), part.get("split.count", 1) or 1
        if stated != (number, len(parts)):
            raise BadFile(
                part.path,
                f"by its metadata this is part {stated[0] + 1} of {stated[1]}, by its "
                f"name part {number + 1} of {len(parts)}; give the parts the names that they were "
                f"written under, NAME-{stated[0] + 1:05d}-of-{stated[1]:05d}.gguf, {_MERGE}",
            )
