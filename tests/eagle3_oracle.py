"""EAGLE-3 in plain torch, written from method.md 14 alone: features, block, training-time test and
its loss, in float64 and with torch's own gradients.

`bug` plants what a test must see.
"""

import numpy as np
import torch
from torch import Tensor

from beagle_jax.model.eagle3 import Eagle3Spec

Weights = dict[str, Tensor]


def weights(params: dict) -> Weights:
    """The draft's parameters as leaves that torch differentiates."""
    return {
        name: torch.tensor(np.asarray(array), dtype=torch.float64, requires_grad=True)
        for name, array in params.items()
    }


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x**2).mean(-1, keepdim=True) + eps) * weight


def features(w: Weights, spec: Eagle3Spec, streams: list[Tensor]) -> Tensor:
    """g [.., d] of the target's streams [.., D], in the order of the layers."""
    if spec.fc_norm:
        parts = w["fc_norm"].split(spec.target_hidden_size)
        streams = [rms(x, part, spec.rms_norm_eps) for x, part in zip(streams, parts, strict=True)]
    x = torch.cat(streams, -1)
    if spec.norm_before_fc:
        x = rms(x, w["fc_input_norm"], spec.rms_norm_eps)
    g = x @ w["fc"].T
    return g + w["fc_bias"] if spec.fc_bias else g


def turned(x: Tensor, place: int, spec: Eagle3Spec) -> Tensor:
    """Heads [N, H] rotated to a place; pairs are half-split."""
    half = spec.head_dim // 2
    factor = spec.rope_scaling.factor if spec.rope_scaling else 1.0
    angle = place / factor / spec.rope_theta ** (torch.arange(half).double() / half)
    first, second = x[:, :half], x[:, half:]
    return torch.cat(
        [first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], 1
    )


def heads(w: Weights, spec: Eagle3Spec, name: str, u: Tensor) -> Tensor:
    out = w[f"{name}_proj"] @ u
    if spec.attention_bias:
        out = out + w[f"{name}_bias"]
    out = out.reshape(-1, spec.head_dim)
    if spec.qk_norm and name != "v":
        out = rms(out, w[f"{name}_norm"], spec.rms_norm_eps)
    return out


class Entry:
    """One entry: the token's embedding, the feature before it, and its place."""

    def __init__(self, w: Weights, spec: Eagle3Spec, e: Tensor, g: Tensor, place: int, bug=""):
        eps = spec.rms_norm_eps
        normed = [rms(e, w["input_layernorm"], eps), rms(g, w["hidden_norm"], eps)]
        u = torch.cat(normed[::-1] if bug == "feature first" else normed)
        self.q = turned(heads(w, spec, "q", u), place, spec)
        self.k = turned(heads(w, spec, "k", u), place, spec)
        self.v = heads(w, spec, "v", u)
        self.residual = normed[1] if spec.norm_before_residual else g
        if bug == "the residual is the embedding":
            self.residual = e


def output(w: Weights, spec: Eagle3Spec, entry: Entry, seen: list[Entry]) -> Tensor:
    """o [d] of an entry that sees these entries."""
    group, out = spec.num_heads // spec.num_kv_heads, []
    for head, q in enumerate(entry.q):
        score = torch.stack([q @ other.k[head // group] for other in seen]) / spec.head_dim**0.5
        out.append(score.softmax(0) @ torch.stack([other.v[head // group] for other in seen]))
    y = entry.residual + w["o_proj"] @ torch.cat(out)
    if spec.attention_bias:
        y = y + w["o_bias"]
    z = rms(y, w["post_attention_layernorm"], spec.rms_norm_eps)
    gate = torch.nn.functional.silu(w["gate_proj"] @ z)
    return y + w["down_proj"] @ (gate * (w["up_proj"] @ z))


def simulated(
    w: Weights, spec: Eagle3Spec, e_LD: Tensor, streams: list[Tensor], steps: int, bug: str = ""
) -> dict[tuple[int, int], Tensor]:
    """The output o of column j at step t, by (j, t); tokens past the row have none."""
    g, L = features(w, spec, streams), len(e_LD)
    first = [Entry(w, spec, e_LD[j + 1], g[j], j, bug) for j in range(L - 1)]
    made = {}
    for j in range(L - 1):
        own: list[Entry] = []
        for t in range(1, steps + 1):
            if j + t >= L:
                break
            if t == 1:
                entry = first[j]
            else:
                before = made[j, t - 1]
                if spec.norm_output:
                    before = rms(before, w["norm"], spec.rms_norm_eps)
                if bug == "fc again":
                    before = w["fc"] @ before.repeat(len(spec.state_layers))
                if bug == "detached":
                    before = before.detach()
                place = j + t - 1 - (bug == "one place")
                entry = Entry(w, spec, e_LD[j + t], before, place, bug)
                own.append(entry)
            seen = first[: j + 1] + (own[-1:] if bug == "own keys forgotten" else own)
            if bug == "later columns seen":
                seen = first[: j + t] + own
            made[j, t] = output(w, spec, entry, seen)
    return made


def loss(
    w: Weights,
    spec: Eagle3Spec,
    rows: list[tuple[Tensor, list[Tensor], Tensor, np.ndarray]],
    head_VD: Tensor,
    ids: np.ndarray,
    steps: int,
    decay: float,
    bug: str = "",
) -> tuple[Tensor, int]:
    """The loss over rows of (embeddings, streams, true states, supervised), and its divisor N.

    ids: the tokens that the draft scores. head_VD: the target's, over its whole vocabulary.
    """
    total, counted = torch.zeros(()).double(), 0
    for e_LD, streams, h_LD, supervised in rows:
        logits = h_LD @ head_VD.T
        scored = np.isin(logits.argmax(-1).numpy(), ids)
        mask = supervised & (scored if bug != "all counted" else True)
        counted += int(mask.sum())
        p = logits[:, ids].softmax(-1)
        if bug == "not renormalised":
            p = logits.softmax(-1)[:, ids]
        for (j, t), o in simulated(w, spec, e_LD, streams, steps, bug).items():
            if not mask[j + t - (bug == "mask one early")]:
                continue
            own_VD = w["head_VD"] if spec.own_head else head_VD[ids]
            x = o if bug == "no final norm" else rms(o, w["norm"], spec.rms_norm_eps)
            log_q = (own_VD @ x).log_softmax(-1)
            weight = 1.0 if bug == "equal weights" else decay ** (t - 1)
            total = total - weight * (p[j + t - (bug == "target early")] * log_q).sum()
    return total / counted, counted
