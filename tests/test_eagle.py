"""The EAGLE draft against method.md section 8 written in torch, one entry at a time.

The entries' indices are the row's own.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import TINY

from beagle_jax.model.attention import merge_attention, partial_attention
from beagle_jax.model.beagle import BeagleSpec
from beagle_jax.model.eagle import EagleBlock, EagleSpec, init_eagle
from beagle_jax.model.layers import RopeScaling
from beagle_jax.model.masks import causal_mask

LLAMA = dict(hidden_size=4096, num_heads=32, head_dim=128)
LLAMA_2_7B = EagleSpec(
    **LLAMA, intermediate_size=11008, num_kv_heads=32, rope_theta=1e4, rms_norm_eps=1e-6
)
LLAMA_3_8B = EagleSpec(
    **LLAMA,
    intermediate_size=14336,
    num_kv_heads=8,
    rope_theta=5e5,
    rms_norm_eps=1e-5,
    fc_bias=False,
)
SPEC = replace(EagleSpec.from_target(TINY, init_std=0.2), rope_scaling=RopeScaling(2.0))
ROW = 8


@pytest.mark.parametrize(("spec", "count"), [(LLAMA_2_7B, 235_937_792), (LLAMA_3_8B, 251_662_336)])
def test_parameter_count(spec, count):
    """The number of method.md 2.3."""
    shapes = jax.eval_shape(lambda: init_eagle(spec, jax.random.key(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count
    assert {name: leaf.shape for name, leaf in shapes.items()} == spec.param_shapes()


def test_initial_vectors():
    params = init_eagle(SPEC, jax.random.key(0))
    assert not params["fc_bias"].any() and (params["post_attention_layernorm"] == 1).all()


def reference(params, spec: EagleSpec, e_LD, h_LD) -> torch.Tensor:
    """Returns predicted states [L, D] by position, in float64.

    Row i is that of position i; row 0 is zero, as nothing predicts it.
    """
    w = {
        name: torch.tensor(np.asarray(array), dtype=torch.float64) for name, array in params.items()
    }
    e_LD, h_LD = torch.tensor(e_LD).double(), torch.tensor(h_LD).double()
    H, G = spec.head_dim, spec.num_heads // spec.num_kv_heads

    def turn(x, place):
        return torch.view_as_real(
            torch.view_as_complex(torch.stack([x[: H // 2], x[H // 2 :]], -1))
            * torch.polar(
                torch.ones(H // 2).double(),
                place / 2.0 / spec.rope_theta ** (torch.arange(H // 2).double() / (H // 2)),
            )
        ).T.reshape(-1)

    # The state at position p, and the token that was chosen after seeing it.
    fused = [
        w["fc"] @ torch.cat([e_LD[p + 1], h_LD[p]]) + w["fc_bias"] for p in range(len(e_LD) - 1)
    ]
    out = torch.zeros_like(h_LD)
    for p, f in enumerate(fused):
        heads = []
        for n in range(spec.num_heads):
            rows = slice(n // G * H, (n // G + 1) * H)
            q = turn(w["q_proj"][n * H : (n + 1) * H] @ f, p)
            score = (
                torch.stack([q @ turn(w["k_proj"][rows] @ fused[s], s) for s in range(p + 1)])
                / H**0.5
            )
            heads.append(
                score.softmax(0) @ torch.stack([w["v_proj"][rows] @ fused[s] for s in range(p + 1)])
            )
        y = f + w["o_proj"] @ torch.cat(heads)
        z = y / torch.sqrt((y**2).mean() + spec.rms_norm_eps) * w["post_attention_layernorm"]
        out[p + 1] = y + w["down_proj"] @ (
            torch.nn.functional.silu(w["gate_proj"] @ z) * (w["up_proj"] @ z)
        )
    return out


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)
    params = {
        name: jnp.asarray(
            array + 0.3 * rng.standard_normal(array.shape) * (array.ndim == 1), jnp.float32
        )
        for name, array in init_eagle(SPEC, jax.random.key(1)).items()
    }
    e_LD, h_LD = rng.standard_normal((2, ROW, SPEC.hidden_size)).astype(np.float32)
    return params, e_LD, h_LD, reference(params, SPEC, e_LD, h_LD).numpy()


def run(params, e_LD, h_LD, mask_BTT=None, spec=SPEC):
    mask_BTT = causal_mask(jnp.array([ROW - 1]), ROW - 1) if mask_BTT is None else mask_BTT
    return EagleBlock(spec).apply(
        {"params": params}, e_LD[None], h_LD[None], mask_BTT, method="row"
    )[0]


def test_entry_j_predicts_the_state_at_j_plus_1(case):
    params, e_LD, h_LD, expected = case
    np.testing.assert_allclose(run(params, e_LD, h_LD), expected[1:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "bug",
    [
        "no shift",
        "state first",
        "own entry hidden",
        "input norm",
        "no bias",
        "no scaling",
        "later token seen",
    ],
)
def test_planted_bugs(case, bug):
    params, e_LD, h_LD, expected = case
    mask_BTT, spec = causal_mask(jnp.array([ROW - 1]), ROW - 1), SPEC
    if bug == "no shift":
        e_LD = np.roll(e_LD, 1, axis=0)
    elif bug == "state first":
        params = {**params, "fc": jnp.roll(params["fc"], SPEC.hidden_size, axis=1)}
    elif bug == "own entry hidden":
        mask_BTT = mask_BTT & ~jnp.eye(ROW - 1, dtype=bool)[None]
    elif bug == "input norm":
        spec, params = (
            replace(SPEC, input_norm=True),
            {**params, "input_layernorm": jnp.ones(SPEC.hidden_size)},
        )
    elif bug == "no bias":
        spec, params = (
            replace(SPEC, fc_bias=False),
            {name: array for name, array in params.items() if name != "fc_bias"},
        )
    elif bug == "no scaling":
        spec = replace(SPEC, rope_scaling=None)
    else:
        mask_BTT = jnp.ones_like(mask_BTT)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(
            run(params, e_LD, h_LD, mask_BTT, spec), expected[1:], rtol=1e-4, atol=1e-4
        )


def test_only_the_rows_that_may_change_do(case):
    """Token i reaches entries from i - 1 on, and state i entries from i on.

    So predictions change from i on, or from i + 1 on.
    """
    params, e_LD, h_LD, _ = case
    before, place = run(params, e_LD, h_LD), 4
    for name, first in (("token", place), ("state", place + 1)):
        e, h = e_LD.copy(), h_LD.copy()
        (e if name == "token" else h)[place] += 1
        changed = np.abs(run(params, e, h) - before).max(axis=1) > 1e-6
        assert changed.tolist() == [position >= first for position in range(1, ROW)], name


def check_parts(case, late: int = 0, merged=merge_attention) -> None:
    """Compares cached entries and one more, as decoding makes it, with the reference.

    That entry is the root's token fused with the last true state. late: planted, its position.
    """
    params, e_LD, h_LD, expected = case
    block, last = EagleBlock(SPEC).bind({"params": params}), ROW - 2
    f_BTD = block.fuse(e_LD[None, 1:], h_LD[None, :-1])
    cached = block.keys_values(f_BTD[:, :last], jnp.arange(last)[None])
    at = jnp.full((1, 1), last + late)
    own = block.keys_values(f_BTD[:, last:], at)
    q_BKGTH = block.queries(f_BTD[:, last:], at)
    state_BTD = block.predict(
        f_BTD[:, last:],
        merged(partial_attention(q_BKGTH, *cached, True), partial_attention(q_BKGTH, *own, True)),
    )
    np.testing.assert_allclose(state_BTD[0, 0], expected[-1], rtol=1e-4, atol=1e-4)


def test_drafting_from_parts_equals_the_row(case):
    check_parts(case)


@pytest.mark.parametrize(
    "bug",
    [{"late": 1}, {"merged": lambda cached, own: merge_attention(cached, cached)}],
    ids=["late", "itself unseen"],
)
def test_planted_bugs_of_the_parts(case, bug):
    with pytest.raises(AssertionError):
        check_parts(case, **bug)


def test_the_beagle_block_is_another(tiny_draft_spec):
    assert tiny_draft_spec.kind != SPEC.kind and tiny_draft_spec == BeagleSpec.from_target(
        TINY, init_std=0.3
    )
