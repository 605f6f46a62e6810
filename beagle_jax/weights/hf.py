"""Reads a Hugging Face model folder (config.json, safetensors, tokenizer files), local or from the hub."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from beagle_jax.errors import UserError
from beagle_jax.weights.json_file import read_json
from beagle_jax.weights.safetensors_file import Place, places


class HFTokenizer:
    """The part of a model folder that is not weights: config.json, tokenizer files, generation_config.json."""

    def __init__(self, path: Path):
        self.path = path

    def config(self) -> dict[str, Any]:
        """The contents of config.json."""
        return read_json(self.path / "config.json", "a Hugging Face model folder holds it")

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The folder's tokenizer."""
        try:
            return AutoTokenizer.from_pretrained(str(self.path))
        except Exception as error:
            # tokenizers raises bare Exceptions; the last two of the others stand for valid JSON that is no tokenizer.
            if type(error) is not Exception and not isinstance(error, OSError | ValueError | KeyError | TypeError):
                raise
            raise UserError(f"{self.path}: no usable tokenizer in this folder ({error})") from error

    def eos_ids(self) -> tuple[int, ...]:
        """Ids that end an answer: generation_config.json if there is one, else config.json."""
        generation = self.path / "generation_config.json"
        found = read_json(generation, "").get("eos_token_id") if generation.exists() else None
        found = self.config().get("eos_token_id") if found is None else found
        if found is None:
            raise UserError(f"{self.path}: neither generation_config.json nor config.json names eos_token_id")
        found = found if isinstance(found, list) else [found]
        if not all(type(token) is int and token >= 0 for token in found):
            raise UserError(f"{self.path}: eos_token_id is {found}; expected a token's id, or a list of them")
        return tuple(found)


class HFFolder(HFTokenizer):
    """A local folder as `save_pretrained` writes it. Only safetensors are read: pickles can run code."""

    def __init__(self, path: Path):
        super().__init__(path)
        self._files = sorted(path.glob("*.safetensors"))
        if not self._files:
            raise UserError(f"{path}: no *.safetensors file in this folder; convert the checkpoint to safetensors first")

    @cached_property
    def places(self) -> list[tuple[str, Place]]:
        """Every tensor and where it lies, file by file. Raises UserError naming a broken file and a dtype that is no weight's."""
        found = [(name, place) for file in self._files for name, place in places(file).items()]
        # A table that old checkpoints stored; recomputed from rope_theta.
        return [(name, place) for name, place in found if not name.endswith("rotary_emb.inv_freq")]

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
    """Local snapshot of `org/name[@revision]` through huggingface_hub, which resumes broken downloads. files: name patterns."""
    # Imported here: everything but this source works without the hub client.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    name, _, revision = repo.partition("@")
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=list(files), cache_dir=cache_dir))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(f"target.source: hf:{repo} could not be downloaded ({error}); check the name and the network, "
                        "or give a local folder") from error
