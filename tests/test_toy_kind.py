"""A kind of draft that only this file defines trains, is saved and is loaded.

It predicts a state from the last token and from streams of the target, without attention. It has
its own embedding, norm and head.
"""

import json
from dataclasses import dataclass
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ONE_DEVICE, TINY
from jax.sharding import PartitionSpec as P
from step_cases import CLEAN, EARLY, LATE, three_rows

from beagle_jax.data.target_forward import states_in_memory
from beagle_jax.errors import UsageError, UserError
from beagle_jax.model.draft import DraftSpec
from beagle_jax.model.kinds import KINDS, Kind, fresh_params
from beagle_jax.model.layers import rms_norm
from beagle_jax.model.packing import of_row
from beagle_jax.model.target import TargetSpec
from beagle_jax.sharding import shardings
from beagle_jax.training.frozen import FrozenTarget
from beagle_jax.training.kinds import OBJECTIVES
from beagle_jax.training.losses import Outputs, Terms, distribution_and_state
from beagle_jax.training.objective import Inputs, Objective, Prediction
from beagle_jax.training.step import make_steps
from beagle_jax.weights.draft import Draft, load_draft, save_draft
from beagle_jax.weights.kinds import FILES, KindFiles, torch_form

V, D = TINY.vocab_size, TINY.hidden_size


@dataclass(frozen=True, kw_only=True)
class ToySpec(DraftSpec):
    """It reads the embedding and the stream that leaves layer 1 of the target."""

    kind: ClassVar[str] = "toy"
    model_type: ClassVar[str] = "toy_draft"

    axes: ClassVar[dict[str, tuple[str | None, ...]]] = {"mix": ("model", "inner")}

    vocab_size: int
    streams: tuple[int, ...] = (0, 2)

    @property
    def taps(self) -> tuple[int, ...]:
        return self.streams

    @classmethod
    def from_target(cls, spec: TargetSpec, init_std: float = 0.02) -> "ToySpec":
        return cls(hidden_size=spec.hidden_size, vocab_size=spec.vocab_size)

    def param_shapes(self) -> dict[str, tuple[int, ...]]:
        width = self.hidden_size * (1 + len(self.streams))
        table = (self.vocab_size, self.hidden_size)
        norm = (self.hidden_size,)
        return {"mix": (self.hidden_size, width), "embed_VD": table, "head_VD": table, "norm": norm}

    def embedding(self, params: dict[str, jax.Array], target_VD: jax.Array) -> jax.Array:
        return params["embed_VD"]

    def final_norm(self, params: dict[str, jax.Array], state_BTD: jax.Array) -> jax.Array:
        return rms_norm(state_BTD, params["norm"], 1e-5)

    def head(self, params: dict[str, jax.Array], target_VD: jax.Array) -> jax.Array:
        return params["head_VD"]


class ToyBlock(nn.Module):
    spec: ToySpec

    def setup(self) -> None:
        for name, shape in self.spec.param_shapes().items():
            setattr(self, name, self.param(name, nn.initializers.normal(0.3), shape))

    def __call__(self, e_BTD: jax.Array, before_BTI: jax.Array) -> jax.Array:
        """Predicts states from tokens and from what the draft reads before them."""
        return jnp.concatenate([e_BTD, before_BTI], axis=-1) @ self.mix.T


def init_toy(spec: ToySpec, key: jax.Array) -> dict[str, jax.Array]:
    e_BTD = jnp.zeros((1, 1, D))
    return ToyBlock(spec).init(key, e_BTD, jnp.zeros((1, 1, D * len(spec.taps))))["params"]


def predict_toy(params, spec: ToySpec, stage: Any, of: Inputs, offset: Any) -> Prediction:
    e_BTD = of.embedded(of_row(of.tokens_BL, of.slot_BT))
    before_BTI = of_row(of.h_BLI, of.slot_BT - 1)
    state_BTD = ToyBlock(spec).apply({"params": params}, e_BTD, before_BTI)
    B, T = of.slot_BT.shape
    query_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
    return Prediction(state_BTD, query_BT, of.slot_BT > 0, 0 * query_BT, jnp.ones(T), 1)


def own_head_loss(outputs: Outputs, config: Any, mesh: Any) -> Terms:
    """Cross-entropy through two heads."""
    p_MV = jax.nn.softmax(outputs.true_MD @ outputs.head_VD.T)
    logits_MV = outputs.normed_MD @ outputs.draft_head_VD.T
    loss_M = -jnp.sum(p_MV * jax.nn.log_softmax(logits_MV), axis=-1)
    loss_M = jnp.where(outputs.counted_M, loss_M, 0.0)
    best_M1 = jnp.take_along_axis(logits_MV, p_MV.argmax(axis=-1)[:, None], axis=-1)
    return Terms(loss_M, 0 * loss_M, loss_M, jnp.sum(logits_MV > best_M1, axis=-1))


def toy_flops(spec: ToySpec, stage: Any, vocab: int, L: int, T: int) -> float:
    return 3 * 2 * T * D * (D * (1 + len(spec.taps)) + vocab)


@pytest.fixture
def toy(monkeypatch) -> ToySpec:
    """Registers the kind in each layer of the package while a test runs."""
    objective = Objective(predict_toy, toy_flops, own_head_loss)
    names = {"mix": "mix.weight", "embed_VD": "embed_tokens.weight"}
    names |= {"head_VD": "lm_head.weight", "norm": "norm.weight"}
    monkeypatch.setitem(KINDS, ToySpec.kind, Kind(ToySpec, ToyBlock, init_toy))
    monkeypatch.setitem(OBJECTIVES, ToySpec.kind, {"early": objective})
    monkeypatch.setitem(FILES, ToySpec.kind, KindFiles(names))
    return ToySpec.from_target(TINY)


def tapped_batch(params: dict[str, Any], spec: ToySpec):
    """Makes rows of text with what the draft reads of the target and what it predicts."""
    batch = three_rows(3, 3, 3)
    states_BLI = states_in_memory(params, TINY, batch.tokens_BL, batch.length_BC, spec.taps)
    return batch._replace(inputs_BLI=states_BLI[..., :-D], targets_BLD=states_BLI[..., -D:])


@pytest.mark.parametrize("states", ["stored", "online"])
def test_it_trains_with_all_that_it_owns(toy, tiny_params, states):
    params = fresh_params(toy, jax.random.key(3))
    step, evaluate, init = make_steps(toy, CLEAN, EARLY, ONE_DEVICE)
    frozen = FrozenTarget(tiny_params["embed_VD"], tiny_params["embed_VD"], tiny_params, TINY)
    stored = tapped_batch(tiny_params, toy)
    batch = stored
    if states == "online":
        batch = stored._replace(inputs_BLI=None, targets_BLD=None)
    before = evaluate(params, frozen, batch)
    # 1e-5: the same rows, stored and computed in the step
    expected = evaluate(params, frozen, stored).objective
    np.testing.assert_allclose(before.objective, expected, rtol=1e-5)
    state = init(params)
    for _ in range(10):
        state, metrics = step(state, frozen, batch, 42)
    assert evaluate(state.params, frozen, batch).objective < before.objective
    assert set(state.params) == {"mix", "embed_VD", "head_VD", "norm"}
    for name, array in state.params.items():
        assert not np.array_equal(array, params[name]), f"{name} was not trained"
    assert float(metrics.supervised) == batch.counted_BT.sum()


def test_it_is_split_as_it_says(toy, monkeypatch):
    """Over a mesh: arrays without a declared axis stay whole.

    So do all arrays of an unknown kind.
    """
    mesh = jax.sharding.AbstractMesh((1, 2, 4), ("data", "fsdp", "tensor"))
    params = jax.eval_shape(lambda: fresh_params(toy, jax.random.key(3)))
    assert {name: x.spec for name, x in shardings(params, mesh).items()} == {
        "mix": P("fsdp", "tensor"),
        "embed_VD": P(None, None),  # 61 tokens are not divisible
        "head_VD": P(None, None),
        "norm": P(),
    }
    monkeypatch.delitem(KINDS, "toy")
    assert shardings(params, mesh)["mix"].spec == P()


def test_what_it_reads_is_not_what_it_predicts(toy, tiny_params):
    """Planted: the predicted states in place of those that it reads."""
    params = fresh_params(toy, jax.random.key(3))
    _, evaluate, _ = make_steps(toy, CLEAN, EARLY, ONE_DEVICE)
    frozen = FrozenTarget(tiny_params["embed_VD"], tiny_params["embed_VD"])
    batch = tapped_batch(tiny_params, toy)
    right = evaluate(params, frozen, batch).objective
    for planted in (
        batch._replace(inputs_BLI=np.tile(batch.targets_BLD, 2)),
        batch._replace(targets_BLD=batch.inputs_BLI[..., :D]),
    ):
        assert abs(evaluate(params, frozen, planted).objective / right - 1) > 1e-3


def test_it_is_saved_and_loaded(toy, tmp_path):
    hot_ids = jnp.arange(TINY.vocab_size - 1, -1, -1, jnp.int32)  # one for each row of its head
    draft = Draft(toy, fresh_params(toy, jax.random.key(3)), hot_ids, {"target": "a tiny one"})
    save_draft(tmp_path, draft)
    written = json.loads((tmp_path / "config.json").read_text())
    assert (written["model_type"], written["streams"]) == ("toy_draft", [0, 2])
    loaded = load_draft(tmp_path, TINY)
    assert (loaded.spec, loaded.provenance) == (toy, draft.provenance)
    assert loaded.fingerprint == draft.fingerprint
    for name, array in draft.params.items():
        np.testing.assert_array_equal(loaded.params[name], array)
    with pytest.raises(UserError, match="has no PyTorch form; expected one of beagle, eagle"):
        torch_form("toy")


def test_a_folder_of_a_kind_that_nobody_registered_is_refused(toy, tmp_path, monkeypatch):
    save_draft(tmp_path, Draft(toy, fresh_params(toy, jax.random.key(3)), None, {}))
    monkeypatch.delitem(KINDS, "toy")
    with pytest.raises(UserError, match="model_type is 'toy_draft', expected 'beagle_draft' or"):
        load_draft(tmp_path, TINY)


def test_a_stage_that_it_has_no_objective_for_is_refused(toy):
    with pytest.raises(UsageError, match="kind 'toy' cannot be trained by a stage of objective 'l"):
        make_steps(toy, CLEAN, LATE, ONE_DEVICE)


def test_the_loss_of_a_shared_head_refuses_a_head_that_it_would_not_train(
    toy, tiny_params, monkeypatch
):
    objective = Objective(predict_toy, toy_flops, distribution_and_state)
    monkeypatch.setitem(OBJECTIVES, ToySpec.kind, {"early": objective})
    _, evaluate, _ = make_steps(toy, CLEAN, EARLY, ONE_DEVICE)
    frozen = FrozenTarget(tiny_params["embed_VD"], tiny_params["embed_VD"])
    with pytest.raises(ValueError, match="a head of its own needs a loss of its own"):
        evaluate(fresh_params(toy, jax.random.key(3)), frozen, tapped_batch(tiny_params, toy))
