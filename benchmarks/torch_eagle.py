"""Our own plain PyTorch form of the EAGLE training step (method.md 8).

Simulated steps are as in training-time test. The draft reads (token at j + t, state at j), fused by
a linear map. At simulated step t the state is its own prediction from the step before, so every
query and key is new. The keys of step 1 are seen causally, those of later steps along the diagonal.
"""

import torch
import torch.nn.functional as F


class EagleBlock(torch.nn.Module):
    """EAGLE block: fusion, causal self-attention without an input norm, gated MLP."""

    def __init__(
        self,
        hidden: int,
        inner: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        theta: float,
        eps: float,
    ):
        super().__init__()

        def linear(into, out):
            return torch.nn.Linear(into, out, bias=False)

        self.heads, self.kv_heads, self.head_dim, self.theta = heads, kv_heads, head_dim, theta
        self.fc = linear(2 * hidden, hidden)
        self.q, self.k, self.v = (
            linear(hidden, count * head_dim) for count in (heads, kv_heads, kv_heads)
        )
        self.o, self.norm = linear(heads * head_dim, hidden), torch.nn.RMSNorm(hidden, eps=eps)
        self.gate, self.up, self.down = (
            linear(hidden, inner),
            linear(hidden, inner),
            linear(inner, hidden),
        )

    def rotate(self, x_BNTH, at_T):
        """Applies rotary embedding to half-split pairs."""
        half = self.head_dim // 2
        angle = at_T[:, None] / self.theta ** (torch.arange(half, device=x_BNTH.device) / half)
        cos, sin = (
            torch.cat([angle, angle], 1).cos().to(x_BNTH.dtype),
            torch.cat([angle, angle], 1).sin().to(x_BNTH.dtype),
        )
        first, second = x_BNTH.chunk(2, dim=-1)
        return x_BNTH * cos + torch.cat([-second, first], dim=-1) * sin

    def forward(self, e_BTD, h_BTD, memory: list, step: int):
        """Predicts states, and appends this step's keys and values to `memory`."""
        B, T, _ = e_BTD.shape
        x_BTD = self.fc(torch.cat([e_BTD, h_BTD], dim=-1))
        at_T = torch.arange(T, device=x_BTD.device) + step

        def split(y, count):
            return y.view(B, T, count, self.head_dim).transpose(1, 2)

        def widen(y):
            return y.repeat_interleave(self.heads // self.kv_heads, dim=1)

        q = self.rotate(split(self.q(x_BTD), self.heads), at_T)
        memory.append(
            (
                widen(self.rotate(split(self.k(x_BTD), self.kv_heads), at_T)),
                widen(split(self.v(x_BTD), self.kv_heads)),
            )
        )
        (first_k, first_v), later = memory[0], memory[1:]
        score = (q @ first_k.transpose(2, 3)).masked_fill(
            torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1), torch.finfo(q.dtype).min
        )
        diagonal = [(q * k).sum(-1, keepdim=True) for k, _ in later]
        weight = F.softmax(
            torch.cat([score, *diagonal], dim=-1).float() * self.head_dim**-0.5, dim=-1
        ).to(q.dtype)
        out = weight[..., :T] @ first_v
        for place, (_, v) in enumerate(later):
            out = out + weight[..., T + place, None] * v
        y_BTD = x_BTD + self.o(out.transpose(1, 2).reshape(B, T, -1))
        z_BTD = self.norm(y_BTD)
        return y_BTD + self.down(F.silu(self.gate(z_BTD)) * self.up(z_BTD))


def eagle_loss(block: EagleBlock, e_BLD, h_BLD, counted_BL, head_VD, steps: int):
    """Soft cross-entropy + 10 smooth-L1 over `steps` simulated steps, per supervised token.

    No gradient flows to the target's side.
    """
    with torch.no_grad():
        p_BLV = F.softmax((h_BLD @ head_VD.T).float(), dim=-1)
    L, loss, memory, state = e_BLD.shape[1], 0.0, [], h_BLD
    for step in range(1, steps + 1):
        # Index j reads token j + step and predicts the state at j + step. Indices past the row's
        # end do not count.
        def shifted(x, step=step):
            return torch.roll(x, -step, dims=1)

        state = block(shifted(e_BLD), state, memory, step - 1)
        live_BL = shifted(counted_BL) & (torch.arange(L, device=state.device) < L - step)
        ce_BL = -(shifted(p_BLV) * F.log_softmax((state @ head_VD.T).float(), dim=-1)).sum(-1)
        l1_BL = F.smooth_l1_loss(state, shifted(h_BLD), reduction="none").mean(-1)
        loss = loss + ((ce_BL + 10 * l1_BL) * live_BL).sum()
    return loss / counted_BL.sum()


def train_step(block: EagleBlock, optimizer, compile_it: bool, steps: int):
    """Returns a function of (e, h, counts, head): one AdamW step with clipping."""
    loss_of = torch.compile(eagle_loss, dynamic=False) if compile_it else eagle_loss

    def step(e_BLD, h_BLD, counted_BL, head_VD) -> None:
        optimizer.zero_grad(set_to_none=True)
        loss_of(block, e_BLD, h_BLD, counted_BL, head_VD, steps).backward()
        torch.nn.utils.clip_grad_norm_(block.parameters(), 0.5)
        optimizer.step()

    return step
