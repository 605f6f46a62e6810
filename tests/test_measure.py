"""Measurements: figures from hand-made round logs, later turns, and resumed runs."""

import dataclasses
import json

import numpy as np
import pytest
from decode_cases import MARKOV, letters, right_draft, target_of

from beagle_jax.data.chats import Chat
from beagle_jax.decoding.decoder import SpeculativeDecoder
from beagle_jax.decoding.sampling import GREEDY, Sampling
from beagle_jax.decoding.tree import chain
from beagle_jax.errors import UserError
from beagle_jax.evaluation.answers import AnswerLog, TimedAnswer
from beagle_jax.evaluation.figures import figures, interval
from beagle_jax.evaluation.measure import Bench, Measurement, System, context_for, measure


def chat(*turns: str, kind: str = "x") -> Chat:
    return Chat(({"role": "user", "content": turns[0]},), "here:1", kind, tuple(turns[1:]))


def bench_for(suites, max_new_tokens=12, sampling=GREEDY) -> Bench:
    target = target_of(MARKOV, tokenizer=letters())
    context = context_for(suites, target.tokenizer, max_new_tokens, target.spec.max_positions)
    plain = System("plain", SpeculativeDecoder(target, context=context))
    draft = SpeculativeDecoder(target, right_draft(0.02), chain(2), context=context)
    systems = (plain, (System("chain", draft),))
    return Bench(*systems, target.tokenizer, context, max_new_tokens, sampling, 5)


# Figures of round logs made by hand


def answer(emitted: list[int], depth: int = 3, seconds: float = 1.0) -> TimedAnswer:
    """Makes an answer whose rounds emitted so many tokens each.

    All tokens of a round but the last were accepted drafts.
    """
    accepted = np.bincount([count - 1 for count in emitted], minlength=depth + 1).tolist()
    tokens = list(range(1 + sum(emitted)))
    return TimedAnswer(tokens, "", "length", len(emitted), accepted, 0.5, seconds)


def test_tau_counts_the_bonus_token_and_no_prefill():
    measurement = Measurement("x", [[answer([4, 1, 2])], [answer([1])]])
    assert (measurement.tokens, measurement.rounds) == (10, 4) and measurement.tau == (
        4 + 1 + 2 + 1
    ) / 4
    plain = Measurement("plain", [[answer([1] * 9, 0)]])
    assert plain.tau == 1 and plain.accepted == [9] and plain.step_alpha == []


def test_an_answer_of_the_prefill_alone_has_no_round():
    assert Measurement("x", [[answer([])]]).tau == 1.0
    assert Measurement("x", [[answer([])], [answer([4])]]).tau == 4.0


def test_tau_is_the_mean_over_rounds_not_over_answers():
    mixed = Measurement("x", [[answer([4])], [answer([1] * 9)]])
    assert mixed.tau == 13 / 10 != np.mean([generation.tau for generation in mixed.generations])


def test_step_alpha_is_a_share_of_the_rounds_that_came_that_far():
    measurement = Measurement("x", [[answer([4, 4, 2, 1])]])
    assert measurement.accepted == [1, 1, 0, 2] and measurement.step_alpha == [3 / 4, 2 / 3, 2 / 2]


def test_a_depth_that_no_round_reached_has_no_share():
    assert Measurement("x", [[answer([1, 1])]]).step_alpha == [0.0, 0.0, 0.0]


def test_speedup_is_time_over_time_of_the_same_tokens():
    plain = Measurement(
        "plain", [[answer([1] * 7, 0, seconds=7.5)], [answer([1] * 7, 0, seconds=7.5)]]
    )
    fast = Measurement("fast", [[answer([4, 3], seconds=3.5)], [answer([4, 3], seconds=3.5)]])
    made = figures(fast, plain).model_dump(mode="json")
    assert (made["tokens_per_second"], made["decode_tokens_per_second"]) == (2.0, 2.0)
    assert (made["speedup"], made["speedup_interval"]) == (2.0, [2.0, 2.0])
    assert (made["tau"], made["tau_interval"], made["identical_to_plain"]) == (3.5, [3.5, 3.5], 2)
    assert (made["prefill_seconds"], made["decode_seconds"]) == (1.0, 7.0)


def test_intervals_are_paired_and_cover():
    """Prompts that are slow for both systems do not widen the interval.

    An interval of means has the width that theory gives.
    """
    slow = [[answer([2] * 6, seconds=float(n))] for n in (1, 5, 9, 30)]
    plain = [[answer([2] * 6, seconds=2.0 * n + 0.5)] for n in (1, 5, 9, 30)]
    made = figures(Measurement("x", slow), Measurement("plain", plain))
    assert made.speedup_interval == (2.0, 2.0)
    values = np.random.default_rng(1).normal(3, 1, 400)
    low, high = interval(lambda draw: draw @ values / draw.sum(axis=1), 400)
    assert abs((high - low) - 2 * 1.96 / 20) < 0.02 and low < values.mean() < high


def test_planted_bug_unpaired_intervals_are_wider():
    times = np.array([1.0, 5.0, 9.0, 30.0, 2.0, 14.0])
    paired = interval(lambda draw: (draw @ (2 * times)) / (draw @ times), 6)
    apart = interval(lambda draw: (draw @ (2 * times)) / (draw[::-1] @ times), 6)
    assert paired == (2.0, 2.0) and apart[1] - apart[0] > 1


# Turns


def test_a_later_turn_follows_the_systems_own_answer():
    suites = {"s": [chat("AB", "C"), chat("D")]}
    bench = bench_for(suites)
    cases, compiles, left_out, _ = measure(bench, suites)
    assert (
        [len(case.turns) for case in cases] == [2, 1]
        and left_out == {"s": 0}
        and compiles == {"plain": 0, "chain": 0}
    )
    for name in ("plain", "chain"):
        first, second = (turn[name] for turn in cases[0].turns)
        history = [("user", "AB"), ("assistant", first.answer.text), ("user", "C")]
        text = "".join(role[0] + said for role, said in history) + "a"
        assert second.prompt == bench.tokenizer.encode(text, add_special_tokens=False)
    assert [turn["plain"].answer.tokens for turn in cases[0].turns] == [
        turn["chain"].answer.tokens for turn in cases[0].turns
    ]


def test_a_later_turn_follows_an_answer_that_was_cut_off_or_empty():
    suites = {"s": [chat("AB", "C")]}
    bench = bench_for(suites)
    [cut], *_ = measure(bench, suites)
    first, second = (turn["plain"] for turn in cut.turns)
    assert first.answer.finish == "length" and len(first.answer.text) == 12
    assert second.prompt == bench.tokenizer.encode(
        f"uABa{first.answer.text}uCa", add_special_tokens=False
    )
    stopping = target_of(MARKOV, tokenizer=letters(), eos_ids=(first.answer.tokens[0],))
    mute = dataclasses.replace(
        bench,
        plain=System("plain", SpeculativeDecoder(stopping, context=bench.context)),
        speculative=(),
    )
    [empty], *_ = measure(mute, suites)
    first, second = (turn["plain"] for turn in empty.turns)
    assert (first.answer.text, first.answer.rounds) == ("", 0)
    assert second.prompt == bench.tokenizer.encode("uABa.uCa", add_special_tokens=False)


def test_turns_that_do_not_fit_are_left_out_for_all():
    suites = {"s": [chat("A" * 60, "B" * 160), chat("C" * 300)]}
    cases, _, left_out, _ = measure(bench_for(suites, 40), suites)
    assert [len(case.turns) for case in cases] == [1] and left_out == {"s": 2}


def test_draws_differ_from_prompt_to_prompt_and_repeat_from_run_to_run():
    suites = {"s": [chat("AB"), chat("AB")]}
    bench = bench_for(suites, 12, Sampling(1.5))
    drawn = [
        [turn[name].answer.tokens for case in measure(bench, suites).cases for turn in case.turns]
        for name in ("plain", "chain")
    ]
    assert drawn[0] == drawn[1] and drawn[0][0] != drawn[0][1]
    assert drawn[0] == [
        turn["plain"].answer.tokens for case in measure(bench, suites).cases for turn in case.turns
    ]


# Going on


@pytest.fixture
def cut_off(tmp_path):
    """The log of a run that was stopped while it wrote the second of three cases."""
    suites, path = {"s": [chat("A", "B"), chat("C"), chat("D")]}, tmp_path / "answers.jsonl"
    bench = bench_for(suites)
    whole = measure(bench, suites, AnswerLog(path, {"a": {"b": 1}}))
    lines = path.read_text().splitlines(keepends=True)
    assert len(lines) == 4
    path.write_text("".join(lines[:2]) + lines[2][:40])
    return suites, path, bench, whole


def test_a_run_goes_on_with_what_is_missing(cut_off, monkeypatch):
    suites, path, bench, whole = cut_off
    calls = []
    right = SpeculativeDecoder.generate
    monkeypatch.setattr(
        SpeculativeDecoder,
        "generate",
        lambda self, prompts, *a, **o: calls.append(1) or right(self, prompts, *a, **o),
    )
    again = measure(bench, suites, AnswerLog(path, {"a": {"b": 1}}))
    assert len(calls) == 2 * len(bench.systems)

    def untimed(measured):
        return [
            [
                {
                    name: (
                        reply.prompt,
                        dataclasses.replace(reply.answer, prefill_seconds=0, decode_seconds=0),
                    )
                    for name, reply in turn.items()
                }
                for turn in case.turns
            ]
            for case in measured.cases
        ]

    assert untimed(again) == untimed(whole) and again.cases[0] == whole.cases[0]
    assert [json.loads(line)["number"] for line in path.read_text().splitlines()[1:]] == [0, 1, 2]


def test_other_settings_are_refused(cut_off):
    with pytest.raises(
        UserError,
        match=r"was written with other settings \(a.b 1 there, 2 here; c None there, 3 here\); "
        r"give another --out",
    ):
        AnswerLog(cut_off[1], {"a": {"b": 2}, "c": 3})


@pytest.mark.parametrize(
    "content",
    [
        b"dear diary\n",
        b"\xff\xfe\n",
        b"",
        b"{}\n[1]\n",
        b'{}\n{"suite": "s", "number": 0, "category": "", "turns": ["x"]}\n',
    ],
)
def test_another_file_is_not_overwritten(tmp_path, content):
    path = tmp_path / "answers.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match="not the answers of an evaluation"):
        AnswerLog(path, {})
    assert path.read_bytes() == content
