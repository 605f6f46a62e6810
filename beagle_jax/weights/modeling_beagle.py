"""A Beagle draft in PyTorch, with greedy speculative decoding.

Needs only torch and transformers. modeling_tree.py stands beside this file.

Beagle ("Cross-Attention Speculative Decoding", arXiv 2505.24544) drafts with one cross-attention
block. The query is the embedding of the token at position i. Keys and values come from states at
positions below i: the target's last hidden states after its final norm (`hidden_states[-1]` of a
Llama), or the draft's own predictions of them. The target's frozen head turns predicted states into
logits. The target's embedding and head are passed in and never stored with the draft.

    draft = AutoModel.from_pretrained(folder, trust_remote_code=True)
    prompt = tokenizer("Why is the sky blue?", return_tensors="pt")
    answer = draft.generate(target, prompt.input_ids, levels=3)
    print(tokenizer.decode(answer.sequences[0]))

Array names end in their axes: B batch, T queries, S keys, D model width, F MLP width, N query
heads, K key/value heads, G query heads per key/value head, H head width, V vocabulary, W tokens
verified per round.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel

from .modeling_tree import Tree

_MASKED_SCORE = -1e30  # finite: a query that sees no key would compute inf - inf


class BeagleConfig(PretrainedConfig):
    """Shape of the block (one layer of the target), and the draft's origin."""

    model_type = "beagle_draft_torch"

    def __init__(
        self,
        hidden_size: int = 64,
        intermediate_size: int = 128,
        num_attention_heads: int = 4,
        num_key_value_heads: int = 4,
        head_dim: int = 16,
        rope_theta: float = 10000.0,
        rms_norm_eps: float = 1e-5,
        initializer_range: float = 0.02,
        vocab_size: int = 64,
        num_hot_tokens: int = 0,
        input_norm: bool = True,
        state_layers: Sequence[int] = (),
        target: str | None = None,
        provenance: dict | None = None,
        **kwargs: Any,
    ) -> None:
        """Stores the shape; other arguments go to PretrainedConfig.

        vocab_size: the target's. num_hot_tokens: number of tokens that the draft scores (0: all).
        input_norm: whether queries are made from normed embeddings. state_layers: layers of the
        target whose inputs keys and values of true states are made from too (`hidden_states[i]`).
        """
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.rope_theta = rope_theta
        self.rms_norm_eps = rms_norm_eps
        self.initializer_range = initializer_range
        self.vocab_size = vocab_size
        self.num_hot_tokens = num_hot_tokens
        self.input_norm = input_norm
        self.state_layers = list(state_layers)
        self.target = target
        self.provenance = provenance
        super().__init__(**kwargs)


class KeysValues(NamedTuple):
    """Rotated keys and values of states."""

    k_BKSH: torch.Tensor
    v_BKSH: torch.Tensor

    def followed_by(self, more: "KeysValues") -> "KeysValues":
        """Returns both concatenated along the positions; neither is changed."""
        return KeysValues(*(torch.cat(pair, dim=2) for pair in zip(self, more, strict=True)))


class Generated(NamedTuple):
    """An answer and the rounds that it took."""

    sequences: torch.Tensor  # [1, prompt and new tokens], with the end token if there is one
    rounds: int  # of draft, verify and accept, without the prefill


class _Norm(nn.Module):
    """Root-mean-square norm, computed in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        x_f32 = x_BTD.float()
        scale = torch.rsqrt(x_f32.square().mean(-1, keepdim=True) + self.eps)
        return (x_f32 * scale).to(x_BTD.dtype) * self.weight


class _Projections(nn.Module):
    """Named linear maps without bias."""

    def __init__(self, **widths: tuple[int, int]) -> None:
        super().__init__()
        for name, (inner, outer) in widths.items():
            setattr(self, name, nn.Linear(inner, outer, bias=False))


class BeagleDraft(PreTrainedModel):
    """The draft block, drafting, and speculative decoding."""

    config_class = BeagleConfig
    # True: a query fuses a token with the state before it, and has that state's position
    fused = False

    def __init__(self, config: BeagleConfig) -> None:
        super().__init__(config)
        D, F = config.hidden_size, config.intermediate_size
        NH, KH = (
            config.num_attention_heads * config.head_dim,
            config.num_key_value_heads * config.head_dim,
        )
        self.self_attn = _Projections(
            q_proj=(D, NH), k_proj=(D, KH), v_proj=(D, KH), o_proj=(NH, D), **self._of_layers(D, KH)
        )
        self.mlp = _Projections(gate_proj=(D, F), up_proj=(D, F), down_proj=(F, D))
        self.input_layernorm = _Norm(D, config.rms_norm_eps) if config.input_norm else nn.Identity()
        self.post_attention_layernorm = _Norm(D, config.rms_norm_eps)
        if config.num_hot_tokens:
            self.register_buffer(
                "hot_tokens", torch.zeros(config.num_hot_tokens, dtype=torch.int32)
            )
        self.post_init()

    def _of_layers(self, D: int, KH: int) -> dict[str, tuple[int, int]]:
        width = D * len(self.config.state_layers)
        return dict(k_layers=(width, KH), v_layers=(width, KH)) if width else {}

    # The block

    def fuse(self, e_BTD: torch.Tensor, h_BTD: torch.Tensor) -> torch.Tensor:
        """Returns the inputs of the queries: the tokens' embeddings."""
        return e_BTD

    def true_rows(
        self, h_BSI: torch.Tensor, next_BSD: torch.Tensor, positions_S: torch.Tensor
    ) -> KeysValues:
        """Returns the keys and values of true states that decoding caches.

        h_BSI: the inputs of `config.state_layers` side by side, then the states. next_BSD:
        embeddings of the tokens after these states.
        """
        D = self.config.hidden_size
        rows = self.keys_values(h_BSI[..., -D:], positions_S)
        if not self.config.state_layers:
            return rows
        x_BSI = self._beside(h_BSI)
        k_BKSH = self._rotated(self.self_attn.k_layers(x_BSI), positions_S)
        return KeysValues(
            rows.k_BKSH + k_BKSH, rows.v_BKSH + self._heads(self.self_attn.v_layers(x_BSI))
        )

    def _beside(self, h_BSI: torch.Tensor) -> torch.Tensor:
        """Returns the streams, each with the root mean square of its position's state."""
        D = self.config.hidden_size
        x_BSnD = h_BSI[..., :-D].float().unflatten(-1, (-1, D))
        size_BS11 = h_BSI[..., -D:].float().square().mean(-1).sqrt()[..., None, None]
        normed_BSnD = x_BSnD * torch.rsqrt(x_BSnD.square().mean(-1, keepdim=True) + 1e-6)
        return (normed_BSnD * size_BS11).to(h_BSI.dtype).flatten(-2)

    def queries(self, e_BTD: torch.Tensor, positions_T: torch.Tensor) -> torch.Tensor:
        """Returns rotated queries [B, N, T, H] of token embeddings at their positions."""
        return self._rotated(self.self_attn.q_proj(self.input_layernorm(e_BTD)), positions_T)

    def keys_values(self, h_BSD: torch.Tensor, positions_S: torch.Tensor) -> KeysValues:
        """Returns keys and values of true or predicted states at their positions."""
        k_BKSH = self._rotated(self.self_attn.k_proj(h_BSD), positions_S)
        return KeysValues(k_BKSH, self._heads(self.self_attn.v_proj(h_BSD)))

    def predict(
        self, e_BTD: torch.Tensor, q_BNTH: torch.Tensor, memory: KeysValues, mask: torch.Tensor
    ) -> torch.Tensor:
        """Returns predicted states [B, T, D].

        mask: True where a query sees a key, broadcastable to [B, 1, 1, T, S].
        """
        B, N, T, H = q_BNTH.shape
        k_BKSH, v_BKSH = memory
        q_BKGTH = q_BNTH.reshape(B, k_BKSH.shape[1], -1, T, H) * H**-0.5
        score_BKGTS = (q_BKGTH @ k_BKSH[:, :, None].transpose(-1, -2)).float()
        # Multiplying by the mask gives zeros to a query that sees no key.
        weight_BKGTS = score_BKGTS.masked_fill(~mask, _MASKED_SCORE).softmax(-1) * mask
        seen_BKGTH = weight_BKGTS.to(v_BKSH.dtype) @ v_BKSH[:, :, None]
        y_BTD = e_BTD + self.self_attn.o_proj(
            seen_BKGTH.reshape(B, N, T, H).transpose(1, 2).reshape(B, T, N * H)
        )
        z_BTD = self.post_attention_layernorm(y_BTD)
        return y_BTD + self.mlp.down_proj(
            functional.silu(self.mlp.gate_proj(z_BTD)) * self.mlp.up_proj(z_BTD)
        )

    def forward(
        self, e_BTD: torch.Tensor, h_BSI: torch.Tensor, mask_BTS: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Predicts states [B, T, D] at positions 0..T-1 from true states at 0..S-1.

        h_BSI: as in `true_rows`. mask_BTS: True where a query sees a state; None: the states before
        its position.
        """
        positions_T = torch.arange(e_BTD.shape[1], device=e_BTD.device)
        positions_S = torch.arange(h_BSI.shape[1], device=e_BTD.device)
        if mask_BTS is None:
            mask_BTS = (positions_S[None] < positions_T[:, None])[None]
        memory = self.true_rows(h_BSI, e_BTD, positions_S)
        return self.predict(
            e_BTD, self.queries(e_BTD, positions_T), memory, mask_BTS[:, None, None]
        )

    def head_rows(self, head_VD: torch.Tensor) -> torch.Tensor:
        """Returns the rows of the target's head for the tokens that the draft scores."""
        return head_VD[self.hot_tokens.long()] if self.config.num_hot_tokens else head_VD

    def _heads(self, x_BTF: torch.Tensor) -> torch.Tensor:
        return x_BTF.unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)

    def _rotated(self, x_BTF: torch.Tensor, positions_T: torch.Tensor) -> torch.Tensor:
        """Splits into heads and rotates half-split pairs by position."""
        x_BNTH = self._heads(x_BTF)
        H = self.config.head_dim
        even_H = torch.arange(0, H, 2, dtype=torch.float32, device=x_BTF.device)
        # float32 angles: bfloat16 would round position 257 to 256.
        angle_TH = positions_T[:, None].float() * self.frequencies(
            1.0 / self.config.rope_theta ** (even_H / H)
        )
        angle_TH = torch.cat([angle_TH, angle_TH], dim=-1)
        first, second = x_BNTH.chunk(2, dim=-1)
        return (x_BNTH * angle_TH.cos() + torch.cat([-second, first], dim=-1) * angle_TH.sin()).to(
            x_BTF.dtype
        )

    def frequencies(self, plain_H: torch.Tensor) -> torch.Tensor:
        """Scales rotary frequencies; plain_H are those without scaling."""
        return plain_H

    # Drafting and decoding

    @torch.no_grad()
    def draft(
        self,
        tree: Tree,
        root: int,
        true: KeysValues,
        embed: nn.Module,
        rows_VD: torch.Tensor,
        last_BTD: torch.Tensor | None = None,
    ) -> list[int]:
        """Drafts the tokens of a tree whose root follows the true states.

        rows_VD: the result of `head_rows`. last_BTD: the last true state [1, 1, D], for a block
        that fuses the root with it. Predicted states become keys for the deeper levels; those of
        the last level are not needed.
        """
        tokens, query_nodes, memory = [root] + [-1] * (tree.size - 1), [], true
        first = true.k_BKSH.shape[2]
        device, states = true.k_BKSH.device, {}
        for depth, nodes in enumerate(tree.levels):
            e_BTD = embed(torch.tensor([[tokens[node] for node in nodes]], device=device)).to(
                self.dtype
            )
            x_BTD = self.fuse(
                e_BTD,
                torch.stack([states[tree.parent[node]] for node in nodes], dim=1)
                if depth
                else last_BTD,
            )
            positions_T = torch.full((len(nodes),), first + depth - int(self.fused), device=device)
            if (
                self.fused and depth
            ):  # each query sees its own key, and the root's is among the true keys
                memory, query_nodes = (
                    memory.followed_by(self.keys_values(x_BTD, positions_T)),
                    query_nodes + nodes,
                )
            above = [
                [other == node or other in tree.ancestors[node] for other in query_nodes]
                for node in nodes
            ]
            above_TQ = torch.tensor(above, dtype=torch.bool, device=device).reshape(
                len(nodes), len(query_nodes)
            )
            sees_TS = torch.cat([above_TQ.new_ones(len(nodes), first), above_TQ], dim=1)
            state_BTD = self.predict(x_BTD, self.queries(x_BTD, positions_T), memory, sees_TS)
            states |= dict(zip(nodes, state_BTD.unbind(1), strict=True))
            ranks = 1 + max(tree.rank[child] for node in nodes for child in tree.children[node])
            best_Tk = self.best_tokens(state_BTD[0], rows_VD, ranks)
            for node, best in zip(nodes, best_Tk.tolist(), strict=True):
                for child in tree.children[node]:
                    tokens[child] = best[tree.rank[child]]
            if not self.fused and depth + 1 < len(tree.levels):
                memory, query_nodes = (
                    memory.followed_by(self.keys_values(state_BTD, positions_T)),
                    query_nodes + nodes,
                )
        return tokens

    def best_tokens(
        self, state_TD: torch.Tensor, rows_VD: torch.Tensor, count: int
    ) -> torch.Tensor:
        """Returns [T, count] token ids of the target's vocabulary, most probable first."""
        logits_TV = functional.linear(state_TD.to(rows_VD.dtype), rows_VD)
        best_Tk = logits_TV.topk(count, dim=-1).indices
        return self.hot_tokens[best_Tk] if self.config.num_hot_tokens else best_Tk

    @torch.no_grad()
    def generate(
        self,
        target: PreTrainedModel,
        input_ids: torch.Tensor,
        max_new_tokens: int = 128,
        levels: int = 3,
        paths: Sequence[Sequence[int]] | None = None,
        eos_token_ids: int | Sequence[int] | None = None,
    ) -> Generated:
        """Decodes one prompt [1, L] greedily: the target's own text, in fewer passes.

        levels: length of the chain drafted per round. paths: a static tree instead (see `Tree`);
        its mask needs a target with eager or sdpa attention. eos_token_ids: tokens that end the
        answer; None: those of the target's generation config. Raises ValueError if the arguments do
        not fit together.
        """
        tree = Tree([(0,) * depth for depth in range(1, levels + 1)] if paths is None else paths)
        stop = target.generation_config.eos_token_id if eos_token_ids is None else eos_token_ids
        stop = {stop} if isinstance(stop, int) else set(stop or ())
        limit = min(max_new_tokens, target.config.max_position_embeddings - input_ids.shape[-1])
        rows_VD = self.head_rows(target.get_output_embeddings().weight)
        self._check(target, input_ids, tree, limit, len(rows_VD))
        past = (
            DynamicCache()
        )  # without the config, layers with a window keep all slots, so drafts can be dropped
        embed = target.get_input_embeddings()
        layers = self.config.state_layers
        h_BTI, [root] = _read(target, input_ids, past, layers, last_only=True)
        true = self._rows(h_BTI, [*input_ids[0, 1:].tolist(), root], embed)
        answer, rounds = [root], 0
        while len(answer) < limit and answer[-1] not in stop:
            tokens = self.draft(
                tree, answer[-1], true, embed, rows_VD, h_BTI[:, -1:].to(self.dtype)
            )
            h_BWI, best = _verified(target, tree, tokens, past, layers)
            path = tree.accepted(tokens, best)
            first = true.k_BKSH.shape[2]
            _keep(past, first, path, tree.size)
            h_BTI, new = h_BWI[:, path], [tokens[node] for node in path[1:]] + [best[path[-1]]]
            true = true.followed_by(self._rows(h_BTI, new, embed, first))
            end = next((place + 1 for place, token in enumerate(new) if token in stop), len(new))
            answer, rounds = answer + new[:end], rounds + 1
        answer_BT = torch.tensor([answer[:limit]], dtype=input_ids.dtype, device=input_ids.device)
        return Generated(torch.cat([input_ids, answer_BT], dim=1), rounds)

    def _rows(
        self, h_BTI: torch.Tensor, after: list[int], embed: nn.Module, first: int = 0
    ) -> KeysValues:
        """Returns keys and values of true states from a position on.

        after: the tokens that follow these states.
        """
        next_BTD = embed(torch.tensor([after], device=h_BTI.device)).to(self.dtype)
        return self.true_rows(
            h_BTI.to(self.dtype),
            next_BTD,
            torch.arange(first, first + len(after), device=h_BTI.device),
        )

    def _check(
        self, target: PreTrainedModel, input_ids: torch.Tensor, tree: Tree, limit: int, scored: int
    ) -> None:
        for key in ("hidden_size", "vocab_size"):
            ours, theirs = getattr(self.config, key), getattr(target.config, key)
            if ours != theirs:
                raise ValueError(
                    f"this draft belongs to another target ({key} {ours}, the target's is {theirs})"
                )
        if input_ids.ndim != 2 or input_ids.shape[0] != 1 or not input_ids.shape[1]:
            raise ValueError(
                f"input_ids has shape {list(input_ids.shape)}; expected one prompt that is not "
                "empty, [1, length]"
            )
        if limit < 1:
            raise ValueError(
                "no token can be generated: max_new_tokens is below 1, or the prompt fills the "
                "target's context"
            )
        if tree.size < 2:
            raise ValueError(
                "the tree has no nodes below its root; give levels of at least 1, or paths"
            )
        if max(tree.rank) >= scored:
            raise ValueError(
                f"the tree asks for rank {max(tree.rank)}, but the draft scores only {scored} "
                "tokens"
            )
        if not tree.is_chain and getattr(target.config, "sliding_window", None):
            raise ValueError(
                "this target's attention has a window, which the mask of a tree does not; "
                "draft a chain (levels)"
            )


def _read(
    target: PreTrainedModel,
    tokens_BT: torch.Tensor,
    past: DynamicCache,
    layers: Sequence[int] = (),
    last_only: bool = False,
    **options: Any,
) -> tuple[torch.Tensor, list[int]]:
    """Appends tokens to the target's cache.

    Returns the inputs of these layers and their states, side by side [1, T, I], and the target's
    choice after each token.
    """
    options |= dict(use_cache=True, output_hidden_states=bool(layers))
    out = target.base_model(input_ids=tokens_BT, past_key_values=past, **options)
    h_BTD = out.last_hidden_state
    logits_TV = target.get_output_embeddings()(h_BTD[0, -1:] if last_only else h_BTD[0])
    streams = [out.hidden_states[layer] for layer in layers]
    return torch.cat([*streams, h_BTD], dim=-1), logits_TV.argmax(-1).tolist()


def _verified(
    target: PreTrainedModel,
    tree: Tree,
    tokens: list[int],
    past: DynamicCache,
    layers: Sequence[int],
) -> tuple[torch.Tensor, list[int]]:
    """Runs all nodes through the target in one pass.

    Each node sees the cache, its ancestors and itself.
    """
    device = target.get_output_embeddings().weight.device
    tokens_BW = torch.tensor([tokens], device=device)
    if tree.is_chain:
        return _read(target, tokens_BW, past, layers)
    first, W = past.get_seq_length(), tree.size
    above = [
        [other == node or other in tree.ancestors[node] for other in range(W)] for node in range(W)
    ]
    sees_WS = torch.cat([torch.ones(W, first, dtype=torch.bool), torch.tensor(above)], dim=1).to(
        device
    )
    mask_WS = torch.zeros(W, first + W, dtype=target.dtype, device=device)
    mask_WS.masked_fill_(~sees_WS, torch.finfo(target.dtype).min)
    positions_BW = first + torch.tensor([tree.depth], device=device)
    at = dict(attention_mask=mask_WS[None, None], position_ids=positions_BW)
    return _read(target, tokens_BW, past, layers, **at)


def _keep(past: DynamicCache, first: int, path: list[int], size: int) -> None:
    """Drops rejected nodes from the target's cache."""
    if path == list(range(len(path))):
        if len(path) < size:
            past.crop(len(path) - size)  # a negative count removes slots at the end
        return
    slots = list(range(first)) + [first + node for node in path]
    for layer in past.layers:
        index_S = torch.tensor(slots, device=layer.keys.device)
        layer.keys, layer.values = (
            layer.keys.index_select(2, index_S),
            layer.values.index_select(2, index_S),
        )
