"""What a request may ask of its logits and its end, in trees as in plain decoding: bias, penalties,
minimum length, end tokens, several answers, log-probabilities.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import TINY, slow_but
from decode_cases import MARKOV, letters, random_draft, right_draft, right_eagle, target_of
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
)

from beagle_jax.decoding.decoder import SpeculativeDecoder
from beagle_jax.decoding.lookup import Lookup
from beagle_jax.decoding.penalties import edited
from beagle_jax.decoding.round import Round
from beagle_jax.decoding.sampling import Sampling, filtered, filters_of
from beagle_jax.decoding.tree import ROOT_ONLY, chain, dynamic_tree, static_tree
from beagle_jax.errors import UsageError, UserError
from beagle_jax.evaluation.measure import CompileCounter
from beagle_jax.model.masks import causal_mask
from beagle_jax.model.target import forward, logits

PROMPTS = [[5, 9, 5, 7], [11], [3, 3, 3, 40, 2, 8]]
NEW = 24
PENALTIES = {
    "repetition": dict(repetition_penalty=1.7),
    "presence": dict(presence_penalty=1.5),
    "frequency": dict(frequency_penalty=0.9),
    "rewarded": dict(frequency_penalty=-3.0),
    "bias": dict(logit_bias={4: 3.0, 17: -100.0, 30: 2.5}),
    "all": dict(
        repetition_penalty=1.2, presence_penalty=0.4, frequency_penalty=0.3, logit_bias={7: 1.0}
    ),
}
DRAWN = dict(temperature=0.9, top_k=30, min_p=0.02)
# drafts that are mostly right for MARKOV, so that paths are accepted
SYSTEMS = {
    "chain": (right_draft, chain(3)),
    "static": (right_draft, static_tree([(0,), (1,), (0, 0), (1, 0)])),
    "dynamic": (right_draft, dynamic_tree(3, 3, 8)),
    "eagle": (right_eagle, dynamic_tree(2, 2, 5)),
    "lookup": (Lookup, chain(2)),
}


@partial(jax.jit, static_argnums=1)
def _all_logits(params, spec, token_1T, length_1) -> jax.Array:
    width = token_1T.shape[1]
    mask_1TT = causal_mask(length_1, width)
    output = forward(params, spec, token_1T, jnp.arange(width)[None], mask_1TT)
    return logits(params, spec, output.states_BTD)[0]


def _text_logits(target, tokens: list[int]) -> np.ndarray:
    """The target's logits after a text, in one pass over all of it."""
    width = -(-len(tokens) // 64) * 64  # few widths, so that few programs are compiled
    padded_1T = np.array([tokens + [0] * (width - len(tokens))], np.int32)
    all_TV = _all_logits(target.params, target.spec, padded_1T, np.array([len(tokens)]))
    return np.asarray(all_TV[len(tokens) - 1])


def _edited_as_published(
    raw_V: np.ndarray, prompt: list[int], answer: list[int], sampling: Sampling
) -> np.ndarray:
    """Bias, transformers' repetition penalty, and the other two as OpenAI's reference has them."""
    scores_V = torch.tensor(raw_V.copy())
    for token, bias in (sampling.logit_bias or {}).items():
        scores_V[token] += bias
    if sampling.repetition_penalty != 1:
        penalise = RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)
        scores_V = penalise(torch.tensor([prompt + answer]), scores_V[None])[0]
    for token in set(answer):
        scores_V[token] -= sampling.frequency_penalty * answer.count(token)
        scores_V[token] -= sampling.presence_penalty
    return scores_V.numpy()


def _greedy_as_published(target, prompt: list[int], sampling: Sampling) -> list[int]:
    answer: list[int] = []
    for _ in range(NEW):
        raw_V = _text_logits(target, prompt + answer)
        answer.append(int(_edited_as_published(raw_V, prompt, answer, sampling).argmax()))
    return answer


def test_plain_greedy_decoding_edits_logits_as_others_do():
    target = target_of()
    decoder = SpeculativeDecoder(target, context=128)
    samplings = [Sampling(**settings) for settings in PENALTIES.values()]
    answers = decoder.generate(PROMPTS[:1] * len(samplings), samplings, max_new_tokens=NEW)
    [unedited] = decoder.generate(PROMPTS[:1], max_new_tokens=NEW)
    for sampling, answer in zip(samplings, answers, strict=True):
        assert answer.tokens == _greedy_as_published(target, PROMPTS[0], sampling)
        assert answer.tokens != unedited.tokens


def _answers(decoder: SpeculativeDecoder, sampling: Sampling, **options) -> list[list[int]]:
    ask = dict(max_new_tokens=NEW, batch=2, seed=5) | options
    return [answer.tokens for answer in decoder.generate(PROMPTS * 2, sampling, **ask)]


@pytest.mark.parametrize("name", slow_but(["dynamic"], list(SYSTEMS)))
def test_trees_write_what_plain_decoding_writes_under_all_penalties(name):
    kind, tree = SYSTEMS[name]
    target = target_of(MARKOV)
    draft = Lookup() if kind is Lookup else kind(0.02)
    fast = SpeculativeDecoder(target, draft, tree, context=128)
    plain = SpeculativeDecoder(target, context=128)
    # With some bias and penalty always, so that all settings share two programs.
    for settings in PENALTIES.values():
        for drawn in ({}, DRAWN):
            all_kinds = dict(presence_penalty=0.1, logit_bias={1: 0.5}) | settings | drawn
            sampling = Sampling(**all_kinds)
            assert _answers(fast, sampling) == _answers(plain, sampling)


def test_a_tree_whose_nodes_share_one_count_is_caught():
    """The planted bug: penalties see the text before the round, and not each node's path."""

    def shared(now, requests, raw, place, history, nodes):
        return Round.edit(now, requests, raw, place, history, None)

    # A reward for what was written: a drafted token raises its own chance.
    target, sampling = target_of(MARKOV), Sampling(frequency_penalty=-3.0)
    fast = SpeculativeDecoder(target, right_draft(0.02), chain(3), context=128)
    plain = _answers(SpeculativeDecoder(target, context=128), sampling)
    assert _answers(fast, sampling) == plain
    assert _answers(fast.with_(edit=shared), sampling) != plain


def test_penalties_are_exact_under_the_ratio_rule():
    """The joint distribution of an answer's second and third token is the target's own."""
    target = target_of(MARKOV, seed=3)
    sampling = Sampling(1.0, top_k=4, frequency_penalty=-2.0)
    decoder = SpeculativeDecoder(target, right_draft(0.3), chain(2), rule="ratio", context=64)
    count = 1500
    answers = decoder.generate([[5]] * count, sampling, max_new_tokens=3, batch=500)
    seen = np.zeros((TINY.vocab_size,) * 2)
    for answer in answers:
        seen[answer.tokens[1], answer.tokens[2]] += 1 / count

    def joint(sampling: Sampling) -> np.ndarray:
        chances = np.zeros_like(seen)
        for first, p in _next_tokens(target, [], sampling):
            for second, q in _next_tokens(target, [first], sampling):
                for third, r in _next_tokens(target, [first, second], sampling):
                    chances[second, third] += p * q * r
        return chances

    expected = joint(sampling)
    # By chance alone the distance is at most sqrt(cells / count) on average (Cauchy-Schwarz).
    reach = 1.5 * np.sqrt((expected > 0).sum() / count)
    assert np.abs(seen - expected).sum() < reach
    assert np.abs(seen - joint(sampling._replace(frequency_penalty=0.0))).sum() > reach


def _next_tokens(target, answer: list[int], sampling: Sampling) -> list[tuple[int, float]]:
    """The tokens that may come next, and their probabilities."""
    raw_V = _text_logits(target, [5, *answer])
    edited_V = _edited_as_published(raw_V, [5], answer, sampling)
    p_V = np.asarray(jax.nn.softmax(filtered(jnp.asarray(edited_V)[None], sampling)[0]))
    return [(int(token), float(p_V[token])) for token in np.flatnonzero(p_V)]


@pytest.mark.parametrize("share", [0.0, 0.03, 0.4, 1.0])
def test_min_p_keeps_what_transformers_keeps(share):
    raw = np.random.default_rng(0).standard_normal((6, TINY.vocab_size)).astype(np.float32) * 3
    remains = np.isfinite(filtered(jnp.asarray(raw), Sampling(1.0, min_p=share)))
    expected = torch.isfinite(MinPLogitsWarper(share)(None, torch.tensor(raw))).numpy()
    np.testing.assert_array_equal(remains, expected)
    assert share == 0 or not remains.all()


def test_values_of_settings_compile_nothing():
    decoder = SpeculativeDecoder(target_of(), random_draft(), chain(2), context=128)
    everything = dict(DRAWN, **PENALTIES["all"], top_p=0.9)
    options = dict(stop_token_ids=[3], min_new_tokens=2, logprobs=3)
    decoder.warm_up(PROMPTS, Sampling(**everything), batch=2, max_new_tokens=NEW, **options)
    with CompileCounter() as compiled:
        for number in range(1, 4):
            sampling = Sampling(
                0.3 * number,
                10 * number,
                1 - 0.1 * number,
                0.01 * number,
                1 + 0.1 * number,
                0.2 * number,
                -0.1 * number,
                {number: 1.0 * number},
            )
            changed = dict(
                stop_token_ids=[number, 9], min_new_tokens=number, logprobs=number, ignore_eos=True
            )
            _answers(decoder, sampling, **changed)
    assert compiled.count == 0


def test_settings_of_each_request_are_its_own():
    settings = [Sampling(), Sampling(0.8, min_p=0.1), Sampling(frequency_penalty=1.0)]
    decoder = SpeculativeDecoder(target_of(), random_draft(), chain(2), context=128)
    together = decoder.generate(PROMPTS, settings, max_new_tokens=NEW, seed=3)
    for line, sampling in enumerate(settings):
        [alone] = decoder.generate([PROMPTS[line]], sampling, max_new_tokens=NEW, seed=3 + line)
        assert together[line].tokens == alone.tokens
    with pytest.raises(UserError, match="2 samplings were given for 3 prompts"):
        decoder.generate(PROMPTS, settings[:2])


def test_end_tokens_of_a_request():
    target = target_of()
    plain = SpeculativeDecoder(target, context=128)
    whole = plain.generate(PROMPTS, max_new_tokens=NEW)
    first, last = whole[0].tokens[4], whole[0].tokens[10]
    for draft, tree in ((None, ROOT_ONLY), (random_draft(), dynamic_tree(2, 2, 4))):
        ending = target_of(eos_ids=(last,))
        decoder = SpeculativeDecoder(ending, draft, tree, context=128)
        ask = dict(max_new_tokens=NEW)

        def answer(decoder=decoder, ask=ask, **options):
            return decoder.generate(PROMPTS, **ask, **options)[0]

        assert (answer().finish, answer().tokens[-1]) == ("token", last)
        stopped = answer(stop_token_ids=[first])
        place = whole[0].tokens.index(first)
        assert (stopped.finish, stopped.tokens) == ("token", whole[0].tokens[: place + 1])
        ignoring = answer(ignore_eos=True)
        assert (ignoring.finish, ignoring.tokens) == ("length", whole[0].tokens)
        late = answer(min_new_tokens=NEW - 2)
        assert last not in late.tokens[: NEW - 2]
        assert late.tokens[:4] == whole[0].tokens[:4]
        assert len(late.tokens) >= NEW - 2


def test_end_tokens_are_no_text():
    target = target_of(tokenizer=letters())
    decoder = SpeculativeDecoder(target, context=128)
    [whole] = decoder.generate(PROMPTS[:1], max_new_tokens=NEW)
    [stopped] = decoder.generate(PROMPTS[:1], max_new_tokens=NEW, stop_token_ids=[whole.tokens[4]])
    assert stopped.text == whole.text[: len(stopped.tokens) - 1]


def test_several_answers_to_a_prompt():
    decoder = SpeculativeDecoder(target_of(), random_draft(), chain(2), context=128)
    ask = dict(sampling=Sampling(1.0), max_new_tokens=NEW, seed=2)
    answers = [answer.tokens for answer in decoder.generate(PROMPTS, n=3, batch=2, **ask)]
    alone = [answer.tokens for answer in decoder.generate(PROMPTS, **ask)]
    assert answers[::3] == alone
    assert len({tuple(tokens) for tokens in answers}) == 9
    plain = SpeculativeDecoder(target_of(), context=128)
    assert [answer.tokens for answer in plain.generate(PROMPTS, n=3, **ask)] == answers


@pytest.mark.parametrize(
    ("draft", "temperature"), [pytest.param(False, 0.0, marks=pytest.mark.slow), (True, 0.8)]
)
def test_log_probabilities_equal_those_of_one_pass_over_the_text(draft, temperature):
    target = target_of(dataclasses.replace(MARKOV, max_positions=1024))
    decoder = SpeculativeDecoder(target, context=700)
    if draft:
        decoder = SpeculativeDecoder(target, right_draft(0.02), dynamic_tree(2, 2, 5), context=700)
    prompts = [*PROMPTS, list(range(60)) * 9]  # read in two chunks
    sampling = Sampling(temperature, frequency_penalty=0.5)
    answers = decoder.generate(prompts, sampling, max_new_tokens=NEW, logprobs=3, batch=4)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert [entry.token for entry in answer.logprobs] == answer.tokens
        for place, entry in enumerate(answer.logprobs):
            raw_V = _text_logits(target, prompt + answer.tokens[:place])
            expected_V = np.asarray(jax.nn.log_softmax(raw_V))
            assert entry.logprob == pytest.approx(expected_V[entry.token], abs=1e-4)
            best = np.argsort(-expected_V)[:3]
            assert [token for token, _ in entry.top] == best.tolist()
            np.testing.assert_allclose([p for _, p in entry.top], expected_V[best], atol=1e-4)
    assert decoder.generate(prompts, max_new_tokens=2)[0].logprobs is None


def test_log_probabilities_of_pieces_are_those_of_the_answer():
    target = target_of(tokenizer=letters())
    decoder = SpeculativeDecoder(target, random_draft(), chain(2), context=128)
    session = decoder.session(PROMPTS, max_new_tokens=NEW, logprobs=2, stop=["no such text"])
    parts: dict[int, list] = {0: [], 1: [], 2: []}
    for piece in session:
        parts[piece.index] += piece.logprobs
        if piece.answer is not None:
            assert parts[piece.index] == piece.answer.logprobs


def test_a_probability_of_the_wrong_node_is_caught():
    """The planted bug: accepted tokens are looked up in the root's logits."""

    def shifted(now, state, proposal, states):
        accepted, finite = Round.accept(now, state, proposal, states)
        return accepted._replace(path_BP1=jnp.zeros_like(accepted.path_BP1)), finite

    target = target_of(MARKOV)
    decoder = SpeculativeDecoder(target, right_draft(), chain(3), context=128)
    ask = dict(max_new_tokens=NEW, logprobs=0)
    right, wrong = (
        [entry.logprob for entry in each.generate([[5]], **ask)[0].logprobs]
        for each in (decoder, decoder.with_(accept=shifted))
    )
    assert not np.allclose(right, wrong, atol=1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(min_p=1.5), "min_p is 1.5; expected a share"),
        (dict(repetition_penalty=0.0), "repetition_penalty is 0.0; expected a number above 0"),
        (dict(presence_penalty=float("nan")), "presence_penalty is nan; expected a number"),
        (dict(logit_bias={"a": 1.0}), "a token of logit_bias is 'a'; expected a whole number"),
        (dict(logit_bias={61: 1.0}), "logit_bias holds token 61, and the target's vocabulary ends"),
    ],
)
def test_sampling_that_means_nothing_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        SpeculativeDecoder(target_of()).generate([[5]], Sampling(**settings))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(n=0), UserError, "n is 0"),
        (dict(min_new_tokens=9, max_new_tokens=8), UserError, "min_new_tokens is 9; expected 0 to"),
        (dict(stop_token_ids=[61]), UserError, "stop_token_ids holds token 61"),
        (dict(stop_token_ids=range(40)), UserError, "40 stop_token_ids; expected at most 32"),
        (dict(logprobs=21), UserError, "logprobs is 21; expected None, or 0 to 20"),
        (dict(maximum=3), UsageError, "maximum: no such option; expected some of max_new_tokens"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        SpeculativeDecoder(target_of(), context=128).generate([[5]], **options)


def test_filters_name_only_what_some_request_needs():
    assert filters_of([Sampling(), Sampling(min_p=0.5)]) == filters_of([Sampling()])
    assert not filters_of([Sampling(1.0, 5)]).edits
    raw = jnp.ones((1, 1, 4))
    assert edited(raw, None, None, filters_of([Sampling()])) is raw
