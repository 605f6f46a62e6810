"""Drafts to PyTorch and back: the same states, the same answers, the same bits; and how a bad draft
is refused.
"""

import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import get_args, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from command_cases import make_target
from convert_cases import PROVENANCE, from_torch, make_place, refused, to_torch
from safetensors.numpy import load_file, save_file
from test_resume import small_disk
from transformers import AutoModel, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from beagle_jax import convert
from beagle_jax.commands import convert as converting
from beagle_jax.config import TrainConfig
from beagle_jax.decoding.decoder import SpeculativeDecoder
from beagle_jax.decoding.draft import DraftHead, draft_tree
from beagle_jax.decoding.tree import chain, static_tree
from beagle_jax.errors import run_main
from beagle_jax.model.beagle import BeagleBlock, DraftSpec
from beagle_jax.weights import torch_export
from beagle_jax.weights.draft import Draft, load_draft, save_draft
from beagle_jax.weights.hf import HFFolder
from beagle_jax.weights.model_card import model_card

PATHS = ((0,), (1,), (2,), (0, 0), (0, 1), (2, 0), (0, 1, 0), (0, 1, 2))
TREES = {"chain": (chain(4), {"levels": 4}), "static": (static_tree(PATHS), {"paths": PATHS})}
PROMPTS = [[7], [40, 5, 5, 211, 90], list(range(100, 150))]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("convert"))


@pytest.fixture(scope="module")
def exported(place) -> dict[str, Path]:
    """Both drafts as PyTorch folders."""
    for name in ("whole", "hot"):
        assert to_torch(place, name, place.folder / f"{name}-torch") == 0
    return {name: place.folder / f"{name}-torch" for name in ("whole", "hot")}


def torch_draft(folder: Path):
    return AutoModel.from_pretrained(folder, trust_remote_code=True).eval()


# To PyTorch


@pytest.mark.parametrize("name", ["whole", "hot"])
def test_torch_predicts_the_states_and_logits_of_jax(place, exported, name):
    draft, module = load_draft(place.folder / name, place.target.spec), torch_draft(exported[name])
    rng = np.random.default_rng(5)
    e_BTD, h_BSD = rng.standard_normal((2, 2, 12, draft.spec.hidden_size), np.float32)
    mask_BTS = rng.random((2, 12, 12)) < 0.4
    mask_BTS[:, 3] = False  # a query that sees nothing
    with torch.no_grad():
        found = module(torch.from_numpy(e_BTD), torch.from_numpy(h_BSD), torch.from_numpy(mask_BTS))
        logits = found @ module.head_rows(place.model.lm_head.weight).T
    expected = BeagleBlock(draft.spec).apply({"params": draft.params}, e_BTD, h_BSD, mask_BTS)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-5)
    rows_VD = (
        place.target.params["head_VD"]
        if draft.hot_ids is None
        else place.target.params["head_VD"][draft.hot_ids]
    )
    np.testing.assert_allclose(
        logits.numpy(), expected @ rows_VD.T, rtol=1e-5, atol=1e-4
    )  # a sum of products over D
    assert np.abs(found.numpy() - e_BTD).max() > 0.1


@pytest.mark.parametrize(("name", "tree"), [("whole", "static"), ("hot", "chain")])
def test_torch_writes_what_jax_and_plain_decoding_write(place, exported, name, tree):
    shape, options = TREES[tree]
    fast = SpeculativeDecoder(
        place.target, load_draft(place.folder / name, place.target.spec), shape
    )
    module = torch_draft(exported[name])
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        found = module.generate(place.model, ids, max_new_tokens=24, **options)
        [jax_answer] = fast.generate([prompt], max_new_tokens=24)
        [plain] = place.plain.generate([prompt], max_new_tokens=24)
        theirs = place.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False
        )
        assert (
            found.sequences[0].tolist()
            == prompt + jax_answer.tokens
            == prompt + plain.tokens
            == theirs[0].tolist()
        )
        assert found.rounds == jax_answer.rounds < len(plain.tokens) - 1
        assert sum(jax_answer.accepted[1:]) > 1, (
            "the draft must be right sometimes, else acceptance is not tested"
        )


grow = jax.jit(draft_tree, static_argnums=(1, 2))


def drafted(place, exported, tree) -> tuple[list[list[int]], list[list[int]]]:
    """What torch, with its own form of a tree, and JAX draft below ten roots over random states."""
    draft, module = (
        load_draft(place.folder / "hot", place.target.spec),
        torch_draft(exported["hot"]),
    )
    params = place.target.params
    head = DraftHead(params["head_VD"][draft.hot_ids], draft.hot_ids)
    h_BSD = np.random.default_rng(6).standard_normal((10, 6, 32), np.float32)
    roots, positions_BS = np.arange(10, dtype=np.int32) * 17, np.broadcast_to(np.arange(6), (10, 6))
    cache = BeagleBlock(draft.spec).apply(
        {"params": draft.params}, h_BSD, positions_BS, method="keys_values"
    )
    found = grow(
        draft.params,
        draft.spec,
        static_tree(PATHS),
        params["embed_VD"],
        head,
        cache,
        jnp.full(10, 6),
        jnp.asarray(roots),
    )
    rows_VD, embed = (
        module.head_rows(place.model.lm_head.weight),
        place.model.get_input_embeddings(),
    )
    true = [module.keys_values(torch.from_numpy(h_SD)[None], torch.arange(6)) for h_SD in h_BSD]
    return [
        module.draft(tree, int(root), one, embed, rows_VD)
        for root, one in zip(roots, true, strict=True)
    ], found.nodes.token_BW.tolist()


def tree_class(exported):
    return sys.modules[type(torch_draft(exported["hot"])).__module__].Tree


def test_torch_drafts_the_nodes_that_jax_drafts(place, exported):
    found, expected = drafted(place, exported, tree_class(exported)(PATHS))
    assert found == expected


@pytest.mark.parametrize(
    "bug", ["siblings are seen", "parents are not seen", "a level is appended late"]
)
def test_wrong_drafting_shows_in_the_nodes(place, exported, bug):
    """Planted bugs of the test above."""
    tree = tree_class(exported)(PATHS)
    if bug == "siblings are seen":
        tree.ancestors = [set(range(tree.size))] * tree.size
    elif bug == "parents are not seen":
        tree.ancestors = [set()] * tree.size
    else:
        tree.ancestors = [
            {node for node in above if tree.depth[node] < depth - 1}
            for above, depth in zip(tree.ancestors, tree.depth, strict=True)
        ]
    found, expected = drafted(place, exported, tree)
    assert found != expected


def test_states_are_the_last_hidden_states_after_the_norm(place):
    """What `generate` takes for states, and `hidden_states[-1]` of a Llama, are what the head
    reads.
    """
    with torch.no_grad():
        out = place.model(torch.tensor([PROMPTS[1]]), output_hidden_states=True)
        state = place.model.base_model(torch.tensor([PROMPTS[1]])).last_hidden_state
    assert torch.equal(state, out.hidden_states[-1]) and torch.equal(
        place.model.lm_head(state), out.logits
    )


def test_generate_stops_where_it_should(place, exported):
    module, ids = torch_draft(exported["whole"]), torch.tensor([PROMPTS[1]])
    whole = module.generate(place.model, ids, max_new_tokens=40).sequences[0].tolist()
    stop = whole[5 + 9]
    cut = whole[: 5 + whole[5:].index(stop) + 1]
    for options in (TREES["chain"][1], TREES["static"][1]):
        assert (
            module.generate(place.model, ids, 40, eos_token_ids=[stop], **options)
            .sequences[0]
            .tolist()
            == cut
        )
        assert (
            module.generate(place.model, ids, 40, eos_token_ids=stop, **options)
            .sequences[0]
            .tolist()
            == cut
        )
        assert module.generate(place.model, ids, 7, **options).sequences[0].tolist() == whole[:12]
    long = torch.tensor([[3] * 250])
    assert module.generate(place.model, long, 40, eos_token_ids=[]).sequences.shape == (1, 256)


@pytest.mark.parametrize(
    ("ids", "options", "expected"),
    [
        ([[1], [2]], {}, "input_ids has shape \\[2, 1\\]"),
        ([[1]], {"levels": 0}, "no nodes below its root"),
        ([[1]], {"max_new_tokens": 0}, "no token can be generated"),
        ([[1] * 256], {}, "the prompt fills the target's context"),
        ([[1]], {"paths": [(0,), (300,)]}, "rank 300, but the draft scores only 300"),
        ([[1]], {"paths": [(0,), (1, 0)]}, "the parent of \\[1, 0\\] is not in the list"),
        ([[1]], {"paths": [(0,), (0,)]}, "repeated or an empty path"),
    ],
)
def test_generate_refuses(place, exported, ids, options, expected):
    with pytest.raises(ValueError, match=expected):
        torch_draft(exported["whole"]).generate(place.model, torch.tensor(ids), **options)


def test_generate_refuses_another_target(place, exported):
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    with pytest.raises(
        ValueError, match="belongs to another target \\(hidden_size 32, the target's is 16\\)"
    ):
        torch_draft(exported["whole"]).generate(
            LlamaForCausalLM(LlamaConfig(vocab_size=300, **sizes)), torch.tensor([[1]])
        )


def test_targets_with_a_window_are_drafted_chains(exported):
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    config = MistralConfig(
        vocab_size=300,
        sliding_window=8,
        initializer_range=0.3,
        eos_token_id=None,
        max_position_embeddings=256,
        **sizes,
    )
    target, module, ids = (
        MistralForCausalLM(config).eval(),
        torch_draft(exported["whole"]),
        torch.tensor([PROMPTS[2]]),
    )
    expected = target.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=30, do_sample=False
    )
    assert torch.equal(module.generate(target, ids, 30).sequences, expected)
    target.config.sliding_window = None
    assert not torch.equal(module.generate(target, ids, 30).sequences, expected), (
        "the window must matter"
    )
    target.config.sliding_window = 8
    with pytest.raises(ValueError, match="attention has a window"):
        module.generate(target, ids, 30, paths=PATHS)


def test_half_precision_drafts_write_the_same_answer(place, exported):
    module = AutoModel.from_pretrained(
        exported["hot"], trust_remote_code=True, dtype=torch.bfloat16
    )
    assert module.dtype == torch.bfloat16 and module.hot_tokens.dtype == torch.int32
    ids = torch.tensor([PROMPTS[1]])
    expected = torch_draft(exported["hot"]).generate(place.model, ids, 30).sequences
    assert torch.equal(module.generate(place.model, ids, 30, paths=PATHS).sequences, expected)


def test_the_folder_says_where_it_comes_from(place, exported):
    assert sorted(path.name for path in exported["hot"].iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "modeling_beagle.py",
    ]
    config = json.loads((exported["hot"] / "config.json").read_text())
    assert config["provenance"] == PROVENANCE and config["target"] == "a tiny one"
    assert (config["num_hot_tokens"], config["vocab_size"], config["num_key_value_heads"]) == (
        220,
        300,
        2,
    )
    card = (exported["hot"] / "README.md").read_text()
    for words in (
        "a tiny one",
        "answer_tokens_written 345",
        "early: steps 3, window 5",
        "optimizer muon",
        "plus 10.0 times the smooth-L1",
        "weighted [4, 3, 2, 1]",
        "jax 0.10.2",
        "220 tokens",
        f"torch {torch.__version__}",
        "Licence",
    ):
        assert words in card
    assert "private" not in card and "None" not in card
    text = (exported["hot"] / "modeling_beagle.py").read_text()
    assert "import beagle_jax" not in text and "from beagle_jax" not in text


def test_a_card_without_provenance_says_so():
    spec = DraftSpec(
        hidden_size=8,
        intermediate_size=8,
        num_heads=2,
        num_kv_heads=2,
        head_dim=4,
        rope_theta=1e4,
        rms_norm_eps=1e-5,
    )
    card = model_card(Draft(spec, {}, None, {"target": "hf:org/name", "imported_from": "x.bin"}))
    assert (
        "base_model: org/name\n" in card
        and card.count("not recorded") == 7
        and "- imported_from: x.bin" in card
    )
    assert "revision not recorded in training; 1a2b when exported" in model_card(
        Draft(spec, {}, None, {"target": "hf:org/name"}), None, "1a2b"
    )
    for told in ({"target": "hf:org/name@v1"}, {"target": "hf:org/name", "target_revision": "v1"}):
        assert "`, revision v1\n" in model_card(Draft(spec, {}, None, told), None, "1a2b")


@pytest.mark.parametrize("loss", get_args(get_type_hints(TrainConfig)["loss"]))
def test_the_card_names_the_loss_that_was_asked_for(place, loss):
    told = {**PROVENANCE, "training": {**PROVENANCE["training"], "loss": loss}}
    draft = Draft(load_draft(place.folder / "hot", place.target.spec).spec, {}, None, told)
    line = (
        model_card(draft)
        .partition("### Losses\n\n")[2]
        .partition(" the target's distribution, plus 10.0 times")[0]
    )
    assert (
        line
        == {
            "cross_entropy": "Soft cross-entropy with",
            "kl": "Kullback-Leibler divergence from",
            "reverse_kl": "Reverse Kullback-Leibler divergence from",
            "total_variation": "Total variation distance to",
            "lk_hybrid": "LK hybrid (Kullback-Leibler, then total variation) distance to",
        }[loss]
    )


def report_of(name: str) -> dict:
    """As report.schema.json says, without what a card does not show."""
    figures = {
        "tau": 1.6101,
        "tau_interval": [1.55, 1.674],
        "speedup": 1.124,
        "identical_to_plain": 39,
        "answers": 40,
    }
    suites = [
        {
            "name": suite,
            "groups": [{"by": "all", "prompts": 40, "systems": {"plain": {}, name: figures}}],
        }
        for suite in ("mt_bench", "gsm8k")
    ]
    systems = [{"name": "plain", "tree": "no draft"}, {"name": name, "tree": "chain of 3"}]
    return {"format": 1, "environment": {"machine": "cpu x"}, "systems": systems, "suites": suites}


def test_the_card_shows_what_was_measured(place, tmp_path, capsys):
    (tmp_path / "report.json").write_text(json.dumps(report_of("there")))
    assert to_torch(place, "hot", tmp_path / "out", "--report", str(tmp_path / "report.json")) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert (
        "chain of 3, on cpu x\n" in card
        and card.count("| 40 | 1.61 | 1.55 to 1.67 | 1.12x | 39/40 |") == 2
        and "| gsm8k |" in card
    )
    for text, expected in (
        ("{", "not JSON"),
        ("[]", "holds a JSON list"),
        ('{"a": 1}', "not a report"),
        ('{"format": 2}', "not a report of this version"),
        ('{"format": 1, "systems": []}', "not a report"),
    ):
        (tmp_path / "report.json").write_text(text)
        message = refused(
            capsys,
            to_torch(place, "hot", tmp_path / "other", "--report", str(tmp_path / "report.json")),
        )
        assert (
            f"{tmp_path}/report.json: {expected}" in message and not (tmp_path / "other").exists()
        )


# The comparison sees what is wrong


def change_module(monkeypatch, *changes: tuple[str, str]) -> str:
    """The exported module with some of its text changed; the message that must come."""
    right = wrong = torch_export.module_source("modeling_beagle")
    for old, new in changes:
        wrong = wrong.replace(old, new)
    assert wrong != right
    monkeypatch.setattr(torch_export, "module_source", lambda name: wrong)
    return "does not compute what the JAX block computes: states by"


def swapped_in_module(monkeypatch):
    """The module uses gate_proj and up_proj the wrong way round."""
    swap = (
        ("gate_proj(z", "temporary(z"),
        ("up_proj(z", "gate_proj(z"),
        ("temporary(z", "up_proj(z"),
    )
    return change_module(monkeypatch, *swap)


def late_keys(monkeypatch):
    """The module lets a query see the state at its own position."""
    return change_module(
        monkeypatch, ("positions_S[None] < positions_T", "positions_S[None] <= positions_T")
    )


def wrong_rows(monkeypatch):
    """The module scores the first tokens instead of the listed ones."""
    return change_module(
        monkeypatch, ("head_VD[self.hot_tokens.long()]", "head_VD[: len(self.hot_tokens)]")
    )


def swapped_in_file(monkeypatch):
    """The file holds keys and values the wrong way round."""
    write = torch_export.write_tensors

    def wrong(path, tensors):
        names = ("self_attn.k_proj.weight", "self_attn.v_proj.weight")
        write(path, {**tensors, names[0]: tensors[names[1]], names[1]: tensors[names[0]]})

    monkeypatch.setattr(torch_export, "write_tensors", wrong)
    return (
        "does not hold what the JAX draft holds (self_attn.k_proj.weight, self_attn.v_proj.weight)"
    )


@pytest.mark.parametrize("bug", [swapped_in_module, late_keys, wrong_rows, swapped_in_file])
@pytest.mark.parametrize("before", [False, True], ids=["new", "overwrite"])
def test_a_planted_bug_leaves_no_folder(place, tmp_path, monkeypatch, capsys, bug, before):
    if before:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "config.json").write_text('{"model_type": "beagle_draft"}')
    expected = bug(monkeypatch)
    status = to_torch(place, "hot", tmp_path / "out", "--overwrite")
    captured = capsys.readouterr()
    assert status == 1 and expected in captured.err and "draft written" not in captured.out
    assert [path.name for path in tmp_path.iterdir()] == ["out"] * before
    assert (
        not before
        or (tmp_path / "out" / "config.json").read_text() == '{"model_type": "beagle_draft"}'
    )


def test_without_torch_the_message_says_how_to_get_it(place, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    status = to_torch(place, "hot", tmp_path / "out")
    assert "PyTorch is not installed, and converting needs it: pip install torch" in refused(
        capsys, status
    )
    assert not any(tmp_path.iterdir())


# The output folder


def test_an_existing_folder_is_refused_or_replaced_as_a_whole(place, tmp_path, capsys):
    out = tmp_path / "new" / "out"
    assert to_torch(place, "hot", out) == 0
    (out / "stale.txt").write_text("left from before")
    assert "this folder exists; choose another, or give --overwrite" in refused(
        capsys, to_torch(place, "whole", out)
    )
    assert (out / "stale.txt").exists()
    assert to_torch(place, "whole", out, "--overwrite") == 0
    assert not (out / "stale.txt").exists() and "hot_tokens" not in load_file(
        out / "model.safetensors"
    )
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_overwriting_does_not_lose_other_things(place, exported, tmp_path, capsys):
    for source in (place.folder / "hot", place.folder):
        status = to_torch(place, "hot", source, "--overwrite")
        assert "what is to be converted is in this folder" in refused(capsys, status)
    status = from_torch(
        place, exported["hot"] / "model.safetensors", exported["hot"], "--overwrite"
    )
    assert "what is to be converted is in this folder" in refused(capsys, status)
    (tmp_path / "thesis.txt").write_text("years of work")
    for out in (tmp_path, place.folder / "target"):  # a target has a config.json too
        assert "nothing that convert or train wrote is in this folder" in refused(
            capsys, to_torch(place, "hot", out, "--overwrite")
        )
    assert (place.folder / "target" / "model.safetensors").exists()
    assert "there is a file of this name" in refused(
        capsys, to_torch(place, "hot", tmp_path / "thesis.txt", "--overwrite")
    )
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_folder_that_cannot_be_made_is_named(place, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    status = to_torch(place, "hot", tmp_path / "file" / "out")
    assert f"--out {tmp_path}/file/out: cannot be written" in refused(capsys, status)


@pytest.mark.parametrize("before", [False, True], ids=["new", "overwrite"])
def test_a_full_disk_leaves_no_half_folder(place, exported, tmp_path, capsys, before):
    """Both directions, and what was there stays."""
    if before:
        shutil.copytree(exported["hot"], tmp_path / "out")
    with small_disk(4000):
        statuses = [
            to_torch(place, "hot", tmp_path / "out", "--overwrite"),
            from_torch(place, exported["hot"], tmp_path / "out", "--overwrite"),
        ]
    message = refused(capsys, max(statuses))
    assert (
        statuses == [1, 1]
        and message.count("cannot be written (") == 2
        and message.count("free some space or choose another folder") == 2
    )
    assert [path.name for path in tmp_path.iterdir()] == ["out"] * before
    assert (
        not before
        or (tmp_path / "out" / "model.safetensors").read_bytes()
        == (exported["hot"] / "model.safetensors").read_bytes()
    )


def test_a_failed_rename_brings_the_old_folder_back(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("")
    right, calls = os.replace, []

    def second_fails(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise OSError("no")
        right(*arguments)

    monkeypatch.setattr(converting.os, "replace", second_fails)
    with pytest.raises(OSError, match="no"), converting.staged(tmp_path / "out") as folder:
        (folder / "new").write_text("")
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == [
        "out",
        "out/old",
    ]


# From PyTorch


@pytest.mark.parametrize("name", ["whole", "hot"])
@pytest.mark.parametrize("of", ["folder", "file"])
def test_a_round_trip_is_exact(place, exported, tmp_path, name, of):
    source = exported[name] if of == "folder" else exported[name] / "model.safetensors"
    assert from_torch(place, source, tmp_path / "back") == 0
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "back" / file).read_bytes() == (
            place.folder / name / file
        ).read_bytes(), file
    assert len(list((tmp_path / "back").iterdir())) == 2


def test_what_torch_saves_again_comes_back(place, exported, tmp_path):
    torch_draft(exported["hot"]).save_pretrained(tmp_path / "saved")
    assert from_torch(place, tmp_path / "saved", tmp_path / "back") == 0
    before, after = (
        load_file(folder / "model.safetensors")
        for folder in (place.folder / "hot", tmp_path / "back")
    )
    assert before.keys() == after.keys() and all(
        np.array_equal(before[name], after[name]) for name in before
    )
    assert json.loads((tmp_path / "back" / "config.json").read_text())["versions"] == {
        "jax": "0.10.2"
    }


def test_the_list_of_scored_tokens_may_not_be_lost(place, exported, tmp_path, capsys):
    tensors = load_file(exported["hot"] / "model.safetensors")
    del tensors["hot_tokens"]
    (tmp_path / "there").mkdir()
    save_file(tensors, tmp_path / "there" / "model.safetensors")
    (tmp_path / "there" / "config.json").write_bytes((exported["hot"] / "config.json").read_bytes())
    assert "missing tensor hot_tokens [220]" in refused(
        capsys, from_torch(place, tmp_path / "there", tmp_path / "here")
    )


# The command


def test_drafts_of_another_target_are_refused(place, exported, tmp_path, capsys):
    make_target(tmp_path / "target")
    settings = json.loads((tmp_path / "target" / "config.json").read_text())
    (tmp_path / "target" / "config.json").write_text(
        json.dumps({**settings, "num_key_value_heads": 4})
    )
    other = f"target.source={tmp_path / 'target'}"
    for status in (
        to_torch(place, "hot", tmp_path / "out", other),
        from_torch(place, exported["hot"], tmp_path / "out", other),
    ):
        assert status == 1
    message = refused(capsys, status)
    assert (
        message.count("this draft belongs to another target (num_k") == 2
        and not (tmp_path / "out").exists()
    )


def test_a_draft_of_another_public_target_is_refused(place, tmp_path, capsys, monkeypatch):
    """Two targets may have one shape: their names tell them apart, those of folders do not."""
    draft = load_draft(place.folder / "hot", place.target.spec)
    monkeypatch.setattr(converting, "open_source", lambda *_: HFFolder(place.folder / "target"))
    for told, asked, refuses in (
        ("hf:org/chat", "hf:org/code", True),
        ("hf:org/chat@v1", "hf:org/chat@v2", True),
        ("hf:org/chat", "hf:org/chat@v2", False),
        ("hf:org/chat", "a/folder", False),
    ):
        source = tmp_path / "native"
        save_draft(source, replace(draft, provenance={**PROVENANCE, "target": told}))
        status = to_torch(place, source, tmp_path / "out", f"target.source={asked}", "--overwrite")
        assert status == refuses
        if refuses:
            assert (
                f"{source}: this draft belongs to another target ({told}, and target.source is "
                f"{asked})" in refused(capsys, status)
            )
        else:
            assert (
                from_torch(
                    place,
                    tmp_path / "out",
                    tmp_path / "back",
                    f"target.source={asked}",
                    "--overwrite",
                )
                == 0
            )
            other = from_torch(
                place,
                tmp_path / "out",
                tmp_path / "back",
                "target.source=hf:org/code",
                "--overwrite",
            )
            assert "this draft belongs to another target (hf:org/chat" in refused(capsys, other)


@pytest.mark.parametrize("of", ["native", "torch"])
def test_a_changed_bit_is_noticed(place, exported, tmp_path, capsys, of):
    folder = tmp_path / "there"
    shutil.copytree(place.folder / "hot" if of == "native" else exported["hot"], folder)
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[len(weights) // 2] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    status = (
        to_torch(place, folder, tmp_path / "out")
        if of == "native"
        else from_torch(place, folder, tmp_path / "out")
    )
    assert (
        f"{folder}: settings and tensors are not those that config.json was written with"
        in refused(capsys, status)
    )


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], "arguments are required: --config"),
        (["to-torch", "--config", "x"], "arguments are required: --out"),
        (["sideways", "--config", "x", "--out", "y"], "invalid choice: 'sideways'"),
        (
            ["to-torch", "--config", "x", "--out", "y", "--source", "z"],
            "--source is not an option of to-torch",
        ),
        (
            ["from-torch", "--config", "x", "--out", "y", "--source", "z", "--report", "r"],
            "--report is not an option of from-torch",
        ),
        (["from-torch", "--config", "x", "--out", "y"], "from-torch needs --source"),
    ],
)
def test_usage(capsys, argv, expected):
    status = run_main(convert.main, argv)
    assert status == 2 and expected in refused(capsys, status)


def test_the_draft_of_the_training_folder_is_the_default(place, tmp_path, capsys):
    status = run_main(
        convert.main, ["to-torch", "--config", place.config, "--out", str(tmp_path / "out")]
    )
    assert f"{place.folder}/draft/config.json: no such file; train a draft first" in refused(
        capsys, status
    )


def test_help_shows_an_example(capsys):
    with pytest.raises(SystemExit):
        run_main(convert.main, ["--help"])
    assert (
        "example:\n  python -m beagle_jax.convert --config configs/smollm2_135m.yaml to-torch --out"
        in capsys.readouterr().out
    )
