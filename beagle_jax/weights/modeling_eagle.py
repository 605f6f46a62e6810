"""An EAGLE-1/2 draft in PyTorch, with greedy speculative decoding.

Needs only torch and transformers.

EAGLE drafts with a fusion layer and one decoder layer with self-attention, which has no input norm
and no output norm. Entry j fuses the token at position j + 1 with the state at position j and has
rotary position j. It sees the entries before it and itself, and predicts the state at position j +
1. modeling_beagle.py, beside this file, has everything else, including how to load and use the
draft.
"""

import math
from typing import Any

import torch
from torch import nn

from .modeling_beagle import BeagleConfig, BeagleDraft, KeysValues


class EagleConfig(BeagleConfig):
    """Shape of the draft, and its origin."""

    model_type = "eagle_draft_torch"

    def __init__(
        self,
        fc_bias: bool = True,
        frequency_scaling: list | None = None,
        qkv_bias: bool = False,
        **kwargs: Any,
    ) -> None:
        """Adds EAGLE's settings to those of BeagleConfig.

        fc_bias: whether the fusion layer has a bias. qkv_bias: whether queries, keys and values
        have biases. frequency_scaling: rotary scaling as factor, low and high frequency factor, and
        original positions (None: linear).
        """
        self.fc_bias = fc_bias
        self.qkv_bias = qkv_bias
        self.frequency_scaling = frequency_scaling
        super().__init__(**kwargs)


class EagleDraft(BeagleDraft):
    """The fusion layer and the block; drafting and decoding are inherited."""

    config_class = EagleConfig
    fused = True

    def __init__(self, config: EagleConfig) -> None:
        super().__init__(config)
        self.fc = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=config.fc_bias)
        if config.qkv_bias:
            for name in ("q_proj", "k_proj", "v_proj"):
                linear = getattr(self.self_attn, name)
                linear.bias = nn.Parameter(torch.zeros(linear.out_features))
        self.post_init()

    def fuse(self, e_BTD: torch.Tensor, h_BTD: torch.Tensor) -> torch.Tensor:
        """Returns inputs [B, T, D]: each next token's embedding fused with the state before it."""
        return self.fc(torch.cat([e_BTD, h_BTD], dim=-1))

    def true_rows(
        self, h_BSD: torch.Tensor, next_BSD: torch.Tensor, positions_S: torch.Tensor
    ) -> KeysValues:
        """Returns keys and values of true states, each fused with the token after it."""
        return self.keys_values(self.fuse(next_BSD, h_BSD), positions_S)

    def forward(
        self, e_BTD: torch.Tensor, h_BSD: torch.Tensor, mask_BTS: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Predicts states [B, L - 1, D] of L positions; entry j is that of position j + 1.

        e_BTD, h_BSD: embedding and true state of each position; this method shifts them. mask_BTS:
        which of the L - 1 entries each entry sees; None: those before it and itself.
        """
        f_BTD = self.fuse(e_BTD[:, 1:], h_BSD[:, :-1])
        positions_T = torch.arange(f_BTD.shape[1], device=f_BTD.device)
        if mask_BTS is None:
            mask_BTS = (positions_T[None] <= positions_T[:, None])[None]
        return self.predict(
            f_BTD,
            self.queries(f_BTD, positions_T),
            self.keys_values(f_BTD, positions_T),
            mask_BTS[:, None, None],
        )

    def frequencies(self, plain_H: torch.Tensor) -> torch.Tensor:
        """Divides rotary frequencies by a factor: all (linear), or those of long waves (Llama 3).

        Llama 3 blends the frequencies between long and short waves.
        """
        if self.config.frequency_scaling is None:
            return plain_H
        factor, low, high, original = self.config.frequency_scaling
        if original is None:
            return plain_H / factor
        kept_H = ((original * plain_H / (2 * math.pi) - low) / (high - low)).clamp(0.0, 1.0)
        return (1 - kept_H) * plain_H / factor + kept_H * plain_H
