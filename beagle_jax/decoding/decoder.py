"""The decoder that entry points use: prompts in, tokens and measurements out, one sequence at a time."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from beagle_jax.decoding.loop import DecodeState, Models, Shapes, decode, draft_head_of, prefill
from beagle_jax.decoding.tree import ROOT_ONLY, Tree
from beagle_jax.errors import UserError
from beagle_jax.weights.draft import Draft
from beagle_jax.weights.target import Target

PROMPT_BUCKET = 64  # shortest padded prompt; longer ones go up by doubling: one compile each
_CAPACITY_MULTIPLE = 64  # cache sizes are multiples of this
ROUNDS_PER_FETCH = 8  # streaming: rounds between two looks of the host
_ALL_ROUNDS = np.int32(2**31 - 1)


@dataclass(frozen=True)
class Generation:
    """One answer and what it took (definitions: product.md, "Words and numbers")."""

    tokens: list[int]  # the stop token included, if one came
    rounds: int  # the prefill is in no round
    accepted: list[int]  # histogram: rounds that accepted 0, 1, .. P drafts
    prefill_seconds: float
    decode_seconds: float

    @property
    def tau(self) -> float:
        """Tokens per round; a round cut short counts what it emitted. 1 for an answer without a round."""
        return (len(self.tokens) - 1) / self.rounds if self.rounds else 1.0

    @property
    def tokens_per_second(self) -> float:
        """All tokens over all time, prefill included."""
        return len(self.tokens) / (self.prefill_seconds + self.decode_seconds)


class Decoder:
    """Greedy decoding of one target, with a draft and a tree or without (plain).

    The cache size is fixed at construction, so prompts of one padded length share one compiled program.
    """

    def __init__(self, target: Target, draft: Draft | None, tree: Tree, *, max_new_tokens: int, longest_prompt: int):
        """longest_prompt: tokens of the longest prompt that will come. Raises UserError past the target's context."""
        if draft is None and tree.depth:
            raise UserError("a draft tree needs a draft; set draft.path, or decode plainly")
        if longest_prompt + max_new_tokens > target.spec.max_positions:
            raise UserError(
                f"a prompt of {longest_prompt} tokens and {max_new_tokens} new ones exceed the target's context of "
                f"{target.spec.max_positions}; shorten the prompt or lower max_new_tokens"
            )
        need = max(_bucket(longest_prompt), longest_prompt + max_new_tokens + tree.depth + 1)
        self._capacity = -(-need // _CAPACITY_MULTIPLE) * _CAPACITY_MULTIPLE
        self._longest_prompt, self._max_new = longest_prompt, max_new_tokens
        if not tree.depth:
            draft = None
        self._models = Models(
            target.params,
            None if draft is None else draft.params,
            None if draft is None else draft_head_of(target.params, draft.hot_ids),
        )
        self._shapes = Shapes(target.spec, None if draft is None else draft.spec, tree, target.eos_ids)

    @classmethod
    def plain(cls, target: Target, *, max_new_tokens: int, longest_prompt: int) -> "Decoder":
        """Decoding without a draft: the baseline of every comparison."""
        return cls(target, None, ROOT_ONLY, max_new_tokens=max_new_tokens, longest_prompt=longest_prompt)

    def warm_up(self, prompts: Sequence[Sequence[int]]) -> None:
        """Compiles everything that these prompts will need: one short answer per padded length."""
        for prompt in {_bucket(len(prompt)): prompt for prompt in prompts}.values():
            self.generate(prompt, min(2, self._max_new))

    def generate(self, prompt: Sequence[int], max_new_tokens: int | None = None) -> Generation:
        """Answers one prompt; blocks until the answer is on the host."""
        clock = time.perf_counter()
        state = self._prefill(prompt, max_new_tokens)
        state.root_B.block_until_ready()
        prefilled = time.perf_counter()
        state = decode(self._models, self._shapes, state, _ALL_ROUNDS)
        out, count, rounds, accepted = jax.device_get((state.out_BT, state.count_B, state.rounds_B, state.accepted_BP1))
        finished = time.perf_counter()
        tokens = out[0, : count[0]].tolist()
        return Generation(tokens, int(rounds[0]), accepted[0].tolist(), prefilled - clock, finished - prefilled)

    def stream(self, prompt: Sequence[int], max_new_tokens: int | None = None) -> Iterator[list[int]]:
        """Yields the tokens of an answer as they come, a few rounds at a time."""
        state, told = self._prefill(prompt, max_new_tokens), 0
        while True:
            out, count, done = jax.device_get((state.out_BT, state.count_B, state.done_B))
            yield out[0, told : count[0]].tolist()
            if done[0]:
                return
            told = int(count[0])
            state = decode(self._models, self._shapes, state, np.int32(ROUNDS_PER_FETCH))

    def _prefill(self, prompt: Sequence[int], max_new_tokens: int | None) -> DecodeState:
        if not prompt:
            raise UserError("the prompt is empty; give at least one token")
        if len(prompt) > self._longest_prompt:
            raise UserError(f"the prompt has {len(prompt)} tokens, this decoder was built for {self._longest_prompt}")
        limit = self._max_new if max_new_tokens is None else max_new_tokens
        if not 1 <= limit <= self._max_new:
            raise UserError(f"max_new_tokens is {limit}; this decoder was built for 1 to {self._max_new}")
        tokens_BT = np.zeros((1, _bucket(len(prompt))), np.int32)
        tokens_BT[0, : len(prompt)] = prompt
        return prefill(
            self._models,
            self._shapes,
            jnp.asarray(tokens_BT),
            jnp.asarray([len(prompt)], jnp.int32),
            jnp.asarray([limit], jnp.int32),
            capacity=self._capacity,
            max_new=self._max_new,
        )


def _bucket(length: int) -> int:
    return max(PROMPT_BUCKET, 1 << (length - 1).bit_length())
