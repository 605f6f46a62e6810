"""Benchmarks for large devices or quiet machines, run at toy size so that they stay usable."""

import json
import math
import re
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from benchmark_cases import benchmark
from command_cases import make_workplace

from beagle_jax.config import load_config
from beagle_jax.decoding.tree import dynamic_tree
from beagle_jax.evaluation.suites import suite
from beagle_jax.model.beagle import BeagleSpec, init_draft
from beagle_jax.model.tensors import param_table
from beagle_jax.training import cost
from beagle_jax.weights.draft import Draft, load_draft, save_draft
from beagle_jax.weights.target import load_target


@pytest.mark.slow
def test_large_shapes_at_toy_size(capsys, monkeypatch):
    bench = benchmark("large_shapes")
    monkeypatch.setattr(bench, "ROWS", (1, 8))
    bench.measure("toy", jnp.dtype("bfloat16"), 20.0, dynamic_tree(2, 2, 5), 8)
    printed = capsys.readouterr().out
    for line in ("verify, ms by rows", "bandwidth floor", "draft, ms", "round, ms"):
        assert line in printed


def test_shapes_are_the_published_sizes():
    shapes = benchmark("large_shapes").SHAPES

    def count(spec):
        return sum(math.prod(shape) for _, shape in param_table(spec).values())

    assert (count(shapes["llama2-7b"]), count(shapes["llama3-8b"])) == (
        6_738_415_616,
        8_030_261_248,
    )


def test_export_at_toy_size(tmp_path, capsys):
    bench = benchmark("export_draft")
    bench.write_inputs(tmp_path, "toy")
    assert bench.measure(tmp_path, 120.0, 1e9) and not bench.measure(tmp_path, 120.0, 1e9), (
        "the second finds the folder in its way"
    )
    assert (
        "export and parity check" in capsys.readouterr().out
        and (tmp_path / "out" / "modeling_beagle.py").exists()
    )


TOY = BeagleSpec(
    hidden_size=32,
    intermediate_size=48,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rope_theta=1e4,
    rms_norm_eps=1e-5,
)


def test_train_step_at_toy_size(capsys):
    pytest.importorskip("torch")
    timings = benchmark("train_step").measure(
        TOY, 64, rows=2, width=24, steps=2, repeats=1, compile_it=False
    )
    assert set(timings) == {
        "beagle early",
        "beagle late s=2",
        "eagle early",
        "eagle late s=2",
        "torch EAGLE eager",
        "torch EAGLE eager s=2",
    }
    assert "times the tokens/s of the faster torch step s=2" in capsys.readouterr().out


def test_torch_step_simulates():
    """Only with simulated steps does the draft read its own states, from the second step on."""
    torch = pytest.importorskip("torch")
    bench = benchmark("train_step")
    torch.manual_seed(0)
    block = bench.EagleBlock(32, 48, 4, 2, 8, 1e4, 1e-5)
    e, h = torch.randn(1, 9, 32), torch.randn(1, 9, 32)
    memory: list = []
    first = block(e, h, memory, 0)
    changed = h.clone()
    changed[:, 5] += 1
    other = block(e, changed, [], 0)
    # Attention is causal.
    assert torch.equal(first[:, :5], other[:, :5]) and not torch.allclose(first[:, 5], other[:, 5])
    second = block(e, first, memory, 1)
    assert len(memory) == 2 and not torch.allclose(first, second)


@pytest.mark.slow
def test_step_memory_at_toy_size(tmp_path, capsys):
    bench = benchmark("step_memory")
    steps, widths = [1, 3], [64]
    measured = bench.measure(TOY, 64, 1, steps, widths, 3)
    bench.plot(measured, steps, widths, tmp_path / "memory.png")
    grown = {form: sizes[-1] / sizes[0] for form, sizes in measured["s"].items()}
    assert (
        grown["ours, detached"] < 1.15
        and grown["ours, gradients kept"] < 1.3
        and grown["training-time test"] > 1.5
    ), grown
    assert (
        tmp_path / "memory.png"
    ).stat().st_size > 1000 and "training-time test" in capsys.readouterr().out


def test_planned_operations_are_those_of_a_large_step(monkeypatch):
    """Within 5 %: at these sizes, what is no product hardly counts."""
    bench = benchmark("step_flops")
    config = load_config(
        bench.ROOT / "configs" / "llama2_7b_chat.yaml",
        ["train.row_tokens=64", "train.batch=1", "train.loss_rows=64", "train.early.window=5"],
    )
    for stage in ("early", "late"):
        assert 0.95 < bench.ratio(config, stage)["ratio"] <= 1, stage
    cost_of_row = cost.row_flops
    monkeypatch.setattr(cost, "row_flops", lambda *sizes: 0.9 * cost_of_row(*sizes))
    assert bench.ratio(config, "early")["ratio"] < 0.95  # planted: a product is left out


def test_plans_for_tpus_are_kept_and_shown(tmp_path, monkeypatch, capsys):
    """Each call plans one topology, and a stage that does not fit is reported.

    docs/results.md shows the table of the stored plans.
    """
    bench = benchmark("plan_tpu")
    seen = []

    def plan(config, options):
        seen.append((config.train.row_tokens, config.mesh.fsdp, options.topology))
        stage = {
            "compiler_total": 3 * 2**30,
            "refusal": "",
            "tokens_a_step": config.train.batch * 2048,
            "fits": True,
        }
        devices = {
            "count": 16,
            "mesh": {"data": 1, "fsdp": config.mesh.fsdp, "tensor": 1},
            "memory": 16 * 2**30,
        }
        return "plan", {
            "devices": devices,
            "stages": {"early": stage, "late": stage | {"fits": options.topology == "v5e:4x4"}},
        }

    monkeypatch.setattr(bench, "plan", plan)
    for topology in ("v5e:4x4", "v5p:2x2x2"):
        ask = [
            "plan_tpu.py",
            "--json",
            str(tmp_path / "plans.json"),
            "--configs",
            "llama2_7b_chat",
            "--topologies",
            topology,
        ]
        monkeypatch.setattr("sys.argv", ask)
        bench.main()
    assert seen == [(2048, 16, "v5e:4x4"), (2048, 8, "v5p:2x2x2")]
    first, second = capsys.readouterr().out.splitlines()[-2:]
    assert (
        first
        == "| llama2_7b_chat | v5e:4x4, 16 chips | fsdp 16 | 16 x 2048 | 3.0 / 3.0 | 16 | yes |"
        and second.endswith("| NO |")
    )
    stored = json.loads((bench.ROOT / "benchmarks" / "results" / "plan_tpu.json").read_text())
    assert stored and bench.table(stored) in (bench.ROOT / "docs" / "results.md").read_text()


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> SimpleNamespace:
    """A tiny target and a random draft for it."""
    made = make_workplace(tmp_path_factory.mktemp("run"))
    spec = BeagleSpec.from_target(
        load_target(str(made.folder / "target"), "float32", "unused").spec
    )
    save_draft(
        made.folder / "run" / "draft", Draft(spec, init_draft(spec, jax.random.key(0)), None, {})
    )
    return made


def _printed(bench, monkeypatch, capsys, *arguments) -> str:
    monkeypatch.setattr(sys, "argv", ["benchmark", *map(str, arguments)])
    bench.main()
    return capsys.readouterr().out


def test_the_oracle_s_rounds_are_told_by_phase(workplace, monkeypatch, capsys):
    bench = benchmark("oracle_draft")
    monkeypatch.setattr(bench, "suite", lambda *_: suite(str(workplace.folder / "eval.jsonl"), 3))
    printed = _printed(
        bench, monkeypatch, capsys, "--config", workplace.config, "--levels", 2, "--new-tokens", 13
    )
    whole, verify, draft, *_, ratio = map(
        float,
        re.search(
            r"chain of 2: round ([\d.]+) ms, verify alone ([\d.]+), draft alone ([\d.]+), "
            r"accept ([\d.]+), append ([\d.]+), left for the loop (-?[\d.]+); ratio ([\d.]+)",
            printed,
        ).groups(),
    )
    assert ratio > 0 and whole > 0 <= verify + draft


def test_speeds_beside_transformers_at_toy_size(workplace, monkeypatch, capsys):
    options = [
        "--config",
        workplace.config,
        "--prompts",
        workplace.folder / "eval.jsonl",
        "--limit",
        2,
        "--new-tokens",
        8,
    ]
    printed = _printed(benchmark("against_transformers"), monkeypatch, capsys, *options)
    for way in ("transformers ", "transformers, prompt lookup", "plain ", "speculative "):
        assert re.search(
            rf"^{way} .* tok/s .*x of plain   same tokens as plain 2/2$", printed, re.M
        ), printed
    assert re.search(
        r"^plain / transformers +[\d.]+x\nspeculative / plain +[\d.]+x$", printed, re.M
    )


def test_tau_on_first_turns_at_toy_size(workplace, monkeypatch, capsys):
    path = workplace.folder / "turns.jsonl"
    path.write_text(json.dumps({"turns": ["Why is it so?", "And now?"]}) + "\n")
    printed = _printed(
        benchmark("mt_bench"),
        monkeypatch,
        capsys,
        path,
        "--config",
        workplace.config,
        "--levels",
        2,
    )
    assert "chain of 2; step-alpha by depth" in printed and printed.count(" 1/1\n") == 2


def test_speed_of_writing_at_toy_size(workplace, monkeypatch, capsys):
    printed = _printed(
        benchmark("writing_answers"),
        monkeypatch,
        capsys,
        "--config",
        workplace.config,
        "--prompts",
        4,
    )
    assert re.search(r"4 prompts, batch 16: \d+ tokens in [\d.]+ s = \d+ tok/s", printed)


def vllm_results(**changes) -> dict:
    """Results of a draft by two engines; changes: of vLLM's run."""
    run = {"same_as_plain": 8, "rounds": 316, "accepted_by_place": [137, 43]}
    return {"beagle": {"vllm": {**run, **changes}, "beagle_jax": run}}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, []),
        ({"same_as_plain": 7}, ["beagle, vllm: other text than without a draft"]),
        ({"rounds": 317}, ["beagle, vllm: other rounds than beagle_jax"]),
        ({"accepted_by_place": [137, 42]}, ["beagle, vllm: other rounds than beagle_jax"]),
    ],
)
def test_what_differs_between_vllm_and_us_is_listed(changes, expected):
    assert benchmark("vllm_cpu").wrong(vllm_results(**changes), 8) == expected


def test_drafts_are_counted_by_place_as_vllm_does(workplace):
    """A round that accepts two drafts accepts one at each of the first two places."""
    bench = benchmark("vllm_cpu")
    target = load_target(str(workplace.folder / "target"), "float32", "unused")
    draft = load_draft(workplace.folder / "run" / "draft", target)
    run = bench.by_us(target, draft, [[5, 6, 7]], 12)
    first, second = run["accepted"]
    # a round writes its accepted drafts and one token more, and the last one past the end
    assert 1 + run["rounds"] + first + second - len(run["tokens"][0]) in (0, 1, 2)
    assert first >= second and bench.figures(run, run)["same_as_plain"] == 1
    other = {**run, "tokens": [[1, 2]]}
    assert bench.figures(other, run)["same_as_plain"] == 0


def test_the_page_shows_what_vllm_measured():
    bench = benchmark("vllm_cpu")
    stored = json.loads((bench.ROOT / "benchmarks" / "results" / "vllm_cpu.json").read_text())
    assert bench.table(stored["drafts"]) in (bench.ROOT / "docs" / "results.md").read_text()
    assert bench.wrong(stored["drafts"], stored["made_with"]["prompts"]) == []


def answering(names: list[str], other: str = "") -> dict:
    """Engines that answer in 1, 2, 3 .. seconds; `other` writes other tokens."""
    return {
        name: lambda prompt, name=name, at=at: {
            "tokens": [*prompt, int(name == other)],
            "seconds": at + 1.0,
        }
        for at, name in enumerate(names)
    }


def test_speeds_are_compared_prompt_by_prompt():
    bench = benchmark("vllm_speed")
    names = ["vllm plain", "vllm beagle", *(f"beagle_jax {x}" for x in ("plain", "chain", "tree"))]
    rows = bench.in_turn(answering(names), [[1], [2]], 3)
    assert rows == [dict(zip(names, (1.0, 2.0, 3.0, 4.0, 5.0), strict=True))] * 6
    ratios = bench.ratios(rows)
    assert ratios["vLLM, Beagle : plain"] == [0.5, 0.5, 0.5]  # vLLM's draft makes it half as fast
    assert "| beagle_jax : vLLM, chain | 0.50 | 0.50 to 0.50 |" in bench.table(ratios)
    with pytest.raises(SystemExit, match=r"prompt 0: \['beagle_jax tree'\] wrote other tokens"):
        bench.in_turn(answering(names, "beagle_jax tree"), [[1]], 1)


def test_the_page_shows_the_speeds_beside_vllm():
    bench = benchmark("vllm_speed")
    stored = json.loads((bench.ROOT / "benchmarks" / "results" / "vllm_speed.json").read_text())
    assert bench.table(stored["ratios"]) in (bench.ROOT / "docs" / "results.md").read_text()
