"""The engine: jitted functions that admit, advance and release rows of a decoding state.

The state is donated from call to call. No value is copied to the host between rounds. Only the
contents of arrays depend on the prompt, so each shape compiles once.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp

from beagle_jax.decoding.round import Chunk, Round
from beagle_jax.decoding.state import DecodeState, Snapshot, constrained, snapshot
from beagle_jax.model.cache import KVRows
from beagle_jax.model.precision import exact


@partial(jax.jit, static_argnames=("batch", "capacity"))
def begin(now: Round, *, batch: int, capacity: int) -> DecodeState:
    """Returns rows without requests. capacity: slots for prompt, answer and a round's drafts."""
    return now.empty(batch, capacity)


@partial(jax.jit, static_argnames=("capacity",))
def grow(now: Round, state: DecodeState, *, capacity: int) -> DecodeState:
    """The same rows with more slots."""
    larger = now.empty(len(state.transcript.done_B), capacity)
    return constrained(jax.tree.map(_put, state, larger), now.mesh)


def _put(old: jax.Array, larger: jax.Array) -> jax.Array:
    """Writes an array into the beginning of a larger one."""
    if old.shape == larger.shape:
        return old
    return jax.lax.dynamic_update_slice(larger, old, (0,) * old.ndim)


@partial(jax.jit, static_argnames=("capacity",))
def carry(now: Round, earlier: DecodeState, *, capacity: int) -> DecodeState:
    """Rows without requests, with the caches of an earlier state of as many rows.

    capacity: slots, at least as many as the earlier state has.
    """
    fresh = now.empty(len(earlier.transcript.done_B), capacity)
    cache, draft = jax.tree.map(_put, (earlier.cache, earlier.draft), (fresh.cache, fresh.draft))
    return constrained(fresh._replace(cache=cache, draft=draft), now.mesh)


@partial(jax.jit, static_argnames=("first", "follows"), donate_argnames=("state",))
@exact
def admit(
    now: Round, state: DecodeState, chunk: Chunk, *, first: bool, follows: bool = False
) -> DecodeState:
    """Reads one chunk of new prompts (`Round.read_chunk`). now: `Round.reading`."""
    more = {"follows": True} if follows else {}
    state, _ = now.part("read_chunk")(now, state, chunk, first, **more)
    return constrained(state, now.mesh)


@partial(jax.jit, donate_argnames=("state",))
@exact
def admit_after(
    now: Round, state: DecodeState, chunk: Chunk, prefix: Sequence[KVRows]
) -> tuple[DecodeState, jax.Array]:
    """Reads prompts that follow a prefix stored in all rows; also returns states [R, T, D]."""
    return now.part("read_chunk")(now, state, chunk, True, prefix)


@partial(jax.jit, donate_argnames=("state",))
@exact
def advance(
    now: Round, state: DecodeState, max_rounds: jax.Array, enough: jax.Array
) -> tuple[DecodeState, Snapshot]:
    """Runs rounds until `enough` rows are done, at most `max_rounds` rounds.

    now: may contain fewer steps than the state has arrays for, if the rows that run need no more.
    """

    def unfinished(carry: tuple[jax.Array, DecodeState]) -> jax.Array:
        index, state = carry
        return (index < max_rounds) & (state.transcript.done_B.sum() < enough)

    def body(carry: tuple[jax.Array, DecodeState]) -> tuple[jax.Array, DecodeState]:
        index, state = carry
        return index + 1, now.run(state)[0]

    state = jax.lax.while_loop(unfinished, body, (jnp.int32(0), state))[1]
    state = constrained(state, now.mesh)
    return state, snapshot(state, now.filters.logprobs is not None)


@partial(jax.jit, static_argnames=("rounds",), donate_argnames=("state",))
@exact
def advance_keeping(
    now: Round, state: DecodeState, *, rounds: int
) -> tuple[DecodeState, Snapshot, jax.Array]:
    """Runs rounds without drafts; also returns the states [rounds, B, D] of their tokens."""

    def step(state: DecodeState, _: None) -> tuple[DecodeState, jax.Array]:
        state, states_B1D = now.run(state)
        return state, states_B1D[:, 0]

    state, states_SBD = jax.lax.scan(step, state, length=rounds)
    return state, snapshot(state, False), states_SBD


@partial(jax.jit, static_argnames=("logprobs",))
def peek(state: DecodeState, *, logprobs: bool) -> Snapshot:
    """Copies the part of the state that the host reads."""
    return jax.tree.map(jnp.copy, snapshot(state, logprobs))


@partial(jax.jit, donate_argnames=("state",))
def release(state: DecodeState, row_B: jax.Array) -> DecodeState:
    """Ends the answers of the masked rows, which idle until a request is admitted to them."""
    now = state.transcript
    return state._replace(transcript=now._replace(done_B=now.done_B | row_B))
