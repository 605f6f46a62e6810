"""Recomputes acceptance from the generated tokens alone, with independent code.

An answer determines its rounds: at each root, the draft grows its tree from the target's true
states of the text so far, and the round accepts the longest path of that tree that matches the
text. Nothing here comes from the decoding loop: no caches, no masks over nodes, trees as sets of
paths in Python, attention as one softmax.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from beagle_jax.arrays import AnyArray
from beagle_jax.decoding.drafter import Drafter
from beagle_jax.decoding.lookup import Lookup
from beagle_jax.decoding.tree import DynamicTree, GrownTree, LookupTree, Tree
from beagle_jax.model.beagle import BeagleBlock, BeagleSpec
from beagle_jax.model.draft import LayerBlock, LayerSpec
from beagle_jax.model.eagle import EagleBlock, EagleSpec
from beagle_jax.model.eagle3 import Eagle3Block, Eagle3Spec
from beagle_jax.model.precision import exact
from beagle_jax.model.target import Params, embed, head
from beagle_jax.weights.draft import Draft
from beagle_jax.weights.target import Target

Path = tuple[int, ...]  # tokens of a path, the root's left out
# Of a kind's queries: their inputs and positions, the inputs of the text's keys, the inputs and
# positions of their own path's keys, and which of these each query sees.
_Entries = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array, slice]


def replayed(
    target: Target,
    draft: Draft | Lookup,
    tree: Tree,
    prompt: Sequence[int],
    answer: Sequence[int],
    states_LD: jax.Array,
    append_predicted: bool,
    favour: float = 0.0,
) -> list[int]:
    """Returns the number of accepted drafts of each round; only emitted drafts count.

    states_LD: what the draft reads of prompt and answer, the target's states or its streams
    (`forced.forced_reads`). favour: added to the draft's
    log-probability of each generated token. A positive value resolves near ties in favour of these
    tokens, a negative one against them.
    """
    text, root, accepted, find = [*prompt, *answer], len(prompt), [], _PATHS[draft.kind]
    while root < len(text) - 1:
        paths = find(target, draft, tree.grown, text, states_LD, root, append_predicted, favour)
        if isinstance(tree, LookupTree):
            paths |= _prefixes(looked_up(text[: root + 1], tree.ngram, tree.looked_up))
        count = 0
        while root + count + 1 < len(text) and tuple(text[root + 1 : root + count + 2]) in paths:
            count += 1
        accepted.append(count)
        root += count + 1
    return accepted


def replayable(draft: Draft | Drafter) -> bool:
    """Whether this module can recompute drafts of this kind."""
    return draft.kind in _PATHS


def scored(draft: Draft | Drafter) -> bool:
    """Whether drafts of this kind choose tokens by their own scores, which noise can tie."""
    return draft.kind in _ENTRIES


def _looked_up_paths(
    target: Target,
    draft: Lookup,
    tree: GrownTree,
    text: Sequence[int],
    states_LD: jax.Array,
    root: int,
    *_: object,
) -> set[Path]:
    return _prefixes(looked_up(text[: root + 1], draft.ngram, tree.depth))


def _prefixes(tokens: Sequence[int]) -> set[Path]:
    return {tuple(tokens[:length]) for length in range(1, len(tokens) + 1)}


def _grown_paths(
    target: Target,
    draft: Draft,
    tree: GrownTree,
    text: Sequence[int],
    states_LD: jax.Array,
    root: int,
    append_predicted: bool,
    favour: float,
) -> set[Path]:
    return Grower(target, draft, text, states_LD, root, append_predicted, favour).paths(tree)


def looked_up(text: Sequence[int], ngram: int, depth: int) -> list[int]:
    """Prompt lookup by direct search; returns `depth` drafted tokens.

    Finds the longest run of last tokens, up to `ngram`, that occurred before, takes its latest
    occurrence and copies what followed. The copy repeats if less followed. Without a match, the
    last token repeats.
    """
    period = 1
    for size in range(min(ngram, len(text) - 1), 0, -1):
        ends = [
            end
            for end in range(len(text) - 1, size - 1, -1)
            if text[end - size : end] == text[-size:]
        ]
        if ends:
            period = len(text) - ends[0]
            break
    longer = list(text)
    for _ in range(depth):
        longer.append(longer[-period])
    return longer[len(text) :]


class Grower:
    """Grows one tree below one root of a given text."""

    def __init__(
        self,
        target: Target,
        draft: Draft,
        text: Sequence[int],
        states_LD: jax.Array,
        root: int,
        append_predicted: bool,
        favour: float = 0.0,
    ) -> None:
        self._target, self._draft, self._states_LD, self._root = target, draft, states_LD, root
        self._text_L = jnp.asarray([*text, *[0] * (len(states_LD) + 1 - len(text))])
        self._append, self._favour = append_predicted, favour
        self._predicted: dict[Path, np.ndarray] = {}  # state predicted at a path's last token

    def paths(self, tree: GrownTree) -> set[Path]:
        """Returns the paths of all nodes of the tree."""
        if isinstance(tree, DynamicTree):
            return self._dynamic(tree)
        by_ranks: dict[Path, Path] = {(): ()}  # tokens by ranks
        for depth in range(tree.depth):
            below = [ranks for ranks in tree.paths if len(ranks) == depth + 1]
            parents = sorted({ranks[:-1] for ranks in below})
            best, _ = self._children(
                [by_ranks[parent] for parent in parents], 1 + max(ranks[-1] for ranks in below)
            )
            by_ranks |= {
                ranks: (*by_ranks[ranks[:-1]], int(best[parents.index(ranks[:-1])][ranks[-1]]))
                for ranks in below
            }
        return set(by_ranks.values()) - {()}

    def scores(self, path: Path, copies: int = 1) -> np.ndarray:
        """Returns log-probabilities [V] after a path, over the draft's own vocabulary.

        Call it from the root down: the states predicted for shorter paths are needed.
        """
        return np.asarray(self._after([path] * copies, 1)[2][0])

    def _dynamic(self, tree: DynamicTree) -> set[Path]:
        """Grows EAGLE-2's tree (method.md 6.4); among equal scores the first node wins."""
        beam: list[tuple[Path, float]] = [((), 0.0)]
        made: list[tuple[Path, float]] = []

        def best_first(pairs: list[tuple[Path, float]], count: int) -> list[tuple[Path, float]]:
            return sorted(pairs, key=lambda pair: -pair[1])[:count]

        for _ in range(tree.levels):
            best, log_p = self._children([path for path, _ in beam], tree.topk)
            children = [
                ((*path, int(token)), score + float(p))
                for (path, score), tokens, shares in zip(beam, best, log_p, strict=True)
                for token, p in zip(tokens, shares, strict=True)
            ]
            made += children
            beam = best_first(children, tree.topk)
        return {path for path, _ in best_first(made, tree.nodes - 1)}

    def _children(self, paths: list[Path], count: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the best tokens after each path of one length, and their log-probabilities."""
        best, log_p, _ = self._after(paths, count)
        return np.asarray(best), np.asarray(log_p)

    def _after(self, paths: list[Path], count: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns the same as `_children`, plus the log-probabilities of all tokens."""
        depth, D = len(paths[0]), self._draft.spec.hidden_size
        seen = [[self._predicted[path[:length]] for length in range(depth)] for path in paths]
        above_QtD = jnp.asarray(np.array(seen).reshape(len(paths), depth, D), self._states_LD.dtype)
        below_Qt = jnp.asarray(np.array(paths, np.int32).reshape(len(paths), depth))
        states, best, log_p, every_QV = _predict(
            self._draft.params,
            self._draft.spec,
            self._target.params,
            self._draft.hot_ids,
            self._text_L,
            self._states_LD,
            jnp.int32(self._root),
            below_Qt,
            above_QtD,
            self._favour,
            self._append,
            count,
        )
        self._predicted |= dict(zip(paths, np.asarray(states), strict=True))
        return best, log_p, every_QV


@partial(jax.jit, static_argnames=("spec", "append", "count"))
@exact
def _predict(
    params: dict[str, jax.Array],
    spec: LayerSpec,
    target: Params,
    hot_ids: AnyArray | None,
    text_L: jax.Array,
    states_LD: jax.Array,
    root: jax.Array,
    below_Qt: jax.Array,
    above_QtD: jax.Array,
    favour: float,
    append: bool,
    count: int,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Predicts the states of the last tokens of paths below the root.

    below_Qt: tokens of each path. above_QtD: the state predicted above each of these tokens.
    Returns the states, the best tokens after each path, their log-probabilities, and all
    log-probabilities.
    """
    block_type, entries = _ENTRIES[spec.kind]
    block, (Q, depth) = block_type(spec).bind({"params": params}), below_Qt.shape

    def embedded(tokens: jax.Array) -> jax.Array:
        return embed(spec.embedding(params, target["embed_VD"]), tokens, spec.embed_scale)

    # tokens of each path, starting with the root's, and their positions
    token_Qt = jnp.concatenate([jnp.broadcast_to(text_L[root], (Q, 1)), below_Qt], axis=1)
    place_Qt = root + jnp.broadcast_to(jnp.arange(depth + 1)[None], (Q, depth + 1))
    x_QtD, place_Qt, true_LD, own_QtD, own_place_Qt, visible = entries(
        block, embedded, text_L, states_LD, root, token_Qt, place_Qt, above_QtD, append
    )
    states_QD = _attend(
        block,
        x_QtD[:, -1:],
        place_Qt[:, -1:],
        true_LD,
        root,
        own_QtD[:, visible],
        own_place_Qt[:, visible],
    )
    written_t1 = text_L[root + 1 + jnp.arange(depth + 1)]
    head_VD = spec.head(params, head(target) if hot_ids is None else head(target)[hot_ids])
    logits_QV = jnp.einsum("QD,VD->QV", spec.final_norm(params, states_QD), head_VD)
    log_p_QV, token_V = _scores(logits_QV, hot_ids, below_Qt, written_t1, favour)
    top_Qk, best_Qk = jax.lax.top_k(log_p_QV, count)
    return block.carried(states_QD), token_V[best_Qk], top_Qk, log_p_QV


def _scores(
    logits_QV: jax.Array,
    hot_ids: AnyArray | None,
    below_Qt: jax.Array,
    written_t1: jax.Array,
    favour: float,
) -> tuple[jax.Array, AnyArray]:
    """Log-probabilities [Q, V] after each path, and the ids [V] of the scored tokens.

    written_t1: the text after the root. A path that follows this text gains `favour` on its next
    token.
    """
    depth = below_Qt.shape[1]
    log_p_QV = jax.nn.log_softmax(logits_QV.astype(jnp.float32), axis=-1)
    token_V = jnp.arange(logits_QV.shape[1]) if hot_ids is None else hot_ids
    written_QV = (below_Qt == written_t1[None, :depth]).all(axis=1, keepdims=True) & (
        token_V == written_t1[depth]
    )[None]
    return log_p_QV + jnp.where(written_QV, favour, 0.0), token_V


def _beagle_entries(
    block: LayerBlock,
    embedded: Callable[[jax.Array], jax.Array],
    text_L: jax.Array,
    states_LD: jax.Array,
    root: jax.Array,
    token_Qt: jax.Array,
    place_Qt: jax.Array,
    above_QtD: jax.Array,
    append: bool,
) -> _Entries:
    """Returns Beagle's queries and positions, and what they see of the text and their path."""
    visible = slice(None) if append else slice(0)
    return embedded(token_Qt), place_Qt, states_LD, above_QtD, place_Qt[:, :-1], visible


def _eagle_entries(
    block: LayerBlock,
    embedded: Callable[[jax.Array], jax.Array],
    text_L: jax.Array,
    states_LD: jax.Array,
    root: jax.Array,
    token_Qt: jax.Array,
    place_Qt: jax.Array,
    above_QtD: jax.Array,
    append: bool,
) -> _Entries:
    """Returns the same for EAGLE: each token fused with the state before it.

    The fused entry has the position of that state.
    """
    Q, depth, D = above_QtD.shape
    g_LD = block.features(states_LD[None])[0]
    root_Q1D = jnp.broadcast_to(g_LD[root - 1], (Q, 1, D))
    x_QtD = block.fuse(embedded(token_Qt), jnp.concatenate([root_Q1D, above_QtD], axis=1))
    true_LD = block.fuse(embedded(text_L[1:])[None], g_LD[None])[0]
    visible = (
        slice(None) if append else slice(max(depth - 1, 0), None)
    )  # at least the query's own entry
    return x_QtD, place_Qt - 1, true_LD, x_QtD[:, 1:], place_Qt[:, 1:] - 1, visible


_ENTRIES: dict[str, tuple[Callable[[Any], Any], Callable[..., _Entries]]] = {
    BeagleSpec.kind: (BeagleBlock, _beagle_entries),
    EagleSpec.kind: (EagleBlock, _eagle_entries),
    Eagle3Spec.kind: (Eagle3Block, _eagle_entries),
}
_PATHS: dict[str, Callable[..., set[Path]]] = {
    Lookup.kind: _looked_up_paths,
    **dict.fromkeys(_ENTRIES, _grown_paths),
}


def _attend(
    block: LayerBlock,
    x_Q1D: jax.Array,
    place_Q1: jax.Array,
    true_LD: jax.Array,
    root: jax.Array,
    own_QtD: jax.Array,
    own_place_Qt: jax.Array,
) -> jax.Array:
    """Predicts states [Q, D] of queries that attend to the text and to their own path.

    They see the text's keys and values below the root.
    """
    q_QKGH = block.queries(x_Q1D, place_Q1)[:, :, :, 0]
    k_KHL, v_KLH = (x[0] for x in block.entry_rows(true_LD[None], jnp.arange(len(true_LD))[None]))
    k_QKHt, v_QKtH = block.keys_values(own_QtD, own_place_Qt)
    true_QKGL = jnp.where(
        jnp.arange(len(true_LD)) < root,
        jnp.einsum("QKGH,KHL->QKGL", q_QKGH, k_KHL).astype(jnp.float32),
        -jnp.inf,
    )
    score_QKGS = jnp.concatenate(
        [true_QKGL, jnp.einsum("QKGH,QKHt->QKGt", q_QKGH, k_QKHt).astype(jnp.float32)], axis=-1
    )
    v_QKSH = jnp.concatenate(
        [jnp.broadcast_to(v_KLH[None], (len(x_Q1D), *v_KLH.shape)), v_QKtH], axis=2
    )
    weight_QKGS = jax.nn.softmax(score_QKGS * block.spec.head_dim**-0.5, axis=-1)
    attended_QKGH = jnp.einsum("QKGS,QKSH->QKGH", weight_QKGS.astype(v_QKSH.dtype), v_QKSH)
    return block.predict(x_Q1D, attended_QKGH[:, :, :, None])[:, 0]
