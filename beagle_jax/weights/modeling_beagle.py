"""A Beagle draft in PyTorch, with speculative decoding.

Needs only torch and transformers. modeling_decoding.py, modeling_sampling.py and modeling_tree.py
stand beside this file.

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
heads, K key/value heads, G query heads per key/value head, H head width, V vocabulary, Q queries of
a round that are keys too.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional
from transformers import PretrainedConfig, PreTrainedModel

from .modeling_decoding import Generated, Settings, decode, stop_of, tree_of
from .modeling_sampling import Sampling
from .modeling_tree import DynamicTree, Growth, Nodes, Tree

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
        """Splits into heads and rotates half-split pairs by position, [T] or [B, T]."""
        x_BNTH = self._heads(x_BTF)
        H = self.config.head_dim
        even_H = torch.arange(0, H, 2, dtype=torch.float32, device=x_BTF.device)
        # float32 angles: bfloat16 would round position 257 to 256.
        angle_TH = positions_T[..., None].float() * self.frequencies(
            1.0 / self.config.rope_theta ** (even_H / H)
        )
        angle_TH = torch.cat([angle_TH, angle_TH], dim=-1).unsqueeze(-3)  # the same for all heads
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
        tree: Tree | DynamicTree,
        root_B: torch.Tensor,
        true: KeysValues,
        length_B: torch.Tensor,
        embed: nn.Module,
        rows_VD: torch.Tensor,
        last_B1D: torch.Tensor | None = None,
    ) -> Nodes:
        """Drafts a tree below each row's root, which follows its `length_B` true states.

        rows_VD: the result of `head_rows`. last_B1D: the last true state of each row, for a block
        that fuses the root with it. Predicted states become keys for the deeper levels; those of
        the last level are not needed.
        """
        growth, memory, before_BTD = Growth(root_B), true, last_B1D
        S = true.k_BKSH.shape[2]
        text_B1S = torch.arange(S, device=root_B.device) < length_B[:, None, None]
        sees_BTQ = text_B1S[..., :0]  # the strict ancestors among the queries that are keys
        for depth in range(tree.depth):
            B, T = growth.token_BT.shape
            x_BTD = self.fuse(embed(growth.token_BT).to(self.dtype), before_BTD)
            at_BT = (length_B[:, None] + depth - int(self.fused)).expand(B, T)
            itself_BTT = torch.eye(T, dtype=torch.bool, device=root_B.device).expand(B, T, T)
            if self.fused and depth:
                # Each query sees its own key, and the root's is among the true keys.
                memory = memory.followed_by(self.keys_values(x_BTD, at_BT))
                sees_BTQ = torch.cat([sees_BTQ, itself_BTT], dim=-1)
            sees_BTS = torch.cat([text_B1S.expand(-1, T, -1), sees_BTQ], dim=-1)
            queries = self.queries(x_BTD, at_BT)
            state_BTD = self.predict(x_BTD, queries, memory, sees_BTS[:, None, None])
            growth.add(depth, *self.best_children(tree, depth, growth.score_BT, state_BTD, rows_VD))
            if depth + 1 == tree.depth:
                break
            if not self.fused:
                memory = memory.followed_by(self.keys_values(state_BTD, at_BT))
                sees_BTQ = torch.cat([sees_BTQ, itself_BTT], dim=-1)
            parent_BT1 = growth.go_on(tree.continued(depth, growth.last_scores))[..., None]
            sees_BTQ = sees_BTQ.gather(1, parent_BT1.expand(-1, -1, sees_BTQ.shape[-1]))
            before_BTD = state_BTD.gather(1, parent_BT1.expand(-1, -1, state_BTD.shape[-1]))
        return growth.nodes(tree)

    def best_children(
        self,
        tree: Tree | DynamicTree,
        level: int,
        score_BT: torch.Tensor,
        state_BTD: torch.Tensor,
        rows_VD: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the most probable children of each query: tokens and scores [B, T * k].

        Scores are sums of log-probabilities from the root on, or zero in trees that need none.
        """
        logits_BTV = functional.linear(state_BTD.to(rows_VD.dtype), rows_VD).float()
        best_BTk, index_BTk = logits_BTV.topk(tree.children(level), dim=-1)
        score_BTk = torch.zeros_like(best_BTk)
        if tree.scored:
            total_BT1 = logits_BTV.logsumexp(-1, keepdim=True)
            score_BTk = score_BT[..., None] + (best_BTk - total_BT1).clamp(max=0.0)
        tokens = self.hot_tokens.long()[index_BTk] if self.config.num_hot_tokens else index_BTk
        return tokens.flatten(1), score_BTk.flatten(1)

    def generate(
        self,
        target: PreTrainedModel,
        input_ids: torch.Tensor,
        max_new_tokens: int = 128,
        levels: int = 3,
        paths: Sequence[Sequence[int]] | None = None,
        eos_token_ids: int | Sequence[int] | None = None,
        *,
        attention_mask: torch.Tensor | None = None,
        dynamic: tuple[int, int, int] | None = None,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int = 0,
    ) -> Generated:
        """Decodes prompts [B, L]: the target's own text, in fewer passes.

        levels: length of the chain drafted per round. paths: a static tree instead (see `Tree`).
        dynamic: levels, topk and nodes of EAGLE-2's tree instead (see `DynamicTree`). The masks of
        trees and batches need a target with eager or sdpa attention. eos_token_ids: tokens that end
        an answer; None: those of the target's generation config. attention_mask: 0 where a prompt
        is padded, on either side. temperature: 0 takes the most likely tokens; otherwise row n
        draws with seed + n, after the filters top_k, top_p and min_p (see `Sampling`). Raises
        ValueError if the arguments do not fit together.
        """
        settings = Settings(
            tree_of(levels, paths, dynamic),
            Sampling(temperature, top_k, top_p, min_p),
            seed,
            stop_of(target, eos_token_ids),
            max_new_tokens,
        )
        return decode(self, target, input_ids, attention_mask, settings)
