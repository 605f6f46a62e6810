"""Turns what the runs wrote to their folders into figures and the table of claims."""

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from claims import (
    FAILS,
    HOLDS,
    OPEN,
    RELATIVE,
    SMALLER,
    Points,
    Value,
    having,
    judged,
    shown_by,
    value_of,
)
from pictures import draw_curve, draw_depth
from plan import Figure, Plan, Training

from beagle_jax.evaluation.figures import environment
from beagle_jax.evaluation.plots import plot_rounds
from beagle_jax.evaluation.report import Milliseconds
from beagle_jax.files import write_text
from beagle_jax.json_file import read_json
from beagle_jax.weights.model_card import TRAINED_WITH, installed

Found = dict[str, dict[int, Points]]  # by run, by seed: measurements in order of steps


def write_results(
    plan: Plan,
    failed: Mapping[str, str],
    *,
    whole: bool = True,
    shows: Mapping[str, float] | None = None,
) -> str:
    """Writes every figure's JSON and PNG and the table of claims; returns the table.

    whole: whether `plan` is the whole plan; a part's table does not replace the whole one's. shows:
    what its seeds can show, by claim (power.py).
    """
    plan.results.mkdir(parents=True, exist_ok=True)
    measurements = measured(plan) | decoded(plan)
    # data.folder is a path of this machine, so it is left out.
    base = {key: value for key, value in plan.base.items() if key != "data.folder"}
    about = {
        "environment": environment().model_dump(),
        "versions": installed(TRAINED_WITH),
        "base": base,
    }
    lines = [
        judged(claim, measurements, plan.interval, (shows or {}).get(claim.says, 0.0))
        for claim in plan.claims
    ]
    tables: list[str] = []
    for name, figure in plan.figures.items():
        runs = {
            label: values(plan, measurements, label)
            for label in figure.of
            if measurements.get(label)
        }
        missing = {label: _reason(label, failed) for label in figure.of if label not in runs}
        made = {
            "figure": name,
            "title": figure.title,
            "runs": runs,
            "not_run": missing,
            "claims": [line for line in lines if line["figure"] == name],
            **about,
        }
        write_text(plan.results / f"{name}.json", json.dumps(made, indent=1) + "\n")
        if runs and figure.kind == "table":
            tables += ["", *systems_table(runs)]
        elif len(runs) > 1:
            draw(figure, runs, plan.results / f"{name}.png")
    columns = {plan.title: lines}
    if plan.beside:
        columns[plan.beside.title] = lines_of(Path(plan.beside.results))
    text = "\n".join([*claims_table(columns), *tables, "", sentence(lines, about)]) + "\n"
    if whole:
        write_text(plan.results / "claims.md", text)
    return text


def _reason(name: str, failed: Mapping[str, str]) -> str:
    """Returns why a run or a draft of an evaluation has no results."""
    return next(
        (
            why
            for label, why in failed.items()
            if label.rsplit("-", 1)[0] == name or label == name.split(".")[0]
        ),
        "not run",
    )


def measured(plan: Plan) -> Found:
    """Reads the measurements of every finished training."""
    measurements: Found = {}
    for training in plan.trainings():
        paths = [
            plan.folder_of(training) / f"step-{step}.json"
            for step in plan.runs[training.name].points
        ]
        points = [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.exists()]
        if len(points) == len(paths):  # an unfinished run is not compared with finished ones
            measurements.setdefault(training.name, {})[training.seed] = points
    return measurements


def decoded(plan: Plan) -> Found:
    """Reads every draft of every finished evaluation, under evaluation.run.

    A draft is one measurement of its seed.
    """
    measurements: Found = {}
    for name in plan.evaluations:
        for folder, drafts in plan.evaluated(name).items():
            if not (folder / "report.json").exists():
                continue
            report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
            answers = [
                json.loads(line)
                for line in (folder / "answers.jsonl").read_text(encoding="utf-8").splitlines()[1:]
            ]
            plain, *systems = report["systems"]
            for draft, system in zip(drafts, systems, strict=True):
                measurements.setdefault(f"{name}.{draft.name}", {})[draft.seed] = [
                    _from_answers(answers, system, plain)
                ]
    return measurements


def _from_answers(
    answers: list[dict], system: Mapping[str, Any], plain: Mapping[str, Any]
) -> dict[str, Any]:
    """Sums each prompt over its turns, and adds the report's round times and memory.

    plain: plain decoding in the same process.
    """
    own = [[turn[system["name"]]["answer"] for turn in case["turns"]] for case in answers]

    def seconds(turns):
        return sum(answer["prefill_seconds"] + answer["decode_seconds"] for answer in turns)

    return {
        "step": 0,
        "tokens": [sum(len(answer["tokens"]) - 1 for answer in turns) for turns in own],
        "rounds": [sum(answer["rounds"] for answer in turns) for turns in own],
        "accepted": [
            [sum(counts) for counts in zip(*(answer["accepted"] for answer in turns), strict=True)]
            for turns in own
        ],
        "seconds": [seconds(turns) for turns in own],
        "plain_seconds": [
            seconds([turn[plain["name"]]["answer"] for turn in case["turns"]]) for case in answers
        ],
        "written": [sum(len(answer["tokens"]) for answer in turns) for turns in own],
        "milliseconds": system["milliseconds"],
        "bytes": _peak(system["bytes"]),
        "plain_bytes": _peak(plain["bytes"]),
    }


def _peak(parts: Mapping[str, int | None]) -> int:
    """Bytes of weights, caches and the larger of the two programs' temporaries."""
    held = sum(
        parts[name] for name in ("target_weights", "draft_weights", "target_cache", "draft_cache")
    )
    return held + max(parts["decode_temporaries"] or 0, parts["prefill_temporaries"] or 0)


def values(plan: Plan, by_run: Found, name: str) -> dict[str, Any]:
    """Returns a figure's values of one run, each with the ends of its 95 % interval."""
    run = by_run[name]
    points_of_one = next(iter(run.values()))  # all seeds are measured at the same steps
    last = points_of_one[-1]
    made: dict[str, Any] = {"seeds": sorted(run), "prompts": len(last["tokens"]), "curve": []}
    for place, point in enumerate(points_of_one):
        upto = {seed: points[: place + 1] for seed, points in run.items()}
        made["curve"].append({"step": point["step"], **_figures(upto)})
    if timed := having(
        by_run.get(name.rpartition(".")[2], {}), "training_speed"
    ):  # for an evaluation's draft: of its run
        made["training_tokens_per_second"] = value_of(timed, "training_speed").rounded
    if "seconds" in last:
        made |= _costs(run)
    before = {}
    if name in plan.runs and plan.runs[name].after:
        for above in {plan.above(Training(name, seed)) for seed in run}:
            before |= {above.seed: by_run.get(above.name, {}).get(above.seed)}
    if before and all(before.values()):  # the curve starts where the previous run's ended
        start = sum(plan.runs[above].steps for above in plan.before(name))
        made["curve"] = [
            {"step": start, **_figures(before)},
            *({**point, "step": point["step"] + start} for point in made["curve"]),
        ]
    return made


def _costs(run: Mapping[int, Points]) -> dict[str, Any]:
    """Returns times and memory of an evaluation's draft over all its seeds."""
    lasts = [points[-1] for points in run.values()]
    made = {
        measure: value_of(run, measure).rounded
        for measure in ("speedup", "tokens_per_second", "plain_tokens_per_second")
    }
    made["milliseconds"] = {
        phase: round(fmean(last["milliseconds"][phase] for last in lasts), 3)
        for phase in lasts[0]["milliseconds"]
    }
    return made | {
        key: round(fmean(last[key] for last in lasts)) for key in ("bytes", "plain_bytes")
    }


def _figures(run: Mapping[int, Points]) -> dict[str, Any]:
    depths = len(next(iter(run.values()))[-1]["accepted"][0]) - 1
    return {
        "tau": value_of(run, "tau").rounded,
        "step_alpha": [value_of(run, f"alpha_{depth}").rounded for depth in range(1, depths + 1)],
    }


def draw(figure: Figure, runs: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Draws a figure from its values."""
    if figure.kind == "curve":
        draw_curve(figure.title, runs, path)
    elif figure.kind == "depth":
        draw_depth(figure.title, runs, path)
    elif figure.kind == "phases":

        def label(name, run):
            return f"{name}, tau {run['curve'][-1]['tau'][0]:.2f}, {run['speedup'][0]:.2f}x"

        rounds = {label(*item): Milliseconds(**item[1]["milliseconds"]) for item in runs.items()}
        plot_rounds(rounds, path)


def lines_of(results: Path) -> list[dict[str, Any]]:
    """Reads the lines of another plan's claims from its figures."""
    made = []
    for path in sorted(results.glob("*.json")):
        for line in read_json(path, "draw the figures of its plan again")["claims"]:
            if line["verdict"] == OPEN and "difference" in line and "seen" not in line:
                line["seen"] = shown_by(Value(*line["difference"]))  # written by an older version
            made.append(line)
    return made


def claims_table(columns: Mapping[str, list[dict[str, Any]]]) -> list[str]:
    """Formats the verdicts as Markdown, two columns a target.

    columns: lines of claims by target; the claims are those of the first.
    """
    heads = [cell for title in columns for cell in (title, "verdict")]
    rows = [f"| figure | the paper | {' | '.join(heads)} |", "| --- " * (2 + len(heads)) + "|"]
    first, *others = columns.values()
    by_name = [{line["says"]: line for line in lines} for lines in others]
    missing = {"verdict": OPEN, "here": "not run"}
    for line in first:
        lines = [line, *(there.get(line["says"], missing) for there in by_name)]
        cells = [cell for each in lines for cell in (each["here"], said(each))]
        rows.append(f"| {line['figure']} | {line['says']} | {' | '.join(cells)} |")
    return rows


def said(line: Mapping[str, Any]) -> str:
    """Returns a verdict in words; an open one says how small the difference is."""
    if "seen" not in line:
        return line["verdict"]
    relative = line["measure"] in RELATIVE
    size = f"{100 * line['seen']:.1f} %" if relative else f"{line['seen']:.3f}"
    return f"{SMALLER} ({size})"


def sentence(lines: list[dict[str, Any]], about: Mapping[str, Any]) -> str:
    """Counts the claims by verdict and names the machine."""
    kinds = [SMALLER if "seen" in line else line["verdict"] for line in lines]
    counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in (HOLDS, FAILS, SMALLER, OPEN))
    return (
        f"Of {len(lines)} claims: {counts}. With one seed an interval is of prompts alone. "
        f"{about['environment']['machine']}."
    )


def systems_table(runs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Formats the columns of the paper's Table 1 as Markdown."""
    first = next(iter(runs.values()))
    rows = [
        "| draft | seeds | tau | tok/s | speedup | peak memory | trains, tok/s |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        f"| none | | 1.00 | {_with(first['plain_tokens_per_second'], 1)} | 1.00x | "
        f"{first['plain_bytes'] / 2**20:.0f} MB | |",
    ]
    for name, run in runs.items():
        tau, speed = _with(run["curve"][-1]["tau"], 2), _with(run["tokens_per_second"], 1)
        trains = (
            _with(run["training_tokens_per_second"], 0)
            if "training_tokens_per_second" in run
            else "not timed"
        )
        rows.append(
            f"| {name.split('.')[1]} | {len(run['seeds'])} | {tau} | {speed} | "
            f"{_with(run['speedup'], 2, 'x')} | {run['bytes'] / 2**20:.0f} MB | {trains} |"
        )
    return rows


def _with(value: list[float], digits: int, unit: str = "") -> str:
    return f"{value[0]:.{digits}f}{unit} [{value[1]:.{digits}f}, {value[2]:.{digits}f}]"
