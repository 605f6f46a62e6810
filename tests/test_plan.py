"""The plan of a run: operations, bytes, verdicts, compiled for virtual devices and for a TPU.

The TPU's compiler is libtpu, where it is installed.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from beagle_jax import plan as entry
from beagle_jax import topology
from beagle_jax.commands.plan import disk, table
from beagle_jax.config import (
    Config,
    DataConfig,
    DraftConfig,
    EarlyStage,
    LateStage,
    MeshConfig,
    TargetConfig,
    TestTimeStage,
    TrainConfig,
)
from beagle_jax.data.folder import write_part
from beagle_jax.data.loader import BatchLoader
from beagle_jax.data.states import keep_states, target_states
from beagle_jax.data.template import Row
from beagle_jax.errors import UserError, run_main
from beagle_jax.hardware import CHIPS
from beagle_jax.model.beagle import BeagleSpec
from beagle_jax.model.eagle import EagleSpec
from beagle_jax.model.target import TargetSpec
from beagle_jax.sharding import make_mesh
from beagle_jax.training import cost
from beagle_jax.training.cost import row_flops, stage_cost
from beagle_jax.training.step import make_steps
from beagle_jax.weights.orbax_target import abstract_params
from beagle_jax.weights.shape import parameter_count

ROOT = Path(__file__).parent.parent
V, L = 512, 48
TARGET = TargetSpec(
    vocab_size=V,
    hidden_size=64,
    intermediate_size=128,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    rope_theta=1e4,
    rms_norm_eps=1e-5,
    max_positions=256,
    tie_embeddings=True,
)
SPEC = BeagleSpec.from_target(TARGET)
EARLY = EarlyStage(steps=3, window=5)
LATE = LateStage(steps=2, window=4, simulation_steps=4)


def config_of(**changes) -> Config:
    train = TrainConfig(
        **{
            "batch": 2,
            "row_tokens": L,
            "loss_rows": 2 * L,
            "early": EARLY,
            "late": LATE,
            "noise": "none",
        }
        | changes
    )
    return Config(target=TargetConfig(source="x"), train=train)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(data=1), jax.devices()[:1])


def cost_and_count(name: str, config: Config, mesh) -> tuple[cost.StageCost, float]:
    """Returns a stage's cost, and the operations that XLA counts in its program."""
    counted = []
    compile_ = jax.stages.Lowered.compile

    def counting(lowered, *arguments, **settings):
        made = compile_(lowered, *arguments, **settings)
        analysis = made.cost_analysis()
        counted.append((analysis[0] if isinstance(analysis, list) else analysis)["flops"])
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.stages.Lowered, "compile", counting)
        return stage_cost(name, config, TARGET, V, mesh), counted[-1]


@pytest.fixture(scope="module", params=["early", "late"])
def compiled(request, mesh):
    return request.param, *cost_and_count(request.param, config_of(), mesh)


def near(planned_flops: float, counted: float) -> bool:
    """XLA also counts operations that are no products, a sixth of the work at these sizes."""
    return 0.75 * counted < planned_flops < 1.05 * counted


def test_operations_are_those_that_xla_counts(compiled):
    name, cost, counted = compiled
    assert near(cost.flops, counted), (cost.flops, counted)
    stage = EARLY if name == "early" else LATE
    for planted in (
        dict(spec=replace(SPEC, intermediate_size=256)),
        dict(vocab=2 * V),
    ):
        sizes = dict(spec=SPEC, stage=stage, vocab=V, L=L, T=L - 1) | planted
        assert not near(2 * row_flops(**sizes), counted), planted


@pytest.mark.parametrize("name", ["early", "late"])
def test_operations_of_an_eagle_step(name, mesh):
    """All rows of the loss fit in one chunk, because XLA counts a loop's body once."""
    early, late = EARLY.changed(window=1), TestTimeStage(steps=2, simulation_steps=4)
    config = config_of(early=early, late=late, loss_rows=(2 if name == "early" else 8) * L)
    config = config.changed(draft=DraftConfig(kind="eagle"))
    cost, counted = cost_and_count(name, config, mesh)
    assert near(cost.flops, counted), (cost.flops, counted)
    assert cost.weights == 4 * sum(
        int(np.prod(shape)) for shape in EagleSpec.from_target(TARGET).param_shapes().values()
    )
    sizes = dict(spec=EagleSpec.from_target(TARGET), vocab=V, L=L, T=L - 1)
    by_stage = {
        "early": row_flops(stage=early, **sizes),
        "late": row_flops(stage=late, **sizes),
    }
    # s times the work.
    assert cost.flops == 2 * by_stage[name] and 3.5 < by_stage["late"] / by_stage["early"] < 4.2
    wider = sizes | {"spec": replace(sizes["spec"], intermediate_size=256)}
    assert not near(
        2 * row_flops(stage=early if name == "early" else late, **wider),
        counted,
    )


def test_operations_of_a_multi_token_step(mesh):
    """Twelve windows per row with 4 + 3 + 2 + 1 predictions each, all in one chunk of the loss."""
    late = LATE.changed(multi_token=True)
    cost, counted = cost_and_count("late", config_of(late=late, loss_rows=2 * 12 * 10), mesh)
    assert near(cost.flops, counted), (cost.flops, counted)
    assert not near(2 * row_flops(SPEC, LATE, V, L, L - 1), counted)


def test_bytes_are_those_of_the_shapes(compiled):
    _, cost, _ = compiled
    numbers = sum(int(np.prod(shape)) for shape in SPEC.param_shapes().values())
    assert (cost.weights, cost.frozen) == (4 * numbers, 2 * 4 * V * 64)
    assert 8 * numbers <= cost.optimizer <= 8 * numbers + 64  # two moments and counters
    assert cost.batch == 2 * (L * 4 + L * 64 * 4 + (L - 1) + 4 + 4)
    assert cost.compiler_total >= cost.held and cost.temporaries > 0 and not cost.refusal


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16", "int8"])
def test_states_are_planned_in_the_dtype_that_the_loader_gives_them(tmp_path, dtype):
    rows, states = [Row([1] * 9, [True] * 9)] * 2, [np.ones((9, 64), jnp.bfloat16)] * 2
    keep_states(tmp_path / "part-0000.states", rows, states, dtype)
    stored = target_states(
        {"embed_VD": np.zeros((1, 64), jnp.bfloat16)},
        TARGET,
        rows,
        tmp_path / "part-0000.states",
        dtype,
    )
    batch = BatchLoader(rows, stored, batch=2, row_tokens=L, seed=0).batch_at(0)
    config = config_of().changed(
        target=TargetConfig(source="x", dtype="bfloat16"),
        data=DataConfig(states_dtype=dtype),
    )
    planned = cost.batch_shapes(config, BeagleSpec.from_target(TARGET))
    assert (planned.inputs_BLI.shape, planned.inputs_BLI.dtype) == (
        batch.inputs_BLI.shape,
        batch.inputs_BLI.dtype,
    )
    assert (planned.scale_BL is None) == (batch.scale_BL is None) == (dtype != "int8")


def test_the_target_s_own_pass_is_part_of_an_online_step(compiled, mesh):
    name, stored, _ = compiled
    online = abstract_params(TARGET, jnp.dtype(jnp.float32), mesh)
    cost = stage_cost(name, config_of(), TARGET, V, mesh, online)
    whole = 4 * parameter_count(TARGET)
    assert cost.frozen == stored.frozen + whole and cost.batch == stored.batch - 2 * L * 64 * 4
    per_token = 2 * 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)  # two layers
    assert cost.flops - stored.flops == 2 * L * (per_token + 2 * 4 * L * 64)


def test_a_target_that_stays_to_measure_tau_with_is_counted(mesh, capsys, monkeypatch):
    """Its layers and norm add to the tables that the step reads anyway.

    A head cut to hot tokens is a copy.
    """
    params = abstract_params(TARGET, jnp.dtype(jnp.float32), mesh)
    config = config_of(row_tokens=16)
    alone, beside = (
        stage_cost("early", config, TARGET, V, mesh, None, resident) for resident in (None, params)
    )
    more = 4 * (parameter_count(TARGET) - V * 64)
    assert (beside.frozen - alone.frozen, beside.compiler_total - alone.compiler_total) == (
        more,
        more,
    ) and beside.flops == alone.flops
    calls = []
    monkeypatch.setattr(
        "beagle_jax.commands.plan.stage_cost", lambda *arguments: calls.append(arguments) or alone
    )
    for every in (0, 7):
        planned(
            capsys,
            "--config",
            str(ROOT / "configs" / "quickstart.yaml"),
            f"target.shape={ROOT}/configs/shapes/llama_2_7b.json",
            f"eval.every={every}",
        )
    assert [arguments[-1] is None for arguments in calls] == [True, True, False, False]


def test_a_refusal_of_the_compiler_is_part_of_the_plan(mesh, monkeypatch):
    def full(*_):
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20G of 16G hbm."
        )

    monkeypatch.setattr(jax.stages.Lowered, "compile", full)
    cost = stage_cost("early", config_of(), TARGET, V, mesh)
    assert (
        cost.refusal == "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm"
        and cost.temporaries is None
    )
    monkeypatch.setattr(
        jax.stages.Lowered,
        "compile",
        lambda *_: (_ for _ in ()).throw(jax.errors.JaxRuntimeError("INTERNAL: a bug")),
    )
    with pytest.raises(jax.errors.JaxRuntimeError, match="a bug"):
        stage_cost("early", config_of(), TARGET, V, mesh)


def planned(capsys, *arguments: str) -> dict:
    assert run_main(entry.main, [*arguments, "--json", "-"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("name", "parameters", "drafted"),
    [
        ("llama2_7b_chat", 6_738_415_616, 202_383_360),
        ("llama3_8b_instruct", 8_030_261_248, 218_112_000),
        # of Llama 2's shape
        pytest.param("vicuna_7b", 6_738_415_616, 202_383_360, marks=pytest.mark.slow),
    ],
)
def test_the_papers_targets_are_planned_on_a_laptop_without_weights(
    capsys, monkeypatch, name, parameters, drafted
):
    monkeypatch.chdir(ROOT)  # target.shape is relative
    short = (
        "train.batch=1",
        "train.row_tokens=16",
        "train.loss_rows=16",
        "train.late.steps=0",
        "mesh.data=-1",
        "mesh.fsdp=1",
    )
    report = planned(capsys, "--config", str(ROOT / "configs" / f"{name}.yaml"), *short)
    assert (
        report["target"]["parameters"] == parameters and report["target"]["bytes"] == 2 * parameters
    )
    assert (
        report["draft"]["parameters"] == drafted and report["disk"]["state_of_a_token"] == 2 * 4096
    )
    early = report["stages"]["early"]
    assert (
        early["weights"] == 4 * drafted and early["compiler_total"] > early["held"] > 12 * drafted
    )
    assert report["disk"]["checkpoint"] == 12 * drafted and "late" not in report["stages"]
    assert "does NOT fit" not in table(report) and "early: compiles" in table(report)


def told_disk(tmp_path, **changes) -> dict:
    data = {
        "source": "self",
        "folder": str(tmp_path / "data"),
        "answer_tokens": 1000,
        "max_prompt_tokens": 100,
        "max_answer_tokens": 50,
    }
    accumulate = changes.pop("accumulate", 1)
    return disk(
        config_of(accumulate=accumulate, early=EARLY.changed(steps=4)).changed(
            data=DataConfig(**data | changes)
        ),
        64,
        1000,
    )


def test_the_disk_of_a_run_is_that_of_its_text(tmp_path):
    """The paper's configs read chats as they are.

    Their number of tokens does not follow from the longest prompt.
    """
    self_written = told_disk(tmp_path)
    # Answers of half the length.
    tokens, states = self_written["text_tokens_at_most"], self_written["states_at_most"]
    assert (tokens, states) == (5000, 5000 * 64 * 4)
    assert told_disk(tmp_path, states="online")["states_at_most"] == 0
    given = told_disk(tmp_path, source="hf:org/name")
    assert (
        given["text_tokens_at_most"] is None
        and given["states_at_most"] is None
        and given["state_of_a_token"] == 64 * 4
    )
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "settings.json").write_text("{}")
    write_part(tmp_path / "data", 0, [Row([1] * 30, [True] * 30)] * 7)
    assert told_disk(tmp_path, source="hf:org/name")["text_tokens_at_most"] is None  # not whole yet
    (tmp_path / "data" / "all").touch()
    assert (
        told_disk(tmp_path, source="hf:org/name")["text_tokens_at_most"]
        == told_disk(tmp_path)["text_tokens_at_most"]
        == 210
    )


def test_a_checkpoint_holds_the_sum_of_gradients_too(tmp_path, mesh):
    """It is as large as the saved state."""
    for accumulate, numbers in ((1, 3), (2, 4)):
        assert told_disk(tmp_path, accumulate=accumulate)["checkpoint"] == numbers * 4 * 1000
        train = config_of(accumulate=accumulate, early=EARLY.changed(steps=4)).train
        init = make_steps(SPEC, train, EARLY, mesh)[2]
        params = {name: jnp.zeros(shape) for name, shape in SPEC.param_shapes().items()}

        def count(tree):
            return sum(leaf.size for leaf in jax.tree.leaves(tree))

        # The rest are counters.
        assert 0 <= count(jax.eval_shape(init, params)) - numbers * count(params) < 10


def test_virtual_devices_split_the_draft(tmp_path):
    """In a separate process, since the number of devices is fixed at the start."""
    shape = tmp_path / "shape.json"
    shape.write_text(
        json.dumps(
            {
                "model_type": "llama",
                "vocab_size": V,
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_hidden_layers": 1,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
            }
        )
    )
    config = tmp_path / "run.yaml"
    config.write_text(
        f"target: {{source: x, shape: {shape}}}\ntrain: {{batch: 4, row_tokens: {L}, late: "
        "{steps: 0}}\n"
    )
    command = [
        sys.executable,
        "-m",
        "beagle_jax.plan",
        "--config",
        str(config),
        "--devices",
        "4",
        "mesh.fsdp=4",
        "--json",
        "-",
    ]
    done = subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["devices"] == {
        "count": 4,
        "kind": "cpu",
        "mesh": {"data": 1, "fsdp": 4, "tensor": 1},
        "memory": None,
    }
    numbers = sum(int(np.prod(shape)) for shape in SPEC.param_shapes().values())
    # A quarter of each matrix; the two norms are on every device.
    assert report["stages"]["early"]["weights"] == numbers + 3 * 2 * 64


def test_a_batch_that_the_devices_do_not_divide_is_refused(tmp_path, capsys):
    config = tmp_path / "run.yaml"
    config.write_text(f"target: {{source: x, shape: {ROOT}/configs/shapes/llama_2_7b.json}}\n")
    assert run_main(entry.main, ["--config", str(config), "mesh.fsdp=3", "mesh.data=1"]) == 1
    assert "does not fit" in capsys.readouterr().err


def test_a_topology_without_libtpu_or_that_nobody_knows_is_named(monkeypatch, capsys):
    arguments = ["--config", str(ROOT / "configs" / "llama2_7b_chat.yaml"), "--topology", "v5e:4x4"]
    monkeypatch.setitem(sys.modules, "libtpu", None)
    assert run_main(entry.main, arguments) == 2
    assert "which is not installed: pip install 'beagle-jax[tpu]'" in capsys.readouterr().err
    assert run_main(entry.main, [*arguments, "--devices", "8"]) == 2
    assert "--devices and --topology were both given" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "libtpu", object())

    def unknown(**_):
        raise ValueError("no topology v9")

    monkeypatch.setattr(topology.topologies, "get_topology_desc", unknown)
    said = r"--topology v9:4x4: libtpu does not know it \(no topology v9\); "
    with pytest.raises(UserError, match=said + "examples: v5e:1, v5e:4x4"):
        topology.topology_devices("v9:4x4")


def test_a_tpu_that_is_not_there_compiles_the_step():
    pytest.importorskip("libtpu", reason="needs the tpu extra")
    devices = topology.topology_devices("v5e:2x2")
    planned_cost = stage_cost(
        "late", config_of(batch=4), TARGET, V, make_mesh(MeshConfig(fsdp=2), devices)
    )
    assert len(devices) == 4 and devices[0].device_kind in CHIPS
    assert planned_cost.held <= planned_cost.compiler_total < CHIPS[devices[0].device_kind].memory


def test_verdicts_and_hours_are_told():
    stage = {
        "flops": 1e15,
        "weights": 4e9,
        "optimizer": 8e9,
        "frozen": 1e8,
        "batch": 1e6,
        "waiting": 2e6,
        "temporaries": 5e9,
        "compiler_total": 17e9,
        "refusal": "",
        "compile_seconds": 2.0,
        "held": 1,
        "steps": 1000,
        "tokens_a_step": 4096,
        "fits": False,
        "with_remat": None,
        "least_seconds": 0.0213,
        "loader_rate": 2e9,
        "hours_at_40_percent": 3.25,
    }
    refused = stage | {
        "temporaries": None,
        "compiler_total": None,
        "refusal": "RESOURCE_EXHAUSTED: hbm",
    }
    figures = {
        "target": {"source": "x", "parameters": 7, "dtype": "bfloat16", "bytes": 14},
        "draft": {"parameters": 1, "scored_tokens": 2, "vocabulary": 3},
        "disk": {
            "state_of_a_token": 8192,
            "states_at_most": None,
            "checkpoints": 6e9,
            "checkpoint": 1e9,
            "draft": 1e9,
        },
        "loader": {"folder": "data", "readers": 1, "batch_bytes": 1e9, "disk_rate": 1e9},
        "devices": {"count": 16, "kind": "TPU v5 lite", "mesh": {"data": 16}, "memory": 2**34},
        "stages": {"early": stage, "late": refused},
    }
    printed = table(figures)
    assert (
        "16 x TPU v5 lite of 16 GiB, mesh data 16" in printed
        and "3.2 h" in printed
        and "21.3 ms" in printed
        and "each process reads 2.00 GB/s of states, and the disk of data gives 1.00 GB/s"
        in printed
        and "17.00 GB" in printed
        and "8.19 kB a token, for as many tokens as the source has" in printed
    )
    figures["disk"]["states_at_most"] = 5e9
    assert "8.19 kB a token, at most 5.00 GB; checkpoints 6.00 GB" in table(figures)
    assert (
        "early: compiles and does NOT fit; lower train.batch" in printed
        and "late: does NOT fit: RESOURCE_EXHAUSTED: hbm" in printed
    )
