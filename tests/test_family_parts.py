"""Each part of each family against transformers' module of it, on that module's own inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from family_cases import each_family, family  # noqa: F401  (the fixture)

from beagle_jax.model import target as target_module
from beagle_jax.model.joined import separated
from beagle_jax.model.masks import causal_mask
from beagle_jax.model.target import embed

B, T = 2, 16


def _torch_parts(model, tokens_BT):
    """Returns input and output of each layer's modules: name -> (in, out)."""
    seen = {}

    def record(name):
        def hook(_, args, named, out):
            first = args[0] if args else named["hidden_states"]
            seen[name] = (first, out[0] if isinstance(out, tuple) else out)

        return hook

    parts = {"embedding": model.model.embed_tokens}
    for index, layer in enumerate(model.model.layers):
        named = {
            # OLMo 2 and 3 and EXAONE 4 have norms on outputs alone
            "norm": getattr(layer, "input_layernorm", layer.post_attention_layernorm),
            "attention": layer.self_attn,
            "mlp": layer.mlp,
            "block": layer,
        }
        parts |= {f"{name} {index}": module for name, module in named.items()}
    hooks = [
        module.register_forward_hook(record(name), with_kwargs=True)
        for name, module in parts.items()
    ]
    with torch.no_grad():
        model.model(torch.from_numpy(tokens_BT))
    for hook in hooks:
        hook.remove()
    return {name: (x.numpy(), out.numpy()) for name, (x, out) in seen.items()}


def _our_parts(spec, params, inputs):
    """Returns our outputs [B, T, D] of the same parts from the same inputs."""
    positions_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
    masks = target_module._layer_masks(spec, positions_BT, causal_mask(jnp.full(B, T), T), None)
    rotary = target_module._layer_rotary(spec, positions_BT)

    def columns(x_BTD):
        return jnp.asarray(x_BTD).reshape(B * T, -1).T

    def rows(x_DM):
        return x_DM.T.reshape(B, T, -1)

    out = {"embedding": embed(params["embed_VD"], inputs["embedding"], spec.embed_scale)}
    for index, layer in enumerate(params["layers"]):

        def at(name, index=index):
            return columns(inputs[f"{name} {index}"])

        around = ((B, T), rotary[index], None, *masks[index])
        weight_D = layer["input_norm_D" if spec.pre_norms else "after_attention_norm_D"]
        out[f"norm {index}"] = rows(target_module._norm(spec, at("norm"), weight_D, axis=0))
        out[f"attention {index}"] = rows(
            target_module._attention(layer, spec, at("attention"), *around)[0]
        )
        out[f"mlp {index}"] = rows(target_module._mlp(layer, spec, at("mlp"), B * T))
        out[f"block {index}"] = rows(target_module._block(layer, spec, at("block"), *around)[0])
    return out


def _differences(pair, change=lambda spec, params: (spec, params)):
    model, target = pair
    spec, params = change(target.spec, target.params)
    expected = _torch_parts(model, np.random.default_rng(3).integers(0, spec.vocab_size, (B, T)))
    outputs = jax.jit(lambda params, inputs: _our_parts(spec, params, inputs))(
        params, {name: x for name, (x, _) in expected.items()}
    )
    assert outputs.keys() == expected.keys()
    # Rounding grows with what is rounded: above 25 a difference counts as a share of the largest
    # output. Gemma 1's blocks reach 95, and differ by 2e-6 of that.
    scales = {name: max(1.0, float(np.abs(out).max()) / 25) for name, (_, out) in expected.items()}
    return {
        name: float(np.abs(outputs[name] - out).max()) / scales[name]
        for name, (_, out) in expected.items()
    }


@each_family
def test_each_part_equals_torch(family):
    assert max(_differences(family).values()) < 1e-4


@each_family
def test_rope_equals_torch(family):
    model, target = family
    positions_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
    for index, tables in enumerate(target_module._layer_rotary(target.spec, positions_BT)):
        if tables is None:  # SmolLM3 and EXAONE 4 rotate some layers only; logits compare which
            assert index in target.spec.unrotated
            continue
        kind = (model.config.layer_types[index],) if target.spec.local_rope_theta else ()
        expected = model.model.rotary_emb(
            torch.zeros(1), torch.from_numpy(np.array(positions_BT)), *kind
        )
        for ours, theirs in zip(tables, expected, strict=True):
            np.testing.assert_allclose(ours[:, 0, 0], theirs.numpy(), atol=1e-5)


@pytest.mark.parametrize("family", ["gemma 3"], indirect=True)
def test_planted_bug_shows_in_its_part_alone(family):
    first, *rest = separated(family[1].params)["layers"]
    shifted = {**first, "up_FD": jnp.roll(first["up_FD"], 1, axis=0)}
    differences = _differences(
        family, lambda spec, params: (spec, {**params, "layers": [shifted, *rest]})
    )
    assert {name for name, difference in differences.items() if difference > 1e-3} == {
        "mlp 0",
        "block 0",
    }
