"""A grid of few trees, for tests of `tune` and of acceptance."""

from beagle_jax.commands import held_out
from beagle_jax.commands import tune as tune_command
from beagle_jax.decoding import acceptance, tuning


def shrink(monkeypatch, *, nodes, levels, topks, text) -> None:
    """Lets acceptance and tuning know few trees, in short texts; nothing counts as disturbed."""
    for name, value in {"NODES": nodes, "LEVELS": levels, "TOPKS": topks, "TEXT": text}.items():
        monkeypatch.setattr(acceptance, name, value)
    monkeypatch.setattr(tuning, "_SLOPE_LEVELS", 2)
    for module in (tuning, held_out):
        monkeypatch.setattr(module, "LEVELS", levels)
    for name in ("FULL", "QUICK"):
        monkeypatch.setattr(tune_command, name, tuning.Effort(nodes, topks, 3, guesses=False))
    monkeypatch.setattr(tuning, "TOLERANCE", 1e9)
