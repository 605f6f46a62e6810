"""Reads a Hugging Face model folder (config.json, safetensors, tokenizer files), local or from the
hub.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from beagle_jax.errors import UserError
from beagle_jax.json_file import read_json
from beagle_jax.weights.safetensors_file import Place, places

_INDEX = (
    "model.safetensors.index.json"  # of a checkpoint in several files: which one holds which tensor
)
_SHOWN = 10  # contradictions in one message


class HFTokenizer:
    """The part of a model folder that is not weights: config.json, tokenizer files,
    generation_config.json.
    """

    def __init__(self, path: Path):
        self.path = path

    def config(self) -> dict[str, Any]:
        """The contents of config.json."""
        return read_json(self.path / "config.json", "a Hugging Face model folder holds it")

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The folder's tokenizer."""
        if (self.path / "tokenizer.model").exists() and not (self.path / "tokenizer.json").exists():
            _check_sentencepiece(self.path / "tokenizer.model")
        from transformers import (
            AutoTokenizer,
        )  # here, since it imports torch where that is installed: two seconds

        try:
            return AutoTokenizer.from_pretrained(str(self.path))
        except Exception as error:
            # tokenizers raises bare Exceptions; the last two of the others stand for valid JSON
            # that is no tokenizer.
            if type(error) is not Exception and not isinstance(
                error, OSError | ValueError | KeyError | TypeError
            ):
                raise
            raise UserError(f"{self.path}: no usable tokenizer in this folder ({error})") from error

    def eos_ids(self) -> tuple[int, ...]:
        """Ids that end an answer: generation_config.json if there is one, else config.json."""
        generation = self.path / "generation_config.json"
        found = read_json(generation, "").get("eos_token_id") if generation.exists() else None
        found = self.config().get("eos_token_id") if found is None else found
        if found is None:
            raise UserError(
                f"{self.path}: neither generation_config.json nor config.json names eos_token_id"
            )
        found = found if isinstance(found, list) else [found]
        if not all(type(token) is int and token >= 0 for token in found):
            raise UserError(
                f"{self.path}: eos_token_id is {found}; expected a token's id, or a list of them"
            )
        return tuple(found)


def _check_sentencepiece(path: Path) -> None:
    """Raises UserError where transformers would take the file for another library's, and name that
    library as missing.
    """
    remedy = "or use a folder that also has tokenizer.json"
    try:
        import sentencepiece
    except ImportError:
        raise UserError(
            f"{path}: reading it takes the sentencepiece package, which is not installed: pip "
            f"install sentencepiece; {remedy}"
        ) from None
    try:
        sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"{path}: cannot be read as a SentencePiece model ({error}); is the file whole? "
            f"Copy or download it again, {remedy}"
        ) from error


def _check_index(path: Path, held: Mapping[str, Collection[str]]) -> None:
    """Raises UserError unless the index and the files agree. held: names of the tensors in each
    file of the folder.
    """
    listed = read_json(path, "").get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(file, str) for file in listed.values()):
        raise UserError(
            f"{path}: weight_map is not a list of tensors with the file of each; copy or "
            "download the file again"
        )
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
        raise UserError(
            f"{path}: the index contradicts the files ({len(problems)} places); copy or "
            "download the folder again:\n  " + "\n  ".join(shown)
        )


class HFFolder(HFTokenizer):
    """A local folder as `save_pretrained` writes it. Only safetensors are read: pickles can run
    code.
    """

    def __init__(self, path: Path):
        super().__init__(path)
        self._files = sorted(path.glob("*.safetensors"))
        if not self._files:
            raise UserError(
                f"{path}: no *.safetensors file in this folder; convert the checkpoint to "
                "safetensors first"
            )

    @cached_property
    def places(self) -> list[tuple[str, Place]]:
        """Every tensor and where it lies, file by file.

        Raises UserError naming a broken file, a dtype that is no weight's, and what the index of
        the files says otherwise.
        """
        found = {file.name: places(file) for file in self._files}
        if (self.path / _INDEX).exists():
            _check_index(self.path / _INDEX, found)
        # A table that old checkpoints stored; recomputed from rope_theta.
        return [
            (name, place)
            for held in found.values()
            for name, place in held.items()
            if not name.endswith("rotary_emb.inv_freq")
        ]

    def shapes(self) -> list[tuple[str, tuple[int, ...]]]:
        """Names and shapes of all tensors; a name is there twice if two files hold it."""
        return [(name, place.shape) for name, place in self.places]

    def read(self, name: str, index: tuple[slice, ...], dtype: np.dtype) -> np.ndarray:
        """A part of a tensor; no more than that is read."""
        return self._by_name[name].read(index, dtype)

    @cached_property
    def _by_name(self) -> dict[str, Place]:
        return dict(self.places)

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """(name, array in its stored dtype), one in memory at a time."""
        for name, place in self.places:
            yield name, place.read(tuple(map(slice, place.shape)), place.dtype)


MODEL_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
_OTHER_FORMS = ("consolidated*", "original/*")  # the same weights again, as their maker stores them


def download(repo: str, cache_dir: Path, files: Sequence[str] = MODEL_FILES) -> Path:
    """Local snapshot of `org/name[@revision]` through huggingface_hub. files: name patterns.

    Within a run the library goes on with a file where a connection broke. Files that are whole are
    kept for the next run; one that the process ended in is begun again (huggingface_hub 2 gives
    what is not whole a name of its own and removes it).
    """
    # Imported here: everything but this source works without the hub client.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HFValidationError,
        HTTPError,
    )  # the second is what its HTTP client raises

    name, _, revision = repo.partition("@")
    try:
        return Path(
            snapshot_download(
                name,
                revision=revision or None,
                allow_patterns=list(files),
                ignore_patterns=list(_OTHER_FORMS),
                cache_dir=cache_dir,
            )
        )
    except (
        HTTPError,
        HFValidationError,
        OSError,
        RuntimeError,
    ) as error:  # the last is what its other transport, hf_xet, raises
        raise UserError(
            f"target.source: hf:{repo} could not be downloaded ({error}); check the name and "
            "the network and run again, which goes on from the files that are whole; or give a "
            "local folder"
        ) from error
