"""A real vLLM serves tiny targets with drafts of this library; skipped where it is not installed.

`python benchmarks/vllm_cpu.py` installs it; BEAGLE_VLLM_ENV names another environment.
"""

import os
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from beagle_jax.decoding.decoder import SpeculativeDecoder
from beagle_jax.model.beagle import BeagleSpec, init_draft
from beagle_jax.weights.draft import Draft
from beagle_jax.weights.target import load_target
from beagle_jax.weights.vllm_export import write_vllm_folder
from benchmarks import vllm_cpu

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
ENV = Path(os.environ.get("BEAGLE_VLLM_ENV", vllm_cpu.ROOT / ".venv-vllm"))
NEW, LEVELS = 40, 3


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> SimpleNamespace:
    """A target whose next token depends mostly on the last one, and a draft that guesses it."""
    if not (ENV / "bin" / "vllm").exists():
        pytest.skip(f"vLLM is not installed in {ENV}; benchmarks/vllm_cpu.py installs it")
    work = tmp_path_factory.mktemp("vllm")
    torch.manual_seed(1)
    # 32 is the smallest width of a head that vLLM computes on CPUs.
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, head_dim=32)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=320, initializer_range=0.3, eos_token_id=None, **sizes, **heads)
    )
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data *= 0.1
        layer.mlp.down_proj.weight.data *= 0.1
    model.model.embed_tokens.weight.data *= 4
    model.save_pretrained(work / "target")
    target = load_target(str(work / "target"), "float32", "unused")
    spec = BeagleSpec.from_target(target.spec, init_std=0.3)
    params = dict(init_draft(spec, jax.random.key(3)))
    draft = Draft(spec, params | {"o_proj": 0.3 * params["o_proj"]}, None, {"target": "tiny"})
    (work / "beagle").mkdir()
    write_vllm_folder(work / "beagle", draft, target.spec)
    python = vllm_cpu.make_environment(ENV)
    vllm_cpu.install_plugin(python, work / "beagle")
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 320, length).tolist() for length in (3, 17, 60)]
    job = {
        "target": str(work / "target"),
        "no_tokenizer": True,
        "context": 256,
        "prompts": prompts,
        "max_tokens": NEW,
    }
    expected = vllm_cpu.by_us(target, draft, prompts, NEW, LEVELS)
    plain = SpeculativeDecoder(target).generate(prompts, max_new_tokens=NEW)
    assert [answer.tokens for answer in plain] == expected["tokens"]
    return SimpleNamespace(work=work, python=python, job=job, expected=expected)


def run(served, **options) -> dict:
    drafting = vllm_cpu.speculative("eagle", served.work / "beagle", LEVELS)
    job = {**served.job, "speculative": drafting, **options}
    return vllm_cpu.by_vllm(served.python, job, served.work)


@pytest.mark.parametrize(
    "options", [{}, {"compiled": True}, {"devices": 2}], ids=["eager", "compiled", "two devices"]
)
def test_vllm_writes_and_accepts_what_we_do(served, options):
    result = run(served, **options)
    for key in ("tokens", "rounds", "accepted"):
        assert result[key] == served.expected[key], key
    assert result["accepted"][0] > 5, "some drafts must be accepted"


def test_a_wrong_plugin_accepts_other_drafts(served):
    """The planted bug: the query is rotated like the key. The text stays the target's own."""
    [installed] = ENV.glob("lib/python*/site-packages/beagle_vllm/draft.py")
    right = installed.read_text()
    try:
        installed.write_text(right.replace("positions_T + 1, q_TF", "positions_T, q_TF"))
        result = run(served)
    finally:
        installed.write_text(right)
    assert result["tokens"] == served.expected["tokens"]
    assert result["accepted"] != served.expected["accepted"]
