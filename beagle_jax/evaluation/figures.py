"""Computes the report of an evaluation: figures by suite, category and prompt length."""

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
from beagle_jax.evaluation.measure import Bench, Measured, Measurement, System
from beagle_jax.evaluation.report import (
    FORMAT,
    Audit,
    By,
    Environment,
    Figures,
    Group,
    Interval,
    Memory,
    Milliseconds,
    Report,
    Suite,
    SystemEntry,
    Throughput,
)

PLAIN = "plain"  # name of plain decoding among the systems
_RESAMPLES = 2000
_SHORTEST_CONTEXT = 64  # prompts up to this length form one group; longer ones double it


def report(
    bench: Bench,
    measured: Measured,
    settings: dict[str, Any],
    costs: dict[str, dict[str, Any]],
    *,
    notes: Sequence[str] = (),
    audit: Audit | None = None,
    throughput: Sequence[Throughput] = (),
    interrupted: bool = False,
) -> Report:
    """Computes the report.

    settings: the config. costs: by system, the measurements of evaluation/cost.py; may be empty.
    notes: remarks beside those that follow from the measurement. interrupted: what follows the
    answers was ended by hand.
    """
    cases = _grouped(measured.cases, lambda case: case.suite)
    return Report(
        format=FORMAT,
        environment=environment(),
        settings=settings,
        notes=[*_notes(bench, measured), *notes],
        systems=[_system(system, measured, costs) for system in bench.systems],
        suites=[
            _suite(name, group, bench, measured.left_out[name]) for name, group in cases.items()
        ],
        audit=audit,
        throughput=list(throughput),
        interrupted=interrupted or measured.missing > 0,
    )


def environment() -> Environment:
    """Describes the machine and the versions that the figures come from."""
    return Environment(
        machine=machine(),
        devices=jax.device_count(),
        cores=os.cpu_count(),
        python=platform.python_version(),
        jax=jax.__version__,
        jaxlib=jaxlib.__version__,
        beagle_jax=beagle_jax.__version__,
    )


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
    for system in bench.systems:
        if system.trained_tokens is None:
            continue
        texts = [
            len(turn[system.name].prompt) + len(turn[system.name].answer.tokens)
            for case in measured.cases
            for turn in case.turns
        ]
        longer = sum(length > system.trained_tokens for length in texts)
        if longer:
            notes.append(
                f"{longer} of {len(texts)} texts are longer than the {system.trained_tokens} "
                f"tokens that {system.name} was trained on."
            )
    if measured.missing:
        notes.append(f"Interrupted: {measured.missing} prompts were not answered.")
    return notes


def _system(system: System, measured: Measured, costs: dict[str, dict[str, Any]]) -> SystemEntry:
    cost = costs.get(system.name)
    tree, whole = system.decoder.tree, of_system(system.name, measured.cases)
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
    return SystemEntry(
        name=system.name,
        tree=str(tree),
        levels=tree.depth,
        nodes=tree.size,
        trained_tokens=system.trained_tokens,
        compiles_after_warm_up=measured.compiles[system.name],
        milliseconds=Milliseconds(**{key: round(value, 3) for key, value in milliseconds.items()}),
        bytes=None if cost is None or "bytes" not in cost else Memory(**cost["bytes"]),
        best_speedup=_best_speedup(system, whole.tau, costs),
    )


def _best_speedup(system: System, tau: float, costs: dict[str, dict[str, Any]]) -> float | None:
    """Returns tau times the time of plain decoding's pass, over that of a round's two passes."""
    cost, plain = costs.get(system.name), costs.get(PLAIN)
    if not system.decoder.tree.depth or cost is None or plain is None:
        return None
    phases = cost["milliseconds"]
    return round(tau * plain["milliseconds"]["verify"] / (phases["draft"] + phases["verify"]), 4)


def _suite(name: str, cases: list[Case], bench: Bench, left_out: int) -> Suite:
    turns = [
        Case(case.suite, case.number, case.category, (turn,))
        for case in cases
        for turn in case.turns
    ]
    by_category, by_context = _grouped(cases, lambda case: case.category), _grouped(turns, _context)
    groups: list[tuple[By, str, list[Case]]] = [("all", "", cases)]
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
    return Suite(
        name=name,
        turns_left_out=left_out,
        groups=[_group(by, of, group, bench) for by, of, group in groups],
    )


def _grouped(cases: Sequence[Case], key: Callable[[Case], str]) -> dict[str, list[Case]]:
    groups: dict[str, list[Case]] = {}
    for case in cases:
        groups.setdefault(key(case), []).append(case)
    return groups


def _context(case: Case) -> str:
    """Returns the context group of a case: its longest prompt, rounded up to a power of two."""
    longest = max(len(entry.prompt) for entry in case.turns[0].values())
    return str(max(_SHORTEST_CONTEXT, 1 << (longest - 1).bit_length()))


def _group(by: By, of: str, cases: list[Case], bench: Bench) -> Group:
    measurements = [of_system(system.name, cases) for system in bench.systems]
    plain = measurements[0]
    return Group(
        by=by,
        of=of,
        prompts=len(cases),
        systems={measurement.name: figures(measurement, plain) for measurement in measurements},
    )


def of_system(name: str, cases: Sequence[Case]) -> Measurement[TimedAnswer]:
    """Collects one system's answers to these cases."""
    return Measurement(name, [[turn[name].answer for turn in case.turns] for case in cases])


def figures(result: Measurement[TimedAnswer], plain: Measurement[TimedAnswer]) -> Figures:
    """Computes all figures of one system (defined in method.md 7.1)."""

    def seconds(timed: Measurement[TimedAnswer]) -> list[float]:
        return [sum(a.prefill_seconds + a.decode_seconds for a in case) for case in timed.cases]

    def tokens(timed: Measurement[TimedAnswer]) -> list[int]:
        return [sum(len(a.tokens) for a in case) for case in timed.cases]

    in_rounds = [sum(len(a.tokens) - 1 for a in case) for case in result.cases]
    rounds = [sum(a.rounds for a in case) for case in result.cases]
    return Figures(
        answers=len(result.generations),
        tokens=result.tokens,
        rounds=result.rounds,
        tau=round(result.tau, 4),
        tau_interval=interval(lambda draw: _ratio(draw, in_rounds, rounds), len(rounds)),
        accepted=result.accepted,
        step_alpha=[round(share, 4) for share in result.step_alpha],
        tokens_per_second=round(result.tokens_per_second, 2),
        decode_tokens_per_second=round(result.decode_tokens_per_second, 2),
        speedup=round(result.tokens_per_second / plain.tokens_per_second, 4),
        # Both systems use the same resampled prompts, so a prompt that is slow for both cancels.
        speedup_interval=interval(
            lambda draw: (
                _ratio(draw, tokens(result), seconds(result))
                / _ratio(draw, tokens(plain), seconds(plain))
            ),
            len(rounds),
        ),
        prefill_seconds=round(sum(timed.prefill_seconds for timed in result.generations), 4),
        decode_seconds=round(sum(timed.decode_seconds for timed in result.generations), 4),
        identical_to_plain=result.identical_to(plain),
        repeated_4_grams=round(result.repeated_4_grams, 4),
    )


def interval(statistic: Callable[[np.ndarray], np.ndarray], count: int) -> Interval:
    """95 % bootstrap interval of a statistic: prompts are resampled with replacement.

    statistic: maps draw counts [resamples, count], how often each prompt was drawn, to values
    [resamples].
    """
    draw = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=_RESAMPLES)
    low, high = np.percentile(statistic(draw), [2.5, 97.5])
    return round(float(low), 4), round(float(high), 4)


def _ratio(draw: np.ndarray, above: Sequence[float], below: Sequence[float]) -> np.ndarray:
    total = draw @ np.asarray(below, float)
    return np.where(total > 0, draw @ np.asarray(above, float), 1.0) / np.where(
        total > 0, total, 1.0
    )
