"""Plots like the paper's, from the values in a figure's JSON file (run.py).

Each function writes one PNG.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from beagle_jax.evaluation.plots import save

_DEPTHS = 3  # step-alpha curves at most, besides tau


def draw_curve(title: str, runs: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Plots tau and step-alpha of the first depths over training steps; bands: 95 % intervals."""
    depths = min(
        _DEPTHS, *(len(point["step_alpha"]) for run in runs.values() for point in run["curve"])
    )
    figure = Figure(figsize=(4 * (1 + depths), 3.6), layout="constrained")
    panels = figure.subplots(1, 1 + depths)
    for panel, name in zip(
        panels, ("tau", *(f"step-alpha {depth}" for depth in range(1, 1 + depths))), strict=True
    ):
        for colour, (label, run) in enumerate(runs.items()):
            values = [
                point["tau"] if name == "tau" else point["step_alpha"][int(name[-1]) - 1]
                for point in run["curve"]
            ]
            _line(panel, [point["step"] for point in run["curve"]], values, label, colour)
        panel.set(xlabel="training steps", title=name)
    panels[0].legend(fontsize="small")
    figure.suptitle(title)
    save(figure, path)


def draw_depth(title: str, runs: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Plots step-alpha by draft depth, and tau, at the end of training."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    alpha, tau = figure.subplots(1, 2)
    for colour, (label, run) in enumerate(runs.items()):
        last = run["curve"][-1]
        _line(alpha, list(range(1, 1 + len(last["step_alpha"]))), last["step_alpha"], label, colour)
        value, low, high = last["tau"]
        tau.barh(
            label,
            value - 1,
            left=1,
            color=f"C{colour}",
            xerr=[[max(value - low, 0)], [max(high - value, 0)]],
            capsize=3,
        )
    alpha.set(xlabel="draft depth", title="step-alpha")
    alpha.xaxis.get_major_locator().set_params(integer=True)
    alpha.legend(fontsize="small")
    tau.set(title="tau", xlim=(1, None))
    tau.invert_yaxis()
    figure.suptitle(title)
    save(figure, path)


def _line(
    panel: Axes, places: Sequence[int], values: Sequence[Sequence[float]], label: str, colour: int
) -> None:
    middle, low, high = zip(*values, strict=True)
    panel.plot(places, middle, "o-", color=f"C{colour}", label=label, markersize=4)
    panel.fill_between(places, low, high, color=f"C{colour}", alpha=0.15, linewidth=0)
