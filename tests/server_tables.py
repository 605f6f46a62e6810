"""What the loaders of other servers ask for in a folder with an EAGLE draft.

Read off their sources, at the versions that VERSIONS names. vLLM 0.32.0 has loaded exports of both
kinds (benchmarks/vllm_cpu.py, test_vllm_served.py), and speculators 0.9.0 of EAGLE-3; SafeAILab's
and SGLang's loaders were not run. d and D are the widths of draft and target, V and v their
vocabularies, Q and K the widths of all query and of all key/value heads, F the MLP's, H a head's, n
the number of streams that the draft reads.
"""

from typing import NamedTuple

VERSIONS = {
    "safeailab": "SafeAILab/EAGLE cb7e084 (eagle/model/cnets1.py, cnets.py, configs.py)",
    "sglang": "SGLang 0.5.23 (models/llama_eagle.py, qwen2_eagle.py, llama_eagle3.py)",
    "vllm": "vLLM 0.33.0 (models/llama_eagle.py, llama_eagle3.py, config/speculative.py)",
    "speculators": "vllm-project/speculators c05b95b (models/eagle3)",
}


class Loader(NamedTuple):
    """Names with shapes, and config keys with a value or a type."""

    needs: dict[str, str]  # tensors without which weights stay random
    may: dict[str, str]  # tensors that are loaded where the config asks for them
    config: dict[str, object]  # keys that decide; a type, or the value that must stand there
    never: tuple[str, ...] = ()  # keys that would change what is computed


def _layer(prefix: str, inputs: str) -> dict[str, str]:
    projections = {"q_proj": f"Q {inputs}", "k_proj": f"K {inputs}", "v_proj": f"K {inputs}"}
    return {
        **{f"{prefix}self_attn.{name}.weight": shape for name, shape in projections.items()},
        f"{prefix}self_attn.o_proj.weight": "d Q",
        f"{prefix}mlp.gate_proj.weight": "F d",
        f"{prefix}mlp.up_proj.weight": "F d",
        f"{prefix}mlp.down_proj.weight": "d F",
        f"{prefix}post_attention_layernorm.weight": "d",
    }


def _biases(prefix: str, names: str = "qkv") -> dict[str, str]:
    widths = {"q": "Q", "k": "K", "v": "K", "o": "d"}
    return {f"{prefix}self_attn.{name}_proj.bias": widths[name] for name in names}


_SIZES = {
    "hidden_size": int,
    "intermediate_size": int,
    "num_attention_heads": int,
    "num_key_value_heads": int,
    "vocab_size": int,
    "rms_norm_eps": float,
    "rope_theta": float,
    "max_position_embeddings": int,
    "hidden_act": "silu",
    "num_hidden_layers": 1,
}
_FC, _EMBED = {"fc.weight": "d 2d"}, {"embed_tokens.weight": "V d"}
EAGLE = {
    # the config says whether fc has a bias, and whether queries, keys and values have
    "safeailab": Loader(
        _FC | _layer("layers.0.", "d"),
        {"fc.bias": "d"} | _biases("layers.0.") | _EMBED,
        _SIZES | {"bias": bool, "qkv_bias": bool},
    ),
    # fc always has a bias; `bias` is the attention's
    "sglang": Loader(
        _FC | {"fc.bias": "d"} | _layer("layers.0.", "d"),
        _biases("layers.0.") | _EMBED,
        _SIZES | {"head_dim": int, "architectures": list},
        ("bias", "attention_bias", "hot_vocab_size"),
    ),
    # fc has none, and a file's is dropped; other unknown names are errors
    "vllm": Loader(
        _FC | _layer("layers.0.", "d"),
        _biases("layers.0.") | _EMBED,
        _SIZES | {"head_dim": int, "architectures": ["LlamaForCausalLM"]},
        ("bias", "attention_bias", "logit_scale"),
    ),
}


def _eagle3(prefix: str) -> dict[str, str]:
    norms = {f"{prefix}hidden_norm.weight": "d", f"{prefix}input_layernorm.weight": "d"}
    return {"fc.weight": "d nD", **_layer(prefix, "2d"), **norms, "norm.weight": "d"}


_MAPS, _HEAD = {"d2t": "v", "t2d": "V"}, {"lm_head.weight": "v d"}
_NORMS = {"input_norm.weight": "nD", **{f"fc_norm.{at}.weight": "D" for at in range(4)}}
EAGLE3 = {
    "safeailab": Loader(
        _eagle3("midlayer.") | _HEAD, _MAPS | _EMBED, _SIZES | {"draft_vocab_size": int}
    ),
    "sglang": Loader(
        _eagle3("midlayer."),
        _HEAD | _MAPS | _EMBED | _NORMS | _biases("midlayer.", "qkvo"),
        _SIZES
        | {
            "head_dim": int,
            "architectures": ["LlamaForCausalLMEagle3"],
            "num_aux_hidden_states": int,
            "eagle_config": dict,
        },
        ("bias", "eagle_aux_hidden_state_layer_ids"),
    ),
    "vllm": Loader(
        _eagle3("layers.0."),
        _HEAD | _MAPS | _EMBED | _NORMS | _biases("layers.0.", "qkvo"),
        _SIZES
        | {
            "head_dim": int,
            "architectures": ["LlamaForCausalLMEagle3"],
            "draft_vocab_size": int,
            "num_aux_hidden_states": int,
            "eagle_aux_hidden_state_layer_ids": list,
            "norm_before_residual": bool,
        },
        ("bias", "eagle_config"),
    ),
    "speculators": Loader(
        _eagle3("layers.0.") | _HEAD,
        _MAPS
        | _EMBED
        | _NORMS
        | _biases("layers.0.", "qkvo")
        | {f"layers.0.self_attn.{name}_norm.weight": "H" for name in "qk"},
        {
            "speculators_model_type": "eagle3",
            "draft_vocab_size": int,
            "norm_before_residual": bool,
            "norm_before_fc": bool,
            "norm_output": bool,
            "fc_norm": bool,
            "eagle_aux_hidden_state_layer_ids": list,
            "transformer_layer_config": dict,
            "speculators_config": dict,
        },
    ),
}


def misfits(loader: Loader, config: dict, shapes: dict[str, tuple], sizes: dict[str, int]) -> list:
    """Lists what a folder lacks, has too much, or has in another shape or value."""
    known = loader.needs | loader.may
    wrong = [f"lacks {name}" for name in loader.needs.keys() - shapes.keys()]
    wrong += [f"unknown {name}" for name in shapes.keys() - known.keys()]
    for name in shapes.keys() & known.keys():
        expected = tuple(_size(word, sizes) for word in known[name].split())
        wrong += [f"{name}: {shapes[name]}, not {expected}"] if shapes[name] != expected else []
    # vLLM takes 1e-06 for a float; JSON writes 1 as an int
    for key, value in loader.config.items():
        given = config.get(key)
        fits = type(given) is value if isinstance(value, type) else given == value
        wrong += [] if fits else [f"{key}: {given!r}"]
    return sorted(wrong + [f"has {key}" for key in loader.never if key in config])


def _size(word: str, sizes: dict[str, int]) -> int:
    """Returns the number of "2d" or "nD"."""
    if len(word) == 1:
        return sizes[word]
    first, rest = word[0], word[1:]
    return (int(first) if first.isdigit() else sizes[first]) * sizes[rest]
