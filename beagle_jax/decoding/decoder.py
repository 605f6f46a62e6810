"""The decoder that everything else calls: prompts in, text, tokens and measurements out."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from beagle_jax.data.template import prompt_tokens
from beagle_jax.decoding.lookup import Lookup
from beagle_jax.decoding.loop import (
    DecodeState,
    Models,
    Report,
    Shapes,
    begin,
    decode,
    draft_head_of,
    read_prompt,
    report,
)
from beagle_jax.decoding.sampling import GREEDY, Sampling
from beagle_jax.decoding.text import TextStream
from beagle_jax.decoding.tree import ROOT_ONLY, DynamicTree, Tree
from beagle_jax.errors import UserError
from beagle_jax.model.cache import round_up
from beagle_jax.sharding import place, replicate
from beagle_jax.weights.draft import Draft
from beagle_jax.weights.target import Target

PROMPT_BUCKET = 64  # shortest padded prompt; longer ones go up by doubling: one compile each
PREFILL_CHUNK = 512  # prompts longer than this are read in pieces of it
_CAPACITY_BUCKET = 128  # smallest cache; larger ones go up by doubling
ROUNDS_PER_FETCH = 8  # streaming: rounds between two looks of the host
_ALL_ROUNDS = np.int32(2**31 - 1)

Prompt = (
    str | Sequence[Mapping[str, str]] | Sequence[int]
)  # a user's message, a chat that waits for an answer, or tokens


@dataclass(frozen=True)
class Generation:
    """One answer and what it took (definitions: product.md, "Words and numbers")."""

    tokens: list[int]  # the stop token included, if one came
    rounds: int  # the prefill is in no round
    accepted: list[
        int
    ]  # histogram: rounds that accepted 0, 1, .. P drafts, as far as they were emitted
    prefill_seconds: float  # of the whole batch
    decode_seconds: float  # of the whole batch
    text: str = ""  # without stop token and stop string; empty when the target has no tokenizer
    stopped_by: Literal["token", "string", "length", "context"] = "length"

    @property
    def tau(self) -> float:
        """Tokens per round; a round cut short counts what it emitted. 1 for an answer without a
        round.
        """
        return (len(self.tokens) - 1) / self.rounds if self.rounds else 1.0

    @property
    def tokens_per_second(self) -> float:
        """All tokens over all time, prefill included."""
        return len(self.tokens) / (self.prefill_seconds + self.decode_seconds)


class SpeculativeDecoder:
    """Lossless decoding of a target with a draft and a tree, or plainly without a draft.

    A program is compiled once for each (batch size, padded prompt length, cache size, sampling) and
    then kept.

        decoder = SpeculativeDecoder(target, draft, chain(3))
        [answer] = decoder.generate(["Why is the sky blue?"])
        print(answer.text, answer.tau)
    """

    def __init__(
        self,
        target: Target,
        draft: Draft | Lookup | None = None,
        tree: Tree = ROOT_ONLY,
        *,
        context: int | None = None,
        append_predicted: bool = True,
        rule: Literal["match", "ratio"] = "match",
        mesh: Mesh | None = None,
    ):
        """context: most tokens that a prompt and its answer may have together, and then the one
        cache size that is used; None: the target's own context, and caches as large as each call
        needs. append_predicted: see `draft.draft_tree`. rule: how drawn drafts are accepted
        (`loop.Shapes`). mesh: the devices that share the target. Raises UserError for a draft, a
        tree and a target that do not fit each other.
        """
        _check_fit(target, draft, tree, rule)
        if context is not None and not tree.depth + 1 < context <= target.spec.max_positions:
            raise UserError(
                f"a context of {context} tokens does not fit: the target's is "
                f"{target.spec.max_positions}, and a round of this tree adds up to "
                f"{tree.depth + 1}; choose one between"
            )
        self._target, self._context = target, context or target.spec.max_positions
        self._fixed_capacity = None if context is None else round_up(context + tree.depth + 1, 64)
        self._models = Models(place(target.params, mesh), None, None)
        draft_shape = draft if tree.depth else None
        if isinstance(draft_shape, Draft):
            draft_shape = draft.spec
            head = draft_head_of(target.params, draft.hot_ids)
            self._models = self._models._replace(
                draft=replicate(draft.params, mesh), draft_head=replicate(head, mesh)
            )
        self._shapes = Shapes(
            target.spec, draft_shape, tree, target.eos_ids, GREEDY, rule, append_predicted, mesh
        )

    @property
    def tree(self) -> Tree:
        """What is drafted per round."""
        return self._shapes.tree

    def warm_up(
        self, prompts: Sequence[Prompt], sampling: Sampling = GREEDY, *, max_new_tokens: int = 128
    ) -> None:
        """Compiles what answering these prompts one at a time will need."""
        needs = {
            (padded(len(tokens)), self._capacity([tokens], max_new_tokens)): tokens
            for tokens in map(self._tokens, prompts)
        }
        for tokens in needs.values():
            shapes, state = self._prefill([tokens], sampling, max_new_tokens, 0, limit=2)
            self._finish(state, shapes)

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling = GREEDY,
        *,
        max_new_tokens: int = 128,
        stop: Sequence[str] = (),
        seed: int = 0,
    ) -> list[Generation]:
        """Answers all prompts as one batch. Prompt n draws with seed + n, so a batch repeats what
        each would get alone.

        stop: an answer ends before the first of these strings. It ends also at the target's stop
        tokens, after max_new_tokens, and where the context is full. Raises UserError for empty and
        overlong prompts, and when the target's logits are not finite.
        """
        clock = time.perf_counter()
        if isinstance(prompts, str) or any(
            isinstance(prompt, (Mapping, int)) for prompt in prompts
        ):
            raise UserError(
                f"generate takes a list of prompts, and was given one, {prompts!r:.80}; write "
                "generate([prompt])"
            )
        rows = [self._tokens(prompt) for prompt in prompts]
        shapes, state = self._prefill(rows, sampling, max_new_tokens, seed)
        state.root_B.block_until_ready()
        prefilled = time.perf_counter()
        texts = [self._text_stream(stop) for _ in rows]
        now = self._finish_with_stops(state, shapes, texts) if stop else self._finish(state, shapes)
        seconds = (prefilled - clock, time.perf_counter() - prefilled)
        for line, text in enumerate(texts):
            if not stop and text is not None:
                text.add(now.out_BS[line, : now.count_B[line]].tolist())
        return [
            self._generation(now, line, text, seconds, max_new_tokens)
            for line, text in enumerate(texts)
        ]

    def stream(
        self,
        prompt: Prompt,
        sampling: Sampling = GREEDY,
        *,
        max_new_tokens: int = 128,
        stop: Sequence[str] = (),
        seed: int = 0,
    ) -> Iterator[str]:
        """Yields the text of an answer as it comes, a few rounds at a time; returns the Generation
        at its end.

        The next rounds run while the host turns the last ones into text.
        """
        clock = time.perf_counter()
        tokens, text, told = self._tokens(prompt), self._text_stream(stop), 0
        if text is None:
            raise UserError(
                "this target has no tokenizer, so there is no text to stream; use generate"
            )
        shapes, state = self._prefill([tokens], sampling, max_new_tokens, seed)
        state.root_B.block_until_ready()
        prefilled = time.perf_counter()
        ready = jax.tree.map(jnp.copy, report(state))
        while True:
            state, coming = decode(self._models, shapes, state, np.int32(ROUNDS_PER_FETCH))
            now = _fetched(ready)
            piece = text.add(now.out_BS[0, told : now.count_B[0]].tolist())
            told, ready = int(now.count_B[0]), coming
            if piece:
                yield piece
            if now.done_B[0] or text.tokens_at_stop is not None:
                break
        if rest := text.close():
            yield rest
        seconds = (prefilled - clock, time.perf_counter() - prefilled)
        return self._generation(now, 0, text, seconds, max_new_tokens)

    def prefilled(
        self,
        prompt: Prompt,
        sampling: Sampling = GREEDY,
        *,
        max_new_tokens: int = 128,
        seed: int = 0,
    ) -> tuple[Models, Shapes, DecodeState]:
        """What the loop's functions take once a prompt is read: to measure parts of a round, or to
        draw one.
        """
        return self._models, *self._prefill([self._tokens(prompt)], sampling, max_new_tokens, seed)

    def _tokens(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}] if prompt.strip() else []
        if not prompt:
            raise UserError("the prompt is empty; give at least one token")
        tokens: list[int] = (
            prompt_tokens(self._target.tokenizer, prompt)
            if isinstance(prompt[0], Mapping)
            else list(prompt)
        )
        if not 0 <= min(tokens) <= max(tokens) < self._target.spec.vocab_size:
            raise UserError(
                f"the prompt holds token {max(tokens, key=abs)}, and the target's vocabulary "
                f"ends at {self._target.spec.vocab_size - 1}; use its own tokenizer"
            )
        if len(tokens) >= self._context:
            raise UserError(
                f"the prompt has {len(tokens)} tokens and the context ends at {self._context}, "
                "which leaves no room for an answer; shorten the prompt"
            )
        return tokens

    def _text_stream(self, stop: Sequence[str]) -> TextStream | None:
        if isinstance(stop, str) or not all(stop):
            raise UserError(f"stop is {stop!r}; expected a list of strings, none of them empty")
        if self._target.tokenizer is None:
            if stop:
                raise UserError(
                    "this target has no tokenizer, so stop strings cannot be looked for"
                )
            return None
        return TextStream(self._target.tokenizer, self._target.eos_ids, stop)

    def _capacity(self, rows: Sequence[Sequence[int]], max_new_tokens: int) -> int:
        longest = max(map(len, rows))
        need = min(longest + max_new_tokens, self._context) + self._shapes.tree.depth + 1
        return max(self._fixed_capacity or _doubled(_CAPACITY_BUCKET, need), padded(longest))

    def _prefill(
        self,
        rows: list[list[int]],
        sampling: Sampling,
        max_new_tokens: int,
        seed: int,
        limit: int | None = None,
    ) -> tuple[Shapes, DecodeState]:
        if not rows:
            raise UserError("there are no prompts; give at least one")
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {max_new_tokens}; expected at least 1")
        shapes = self._shapes._replace(sampling=sampling.check())
        if shapes.rule == "ratio" and sampling.greedy:
            raise UserError(
                "rule 'ratio' accepts drafts that were drawn; set a temperature, or use rule "
                "'match'"
            )
        length_B = np.array([len(row) for row in rows], np.int32)
        limit_B = np.minimum(
            min(limit or max_new_tokens, self._context), self._context - length_B
        ).astype(np.int32)
        key_B = jax.vmap(jax.random.key)(
            np.array([(seed + line) % 2**32 for line in range(len(rows))], np.uint32)
        )
        reading = shapes._replace(
            tree=ROOT_ONLY, rule="match", append_predicted=True
        )  # a prompt's program is that of any tree
        state = begin(
            self._models, reading, limit_B, key_B, capacity=self._capacity(rows, max_new_tokens)
        )
        width = padded(max(length_B))
        tokens_BT = np.zeros((len(rows), width), np.int32)
        for line, row in enumerate(rows):
            tokens_BT[line, : len(row)] = row
        for start in range(0, width, PREFILL_CHUNK):
            chunk_BT = tokens_BT[:, start : start + PREFILL_CHUNK]
            state = read_prompt(
                self._models, reading, state, chunk_BT, np.int32(start), length_B, first=start == 0
            )
        return shapes, state

    def _finish(self, state: DecodeState, shapes: Shapes) -> Report:
        return _fetched(decode(self._models, shapes, state, _ALL_ROUNDS)[1])

    def _finish_with_stops(
        self, state: DecodeState, shapes: Shapes, texts: list[TextStream]
    ) -> Report:
        """A few rounds at a time; rows whose text reached a stop string are told to idle."""
        told = [0] * len(texts)
        while True:
            state, after = decode(self._models, shapes, state, np.int32(ROUNDS_PER_FETCH))
            now = _fetched(after)
            for line, text in enumerate(texts):
                text.add(now.out_BS[line, told[line] : now.count_B[line]].tolist())
                told[line] = int(now.count_B[line])
            done_B = now.done_B | np.array([text.tokens_at_stop is not None for text in texts])
            if done_B.all():
                return now
            state = state._replace(done_B=jnp.asarray(done_B))

    def _generation(
        self,
        now: Report,
        line: int,
        text: TextStream | None,
        seconds: tuple[float, float],
        max_new_tokens: int,
    ) -> Generation:
        count, rounds, accepted = (
            int(now.count_B[line]),
            int(now.rounds_B[line]),
            now.accepted_BS[line],
        )
        tokens = now.out_BS[line, :count].tolist()
        stopped_by = (
            "token"
            if tokens[-1] in self._target.eos_ids
            else "length"
            if count >= max_new_tokens
            else "context"
        )
        if text is not None and text.tokens_at_stop is not None:
            tokens, stopped_by = tokens[: text.tokens_at_stop], "string"
            # A round adds its accepted tokens and one more; rounds after the stop, and tokens of
            # its round, do not count.
            through = 1 + np.cumsum(accepted[:rounds] + 1)
            rounds = 0 if len(tokens) == 1 else int(np.searchsorted(through, len(tokens))) + 1
            before = 1 if rounds < 2 else int(through[rounds - 2])
            accepted = (
                np.append(accepted[: rounds - 1], min(accepted[rounds - 1], len(tokens) - before))
                if rounds
                else accepted
            )
        histogram = np.bincount(accepted[:rounds], minlength=self._shapes.tree.depth + 1).tolist()
        whole = "" if text is None else text.whole()
        return Generation(tokens, rounds, histogram, *seconds, whole, stopped_by)


def _fetched(device: Report) -> Report:
    now = Report(*jax.device_get(device))
    if now.broken_B.any():
        raise UserError(
            f"the target's logits are not finite (prompt {int(np.argmax(now.broken_B)) + 1} of "
            "the batch); its weights hold NaN or overflow in this dtype; try "
            "target.dtype=float32"
        )
    return now


def _check_fit(target: Target, draft: Draft | Lookup | None, tree: Tree, rule: str) -> None:
    """Raises UserError unless the draft belongs to the target and the tree can be drafted."""
    if not tree.depth:
        return
    if draft is None:
        raise UserError("a draft tree needs a draft; set draft.path, or decode plainly")
    branches = isinstance(tree, DynamicTree) or tree.size != tree.depth + 1
    if isinstance(draft, Lookup):
        if branches or rule == "ratio":
            raise UserError(
                "prompt lookup drafts a chain and knows no probabilities, but was given a "
                f"{tree} and rule {rule!r}; use a chain and rule 'match'"
            )
        return
    ours, theirs = draft.spec.hidden_size, target.spec.hidden_size
    if ours != theirs:
        raise UserError(
            f"this draft belongs to another target (hidden size {ours}, the target's is {theirs})"
        )
    vocabulary, known = target.spec.vocab_size, target.spec.vocab_size
    if draft.hot_ids is not None:
        vocabulary, highest = len(draft.hot_ids), int(jnp.max(draft.hot_ids))
        if highest >= known:
            raise UserError(
                f"this draft belongs to another target (it scores token {highest}, the target "
                f"has {known})"
            )
    most = max(tree.kept_children(level) for level in range(tree.depth))
    if most > vocabulary:
        raise UserError(
            f"the tree keeps {most} children of a node, but the draft scores only {vocabulary} "
            "tokens; lower topk"
        )
    if rule == "ratio" and branches:
        raise UserError(
            "rule 'ratio' is for chains: a tree's siblings are not independent draws; use rule "
            "'match'"
        )


def padded(length: int) -> int:
    """Columns that a prompt takes in the prefill."""
    return (
        round_up(length, PREFILL_CHUNK)
        if length > PREFILL_CHUNK
        else _doubled(PROMPT_BUCKET, length)
    )


def _doubled(start: int, need: int) -> int:
    return max(start, 1 << (int(need) - 1).bit_length())
