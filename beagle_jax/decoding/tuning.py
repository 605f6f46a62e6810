"""Choice of the fastest dynamic tree, from measured costs and measured acceptance.

A round of a tree with P levels, k children per node and W nodes takes draft(P, k) + ending(W), and
writes one token more than it accepts (`acceptance`). ending(W) is the target's pass over W nodes,
acceptance, and the append of what was accepted.
"""

import hashlib
import json
import logging
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import jax
from jax.sharding import Mesh
from tqdm import tqdm

from beagle_jax.decoding.acceptance import LEVELS, NODES, TOPKS, Acceptance, acceptance_of
from beagle_jax.decoding.decoder import SpeculativeDecoder
from beagle_jax.decoding.kinds import trained_drafter
from beagle_jax.decoding.round import TargetModel
from beagle_jax.decoding.sampling import GREEDY, Sampling
from beagle_jax.decoding.timing import (
    ALONE,
    Passes,
    Situation,
    compiled,
    drafting,
    ending,
    milliseconds,
    small_tree,
)
from beagle_jax.decoding.trained import TrainedDrafter
from beagle_jax.decoding.tree import ROOT_ONLY, Tree, dynamic_tree
from beagle_jax.errors import BadFile, UserError
from beagle_jax.files import write_text
from beagle_jax.json_file import read_json
from beagle_jax.sharding import decoding_mesh, place, with_experts
from beagle_jax.weights.draft import Draft
from beagle_jax.weights.target import Target

_log = logging.getLogger(__name__)

# Largest difference of a plain step's time at the beginning and at the end of a measurement that
# nothing disturbed.
TOLERANCE = 0.1
_TUNE = "run python -m beagle_jax.tune --config FILE"
_PLAIN = "plain"  # key of a saved choice


class Effort(NamedTuple):
    """Which trees are measured."""

    nodes: tuple[int, ...]
    topks: tuple[int, ...]
    patience: int  # numbers of nodes in a row that bring no faster tree, after which none is tried
    guesses: bool  # leaves out numbers of nodes that cannot pay if costs go on in a line
    attempts: int = 2  # measurements, as long as other work disturbs them


FULL = Effort(NODES, TOPKS, patience=3, guesses=False)
QUICK = Effort((4, 8, 16, 32, 64), (3,), patience=1, guesses=True, attempts=3)
_SLOPE_LEVELS = 3  # of the trees that show what another level costs


@dataclass(frozen=True)
class Choice:
    """One tree, with its expected speed."""

    levels: int
    topk: int
    nodes: int
    tau: float
    milliseconds: float  # per round

    @property
    def tokens_per_second(self) -> float:
        """Expected speed, without the prefill."""
        return 1000 * self.tau / self.milliseconds


@dataclass(frozen=True)
class Tuning:
    """All measurements."""

    verify_ms: dict[int, float]  # of a round without its drafting, by number of nodes
    draft_ms: dict[tuple[int, int], float]  # by (levels, topk)
    acceptance: Acceptance
    choices: list[Choice]  # best first
    where: Situation
    plain_again_ms: float  # of a plain step, after all else

    @property
    def plain_tokens_per_second(self) -> float:
        """Expected speed of plain decoding, without the prefill."""
        return 1000 / self.verify_ms[1]

    @property
    def best(self) -> Choice | None:
        """The fastest tree; None if no tree is faster than plain decoding."""
        best = self.choices[0]
        return best if best.tokens_per_second > self.plain_tokens_per_second else None

    @property
    def disturbed(self) -> bool:
        """Whether a plain step took another time at the end, as other work ran meanwhile."""
        return abs(self.plain_again_ms / self.verify_ms[1] - 1) > TOLERANCE

    @property
    def steps_differ(self) -> str:
        """Says how a disturbed measurement was recognised."""
        return (
            f"a plain step took {self.verify_ms[1]:.1f} ms at first and "
            f"{self.plain_again_ms:.1f} ms at the end, so other work ran meanwhile"
        )


def tune(
    target: Target,
    draft: Draft,
    acceptance: Acceptance,
    mesh: Mesh | None = None,
    where: Situation = ALONE,
    effort: Effort = FULL,
) -> Tuning:
    """Measures this machine and this draft, and ranks trees by expected speed.

    acceptance: of the draft. mesh: the devices that are measured. Numbers of nodes that cannot be
    faster than what was found are not measured. What other work disturbed is measured again.
    """
    mesh = None if mesh is None else decoding_mesh(mesh, target.spec.num_kv_heads)
    spec, params = with_experts(target.spec, mesh), place(target.params, mesh)
    target = replace(target, spec=spec, params=params)
    drafter = trained_drafter(draft, target.params, mesh=mesh)
    tuning = _measured(target, drafter, acceptance, mesh, where, effort)
    for _ in range(effort.attempts - 1):
        if not tuning.disturbed:
            break
        _log.info(f"measuring again, as {tuning.steps_differ}")
        tuning = _measured(target, drafter, acceptance, mesh, where, effort)
    return tuning


def _measured(
    target: Target,
    drafter: TrainedDrafter,
    acceptance: Acceptance,
    mesh: Mesh | None,
    where: Situation,
    effort: Effort,
) -> Tuning:
    """Measures once. A second call compiles nothing."""
    plain, smallest = (
        ending(target, nodes, mesh, where, drafter) for nodes in (1, effort.nodes[0])
    )
    draft_ms = _draft_ms(drafter, mesh, where, effort, beside=(plain, smallest))
    verify_ms, choices, vain = {1: milliseconds(plain)}, list[Choice](), 0
    for nodes in tqdm(effort.nodes, desc="verify cost", unit="size"):
        if effort.guesses and not _may_pay(nodes, verify_ms, draft_ms, acceptance):
            break
        verify_ms[nodes] = milliseconds(ending(target, nodes, mesh, where, drafter))
        before, choices = choices[:1], _choices(verify_ms, draft_ms, acceptance)
        vain = vain + 1 if before and before[0] == choices[0] else 0
        if vain >= effort.patience or _nothing_more(verify_ms, draft_ms, acceptance, choices):
            break
    return Tuning(verify_ms, draft_ms, acceptance, choices, where, milliseconds(plain))


def _draft_ms(
    drafter: TrainedDrafter,
    mesh: Mesh | None,
    where: Situation,
    effort: Effort,
    beside: Sequence[Passes],
) -> dict[tuple[int, int], float]:
    """Measures drafting, by (levels, topk). The first level costs the same for every topk.

    beside: compiled at the same time.
    """
    first = drafting(drafter, small_tree(1, max(effort.topks)), mesh, where)
    deep = [
        drafting(drafter, small_tree(_SLOPE_LEVELS, topk), mesh, where) for topk in effort.topks
    ]
    compiled([*beside, first, *deep])
    first_ms, draft_ms = milliseconds(first), {}
    for topk, work in zip(effort.topks, deep, strict=True):
        level_ms = max(milliseconds(work) - first_ms, 0.0) / (_SLOPE_LEVELS - 1)
        for levels in LEVELS:
            draft_ms[levels, topk] = first_ms + (levels - 1) * level_ms
    return draft_ms


def _choices(
    verify_ms: dict[int, float], draft_ms: dict[tuple[int, int], float], acceptance: Acceptance
) -> list[Choice]:
    """Returns trees of the measured sizes, the fastest first.

    A size between two measured ones costs about as much as the larger one, and accepts less.
    """
    choices = [
        Choice(levels, topk, nodes, tau, draft_ms[levels, topk] + verify_ms[nodes])
        for (levels, topk, nodes), tau in acceptance.tau.items()
        if (levels, topk) in draft_ms and nodes in offered(verify_ms)
    ]
    return sorted(choices, key=lambda choice: -choice.tokens_per_second)


def offered(verify_ms: dict[int, float]) -> list[int]:
    """Returns the numbers of nodes of trees, without those that a device runs badly.

    On two cores a pass over 12 tokens took longer than one over 16. A larger tree accepts more.
    """
    return [
        nodes
        for nodes in verify_ms
        if nodes > 1
        and all(verify_ms[nodes] < verify_ms[more] for more in verify_ms if more > nodes)
    ]


def _nothing_more(
    verify_ms: dict[int, float],
    draft_ms: dict[tuple[int, int], float],
    acceptance: Acceptance,
    choices: list[Choice],
) -> bool:
    """Whether no larger number of nodes can be faster than the best tree, or than plain decoding.

    A larger one costs at least as much as the cheaper of the last two, one of which the device may
    run badly.
    """
    least_ms = min(list(verify_ms.values())[-2:]) if len(verify_ms) > 2 else verify_ms[1]
    best = max([1 / verify_ms[1], *(choice.tau / choice.milliseconds for choice in choices)])
    return all(
        acceptance.most(*shape) / (drafting_ms + least_ms) <= best
        for shape, drafting_ms in draft_ms.items()
    )


def _may_pay(
    nodes: int,
    verify_ms: dict[int, float],
    draft_ms: dict[tuple[int, int], float],
    acceptance: Acceptance,
) -> bool:
    """Whether so many nodes would be faster if costs went on in a line from the last two sizes."""
    if len(verify_ms) == 1:
        return True
    (less, less_ms), (last, last_ms) = list(verify_ms.items())[-2:]
    guessed = last_ms + (nodes - last) * max(last_ms - less_ms, 0.0) / (last - less)
    best = _choices(verify_ms, draft_ms, acceptance)[0]
    return any(
        tau / (draft_ms[shape] + guessed) > best.tau / best.milliseconds
        for (*shape_, size), tau in acceptance.tau.items()
        if size == nodes and (shape := (shape_[0], shape_[1])) in draft_ms
    )


def measured_acceptance(
    target: Target,
    draft: Draft,
    texts: Sequence[tuple[list[int], list[int]]],
    mesh: Mesh | None = None,
    described: str = "",
    topks: tuple[int, ...] | None = None,
) -> Acceptance:
    """Measures the acceptance of a draft on texts; see `acceptance_of` for arguments and errors.

    mesh: the devices that compute it.
    """
    mesh = None if mesh is None else decoding_mesh(mesh, target.spec.num_kv_heads)
    params = place(target.params, mesh)
    drafter = trained_drafter(draft, params, mesh=mesh)
    model = TargetModel(with_experts(target.spec, mesh), params)
    return acceptance_of(model, drafter, texts, described, topks)


def answers_for_tuning(
    target: Target,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    mesh: Mesh | None = None,
    sampling: Sampling = GREEDY,
) -> list[tuple[list[int], list[int]]]:
    """Returns the target's answers, written as one batch."""
    plain = SpeculativeDecoder(target, mesh=mesh)
    answers = plain.generate(prompts, sampling, max_new_tokens=max_new_tokens)
    return [(list(prompt), answer.tokens) for prompt, answer in zip(prompts, answers, strict=True)]


def machine() -> str:
    """Returns a description of the device on which the costs were measured."""
    device = jax.devices()[0]
    name = device.device_kind if device.platform != "cpu" else f"{_processor()} x{os.cpu_count()}"
    return f"{device.platform} {name}, jax {jax.__version__}"


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")),
        platform.processor(),
    )


def tuned_path(
    cache_dir: str,
    target: Target,
    draft: Draft,
    mesh: Mesh | None = None,
    rows: int = 1,
    sampling: Sampling = GREEDY,
) -> Path:
    """Returns the path of the tuned tree for this machine, mesh, target and draft.

    rows: decoded at once. sampling: of the answers.
    """
    quantised = (
        "" if target.quantised is None else f" {target.quantised.kind} {target.quantised.group}"
    )
    parts = "" if mesh is None else f"|{dict(mesh.shape)}"
    many = "" if rows == 1 else f"|{rows} rows"
    drawn = "" if sampling == GREEDY else f"|{sampling}"
    digest = hashlib.sha256(
        f"{machine()}{parts}|{target.source}|{target.dtype}{quantised}|{draft.fingerprint}"
        f"{many}{drawn}".encode()
    )
    return Path(cache_dir).expanduser() / "tuned" / f"{digest.hexdigest()[:16]}.json"


def remember(path: Path, choice: Choice | None) -> None:
    """Saves a choice for `decode.tree: auto`; None stands for plain decoding."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = {_PLAIN: True} if choice is None else asdict(choice)
    write_text(path, json.dumps({"machine": machine(), **stored}, indent=1) + "\n")


def tuned_tree(path: Path) -> Tree | None:
    """Loads the saved choice; None if there is none.

    It is a dynamic tree, or `ROOT_ONLY` if none is faster than plain decoding.

    Raises:
        UserError: The file is not a choice.
    """
    if not path.exists():
        return None
    stored = read_json(path, "", _TUNE)
    if stored.get(_PLAIN) is True:
        return ROOT_ONLY
    try:
        return dynamic_tree(stored["levels"], stored["topk"], stored["nodes"])
    except (KeyError, UserError) as error:
        raise BadFile(path, f"not a tuned tree ({error!r}); {_TUNE}") from error
