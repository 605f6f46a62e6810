"""transformers' own Llama as the reference: tiny random ones, and one with given weights."""

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM


def tiny_llama(tie: bool, seed: int = 0) -> LlamaForCausalLM:
    """A random Llama with grouped heads; weights large enough that logits differ clearly."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=56, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=128, rope_theta=5000.0, tie_word_embeddings=tie, initializer_range=0.2, eos_token_id=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight += 0.2 * torch.randn_like(weight)
    return model


def torch_llama(config: dict, tensors) -> LlamaForCausalLM:
    """A Llama with exactly these float32 weights."""
    model = LlamaForCausalLM(LlamaConfig(**config)).eval()
    state = {name: torch.from_numpy(np.array(array, np.float32)) for name, array in tensors}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    return model


def torch_logits(model: LlamaForCausalLM, tokens: list[int]) -> np.ndarray:
    """Logits of every position."""
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].numpy()


def torch_greedy(model: LlamaForCausalLM, tokens: list[int], count: int, eos_ids: list[int]) -> list[int]:
    """Greedy continuation by transformers' generate, its stop token included."""
    ids = torch.tensor([tokens])
    with torch.no_grad():
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count, eos_token_id=eos_ids, pad_token_id=0
        )
    return out[0, len(tokens) :].tolist()
