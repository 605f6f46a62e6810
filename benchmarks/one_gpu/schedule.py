"""Phases, their parts and their time: what remains to do and for how long. Loads no jax."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

PHASES = ("measure", "unbuffered", "write", "train", "evaluate")
# Seconds of a call of ten minutes, of which one minute is kept free for the machine itself. Other
# totals are divided in the same proportions.
SECONDS = {"measure": 190, "unbuffered": 90, "write": 70, "train": 110, "evaluate": 80}
TOTAL = sum(SECONDS.values())
LEAST = 5.0  # seconds; a phase that would get less is not started
# Seconds between SIGTERM and SIGKILL. Training ends its step, saves it and exports a draft.
GRACE = {"train": 25.0}

Tree = tuple[int, int, int]  # levels, topk, nodes


class Plan(NamedTuple):
    """The measurements of one target, with random weights in its shapes."""

    shape: str  # in benchmarks/large_shapes.py
    dtype: str
    config: str  # its training steps are measured, with its batch and row length
    trees: tuple[Tree, ...]  # the first one is measured without command buffers too
    rows: tuple[int, ...]  # tokens verified in one pass


PLANS = (
    Plan(
        "llama2-7b",
        "bfloat16",
        "configs/llama2_7b_chat.yaml",
        ((6, 10, 60), (2, 3, 4)),
        (64, 1, 8, 16, 32, 128),
    ),
    Plan(
        "smollm2-135m",
        "bfloat16",
        "configs/smollm2_135m.yaml",
        ((6, 10, 60), (2, 3, 4)),
        (64, 1, 8, 16, 32, 128),
    ),
)
TOY = (Plan("toy", "float32", "configs/quickstart.yaml", ((2, 2, 5),), (1, 4)),)


class Part(NamedTuple):
    """One measurement, with one file of results."""

    plan: Plan
    kind: str  # plain, round, verify, draft, early or late
    tree: Tree | None = None
    rows: int | None = None

    @property
    def name(self) -> str:
        """Name of its file, without the phase."""
        detail = "x".join(map(str, self.tree)) if self.tree else self.rows
        return f"{self.plan.shape}-{self.kind}" + ("" if detail is None else f"-{detail}")


def parts_of(phase: str, toy: bool) -> list[Part]:
    """Returns a phase's measurements by importance; a short call leaves out the last."""
    plans = TOY if toy else PLANS
    if phase == "unbuffered":
        return [
            part
            for plan in plans
            for part in (Part(plan, "plain"), Part(plan, "round", plan.trees[0]))
        ]
    first, later = [], []
    for plan in plans:
        first += [Part(plan, "plain"), Part(plan, "round", plan.trees[0])]
        first += [Part(plan, "early"), Part(plan, "late"), Part(plan, "draft", plan.trees[0])]
        first += [Part(plan, "verify", rows=rows) for rows in plan.rows[:2]]
        later += [Part(plan, "round", tree) for tree in plan.trees[1:]]
        later += [Part(plan, "verify", rows=rows) for rows in plan.rows[2:]]
    return first + later


def allotted(waiting: Sequence[str], left: float, fixed: Mapping[str, float]) -> float:
    """Returns the seconds of the first pending phase, out of those left in the call.

    A phase with a fixed budget gets it, as far as time is left. The others divide the rest in the
    proportions of `SECONDS`, so that time that a phase did not need goes to later ones.
    """
    phase, left = waiting[0], max(left, 0.0)
    if phase in fixed:
        return min(fixed[phase], left)
    reserved = sum(fixed.get(later, 0.0) for later in waiting[1:])
    weight = sum(SECONDS[later] for later in waiting if later not in fixed)
    return max(left - reserved, 0.0) * SECONDS[phase] / weight


def parse_budget(text: str) -> tuple[str, float]:
    """Parses `measure=120` into phase and seconds.

    Raises: ValueError for anything else.
    """
    phase, equals, seconds = text.partition("=")
    if not equals or phase not in PHASES:
        raise ValueError(f"expected PHASE=SECONDS with a phase of {', '.join(PHASES)}")
    value = float(seconds)
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{seconds} is no number of seconds")
    return phase, value
