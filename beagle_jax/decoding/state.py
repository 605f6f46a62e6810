"""The decoding state on the device between two rounds."""

from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from beagle_jax.arrays import AnyArray
from beagle_jax.decoding.drafter import State
from beagle_jax.decoding.logprobs import LogProbs, no_logprobs
from beagle_jax.decoding.penalties import Ends, History, no_history
from beagle_jax.decoding.sampling import GREEDY, NO_FILTERS, Filters, Knobs, knobs_of
from beagle_jax.model.cache import KVCache, KVRows
from beagle_jax.sharding import sharding_of

T = TypeVar("T")


class Requests(NamedTuple):
    """Settings of the requests, per sequence."""

    limit_B: AnyArray  # largest number of tokens of the answer
    key_B: jax.Array  # random key of the sequence's draws (sampling.place_keys)
    knobs: Knobs
    ends: Ends | None = None  # with `Filters.ends`
    drafts_B: AnyArray | None = None  # bool: drafts may be accepted; with `Filters.undrafted`


class Transcript(NamedTuple):
    """The answers so far."""

    root_B: jax.Array  # last token; the target has not computed its state yet
    out_BS: jax.Array  # tokens of the answer; the first is that of the prefill
    count_B: jax.Array  # number of tokens in out_BS
    done_B: jax.Array  # the answer is finished, or the row has no request
    broken_B: jax.Array  # the answer ended because the target's logits were not finite


class Drafted(NamedTuple):
    """The tree that each sequence drafted last; node 0 is the root."""

    token_BW: AnyArray
    parent_BW: AnyArray
    accepted_BW: AnyArray  # bool: the node is on the accepted path, as the root always is


class Stats(NamedTuple):
    """Counters of the rounds, per sequence."""

    rounds_B: jax.Array  # the prefill not counted
    accepted_BS: jax.Array  # accepted draft tokens of each round, as far as they were emitted
    passes_B: jax.Array  # rounds of the whole batch since it began, the same in all rows
    logprobs: LogProbs | None = None  # with `Filters.logprobs`
    drafted: Drafted | None = None  # with `Filters.drafted`


class DecodeState(NamedTuple):
    """Everything on the device between two rounds; donated from call to call."""

    cache: KVCache  # of the target; its length is the root's position
    draft: State  # of the drafter
    requests: Requests
    transcript: Transcript
    stats: Stats
    history: History | None = None  # with `Filters.penalties`


class Snapshot(NamedTuple):
    """Values that the host reads after some rounds: copies, because the state is donated."""

    out_BS: AnyArray
    count_B: AnyArray
    done_B: AnyArray
    broken_B: AnyArray
    rounds_B: AnyArray
    accepted_BS: AnyArray
    passes_B: AnyArray
    logprobs: LogProbs | None = None
    drafted: Drafted | None = None


def snapshot(state: DecodeState, logprobs: bool) -> Snapshot:
    """Returns the part of a state that the host reads. logprobs: with log-probabilities."""
    now, stats = state.transcript, state.stats
    return Snapshot(
        now.out_BS,
        now.count_B,
        now.done_B,
        now.broken_B,
        stats.rounds_B,
        stats.accepted_BS,
        stats.passes_B,
        stats.logprobs if logprobs else None,
        stats.drafted,
    )


def idle(
    cache: KVCache,
    draft: State,
    batch: int,
    capacity: int,
    filters: Filters = NO_FILTERS,
    vocab_size: int = 0,
) -> DecodeState:
    """Rows without a request. vocab_size: read only with filters that need it."""

    def zeros(dtype: DTypeLike = jnp.int32) -> jax.Array:
        return jnp.zeros(batch, dtype)  # donated buffers must differ

    def out() -> jax.Array:
        return jnp.zeros((batch, capacity), jnp.int32)

    key_B = jax.vmap(jax.random.key)(zeros(jnp.uint32))
    knobs = jax.tree.map(jnp.asarray, knobs_of([GREEDY] * batch))
    if filters.bias:
        knobs = knobs._replace(bias_BV=jnp.zeros((batch, vocab_size), jnp.float32))
    ends = history = logprobs = drafted = None
    drafts_B = jnp.ones(batch, bool) if filters.undrafted else None
    if filters.ends:
        ends = Ends(jnp.full((batch, filters.ends), -1, jnp.int32), zeros())
    if filters.penalties:
        history = no_history(batch, vocab_size)
    if filters.logprobs is not None:
        logprobs = no_logprobs(batch, capacity, filters.logprobs)
    if filters.drafted:
        shape = (batch, filters.drafted)
        drafted = Drafted(
            jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.int32), jnp.zeros(shape, bool)
        )
    return DecodeState(
        cache,
        draft,
        Requests(zeros(), key_B, knobs, ends, drafts_B),
        Transcript(zeros(), out(), zeros(), jnp.ones(batch, bool), zeros(bool)),
        Stats(zeros(), out(), zeros(), logprobs, drafted),
        history,
    )


def constrained(state: DecodeState, mesh: Mesh | None) -> DecodeState:
    """Constrains a state inside jit to `state_shardings`."""
    if mesh is None:
        return state
    return jax.lax.with_sharding_constraint(state, state_shardings(state, mesh))


def place_state(tree: T, mesh: Mesh | None) -> T:
    """Places a decoding state, or a part of it; returns it unchanged without a mesh."""
    return tree if mesh is None else jax.device_put(tree, state_shardings(tree, mesh))


def state_shardings(tree: Any, mesh: Mesh) -> Any:
    """Returns the shardings of a decoding state, or of a part of it.

    Keys and values are split by row and by head, other arrays by row, their first axis.
    """

    def of_rows(x: jax.Array) -> Any:  # in the place of the array
        return sharding_of(("row", *[None] * x.ndim)[: x.ndim], x.shape, mesh)

    def of_cache(x: jax.Array) -> Any:
        return sharding_of(("row", "kv", None, None), x.shape, mesh)

    def each(part: Any) -> Any:
        if isinstance(part, KVRows):
            return KVRows(of_cache(part.k_BKHS), of_cache(part.v_BKSH))
        return of_rows(part)

    return jax.tree.map(each, tree, is_leaf=lambda part: isinstance(part, KVRows))
