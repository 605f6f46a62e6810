"""Acceptance computed a second time, from the written tokens alone.

An answer tells what its rounds must have been: at each root the draft grows its tree from the true states of the text
before it, and the round accepted as many tokens as the tree holds of what was written next. Nothing of the decoding loop
is used: no caches, no masks over nodes, trees as sets of paths in Python, attention as one softmax.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from beagle_jax.decoding.lookup import Lookup
from beagle_jax.decoding.tree import DynamicTree, Tree
from beagle_jax.model.beagle import BeagleBlock
from beagle_jax.model.target import embed, head
from beagle_jax.weights.draft import Draft
from beagle_jax.weights.target import Target

Path = tuple[int, ...]  # tokens below the root


def replayed(
    target: Target,
    draft: Draft | Lookup,
    tree: Tree,
    prompt: Sequence[int],
    answer: Sequence[int],
    states_LD: jax.Array,
    append_predicted: bool,
) -> list[int]:
    """Accepted drafts of each round, as far as they were written. states_LD: the target's states of prompt and answer."""
    text, root, accepted = [*prompt, *answer], len(prompt), []
    while root < len(text) - 1:
        if isinstance(draft, Lookup):
            paths = set(_prefixes(looked_up(text[: root + 1], draft.ngram, tree.depth)))
        else:
            paths = _Grower(target, draft, states_LD, root, append_predicted).paths(text[root], tree)
        count = 0
        while root + count + 1 < len(text) and tuple(text[root + 1 : root + count + 2]) in paths:
            count += 1
        accepted.append(count)
        root += count + 1
    return accepted


def _prefixes(path: Sequence[int]) -> Iterator[Path]:
    return (tuple(path[:length]) for length in range(1, len(path) + 1))


def looked_up(text: Sequence[int], ngram: int, depth: int) -> list[int]:
    """Prompt lookup by searching: the longest run of last tokens that ended before, the latest of them."""
    period = 1
    for size in range(min(ngram, len(text) - 1), 0, -1):
        ends = [end for end in range(len(text) - 1, size - 1, -1) if text[end - size : end] == text[-size:]]
        if ends:
            period = len(text) - ends[0]
            break
    longer = list(text)
    for _ in range(depth):
        longer.append(longer[-period])
    return longer[len(text) :]


class _Grower:
    """Grows one tree below one root."""

    def __init__(self, target: Target, draft: Draft, states_LD: jax.Array, root: int, append_predicted: bool):
        self._target, self._draft, self._states_LD, self._root = target, draft, states_LD, root
        self._append = append_predicted
        self._predicted: dict[Path, np.ndarray] = {}  # state that was predicted for a path's last token

    def paths(self, root_token: int, tree: Tree) -> set[Path]:
        """All paths of the tree's nodes."""
        if isinstance(tree, DynamicTree):
            return self._dynamic(root_token, tree)
        found: dict[Path, Path] = {(): ()}  # tokens by ranks
        for depth in range(tree.depth):
            below = [ranks for ranks in tree.paths if len(ranks) == depth + 1]
            parents = sorted({ranks[:-1] for ranks in below})
            best, _ = self._children(root_token, [found[parent] for parent in parents], 1 + max(ranks[-1] for ranks in below))
            found |= {ranks: (*found[ranks[:-1]], int(best[parents.index(ranks[:-1])][ranks[-1]])) for ranks in below}
        return set(found.values()) - {()}

    def _dynamic(self, root_token: int, tree: DynamicTree) -> set[Path]:
        """EAGLE-2's tree (method.md 6.4); of equal scores the first made wins."""
        beam: list[tuple[Path, float]] = [((), 0.0)]
        made: list[tuple[Path, float]] = []
        best_first = lambda pairs, count: sorted(pairs, key=lambda pair: -pair[1])[:count]
        for _ in range(tree.levels):
            best, log_p = self._children(root_token, [path for path, _ in beam], tree.topk)
            children = [((*path, int(token)), score + float(p))
                        for (path, score), tokens, shares in zip(beam, best, log_p) for token, p in zip(tokens, shares)]  # fmt: skip
            made += children
            beam = best_first(children, tree.topk)
        return {path for path, _ in best_first(made, tree.nodes - 1)}

    def _children(self, root_token: int, paths: list[Path], count: int) -> tuple[np.ndarray, np.ndarray]:
        """The best tokens after each path of one length, and their log-probabilities."""
        tokens = [path[-1] if path else root_token for path in paths]
        seen = [[self._predicted[path[:length]] for length in range(len(path))] for path in paths]
        above_QtD = jnp.asarray(np.array(seen).reshape(len(paths), len(paths[0]), self._states_LD.shape[1]), self._states_LD.dtype)
        states, best, log_p = _predict(
            self._draft.params, self._draft.spec, self._target.params, self._draft.hot_ids, self._states_LD, jnp.int32(self._root),
            jnp.asarray(tokens), above_QtD, self._append, count,
        )  # fmt: skip
        self._predicted |= dict(zip(paths, np.asarray(states)))
        return np.asarray(best), np.asarray(log_p)


@partial(jax.jit, static_argnames=("spec", "append", "count"))
def _predict(params, spec, target, hot_ids, states_LD, root, token_Q, above_QtD, append, count):
    """States of queries that sit as many places below the root as `above_QtD` has predicted states for each of them."""
    block, depth = BeagleBlock(spec).bind({"params": params}), above_QtD.shape[1]
    e_Q1D, place_Q1 = embed(target["embed_VD"], token_Q, spec.embed_scale)[:, None], jnp.full((len(token_Q), 1), root + depth)
    q_QKGH = block.queries(e_Q1D, place_Q1)[:, :, :, 0]
    k_KHL, v_KLH = (x[0] for x in block.keys_values(states_LD[None], jnp.arange(len(states_LD))[None]))
    score_QKGS = jnp.where(jnp.arange(len(states_LD)) < root, jnp.einsum("QKGH,KHL->QKGL", q_QKGH, k_KHL).astype(jnp.float32), -jnp.inf)
    v_QKSH = jnp.broadcast_to(v_KLH[None], (len(token_Q), *v_KLH.shape))
    if append and depth:
        place_Qt = jnp.broadcast_to(root + jnp.arange(depth)[None], above_QtD.shape[:2])
        k_QKHt, v_QKtH = block.keys_values(above_QtD, place_Qt)
        score_QKGS = jnp.concatenate([score_QKGS, jnp.einsum("QKGH,QKHt->QKGt", q_QKGH, k_QKHt).astype(jnp.float32)], axis=-1)
        v_QKSH = jnp.concatenate([v_QKSH, v_QKtH], axis=2)
    weight_QKGS = jax.nn.softmax(score_QKGS * spec.head_dim**-0.5, axis=-1)
    attended_QKGH = jnp.einsum("QKGS,QKSH->QKGH", weight_QKGS.astype(v_QKSH.dtype), v_QKSH)
    states_QD = block.predict(e_Q1D, attended_QKGH[:, :, :, None])[:, 0]
    head_VD = head(target) if hot_ids is None else head(target)[hot_ids]
    log_p_QV = jax.nn.log_softmax(jnp.einsum("QD,VD->QV", states_QD, head_VD).astype(jnp.float32), axis=-1)
    top_Qk, best_Qk = jax.lax.top_k(log_p_QV, count)
    return states_QD, best_Qk if hot_ids is None else hot_ids[best_Qk], top_Qk
