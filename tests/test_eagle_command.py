"""An EAGLE draft through the commands: trained in both stages, written, continued, planned."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from command_cases import make_target, trained, write_lines  # noqa: F401 (the fixture)

from beagle_jax import plan, train
from beagle_jax.errors import run_main
from beagle_jax.model.eagle import EagleSpec
from beagle_jax.weights.draft import Draft, load_draft
from beagle_jax.weights.target import load_target

pytestmark = pytest.mark.usefixtures("shared_steps")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> SimpleNamespace:
    """A target, answered chats and a config of very few steps."""
    folder = tmp_path_factory.mktemp("eagle")
    make_target(folder / "target")
    chats = [
        [("user", f"What is {number}?"), ("assistant", f"{number} is {number}.")]
        for number in range(8)
    ]
    lines = [
        {"messages": [{"role": role, "content": text} for role, text in chat]} for chat in chats
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = {
        "target": {"source": str(folder / "target")},
        "draft": {"kind": "eagle", "hot_tokens": 200},
        "data": {"source": str(folder / "chats.jsonl"), "folder": str(folder / "data")},
        "train": {
            "folder": str(folder / "run"),
            "batch": 4,
            "row_tokens": 80,
            "checkpoint_every": 2,
            "early": {"steps": 3, "window": 1, "warmup": 1, "learning_rate": 1e-3},
            "late": {
                "steps": 2,
                "dense": True,
                "simulation_steps": 2,
                "warmup": 1,
                "learning_rate": 1e-3,
            },
        },
        "decode": {"levels": 2},
        "eval": {
            "suites": [write_lines(folder / "eval.jsonl", ["Why is it so?", "Who are you?"])],
            "max_new_tokens": 16,
        },
        "log": {"every": 1},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    return SimpleNamespace(
        folder=folder,
        config=str(folder / "run.yaml"),
        target=load_target(str(folder / "target"), "float32", "unused"),
    )


def log_of(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["stage"] != "data"]


def draft_of(trained, run: str) -> Draft:
    return load_draft(trained.folder / run / "draft", trained.target.spec, EagleSpec)


def test_training_leaves_log_and_draft(trained):
    log = log_of(trained.folder / "run")
    assert [(line["stage"], line["step"], len(line["top1_by_offset"])) for line in log] == [
        ("early", 1, 1),
        ("early", 2, 1),
        ("early", 3, 1),
        ("late", 1, 2),
        ("late", 2, 2),
    ]
    written = json.loads((trained.folder / "run" / "draft" / "config.json").read_text())
    assert (
        written["model_type"],
        written["draft"]["kind"],
        written["training"]["late"]["objective"],
    ) == ("eagle_draft", "eagle", "test_time")
    draft = draft_of(trained, "run")
    assert draft.spec == EagleSpec.from_target(trained.target.spec) and len(draft.hot_ids) == 200
    assert {name: array.shape for name, array in draft.params.items()} == draft.spec.param_shapes()
    assert np.abs(draft.params["fc_bias"]).max() > 0  # it begins at zero


def test_a_second_run_goes_on_from_the_checkpoints(trained, capsys):
    before = (trained.folder / "run" / "draft" / "model.safetensors").read_bytes()
    assert run_main(train.main, ["--config", trained.config]) == 0
    assert "late stage: continues from step 2 of 2" in capsys.readouterr().err
    assert (trained.folder / "run" / "draft" / "model.safetensors").read_bytes() == before and len(
        log_of(trained.folder / "run")
    ) == 5


def test_states_computed_in_the_step_give_the_same_losses(trained):
    folder = trained.folder / "online"
    assert (
        run_main(
            train.main,
            [
                "--config",
                trained.config,
                "data.states=online",
                f"train.folder={folder}",
                "train.late=none",
            ],
        )
        == 0
    )
    for disk, online in zip(log_of(trained.folder / "run")[:3], log_of(folder), strict=True):
        # Three steps apart, of rows that were summed in another order.
        assert online["loss"] == pytest.approx(disk["loss"], rel=1e-3)


def test_training_goes_on_from_an_eagle_draft_only(trained, capsys):
    """It continues with the draft's own settings, which may differ from the target's."""
    given, folder = trained.folder / "run" / "draft", trained.folder / "further"
    options = [
        "--config",
        trained.config,
        f"draft.init={given}",
        f"train.folder={folder}",
        "train.late=none",
        "train.early.learning_rate=0",
    ]
    assert run_main(train.main, options) == 0
    assert [line["stage"] for line in log_of(folder)] == ["early"] * 3
    for name, array in draft_of(trained, "further").params.items():
        np.testing.assert_array_equal(array, draft_of(trained, "run").params[name])
    capsys.readouterr()
    assert (
        run_main(
            train.main, [*options, "draft.kind=beagle", f"train.folder={trained.folder}/other"]
        )
        == 1
    )
    assert (
        f"{given}/config.json: model_type is 'eagle_draft', expected 'beagle_draft'"
        in capsys.readouterr().err
    )


def test_tau_is_measured_while_training(trained):
    folder = trained.folder / "looking"
    assert (
        run_main(
            train.main,
            [
                "--config",
                trained.config,
                f"train.folder={folder}",
                "eval.every=2",
                "train.late=none",
            ],
        )
        == 0
    )
    looked = [line for line in log_of(folder) if line.get("split") == "decoding"]
    assert [(line["stage"], line["step"]) for line in looked] == [("early", 2), ("early", 3)]
    assert all(1 <= line["tau"] <= 3 and line["tokens"] <= 2 * 15 for line in looked)
    written = json.loads((folder / "draft" / "config.json").read_text())
    assert written["model_type"] == "eagle_draft" and written["best"]["tau"] == max(
        line["tau"] for line in looked
    )


def test_the_plan_is_of_an_eagle_draft(trained, capsys):
    assert run_main(plan.main, ["--config", trained.config, "train.late=none", "--json", "-"]) == 0
    figures, numbers = (
        json.loads(capsys.readouterr().out),
        sum(array.size for array in draft_of(trained, "run").params.values()),
    )
    assert figures["draft"]["parameters"] == numbers and figures["disk"]["draft"] == 4 * numbers
    assert (
        set(figures["stages"]) == {"early"} and figures["stages"]["early"]["weights"] == 4 * numbers
    )
