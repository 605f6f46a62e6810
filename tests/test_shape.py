"""The sizes of a target without its weights."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from conftest import TINY
from safetensors.numpy import save_file

from beagle_jax.config import TargetConfig
from beagle_jax.errors import UserError
from beagle_jax.weights.shape import check_shape, parameter_count, planned_spec

SHAPES = Path(__file__).parent.parent / "configs" / "shapes"


@pytest.mark.parametrize(
    ("name", "count"),
    [("llama_2_7b", 6_738_415_616), ("vicuna_7b", 6_738_415_616), ("llama_3_8b", 8_030_261_248)],
)
def test_committed_shapes_have_the_published_number_of_parameters(name, count):
    spec = planned_spec(
        TargetConfig(source="hf:nobody/nothing", shape=str(SHAPES / f"{name}.json"))
    )
    assert parameter_count(spec) == count
    assert parameter_count(replace(spec, num_kv_heads=4)) != count


@pytest.fixture
def shape_of(tmp_path):
    """A config.json of the tiny target, with changes."""

    def shape_of(**changes) -> TargetConfig:
        names = {
            "num_layers": "num_hidden_layers",
            "num_heads": "num_attention_heads",
            "num_kv_heads": "num_key_value_heads",
            "max_positions": "max_position_embeddings",
            "tie_embeddings": "tie_word_embeddings",
        }
        config = (
            {names.get(key, key): value for key, value in asdict(TINY).items()}
            | {"model_type": "llama"}
            | changes
        )
        path = tmp_path / "shape.json"
        path.write_text(json.dumps(config))
        return TargetConfig(source="hf:nobody/nothing", shape=str(path))

    return shape_of


def test_a_shape_describes_the_target_without_its_source(shape_of):
    assert planned_spec(shape_of()) == TINY
    check_shape(shape_of(), TINY)
    check_shape(TargetConfig(source="anything"), TINY)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"vocab_size": 62},
            r"model.embed_tokens.weight is \[62, 32\] there and \[61, 32\] in the target \(1 "
            r"tensors differ\)",
        ),
        (
            {"num_hidden_layers": 1},
            r"model.layers.1.* is absent there and \[.*\] in the target \(9 tensors differ\)",
        ),
    ],
)
def test_a_target_that_is_not_what_the_shape_promised_is_refused(shape_of, changes, message):
    config = shape_of(**changes)
    with pytest.raises(
        UserError, match=rf"shape.json: target.shape does not describe hf:nobody/nothing: {message}"
    ):
        check_shape(config, TINY)


def test_a_missing_shape_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"gone.json: no such file"):
        planned_spec(TargetConfig(source="x", shape=str(tmp_path / "gone.json")))


def test_without_a_shape_the_source_is_read(tmp_path, shape_of):
    path = Path(shape_of().shape)
    folder = tmp_path / "target"
    folder.mkdir()
    path.rename(folder / "config.json")
    save_file({}, folder / "model.safetensors")
    assert planned_spec(TargetConfig(source=str(folder))) == TINY
