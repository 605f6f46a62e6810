"""The engine's programs as XLA compiles them for users, and what of a cache they copy.

The suite switches most of XLA's optimisations off (conftest.py), so test_in_place.py runs this file
in a process of its own: `JAX_DISABLE_MOST_OPTIMIZATIONS=0 python in_place_cases.py OUT`.
"""

import dataclasses
import json
import math
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from conftest import TINY
from decode_cases import NEVER, append_at_once, next_stop, round_of, target_of

from beagle_jax.decoding import engine, writer
from beagle_jax.decoding.round import Chunk, Round
from beagle_jax.decoding.sampling import GREEDY, Sampling, knobs_of
from beagle_jax.decoding.state import DecodeState, Requests
from beagle_jax.decoding.tree import ROOT_ONLY, Tree, chain, dynamic_tree
from beagle_jax.model.beagle import BeagleSpec, init_draft
from beagle_jax.model.cache import KVCache, KVRows
from beagle_jax.model.eagle import EagleSpec, init_eagle
from beagle_jax.model.target import init_cache
from beagle_jax.weights.draft import Draft

# Heads wide enough that the scores of a chunk or a tree over all slots are small beside the keys.
SPEC = dataclasses.replace(TINY, num_layers=1, head_dim=64, max_positions=4096)
DRAWN = Sampling(0.4, top_k=20, top_p=0.95)
B, S = 3, 2048
CHUNK_ROWS, T = 2, 16  # fewer sequences than the batch has: their slots are no whole cache

_BUFFERS = {
    "bitcast",
    "call",
    "conditional",
    "get-tuple-element",
    "opt-barrier",
    "parameter",
    "tuple",
    "while",
}
_WRITES = {"dynamic-update-slice", "scatter"}
_INSTRUCTION = re.compile(
    r"^\s+(?P<root>ROOT )?%?[\w.-]+ = \w+\[(?P<shape>[\d,]*)\]\S* (?P<operation>[\w-]+)\("
)
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) .*\{$")
_FUSED = re.compile(r"kind=k\w+, calls=%?([\w.-]+)")


def copies(program: str, sizes: set[int]) -> list[str]:
    """Operations of an optimised HLO module that make an array of a cache's number of elements.

    Writes in place are none of them. Operations inside a fusion make no array of their own: what
    counts is the fusion's last operation.
    """
    fused = set(_FUSED.findall(program))
    last: dict[str, str] = {}
    made: list[tuple[str, str]] = []  # the operation, and the computation that a fusion calls
    computation = ""
    for line in program.splitlines():
        if begun := _COMPUTATION.match(line):
            computation = begun[1]
        if not (instruction := _INSTRUCTION.match(line)):
            continue
        operation = instruction["operation"]
        if instruction["root"]:
            last[computation] = operation
        elements = math.prod(int(size) for size in instruction["shape"].split(",") if size)
        if elements in sizes and computation not in fused:
            called = _FUSED.search(line)
            made.append((operation, called[1] if called else ""))
    ends = [last[called] if operation == "fusion" else operation for operation, called in made]
    return sorted(operation for operation in ends if operation not in _BUFFERS | _WRITES)


def caches(state: DecodeState) -> list[jax.Array]:
    """Keys and values of the target and of the draft."""
    return [x for x in jax.tree.leaves((state.cache, state.draft)) if x.ndim == 4]


def _draft(kind: str) -> Draft | None:
    if kind == "beagle":
        beagle = BeagleSpec.from_target(SPEC)
        return Draft(beagle, init_draft(beagle, jax.random.key(0)), None, {})
    if kind == "eagle":
        eagle = EagleSpec.from_target(SPEC)
        return Draft(eagle, init_eagle(eagle, jax.random.key(0)), None, {})
    return None


def _measured(jitted, now: Round | None, state: DecodeState, *more, **static) -> dict:
    """Compiles and runs a program that takes a round, if any, the state and more."""
    sizes, cache_bytes = {x.size for x in caches(state)}, sum(x.nbytes for x in caches(state))
    first = (state,) if now is None else (now, state)
    compiled = jitted.lower(*first, *more, **static).compile()
    memory = compiled.memory_analysis()
    last_states = [x for x in jax.tree.leaves(state.draft) if x.ndim == 3]  # EAGLE's
    compiled(*first, *more)
    return {
        "cache": cache_bytes,
        "reused": memory.alias_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
        "copies": copies(compiled.as_text(), sizes),
        "not_donated": sum(not x.is_deleted() for x in (*caches(state), *last_states)),
    }


def _begun(
    kind: str, tree: Tree, sampling: Sampling, eos_ids=NEVER, batch: int = B, **parts: Callable
) -> tuple[Round, DecodeState]:
    """A round, and a state of three sequences, or `batch`, without requests."""
    now = round_of(target_of(SPEC, eos_ids), _draft(kind), tree, sampling).with_(**parts)
    return now, engine.begin(now.reading, batch=batch, capacity=S)


def rounds(
    kind: str, tree: Tree, sampling: Sampling = GREEDY, advance=engine.advance, **parts: Callable
) -> dict:
    now, state = _begun(kind, tree, sampling, **parts)
    return _measured(advance, now, state, np.int32(9), np.int32(B))


def chunk(kind: str, *, first: bool, eos_ids=NEVER, row_R=(2, 0), batch: int = B) -> dict:
    """Reads the first chunk of two prompts, or a later one, into two of the sequences."""
    tree = ROOT_ONLY if kind == "none" else chain(3)
    now, state = _begun(kind, tree, GREEDY, eos_ids, batch)
    return _measured(engine.admit, now.reading, state, _text(row_R, first=first), first=first)


def _text(row_R=(2, 0), *, first: bool) -> Chunk:
    count = len(row_R)
    key_R = jax.vmap(jax.random.key)(jnp.arange(count))
    requests = Requests(np.full(count, 8, np.int32), key_R, knobs_of([GREEDY] * count))
    return Chunk(
        np.array(row_R, np.int32),
        np.ones((count, T), np.int32),
        np.int32(0 if first else T),
        np.full(count, 2 * T, np.int32),
        requests,
    )


def released(release=engine.release) -> dict:
    """Ends the answers of some rows: the caches pass through."""
    _, state = _begun("beagle", chain(3), GREEDY)
    return _measured(release, None, state, np.array([True, False, True]))


def turned_at_exit() -> dict:
    """Planted: a program whose caches leave it with their slots in another order."""

    @partial(jax.jit, donate_argnames=("state",))
    def release(state: DecodeState, row_B: jax.Array) -> DecodeState:
        state = engine.release(state, row_B)
        layers = [
            KVRows(layer.k_BKHS[..., ::-1], layer.v_BKSH[:, :, ::-1])
            for layer in state.cache.layers
        ]
        return state._replace(cache=state.cache.with_(layers=layers))

    return released(release)


def _ring() -> tuple[Round, DecodeState]:
    """The round and the state of the writer of training text."""
    now = round_of(target_of(SPEC, NEVER), None, ROOT_ONLY, GREEDY)
    state = writer._begin(SPEC, init_cache(SPEC, 1, T, jnp.float32), batch=B, max_new=S - 4 * T)
    return now, writer._resized(state, np.arange(B), 4 * T)


def written() -> dict:
    """Rounds that keep the target's states."""
    return _measured(engine.advance_keeping, *_ring(), rounds=2)


def after_a_prefix() -> dict:
    """Reads prompts behind a prefix that all of them share."""
    now, state = _ring()
    prefix = init_cache(SPEC, 1, T, jnp.float32)
    return _measured(engine.admit_after, now, state, _text(first=False), prefix)


def chunk_put_at_once() -> dict:
    """Planted: the slot of a later chunk does not depend on the chosen tokens."""
    right = KVCache.put

    def put(self, rows, row_R, start):
        return right(self, rows, row_R, jnp.int32(T))

    with mock.patch.object(KVCache, "put", put):
        return chunk("none", first=False, eos_ids=next_stop())


CASES: dict[str, Callable[[], dict]] = {
    "plain, greedy": lambda: rounds("none", ROOT_ONLY),
    "plain, drawn": lambda: rounds("none", ROOT_ONLY, DRAWN),
    "chain, greedy": lambda: rounds("beagle", chain(3)),
    "dynamic, drawn": lambda: rounds("beagle", dynamic_tree(2, 2, 4), DRAWN),
    "EAGLE's tree": lambda: rounds("eagle", dynamic_tree(2, 2, 4)),
    "first chunk": lambda: chunk("beagle", first=True),
    "later chunk": lambda: chunk("beagle", first=False),
    "later chunk of the only sequence": lambda: chunk("beagle", first=False, row_R=(0,), batch=1),
    "EAGLE's later chunk": lambda: chunk("eagle", first=False),
    "released rows": released,
    "written text": written,
    "a chunk after a prefix": after_a_prefix,
}
PLANTED: dict[str, Callable[[], dict]] = {
    "not given away": lambda: rounds(
        "none", ROOT_ONLY, advance=jax.jit(engine.advance.__wrapped__)
    ),
    "appended at once": lambda: rounds("none", ROOT_ONLY, append=append_at_once),
    "chunk put at once": chunk_put_at_once,
    "turned at exit": turned_at_exit,
}


# Compiled in every run of the tests; the others in the slow ones.
QUICK = (
    "plain, greedy",
    "not given away",
)


if __name__ == "__main__":
    cases = CASES | PLANTED
    Path(sys.argv[1]).write_text(json.dumps({name: cases[name]() for name in sys.argv[2:]}))
