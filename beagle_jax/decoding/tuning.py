"""Choice of the fastest dynamic tree, from measured costs and measured acceptance.

A round of a tree with P levels, k children per node and W nodes takes draft(P, k) + verify(W), and
writes one token more than it accepts. Acceptance is measured without a decoding loop: at every
position of texts that the target wrote, the draft grows its widest tree. The ranks of the correct
continuation in that tree determine what every smaller tree would accept.
"""

import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from beagle_jax.decoding.decoder import SpeculativeDecoder
from beagle_jax.decoding.drafter import Known, Seen, State
from beagle_jax.decoding.kinds import trained_drafter
from beagle_jax.decoding.nodes import Nodes
from beagle_jax.decoding.round import TargetModel
from beagle_jax.decoding.trained import TrainedDrafter
from beagle_jax.decoding.tree import ROOT_ONLY, DynamicTree, Tree, candidates, dynamic_tree
from beagle_jax.errors import BadFile, UserError
from beagle_jax.files import write_text
from beagle_jax.json_file import read_json
from beagle_jax.model.cache import KVRows
from beagle_jax.model.masks import causal_mask
from beagle_jax.model.precision import exact
from beagle_jax.model.target import Params, TargetSpec, best_tokens, forward, init_cache
from beagle_jax.sharding import decoding_mesh, place, place_state, split_over
from beagle_jax.weights.draft import Draft
from beagle_jax.weights.target import Target

VERIFY_ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 64, 128)
LEVELS = range(1, 7)
TOPKS = (1, 2, 3, 4, 6, 8)
_CAPACITY = 256  # cache slots while measuring
_REPEATS = 7
PASSES = 4  # passes in one timed call
_TUNE = "run python -m beagle_jax.tune --config FILE"
_PLAIN = "plain"  # key of a saved choice
_BATCH = 16  # positions of a text whose trees are grown at once


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

    verify_ms: dict[int, float]  # by number of nodes
    draft_ms: dict[tuple[int, int], float]  # by (levels, topk)
    rank_share: (
        np.ndarray
    )  # [depth, rank]: share of correct tokens with this rank, where all tokens above are correct
    places: int  # number of positions of text that were measured
    choices: list[Choice]  # best first

    @property
    def plain_tokens_per_second(self) -> float:
        """Expected speed of plain decoding, without the prefill."""
        return 1000 / self.verify_ms[1]

    @property
    def best(self) -> Choice | None:
        """The fastest tree; None if no tree is faster than plain decoding."""
        best = self.choices[0]
        return best if best.tokens_per_second > self.plain_tokens_per_second else None


def tune(
    target: Target,
    draft: Draft,
    texts: Sequence[tuple[list[int], list[int]]],
    mesh: Mesh | None = None,
) -> Tuning:
    """Measures this machine and this draft, and ranks all trees by expected speed.

    texts: prompts and the target's answers, as tokens. mesh: the devices that are measured.

    Raises:
        UserError: All texts are too short to measure acceptance.
    """
    mesh = None if mesh is None else decoding_mesh(mesh, target.spec.num_kv_heads)
    target = replace(target, params=place(target.params, mesh))
    drafter = trained_drafter(draft, target.params, mesh=mesh)
    model = TargetModel(target.spec, target.params)
    texts_read = [_read(model, drafter, *text) for text in texts if len(_places(*text))]
    if not texts_read:
        raise UserError(
            "acceptance cannot be measured: no answer to the sample prompts has more than "
            f"{max(LEVELS)} tokens among the first {_CAPACITY} of prompt and answer; raise "
            "eval.max_new_tokens or --prompts, or set other eval.suites"
        )
    verify_ms = {
        rows: milliseconds(verifying(target, rows, mesh))
        for rows in tqdm(VERIFY_ROWS, desc="verify cost", unit="size")
    }
    draft_ms, order = {}, {}
    ranks, places = np.zeros((max(LEVELS), max(TOPKS))), 0
    for topk in tqdm(TOPKS, desc="draft cost and acceptance", unit="topk"):
        one_level, four_levels = (
            milliseconds(drafting(drafter, small_tree(levels, topk), mesh)) for levels in (1, 4)
        )
        for levels in LEVELS:
            draft_ms[levels, topk] = one_level + (levels - 1) * (four_levels - one_level) / 3
        trees = [_widest_trees(drafter, topk, *text) for text in texts_read]
        grown = _Trees(*(np.concatenate(each) for each in zip(*trees, strict=True)))
        order[topk] = {levels: _order_of_right_path(*grown, levels) for levels in LEVELS}
        if topk == max(TOPKS):
            ranks, places = _rank_share(*grown), len(grown[0])
    return Tuning(verify_ms, draft_ms, ranks, places, _choices(verify_ms, draft_ms, order))


class _Trees(NamedTuple):
    """Trees grown at M positions of texts, and the tokens that follow each in its text."""

    token_MW: np.ndarray
    parent_MW: np.ndarray
    depth_MW: np.ndarray
    score_MW: np.ndarray
    follows_MP: np.ndarray


def _choices(
    verify_ms: dict[int, float],
    draft_ms: dict[tuple[int, int], float],
    order: dict[int, dict[int, np.ndarray]],
) -> list[Choice]:
    """Returns trees of all measured sizes, the fastest first.

    A size between two measured ones costs about as much as the larger one, and accepts less.
    """
    choices = []
    for (levels, topk), drafting_ms in draft_ms.items():
        for nodes in verify_ms:
            if 2 <= nodes <= candidates(levels, topk) + 1:
                accepted = (order[topk][levels] < nodes - 1).sum(axis=1).mean()
                choices.append(
                    Choice(levels, topk, nodes, 1 + float(accepted), drafting_ms + verify_ms[nodes])
                )
    return sorted(choices, key=lambda choice: -choice.tokens_per_second)


@dataclass(frozen=True)
class Passes:
    """A call that repeats its work several times in one program."""

    call: Callable[[], Any]
    count: int


def milliseconds(work: Passes) -> float:
    """Returns the median time of one pass; the first call is not timed."""
    jax.block_until_ready(work.call())
    seconds = []
    for _ in range(_REPEATS):
        clock = time.perf_counter()
        jax.block_until_ready(work.call())
        seconds.append(time.perf_counter() - clock)
    return 1000 * float(np.median(seconds)) / work.count


@partial(jax.jit, static_argnames="spec")
def _verified(
    params: Params,
    spec: TargetSpec,
    token_BW: jax.Array,
    cache: Sequence[KVRows],
    visible_BS: jax.Array,
) -> jax.Array:
    """Runs passes in one loop, as decoding does.

    A call of its own for each pass would include the time to pass hundreds of weights to it, which
    is milliseconds.
    """
    B, W = token_BW.shape
    mask_BWW = jnp.broadcast_to(jnp.tril(jnp.ones((W, W), bool))[None], (B, W, W))
    positions_BW = jnp.broadcast_to(_CAPACITY + jnp.arange(W)[None], (B, W))

    def read(_: jax.Array, token_BW: jax.Array) -> jax.Array:
        verified = forward(params, spec, token_BW, positions_BW, mask_BWW, cache, visible_BS)
        return best_tokens(params, verified.states_BTD)[0]

    return jax.lax.fori_loop(0, PASSES, read, token_BW)


def verifying(target: Target, rows: int, mesh: Mesh | None = None) -> Passes:
    """Returns a call that verifies `rows` nodes greedily, `PASSES` times.

    mesh: over which the target is split.
    """
    cache = place_state(init_cache(target.spec, 1, _CAPACITY, target.dtype), mesh)
    tokens, visible = jnp.zeros((1, rows), jnp.int32), jnp.ones((1, _CAPACITY), bool)
    return Passes(lambda: _verified(target.params, target.spec, tokens, cache, visible), PASSES)


@partial(jax.jit, static_argnames="tree")
def _grown(drafter: TrainedDrafter, tree: Tree, state: State, known: Known) -> Nodes:
    """Returns the whole tree below each root."""
    return drafter.propose(state, known, tree, None).nodes


def _full_tree(levels: int, topk: int) -> DynamicTree:
    return dynamic_tree(levels, topk, candidates(levels, topk) + 1)


@partial(jax.jit, static_argnames=("tree", "mesh"))
def _drafted(
    drafter: TrainedDrafter, tree: Tree, state: State, known: Known, mesh: Mesh | None
) -> jax.Array:
    def read(_: jax.Array, root_B: jax.Array) -> jax.Array:
        with split_over(mesh):
            proposal = drafter.propose(state, known._replace(root_B=root_B), tree, None)
        return proposal.nodes.token_BW[:, -1]

    return jax.lax.fori_loop(0, PASSES, read, known.root_B)


def drafting(drafter: TrainedDrafter, tree: Tree, mesh: Mesh | None = None) -> Passes:
    """Returns a call that drafts this tree `PASSES` times.

    mesh: over which the draft is split.
    """
    state = place_state(drafter.init(1, _CAPACITY), mesh)
    known = Known(jnp.zeros(1, jnp.int32), jnp.full(1, _CAPACITY - 8))
    return Passes(lambda: _drafted(drafter, tree, state, known, mesh), PASSES)


def small_tree(levels: int, topk: int) -> DynamicTree:
    """Returns a tree with few nodes: choosing them is part of the cost of drafting."""
    return dynamic_tree(levels, topk, min(8, candidates(levels, topk) + 1))


@jax.jit
@exact
def _read_text(
    model: TargetModel, drafter: TrainedDrafter, text_BL: jax.Array
) -> tuple[State, jax.Array]:
    """Returns the drafter's state after a text, and what it read of the target [B, L, I]."""
    B, L = text_BL.shape
    positions_BL = jnp.broadcast_to(jnp.arange(L)[None], (B, L))
    mask_BLL = causal_mask(jnp.full(B, L), L)
    output = forward(model.params, model.spec, text_BL, positions_BL, mask_BLL, taps=drafter.taps)
    start_B, count_B = jnp.zeros(B, jnp.int32), jnp.full(B, L)
    next_BL = jnp.roll(text_BL, -1, axis=1)
    seen = Seen(output.states_BTD, text_BL, next_BL, start_B, count_B, tapped_BTI=output.tapped_BTI)
    return drafter.observe(drafter.init(B, L), seen), seen.input_BTI


def _read(
    model: TargetModel, drafter: TrainedDrafter, prompt: list[int], answer: list[int]
) -> tuple[State, jax.Array, np.ndarray, np.ndarray]:
    """Reads a text.

    Returns the drafter's state after it, repeated `_BATCH` times; the target's states [1, L, D] and
    the tokens [1, L], both padded; and the positions of `_places`.
    """
    tokens = (prompt + answer)[:_CAPACITY]
    padded_BL = np.zeros((1, _CAPACITY), np.int32)
    padded_BL[0, : len(tokens)] = tokens
    state, states_BLD = _read_text(model, drafter, padded_BL)
    state = jax.tree.map(lambda x: jnp.repeat(x, _BATCH, axis=0), state)
    return state, states_BLD, padded_BL, _places(prompt, answer)


def _places(prompt: list[int], answer: list[int]) -> np.ndarray:
    """Returns positions of an answer with enough text after them; empty if it is too short."""
    return np.arange(len(prompt), min(len(prompt) + len(answer), _CAPACITY) - max(LEVELS))


def _widest_trees(
    drafter: TrainedDrafter,
    topk: int,
    state: State,
    states_BLD: jax.Array,
    padded_BL: np.ndarray,
    roots: np.ndarray,
) -> _Trees:
    """Grows the full tree at each root of a text."""
    grown: list[list[np.ndarray]] = []
    for start in range(0, len(roots), _BATCH):
        # The last batch repeats positions, which are removed below.
        places = jnp.asarray(np.resize(roots[start : start + _BATCH], _BATCH))
        at_B = drafter.at(state, jnp.repeat(states_BLD, _BATCH, axis=0), places)
        known = Known(jnp.asarray(padded_BL[0])[places], places)
        nodes = _grown(drafter, _full_tree(max(LEVELS), topk), at_B, known)
        grown.append(
            [
                np.asarray(x)
                for x in (nodes.token_BW, nodes.parent_BW, nodes.depth_BW, nodes.score_BW)
            ]
        )
    follows_MP = padded_BL[0, roots[:, None] + 1 + np.arange(max(LEVELS))[None]]
    token_MW, parent_MW, depth_MW, score_MW = (
        np.concatenate(each)[: len(roots)] for each in zip(*grown, strict=True)
    )
    return _Trees(token_MW, parent_MW, depth_MW, score_MW, follows_MP)


def _right_path(
    token_MW: np.ndarray, parent_MW: np.ndarray, depth_MW: np.ndarray, follows_MP: np.ndarray
) -> np.ndarray:
    """Returns the correct node at each depth [M, P], -1 if the tree does not contain it.

    A node is correct if its token and those of all its ancestors follow in the text.
    """
    places = np.arange(len(token_MW))
    path, above = np.full(follows_MP.shape, -1), np.zeros(len(token_MW), int)
    for depth in range(follows_MP.shape[1]):
        fits_MW = (
            (token_MW == follows_MP[:, depth, None])
            & (parent_MW == above[:, None])
            & (depth_MW == depth + 1)
        )
        above = np.where((above >= 0) & fits_MW.any(axis=1), fits_MW.argmax(axis=1), -1)
        path[places, depth] = above
    return path


def _order_of_right_path(
    token_MW: np.ndarray,
    parent_MW: np.ndarray,
    depth_MW: np.ndarray,
    score_MW: np.ndarray,
    follows_MP: np.ndarray,
    levels: int,
) -> np.ndarray:
    """Returns how many candidates come before the correct one at each depth [M, levels].

    levels: of the tree. A correct token that is not a candidate comes after all candidates.
    """
    path_MP = _right_path(token_MW, parent_MW, depth_MW, follows_MP)[:, :levels]
    candidate_MW = (depth_MW >= 1) & (depth_MW <= levels)
    score_MP = np.take_along_axis(score_MW, np.maximum(path_MP, 0), axis=1)
    node_W = np.arange(token_MW.shape[1])
    before = (score_MW[:, None] > score_MP[..., None]) | (
        (score_MW[:, None] == score_MP[..., None]) & (node_W < path_MP[..., None])
    )
    return np.where(path_MP >= 0, (before & candidate_MW[:, None]).sum(axis=-1), token_MW.shape[1])


def _rank_share(
    token_MW: np.ndarray,
    parent_MW: np.ndarray,
    depth_MW: np.ndarray,
    score_MW: np.ndarray,
    follows_MP: np.ndarray,
) -> np.ndarray:
    """Returns how often the correct token has each rank among its siblings, [depth, rank].

    The share is taken over the positions at which all tokens above are correct.
    """
    path_MP, topk = _right_path(token_MW, parent_MW, depth_MW, follows_MP), max(TOPKS)
    share = np.zeros((follows_MP.shape[1], topk))
    above = np.zeros(len(token_MW), int)
    for depth, node in enumerate(path_MP.T):
        # A node has children only if it was continued.
        reached = (above >= 0) & ((parent_MW == above[:, None]) & (depth_MW == depth + 1)).any(
            axis=1
        )
        siblings = (
            (parent_MW == above[:, None])
            & (depth_MW == depth + 1)
            & (np.arange(token_MW.shape[1]) < node[:, None])
        )
        ranks = siblings.sum(axis=1)[reached & (node >= 0)]
        share[depth] = np.bincount(ranks, minlength=topk)[:topk] / max(reached.sum(), 1)
        above = node
    return share


def answers_for_tuning(
    target: Target,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    mesh: Mesh | None = None,
) -> list[tuple[list[int], list[int]]]:
    """Returns the target's greedy answers, written as one batch."""
    plain = SpeculativeDecoder(target, mesh=mesh)
    answers = plain.generate(prompts, max_new_tokens=max_new_tokens)
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


def tuned_path(cache_dir: str, target: Target, draft: Draft, mesh: Mesh | None = None) -> Path:
    """Returns the path of the tuned tree for this machine, mesh, target and draft."""
    quantised = (
        "" if target.quantised is None else f" {target.quantised.kind} {target.quantised.group}"
    )
    parts = "" if mesh is None else f"|{dict(mesh.shape)}"
    digest = hashlib.sha256(
        f"{machine()}{parts}|{target.source}|{target.dtype}{quantised}|{draft.fingerprint}".encode()
    )
    return Path(cache_dir).expanduser() / "tuned" / f"{digest.hexdigest()[:16]}.json"


def remember(path: Path, choice: Choice | None) -> None:
    """Saves a choice for `decode.tree: auto`; None stands for plain decoding."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = {_PLAIN: True} if choice is None else asdict(choice)
    write_text(path, json.dumps({"machine": machine(), **stored}, indent=1) + "\n")


def tuned_tree(path: Path) -> Tree:
    """Loads the saved choice: a dynamic tree, or `ROOT_ONLY` if none is faster than plain decoding.

    Raises:
        UserError: Nothing is saved, or it is not a choice.
    """
    if not path.exists():
        raise UserError(
            "decode.tree is auto, but no tree was tuned for this draft on this machine "
            f"({machine()}); {_TUNE}"
        )
    stored = read_json(path, "", _TUNE)
    if stored.get(_PLAIN) is True:
        return ROOT_ONLY
    try:
        return dynamic_tree(stored["levels"], stored["topk"], stored["nodes"])
    except (KeyError, UserError) as error:
        raise BadFile(path, f"not a tuned tree ({error!r}); {_TUNE}") from error
