"""beagle_jax: Beagle speculative decoding (arXiv 2505.24544) in JAX.

Array names carry their shape as a suffix of single letters:

    B batch (sequences)          D model width            N query heads
    L training sequence length   F MLP width              K key/value heads
    T new tokens in a forward    V vocabulary             G query heads per K (N = K * G)
    S cache slots (keys)         H head width             M columns of a matrix product (B * T)
    W tree nodes per round       P tree depth             J draft steps in a training window
    U windows in a row           C rows of a logits chunk R rows picked out of a batch
    I width of a draft's inputs

`q_BKGTH` is therefore an array [batch, kv heads, group, new tokens, head width].
"""

__version__ = "0.1.0"
