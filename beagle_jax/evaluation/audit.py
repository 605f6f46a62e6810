"""Is decoding lossless, and are its figures true? Every answer is held against a second way of computing it.

The second way reads the written text at once (evaluation/forced.py) and walks through it with trees grown by other code
(evaluation/replay.py). Rounding differs between the ways: a claim about tokens may fail by no more than twice the noise
that is measured here, and in float32 all ways of decoding must write the very same tokens.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from beagle_jax.decoding.decoder import Generation
from beagle_jax.decoding.lookup import Lookup
from beagle_jax.decoding.sampling import Sampling
from beagle_jax.evaluation.answers import Asked
from beagle_jax.evaluation.forced import forced_logits, forced_states, probabilities, rounding_noise
from beagle_jax.evaluation.measure import Bench, Measured, Measurement
from beagle_jax.evaluation.replay import replayed
from beagle_jax.weights.draft import Draft
from beagle_jax.weights.target import Target

_NOISE_TEXTS = 3  # the longest ones, whose rounding noise is measured
_DRAWN = Sampling(1.0)  # for the test of draws when decoding itself is greedy
# Distance of 1e-4: an honest sampler fails once in ten thousand audits. Kolmogorov's bound: sqrt(ln(2 / 1e-4) / 2).
_KOLMOGOROV = 2.225
# Answers whose rounds may differ because two of the draft's own scores were nearly tied, and how far tau may then be off.
_TIED_ANSWERS = {"float32": 0.02, "bfloat16": 1.0}
_TAU_OFF = {"float32": 0.005, "bfloat16": 0.03}


class Check(NamedTuple):
    """One claim."""

    name: str
    passed: bool
    found: str


class _Text(NamedTuple):
    """One answer, and where it stands."""

    where: dict[str, Any]  # suite, number, turn
    asked: Asked
    plain: Asked


def audit(
    target: Target, drafts: dict[str, Draft | Lookup], bench: Bench, measured: Measured, *, append_predicted: bool, rule: str
) -> dict[str, Any]:
    """The report's `audit` (its fields: report.schema.json). drafts: by system; plain decoding has none."""
    texts = {name: _texts(name, measured) for name in bench.decoders}
    told = [[*text.asked.prompt, *text.asked.answer.tokens] for text in next(iter(texts.values()))]
    noise = max(rounding_noise(target, text) for text in sorted(told, key=len)[-_NOISE_TEXTS:])
    checks, divergences = [], []
    for name in tqdm(bench.decoders, desc="audit", unit="system"):
        if name in drafts:
            parted = [one for text in texts[name] if (one := _divergence(target, name, text, noise)) is not None]
            checks.append(_equality(name, texts[name], parted, target, bench.sampling, rule))
            divergences += parted
        if bench.sampling.greedy:
            checks.append(_largest_logit(target, name, texts[name], noise))
        checks.append(_draws(target, name, texts[name], bench))
        if name in drafts and rule == "match":
            checks.append(_acceptance(target, drafts[name], name, texts[name], bench, append_predicted))
    return {
        "passed": all(check.passed for check in checks),
        "noise": round(noise, 6),
        "checks": [check._asdict() for check in checks],
        "divergences": divergences,
    }


def _texts(name: str, measured: Measured) -> list[_Text]:
    return [
        _Text({"suite": case.suite, "number": case.number, "turn": number}, turn[name], next(iter(turn.values())))
        for case in measured.cases
        for number, turn in enumerate(case.turns)
    ]


def _divergence(target: Target, name: str, text: _Text, noise: float) -> dict[str, Any] | None:
    """Where an answer first differs from plain decoding's; None where it does not, or where the prompts already did."""
    mine, theirs = text.asked.answer.tokens, text.plain.answer.tokens
    if mine == theirs or text.asked.prompt != text.plain.prompt:
        return None
    place = next((n for n, (a, b) in enumerate(zip(mine, theirs)) if a != b), min(len(mine), len(theirs)))
    before = [*text.asked.prompt, *mine[:place]]
    logits_V = forced_logits(target, forced_states(target, before), len(before) - 1, len(before))[0]
    ours, plain = (tokens[place] if place < len(tokens) else None for tokens in (mine, theirs))
    second, first = np.partition(logits_V, -2)[-2:]
    # An answer that ends where the other goes on is no matter of rounding, nor is a token that is far from the best.
    gap = float("inf") if ours is None or plain is None else max(first - logits_V[ours], first - logits_V[plain])
    gap = float(min(gap, np.finfo(np.float32).max))
    return {
        "system": name, **text.where, "place": place, "plain": plain, "system_token": ours, "gap": gap,
        "top_2_gap": float(first - second), "within_noise": bool(gap <= 2 * noise),
    }  # fmt: skip


def _equality(name: str, texts: list[_Text], parted: list[dict], target: Target, sampling: Sampling, rule: str) -> Check:
    """float32: no difference. Less precise: every first difference is a near tie; draws have no such measure."""
    same = sum(text.asked.answer.tokens == text.plain.answer.tokens for text in texts)
    beyond = sum(not one["within_noise"] for one in parted)
    gaps = f"; logit gaps there up to {max(one['gap'] for one in parted):.3g}, {beyond} beyond twice the noise" if parted else ""
    exact = str(target.dtype) == "float32"
    passed = not parted if exact else beyond == 0 or not sampling.greedy
    if rule == "ratio":  # other draws than plain decoding's, of the same distribution
        passed, gaps = True, "; the ratio rule draws other tokens"
    return Check(f"{name}: the tokens of plain decoding", passed, f"{same} of {len(texts)} answers are the same{gaps}")


def _largest_logit(target: Target, name: str, texts: list[_Text], noise: float) -> Check:
    """Every greedy token has the largest logit when its text is read at once."""
    worst, count, others = 0.0, 0, 0
    for text in texts:
        logits_TV, tokens = _next_logits(target, text.asked.prompt, text.asked.answer)
        gap_T = logits_TV.max(axis=1) - np.take_along_axis(logits_TV, tokens[:, None], axis=1)[:, 0]
        worst, count, others = max(worst, float(gap_T.max())), count + len(tokens), others + int((gap_T > 0).sum())
    found = f"{others} of {count} tokens are not the largest when read at once, by up to {worst:.3g} (noise {noise:.3g})"
    return Check(f"{name}: the target's own greedy choice", worst <= 2 * noise, found)


def _next_logits(target: Target, prompt: Sequence[int], answer: Generation) -> tuple[np.ndarray, np.ndarray]:
    """Logits that each token of an answer was chosen from [T, V], and the tokens [T]."""
    text = [*prompt, *answer.tokens]
    states_LD = forced_states(target, text)
    return forced_logits(target, states_LD, len(prompt) - 1, len(text) - 1), np.array(answer.tokens)


def _draws(target: Target, name: str, texts: list[_Text], bench: Bench) -> Check:
    """Draws have the target's distribution: where each falls in the sum of probabilities is uniform (Kolmogorov-Smirnov).

    Tokens are summed from the most likely on, so that a wrong temperature or filter moves the whole sum.
    """
    sampling, asked = bench.sampling, [text.asked for text in texts]
    if sampling.greedy:
        sampling = _DRAWN
        draw = lambda prompt, seed: bench.decoders[name].generate([prompt], sampling, max_new_tokens=bench.max_new_tokens, seed=seed)[0]
        asked = [Asked(one.prompt, draw(one.prompt, seed)) for seed, one in enumerate(asked)]
    rng, places, outside = np.random.default_rng(0), [], 0
    for one in asked:
        logits_TV, tokens = _next_logits(target, one.prompt, one.answer)
        p_TV = probabilities(logits_TV, sampling)
        own_T1 = np.take_along_axis(p_TV, tokens[:, None], axis=1)
        before_T = np.where(p_TV > own_T1, p_TV, 0).sum(axis=1)
        # Equally likely tokens share their part of the sum.
        tied_T = np.where(p_TV == own_T1, p_TV, 0).sum(axis=1)
        places.append(before_T + rng.random(len(tokens)) * tied_T)
        outside += int((own_T1 == 0).sum())
    place = np.sort(np.concatenate(places))
    count = len(place)
    distance = max(np.max(np.arange(1, count + 1) / count - place), np.max(place - np.arange(count) / count))
    allowed = _KOLMOGOROV / np.sqrt(count)
    found = (f"{count} draws at temperature {sampling.temperature}: distance {distance:.4f} of {allowed:.4f} allowed, "
             f"{outside} outside the filter")
    return Check(f"{name}: draws have the target's distribution", bool(distance <= allowed and outside <= 0.001 * count), found)


def _acceptance(
    target: Target, draft: Draft | Lookup, name: str, texts: list[_Text], bench: Bench, append_predicted: bool
) -> Check:
    """Rounds and accepted drafts recomputed from the tokens; tau by its definition, from the recomputed rounds."""
    tree, dtype = bench.decoders[name].tree, str(target.dtype)
    rounds, written, differing, agreed, in_agreed = 0, 0, 0, [], 0
    for text in tqdm(texts, desc=f"rounds of {name}", unit="answer", leave=False):
        prompt, answer = text.asked
        states_LD = forced_states(target, [*prompt, *answer.tokens])
        accepted = replayed(target, draft, tree, prompt, answer.tokens, states_LD, append_predicted)
        rounds, written = rounds + len(accepted), written + len(answer.tokens) - 1
        if (len(accepted), np.bincount(accepted, minlength=tree.depth + 1).tolist()) == (answer.rounds, answer.accepted):
            agreed.append([answer])
            in_agreed += len(answer.tokens) - 1
        else:
            differing += 1
    told, again = Measurement(name, "", [[text.asked.answer] for text in texts]).tau, written / max(rounds, 1)
    same = Measurement(name, "", agreed)
    exact = not agreed or abs(same.tau * same.rounds - in_agreed) < 1e-6  # the definition itself, where rounds are the same
    passed = exact and differing <= _TIED_ANSWERS[dtype] * len(texts) and abs(told - again) <= _TAU_OFF[dtype] * again
    found = f"tau {told:.4f}, recomputed {again:.4f} over {rounds} rounds; {differing} of {len(texts)} answers have other rounds"
    return Check(f"{name}: acceptance recomputed from the tokens", bool(passed), found)


def lines(made: dict[str, Any]) -> list[str]:
    """What the terminal shows."""
    width = max(len(check["name"]) for check in made["checks"])
    shown = [f"{'passed' if check['passed'] else 'FAILED'}  {check['name']:{width}}  {check['found']}" for check in made["checks"]]
    for one in made["divergences"]:
        shown.append(f"        {one['system']}: {one['suite']} prompt {one['number']}, turn {one['turn']}, token {one['place']}: "
                     f"{one['plain']} became {one['system_token']}, gap {one['gap']:.3g}, of the two best {one['top_2_gap']:.3g}")  # fmt: skip
    return ["", "audit", *shown]
