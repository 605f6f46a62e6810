"""EAGLE-3 folders as SafeAILab, SGLang and speculators write them, and how others are refused.

The tensors are written under their published names by safetensors alone.
"""

import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY
from convert_cases import refused
from eagle3_cases import HOT, D, V, random_params
from safetensors.numpy import save_file
from test_eagle_import import run, target  # noqa: F401  target is a fixture

from beagle_jax.errors import UserError
from beagle_jax.model.eagle3 import Eagle3Spec
from beagle_jax.weights.draft import load_draft, save_draft
from beagle_jax.weights.eagle_import import read_eagle_draft

TARGET = replace(TINY, num_layers=8)  # its streams are 2, 4 and 5
IDS = np.sort(HOT)
EMBED_VD = np.random.default_rng(1).standard_normal((V, D)).astype(np.float32)
BASE = replace(
    Eagle3Spec.from_target(TARGET), draft_vocab_size=len(IDS), rope_theta=1e4, rms_norm_eps=1e-6
)
CONFIG = {
    "architectures": ["LlamaForCausalLMEagle3"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 1,
    "max_position_embeddings": 256,
    "vocab_size": V,
    "draft_vocab_size": len(IDS),
    "tie_word_embeddings": False,
}
LAYER = {
    key: CONFIG[key]
    for key in CONFIG
    if key not in ("architectures", "draft_vocab_size", "tie_word_embeddings")
}
SPECULATORS = {
    "architectures": ["Eagle3Speculator"],
    "speculators_model_type": "eagle3",
    "draft_vocab_size": len(IDS),
    "norm_before_residual": True,
    "norm_before_fc": True,
    "norm_output": True,
    "eagle_aux_hidden_state_layer_ids": [1, 3, 8],
    "speculators_config": {"algorithm": "eagle3"},
    "transformer_layer_config": LAYER
    | {"model_type": "qwen3", "head_dim": 8, "rope_theta": 5e5, "attention_bias": True},
}
NARROW = {"hidden_size": 24, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8}
# folder -> (description, config.json, prefix of all names, prefix of the layer's)
FOLDERS = {
    "SafeAILab": (BASE, CONFIG, "", "midlayer."),
    "SafeAILab, another width": (
        replace(BASE, hidden_size=24, num_heads=6, num_kv_heads=3, own_embedding=True),
        CONFIG | NARROW | {"target_hidden_size": 32},
        "",
        "midlayer.",
    ),
    "SGLang": (
        replace(BASE, fc_norm=True, fc_bias=True, attention_bias=True, state_layers=(1, 4, 7)),
        CONFIG
        | {"bias": True, "fc_norm": True}
        | {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 3, 6]}},
        "model.",
        "layers.0.",
    ),
    "SGLang, older norms": (
        replace(BASE, fc_norm=True),
        CONFIG | {"eagle_config": {"use_aux_norm": True, "use_aux_hidden_state": True}},
        "",
        "layers.0.",
    ),
    "the target's head": (
        replace(BASE, own_head=False, draft_vocab_size=V),
        CONFIG | {"draft_vocab_size": None},
        "",
        "midlayer.",
    ),
    "speculators": (
        replace(
            BASE,
            state_layers=(1, 3, 8),
            norm_before_residual=True,
            norm_before_fc=True,
            norm_output=True,
            qk_norm=True,
            attention_bias=True,
            rope_theta=5e5,
        ),
        SPECULATORS,
        "",
        "layers.0.",
    ),
}
OUTSIDE = {
    "fc": "fc.weight",
    "fc_bias": "fc.bias",
    "fc_input_norm": "input_norm.weight",
    "norm": "norm.weight",
    "head_VD": "lm_head.weight",
    "embed_VD": "embed_tokens.weight",
}


def published(name: str) -> dict[str, np.ndarray]:
    """The folder's tensors, in half precision as they are published."""
    spec, _, every, layer = FOLDERS[name]
    tensors = {}
    for key, array in random_params(spec).items():
        array = np.asarray(array, np.float16)
        if key == "fc_norm":
            names = ("aux_norm_low", "aux_norm_mid", "aux_norm_high")
            if name == "SGLang":
                names = ("fc_norm.0", "fc_norm.1", "fc_norm.2")
            tensors |= {
                f"{n}.weight": part for n, part in zip(names, np.split(array, 3), strict=True)
            }
            continue
        if key in OUTSIDE:
            tensors[OUTSIDE[key]] = array
            continue
        part, _, kind = key.rpartition("_")
        if kind == "bias" or key in ("q_norm", "k_norm") or part in (*"qkvo",):
            place = "self_attn."
        else:
            place = "mlp." if kind == "proj" else ""
        end = f"{part}_proj.bias" if kind == "bias" else f"{key}.weight"
        tensors[f"{layer}{place}{end}"] = array
    if spec.draft_vocab_size < V:
        tensors["d2t"] = (IDS - np.arange(len(IDS))).astype(np.int64)
        tensors["t2d"] = np.isin(np.arange(V), IDS)
    return {every + key: array for key, array in tensors.items()}


def write(folder: Path, tensors: dict[str, np.ndarray], config: dict) -> Path:
    folder.mkdir()
    save_file(
        {key: np.ascontiguousarray(x) for key, x in tensors.items()}, folder / "model.safetensors"
    )
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def targets_own(name: str) -> np.ndarray:
    assert name == "model.embed_tokens.weight"
    return EMBED_VD


def imported(folder: Path):
    return read_eagle_draft(folder, TARGET, "hf:org/target", read_target=targets_own)


def check(folder: Path, name: str) -> None:
    """The folder's draft is the one that was written, and survives a native folder."""
    spec, *_ = FOLDERS[name]
    draft, params = imported(folder), random_params(spec)
    assert draft.spec == spec
    if spec.draft_vocab_size < V:
        np.testing.assert_array_equal(draft.hot_ids, IDS)
    else:
        assert draft.hot_ids is None
    assert draft.params.keys() == params.keys()
    for key, array in params.items():
        assert draft.params[key].dtype == np.float32
        np.testing.assert_array_equal(draft.params[key], np.asarray(array, np.float16), key)
    save_draft(folder / "native", draft)
    again = load_draft(folder / "native", TARGET)
    assert (again.spec, again.fingerprint) == (draft.spec, draft.fingerprint)


@pytest.mark.parametrize("name", FOLDERS)
def test_published_folders_are_read_exactly(name, tmp_path):
    check(write(tmp_path / "there", published(name), FOLDERS[name][1]), name)


@pytest.mark.parametrize(
    ("name", "planted"),
    [
        ("SafeAILab", lambda t: t.update(d2t=np.roll(t["d2t"], 1), t2d=t["t2d"])),
        ("SafeAILab", lambda t: t["fc.weight"].__setitem__((0, 0), 7)),
        ("SGLang", lambda t: _swap(t, "model.fc_norm.0.weight", "model.fc_norm.2.weight")),
        (
            "SafeAILab",
            lambda t: _swap(t, "midlayer.hidden_norm.weight", "midlayer.input_layernorm.weight"),
        ),
        (
            "speculators",
            lambda t: _swap(
                t, "layers.0.self_attn.q_norm.weight", "layers.0.self_attn.k_norm.weight"
            ),
        ),
    ],
    ids=["another map", "another value", "norms swapped", "norms in other places", "q and k"],
)
def test_planted_bugs(name, planted, tmp_path):
    tensors = published(name)
    planted(tensors)
    folder = write(tmp_path / "there", tensors, FOLDERS[name][1])
    with pytest.raises((AssertionError, UserError)):
        check(folder, name)


def _swap(tensors, first, second) -> None:
    tensors[first], tensors[second] = tensors[second], tensors[first]


# Readings


def test_the_embedding_is_compared_or_kept(tmp_path):
    """A copy is dropped, also in half precision; one changed value makes it the draft's own."""
    tensors, copy_VD = published("SafeAILab"), EMBED_VD.astype(np.float16)
    same = write(tmp_path / "same", tensors | {"embed_tokens.weight": copy_VD}, CONFIG)
    assert imported(same).spec == BASE
    other_VD = copy_VD.copy()
    other_VD[17, 3] += 0.1
    other = write(tmp_path / "other", tensors | {"embed_tokens.weight": other_VD}, CONFIG)
    draft = imported(other)
    assert draft.spec == replace(BASE, own_embedding=True)
    np.testing.assert_array_equal(draft.params["embed_VD"], other_VD)


def test_which_reading_of_the_nested_layers_was_taken(tmp_path, caplog):
    folder = write(tmp_path / "there", published("SGLang"), FOLDERS["SGLang"][1])
    with caplog.at_level(logging.WARNING):
        draft = imported(folder)
    assert "[0, 3, 6] was read as SGLang and SpecForge do, as outputs" in caplog.text
    assert "streams [1, 4, 7]" in draft.provenance["reading"]


def test_the_top_level_list_names_layers_that_streams_enter(tmp_path):
    key = "eagle_aux_hidden_state_layer_ids"
    both = CONFIG | {key: [1, 4, 7], "eagle_config": {key: [0, 3, 6]}}
    tensors = published("SafeAILab")
    assert imported(write(tmp_path / "both", tensors, both)).spec.taps == (1, 4, 7)
    alone = write(tmp_path / "alone", tensors, CONFIG | {key: [1, 4, 7]})
    assert imported(alone).spec.taps == (1, 4, 7)


def test_an_absent_rope_base_is_ten_thousand(tmp_path):
    """And not the target's."""
    folder = write(tmp_path / "there", published("SafeAILab"), CONFIG)
    other = replace(TARGET, rope_theta=5e5, rms_norm_eps=1e-5)
    spec = read_eagle_draft(folder, other, "x", read_target=targets_own).spec
    assert (spec.rope_theta, spec.rms_norm_eps) == (1e4, 1e-6)


# Refusals

LIST = "eagle_aux_hidden_state_layer_ids"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"vocab_size": 300}, "belongs to another target (vocab_size 300 there, 61 here)"),
        ({"target_hidden_size": 64}, "(hidden size of the target 64 there, 32 here)"),
        ({"draft_vocab_size": 50}, "has d2t of shape [40], expected [50]"),
        (
            {"draft_vocab_size": 99},
            "draft_vocab_size is 99; expected a number up to the target's 61",
        ),
        ({"norm_before_fc": True}, "missing tensor input_norm.weight [96]"),
        ({"norm_before_fc": True, "fc_norm": True}, "norm_before_fc and fc_norm are both set"),
        ({"norm_output": "yes"}, "norm_output is 'yes'; expected true or false"),
        ({"attention_bias": True}, "missing tensor self_attn.o_proj.bias [32]"),
        ({"mlp_bias": True}, "asks for mlp_bias"),
        ({"tie_word_embeddings": True}, "by which SGLang takes the embedding as the head"),
        ({"layer_types": ["sliding_attention"], "sliding_window": 64}, "a sliding window (64 tok"),
        ({LIST: [1, 3]}, "fc.weight has shape [32, 96], expected [32, 64]"),
        ({LIST: [3, 1, 5]}, "expected layers of the target in ascending order"),
        ({LIST: [1, 3, 5], "eagle_config": {LIST: [1, 3, 5]}}, "the two name other streams"),
        ({"eagle_config": {"use_aux_hidden_state": False}}, "use_aux_hidden_state is false"),
        ({"num_aux_hidden_states": 4}, "num_aux_hidden_states is 4, but the draft reads 3"),
        ({LIST: [1, 3, 9]}, "(it reads the streams [9], the target has 0 to 8)"),
    ],
)
def test_settings_that_do_not_fit(change, expected, tmp_path):
    folder = write(tmp_path / "there", published("SafeAILab"), CONFIG | change)
    with pytest.raises(UserError) as caught:
        imported(folder)
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            {"norm_before_residual": None},
            "lacks norm_before_residual, which is false to speculators",
        ),
        ({"transformer_layer_config": None}, "lacks transformer_layer_config"),
        (
            {"transformer_layer_config": LAYER | {"model_type": "mistral"}},
            "model_type 'mistral'; exp",
        ),
        (
            {"transformer_layer_config": {k: v for k, v in LAYER.items() if k != "model_type"}},
            "has no model_type, which is qwen3 to speculators and llama to vLLM",
        ),
    ],
)
def test_speculators_settings_that_do_not_fit(change, expected, tmp_path):
    config = {key: value for key, value in (SPECULATORS | change).items() if value is not None}
    folder = write(tmp_path / "there", published("speculators"), config)
    with pytest.raises(UserError) as caught:
        imported(folder)
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t: t.pop("d2t"), "lacks d2t, expected [40]"),
        (lambda t: t.update(d2t=t["d2t"] * 0 + 60), "d2t names token 61; the target's vocabulary"),
        (lambda t: t.update(d2t=-np.arange(40)), "d2t names a token twice"),
        (lambda t: t.update(t2d=~t["t2d"]), "d2t and t2d do not name the same tokens"),
        (
            lambda t: t.update({"fc.bias": np.ones(32, np.float16)}),
            "holds fc.bias, and config.json does not say",
        ),
        (
            lambda t: t.pop("midlayer.mlp.up_proj.weight"),
            "missing tensor mlp.up_proj.weight [48, 32]",
        ),
        (
            lambda t: t.update({"mask_hidden": np.ones(32, np.float16)}),
            "extra tensor mask_hidden [32]",
        ),
        (
            lambda t: t.update({"layers.1.hidden_norm.weight": np.ones(32, np.float16)}),
            "extra tensor layers.1.hidden_norm.weight",
        ),
        (
            lambda t: t.update({"layers.0.hidden_norm.weight": np.ones(32, np.float16)}),
            "stands there twice",
        ),
        (
            lambda t: t.update({"fc_norm.1.weight": np.ones(32, np.float16)}),
            "holds fc_norm.1.weight; expected fc_norm.0.weight",
        ),
        (lambda t: t.update(d2t=t["d2t"].astype(np.float32)), "tensor d2t is stored as F32"),
    ],
)
def test_tensors_that_do_not_fit(change, expected, tmp_path):
    tensors = published("SafeAILab")
    change(tensors)
    with pytest.raises(UserError) as caught:
        imported(write(tmp_path / "there", tensors, CONFIG))
    assert expected in str(caught.value)


def test_a_map_over_a_whole_vocabulary(tmp_path):
    """All zeros is none; another is ignored by one reader and applied by another."""
    name = "the target's head"
    tensors = published(name) | {"d2t": np.zeros(V, np.int64)}
    check(write(tmp_path / "zeros", tensors, FOLDERS[name][1]), name)
    tensors["d2t"][[0, 1]] = 1, -1
    with pytest.raises(UserError, match="d2t maps tokens, though the draft scores all 61"):
        imported(write(tmp_path / "swaps", tensors, FOLDERS[name][1]))


def test_another_width_needs_both_tables(tmp_path):
    name = "SafeAILab, another width"
    tensors = published(name)
    del tensors["embed_tokens.weight"]
    with pytest.raises(
        UserError, match=r"lacks embed_tokens\.weight, and the target's does not fit"
    ):
        imported(write(tmp_path / "there", tensors, FOLDERS[name][1]))


def test_the_command(target, tmp_path, capsys):
    """Safetensors, and pickles only when they are allowed."""
    sizes = {"vocab_size": 300, LIST: [0, 1, 2]}
    tensors = published("SafeAILab")
    tensors.pop("t2d")
    source = write(tmp_path / "there", tensors, CONFIG | sizes)
    assert run(target, source, tmp_path / "here") == 0
    written = json.loads((tmp_path / "here" / "config.json").read_text())
    assert (written["model_type"], written["state_layers"]) == ("eagle3_draft", [0, 1, 2])
    (source / "model.safetensors").unlink()
    torch.save({n: torch.from_numpy(x) for n, x in tensors.items()}, source / "pytorch_model.bin")
    assert "is a pickle, which may run code" in refused(capsys, run(target, source, tmp_path / "b"))
    assert run(target, source, tmp_path / "b", "--allow-pickle") == 0
