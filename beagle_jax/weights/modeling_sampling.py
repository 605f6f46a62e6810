"""Choice of the next token, for drafts in PyTorch: the most likely one, or a seeded draw.

The noise of a draw depends on the seed, the token's place in the answer and the token alone, not on
the round that reaches it. Drafts that equal the target's draws are accepted, so a seed gives the
same answer with every tree, alone and in a batch. The noise is that of beagle_jax: Threefry, a
counter-based generator (Salmon et al., 2011).
"""

import math
from typing import NamedTuple

import torch

_WORD = 0xFFFFFFFF  # words of 32 bits, held in int64
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA


class Sampling(NamedTuple):
    """How tokens are chosen. Filters apply in the order of the fields, after the temperature."""

    temperature: float = 0.0  # 0: the most likely token
    top_k: int = 0  # only this many most likely tokens; 0: all
    top_p: float = 1.0  # of these, the fewest whose probabilities reach this sum
    min_p: float = 0.0  # of these, those with this share of the largest probability; 0: all

    def check(self) -> None:
        """Raises ValueError if a value means nothing."""
        expected = {
            "temperature": (0 <= self.temperature < math.inf, "0 (greedy) or a number above it"),
            "top_k": (self.top_k >= 0, "0 (all tokens) or a whole number"),
            "top_p": (0 < self.top_p <= 1, "a share above 0 and at most 1"),
            "min_p": (0 <= self.min_p <= 1, "a share from 0 (all tokens) to 1"),
        }
        for name, (fits, words) in expected.items():
            if not fits:
                raise ValueError(f"{name} is {getattr(self, name)}; expected {words}")

    def choose(self, logits_MV: torch.Tensor, seeds: list[int], places: list[int]) -> list[int]:
        """Returns a token for each row of logits, given its answer's seed and its place there."""
        if self.temperature == 0:
            return logits_MV.argmax(-1).tolist()
        keys = [_key_of(seed, place) for seed, place in zip(seeds, places, strict=True)]
        noise_MV = gumbel(torch.tensor(keys), logits_MV.shape[-1]).to(logits_MV.device)
        return (self.filtered(logits_MV) + noise_MV).argmax(-1).tolist()

    def filtered(self, logits_MV: torch.Tensor) -> torch.Tensor:
        """Returns logits over the temperature, minus infinity where a filter removes the token.

        Tokens equal to the last one that is kept are kept too.
        """
        logits_MV = logits_MV.float() / self.temperature
        lowest_M1 = torch.full_like(logits_MV[:, :1], -torch.inf)
        if self.min_p > 0:
            lowest_M1 = logits_MV.amax(-1, keepdim=True) + math.log(self.min_p)
        if self.top_k or self.top_p < 1:
            sorted_MV = logits_MV.sort(dim=-1, descending=True).values
            sorted_MV = sorted_MV[:, : self.top_k or None]
            p_MV = sorted_MV.softmax(-1)
            below_MV = p_MV.cumsum(-1) - p_MV < self.top_p if self.top_p < 1 else p_MV >= 0
            last_M1 = (below_MV.sum(-1, keepdim=True) - 1).clamp(min=0)
            lowest_M1 = torch.maximum(lowest_M1, sorted_MV.gather(-1, last_M1))
        return logits_MV.masked_fill(logits_MV < lowest_M1, -torch.inf)


def gumbel(key_M2: torch.Tensor, count: int) -> torch.Tensor:
    """Returns Gumbel noise [M, count]; argmax(logits + noise) is a draw from their softmax."""
    token_1V = torch.arange(count)[None]
    first_MV, second_MV = _threefry(
        key_M2[:, :1], key_M2[:, 1:], torch.zeros_like(token_1V), token_1V
    )
    # 23 bits become a number in [tiny, 1).
    bits_MV = ((first_MV ^ second_MV) >> 9) | 0x3F800000
    uniform_MV = bits_MV.to(torch.int32).view(torch.float32) - 1.0
    tiny = torch.finfo(torch.float32).tiny
    uniform_MV = (uniform_MV * (1.0 - tiny) + tiny).clamp(min=tiny)
    return -torch.log(-torch.log(uniform_MV))


def _key_of(seed: int, place: int) -> tuple[int, int]:
    """Returns the random key of a place of an answer, for the target's choice."""
    key = (0, seed & _WORD)
    for number in (0, place):  # 0: what the key is for
        words = (torch.tensor(word) for word in (*key, 0, number))
        first, second = _threefry(*words)
        key = (int(first), int(second))
    return key


def _threefry(
    key_0: torch.Tensor, key_1: torch.Tensor, x_0: torch.Tensor, x_1: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Threefry-2x32 with 20 rounds: encrypts a counter of two words by a key of two."""
    keys = (key_0, key_1, key_0 ^ key_1 ^ _PARITY)
    x_0, x_1 = (x_0 + key_0) & _WORD, (x_1 + key_1) & _WORD
    for turn in range(5):
        for rotation in _ROTATIONS[turn % 2]:
            x_0 = (x_0 + x_1) & _WORD
            x_1 = ((x_1 << rotation) | (x_1 >> (32 - rotation))) & _WORD
            x_1 = x_1 ^ x_0
        x_0 = (x_0 + keys[(turn + 1) % 3]) & _WORD
        x_1 = (x_1 + keys[(turn + 2) % 3] + turn + 1) & _WORD
    return x_0, x_1
