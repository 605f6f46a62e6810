"""Targets whose experts are split over eight virtual devices, whole experts on each.

python tests/expert_mesh_cases.py OUT.json           # states of one layer, what its program sends
python tests/expert_mesh_cases.py OUT.json decoding  # tokens, parts in memory, loading
"""

import dataclasses
import json
import re
import sys
import tempfile
from functools import partial
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from conftest import TINY
from decode_cases import NEVER, next_stop
from gguf_files import llama_tensors, write_llama
from joined_mesh_cases import joined, params_of, states
from safetensors.numpy import save_file
from weight_cases import LLAMA

from beagle_jax.config import MeshConfig
from beagle_jax.data.target_forward import states_at
from beagle_jax.decoding import engine
from beagle_jax.decoding.decoder import SpeculativeDecoder
from beagle_jax.decoding.sampling import GREEDY, Sampling
from beagle_jax.decoding.tree import ROOT_ONLY, chain, dynamic_tree
from beagle_jax.model import experts as experts_module
from beagle_jax.model import target as target_module
from beagle_jax.model.beagle import BeagleSpec
from beagle_jax.model.experts import Experts
from beagle_jax.model.kinds import fresh_params
from beagle_jax.model.target import TargetSpec
from beagle_jax.model.tensors import param_table
from beagle_jax.sharding import decoding_mesh, make_mesh, place, with_experts
from beagle_jax.weights.draft import Draft
from beagle_jax.weights.gguf import GGUFFile
from beagle_jax.weights.hf import HFFolder
from beagle_jax.weights.orbax_target import save_target
from beagle_jax.weights.target import Target, load_target

NAMES = ("mlp.gate", *(f"mlp.experts.{{}}.{name}_proj" for name in ("gate", "up", "down")))
_SIZES = dataclasses.replace(TINY, vocab_size=64, num_heads=8, head_dim=4)
SPECS = {
    "mixtral": dataclasses.replace(_SIZES, experts=Experts(8, 2, 40, True, (), NAMES)),
    # The first layer has a plain MLP; there are more KV heads than devices along `expert`.
    "qwen3 moe": dataclasses.replace(
        _SIZES, num_kv_heads=4, qk_norm=True, experts=Experts(16, 4, 24, False, (0,), NAMES)
    ),
}
ONE_LAYER = dataclasses.replace(SPECS["mixtral"], num_layers=1)
TREES = {"plain": ROOT_ONLY, "chain": chain(2), "dynamic": dynamic_tree(2, 2, 5)}
RULES = {"greedy": GREEDY, "drawn": Sampling(0.8, top_k=20)}
# data, fsdp, expert, tensor
WIDE, ROWS, BOTH, ALL = (1, 1, 8, 1), (2, 1, 4, 1), (1, 1, 4, 2), (2, 2, 2, 1)
CASES = [
    ("mixtral", "dynamic", "greedy", WIDE),
    ("mixtral", "chain", "drawn", ALL),
    ("qwen3 moe", "plain", "greedy", BOTH),
    ("qwen3 moe", "dynamic", "greedy", ROWS),
    ("qwen3 moe", "dynamic", "drawn", WIDE),
]
PROMPTS, NEW = [[5], [7, 8, 9], list(range(20))], 6


def mesh_of(shape: tuple[int, int, int, int]) -> jax.sharding.Mesh:
    data, fsdp, expert, tensor = shape
    sizes = MeshConfig(data=data, fsdp=fsdp, expert=expert, tensor=tensor)
    return make_mesh(sizes, jax.devices()[: data * fsdp * expert * tensor])


def gathers(text: str, spec: TargetSpec) -> list[str]:
    """Collectives of a program whose result has an expert's matrix in it."""
    assert spec.experts is not None
    sent = re.findall(
        r"= (\S+) (?:all-gather|all-to-all|collective-permute|all-reduce)(?:-start)?\(", text
    )
    width, moved = spec.experts.width, []
    for shape in sent:
        sizes = [int(size) for size in re.search(r"\[([\d,]*)\]", shape)[1].split(",") if size]
        if len(sizes) > 2 and (width in sizes or width * spec.hidden_size in sizes):
            moved.append(shape)
    return moved


def left_out(psum=jax.lax.psum):
    """Planted: the experts of one device are left out of the sum."""

    def sum_of_others(x, axes):
        return psum(jnp.where(jax.lax.axis_index(axes) == 3, 0, x), axes)

    return mock.patch.object(experts_module.jax.lax, "psum", sum_of_others)


def _alone(params, spec: TargetSpec) -> np.ndarray:
    return np.asarray(jax.jit(partial(states, spec=spec))(params))


def each_form() -> dict:
    """How far each form is from the loop on one device, by mesh; also planted."""
    params, spec = params_of(ONE_LAYER), ONE_LAYER
    expected = _alone(params, spec)
    measured: dict = {}
    for shape in (WIDE, BOTH, ALL):
        mesh = decoding_mesh(mesh_of(shape), spec.num_kv_heads)
        split = with_experts(spec, mesh)
        for form in ("one_by_one", "few", "every", "grouped"):
            routed = getattr(experts_module, f"_{form}", None)
            placed = place(joined(params, spec, turned=not routed), mesh)
            with mock.patch.object(target_module, "routed", routed):
                run = jax.jit(partial(states, spec=split))
                measured[f"{shape} {form}"] = float(np.abs(run(placed) - expected).max())
    return measured


def sent() -> dict:
    """What the programs of a layer send, with and without the axis for experts in the program."""
    params, spec = params_of(ONE_LAYER), ONE_LAYER
    mesh = decoding_mesh(mesh_of(WIDE), spec.num_kv_heads)
    placed = place(joined(params, spec, heads=False), mesh)
    expected, measured = _alone(params, spec), {}
    split = with_experts(spec, mesh)

    def program(spec):
        return jax.jit(partial(states, spec=spec)).lower(placed).compile()

    now, without = program(split), program(spec)
    measured["sent"] = gathers(now.as_text(), spec)
    measured["all-reduces"] = len(re.findall(r" all-reduce(?:-start)?\(", now.as_text()))
    measured["planted: no axis in the program"] = gathers(without.as_text(), spec)
    measured["difference"] = float(np.abs(np.asarray(now(placed)) - expected).max())
    with left_out():
        wrong = program(dataclasses.replace(split, max_positions=255))(placed)
    measured["planted: left out"] = float(np.abs(np.asarray(wrong) - expected).max())
    measured["parts"] = {
        key: placed["layers"][0][key].addressable_shards[0].data.shape
        for key in ("router_ED", "gate_EFD", "down_EDF", "q_FD", "k_FD")
    }
    return measured


def decoder_of(case: tuple, *, spread: bool, eos_ids=NEVER) -> SpeculativeDecoder:
    name, tree, _, shape = case
    spec = SPECS[name]
    draft = BeagleSpec.from_target(spec, init_std=0.3)
    return SpeculativeDecoder(
        Target(spec, params_of(spec), None, eos_ids, "test"),
        Draft(draft, fresh_params(draft, jax.random.key(1)), None, {}),
        TREES[tree],
        mesh=mesh_of(shape) if spread else None,
    )


def written(decoder: SpeculativeDecoder, case: tuple) -> list:
    answers = decoder.generate(PROMPTS, RULES[case[2]], max_new_tokens=NEW, seed=3)
    return [[answer.tokens, answer.rounds] for answer in answers]


def of_round(decoder: SpeculativeDecoder) -> str:
    state = engine.begin(decoder._round.reading, batch=4, capacity=128)
    lowered = engine.advance.lower(decoder._round, state, np.int32(3), np.int32(3))
    return lowered.compile().as_text()


def loaded() -> dict:
    """What is read and held of a target that is loaded into parts, and what its states send."""
    config = LLAMA | {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}
    spec, rng = TargetSpec.from_hf_config(config, "test"), np.random.default_rng(0)
    tensors = {
        name: rng.standard_normal(shape).astype(np.float32)
        for name, (_, shape) in param_table(spec).items()
    }
    opened, mesh = [], mesh_of(WIDE)
    with tempfile.TemporaryDirectory() as root:
        folder, saved = Path(root) / "folder", Path(root) / "saved"
        write_llama(Path(root) / "tiny.gguf", llama_tensors())
        tokenizer = GGUFFile(Path(root) / "tiny.gguf").tokenizer()
        tokenizer.save_pretrained(folder)
        (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": 2}))
        save_file(tensors, folder / "model.safetensors")
        load = partial(load_target, dtype="float32", cache_dir="unused", join=False)
        alone, real = load(folder), HFFolder.read
        with mock.patch.object(
            HFFolder,
            "read",
            lambda self, name, *more: opened.append(name) or real(self, name, *more),
        ):
            target = load(folder, mesh=mesh)
        saved.mkdir()
        origin = {"dtype": "float32", "source": "x", "revision": None}
        save_target(saved, target.params, config, tokenizer, (2,), origin)
        restored = load(saved, mesh=mesh)
    names = [name for name in opened if "experts" in name]
    tokens_BL, length_B1 = np.zeros((8, 16), np.int32), np.full((8, 1), 16, np.int32)
    states = jax.jit(states_at, static_argnames="spec")
    lowered = states.lower(target.params, target.spec, tokens_BL, length_B1)

    def same(params) -> bool:
        return all(jax.tree.leaves(jax.tree.map(np.array_equal, params, alone.params)))

    return {
        "each expert once": len(names) == len(set(names)) == 2 * 3 * 8,
        "parts": [
            each.params["layers"][1]["up_EFD"].addressable_shards[0].data.shape
            for each in (target, restored)
        ],
        "right": [same(target.params), same(restored.params)],
        "states sent": gathers(lowered.compile().as_text(), spec),
    }


def main(out: str, which: str = "") -> None:
    if which == "decoding":
        measured: dict = {"loaded": loaded(), "forms": each_form()}
        Path(out).write_text(json.dumps(measured))
        for case in CASES:
            decoders = [decoder_of(case, spread=spread) for spread in (False, True)]
            measured[str(case)] = [written(decoder, case) for decoder in decoders]
        measured["sent"] = gathers(of_round(decoders[1]), SPECS[CASES[-1][0]])
        with left_out():
            wrong = decoder_of(CASES[0], spread=True, eos_ids=next_stop())
            measured["planted"] = written(wrong, CASES[0])
    else:
        measured = sent()
    Path(out).write_text(json.dumps(measured))


if __name__ == "__main__":
    main(*sys.argv[1:])
