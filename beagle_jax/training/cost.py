"""What a training step takes before there is data, weights or even the machine: work by formula,
memory by compilation.

Everything is shapes (`jax.eval_shape`), placed as the run would place it; XLA compiles the step for
the devices of the mesh, which may be those of a TPU topology that nobody here has
(jax.experimental.topologies and the libtpu wheel).
"""

import math
import re
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from beagle_jax.config import Config, StageConfig
from beagle_jax.data.loader import Batch, BatchLoader
from beagle_jax.data.template import Row
from beagle_jax.errors import UsageError
from beagle_jax.model.draft import DraftSpec
from beagle_jax.model.kinds import spec_type
from beagle_jax.model.target import TargetSpec
from beagle_jax.model.tensors import param_table
from beagle_jax.sharding import rows, shardings
from beagle_jax.training.frozen import FrozenTarget
from beagle_jax.training.kinds import objective_of
from beagle_jax.training.step import make_steps


class StageCost(NamedTuple):
    """Of one step of a stage. Bytes are those of one device."""

    flops: float  # matrix products on all devices together, every token an answer
    weights: int  # the trained draft
    optimizer: int
    # the target's embedding and head; all of it when the step computes its states, or tau is
    # measured on the way
    frozen: int
    batch: int  # tokens and states
    temporaries: int | None  # by the compiler; None: it ran out of the chip's memory
    compiler_total: (
        int | None
    )  # everything at once, as the compiler counts it, and what it does not see
    refusal: str  # what the compiler said when it ran out; else empty
    compile_seconds: float

    @property
    def held(self) -> int:
        """Bytes that stay for the whole step, by their shapes."""
        return self.weights + self.optimizer + self.frozen + self.batch


def topology_devices(name: str) -> list[jax.Device]:
    """Descriptions of a TPU's devices, "v5e:4x4". Raises UsageError without libtpu and for a name
    that it does not know.
    """
    try:
        import libtpu  # noqa: F401
    except ImportError:
        raise UsageError(
            "--topology compiles with the libtpu wheel, which is not installed: pip install "
            "'beagle-jax[tpu]' (Linux on x86; no TPU is needed)"
        ) from None
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    except (ValueError, RuntimeError) as error:
        raise UsageError(
            f"--topology {name}: libtpu does not know it ({_first_line(error)}); examples: "
            "v5e:4x4, v5p:2x2x2, v6e:4x4, v4:2x2x2"
        ) from error


def stage_cost(
    name: str,
    config: Config,
    target: TargetSpec,
    draft_vocab: int,
    mesh: Mesh,
    online: Any = None,
    beside: Any = None,
) -> StageCost:
    """Compiles one step of a stage of `train` for the mesh; nothing is allocated.

    draft_vocab: tokens that the draft scores. online: shapes of the target's parameters, when the
    step computes its states; beside: when they only stay in memory, for tau to be measured with
    (eval.every).
    """
    stage: StageConfig = config.train.named_stages[name]
    spec = spec_type(config.draft.kind).from_target(target)
    train_step: Any  # jitted, which its type does not tell
    train_step, _, init = make_steps(spec, config.train, stage, mesh)
    params = {
        key: jax.ShapeDtypeStruct(shape, jnp.float32) for key, shape in spec.param_shapes().items()
    }
    dtype = jnp.dtype(config.target.dtype)
    frozen = FrozenTarget(
        embed_VD=jax.ShapeDtypeStruct((target.vocab_size, spec.hidden_size), dtype),
        head_VD=jax.ShapeDtypeStruct((draft_vocab, spec.hidden_size), dtype),
        model=online,
        spec=None if online is None else target,
    )
    beside = _not_read(beside or {}, frozen)
    state, frozen = (
        _placed(tree, shardings(tree, mesh)) for tree in (jax.eval_shape(init, params), frozen)
    )
    batch = batch_shapes(config, spec.hidden_size, len(spec.taps))
    batch = batch if online is None else batch._replace(inputs_BLI=None, targets_BLD=None)
    batch = _placed(batch, jax.tree.map(lambda _: rows(mesh), batch))
    clock = time.perf_counter()
    temporaries, total, refusal = _compiled(
        train_step.lower(state, frozen, batch, config.train.seed)
    )
    B, T = batch.counts_BT.shape
    return StageCost(
        flops=B
        * (
            row_flops(spec, stage, draft_vocab, config.train.row_tokens, T)
            + (0 if online is None else target_flops(target, config.train.row_tokens))
        ),
        weights=_bytes(state.params),
        optimizer=_bytes(state.opt_state),
        frozen=_bytes(frozen) + _bytes(beside),
        batch=_bytes(batch),
        temporaries=temporaries,
        compiler_total=None if total is None else total + _bytes(beside),
        refusal=refusal,
        compile_seconds=time.perf_counter() - clock,
    )


def _not_read(beside: dict[str, Any], frozen: FrozenTarget) -> dict[str, Any]:
    """Tables that the step reads are the target's own, unless they are cut to hot tokens."""
    tables = {"embed_VD": frozen.embed_VD, "head_VD": frozen.head_VD}
    return {
        key: x for key, x in beside.items() if key not in tables or x.shape != tables[key].shape
    }


def _compiled(lowered: Any) -> tuple[int | None, int | None, str]:
    """Bytes of temporaries and in all; or None for both and why the compiler refuses the step."""
    try:
        memory = lowered.compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None, None, _first_line(error)
    total = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )
    return memory.temp_size_in_bytes, total, ""


def batch_shapes(config: Config, width: int, taps: int = 0) -> Batch:
    """The shapes of a batch whose rows are full and answers throughout, as the loader makes
    them.
    """
    L, stored = config.train.row_tokens, config.data.states_dtype or config.target.dtype
    narrow_L1 = np.zeros(
        (L, 1), jnp.dtype("float32" if stored == "int8" else stored)
    )  # the loader copies states: one channel is enough
    full = [Row([0] * L, [True] * L)] * config.train.batch
    made = BatchLoader(
        full, [narrow_L1] * len(full), batch=len(full), row_tokens=L, seed=0
    ).batch_at(0)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), made)
    states = jax.ShapeDtypeStruct((len(full), L, width * max(taps, 1)), narrow_L1.dtype)
    targets = jax.ShapeDtypeStruct((len(full), L, width), narrow_L1.dtype) if taps else None
    return shapes._replace(inputs_BLI=states, targets_BLD=targets)


def row_flops(spec: DraftSpec, stage: StageConfig, vocab: int, L: int, T: int) -> float:
    """Operations of the matrix products of one row: L states, T queries that all count (method.md
    3, 4.5b and 8).

    See `Objective.flops`.
    """
    return objective_of(spec, stage).flops(spec, stage, vocab, L, T)


def target_flops(spec: TargetSpec, L: int) -> float:
    """Operations of the matrix products of the target's forward pass over one row of L tokens,
    without the head.
    """
    per_token = 2 * sum(
        math.prod(shape)
        for path, shape in param_table(spec).values()
        if path[0] == "layers" and len(shape) == 2
    )
    return L * per_token + spec.num_layers * 2 * 2 * L * L * spec.num_heads * spec.head_dim


def _placed(tree: Any, where: Any) -> Any:
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree, where
    )


def _bytes(tree: Any) -> int:
    """On the device that holds most."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def _first_line(error: Exception) -> str:
    return re.split(r"\n|\. ", str(error).strip())[0][:300]
