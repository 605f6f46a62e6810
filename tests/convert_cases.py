"""A tiny target and two drafts in folders, and `convert` as a user starts it."""

import json
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import yaml
from command_cases import make_target
from transformers import AutoModel, LlamaConfig, LlamaForCausalLM

from beagle_jax import convert
from beagle_jax.decoding.decoder import SpeculativeDecoder
from beagle_jax.errors import run_main
from beagle_jax.model.beagle import BeagleSpec, init_draft
from beagle_jax.weights.draft import Draft, save_draft
from beagle_jax.weights.target import load_target

PROVENANCE = {
    "target": "a tiny one",
    "draft": {"init_std": 0.3},
    "data": {
        "source": "self",
        "folder": "/a/private/place",
        "rows": 12,
        "answer_tokens_written": 345,
    },
    "training": {
        "seed": 42,
        "batch": 4,
        "optimizer": "muon",
        "vloss_weight": 10.0,
        "early": {"steps": 3, "window": 5},
        "late": {"steps": 2, "window": 4, "simulation_steps": 4},
    },
    "versions": {"jax": "0.10.2"},
}


def make_place(folder: Path) -> SimpleNamespace:
    """Makes a target and its drafts.

    The target's next token depends mostly on the last one, and the draft guesses it now and then.
    """
    make_target(folder / "target")
    settings = json.loads((folder / "target" / "config.json").read_text())
    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(**{**settings, "tie_word_embeddings": False}))
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data *= 0.1
        layer.mlp.down_proj.weight.data *= 0.1
    model.model.embed_tokens.weight.data *= 4
    model.save_pretrained(folder / "target")
    target = load_target(str(folder / "target"), "float32", "unused")
    spec = BeagleSpec.from_target(target.spec, init_std=0.3)
    params = dict(init_draft(spec, jax.random.key(3)))
    for name in ("o_proj", "down_proj"):
        params[name] = 0.1 * params[name]
    for name in ("input_layernorm", "post_attention_layernorm"):
        params[name] = params[name] + 0.2 * jax.random.normal(jax.random.key(4), params[name].shape)
    hot_ids = jnp.asarray(
        np.random.default_rng(0).permutation(target.spec.vocab_size)[:220], jnp.int32
    )
    for name, ids in (("whole", None), ("hot", hot_ids)):
        save_draft(folder / name, Draft(spec, params, ids, PROVENANCE))
    (folder / "run.yaml").write_text(
        yaml.safe_dump(
            {"target": {"source": str(folder / "target")}, "train": {"folder": str(folder)}}
        )
    )
    plain = SpeculativeDecoder(target)
    return SimpleNamespace(
        folder=folder,
        target=target,
        plain=plain,
        model=model.eval(),
        config=str(folder / "run.yaml"),
    )


def to_torch(place, name: str | Path, out: Path, *more: str) -> int:
    """name: one of the two drafts, or a folder."""
    draft = f"draft.path={place.folder / name}"
    return run_main(
        convert.main, ["to-torch", "--config", place.config, "--out", str(out), draft, *more]
    )


def from_torch(place, source: Path, out: Path, *more: str) -> int:
    return run_main(
        convert.main,
        ["from-torch", "--config", place.config, "--source", str(source), "--out", str(out), *more],
    )


def refused(capsys, status: int) -> str:
    message = capsys.readouterr().err
    assert status in (1, 2) and "error: " in message and "Traceback" not in message
    return message[message.index("error: ") :]  # transformers' progress bars may stand before it


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("convert"))


@pytest.fixture(scope="module")
def exported(place) -> dict[str, Path]:
    """Exports both drafts to PyTorch folders."""
    for name in ("whole", "hot"):
        assert to_torch(place, name, place.folder / f"{name}-torch") == 0
    return {name: place.folder / f"{name}-torch" for name in ("whole", "hot")}


def torch_draft(folder: Path):
    return AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
