"""Float32 products keep all bits on an accelerator, in the programs that need it.

Programs are lowered for a TPU on this machine and read; nothing runs on a TPU.
"""

import re

import jax
import jax.numpy as jnp
import pytest
from conftest import TINY, random_params
from decode_cases import letters, next_stop, random_draft, random_eagle, target_of

from beagle_jax.config import TargetConfig
from beagle_jax.data.target_forward import states_at
from beagle_jax.decoding import engine
from beagle_jax.decoding.decoder import SpeculativeDecoder
from beagle_jax.decoding.sampling import Sampling
from beagle_jax.decoding.tree import chain
from beagle_jax.model.precision import exact, precision_for
from beagle_jax.model.target import causal_layer, forward, logits
from beagle_jax.weights.orbax_target import save_target
from beagle_jax.weights.target import configured_target, load_target

ALL_BITS, AS_IT_IS = {"HIGHEST"}, {"DEFAULT"}


@pytest.fixture
def on_tpu(monkeypatch):
    """Lowers programs for a TPU from here on."""
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")


def _precisions(jitted, *arguments) -> set[str]:
    """Returns the precisions of a program's products."""
    text = jitted.trace(*arguments).lower(lowering_platforms=("tpu",)).as_text()
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert products
    matches = [re.search(r"precision = \[(\w+), (\w+)\]", line) for line in products]
    return {name for match in matches for name in (match.groups() if match else ("DEFAULT",))}


def _states(dtype):
    """Returns the program that computes the states of training text, and its arguments."""
    params = jax.tree.map(lambda x: x.astype(dtype), random_params(TINY))
    jitted = jax.jit(lambda *arguments: states_at(arguments[0], TINY, *arguments[1:]))
    return jitted, params, jnp.zeros((2, 16), jnp.int32), jnp.full((2, 1), 9)


@pytest.mark.parametrize(
    ("dtype", "expected"), [("float32", ALL_BITS), ("bfloat16", AS_IT_IS)], ids=str
)
def test_states(on_tpu, dtype, expected):
    assert _precisions(*_states(dtype)) == expected


def test_on_a_cpu_programs_stay_as_they_are():
    assert _precisions(*_states("float32")) == AS_IT_IS


def test_a_precision_that_the_user_has_set_stands(on_tpu):
    with jax.default_matmul_precision("high"):
        assert _precisions(*_states("float32")) == {"HIGH"}


@pytest.mark.parametrize("make", [random_draft, random_eagle])
@pytest.mark.parametrize("sampling", [Sampling(temperature=0.0), Sampling(temperature=1.0)])
def test_decoding(on_tpu, make, sampling):
    """It has stop tokens of its own, so that its program is traced here."""
    decoder = SpeculativeDecoder(target_of(eos_ids=next_stop()), make(), chain(2))
    now, state = decoder.prefilled([[1, 2, 3]], sampling, max_new_tokens=4)
    assert _precisions(engine.advance, now, state, jnp.int32(2), jnp.int32(1)) == ALL_BITS


def test_what_runs_the_target_one_by_one(on_tpu):
    """Text writing, audits and quantisation use these outside the programs above."""
    params, x_BTD = random_params(TINY), jnp.zeros((1, 4, TINY.hidden_size))
    programs = {
        "logits": jax.jit(lambda params, x_BTD: logits(params, TINY, x_BTD)),
        "layer": jax.jit(lambda params, x_BTD: causal_layer(params["layers"][1], TINY, 1, x_BTD)),
    }
    for name, jitted in programs.items():
        assert _precisions(jitted, params, x_BTD) == ALL_BITS, name


def test_a_program_without_it_is_seen(on_tpu, monkeypatch):
    """Planted: `forward` and what it calls, without the scope."""
    plain = jax.jit(lambda params, *rest: forward.__wrapped__(params, TINY, *rest))
    arguments = jnp.zeros((1, 4), jnp.int32), jnp.arange(4)[None], jnp.ones((1, 4, 4), bool)
    assert _precisions(plain, random_params(TINY), *arguments) == AS_IT_IS


def test_nothing_outside_changes(on_tpu):
    @exact
    def inside(x):
        return jax.config.jax_default_matmul_precision

    before = jax.config.jax_default_matmul_precision
    assert (before, inside(jnp.zeros(2))) == (None, "highest")
    assert jax.config.jax_default_matmul_precision is None


def test_loading_changes_no_setting_of_jax(on_tpu, tmp_path):
    config = {
        "model_type": "llama",
        "vocab_size": TINY.vocab_size,
        "hidden_size": TINY.hidden_size,
        "intermediate_size": TINY.intermediate_size,
        "num_hidden_layers": TINY.num_layers,
        "num_attention_heads": TINY.num_heads,
        "num_key_value_heads": TINY.num_kv_heads,
        "head_dim": TINY.head_dim,
        "tie_word_embeddings": True,
    }
    settings = {"dtype": "float32"}
    save_target(tmp_path, random_params(TINY), config, letters(), (0,), settings)
    before = dict(jax.config.values)
    target = configured_target(TargetConfig(source=str(tmp_path)), decoding=True)
    assert load_target(str(tmp_path), "float32", str(tmp_path)).spec == target.spec
    assert target.dtype == jnp.float32
    assert dict(jax.config.values) == before


@pytest.mark.parametrize(
    ("backend", "dtypes", "expected"),
    [
        ("tpu", ["float32"], "highest"),
        ("gpu", ["float32", "int32", "uint8"], "highest"),
        ("cpu", ["float32"], None),
        ("gpu", ["bfloat16"], None),
        ("gpu", ["bfloat16", "float32"], None),  # a quantised target's scales
        ("gpu", ["int32"], None),
    ],
)
def test_the_choice(monkeypatch, backend, dtypes, expected):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    assert precision_for(map(jnp.dtype, dtypes)) == expected
