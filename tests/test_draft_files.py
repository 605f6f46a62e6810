"""A draft on disk: bit for bit, whole or not at all, and refused by name if it does not fit."""

import json
from dataclasses import replace
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ONE_DEVICE, TINY
from loop_cases import (
    SPEC,
    config_for,
    same_params,
)
from safetensors.numpy import load_file, save_file

from beagle_jax.commands.train import first_params, given_draft
from beagle_jax.config import DraftConfig, EarlyStage, TestTimeStage, TrainConfig
from beagle_jax.errors import UserError
from beagle_jax.weights import draft as draft_module
from beagle_jax.weights.draft import Draft, draft_digest, load_draft, save_draft


@pytest.fixture
def draft() -> Draft:
    rng = np.random.default_rng(4)
    params = {
        name: jnp.asarray(rng.standard_normal(shape), jnp.float32)
        for name, shape in SPEC.param_shapes().items()
    }
    return Draft(
        SPEC,
        params,
        jnp.array([7, 3, 60, 0], jnp.int32),
        {"target": "tiny", "training": {"seed": 3}},
    )


def same_draft(actual: Draft, expected: Draft) -> None:
    same_params(actual.params, expected.params)
    assert actual.spec == expected.spec and actual.provenance == expected.provenance
    assert (actual.hot_ids is None) == (expected.hot_ids is None)
    if expected.hot_ids is not None:
        assert actual.hot_ids.dtype == jnp.int32
        np.testing.assert_array_equal(actual.hot_ids, expected.hot_ids)


@pytest.mark.parametrize("hot", [True, False])
def test_a_draft_survives_the_disk_bit_for_bit(draft, tmp_path, hot):
    draft = draft if hot else replace(draft, hot_ids=None)
    save_draft(tmp_path / "new" / "draft", draft)
    same_draft(load_draft(tmp_path / "new" / "draft", TINY), draft)
    assert sorted(path.name for path in (tmp_path / "new" / "draft").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


def test_transposed_views_are_written_as_what_they_are(draft, tmp_path):
    turned = draft.params | {"q_proj": np.asarray(draft.params["q_proj"]).T}
    save_draft(tmp_path, replace(draft, params=turned))
    same_params(load_draft(tmp_path, TINY).params, turned)


@pytest.mark.parametrize("bug", ["transposed", "rounded", "hot ids sorted"])
def test_a_draft_that_changed_on_disk_is_seen(draft, tmp_path, bug):
    save_draft(tmp_path, draft)
    tensors = load_file(tmp_path / "model.safetensors")
    if bug == "transposed":
        tensors["self_attn.q_proj.weight"] = np.ascontiguousarray(
            tensors["self_attn.q_proj.weight"].T
        )
    elif bug == "rounded":
        tensors["mlp.up_proj.weight"] = (
            tensors["mlp.up_proj.weight"].astype(np.float16).astype(np.float32)
        )
    else:
        tensors["hot_tokens"] = np.sort(tensors["hot_tokens"])
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(
        UserError, match=r"settings and tensors do not match the checksum in config.json"
    ):
        load_draft(tmp_path, TINY)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps({**config, "sha256": draft_digest(SPEC, tensors)})
    )
    with pytest.raises(AssertionError):
        same_draft(load_draft(tmp_path, TINY), draft)


def test_a_save_that_breaks_off_leaves_the_old_draft(draft, tmp_path, monkeypatch):
    save_draft(tmp_path, draft)

    def broken(path, tensors):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(draft_module, "write_tensors", broken)
    with pytest.raises(KeyboardInterrupt):
        save_draft(
            tmp_path,
            replace(draft, params={name: array + 1 for name, array in draft.params.items()}),
        )
    same_draft(load_draft(tmp_path, TINY), draft)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(draft, tmp_path, name):
    save_draft(tmp_path, draft)
    (tmp_path / name).unlink()
    with pytest.raises(
        UserError,
        match=rf"{tmp_path}/{name}: no such file; train a draft first .* or set draft.path",
    ):
        load_draft(tmp_path, TINY)


def test_a_broken_file_is_named(draft, tmp_path):
    save_draft(tmp_path, draft)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(
        UserError, match=rf"{weights}: cannot be read as safetensors .*; is the file whole\?"
    ):
        load_draft(tmp_path, TINY)
    config.write_text(config.read_text()[:100])
    with pytest.raises(UserError, match=rf"{config}: not JSON .*; is the file whole\?"):
        load_draft(tmp_path, TINY)
    config.write_text('{"model_type": "llama"}')
    with pytest.raises(
        UserError, match=rf"{config}: model_type is 'llama', expected 'beagle_draft'"
    ):
        load_draft(tmp_path, TINY)


def test_a_draft_of_another_target_is_refused(draft, tmp_path):
    save_draft(tmp_path, draft)
    other = replace(TINY, hidden_size=64, rope_theta=5e5)
    message = (
        r"belongs to another target \(hidden_size 32 there, 64 here; rope_theta 10000.0 there, "
        r"500000.0 here\)"
    )
    with pytest.raises(UserError, match=message):
        load_draft(tmp_path, other)
    save_draft(tmp_path, replace(draft, spec=replace(SPEC, init_std=0.5)))
    assert load_draft(tmp_path, TINY).params  # how a draft began does not matter
    with pytest.raises(
        UserError,
        match=r"belongs to another target \(it scores token 60, the vocabulary ends at 59\)",
    ):
        load_draft(tmp_path, replace(TINY, vocab_size=60))


def test_a_token_that_is_scored_twice_is_refused(draft, tmp_path):
    """The ratio rule would lose a part of its probability."""
    save_draft(tmp_path, replace(draft, hot_ids=jnp.array([7, 3, 60, 3], jnp.int32)))
    with pytest.raises(UserError, match=f"{tmp_path}: hot_tokens holds token 3 more than once"):
        load_draft(tmp_path, TINY)
    save_draft(tmp_path, replace(draft, hot_ids=jnp.array([7, 3, 60], jnp.int32)))
    assert load_draft(tmp_path, TINY).hot_ids.tolist() == [7, 3, 60]


def test_every_wrong_tensor_is_listed(draft, tmp_path):
    save_draft(tmp_path, draft)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["self_attn.q_norm.weight"] = tensors.pop("input_layernorm.weight")
    tensors["mlp.up_proj.weight"] = np.ascontiguousarray(tensors["mlp.up_proj.weight"].T)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError) as caught:
        load_draft(tmp_path, TINY)
    assert str(caught.value).splitlines() == [
        f"{tmp_path}/model.safetensors: not the weights of this draft:",
        "  missing tensor input_layernorm.weight [32]",
        "  extra tensor self_attn.q_norm.weight",
        "  mlp.up_proj.weight has shape [32, 48], expected [48, 32]",
    ]


def test_training_goes_on_from_a_draft(draft, tmp_path):
    save_draft(tmp_path, draft)
    fresh, target = config_for(tmp_path / "run"), SimpleNamespace(spec=TINY)
    config = fresh.changed(draft=DraftConfig(init=str(tmp_path)))
    same_params(given_draft(config, target).params, draft.params)
    assert given_draft(fresh, target) is None
    with pytest.raises(AssertionError):
        same_params(first_params(fresh, None, SPEC, ONE_DEVICE, None), draft.params)
    other = fresh.changed(
        draft=DraftConfig(init=str(tmp_path), kind="eagle"),
        train=TrainConfig(early=EarlyStage(window=1), late=TestTimeStage()),
    )
    with pytest.raises(
        UserError,
        match=f"{tmp_path}/config.json: model_type is 'beagle_draft', expected 'eagle_draft'",
    ):
        given_draft(other, target)
