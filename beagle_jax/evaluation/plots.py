"""Pictures of what was measured (matplotlib, without a display)."""

from pathlib import Path

from matplotlib.figure import Figure

from beagle_jax.decoding.tuning import Tuning


def plot_tuning(found: Tuning, path: str | Path) -> None:
    """Costs of verifying and drafting, and what the trees of the best levels and topk promise by their size."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    cost, promise = figure.subplots(1, 2)
    cost.plot(list(found.verify_ms), list(found.verify_ms.values()), "o-", label="verify")
    cost.set(xscale="log", xlabel="tokens verified", ylabel="ms", title="cost of one pass of the target", ylim=(0, None))
    best = found.choices[0]
    for topk in sorted({choice.topk for choice in found.choices}):
        row = sorted((c.nodes, c.tokens_per_second) for c in found.choices if (c.levels, c.topk) == (best.levels, topk))
        if row:
            promise.plot(*zip(*row), ".-", label=f"topk {topk}")
    promise.axhline(found.plain_tokens_per_second, color="black", linestyle="--", label="plain")
    promise.set(xscale="log", xlabel="nodes", ylabel="expected tokens/s", title=f"{best.levels} levels")
    promise.legend()
    figure.savefig(path)
