"""A Beagle draft as a model that vLLM's EAGLE proposer runs.

The proposer hands over entries: entry j has the token at position j + 1, position j, and the
target's state h_j after its final norm. In later draft steps the state is the draft's own
prediction. This is Beagle's recurrence (arXiv 2505.24544): keys and values of entry j are made from
h_j at rotary position j, the query from the embedding of the token at position j + 1, at which the
residual begins too. The query sees entries 0 to j, and the output predicts h_{j+1}. Embedding and
head are the target's own, which vLLM shares with the draft. So all tokens are scored.

Array names end in their axes: T entries of all requests, D model width, F MLP width, N query heads,
K key/value heads, H head width, V vocabulary.
"""

from collections.abc import Iterable

import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.weight_utils import default_weight_loader

# Name in the file -> parameter, and its part of a joined matrix.
_PLACES: dict[str, tuple[str, int | None]] = {
    "self_attn.q_proj.weight": ("self_attn.q_proj.weight", None),
    "self_attn.k_proj.weight": ("self_attn.kv_proj.weight", 0),
    "self_attn.v_proj.weight": ("self_attn.kv_proj.weight", 1),
    "self_attn.o_proj.weight": ("self_attn.o_proj.weight", None),
    "mlp.gate_proj.weight": ("mlp.gate_up_proj.weight", 0),
    "mlp.up_proj.weight": ("mlp.gate_up_proj.weight", 1),
    "mlp.down_proj.weight": ("mlp.down_proj.weight", None),
    "input_layernorm.weight": ("input_layernorm.weight", None),
    "post_attention_layernorm.weight": ("post_attention_layernorm.weight", None),
}


class CrossAttention(nn.Module):
    """Queries from embeddings; keys and values from states, in vLLM's paged cache."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config = vllm_config.speculative_config.draft_model_config.hf_config
        D, N, H = config.hidden_size, config.num_attention_heads, config.head_dim
        size = get_tensor_model_parallel_world_size()
        # With more devices than key/value heads, each head is held several times.
        self.copies = max(1, size // config.num_key_value_heads)
        K = config.num_key_value_heads * self.copies
        if N % size or K % size:
            raise ValueError(
                f"a draft of {N} heads and {config.num_key_value_heads} key/value heads cannot be "
                f"split over {size} devices; set tensor_parallel_size to a number that divides both"
            )
        self.head_dim, self.kv_width = H, K // size * H
        self.q_proj = ColumnParallelLinear(D, N * H, bias=False, prefix=f"{prefix}.q_proj")
        self.kv_proj = MergedColumnParallelLinear(
            D, [K * H, K * H], bias=False, prefix=f"{prefix}.kv_proj"
        )
        self.o_proj = RowParallelLinear(N * H, D, bias=False, prefix=f"{prefix}.o_proj")
        # The query of the last position is rotated by one more.
        last = max(config.max_position_embeddings, vllm_config.model_config.max_model_len)
        theta = config.rope_parameters["rope_theta"]
        self.rotary_emb = get_rope(
            H,
            max_position=last + 1,
            is_neox_style=True,
            rope_parameters={"rope_type": "default", "rope_theta": theta},
        )
        self.attn = Attention(
            N // size,
            H,
            H**-0.5,
            num_kv_heads=K // size,
            cache_config=vllm_config.cache_config,
            prefix=f"{prefix}.attn",
        )

    def forward(
        self, positions_T: torch.Tensor, u_TD: torch.Tensor, h_TD: torch.Tensor
    ) -> torch.Tensor:
        """Returns what the queries of the normed embeddings u read of the states h [T, D]."""
        q_TF, _ = self.q_proj(u_TD)
        kv_TF, _ = self.kv_proj(h_TD)
        k_TF, v_TF = kv_TF.split([self.kv_width, self.kv_width], dim=-1)
        q_TF, _ = self.rotary_emb(positions_T + 1, q_TF, None)
        k_TF, _ = self.rotary_emb(positions_T, k_TF, None)
        seen_TF = self.attn(q_TF, k_TF, v_TF)
        out_TD, _ = self.o_proj(seen_TF)
        return out_TD


class GatedMLP(nn.Module):
    """The MLP of a Llama layer."""

    def __init__(self, D: int, F: int, prefix: str) -> None:
        super().__init__()
        self.gate_up_proj = MergedColumnParallelLinear(
            D, [F, F], bias=False, prefix=f"{prefix}.gate_up_proj"
        )
        self.down_proj = RowParallelLinear(F, D, bias=False, prefix=f"{prefix}.down_proj")
        self.act_fn = SiluAndMul()

    def forward(self, z_TD: torch.Tensor) -> torch.Tensor:
        """Returns the output [T, D]."""
        joined_TF, _ = self.gate_up_proj(z_TD)
        out_TD, _ = self.down_proj(self.act_fn(joined_TF))
        return out_TD


@support_torch_compile
class BeagleBlock(nn.Module):
    """The embedding, which vLLM replaces by the target's, and the draft's one layer."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.speculative_config.draft_model_config.hf_config
        D, eps = config.hidden_size, config.rms_norm_eps
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size, D, prefix=f"{prefix}.embed_tokens"
        )
        # vLLM numbers the layers of target and draft together.
        layers = vllm_config.model_config.get_num_layers(vllm_config.parallel_config)
        name = f"{prefix}.layers.{layers}"
        self.self_attn = CrossAttention(vllm_config, f"{name}.self_attn")
        self.mlp = GatedMLP(D, config.intermediate_size, f"{name}.mlp")
        self.input_layernorm = RMSNorm(D, eps) if config.input_norm else None
        self.post_attention_layernorm = RMSNorm(D, eps)
        self.embed_scale = config.embed_scale

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, hidden_states: torch.Tensor
    ) -> torch.Tensor:
        """Predicts the states [T, D] after the tokens of these entries.

        input_ids: the tokens [T]. positions: of the states before them [T]. hidden_states: these
        states [T, D].
        """
        e_TD = self.embed_tokens(input_ids)
        if self.embed_scale != 1.0:
            e_TD = e_TD * self.embed_scale
        u_TD = e_TD if self.input_layernorm is None else self.input_layernorm(e_TD)
        y_TD = e_TD + self.self_attn(positions, u_TD, hidden_states)
        return y_TD + self.mlp(self.post_attention_layernorm(y_TD))


class BeagleForCausalLM(nn.Module):
    """The draft as vLLM knows it: states in, states and logits out."""

    # The proposer then shares the target's.
    has_own_lm_head = False
    has_own_embed_tokens = False

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        if vllm_config.parallel_config.pipeline_parallel_size > 1:
            raise ValueError(
                "a Beagle draft reads the target's embedding, which vLLM does not share under "
                "pipeline parallelism; set pipeline_parallel_size to 1"
            )
        self.config = vllm_config.speculative_config.draft_model_config.hf_config
        self.model = BeagleBlock(
            vllm_config=vllm_config, prefix=f"{prefix}.model" if prefix else "model"
        )
        self.logits_processor = LogitsProcessor(self.config.vocab_size)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Returns the embeddings [T, D] of tokens."""
        return self.model.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        inputs_embeds: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the predicted states twice: for the head, and for the next draft step."""
        if inputs_embeds is not None:
            raise NotImplementedError("a Beagle draft reads tokens, not embeddings of other inputs")
        state_TD = self.model(input_ids, positions, hidden_states)
        return state_TD, state_TD

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Returns the logits [T, V] by the target's head."""
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Loads the draft's tensors; each rank takes its part.

        Raises ValueError if a tensor is missing or unknown.
        """
        params = dict(self.model.named_parameters())
        places = {name: place for name, place in _PLACES.items() if place[0] in params}
        loaded = set()
        for name, weight in weights:
            if name not in places:
                raise ValueError(f"a Beagle draft has no tensor {name}")
            param, part = params[places[name][0]], places[name][1]
            if "kv_proj" in places[name][0]:
                heads = weight.unflatten(0, (-1, self.model.self_attn.head_dim))
                weight = heads.repeat_interleave(self.model.self_attn.copies, 0).flatten(0, 1)
            load = getattr(param, "weight_loader", default_weight_loader)
            load(param, weight) if part is None else load(param, weight, part)
            loaded.add(name)
        if missing := sorted(places.keys() - loaded):
            raise ValueError(f"the files of the Beagle draft lack {', '.join(missing)}")
