"""Compares the planned operations of a training step with those that XLA counts.

    JAX_PLATFORMS=cpu python benchmarks/step_flops.py --json benchmarks/results/step_flops.json

For configs of large targets, both stages: the formula of `beagle_jax.plan` (matrix products only)
over XLA's count of the step's program before optimisation. XLA also counts operations that are no
products, and the body of a loop once, however often it runs. So a row is too short for attention in
blocks, and one chunk of the loss has all positions: no loop is left. Nothing is compiled or run.
"""

import argparse
import json
from pathlib import Path

import jax

from beagle_jax.config import Config, MeshConfig, load_config
from beagle_jax.model.attention import MANY_KEYS
from beagle_jax.sharding import make_mesh
from beagle_jax.training.cost import abstract_step
from beagle_jax.weights.shape import planned_spec

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ("llama2_7b_chat", "llama3_8b_instruct", "qwen3_8b")
ROW_TOKENS = MANY_KEYS // 2


def ratio(config: Config, stage: str) -> dict[str, float]:
    """Returns the planned operations of a step on one device, and XLA's count."""
    target = planned_spec(config.target)
    scored = config.draft.hot_tokens or target.vocab_size
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    step = abstract_step(stage, config, target, scored, mesh)
    counted = step.lowered().cost_analysis()["flops"]
    return {"planned": step.flops, "counted": counted, "ratio": step.flops / counted}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--configs", nargs="+", default=CONFIGS, help="names of files in configs/")
    parser.add_argument("--json", help="where the figures are kept")
    arguments = parser.parse_args()
    figures = {}
    short = (f"train.row_tokens={ROW_TOKENS}", "train.batch=1", f"train.loss_rows={ROW_TOKENS}")
    for name in arguments.configs:
        config = load_config(ROOT / "configs" / f"{name}.yaml", list(short))
        for stage in config.train.stages_to_run:
            figures[f"{name} {stage}"] = row = ratio(config, stage)
            print(f"{name:20} {stage:6} {row['planned']:.4g} planned, {row['ratio']:.4f} of XLA's")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
