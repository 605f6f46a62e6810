"""The exported torch module decodes as this library does: every tree, drawn answers, batches."""

import sys

import jax
import numpy as np
import pytest
import torch
from convert_cases import exported, place, torch_draft  # noqa: F401 (fixtures)

from beagle_jax.decoding.decoder import SpeculativeDecoder
from beagle_jax.decoding.sampling import Sampling, filtered, gumbel
from beagle_jax.decoding.tree import chain, dynamic_tree, static_tree
from beagle_jax.weights import modeling_sampling
from beagle_jax.weights.draft import load_draft

PATHS = ((0,), (1,), (2,), (0, 0), (0, 1), (2, 0), (0, 1, 0), (0, 1, 2))
TREES = {
    "chain": (chain(3), {"levels": 3}),
    "static": (static_tree(PATHS), {"paths": PATHS}),
    "dynamic": (dynamic_tree(3, 3, 7), {"dynamic": (3, 3, 7)}),
}
PROMPTS = [[7], [40, 5, 5, 211, 90], list(range(100, 150))]
DRAWN = {
    "all tokens": {"temperature": 1.2},
    "filtered": {"temperature": 0.9, "top_k": 40, "top_p": 0.8},
    "shares": {"temperature": 1.0, "top_p": 0.9, "min_p": 0.01},
}
NEW = 20


def by_jax(place, tree: str, draft: str = "whole", seed: int = 0, **options) -> list:
    """Answers of this library, each with its tokens and rounds; computed once for all tests."""
    known = vars(place).setdefault("answers", {})
    key = (tree, draft, seed, *options.items())
    if key not in known:
        decoders = vars(place).setdefault("decoders", {})
        if (tree, draft) not in decoders:
            made = load_draft(place.folder / draft, place.target.spec)
            decoders[tree, draft] = SpeculativeDecoder(place.target, made, TREES[tree][0])
        answers = decoders[tree, draft].generate(
            PROMPTS, Sampling(**options), max_new_tokens=NEW, seed=seed
        )
        known[key] = [(answer.tokens, answer.rounds) for answer in answers]
    return known[key]


def batch(side: str) -> dict[str, torch.Tensor]:
    """The prompts as one padded batch."""
    longest = max(map(len, PROMPTS))
    rows, masks = [], []
    for prompt in PROMPTS:
        padding = [0] * (longest - len(prompt))
        ones = [1] * len(prompt)
        rows.append(padding + prompt if side == "left" else prompt + padding)
        masks.append(padding + ones if side == "left" else ones + padding)
    return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(masks)}


def by_torch(place, exported, tree: str, draft: str = "whole", side: str = "left", **options):
    """Answers of the exported module to all prompts in one batch."""
    answer = torch_draft(exported[draft]).generate(
        place.model, **batch(side), max_new_tokens=NEW, **TREES[tree][1], **options
    )
    return list(zip(answer.answers, answer.row_rounds, strict=True))


@pytest.mark.parametrize(
    ("draft", "tree", "side"),
    [
        ("whole", "chain", "left"),
        ("hot", "static", "right"),
        ("whole", "dynamic", "right"),
        ("hot", "dynamic", "left"),
    ],
)
def test_a_batch_is_answered_as_here(place, exported, draft, tree, side):
    expected = by_jax(place, tree, draft)
    assert by_torch(place, exported, tree, draft, side) == expected
    assert min(rounds for _, rounds in expected) < NEW - 2, "some drafts must be accepted"


@pytest.mark.parametrize("tree", TREES)
def test_one_prompt_takes_the_rounds_that_it_takes_here(place, exported, tree):
    module, expected = torch_draft(exported["whole"]), by_jax(place, tree)
    for prompt, (tokens, rounds) in zip(PROMPTS, expected, strict=True):
        ids = torch.tensor([prompt])
        answer = module.generate(place.model, ids, max_new_tokens=NEW, **TREES[tree][1])
        assert answer.sequences[0].tolist() == prompt + tokens and answer.rounds == rounds


@pytest.mark.parametrize(
    ("tree", "name"), [("static", "all tokens"), ("dynamic", "filtered"), ("chain", "shares")]
)
def test_drawn_answers_are_the_same(place, exported, tree, name):
    """The same noise: prompt n draws with seed + n, in both."""
    options = DRAWN[name]
    expected = by_jax(place, tree, seed=5, **options)
    assert by_torch(place, exported, tree, seed=5, **options) == expected
    assert by_jax(place, tree, seed=6, **options) != expected


def test_rows_end_on_their_own(place, exported):
    """A row that has ended keeps its answer while others go on; sequences are padded behind."""
    [first, *_] = whole = by_jax(place, "static")
    stop = first[0][4]
    module = torch_draft(exported["whole"])
    answer = module.generate(
        place.model, **batch("left"), max_new_tokens=NEW, paths=PATHS, eos_token_ids=[stop]
    )
    for tokens, (complete, _) in zip(answer.answers, whole, strict=True):
        end = complete.index(stop) + 1 if stop in complete else NEW
        assert tokens == complete[:end]
    assert len(answer.answers[0]) <= 5 < max(map(len, answer.answers))
    assert answer.rounds == max(answer.row_rounds) > min(answer.row_rounds)
    for prompt, tokens, row in zip(PROMPTS, answer.answers, answer.sequences.tolist(), strict=True):
        assert row[: len(prompt) + len(tokens)] == prompt + tokens
        assert set(row[len(prompt) + len(tokens) :]) <= {0}


# Planted bugs


def modules(exported):
    """The modules of the exported folder that transformers loaded."""
    name = type(torch_draft(exported["whole"])).__module__.rpartition(".")[0]
    return {
        part: sys.modules[f"{name}.modeling_{part}"] for part in ("decoding", "sampling", "tree")
    }


def test_a_batch_that_sees_its_padding_writes_something_else(place, exported, monkeypatch):
    kind = modules(exported)["decoding"].Decoding
    right = kind._verified

    def wrong(self, nodes):
        lengths, self.lengths = self.lengths, [max(self.lengths)] * len(self.lengths)
        out = right(self, nodes)
        self.lengths = lengths
        return out

    monkeypatch.setattr(kind, "_verified", wrong)
    assert by_torch(place, exported, "static") != by_jax(place, "static")


def test_nodes_that_see_their_siblings_write_something_else(place, exported, monkeypatch):
    growth = modules(exported)["tree"].Growth
    right = growth.nodes

    def wrong(self, tree):
        nodes = right(self, tree)
        return nodes._replace(above_BWW=torch.ones_like(nodes.above_BWW).tril())

    monkeypatch.setattr(growth, "nodes", wrong)
    assert by_torch(place, exported, "static") != by_jax(place, "static")


def test_a_tree_without_scores_takes_other_rounds(place, exported, monkeypatch):
    """A dynamic tree of the first candidates: the answers stay right."""
    tree = modules(exported)["tree"]
    monkeypatch.setattr(
        tree, "_best", lambda score_BA, count: torch.arange(count).expand(len(score_BA), -1)
    )
    wrong, right = by_torch(place, exported, "dynamic"), by_jax(place, "dynamic")
    assert [tokens for tokens, _ in wrong] == [tokens for tokens, _ in right]
    assert [rounds for _, rounds in wrong] != [rounds for _, rounds in right]


@pytest.mark.parametrize("bug", ["the place", "the row"])
def test_noise_that_forgets_something_draws_other_answers(place, exported, monkeypatch, bug):
    sampling = modules(exported)["sampling"]
    right = sampling._key_of

    def wrong(seed, place):
        return right(seed, 0) if bug == "the place" else right(5, place)

    monkeypatch.setattr(sampling, "_key_of", wrong)
    options = {"seed": 5, **DRAWN["all tokens"]}
    assert by_torch(place, exported, "static", **options) != by_jax(place, "static", **options)


# The noise and the filters


def test_the_noise_is_that_of_jax():
    for seed, place_in_answer in ((0, 0), (7, 3), (2**31 + 5, 100)):
        key = jax.random.key(np.uint32(seed))
        key = jax.random.fold_in(jax.random.fold_in(key, 0), place_in_answer)
        expected = gumbel(key.reshape(1, 1), 500)[0]
        ours = modeling_sampling.gumbel(
            torch.tensor([modeling_sampling._key_of(seed, place_in_answer)]), 500
        )
        np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bug", [None, 13])
def test_the_generator_has_its_published_answers(monkeypatch, bug):
    """Of the generator's authors, for two keys and counters; a rotation is the planted bug."""
    if bug:
        monkeypatch.setattr(modeling_sampling, "_ROTATIONS", ((bug, 15, 26, 7), (17, 29, 16, 24)))
    ones = 0xFFFFFFFF
    known = {(0, 0, 0, 0): (0x6B200159, 0x99BA4EFE), (ones,) * 4: (0x1CB996FC, 0xBB002BE7)}
    for words, expected in known.items():
        out = modeling_sampling._threefry(*map(torch.tensor, words))
        assert (tuple(map(int, out)) == expected) == (bug is None)


@pytest.mark.parametrize(
    "options",
    [*DRAWN.values(), {"temperature": 0.5, "min_p": 0.2, "top_k": 3}],
    ids=[*DRAWN, "few"],
)
def test_the_filters_are_those_of_jax(options):
    logits_MV = np.random.default_rng(0).standard_normal((4, 120)).astype(np.float32) * 3
    logits_MV[:, 5] = logits_MV[:, 6]  # equal tokens are kept together
    ours = modeling_sampling.Sampling(**options).filtered(torch.from_numpy(logits_MV))
    expected = np.asarray(filtered(logits_MV, Sampling(**options)))
    np.testing.assert_array_equal(np.isfinite(ours.numpy()), np.isfinite(expected))
    finite = np.isfinite(expected)
    np.testing.assert_allclose(ours.numpy()[finite], expected[finite], rtol=1e-6)
