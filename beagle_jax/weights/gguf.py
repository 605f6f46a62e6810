"""Reads a llama-architecture GGUF file: config, tensors under Hugging Face names, tokenizer and
chat template.

Dequantisation is the `gguf` package's. What is done here is the renaming, the un-permutation of q
and k rows (llama.cpp interleaves the rotary pairs, Hugging Face halves them), and the tokenizer.
"""

import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from beagle_jax.errors import UserError
from beagle_jax.weights.gguf_header import check_header
from beagle_jax.weights.hf import HFTokenizer
from beagle_jax.weights.safetensors_file import aligned

_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# GGUF token types (the format's own numbers).
_CONTROL, _USER_DEFINED = 3, 4
_MOST_THREADS = 8
_VALUES = 1 << 18  # dequantised at a time: the package makes several arrays of that size on the way


class GGUFFile:
    """One GGUF file, memory-mapped. Raises UserError when it is not a llama GGUF."""

    def __init__(self, path: Path):
        self.path = path
        check_header(path)
        try:
            self._reader = gguf.GGUFReader(path)
        except (OSError, ValueError, IndexError, KeyError) as error:
            raise UserError(
                f"{path}: not a readable GGUF file ({error}); download it again"
            ) from error
        architecture = self._field("general.architecture")
        if architecture != "llama":
            raise UserError(
                f"{path}: architecture is {architecture!r}; this version reads GGUF files of "
                "'llama'"
            )

    def _field(self, key: str) -> Any:
        field = self._reader.get_field(key)
        if field is None:
            raise UserError(
                f"{self.path}: GGUF metadata lacks {key!r}; use a file made by llama.cpp's "
                "converter"
            )
        try:
            return field.contents()
        except ValueError as error:  # bytes that are no UTF-8
            raise UserError(
                f"{self.path}: GGUF metadata {key!r} cannot be read ({error}); download the "
                "file again"
            ) from error

    def _list(self, key: str) -> list[Any]:
        found = self._field(key)
        if not isinstance(found, list):
            raise UserError(
                f"{self.path}: GGUF metadata {key!r} is {found!r}, expected a list; download "
                "the file again"
            )
        return found

    def _has(self, key: str) -> bool:
        return self._reader.get_field(key) is not None

    def config(self) -> dict[str, Any]:
        """The metadata as a Hugging Face Llama config."""
        if (
            self._has("llama.rope.scaling.type")
            and self._field("llama.rope.scaling.type") != "none"
        ):
            raise UserError(
                f"{self.path}: RoPE scaling {self._field('llama.rope.scaling.type')!r} is not "
                "supported"
            )
        names = {tensor.name for tensor in self._reader.tensors}
        return {
            "model_type": "llama",
            "vocab_size": len(self._list("tokenizer.ggml.tokens")),
            "hidden_size": self._field("llama.embedding_length"),
            "intermediate_size": self._field("llama.feed_forward_length"),
            "num_hidden_layers": self._field("llama.block_count"),
            "num_attention_heads": self._field("llama.attention.head_count"),
            "num_key_value_heads": self._field("llama.attention.head_count_kv"),
            "head_dim": self._field("llama.rope.dimension_count"),
            "rope_theta": self._field("llama.rope.freq_base"),
            "rms_norm_eps": self._field("llama.attention.layer_norm_rms_epsilon"),
            "max_position_embeddings": self._field("llama.context_length"),
            "tie_word_embeddings": "output.weight" not in names,
        }

    def shapes(self) -> list[tuple[str, tuple[int, ...]]]:
        """Hugging Face names and shapes [out, in]; a name without a counterpart keeps its own."""
        return [(_hf_name(tensor.name), _shape(tensor)) for tensor in self._reader.tensors]

    def read(self, name: str, index: tuple[slice, ...], dtype: np.dtype) -> np.ndarray:
        """A part of a tensor by its Hugging Face name. Only the rows that it has are dequantised,
        some at a time.
        """
        tensor = self._by_name[name]
        shape, order = _shape(tensor), self._row_order(tensor)
        # Not through the reader's map: pages that it has touched count as the process's memory for
        # as long as it lives.
        stored = (
            np.fromfile(self.path, np.uint8, tensor.n_bytes, offset=tensor.data_offset)
            .view(tensor.data.dtype)
            .reshape(tensor.data.shape)
        )
        if len(shape) == 1:
            return self._dequantised(tensor, stored).reshape(shape)[index].astype(dtype)
        order = order[index[0]]
        found = aligned((len(order), len(range(*index[1].indices(shape[1])))), dtype)
        step = max(_VALUES // shape[1], 1)

        def fill(start: int) -> None:
            rows = stored[order[start : start + step]]
            found[start : start + step] = self._dequantised(tensor, rows).reshape(
                len(rows), shape[1]
            )[:, index[1]]

        with ThreadPoolExecutor(max_workers=min(os.cpu_count() or 1, _MOST_THREADS)) as workers:
            list(workers.map(fill, range(0, len(order), step)))
        return found

    @cached_property
    def _by_name(self) -> dict[str, gguf.ReaderTensor]:
        return {_hf_name(tensor.name): tensor for tensor in self._reader.tensors}

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """(Hugging Face name, float32 array [out, in]) one at a time."""
        for name, shape in self.shapes():
            yield name, self.read(name, tuple(map(slice, shape)), np.dtype(np.float32))

    def _dequantised(self, tensor: gguf.ReaderTensor, rows: np.ndarray) -> np.ndarray:
        """Some of a tensor's rows in float32, one behind another."""
        try:
            # As one long row: the package goes through matrices by sixteen rows at a time, each
            # with a dozen calls of numpy.
            return gguf.quants.dequantize(rows.reshape(1, -1), tensor.tensor_type).astype(
                np.float32, copy=False
            )
        except NotImplementedError:
            raise UserError(
                f"{self.path}: {tensor.name} is stored as {tensor.tensor_type.name}, which the "
                "gguf package cannot decode; use a file in F32, F16, BF16, Q8_0 or Q4_K"
            ) from None

    def _row_order(self, tensor: gguf.ReaderTensor) -> np.ndarray:
        """Which of the file's rows stands where in Hugging Face's order."""
        order = np.arange(_shape(tensor)[0])
        if not tensor.name.endswith((".attn_q.weight", ".attn_k.weight")):
            return order
        count = self._field(
            "llama.attention.head_count"
            if ".attn_q." in tensor.name
            else "llama.attention.head_count_kv"
        )
        if (
            len(tensor.shape) != 2
            or type(count) is not int
            or count < 1
            or len(order) % (2 * count)
        ):
            raise UserError(
                f"{self.path}: {tensor.name} of shape {list(_shape(tensor))} does not fit "
                f"{count!r} heads; download it again"
            )
        return _unpermute_rows(order[:, None], count)[:, 0]

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that lies beside the file; without one, the file's own byte-level BPE with
        its chat template.
        """
        if (self.path.parent / "tokenizer_config.json").exists():
            return HFTokenizer(self.path.parent).tokenizer()
        model, pre = self._field("tokenizer.ggml.model"), self._field("tokenizer.ggml.pre")
        if (model, pre) != ("gpt2", "smollm"):
            raise UserError(
                f"{self.path}: tokenizer {model!r}/{pre!r} cannot be rebuilt from GGUF here "
                "(only 'gpt2'/'smollm'); put the model's tokenizer files (tokenizer.json, "
                "tokenizer_config.json, ..) beside it, or use its Hugging Face folder"
            )
        tokens = self._list("tokenizer.ggml.tokens")
        return PreTrainedTokenizerFast(
            tokenizer_object=self._bpe(tokens),
            chat_template=self._field("tokenizer.chat_template"),
            eos_token=tokens[self._token_id("eos", len(tokens))],
            bos_token=tokens[self._token_id("bos", len(tokens))],
            clean_up_tokenization_spaces=False,
        )

    def _token_id(self, name: str, count: int) -> int:
        found = self._field(f"tokenizer.ggml.{name}_token_id")
        if type(found) is not int or not 0 <= found < count:
            raise UserError(
                f"{self.path}: tokenizer.ggml.{name}_token_id is {found!r}, and there are "
                f"{count} tokens; download it again"
            )
        return found

    def _bpe(self, tokens: list[str]) -> Tokenizer:
        vocab = {token: index for index, token in enumerate(tokens)}
        merges = [tuple(merge.split(" ", 1)) for merge in self._list("tokenizer.ggml.merges")]
        unknown = [
            merge
            for merge in merges
            if len(merge) != 2 or not {*merge, "".join(merge)} <= vocab.keys()
        ]
        if unknown or len(vocab) != len(tokens):
            found = (
                f"merge {' '.join(unknown[0])!r} is not of its tokens"
                if unknown
                else "two of its tokens are the same"
            )
            raise UserError(
                f"{self.path}: the tokenizer is damaged ({found}); download the file again"
            )
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
        # Each digit stands alone; transformers' own GGUF route drops this step and splits "\n\n1."
        # differently.
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        tokenizer.decoder = decoders.ByteLevel()
        for token, kind in zip(tokens, self._list("tokenizer.ggml.token_type"), strict=True):
            if kind == _CONTROL:
                tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
            elif kind == _USER_DEFINED:
                tokenizer.add_tokens([AddedToken(token, normalized=False)])
        return tokenizer

    def eos_ids(self) -> tuple[int, ...]:
        """Ids of the tokens that end an answer."""
        return (self._token_id("eos", len(self._list("tokenizer.ggml.tokens"))),)


def _shape(tensor: gguf.ReaderTensor) -> tuple[int, ...]:
    """GGUF lists dimensions fastest first."""
    return tuple(int(size) for size in reversed(tensor.shape))


def _hf_name(name: str) -> str:
    if name in _TOP_NAMES:
        return _TOP_NAMES[name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if match and match.group(2) in _LAYER_NAMES:
        return f"model.layers.{match.group(1)}.{_LAYER_NAMES[match.group(2)]}.weight"
    return name


def _unpermute_rows(weight: np.ndarray, heads: int) -> np.ndarray:
    """Interleaved rotary pairs (0 1)(2 3).. per head -> half-split (0 h/2)(1 h/2+1).. as Hugging
    Face stores them.
    """
    rows, width = weight.shape
    return np.ascontiguousarray(
        weight.reshape(heads, rows // heads // 2, 2, width).swapaxes(1, 2).reshape(rows, width)
    )
