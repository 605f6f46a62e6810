"""Stand-ins in plain torch for the parts of vLLM that the plugin uses, and for its EAGLE proposer.

Layers take the same arguments and are split over ranks in the same way. A rank is a thread. One
request alone is computed: slots of its cache are its positions.
"""

import sys
import threading
from collections.abc import Callable
from importlib.resources import files
from types import ModuleType, SimpleNamespace

import torch
from torch import nn
from torch.nn import functional

SOURCE = files("beagle_jax.weights") / "vllm_plugin" / "beagle_vllm" / "draft.py"


class World(threading.local):
    """What a rank knows: its number, and how it adds its part to those of the others."""

    size, rank = 1, 0
    positions_T: torch.Tensor | None = None  # of this forward pass: what vLLM's context holds

    def added(self, part: torch.Tensor) -> torch.Tensor:
        if self.size == 1:
            return part
        self.parts[self.rank] = part
        self.barrier.wait()
        total = sum(self.parts)
        self.barrier.wait()
        return total


world = World()


def on_ranks(size: int, work: Callable[[], object]) -> list[object]:
    """Returns what `work` returns on each of `size` ranks."""
    results, parts, barrier = [None] * size, [None] * size, threading.Barrier(size, timeout=20)

    def run(rank: int) -> None:
        world.size, world.rank, world.parts, world.barrier = size, rank, parts, barrier
        try:
            results[rank] = work()
        except BaseException as error:
            results[rank] = error
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException) and not isinstance(
            result, threading.BrokenBarrierError
        ):
            raise result
    return results


class _Linear(nn.Module):
    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((outer, inner), torch.nan), requires_grad=False)
        self.weight.weight_loader = self.load

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return functional.linear(x, self.weight), None


class MergedColumnParallelLinear(_Linear):
    def __init__(self, input_size, output_sizes, bias=True, prefix=""):
        assert not bias and all(size % world.size == 0 for size in output_sizes)
        self.sizes = [size // world.size for size in output_sizes]
        super().__init__(input_size, sum(self.sizes))

    def load(self, param, weight, part):
        first = sum(self.sizes[:part])
        param[first : first + self.sizes[part]].copy_(weight.chunk(world.size)[world.rank])


class ColumnParallelLinear(MergedColumnParallelLinear):
    def __init__(self, input_size, output_size, bias=True, prefix=""):
        super().__init__(input_size, [output_size], bias, prefix)

    def load(self, param, weight):
        super().load(param, weight, 0)


class RowParallelLinear(_Linear):
    def __init__(self, input_size, output_size, bias=True, prefix=""):
        assert not bias and input_size % world.size == 0
        super().__init__(input_size // world.size, output_size)

    def load(self, param, weight):
        param.copy_(weight.chunk(world.size, dim=1)[world.rank])

    def forward(self, x):
        return world.added(super().forward(x)[0]), None


class RMSNorm(nn.Module):
    def __init__(self, hidden_size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(hidden_size), requires_grad=False), eps

    def forward(self, x):
        return functional.rms_norm(x, x.shape[-1:], self.weight, self.eps)


class SiluAndMul(nn.Module):
    def forward(self, x):
        gate, up = x.chunk(2, dim=-1)
        return functional.silu(gate) * up


class VocabParallelEmbedding(nn.Embedding):
    def __init__(self, num_embeddings, embedding_dim, prefix=""):
        super().__init__(num_embeddings, embedding_dim)


class Rotary:
    """Rotates half-split pairs; knows positions below `max_position` only, as vLLM's table does."""

    def __init__(self, head_size, max_position, is_neox_style, rope_parameters):
        assert is_neox_style and rope_parameters["rope_type"] == "default"
        even_H = torch.arange(0, head_size, 2, dtype=torch.float32) / head_size
        angle_SH = torch.arange(max_position)[:, None] / rope_parameters["rope_theta"] ** even_H
        self.table_SH = torch.cat([angle_SH, angle_SH], dim=-1)

    def __call__(self, positions_T, q_TF, k_TF):
        assert k_TF is None
        angle_T1H = self.table_SH[positions_T][:, None]
        x_TNH = q_TF.unflatten(-1, (-1, angle_T1H.shape[-1]))
        first, second = x_TNH.chunk(2, dim=-1)
        turned_TNH = torch.cat([-second, first], dim=-1)
        return (x_TNH * angle_T1H.cos() + turned_TNH * angle_T1H.sin()).flatten(1), None


class Attention(nn.Module):
    """Writes keys and values at their positions; a query sees those up to its own."""

    def __init__(self, num_heads, head_size, scale, num_kv_heads, cache_config, prefix):
        super().__init__()
        self.prefix, self.heads, self.scale = prefix, num_kv_heads, scale
        self.k_SKH = self.v_SKH = torch.zeros(cache_config.slots, num_kv_heads, head_size)

    def forward(self, q_TF, k_TF, v_TF):
        at_T, H = world.positions_T, self.k_SKH.shape[-1]
        self.k_SKH = self.k_SKH.index_copy(0, at_T, k_TF.unflatten(-1, (-1, H)))
        self.v_SKH = self.v_SKH.index_copy(0, at_T, v_TF.unflatten(-1, (-1, H)))
        q_TKGH = q_TF.unflatten(-1, (self.heads, -1, H))
        score_KGTS = torch.einsum("TKGH,SKH->KGTS", q_TKGH, self.k_SKH) * self.scale
        sees_TS = torch.arange(len(self.k_SKH)) <= at_T[:, None]
        weight_KGTS = score_KGTS.masked_fill(~sees_TS, -torch.inf).softmax(-1)
        return torch.einsum("KGTS,SKH->TKGH", weight_KGTS, self.v_SKH).flatten(1)


class LogitsProcessor(nn.Module):
    def __init__(self, vocab_size):
        super().__init__()

    def forward(self, lm_head, h_TD):
        return functional.linear(h_TD, lm_head.weight)


def _load(param, weight):
    assert param.shape == weight.shape
    param.copy_(weight)


_LAYERS = "vllm.model_executor.layers"
_PARTS = {
    "vllm.compilation.decorators": {"support_torch_compile": lambda made: made},
    "vllm.config": {"VllmConfig": SimpleNamespace},
    "vllm.distributed": {"get_tensor_model_parallel_world_size": lambda: world.size},
    f"{_LAYERS}.activation": {"SiluAndMul": SiluAndMul},
    f"{_LAYERS}.attention": {"Attention": Attention},
    f"{_LAYERS}.layernorm": {"RMSNorm": RMSNorm},
    f"{_LAYERS}.linear": {
        "ColumnParallelLinear": ColumnParallelLinear,
        "MergedColumnParallelLinear": MergedColumnParallelLinear,
        "RowParallelLinear": RowParallelLinear,
    },
    f"{_LAYERS}.logits_processor": {"LogitsProcessor": LogitsProcessor},
    f"{_LAYERS}.rotary_embedding": {"get_rope": Rotary},
    f"{_LAYERS}.vocab_parallel_embedding": {"VocabParallelEmbedding": VocabParallelEmbedding},
    "vllm.model_executor.model_loader.weight_utils": {"default_weight_loader": _load},
}


def plugin(monkeypatch, *bug: str) -> ModuleType:
    """Returns the plugin's module over the stand-ins; bug: text of its source, and what replaces
    it."""
    for name, parts in _PARTS.items():
        above = name.split(".")
        for depth in range(1, len(above) + 1):
            path = ".".join(above[:depth])
            if path not in sys.modules:
                monkeypatch.setitem(sys.modules, path, ModuleType(path))
        monkeypatch.setitem(sys.modules, name, module := ModuleType(name))
        vars(module).update(parts)
    text = SOURCE.read_text(encoding="utf-8")
    if bug:
        assert text.count(bug[0]) == 1, bug
        text = text.replace(*bug)
    module = ModuleType("beagle_vllm.draft")
    exec(compile(text, str(SOURCE), "exec"), vars(module))
    return module


class Proposer:
    """vLLM's EAGLE proposer for one request, on this rank."""

    def __init__(self, module: ModuleType, config, weights, embed_VD, head_VD, context=64) -> None:
        """config: what transformers reads of config.json. context: the target's max_model_len."""
        self.model = module.BeagleForCausalLM(
            vllm_config=SimpleNamespace(
                speculative_config=SimpleNamespace(
                    draft_model_config=SimpleNamespace(hf_config=config)
                ),
                parallel_config=SimpleNamespace(pipeline_parallel_size=1),
                model_config=SimpleNamespace(
                    max_model_len=context, get_num_layers=lambda parallel_config: 7
                ),
                cache_config=SimpleNamespace(slots=context),
            )
        )
        with torch.no_grad():
            self.model.load_weights(weights)
        assert not self.model.has_own_embed_tokens and not self.model.has_own_lm_head
        self.model.model.embed_tokens = nn.Embedding.from_pretrained(embed_VD)
        self.model.lm_head = nn.Embedding.from_pretrained(head_VD)

    def run(self, tokens: list[int], states_TD: torch.Tensor, first: int) -> torch.Tensor:
        """Returns the states predicted by entries from position `first` on.

        tokens: those after the states.
        """
        world.positions_T = torch.arange(first, first + len(tokens))
        with torch.no_grad():
            state_TD, again_TD = self.model(torch.tensor(tokens), world.positions_T, states_TD)
        assert state_TD is again_TD
        return state_TD

    def propose(
        self, tokens: list[int], states_TD: torch.Tensor, first: int, steps: int
    ) -> list[int]:
        """Returns drafted tokens: appends true entries, then entries of its own predictions."""
        state_TD, drafted = self.run(tokens, states_TD, first), []
        for step in range(steps):
            state_TD = state_TD[-1:]
            drafted += self.model.compute_logits(state_TD).argmax(-1).tolist()
            if step + 1 < steps:
                state_TD = self.run(drafted[-1:], state_TD, first + len(tokens) + step)
        return drafted
