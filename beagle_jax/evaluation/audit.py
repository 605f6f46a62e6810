"""Audit of a report: recomputes every answer by teacher forcing and compares the two.

It compares tokens, acceptance and counters. The second computation runs the complete text through
the target in one forward pass (evaluation/forced.py) and replays the rounds with trees from
independent code (evaluation/replay.py).

The two computations round differently. Audit checks on tokens therefore allow differences up to a
noise level that is measured on this machine (evaluation/chance.py). In float32, all systems must
produce exactly the same tokens.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from beagle_jax.decoding.lookup import Lookup
from beagle_jax.decoding.requests import Answer
from beagle_jax.decoding.sampling import Sampling
from beagle_jax.decoding.tree import Tree
from beagle_jax.evaluation.answers import Asked, TimedAnswer
from beagle_jax.evaluation.chance import (
    allowed_distance,
    distance_from_uniform,
    logit_noise,
    score_noise,
)
from beagle_jax.evaluation.forced import forced_logits, forced_reads, forced_states, probabilities
from beagle_jax.evaluation.measure import Bench, Measured, Measurement, System, timed
from beagle_jax.evaluation.replay import replayable, replayed, scored
from beagle_jax.evaluation.report import Audit, Check, Divergence
from beagle_jax.weights.draft import Draft
from beagle_jax.weights.target import Target

# Rounding noise is measured on this many of the longest texts. With 64 positions each, about one
# position in 193 is noisier than every measured position.
_NOISE_TEXTS = 3
_DRAWN = Sampling(1.0)  # for the check of sampled tokens when decoding is greedy
_VERDICT = {True: ": noise explains it", False: ": noise does not explain it", None: ""}


class _Text(NamedTuple):
    """One answer of a system, with plain decoding's answer to the same turn."""

    where: dict[str, Any]  # suite, number, turn
    system: Asked
    plain: Asked


def audit(
    target: Target,
    drafts: dict[str, Draft | Lookup],
    bench: Bench,
    measured: Measured,
    *,
    append_predicted: bool,
    rule: str,
) -> Audit:
    """Returns the `audit` part of the report.

    drafts: by system; plain decoding has none.
    """
    texts = {system.name: _texts(system.name, measured) for system in bench.systems}
    sequences = [
        [*text.system.prompt, *text.system.answer.tokens] for text in next(iter(texts.values()))
    ]
    noise = logit_noise(target, sorted(sequences, key=len)[-_NOISE_TEXTS:])
    # At each position the chosen token is compared with every other token of the vocabulary.
    reach = noise.reach(
        target.spec.vocab_size
        * max(sum(len(text.system.answer.tokens) for text in each) for each in texts.values())
    )
    checks, divergences = [], []
    for system in tqdm(bench.systems, desc="audit", unit="system"):
        name = system.name
        if name in drafts:
            explained = reach if bench.sampling.greedy else None
            parted = [
                divergence
                for text in texts[name]
                if (divergence := _divergence(target, name, text, explained)) is not None
            ]
            checks.append(_equality(name, texts[name], parted, target, bench.sampling, rule))
            divergences += parted
        if bench.sampling.greedy:
            checks.append(_largest_logit(target, name, texts[name], reach))
        checks.append(_draws(target, system, texts[name], bench, reach))
        if name in drafts and rule == "match":
            if not replayable(drafts[name]):
                kind = f"drafts of kind {drafts[name].kind!r} are not computed a second time"
                checks.append(_check(f"{name}: acceptance is not recomputed", True, kind))
                continue
            checks.append(_acceptance(target, drafts[name], system, texts[name], append_predicted))
    return Audit(
        passed=all(check.passed for check in checks),
        noise=round(noise.largest, 6),
        reach=round(reach, 6),
        checks=checks,
        divergences=divergences,
    )


def _check(name: str, passed: bool, figures: str) -> Check:
    return Check(name=name, passed=bool(passed), found=figures)


def _texts(name: str, measured: Measured) -> list[_Text]:
    return [
        _Text(
            {"suite": case.suite, "number": case.number, "turn": number},
            turn[name],
            next(iter(turn.values())),
        )
        for case in measured.cases
        for number, turn in enumerate(case.turns)
    ]


def _divergence(target: Target, name: str, text: _Text, reach: float | None) -> Divergence | None:
    """Returns where an answer first differs from plain decoding's, or None.

    None also if the two prompts already differed. reach: largest logit gap that noise explains;
    None if tokens were sampled, where the logits alone do not determine the token.
    """
    mine, theirs = text.system.answer.tokens, text.plain.answer.tokens
    if mine == theirs or text.system.prompt != text.plain.prompt:
        return None
    place = next(
        (n for n, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b),
        min(len(mine), len(theirs)),
    )
    before = [*text.system.prompt, *mine[:place]]
    logits_V = forced_logits(target, forced_states(target, before), len(before) - 1, len(before))[0]
    ours, plain = (tokens[place] if place < len(tokens) else None for tokens in (mine, theirs))
    second, first = np.partition(logits_V, -2)[-2:]
    # Rounding does not explain an answer that ends earlier than the other, nor a token whose logit
    # is far below the best.
    gap = (
        float("inf")
        if ours is None or plain is None
        else max(first - logits_V[ours], first - logits_V[plain])
    )
    gap = float(min(gap, np.finfo(np.float32).max))
    return Divergence(
        system=name,
        **text.where,
        place=place,
        plain=plain,
        system_token=ours,
        gap=gap,
        top_2_gap=float(first - second),
        within_noise=None if reach is None else bool(gap <= reach),
    )


def _equality(
    name: str,
    texts: list[_Text],
    parted: list[Divergence],
    target: Target,
    sampling: Sampling,
    rule: str,
) -> Check:
    """Checks that a system writes the tokens of plain decoding.

    In float32 no difference is allowed. In lower precision every first difference must be a near
    tie of logits; sampled tokens have no such criterion.
    """
    same = sum(text.system.answer.tokens == text.plain.answer.tokens for text in texts)
    beyond = sum(divergence.within_noise is False for divergence in parted)
    gaps = (
        f"; logit gaps there up to {max(divergence.gap for divergence in parted):.3g}"
        if parted
        else ""
    )
    gaps += f", {beyond} beyond what noise explains" if parted and sampling.greedy else ""
    passed = not parted if str(target.dtype) == "float32" else not beyond
    if rule == "ratio":  # draws differ from plain decoding's but have the same distribution
        passed, gaps = True, "; the ratio rule draws other tokens"
    return _check(
        f"{name}: the tokens of plain decoding",
        passed,
        f"{same} of {len(texts)} answers are the same{gaps}",
    )


def _largest_logit(target: Target, name: str, texts: list[_Text], reach: float) -> Check:
    """Checks that every greedy token has the largest logit under teacher forcing."""
    worst, count, others = 0.0, 0, 0
    for text in texts:
        logits_TV, tokens = _next_logits(target, text.system.prompt, text.system.answer)
        gap_T = logits_TV.max(axis=1) - np.take_along_axis(logits_TV, tokens[:, None], axis=1)[:, 0]
        worst, count, others = (
            max(worst, float(gap_T.max())),
            count + len(tokens),
            others + int((gap_T > 0).sum()),
        )
    summary = (
        f"{others} of {count} tokens are not the largest when read at once, by up to "
        f"{worst:.3g} (noise explains {reach:.3g})"
    )
    return _check(f"{name}: the target's own greedy choice", worst <= reach, summary)


def _next_logits(
    target: Target, prompt: Sequence[int], answer: Answer
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the logits each answer token was chosen from [T, V], and the tokens [T]."""
    text = [*prompt, *answer.tokens]
    states_LD = forced_states(target, text)
    return forced_logits(target, states_LD, len(prompt) - 1, len(text) - 1), np.array(answer.tokens)


def _draws(target: Target, system: System, texts: list[_Text], bench: Bench, reach: float) -> Check:
    """Checks that sampled tokens follow the target's distribution (Kolmogorov-Smirnov).

    Each token falls somewhere in the cumulative distribution; these positions must be uniform. The
    sum runs from the most likely token down, so a wrong temperature or filter shifts it as a whole.
    Noise in a logit has either sign equally often, so it shifts the sum only by its square. No
    token that the filter removes may be drawn, unless noise explains it. Greedy decoding is checked
    on answers sampled for this purpose.
    """
    sampling, entries = bench.sampling, [text.system for text in texts]
    if sampling.greedy:
        sampling = _DRAWN

        def draw(prompt: list[int], seed: int) -> TimedAnswer:
            return timed(
                system.decoder.generate(
                    [prompt], sampling, max_new_tokens=bench.max_new_tokens, seed=seed
                )
            )

        entries = [
            Asked(entry.prompt, draw(entry.prompt, seed)) for seed, entry in enumerate(entries)
        ]
    rng, places, outside = np.random.default_rng(0), [], 0
    for entry in entries:
        logits_TV, tokens = _next_logits(target, entry.prompt, entry.answer)
        p_TV = probabilities(logits_TV, sampling)
        own_T1 = np.take_along_axis(p_TV, tokens[:, None], axis=1)
        before_T = np.where(p_TV > own_T1, p_TV, 0).sum(axis=1)
        # Equally likely tokens share their part of the sum at random.
        tied_T = np.where(p_TV == own_T1, p_TV, 0).sum(axis=1)
        places.append(before_T + rng.random(len(tokens)) * tied_T)
        outside += sum(
            not _inside(logits_TV[place], tokens[place], sampling, reach)
            for place in np.flatnonzero(own_T1[:, 0] == 0)
        )
    place = np.concatenate(places)
    distance, allowed = distance_from_uniform(place), allowed_distance(len(place))
    summary = (
        f"{len(place)} draws at temperature {sampling.temperature}: distance {distance:.4f} of "
        f"{allowed:.4f} allowed, {outside} outside the filter"
    )
    return _check(
        f"{system.name}: draws have the target's distribution",
        distance <= allowed and not outside,
        summary,
    )


def _inside(logits_V: np.ndarray, token: int, sampling: Sampling, reach: float) -> bool:
    """Returns whether the filter would keep the token after an allowance for noise.

    The allowance raises the logits of the token and of all less likely tokens by `reach`.
    """
    raised_V = logits_V + reach * (
        (logits_V < logits_V[token]) | (np.arange(len(logits_V)) == token)
    )
    return bool(probabilities(raised_V[None], sampling)[0, token] > 0)


def _acceptance(
    target: Target,
    draft: Draft | Lookup,
    system: System,
    texts: list[_Text],
    append_predicted: bool,
) -> Check:
    """Recomputes rounds and accepted drafts from the tokens, and tau from its definition.

    An answer may have had other rounds where two of the draft's scores were nearly tied. Such an
    answer must contain a near tie. The total number of rounds of all such answers must lie between
    the totals that result when every tie is resolved one way or the other.
    """
    name, tree = system.name, system.decoder.tree
    reach = _score_reach(target, draft, tree, texts, append_predicted)
    rounds, written, differing, unexplained, tied = 0, 0, 0, 0, [(0, 0, 0)]
    for text in tqdm(texts, desc=f"rounds of {name}", unit="answer", leave=False):
        prompt, answer = text.system
        states_LD = forced_reads(target, [*prompt, *answer.tokens], draft.taps)
        again = partial(
            replayed, target, draft, tree, prompt, answer.tokens, states_LD, append_predicted
        )
        accepted = again()
        rounds, written = rounds + len(accepted), written + len(answer.tokens) - 1
        if (len(accepted), np.bincount(accepted, minlength=tree.depth + 1).tolist()) == (
            answer.rounds,
            answer.accepted,
        ):
            continue
        differing += 1
        sides = [accepted, again(-reach), again(reach)]
        unexplained += all(side == accepted for side in sides)
        tied.append((min(map(len, sides)), answer.rounds, max(map(len, sides))))
    fewest, had, most = np.sum(tied, axis=0).tolist()
    answers = [text.system.answer for text in texts]
    tau = Measurement(name, [[answer] for answer in answers]).tau
    exact = abs(tau * sum(answer.rounds for answer in answers) - written) < 1e-6
    summary = (
        f"tau {tau:.4f}, recomputed {written / max(rounds, 1):.4f} over {rounds} rounds; "
        f"{differing} of {len(texts)} answers have other rounds, {unexplained} of them without "
        "a near tie"
    )
    summary += f"; they had {had} rounds, recomputed {fewest} to {most}" if differing else ""
    passed = exact and not unexplained and fewest <= had <= most
    return _check(f"{name}: acceptance recomputed from the tokens", passed, summary)


def _score_reach(
    target: Target, draft: Draft | Lookup, tree: Tree, texts: list[_Text], append_predicted: bool
) -> float:
    """Returns the largest gap between two draft scores that noise explains.

    It allows for every drafted node and any token in its place.
    """
    if isinstance(draft, Lookup) or not scored(draft) or not tree.grown.depth:
        return 0.0
    longest = max(
        (text.system for text in texts),
        key=lambda entry: len(entry.prompt) + len(entry.answer.tokens),
    )
    noise = score_noise(
        target, draft, tree, [*longest.prompt, *longest.answer.tokens], append_predicted
    )
    return noise.reach(
        target.spec.vocab_size * tree.size * sum(text.system.answer.rounds for text in texts)
    )


def lines(made: Audit) -> list[str]:
    """Formats the audit for the terminal."""
    width = max(len(check.name) for check in made.checks)
    shown = [
        f"{'passed' if check.passed else 'FAILED'}  {check.name:{width}}  {check.figures}"
        for check in made.checks
    ]
    shown += [
        f"        {divergence.system}: {divergence.suite} prompt {divergence.number}, "
        f"turn {divergence.turn}, token {divergence.place}: {divergence.change}, "
        f"gap {divergence.gap:.3g}, of the two best {divergence.top_2_gap:.3g}"
        f"{_VERDICT[divergence.within_noise]}"
        for divergence in made.divergences
    ]
    return ["", "audit", *shown]
