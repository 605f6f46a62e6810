"""Caches have the slots that were asked for, rounded up to 128, whatever prompts are padded to."""

from dataclasses import replace

import numpy as np
import pytest
from conftest import TINY
from decode_cases import naive_greedy, random_draft, target_of

from beagle_jax.decoding import session as session_module
from beagle_jax.decoding.decoder import SpeculativeDecoder
from beagle_jax.decoding.session import Session
from beagle_jax.decoding.tree import chain

LONG = replace(TINY, num_layers=0, max_positions=4096)


def begun(context: int | None, prompt: int, new: int, levels: int = 5) -> Session:
    decoder = SpeculativeDecoder(target_of(LONG), random_draft(), chain(levels), context=context)
    return decoder.session([[1] * prompt], max_new_tokens=new)


@pytest.mark.parametrize(
    ("context", "prompt", "new", "capacity"),
    [
        (4096, 9, 9, 4224),  # a full Llama-2 context
        (None, 4000, 999, 4224),  # the target's own context is the limit
        (None, 1030, 40, 1152),
        (1100, 1030, 40, 1152),
        (None, 300, 20, 384),
        (None, 5, 8, 128),
    ],
)
def test_capacity_is_what_was_asked_for(context, prompt, new, capacity):
    assert begun(context, prompt, new).capacity == capacity


@pytest.mark.parametrize(
    ("prompt", "new", "widths"),
    [(1030, 40, [512, 512, 128]), (300, 20, [384]), (300, 300, [512]), (5, 8, [64])],
)
def test_the_last_chunk_of_a_prompt_ends_where_the_cache_ends(prompt, new, widths):
    session = begun(None, prompt, new)
    [request] = session.source
    chunks = list(session._chunks([0], [request], 1))
    assert [chunk.token_RT.shape[1] for chunk in chunks] == widths
    assert int(chunks[-1].offset) + widths[-1] <= session.capacity
    text = np.concatenate([chunk.token_RT[0] for chunk in chunks])
    assert text[:prompt].tolist() == [1] * prompt and not text[prompt:].any()


def test_a_cut_chunk_is_read_like_any_other(monkeypatch):
    monkeypatch.setattr(session_module, "PREFILL_CHUNK", 96)
    target, prompt = target_of(replace(TINY, num_layers=1)), [7 * n % 61 for n in range(110)]
    decoder = SpeculativeDecoder(target, random_draft(), chain(1))
    session = decoder.session([prompt], max_new_tokens=8)
    assert session.capacity == 128  # chunks of 96 and 32 tokens
    [answer] = decoder.generate([prompt], max_new_tokens=8)
    assert answer.tokens == naive_greedy(target, prompt, 8)
    # Planted: the tokens of the cut chunk are lost.
    [other] = decoder.generate([prompt[:96] + [0] * 14], max_new_tokens=8)
    assert other.tokens != answer.tokens
