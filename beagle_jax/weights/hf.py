"""Reads a Hugging Face model folder, local or from the hub.

The folder holds config.json, safetensors and tokenizer files.
"""

import logging
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from beagle_jax.errors import BadFile, UserError
from beagle_jax.json_file import read_json
from beagle_jax.model.config_values import fp8_block
from beagle_jax.model.wrapped import is_wrapper, text_config, text_name
from beagle_jax.weights.block_scales import ScaledPlace, with_scales
from beagle_jax.weights.model_files import (
    INDEX,
    OTHER_FORMS,
    adapter_beside,
    check_index,
    is_whole,
    model_files,
    of_the_model,
    weights_in,
)
from beagle_jax.weights.safetensors_file import Place, places

_log = logging.getLogger(__name__)

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_ROWS = 4096  # rows compared at a time


class HFTokenizer:
    """The files of a model folder other than weights.

    These are config.json, the tokenizer files and generation_config.json.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def config(self) -> dict[str, Any]:
        """Returns the contents of config.json."""
        return read_json(self.path / "config.json", "a Hugging Face model folder holds it")

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Loads the folder's tokenizer."""
        if (self.path / "tokenizer.model").exists() and not (self.path / "tokenizer.json").exists():
            _check_sentencepiece(self.path / "tokenizer.model")
        from huggingface_hub.errors import StrictDataclassError
        from transformers import (
            AutoTokenizer,
        )  # imported late, because it imports torch if that is installed, which takes two seconds

        try:
            return AutoTokenizer.from_pretrained(str(self.path))
        except StrictDataclassError as error:  # raised for config.json, which is read as well
            raise UserError(
                f"{self.path / 'config.json'}: transformers cannot read it "
                f"({' '.join(str(error).split())}); correct that value in the file"
            ) from error
        except Exception as error:
            # tokenizers raises bare Exceptions. The last types of the tuple are raised for valid
            # JSON that is not a tokenizer or config.
            if type(error) is not Exception and not isinstance(
                error,
                OSError | ValueError | LookupError | TypeError | AttributeError | ArithmeticError,
            ):
                raise
            raise UserError(f"{self.path}: no usable tokenizer in this folder ({error})") from error

    def eos_ids(self) -> tuple[int, ...]:
        """Returns ids of the tokens that end an answer.

        They come from generation_config.json if it names any, else from config.json. (A GGUF file
        adds those of generation_config.json to its own: `GGUFFile.eos_ids` in gguf.py.) If neither
        names one, the tokenizer's end token ends an answer.
        """
        ids = generation_eos_ids(self.path)
        if ids is None:
            ids = _eos_ids(self.config(), self.path)
        if ids is None:
            ids = self._tokenizer_end()
        if ids is None:
            raise UserError(
                f"{self.path}: neither generation_config.json nor config.json names eos_token_id, "
                "and tokenizer_config.json names no eos_token, so that no token ends an answer; "
                "write eos_token_id to generation_config.json"
            )
        return ids

    def _tokenizer_end(self) -> tuple[int, ...] | None:
        """Returns the tokenizer's end token; None if it has none, or there is no tokenizer."""
        try:
            token = self.tokenizer().eos_token_id
        except UserError:
            return None
        return None if token is None else (token,)


def generation_eos_ids(folder: Path) -> tuple[int, ...] | None:
    """Returns the end tokens of a folder's generation_config.json.

    Returns None if there is no such file, or it names none.
    """
    path = folder / "generation_config.json"
    return _eos_ids(read_json(path, ""), folder) if path.exists() else None


def _eos_ids(config: dict[str, Any], folder: Path) -> tuple[int, ...] | None:
    value = config.get("eos_token_id")
    if value is None:
        return None
    ids = value if isinstance(value, list) else [value]
    if not ids or not all(type(token) is int and 0 <= token < 2**31 for token in ids):
        raise UserError(
            f"{folder}: eos_token_id is {ids}; expected a token's id, or a list of them"
        )
    return tuple(ids)


def _check_sentencepiece(path: Path) -> None:
    """Checks that a file can be read as a SentencePiece model.

    For a damaged one, transformers would ask for another library instead.

    Raises:
      UserError: sentencepiece is not installed, or it cannot read the file.
    """
    remedy = "or use a folder that also has tokenizer.json"
    try:
        import sentencepiece
    except ImportError:
        raise UserError(
            f"{path}: reading it needs the sentencepiece package, which is not installed: pip "
            f"install sentencepiece; {remedy}"
        ) from None
    try:
        sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise BadFile(
            path,
            f"cannot be read as a SentencePiece model ({error}); is the file whole? "
            f"Copy or download it again, {remedy}",
        ) from error


class HFFolder(HFTokenizer):
    """A local folder in the format of `save_pretrained`.

    Of a multimodal model it shows the text model alone (`model/wrapped.py`). Only safetensors are
    read, because pickles can run code.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._files = model_files(path)
        others = [file.name for file in of_the_model(weights_in(path, (".safetensors",)))]
        if is_whole(path) and len(others) > 1:
            _log.warning(
                "%s: model.safetensors is read; the parts beside it (%d files) are not",
                path,
                len(others) - 1,
            )
        if name := adapter_beside(path):
            _log.warning(
                "%s: the adapter %s is beside the model and is not applied; merge it into the "
                "model first to decode with it",
                path,
                name,
            )

    def config(self) -> dict[str, Any]:
        """Returns config.json, with the head untied if the files hold a separate head."""
        config = dict(text_config(super().config()))
        if config.get("tie_word_embeddings") is not False and self._has_own_head:
            config["tie_word_embeddings"] = False
        return config

    @cached_property
    def _has_own_head(self) -> bool:
        """Returns whether lm_head.weight exists and differs from the embedding.

        Transformers then computes with it, whatever tie_word_embeddings says.
        """
        head, embedding = (self._by_name.get(name) for name in (_HEAD, _EMBEDDING))
        if head is None or embedding is None:
            return False
        if head.shape != embedding.shape:
            return True

        def rows(place: Place | ScaledPlace, start: int) -> np.ndarray:
            return place.read((slice(start, start + _ROWS), slice(None)), np.dtype(np.float32))

        return not all(
            np.array_equal(rows(head, start), rows(embedding, start))
            for start in range(0, head.shape[0], _ROWS)
        )

    @cached_property
    def places(self) -> list[tuple[str, Place | ScaledPlace]]:
        """Returns the place of every tensor, file by file.

        Raises:
          UserError: a file is broken, a dtype is not one of weights, or the index and the files
            disagree. The message names the file.
        """
        places_by_file = {file.name: places(file) for file in self._files}
        if (self.path / INDEX).exists() and not is_whole(self.path):
            check_index(self.path / INDEX, places_by_file)
        stored = [(name, place) for held in places_by_file.values() for name, place in held.items()]
        config = super().config() if (self.path / "config.json").exists() else {}
        if is_wrapper(config):
            named = [(text_name(name), place) for name, place in stored]
            stored = [(name, place) for name, place in named if name is not None]
        return with_scales(stored, fp8_block(config))

    def shapes(self) -> list[tuple[str, tuple[int, ...]]]:
        """Lists names and shapes of all tensors; a name in two files appears twice."""
        return [(name, place.shape) for name, place in self.places]

    def read(self, name: str, index: tuple[slice, ...], dtype: np.dtype) -> np.ndarray:
        """Reads a part of a tensor, without reading the rest of it."""
        return self._by_name[name].read(index, dtype)

    @cached_property
    def _by_name(self) -> dict[str, Place | ScaledPlace]:
        return dict(self.places)

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yields (name, array in its stored dtype), with one array in memory at a time."""
        for name, place in self.places:
            yield name, place.read(tuple(map(slice, place.shape)), place.dtype)


MODEL_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")


def download(
    repo: str,
    cache_dir: Path,
    files: Sequence[str] = MODEL_FILES,
    setting: str = "target.source",
) -> Path:
    """Downloads `org/name[@revision]` with huggingface_hub and returns the local snapshot.

    Within a run, the library resumes a file after a lost connection. The next run reuses complete
    files and restarts incomplete ones (huggingface_hub 2 writes an incomplete file under a name of
    its own and removes it). Without a connection, or with HF_HUB_OFFLINE, a snapshot in the
    library's own cache (HF_HUB_CACHE, HF_HOME) is used.

    files: patterns of the file names to download. setting: what named the repository, for errors.

    Raises:
      UserError: the download failed and the cache has no snapshot.
    """
    # Imported late: every other source works without the hub client.
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        HFValidationError,
        HTTPError,
    )  # HTTPError comes from its HTTP client

    name, _, revision = repo.partition("@")
    # RuntimeError comes from hf_xet, its other transport.
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
                f"{setting}: hf:{repo} could not be downloaded ({error}); check the name and "
                "the network, then run again (complete files are not downloaded again); or give a "
                "local folder"
            ) from error
    _log.warning("hf:%s is read from the hub's cache, %s", repo, snapshot)
    return snapshot
