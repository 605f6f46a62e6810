"""`train.dtype`: which products of a training step are computed in bfloat16, and which are not."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ONE_DEVICE
from step_cases import EARLY, LATE, NOISY, SPEC, three_rows

from beagle_jax.config import StageConfig, TestTimeStage
from beagle_jax.model.beagle import init_draft
from beagle_jax.model.draft import LayerBlock
from beagle_jax.model.layers import rms_norm
from beagle_jax.training import step
from beagle_jax.training.frozen import FrozenTarget
from beagle_jax.training.step import make_steps

DENSE = TestTimeStage(steps=10, learning_rate=1e-3, warmup=0, simulation_steps=2)
STAGES = pytest.mark.parametrize("stage", [EARLY, LATE, DENSE], ids=["early", "late", "test_time"])
HALF = NOISY.changed(dtype="bfloat16")
# Attention's backward pass: the scores' gradient is float32, as the softmax is.
OF_SCORES = ("float32", "bfloat16")


@pytest.fixture(scope="module")
def half(tiny_params) -> FrozenTarget:
    embed_VD = tiny_params["embed_VD"].astype(jnp.bfloat16)
    return FrozenTarget(embed_VD, embed_VD[:4])


def equations(jaxpr: Any) -> Iterator[Any]:
    """Yields the equations of a jaxpr and of all that it calls."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(value):
                yield from equations(getattr(value, "jaxpr", value))


def _is_jaxpr(value: Any) -> bool:
    return hasattr(value, "eqns") or hasattr(value, "jaxpr")


def traced(config, stage: StageConfig, frozen: FrozenTarget) -> list[Any]:
    """Returns the equations of a training step with its gradient and update."""
    train_step, _, init = make_steps(SPEC, config, stage, ONE_DEVICE)
    state = init(init_draft(SPEC, jax.random.key(0)))
    made = jax.make_jaxpr(lambda state: train_step(state, frozen, three_rows(3, 3, 3), 42))(state)
    return list(equations(made.jaxpr))


def operands(equations_: list[Any]) -> Counter[tuple[str, ...]]:
    """Counts products by the dtypes of what is multiplied."""
    products = [e for e in equations_ if e.primitive.name == "dot_general"]
    return Counter(tuple(str(x.aval.dtype) for x in e.invars) for e in products)


@STAGES
def test_every_product_reads_bfloat16(stage, half):
    counted = operands(traced(HALF, stage, half))
    assert counted.keys() <= {("bfloat16", "bfloat16"), OF_SCORES}
    assert counted[OF_SCORES] < counted["bfloat16", "bfloat16"] / 4


@STAGES
def test_norms_softmax_loss_and_optimizer_are_float32(stage, half):
    made = traced(HALF, stage, half)
    for name in ("rsqrt", "exp", "log", "sqrt"):
        dtypes = {str(e.invars[0].aval.dtype) for e in made if e.primitive.name == name}
        assert dtypes <= {"float32"}, name
    assert {"rsqrt", "exp", "sqrt"} <= {e.primitive.name for e in made}


def test_planted_bug_float32_norm_weights_widen_the_products_after_them(half, monkeypatch):
    """What version 0.1.0 did: Q, gate, up and down were float32 beside bfloat16 K, V and O."""

    def widening(self, name, x_BTD):
        return rms_norm(x_BTD, getattr(self, name), self.spec.rms_norm_eps)

    monkeypatch.setattr(LayerBlock, "_norm", widening)
    assert ("float32", "float32") in operands(traced(HALF, EARLY, half))


@STAGES
def test_float32_is_the_default_on_a_cpu_and_bfloat16_close_to_it(stage, half):
    assert step.compute_dtype(NOISY, ONE_DEVICE) == jnp.float32
    metrics = {}
    for dtype in ("float32", "bfloat16", None):
        train_step, _, init = make_steps(SPEC, NOISY.changed(dtype=dtype), stage, ONE_DEVICE)
        state, metrics[dtype] = train_step(
            init(init_draft(SPEC, jax.random.key(0))), half, three_rows(3, 3, 3), 42
        )
        assert {x.dtype for x in state.params.values()} == {jnp.dtype("float32")}  # masters
    assert metrics[None].objective == metrics["float32"].objective
    loss, wide = (float(metrics[dtype].objective) for dtype in ("bfloat16", "float32"))
    # bfloat16 has 8 bits: each activation is off by up to 0.4 %.
    assert loss == pytest.approx(wide, rel=5e-3) and loss != wide


def test_on_accelerators_the_default_is_bfloat16():
    class Accelerated:
        devices = np.array([type("Device", (), {"platform": "tpu"})()])

    assert step.compute_dtype(NOISY, Accelerated()) == jnp.bfloat16
    assert step.compute_dtype(NOISY.changed(dtype="float32"), Accelerated()) == jnp.float32
