"""Plots of measurements (matplotlib, no display needed).

Each plot function writes one file, .png or .svg.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from beagle_jax.decoding.tuning import Tuning
from beagle_jax.evaluation.inside import Played
from beagle_jax.evaluation.report import Milliseconds, Report
from beagle_jax.files import whole
from beagle_jax.model.masks import early_block_mask, window_start

_PHASES = ("draft", "verify", "rest")
_NAME = 36  # characters of a system's name that leave room for the plot


def save(figure: Figure, path: str | Path) -> None:
    """Writes a figure; an interrupted write leaves no partial file."""
    path = Path(path)
    with whole(path) as partial:
        figure.savefig(partial, format=path.suffix.removeprefix("."))


def plot_tuning(tuning: Tuning, path: str | Path) -> None:
    """Plots measured costs, and expected speed by tree size.

    Left: milliseconds of verifying. Right: expected tokens/s of trees with the best number of
    levels, one line per topk.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    cost, promise = figure.subplots(1, 2)
    cost.plot(list(tuning.verify_ms), list(tuning.verify_ms.values()), "o-", label="verify")
    cost.set(
        xscale="log",
        xlabel="tokens verified",
        ylabel="ms",
        title="cost of a round without its draft",
        ylim=(0, None),
    )
    best = tuning.choices[0]
    for topk in sorted({choice.topk for choice in tuning.choices}):
        row = sorted(
            (c.nodes, c.tokens_per_second)
            for c in tuning.choices
            if (c.levels, c.topk) == (best.levels, topk)
        )
        if row:
            promise.plot(*zip(*row, strict=True), ".-", label=f"topk {topk}")
    promise.axhline(tuning.plain_tokens_per_second, color="black", linestyle="--", label="plain")
    promise.set(
        xscale="log", xlabel="nodes", ylabel="expected tokens/s", title=f"{best.levels} levels"
    )
    promise.legend()
    save(figure, path)


def plot_acceptance(report: Report, path: str | Path) -> None:
    """Plots step-alpha by draft depth, one panel per suite, one line per draft."""
    figure = Figure(figsize=(1 + 4 * len(report.suites), 4), layout="constrained")
    for panel, suite in zip(
        figure.subplots(1, len(report.suites), squeeze=False)[0], report.suites, strict=True
    ):
        for name, figures in suite.whole.systems.items():
            if figures.step_alpha:
                panel.plot(
                    range(1, len(figures.step_alpha) + 1),
                    figures.step_alpha,
                    "o-",
                    label=f"{_short(name)}, tau {figures.tau:.2f}",
                )
        panel.set(xlabel="draft depth", ylabel="step-alpha", title=_short(suite.name), ylim=(0, 1))
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.legend(fontsize="small")
    save(figure, path)


def plot_phases(report: Report, path: str | Path) -> None:
    """Plots the milliseconds of a round by phase, one bar per system of a report."""
    plot_rounds({system.name: system.milliseconds for system in report.systems}, path)


def plot_rounds(rounds: Mapping[str, Milliseconds], path: str | Path) -> None:
    """Plots the milliseconds of a round by phase, one bar per system whose phases were measured.

    A negative rest (the phases measured alone took longer than the round) is not drawn.
    """
    measured = {name: times for name, times in rounds.items() if times.draft is not None}
    figure = Figure(figsize=(8, 1.5 + 0.5 * len(measured)), layout="constrained")
    panel, left = figure.subplots(), np.zeros(len(measured))
    for phase in _PHASES:
        width = np.array([max(getattr(times, phase), 0.0) for times in measured.values()])
        panel.barh(range(len(measured)), width, left=left, label=phase)
        left += width
    panel.set_yticks(range(len(measured)), [_short(name) for name in measured])
    panel.set(xlabel="ms per round", title="time by phase")
    panel.invert_yaxis()
    panel.legend()
    save(figure, path)


def _short(name: str) -> str:
    """Shortens a long name, for example a folder path, to its end."""
    return name if len(name) <= _NAME else f"..{name[2 - _NAME :]}"


def mask_levels(width: int, window: int, steps: int, offset: int) -> np.ndarray:
    """Training mask as levels [query, key].

    1: a true state is visible. 2: a state predicted in the query's own window is visible. 0:
    neither.

    steps = 1 is the early stage. In the late stage, a query at window offset j < steps sees the j
    predicted states before it. Queries further on are not trained; they see true states only.
    """
    seen_LL = np.asarray(
        early_block_mask(jnp.array([[width]]), width, window, jnp.int32(offset))[0]
    ).astype(int)
    query_L1, key_1L = np.arange(width)[:, None], np.arange(width)[None]
    start_L1 = np.asarray(window_start(jnp.arange(width), window, jnp.int32(offset)))[:, None]
    predicted_LL = (key_1L >= start_L1) & (key_1L < query_L1) & (query_L1 - start_L1 < steps)
    return np.where(predicted_LL, 2, seen_LL)


def plot_masks(
    early_window: int,
    late_window: int,
    steps: int,
    path: str | Path,
    *,
    width: int = 16,
    offset: int = 2,
) -> None:
    """Plots the masks of both training stages on a short row."""
    figure = Figure(figsize=(10, 5), layout="constrained")
    panels = figure.subplots(1, 2)
    stages = (
        (f"early stage, window {early_window}", early_window, 1),
        (f"late stage, window {late_window}, {steps} steps", late_window, steps),
    )
    colours = ListedColormap(["white", "tab:blue", "tab:orange"])
    for panel, (title, window, simulated) in zip(panels, stages, strict=True):
        panel.imshow(mask_levels(width, window, simulated, offset), cmap=colours, vmin=0, vmax=2)
        panel.set(title=title, xlabel="key", ylabel="query")
        panel.set_xticks(np.arange(-0.5, width), minor=True)
        panel.set_yticks(np.arange(-0.5, width), minor=True)
        panel.grid(which="minor", color="lightgray", linewidth=0.5)
    figure.supxlabel(
        "blue: true states; orange: states predicted in the same window", fontsize="small"
    )
    save(figure, path)


def plot_training(log: str | Path, path: str | Path) -> bool:
    """Plots loss and top-1 agreement by window offset over training steps, from a log.jsonl.

    One row of panels per stage; dashed lines are held-out rows. Returns whether there was anything
    to plot: a run that has just started has not logged a loss.
    """
    whole = [
        line
        for line in Path(log).read_text(encoding="utf-8").splitlines(keepends=True)
        if line.endswith("\n")
    ]
    lines = [
        line for line in map(json.loads, whole) if "loss" in line
    ]  # a killed run can leave an incomplete last line; it is ignored
    if not lines:
        return False
    stages = list(dict.fromkeys(line["stage"] for line in lines))
    figure = Figure(figsize=(10, 3.5 * len(stages)), layout="constrained")
    for (loss, agree), stage in zip(
        figure.subplots(len(stages), 2, squeeze=False), stages, strict=True
    ):
        for split, style in ((None, "-"), ("held_out", "--")):
            # A resumed run logs the steps after its checkpoint again; the last record counts.
            by_step = {
                line["step"]: line
                for line in lines
                if line["stage"] == stage and line.get("split") == split
            }
            if not by_step:
                continue
            steps, records = sorted(by_step), [by_step[step] for step in sorted(by_step)]
            loss.plot(steps, [line["loss"] for line in records], style, label=split or "training")
            for offset in range(len(records[0]["top1_by_offset"])):
                agree.plot(
                    steps,
                    [line["top1_by_offset"][offset] for line in records],
                    style,
                    color=f"C{offset}",
                    label=None if split else f"offset {offset}",
                )
        loss.set(xlabel="step", ylabel="loss", title=f"{stage} stage")
        agree.set(
            xlabel="step",
            ylabel="top-1 agreement with the target",
            ylim=(0, 1),
            title=f"{stage} stage",
        )
        loss.legend()
        agree.legend(fontsize="small")
    save(figure, path)
    return True


def plot_attention(weights_TS: np.ndarray, path: str | Path, *, first: int) -> None:
    """Plots where the draft attends at each position of an answer, newest states at the right.

    first: the position of weight row 0.
    """
    figure = Figure(figsize=(9, 4), layout="constrained")
    panel = figure.subplots()
    T, S = weights_TS.shape
    drawn = panel.imshow(
        np.sqrt(weights_TS),
        aspect="auto",
        cmap="magma",
        extent=(0, S, first + T, first),
        interpolation="nearest",
    )
    panel.set(
        xlabel="position of the state",
        ylabel="position of the query",
        title="attention of the draft, mean over heads",
    )
    figure.colorbar(drawn, label="square root of the weight")
    save(figure, path)


def plot_tree(played: Played, path: str | Path, name: Callable[[int], str] = str) -> None:
    """Plots the tree of one round with its accepted path in colour.

    name: returns the text of a token.
    """
    height = _heights(played)
    figure = Figure(
        figsize=(2.5 + 2 * played.depth_W.max(), 1.5 + 0.35 * (height.max() + 1)),
        layout="constrained",
    )
    panel = figure.subplots()
    for node, (parent, depth) in enumerate(zip(played.parent_W, played.depth_W, strict=True)):
        taken = node in played.path
        if node:
            panel.plot(
                [played.depth_W[parent], depth],
                [height[parent], height[node]],
                color="tab:green" if taken else "lightgray",
                zorder=1,
            )
        panel.text(
            depth,
            height[node],
            repr(name(int(played.token_W[node]))),
            ha="center",
            va="center",
            fontsize=9,
            parse_math=False,
            bbox={
                "boxstyle": "round",
                "facecolor": "palegreen" if taken else "white",
                "edgecolor": "gray",
            },
        )
    panel.set(
        xlim=(-0.5, played.depth_W.max() + 0.5),
        ylim=(height.max() + 0.7, -0.7),
        xlabel="draft depth",
        yticks=[],
    )
    panel.set_xticks(range(played.depth_W.max() + 1))
    written = "".join(name(token) for token in played.written)
    panel.set_title(
        f"one round: {len(played.path) - 1} drafts accepted, wrote {written!r}",
        fontsize="medium",
        parse_math=False,
    )
    save(figure, path)


def _heights(played: Played) -> np.ndarray:
    """Returns the vertical position of each node.

    Leaves are one below the other; a parent is centred on its children.
    """
    height, leaves = np.zeros(len(played.token_W)), 0
    children: list[list[int]] = [[] for _ in played.token_W]
    for node in range(1, len(played.token_W)):
        children[played.parent_W[node]].append(node)

    def place(node: int) -> float:
        nonlocal leaves
        below: Sequence[float] = [place(child) for child in children[node]]
        if not below:
            leaves += 1
        height[node] = np.mean(below) if below else leaves - 1
        return height[node]

    place(0)
    return height
