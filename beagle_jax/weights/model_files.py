"""Selects the files of a target or a draft in a folder, and checks the index of a Hugging Face one.

Transformers reads `model.safetensors`, or the files that `model.safetensors.index.json` names.
Other files are not part of the model: the same weights in their maker's form
(`consolidated.safetensors`), adapters, a trainer's files, leftovers of file managers.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from beagle_jax.errors import BadFile, UserError
from beagle_jax.json_file import read_json

INDEX = "model.safetensors.index.json"  # maps tensors to files of a checkpoint in several files
WHOLE = "model.safetensors"  # a checkpoint in one file
# Files of a repository that are not downloaded: the weights in their maker's form, and junk.
OTHER_FORMS = ("consolidated*", "original/*", "._*", "*/._*")
_MODEL = re.compile(r"model(-\d+)?(-of-\d+)?\.safetensors|pytorch_model(-\d+)?(-of-\d+)?\.bin")
# Used only if no file has a model's usual name.
_NOT_THE_MODEL = re.compile(
    r"(consolidated|adapter|optimizer|optim|scheduler|scaler|training|trainer|random_states|rng)"
    r"([._-].*)?\.(safetensors|bin|pt|pth)"
)
_ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
_SHOWN = 10  # contradictions listed in one message


def model_files(folder: Path) -> list[Path]:
    """Returns the model's safetensors files, sorted by name.

    Raises:
      UserError: there are none.
    """
    files = weights_in(folder, (".safetensors",))
    if is_whole(folder):
        return [folder / WHOLE]
    if (folder / INDEX).exists():
        listed = set(_weight_map(folder / INDEX).values())
        return [path for path in files if _MODEL.fullmatch(path.name) or path.name in listed]
    held = of_the_model(files)
    if not held:
        raise UserError(f"{folder}: {_nothing_to_read(folder, files)}")
    return held


def is_whole(folder: Path) -> bool:
    """Returns whether model.safetensors is the whole model, so that no index describes it.

    Transformers then reads this file alone, whatever parts lie beside it.
    """
    if not (folder / WHOLE).is_file():
        return False
    return not (folder / INDEX).exists() or WHOLE not in _weight_map(folder / INDEX).values()


def weights_in(folder: Path, suffixes: Collection[str]) -> list[Path]:
    """Returns the files with one of these suffixes, sorted by name, without hidden ones."""
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix in suffixes and not path.name.startswith(".")
    )


def of_the_model(files: Sequence[Path]) -> list[Path]:
    """Returns the files that have a model's usual name.

    If there are none, returns those that are not known to be something else.
    """
    usual = [path for path in files if _MODEL.fullmatch(path.name)]
    return usual or [path for path in files if not _NOT_THE_MODEL.fullmatch(path.name)]


def adapter_beside(folder: Path) -> str | None:
    """Returns the name of an adapter's file in the folder, else None."""
    return next((name for name in _ADAPTERS if (folder / name).exists()), None)


def _nothing_to_read(folder: Path, files: Collection[Path]) -> str:
    """Explains what a folder without model files is, and what to do."""
    if name := adapter_beside(folder):
        return (
            f"this is a LoRA adapter ({name}), not a model; merge it into its base model "
            "(peft's merge_and_unload, then save_pretrained) and give that folder"
        )
    if ggufs := sorted(path.name for path in folder.glob("*.gguf")):
        return f"no *.safetensors file in this folder; to read the GGUF file, name it: {ggufs[0]}"
    if files:
        names = ", ".join(path.name for path in files)
        return f"no file of a model in this folder, only {names}; expected model.safetensors"
    return "no *.safetensors file in this folder; convert the checkpoint to safetensors first"


def _weight_map(path: Path) -> dict[str, str]:
    """Reads the index: name of each tensor -> name of its file."""
    listed = read_json(path, "").get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(file, str) for file in listed.values()):
        raise BadFile(
            path,
            "weight_map is not a list of tensors with the file of each; copy or "
            "download the file again",
        )
    return listed


def check_index(path: Path, held: Mapping[str, Collection[str]]) -> None:
    """Checks that the index and the files agree.

    held: names of the tensors in each file of the model.

    Raises:
      UserError: they disagree.
    """
    listed = _weight_map(path)
    files = set(listed.values())
    problems = [f"{file} is listed, but not in the folder" for file in sorted(files - held.keys())]
    problems += [f"{file} is in the folder, but not listed" for file in sorted(held.keys() - files)]
    problems += [
        f"{name} is listed in {file}, which lacks it"
        for name, file in listed.items()
        if file in held and name not in held[file]
    ]
    problems += [
        f"{name} is in {file}, but "
        f"{f'listed in {listed[name]}' if name in listed else 'not listed'}"
        for file, names in held.items()
        if file in files
        for name in names
        if listed.get(name) != file
    ]
    if problems:
        shown = [
            *problems[:_SHOWN],
            *([f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []),
        ]
        raise BadFile(
            path,
            f"the index does not match the files ({len(problems)} differences); copy or "
            "download the folder again:\n  " + "\n  ".join(shown),
        )
