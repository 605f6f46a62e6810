"""The table that `evaluate` prints, and the same as JSON."""

from collections.abc import Sequence
from typing import Any

from beagle_jax.evaluation.suites import Measurement


def summary(result: Measurement, plain: Measurement) -> dict[str, Any]:
    """Every figure of one way of decoding (definitions: product.md, "Words and numbers")."""
    return {
        "name": result.name,
        "tree": result.tree,
        "prompts": len(result.generations),
        "tokens": result.tokens,
        "rounds": result.rounds,
        "tau": round(result.tau, 3),
        "step_alpha": [round(share, 3) for share in result.step_alpha],
        "tokens_per_second": round(result.tokens_per_second, 2),
        "decode_tokens_per_second": round(result.decode_tokens_per_second, 2),
        "speedup": round(result.tokens_per_second / plain.tokens_per_second, 3),
        "identical_to_plain": result.identical_to(plain),
        "repeated_4_grams": round(result.repeated_4_grams, 3),
        "compiles_after_warm_up": result.compiles,
    }


def table(summaries: Sequence[dict[str, Any]]) -> str:
    """One line per way of decoding."""
    width = max(len(one["name"]) for one in summaries)
    head = f"{'':{width}}  {'tau':>5}  {'tok/s':>7}  {'decode':>7}  {'speedup':>7}  {'rounds':>6}  {'tokens':>6}  {'compiles':>8}  identical to plain decoding"
    lines = [head, "-" * len(head)]
    for one in summaries:
        lines.append(
            f"{one['name']:{width}}  {one['tau']:5.2f}  {one['tokens_per_second']:7.1f}  {one['decode_tokens_per_second']:7.1f}  "
            f"{one['speedup']:6.2f}x  {one['rounds']:6d}  {one['tokens']:6d}  {one['compiles_after_warm_up']:8d}  "
            f"{one['identical_to_plain']}/{one['prompts']}"
        )
    for one in summaries:
        if one["step_alpha"]:
            lines.append(f"{one['name']}: {one['tree']}; step-alpha by depth {'  '.join(f'{share:.2f}' for share in one['step_alpha'])}")
    lines.append(f"repeated 4-grams in the answers: {summaries[0]['repeated_4_grams']:.1%}")
    lines.append("tok/s: prefill included; decode: without it. Times exclude compilation.")
    return "\n".join(lines)
