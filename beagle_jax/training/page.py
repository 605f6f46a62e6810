"""A run's page: <train.folder>/report.html, one file with its curves and its configuration.

It is drawn from log.jsonl, so a resumed run shows all of its steps.
"""

import html
import io
import json
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from beagle_jax.config import Config
from beagle_jax.files import write_text
from beagle_jax.processes import is_first
from beagle_jax.remote import local

CONFIG = "config.txt"  # beside the page: the configuration, with the origin of each value

_STYLE = """:root{color-scheme:light dark}
body{font:15px/1.5 system-ui,sans-serif;max-width:72em;margin:2em auto;padding:0 1em}
.curves{display:grid;grid-template-columns:repeat(auto-fit,minmax(22em,1fr));gap:1em}
figure{margin:0}
.curves svg{width:100%;height:auto;background:#fff;border-radius:6px}
table{border-collapse:collapse;margin:1em 0;display:block;overflow-x:auto}
th,td{padding:.25em .8em;text-align:right;border-bottom:1px solid #8886}
th:first-child,td:first-child{text-align:left}
pre{overflow-x:auto;font-size:13px;padding:1em;border:1px solid #8886;border-radius:6px}"""
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))
_SHOWN = ("loss", "top1_by_offset", "tokens_per_second", "learning_rate", "grad_norm", "data_wait")


class Record(NamedTuple):
    """One record of the log."""

    stage: str
    split: str  # "" for training
    step: int  # over all stages
    values: dict[str, Any]


def write_page(config: Config) -> None:
    """Draws the page of a run anew; only the first process does."""
    folder = local(config.train.folder)
    path = folder / "log.jsonl"
    if not is_first() or not path.exists():
        return
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    records = _records(lines, config)
    if records:
        described = folder / CONFIG
        text = described.read_text(encoding="utf-8") if described.exists() else ""
        write_text(folder / "report.html", _page(config, records, text))


def _records(lines: Iterable[dict[str, Any]], config: Config) -> list[Record]:
    """Returns the newest record of each step, in order; a resumed run logs some steps again."""
    before, start = 0, {}
    for name, stage in config.train.stages_to_run.items():
        start[name] = before
        before += stage.steps
    newest = {
        (line["stage"], line.get("split", ""), line["step"]): line
        for line in lines
        if line["stage"] in start
    }
    records = [
        Record(stage, split, start[stage] + step, line)
        for (stage, split, step), line in newest.items()
    ]
    return sorted(records, key=lambda record: record.step)


def _page(config: Config, records: list[Record], described: str) -> str:
    charts = [(title, drawn) for title, draw in _CHARTS.items() if (drawn := _svg(draw, records))]
    figures = [
        f"<figure><figcaption>{title}</figcaption>{drawn}</figure>" for title, drawn in charts
    ]
    title = f"{config.draft.kind} draft of {config.target.source}"
    parts = [
        '<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content="'
        f'width=device-width"><title>{html.escape(title)}</title><style>{_STYLE}</style>',
        f"<h1>{html.escape(title)}</h1><p>{html.escape(_state(config, records))}</p>",
        f'<div class="curves">{"".join(figures)}</div>',
        f"<h2>Latest figures</h2>{_table(records)}",
    ]
    if described:
        parts.append(f"<h2>Configuration</h2><pre>{html.escape(described)}</pre>")
    return "\n".join(parts) + "</html>\n"


def _state(config: Config, records: list[Record]) -> str:
    total = sum(stage.steps for stage in config.train.stages_to_run.values())
    clock = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    last = records[-1]
    return (
        f"{last.stage} stage, step {last.values['step']}; {last.step} of {total} steps of the run. "
        f"Drawn {clock}."
    )


def _table(records: list[Record]) -> str:
    """Returns the newest record of each stage and split as rows of a table."""
    newest = {(record.stage, record.split): record for record in records}
    head = "".join(f"<th>{name}</th>" for name in ("stage", "step", *_SHOWN, "tau"))
    rows = []
    for (stage, split), record in newest.items():
        cells = [f"{stage} {split}".strip(), str(record.values["step"])]
        cells += [_cell(record.values.get(name)) for name in (*_SHOWN, "tau")]
        rows.append("".join(f"<td>{html.escape(cell)}</td>" for cell in cells))
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return " ".join(map(_cell, value)) if isinstance(value, list) else f"{value:g}"


def _svg(draw: Callable[[Axes, list[Record]], None], records: list[Record]) -> str:
    """Draws one chart; "" if the log has nothing for it."""
    figure = Figure(figsize=(5, 3.2))
    axes = figure.add_axes((0.15, 0.14, 0.82, 0.78))
    draw(axes, records)
    if not axes.lines:
        return ""
    axes.set_xlabel("step")
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=8)
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg", metadata=_NO_METADATA)
    text = drawn.getvalue()
    return text[text.index("<svg") :]


def _line(axes: Axes, records: list[Record], key: str, split: str, label: str) -> None:
    """Adds one line for each stage, in its colour; of lists one for each place, in its colour."""
    for number, stage in enumerate(dict.fromkeys(record.stage for record in records)):
        points = [r for r in records if (r.stage, r.split) == (stage, split) and key in r.values]
        if not points:
            continue
        steps, values = [r.step for r in points], [r.values[key] for r in points]
        name = " ".join(part for part in (stage, label) if part)
        if isinstance(values[0], list):
            for depth, line in enumerate(zip(*values, strict=True), 1):
                known = f"{label} {depth}" in axes.get_legend_handles_labels()[1]
                axes.plot(
                    steps,
                    line,
                    ".-",
                    label=None if known else f"{label} {depth}",
                    color=f"C{depth - 1}",
                    linewidth=1,
                )
        else:
            style = "o--" if split else "-"
            axes.plot(steps, values, style, label=name, color=f"C{number}", linewidth=1)


def _losses(axes: Axes, records: list[Record]) -> None:
    _line(axes, records, "loss", "", "training")
    _line(axes, records, "loss", "held_out", "held out")
    axes.set_ylabel("loss")


def _agreement(axes: Axes, records: list[Record]) -> None:
    split = "held_out" if any(record.split == "held_out" for record in records) else ""
    _line(axes, records, "top1_by_offset", split, "offset")
    axes.set(ylabel="share", ylim=(0, 1))


def _one(key: str, split: str, unit: str, scale: str = "linear") -> Any:
    def draw(axes: Axes, records: list[Record]) -> None:
        _line(axes, records, key, split, "")
        axes.set(ylabel=unit, yscale=scale)

    return draw


def _waits(axes: Axes, records: list[Record]) -> None:
    _line(axes, records, "data_wait", "", "data")
    _line(axes, records, "checkpoint_wait", "", "checkpoints")
    axes.set(ylabel="share of the time", ylim=(0, None))


_CHARTS: dict[str, Callable[[Axes, list[Record]], None]] = {
    "Loss": _losses,
    "Agreement with the target by offset": _agreement,
    "Tau, decoded": _one("tau", "decoding", "tokens a round"),
    "Answer tokens per second": _one("tokens_per_second", "", "tokens/s"),
    "Waiting": _waits,
    "Utilisation of the chips": _one("utilisation", "", "share of the peak"),
    "Memory of a device": _one("memory_peak", "", "bytes"),
    "Learning rate": _one("learning_rate", "", "rate"),
    "Gradient norm before clipping": _one("grad_norm", "", "norm", "log"),
}
