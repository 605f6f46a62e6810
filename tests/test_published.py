"""Drafts in the forms of other servers: names, shapes, settings, and bit-equal on the way back."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY
from convert_cases import make_place, refused
from eagle3_cases import random_params as eagle3_params
from layers_cases import random_layers_draft
from safetensors.numpy import load_file
from server_tables import EAGLE, EAGLE3, VERSIONS, misfits

from beagle_jax import convert
from beagle_jax.config import DraftConfig
from beagle_jax.errors import UserError, run_main
from beagle_jax.model.eagle import EagleSpec, init_eagle
from beagle_jax.model.eagle3 import Eagle3Spec
from beagle_jax.model.kinds import new_spec
from beagle_jax.model.layers import RopeScaling
from beagle_jax.weights import eagle_export
from beagle_jax.weights.draft import Draft, load_draft, save_draft
from beagle_jax.weights.eagle_import import read_eagle_draft
from beagle_jax.weights.server_files import write_published
from beagle_jax.weights.server_form import TITLES, Server

TARGET = replace(TINY, num_layers=8)  # its default streams are 2, 4 and 5
V = TARGET.vocab_size
HOT = np.random.default_rng(9).permutation(V)[:40].astype(np.int32)  # in no order
LLAMA3 = RopeScaling(8.0, 1.0, 4.0, 64.0)
EAGLE_SPEC = EagleSpec.from_target(TARGET, init_std=0.3)
SPEC3 = replace(Eagle3Spec.from_target(TARGET, init_std=0.3), draft_vocab_size=len(HOT))
VERIFIER = {"name_or_path": "org/name", "architectures": ["LlamaForCausalLM"]}


def eagle(**changes) -> Draft:
    spec = replace(EAGLE_SPEC, **changes)
    params = init_eagle(spec, jax.random.key(0))
    biased = {name: params[name] + 0.3 for name in params if name.endswith("_bias")}
    return Draft(spec, {**params, **biased}, None, {"target": "a tiny one"})


def eagle3(hot_ids=HOT, **changes) -> Draft:
    spec = replace(SPEC3, **changes).scoring(V if hot_ids is None else len(hot_ids))
    ids = None if hot_ids is None else jnp.asarray(hot_ids)
    return Draft(spec, eagle3_params(spec), ids, {"target": "a tiny one"})


# name -> (draft, server). What each holds beyond the plain form is what its loader computes.
WRITTEN = {
    "eagle for eagle": (eagle(), "safeailab"),
    "eagle for eagle, with all": (
        eagle(fc_bias=False, qkv_bias=True, rope_scaling=RopeScaling(2.0), rope_theta=5e5),
        "safeailab",
    ),
    "eagle for sglang": (eagle(), "sglang"),
    "eagle for sglang, no bias": (eagle(fc_bias=False, rope_scaling=LLAMA3), "sglang"),
    "eagle for sglang, as Qwen2": (eagle(qkv_bias=True, head_dim=10), "sglang"),
    "eagle for vllm": (eagle(fc_bias=False, rope_scaling=LLAMA3, head_dim=10), "vllm"),
    "eagle for vllm, biased": (eagle(fc_bias=False, qkv_bias=True), "vllm"),
    "eagle3 for eagle": (eagle3(), "safeailab"),
    "eagle3 for eagle, all tokens": (eagle3(None, rope_scaling=RopeScaling(4.0)), "safeailab"),
    "eagle3 for eagle, narrow": (
        eagle3(hidden_size=24, num_heads=6, num_kv_heads=3, head_dim=4, own_embedding=True),
        "safeailab",
    ),
    "eagle3 for sglang": (
        eagle3(state_layers=(1, 8), norm_before_fc=True, norm_output=True, attention_bias=True),
        "sglang",
    ),
    "eagle3 for sglang, norms": (eagle3(fc_norm=True, state_layers=(1, 2, 3, 4)), "sglang"),
    "eagle3 for sglang, target's head": (eagle3(None, own_head=False), "sglang"),
    "eagle3 for vllm": (
        eagle3(
            state_layers=(0, 8),
            norm_before_residual=True,
            fc_norm=True,
            norm_output=True,
            rope_scaling=LLAMA3,
        ),
        "vllm",
    ),
    "eagle3 for speculators": (
        eagle3(
            state_layers=(0, 3, 8),
            norm_before_residual=True,
            norm_before_fc=True,
            qk_norm=True,
            attention_bias=True,
            rope_theta=5e5,
        ),
        "speculators",
    ),
    "eagle3 for speculators, llama": (eagle3(fc_norm=True, head_dim=10), "speculators"),
}


def write(folder: Path, draft: Draft, server: str) -> tuple[dict, dict[str, np.ndarray]]:
    folder.mkdir()
    write_published(folder, draft, TARGET, Server(server, VERIFIER))
    config = json.loads((folder / "config.json").read_text())
    return config, load_file(folder / "model.safetensors")


def sizes_of(draft: Draft) -> dict[str, int]:
    spec = draft.spec
    return {
        "d": spec.hidden_size,
        "D": TARGET.hidden_size,
        "V": V,
        "v": V if draft.hot_ids is None else len(draft.hot_ids),
        "Q": spec.num_heads * spec.head_dim,
        "K": spec.num_kv_heads * spec.head_dim,
        "F": spec.intermediate_size,
        "H": spec.head_dim,
        "n": len(spec.taps),
    }


def check_table(draft: Draft, server: str, config: dict, tensors: dict[str, np.ndarray]) -> None:
    loader = (EAGLE if draft.kind == "eagle" else EAGLE3)[server]
    shapes = {name: array.shape for name, array in tensors.items()}
    wrong = misfits(loader, config, shapes, sizes_of(draft))
    if server == "speculators":
        layer = EAGLE["vllm"].config.keys() - {"architectures"}
        wrong += [key for key in layer if key not in config["transformer_layer_config"]]
    assert not wrong, f"{VERSIONS[server]}: {wrong}"


@pytest.mark.parametrize("name", WRITTEN)
def test_names_shapes_and_settings_are_what_the_loader_asks_for(name, tmp_path):
    draft, server = WRITTEN[name]
    config, tensors = write(tmp_path / "out", draft, server)
    check_table(draft, server, config, tensors)
    assert config.get("bias") in (None, draft.kind == "eagle" and draft.spec.fc_bias)
    assert {array.dtype.name for array in tensors.values()} <= {"float32", "int64", "bool"}


@pytest.mark.parametrize("name", WRITTEN)
def test_our_importer_reads_it_back_bit_equal(name, tmp_path):
    draft, server = WRITTEN[name]
    write(tmp_path / "out", draft, server)
    again = read_eagle_draft(tmp_path / "out", TARGET, "a tiny one")
    expected = dict(draft.params)
    if server == "sglang" and draft.kind == "eagle":
        expected.setdefault("fc_bias", np.zeros(TARGET.hidden_size, np.float32))
    if draft.hot_ids is not None:
        order = np.argsort(HOT)
        expected["head_VD"] = np.asarray(expected["head_VD"])[order]
        np.testing.assert_array_equal(again.hot_ids, HOT[order])
    assert again.params.keys() == expected.keys()
    for key, array in expected.items():
        np.testing.assert_array_equal(again.params[key], array, err_msg=key)
    changed = {"init_std": again.spec.init_std, "fc_bias": "fc_bias" in expected}
    assert again.spec == replace(draft.spec, **changed)


def test_the_table_sees_planted_errors(tmp_path):
    draft = eagle(fc_bias=False)
    config, tensors = write(tmp_path / "out", draft, "vllm")
    for changed, more in (
        ({**config, "attention_bias": True}, {}),
        ({key: value for key, value in config.items() if key != "rope_theta"}, {}),
        (config, {"lm_head.weight": np.zeros((V, 32))}),
        (config, {"fc.weight": np.zeros((32, 32))}),
    ):
        with pytest.raises(AssertionError, match=r"vLLM 0\.33"):
            check_table(draft, "vllm", changed, {**tensors, **more})
    del tensors["layers.0.mlp.up_proj.weight"]
    with pytest.raises(AssertionError, match=r"lacks layers\.0\.mlp\.up_proj\.weight"):
        check_table(draft, "vllm", config, tensors)


def test_zeros_stand_where_sglang_would_leave_random_numbers(tmp_path):
    _, tensors = write(tmp_path / "out", eagle(fc_bias=False), "sglang")
    assert not tensors["fc.bias"].any()


def test_streams_are_named_as_each_server_counts(tmp_path):
    draft = eagle3(state_layers=(1, 4, 8))
    key = "eagle_aux_hidden_state_layer_ids"
    configs = {name: write(tmp_path / name, draft, name)[0] for name in ("sglang", "vllm")}
    assert configs["sglang"]["eagle_config"][key] == [0, 3, 7]  # outputs of layers
    assert configs["vllm"][key] == [1, 4, 8]  # streams that enter layers
    layers = write(tmp_path / "s", draft, "speculators")[0]
    assert layers[key] == [1, 4, 8] and layers["speculators_config"]["verifier"] == VERIFIER
    assert layers["transformer_layer_config"]["num_aux_hidden_states"] == 3


def test_tokens_are_offsets_in_ascending_order(tmp_path):
    _, tensors = write(tmp_path / "out", eagle3(), "safeailab")
    np.testing.assert_array_equal(np.arange(40) + tensors["d2t"], np.sort(HOT))
    np.testing.assert_array_equal(np.flatnonzero(tensors["t2d"]), np.sort(HOT))


def test_planted_bug_in_the_writer_leaves_a_message(tmp_path, monkeypatch):
    names = dict(eagle_export._NAMES)
    names["gate_proj"], names["up_proj"] = names["up_proj"], names["gate_proj"]
    monkeypatch.setattr(eagle_export, "_NAMES", names)
    with pytest.raises(UserError, match=r"does not read back as it is \(gate_proj, up_proj\)"):
        write(tmp_path / "out", eagle(), "safeailab")


@pytest.mark.parametrize(
    ("draft", "server", "message"),
    [
        (eagle(), "vllm", r"has a bias \(fc\.bias\), which vLLM drops .*draft\.fc_bias=false"),
        (
            replace(eagle(), hot_ids=jnp.asarray(HOT)),
            "sglang",
            r"scores 40 of the target's tokens \(draft\.hot_tokens\)",
        ),
        (eagle(input_norm=True), "safeailab", r"theirs has no input_layernorm"),
        (eagle(rope_scaling=LLAMA3), "safeailab", "knows linear and dynamic alone"),
        (eagle(rope_scaling=RopeScaling(0.5)), "safeailab", r"rope factor of 0\.5 is refused"),
        (eagle(head_dim=10), "safeailab", r"heads are 10 wide.*hidden_size / heads \(32 / 4\)"),
        (eagle(embed_scale=8.0), "sglang", "reads embeddings times 8 "),
        (eagle(), "speculators", "no longer load EAGLE-1/2"),
        (random_layers_draft(), "vllm", r"kind 'beagle' cannot be written for vLLM"),
        (eagle3(state_layers=(1, 2, 3)), "safeailab", r"SafeAILab's code reads \[2, 4, 5\]"),
        (eagle3(norm_before_residual=True), "sglang", "norm_before_residual, which SGLang does"),
        (eagle3(qk_norm=True), "vllm", "qk_norm, which vLLM does not compute"),
        (eagle3(norm_output=True), "safeailab", "norm_output, which SafeAILab's"),
        (eagle3(fc_bias=True), "sglang", r"fusion layer has a bias \(fc\.bias\)"),
        (eagle3(state_layers=(0, 2)), "sglang", r"reads the embedding \(stream 0\)"),
        (eagle3(None, own_head=False), "safeailab", "rows of the target's head"),
        (eagle3(own_embedding=True), "sglang", "which SGLang replaces"),
        (
            eagle3(hidden_size=24, num_heads=6, num_kv_heads=3, own_embedding=True),
            "speculators",
            "is 24 wide and the target 32",
        ),
        (eagle3(norm_before_fc=True, fc_norm=True), "vllm", "both norm_before_fc and fc_norm"),
        (eagle3(embed_scale=8.0), "vllm", "reads embeddings times 8 "),
    ],
)
def test_what_a_loader_cannot_express_is_refused(draft, server, message, tmp_path):
    with pytest.raises(
        UserError, match=f"(?s)cannot be written for {TITLES[server]}.*{message}|{message}"
    ):
        write(tmp_path / "out", draft, server)


def test_a_draft_without_the_bias_can_be_trained():
    settings = DraftConfig(kind="eagle", fc_bias=False)
    spec = new_spec(settings, TARGET)
    assert "fc_bias" not in spec.param_shapes()
    assert "fc_bias" in new_spec(settings.changed(fc_bias=True), TARGET).param_shapes()


# The command


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    made = make_place(tmp_path_factory.mktemp("published"))
    spec = replace(EagleSpec.from_target(made.target.spec), fc_bias=False)
    draft = Draft(spec, init_eagle(spec, jax.random.key(0)), None, {"target": "a tiny one"})
    save_draft(made.folder / "eagle", draft)
    return made


def run(place, *arguments: str) -> int:
    return run_main(convert.main, [*arguments, "--config", place.config])


def test_the_command_writes_what_import_eagle_reads(place, tmp_path, capsys):
    out, back = tmp_path / "served", tmp_path / "back"
    draft = f"draft.path={place.folder / 'eagle'}"
    assert run(place, "to-eagle", "--for", "vllm", "--out", str(out), draft) == 0
    assert "Such folders were loaded by vLLM 0.32.0" in capsys.readouterr().out
    names = sorted(path.name for path in out.iterdir())
    assert names == ["beagle_jax.json", "config.json", "model.safetensors"]
    assert json.loads((out / "beagle_jax.json").read_text())["written_for"] == "vllm"
    # again, over its own output; and no other folder
    again = ["to-eagle", "--for", "sglang", "--out", str(out), "--overwrite", draft]
    assert run(place, *again) == 0
    assert "That loader itself was not run" in capsys.readouterr().out
    assert run(place, "import-eagle", "--source", str(out), "--out", str(back)) == 0
    ours = load_draft(place.folder / "eagle", place.target.spec)
    theirs = load_draft(back, place.target.spec)
    for name, array in ours.params.items():
        np.testing.assert_array_equal(theirs.params[name], array)


def test_the_command_refuses(place, tmp_path, capsys):
    out = ["--out", str(tmp_path / "out")]
    assert "to-eagle needs --for: eagle, sglang, vllm" in refused(
        capsys, run(place, "to-eagle", *out)
    )
    assert "--for is not an option of to-torch" in refused(
        capsys, run(place, "to-torch", "--for", "vllm", *out)
    )
    beagle = f"draft.path={place.folder / 'whole'}"
    assert "kind 'beagle' cannot be written for vLLM" in refused(
        capsys, run(place, "to-eagle", "--for", "vllm", *out, beagle)
    )
    eagle_draft = f"draft.path={place.folder / 'eagle'}"
    assert "no longer load EAGLE-1/2" in refused(
        capsys, run(place, "to-speculators", *out, eagle_draft)
    )
    assert not (tmp_path / "out").exists()
