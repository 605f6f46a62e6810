"""Drafts from PyTorch: published names, and every way in which a file can be wrong."""

import json
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from convert_cases import from_torch, make_place, refused, to_torch
from safetensors.numpy import load_file, save_file

from beagle_jax.model.beagle import BeagleBlock
from beagle_jax.weights.draft import load_draft

PUBLISHED = "speculative_decoder.layers.0."


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("import"))


def published(
    place,
    folder: Path,
    change=lambda tensors: None,
    prefix: str = PUBLISHED,
    config: dict | None = None,
) -> Path:
    """Makes a checkpoint with the published names and copies of the target's frozen parts."""
    tensors = {
        prefix + name: array
        for name, array in load_file(place.folder / "whole" / "model.safetensors").items()
    }
    copies = load_file(place.folder / "target" / "model.safetensors")
    names = ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight")
    tensors |= {name: copies[name] for name in names}
    change(tensors)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("prefix", [PUBLISHED, "layers.0.", "", "speculative_decoder."])
def test_published_names_are_accepted(place, tmp_path, prefix):
    config = {
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_theta": 10000.0,
        "beagle_use_lower_layers": 0,
    }
    source = published(place, tmp_path / "there", prefix=prefix, config=config)
    assert from_torch(place, source, tmp_path / "here") == 0
    draft = load_draft(tmp_path / "here", place.target.spec)
    expected = load_draft(place.folder / "whole", place.target.spec)
    assert all(
        np.array_equal(draft.params[name], expected.params[name]) for name in expected.params
    )
    assert draft.provenance == {"target": str(place.folder / "target"), "imported_from": "there"}


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"]
)
def test_an_array_that_the_target_has_otherwise_is_refused(place, tmp_path, capsys, name):
    """Decoding takes the target's own. A single changed value is detected."""

    def change(tensors):
        tensors[name] = tensors[name].copy()
        tensors[name].flat[7] += 0.01

    source = published(place, tmp_path / "there", change)
    message = refused(capsys, from_torch(place, source, tmp_path / "here"))
    assert f"{source}: the values of {name} differ from the target's {name}" in message
    assert not (tmp_path / "here").exists()


def test_half_precision_widens_exactly(place, tmp_path):
    def halve(tensors):
        for name in tensors:
            tensors[name] = np.asarray(jnp.asarray(tensors[name], jnp.bfloat16))

    source = published(place, tmp_path / "there", halve)
    assert from_torch(place, source, tmp_path / "here") == 0
    widened, expected = (
        load_file(path / "model.safetensors") for path in (tmp_path / "here", source)
    )
    for name, array in widened.items():
        assert array.dtype == np.float32 and np.array_equal(
            array, expected[PUBLISHED + name].astype(np.float32)
        )


def test_drafts_without_an_input_norm_project_embeddings_as_they_are(place, tmp_path):
    """method.md 9.1: a missing norm is the identity, which no norm weights are."""
    source = published(
        place, tmp_path / "there", lambda tensors: tensors.pop(PUBLISHED + "input_layernorm.weight")
    )
    assert from_torch(place, source, tmp_path / "here") == 0
    bare, normed = (
        load_draft(folder, place.target.spec)
        for folder in (tmp_path / "here", place.folder / "whole")
    )
    assert not bare.spec.input_norm and "input_layernorm" not in bare.params
    e_BTD, h_BSD = np.random.default_rng(5).standard_normal((2, 1, 6, 32), np.float32)
    # Embeddings whose norm is themselves.
    e_BTD /= np.sqrt(np.mean(np.square(e_BTD), axis=-1, keepdims=True))

    def run(draft):
        return BeagleBlock(draft.spec).apply(
            {"params": draft.params}, e_BTD, h_BSD, np.tri(6, 6, -1, dtype=bool)[None]
        )

    with_ones = replace(
        normed, params={**normed.params, "input_layernorm": np.ones(32, np.float32)}
    )
    np.testing.assert_allclose(run(bare), run(with_ones), rtol=1e-4, atol=1e-4)
    assert np.abs(run(bare) - run(normed)).max() > 1e-2
    assert to_torch(place, tmp_path / "here", tmp_path / "torch") == 0  # compares them
    assert from_torch(place, tmp_path / "torch", tmp_path / "back") == 0
    assert (tmp_path / "back" / "config.json").read_bytes() == (
        tmp_path / "here" / "config.json"
    ).read_bytes()


def test_a_dtype_that_holds_no_weights_is_named(place, tmp_path, capsys):
    for dtype, stored in ((np.float64, "F64"), (np.int32, "I32")):

        def change(t, dtype=dtype):
            return t.update({PUBLISHED + "mlp.up_proj.weight": np.ones((48, 32), dtype)})

        source = published(place, tmp_path / stored, change)
        message = refused(capsys, from_torch(place, source, tmp_path / "here"))
        assert (
            f"tensor {PUBLISHED}mlp.up_proj.weight is stored as {stored}; expected F32 or F16 "
            "or BF16" in message
        )


def renamed(tensors: dict, old: str, new: str) -> None:
    tensors[new] = tensors.pop(old)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            lambda t: t.pop(PUBLISHED + "mlp.up_proj.weight"),
            ["missing tensor mlp.up_proj.weight [48, 32]"],
        ),
        (
            lambda t: t.update({"eagle_fc.weight": np.ones((32, 64), np.float32)}),
            ["extra tensor eagle_fc.weight [32, 64]"],
        ),
        (
            lambda t: t.update({PUBLISHED + "self_attn.q_proj.bias": np.ones(32, np.float32)}),
            ["extra tensor " + PUBLISHED + "self_attn.q_proj.bias"],
        ),
        (
            lambda t: t.update({"speculative_decoder.norm.weight": np.ones(32, np.float32)}),
            ["extra tensor speculative_decoder.norm.weight"],
        ),
        (
            lambda t: t.update(
                {"model.layers.1.mlp.up_proj.weight": np.ones((48, 32), np.float32)}
            ),
            [
                "2 tensors match mlp.up_proj.weight: ",
                "model.layers.1.mlp.up_proj.weight",
                "2 different prefixes",
            ],
        ),
        (
            lambda t: renamed(
                t, PUBLISHED + "mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"
            ),
            [
                "the tensors have 2 different prefixes ('model.layers.0.', "
                "'speculative_decoder.layers.0.'); "
                "expected one"
            ],
        ),
        (
            lambda t: t.update({PUBLISHED + "mlp.up_proj.weight": np.ones((32, 48), np.float32)}),
            ["mlp.up_proj.weight has shape [32, 48], expected [48, 32]"],
        ),
        (
            lambda t: t.update({PUBLISHED + "hot_tokens": np.array([1, 300], np.int32)}),
            ["it scores token 300, the vocabulary ends at 299"],
        ),
        (
            lambda t: t.update({PUBLISHED + "hot_tokens": np.array([4, 1, 4], np.int32)}),
            ["hot_tokens holds token 4 more than once"],
        ),
        (
            lambda t: (
                t.pop(PUBLISHED + "mlp.up_proj.weight"),
                t.update({"x": np.ones(1, np.float32)}),
            ),
            ["missing tensor", "extra tensor x [1]"],
        ),
    ],
)
def test_tensors_that_do_not_fit_are_listed(place, tmp_path, capsys, change, expected):
    message = refused(
        capsys, from_torch(place, published(place, tmp_path / "there", change), tmp_path / "here")
    )
    assert "not the weights of one Beagle block for this target" in message
    assert all(words in message for words in expected), message
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            {"num_attention_heads": 8, "rope_parameters": {"rope_theta": 5e5}},
            "(num_attention_heads 8 there, 4 here; rope_theta 500000.0 there",
        ),
        ({"beagle_use_lower_layers": 7}, "beagle_use_lower_layers is 7"),
        ({"model_type": "beagle_draft"}, "already a draft of beagle_jax; set draft.path to it"),
        ([], "holds a JSON list, expected an object"),
    ],
)
def test_configs_that_do_not_fit(place, tmp_path, capsys, config, expected):
    source = published(place, tmp_path / "there", config=config)
    assert expected in refused(capsys, from_torch(place, source, tmp_path / "here"))
    assert not (tmp_path / "here").exists()


def test_broken_files(place, tmp_path, capsys):
    whole = (place.folder / "whole" / "model.safetensors").read_bytes()
    for size in (0, 5, 100, len(whole) - 1):
        (tmp_path / "cut.safetensors").write_bytes(whole[:size])
        message = refused(
            capsys, from_torch(place, tmp_path / "cut.safetensors", tmp_path / "here")
        )
        assert (
            f"{tmp_path}/cut.safetensors: cannot be read as safetensors" in message
            and "is the file whole" in message
        )
        assert (
            "its header should end at byte"
            if size < len(whole) - 1
            else f"should end at byte {len(whole):,}, the file ends at byte {size:,}"
        ) in message
    (tmp_path / "config.json").write_text("{")
    assert "config.json: not JSON (line 1" in refused(
        capsys, from_torch(place, tmp_path / "cut.safetensors", tmp_path / "here")
    )
    assert "no such file or folder" in refused(
        capsys, from_torch(place, tmp_path / "none", tmp_path / "here")
    )
    assert "expected a folder, or a file" in refused(
        capsys, from_torch(place, tmp_path / "config.json", tmp_path / "here")
    )
    (tmp_path / "empty").mkdir()
    assert "no weights in this folder" in refused(
        capsys, from_torch(place, tmp_path / "empty", tmp_path / "here")
    )


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_pickles_are_read_only_when_allowed_and_as_weights_only(place, tmp_path, capsys):
    tensors = {
        name: torch.from_numpy(array)
        for name, array in load_file(place.folder / "whole" / "model.safetensors").items()
    }
    file = tmp_path / "states.pt"
    torch.save({PUBLISHED + name: tensor for name, tensor in tensors.items()}, file)
    for source in (file, tmp_path):
        message = refused(capsys, from_torch(place, source, tmp_path / "here"))
        assert (
            f"{file} is a pickle, which may run code when it is read" in message
            and "--allow-pickle" in message
        )
    assert from_torch(place, file, tmp_path / "here", "--allow-pickle") == 0
    draft, expected = (
        load_draft(folder, place.target.spec)
        for folder in (tmp_path / "here", place.folder / "whole")
    )
    assert all(
        np.array_equal(draft.params[name], expected.params[name]) for name in expected.params
    )
    trapped = tmp_path / "trap.bin"
    torch.save({"x": Trap(tmp_path / "sprung")}, trapped)
    message = refused(capsys, from_torch(place, trapped, tmp_path / "there", "--allow-pickle"))
    assert (
        f"{trapped}: torch.load(weights_only=True) cannot read it" in message
        and not (tmp_path / "sprung").exists()
    )
    torch.save([1], trapped)
    assert "expected named tensors, but it holds other values" in refused(
        capsys, from_torch(place, trapped, tmp_path / "there", "--allow-pickle")
    )
    file.write_bytes(file.read_bytes()[:-100])
    assert "cannot read it" in refused(
        capsys, from_torch(place, file, tmp_path / "there", "--allow-pickle")
    )
