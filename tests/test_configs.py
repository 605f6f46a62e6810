"""Every file in configs/ loads and has its own folder; the paper's targets have its settings."""

import json
from pathlib import Path

import pytest

from beagle_jax import plan
from beagle_jax.config import EarlyStage, load_config
from beagle_jax.decoding.tree import dynamic_tree
from beagle_jax.errors import run_main
from beagle_jax.model.target import TargetSpec
from beagle_jax.weights import shape
from beagle_jax.weights.shape import parameter_count

pytestmark = pytest.mark.usefixtures("at_the_root")

ROOT = Path(__file__).resolve().parent.parent
# paper.yaml is what others extend: it has no target.
CONFIGS = sorted({*(ROOT / "configs").glob("*.yaml")} - {ROOT / "configs" / "paper.yaml"})
PAPER = [path for path in CONFIGS if path.stem.startswith(("llama", "vicuna", "qwen"))]
WHEEL = ["make_it_yours", "quickstart", "smollm2_135m"]
# Of the wheel that these configs name: they plan from the wheel itself, which is small.
SMALL = "configs/shapes/smollm2_135m.json"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_loads_keeps_to_its_folder_and_has_a_tree(path):
    config = load_config(path)
    assert (
        config.train.folder == f"runs/{path.stem}"
        and config.data.folder == f"runs/{path.stem}/data"
    )
    tuned = path.stem in WHEEL  # on each machine; else the same sizes
    assert config.decode.tree == ("auto" if tuned else "dynamic")
    assert dynamic_tree(config.decode.levels, config.decode.topk, config.decode.nodes)


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_paper_settings(path):
    """The settings are those of method.md 5.4 and 6.4."""
    train, decode = load_config(path).train, load_config(path).decode
    stage = EarlyStage(steps=42_500, learning_rate=3e-5, warmup=2000, schedule="constant", window=5)
    assert train.early == stage
    assert (
        train.late.steps,
        train.late.learning_rate,
        train.late.warmup,
        train.late.simulation_steps,
    ) == (42_500, 3e-5, 2000, 4)
    assert (train.batch, train.row_tokens, train.optimizer, train.seed) == (16, 2048, "adamw", 42)
    assert (train.beta1, train.beta2, train.clip_norm, train.weight_decay) == (0.9, 0.95, 0.5, 0.0)
    assert (train.noise, train.noise_scale, train.vloss_weight) == ("uniform", 0.2, 10.0)
    assert (decode.levels, decode.topk, decode.nodes) == (6, 10, 60)


# As the model's makers published it: parameters in millions, vocabulary, context, rope base, norm
# epsilon.
PUBLISHED = {
    "smollm2_135m": (134.515_008, 49_152, 8192, 1e5, 1e-5),
    "smollm2_360m": (361.821_120, 49_152, 8192, 1e5, 1e-5),
    "llama_2_7b": (6738.415_616, 32_000, 4096, 1e4, 1e-5),
    "vicuna_7b": (6738.415_616, 32_000, 2048, 1e4, 1e-6),
    "llama_3_8b": (8030.261_248, 128_256, 8192, 5e5, 1e-5),
    "llama_3_1_8b": (8030.261_248, 128_256, 131_072, 5e5, 1e-5),
    "qwen2_5_7b": (7615.616_512, 152_064, 32_768, 1e6, 1e-6),
    "qwen3_8b": (8190.735_360, 151_936, 40_960, 1e6, 1e-6),
}


def shape_of(name: str) -> TargetSpec:
    path = ROOT / "configs" / "shapes" / f"{name}.json"
    return TargetSpec.from_hf_config(json.loads(path.read_text()), name)


@pytest.mark.parametrize("name", PUBLISHED)
def test_shapes_have_the_published_numbers(name):
    spec = shape_of(name)
    numbers = (spec.vocab_size, spec.max_positions, spec.rope_theta, spec.rms_norm_eps)
    assert (round(parameter_count(spec) / 1e6, 6), *numbers) == PUBLISHED[name]
    assert (spec.rope_scaling is not None) == (
        name == "llama_3_1_8b"
    ) and spec.tie_embeddings == name.startswith("smollm2")


def test_llama_3_1_scales_its_angles_as_published():
    assert shape_of("llama_3_1_8b").rope_scaling == (8.0, 1.0, 4.0, 8192)


def test_every_shape_is_checked_and_every_config_but_the_wheel_s_has_one():
    assert {path.stem for path in (ROOT / "configs" / "shapes").glob("*.json")} == set(PUBLISHED)
    without = [path.stem for path in CONFIGS if load_config(path).target.shape is None]
    assert without == WHEEL


@pytest.mark.slow
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_both_stages_compile_without_weights(path, capsys, monkeypatch):
    for name in ("open_source", "download"):
        monkeypatch.setattr(
            shape, name, lambda *_: pytest.fail("something of the target was fetched")
        )
    overrides = [] if load_config(path).target.shape else [f"target.shape={SMALL}"]
    assert run_main(plan.main, ["--config", str(path), "--json", "-", *overrides]) == 0
    stages = json.loads(capsys.readouterr().out)["stages"]
    assert set(stages) == {"late"} | ({"early"} if load_config(path).train.early.steps else set())
    assert all(stage["temporaries"] > 0 and not stage["refusal"] for stage in stages.values())


def test_the_targets_of_the_paper_and_its_successors_are_here():
    assert {path.stem for path in CONFIGS} >= {
        "quickstart",
        "smollm2_135m",
        "smollm2_360m",
        "llama2_7b_chat",
        "vicuna_7b",
        "llama3_8b_instruct",
        "llama3_1_8b_instruct",
        "qwen2_5_7b_instruct",
        "qwen3_8b",
    }
