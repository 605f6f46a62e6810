"""Greedy speculative decoding equals plain decoding, for any tree, draft and stopping point."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY
from decode_cases import (
    MARKOV,
    NEVER,
    naive_greedy,
    next_stop,
    random_draft,
    right_draft,
    round_of,
    run,
    start,
    target_of,
)

from beagle_jax.decoding import engine, trained
from beagle_jax.decoding.accept import accept_matching
from beagle_jax.decoding.decoder import SpeculativeDecoder
from beagle_jax.decoding.requests import Answer, Answers
from beagle_jax.decoding.round import Round
from beagle_jax.decoding.sampling import GREEDY, Sampling
from beagle_jax.decoding.state import DecodeState
from beagle_jax.decoding.tree import EAGLE_PATHS, ROOT_ONLY, chain, dynamic_tree, static_tree
from beagle_jax.errors import UserError
from beagle_jax.evaluation.answers import TimedAnswer
from beagle_jax.evaluation.measure import CompileCounter, Measurement

TREES = {
    "chain 1": chain(1),
    "chain 3": chain(3),
    "eagle": static_tree(EAGLE_PATHS),
    "ragged": static_tree([(0,), (1,), (3,), (1, 0), (1, 2), (1, 2, 0)]),
    "dynamic": dynamic_tree(3, 3, 8),
}
KINDS = {name: TREES[name] for name in ("chain 3", "ragged", "dynamic")}
DRAWN = Sampling(0.4, top_k=20, top_p=0.95)
MODES = pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
START = 5  # MARKOV: eight different tokens follow it
PROMPTS = {
    "one token": [5],
    "short": [7, 8, 9],
    "a bucket": [*range(60), 3, 1, 4, 1],
    "one more": [*range(60), 3, 1, 4, 1, 5],
}


def _generate(target, draft, tree, prompt, max_new=20, limit=None, context=None, **parts) -> Answer:
    decoder = SpeculativeDecoder(target, draft, tree, context=context).with_(**parts)
    [answer] = decoder.generate([prompt], max_new_tokens=limit or max_new)
    return answer


def _check_lossless(target, draft, tree, prompt, max_new=20, context=None, **parts) -> Answer:
    answer = _generate(target, draft, tree, prompt, max_new, context=context, **parts)
    assert answer.tokens == naive_greedy(target, prompt, max_new)
    assert sum(answer.accepted) == answer.rounds
    return answer


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
@pytest.mark.parametrize(
    "tree", [ROOT_ONLY, TREES["eagle"], *KINDS.values()], ids=["plain", "eagle", *KINDS]
)
def test_equals_plain_decoding(tree, prompt):
    draft = random_draft() if tree.depth else None
    _check_lossless(target_of(), draft, tree, prompt, context=120)  # one cache size


@pytest.mark.parametrize("error", [0.0, 0.02, 0.2])
@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_equals_plain_decoding_when_drafts_are_accepted(tree, error):
    answer = _check_lossless(target_of(MARKOV), right_draft(error), tree, [5], 30)
    # These do not always contain the best path to its end.
    if error == 0.0 and tree not in (
        TREES["ragged"],
        TREES["dynamic"],
    ):
        # Every round but perhaps the last goes all the way.
        assert answer.accepted[-1] >= answer.rounds - 1
        assert answer.rounds == -(-29 // (tree.depth + 1))


def test_planted_bug_accepts_one_too_many():
    def wrong(now, state, proposal, states_BWD):
        nodes = proposal.nodes
        place_BW = state.transcript.count_B[:, None] + nodes.depth_BW
        wanted_BW, finite_BW = now.choose(state.requests, states_BWD, place_BW)
        wanted_BW = wanted_BW.at[:, 0].set(nodes.token_BW[:, 1])
        return accept_matching(nodes, wanted_BW, now.tree.depth), finite_BW

    with pytest.raises(AssertionError):
        _check_lossless(target_of(), random_draft(), chain(2), [5], accept=wrong)


def test_all_drafts_rejected():
    target = target_of()
    never = next(
        token for token in range(TINY.vocab_size) if token not in naive_greedy(target, [5], 20)
    )
    answer = _check_lossless(target, random_draft(hot_ids=jnp.array([never])), chain(3), [5])
    assert answer.accepted == [19, 0, 0, 0]
    assert answer.tau == 1.0


def test_stop_token_anywhere_in_an_accepted_run():
    """Each prompt starts one token further along one text, so it reaches the stop token sooner.

    The next token depends on the last one alone.
    """
    free = naive_greedy(target_of(MARKOV), [START], 8)
    prompts, stop = [[START], *([token] for token in free[:7])], free[7]
    target = target_of(MARKOV, eos_ids=(9_999, stop))
    answers = SpeculativeDecoder(target, right_draft(), chain(5)).generate(
        prompts, max_new_tokens=12
    )
    for place, answer in enumerate(answers):
        assert (
            answer.tokens == naive_greedy(target, prompts[place], 12) == free[place:]
            and answer.finish == "token"
        )
        assert sum(answer.accepted) == answer.rounds == -(-(7 - place) // 6)


@MODES
@pytest.mark.parametrize("tree", KINDS.values(), ids=KINDS)
def test_stop_tokens_and_limits_inside_a_round(tree, sampling):
    """A seed gives what plain sampling gives with it.

    The answers to all one-token prompts reach one stop token at different positions.
    """

    def ask(target, limit, *parts):
        return SpeculativeDecoder(target, *parts).generate(
            [[token] for token in range(TINY.vocab_size)], sampling, max_new_tokens=limit, seed=4
        )

    free = [answer.tokens for answer in ask(target_of(MARKOV), 16)]

    def places(token):
        return {tokens.index(token) for tokens in free if token in tokens}

    stop = max(
        range(TINY.vocab_size), key=lambda token: ({0, 1, 2} <= places(token), len(places(token)))
    )
    assert {0, 1, 2} < places(stop) and max(places(stop)) > tree.depth
    target = target_of(MARKOV, eos_ids=(stop,))
    for limit in (1, 2, 3, 5, 8, 16):
        for drafted, plain, tokens in zip(
            ask(target, limit, right_draft(0.02), tree), ask(target, limit), free, strict=True
        ):
            ended = tokens[: tokens.index(stop) + 1] if stop in tokens else tokens
            assert drafted.tokens == plain.tokens == ended[:limit]
            assert (
                drafted.finish
                == plain.finish
                == ("token" if drafted.tokens[-1] == stop else "length")
            )
            assert sum(drafted.accepted) == drafted.rounds <= plain.rounds == len(plain.tokens) - 1


@pytest.mark.parametrize("limit", [1, 2, 6, 7, 8, 13])
def test_length_limit_inside_a_round(limit):
    target = target_of(MARKOV)
    answer = _generate(target, right_draft(), chain(5), [5], 13, limit)
    assert answer.tokens == naive_greedy(target, [5], 13)[:limit]
    assert answer.rounds == -(-(limit - 1) // 6)
    assert answer.tau == ((limit - 1) / answer.rounds if answer.rounds else 1.0)


def _state(target, draft, tree, prompts, capacity, max_new, sampling=GREEDY):
    now = round_of(target, draft, tree, sampling)
    return now, start(now, prompts, [max_new] * len(prompts), capacity, sampling)


def _check_full_cache(target, draft, tree, sampling, *, missing=0) -> DecodeState:
    """Decodes with exactly as many slots as the last round needs.

    That round starts at prompt + max_new - 2 at the latest and overhangs by the depth.
    """
    prompt, max_new = [3, 1, 4], 11
    [plain] = SpeculativeDecoder(target).generate([prompt], sampling, max_new_tokens=max_new)
    assert not sampling.greedy or plain.tokens == naive_greedy(target, prompt, max_new)
    capacity = len(prompt) + max_new - 2 + tree.depth + 1 - missing
    now, state = _state(target, draft, tree, [prompt], capacity, max_new, sampling)
    state, after = run(now, state, 100)
    assert after.out_BS[0, : after.count_B[0]].tolist() == plain.tokens
    return state


def test_cache_exactly_full_with_drafts_accepted():
    _check_full_cache(target_of(MARKOV), right_draft(), chain(4), GREEDY)


def _never_right(sampling):
    """Makes a draft of TINY that scores none of the answer's tokens."""
    [plain] = SpeculativeDecoder(target_of()).generate([[3, 1, 4]], sampling, max_new_tokens=11)
    return random_draft(
        hot_ids=jnp.array(
            [token for token in range(TINY.vocab_size) if token not in plain.tokens][:5]
        )
    )


@MODES
@pytest.mark.parametrize("tree", KINDS.values(), ids=KINDS)
def test_cache_exactly_full_with_all_drafts_rejected(tree, sampling):
    state = _check_full_cache(target_of(), _never_right(sampling), tree, sampling)
    stats = state.stats
    assert (stats.rounds_B[0], stats.accepted_BS[0, :10].tolist()) == (10, [0] * 10)


def test_planted_bug_a_cache_of_too_few_slots():
    with pytest.raises(AssertionError):
        _check_full_cache(target_of(), _never_right(GREEDY), KINDS["chain 3"], GREEDY, missing=4)


def test_a_draft_that_overflows_changes_no_token(monkeypatch):
    """Children whose scores are NaN come last.

    Otherwise they would come first, without their parent. A CPU makes two kinds of NaN; this test
    plants one.
    """
    right = trained.logit_columns

    def broken(*arguments):
        columns_VM = right(*arguments)
        return jnp.where(jnp.argmax(columns_VM, axis=0)[None] % 2 == 1, jnp.nan, columns_VM)

    monkeypatch.setattr(trained, "logit_columns", broken)
    answer = _check_lossless(
        target_of(MARKOV, next_stop()), right_draft(0.02), TREES["dynamic"], [5], 30
    )
    assert answer.rounds < 29  # of the children that are numbers some are right


def _infinite_after(token: int):
    """Makes a target whose logits are not finite after this token."""
    target = target_of(MARKOV)
    embed_VD = target.params["embed_VD"].at[token].set(jnp.inf)
    return dataclasses.replace(target, params={**target.params, "embed_VD": embed_VD})


@pytest.mark.parametrize("tree", [ROOT_ONLY, *KINDS.values()], ids=["plain", *KINDS])
def test_logits_that_turn_infinite_on_the_way_end_the_answer(tree, caplog):
    """The tokens before are kept, and the other rows of the batch continue."""
    free = naive_greedy(target_of(MARKOV), [START], 8)
    texts = {token: naive_greedy(target_of(MARKOV), [token], 8) for token in range(TINY.vocab_size)}
    start, other = next(item for item in texts.items() if free[5] not in (item[0], *item[1]))
    draft = right_draft(0.02) if tree.depth else None
    decoder = SpeculativeDecoder(_infinite_after(free[5]), draft, tree)

    def ask(limit):
        return decoder.generate([[START], [start]], max_new_tokens=limit)

    whole, beside = ask(6)  # nothing follows the last one
    assert (whole.tokens, whole.finish, beside.tokens) == (free[:6], "length", other[:6])
    assert not caplog.records
    broken, beside = ask(8)
    assert (broken.tokens, broken.finish) == (free[:6], "error")
    assert (beside.tokens, beside.finish) == (other, "length")
    assert [record.getMessage()[:40] for record in caplog.records] == [
        "prompt 1: the target's logits are not fi"
    ]


@pytest.mark.parametrize("tree", [chain(2), KINDS["ragged"]], ids=["chain", "ragged"])
def test_a_rejected_node_with_infinite_logits_decides_nothing(tree):
    """The draft scores one token only, after which logits are not finite.

    The target never writes that token.
    """
    free = naive_greedy(target_of(MARKOV), [START], 8)
    never = [token for token in range(TINY.vocab_size) if token not in (START, *free)]
    target = _infinite_after(never[0])
    draft = dataclasses.replace(right_draft(), hot_ids=jnp.array(never[:4]))
    answer = _generate(target, draft, tree, [START], 8)
    assert (answer.tokens, answer.finish, answer.accepted[0]) == (free, "length", 7)


@pytest.mark.parametrize("rule", ["match", "ratio"])
def test_a_rejected_node_decides_nothing_under_penalties(rule):
    """A drawn answer is that of the same target without the infinity, which no answer contains."""
    sampling = Sampling(0.8, top_k=6, repetition_penalty=1.3, frequency_penalty=0.4)

    def ask(target, draft):
        return SpeculativeDecoder(target, draft, chain(2), rule=rule, context=64).generate(
            [[START]] * 4, sampling, max_new_tokens=10
        )

    free = ask(target_of(MARKOV), right_draft())
    written = {token for answer in free for token in answer.tokens}
    never = [token for token in range(TINY.vocab_size) if token not in (START, *written)]
    draft = dataclasses.replace(right_draft(), hot_ids=jnp.array(never[:2]))
    sound, spoiled = ask(target_of(MARKOV), draft), ask(_infinite_after(never[0]), draft)
    assert [answer.tokens for answer in spoiled] == [answer.tokens for answer in sound]
    assert {answer.finish for answer in spoiled} == {"length"}


def test_a_rejected_node_spoils_no_other_node():
    """In a target with layers a hidden value that is not finite would reach all nodes: 0 * inf."""
    free = naive_greedy(target_of(), [START], 8)
    never = [token for token in range(TINY.vocab_size) if token not in (START, *free)]
    untied = dataclasses.replace(TINY, tie_embeddings=False)
    params = {**target_of().params, "head_VD": target_of().params["embed_VD"]}
    embed_VD = params["embed_VD"].at[never[-1]].set(jnp.inf)  # not 0, with which prompts are padded
    target = target_of(untied)
    target = dataclasses.replace(target, params={**params, "embed_VD": embed_VD})
    assert naive_greedy(target, [START], 8) == free
    draft = random_draft(hot_ids=jnp.array(never[-4:]))
    answer = _generate(target, draft, KINDS["dynamic"], [START], 8)
    assert (answer.tokens, answer.finish) == (free, "length")


def test_reduced_vocabulary_is_still_exact():
    hot = jnp.array([3, 17, 40, 41, 5], jnp.int32)
    answer = _check_lossless(target_of(), random_draft(hot_ids=hot), TREES["ragged"], [5])
    assert answer.rounds > 0
    target, draft = target_of(), random_draft(hot_ids=hot)
    now, state = _state(target, draft, TREES["ragged"], [[5]], 64, 4)
    drafted = jax.jit(Round.propose)(now, state)
    assert set(drafted.nodes.token_BW[0, 1:].tolist()) <= set(hot.tolist())


def test_nothing_compiles_after_warm_up():
    decoder = SpeculativeDecoder(target_of(), random_draft(), dynamic_tree(3, 2, 6))
    prompts = [[(7 * length + place) % 61 for place in range(length)] for length in range(1, 101)]
    decoder.warm_up(prompts, max_new_tokens=8)
    with CompileCounter() as counter:
        for prompt in prompts:
            decoder.generate([prompt], max_new_tokens=8)
    assert counter.count == 0
    other = SpeculativeDecoder(target_of(), random_draft(), chain(4))
    with CompileCounter() as counter:
        other.generate([[1]], max_new_tokens=8)
    assert counter.count > 0


def test_phases_are_named_in_the_program():
    now, state = _state(target_of(), random_draft(), chain(3), [[5]], 64, 8)
    text = engine.advance.lower(now, state, np.int32(9), np.int32(1)).compile().as_text()
    assert all(f"/{phase}/" in text for phase in ("draft", "verify", "accept", "append"))


def test_definitions_of_tau_and_step_alpha():
    first = TimedAnswer([1] * 8, "", "length", 3, [1, 0, 2], 0.5, 1.5)
    other = TimedAnswer([1, 2, 3], "", "length", 2, [2, 0, 0], 0.5, 0.5)
    assert first.tau == 7 / 3 and Answers((first, other), 1.0, 1.75).tokens_per_second == 4.0
    assert Measurement("one", [[first]]).tokens_per_second == 4.0
    both = Measurement("both", [[first], [other]])
    assert (both.tokens, both.rounds, both.tau) == (11, 5, 9 / 5)
    assert both.step_alpha == [2 / 5, 1.0]
    assert both.identical_to(Measurement("x", [[first, first]])) == 1
    assert both.repeated_4_grams == 4 / 5


def _wide_draft():
    draft = random_draft()
    return dataclasses.replace(draft, spec=dataclasses.replace(draft.spec, hidden_size=64))


def _broken_target():
    target = target_of()
    return dataclasses.replace(
        target, params={**target.params, "norm_D": target.params["norm_D"].at[3].set(jnp.nan)}
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: _generate(target_of(), random_draft(), chain(1), []), "the prompt is empty"),
        (lambda: SpeculativeDecoder(target_of()).generate([" "]), "the prompt is empty"),
        (lambda: SpeculativeDecoder(target_of()).generate([]), "there are no prompts"),
        (
            lambda: SpeculativeDecoder(target_of()).generate("Why?"),
            r"takes a list of prompts, and was given one, 'Why\?'; write generate\(\[prompt\]",
        ),
        (
            lambda: SpeculativeDecoder(target_of()).generate([{"role": "user", "content": "Hi"}]),
            "takes a list of prompts",
        ),
        (
            lambda: SpeculativeDecoder(target_of()).generate([5, 6]),
            r"takes a list of prompts, and was given one, \[5, 6\]",
        ),
        (
            lambda: SpeculativeDecoder(target_of()).generate([[1, 61]]),
            "the prompt holds token 61; expected tokens of the target's vocabulary, 0 to 60",
        ),
        (lambda: SpeculativeDecoder(target_of(), None, chain(1)), "needs a draft"),
        (
            lambda: SpeculativeDecoder(target_of(), context=300),
            "a context of 300 tokens does not fit: the target's is 256",
        ),
        (
            lambda: SpeculativeDecoder(target_of(), random_draft(), chain(5), context=6),
            "a round of this tree adds up to 6",
        ),
        (
            lambda: SpeculativeDecoder(target_of(), context=5).generate([[1] * 5]),
            "has 5 tokens and the context ends at 5",
        ),
        (
            lambda: SpeculativeDecoder(target_of()).generate([[1]], max_new_tokens=0),
            "max_new_tokens is 0",
        ),
        (
            lambda: SpeculativeDecoder(target_of()).generate([[1]], stop=["x"]),
            "no tokenizer, so stop strings",
        ),
        (
            lambda: SpeculativeDecoder(target_of()).generate([[1]], stop="x"),
            "expected a list of strings",
        ),
        (lambda: next(SpeculativeDecoder(target_of()).stream([1])), "cannot be streamed as text"),
        (
            lambda: SpeculativeDecoder(target_of(), _wide_draft(), chain(1)),
            "hidden size is 64, the target's is 32",
        ),
        (
            lambda: SpeculativeDecoder(
                target_of(), random_draft(hot_ids=jnp.array([99])), chain(1)
            ),
            "it scores token 99",
        ),
        (
            lambda: SpeculativeDecoder(
                target_of(), random_draft(hot_ids=jnp.arange(3)), dynamic_tree(2, 4, 6)
            ),
            "keeps 4 children of a node, but the draft scores only 3",
        ),
        (
            lambda: SpeculativeDecoder(
                target_of(), random_draft(), dynamic_tree(2, 2, 4), rule="ratio"
            ),
            "is for chains",
        ),
        (
            lambda: SpeculativeDecoder(
                target_of(), random_draft(), chain(2), rule="ratio"
            ).generate([[1]]),
            "set a temperature",
        ),
        (
            lambda: SpeculativeDecoder(target_of()).generate([[1]], Sampling(-1.0)),
            "temperature is -1.0",
        ),
        (
            lambda: SpeculativeDecoder(target_of()).generate([[1]], Sampling(1e-40)),
            "temperature is 1e-40; expected 0 .greedy. or .* at least 1e-06",
        ),
        (
            lambda: SpeculativeDecoder(target_of()).generate([[1]], Sampling(1.0, top_k=-1)),
            "top_k is -1",
        ),
        (
            lambda: SpeculativeDecoder(target_of()).generate([[1]], Sampling(1.0, top_p=0.0)),
            "top_p is 0.0",
        ),
    ],
)
def test_error_messages(call, message):
    with pytest.raises(UserError, match=message):
        call()


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(1.0)], ids=["greedy", "drawn"])
def test_a_target_that_gives_no_number_answers_nothing(sampling, caplog):
    answers = SpeculativeDecoder(_broken_target()).generate([[1], [2]], sampling)
    assert [(answer.tokens, answer.finish) for answer in answers] == [([], "error")] * 2
    assert "prompt 2: the target's logits are not finite" in caplog.text


def test_stop_tokens_used_here_are_outside_the_vocabulary():
    assert min(NEVER) >= TINY.vocab_size
