"""Every file in configs/: it loads, it names the folder of its own, and the paper's targets have the paper's settings."""

import json
from pathlib import Path

import pytest

from beagle_jax import plan
from beagle_jax.config import StageConfig, load_config
from beagle_jax.decoding.tree import dynamic_tree
from beagle_jax.errors import run_main
from beagle_jax.weights.shape import parameter_count, planned_spec


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    """Configs name files from there."""
    monkeypatch.chdir(ROOT)


ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
PAPER = [path for path in CONFIGS if path.stem.startswith(("llama", "vicuna", "qwen"))]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_loads_keeps_to_its_folder_and_has_a_tree(path):
    config = load_config(path)
    assert config.train.folder == f"runs/{path.stem}" and config.data.folder == f"runs/{path.stem}/data"
    assert config.decode.tree == "dynamic"
    assert dynamic_tree(config.decode.levels, config.decode.topk, config.decode.nodes)


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_paper_settings(path):
    """method.md 5.4 and 6.4."""
    train, decode = load_config(path).train, load_config(path).decode
    stage = StageConfig(steps=42_500, learning_rate=3e-5, warmup=2000, schedule="constant", window=5)
    assert train.early == stage
    assert (train.late.steps, train.late.learning_rate, train.late.warmup, train.late.simulation_steps) == (42_500, 3e-5, 2000, 4)
    assert (train.batch, train.row_tokens, train.optimizer, train.seed) == (16, 2048, "adamw", 42)
    assert (train.beta1, train.beta2, train.clip_norm, train.weight_decay) == (0.9, 0.95, 0.5, 0.0)
    assert (train.noise, train.noise_scale, train.vloss_weight) == ("uniform", 0.2, 10.0)
    assert (decode.levels, decode.topk, decode.nodes) == (6, 10, 60)


@pytest.mark.parametrize(
    "name, millions",
    [
        ("smollm2_360m", 361.821_120), ("llama2_7b_chat", 6738.415_616), ("vicuna_7b", 6738.415_616),
        ("llama3_8b_instruct", 8030.261_248), ("llama3_1_8b_instruct", 8030.261_248), ("qwen2_5_7b_instruct", 7615.616_512),
        ("qwen3_8b", 8190.735_360),
    ],
)  # fmt: skip
def test_shapes_have_the_published_number_of_parameters(name, millions):
    assert parameter_count(planned_spec(load_config(ROOT / "configs" / f"{name}.yaml").target)) == round(millions * 1e6)


@pytest.mark.slow
@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_both_stages_compile_without_weights(path, capsys):
    assert run_main(plan.main, ["--config", str(path), "--json", "-"]) == 0
    stages = json.loads(capsys.readouterr().out)["stages"]
    assert set(stages) == {"early", "late"}
    assert all(stage["temporaries"] > 0 and not stage["refusal"] for stage in stages.values())


def test_the_targets_of_the_paper_and_its_successors_are_here():
    assert {path.stem for path in CONFIGS} >= {
        "quickstart", "smollm2_135m", "smollm2_360m", "llama2_7b_chat", "vicuna_7b", "llama3_8b_instruct",
        "llama3_1_8b_instruct", "qwen2_5_7b_instruct", "qwen3_8b",
    }  # fmt: skip
