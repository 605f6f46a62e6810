"""Reads a file of experiments.

It names drafts to train, evaluations of them, figures, and the paper's claims about them.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin

from plan_file import read_tree

from beagle_jax.config import read_settings
from beagle_jax.errors import UsageError

_SHORTER = 120  # --short divides the steps of a stage by this
_MEASURES = re.compile(r"tau|curve|alpha_[1-9]\d*|speedup|memory|training_speed")
# Added to the seed per run that a run continues from, so that it sees other batches.
_AFTER_SEED = 100


@dataclass(frozen=True, kw_only=True)
class Run:
    """One draft: one stage of training, from random weights or from another run's draft."""

    stage: Literal["early", "late"]
    steps: int  # batches
    every: int | None = None  # batches between two measurements; null: one at the end
    seeds: tuple[int, ...] = (0,)
    after: str | None = (
        None  # the run whose draft this run starts from: that of the same seed, or its only one
    )
    set: Mapping[str, Any] = field(
        default_factory=dict
    )  # settings that differ from the base, by dotted key

    @property
    def points(self) -> list[int]:
        """Steps after which the draft is measured."""
        every = self.every or self.steps
        return sorted({*range(every, self.steps, every), self.steps})


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Trained drafts that `beagle_jax.evaluate` times per prompt, next to plain decoding."""

    drafts: tuple[str, ...]  # runs, each with all its seeds
    set: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One figure.

    curve: over training steps; depth: by draft depth; phases: of a round; table: no plot.
    """

    title: str
    kind: Literal["curve", "depth", "phases", "table"]
    of: tuple[str, ...]  # runs, or evaluation.run


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A sentence of the paper as a comparison of two measures (claims.py)."""

    figure: str
    says: str
    measure: str = "tau"
    more: str  # a run, or evaluation.run
    less: tuple[str, ...]  # of several runs, the best counts
    at_least: float = 0.0  # the least difference; below 0: how much less it may be
    alike: float | None = None  # instead of at_least: the largest difference in either direction
    unless: str | None = None  # why no figures of this scale can decide it
    effect: float | None = None  # difference that it must show; null: `effects` of its measure


class Training(NamedTuple):
    """A run with a seed; it has one folder."""

    name: str
    seed: int


@dataclass(frozen=True, kw_only=True)
class Beside:
    """Results of another plan with the same claims."""

    title: str
    results: str  # its folder


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A whole file of experiments."""

    base: Mapping[str, Any]  # a normal config
    folder: Path  # of the runs
    results: Path  # of figures and table
    runs: Mapping[str, Run]
    evaluations: Mapping[str, Evaluation]
    figures: Mapping[str, Figure]
    claims: Sequence[Claim]
    title: str = "here"  # heads its column in the table of claims
    pilot: tuple[int, ...] = ()  # seeds of a pilot, which no run of the plan has (power.py)
    fresh: bool = False  # no draft reads a text twice: a text of its own for each run in a row
    interval: Literal["bootstrap", "t"] = "bootstrap"  # of the difference of two runs (claims.py)
    registered: Path | None = None  # file of what the seeds can show, written before the runs
    effects: Mapping[str, float] = field(default_factory=dict)  # by measure: Claim.effect
    beside: Beside | None = None  # another plan's claims, in a column of their own

    def trainings(self) -> Iterator[Training]:
        """Yields trainings in order: every run with its first seed, then with its second, etc.

        Runs are in the file's order.
        """
        for place in range(max(len(run.seeds) for run in self.runs.values())):
            yield from (
                Training(name, run.seeds[place])
                for name, run in self.runs.items()
                if place < len(run.seeds)
            )

    def folder_of(self, training: Training) -> Path:
        """Returns the folder of a run's config, checkpoints, log, draft and measurements."""
        return self.folder / f"{training.name}-{training.seed}"

    def evaluated(self, name: str) -> dict[Path, list[Training]]:
        """Returns, by folder, the drafts that an evaluation times side by side.

        The first folder has every run's first seed, the second every run's second, and so on. A
        seed added later gets its own folder and its own plain decoding, so earlier times stay as
        they are.
        """
        seeds = {draft: self.runs[draft].seeds for draft in self.evaluations[name].drafts}
        by_folder: dict[Path, list[Training]] = {}
        for place in range(max(map(len, seeds.values()))):
            folder = self.folder / "evaluations" / (f"{name}-{place}" if place else name)
            by_folder[folder] = [
                Training(draft, own[place]) for draft, own in seeds.items() if place < len(own)
            ]
        return by_folder

    def above(self, training: Training) -> Training:
        """Returns the training that a run with `after` continues from."""
        name = self.runs[training.name].after
        seeds = self.runs[name].seeds
        return Training(name, seeds[0] if len(seeds) == 1 else training.seed)

    def before(self, name: str) -> list[str]:
        """Returns the runs that a run continues from, directly or not, nearest first."""
        above = self.runs[name].after
        return [above, *self.before(above)] if above else []

    def settings_of(self, training: Training, steps: int) -> dict[str, Any]:
        """Returns the config that trains a run up to `steps` steps.

        It is the base plus dotted keys, which take precedence.
        """
        run, folder = self.runs[training.name], self.folder_of(training)
        other = "late" if run.stage == "early" else "early"
        own = {
            "train.seed": training.seed + _AFTER_SEED * len(self.before(training.name)),
            "train.folder": str(folder),
            f"train.{run.stage}.steps": steps,
            f"train.{other}.steps": 0,
            # Only the number of steps changes from one measurement to the next.
            "train.accept_changes": True,
        }
        if self.fresh:
            place = len(self.before(training.name))
            own["data.folder"] = f"{_setting(self.base, 'data.folder')}-{place}"
            own["data.seed"] = place
        if run.after:
            own["draft.init"] = str(self.folder_of(self.above(training)) / "draft")
        return {**self.base, **run.set, **own}

    def only(self, figures: Sequence[str]) -> "Plan":
        """Returns the part of the plan that these figures and their claims need.

        No figures: the whole plan.
        """
        if not figures:
            return self
        for name in figures:
            if name not in self.figures:
                raise UsageError(
                    f"--only {name}: no such figure; expected {', '.join(self.figures)}"
                )
        claims = [claim for claim in self.claims if claim.figure in figures]
        named = {name for figure in figures for name in self.figures[figure].of}
        named |= {name for claim in claims for name in (claim.more, *claim.less)}
        evaluations = {
            name: entry
            for name, entry in self.evaluations.items()
            if any(which.startswith(f"{name}.") for which in named)
        }
        named |= {draft for entry in evaluations.values() for draft in entry.drafts}
        runs = {name: run for name, run in self.runs.items() if name in named}
        while above := {run.after for run in runs.values() if run.after} - runs.keys():
            runs = {name: run for name, run in self.runs.items() if name in runs or name in above}
        return replace(
            self,
            runs=runs,
            evaluations=evaluations,
            claims=claims,
            figures={name: entry for name, entry in self.figures.items() if name in figures},
        )


def load_plan(
    path: Path, overrides: Mapping[str, Any], *, short: bool, pilot: bool = False
) -> Plan:
    """Reads a file of experiments.

    overrides: settings for all runs, by dotted key. The key `folder` sets the folder of the runs,
    which then also holds the results. short: few steps of the first seed, with the file's short
    settings. pilot: the seeds of the pilot, in a folder of its own.

    Raises: UsageError for a name that is not defined and for an unknown key.
    """
    tree = read_tree(path)
    try:
        base = read_settings(tree["base"])
        folder, results = Path(tree["folder"]), Path(tree["results"])
        groups = {kind: tree.get(kind) or {} for kind in ("runs", "evaluations", "figures")}
        claims = tree.get("claims") or []
    except (OSError, KeyError, TypeError, UsageError) as error:
        raise UsageError(
            f"{path}: not a file of experiments ({error!r}); experiments/paper.yaml is one"
        ) from error
    if "folder" in overrides:
        folder = Path(overrides["folder"])
        results = folder / "results"
    seeds = _seeds(tree, path, pilot=pilot)
    groups["runs"] = {
        name: _resized(run, tree.get("times", 1), seeds) for name, run in groups["runs"].items()
    }
    if pilot:
        folder = folder.with_name(f"{folder.name}-pilot")
        results = folder / "results"
    if short:
        base, folder = {**base, **tree.get("short", {})}, folder.with_name(f"{folder.name}-short")
        results = folder / "results"
        for run in groups["runs"].values():
            _shorten(run, seeds=2 if pilot else 1)
    made = {
        section: {
            name: _made(kind, entry, f"{path}: {section}.{name}")
            for name, entry in groups[section].items()
        }
        for section, kind in (("runs", Run), ("evaluations", Evaluation), ("figures", Figure))
    }
    plan = Plan(
        base={**base, **{key: value for key, value in overrides.items() if key != "folder"}},
        folder=folder,
        results=results,
        claims=[
            _made(Claim, entry, f"{path}: claims[{place}]") for place, entry in enumerate(claims)
        ],
        **made,
        **_judging(tree, path),
    )
    _check_names(plan, path)
    if plan.fresh and not short:
        _check_fresh(plan, path)
    return plan


def _seeds(tree: Mapping[str, Any], path: Path, *, pilot: bool) -> list[int]:
    """Returns the seeds that every run has; [] if each has its own."""
    seeds, pilots = (tree.get(key, []) for key in ("seeds", "pilot"))
    if pilots and (len(set(pilots)) < 2 or set(pilots) & set(seeds) or not seeds):
        raise UsageError(
            f"{path}: pilot is {pilots}; expected two seeds or more that are not among seeds: "
            "the spread of seeds comes from it, and the runs must not have been seen"
        )
    if pilot and not (pilots and tree.get("registered")):
        raise UsageError(
            f"{path}: --pilot needs the keys pilot, a list of seeds, and registered, the file that "
            "it writes"
        )
    return pilots if pilot else seeds


def _resized(run: Mapping[str, Any], times: int, seeds: list[int]) -> dict[str, Any]:
    """Returns a run with its steps multiplied, and with the seeds that all runs have."""
    steps = {key: run[key] * times for key in ("steps", "every") if run.get(key)}
    return {**run, **steps, **({"seeds": list(seeds)} if seeds else {})}


def _shorten(run: dict[str, Any], *, seeds: int) -> None:
    run["steps"] = max(run["steps"] // _SHORTER, 2)
    run["every"] = max(run["every"] // _SHORTER, 1) if run.get("every") else None
    run["seeds"] = run.get("seeds", [0])[:seeds]


def _judging(tree: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Returns the fields of a plan that say how its claims are judged."""
    made = {key: tree[key] for key in ("title", "fresh", "interval", "effects") if tree.get(key)}
    if made.get("interval", "t") not in ("t", "bootstrap"):
        raise UsageError(f"{path}: interval is {made['interval']!r}; expected bootstrap or t")
    if tree.get("registered"):
        made["registered"] = Path(tree["registered"])
    if tree.get("beside"):
        made["beside"] = _made(Beside, tree["beside"], f"{path}: beside")
    return made | {"pilot": tuple(tree.get("pilot", ()))}


def _setting(settings: Mapping[str, Any], key: str) -> Any:
    """Returns a setting of a config, of which dotted keys take precedence; None if it is unset."""
    section, _, name = key.partition(".")
    return settings.get(key, settings.get(section, {}).get(name))


def _check_fresh(plan: Plan, path: Path) -> None:
    """Checks that the text of a run lasts for its steps, so that no row is read twice."""
    for name, run in plan.runs.items():
        settings = {**plan.base, **run.set}
        keys = ("data.answer_tokens", "data.max_answer_tokens", "train.batch", "data.folder")
        values = [_setting(settings, key) for key in keys]
        if None in values:
            raise UsageError(f"{path}: fresh needs {', '.join(keys)} in {name}'s settings")
        tokens, longest, batch, _ = values
        # No answer is longer, so there are at least so many rows.
        rows = tokens // longest - (_setting(settings, "log.eval_rows") or 0)
        if rows < run.steps * batch:
            raise UsageError(
                f"{path}: runs.{name} reads {run.steps} batches of {batch} chats, but "
                f"{tokens} answer tokens may be no more than {rows} chats, and fresh allows no "
                "second pass; increase data.answer_tokens, or take fewer steps"
            )


def _made(kind: type, values: Mapping[str, Any], where: str) -> Any:
    """Returns the dataclass, with lists as tuples; a single name stands for a list of one."""
    tuples = {name for name, hint in kind.__annotations__.items() if str(hint).startswith("tuple")}
    values = {
        key: tuple(value) if isinstance(value, list) else (value,) if key in tuples else value
        for key, value in values.items()
    }
    for name, hint in kind.__annotations__.items():
        if get_origin(hint) is Literal and name in values and values[name] not in get_args(hint):
            raise UsageError(
                f"{where}: {name} is {values[name]!r}; expected one of {', '.join(get_args(hint))}"
            )
    try:
        return kind(**values)
    except TypeError as error:
        raise UsageError(f"{where}: {error}; see experiments/plan.py") from error


def _check_names(plan: Plan, path: Path) -> None:
    """Checks that every name is defined and has the measures requested of it.

    An error is then reported at once and not after hours of training.
    """
    decoded = {
        f"{name}.{draft}" for name, entry in plan.evaluations.items() for draft in entry.drafts
    }
    uses = [
        (f"runs.{name}.after", run.after, plan.runs) for name, run in plan.runs.items() if run.after
    ]
    uses += [
        (f"evaluations.{name}.drafts", draft, plan.runs)
        for name, entry in plan.evaluations.items()
        for draft in entry.drafts
    ]
    known = plan.runs.keys() | decoded
    uses += [
        (f"figures.{name}.of", entry, known)
        for name, figure in plan.figures.items()
        for entry in figure.of
    ]
    for place, claim in enumerate(plan.claims):
        uses += [(f"claims[{place}].figure", claim.figure, plan.figures)]
        uses += [(f"claims[{place}]", entry, known) for entry in (claim.more, *claim.less)]
        if plan.registered and claim.alike is None and claim.effect is None:
            uses += [(f"claims[{place}].effect: effects", claim.measure, plan.effects)]
    for where, name, there in uses:
        if name not in there:
            raise UsageError(
                f"{path}: {where} names {name!r}, which is not there; expected one of "
                f"{', '.join(sorted(there))}"
            )
    for name, entry in plan.evaluations.items():
        if len(set(entry.drafts)) < len(entry.drafts):
            raise UsageError(
                f"{path}: evaluations.{name}.drafts is {', '.join(entry.drafts)}; expected each "
                "once"
            )
    folders = [folder.name for name in plan.evaluations for folder in plan.evaluated(name)]
    for entry in folders:
        if folders.count(entry) > 1:
            raise UsageError(
                f"{path}: evaluations.{entry} would share its folder with seeds of another "
                "evaluation; give it another name"
            )
    for name, figure in plan.figures.items():
        if figure.kind in ("phases", "table") and not decoded.issuperset(figure.of):
            raise UsageError(
                f"{path}: figures.{name} is of kind {figure.kind}, which needs times: of "
                f"{', '.join(sorted(decoded)) or 'evaluations'}"
            )
    for place, claim in enumerate(plan.claims):
        if not _MEASURES.fullmatch(claim.measure):
            raise UsageError(
                f"{path}: claims[{place}].measure is {claim.measure!r}; expected tau, curve, "
                "alpha_1, alpha_2, .., speedup, memory or training_speed"
            )
        having = {"speedup": decoded, "memory": decoded, "training_speed": plan.runs.keys()}.get(
            claim.measure, known
        )
        for entry in (claim.more, *claim.less):
            if entry not in having:
                raise UsageError(
                    f"{path}: claims[{place}]: {entry} has no {claim.measure}; expected one of "
                    f"{', '.join(sorted(having))}"
                )
    order = list(plan.runs)
    for name, run in plan.runs.items():
        if run.after and order.index(run.after) > order.index(name):
            raise UsageError(
                f"{path}: runs.{name} goes on from {run.after}, which stands below it; runs "
                "are made in the file's order, move it up"
            )
