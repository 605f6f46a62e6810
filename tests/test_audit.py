"""The audit passes right decoding and reports each planted bug (mask, cache, tau, sampler)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY
from decode_cases import (
    MARKOV,
    cache_one_row_too_long,
    letters,
    random_draft,
    right_draft,
    target_of,
)
from test_measure import chat
from test_report import check_schema

from beagle_jax.commands.evaluate import evaluate
from beagle_jax.config import load_config
from beagle_jax.decoding.decoder import SpeculativeDecoder
from beagle_jax.decoding.round import Round
from beagle_jax.decoding.sampling import GREEDY, Sampling, filtered
from beagle_jax.decoding.tree import chain, dynamic_tree, static_tree
from beagle_jax.errors import UserError
from beagle_jax.evaluation import audit as audit_module
from beagle_jax.evaluation import forced as forced_module
from beagle_jax.evaluation import replay as replay_module
from beagle_jax.evaluation.audit import audit
from beagle_jax.evaluation.chance import logit_noise
from beagle_jax.evaluation.forced import forced_logits, forced_states, probabilities
from beagle_jax.evaluation.measure import (
    Bench,
    Measured,
    Measurement,
    System,
    context_for,
    measure,
)
from beagle_jax.evaluation.report import Audit, Check
from beagle_jax.model.masks import causal_mask
from beagle_jax.model.target import forward

PROMPTS = {"s": [chat("AB", "C"), chat("DEF"), chat("G" * 30), chat("H"), chat("KLM"), chat("N")]}
TREES = {
    "chain": chain(2),
    "static": static_tree([(0,), (1,), (0, 0), (0, 2)]),
    "dynamic": dynamic_tree(2, 3, 5),
}
DRAWN = Sampling(1.2, top_k=30, top_p=0.95)


def audited(
    target,
    drafts,
    trees,
    sampling=GREEDY,
    max_new_tokens=24,
    append_predicted=True,
    parts=None,
    plain_parts=None,
) -> dict:
    """Runs the audit of these systems.

    parts: planted parts of the rounds with a draft.
    """
    target = dataclasses.replace(target, tokenizer=letters())
    context = context_for(PROMPTS, target.tokenizer, max_new_tokens, 256)
    plain = SpeculativeDecoder(target, context=context).with_(**(plain_parts or {}))
    systems = []
    for name, draft in drafts.items():
        options = dict(context=context, append_predicted=append_predicted)
        decoder = SpeculativeDecoder(target, draft, trees[name], **options)
        systems.append(System(name, decoder.with_(**(parts or {}))))
    plain = System("plain", plain)
    bench = Bench(plain, tuple(systems), target.tokenizer, context, max_new_tokens, sampling, 3)
    made = audit(
        target,
        drafts,
        bench,
        measure(bench, PROMPTS),
        append_predicted=append_predicted,
        rule="match",
    )
    return made.model_dump(mode="json")


def lines(made: dict) -> list[str]:
    return audit_module.lines(Audit.model_validate(made))


def failed(made: dict) -> set[str]:
    """Returns the names of the checks that failed."""
    return {check["name"].split(": ")[1] for check in made["checks"] if not check["passed"]}


TOKENS, GREEDY_CHOICE = "the tokens of plain decoding", "the target's own greedy choice"
DRAWS, ACCEPTANCE = "draws have the target's distribution", "acceptance recomputed from the tokens"


# Right decoding passes


def test_right_decoding_passes():
    # Prompt lookup: tests/test_eagle_evaluation.py.
    made = audited(target_of(MARKOV), {"static": right_draft(0.15)}, TREES)
    assert made["passed"] and made["divergences"] == [] and failed(made) == set()
    assert len(made["checks"]) == 2 + 4 and made["noise"] < 1e-3
    recomputed = [check["found"] for check in made["checks"] if ACCEPTANCE in check["name"]]
    assert all(
        "; 0 of 7 answers have other rounds" in text and not text.startswith("tau 1.0")
        for text in recomputed
    )


@pytest.mark.parametrize(
    ("tree", "append_predicted"),
    [pytest.param("dynamic", True, marks=pytest.mark.slow), ("chain", False)],
)
def test_right_draws_of_a_target_with_layers_pass(tree, append_predicted):
    draft = dataclasses.replace(random_draft(), hot_ids=jnp.arange(3, 40))
    made = audited(target_of(), {tree: draft}, TREES, DRAWN, append_predicted=append_predicted)
    assert made["passed"] and len(made["checks"]) == 1 + 3
    assert "0 of 7 answers have other rounds" in lines(made)[-1] and lines(made)[2].startswith(
        "passed  "
    )


# Planted bugs in the loop


def no_draws(*_) -> Check:
    """For tests of greedy choice: draws have their own, and are dear to compile."""
    return Check(name="x: draws", passed=True, found="")


def test_wrong_mask(monkeypatch):
    """Every node of a chain sees all others."""

    def everything(now, state, nodes):
        return Round.read(now, state, nodes._replace(above_BWW=jnp.ones_like(nodes.above_BWW)))

    monkeypatch.setattr(audit_module, "_draws", no_draws)
    made = audited(target_of(), {"chain": random_draft()}, TREES, parts={"read": everything})
    assert {TOKENS, GREEDY_CHOICE} <= failed(made) and not made["passed"]
    first = made["divergences"][0]
    assert (
        not first["within_noise"]
        and first["gap"] >= first["top_2_gap"]
        and first["plain"] != first["system_token"]
    )
    assert f"{first['plain']} became {first['system_token']}" in "\n".join(lines(made))
    check_schema(made, "audit")


def test_stale_cache_row():
    """After the first round the cache counts a token too many."""
    parts = {"emit": cache_one_row_too_long}
    made = audited(target_of(), {"chain": random_draft()}, TREES, DRAWN, parts=parts)
    assert TOKENS in failed(made)


def test_stale_rows_of_the_draft_alone():
    """The output stays right; only the recomputed acceptance shows the bug."""

    def stale(now, state):
        rows = jax.tree.map(lambda x: -3 * x, state.draft)
        return Round.propose(now, state._replace(draft=rows))

    draft = random_draft()
    attentive = {
        **draft.params,
        "o_proj": 3 * draft.params["o_proj"],
        "down_proj": 0 * draft.params["down_proj"],
    }
    made = audited(
        target_of(MARKOV),
        {"chain": dataclasses.replace(draft, params=attentive)},
        TREES,
        DRAWN,
        48,
        parts={"propose": stale},
    )
    assert failed(made) == {ACCEPTANCE}


def test_biased_sampler():
    """Draws at half the temperature are the same with and without a tree.

    So a comparison of the two cannot show the bug.
    """

    def biased(sampler):
        def wrong(now, state, *rest):
            knobs = state.requests.knobs
            cold = knobs._replace(temperature_B=0.5 * knobs.temperature_B)
            return sampler(now, state, cold, *rest)

        return wrong

    def accept(now, state, knobs, *rest):
        requests = state.requests._replace(knobs=knobs)
        return Round.accept(now, state._replace(requests=requests), *rest)

    parts = {"accept": biased(accept)}
    made = audited(
        target_of(MARKOV),
        {"chain": right_draft(0.15)},
        TREES,
        DRAWN,
        parts=parts,
        plain_parts=parts,
    )
    assert failed(made) == {DRAWS}


# Planted bugs in figures, without another program


@pytest.fixture(scope="module")
def measured():
    """A right measurement of a chain, for the tests to change."""
    target = target_of(MARKOV, tokenizer=letters())
    context = context_for(PROMPTS, target.tokenizer, 24, 256)
    plain = System("plain", SpeculativeDecoder(target, context=context))
    draft = SpeculativeDecoder(target, right_draft(0.15), chain(2), context=context)
    bench = Bench(plain, (System("chain", draft),), target.tokenizer, context, 24, DRAWN, 3)
    return target, bench, measure(bench, PROMPTS)


def checked(measured, spoil=lambda answer: answer) -> dict:
    target, bench, unspoilt = measured
    spoilt = [
        {**turn, "chain": turn["chain"]._replace(answer=spoil(turn["chain"].answer))}
        for case in unspoilt.cases
        for turn in case.turns
    ]
    cases = [dataclasses.replace(unspoilt.cases[0], turns=tuple(spoilt))]
    made = audit(
        target,
        {"chain": right_draft(0.15)},
        bench,
        Measured(cases, {}, {}),
        append_predicted=True,
        rule="match",
    )
    return made.model_dump(mode="json")


def test_tau_off_by_one(measured, monkeypatch):
    assert checked(measured)["passed"]
    right = Measurement.tau.fget
    # Without the bonus token, and with the prefill's token.
    for wrong in (
        lambda self: right(self) - 1,
        lambda self: self.tokens / self.rounds,
    ):
        with monkeypatch.context() as planted:
            planted.setattr(Measurement, "tau", property(wrong))
            assert failed(checked(measured)) == {ACCEPTANCE}


def test_rounds_and_accepted_drafts_are_counted_again(measured):
    def moved(answer):
        return dataclasses.replace(answer, accepted=[*answer.accepted[1:], answer.accepted[0]])

    assert failed(checked(measured, moved)) == {ACCEPTANCE}

    def fewer(answer):
        return dataclasses.replace(
            answer,
            rounds=answer.rounds - 1,
            accepted=[answer.accepted[0] - 1, *answer.accepted[1:]],
        )

    assert failed(checked(measured, fewer)) == {ACCEPTANCE}


def test_near_ties_of_the_draft_are_no_false_alarm(measured, monkeypatch):
    """Scores differ a little from run to run, so rounds differ at ties.

    The audit accepts only differences that ties explain.
    """
    right, rng, deviation = replay_module._predict, np.random.default_rng(0), 0.3

    def noisy(*arguments):
        states, _, _, log_p_QV = right(*arguments)
        log_p_QV = np.asarray(log_p_QV) + rng.normal(0, deviation, log_p_QV.shape)
        best_Qk = np.argsort(-log_p_QV, axis=1)[:, : arguments[-1]]
        return states, best_Qk, np.take_along_axis(log_p_QV, best_Qk, axis=1), log_p_QV

    monkeypatch.setattr(replay_module, "_predict", noisy)
    made = [checked(measured) for _ in range(4)]
    assert not any(failed(figures) for figures in made)
    assert any(
        " 0 of 7 answers have other rounds" not in check["found"]
        for figures in made
        for check in figures["checks"]
        if ACCEPTANCE in check["name"]
    )
    deviation = 0.05  # what explains a tie does not explain that nothing was accepted

    def none(answer):
        return dataclasses.replace(
            answer, rounds=len(answer.tokens) - 1, accepted=[len(answer.tokens) - 1, 0, 0]
        )

    assert failed(checked(measured, none)) == {ACCEPTANCE}


def test_what_a_filter_removes_is_drawn_only_where_rounding_decides():
    inside = audit_module._inside
    assert [
        inside(np.array([3, 2, 1, 0.9, -5]), 3, Sampling(1.0, top_k=3), reach)
        for reach in (0.05, 0.15)
    ] == [False, True]
    assert not inside(np.array([3, 2, 1, 0.9, -5]), 4, Sampling(1.0, top_k=3), 0.15)
    # 0.9 of the probability lies before the third; it has its place from exp(0.107) times its
    # weight on.
    assert [
        inside(np.log([0.6, 0.3, 0.1]), 2, Sampling(1.0, top_p=0.89), reach)
        for reach in (0.05, 0.15)
    ] == [False, True]
    assert [
        inside(np.log([0.6, 0.3, 0.1]), 2, Sampling(2.0, top_p=0.75), reach)
        for reach in (0.05, 0.9)
    ] == [False, True]


def test_min_p_of_the_audit_keeps_what_decoding_keeps():
    logits_TV = np.random.default_rng(0).standard_normal((9, 40)) * 3
    for sampling in (Sampling(0.7, min_p=0.1), Sampling(1.3, 12, 0.9, 0.2)):
        p_TV = probabilities(logits_TV, sampling)
        decoded_TV = np.isfinite(filtered(jnp.asarray(logits_TV, jnp.float32), sampling))
        np.testing.assert_array_equal(p_TV > 0, decoded_TV)
        without_TV = probabilities(logits_TV, sampling._replace(min_p=0.0))
        assert (without_TV > 0).sum() > (p_TV > 0).sum()


def test_penalties_are_refused_before_anything_is_loaded():
    config = load_config("configs/quickstart.yaml", ["decode.frequency_penalty=0.5"])
    with pytest.raises(UserError, match="--audit computes each answer's tokens from the text"):
        evaluate(config, audited=True)


def test_a_token_that_was_never_drawn(measured):
    made = checked(
        measured,
        lambda answer: dataclasses.replace(
            answer, tokens=[*answer.tokens[:-1], answer.tokens[-1] ^ 1]
        ),
    )
    assert TOKENS in failed(made) and made["divergences"][0]["within_noise"] is None
    check_schema(made, "audit")


def test_an_answer_that_ends_too_early(measured):
    made = checked(measured, lambda answer: dataclasses.replace(answer, tokens=answer.tokens[:-1]))
    assert TOKENS in failed(made) and {
        divergence["system_token"] for divergence in made["divergences"]
    } == {None}
    assert "became the end" in "\n".join(lines(made))
    check_schema(made, "audit")


# Half precision


@pytest.mark.slow
def test_bfloat16_flips_are_near_ties(monkeypatch):
    """In bfloat16 a verified block may round differently from single steps.

    Where texts part, both tokens were nearly tied.
    """
    monkeypatch.setattr(audit_module, "_draws", no_draws)

    def half(target):
        return dataclasses.replace(
            target, params=jax.tree.map(lambda x: x.astype(jnp.bfloat16), target.params)
        )

    target = half(target_of())
    made = audited(target, {"chain": random_draft()}, TREES, max_new_tokens=40)
    print(*lines(made), sep="\n")
    assert (
        made["passed"]
        and made["noise"] > 1e-3
        and all(divergence["within_noise"] for divergence in made["divergences"])
    )

    # Tokens that part for no reason of rounding: the same audit must object.
    def wrong(answer):
        return dataclasses.replace(
            answer, tokens=[*answer.tokens[:5], (answer.tokens[5] + 1) % 61, *answer.tokens[6:]]
        )

    def replaced(answers):
        return dataclasses.replace(answers, answers=tuple(map(wrong, answers)))

    right = SpeculativeDecoder.generate
    with pytest.MonkeyPatch.context() as planted:
        planted.setattr(
            SpeculativeDecoder,
            "generate",
            lambda self, *a, **o: (
                replaced(right(self, *a, **o)) if self.tree.depth else right(self, *a, **o)
            ),
        )
        made = audited(target, {"chain": random_draft()}, TREES, max_new_tokens=40)
    assert {TOKENS, GREEDY_CHOICE} <= failed(made) and not all(
        divergence["within_noise"] for divergence in made["divergences"]
    )


# The second way itself


def test_what_comes_later_does_not_change_a_forced_reading():
    target, tokens = target_of(), [5, 7, 9, 11, 2, 40]
    whole = forced_logits(target, forced_states(target, tokens), 0, 6)
    part = forced_logits(target, forced_states(target, tokens[:4]), 3, 4)
    np.testing.assert_allclose(whole[3], part[0], atol=1e-4)
    assert whole.shape == (6, 61)
    # Longer texts too: only their last tokens are read one by one.
    long = np.random.default_rng(0).integers(0, 61, 100).tolist()
    for text in (tokens, long):
        noise = logit_noise(target, [text])
        assert 0 < noise.deviation < noise.largest < 1e-3


WINDOWED = dataclasses.replace(TINY, windows=(None, 20))


@pytest.mark.parametrize("spec", [TINY, WINDOWED], ids=["full", "window"])
def test_a_long_text_is_read_in_blocks(spec, monkeypatch):
    _check_blocks(spec, monkeypatch)


def test_planted_bug_a_block_does_not_see_those_before(monkeypatch):
    monkeypatch.setattr(
        forced_module,
        "visible_slots",
        lambda start_B, cache: jnp.zeros((1, cache[0].v_BKSH.shape[2]), bool),
    )
    forced_module._read_block.clear_cache()
    with pytest.raises(AssertionError):
        _check_blocks(TINY, monkeypatch)
    forced_module._read_block.clear_cache()


def _check_blocks(spec, monkeypatch) -> None:
    """The states of one pass, without an array of text by text."""
    target, tokens = target_of(spec), np.random.default_rng(0).integers(0, 61, 200).tolist()
    mask = causal_mask(jnp.array([200]), 200)
    text_BL = jnp.array([tokens])
    expected = forward(target.params, spec, text_BL, jnp.arange(200)[None], mask).states_BTD[0]
    monkeypatch.setattr(forced_module, "_BLOCK", 64)
    sizes = []
    true_forward = forced_module.forward

    def noted(params, spec, text_BT, position_BT, mask_BTT, cache, visible_BS, **more):
        sizes.append((mask_BTT.shape[-1], visible_BS.shape[-1]))
        return true_forward(params, spec, text_BT, position_BT, mask_BTT, cache, visible_BS, **more)

    monkeypatch.setattr(forced_module, "forward", noted)
    states_LD = forced_states(target, tokens)
    assert set(sizes) <= {(64, 256)}
    np.testing.assert_allclose(states_LD[:200], expected, atol=1e-4)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(1.0),
        Sampling(0.7, top_k=3),
        Sampling(1.5, top_p=0.6),
        Sampling(1.0, top_k=4, top_p=0.5),
    ],
)
def test_probabilities_are_those_of_the_filters(sampling):
    logits_TV = np.random.default_rng(0).normal(size=(20, 12)).astype(np.float32)
    np.testing.assert_allclose(
        probabilities(logits_TV, sampling),
        jax.nn.softmax(filtered(jnp.asarray(logits_TV), sampling), axis=-1),
        atol=1e-6,
    )
