"""Results of several seeds, compared with figures counted by hand."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from experiment_cases import PAPER

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "experiments"))
import plan as plans
import results
from claims import value_of

pytestmark = pytest.mark.usefixtures("at_the_root")


def answer(tokens: int, rounds: int, seconds: float) -> dict:
    """Makes an answer to one turn; one of its tokens belongs to the prefill."""
    accepted = [2 * rounds - tokens + 1, tokens - 1 - rounds]
    return {
        "tokens": [5] * tokens,
        "rounds": rounds,
        "accepted": accepted,
        "prefill_seconds": 0.0,
        "decode_seconds": seconds,
        "text": "",
        "finish": "length",
    }


def measured_by_hand(
    plan, name: str, rounds: dict[int, int], speed: dict[int, float], plain: dict[int, float]
) -> None:
    """Writes an evaluation of one draft, with two equal prompts.

    By seed: rounds for 12 tokens, and seconds; milliseconds and bytes grow with the seed.
    """

    def bytes_of(draft):
        return dict.fromkeys(
            [
                "target_weights",
                "target_cache",
                "draft_cache",
                "decode_temporaries",
                "prefill_temporaries",
            ],
            0,
        ) | {"draft_weights": draft}

    for (folder, [draft]), taken in zip(plan.evaluated(name).items(), rounds, strict=True):
        folder.mkdir(parents=True)
        turn = {"plain": answer(13, 12, plain[taken]), "d": answer(13, rounds[taken], speed[taken])}
        case = json.dumps(
            {"turns": [{system: {"answer": answer} for system, answer in turn.items()}]}
        )
        (folder / "answers.jsonl").write_text("{}\n" + 2 * f"{case}\n")
        systems = [
            {
                "name": system,
                "milliseconds": {"verify": 10.0 + draft.seed},
                "bytes": bytes_of(size + draft.seed),
            }
            for system, size in (("plain", 0), ("d", 100))
        ]
        (folder / "report.json").write_text(json.dumps({"systems": systems}))


def seeds_count(plan) -> None:
    """Checks an evaluation of three seeds, each next to its own plain decoding."""
    rounds, seconds, plain = (
        {0: 6, 1: 8, 2: 10},
        {0: 2.0, 1: 4.0, 2: 6.0},
        {0: 4.0, 1: 12.0, 2: 8.0},
    )
    measured_by_hand(plan, "dynamic-append", rounds, seconds, plain)
    decoded = results.decoded(plan) | {
        "late": {
            seed: [{"training_tokens_per_second": [speed]}]
            for seed, speed in ((0, 90.0), (2, 110.0))
        }
    }
    assert {
        seed: value_of({seed: points}, "speedup").value
        for seed, points in decoded["dynamic-append.late"].items()
    } == {0: 2, 1: 3, 2: 4 / 3}
    made = results.values(plan, decoded, "dynamic-append.late")
    tau, low, high = made["curve"][-1]["tau"]
    assert made["seeds"] == [0, 1, 2] and tau == 1.5 and (low, high) == (12 / 10, 12 / 6)
    assert (
        made["speedup"][0],
        made["tokens_per_second"][0],
        made["plain_tokens_per_second"][0],
    ) == (2, 3.25, 1.625)
    assert (made["milliseconds"], made["bytes"], made["plain_bytes"]) == ({"verify": 11.0}, 101, 1)
    assert made["training_tokens_per_second"] == [100, 90, 110]
    [*_, row] = results.systems_table({"dynamic-append.late": made})
    assert (
        row == "| late | 3 | 1.50 [1.20, 2.00] | 3.2 [2.2, 6.5] | 2.00x [1.33, 3.00] | 0 MB | 100 "
        "[90, 110] |"
    )


def test_results_are_of_every_seed(tmp_path):
    seeds_count(replace(plans.load_plan(Path(PAPER), {}, short=False), folder=tmp_path))


@pytest.mark.parametrize(
    "bug", ["the first seed only", "plain decoding of the first", "costs of the first"]
)
def test_planted_bugs_of_seeds(bug, tmp_path, monkeypatch):
    """Each bug must make the test above fail."""
    decoded, from_answers, costs, plain = results.decoded, results._from_answers, results._costs, []

    def beside_the_first(*arguments):
        plain.append(from_answers(*arguments))
        return plain[-1] | {"plain_seconds": plain[0]["plain_seconds"]}

    def first(run):
        return dict(list(run.items())[:1])

    plants = {
        "the first seed only": (
            "decoded",
            lambda plan: {name: first(run) for name, run in decoded(plan).items()},
        ),
        "plain decoding of the first": ("_from_answers", beside_the_first),
        "costs of the first": ("_costs", lambda run: costs(first(run))),
    }
    monkeypatch.setattr(results, *plants[bug])
    with pytest.raises(AssertionError):
        seeds_count(replace(plans.load_plan(Path(PAPER), {}, short=False), folder=tmp_path))
