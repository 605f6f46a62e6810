"""Speculative decoding of a transformers target, for drafts in PyTorch: batches, trees, draws.

A round drafts a tree for each row, runs its nodes through the target in one pass, and accepts the
path that the target would have chosen itself. Rows end on their own; one that has ended waits for
the others. It is kept short, not fast.

Array names end in their axes: B rows, L prompt tokens, S slots of a cache, W nodes of a tree, P
nodes of an accepted path, I width of what the draft reads, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from transformers import DynamicCache, PreTrainedModel

from .modeling_sampling import Sampling
from .modeling_tree import DynamicTree, Nodes, Tree


class Generated(NamedTuple):
    """The answers of a call and the rounds that they took."""

    # [B, prompt and new tokens]: each row without the padding of its prompt, padded at its end
    sequences: torch.Tensor
    rounds: int  # of draft, verify and accept, without the prefill; of a batch: until all rows end
    answers: list[list[int]]  # the new tokens of each row, with the end token if there is one
    row_rounds: list[int]  # rounds of each row


class Settings(NamedTuple):
    """What a call of `generate` asks for."""

    tree: Tree | DynamicTree
    sampling: Sampling
    seed: int  # of the first row; row n has seed + n
    stop: frozenset[int]  # tokens that end an answer
    max_new_tokens: int


def prompts_of(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> list[list[int]]:
    """Returns the tokens of each prompt without its padding.

    Raises ValueError if shapes do not fit, or a prompt is empty.
    """
    if input_ids.ndim != 2 or not input_ids.numel():
        raise ValueError(
            f"input_ids has shape {list(input_ids.shape)}; expected prompts that are not empty, "
            "[batch, length]"
        )
    if attention_mask is None:
        return input_ids.tolist()
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask has shape {list(attention_mask.shape)}; expected that of input_ids, "
            f"{list(input_ids.shape)}"
        )
    prompts = [
        tokens[mask].tolist() for tokens, mask in zip(input_ids, attention_mask.bool(), strict=True)
    ]
    if not all(prompts):
        raise ValueError("attention_mask leaves a prompt without a token")
    return prompts


def check(
    config: Any, target: PreTrainedModel, prompts: list[list[int]], settings: Settings, scored: int
) -> list[int]:
    """Returns how many tokens each answer may have.

    config: of the draft. scored: the tokens that it scores. Raises ValueError if draft, target and
    settings do not fit together.
    """
    for key in ("hidden_size", "vocab_size"):
        ours, theirs = getattr(config, key), getattr(target.config, key)
        if ours != theirs:
            raise ValueError(
                f"this draft belongs to another target ({key} {ours}, the target's is {theirs})"
            )
    tree, context = settings.tree, target.config.max_position_embeddings
    limits = [min(settings.max_new_tokens, context - len(prompt)) for prompt in prompts]
    if min(limits) < 1:
        raise ValueError(
            "no token can be generated: max_new_tokens is below 1, or the prompt fills the "
            "target's context"
        )
    if tree.size < 2:
        raise ValueError(
            "the tree has no nodes below its root; give levels of at least 1, or paths"
        )
    most = max(tree.children(level) for level in range(tree.depth))
    if most > scored:
        raise ValueError(
            f"the tree asks for rank {most - 1}, but the draft scores only {scored} tokens"
        )
    if not (tree.is_chain and len(prompts) == 1) and getattr(target.config, "sliding_window", None):
        raise ValueError(
            "this target's attention has a window, which the mask of a tree or of a batch does "
            "not; draft a chain (levels) for one prompt"
        )
    settings.sampling.check()
    return limits


class Decoding:
    """The rows of a call: the target's cache, the draft's, and the answers so far."""

    def __init__(
        self, draft: Any, target: PreTrainedModel, prompts: list[list[int]], settings: Settings
    ) -> None:
        """Reads the prompts, after which each answer has its first token."""
        self.draft, self.target, self.settings = draft, target, settings
        self.head, self.embed = target.get_output_embeddings(), target.get_input_embeddings()
        self.device = self.head.weight.device
        self.rows_VD = draft.head_rows(self.head.weight)
        self.limits = check(draft.config, target, prompts, settings, len(self.rows_VD))
        self.seeds = [settings.seed + row for row in range(len(prompts))]
        # Without the config, layers with a window keep all slots, so that drafts can be dropped.
        self.past = DynamicCache()
        self.lengths = [len(prompt) for prompt in prompts]
        L = max(self.lengths)
        tokens_BL = self._tensor([prompt + [0] * (L - len(prompt)) for prompt in prompts])
        h_BLI = self._read(tokens_BL)  # causal: padding stands after the text that it must not meet
        last_BI = h_BLI[range(len(prompts)), [length - 1 for length in self.lengths]]
        self.answers = [
            [token] for token in self._choices(last_BI[:, None], [[0]] * len(prompts))[0]
        ]
        after = [
            (prompt[1:] + answer + [0] * L)[:L]
            for prompt, answer in zip(prompts, self.answers, strict=True)
        ]
        self.true = self._true_rows(h_BLI, after, torch.arange(L, device=self.device)[None])
        self.last_B1I = last_BI[:, None]  # the last true state of each row
        self.rounds = [0] * len(prompts)

    def live(self) -> list[int]:
        """Returns the rows whose answers go on."""
        return [
            row
            for row, answer in enumerate(self.answers)
            if len(answer) < self.limits[row] and answer[-1] not in self.settings.stop
        ]

    def round(self, live: list[int]) -> None:
        """Drafts, verifies and accepts; only `live` rows get tokens."""
        D, tree, B = self.draft.config.hidden_size, self.settings.tree, len(self.answers)
        root_B = self._tensor([answer[-1] for answer in self.answers])
        nodes = self.draft.draft(
            tree,
            root_B,
            self.true,
            self._tensor(self.lengths),
            self.embed,
            self.rows_VD,
            self.last_B1I[..., -D:].to(self.draft.dtype),
        )
        h_BWI = self._verified(nodes)
        places = [
            [len(answer) + depth for depth in depths]
            for answer, depths in zip(self.answers, nodes.depth_BW.tolist(), strict=True)
        ]
        choices = self._choices(h_BWI, places)
        columns = list(zip(*choices, strict=True))  # of each row
        paths = [nodes.accepted(row, columns[row]) if row in live else [] for row in range(B)]
        tokens = nodes.token_BW.tolist()
        new = [
            [tokens[row][node] for node in path[1:]] + [columns[row][path[-1]]] if path else []
            for row, path in enumerate(paths)
        ]
        self._append(h_BWI, paths, new)
        for row in live:
            end = next(
                (n + 1 for n, token in enumerate(new[row]) if token in self.settings.stop), None
            )
            self.answers[row] = (self.answers[row] + new[row][:end])[: self.limits[row]]
            self.rounds[row] += 1

    def _append(self, h_BWI: torch.Tensor, paths: list[list[int]], new: list[list[int]]) -> None:
        """Keeps the accepted nodes in both caches; slots of the others are dropped."""
        first, size = self.true.k_BKSH.shape[2], h_BWI.shape[1]
        longest = max(map(len, paths))
        padded = [path + [0] * (longest - len(path)) for path in paths]
        index_BP1 = self._tensor(padded)[..., None]
        h_BPI = h_BWI.gather(1, index_BP1.expand(-1, -1, h_BWI.shape[-1]))
        after = [tokens + [0] * (longest - len(tokens)) for tokens in new]
        at_BP = self._tensor(self.lengths)[:, None] + torch.arange(longest, device=self.device)
        self.true = self.true.followed_by(self._true_rows(h_BPI, after, at_BP))
        slots_of = [
            (range(length), [first + node for node in path], [first + n for n in range(len(path))])
            for length, path in zip(self.lengths, paths, strict=True)
        ]
        self.lengths = [
            length + len(path) for length, path in zip(self.lengths, paths, strict=True)
        ]
        most = max(self.lengths)

        def index(places: list[list[int]]) -> torch.Tensor:
            return self._tensor([slots + [0] * (most - len(slots)) for slots in places])

        _keep(self.past, index([[*old, *nodes] for old, nodes, _ in slots_of]), first + size)
        in_order_BS = index([[*old, *rows] for old, _, rows in slots_of])
        self.true = type(self.true)(*(_gathered(x_BKSH, in_order_BS) for x_BKSH in self.true))
        for row, path in enumerate(paths):
            if path:
                self.last_B1I[row, 0] = h_BWI[row, path[-1]]

    def _verified(self, nodes: Nodes) -> torch.Tensor:
        """Runs all nodes through the target in one pass and returns what the draft reads of them.

        Each node sees its row's text, its ancestors and itself.
        """
        B, W = nodes.token_BW.shape
        if B == 1 and self.settings.tree.is_chain:
            return self._read(nodes.token_BW)
        S, lengths_B1 = self.past.get_seq_length(), self._tensor(self.lengths)[:, None]
        text_BS = torch.arange(S, device=self.device) < lengths_B1
        sees_BWS = torch.cat([text_BS[:, None].expand(-1, W, -1), nodes.above_BWW], dim=-1)
        dtype = self.target.dtype
        mask_BWS = torch.zeros(sees_BWS.shape, dtype=dtype, device=self.device)
        mask_BWS.masked_fill_(~sees_BWS, torch.finfo(dtype).min)
        return self._read(
            nodes.token_BW,
            attention_mask=mask_BWS[:, None],
            position_ids=lengths_B1 + nodes.depth_BW,
        )

    def _read(self, tokens_BT: torch.Tensor, **options: Any) -> torch.Tensor:
        """Appends tokens to the target's cache.

        Returns what the draft reads [B, T, I]: inputs of some layers, and the states beside them.
        """
        layers = self.draft.config.state_layers
        options |= dict(use_cache=True, output_hidden_states=bool(layers))
        out = self.target.base_model(input_ids=tokens_BT, past_key_values=self.past, **options)
        streams = [out.hidden_states[layer] for layer in layers]
        return torch.cat([*streams, out.last_hidden_state], dim=-1)

    def _choices(self, h_BTI: torch.Tensor, places: list[list[int]]) -> list[list[int]]:
        """Returns the target's choice after each state, as T lists of B tokens.

        places: of the tokens in their answers, B lists of T numbers.
        """
        T, D = h_BTI.shape[1], self.draft.config.hidden_size
        logits_BTV = self.head(h_BTI[..., -D:])
        if cap := getattr(self.target.config, "final_logit_softcapping", None):
            logits_BTV = torch.tanh(logits_BTV / cap) * cap
        seeds = [seed for seed in self.seeds for _ in range(T)]
        flat = [place for row in places for place in row]
        chosen = self.settings.sampling.choose(logits_BTV.flatten(0, 1), seeds, flat)
        return [chosen[column::T] for column in range(T)]

    def _true_rows(self, h_BTI: torch.Tensor, after: list[list[int]], at_BT: torch.Tensor) -> Any:
        """Returns the draft's keys and values of true states.

        after: the tokens that follow them.
        """
        dtype = self.draft.dtype
        next_BTD = self.embed(self._tensor(after)).to(dtype)
        return self.draft.true_rows(h_BTI.to(dtype), next_BTD, at_BT)

    def _tensor(self, numbers: Sequence) -> torch.Tensor:
        return torch.tensor(numbers, device=self.device)

    def result(self, prompts: list[list[int]], like: torch.Tensor) -> Generated:
        """Returns the answers. like: the tensor of prompts that the caller gave."""
        rows = [prompt + answer for prompt, answer in zip(prompts, self.answers, strict=True)]
        config = self.target.generation_config
        pad = config.pad_token_id if config.pad_token_id is not None else 0
        longest = max(map(len, rows))
        sequences = [row + [pad] * (longest - len(row)) for row in rows]
        tensor = torch.tensor(sequences, dtype=like.dtype, device=like.device)
        return Generated(tensor, max(self.rounds), self.answers, self.rounds)


@torch.no_grad()
def decode(
    draft: Any, target: PreTrainedModel, input_ids: torch.Tensor, mask: Any, settings: Settings
) -> Generated:
    """Decodes all prompts until their answers end."""
    prompts = prompts_of(input_ids, mask)
    decoding = Decoding(draft, target, prompts, settings)
    while live := decoding.live():
        decoding.round(live)
    return decoding.result(prompts, input_ids)


def _keep(past: DynamicCache, index_BS: torch.Tensor, size: int) -> None:
    """Keeps these slots of each row in the target's cache of `size` slots."""
    B, S = index_BS.shape
    if B == 1 and index_BS[0].tolist() == list(range(S)):
        if size > S:
            past.crop(S - size)  # a negative count removes slots at the end
        return
    for layer in past.layers:
        layer.keys, layer.values = (_gathered(x, index_BS) for x in (layer.keys, layer.values))


def _gathered(x_BKSH: torch.Tensor, index_BS: torch.Tensor) -> torch.Tensor:
    """Returns the slots [B, S] of each row, for all heads."""
    index_BKSH = index_BS[:, None, :, None].to(x_BKSH.device)
    return x_BKSH.gather(2, index_BKSH.expand(-1, x_BKSH.shape[1], -1, x_BKSH.shape[3]))


def tree_of(
    levels: int, paths: Sequence[Sequence[int]] | None, dynamic: tuple[int, int, int] | None
) -> Tree | DynamicTree:
    """Returns the tree that a call asks for. Raises ValueError if it asks for two."""
    if paths is not None and dynamic is not None:
        raise ValueError("both paths and dynamic are given; give one tree")
    if dynamic is not None:
        return DynamicTree(*dynamic)
    return Tree([(0,) * depth for depth in range(1, levels + 1)] if paths is None else paths)


def stop_of(target: PreTrainedModel, tokens: int | Sequence[int] | None) -> frozenset[int]:
    """Returns the tokens that end an answer; None: those of the target's generation config."""
    stop = target.generation_config.eos_token_id if tokens is None else tokens
    return frozenset([stop] if isinstance(stop, int) else stop or ())
