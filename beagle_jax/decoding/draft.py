"""Drafting a tree with the cached draft: levels of the block, predicted states as keys (method.md 6.2).

True states live in the draft's cache; predicted ones only in local arrays that end with the round, so nothing has
to be rolled back. The states of the last level are never turned into keys (lazy append).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from beagle_jax.decoding.tree import Tree
from beagle_jax.model.beagle import BeagleBlock, DraftSpec
from beagle_jax.model.cache import KVRows, append_rows, visible_slots
from beagle_jax.model.layers import merge_attention, partial_attention


class DraftHead(NamedTuple):
    """What reads the draft's states: rows of the target's head, and the token each row stands for."""

    rows_VD: jax.Array
    ids_V: jax.Array | None  # None: row v is token v


def draft_tree(
    params: dict[str, jax.Array],
    spec: DraftSpec,
    tree: Tree,
    embed_VD: jax.Array,
    head: DraftHead,
    cache: KVRows,
    length_B: jax.Array,
    root_B: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Greedy drafts: tokens of all nodes [B, W], and the predicted states of the inner nodes [B, W, D] (zeros at leaves).

    cache: keys and values of the true states at positions below length_B; the root sits at position length_B.
    """
    block = BeagleBlock(spec).bind({"params": params})
    B, W = root_B.shape[0], tree.size
    token_BW = jnp.zeros((B, W), jnp.int32).at[:, 0].set(root_B)
    state_BWD = jnp.zeros((B, W, embed_VD.shape[1]), embed_VD.dtype)
    slots = visible_slots(length_B, [cache])[:, None, None, None]
    memory: KVRows | None = None
    remembered = np.zeros(0, np.int32)  # the node behind each row of `memory`
    for level in range(tree.depth):
        with jax.named_scope(f"draft_{level + 1}"):
            nodes = tree.inner_nodes(level)
            positions_BT = jnp.broadcast_to((length_B + level)[:, None], (B, len(nodes)))
            e_BTD = embed_VD[token_BW[:, nodes]]
            q_BKGTH = block.queries(e_BTD, positions_BT)
            parts = [partial_attention(q_BKGTH, *cache, slots)]
            if memory is not None:
                strict = tree.ancestors_or_self_WW[np.ix_(nodes, remembered)]  # they are above: never the node itself
                parts.append(partial_attention(q_BKGTH, *memory, jnp.asarray(strict)[None, None, None]))
            state_BTD = block.predict(e_BTD, merge_attention(*parts))
            state_BWD = state_BWD.at[:, nodes].set(state_BTD)
            token_BW = _place_children(tree, level, nodes, token_BW, state_BTD, head)
            if level + 1 < tree.depth:
                memory = append_rows(memory, block.keys_values(state_BTD, positions_BT))
                remembered = np.concatenate([remembered, nodes])
    return token_BW, state_BWD


def _place_children(tree: Tree, level: int, nodes, token_BW, state_BTD, head: DraftHead) -> jax.Array:
    """Fills in the tokens of the level below: each child takes its rank among its parent's best tokens."""
    children = tree.children(level)
    ranks = tree.rank_W[children]
    logits_BTV = jnp.einsum("BTD,VD->BTV", state_BTD, head.rows_VD, preferred_element_type=jnp.float32)
    if ranks.max() == 0:
        best_BTC = jnp.argmax(logits_BTV, axis=-1)[..., None]
    else:
        best_BTC = jax.lax.top_k(logits_BTV, int(ranks.max()) + 1)[1]
    column = np.searchsorted(nodes, tree.parent_W[children])
    picked_BC = best_BTC[:, column, ranks]
    if head.ids_V is not None:
        picked_BC = head.ids_V[picked_BC]
    return token_BW.at[:, children].set(picked_BC.astype(jnp.int32))
