"""Beagle drafts for vLLM: its plugin computes what the JAX block computes; refusals; the folder."""

import ast
import json
import sys
import tomllib
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import TINY, random_params
from convert_cases import place, refused  # noqa: F401 (a fixture)
from safetensors.torch import load_file
from test_published import eagle, eagle3
from transformers import AutoConfig
from vllm_standin import Proposer, on_ranks, plugin

from beagle_jax import convert
from beagle_jax.decoding.draft import grow
from beagle_jax.decoding.drafter import Known
from beagle_jax.decoding.trained import BeagleDrafter, DraftHead
from beagle_jax.decoding.tree import chain
from beagle_jax.errors import UserError, run_main
from beagle_jax.model.beagle import BeagleBlock, BeagleSpec, init_draft
from beagle_jax.model.kinds import KINDS, Served
from beagle_jax.weights.draft import Draft
from beagle_jax.weights.vllm_export import plugin_files, write_vllm_folder

SPEC = BeagleSpec.from_target(TINY, init_std=0.3)
TARGET = random_params(TINY)
HEAD_VD = np.random.default_rng(1).standard_normal((61, 32)).astype(np.float32)
L = 12
TOKENS = np.random.default_rng(2).integers(0, 61, L + 1).tolist()
STATES_LD = np.random.default_rng(3).standard_normal((L, 32)).astype(np.float32)


def draft(hot_ids=None, **changes) -> Draft:
    spec = replace(SPEC, **changes)
    params = init_draft(spec, jax.random.key(0))
    norms = {name: params[name] + 0.3 for name in params if name.endswith("layernorm")}
    return Draft(spec, {**params, **norms}, hot_ids, {"target": "org/name"})


def written(folder: Path, made: Draft, target=TINY) -> tuple[object, dict[str, torch.Tensor]]:
    """Returns the config as transformers reads it, and the tensors."""
    write_vllm_folder(folder, made, target)
    return AutoConfig.from_pretrained(folder), load_file(folder / "model.safetensors")


def proposer(module: ModuleType, folder: Path, made: Draft) -> Proposer:
    config, tensors = written(folder, made) if not any(folder.iterdir()) else stored(folder)
    tables = (torch.from_numpy(np.array(x)) for x in (TARGET["embed_VD"], HEAD_VD))
    return Proposer(module, config, tensors.items(), *tables)


def stored(folder: Path) -> tuple[object, dict[str, torch.Tensor]]:
    return AutoConfig.from_pretrained(folder), load_file(folder / "model.safetensors")


def states_by_jax(made: Draft) -> np.ndarray:
    """States predicted for positions 1 to L by the block in training's form."""
    e_BTD = TARGET["embed_VD"][np.array([TOKENS])] * made.spec.embed_scale
    h_BTD = np.concatenate([STATES_LD, np.zeros((1, 32), np.float32)])[None]
    return np.asarray(_states(made.params, e_BTD, h_BTD, made.spec)[0, 1:])


@partial(jax.jit, static_argnums=3)
def _states(params, e_BTD, h_BTD, spec):
    return BeagleBlock(spec).apply({"params": params}, e_BTD, h_BTD, method="teacher_forced")


grown = jax.jit(grow, static_argnums=3)


def difference(module: ModuleType, folder: Path, made: Draft) -> float:
    """Largest difference of the predicted states, as a share of the largest value."""
    ours = proposer(module, folder, made).run(TOKENS[1:], torch.from_numpy(STATES_LD), 0)
    expected = states_by_jax(made)
    return float(np.abs(ours.numpy() - expected).max() / np.abs(expected).max())


CASES = {
    "plain": draft(),
    "no input norm, own sizes": draft(
        input_norm=False, num_heads=8, num_kv_heads=4, head_dim=10, intermediate_size=40
    ),
    "scaled embedding, other theta": draft(embed_scale=5.66, rope_theta=500.0),
}


@pytest.mark.parametrize("made", CASES.values(), ids=CASES.keys())
def test_the_plugin_predicts_the_states_of_jax(made, tmp_path, monkeypatch):
    assert difference(plugin(monkeypatch), tmp_path, made) < 1e-5
    assert np.abs(states_by_jax(made)).max() > 0.3


BUGS = {
    "the query is rotated like the key": ("positions_T + 1, q_TF", "positions_T, q_TF"),
    "the residual begins at the state": ("y_TD = e_TD +", "y_TD = hidden_states +"),
    "keys and values come from the embedding": ("self.kv_proj(h_TD)", "self.kv_proj(u_TD)"),
    "keys and values are swapped": ("k_TF, v_TF = kv", "v_TF, k_TF = kv"),
    "the query is not normed": ("self.q_proj(u_TD)", "self.q_proj(h_TD)"),
    "gate and up are swapped": ('gate_up_proj.weight", 0)', 'gate_up_proj.weight", 1)'),
}


@pytest.mark.parametrize("bug", BUGS.values(), ids=BUGS.keys())
def test_a_wrong_plugin_predicts_other_states(bug, tmp_path, monkeypatch):
    assert not difference(plugin(monkeypatch, *bug), tmp_path, draft()) < 1e-2


def chain_by_jax(made: Draft, steps: int) -> list[int]:
    rows = BeagleBlock(made.spec).apply(
        {"params": made.params}, STATES_LD[None], jnp.arange(L)[None], method="keys_values"
    )
    drafter = BeagleDrafter(
        made.spec, made.params, TARGET["embed_VD"], DraftHead(jnp.asarray(HEAD_VD), None)
    )
    known = Known(jnp.asarray(TOKENS[-1:]), jnp.full(1, L))
    return grown(drafter, rows, known, chain(steps)).nodes.token_BW[0, 1:].tolist()


@pytest.mark.parametrize("bug", [(), ("positions_T + 1, q_TF", "positions_T, q_TF")])
def test_the_proposer_drafts_the_chain_of_jax(tmp_path, monkeypatch, bug):
    """In two calls, the second after a rejected draft, whose entries it must overwrite."""
    proposing = proposer(plugin(monkeypatch, *bug), tmp_path, draft())
    states_LD = torch.from_numpy(STATES_LD)
    proposing.propose(TOKENS[1:8], states_LD[:7], 0, 4)
    drafted = proposing.propose(TOKENS[8:], states_LD[7:], 7, 6)
    assert (drafted == chain_by_jax(draft(), 6)) == (not bug)


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_add_up_to_the_whole(tmp_path, monkeypatch, size):
    """With four ranks and two key/value heads each head is on two ranks."""
    module, expected = plugin(monkeypatch), states_by_jax(draft())
    written(tmp_path, draft())

    def work() -> np.ndarray:
        proposing = proposer(module, tmp_path, draft())
        assert proposing.model.model.self_attn.attn.heads == max(1, 2 // size)
        return proposing.run(TOKENS[1:], torch.from_numpy(STATES_LD), 0).numpy()

    for states_LD in on_ranks(size, work):
        assert np.abs(states_LD - expected).max() < 1e-5 * np.abs(expected).max()


def test_ranks_that_hold_wrong_heads_differ(tmp_path, monkeypatch):
    """The bug planted in the test above: heads repeated in turn (0 1 0 1), not each twice."""
    bug = ("heads.repeat_interleave(self.model.self_attn.copies, 0)", "heads.repeat(2, 1, 1)")
    module = plugin(monkeypatch, *bug)
    written(tmp_path, draft())

    def work() -> np.ndarray:
        proposing = proposer(module, tmp_path, draft())
        return proposing.run(TOKENS[1:], torch.from_numpy(STATES_LD), 0).numpy()

    assert np.abs(on_ranks(4, work)[0] - states_by_jax(draft())).max() > 1e-2


def test_ranks_that_do_not_divide_the_heads_are_refused(tmp_path, monkeypatch):
    module = plugin(monkeypatch)
    written(tmp_path, draft())
    with pytest.raises(ValueError, match="4 heads and 2 key/value heads cannot be split over 3"):
        on_ranks(3, lambda: proposer(module, tmp_path, draft()))


def test_the_last_position_of_the_context_has_a_query(tmp_path, monkeypatch):
    """Its query is rotated by one more than any key."""
    module = plugin(monkeypatch)
    wide = proposer(module, tmp_path, draft())
    last_TD = torch.from_numpy(STATES_LD[:1])
    wide.model.model.self_attn.attn.k_SKH = torch.zeros(256, 2, 8)
    wide.model.model.self_attn.attn.v_SKH = torch.zeros(256, 2, 8)
    assert wide.run([5], last_TD, TINY.max_positions - 1).isfinite().all()


def test_missing_and_unknown_tensors_are_refused(tmp_path, monkeypatch):
    module = plugin(monkeypatch)
    config, tensors = written(tmp_path, draft())
    table = torch.zeros(61, 32)
    with pytest.raises(ValueError, match=r"lack mlp\.up_proj\.weight"):
        Proposer(
            module,
            config,
            [pair for pair in tensors.items() if pair[0] != "mlp.up_proj.weight"],
            table,
            table,
        )
    with pytest.raises(ValueError, match=r"has no tensor fc\.weight"):
        Proposer(module, config, {**tensors, "fc.weight": table}.items(), table, table)


def test_pipeline_parallelism_is_refused(tmp_path, monkeypatch):
    config = SimpleNamespace(parallel_config=SimpleNamespace(pipeline_parallel_size=2))
    with pytest.raises(ValueError, match="set pipeline_parallel_size to 1"):
        plugin(monkeypatch).BeagleForCausalLM(vllm_config=config)


# The folder


def test_the_folder_has_weights_config_plugin_and_origin(tmp_path):
    hot_ids = jnp.arange(40, dtype=jnp.int32)
    config, tensors = written(tmp_path, draft(hot_ids))
    names = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*"))
    assert names == [
        "README.md",
        "beagle_jax.json",
        "config.json",
        "model.safetensors",
        "plugin/beagle_vllm/__init__.py",
        "plugin/beagle_vllm/draft.py",
        "plugin/pyproject.toml",
    ]
    assert "hot_tokens" not in tensors and len(tensors) == 9
    assert config.architectures == ["BeagleForCausalLM"] and config.num_hidden_layers == 1
    assert config.rope_parameters["rope_theta"] == SPEC.rope_theta
    assert (config.input_norm, config.embed_scale) == (True, 1.0)
    record = json.loads((tmp_path / "beagle_jax.json").read_text())
    assert record["scored_tokens_in_training"] == 40 and record["written_for"] == "vllm"
    readme = (tmp_path / "README.md").read_text()
    assert "draft for `org/name`" in readme and '{"method": "eagle", "model"' in readme


def test_the_plugin_registers_the_names_that_vllm_looks_up(tmp_path, monkeypatch):
    """It is a package of its own with an entry point, and imports nothing but torch and vLLM."""
    written(tmp_path, draft())
    project = tomllib.loads((tmp_path / "plugin" / "pyproject.toml").read_text())
    entry = project["project"]["entry-points"]["vllm.general_plugins"]["beagle"]
    module, _, function = entry.partition(":")
    assert project["tool"]["setuptools"]["packages"] == [module]
    registered = {}
    vllm = ModuleType("vllm")
    vllm.ModelRegistry = SimpleNamespace(register_model=registered.__setitem__)
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.syspath_prepend(tmp_path / "plugin")
    getattr(import_module(module), function)()
    monkeypatch.delitem(sys.modules, module)
    place = "beagle_vllm.draft:BeagleForCausalLM"
    assert registered == {"BeagleForCausalLM": place, "EagleBeagleForCausalLM": place}
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"][0] in registered
    for path in (tmp_path / "plugin" / "beagle_vllm").glob("*.py"):
        nodes = ast.walk(ast.parse(path.read_text()))
        imports = {node.module.partition(".")[0] for node in nodes if hasattr(node, "module")}
        imports |= {"import" for node in nodes if isinstance(node, ast.Import)}
        assert imports <= {"torch", "vllm", "collections"}, path


def test_the_plugin_is_written_as_it_lies_in_the_package():
    names = [name for name, _ in plugin_files()]
    assert names == ["beagle_vllm/__init__.py", "beagle_vllm/draft.py", "pyproject.toml"]


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (draft(state_layers=(1,)), r"enter the layers \[1\] of the target \(draft\.state_layers\)"),
        (draft(num_heads=6, num_kv_heads=3), r"refuses a config of 6 heads in a width of 32"),
        (eagle(), "a draft of kind 'eagle' needs no plugin in vLLM"),
        (eagle3(), "a draft of kind 'eagle3' needs no plugin in vLLM.*convert to-eagle --for vllm"),
    ],
)
def test_what_vllm_cannot_compute_is_refused(made, expected, tmp_path):
    with pytest.raises(UserError, match=expected):
        write_vllm_folder(tmp_path, made, replace(TINY, num_layers=8))
    assert not any(tmp_path.iterdir())


def test_a_kind_that_nothing_there_computes_is_refused(tmp_path, monkeypatch):
    unknown = KINDS[SPEC.kind]._replace(served=Served.NOWHERE)
    monkeypatch.setitem(KINDS, SPEC.kind, unknown)
    with pytest.raises(UserError, match="neither its own classes nor the plugin compute it"):
        write_vllm_folder(tmp_path, draft(), TINY)
    assert not any(tmp_path.iterdir())


def test_the_command_says_how_to_serve_the_draft(place, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["to-vllm", "--config", place.config, "--out", str(out)]
    assert run_main(convert.main, [*arguments, f"draft.path={place.folder / 'hot'}"]) == 0
    said = capsys.readouterr().out
    assert f"pip install {out}/plugin" in said and "tried with vLLM 0.32.0" in said
    assert '{"method": "eagle", "model": "' + str(out) in said
    assert "The draft scores 220 tokens (draft.hot_tokens); vLLM scores all" in said
    assert (out / "plugin" / "beagle_vllm" / "draft.py").exists()
    # its own output may be replaced, and options of other directions are none of it
    whole = [*arguments, "--overwrite", f"draft.path={place.folder / 'whole'}"]
    assert run_main(convert.main, whole) == 0
    assert "draft.hot_tokens" not in capsys.readouterr().out
    assert "--for is not an option of to-vllm" in refused(
        capsys, run_main(convert.main, [*arguments, "--for", "vllm"])
    )
