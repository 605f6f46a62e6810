"""Train step of a stage: a pure function, jitted once, with sharded and donated state."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from beagle_jax.arrays import AnyArray
from beagle_jax.config import StageConfig, TrainConfig
from beagle_jax.data.loader import Batch
from beagle_jax.data.state_records import apart
from beagle_jax.data.target_forward import states_at
from beagle_jax.model.draft import DraftSpec
from beagle_jax.model.packing import of_row, places, queries
from beagle_jax.model.target import FINAL
from beagle_jax.sharding import gathered, rows, shardings, whole
from beagle_jax.training.frozen import FrozenTarget, Vocabulary
from beagle_jax.training.kinds import objective_of
from beagle_jax.training.losses import Outputs, Terms, is_scored, over_vocabulary
from beagle_jax.training.objective import Objective
from beagle_jax.training.predicting import Predicted, RowArrays, predicted

# Agreement is measured within the draft's top 1, 4 and 10; the paper's figures show 4 and 10.
AGREE_WITHIN = (1, 4, 10)
# Root mean square of an AdamW update, divided by the learning rate (optax.contrib.muon,
# consistent_rms).
_ADAMW_RMS = 0.2


class TrainState(NamedTuple):
    """State that a train step updates."""

    params: dict[str, jax.Array]
    opt_state: optax.OptState
    step: jax.Array  # int32, batches seen in this stage
    ema: dict[str, jax.Array] | None = None  # moving average of `params` (`train.ema`)


def exported(state: TrainState) -> dict[str, jax.Array]:
    """Returns the weights that are measured and exported: their average, or the last ones."""
    return state.params if state.ema is None else state.ema


class Accumulated(NamedTuple):
    """Optimizer state between two updates if several batches form one (`train.accumulate`)."""

    inner: optax.OptState
    gradient: dict[str, jax.Array]  # of the objective, summed over batches since the last update
    supervised: jax.Array  # supervised tokens of these batches; divides the sum, once


class Metrics(NamedTuple):
    """Sums over a batch; divide by a count once, at the end.

    J is the window offset (early stage) or the draft step (late stage).
    """

    ploss: jax.Array  # `train.loss` (soft cross-entropy by default), unweighted
    vloss: jax.Array  # smooth-L1, unweighted
    objective: jax.Array  # what is minimised, before the division by `supervised`
    supervised: jax.Array  # supervised tokens of the batch: the divisor of the loss
    count_J: jax.Array  # predictions that entered the loss
    # of these, predictions with the target's most likely token in the draft's top AGREE_WITHIN[k]
    agree_JK: jax.Array
    grad_norm: jax.Array  # before clipping; of the batches since the last update


def make_optimizer(config: TrainConfig, stage: StageConfig) -> optax.GradientTransformation:
    """Builds AdamW or Muon with clipping by global norm and a schedule (method.md 5.4).

    The learning rate follows `learning_rates`. Weight decay is applied to matrices only: norm
    weights and biases are not pulled to zero.
    """
    by_batch = learning_rates(stage)

    def schedule(updates: jax.Array) -> jax.Array:
        return by_batch(updates * config.accumulate, config.accumulate)

    if config.optimizer == "adamw":
        # optax.adamw, but that its mask would change the structure of the state in checkpoints
        update = optax.chain(
            optax.scale_by_adam(b1=config.beta1, b2=config.beta2),
            _decay_of_matrices(config.weight_decay),
            optax.scale_by_learning_rate(schedule),
        )
    else:
        # Muon's updates are scaled to AdamW's usual size, so that one learning rate fits both.
        # Norm weights and biases are updated by AdamW.
        update = optax.contrib.muon(
            schedule,
            weight_decay=config.weight_decay,
            consistent_rms=_ADAMW_RMS,
            adam_b1=config.beta1,
            adam_b2=config.beta2,
            adam_weight_decay=0.0,
        )
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), update)


def learning_rates(stage: StageConfig) -> Callable[[Any, int], jax.Array]:
    """Returns the learning rate of an update, from the batches before it and those that it sums.

    A linear warm-up, which the first update already is a step of and which its last update ends at
    the peak; then constant, a cosine to zero over the rest of the stage, or (`wsd`) constant up to
    a linear end over the last `ending` batches. The last update's rate is never zero.
    """
    after = stage.steps - stage.warmup
    if stage.schedule == "cosine":
        rest = optax.cosine_decay_schedule(1.0, max(after, 1))
    elif stage.schedule == "wsd":
        rest = optax.linear_schedule(1.0, 0.0, stage.ending, max(after - stage.ending, 0))
    else:
        rest = optax.constant_schedule(1.0)

    def rate(before: Any, batches: int = 1) -> jax.Array:
        warm = jnp.minimum(1.0, (before + batches) / max(stage.warmup, 1))
        return stage.learning_rate * warm * rest(jnp.maximum(before - stage.warmup, 0))

    return rate


def _decay_of_matrices(weight_decay: float) -> optax.GradientTransformation:
    def decayed(update: jax.Array, param: jax.Array) -> jax.Array:
        return update + weight_decay * param if param.ndim > 1 else update

    return optax.stateless(lambda updates, params: jax.tree.map(decayed, updates, params))


def add_noise(
    states_BLD: jax.Array, length_BC: AnyArray, config: TrainConfig, key: jax.Array
) -> jax.Array:
    """Adds training noise to states used as keys and values (method.md 3.3).

    The states that the loss compares with get no noise.
    """
    if config.noise == "none":
        return states_BLD
    if config.noise == "gaussian":
        return states_BLD + config.noise_scale * jax.random.normal(
            key, states_BLD.shape, states_BLD.dtype
        )
    # Shorter chats get more noise, up to that of `noise_shortest` tokens (method.md 3.3).
    length_BL = of_row(length_BC, places(states_BLD.shape[1], length_BC).chat_BX)
    width_BL1 = (config.noise_scale * 512 / jnp.maximum(length_BL, config.noise_shortest))[
        ..., None
    ]
    return states_BLD + width_BL1 * (
        jax.random.uniform(key, states_BLD.shape, states_BLD.dtype) - 0.5
    )


def _noisy_inputs(spec: DraftSpec, batch: Batch, config: TrainConfig, key: jax.Array) -> jax.Array:
    """Adds noise to what the draft reads; beside the states, streams get none (method.md 15).

    Noise prepares a draft for its own predictions, which have no streams.
    """
    h_BLI = jnp.asarray(batch.inputs_BLI)
    beside = len(spec.streams) * spec.target_width if FINAL in spec.taps else 0
    noisy = add_noise(h_BLI[..., beside:], batch.length_BC, config, key)
    return jnp.concatenate([h_BLI[..., :beside], noisy], axis=-1) if beside else noisy


def stage_loss(
    params: dict[str, jax.Array],
    spec: DraftSpec,
    config: TrainConfig,
    stage: StageConfig,
    objective: Objective,
    frozen: FrozenTarget,
    batch: Batch,
    key: jax.Array,
    mesh: Mesh,
    vocabulary: Vocabulary | None = None,
) -> tuple[jax.Array, Metrics]:
    """Computes the loss and the metrics of a batch (method.md 3.2, 4.2).

    L = sum of beta (ploss + vloss_weight * vloss) over supervised predictions / supervised tokens.
    The objective sets beta (`Prediction.weight_Y`; the late stage's by draft step, in
    `objective.by_step`) and adds both losses (`Objective.terms`). Training takes the gradient of
    the sum and divides later, in `updated`.

    vocabulary: tokens that loss and agreement are over, at all supervised positions; None: those
    that the draft scores, at the positions that the objective counts.
    """
    dtype = compute_dtype(config, mesh)
    params = gathered(_computed(params, dtype), mesh)
    noise_key, offset_key = jax.random.split(key)
    offset = jax.random.randint(offset_key, (), 0, stage.window)
    true_BLD = jnp.asarray(batch.predicted_BLD)
    h_BLI = _noisy_inputs(spec, batch, config, noise_key).astype(dtype)
    counted_BT = jnp.asarray(batch.counted_BT)
    if objective.only_scored and frozen.vocabulary is not None and vocabulary is None:
        slot_BT = queries(counted_BT.shape[1], batch.length_BC, batch.first_BC).slot_BT
        true_BTD = of_row(true_BLD, slot_BT)
        counted_BT = _scored(frozen.vocabulary, true_BTD, counted_BT, config.loss_rows, mesh)
    out = predicted(
        params,
        spec,
        stage,
        objective,
        spec.embedding(params, frozen.embed_VD),
        h_BLI,
        RowArrays(batch.tokens_BL, true_BLD, counted_BT, batch.length_BC, batch.first_BC),
        offset,
        remat=config.remat == "block",
        mesh=mesh,
    )
    outputs = Outputs(
        out.state_MD,
        spec.final_norm(params, out.state_MD),
        out.true_MD,
        out.counted_M,
        spec.head(params, frozen.head_VD),
        frozen.head_VD,
    )
    terms = objective.terms(outputs, config, mesh)
    if vocabulary is not None:
        terms = over_vocabulary(terms, outputs, vocabulary, config, mesh)
    metrics = _summed(out, terms, jnp.sum(counted_BT))
    return metrics.objective / (metrics.supervised + 1e-5), metrics


def compute_dtype(config: TrainConfig, mesh: Mesh) -> jnp.dtype:
    """Returns the dtype of the draft's products and activations on the mesh (`train.dtype`)."""
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    return jnp.dtype(config.dtype or ("float32" if on_cpu else "bfloat16"))


def _computed(params: dict[str, jax.Array], dtype: jnp.dtype) -> dict[str, jax.Array]:
    """Casts matrices before devices exchange their parts; vectors are cast where they are used."""
    return {name: x.astype(dtype) if x.ndim > 1 else x for name, x in params.items()}


def _scored(
    vocabulary: Vocabulary, true_BTD: jax.Array, counted_BT: jax.Array, chunk: int, mesh: Mesh
) -> jax.Array:
    """Keeps the counted queries [B, T] whose most likely next token the draft scores."""
    true_MD = true_BTD.reshape(-1, true_BTD.shape[-1])
    scored_M = is_scored(vocabulary, true_MD, counted_BT.reshape(-1), chunk, mesh)
    return scored_M.reshape(counted_BT.shape)


def _summed(out: Predicted, terms: Terms, supervised: jax.Array) -> Metrics:
    """Sums the terms of all predictions, each with the weight that the objective gave it."""
    agree_KM = [out.counted_M & (terms.rank_M < within) for within in AGREE_WITHIN]

    def by_group(x_M: jax.Array) -> jax.Array:
        return jnp.sum(x_M[:, None] & out.group_MJ, axis=0)

    return Metrics(
        ploss=jnp.sum(terms.ploss_M),
        vloss=jnp.sum(terms.vloss_M),
        objective=jnp.sum(out.weight_M * terms.total_M),
        supervised=supervised,
        count_J=by_group(out.counted_M),
        agree_JK=jnp.stack([by_group(agree_M) for agree_M in agree_KM], axis=1),
        grad_norm=jnp.float32(0),
    )


def updated(
    state: TrainState,
    gradient: dict,
    supervised: jax.Array,
    optimizer: optax.GradientTransformation,
    config: TrainConfig,
) -> tuple[TrainState, jax.Array]:
    """Applies or accumulates the gradient of one batch.

    gradient: of the batch's objective, which is a sum. It is divided once, before the update, so
    that batches with more supervised tokens have more weight. Returns the new state and the norm of
    the mean gradient.
    """
    done = state.step + 1

    def mean(total: Any, tokens: jax.Array) -> Any:
        return jax.tree.map(lambda x: x / (tokens + 1e-5), total)

    def change(
        opt_state: optax.OptState, total: Any, tokens: jax.Array
    ) -> tuple[Any, Any, optax.OptState]:
        updates, opt_state = optimizer.update(mean(total, tokens), opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return params, averaged(state.ema, params, done // config.accumulate, config), opt_state

    if config.accumulate == 1:
        params, ema, opt_state = change(state.opt_state, gradient, supervised)
        norm = optax.tree.norm(mean(gradient, supervised))
        return TrainState(params, opt_state, done, ema), norm
    held: Accumulated = state.opt_state
    total, tokens = optax.tree.add(held.gradient, gradient), held.supervised + supervised

    def full() -> tuple[Any, Any, Accumulated]:
        params, ema, inner = change(held.inner, total, tokens)
        return params, ema, Accumulated(inner, optax.tree.zeros_like(total), jnp.zeros_like(tokens))

    def waiting() -> tuple[Any, Any, Accumulated]:
        return state.params, state.ema, Accumulated(held.inner, total, tokens)

    params, ema, opt_state = jax.lax.cond(done % config.accumulate == 0, full, waiting)
    return TrainState(params, opt_state, done, ema), optax.tree.norm(mean(total, tokens))


def averaged(
    ema: dict[str, jax.Array] | None,
    params: dict[str, jax.Array],
    updates: jax.Array,
    config: TrainConfig,
) -> dict[str, jax.Array] | None:
    """Returns the moving average after an update that gave `params`; None without `train.ema`.

    Early averages forget faster, min(ema, (1 + n) / (10 + n)) after n updates, so that the first
    weights do not stay in them.
    """
    if ema is None or config.ema is None:
        return None
    keep = jnp.minimum(config.ema, (1 + updates) / (10 + updates))
    return jax.tree.map(lambda old, new: keep * old + (1 - keep) * new, ema, params)


def with_states(frozen: FrozenTarget, batch: Batch, taps: tuple[int, ...] = ()) -> Batch:
    """Returns the batch with the target's states, in the target's dtype.

    Computes the states with `frozen.model` if the batch has none (`data.states: online`). taps:
    layers of the target that the draft reads (`DraftSpec.taps`).
    """
    if batch.inputs_BLI is not None:
        batch = batch.scaled()
        dtype = frozen.embed_VD.dtype
        cast = jax.tree.map(lambda x: jnp.asarray(x, dtype), (batch.inputs_BLI, batch.targets_BLD))
        return batch._replace(inputs_BLI=cast[0], targets_BLD=cast[1])
    assert frozen.model is not None and frozen.spec is not None  # `data.states: online`
    with jax.named_scope("target"):
        states_BLI = states_at(frozen.model, frozen.spec, batch.tokens_BL, batch.length_BC, taps)
    inputs_BLI, targets_BLD = apart(states_BLI, taps)
    return batch._replace(inputs_BLI=inputs_BLI, targets_BLD=targets_BLD)


def make_steps(
    spec: DraftSpec, config: TrainConfig, stage: StageConfig, mesh: Mesh
) -> tuple[
    Callable[..., tuple[TrainState, Metrics]], Callable[..., Metrics], Callable[[Any], TrainState]
]:
    """Builds (train step, eval step, initial state from a copy of parameters) of one stage.

    The train step takes (state, frozen, batch, seed) and donates the state. Its randomness depends
    on seed and step only. The state is created sharded and keeps its shardings; `frozen` keeps
    those that the caller gave it (sharding.place). Batches contain the target's states, or
    `frozen.model` computes them.
    """
    objective = objective_of(spec, stage)
    optimizer = make_optimizer(config, stage)

    # Evaluation uses no noise: it reads the same states as decoding.
    clean = config.changed(noise="none")

    def loss(
        params: dict[str, jax.Array], frozen: FrozenTarget, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        metrics = stage_loss(params, spec, config, stage, objective, frozen, batch, key, mesh)[1]
        return metrics.objective, metrics

    def train_step(
        state: TrainState, frozen: FrozenTarget, batch: Batch, seed: int
    ) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        gradient, metrics = jax.grad(loss, has_aux=True)(
            state.params, frozen, with_states(frozen, batch, spec.taps), key
        )
        state, grad_norm = updated(state, gradient, metrics.supervised, optimizer, config)
        return state, metrics._replace(grad_norm=grad_norm)

    def eval_step(params: dict[str, jax.Array], frozen: FrozenTarget, batch: Batch) -> Metrics:
        batch = with_states(frozen, batch, spec.taps)
        of_batch = (spec, clean, stage, objective, frozen, batch, jax.random.key(0), mesh)
        return stage_loss(params, *of_batch, frozen.vocabulary)[1]

    def init(params: dict[str, jax.Array]) -> TrainState:
        return _first_state(params, optimizer, config)

    shapes = spec.param_shapes().items()
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes}
    where = shardings(jax.eval_shape(init, params), mesh)
    inputs, outputs = (where, None, rows(mesh), None), (where, whole(mesh))
    return (
        jax.jit(train_step, donate_argnums=0, in_shardings=inputs, out_shardings=outputs),
        jax.jit(
            eval_step, in_shardings=(where.params, None, rows(mesh)), out_shardings=whole(mesh)
        ),
        jax.jit(init, out_shardings=where),
    )


def _first_state(
    params: Any, optimizer: optax.GradientTransformation, config: TrainConfig
) -> TrainState:
    """Builds the initial state from a copy of the parameters."""
    opt_state = optimizer.init(params)
    if config.accumulate > 1:
        opt_state = Accumulated(opt_state, optax.tree.zeros_like(params), jnp.int32(0))
    ema = None if config.ema is None else jax.tree.map(jnp.copy, params)
    return TrainState(jax.tree.map(jnp.copy, params), opt_state, jnp.int32(0), ema)
