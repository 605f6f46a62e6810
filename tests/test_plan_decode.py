"""Plans of decoding: bytes by hand, programs of the real decoder, names of topologies, refusals.

GPUs that are not there are compiled for where JAX's CUDA plugin is installed.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, random_params

from beagle_jax import plan as entry
from beagle_jax import topology
from beagle_jax.commands.plan import memory_of
from beagle_jax.commands.plan_decode import table
from beagle_jax.config import Config, DraftConfig, MeshConfig, TargetConfig
from beagle_jax.decoding.cost import ProgramCost, abstract_round, decode_cost
from beagle_jax.decoding.decoder import SpeculativeDecoder
from beagle_jax.decoding.engine import advance
from beagle_jax.decoding.tree import dynamic_tree
from beagle_jax.errors import UsageError, run_main
from beagle_jax.hardware import CHIPS
from beagle_jax.model.joined import join_layer
from beagle_jax.model.kinds import fresh_params, new_spec
from beagle_jax.program import Program, program_of
from beagle_jax.sharding import decoding_mesh, make_mesh
from beagle_jax.topology import GPUS, gpu_target, topology_devices
from beagle_jax.weights.draft import Draft
from beagle_jax.weights.target import Target

ROOT = Path(__file__).parent.parent
SPEC = replace(TINY, num_layers=1)
CONFIG = Config(target=TargetConfig(source="x", dtype="float32"), draft=DraftConfig(hot_tokens=24))
TREE = dynamic_tree(2, 2, 5)

HLO = """
HloModule m

%fused (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %a = f32[8]{0} add(%p, %p)
}

%called (q: f32[8]) -> f32[8] {
  %q = f32[8]{0} parameter(0)
  ROOT %f.1 = f32[8]{0} fusion(%q), kind=kLoop, calls=%fused
}

%inner_body (t: (s32[], f32[8])) -> (s32[], f32[8]) {
  %t = (s32[], f32[8]{0}) parameter(0)
  %g = f32[8]{0} get-tuple-element(%t), index=1
  %f.2 = f32[8]{0} fusion(%g), kind=kLoop, calls=%fused
  ROOT %r = (s32[], f32[8]{0}) tuple(%g, %f.2)
}

%inner_cond (t: (s32[], f32[8])) -> pred[] {
  %t.1 = (s32[], f32[8]{0}) parameter(0)
  ROOT %c = pred[] constant(true)
}

%body (s: (s32[], f32[8])) -> (s32[], f32[8]) {
  %s = (s32[], f32[8]{0}) parameter(0)
  %x = f32[8]{0} get-tuple-element(%s), index=1
  %sum = f32[8]{0} all-reduce(%x), to_apply=%fused
  %all = (bf16[2]{0}, bf16[16]{0}) all-gather-start(%x), dimensions={0}
  %done = bf16[16]{0} all-gather-done(%all)
  %many = (s32[], f32[8]{0}) while(%s), condition=%inner_cond, body=%inner_body, \
backend_config={"known_trip_count":{"n":"5"}}
  %two = f32[8]{0} conditional(%x, %x, %x), branch_computations={%called, %fused}
  %f.3 = f32[8]{0} call(%x), to_apply=%called
  ROOT %out = (s32[], f32[8]{0}) tuple(%f.3, %f.3)
}

ENTRY %main (a.1: f32[8]) -> f32[8] {
  %a.1 = f32[8]{0} parameter(0)
  %copy = f32[8]{0} copy(%a.1)
  %loop = (s32[], f32[8]{0}) while(%copy), condition=%inner_cond, body=%body
  ROOT %end = f32[8]{0} get-tuple-element(%loop), index=1
}
"""


def test_kernels_of_a_round_are_those_of_the_loop_and_of_what_it_calls():
    # five passes of the inner loop, one kernel of a branch, one of the called computation
    assert program_of(HLO, loop=True) == Program(5 + 1 + 1, 2, 8 * 4 + 16 * 2)
    assert program_of(HLO, loop=False) == Program(7 + 1, 2, 8 * 4 + 16 * 2)
    once = HLO.replace('"n":"5"', '"n":"1"')
    assert program_of(once, loop=True).kernels == 3


@pytest.fixture(scope="module")
def mesh():
    made = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    return decoding_mesh(made, SPEC.num_kv_heads)


@pytest.fixture(scope="module")
def cost(mesh):
    return decode_cost(CONFIG, SPEC, TREE, mesh, batch=2, context=100)


def test_bytes_are_those_of_the_shapes(cost):
    D, F, V, K, H = 32, 48, 61, 2, 8
    layer = 2 * D * D + 2 * K * H * D + 3 * D * F
    assert cost.capacity == 128
    assert cost.target_weights == 4 * (V * D + D + layer + 2 * D)
    assert cost.draft_weights == 4 * (layer + 2 * D + 24 * D + 24)  # its head's rows and their ids
    assert cost.target_cache == cost.draft_cache == 4 * 2 * 2 * K * H * 128
    live = 4 * 2 * 2 * K * H * 100
    assert cost.step_bytes == cost.target_weights + live
    assert cost.round_bytes == cost.step_bytes + 2 * (4 * (layer + 2 * D + 24 * D) + live)


def loaded_params():
    """Weights as they are loaded for decoding."""
    params = random_params(SPEC)
    return {**params, "layers": [join_layer(layer, SPEC) for layer in params["layers"]]}


def test_programs_are_those_of_the_decoder(cost, mesh):
    """The plan's round is the real one, of weights that are there."""
    spec = new_spec(CONFIG.draft, SPEC)
    draft = Draft(spec, fresh_params(spec, jax.random.key(0)), np.arange(24, dtype=np.int32), {})
    target = Target(SPEC, loaded_params(), None, (0,), "test")

    def kernels(tree) -> int:
        now = SpeculativeDecoder(target, draft, tree, context=100)._round
        state = jax.eval_shape(lambda: now.reading.empty(2, 128))
        lowered = advance.lower(now, state, np.int32(2), np.int32(2))
        return program_of(lowered.compile().as_text(), loop=True).kernels

    assert cost.round.program.kernels == kernels(TREE) > cost.step.program.kernels
    assert cost.round.program.collectives == 0
    assert kernels(dynamic_tree(1, 2, 3)) != cost.round.program.kernels  # planted: another tree


def test_the_abstract_round_has_the_weights_of_a_real_one(mesh):
    now = abstract_round(CONFIG, SPEC, TREE, mesh)
    params = loaded_params()
    assert jax.tree.map(jnp.shape, now.target.params) == jax.tree.map(jnp.shape, params)
    assert now.drafter.head.rows_VD.shape == (24, 32) and now.drafter.head.ids_V.shape == (24,)


def test_joined_projections_are_planned_as_they_are_loaded(mesh):
    for layer in abstract_round(CONFIG, SPEC, TREE, mesh).target.params["layers"]:
        expected = join_layer(random_params(SPEC)["layers"][0], SPEC)
        assert jax.tree.map(jnp.shape, layer) == jax.tree.map(jnp.shape, expected)


def test_the_plan_says_what_fits(cost, monkeypatch):
    made = ProgramCost(None, None, "out of memory", 1.0, None)
    figures = {
        "target": {"source": "x", "parameters": 7, "dtype": "bfloat16"},
        "tree": str(TREE),
        "devices": {"count": 1, "kind": "GPU", "mesh": {"data": 1}, "memory": 6e10},
        "batch": 1,
        "context": 4096,
        "capacity": 4224,
        "bytes": dict.fromkeys(
            ("target_weights", "draft_weights", "target_cache", "draft_cache"), 1e9
        ),
        "programs": {
            name: {
                "temporaries": made.temporaries,
                "total": made.total,
                "refusal": made.refusal,
                "compile_seconds": made.seconds,
                "kernels": 12,
                "collectives": 0,
                "collective_bytes": None,
                "fits": False,
            }
            for name in ("step", "round", "reading")
        },
        "least_bytes": {"step": 1e9, "round": 2e9},
        "least_ms": {"step": 0.3, "round": 0.6},
        "fits": {"1024": 8, "4096": 2},
    }
    shown = table(figures)
    assert "0.60 ms" in shown and "does NOT fit: out of memory" in shown
    assert "largest batch by context: 1,024: 8, 4,096: 2" in shown and "60.0 GB usable" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "2"], "--batch is for decoding; add --decode"),
        (["--decode", "--context", "0"], "--context is 0; expected at least 1"),
        (["--decode", "--context", "9999"], "the target's longest context is 4096"),
        (["--decode", "draft.path=plain"], "draft.path is plain, but plan --decode plans a draft"),
        (
            ["--decode", "draft.path=lookup", "decode.lookup_nodes=3"],
            "draft.path is lookup and decode.lookup_nodes is 3, but prompt lookup drafts a chain",
        ),
        (["--decode", "mesh.tensor=64"], "mesh.tensor=64 needs 64 devices, but there are"),
        (["--decode", "--batch", "3", "mesh.data=2"], "which cannot be split into 2 equal parts"),
    ],
)
def test_what_cannot_be_planned_is_refused(arguments, message, capsys):
    config = str(ROOT / "configs" / "llama2_7b_chat.yaml")
    assert run_main(entry.main, ["--config", config, *arguments]) in (1, 2)
    assert message in capsys.readouterr().err


# Topologies


def test_a_gpu_without_the_plugin_is_refused(monkeypatch):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UsageError, match="--topology h100:8 compiles with JAX's CUDA plugin, which"
    ):
        topology_devices("h100:8")


@pytest.mark.parametrize(
    ("name", "shape"), [("l4", "1x1x1"), ("h100:8", "1x1x8"), ("b200:2x8", "2x1x8")]
)
def test_names_of_gpus_say_how_many(monkeypatch, name, shape):
    calls = []

    def described(**settings):
        calls.append(settings)
        return SimpleNamespace(devices=["a"])

    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(topology.topologies, "get_topology_desc", described)
    assert topology_devices(name) == ["a"]
    assert calls[0]["topology"] == shape and calls[0]["platform"] == "cuda"
    assert GPUS[name.split(":")[0]] in calls[0]["target_config"]


@pytest.mark.parametrize(("name", "bounds"), [("v5e:1", (1, 1, 1)), ("v5e:4x4", None)])
def test_a_tpu_may_be_a_single_chip(monkeypatch, name, bounds):
    """libtpu takes a host to have several chips, if nothing else is said."""
    calls = []

    def described(**settings):
        calls.append(settings)
        return SimpleNamespace(devices=["a"])

    monkeypatch.setitem(sys.modules, "libtpu", SimpleNamespace())
    monkeypatch.setattr(topology.topologies, "get_topology_desc", described)
    assert topology_devices(name) == ["a"]
    assert calls[0].get("chips_per_host_bounds") == bounds


def test_every_gpu_has_what_the_compiler_asks():
    for name in GPUS.values():
        chip = CHIPS[name]
        assert f"memory_bandwidth: {int(chip.bandwidth)}" in gpu_target(name, chip)
        assert chip.core.shared_per_block <= chip.core.shared
        assert chip.float16 and chip.int8 and chip.float16 < chip.int8


def test_a_planned_gpu_has_the_share_of_its_memory_that_jax_takes():
    def unknown():
        raise NotImplementedError

    device = SimpleNamespace(platform="gpu", device_kind="NVIDIA L4", memory_stats=unknown)
    assert memory_of(device) == 0.75 * 24e9


def planned(folder: Path, *arguments: str) -> tuple[dict, str]:
    """Figures and stderr of `plan` for a tiny target, compiled as for users (conftest.py)."""
    shape = {
        "model_type": "llama",
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
    }
    (folder / "shape.json").write_text(json.dumps(shape))
    target = {"source": "hf:a/b", "shape": str(folder / "shape.json"), "dtype": "bfloat16"}
    train = {"batch": 4, "row_tokens": 64, "loss_rows": 64, "late": "none"}
    config = {"target": target, "train": train, "decode": {"levels": 1}}
    (folder / "run.yaml").write_text(json.dumps(config))
    command = [sys.executable, "-m", "beagle_jax.plan", "--config", str(folder / "run.yaml")]
    settings = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0", "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    paths = f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"
    done = subprocess.run(
        [*command, *arguments, "--json", "-"],
        env={**os.environ, **settings, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout), done.stderr


@pytest.mark.parametrize(
    ("package", "name", "kind"),
    [
        ("jax_cuda13_plugin", "l4:2", "NVIDIA L4"),
        ("libtpu", "v5e:2x2", "TPU v5 lite"),
    ],
)
def test_devices_that_are_not_there_compile_decoding_and_training(tmp_path, package, name, kind):
    pytest.importorskip(package, reason="needs the compiler of these devices")
    spread = "mesh.tensor=2" if name == "l4:2" else "mesh.tensor=4"
    figures, shown = planned(tmp_path, "--decode", "--topology", name, spread)
    assert figures["devices"]["kind"] == kind and shown == ""
    step, speculative = (figures["programs"][key] for key in ("step", "round"))
    assert speculative["kernels"] > step["kernels"] > 5 and step["collectives"] > 2
    assert figures["least_ms"]["round"] > figures["least_ms"]["step"] > 0
    assert step["fits"] and figures["fits"]["256"] > 1
    training, shown = planned(tmp_path, "--topology", name, "mesh.fsdp=2")
    assert training["stages"]["early"]["fits"] and shown == ""
