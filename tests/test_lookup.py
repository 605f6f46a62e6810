"""Prompt lookup: drafts against a search through Python lists, answers against plain decoding."""

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY
from decode_cases import MARKOV, naive_greedy, run, target_of

from beagle_jax.config import load_config
from beagle_jax.decoding import session as session_module
from beagle_jax.decoding.build import decoder_of, drafter_of
from beagle_jax.decoding.decoder import SpeculativeDecoder
from beagle_jax.decoding.lookup import Lookup, lookup_chain
from beagle_jax.decoding.round import Round
from beagle_jax.decoding.sampling import Sampling
from beagle_jax.decoding.tree import chain, dynamic_tree
from beagle_jax.errors import UserError

DEPTH = 4


def search(text: list[int], ngram: int, depth: int = DEPTH) -> list[int]:
    """Searches by hand: the longest run first, and the latest one of each length.

    A text that ends in its own period continues with it.
    """
    period = 1
    for size in range(min(ngram, len(text) - 1), 0, -1):
        ends = [end for end in range(size, len(text)) if text[end - size : end] == text[-size:]]
        if ends:
            period = len(text) - ends[-1]
            break
    longer = list(text)
    for _ in range(depth):
        longer.append(longer[-period])
    return longer[len(text) :]


def texts(count: int = 300):
    """Makes texts of few letters, so that runs repeat, with garbage after their end."""
    rng = np.random.default_rng(0)
    width, lengths = 24, rng.integers(1, 21, count)
    return rng.integers(0, 3, (count, width)), lengths


@pytest.mark.parametrize("ngram", [1, 2, 3, 5])
def test_the_chain_is_what_a_search_finds(ngram):
    rows, lengths = texts()
    nodes = lookup_chain(jnp.asarray(rows), jnp.asarray(lengths - 1), ngram, DEPTH)
    for row, length, node_tokens in zip(
        rows.tolist(), lengths, np.asarray(nodes.token_BW).tolist(), strict=True
    ):
        assert node_tokens == [row[length - 1], *search(row[:length], ngram)]
    assert nodes.parent_BW[0].tolist() == [0, 0, 1, 2, 3] and nodes.depth_BW[0].tolist() == [
        0,
        1,
        2,
        3,
        4,
    ]
    assert np.array_equal(nodes.above_BWW[0], np.tril(np.ones((5, 5), bool)))


def test_planted_bug_a_length_off_by_one_is_seen():
    rows, lengths = texts()
    nodes = lookup_chain(jnp.asarray(rows), jnp.asarray(lengths), 3, DEPTH)

    def compare():
        for row, length, node_tokens in zip(
            rows.tolist(), lengths, np.asarray(nodes.token_BW).tolist(), strict=True
        ):
            assert node_tokens == [row[length - 1], *search(row[:length], 3)]

    with pytest.raises(AssertionError):
        compare()


def test_the_drawn_example():
    text = jnp.array([[ord(letter) for letter in "abcxabc???"]])
    suggested = lookup_chain(text, jnp.array([6]), 3, 3).token_BW[0, 1:]
    assert "".join(map(chr, suggested.tolist())) == "xab"


@pytest.mark.parametrize(
    ("spec", "sampling"),
    [(TINY, Sampling()), (MARKOV, Sampling(0.5, top_k=8))],
    ids=["greedy", "drawn"],
)
def test_output_is_that_of_plain_decoding(spec, sampling):
    target, prompts = target_of(spec), [[5], [7, 8, 9, 7, 8], list(range(50)) * 2]
    fast = SpeculativeDecoder(target, Lookup(), chain(3)).generate(
        prompts, sampling, max_new_tokens=40, seed=2
    )
    plain = SpeculativeDecoder(target).generate(prompts, sampling, max_new_tokens=40, seed=2)
    assert [answer.tokens for answer in fast] == [answer.tokens for answer in plain]
    if sampling.greedy:
        assert fast[0].tokens == naive_greedy(target, prompts[0], 40)


def test_a_text_that_repeats_itself_is_looked_up():
    """If the next token depends on the last one alone, the text repeats.

    Most rounds then give four tokens.
    """
    [answer] = SpeculativeDecoder(target_of(MARKOV), Lookup(), chain(3)).generate(
        [[5]], max_new_tokens=150
    )
    assert answer.tau > 2.5


def _check_text(monkeypatch, **parts) -> None:
    monkeypatch.setattr(session_module, "PREFILL_CHUNK", 64)
    target, prompt = target_of(), np.random.default_rng(0).integers(0, 61, 150).tolist()
    decoder = SpeculativeDecoder(target, Lookup(), chain(3)).with_(**parts)
    now, state = decoder.prefilled([prompt], max_new_tokens=20)
    for rounds in (0, 3, 100):
        state, after = run(now, state, rounds)
        length, count = int(state.cache.length_B[0]), int(after.count_B[0])
        known = np.asarray(state.draft)[0, : length + 1].tolist()
        whole = prompt + np.asarray(after.out_BS)[0, :count].tolist()
        assert known[: len(whole)] == whole and known[-1] == int(state.transcript.root_B[0])
    assert whole == prompt + naive_greedy(target, prompt, 20)


def test_the_text_is_kept_over_chunks_and_rounds(monkeypatch):
    _check_text(monkeypatch)


def test_planted_bug_rejected_drafts_left_in_the_text(monkeypatch):
    """The output stays right; the text to search is no longer what was written."""

    def wrong(now, state, *rest):
        after = Round.append(now, state, *rest)
        return after._replace(draft=after.draft.at[0, state.cache.length_B[0] + 1].add(1))

    with pytest.raises(AssertionError):
        _check_text(monkeypatch, append=wrong)


def test_what_lookup_cannot_do():
    with pytest.raises(
        UserError,
        match="prompt lookup drafts a chain without probabilities, but got a dynamic tree",
    ):
        SpeculativeDecoder(target_of(), Lookup(), dynamic_tree(2, 2, 4))
    with pytest.raises(UserError, match="and rule 'ratio'"):
        SpeculativeDecoder(target_of(), Lookup(), chain(2), rule="ratio")


@pytest.mark.parametrize(
    ("tree", "drafted"),
    [("tree: chain, levels: 4", 4), ("tree: dynamic, nodes: 7", 6), ("tree: auto, levels: 2", 2)],
)
def test_a_config_asks_for_it(tmp_path, tree, drafted):
    (tmp_path / "c.yaml").write_text(
        f"target: {{source: test}}\ndraft: {{path: lookup}}\ndecode: {{{tree}, ngram: 2}}\n"
    )
    config, target = load_config(tmp_path / "c.yaml"), target_of()
    assert drafter_of(config, target) == Lookup(2)
    decoder = decoder_of(config, target, drafter_of(config, target))
    assert decoder.tree == chain(drafted)


@pytest.mark.parametrize(
    ("decode", "drafted"),
    [("tree: chain, levels: 4", 6), ("tree: dynamic, nodes: 7", 8), ("tree: auto, levels: 2", 4)],
)
def test_compared_with_a_draft_it_drafts_the_looked_up_nodes_too(tmp_path, decode, drafted):
    (tmp_path / "c.yaml").write_text(
        f"target: {{source: test}}\neval: {{compare: [lookup]}}\n"
        f"decode: {{{decode}, ngram: 2, lookup_nodes: 2}}\n"
    )
    config, target = load_config(tmp_path / "c.yaml"), target_of()
    assert decoder_of(config, target, drafter_of(config, target, "lookup")).tree == chain(drafted)
