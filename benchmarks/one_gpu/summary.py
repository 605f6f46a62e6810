"""All results as one file and one page, with figures derived from several parts.

Loads no jax.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from beagle_jax.files import write_text

Parts = Mapping[str, dict[str, Any]]
# Beagle on MT-Bench, in PyTorch on an RTX 6000 Ada: arXiv 2505.24544, Table 1.
PAPER = {"llama2-7b": {"tau": 4.1, "speedup": 3.0}}


def derived(parts: Parts) -> dict[str, Any]:
    """Returns, by shape, ratios to a plain step, and the speedup at the paper's tau.

    The speedup of a round at tau is tau * plain / round. Parts of one ratio are measured by the
    same process if one call had time for both.
    """
    shapes = sorted({part["shape"] for part in parts.values() if "shape" in part})
    by_shape = {}
    for shape in shapes:
        for phase in ("measure", "unbuffered"):
            plain = _milliseconds(parts.get(f"{phase}-{shape}-plain"))
            if plain:
                by_shape[f"{phase}-{shape}"] = _ratios(parts, phase, shape, plain)
    return by_shape


def _ratios(parts: Parts, phase: str, shape: str, plain: float) -> dict[str, Any]:
    """Returns the ratios of one shape in one phase to its plain step."""
    ratios: dict[str, Any] = {"verify_over_plain": {}, "rounds": {}}
    for name, part in parts.items():
        took = _milliseconds(part)
        if not name.startswith(f"{phase}-{shape}-") or not took:
            continue
        if part["kind"] == "verify":
            ratios["verify_over_plain"][part["rows"]] = took / plain
        if part["kind"] == "round":
            figures = {"round_over_plain": took / plain}
            if shape in PAPER:
                figures["speedup_at_paper_tau"] = PAPER[shape]["tau"] * plain / took
            ratios["rounds"]["x".join(map(str, part["tree"]))] = figures
    if phase == "unbuffered":
        buffered = _milliseconds(parts.get(f"measure-{shape}-plain"))
        ratios["plain_over_buffered"] = buffered and plain / buffered
        for tree, figures in ratios["rounds"].items():
            other = _milliseconds(parts.get(f"measure-{shape}-round-{tree}"))
            mine = figures["round_over_plain"] * plain
            figures["round_over_buffered"] = other and mine / other
    return ratios


def _milliseconds(part: Mapping[str, Any] | None) -> float | None:
    return None if part is None else part.get("milliseconds")


def write_summary(out: Path, parts: Parts, calls: list[dict[str, Any]]) -> None:
    """Writes OUT/results.json and OUT/summary.md."""
    results = {"calls": calls, "parts": dict(parts), "derived": derived(parts), "paper": PAPER}
    write_text(out / "results.json", json.dumps(results, indent=1) + "\n")
    write_text(out / "summary.md", page(parts, calls))


def page(parts: Parts, calls: list[dict[str, Any]]) -> str:
    """Formats the results as Markdown."""
    about = parts.get("measure-device") or parts.get("unbuffered-device") or {}
    lines = ["# One GPU", "", about.get("machine", "no device was measured yet")]
    if "matmul" in about:
        rates = about["matmul"]["dtypes"].items()
        reached = ", ".join(f"{rate / 1e12:.4g} TFLOP/s in {name}" for name, rate in rates)
        copied = about["copy"]["bytes_per_second"] / 1e9
        lines += [
            "",
            f"By itself it reaches {reached} ({about['matmul']['shape'][0]} wide), and copies "
            f"{copied:.4g} GB/s. {_published(about['published'])}.",
        ]
    for name, ratios in derived(parts).items():
        lines += _shape_lines(parts, name, ratios)
    lines += _text_lines(parts)
    for name, part in parts.items():
        if name.startswith("evaluate-") and "report" in part:
            lines += _suite_lines(part)
    failed = [f"* {name}: {part['error']}" for name, part in parts.items() if "error" in part]
    if failed:
        lines += ["", "## Failed", "", *failed]
    if calls:
        lines += ["", "## Time", "", "| phase | seconds allowed | seconds taken | ended |"]
        lines += ["|---|---|---|---|"]
        for call in calls:
            lines.append(
                f"| {call['phase']} | {call['allowed']:.0f} | {call['seconds']:.0f} "
                f"| {call['ended']} |"
            )
    return "\n".join(lines) + "\n"


def _published(figures: Mapping[str, Any] | str) -> str:
    """Formats the published peaks of the chip, or the reason why there are none."""
    if isinstance(figures, str):
        return figures
    rates = ", ".join(
        f"{figures[name] / 1e12:.4g} TFLOP/s in {name}"
        for name in ("bfloat16", "float32")
        if figures[name]
    )
    bandwidth = f"{figures['bandwidth'] / 1e12:.4g} TB/s"
    return f"Published ({figures['source']}): {rates}, {bandwidth}"


def _shape_lines(parts: Parts, name: str, ratios: Mapping[str, Any]) -> list[str]:
    """Formats a table of one shape in one phase."""
    plain = parts[f"{name}-plain"]
    how = " without command buffers" if name.startswith("unbuffered") else ""
    rows = [("plain step", f"{plain['milliseconds']:.3f} ms")]
    if plain.get("over_floor"):
        floor = f"{plain['floor_ms']:.3f} ms"
        rows.append(("over the bandwidth floor", f"{plain['over_floor']:.2f}x ({floor})"))
    if ratios.get("plain_over_buffered"):
        rows.append(("plain, over command buffers", f"{ratios['plain_over_buffered']:.3f}x"))
    for count, ratio in sorted(ratios["verify_over_plain"].items()):
        rows.append((f"verify {count} rows", f"{ratio:.2f}x plain"))
    for tree, figures in ratios["rounds"].items():
        took = figures["round_over_plain"] * plain["milliseconds"]
        text = f"{took:.3f} ms, {figures['round_over_plain']:.2f}x plain"
        if "speedup_at_paper_tau" in figures:
            speedup = figures["speedup_at_paper_tau"]
            text += f"; {speedup:.2f}x plain decoding at the paper's tau"
        if figures.get("round_over_buffered"):
            text += f"; {figures['round_over_buffered']:.3f}x the round with command buffers"
        rows.append((f"round of {tree}", text))
    rows += [row for part_name, part in parts.items() for row in _part_row(name, part_name, part)]
    title = f"## {plain['shape']}, {plain['dtype']}{how}"
    return ["", title, "", "| what | measured |", "|---|---|", *(f"| {a} | {b} |" for a, b in rows)]


def _part_row(name: str, part_name: str, part: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Formats a table row of draft levels or a training step."""
    if not part_name.startswith(f"{name}-") or "error" in part:
        return []
    if part["kind"] == "draft":
        first, further = part["first_level_ms"], part["further_level_ms"]
        text = f"{first:.3f} ms, each further one {further:.3f} (topk {part['topk']})"
        return [("first draft level", text)]
    if part["kind"] in ("early", "late"):
        shares = [
            f"{part[f'share_of_{kind}_peak']:.1%} of the {kind} peak"
            for kind in ("bfloat16", "float32")
            if part.get(f"share_of_{kind}_peak")
        ]
        rate = f"{part['flops_per_second'] / 1e12:.4g} TFLOP/s"
        text = f"{part['milliseconds']:.2f} ms, {part['tokens_per_second']:,.0f} tokens/s, {rate}"
        size = f"{part['rows']} x {part['row_tokens']}"
        return [(f"{part['kind']} step, {size}", ", ".join([text, *shares]))]
    return []


def _text_lines(parts: Parts) -> list[str]:
    lines = []
    if "write" in parts:
        part = parts["write"]
        lines.append(
            f"Text written: {part['answers']:,} answers, {part['answer_tokens']:,} tokens."
        )
    if "train" in parts and "rows" in parts["train"]:
        part = parts["train"]
        lines.append(f"Trained on {part['rows']:,} rows, {part['answer_tokens']:,} answer tokens.")
    elif "train" in parts:
        part = parts["train"]
        where = f"step {part['stopped_after']} of the {part['stopped_in']} stage"
        lines.append(f"Training was ended after {where}; the next call goes on from there.")
    return ["", "## Text and training", "", *lines] if lines else []


def _suite_lines(part: Mapping[str, Any]) -> list[str]:
    """Formats a table of one suite."""
    lines = [
        "",
        f"## {part['suite']}",
        "",
        "| system | tau | tok/s | speedup | as plain decoding |",
    ]
    lines.append("|---|---|---|---|---|")
    systems = part["report"]["suites"][0]["groups"][0]["systems"]
    for name, system in systems.items():
        lines.append(
            f"| {name} | {system['tau']:.2f} | {system['tokens_per_second']:.1f} "
            f"| {system['speedup']:.2f}x | {system['identical_to_plain']}/{system['answers']} |"
        )
    return lines
