"""Time of top-p (and of top-k with top-p) by sorting the vocabulary and by search, in turn.

    python benchmarks/top_p.py --json top_p.json

Both give the lowest logit that is kept, of rows of random logits. `sort` is what version 0.1.0 did.
Prints the median time of each and the ratio (above 1 the search is faster).
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from beagle_jax.decoding.threshold import lowest_of

SHAPES = ((1, 49_152), (8, 49_152), (60, 49_152), (8, 128_256))
TOP_K, TOP_P = 200, 0.95


by_search = jax.jit(lowest_of)


@jax.jit
def by_sorting(logits_MV, top_k_M, top_p_M):
    """The lowest kept logit, as version 0.1.0 found it."""
    sorted_MV = -jnp.sort(-logits_MV, axis=-1)
    kept_MV = jnp.arange(logits_MV.shape[-1]) < top_k_M[:, None]
    p_MV = jax.nn.softmax(jnp.where(kept_MV, sorted_MV, -jnp.inf), axis=-1)
    kept_MV &= jnp.cumsum(p_MV, axis=-1) - p_MV < top_p_M[:, None]
    last_M1 = jnp.maximum(kept_MV.sum(axis=-1, keepdims=True) - 1, 0)
    return jnp.take_along_axis(sorted_MV, last_M1, axis=-1)


def compared(M: int, V: int, top_k: int, repeats: int) -> dict:
    """Median milliseconds of both ways on the same logits; their results must be the same."""
    logits_MV = 3 * jax.random.normal(jax.random.key(0), (M, V))
    top_k_M, top_p_M = jnp.full(M, top_k), jnp.full(M, TOP_P)
    ways = {
        "sort": lambda: by_sorting(logits_MV, top_k_M, top_p_M),
        "search": lambda: by_search(logits_MV, top_k_M if top_k < V else None, top_p_M),
    }
    counts = [(logits_MV >= way()).sum(axis=-1) for way in ways.values()]
    # Sums in another order: at the border a token more or less may remain.
    assert jnp.abs(counts[0] - counts[1]).max() <= 1
    taken = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            before = time.perf_counter()
            way().block_until_ready()
            taken[name].append(time.perf_counter() - before)
    ms = {name: 1000 * statistics.median(times) for name, times in taken.items()}
    return {"rows": M, "vocabulary": V, "top_k": top_k, **ms, "ratio": ms["sort"] / ms["search"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path, help="figures to this file too")
    options = parser.parse_args()
    lines = []
    for M, V in SHAPES:
        for top_k in (V, TOP_K):
            lines.append(compared(M, V, top_k, options.repeats))
            print(
                "{rows:3} rows x {vocabulary:7,}, top-k {top_k:7,}: sort {sort:7.1f} ms, search "
                "{search:7.1f} ms, ratio {ratio:5.2f}".format(**lines[-1]),
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps(lines, indent=1) + "\n")


if __name__ == "__main__":
    main()
