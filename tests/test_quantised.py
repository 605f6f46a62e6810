"""Weight-only quantisation: the numbers, decoding with them, and reported memory and error."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, slow_but
from decode_cases import naive_greedy, random_draft, target_of
from gguf_files import llama_tensors, write_llama
from test_loading import MOE
from weight_cases import Held

from beagle_jax import evaluate, generate
from beagle_jax.config import TargetConfig
from beagle_jax.decoding.decoder import SpeculativeDecoder
from beagle_jax.decoding.tree import dynamic_tree
from beagle_jax.errors import UserError, run_main
from beagle_jax.model.joined import separate_layer
from beagle_jax.model.masks import causal_mask
from beagle_jax.model.quantised import Quantised, dense, pick, quantise, quantise_layer
from beagle_jax.model.target import forward, logits
from beagle_jax.model.tensors import ARRAYS, param_table
from beagle_jax.weights.quantiser import Quantiser
from beagle_jax.weights.target import configured_target, fill_params, load_target

GROUP = 8


_quantised_layer = jax.jit(quantise_layer, static_argnums=(1, 2))


def _quantised(params, kind, group=GROUP):
    return {
        **params,
        "layers": [_quantised_layer(layer, kind, group) for layer in params["layers"]],
    }


@jax.jit
def _turned_back(params):
    """Returns the parameters with every quantised matrix as plain float32."""

    def turned(x):
        return dense(x, jnp.ones(())) if isinstance(x, Quantised) else x

    return {
        **params,
        "layers": [{key: turned(x) for key, x in layer.items()} for layer in params["layers"]],
    }


@pytest.mark.parametrize(("kind", "largest"), [("int8", 127), ("int4", 7)])
def test_weights_are_rounded_to_the_nearest_step_of_their_group(kind, largest):
    weight = np.random.default_rng(0).standard_normal((6, 24)).astype(np.float32)
    weight[2, :8] = 0  # a group without a scale
    dequantised = np.asarray(dense(quantise(jnp.asarray(weight), kind, 8), jnp.ones(())))
    step = np.repeat(np.abs(weight.reshape(6, 3, 8)).max(axis=-1) / largest, 8, axis=1)
    assert (np.abs(dequantised - weight) <= step / 2 + 1e-6).all()
    np.testing.assert_allclose(
        dequantised, np.round(weight / np.where(step, step, 1)) * step, atol=1e-6
    )
    assert not dequantised[2, :8].any() and np.isfinite(dequantised).all()


def test_planted_bug_halves_of_a_byte_swapped():
    weight = jnp.asarray(np.random.default_rng(0).standard_normal((6, 24)), jnp.float32)
    packed = quantise(weight, "int4", 8)
    swapped = dataclasses.replace(packed, values=(packed.values >> 4) | (packed.values << 4))
    assert (
        float(jnp.abs(dense(packed, weight) - weight).max())
        < 0.3
        < float(jnp.abs(dense(swapped, weight) - weight).max())
    )


def test_int4_takes_half_a_byte_and_stacks_are_picked_from():
    weight = jax.random.normal(jax.random.key(0), (3, 4, 16))
    packed = quantise(weight, "int4", 8)
    assert packed.values.nbytes == weight.size // 2 and packed.scale.shape == (3, 4, 2)
    np.testing.assert_array_equal(dense(pick(packed, 1), weight), dense(packed, weight)[1])


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("spec", [TINY, MOE], ids=["dense", "experts"])
def test_a_quantised_target_computes_with_the_rounded_weights(spec, kind):
    table = {
        name: np.asarray(0.3 * np.random.default_rng(1).standard_normal(shape), np.float32)
        for name, (_, shape) in param_table(spec).items()
    }
    params = _quantised(fill_params(spec, Held(table.items()), jnp.dtype("float32"), "x"), kind)
    tokens_BT = jnp.arange(12)[None] % spec.vocab_size
    run = jax.jit(
        lambda params: (
            forward(
                params, spec, tokens_BT, jnp.arange(12)[None], causal_mask(jnp.array([12]), 12)
            ).states_BTD
        )
    )
    np.testing.assert_allclose(run(params), run(_turned_back(params)), atol=1e-5)
    assert {
        key for layer in params["layers"] for key, x in layer.items() if isinstance(x, Quantised)
    } <= {key for key, array in ARRAYS.items() if array.quantisable}


PROMPTS = [[5, 17, 60, 3], [8], list(range(20))]


@pytest.mark.parametrize("kind", slow_but(["int4"], ["int8", "int4"]))
def test_trees_write_what_plain_decoding_of_the_same_quantised_target_writes(kind):
    whole = target_of()
    target = dataclasses.replace(whole, params=_quantised(whole.params, kind))

    def write(target, *draft):
        return [
            answer.tokens
            for answer in SpeculativeDecoder(target, *draft).generate(PROMPTS, max_new_tokens=24)
        ]

    plain = write(target)
    assert plain == [
        naive_greedy(dataclasses.replace(target, params=_turned_back(target.params)), prompt, 24)
        for prompt in PROMPTS
    ]
    assert write(target, random_draft(), dynamic_tree(3, 2, 6)) == plain
    assert kind == "int8" or plain != write(whole)  # int4 of random weights does change the text


# Loading


def _write(tmp_path) -> str:
    write_llama(tmp_path / "tiny.gguf", llama_tensors())
    return str(tmp_path / "tiny.gguf")


def test_loading_tells_memory_and_error(tmp_path, capsys):
    source = _write(tmp_path)
    whole = load_target(source, "float32", "unused")
    errors = {}
    for kind in ("int8", "int4"):
        target = load_target(source, "float32", "unused", quantize=kind, group_size=16)
        printed = "".join(capsys.readouterr())
        assert (
            f"target quantised to {kind}, groups of 16: " in printed
            and "MB at rest; on 32 random tokens logits are off by" in printed
        )
        assert all(
            isinstance(separate_layer(layer)["q_FD"], Quantised)
            and not isinstance(layer["input_norm_D"], Quantised)
            for layer in target.params["layers"]
        )
        tokens = jax.random.randint(jax.random.key(0), (1, 32), 0, whole.spec.vocab_size)
        at, mask = jnp.arange(32)[None], causal_mask(jnp.array([32]), 32)
        run = jax.jit(
            lambda params, tokens, at, mask: logits(
                params, whole.spec, forward(params, whole.spec, tokens, at, mask).states_BTD
            )
        )
        full, small = (run(params, tokens, at, mask) for params in (whole.params, target.params))
        errors[kind] = float(jnp.sqrt(jnp.mean((small - full) ** 2) / jnp.var(full)))
        assert f"off by {errors[kind]:.1%} of their spread" in printed
        assert (
            f"{sum(x.nbytes for x in jax.tree.leaves(whole.params)) / 1e6:,.0f} MB -> " in printed
        )
    assert 0 < errors["int8"] < errors["int4"]


def test_no_layer_stays_unquantised_while_the_next_is_loaded(tmp_path, monkeypatch):
    taken = []
    real = Quantiser.take

    def take(self, params, index):
        taken.append(
            [sum(isinstance(x, Quantised) for x in layer.values()) for layer in params["layers"]]
        )
        return real(self, params, index)

    monkeypatch.setattr(Quantiser, "take", take)
    source = _write(tmp_path)
    load_target(source, "float32", "unused", quantize="int8", group_size=16, join=False)
    assert taken == [[0, 0], [7, 0]]


def test_what_cannot_be_quantised_is_refused(tmp_path):
    source = _write(tmp_path)
    for group, message in (
        (48, "divide the 64 inputs of model.layers.0.self_attn.q_proj.weight"),
        (1, "must be even"),
    ):
        with pytest.raises(UserError, match=message):
            load_target(source, "float32", "unused", quantize="int8", group_size=group)
    with pytest.raises(UserError, match="is for one device"):
        load_target(
            source,
            "float32",
            "unused",
            jax.sharding.Mesh(np.array(jax.devices()[:1]), ("tensor",)),
            quantize="int8",
            group_size=16,
        )


@pytest.mark.slow
def test_evaluate_and_generate_report_it(tmp_path, capsys):
    """With prompt lookup as the draft, so that nothing is trained."""
    config, figures = tmp_path / "run.yaml", tmp_path / "figures.json"
    prompt = tmp_path / "prompts.jsonl"
    prompt.write_text('{"prompt": "ab"}\n')
    config.write_text(
        json.dumps(
            {
                "target": {"source": _write(tmp_path), "quantize": "int4", "group_size": 16},
                "draft": {"path": "lookup"},
                "decode": {"levels": 2, "max_new_tokens": 4},
                "eval": {"suites": [str(prompt)], "max_new_tokens": 4},
            }
        )
    )
    assert run_main(generate.main, ["--config", str(config), "ab", "--json", str(figures)]) == 0
    quantised = json.loads(figures.read_text())["quantised"]
    assert (
        (quantised["kind"], quantised["group"]) == ("int4", 16)
        and quantised["bytes_after"] < quantised["bytes_before"]
        and quantised["logit_error"] > 0
    )
    line = next(
        line
        for line in capsys.readouterr().err.splitlines()
        if line.startswith("target quantised to int4, groups of 16: ")
    )
    assert run_main(evaluate.main, ["--config", str(config)]) == 0
    assert (
        line.replace("target quantised", "The target, in plain decoding too, is quantised")
        in capsys.readouterr().out
    )
    assert (
        run_main(
            generate.main,
            ["--config", str(config), "ab", "target.quantize=none", "--json", str(figures)],
        )
        == 0
    )
    assert json.loads(figures.read_text())["quantised"] is None


def test_training_takes_the_target_as_it_is():
    with pytest.raises(
        UserError,
        match=r"target.quantize is int4, which is for decoding; set target.quantize=none here",
    ):
        configured_target(TargetConfig(source="nowhere", quantize="int4"), decoding=False)
