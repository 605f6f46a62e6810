"""GGUF files: exact tensors, known encodings, and broken files."""

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from gguf_files import HEADS, header_by_package, llama_tensors, write_llama
from weight_cases import LLAMA, Held

from beagle_jax.errors import UserError
from beagle_jax.model.target import TargetSpec
from beagle_jax.weights import gguf as gguf_module
from beagle_jax.weights.gguf import GGUFFile
from beagle_jax.weights.gguf_header import read_header
from beagle_jax.weights.hf import HFFolder
from beagle_jax.weights.target import (
    fill_params,
    load_target,
)


def _compare_gguf(folder, kind) -> None:
    tensors = llama_tensors()
    write_llama(folder / "tiny.gguf", tensors, kind=kind)
    read_back = dict(GGUFFile(folder / "tiny.gguf").tensors())
    assert read_back.keys() == tensors.keys()
    for name, array in tensors.items():
        # Quantisation is per row, so it commutes with the permutation of rows.
        expected = (
            array
            if array.ndim == 1
            else gguf.quants.dequantize(gguf.quants.quantize(array, kind), kind)
        )
        np.testing.assert_array_equal(read_back[name], expected, err_msg=name)


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_1"])
def test_gguf_tensors_are_exact(tmp_path, kind):
    _compare_gguf(tmp_path, gguf.GGMLQuantizationType[kind])


def test_a_header_is_what_the_package_reads(tmp_path):
    path = tmp_path / "tiny.gguf"
    write_llama(path, llama_tensors(), kind=gguf.GGMLQuantizationType.Q8_0)
    whole = path.read_bytes()
    header, expected = read_header(path), header_by_package(path)
    assert header == expected
    assert {type(value) for value in header.values.values()} >= {int, float, str, list}
    key = b"llama.block_count"
    at = whole.index(key) + len(key) + 4
    path.write_bytes(whole[:at] + bytes([whole[at] + 1]) + whole[at + 1 :])
    assert read_header(path) != expected  # planted bug: another value


def test_gguf_tensors_are_dequantised_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_module, "_VALUES", 5 * 64)  # of five rows, which divide no tensor
    _compare_gguf(tmp_path, gguf.GGMLQuantizationType.Q8_0)


def test_planted_bug_rows_left_permuted(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_module, "_unpermute_rows", lambda weight, heads: weight)
    with pytest.raises(AssertionError):
        _compare_gguf(tmp_path, gguf.GGMLQuantizationType.F32)


def _write_gguf(path, tensors, kind=None) -> None:
    """Writes a GGUF file of loose tensors under the file's own names, for `tensors()` alone."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    for name, array in tensors.items():
        writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_biases_and_own_head_are_named(tmp_path):
    tensors = {
        "output.weight": np.ones((12, 64), np.float32),
        "blk.1.attn_q.bias": np.arange(64, dtype=np.float32),
    }
    _write_gguf(tmp_path / "biased.gguf", tensors)
    stored = dict(GGUFFile(tmp_path / "biased.gguf").tensors())
    np.testing.assert_array_equal(stored["lm_head.weight"], tensors["output.weight"])
    np.testing.assert_array_equal(stored["blk.1.attn_q.bias"], tensors["blk.1.attn_q.bias"])
    with pytest.raises(UserError, match=r"extra tensor blk.1.attn_q.bias \[64\]"):
        fill_params(
            TargetSpec.from_hf_config(LLAMA, "test"),
            Held(stored.items()),
            jnp.dtype("float32"),
            "here",
        )


def test_gguf_encoding_without_decoder(tmp_path):
    _write_gguf(tmp_path / "int8.gguf", {"output_norm.weight": np.zeros(64, np.int8)})
    with pytest.raises(
        UserError, match=r"output_norm.weight is stored as I8, which the gguf package cannot decode"
    ):
        list(GGUFFile(tmp_path / "int8.gguf").tensors())


def test_gguf_target_loads_whole(tmp_path):
    write_llama(tmp_path / "tiny.gguf", llama_tensors())
    target = load_target(str(tmp_path / "tiny.gguf"), "bfloat16", "unused")
    assert (target.spec.num_heads, target.spec.head_dim, target.spec.tie_embeddings) == (
        HEADS,
        16,
        True,
    )
    assert (target.eos_ids, target.dtype) == ((2,), jnp.bfloat16)
    assert target.tokenizer.encode("ab\n\n1 2", add_special_tokens=False) == [5, 10, 8, 6, 9]
    text = target.tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False)
    assert text == "<|im_start|>ab<|im_end|>"


def test_broken_gguf_files(tmp_path):
    (tmp_path / "broken.gguf").write_bytes(b"GGUF but not really")
    with pytest.raises(UserError, match=r"broken.gguf: not a readable GGUF file"):
        GGUFFile(tmp_path / "broken.gguf")
    write_llama(tmp_path / "other.gguf", llama_tensors(), architecture="falcon")
    with pytest.raises(UserError, match="architecture is 'falcon'"):
        GGUFFile(tmp_path / "other.gguf")
    write_llama(tmp_path / "pre.gguf", llama_tensors(), pre="deepseek-llm")
    with pytest.raises(UserError, match="tokenizer 'gpt2'/'deepseek-llm' cannot be built"):
        GGUFFile(tmp_path / "pre.gguf").tokenizer()


def test_a_tokenizer_beside_a_gguf_file_is_taken(tmp_path):
    """GGUF names a way to split text but does not define it.

    An unknown one is read from the model's own files.
    """
    write_llama(tmp_path / "tiny.gguf", llama_tensors())
    expected = load_target(str(tmp_path / "tiny.gguf"), "float32", "unused")
    (tmp_path / "other").mkdir()
    write_llama(tmp_path / "other" / "pre.gguf", llama_tensors(), pre="deepseek-llm")
    with pytest.raises(
        UserError,
        match=r"put the model's tokenizer files .* beside it, or use its Hugging Face folder",
    ):
        load_target(str(tmp_path / "other" / "pre.gguf"), "float32", "unused")
    expected.tokenizer.save_pretrained(tmp_path / "other")
    target = load_target(str(tmp_path / "other" / "pre.gguf"), "float32", "unused")
    assert (
        target.tokenizer.encode("ab\n\n1 2") == expected.tokenizer.encode("ab\n\n1 2")
        and target.eos_ids == expected.eos_ids
    )
    assert target.tokenizer.chat_template == expected.tokenizer.chat_template


def test_a_header_that_names_a_tensor_twice(tmp_path):
    entry = '"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
    header = f"{{{entry},{entry}}}".encode()
    (tmp_path / "model.safetensors").write_bytes(
        len(header).to_bytes(8, "little") + header + bytes(8)
    )
    with pytest.raises(UserError, match=r"model.safetensors: the header names x twice"):
        list(HFFolder(tmp_path).tensors())
