"""A real vLLM serves tiny targets with drafts of this library; skipped where it is not installed.

`python benchmarks/vllm_cpu.py` installs it; BEAGLE_VLLM_ENV names another environment.
"""

import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import torch
from chat_cases import byte_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from beagle_jax.decoding.decoder import SpeculativeDecoder
from beagle_jax.model.beagle import BeagleSpec, init_draft
from beagle_jax.model.eagle import EagleSpec, init_eagle
from beagle_jax.model.eagle3 import Eagle3Spec, init_eagle3
from beagle_jax.model.layers import RopeScaling
from beagle_jax.model.target import head
from beagle_jax.weights.draft import Draft
from beagle_jax.weights.server_files import write_published
from beagle_jax.weights.server_form import Server
from beagle_jax.weights.target import load_target
from beagle_jax.weights.vllm_export import write_vllm_folder
from benchmarks import vllm_cpu

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
ENV = Path(os.environ.get("BEAGLE_VLLM_ENV", vllm_cpu.ROOT / ".venv-vllm"))
NEW, LEVELS = 40, 3
LLAMA3 = RopeScaling(8.0, 1.0, 4.0, 64.0)


def beagle_draft(target, _) -> Draft:
    spec = BeagleSpec.from_target(target.spec, init_std=0.1)
    return Draft(spec, init_draft(spec, jax.random.key(3)), None, {"target": "tiny"})


def eagle_draft(target, _) -> Draft:
    """Its fusion layer passes the embedding on, and a little of the state."""
    spec = EagleSpec.from_target(target.spec, init_std=0.1)
    spec = replace(spec, fc_bias=False, qkv_bias=True, rope_scaling=LLAMA3)
    params = dict(init_eagle(spec, jax.random.key(3)))
    params |= {f"{name}_bias": params[f"{name}_bias"] + 0.3 for name in "qkv"}
    fc = np.concatenate([np.eye(64), 0.3 * np.asarray(params["fc"])[:, 64:]], axis=1)
    return Draft(spec, params | {"fc": fc.astype(np.float32)}, None, {"target": "tiny"})


def eagle3_draft(target, answers, **settings) -> Draft:
    """Its attention finds the entry's own token and passes its embedding on.

    200 tokens are hot, among them those of the answers.
    """
    rng = np.random.default_rng(4)
    answered = np.unique(np.concatenate(answers))
    others = np.setdiff1d(rng.permutation(320), answered)[: 200 - len(answered)]
    hot_ids = np.sort([*answered, *others]).astype(np.int32)
    spec = replace(Eagle3Spec.from_target(target.spec, init_std=0.03).scoring(200), **settings)
    params = dict(init_eagle3(spec, jax.random.key(3)))
    norms = {name: array for name, array in params.items() if "norm" in name}
    params |= {name: array * rng.uniform(0.8, 1.2, array.shape) for name, array in norms.items()}
    q_proj, k_proj, v_proj = (np.array(params[f"{name}_proj"]) for name in "qkv")
    k_proj[:, :64] += 1.5 * np.eye(64)  # the first half of what it reads is the embedding
    q_proj[:, :64] += 1.5 * np.repeat(np.eye(64).reshape(2, 32, 64), 2, axis=0).reshape(128, 64)
    v_proj[:, :64] += np.eye(64)
    o_proj = np.repeat(np.eye(64).reshape(64, 2, 32), 2, axis=1).reshape(64, 128) / 2
    params |= {"q_proj": q_proj, "k_proj": k_proj, "v_proj": v_proj}
    params |= {"o_proj": o_proj.astype(np.float32)}
    params["head_VD"] = np.asarray(head(target.params))[hot_ids]
    return Draft(spec, params, hot_ids, {"target": "tiny"})


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> SimpleNamespace:
    """A target whose next token depends mostly on the last one, and prompts."""
    if not (ENV / "bin" / "vllm").exists():
        pytest.skip(f"vLLM is not installed in {ENV}; benchmarks/vllm_cpu.py installs it")
    work = tmp_path_factory.mktemp("vllm")
    torch.manual_seed(1)
    # 32 is the smallest width of a head that vLLM computes on CPUs.
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, head_dim=32)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=320, initializer_range=0.3, eos_token_id=0, **sizes, **heads)
    )
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data *= 0.1
        layer.mlp.down_proj.weight.data *= 0.1
    # Each token has a likely next one, which drafts find too; the rest of the head is random.
    likely = model.model.embed_tokens.weight.data[torch.randperm(320)]
    model.lm_head.weight.data = 0.5 * likely + 0.85 * model.lm_head.weight.data
    model.lm_head.weight.data[0] = 0.0  # so no answer ends
    model.model.embed_tokens.weight.data *= 4
    model.save_pretrained(work / "target")
    byte_tokenizer().save_pretrained(work / "target")  # never used
    target = load_target(str(work / "target"), "float32", "unused")
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 320, length).tolist() for length in (3, 17, 60)]
    job = {
        "target": str(work / "target"),
        "no_tokenizer": True,
        "context": 256,
        "prompts": prompts,
        "max_tokens": NEW,
    }
    plain = SpeculativeDecoder(target).generate(prompts, max_new_tokens=NEW)
    return SimpleNamespace(
        work=work,
        python=vllm_cpu.make_environment(ENV),
        job=job,
        target=target,
        plain=[list(answer.tokens) for answer in plain],
    )


@pytest.fixture(scope="module")
def beagle(place) -> dict:
    """Exports a Beagle draft with its plugin, and decodes with it."""
    draft = beagle_draft(place.target, place.plain)
    (place.work / "beagle").mkdir()
    write_vllm_folder(place.work / "beagle", draft, place.target.spec)
    vllm_cpu.install_plugin(place.python, place.work / "beagle")
    return ours(place, draft)


def ours(place, draft: Draft) -> dict:
    """Returns tokens, rounds and accepted drafts of our chain, which decodes as without a draft."""
    expected = vllm_cpu.by_us(place.target, draft, place.job["prompts"], NEW, LEVELS)
    assert expected["tokens"] == place.plain
    assert expected["accepted"][0] > 5, "some drafts must be accepted"
    return expected


def run(place, folder: str, method: str = "eagle", **options) -> dict:
    drafting = vllm_cpu.speculative(method, place.work / folder, LEVELS)
    job = {**place.job, "speculative": drafting, **options}
    return vllm_cpu.by_vllm(place.python, job, place.work)


def check_equal(result: dict, expected: dict) -> None:
    for key in ("tokens", "rounds", "accepted"):
        assert result[key] == expected[key], key


@pytest.mark.parametrize(
    "options", [{}, {"compiled": True}, {"devices": 2}], ids=["eager", "compiled", "two devices"]
)
def test_vllm_writes_and_accepts_what_we_do(place, beagle, options):
    check_equal(run(place, "beagle", **options), beagle)


EXPORTS = {
    "eagle": (eagle_draft, "eagle", "vllm"),
    "eagle3": (partial(eagle3_draft, rope_scaling=LLAMA3, fc_norm=True), "eagle3", "vllm"),
    "speculators": (
        partial(eagle3_draft, norm_before_residual=True, norm_before_fc=True, norm_output=True),
        "eagle3",
        "speculators",
    ),
}


@pytest.mark.parametrize("name", EXPORTS)
def test_vllm_decodes_with_exported_drafts_as_we_do(place, name):
    make, method, server = EXPORTS[name]
    draft, folder = make(place.target, place.plain), place.work / name
    expected = ours(place, draft)
    folder.mkdir()
    verifier = {"name_or_path": "tiny", "architectures": ["LlamaForCausalLM"]}
    write_published(folder, draft, place.target.spec, Server(server, verifier))
    check_equal(run(place, name, method), expected)


def test_a_wrong_plugin_accepts_other_drafts(place, beagle):
    """The planted bug: what the queries read is lost. The text stays the target's own."""
    [installed] = ENV.glob("lib/python*/site-packages/beagle_vllm/draft.py")
    right = installed.read_text()
    try:
        installed.write_text(right.replace("self.o_proj(seen_TF)", "self.o_proj(0 * seen_TF)"))
        result = run(place, "beagle")
    finally:
        installed.write_text(right)
    assert result["tokens"] == beagle["tokens"]
    assert result["accepted"] != beagle["accepted"]
