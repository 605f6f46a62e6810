"""A run's page: what is drawn of the log, in which order, and that nothing of it is markup."""

import json
from pathlib import Path
from typing import Any

import pytest
from loop_cases import config_for, loader_of, train_stage

from beagle_jax.config import Config, LateStage, TargetConfig
from beagle_jax.training import page
from beagle_jax.training.frozen import FrozenTarget
from beagle_jax.training.page import CONFIG, write_page

LATE = LateStage(steps=6, learning_rate=1e-2, warmup=2, window=2, simulation_steps=2)


def line(stage: str, step: int, split: str = "", **values: Any) -> dict[str, Any]:
    return {"stage": stage, "step": step, **({"split": split} if split else {}), **values}


def drawn(folder: Path, lines: list[dict[str, Any]], config: Config | None = None) -> str:
    """Writes a log, draws its page and returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in lines))
    write_page(config or config_for(folder, late=LATE))
    return (folder / "report.html").read_text(encoding="utf-8")


def curves(monkeypatch) -> list[tuple]:
    """Returns a list that fills with (label, steps, values) of each drawn line."""
    seen: list[tuple] = []

    def record(axes, steps, values, style, label=None, **_):
        seen.append((label, list(steps), list(values)))
        return plot(axes, steps, values, style, label=label)

    plot = page.Axes.plot
    monkeypatch.setattr(page.Axes, "plot", record)
    return seen


def test_steps_of_later_stages_come_after_those_of_earlier_ones(tmp_path, monkeypatch):
    """A resumed run logs a step again; the newest record of it counts."""
    seen = curves(monkeypatch)
    lines = [
        line("early", 3, loss=3.0),
        line("early", 6, loss=9.0),
        line("early", 6, loss=2.0),
        line("late", 3, loss=5.0),
        line("late", 3, "held_out", loss=6.0),
        line("data", 0, padding=0.5),
    ]
    text = drawn(tmp_path, lines)
    assert seen == [
        ("early training", [3, 6], [3.0, 2.0]),
        ("late training", [15], [5.0]),
        ("late held out", [15], [6.0]),
    ]
    assert "late stage, step 3; 15 of 18 steps of the run" in text


def test_lists_give_a_line_for_each_place_and_held_out_ones_come_first(tmp_path, monkeypatch):
    seen = curves(monkeypatch)
    lines = [line("early", step, top1_by_offset=[0.5, step / 10]) for step in (3, 6)]
    drawn(tmp_path / "a", lines)
    assert seen == [("offset 1", [3, 6], [0.5, 0.5]), ("offset 2", [3, 6], [0.3, 0.6])]
    seen.clear()
    drawn(tmp_path / "b", [*lines, line("early", 6, "held_out", top1_by_offset=[0.1])])
    assert seen == [("offset 1", [6], [0.1])]


@pytest.mark.parametrize(
    ("values", "title"),
    [
        ({"tokens_per_second": 5.0}, "Answer tokens per second"),
        ({"data_wait": 0.1, "checkpoint_wait": 0.2}, "Waiting"),
        ({"utilisation": 0.3}, "Utilisation of the chips"),
        ({"memory_peak": 1e9}, "Memory of a device"),
        ({"learning_rate": 1e-3}, "Learning rate"),
        ({"grad_norm": 2.0}, "Gradient norm before clipping"),
    ],
)
def test_a_chart_is_there_if_the_log_has_it_and_only_then(tmp_path, values, title):
    text = drawn(tmp_path, [line("early", 3, **values)])
    assert text.count("<figcaption>") == 1 and f"<figcaption>{title}</figcaption>" in text


def test_tau_and_the_configuration_are_shown_and_escaped(tmp_path):
    (tmp_path / CONFIG).write_text("target:\n  source: <b>x</b>  # run.yaml\n")
    config = config_for(tmp_path, late=LATE)
    config = config.changed(target=TargetConfig(source="<script>alert(1)</script>"))
    text = drawn(tmp_path, [line("early", 3, "decoding", tau=1.25)], config)
    assert "<figcaption>Tau, decoded</figcaption>" in text and "<td>1.25</td>" in text
    assert "&lt;b&gt;x&lt;/b&gt;  # run.yaml" in text
    assert "<script" not in text and "<b>x" not in text
    assert "://" not in text.replace("http://www.w3.org/", "")  # names of XML, not addresses


def test_a_run_leaves_its_page(tmp_path, tiny_params):
    frozen = FrozenTarget(tiny_params["embed_VD"], tiny_params["embed_VD"])
    train_stage(config_for(tmp_path, late=LATE), frozen, held_out=loader_of(8, 2))
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "early stage, step 12; 12 of 18 steps" in text
    assert "early held_out" in text and text.count("<svg") >= 5


def test_no_page_without_a_record(tmp_path):
    write_page(config_for(tmp_path))
    (tmp_path / "log.jsonl").write_text("")
    write_page(config_for(tmp_path))
    assert not (tmp_path / "report.html").exists()
