"""Small GGUF files for the loader tests: a llama with a toy byte-level tokenizer."""

from pathlib import Path

import gguf
import numpy as np

from beagle_jax.weights.gguf_header import Header, Tensor

HIDDEN, INTER, LAYERS, HEADS, KV_HEADS, VOCAB = 64, 96, 2, 4, 2, 12
TOKENS = ["<|end|>", "<|im_start|>", "<|im_end|>", "a", "b", "ab", "Ġ", "Ċ", "1", "2", "ĊĊ", "c"]
MERGES = ["a b", "Ċ Ċ"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"


def llama_tensors(seed: int = 0) -> dict[str, np.ndarray]:
    """Random float32 weights under Hugging Face names."""
    rng = np.random.default_rng(seed)
    H = HIDDEN // HEADS
    per_layer = {
        "input_layernorm": (HIDDEN,),
        "post_attention_layernorm": (HIDDEN,),
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (KV_HEADS * H, HIDDEN),
        "self_attn.v_proj": (KV_HEADS * H, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (INTER, HIDDEN),
        "mlp.up_proj": (INTER, HIDDEN),
        "mlp.down_proj": (HIDDEN, INTER),
    }
    shapes = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for layer in range(LAYERS):
        shapes |= {
            f"model.layers.{layer}.{name}.weight": shape for name, shape in per_layer.items()
        }
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def _gguf_name(name: str) -> str:
    top = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
    }
    if name in top:
        return top[name]
    _, _, layer, *rest, _ = name.split(".")
    short = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "q_proj": "attn_q",
        "k_proj": "attn_k",
        "v_proj": "attn_v",
        "o_proj": "attn_output",
        "gate_proj": "ffn_gate",
        "up_proj": "ffn_up",
        "down_proj": "ffn_down",
    }
    return f"blk.{layer}.{short[rest[-1]]}.weight"


def _interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """Puts q and k rows in llama.cpp's order: each rotary pair side by side."""
    rows, width = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, width).swapaxes(1, 2).reshape(rows, width)


def write_llama(
    path: Path,
    tensors: dict[str, np.ndarray],
    *,
    kind=gguf.GGMLQuantizationType.F32,
    architecture="llama",
    pre="smollm",
):
    """Writes the file as llama.cpp's converter would: permuted q and k, matrices in `kind`, vectors
    in float32.
    """
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INTER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_merges(MERGES)
    writer.add_token_types([3, 3, 3] + [1] * (len(TOKENS) - 3))
    writer.add_eos_token_id(2)
    writer.add_bos_token_id(1)
    writer.add_chat_template(TEMPLATE)
    for name, array in tensors.items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            array = _interleave(array, HEADS if "q_proj" in name else KV_HEADS)
        stored = array if array.ndim == 1 else gguf.quants.quantize(array, kind)
        writer.add_tensor(_gguf_name(name), stored, raw_dtype=None if array.ndim == 1 else kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# Any model of transformers, as llama.cpp's converter lays it out


def write_model(path: Path, architecture: str, model, metadata=(), leave_out=(), extra=(), **split):
    """Writes a model of transformers. Names are those of the gguf package's own table.

    metadata: more keys, {key without architecture: value}, that replace the usual ones. leave_out:
    keys, and names of tensors, that the file lacks. extra: more tensors. split: of GGUFWriter.
    """
    config = model.config
    keys = _keys(architecture, config) | dict(metadata)
    writer = gguf.GGUFWriter(path, architecture, **split)
    for key, value in keys.items():
        if key not in leave_out:
            _add(writer, key if key.startswith(_GLOBAL) else f"{architecture}.{key}", value)
    for name, array in (_converted(architecture, model) | dict(extra)).items():
        if name not in leave_out:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


_GLOBAL = ("tokenizer.", "general.", "split.")


def _keys(architecture: str, config) -> dict:
    """Returns the metadata that the converter writes for each of these architectures."""
    rope = config.rope_parameters
    full = rope.get("full_attention", rope)
    keys = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": float(full["rope_theta"]),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": [chr(ord("!") + i) for i in range(config.vocab_size)],
        "tokenizer.ggml.token_type": [1] * config.vocab_size,
        "tokenizer.ggml.merges": [],
        "tokenizer.ggml.eos_token_id": 1,
    }
    if getattr(config, "head_dim", None):
        keys |= {"attention.key_length": config.head_dim, "attention.value_length": config.head_dim}
    if full.get("rope_type") == "linear":
        keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(full["factor"])}
    if architecture == "llama":
        keys["rope.dimension_count"] = keys.get(
            "attention.key_length", config.hidden_size // config.num_attention_heads
        )
    if architecture == "gemma2":
        keys["attn_logit_softcapping"] = config.attn_logit_softcapping
        keys["final_logit_softcapping"] = config.final_logit_softcapping
    if architecture in ("gemma2", "gemma3"):
        keys["attention.sliding_window"] = config.sliding_window
    return keys


def _add(writer: gguf.GGUFWriter, key: str, value) -> None:
    if isinstance(value, list):
        if value:  # the package writes no empty array
            writer.add_array(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_uint32(key, value)


def _converted(architecture: str, model) -> dict[str, np.ndarray]:
    """Returns the tensors by GGUF name, with values as the converter changes them."""
    config, tensors = model.config, {}
    arch = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = tensor.numpy().astype(np.float32)
        part = name.rpartition(".")[0]
        if architecture == "llama" and part.endswith((".q_proj", ".k_proj")):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            array = _interleave(array.reshape(len(array), -1), heads).reshape(array.shape)
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            array = array + 1
        tensors[names.get_name(name, (".weight", ".bias"))] = np.ascontiguousarray(array)
    return tensors


def header_by_package(path) -> Header:
    """Reads a header with the gguf package, which believes what it says."""
    reader = gguf.GGUFReader(path)
    return Header(
        {
            key: field.contents()
            for key, field in reader.fields.items()
            if not key.startswith("GGUF.")
        },
        [
            Tensor(
                tensor.name,
                tuple(map(int, tensor.shape)),
                tensor.tensor_type,
                int(tensor.data_offset),
                int(tensor.n_bytes),
            )
            for tensor in reader.tensors
        ],
    )
