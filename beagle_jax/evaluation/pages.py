"""The report as Markdown and as one self-contained HTML page with its pictures."""

import base64
import html
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from beagle_jax.evaluation.report import Audit, Group, Memory, Report, paying

_STYLE = """body{font:15px/1.5 system-ui,sans-serif;margin:2em auto}
body{max-width:70em;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:1em 0}
th,td{padding:.25em .8em;text-align:right;border-bottom:1px solid #ddd}
th:first-child,td:first-child{text-align:left}img{max-width:100%}h2{margin-top:2em}"""
_MEGABYTE = 2**20


class Section(NamedTuple):
    """A heading, sentences, and a table; no rows means no table."""

    title: str
    sentences: list[str]
    head: list[str]
    rows: list[list[str]]


def sections(report: Report) -> list[Section]:
    """Converts the whole report to sections of text."""
    made = [_environment(report)]
    for suite in report.suites:
        left_out = []
        if suite.turns_left_out:
            left_out = [f"{suite.turns_left_out} turns did not fit the context and were left out."]
        made += [
            _group(suite.name, group, left_out if group.by == "all" else [])
            for group in suite.groups
        ]
    made += [_throughput(report), _times(report), _memory(report)]
    if report.audit is not None:
        made += [_audit(report.audit), _divergences(report.audit)]
    return [section for section in made if section.rows or section.sentences]


def markdown(report: Report) -> str:
    """The report as Markdown."""
    lines = ["# Evaluation", ""]
    for section in sections(report):
        lines += [f"## {section.title}", "", *[f"{sentence}\n" for sentence in section.sentences]]
        if section.rows:
            escaped = [
                [cell.replace("|", "\\|") for cell in row] for row in (section.head, *section.rows)
            ]
            lines += [
                _pipes(escaped[0]),
                _pipes(["---", *["---:"] * (len(section.head) - 1)]),
                *map(_pipes, escaped[1:]),
                "",
            ]
    return "\n".join(lines).rstrip() + "\n"


def _pipes(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def page(report: Report, pictures: dict[str, Path]) -> str:
    """Renders the report as HTML.

    pictures: PNG files by title; the page embeds them.
    """
    parts = [
        "<!doctype html><html lang=en><meta "
        f"charset=utf-8><title>Evaluation</title><style>{_STYLE}</style><h1>Evaluation</h1>"
    ]
    for section in sections(report):
        parts.append(f"<h2>{html.escape(section.title)}</h2>")
        parts += [f"<p>{html.escape(sentence)}</p>" for sentence in section.sentences]
        if section.rows:
            rows = [_cells("th", section.head), *(_cells("td", row) for row in section.rows)]
            parts.append(f"<table>{''.join(rows)}</table>")
    for title, path in pictures.items():
        encoded = base64.b64encode(path.read_bytes()).decode("ascii")
        parts.append(
            f'<h2>{html.escape(title)}</h2><img alt="{html.escape(title)}" '
            f'src="data:image/png;base64,{encoded}">'
        )
    return "\n".join(parts) + "</html>\n"


def _cells(tag: str, cells: list[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"


def _environment(report: Report) -> Section:
    decode, where = report.settings["decode"], report.environment
    drawn = (
        f"temperature {decode['temperature']}, top_k {decode['top_k']}, top_p {decode['top_p']}"
        if decode["temperature"]
        else "greedy"
    )
    sentences = [
        f"Target {report.settings['target']['source']} in "
        f"{report.settings['target']['dtype']}, {drawn}, up to "
        f"{report.settings['eval']['max_new_tokens']} new tokens.",
        f"{where.machine}; Python {where.python}, jaxlib {where.jaxlib}, beagle_jax "
        f"{where.beagle_jax}; {where.devices} {'device' if where.devices == 1 else 'devices'}.",
        *report.notes,
    ]
    rows = [
        [
            system.name,
            system.tree,
            str(system.nodes),
            str(system.compiles_after_warm_up),
        ]
        for system in report.systems
    ]
    return Section(
        "What was compared",
        sentences,
        ["system", "tree", "tokens verified per round", "compiles after warm-up"],
        rows,
    )


def _group(suite: str, group: Group, sentences: list[str]) -> Section:
    what = {
        "all": suite,
        "category": f"{suite}: {group.of or 'no category'}",
        "context": f"{suite}: prompts up to {group.of} tokens",
    }[group.by]
    head = [
        "system",
        "tau",
        "tok/s",
        "decode tok/s",
        "speedup",
        "rounds",
        "tokens",
        "identical",
        "step-alpha by depth",
    ]
    rows = []
    for name, figures in group.systems.items():
        alpha = " ".join(f"{share:.2f}" for share in figures.step_alpha)

        def between(edges: Sequence[float]) -> str:
            return f" [{edges[0]:.2f}, {edges[1]:.2f}]" if group.prompts > 1 else ""

        rows.append(
            [
                name,
                f"{figures.tau:.2f}{between(figures.tau_interval)}",
                f"{figures.tokens_per_second:.1f}",
                f"{figures.decode_tokens_per_second:.1f}",
                f"{figures.speedup:.2f}x{between(figures.speedup_interval)}",
                str(figures.rounds),
                str(figures.tokens),
                f"{figures.identical_to_plain}/{figures.answers}",
                alpha,
            ]
        )
    unit = "turn" if group.by == "context" else "prompt"
    summary = (
        f"{group.prompts} {unit}s; in brackets 95 % intervals over {unit}s."
        if group.prompts > 1
        else f"One {unit}: no intervals."
    )
    return Section(what, [summary, *sentences], head, rows)


def _throughput(report: Report) -> Section:
    names = [system.name for system in report.systems]
    rows = []
    for entry in report.throughput:
        cells = [str(entry.batch)]
        for name in names:
            values = entry.systems[name]
            speedup = "" if name == names[0] else f" ({values.speedup:.2f}x)"
            cells.append(f"{values.tokens_per_second:.1f}{speedup}")
        rows.append(cells)
    sentences = []
    if rows:
        answers = report.throughput[0].answers
        sentences = [
            f"{answers} answers each; in brackets the speedup at the same batch size.",
            *paying(report),
        ]
    return Section("Throughput by batch size, tok/s", sentences, ["batch", *names], rows)


def _times(report: Report) -> Section:
    phases = ["prefill", "round", "draft", "verify", "rest"]
    rows = [
        [
            system.name,
            *(
                "" if (value := getattr(system.milliseconds, phase)) is None else f"{value:.2f}"
                for phase in phases
            ),
        ]
        for system in report.systems
    ]
    sentence = (
        "Prefill and round: means over whole answers. Draft and verify: each alone in a loop, "
        "at the shapes of a prompt of middle length. Rest: what a round takes beyond the two; "
        "below zero where the parts alone took longer."
    )
    best = [
        f"{system.name}: at best {system.best_speedup:.2f}x with this acceptance (tau times plain "
        "decoding's verify, over draft and verify)."
        for system in report.speculative
        if system.best_speedup is not None
    ]
    return Section("Time by phase, ms", [sentence, *best], ["system", *phases], rows)


def _memory(report: Report) -> Section:
    rows = [
        [
            system.name,
            *("" if value is None else f"{value / _MEGABYTE:.1f}" for _, value in system.bytes),
        ]
        for system in report.systems
        if system.bytes is not None
    ]
    sentence = (
        "Temporaries as the compiled programs state them; the device's peak is of the whole "
        "process."
    )
    return Section(
        "Memory, MiB",
        [sentence] if rows else [],
        ["system", *(name.replace("_", " ") for name in Memory.model_fields)],
        rows,
    )


def _audit(audit: Audit) -> Section:
    rows = [
        [check.name, "passed" if check.passed else "FAILED", check.figures]
        for check in audit.checks
    ]
    sentence = (
        f"Rounding moves a logit by up to {audit.noise:.3g}; gaps of two logits up to "
        f"{audit.reach:.3g} are explained by it."
    )
    return Section("Audit", [sentence], ["check", "", "found"], rows)


def _divergences(audit: Audit) -> Section:
    rows = [
        [
            divergence.system,
            f"{divergence.suite} prompt {divergence.number}, turn {divergence.turn}, "
            f"token {divergence.place}",
            divergence.change,
            f"{divergence.gap:.3g}",
            f"{divergence.top_2_gap:.3g}",
            {True: "yes", False: "NO", None: ""}[divergence.within_noise],
        ]
        for divergence in audit.divergences
    ]
    head = ["system", "where", "token", "logit gap", "gap of the two best", "explained by rounding"]
    return Section("Where answers part from plain decoding's", [], head, rows)


def acceptance(report: Report) -> str:
    """Formats the results of the report's first draft for a model card, one line per suite."""
    system = report.speculative[0]
    lines = [
        "| suite | prompts | tau | 95 % interval | speedup | identical to plain decoding |",
        "|---|---|---|---|---|---|",
    ]
    for suite in report.suites:
        results = suite.whole.systems[system.name]
        low, high = results.tau_interval
        lines.append(
            f"| {suite.name} | {suite.whole.prompts} | {results.tau:.2f} | {low:.2f} to "
            f"{high:.2f} | {results.speedup:.2f}x | "
            f"{results.identical_to_plain}/{results.answers} |"
        )
    return "\n".join([f"{system.tree}, on {report.environment.machine}", "", *lines])
