"""Writes what a released version leaves on disk, as the small files of tests/test_frozen.py.

    python tests/frozen/make.py PROJECT OUT

PROJECT is the folder of that version's source, whose code runs; OUT must not exist. Files of a
version are made once and stay: make them anew only for a version that is not released yet. All
paths in them are relative to OUT, so that a copy of it can be worked in.
"""

import json
import os
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import torch
import yaml
from every_setting import ALIASES, EVERY
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MACHINE = "cpu of no name, jax 0.10"  # a tuned tree is found by the machine's name
PROMPT = "What is 3?"
DRAFTS = {
    "beagle": ["draft.hot_tokens=0"],
    "beagle_hot": [],
    "eagle": ["draft.kind=eagle", "train.early.window=1"],
}
LONGER = [
    "train.early.steps=160",
    "train.early.learning_rate=1e-2",
    "train.late=none",
    "eval.every=0",
    "train.checkpoint_every=160",
]
# An early stage that stops at its fifth step, after a checkpoint at its third; or a late one.
EARLY = ["train.early.steps=6", "train.late=none"]
MUON = ["train.optimizer=muon", "data.folder=data_int8", "data.states_dtype=int8"]
RUNS = {
    "adamw_early": EARLY,
    "adamw_late": [],
    "muon_early": EARLY + MUON,
    "muon_late": MUON,
}
STOP = 4  # batches are counted from 0
SETTINGS = {
    "target": {"source": "target", "cache_dir": "cache"},
    "draft": {"hot_tokens": 60},
    "data": {
        "source": "prompts.jsonl",
        "folder": "data",
        "answer_tokens": 200,
        "batch": 8,
        "max_answer_tokens": 16,
    },
    "train": {
        "folder": "run",
        "batch": 4,
        "row_tokens": 56,
        "checkpoint_every": 3,
        "early": {"steps": 3, "window": 3, "warmup": 1, "learning_rate": 3e-3},
        "late": {
            "steps": 6,
            "window": 2,
            "simulation_steps": 2,
            "warmup": 1,
            "learning_rate": 3e-3,
        },
    },
    "decode": {"levels": 2, "max_new_tokens": 24},
    "eval": {"suites": ["eval.jsonl"], "max_new_tokens": 16, "every": 3, "train_prompts": 2},
    "log": {"every": 2},
}


def write_target(folder: Path) -> None:
    """Writes a random Llama of two layers of width 16, with a token for every ASCII character."""
    # As GPT-2 writes bytes: those that do not print are moved to 256 and on.
    letters = [*map(chr, range(33, 127)), *map(chr, range(256, 290))]
    model = Tokenizer(models.BPE(vocab={x: n for n, x in enumerate(letters)}, merges=[]))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    special = {"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, chat_template=CHATML, **special)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=130,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=0.5,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        pad_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def write_lines(path: str, prompts: list[str]) -> None:
    Path(path).write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))


def run(command: str, *argv: str, status: int = 0) -> None:
    """Runs a command of that version in this process."""
    from beagle_jax import convert, evaluate, generate, prepare, train
    from beagle_jax.errors import run_main

    mains = {
        "convert": convert.main,
        "evaluate": evaluate.main,
        "generate": generate.main,
        "prepare": prepare.main,
        "train": train.main,
    }
    print(">>", command, *argv, flush=True)
    ended = run_main(mains[command], ["--config", "run.yaml", "--quiet", *argv])
    assert ended == status, f"{command} ended with {ended}"


def figures(command: str, *argv: str) -> Any:
    """Returns what the command writes with --json."""
    run(command, "--json", "figures.json", *argv)
    path = Path("figures.json")
    report = json.loads(path.read_text())
    path.unlink()
    return report


def log_of(folder: str | Path) -> list[dict]:
    """Returns the last record of each step and split, without what depends on the clock."""
    lines = map(json.loads, (Path(folder) / "log.jsonl").read_text().splitlines())
    last = {(line["stage"], line["step"], line.get("split")): line for line in lines}
    return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in last.values()]


def write_configs(project: Path) -> None:
    """Writes the shipped configs, one with all settings, one with all aliases, and their values."""
    from beagle_jax.config import load_config

    folder = Path("configs").absolute()
    folder.mkdir()
    for path in (project / "configs").glob("*.yaml"):
        shutil.copy(path, folder)
    for name, settings in {"every": EVERY, **ALIASES}.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    working_directory = Path.cwd()
    os.chdir(project)  # a config may name a draft of the project
    values = {path.stem: asdict(load_config(path)) for path in sorted(folder.glob("*.yaml"))}
    os.chdir(working_directory)
    keys = {f"{section}.{key}" for section, part in EVERY.items() for key in part}
    assert keys == {f"{section}.{key}" for section, part in values["every"].items() for key in part}
    (folder / "values.json").write_text(json.dumps(values, indent=1) + "\n")


def write_drafts() -> dict[str, Any]:
    """Writes drafts as train exports them, with the answers of each.

    All drafts give the same text; the rounds tell them apart.
    """
    expected = {}
    for name, more in DRAFTS.items():
        run("train", f"train.folder=scratch/{name}", *LONGER, *more)
        shutil.copytree(f"scratch/{name}/draft", f"drafts/{name}")
        made = figures("generate", PROMPT, f"draft.path=drafts/{name}")
        assert made["equal"], name
        expected[name] = {key: made[key] for key in ("text", "tokens", "rounds")}
    return expected


def write_runs() -> dict[str, Any]:
    """Writes interrupted runs, and what the same version logged when it continued them.

    Orbax writes thirty files per checkpoint, so each run is one archive.
    """
    from beagle_jax.data.loader import BatchLoader

    batch_at, expected = BatchLoader.batch_at, {}

    def interrupted(self, step):
        if step == STOP:
            raise KeyboardInterrupt
        return batch_at(self, step)

    for name, more in RUNS.items():
        BatchLoader.batch_at = interrupted
        run("train", f"train.folder={name}", *more, status=130)
        BatchLoader.batch_at = batch_at
        shutil.make_archive(name, "zip", name)
        shutil.move(name, f"scratch/{name}")
        run("train", f"train.folder=scratch/{name}", *more)
        best = json.loads(Path("scratch", name, "best.json").read_text())
        log = log_of(f"scratch/{name}")
        expected[name] = {"overrides": more, "log": log, "best": best["stages"]}
    return expected


def write_evaluation() -> dict[str, Any]:
    """Writes a report with all answers, a tuned tree, and a target and a draft in other forms."""
    from beagle_jax.config import load_config
    from beagle_jax.decoding import tuning
    from beagle_jax.weights.draft import load_draft
    from beagle_jax.weights.target import load_target

    draft = "draft.path=drafts/beagle_hot"
    run("evaluate", "--out", "evaluation", draft)
    shutil.rmtree("evaluation/pictures")
    Path("evaluation/report.html").unlink()
    config = load_config("run.yaml")
    target = load_target(config.target.source, config.target.dtype, config.target.cache_dir)
    path = tuning.tuned_path("cache", target, load_draft("drafts/beagle_hot", target.spec))
    tuning.remember(path, tuning.Choice(levels=3, topk=2, nodes=5, tau=1.5, milliseconds=2.0))
    run("convert", "to-jax", "--out", "scratch/target_orbax")
    shutil.make_archive("target_orbax", "zip", "scratch/target_orbax")
    more = ("--report", "evaluation/report.json")
    run("convert", "to-torch", "--out", "scratch/exported", draft, *more)
    shutil.make_archive("exported", "zip", "scratch/exported")  # no code of that version to lint
    return {"tuned": figures("generate", PROMPT, draft, "decode.tree=auto", "eval.every=0")}


def main(project: Path, out: Path) -> None:
    """Writes everything, in the order in which one part needs another."""
    sys.path.insert(0, str(project))
    jax.config.update("jax_platforms", "cpu")
    # Each program runs a few times, and most are needed twice: to compile is most of the time.
    jax.config.update("jax_disable_most_optimizations", True)
    cache = Path("~/.cache/beagle_jax/xla_frozen").expanduser()
    jax.config.update("jax_compilation_cache_dir", str(cache))
    import beagle_jax
    from beagle_jax.decoding import tuning

    assert Path(beagle_jax.__file__).is_relative_to(project), beagle_jax.__file__
    tuning.machine = lambda: MACHINE
    from beagle_jax.evaluation import report

    report.machine = tuning.machine
    out.mkdir(parents=True)
    os.chdir(out)
    write_configs(project)
    write_target(Path("target"))
    write_lines("prompts.jsonl", [f"What is {number}?" for number in range(12)])
    write_lines("eval.jsonl", ["What is 5?", PROMPT])
    Path("run.yaml").write_text(yaml.safe_dump(SETTINGS, sort_keys=False))
    rows = {
        "data": figures("prepare"),
        "data_int8": figures("prepare", "data.folder=data_int8", "data.states_dtype=int8"),
    }
    expected = {"rows": rows, "drafts": write_drafts(), "runs": write_runs(), **write_evaluation()}
    for key in ("tokens_per_second", "plain_tokens_per_second", "speedup"):
        del expected["tuned"][key]
    expected["version"] = beagle_jax.__version__
    Path("expected.json").write_text(json.dumps(expected, indent=1) + "\n")
    shutil.rmtree("scratch")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).absolute())
