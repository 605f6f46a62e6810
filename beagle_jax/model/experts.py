"""Routed experts: several MLPs, of which each token uses a few (Mixtral, Qwen3-MoE).

Each platform has a form of its own; all of them compute the same. None drops a token.

    TPU    `grouped`: columns sorted by expert, then products of each expert with its columns, where
           the stacks were turned for it (`joined.turns_experts`)
    GPU    `_few`: the experts of each column, gathered within the kernel that multiplies by them;
           with more columns `_every`: all experts, as if they were one matrix
    else   `_one_by_one`: a loop over all experts that skips those no token chose

`jax.lax.ragged_dot`, the product of `grouped`, multiplies every column by every expert on CPUs and
on GPUs (jax 0.10); there it also turns all weights first (`benchmarks/experts_pass.py`). The loop
costs a GPU a wait of the host for each expert.

On a mesh with an axis for whole experts, each device runs its form on the experts that it holds
(`on_devices`), and one sum over these devices follows.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from beagle_jax.model.quantised import Quantised, dense, pick, times
from beagle_jax.model.tensors import ARRAYS, JOINED

Act = Callable[[jax.Array], jax.Array]
Stacks = Sequence[jax.Array | Quantised]  # of gate, up and down

# Columns up to which a GPU multiplies by all experts at once: `_every` holds the outputs of all of
# them, 370 MB for 512 columns of Qwen3-30B-A3B.
_COLUMNS = 512


@dataclass(frozen=True)
class Spread:
    """How devices of a mesh share the experts of a layer. Hashable; sharding.py makes it."""

    mesh: Mesh
    experts: tuple[str, ...]  # devices along these axes hold different experts
    widths: tuple[str, ...]  # devices along these hold different parts of the inner width of each


@dataclass(frozen=True)
class Experts:
    """Description of a target's routed experts. Hashable."""

    count: int  # E
    per_token: int  # experts that each token uses
    width: int  # F of a single expert
    renormalised: bool  # the shares of the chosen experts are scaled to sum to 1
    dense_layers: tuple[int, ...]  # layers with a plain MLP instead
    names: tuple[
        str, str, str, str
    ]  # names in files: the router, then each expert's gate, up and down; {} is its number
    # None: each device has all experts, or a part of each (`mesh.tensor`)
    spread: Spread | None = field(default=None, repr=False)


class Choice(NamedTuple):
    """The k experts of each column."""

    share_Mk: jax.Array  # float32; zero for padding
    expert_Mk: jax.Array  # int32; padding has those of the first column
    num_experts: int  # E
    partial: bool = False  # the number E stands for any expert of another device; its share is zero

    def among(self, first: jax.Array, count: int) -> "Choice":
        """Returns the choice among `count` experts from number `first` on; they start at 0."""
        number_Mk = self.expert_Mk - first
        own_Mk = (number_Mk >= 0) & (number_Mk < count)
        return Choice(
            jnp.where(own_Mk, self.share_Mk, 0.0),
            jnp.where(own_Mk, number_Mk, count),
            count,
            partial=True,
        )

    @property
    def share_EM(self) -> jax.Array:
        """Each expert's share of each column; zero for experts that were not chosen."""
        M = len(self.share_Mk)
        zero_EM = jnp.zeros((self.num_experts, M), jnp.float32)
        place = zero_EM.at[self.expert_Mk, jnp.arange(M)[:, None]]
        return place.set(self.share_Mk, mode="drop")


def choose(router_ED: jax.Array, experts: Experts, y_DM: jax.Array, count: int) -> Choice:
    """Returns the experts of each column. Columns past `count` are padding."""
    share_EM = jax.nn.softmax(jnp.einsum("ED,DM->EM", router_ED, y_DM).astype(jnp.float32), axis=0)
    best_Mk, expert_Mk = jax.lax.top_k(share_EM.T, experts.per_token)
    if experts.renormalised:
        best_Mk = best_Mk / best_Mk.sum(axis=-1, keepdims=True)
    real_M1 = jnp.arange(y_DM.shape[1])[:, None] < count
    return Choice(
        jnp.where(real_M1, best_Mk, 0.0),
        jnp.where(real_M1, expert_Mk, expert_Mk[:1]),
        experts.count,
    )


Form = Callable[[Choice, Stacks, Act, jax.Array], jax.Array]


def on_devices(form: Form, keys: Sequence[str], spread: Spread | None) -> Form:
    """Makes a form run on each device's own experts, and sums their outputs over devices.

    keys: names of the stacks (`model/tensors.py`). Without `spread`, returns the form: XLA then
    splits its products as the stacks are split, and sums each expert's outputs.
    """
    if spread is None:
        return form
    axes = {"experts": spread.experts, "expert": spread.widths}
    specs = [P(*(axes.get(str(axis)) or None for axis in _axes(key))) for key in keys]
    devices = math.prod(spread.mesh.shape[axis] for axis in spread.experts)

    def on_mesh(choice: Choice, stacks: Stacks, act: Act, y_DM: jax.Array) -> jax.Array:
        def on_each(
            share_Mk: jax.Array, expert_Mk: jax.Array, stacks: Stacks, y_DM: jax.Array
        ) -> jax.Array:
            count = choice.num_experts // devices
            whole = Choice(share_Mk, expert_Mk, choice.num_experts)
            own = whole.among(jax.lax.axis_index(spread.experts) * count, count)
            return jax.lax.psum(form(own, stacks, act, y_DM), spread.experts + spread.widths)

        # The other axes stay with XLA: the rows of a batch, and the model width.
        return jax.shard_map(
            on_each,
            mesh=spread.mesh,
            in_specs=(P(), P(), specs, P()),
            out_specs=P(),
            axis_names=set(spread.experts + spread.widths),
            check_vma=False,
        )(choice.share_Mk, choice.expert_Mk, list(stacks), y_DM)

    return on_mesh


def _axes(key: str) -> tuple[str | None, ...]:
    return ARRAYS[key].axes if key in ARRAYS else JOINED[key].axes


def routed(choice: Choice, stacks: Stacks, act: Act, y_DM: jax.Array) -> jax.Array:
    """Returns the sum over experts of share times output, float32 [D, M], in the platform's form.

    stacks: [E, F, D] of gate and up, [E, D, F] of down. act: activation of the gate.
    """

    def on_gpu() -> jax.Array:
        if choice.expert_Mk.size <= choice.num_experts:
            return _few(choice, stacks, act, y_DM)
        if y_DM.shape[1] <= _COLUMNS and not isinstance(stacks[0], Quantised):
            return _every(choice, stacks, act, y_DM)
        return elsewhere()

    def elsewhere() -> jax.Array:
        return _one_by_one(choice, stacks, act, y_DM)

    return by_platform(on_gpu, elsewhere)


def by_platform(on_gpu: Callable[[], jax.Array], elsewhere: Callable[[], jax.Array]) -> jax.Array:
    """Returns the result of the function for the platform that the program is compiled for."""
    return jax.lax.platform_dependent(cuda=on_gpu, rocm=on_gpu, default=elsewhere)


def grouped(choice: Choice, stacks: Stacks, act: Act, y_DM: jax.Array) -> jax.Array:
    """Returns the sum over experts of share times output, float32 [D, M], by grouped products.

    stacks: [E, D, F] of gate and up, [E, F, D] of down (`joined.TURNED`), not quantised. act:
    activation of the gate.
    """
    per_token = choice.expert_Mk.shape[1]
    expert_R = choice.expert_Mk.reshape(-1)
    order_R = jnp.argsort(expert_R)
    # Experts of other devices are sorted last and belong to no group: their rows are not computed.
    size_E = jnp.bincount(expert_R, length=choice.num_experts)

    def product(x_RI: jax.Array, stack_EIO: Any) -> jax.Array:
        out_RO = jax.lax.ragged_dot(x_RI, stack_EIO, size_E, preferred_element_type=jnp.float32)
        return out_RO.astype(x_RI.dtype)

    gate_EDF, up_EDF, down_EFD = stacks
    x_RD = y_DM.T[order_R // per_token]
    out_RD = product(act(product(x_RD, gate_EDF)) * product(x_RD, up_EDF), down_EFD)
    return _mixed(out_RD[jnp.argsort(order_R)], choice)


def _few(choice: Choice, stacks: Stacks, act: Act, y_DM: jax.Array) -> jax.Array:
    """Computes sums, not products of matrices: XLA's kernels for them read an expert in place."""
    expert_R = choice.expert_Mk.reshape(-1)
    if choice.partial:  # in place of another device's expert, one that is read anyway
        last = choice.num_experts - 1
        expert_R = jnp.where(expert_R > last, jnp.minimum(expert_R.min(), last), expert_R)

    def product(stack: jax.Array | Quantised, x_RI: jax.Array) -> jax.Array:
        matrix_ROI = dense(pick(stack, expert_R), x_RI).astype(jnp.float32)
        return (matrix_ROI * x_RI[:, None].astype(jnp.float32)).sum(axis=-1).astype(x_RI.dtype)

    gate, up, down = stacks
    x_RD = jnp.repeat(y_DM.T, choice.expert_Mk.shape[1], axis=0)
    return _mixed(product(down, act(product(gate, x_RD)) * product(up, x_RD)), choice)


def _mixed(out_RD: jax.Array, choice: Choice) -> jax.Array:
    """Returns the sum [D, M] of the outputs of each column's experts by their shares."""
    share_Mk1 = choice.share_Mk[..., None]
    out_MkD = out_RD.reshape(*choice.share_Mk.shape, -1).astype(jnp.float32)
    if choice.partial:  # rows of other devices' experts hold anything, perhaps NaN
        out_MkD = jnp.where(share_Mk1 == 0, 0.0, out_MkD)
    return (out_MkD * share_Mk1).sum(axis=1).T


def _every(choice: Choice, stacks: Stacks, act: Act, y_DM: jax.Array) -> jax.Array:
    """An expert's output does not count in columns that did not choose it, even if not finite."""
    gate_EFD, up_EFD, down_EDF = (dense(stack, y_DM) for stack in stacks)
    share_E1M = choice.share_EM[:, None]
    gate_EFM, up_EFM = (jnp.einsum("EFD,DM->EFM", x, y_DM) for x in (gate_EFD, up_EFD))
    inner_EFM = jnp.where(share_E1M > 0, act(gate_EFM) * up_EFM, 0)
    out_EDM = jnp.einsum("EDF,EFM->EDM", down_EDF, inner_EFM).astype(jnp.float32)
    return (out_EDM * share_E1M).sum(axis=0)


def _one_by_one(choice: Choice, stacks: Stacks, act: Act, y_DM: jax.Array) -> jax.Array:
    """An expert that runs reads every column.

    A decoding step therefore costs only the experts that it needs. A long prompt costs up to
    count / per_token times as much as products of each expert with its own columns.
    """
    gate, up, down = stacks
    share_EM = choice.share_EM

    def run(expert: jax.Array) -> jax.Array:
        inner_FM = act(times(pick(gate, expert), y_DM)) * times(pick(up, expert), y_DM)
        return times(pick(down, expert), inner_FM)

    def add(expert: jax.Array, total_DM: jax.Array) -> jax.Array:
        share_M = share_EM[expert]

        def weighted() -> jax.Array:
            return total_DM + run(expert).astype(jnp.float32) * share_M[None]

        return jax.lax.cond((share_M > 0).any(), weighted, lambda: total_DM)

    return jax.lax.fori_loop(0, choice.num_experts, add, jnp.zeros(y_DM.shape, jnp.float32))
