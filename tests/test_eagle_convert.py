"""EAGLE drafts to PyTorch and back: the same states, nodes, answers and bits."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from convert_cases import PROVENANCE, from_torch, make_place, refused, to_torch, torch_draft
from test_convert import PATHS, PROMPTS, TREES

from beagle_jax.decoding.decoder import SpeculativeDecoder
from beagle_jax.model.eagle import EagleBlock, EagleSpec, init_eagle
from beagle_jax.model.layers import RopeScaling
from beagle_jax.model.masks import causal_mask
from beagle_jax.weights import torch_export
from beagle_jax.weights.draft import Draft, load_draft, save_draft

SCALINGS = {
    "whole": RopeScaling(8.0, 1.0, 4.0, 64.0),
    "hot": RopeScaling(2.0),
    "biased": None,  # queries, keys and values have biases, as in drafts of Qwen2
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The target of the other tests, and two EAGLE drafts that are right now and then."""
    place = make_place(tmp_path_factory.mktemp("eagle"))
    spec = replace(EagleSpec.from_target(place.target.spec, init_std=0.3), rms_norm_eps=1e-6)
    params = init_eagle(spec, jax.random.key(3))
    fc = jnp.concatenate([jnp.eye(32), 0.02 * params["fc"][:, 32:]], axis=1)
    small = {name: 0.1 * params[name] for name in ("o_proj", "down_proj")}
    bias = {"fc_bias": 0.02 * jax.random.normal(jax.random.key(4), (32,))}
    hot_ids = jnp.asarray(np.random.default_rng(0).permutation(300)[:220], jnp.int32)
    qkv = {
        f"{name}_bias": 0.3 * jax.random.normal(jax.random.key(7), params[f"{name}_proj"].shape[:1])
        for name in "qkv"
    }
    for name, ids, more in (
        ("whole", None, bias),
        ("hot", hot_ids, {}),
        ("biased", None, {**bias, **qkv}),
    ):
        spec = replace(
            spec, fc_bias=bool(more), rope_scaling=SCALINGS[name], qkv_bias="q_bias" in more
        )
        held = {
            key: value
            for key, value in {**params, **small, "fc": fc, **more}.items()
            if key in spec.param_shapes()
        }
        save_draft(place.folder / f"eagle-{name}", Draft(spec, held, ids, PROVENANCE))
        assert to_torch(place, f"eagle-{name}", place.folder / f"eagle-{name}-torch") == 0
    return place


def drafts(place, name: str):
    return load_draft(place.folder / f"eagle-{name}", place.target.spec), torch_draft(
        place.folder / f"eagle-{name}-torch"
    )


@pytest.mark.parametrize("name", SCALINGS)
def test_torch_predicts_the_states_of_jax(place, name):
    draft, module = drafts(place, name)
    e_BLD, h_BLD = np.random.default_rng(5).standard_normal((2, 2, 12, 32), np.float32)
    mask_BTT = np.array(causal_mask(jnp.array([11, 11]), 11))
    mask_BTT[0, 7, 2:5] = False
    expected = EagleBlock(draft.spec).apply(
        {"params": draft.params}, e_BLD, h_BLD, jnp.asarray(mask_BTT), method="row"
    )
    with torch.no_grad():
        torch_states = module(*map(torch.from_numpy, (e_BLD, h_BLD, mask_BTT)))
    np.testing.assert_allclose(torch_states.numpy(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "tree"), [("whole", "chain"), ("whole", "static"), ("hot", "static")]
)
def test_torch_writes_what_jax_and_plain_decoding_write(place, name, tree):
    (draft, module), (shape, options) = drafts(place, name), TREES[tree]
    fast = SpeculativeDecoder(place.target, draft, shape)
    for prompt in PROMPTS:
        torch_answer = module.generate(
            place.model, torch.tensor([prompt]), max_new_tokens=40, **options
        )
        [jax_answer], [plain] = (
            decoder.generate([prompt], max_new_tokens=40) for decoder in (fast, place.plain)
        )
        assert (
            torch_answer.sequences[0].tolist()
            == prompt + jax_answer.tokens
            == prompt + plain.tokens
        )
        assert torch_answer.rounds == jax_answer.rounds < len(plain.tokens) - 1
        assert sum(jax_answer.accepted[1:]) > 1, (
            "the draft must be right sometimes, else acceptance is not tested"
        )


@pytest.mark.parametrize("bug", ["its own row unseen", "a state too old", "another parent"])
def test_wrong_drafting_shows_in_the_rounds(place, monkeypatch, bug):
    """Planted bugs: the answer stays right, its rounds do not."""
    _, module = drafts(place, "whole")

    def ask():
        return [
            module.generate(place.model, torch.tensor([prompt]), max_new_tokens=60, paths=PATHS)
            for prompt in PROMPTS
        ]

    before, kind = ask(), type(module)
    right = kind.fuse
    if bug == "its own row unseen":
        monkeypatch.setattr(
            kind,
            "keys_values",
            lambda self, x, at, old=kind.keys_values: (
                old(self, -5 * x, at) if x.shape[1] < 4 else old(self, x, at)
            ),
        )
    elif bug == "a state too old":
        monkeypatch.setattr(
            kind,
            "fuse",
            lambda self, e, h: right(
                self, e, 20 * h.roll(1, dims=1) if h.shape[1] > 4 else -20 * h
            ),
        )
    else:
        monkeypatch.setattr(
            kind,
            "fuse",
            lambda self, e, h: right(self, e, -30 * h.flip(1) if 1 < h.shape[1] < 4 else h),
        )
    after = ask()
    assert all(
        torch.equal(right.sequences, wrong.sequences)
        for right, wrong in zip(before, after, strict=True)
    )
    assert [right.rounds for right in before] != [wrong.rounds for wrong in after]


@pytest.mark.parametrize("bias", ["q_bias", "v_bias"])
def test_planted_bug_a_bias_left_out(place, bias):
    """Biases of queries and values.

    A bias of the keys would change little: only its rotation acts.
    """
    draft, module = drafts(place, "biased")
    e_BLD, h_BLD = np.random.default_rng(5).standard_normal((2, 2, 12, 32), np.float32)
    params = {**draft.params, bias: jnp.zeros_like(draft.params[bias])}
    mask_BTT = causal_mask(jnp.array([11, 11]), 11)
    wrong = EagleBlock(draft.spec).apply({"params": params}, e_BLD, h_BLD, mask_BTT, method="row")
    with torch.no_grad():
        torch_states = module(torch.from_numpy(e_BLD), torch.from_numpy(h_BLD)).numpy()
    with pytest.raises(AssertionError, match="Mismatched elements"):
        np.testing.assert_allclose(torch_states, wrong, atol=1e-4)


@pytest.mark.parametrize("name", SCALINGS)
def test_back_again_it_is_the_same_draft(place, tmp_path, name):
    assert from_torch(place, place.folder / f"eagle-{name}-torch", tmp_path / "back") == 0
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "back" / file).read_bytes() == (
            place.folder / f"eagle-{name}" / file
        ).read_bytes()


def test_the_folder_says_what_it_is(place):
    folder = place.folder / "eagle-hot-torch"
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "modeling_beagle.py",
        "modeling_decoding.py",
        "modeling_eagle.py",
        "modeling_sampling.py",
        "modeling_tree.py",
    ]
    config, card = (
        json.loads((folder / "config.json").read_text()),
        (folder / "README.md").read_text(),
    )
    assert (config["model_type"], config["fc_bias"], config["frequency_scaling"]) == (
        "eagle_draft_torch",
        False,
        [2.0, 1.0, 1.0, None],
    )
    assert (
        "# An EAGLE draft for `a tiny one`" in card
        and "`modeling_eagle.py` and the modules beside it are Apache-2.0" in card
    )
    assert "beagle_jax" not in (folder / "modeling_eagle.py").read_text()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("[e_BTD, h_BTD]", "[h_BTD, e_BTD]"),
        ("positions_T[None] <= positions_T", "positions_T[None] < positions_T"),
        ("+ kept_H * plain_H", ""),
    ],
    ids=["state first", "own entry hidden", "no scaling"],
)
def test_a_planted_bug_leaves_no_folder(place, tmp_path, monkeypatch, capsys, old, new):
    right = torch_export.module_source
    assert old in right("modeling_eagle")
    monkeypatch.setattr(torch_export, "module_source", lambda name: right(name).replace(old, new))
    assert "differ from those of the JAX block: states by" in refused(
        capsys, to_torch(place, "eagle-whole", tmp_path / "out")
    )
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"hidden_size": 64}, "belongs to another target (hidden_size 64 there, 32 here)"),
        ({"vocab_size": 301}, "belongs to another target (vocab_size 301 there, 300 here)"),
        ({"fc_bias": False}, "extra tensor fc.bias"),
        (
            {"rope_theta": 5.0},
            "settings and tensors do not match the checksum in config.json",
        ),
        ({"frequency_scaling": "linear"}, "rope_scaling is 'linear'; expected the numbers factor"),
        ({"model_type": "eagle_draft"}, "already a draft of beagle_jax; set draft.path to it"),
    ],
)
def test_folders_that_do_not_fit(place, tmp_path, capsys, changes, expected):
    folder = tmp_path / "there"
    folder.mkdir()
    whole = place.folder / "eagle-whole-torch"
    (folder / "model.safetensors").write_bytes((whole / "model.safetensors").read_bytes())
    (folder / "config.json").write_text(
        json.dumps(json.loads((whole / "config.json").read_text()) | changes)
    )
    assert expected in refused(capsys, from_torch(place, folder, tmp_path / "back"))
    assert not (tmp_path / "back").exists()
