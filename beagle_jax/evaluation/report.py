"""The report of an evaluation: figures by suite, category and prompt length.

A tree of plain values whose fields report.schema.json, beside this file, declares and explains.
`evaluate` prints its table and writes it as JSON and as pages (evaluation/pages.py).
"""

import os
import platform
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jaxlib
import numpy as np

import beagle_jax
from beagle_jax.decoding.tuning import machine
from beagle_jax.evaluation.answers import Case, TimedAnswer
from beagle_jax.evaluation.measure import Bench, Measured, Measurement

FORMAT = 1  # of the report; increases when a field changes its meaning or is removed
_RESAMPLES = 2000
_SHORTEST_CONTEXT = 64  # prompts up to this length form one group; longer ones double it


def report(
    bench: Bench, measured: Measured, settings: dict[str, Any], costs: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """Builds the report.

    settings: the config. costs: by system, the measurements of evaluation/cost.py; may be empty.
    """
    names = list(bench.decoders)
    cases = _grouped(measured.cases, lambda case: case.suite)
    return {
        "format": FORMAT,
        "environment": environment(),
        "settings": settings,
        "notes": _notes(bench, measured),
        "systems": [_system(name, bench, measured, costs.get(name)) for name in names],
        "suites": [
            _suite(name, group, bench, measured.left_out[name]) for name, group in cases.items()
        ],
        "audit": None,
    }


def environment() -> dict[str, Any]:
    """Describes the machine and the versions that the figures come from."""
    return {
        "machine": machine(),
        "devices": jax.device_count(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "beagle_jax": beagle_jax.__version__,
    }


def _notes(bench: Bench, measured: Measured) -> list[str]:
    """Notes on suites without any turn that fits, and on texts longer than in training.

    Acceptance falls on such texts.
    """
    there = {case.suite for case in measured.cases}
    notes = [
        f"{name} is not there: none of its {count} turns fits the context."
        for name, count in measured.left_out.items()
        if name not in there
    ]
    for name, trained in bench.trained_tokens.items():
        texts = [
            len(turn[name].prompt) + len(turn[name].answer.tokens)
            for case in measured.cases
            for turn in case.turns
        ]
        longer = sum(length > trained for length in texts)
        if longer:
            notes.append(
                f"{longer} of {len(texts)} texts are longer than the {trained} tokens that "
                f"{name} was trained on."
            )
    return notes


def _system(
    name: str, bench: Bench, measured: Measured, cost: dict[str, Any] | None
) -> dict[str, Any]:
    tree, whole = bench.decoders[name].tree, of_system(name, bench, measured.cases)
    answers = len(whole.generations)
    round_ms = (
        1000 * sum(answer.decode_seconds for answer in whole.generations) / max(whole.rounds, 1)
    )
    milliseconds = {
        "prefill": 1000 * sum(answer.prefill_seconds for answer in whole.generations) / answers,
        "round": round_ms,
    }
    if cost is not None:
        phases = cost["milliseconds"]
        milliseconds |= {**phases, "rest": round_ms - sum(phases.values())}
    return {
        "name": name,
        "tree": str(tree),
        "levels": tree.depth,
        "nodes": tree.size,
        "trained_tokens": bench.trained_tokens.get(name),
        "compiles_after_warm_up": measured.compiles[name],
        "milliseconds": {key: round(value, 3) for key, value in milliseconds.items()},
        "bytes": None if cost is None else cost["bytes"],
    }


def _suite(name: str, cases: list[Case], bench: Bench, left_out: int) -> dict[str, Any]:
    turns = [
        Case(case.suite, case.number, case.category, (turn,))
        for case in cases
        for turn in case.turns
    ]
    by_category, by_context = _grouped(cases, lambda case: case.category), _grouped(turns, _context)
    groups = [("all", "", cases)]
    groups += (
        [("category", key, group) for key, group in by_category.items()]
        if len(by_category) > 1
        else []
    )
    groups += (
        [("context", key, by_context[key]) for key in sorted(by_context, key=int)]
        if len(by_context) > 1
        else []
    )
    return {
        "name": name,
        "turns_left_out": left_out,
        "groups": [_group(by, of, group, bench) for by, of, group in groups],
    }


def _grouped(cases: Sequence[Case], key: Callable[[Case], str]) -> dict[str, list[Case]]:
    groups: dict[str, list[Case]] = {}
    for case in cases:
        groups.setdefault(key(case), []).append(case)
    return groups


def _context(case: Case) -> str:
    """Returns the context group of a case: its longest prompt, rounded up to a power of two."""
    longest = max(len(entry.prompt) for entry in case.turns[0].values())
    return str(max(_SHORTEST_CONTEXT, 1 << (longest - 1).bit_length()))


def _group(by: str, of: str, cases: list[Case], bench: Bench) -> dict[str, Any]:
    plain, *others = (of_system(name, bench, cases) for name in bench.decoders)
    return {
        "by": by,
        "of": of,
        "prompts": len(cases),
        "systems": {
            measurement.name: figures(measurement, plain) for measurement in (plain, *others)
        },
    }


def of_system(name: str, bench: Bench, cases: Sequence[Case]) -> Measurement[TimedAnswer]:
    """Collects one system's answers to these cases."""
    answers = [[turn[name].answer for turn in case.turns] for case in cases]
    return Measurement(name, str(bench.decoders[name].tree), answers)


def figures(result: Measurement[TimedAnswer], plain: Measurement[TimedAnswer]) -> dict[str, Any]:
    """Computes all figures of one system (defined in method.md 7.1)."""

    def seconds(timed: Measurement[TimedAnswer]) -> list[float]:
        return [sum(a.prefill_seconds + a.decode_seconds for a in case) for case in timed.cases]

    def tokens(timed: Measurement[TimedAnswer]) -> list[int]:
        return [sum(len(a.tokens) for a in case) for case in timed.cases]

    in_rounds = [sum(len(a.tokens) - 1 for a in case) for case in result.cases]
    rounds = [sum(a.rounds for a in case) for case in result.cases]
    return {
        "answers": len(result.generations),
        "tokens": result.tokens,
        "rounds": result.rounds,
        "tau": round(result.tau, 4),
        "tau_interval": interval(lambda draw: _ratio(draw, in_rounds, rounds), len(rounds)),
        "accepted": result.accepted,
        "step_alpha": [round(share, 4) for share in result.step_alpha],
        "tokens_per_second": round(result.tokens_per_second, 2),
        "decode_tokens_per_second": round(result.decode_tokens_per_second, 2),
        "speedup": round(result.tokens_per_second / plain.tokens_per_second, 4),
        # Both systems use the same resampled prompts, so a prompt that is slow for both cancels.
        "speedup_interval": interval(
            lambda draw: (
                _ratio(draw, tokens(result), seconds(result))
                / _ratio(draw, tokens(plain), seconds(plain))
            ),
            len(rounds),
        ),
        "prefill_seconds": round(sum(timed.prefill_seconds for timed in result.generations), 4),
        "decode_seconds": round(sum(timed.decode_seconds for timed in result.generations), 4),
        "identical_to_plain": result.identical_to(plain),
        "repeated_4_grams": round(result.repeated_4_grams, 4),
    }


def interval(statistic: Callable[[np.ndarray], np.ndarray], count: int) -> list[float]:
    """95 % bootstrap interval of a statistic: prompts are resampled with replacement.

    statistic: maps draw counts [resamples, count], how often each prompt was drawn, to values
    [resamples].
    """
    draw = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=_RESAMPLES)
    return [round(float(edge), 4) for edge in np.percentile(statistic(draw), [2.5, 97.5])]


def _ratio(draw: np.ndarray, above: Sequence[float], below: Sequence[float]) -> np.ndarray:
    total = draw @ np.asarray(below, float)
    return np.where(total > 0, draw @ np.asarray(above, float), 1.0) / np.where(
        total > 0, total, 1.0
    )


def table(made: dict[str, Any]) -> str:
    """Formats the report for the terminal: a block per suite, a line per system."""
    blocks = []
    for suite in made["suites"]:
        whole = suite["groups"][0]["systems"]
        title = [suite["name"]] if len(made["suites"]) > 1 else []
        notes = (
            [f"{suite['turns_left_out']} turns did not fit the context and were left out"]
            if suite["turns_left_out"]
            else []
        )
        blocks.append("\n".join([*title, *_lines(made["systems"], whole), *notes]))
    return "\n".join(
        [
            "\n\n".join(blocks),
            "tok/s: prefill included; decode: without it. Times exclude compilation.",
            *made["notes"],
        ]
    )


def _lines(systems: list[dict[str, Any]], whole: dict[str, dict[str, Any]]) -> list[str]:
    width = max(map(len, whole))
    head = (
        f"{'':{width}}  {'tau':>5}  {'tok/s':>7}  {'decode':>7}  {'speedup':>7}  {'rounds':>6} "
        f" {'tokens':>6}  {'compiles':>8}  identical to plain decoding"
    )
    lines = [head, "-" * len(head)]
    for system in systems:
        values = whole[system["name"]]
        lines.append(
            f"{system['name']:{width}}  {values['tau']:5.2f}  {values['tokens_per_second']:7.1f}  "
            f"{values['decode_tokens_per_second']:7.1f}  {values['speedup']:6.2f}x  "
            f"{values['rounds']:6d}  {values['tokens']:6d}  {system['compiles_after_warm_up']:8d}  "
            f"{values['identical_to_plain']}/{values['answers']}"
        )
    lines += [
        f"{system['name']}: {system['tree']}; step-alpha by depth "
        f"{'  '.join(f'{share:.2f}' for share in alpha)}"
        for system in systems
        if (alpha := whole[system["name"]]["step_alpha"])
    ]
    repeated = whole[systems[0]["name"]]["repeated_4_grams"]
    return [*lines, f"repeated 4-grams in the answers: {repeated:.1%}"]
