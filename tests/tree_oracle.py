"""Draft trees grown the slow way: one path at a time, with Python lists and no caches.

Nothing of the decoder's code is used.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from beagle_jax.model.beagle import BeagleBlock


@partial(jax.jit, static_argnums=(0,))
def _state(spec, params, e_PD, memory_SD, seen_S, depth):
    block = BeagleBlock(spec)
    rows = memory_SD.shape[0]
    e_1SD = jnp.zeros((1, rows, e_PD.shape[-1])).at[0, depth].set(e_PD)
    return block.apply(
        {"params": params},
        e_1SD,
        memory_SD[None],
        jnp.broadcast_to(seen_S[None, None], (1, rows, rows)),
    )[0, depth]


class PathOracle:
    """Log-probabilities of the token after each path from the root.

    Predicted states along the path are used.
    """

    def __init__(self, draft, embed_VD, head_VD, states_LD, length, root, depth):
        self.draft, self.embed_VD, self.head_VD, self.root = draft, embed_VD, head_VD, root
        # Few sizes, so that few programs are compiled; what lies past the end is not seen.
        rows = -(-(length + depth) // 16) * 16
        self.memory_SD = np.zeros((rows, embed_VD.shape[1]), np.float32)
        self.memory_SD[:length] = states_LD[:length]
        self.length = length
        self._states: dict[tuple[int, ...], np.ndarray] = {}

    def state(self, tokens: tuple[int, ...]) -> np.ndarray:
        """Returns the predicted state of a path's last token; the empty path is the root."""
        if tokens not in self._states:
            memory, depth = self.memory_SD.copy(), self.length + len(tokens)
            for above in range(len(tokens)):
                memory[self.length + above] = self.state(tokens[:above])
            seen, token = np.arange(len(memory)) < depth, tokens[-1] if tokens else self.root
            state_D = _state(
                self.draft.spec,
                self.draft.params,
                self.embed_VD[token],
                jnp.asarray(memory),
                jnp.asarray(seen),
                depth,
            )
            self._states[tokens] = np.asarray(state_D)
        return self._states[tokens]

    def log_probabilities(self, tokens: tuple[int, ...]) -> np.ndarray:
        return np.asarray(jax.nn.log_softmax(self.head_VD @ self.state(tokens)))


def best(log_V: np.ndarray, count: int) -> list[int]:
    """The most likely tokens, best first."""
    return np.argsort(-log_V, kind="stable")[:count].tolist()


def static_paths(oracle: PathOracle, paths) -> set[tuple[int, ...]]:
    """Returns the token paths of a static tree given by ranks."""
    tokens_of = {(): ()}
    for path in sorted(paths, key=len):
        above = tokens_of[path[:-1]]
        tokens_of[path] = (*above, best(oracle.log_probabilities(above), path[-1] + 1)[-1])
    return {tokens for path, tokens in tokens_of.items() if path}


def eagle2_paths(oracle: PathOracle, levels: int, topk: int, nodes: int) -> set[tuple[int, ...]]:
    """Returns the token paths of EAGLE-2's dynamic tree (method.md 6.4)."""
    beam, candidates = [((), 0.0)], []
    for _ in range(levels):
        children = []
        for tokens, score in beam:
            log_V = oracle.log_probabilities(tokens)
            children += [((*tokens, token), score + log_V[token]) for token in best(log_V, topk)]
        candidates += children
        beam = sorted(children, key=lambda pair: -pair[1])[:topk]
    return {tokens for tokens, _ in sorted(candidates, key=lambda pair: -pair[1])[: nodes - 1]}
