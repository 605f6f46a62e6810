"""Drafts to PyTorch and back: same states, same answers, same bits; bad drafts are refused."""

import json
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from convert_cases import PROVENANCE, exported, place, refused, to_torch, torch_draft  # noqa: F401 (fixtures)
from transformers import AutoModel, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from beagle_jax.config import TrainConfig
from beagle_jax.decoding.decoder import SpeculativeDecoder
from beagle_jax.decoding.draft import grow
from beagle_jax.decoding.drafter import Known
from beagle_jax.decoding.trained import BeagleDrafter, DraftHead
from beagle_jax.decoding.tree import chain, static_tree
from beagle_jax.model.beagle import BeagleBlock, BeagleSpec
from beagle_jax.weights.draft import Draft, load_draft
from beagle_jax.weights.model_card import model_card

PATHS = ((0,), (1,), (2,), (0, 0), (0, 1), (2, 0), (0, 1, 0), (0, 1, 2))
TREES = {"chain": (chain(4), {"levels": 4}), "static": (static_tree(PATHS), {"paths": PATHS})}
PROMPTS = [[7], [40, 5, 5, 211, 90], list(range(100, 150))]


# To PyTorch


@pytest.mark.parametrize("name", ["whole", "hot"])
def test_torch_predicts_the_states_and_logits_of_jax(place, exported, name):
    draft, module = load_draft(place.folder / name, place.target.spec), torch_draft(exported[name])
    rng = np.random.default_rng(5)
    e_BTD, h_BSD = rng.standard_normal((2, 2, 12, draft.spec.hidden_size), np.float32)
    mask_BTS = rng.random((2, 12, 12)) < 0.4
    mask_BTS[:, 3] = False  # a query that sees nothing
    with torch.no_grad():
        predicted_BTD = module(
            torch.from_numpy(e_BTD), torch.from_numpy(h_BSD), torch.from_numpy(mask_BTS)
        )
        logits = predicted_BTD @ module.head_rows(place.model.lm_head.weight).T
    expected = BeagleBlock(draft.spec).apply({"params": draft.params}, e_BTD, h_BSD, mask_BTS)
    np.testing.assert_allclose(predicted_BTD.numpy(), expected, rtol=1e-5, atol=1e-5)
    rows_VD = (
        place.target.params["head_VD"]
        if draft.hot_ids is None
        else place.target.params["head_VD"][draft.hot_ids]
    )
    # A sum of products over D.
    np.testing.assert_allclose(logits.numpy(), expected @ rows_VD.T, rtol=1e-5, atol=1e-4)
    assert np.abs(predicted_BTD.numpy() - e_BTD).max() > 0.1


@pytest.mark.parametrize(("name", "tree"), [("whole", "static"), ("hot", "chain")])
def test_torch_writes_what_jax_and_plain_decoding_write(place, exported, name, tree):
    shape, options = TREES[tree]
    fast = SpeculativeDecoder(
        place.target, load_draft(place.folder / name, place.target.spec), shape
    )
    module = torch_draft(exported[name])
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        torch_answer = module.generate(place.model, ids, max_new_tokens=24, **options)
        [jax_answer] = fast.generate([prompt], max_new_tokens=24)
        [plain] = place.plain.generate([prompt], max_new_tokens=24)
        theirs = place.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False
        )
        assert (
            torch_answer.sequences[0].tolist()
            == prompt + jax_answer.tokens
            == prompt + plain.tokens
            == theirs[0].tolist()
        )
        assert torch_answer.rounds == jax_answer.rounds < len(plain.tokens) - 1
        assert sum(jax_answer.accepted[1:]) > 1, (
            "the draft must be right sometimes, else acceptance is not tested"
        )


grown = jax.jit(grow, static_argnums=3)


def drafted(place, exported) -> tuple[list[list[int]], list[list[int]]]:
    """Returns what torch, with its own tree class, and JAX draft below ten roots.

    The states are random.
    """
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
    drafter = BeagleDrafter(draft.spec, draft.params, params["embed_VD"], head)
    known = Known(jnp.asarray(roots), jnp.full(10, 6))
    drafted_tree = grown(drafter, cache, known, static_tree(PATHS))
    rows_VD, embed = (
        module.head_rows(place.model.lm_head.weight),
        place.model.get_input_embeddings(),
    )
    true = module.keys_values(torch.from_numpy(h_BSD), torch.arange(6))
    tree = sys.modules[type(module).__module__].Tree(PATHS)
    lengths_B = torch.full((10,), 6)
    nodes = module.draft(tree, torch.from_numpy(roots).long(), true, lengths_B, embed, rows_VD)
    return nodes.token_BW.tolist(), drafted_tree.nodes.token_BW.tolist()


def test_torch_drafts_the_nodes_that_jax_drafts(place, exported):
    by_torch, expected = drafted(place, exported)
    assert by_torch == expected


@pytest.mark.parametrize(
    "bug", ["siblings are seen", "parents are not seen", "a level is appended late"]
)
def test_wrong_drafting_shows_in_the_nodes(place, exported, monkeypatch, bug):
    """Bugs planted in the test above: in the mask of the queries' own keys, after six states."""
    kind = type(torch_draft(exported["hot"]))
    right = kind.predict

    def wrong(self, e_BTD, q_BNTH, memory, mask):
        mask = mask.clone()
        if bug == "siblings are seen":
            mask[..., 6:] = True
        elif bug == "parents are not seen":
            mask[..., 6:] = False
        else:  # the last level has one query, or two
            mask[..., 6 if mask.shape[-1] == 7 else 7 :] = False
        return right(self, e_BTD, q_BNTH, memory, mask)

    monkeypatch.setattr(kind, "predict", wrong)
    by_torch, expected = drafted(place, exported)
    assert by_torch != expected


def test_states_are_the_last_hidden_states_after_the_norm(place):
    """`generate` takes what the head reads as states, which is `hidden_states[-1]` of a Llama."""
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
        ([[]], {}, "input_ids has shape \\[1, 0\\]"),
        ([[1]], {"attention_mask": torch.ones(1, 2)}, "attention_mask has shape \\[1, 2\\]"),
        ([[1]], {"attention_mask": torch.zeros(1, 1)}, "leaves a prompt without a token"),
        ([[1]], {"paths": PATHS, "dynamic": (2, 2, 4)}, "both paths and dynamic are given"),
        ([[1]], {"dynamic": (2, 2, 9)}, "9 nodes; 2 levels of topk 2 make 2 to 7"),
        ([[1]], {"temperature": -1.0}, "temperature is -1.0; expected 0"),
        ([[1]], {"temperature": 1.0, "top_p": 0.0}, "top_p is 0.0; expected a share above 0"),
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
        "modeling_decoding.py",
        "modeling_sampling.py",
        "modeling_tree.py",
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
    spec = BeagleSpec(
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
    for provenance in (
        {"target": "hf:org/name@v1"},
        {"target": "hf:org/name", "target_revision": "v1"},
    ):
        assert "`, revision v1\n" in model_card(Draft(spec, {}, None, provenance), None, "1a2b")


@pytest.mark.parametrize("loss", get_args(get_type_hints(TrainConfig)["loss"]))
def test_the_card_names_the_loss_that_was_asked_for(place, loss):
    provenance = {**PROVENANCE, "training": {**PROVENANCE["training"], "loss": loss}}
    draft = Draft(load_draft(place.folder / "hot", place.target.spec).spec, {}, None, provenance)
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
    """The report of version 0.1.0 with another draft's figures, on two suites."""
    frozen = Path(__file__).parent / "frozen" / "0.1.0" / "evaluation" / "report.json"
    report = json.loads(frozen.read_text())
    report["environment"]["machine"] = "cpu x"
    report["systems"][1] |= {"name": name, "tree": "chain of 3"}
    [suite] = report["suites"]
    plain, figures = suite["groups"][0]["systems"].values()
    figures |= {
        "tau": 1.6101,
        "tau_interval": [1.55, 1.674],
        "speedup": 1.124,
        "identical_to_plain": 39,
        "answers": 40,
    }
    group = {"by": "all", "of": "", "prompts": 40, "systems": {"plain": plain, name: figures}}
    suites = [suite | {"name": title, "groups": [group]} for title in ("mt_bench", "gsm8k")]
    return report | {"suites": suites}


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
