"""An EAGLE-3 draft through the commands: configured, planned, trained on streams from disk and
online, and gone on from.
"""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from command_cases import make_target
from convert_cases import refused

from beagle_jax import plan, prepare, train
from beagle_jax.config import Config, EarlyStage, TestTimeStage, TrainConfig, load_config
from beagle_jax.errors import UsageError, run_main
from beagle_jax.model.eagle3 import Eagle3Spec
from beagle_jax.weights.draft import Draft, load_draft
from beagle_jax.weights.target import load_target

pytestmark = pytest.mark.usefixtures("shared_steps")
SETTINGS = {
    "draft": {"kind": "eagle3", "hot_tokens": 200, "state_layers": [0, 1, 2]},
    "train": {
        "batch": 4,
        "row_tokens": 80,
        "early": {"steps": 0},
        "late": {"objective": "test_time", "steps": 3, "warmup": 1, "learning_rate": 1e-3},
    },
    "decode": {"levels": 2},
    "log": {"every": 1},
}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> SimpleNamespace:
    """A target, answered chats and a config of very few steps."""
    folder = tmp_path_factory.mktemp("eagle3")
    make_target(folder / "target")
    chats = [
        [("user", f"What is {number}?"), ("assistant", f"{number} is {number}.")]
        for number in range(8)
    ]
    lines = [
        {"messages": [{"role": role, "content": text} for role, text in chat]} for chat in chats
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = SETTINGS | {
        "target": {"source": str(folder / "target")},
        "data": {"source": str(folder / "chats.jsonl"), "folder": str(folder / "data")},
        "train": SETTINGS["train"] | {"folder": str(folder / "run")},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    return SimpleNamespace(
        folder=folder,
        config=str(folder / "run.yaml"),
        target=load_target(str(folder / "target"), "float32", "unused"),
    )


def draft_of(workplace, run: str) -> Draft:
    return load_draft(workplace.folder / run / "draft", workplace.target.spec, Eagle3Spec)


def stage_of(config: Config) -> TestTimeStage:
    [stage] = config.train.stages_to_run.values()
    return stage


# Settings


def test_defaults_of_the_kind(workplace):
    """Seven steps, 0.8 ** (t - 1), gradients through the steps, no noise, no term on states."""
    config = load_config(workplace.config)
    stage = stage_of(config)
    assert (stage.simulation_steps, stage.detach) == (7, False)
    np.testing.assert_allclose(stage.weights, [0.8**step for step in range(7)])
    assert (config.train.noise, config.train.vloss_weight) == ("none", 0.0)
    plain = stage_of(load_config(workplace.config, ["draft.kind=eagle", "draft.state_layers=null"]))
    assert (plain.simulation_steps, plain.detach, plain.weights) == (4, True, (4.0, 3.0, 2.0, 1.0))


def test_settings_that_are_given_stay():
    given = TestTimeStage(simulation_steps=3, detach=True)
    made = Config(
        target={"source": "x"},
        draft={"kind": "eagle3"},
        train=TrainConfig(early=EarlyStage(steps=0), late=given, noise="uniform"),
    )
    stage = stage_of(made)
    assert (stage.simulation_steps, stage.detach, stage.step_decay) == (3, True, 0.8)
    assert made.train.noise == "uniform"
    weighted = made.changed(
        train={"stages": [TestTimeStage(simulation_steps=2, step_weights=(2.0, 1.0))]}
    )
    assert stage_of(weighted).weights == (2.0, 1.0)
    again = made.changed(train=made.train.changed(seed=3))
    assert stage_of(again) == stage


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["train.vloss_weight=10"], "train.vloss_weight is 10.0, but its loss has no term on sta"),
        (["draft.init=ridge"], "draft.kind is eagle3 and draft.init is ridge"),
        (["draft.state_layers=[2,1]"], "draft.state_layers is [2, 1]; expected layers of the targ"),
        (["draft.kind=eagle"], "draft.state_layers is [0, 1, 2], but a draft of kind eagle reads"),
        (["draft.fc_bias=false"], "draft.fc_bias is false, but a draft of kind eagle3 has no such"),
        (["draft.head_dim=7"], "draft.head_dim is 7; expected an even number"),
        (["draft.state_layers=[]"], "draft.state_layers is []; expected"),
        (
            ["train.late.objective=late"],
            "draft.kind is eagle3 and train.late.dense is false",
        ),
        (
            ["train.early.window=3", "train.early.steps=2"],
            "train.early.window is 3, but EAGLE-3 predicts the next position only",
        ),
        (
            ["train.late.step_decay=0.5", "train.late.step_weights=[1.0]"],
            "train.late.step_weights and train.late.step_decay are both set",
        ),
    ],
)
def test_settings_without_a_meaning_are_refused(workplace, overrides, expected):
    with pytest.raises(UsageError) as caught:
        load_config(workplace.config, overrides)
    assert expected in str(caught.value)


# Runs


@pytest.fixture(scope="module")
def trained(workplace) -> SimpleNamespace:
    assert run_main(train.main, ["--config", workplace.config]) == 0
    return workplace


def test_it_trains_from_streams_on_disk(trained, capsys):
    draft = draft_of(trained, "run")
    assert draft.spec.taps == (0, 1, 2) and len(draft.hot_ids) == 200
    assert draft.params["head_VD"].shape == (200, draft.spec.hidden_size)
    stage = draft.provenance["training"]["late"]
    assert (stage["simulation_steps"], stage["step_decay"], stage["detach"]) == (7, 0.8, False)
    index = json.loads((trained.folder / "data/part-0000.states.json").read_text())
    assert (index["taps"], index["shape"][1]) == ([0, 1, 2], 4 * trained.target.spec.hidden_size)


def test_prepare_announces_the_disk_of_all_streams(trained, tmp_path, capsys):
    folder = f"data.folder={tmp_path / 'data'}"
    assert run_main(prepare.main, ["--config", trained.config, folder]) == 0
    width = 4 * trained.target.spec.hidden_size
    printed = capsys.readouterr()
    assert f"tokens x {width} in float32" in printed.out + printed.err


@pytest.mark.slow
def test_online_streams_train_the_same_draft(trained):
    run = f"train.folder={trained.folder / 'online'}"
    assert run_main(train.main, ["--config", trained.config, run, "data.states=online"]) == 0
    stored, online = (draft_of(trained, name) for name in ("run", "online"))
    for name, array in stored.params.items():
        # 1e-4: three steps of AdamW on streams computed in batches of other widths
        np.testing.assert_allclose(online.params[name], array, atol=1e-4, err_msg=name)


def test_states_of_other_layers_are_not_taken(trained, capsys):
    overrides = ["draft.state_layers=[0,2]", f"train.folder={trained.folder / 'other'}"]
    message = refused(capsys, run_main(train.main, ["--config", trained.config, *overrides]))
    assert "holds states of the target's streams [0, 1, 2], and this draft reads" in message


def test_training_goes_on_from_a_draft_with_its_own_vocabulary(trained, capsys):
    start = f"draft.init={trained.folder / 'run' / 'draft'}"
    run = f"train.folder={trained.folder / 'more'}"
    again = [
        "--config",
        trained.config,
        start,
        run,
        "train.early.steps=2",
        "train.early.window=1",
        "train.late.steps=0",
    ]
    assert run_main(train.main, [*again, "draft.hot_tokens=0"]) == 0
    before, after = (draft_of(trained, name) for name in ("run", "more"))
    np.testing.assert_array_equal(before.hot_ids, after.hot_ids)
    assert before.fingerprint != after.fingerprint
    again[3] = f"train.folder={trained.folder / 'never'}"
    message = refused(capsys, run_main(train.main, [*again, "draft.hot_tokens=100"]))
    assert "draft.hot_tokens is 100, but the head of draft.init" in message
    other = ["draft.state_layers=[0,2]", f"data.folder={trained.folder / 'elsewhere'}"]
    message = refused(capsys, run_main(train.main, [*again, *other]))
    assert (
        "reads the target's streams [0, 1, 2], and draft.state_layers stands for [0, 2]" in message
    )


@pytest.mark.slow
def test_a_plan_counts_streams_head_and_steps(trained, capsys):
    def planned(*overrides: str) -> dict:
        arguments = ["--config", trained.config, "--json", "-", *overrides]
        assert run_main(plan.main, arguments) == 0
        return json.loads(capsys.readouterr().out)

    whole = planned()
    D = trained.target.spec.hidden_size
    assert whole["disk"]["state_of_a_token"] == 4 * D * 4
    shapes = draft_of(trained, "run").spec.param_shapes()
    count = sum(int(np.prod(shape)) for shape in shapes.values())
    assert whole["draft"]["parameters"] == count
    stage = whole["stages"]["late"]
    less = planned("train.late.simulation_steps=2")
    assert stage["flops"] > 2 * less["stages"]["late"]["flops"]
    assert stage["temporaries"] > less["stages"]["late"]["temporaries"]
