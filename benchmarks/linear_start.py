"""Held-out top-1 of `draft.init: ridge` beside plain linear fits, on states of a real target.

    python benchmarks/linear_start.py --states states.npz --json linear_start.json

The plain fits are h_i ~ A e_i + B h_{i-1} + c by ridge regression in float64, with a B of full rank
and of the rank that the draft's values have (reduced-rank regression). The start reads the same
rows, with attention over all earlier states. Top-1 is the share of held-out answer positions at
which a prediction and the state itself have the same most likely token, among the tokens of the
rows that are fitted on (at most --vocabulary of them). Differences have 95 % intervals by
bootstrap over the held-out rows. Text: experiments/text, greedy answers; the target:
configs/quickstart.yaml. The states are written in pieces, from which an interrupted run goes on.
"""

import argparse
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from one_gpu.text_files import rows_of

from beagle_jax.config import load_config
from beagle_jax.data.loader import Batch, BatchLoader
from beagle_jax.data.target_forward import states_in_memory
from beagle_jax.data.template import Row
from beagle_jax.model.beagle import BeagleBlock, BeagleSpec, init_draft
from beagle_jax.model.masks import early_block_mask
from beagle_jax.training.warm_start import _explaining, _ridge, warm_start
from beagle_jax.weights.target import configured_target

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = 800  # rows that are drawn; --rows takes the first of them
WIDTH, AT_ONCE = 192, 20  # tokens of a row, rows at once
DRAWS = 2000  # of the bootstrap


def states(count: int, path: Path) -> dict[str, np.ndarray]:
    """Computes the target's states of `count` rows, or reads them from the file."""
    if path.exists():
        return dict(np.load(path))
    target = configured_target(
        load_config(ROOT / "configs" / "quickstart.yaml", []).target, decoding=False
    )
    texts = list(rows_of(sorted((ROOT / "experiments" / "text").glob("part-greedy-*.npz"))))
    order = np.random.default_rng(0).permutation(len(texts))[:SAMPLE]
    rows = [
        Row(
            texts[index].prompt + texts[index].answer,
            [False] * len(texts[index].prompt) + [True] * len(texts[index].answer),
        )
        for index in order
    ]
    batch = next(
        BatchLoader(rows, None, batch=1, row_tokens=WIDTH, seed=0).samples(1, WIDTH * SAMPLE)
    )
    batch = jax.tree.map(lambda x: x[:count], batch)
    head_VD = target.params.get("head_VD", target.params["embed_VD"])
    pieces = []
    for first in range(0, count, AT_ONCE):
        piece = path.with_suffix(f".{first:05d}.npy")
        if not piece.exists():
            own = slice(first, first + AT_ONCE)
            states_BLD = states_in_memory(
                target.params, target.spec, batch.tokens_BL[own], batch.length_BC[own]
            )
            np.save(piece, states_BLD.astype(np.float16))
        pieces.append(piece)
    made = {
        "tokens": batch.tokens_BL,
        "counted": batch.counted_BT,
        "length": batch.length_BC,
        "first": batch.first_BC,
        "states": np.concatenate([np.load(piece) for piece in pieces]),
        "embed": np.asarray(target.params["embed_VD"]),
        "head": np.asarray(head_VD),
    }
    np.savez(path, **made)
    for piece in pieces:
        piece.unlink()
    return made


def batch_of(stored: dict[str, np.ndarray], rows: slice) -> Batch:
    return Batch(
        stored["tokens"][rows],
        stored["states"][rows].astype(np.float32),
        stored["counted"][rows],
        stored["length"][rows],
        stored["first"][rows],
    )


def triples(embed_VD: np.ndarray, batch: Batch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns [e_i, h_{i-1}, 1], h_i and the place (row, position) of each supervised query."""
    row, query = np.nonzero(batch.counted_BT)
    position = batch.first_BC[row, 0] + query
    row, position = row[position > 0], position[position > 0]
    e_MD, before_MD = embed_VD[batch.tokens_BL[row, position]], batch.inputs_BLI[row, position - 1]
    x_MF = np.concatenate([e_MD, before_MD, np.ones((len(row), 1), np.float32)], axis=1)
    return x_MF, batch.inputs_BLI[row, position], np.stack([row, position])


def predicted(params: dict, spec: BeagleSpec, embed_VD: jax.Array, batch: Batch) -> np.ndarray:
    """Predicts every position of the rows from all states before it."""
    mask = early_block_mask(batch.length_BC, batch.tokens_BL.shape[1], 1, jnp.int32(0))
    block = BeagleBlock(spec).bind({"params": params})
    return block(embed_VD[batch.tokens_BL], jnp.asarray(batch.inputs_BLI), mask)


def difference(right_M: np.ndarray, other_M: np.ndarray, row_M: np.ndarray) -> dict[str, float]:
    """Returns how much more often the first is right, with its interval over rows."""
    more = np.bincount(row_M, right_M.astype(float) - other_M)
    count = np.bincount(row_M)
    drawn = np.random.default_rng(0).integers(0, len(count), (DRAWS, len(count)))
    low, high = np.quantile(more[drawn].sum(axis=1) / count[drawn].sum(axis=1), [0.025, 0.975])
    return {"difference": more.sum() / count.sum(), "low": low, "high": high}


def measure(stored: dict[str, np.ndarray], held_out: int, vocabulary: int) -> dict:
    """Returns top-1 of each fit on the held-out rows."""
    spec = BeagleSpec(
        hidden_size=576,
        intermediate_size=1536,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        rope_theta=1e5,
        rms_norm_eps=1e-5,
    )
    cut, D = len(stored["tokens"]) - held_out, spec.hidden_size
    embed_VD = stored["embed"].astype(np.float32)
    counts_V = np.bincount(stored["tokens"][:cut].ravel(), minlength=len(embed_VD))
    head_VD = stored["head"][np.argsort(-counts_V, kind="stable")[:vocabulary]].astype(np.float32)
    x_MF, y_MD, _ = triples(embed_VD, batch_of(stored, slice(0, cut)))
    held = batch_of(stored, slice(cut, None))
    held_MF, true_MD, at = triples(embed_VD, held)
    best_M = np.argmax(true_MD @ head_VD.T, axis=1)

    def right(state_MD: np.ndarray) -> np.ndarray:
        return np.argmax(state_MD @ head_VD.T, axis=1) == best_M

    gram_FF, cross_FO = ((x_MF.T @ y).astype(np.float64) for y in (x_MF, y_MD))
    rank = spec.num_kv_heads * spec.head_dim
    values_rD = _explaining(D, rank, gram_FF, cross_FO)
    narrow = np.zeros((2 * D + 1, D + rank + 1))
    narrow[:D, :D], narrow[D:-1, D:-1], narrow[-1, -1] = np.eye(D), values_rD.T, 1
    parts = [batch_of(stored, slice(first, first + AT_ONCE)) for first in range(0, cut, AT_ONCE)]
    fresh = init_draft(spec, jax.random.key(0))
    start = warm_start(fresh, spec, jnp.asarray(embed_VD), lambda: parts)
    state_BLD = np.asarray(
        jax.jit(predicted, static_argnums=1)(start, spec, jnp.asarray(embed_VD), held)
    )
    right_M = {
        "plain_full_rank": right(held_MF @ _ridge(gram_FF, cross_FO)),
        "plain_rank_of_values": right(
            held_MF @ narrow @ _ridge(narrow.T @ gram_FF @ narrow, narrow.T @ cross_FO)
        ),
        "start": right(state_BLD[at[0], at[1]]),
    }
    return {
        "positions": len(x_MF),
        "answers": cut,
        "held_out_positions": len(held_MF),
        "held_out_answers": held_out,
        **{name: float(right.mean()) for name, right in right_M.items()},
        "start_over_plain_rank_of_values": difference(
            right_M["start"], right_M["plain_rank_of_values"], at[0]
        ),
        "jax": jax.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--states", type=Path, required=True, help="where states are kept (.npz)")
    parser.add_argument("--rows", type=int, default=SAMPLE, help="answers, held-out ones included")
    parser.add_argument("--held-out", type=int, default=60, help="rows that are not fitted on")
    parser.add_argument("--vocabulary", type=int, default=8192, help="tokens to choose from")
    parser.add_argument("--json", type=Path, help="where the figures are written")
    arguments = parser.parse_args()
    figures = measure(
        states(arguments.rows, arguments.states), arguments.held_out, arguments.vocabulary
    )
    print(json.dumps(figures, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
