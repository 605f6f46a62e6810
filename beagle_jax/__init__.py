"""beagle_jax: Beagle speculative decoding (arXiv 2505.24544) in JAX.

    from beagle_jax import SpeculativeDecoder

    decoder = SpeculativeDecoder.from_config("smollm2_135m")
    for answer in decoder.generate(["Why is the sky blue?"], max_new_tokens=64):
        print(answer.text, answer.tau)

Array names carry their shape as a suffix of single letters:

    B batch (sequences)          D model width            N query heads
    L training sequence length   F MLP width              K key/value heads
    T new tokens in a forward    V vocabulary             G query heads per K (N = K * G)
    S cache slots (keys)         H head width             M columns of a matrix product (B * T)
    W tree nodes per round       P tree depth             J draft steps in a training window
    U windows in a row           C chats of a row         R rows picked out of a batch or of M
    A candidates of a level      Y predictions of a row   Z candidates of all levels of a tree
    Q draft queries of a round   E experts                X elements of any kind
    I width of inputs            O width of outputs

A small letter is a size that only its own file knows (`top_BTk`).

`q_BKGTH` is therefore an array [batch, kv heads, group, new tokens, head width].
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from beagle_jax.config import load_config
    from beagle_jax.decoding.conversation import Conversation
    from beagle_jax.decoding.decoder import SpeculativeDecoder
    from beagle_jax.decoding.drawing import draw
    from beagle_jax.decoding.requests import Answer, Answers, Request
    from beagle_jax.decoding.sampling import Sampling
    from beagle_jax.decoding.tree import chain, dynamic_tree, static_tree
    from beagle_jax.weights.draft import load_draft
    from beagle_jax.weights.target import load_target

__version__ = "0.1.0"

# Public names and the modules that hold them. They are imported at their first use, so that
# `import beagle_jax` and every --help stay fast.
_PUBLIC = {
    "Answer": "decoding.requests",
    "Answers": "decoding.requests",
    "Conversation": "decoding.conversation",
    "Request": "decoding.requests",
    "Sampling": "decoding.sampling",
    "SpeculativeDecoder": "decoding.decoder",
    "chain": "decoding.tree",
    "draw": "decoding.drawing",
    "dynamic_tree": "decoding.tree",
    "load_config": "config",
    "load_draft": "weights.draft",
    "load_target": "weights.target",
    "static_tree": "decoding.tree",
}

__all__ = [
    "Answer",
    "Answers",
    "Conversation",
    "Request",
    "Sampling",
    "SpeculativeDecoder",
    "chain",
    "draw",
    "dynamic_tree",
    "load_config",
    "load_draft",
    "load_target",
    "static_tree",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
