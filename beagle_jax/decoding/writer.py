"""Writes the target's answers to many prompts, with its states, as training data.

It runs the engine without a drafter, on a ring cache. The states are a by-product of decoding and
cost nothing extra. Rounds run in short segments, so that the host can show progress and refill
rows. Prompt n draws with seed + n and the position of each token, so the text does not depend on
the number of rows.

A prefix that all prompts share, such as the header of a chat template, is read once: reading a
token costs as much as writing one.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from beagle_jax.arrays import AnyArray
from beagle_jax.decoding.drafter import NoDrafter
from beagle_jax.decoding.engine import admit_after, advance_keeping
from beagle_jax.decoding.requests import NOT_FINITE
from beagle_jax.decoding.round import Chunk, Round, TargetModel
from beagle_jax.decoding.sampling import Sampling, filters_of, knobs_of
from beagle_jax.decoding.state import DecodeState, Requests, idle
from beagle_jax.decoding.tree import ROOT_ONLY
from beagle_jax.errors import UserError
from beagle_jax.model.cache import KVRows, RingCache, append_rows, repeated, round_up
from beagle_jax.model.masks import causal_mask
from beagle_jax.model.target import Params, TargetSpec, forward, init_cache

SEGMENT_ROUNDS = 8  # tokens per row between two reads by the host
ADMIT_ROWS = 16  # prompts read in one prefill
PROMPT_BUCKET = 16  # prompts are padded to a multiple of this; each length compiles once
_ROOM_BUCKET = 32  # cache slots for prompts are a multiple of this: a new size recompiles all


@dataclass(frozen=True)
class Written:
    """The target's answer to one prompt, with its states."""

    index: int  # of the prompt
    tokens: list[int]  # of the answer, with its stop token if there is one
    # The target's states of prompt and answer. Zeros for the last token, which was never read.
    states_LD: np.ndarray


class Beginning(NamedTuple):
    """The prefix of P tokens that all prompts share: key/value rows of each layer, and states.

    The rows are those of one sequence.
    """

    rows: list[KVRows]
    states_PD: np.ndarray


_read = jax.jit(forward, static_argnames="spec")


def _read_beginning(
    params: Params, spec: TargetSpec, prompts: Sequence[Sequence[int]]
) -> Beginning:
    """Reads the longest prefix that all prompts share; it may be empty.

    At least one token of each prompt stays outside, because its state predicts the answer's first
    token.
    """
    shortest = min(map(len, prompts))
    # All prompts lie between these two in sorted order, so they share the prefix of these two.
    first, last = min(map(tuple, prompts)), max(map(tuple, prompts))
    P = next((place for place in range(shortest - 1) if first[place] != last[place]), shortest - 1)
    if not P:
        dtype = params["embed_VD"].dtype
        return Beginning(init_cache(spec, 1, 0, dtype), np.zeros((0, spec.hidden_size), dtype))
    tokens_1P = jnp.asarray([first[:P]], jnp.int32)
    states_1PD, rows = _read(
        params, spec, tokens_1P, jnp.arange(P)[None], causal_mask(jnp.full(1, P), P)
    )
    return Beginning(rows, np.asarray(states_1PD[0]))


@partial(jax.jit, static_argnames=("spec", "batch", "max_new"))
def _begin(spec: TargetSpec, beginning: list[KVRows], *, batch: int, max_new: int) -> DecodeState:
    """Returns rows without requests, each with the shared prefix in its cache."""
    rings = init_cache(spec, batch, max_new, beginning[0].v_BKSH.dtype)
    layers = list(map(append_rows, rings, repeated(beginning, batch)))
    zero_B = jnp.zeros(batch, jnp.int32)
    cache = RingCache(layers, zero_B, zero_B + 0, jnp.int32(0), max_new)
    return idle(cache, (), batch, max_new)


@partial(jax.jit, static_argnames=("room",))
def _resized(state: DecodeState, row_R: AnyArray, room: int) -> DecodeState:
    """Keeps only these rows, with at least `room` cache slots for prompts; never shrinks them."""
    assert isinstance(state.cache, RingCache)
    rest = jax.tree.map(lambda x: x[row_R], state[1:])  # all but the cache
    return DecodeState(state.cache.resized(row_R, room), *rest)


class _Line:
    """Host data of a row: the prompt that it answers, and the states so far."""

    def __init__(self, index: int, prompt_states_TD: np.ndarray) -> None:
        self.index, self.count, self.states = index, 1, [prompt_states_TD]

    def grow(self, count: int, states_SD: np.ndarray) -> None:
        """Appends the states of a segment, one for each token that it wrote."""
        self.states.append(states_SD[: count - self.count].copy())
        self.count = count

    def finish(self, tokens: list[int]) -> Written:
        never_read = np.zeros_like(self.states[0][:1])
        return Written(self.index, tokens, np.concatenate([*self.states, never_read]))


class _Rows:
    """The rows of a state, and the prompts that wait for a row.

    Prompts wait in order of their length, the shortest first: neighbours then share a padded
    length, and the cache grows as late as possible.
    """

    def __init__(
        self,
        now: Round,
        beginning: Beginning,
        prompts: Sequence[Sequence[int]],
        max_new: int,
        batch: int,
        sampling: Sampling,
        seed: int,
    ) -> None:
        self.now, self.beginning, self.prompts = now, beginning, prompts
        self.max_new, self.sampling, self.seed = max_new, sampling, seed
        self.waiting = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        batch = _rows(batch, len(prompts))
        self.state = _begin(now.target.spec, beginning.rows, batch=batch, max_new=max_new)
        self.lines: list[_Line | None] = [None] * batch

    def refill(self) -> int:
        """Admits prompts to free rows, and returns how many.

        It waits for a full prefill, except at the end: a half-empty one costs as much.
        """
        free = [row for row, line in enumerate(self.lines) if line is None]
        admitted = 0
        while self.waiting and len(free) >= min(ADMIT_ROWS, len(self.lines), len(self.waiting)):
            taken, self.waiting = self.waiting[:ADMIT_ROWS], self.waiting[ADMIT_ROWS:]
            taken, more = taken[: len(free)], taken[len(free) :]
            self.waiting = more + self.waiting
            rows, free = free[: len(taken)], free[len(taken) :]
            self._admit(rows, taken)
            admitted += len(taken)
        return admitted

    def shrink(self) -> None:
        """Drops rows that no prompt will use, if at least half of all rows can go."""
        live = [row for row, line in enumerate(self.lines) if line is not None]
        fewer = _rows(len(self.lines), len(live))
        if not self.waiting and fewer < len(self.lines):
            idle_rows = (row for row, line in enumerate(self.lines) if line is None)
            keep = [*live, *idle_rows][:fewer]
            self.state = _resized(self.state, np.array(keep), 0)
            self.lines = [self.lines[row] for row in keep]

    def run(self) -> tuple[int, list[Written]]:
        """Runs a segment. Returns how many tokens it wrote, and the answers that ended."""
        self.state, now, states_SBD = advance_keeping(self.now, self.state, rounds=SEGMENT_ROUNDS)
        now, states_SBD = jax.device_get((now, states_SBD))
        live = [(row, line) for row, line in enumerate(self.lines) if line is not None]
        if any(now.broken_B[row] for row, _ in live):
            raise UserError(NOT_FINITE)
        written = sum(int(now.count_B[row]) - line.count for row, line in live)
        ended = []
        for row, line in live:
            line.grow(int(now.count_B[row]), states_SBD[:, row])
            if now.done_B[row]:
                ended.append(line.finish(now.out_BS[row, : line.count].tolist()))
                self.lines[row] = None
        return written, ended

    def _admit(self, rows: list[int], taken: list[int]) -> None:
        P = len(self.beginning.states_PD)
        chunk = self._chunk(rows, taken)
        room = P + round_up(chunk.token_RT.shape[1], _ROOM_BUCKET)
        if self.max_new + room > self.state.cache.capacity:
            self.state = _resized(self.state, np.arange(len(self.lines)), room)
        prefix = self.beginning.rows if P else None
        self.state, states_RTD = admit_after(self.now, self.state, chunk, prefix)
        for row, index, states_TD in zip(rows, taken, np.asarray(states_RTD), strict=False):
            own_TD = states_TD[: len(self.prompts[index]) - P]
            self.lines[row] = _Line(index, np.concatenate([self.beginning.states_PD, own_TD]))

    def _chunk(self, rows: list[int], taken: list[int]) -> Chunk:
        """Returns a chunk of what follows the prefix in some prompts.

        If there are fewer prompts than ADMIT_ROWS, the last one is repeated.
        """
        P, missing = len(self.beginning.states_PD), ADMIT_ROWS - len(rows)
        rows, taken = rows + rows[-1:] * missing, taken + taken[-1:] * missing
        length_R = np.array([len(self.prompts[index]) for index in taken], np.int32)
        width = round_up(int(length_R.max()) - P, PROMPT_BUCKET)
        token_RT = np.zeros((ADMIT_ROWS, width), np.int32)
        for line, index in enumerate(taken):
            token_RT[line, : length_R[line] - P] = self.prompts[index][P:]
        seed_R = np.array([(self.seed + index) % 2**32 for index in taken], np.uint32)
        requests = Requests(
            np.full(ADMIT_ROWS, self.max_new, np.int32),
            jax.vmap(jax.random.key)(seed_R),
            knobs_of([self.sampling] * ADMIT_ROWS),
        )
        return Chunk(np.array(rows, np.int32), token_RT, np.array(P, np.int32), length_R, requests)


def write_answers(
    params: Params,
    spec: TargetSpec,
    prompts: Sequence[Sequence[int]],
    *,
    eos_ids: tuple[int, ...],
    max_new: int,
    batch: int,
    sampling: Sampling,
    seed: int,
    on_tokens: Callable[[int], object] = lambda count: None,
    parts: Mapping[str, Callable[..., Any]] | None = None,
) -> Iterator[Written]:
    """Yields answers as rows finish, in no fixed order.

    batch: largest number of rows. on_tokens: called with the number of new tokens after each
    segment. parts: replacements for parts of a round (`Round.with_`).

    Raises:
        UserError: The target's logits are not finite.
    """
    if not prompts:
        return
    now = Round(
        TargetModel(spec, params), NoDrafter(), ROOT_ONLY, eos_ids, filters=filters_of([sampling])
    ).with_(**parts or {})
    beginning = _read_beginning(params, spec, prompts)
    rows = _Rows(now, beginning, prompts, max_new, batch, sampling, seed)
    while rows.waiting or any(rows.lines):
        if admitted := rows.refill():
            on_tokens(admitted)
        rows.shrink()
        written, ended = rows.run()
        on_tokens(written)
        yield from ended


def _rows(batch: int, prompts: int) -> int:
    """Returns a number of rows for these prompts: the batch, or its half, quarter, ...

    There are few sizes, because each one compiles.
    """
    while -(-batch // 2) >= max(prompts, ADMIT_ROWS):
        batch = -(-batch // 2)
    return batch
