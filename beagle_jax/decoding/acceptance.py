"""How often a draft is right, by tree: what every dynamic tree would accept of given texts.

It is measured without a decoding loop. At positions of texts that the target wrote, the draft grows
full trees. The ranks of the correct continuation in a full tree determine what every smaller tree
of the same topk would accept. The figures depend on the draft and the texts, and not on the
machine, so a draft's folder can hold them.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from beagle_jax.decoding.drafter import Known, Seen, State
from beagle_jax.decoding.round import TargetModel
from beagle_jax.decoding.trained import TrainedDrafter
from beagle_jax.decoding.tree import candidates
from beagle_jax.errors import BadFile, UserError
from beagle_jax.files import write_text
from beagle_jax.json_file import read_json
from beagle_jax.model.masks import causal_mask
from beagle_jax.model.precision import exact
from beagle_jax.model.target import forward

LEVELS = range(1, 7)
TOPKS = (1, 2, 3, 4, 6, 8)
NODES = (2, 4, 8, 12, 16, 24, 32, 64, 128)
FILE = "acceptance.json"  # in a draft's folder
TEXT = 256  # tokens of a text that are read
_PLACES = 384  # positions of all texts, at most
_BATCH = 16  # positions whose trees are grown at once


@dataclass(frozen=True)
class Acceptance:
    """What the trees of a draft accept."""

    tau: dict[tuple[int, int, int], float]  # tokens per round, by (levels, topk, nodes)
    # [depth, rank]: share of correct tokens with this rank, where all tokens above are correct
    rank_share: np.ndarray
    places: int  # number of positions of text that were measured
    texts: str  # what they are, in words

    def most(self, levels: int, topk: int) -> float:
        """Returns tau of the largest tree with so many levels and topk."""
        taus = (tau for shape, tau in self.tau.items() if shape[:2] == (levels, topk))
        return max(taus, default=1.0)


class Text(NamedTuple):
    """A text that the draft has read."""

    state: State  # the drafter's, after the text, in `_BATCH` rows
    input_BLI: jax.Array  # what the drafter reads of the target, of one row
    padded_BL: np.ndarray  # tokens
    roots: np.ndarray  # positions at which trees are grown


def acceptance_of(
    model: TargetModel,
    drafter: TrainedDrafter,
    texts: Sequence[tuple[list[int], list[int]]],
    described: str = "",
    topks: tuple[int, ...] | None = None,
) -> Acceptance:
    """Measures a draft on texts.

    texts: prompts and the target's answers, as tokens. described: what they are. topks: of the
    trees; None: all.

    Raises:
        UserError: All texts are too short.
    """
    texts_read = [_read(model, drafter, *text) for text in texts if len(_places(*text))]
    if not texts_read:
        raise UserError(
            "acceptance cannot be measured: no answer to the sample prompts has more than "
            f"{max(LEVELS)} tokens among the first {TEXT} of prompt and answer; raise "
            "eval.max_new_tokens or --prompts, or set other eval.suites"
        )
    return acceptance_in(drafter, texts_read, described, topks)


def acceptance_in(
    drafter: TrainedDrafter,
    texts: Sequence[Text],
    described: str,
    topks: tuple[int, ...] | None = None,
) -> Acceptance:
    """Measures a draft on texts that it has read: at all of their roots, or at 384 of them."""
    topks = topks or TOPKS
    forest = Forest(max(LEVELS), topks)
    every = -(-sum(len(text.roots) for text in texts) // _PLACES)
    thinned = [text._replace(roots=text.roots[::every]) for text in texts]
    trees = [_full_trees(drafter, topks, *text) for text in thinned]
    grown = Trees(*(np.concatenate(each) for each in zip(*trees, strict=True)))
    tau = {}
    for topk in topks:
        alone = forest.only(grown, topk)
        for levels in LEVELS:
            order_MP = _order_of_right_path(*alone, levels)
            for nodes in NODES:
                if nodes <= candidates(levels, topk) + 1:
                    accepted = (order_MP < nodes - 1).sum(axis=1).mean()
                    tau[levels, topk, nodes] = 1 + float(accepted)
    rank_share = _rank_share(*forest.only(grown, max(topks)), max(topks))
    return Acceptance(tau, rank_share, len(grown.token_MW), described)


def save_acceptance(folder: Path, acceptance: Acceptance, fingerprint: str) -> None:
    """Writes the figures to a draft's folder. fingerprint: of the draft (`Draft.fingerprint`)."""
    trees = [[*tree, round(tau, 4)] for tree, tau in acceptance.tau.items()]
    stored = {
        "draft": fingerprint,
        "texts": acceptance.texts,
        "places": acceptance.places,
        "rank_share": np.round(acceptance.rank_share, 4).tolist(),
        "trees": trees,
    }
    lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in stored.items()]
    write_text(folder / FILE, "{\n" + ",\n".join(lines) + "\n}\n")


def saved_acceptance(folder: Path, fingerprint: str) -> Acceptance | None:
    """Reads the figures of a draft's folder; None if it has none for these weights.

    Raises:
        UserError: The file does not hold such figures.
    """
    path, remedy = folder / FILE, "delete it, and tune measures acceptance itself"
    if not path.exists():
        return None
    stored = read_json(path, "", remedy)
    try:
        if stored["draft"] != fingerprint:
            return None
        tau = {
            (int(levels), int(topk), int(nodes)): float(tokens)
            for levels, topk, nodes, tokens in stored["trees"]
        }
        rank_share = np.asarray(stored["rank_share"], float)
        return Acceptance(tau, rank_share, int(stored["places"]), str(stored["texts"]))
    except (KeyError, TypeError, ValueError) as error:
        raise BadFile(path, f"not the figures of a draft ({error!r}); {remedy}") from error


class Trees(NamedTuple):
    """Trees grown at M positions of texts, and the tokens that follow each in its text."""

    token_MW: np.ndarray
    parent_MW: np.ndarray
    depth_MW: np.ndarray
    score_MW: np.ndarray
    follows_MP: np.ndarray


@dataclass(frozen=True)
class Forest:
    """Full dynamic trees of several topks with a common root, grown as one tree. Hashable.

    Each query keeps as many children as the largest topk needs. The queries of a level are those of
    the first tree, then those of the second, and so on. A tree of k children continues the best of
    the first k children of its own k queries.
    """

    levels: int
    topks: tuple[int, ...]

    scored = True

    @property
    def grown(self) -> "Forest":
        """The forest itself: it has no looked-up nodes."""
        return self

    @property
    def size(self) -> int:
        """W: all candidates and the root."""
        return 1 + self.kept_children(0) * (1 + (self.levels - 1) * sum(self.topks))

    @property
    def depth(self) -> int:
        """P."""
        return self.levels

    def kept_children(self, level: int) -> int:
        """Returns how many children each query of a level keeps."""
        return max(self.topks)

    def next_queries(self, level: int, score_BA: jax.Array) -> jax.Array:
        """Returns indices of the best candidates of each tree [B, T]."""
        best = []
        for topk in self.topks:
            own_A = np.arange(topk) if level == 0 else self._candidates(topk)
            best.append(jnp.asarray(own_A)[jax.lax.top_k(score_BA[:, own_A], topk)[1]])
        return jnp.concatenate(best, axis=1)

    def chosen(self, score_BZ: jax.Array) -> jax.Array:
        """Returns the indices of all candidates [B, W - 1]."""
        return jnp.broadcast_to(jnp.arange(self.size - 1)[None], (len(score_BZ), self.size - 1))

    def _candidates(self, topk: int) -> np.ndarray:
        """Indices of a tree's candidates among all of a level below the first."""
        first = sum(self.topks[: self.topks.index(topk)])
        query, rank = np.arange(first, first + topk), np.arange(topk)
        return (query[:, None] * self.kept_children(0) + rank).ravel()

    def only(self, grown: Trees, topk: int) -> Trees:
        """Returns the full trees of one topk."""
        width = self.kept_children(0)
        below = [
            1 + width + level * sum(self.topks) * width + self._candidates(topk)
            for level in range(self.levels - 1)
        ]
        node_W = np.concatenate([[0], 1 + np.arange(topk), *below])
        place_W = np.zeros(self.size, int)
        place_W[node_W] = np.arange(len(node_W))
        token_MW, parent_MW, depth_MW, score_MW = (x_MW[:, node_W] for x_MW in grown[:-1])
        return Trees(token_MW, place_W[parent_MW], depth_MW, score_MW, grown.follows_MP)


@partial(jax.jit, static_argnames="tree")
def _grown(
    drafter: TrainedDrafter, tree: Any, state: State, known: Known
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns token, parent, depth and score of all nodes below each root, [B, W] each."""
    nodes = drafter.propose(state, known, tree, None).nodes
    return nodes.token_BW, nodes.parent_BW, nodes.depth_BW, nodes.score_BW


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
) -> Text:
    """Reads a text with the target and the drafter."""
    tokens = (prompt + answer)[:TEXT]
    padded_BL = np.zeros((1, TEXT), np.int32)
    padded_BL[0, : len(tokens)] = tokens
    state, input_BLI = _read_text(model, drafter, padded_BL)
    return Text(in_batch(state), input_BLI, padded_BL, _places(prompt, answer))


def in_batch(state: State) -> State:
    """Repeats a drafter's state of one row for the positions whose trees are grown at once."""
    return jax.tree.map(lambda x: jnp.repeat(x, _BATCH, axis=0), state)


def _places(prompt: list[int], answer: list[int]) -> np.ndarray:
    """Returns positions of an answer with enough text after them; empty if it is too short."""
    return np.arange(len(prompt), min(len(prompt) + len(answer), TEXT) - max(LEVELS))


def _full_trees(
    drafter: TrainedDrafter,
    topks: tuple[int, ...],
    state: State,
    input_BLI: jax.Array,
    padded_BL: np.ndarray,
    roots: np.ndarray,
) -> Trees:
    """Grows the full trees of all topks at each root of a text (`Forest`)."""
    forest, grown = Forest(max(LEVELS), topks), []
    for start in range(0, len(roots), _BATCH):
        # The last batch repeats positions, which are removed below.
        places = jnp.asarray(np.resize(roots[start : start + _BATCH], _BATCH))
        at_B = drafter.at(state, jnp.repeat(input_BLI, _BATCH, axis=0), places)
        known = Known(jnp.asarray(padded_BL[0])[places], places)
        grown.append(jax.device_get(_grown(drafter, forest, at_B, known)))
    follows_MP = padded_BL[0, roots[:, None] + 1 + np.arange(max(LEVELS))[None]]
    token_MW, parent_MW, depth_MW, score_MW = (
        np.concatenate(each)[: len(roots)] for each in zip(*grown, strict=True)
    )
    return Trees(token_MW, parent_MW, depth_MW, score_MW, follows_MP)


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
    topk: int,
) -> np.ndarray:
    """Returns how often the correct token has each rank among its siblings, [depth, rank].

    The share is taken over the positions at which all tokens above are correct.
    """
    path_MP = _right_path(token_MW, parent_MW, depth_MW, follows_MP)
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
