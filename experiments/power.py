"""What a plan's seeds can show, from a pilot: written to a file before the runs, and held to.

    python experiments/run.py experiments/tiny.yaml --pilot    # other seeds, in a folder of its own

The pilot trains every run with seeds of its own. Its file (`registered:` of the plan) has the rule
of each claim (measure, runs, margin, seeds), the effect that it must show, and the smallest
distance from the margin that these seeds show four times in five. It does not have the pilot's
differences. Commit it before the runs: the runner refuses claims that differ from it.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from claims import Points, compared
from plan import Claim, Plan
from spread import Spread, pooled

from beagle_jax.errors import UserError
from beagle_jax.evaluation.figures import environment
from beagle_jax.files import write_text
from beagle_jax.json_file import read_json

_MAKE = "make it with --pilot, and commit it before the runs"


def rule_of(plan: Plan, claim: Claim) -> dict[str, Any]:
    """Returns what decides a claim, as plain values."""
    names = {name.rpartition(".")[2] for name in (claim.more, *claim.less)}
    return {
        "says": claim.says,
        "measure": claim.measure,
        "more": claim.more,
        "less": list(claim.less),
        "at_least": claim.at_least,
        "alike": claim.alike,
        "effect": effect_of(plan, claim),
        "seeds": min(len(plan.runs[name].seeds) for name in names),
    }


def effect_of(plan: Plan, claim: Claim) -> float:
    """Returns the distance from the margin that a claim must show; with `alike`, that margin."""
    if claim.alike is not None:
        return claim.alike
    return plan.effects[claim.measure] if claim.effect is None else claim.effect


def register(
    plan: Plan, pilot: Mapping[str, Mapping[int, Points]], path: Path
) -> list[dict[str, Any]]:
    """Writes what the seeds of `plan` can show, from the measurements of a pilot, to a file.

    Returns the lines of the file, one a claim.

    Raises:
        UserError: runs of the plan exist already.
    """
    if begun := sorted(plan.folder.glob("*/step-*.json")):
        raise UserError(
            f"{begun[0]}: a run of the plan has been made; what its seeds can show is written "
            f"before the runs. Delete {plan.folder}, or use another folder"
        )
    spreads = {claim.says: _spread(claim, pilot) for claim in plan.claims}
    for measure in {claim.measure for claim in plan.claims}:
        known = [
            claim.says
            for claim in plan.claims
            if claim.measure == measure and spreads[claim.says] is not None
        ]
        if known:
            spreads |= dict(zip(known, pooled([spreads[says] for says in known]), strict=True))
    lines = [_line(plan, claim, spreads[claim.says]) for claim in plan.claims]
    made = {
        "pilot_seeds": list(plan.pilot),
        "environment": environment().model_dump(),
        "claims": lines,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(made, indent=1) + "\n")
    return lines


def _spread(claim: Claim, pilot: Mapping[str, Mapping[int, Points]]) -> Spread | None:
    names = (claim.more, *claim.less)
    if not all(pilot.get(name) for name in names):
        return None
    less = [pilot[name] for name in claim.less]
    _, _, seeds, spread = compared(pilot[claim.more], less, claim.measure)
    return spread if seeds > 1 else None


def _line(plan: Plan, claim: Claim, spread: Spread | None) -> dict[str, Any]:
    rule = rule_of(plan, claim)
    if spread is None:
        return rule | {"shows": None, "seeds_needed": None}
    alike = claim.alike is not None
    return rule | {
        "shows": round(spread.visible(rule["seeds"], alike=alike), 4),
        "seeds_needed": spread.seeds_for(rule["effect"], alike=alike),
    }


def registered(plan: Plan) -> dict[str, float]:
    """Returns what the seeds can show by claim; {} for a plan that registers nothing.

    Raises:
        UserError: the file is missing, or a claim's rule is another one than there.
    """
    if plan.registered is None:
        return {}
    path = plan.registered
    if not path.exists():
        raise UserError(f"{path}: not there; {_MAKE}")
    lines = {line["says"]: line for line in read_json(path, _MAKE)["claims"]}
    for claim in plan.claims:
        rule, line = rule_of(plan, claim), lines.get(claim.says, {})
        if changed := [key for key in rule if line.get(key) != rule[key]]:
            raise UserError(
                f"{path}: the claim '{claim.says}' was registered with another "
                f"{', '.join(changed)}; change it back, or {_MAKE} in a folder without runs"
            )
    return {says: line["shows"] or 0.0 for says, line in lines.items()}


def power_table(lines: list[dict[str, Any]]) -> str:
    """Formats what the seeds can show as Markdown."""
    rows = [
        "| claim | measure | must show | seeds | shows | seeds for it |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for line in lines:
        shows = "not measured" if line["shows"] is None else f"{line['shows']:.3f}"
        rows.append(
            f"| {line['says']} | {line['measure']} | {line['effect']:.3f} | {line['seeds']} | "
            f"{shows} | {line['seeds_needed'] or 'none'} |"
        )
    return "\n".join(rows)
