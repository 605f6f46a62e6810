"""Estimates the cost of a training step: operations by formula, memory by compilation.

Needs neither data nor weights nor the machine: all arrays are shapes (`jax.eval_shape`) with the
shardings of the real run. XLA compiles the step for the devices of the mesh. They may belong to a
TPU topology that is not available (jax.experimental.topologies with the libtpu wheel).
"""

import math
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from beagle_jax.config import Config, StageConfig
from beagle_jax.data.loader import Batch, BatchLoader
from beagle_jax.data.prefetch import AHEAD
from beagle_jax.data.template import Row
from beagle_jax.model.draft import DraftSpec
from beagle_jax.model.kinds import new_spec
from beagle_jax.model.target import TargetSpec
from beagle_jax.model.tensors import param_table
from beagle_jax.sharding import place_abstract, rows, shardings
from beagle_jax.topology import first_line, hidden_warnings
from beagle_jax.training.frozen import FrozenTarget, Vocabulary
from beagle_jax.training.kinds import asks_for_scored, objective_of
from beagle_jax.training.step import make_steps


class StageCost(NamedTuple):
    """Cost of one step of a stage. Bytes are per device."""

    flops: float  # of matrix products, summed over devices; every token is an answer token
    weights: int  # the trained draft
    optimizer: int  # its moments, and the moving average of the weights
    # the target's embedding and head; the whole target if the step computes its states, or if
    # tau is measured during training
    frozen: int
    batch: int  # tokens and states
    waiting: int  # batches that are copied to the devices in advance (data/prefetch.py)
    temporaries: int | None  # by the compiler; None: they do not fit into the chip's memory
    # the compiler's own sum, plus the batches that wait and the arrays that stay in memory beside
    # the step
    compiler_total: int | None
    refusal: str  # the compiler's out-of-memory message; else empty
    compile_seconds: float

    @property
    def held(self) -> int:
        """Bytes that stay in memory during the whole step, computed from shapes."""
        return self.weights + self.optimizer + self.frozen + self.batch + self.waiting


class Step(NamedTuple):
    """A stage's step and what it takes: shapes with the shardings of the real run."""

    run: Any  # jitted; its type does not show `lower`
    state: Any
    frozen: FrozenTarget
    batch: Batch
    seed: int
    flops: float  # as `StageCost.flops`

    def lowered(self) -> Any:
        """The program before XLA compiles it."""
        return self.run.lower(self.state, self.frozen, self.batch, self.seed)


def abstract_step(
    name: str,
    config: Config,
    target: TargetSpec,
    draft_vocab: int,
    mesh: Mesh,
    online: Any = None,
) -> Step:
    """Returns a stage's step of `train` on the mesh, without allocating arrays.

    See `stage_cost` for the arguments.
    """
    stage: StageConfig = config.train.named_stages[name]
    spec = new_spec(config.draft, target).scoring(draft_vocab)
    train_step, _, init = make_steps(spec, config.train, stage, mesh)
    params = {
        key: jax.ShapeDtypeStruct(shape, jnp.float32) for key, shape in spec.param_shapes().items()
    }
    dtype = jnp.dtype(config.target.dtype)
    frozen = _frozen(target, spec, stage, draft_vocab, dtype, online)
    state, frozen = (
        place_abstract(tree, shardings(tree, mesh))
        for tree in (jax.eval_shape(init, params), frozen)
    )
    batch = batch_shapes(config, spec)
    if online is not None:
        batch = batch._replace(inputs_BLI=None, targets_BLD=None, scale_BL=None)
    batch = place_abstract(batch, jax.tree.map(lambda _: rows(mesh), batch))
    (B, T), L = batch.counted_BT.shape, config.train.row_tokens
    flops = row_flops(spec, stage, draft_vocab, L, T)
    if online is not None:
        flops += target_flops(target, L)
    return Step(train_step, state, frozen, batch, config.train.seed, B * flops)


def stage_cost(
    name: str,
    config: Config,
    target: TargetSpec,
    draft_vocab: int,
    mesh: Mesh,
    online: Any = None,
    beside: Any = None,
) -> StageCost:
    """Compiles one step of a stage of `train` for the mesh, without allocating arrays.

    draft_vocab: number of tokens that the draft scores. online: shapes of the target's parameters
    if the step computes the target's states. beside: the same shapes if the parameters only stay in
    memory to measure tau (`eval.every`).
    """
    step = abstract_step(name, config, target, draft_vocab, mesh, online)
    state, batch = step.state, step.batch
    beside = _not_read(beside or {}, step.frozen)
    clock = time.perf_counter()
    temporaries, total, refusal = _compiled(step.lowered())
    waiting = AHEAD * _bytes(batch)
    return StageCost(
        flops=step.flops,
        weights=_bytes(state.params),
        optimizer=_bytes(state.opt_state) + _bytes(state.ema or {}),
        frozen=_bytes(step.frozen) + _bytes(beside),
        batch=_bytes(batch),
        waiting=waiting,
        temporaries=temporaries,
        compiler_total=None if total is None else total + _bytes(beside) + waiting,
        refusal=refusal,
        compile_seconds=time.perf_counter() - clock,
    )


def _frozen(
    target: TargetSpec,
    spec: DraftSpec,
    stage: StageConfig,
    draft_vocab: int,
    dtype: jnp.dtype,
    online: Any,
) -> FrozenTarget:
    """Returns the shapes of the frozen target; they stand for the arrays."""
    V, D = target.vocab_size, target.hidden_size
    embed_VD: Any = jax.ShapeDtypeStruct((V, D), dtype)
    head_VD: Any = jax.ShapeDtypeStruct((draft_vocab, D), dtype)
    scored_V: Any = jax.ShapeDtypeStruct((V,), bool)
    vocabulary = None
    if draft_vocab < V and asks_for_scored(spec, [stage]):
        vocabulary = Vocabulary(embed_VD, scored_V)
    return FrozenTarget(embed_VD, head_VD, online, None if online is None else target, vocabulary)


def _not_read(beside: dict[str, Any], frozen: FrozenTarget) -> dict[str, Any]:
    """Drops the tables that the step already holds.

    The step holds the target's own tables, unless they are reduced to hot tokens.
    """
    tables = {"embed_VD": frozen.embed_VD, "head_VD": frozen.head_VD}
    return {
        key: x for key, x in beside.items() if key not in tables or x.shape != tables[key].shape
    }


def _compiled(lowered: Any) -> tuple[int | None, int | None, str]:
    """Returns bytes of temporaries, bytes in total, and an empty message.

    If the step does not fit: None, None and the compiler's message.
    """
    try:
        with hidden_warnings():
            memory = lowered.compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None, None, first_line(error)
    total = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )
    return memory.temp_size_in_bytes, total, ""


def batch_shapes(config: Config, spec: DraftSpec) -> Batch:
    """Returns the shapes of a loader's batch in which every row is full and supervised."""
    L, stored = config.train.row_tokens, config.data.states_dtype or config.target.dtype
    # One channel is enough: the loader copies states.
    narrow_L1 = np.zeros((L, 1), jnp.dtype(stored))
    full = [Row([0] * L, [True] * L)] * config.train.batch
    made = BatchLoader(
        full, [narrow_L1] * len(full), batch=len(full), row_tokens=L, seed=0
    ).batch_at(0)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), made)
    states = jax.ShapeDtypeStruct((len(full), L, spec.input_width), narrow_L1.dtype)
    targets = jax.ShapeDtypeStruct((len(full), L, spec.target_width), narrow_L1.dtype)
    scale = jax.ShapeDtypeStruct((len(full), L), jnp.float32) if stored == "int8" else None
    return shapes._replace(
        inputs_BLI=states, targets_BLD=targets if spec.taps else None, scale_BL=scale
    )


def row_flops(spec: DraftSpec, stage: StageConfig, vocab: int, L: int, T: int) -> float:
    """Counts the operations of one row's matrix products (method.md 3, 4.5b and 8).

    The row has L states and T queries that all enter the loss; see `Objective.flops`.
    """
    return objective_of(spec, stage).flops(spec, stage, vocab, L, T)


def target_flops(spec: TargetSpec, L: int) -> float:
    """Counts the operations of the target's forward pass over one row of L tokens.

    Matrix products only, without the head.
    """
    per_token = 2 * sum(
        math.prod(shape)
        for path, shape in param_table(spec).values()
        if path[0] == "layers" and len(shape) == 2
    )
    return L * per_token + spec.num_layers * 2 * 2 * L * L * spec.num_heads * spec.head_dim


def _bytes(tree: Any) -> int:
    """Bytes on the device that holds the most."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )
