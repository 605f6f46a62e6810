"""A tiny target in a Hugging Face folder and prompts, for tests of the commands."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from chat_cases import byte_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from beagle_jax import convert, evaluate, generate, prepare, train, tune
from beagle_jax.errors import run_main

COMMANDS = {
    "train": train.main,
    "evaluate": evaluate.main,
    "generate": generate.main,
    "tune": tune.main,
    "convert": convert.main,
    "prepare": prepare.main,
}
QUESTIONS = [f"What is {number}?" for number in range(12)]
EVAL_QUESTIONS = [
    "Why is it so?",
    "Who are you?",
    "And a much longer question, which takes more than sixty-four tokens of one byte?",
]


def make_target(folder: Path) -> None:
    """A random Llama of two layers with a byte-level tokenizer, as transformers writes it."""
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.3,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        pad_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def write_lines(path: Path, questions: list[str]) -> str:
    path.write_text("".join(json.dumps({"prompt": question}) + "\n" for question in questions))
    return str(path)


def make_workplace(folder: Path) -> SimpleNamespace:
    """A folder with a target, prompts and a config of very few steps."""
    make_target(folder / "target")
    settings = {
        "target": {"source": str(folder / "target")},
        "draft": {"hot_tokens": 200},
        "data": {
            "source": write_lines(folder / "prompts.jsonl", QUESTIONS),
            "folder": str(folder / "data"),
            "answer_tokens": 200,
            "max_answer_tokens": 12,
            "batch": 16,
        },
        "train": {
            "folder": str(folder / "run"),
            "batch": 4,
            "row_tokens": 48,
            "checkpoint_every": 2,
            "early": {"steps": 3, "window": 3, "warmup": 1, "learning_rate": 1e-3},
            "late": {
                "steps": 2,
                "window": 2,
                "simulation_steps": 2,
                "warmup": 1,
                "learning_rate": 1e-3,
            },
        },
        "decode": {"levels": 2, "max_new_tokens": 20},
        "eval": {
            "suites": [write_lines(folder / "eval.jsonl", EVAL_QUESTIONS)],
            "max_new_tokens": 20,
        },
        "log": {"every": 1},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    return SimpleNamespace(folder=folder, config=str(folder / "run.yaml"))


def ended(capsys, name: str, *argv: str) -> tuple[int, str]:
    """Exit status and the message on stderr, which begins with `error: ` and has no traceback."""
    status = run_main(COMMANDS[name], list(argv))
    message = capsys.readouterr().err
    assert "error: " in message and "Traceback" not in message
    return status, message[message.index("error: ") + len("error: ") :]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> SimpleNamespace:
    return make_workplace(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def trained(workplace) -> SimpleNamespace:
    """The workplace after one training run."""
    assert run_main(train.main, ["--config", workplace.config]) == 0
    return workplace
