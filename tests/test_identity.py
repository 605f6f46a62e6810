"""Which settings decide a result: against hand-written lists and what 0.1.0 wrote."""

import json

import pytest

from beagle_jax.config import (
    Config,
    DataConfig,
    EarlyStage,
    EvalConfig,
    Identity,
    LateStage,
    TargetConfig,
    TestTimeStage,
    TrainConfig,
)
from beagle_jax.config.section import extra_of

CONFIG = Config(target=TargetConfig(source="x"))
RESULTS = {"text", "stage", "answers", "tau"}


def test_fields_name_results_that_there_are():
    noted = [
        extra_of(type(section), name).get("affects")
        for section in (getattr(CONFIG, field) for field in Config.model_fields)
        for name in type(section).model_fields
    ]
    assert len(noted) > 60 and all(RESULTS.issuperset(results) for results in noted)


def test_what_decides_each_result():
    """Compares with the hand-written lists of 0.1.0, and other sections' settings by name."""
    text = Identity.of(CONFIG, "text").values
    assert {key.removeprefix("data.") for key in text} == set(DataConfig.model_fields) - {
        "folder",
        "batch",
        "answer_tokens",
        "workers",
        "states_tokens",
        "streaming",
        "states",
        "max_bad_share",
        "unread",
    }
    assert set(Identity.of(CONFIG.eval, "tau").values) == {
        "eval.suites",
        "eval.best_by",
        "eval.every",
        "eval.train_prompts",
        "eval.max_new_tokens",
    }
    stage = {key for key in Identity.of(CONFIG, "stage").values if key.count(".") == 1}
    free = {
        "target.cache_dir",
        "target.shape",
        "draft.path",
        "data.batch",
        "data.max_bad_share",
        "data.unread",
        "data.workers",
        "data.states_tokens",
        "train.folder",
        "train.checkpoint_every",
        "train.accept_changes",
        "train.loss_rows",
        "train.remat",
        "train.early",
        "train.late",
        "train.stages",
    }
    assert stage == {
        f"{section}.{name}"
        for section in ("target", "draft", "data", "train")
        for name in type(getattr(CONFIG, section)).model_fields
    } - free | {"log.eval_rows"}
    answers = set(Identity.of(CONFIG, "answers").values)
    assert {"target.source", "decode.levels", "eval.limit"} <= answers
    assert not {key for key in answers if key.startswith(("draft", "data", "train", "log"))}
    assert not answers & {"target.cache_dir", "eval.folder", "eval.every", "decode.stop"}


def changed(**train) -> Config:
    return CONFIG.changed(train=TrainConfig(**train))


def test_a_stage_does_not_depend_on_those_after_it():
    late = changed(late=LateStage(steps=7))
    early = [Identity.of(config, "stage", stage="early") for config in (late, CONFIG)]
    assert early[0].diff(early[1]) == {}
    whole = [Identity.of(config, "stage", stage="late") for config in (late, CONFIG)]
    assert whole[0].diff(whole[1]) == {"train.late.steps": (500, 7)}


def test_both_forms_of_the_same_stages_are_the_same():
    listed = changed(stages=(EarlyStage(steps=4), LateStage(window=5)))
    named = changed(early=EarlyStage(steps=4), late=LateStage(window=5))
    assert Identity.of(listed, "stage").diff(Identity.of(named, "stage")) == {}
    other = changed(stages=(LateStage(window=5),))  # planted: no early stage before it
    gone = Identity.of(other, "stage", stage="late").diff(Identity.of(named, "stage"))
    assert "train.early.steps" in gone and "train.late.window" not in gone


# A stage's settings as 0.1.0 wrote them beside its checkpoints.
OLD_STAGE = {
    "steps": 500,
    "learning_rate": 3e-05,
    "warmup": 100,
    "schedule": "constant",
    "window": 4,
    "simulation_steps": 4,
    "step_weights": None,
    "detach": True,
    "dense": False,
    "multi_token": False,
}


def old(early: dict, late: dict) -> dict:
    values = dict(Identity.of(CONFIG, "stage").values)
    values = {key: value for key, value in values.items() if key.count(".") == 1}
    for name, stage in (("early", early), ("late", late)):
        values |= {f"train.{name}.{key}": value for key, value in stage.items()}
    return json.loads(json.dumps(values))


EARLY = OLD_STAGE | {"steps": 1000, "window": 5, "simulation_steps": 1}


def test_checkpoints_of_0_1_0_are_taken():
    now = Identity.of(CONFIG, "stage")
    assert now.diff(Identity.read(old(EARLY, OLD_STAGE))) == {}
    dense = changed(late=TestTimeStage(steps=500))
    old_identity = Identity.read(old(EARLY, OLD_STAGE | {"dense": True, "window": 9}))
    assert Identity.of(dense, "stage").diff(old_identity) == {}


@pytest.mark.parametrize(
    ("early", "late", "key"),
    [
        ({}, {"dense": True}, "train.late.objective"),
        ({}, {"multi_token": True}, "train.late.multi_token"),
        ({"window": 4}, {}, "train.early.window"),
        ({"step_weights": [2.0]}, {}, "train.early.step_weights"),
    ],
)
def test_checkpoints_of_0_1_0_with_other_settings_are_seen(early, late, key):
    old_identity = Identity.read(old(EARLY | early, OLD_STAGE | late))
    assert key in Identity.of(CONFIG, "stage").diff(old_identity)


def test_the_same_place_may_be_written_in_two_ways(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    there = Identity.read({"data": {"source": "~/chats.jsonl"}})
    now = Identity.of(DataConfig(source="/home/me/chats.jsonl"), "text")
    assert "data.source" not in now.diff(there)
    assert "data.source" in now.diff(Identity.read({"data": {"source": "~/other.jsonl"}}))


def test_values_are_those_of_json():
    config = EvalConfig(suites=("a", "b"))
    values = Identity.of(config, "tau").values
    assert values["eval.suites"] == ["a", "b"] and json.loads(json.dumps(values)) == values
