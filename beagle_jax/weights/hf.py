"""Reads a Hugging Face model folder (config.json, safetensors, tokenizer files), local or from the
hub.
"""

import sys
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from beagle_jax.errors import UserError
from beagle_jax.json_file import read_json
from beagle_jax.weights.model_files import (
    INDEX,
    OTHER_FORMS,
    adapter_beside,
    check_index,
    model_files,
)
from beagle_jax.weights.safetensors_file import Place, places

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_ROWS = 4096  # compared at a time


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
        from huggingface_hub.errors import StrictDataclassError
        from transformers import (
            AutoTokenizer,
        )  # here, since it imports torch where that is installed: two seconds

        try:
            return AutoTokenizer.from_pretrained(str(self.path))
        except StrictDataclassError as error:  # config.json, which is read on the way
            raise UserError(
                f"{self.path / 'config.json'}: transformers cannot read it "
                f"({' '.join(str(error).split())}); correct that value in the file"
            ) from error
        except Exception as error:
            # tokenizers raises bare Exceptions; the last ones of the others stand for valid JSON
            # that is no tokenizer, or no config.
            if type(error) is not Exception and not isinstance(
                error,
                OSError | ValueError | LookupError | TypeError | AttributeError | ArithmeticError,
            ):
                raise
            raise UserError(f"{self.path}: no usable tokenizer in this folder ({error})") from error

    def eos_ids(self) -> tuple[int, ...]:
        """Ids that end an answer: generation_config.json if there is one, else config.json."""
        ids = generation_eos_ids(self.path)
        if ids is None:
            ids = _eos_ids(self.config(), self.path)
        if ids is None:
            raise UserError(
                f"{self.path}: neither generation_config.json nor config.json names eos_token_id"
            )
        return ids


def generation_eos_ids(folder: Path) -> tuple[int, ...] | None:
    """Ids that a folder's generation_config.json says end an answer; None when it says nothing, or
    is not there.
    """
    path = folder / "generation_config.json"
    return _eos_ids(read_json(path, ""), folder) if path.exists() else None


def _eos_ids(config: dict[str, Any], folder: Path) -> tuple[int, ...] | None:
    told = config.get("eos_token_id")
    if told is None:
        return None
    ids = told if isinstance(told, list) else [told]
    if not ids or not all(type(token) is int and token >= 0 for token in ids):
        raise UserError(
            f"{folder}: eos_token_id is {ids}; expected a token's id, or a list of them"
        )
    return tuple(ids)


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


class HFFolder(HFTokenizer):
    """A local folder as `save_pretrained` writes it. Only safetensors are read: pickles can run
    code.
    """

    def __init__(self, path: Path):
        super().__init__(path)
        self._files = model_files(path)
        if name := adapter_beside(path):
            print(
                f"{path}: {name} lies beside the model and is not applied; merge the adapter "
                "first to decode with it",
                file=sys.stderr,
            )

    def config(self) -> dict[str, Any]:
        """The contents of config.json, untied where the files hold a head of their own."""
        config = super().config()
        if config.get("tie_word_embeddings") is not False and self._has_own_head:
            config["tie_word_embeddings"] = False
        return config

    @cached_property
    def _has_own_head(self) -> bool:
        """Whether there is an lm_head.weight of other values than the embedding. Transformers
        computes with it, whatever tie_word_embeddings says.
        """
        head, embedding = (self._by_name.get(name) for name in (_HEAD, _EMBEDDING))
        if head is None or embedding is None:
            return False
        if head.shape != embedding.shape:
            return True
        return not all(
            np.array_equal(
                *(
                    place.read((slice(start, start + _ROWS), slice(None)), np.dtype(np.float32))
                    for place in (head, embedding)
                )
            )
            for start in range(0, head.shape[0], _ROWS)
        )

    @cached_property
    def places(self) -> list[tuple[str, Place]]:
        """Every tensor and where it lies, file by file.

        Raises UserError naming a broken file, a dtype that is no weight's, and what the index of
        the files says otherwise.
        """
        found = {file.name: places(file) for file in self._files}
        if (self.path / INDEX).exists():
            check_index(self.path / INDEX, found)
        return [(name, place) for held in found.values() for name, place in held.items()]

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


def download(repo: str, cache_dir: Path, files: Sequence[str] = MODEL_FILES) -> Path:
    """Local snapshot of `org/name[@revision]` through huggingface_hub. files: name patterns.

    Within a run the library goes on with a file where a connection broke. Files that are whole are
    kept for the next run; one that the process ended in is begun again (huggingface_hub 2 gives
    what is not whole a name of its own and removes it). Without a connection (or with
    HF_HUB_OFFLINE) a snapshot in the library's own cache (HF_HUB_CACHE, HF_HOME) is used.
    """
    # Imported here: everything but this source works without the hub client.
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        HFValidationError,
        HTTPError,
    )  # the second is what its HTTP client raises

    name, _, revision = repo.partition("@")
    # RuntimeError is what its other transport, hf_xet, raises.
    failures = (HTTPError, HFValidationError, OSError, RuntimeError)
    fetch = partial(
        snapshot_download,
        name,
        revision=revision or None,
        allow_patterns=list(files),
        ignore_patterns=list(OTHER_FORMS),
    )
    try:
        return Path(fetch(cache_dir=cache_dir))
    except failures as error:
        try:
            snapshot = Path(fetch(cache_dir=constants.HF_HUB_CACHE, local_files_only=True))
        except failures:
            raise UserError(
                f"target.source: hf:{repo} could not be downloaded ({error}); check the name and "
                "the network and run again, which goes on from the files that are whole; or give "
                "a local folder"
            ) from error
    print(f"hf:{repo} is read from the hub's cache, {snapshot}", file=sys.stderr)
    return snapshot
