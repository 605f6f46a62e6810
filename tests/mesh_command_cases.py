"""Runs evaluate with its audit, generate and tune on a mesh; meant for eight virtual devices.

python tests/mesh_command_cases.py FOLDER
"""

import json
import sys
from pathlib import Path

import jax
from command_cases import make_workplace

from beagle_jax import evaluate, generate, tune
from beagle_jax.decoding import tuning
from beagle_jax.errors import run_main
from beagle_jax.model.beagle import BeagleSpec, init_draft
from beagle_jax.weights.draft import Draft, save_draft
from beagle_jax.weights.target import load_target

SPREAD = ["mesh.tensor=2", "decode.tree=dynamic", "decode.levels=2", "decode.nodes=5"]
SPREAD += ["decode.topk=2", "eval.limit=2", "eval.max_new_tokens=8"]


def main(folder: Path) -> None:
    tuning.TOLERANCE = 1e9  # figures of a busy machine are saved too: their place is tested
    place = make_workplace(folder)
    spec = BeagleSpec.from_target(load_target(str(folder / "target"), "float32", "unused").spec)
    draft = Draft(spec, init_draft(spec, jax.random.key(0)), None, {})
    save_draft(folder / "run" / "draft", draft)
    own = [*SPREAD, f"target.cache_dir={folder / 'cache'}"]
    answer = ["--json", str(folder / "generate.json")]
    commands = {
        "evaluate": (evaluate.main, [*own, "--audit", "--out", str(folder / "out")]),
        "generate": (generate.main, ["Why?", *own, *answer]),
        "tune": (tune.main, [*own, "--prompts", "1"]),
        "two rows": (generate.main, ["Why?", "mesh.data=2"]),
    }
    statuses = {
        name: run_main(command, ["--config", place.config, *arguments])
        for name, (command, arguments) in commands.items()
    }
    (folder / "statuses.json").write_text(json.dumps(statuses))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
