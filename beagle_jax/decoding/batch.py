"""Plain batched generation: many prompts share one jitted loop, and a finished row takes the next
prompt.

This is how the target writes training data, and its states with it: they are the text's cheapest
by-product. It runs in segments of a few steps so that the host can show progress and refill rows;
inside a segment nothing leaves the device. Knows nothing of drafts.

The cache has two zones. Answers lie in a ring that all rows share: every step writes one slot, the
same for each row, so the write is one slice and not a scatter (0.3 s of 0.9 for 256 rows of a 135M
model). Prompts lie behind the ring. Where a key lies does not matter, it carries its position; what
a row sees is its prompt and its own last steps.

What all prompts begin with, a chat template's header, is read once: a token read costs as much as a
token written.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from beagle_jax.decoding.sampling import Sampling, choose_from_top, is_stop
from beagle_jax.errors import UserError
from beagle_jax.model.cache import KVRows, append_rows, round_up
from beagle_jax.model.masks import causal_mask
from beagle_jax.model.target import Params, TargetSpec, forward, init_cache, logits

SEGMENT_STEPS = 8  # tokens per row between two looks of the host
ADMIT_ROWS = 16  # prompts read in one prefill
PROMPT_BUCKET = 16  # what is read of a prompt is padded to a multiple of this: one compile each
_ROOM_BUCKET = 32  # and the cache's room for it to a multiple of this: a compile of everything each


class Answer(NamedTuple):
    """What the target wrote for one prompt."""

    index: int  # of the prompt
    tokens: list[int]  # with the stop token, if one came
    states_LD: (
        np.ndarray
    )  # the target's states over prompt and answer; zeros at the last token, which it never read


class WriterState(NamedTuple):
    """Everything on the device between two segments. The ring has as many slots as an answer has
    tokens at most.
    """

    cache: list[KVRows]  # ring, then prompt
    step: jax.Array  # steps so far; the next one writes slot step % ring
    prompt_len_B: jax.Array
    token_B: jax.Array  # last chosen token, not in the cache yet
    out_BT: jax.Array  # tokens chosen so far
    count_B: jax.Array  # how many of them
    done_B: jax.Array  # finished, or never filled
    key: jax.Array


class Beginning(NamedTuple):
    """What all prompts begin with, P tokens: its rows in each layer, of one sequence, and its
    states.
    """

    rows: list[KVRows]
    states_PD: np.ndarray


_read = jax.jit(forward, static_argnames="spec")


def _read_beginning(
    params: Params, spec: TargetSpec, prompts: Sequence[Sequence[int]]
) -> Beginning:
    """Reads what all prompts begin with, perhaps nothing. One token of each is left: what comes
    next is read off that.
    """
    shortest = min(map(len, prompts))
    first, last = (
        min(prompts),
        max(prompts),
    )  # what these two share, those between them in order share too
    P = next((place for place in range(shortest - 1) if first[place] != last[place]), shortest - 1)
    if not P:
        dtype = params["embed_VD"].dtype
        return Beginning(init_cache(spec, 1, 0, dtype), np.zeros((0, spec.hidden_size), dtype))
    tokens_1P = jnp.asarray([first[:P]], jnp.int32)
    states_1PD, rows = _read(
        params, spec, tokens_1P, jnp.arange(P)[None], causal_mask(jnp.full(1, P), P)
    )
    return Beginning(rows, np.asarray(states_1PD[0]))


def _repeated(rows: list[KVRows], count: int) -> list[KVRows]:
    return [
        KVRows(jnp.repeat(one.k_BKHS, count, 0), jnp.repeat(one.v_BKSH, count, 0)) for one in rows
    ]


def _empty_state(
    spec: TargetSpec, beginning: list[KVRows], batch: int, max_new: int, seed: int
) -> WriterState:
    def zeros(*shape):
        return jnp.zeros(shape, jnp.int32)  # a new buffer each time: donated buffers must differ

    rings = init_cache(spec, batch, max_new, beginning[0].v_BKSH.dtype)
    return WriterState(
        cache=list(map(append_rows, rings, _repeated(beginning, batch))),
        step=zeros(),
        prompt_len_B=zeros(batch),
        token_B=zeros(batch),
        out_BT=zeros(batch, max_new),
        count_B=zeros(batch),
        done_B=jnp.ones(batch, bool),
        key=jax.random.key(seed),
    )


@partial(jax.jit, static_argnames=("slots",))
def _resize(state: WriterState, row_B: jax.Array, slots: int) -> WriterState:
    """Keeps these rows only, with so many slots (never less than there are)."""
    more = max(0, slots - state.cache[0].v_BKSH.shape[2])

    def longer(kept):
        return KVRows(
            jnp.pad(kept.k_BKHS[row_B], ((0, 0), (0, 0), (0, 0), (0, more))),
            jnp.pad(kept.v_BKSH[row_B], ((0, 0), (0, 0), (0, more), (0, 0))),
        )

    return state._replace(
        cache=[longer(rows) for rows in state.cache],
        prompt_len_B=state.prompt_len_B[row_B],
        token_B=state.token_B[row_B],
        out_BT=state.out_BT[row_B],
        count_B=state.count_B[row_B],
        done_B=state.done_B[row_B],
    )


@partial(jax.jit, static_argnames=("spec", "sampling", "eos_ids"), donate_argnames=("state",))
def _admit(
    params, spec, state, beginning, slot_R, tokens_RT, length_R, sampling, eos_ids
) -> tuple[WriterState, jax.Array]:
    """Prefills what follows the beginning in R prompts into rows slot_R; a slot equal to the batch
    size is dropped.

    Returns the states [R, T, D] of what it read too.
    """
    (R, T), P = tokens_RT.shape, beginning[0].v_BKSH.shape[2]
    ring = state.out_BT.shape[1]
    positions_RT = jnp.broadcast_to(P + jnp.arange(T), (R, T))
    past = (_repeated(beginning, R), jnp.ones((R, P), bool)) if P else ()
    states_RTD, rows = forward(
        params, spec, tokens_RT, positions_RT, causal_mask(length_R, T), *past
    )
    last_RD = jnp.take_along_axis(states_RTD, (length_R - 1)[:, None, None], axis=1)[:, 0]
    key, sub = jax.random.split(state.key)
    token_R = choose_from_top(logits(params, spec, last_RD), sampling, sub)

    def put(old, new):
        return old.at[slot_R].set(new, mode="drop")

    def put_rows(old, new):
        return KVRows(
            old.k_BKHS.at[slot_R, :, :, ring + P : ring + P + T].set(new.k_BKHS, mode="drop"),
            old.v_BKSH.at[slot_R, :, ring + P : ring + P + T].set(new.v_BKSH, mode="drop"),
        )

    admitted = state._replace(
        cache=[put_rows(old, new) for old, new in zip(state.cache, rows, strict=True)],
        prompt_len_B=put(state.prompt_len_B, P + length_R),
        token_B=put(state.token_B, token_R),
        out_BT=state.out_BT.at[slot_R, 0].set(token_R, mode="drop"),
        count_B=put(state.count_B, jnp.ones(R, jnp.int32)),
        done_B=put(state.done_B, is_stop(token_R, eos_ids) | (ring == 1)),
        key=key,
    )
    return admitted, states_RTD


def _visible(state: WriterState) -> jax.Array:
    """Mask [B, S] of the slots that each row sees: its prompt, and the ring's slots since it was
    admitted.
    """
    ring = state.out_BT.shape[1]
    slot_1S = jnp.arange(state.cache[0].v_BKSH.shape[2])[None]
    # A row that is not done has run in every step since: its count - 1 newest slots are its own.
    age_1S = (state.step - 1 - slot_1S) % ring
    own_BS = (slot_1S < ring) & (age_1S < state.count_B[:, None] - 1)
    prompt_BS = (slot_1S >= ring) & (slot_1S - ring < state.prompt_len_B[:, None])
    return own_BS | prompt_BS


def _write_slot(cache: KVRows, rows: KVRows, slot: jax.Array) -> KVRows:
    """Writes one token's rows at the same slot of every sequence."""

    def put(old, new, axis):
        return jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), slot, axis)

    return KVRows(put(cache.k_BKHS, rows.k_BKHS, 3), put(cache.v_BKSH, rows.v_BKSH, 2))


@partial(jax.jit, static_argnames=("spec", "sampling", "eos_ids"), donate_argnames=("state",))
def _segment(params, spec, state, sampling, eos_ids) -> tuple[WriterState, jax.Array]:
    """SEGMENT_STEPS tokens for every row until it is done, and the states [steps, B, D] of the
    tokens read.
    """
    B, ring = state.out_BT.shape
    row_B = jnp.arange(B)

    def step(now, _):
        position_B1 = (now.prompt_len_B + now.count_B - 1)[:, None]
        seen = (now.cache, _visible(now))
        states_B1D, rows = forward(
            params, spec, now.token_B[:, None], position_B1, jnp.ones((B, 1, 1), bool), *seen
        )
        key, sub = jax.random.split(now.key)
        token_B = choose_from_top(logits(params, spec, states_B1D[:, 0]), sampling, sub)
        # A done row keeps computing, on slots that nobody sees, and counts nothing.
        column_B = jnp.where(now.done_B, ring, now.count_B)
        count_B = now.count_B + ~now.done_B
        done_B = now.done_B | is_stop(token_B, eos_ids) | (count_B >= ring)
        # The slot depends on the chosen tokens, so XLA must order the write after every read of the
        # cache and can do it in place; without that it copies the whole cache each step. Once all
        # are done any slot will do.
        slot = jnp.where(done_B.all(), 0, now.step % ring)
        moved = now._replace(
            cache=[_write_slot(old, new, slot) for old, new in zip(now.cache, rows, strict=True)],
            step=now.step + 1,
            token_B=jnp.where(now.done_B, now.token_B, token_B),
            out_BT=now.out_BT.at[row_B, column_B].set(token_B, mode="drop"),
            count_B=count_B,
            done_B=done_B,
            key=key,
        )
        return moved, states_B1D[:, 0]

    return jax.lax.scan(step, state, length=SEGMENT_STEPS)


class _Line:
    """The host's side of one row: which prompt it answers, and the states that came so far."""

    def __init__(self, index: int, prompt_states_TD: np.ndarray):
        self.index, self.count, self.states = index, 1, [prompt_states_TD]

    def grow(self, count: int, states_SD: np.ndarray) -> None:
        """Takes the states of the tokens that this segment read: one for each that it chose."""
        self.states.append(states_SD[: count - self.count].copy())
        self.count = count

    def finish(self, tokens: list[int]) -> Answer:
        never_read = np.zeros_like(self.states[0][:1])
        return Answer(self.index, tokens, np.concatenate([*self.states, never_read]))


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
) -> Iterator[Answer]:
    """Yields answers as rows finish, in no fixed order.

    Prompts are taken shortest first, so that neighbours share a padded length and the cache grows
    only when it must. `on_tokens` is told how many tokens each segment added. Raises UserError
    where a sliding window would hide a token.
    """
    _check_window(spec, prompts, max_new)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    if not order:
        return
    beginning = _read_beginning(params, spec, prompts)
    P = len(beginning.states_PD)
    batch = _rows(batch, len(prompts))
    state = _empty_state(spec, beginning.rows, batch, max_new, seed)
    lines: list[_Line | None] = [None] * batch
    while order or any(lines):
        free = [row for row, line in enumerate(lines) if line is None]
        # A full prefill or nothing, except at the end: half-empty prefills cost as much as full
        # ones.
        while order and len(free) >= min(ADMIT_ROWS, batch, len(order)):
            rows, free = free[:ADMIT_ROWS], free[ADMIT_ROWS:]
            taken, order = order[: len(rows)], order[len(rows) :]
            slots, tokens, lengths = _pack([prompts[index][P:] for index in taken], rows, batch)
            needed = max_new + P + round_up(tokens.shape[1], _ROOM_BUCKET)
            if needed > state.cache[0].v_BKSH.shape[2]:
                state = _resize(state, np.arange(batch), needed)
            state, states_RTD = _admit(
                params, spec, state, beginning.rows, slots, tokens, lengths, sampling, eos_ids
            )
            for row, index, states_TD in zip(rows, taken, np.asarray(states_RTD), strict=False):
                own_TD = states_TD[: len(prompts[index]) - P]
                lines[row] = _Line(index, np.concatenate([beginning.states_PD, own_TD]))
            on_tokens(len(taken))
        if not order and (fewer := _rows(len(lines), len(lines) - len(free))) < len(lines):
            keep = sorted(range(len(lines)), key=lambda row: lines[row] is None)[:fewer]
            state, lines = _resize(state, np.array(keep), 0), [lines[row] for row in keep]
        state, states_SBD = _segment(params, spec, state, sampling, eos_ids)
        done_B, count_B, out_BT, states_SBD = jax.device_get(
            (state.done_B, state.count_B, state.out_BT, states_SBD)
        )
        live = [row for row, line in enumerate(lines) if line is not None]
        on_tokens(sum(int(count_B[row]) - lines[row].count for row in live))
        for row in live:
            lines[row].grow(int(count_B[row]), states_SBD[:, row])
            if done_B[row]:
                yield lines[row].finish(out_BT[row, : count_B[row]].tolist())
                lines[row] = None


def _check_window(spec: TargetSpec, prompts: Sequence[Sequence[int]], max_new: int) -> None:
    """Raises UserError if any text could outgrow the target's sliding window: slots of the ring are
    not positions.
    """
    longest, window = max(map(len, prompts), default=0), spec.shortest_window
    if window is not None and longest + max_new > window:
        raise UserError(
            f"the target's sliding window is {window} tokens; a prompt of {longest} and an "
            f"answer of {max_new} do not fit into it, and answers are written only where it "
            "hides nothing; lower data.max_prompt_tokens or data.max_answer_tokens"
        )


def _rows(batch: int, prompts: int) -> int:
    """Rows for so many prompts: the batch, or its half, quarter, ..: few sizes, as each is
    compiled.
    """
    while -(-batch // 2) >= max(prompts, ADMIT_ROWS):
        batch = -(-batch // 2)
    return batch


def _pack(
    prompts: list[Sequence[int]], rows: list[int], batch: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Slots, right-padded tokens and lengths of one prefill; unused lines point at slot `batch`,
    out of range.
    """
    slots = np.full(ADMIT_ROWS, batch, np.int32)
    lengths = np.ones(ADMIT_ROWS, np.int32)
    tokens = np.zeros((ADMIT_ROWS, round_up(max(map(len, prompts)), PROMPT_BUCKET)), np.int32)
    # The last prefills have fewer prompts than rows.
    for line, (prompt, row) in enumerate(zip(prompts, rows, strict=False)):
        slots[line], lengths[line] = row, len(prompt)
        tokens[line, : len(prompt)] = prompt
    return slots, tokens, lengths
