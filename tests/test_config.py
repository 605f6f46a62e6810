"""Config files: error messages, aliases, overrides, conversions, and defaults."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from beagle_jax.config import (
    ALIASES,
    Config,
    EarlyStage,
    LateStage,
    TargetConfig,
    TestTimeStage,
    load_config,
)
from beagle_jax.errors import UsageError

ROOT = Path(__file__).resolve().parent.parent
# paper.yaml is what others extend: it has no target.
CONFIGS = sorted({*(ROOT / "configs").glob("*.yaml")} - {ROOT / "configs" / "paper.yaml"})


@pytest.fixture
def load(tmp_path):
    """Loads YAML text, by default one that names a target, with overrides."""

    def load(text: str = "target: {source: some/folder}", *overrides: str) -> Config:
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return load_config(path, overrides)

    return load


def refused(load, text: str, *overrides: str) -> str:
    """Returns the usage error's message for this file and these overrides.

    Checks that it names the file or the override.
    """
    with pytest.raises(UsageError) as caught:
        load(text, *overrides)
    assert caught.value.exit_status == 2
    assert "run.yaml: " in str(caught.value) or str(caught.value).startswith("override ")
    return str(caught.value)


TARGET = "target: {source: some/folder}\n"


def test_empty_sections_give_the_documented_defaults(load):
    config = load(TARGET + "train: {}\ndata: {}")
    assert config == Config(target=TargetConfig(source="some/folder"))
    train = config.train
    assert (train.vloss_weight, train.clip_norm, train.beta1, train.beta2, train.weight_decay) == (
        10.0,
        0.5,
        0.9,
        0.95,
        0.0,
    )
    assert (train.noise, train.noise_scale, train.seed, train.batch) == ("uniform", 0.2, 42, 16)
    assert (train.early.learning_rate, train.early.window, train.early.simulation_steps) == (
        3e-5,
        5,
        1,
    )
    assert (train.late.learning_rate, train.late.window, train.late.simulation_steps) == (
        3e-5,
        4,
        4,
    )
    assert (
        train.late.detach and train.late.step_weights is None and train.early.schedule == "constant"
    )
    assert (config.target.dtype, config.data.source, config.data.temperature) == (
        "float32",
        "self",
        0.0,
    )
    assert (config.draft.path, config.draft.init_std, config.draft.hot_tokens) == (None, 0.02, 0)
    assert (config.decode.tree, config.decode.levels, config.decode.paths) == ("chain", 5, None)
    assert (config.eval.suites, config.eval.limit, config.log.every) == (("held_out",), None, 10)


def test_part_of_a_stage_keeps_that_stages_other_defaults(load):
    late = load(TARGET, "train.late.steps=7").train.late
    assert late == LateStage(steps=7, window=4, simulation_steps=4)
    assert load(TARGET + "train: {early: {window: 3}}").train.early == EarlyStage(
        steps=1000, window=3
    )


def test_a_config_cannot_be_changed(load):
    with pytest.raises(ValidationError, match="frozen"):
        load().train.batch = 3


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_committed_file_loads(path):
    assert load_config(path).target.source


def test_there_are_committed_files():
    assert "quickstart.yaml" in [path.name for path in CONFIGS]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trian: {batch: 4}", "unknown key trian; did you mean train?"),
        ("train: {bach: 4}", "unknown key train.bach; did you mean train.batch?"),
        (
            "train: {early: {stpes: 4}}",
            "unknown key train.early.stpes; did you mean train.early.steps?",
        ),
        ("train: {erly: {steps: 4}}", "unknown key train.erly; did you mean train.early?"),
        ("draft: {zzz: 4}", "unknown key draft.zzz; valid keys: path, "),
        (
            "qqq: 4",
            "unknown key qqq; valid keys: target, draft, data, train, mesh, decode, eval, log",
        ),
        ("7: 4", "unknown key 7; valid keys: target, draft"),
    ],
)
def test_unknown_key_names_the_nearest(load, text, message):
    assert message in refused(load, TARGET + text)


def test_unknown_key_in_an_override(load):
    assert "unknown key decode.level; did you mean decode.levels?" in refused(
        load, TARGET, "decode.level=3"
    )
    assert "unknown key data.batch.size" not in refused(load, TARGET, "data.batch.size=3")
    assert "data.batch is {'size': 3}; expected int" in refused(load, TARGET, "data.batch.size=3")


def test_missing_section_and_key(load):
    assert "target is missing" in refused(load, "train: {batch: 4}")
    assert "target.source is missing; TargetConfig needs it" in refused(
        load, "target: {dtype: float32}"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data: 5", "data must be a section with the keys source, split, "),
        ("data:", "data must be a section with the keys source, split, "),
        ("train: {late: [1]}", "train.late must be a section with the keys steps, "),
        ("data: {batch: 4.5}", "data.batch is 4.5; expected int"),
        ("data: {batch: true}", "data.batch is True; expected int"),
        ("data: {batch: '4'}", "data.batch is '4'; expected int"),
        ("data: {folder: 4}", "data.folder is 4; expected str"),
        ("train: {late: {detach: 1}}", "train.late.detach is 1; expected bool"),
        ("train: {beta1: true}", "train.beta1 is True; expected float"),
        ("train: {beta1: high}", "train.beta1 is 'high'; expected float"),
        ("train: {beta1: null}", "train.beta1 is None; expected float"),
        ("eval: {limit: some}", "eval.limit is 'some'; expected int"),
        ("decode: {paths: 0}", "decode.paths is 0; expected a list"),
        ("decode: {paths: [[0], 1]}", "decode.paths[1] is 1; expected a list"),
        ("decode: {paths: [[0], [0, x]]}", "decode.paths[1][1] is 'x'; expected int"),
        ("decode: {tree: bush}", "decode.tree is 'bush'; expected one of chain, static"),
        ("train: {noise: null}", "train.noise is None; expected one of uniform, gaussian, none"),
    ],
)
def test_wrong_type_says_what_is_expected(load, text, message):
    assert message in refused(load, TARGET + text)


AT_LEAST_ONE = [
    "target.group_size",
    "data.answer_tokens",
    "data.max_prompt_tokens",
    "data.max_answer_tokens",
    "data.max_chat_tokens",
    "data.batch",
    "data.top_k",
    "train.batch",
    "train.row_tokens",
    "train.loss_rows",
    "train.checkpoint_every",
    "decode.levels",
    "decode.ngram",
    "decode.max_new_tokens",
    "eval.max_new_tokens",
    "eval.limit",
    "eval.train_prompts",
    "log.every",
]
NOT_NEGATIVE = [
    "draft.init_std",
    "draft.hot_tokens",
    "data.temperature",
    "train.noise_scale",
    "train.vloss_weight",
    "train.weight_decay",
    "log.eval_rows",
    "eval.every",
    "eval.patience",
    "train.early.steps",
    "train.early.warmup",
    "train.early.learning_rate",
    "train.late.steps",
    "train.late.warmup",
    "train.late.learning_rate",
]


@pytest.mark.parametrize("key", AT_LEAST_ONE)
def test_zero_is_too_small(load, key):
    assert refused(load, TARGET, f"{key}=0").endswith(f"run.yaml: {key} is 0; expected at least 1")
    load(TARGET, f"{key}=1")


@pytest.mark.parametrize("key", NOT_NEGATIVE)
def test_negative_is_too_small(load, key):
    assert f"run.yaml: {key} is -1" in refused(load, TARGET, f"{key}=-1")
    load(TARGET, f"{key}=0")


def test_tau_while_training_needs_measurements(load):
    load(TARGET, "eval.every=5", "decode.tree=auto")
    assert "eval.patience is 3, but eval.every is 0" in refused(load, TARGET, "eval.patience=3")
    load(TARGET, "eval.every=5", "eval.patience=3")


def test_chats_kept_out_fill_a_batch(load):
    assert (
        "log.eval_rows is 3, less than train.batch = 4, but held-out chats are measured in "
        "whole batches" in refused(load, TARGET, "log.eval_rows=3", "train.batch=4")
    )
    load(TARGET, "log.eval_rows=4", "train.batch=4")


EAGLE = ("draft.kind=eagle", "train.early.window=1", "train.late.dense=true")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "draft.init=ridge",
            "draft.init is ridge, the closed-form start of a Beagle draft; expected normal or "
            "the folder",
        ),
        (
            "train.early.window=3",
            "train.early.window is 3, but EAGLE predicts the next position only; set "
            "train.early.window to 1",
        ),
        (
            "train.late.dense=false",
            "train.late.dense is false, but its late stage, training-time test, drafts from "
            "every position; set train.late.dense to true, or train.late to none",
        ),
    ],
)
def test_settings_that_only_beagle_has(load, override, message):
    assert f"run.yaml: draft.kind is eagle and {message}" in refused(load, TARGET, *EAGLE, override)
    load(TARGET, *EAGLE)
    load(TARGET, override)
    if not override.startswith("draft"):  # a stage that is not run may say what it likes
        load(TARGET, *EAGLE, override, f"{override.rpartition('.')[0]}.steps=0")


def test_rows_of_eagle_are_not_split(load):
    assert (
        "run.yaml: draft.kind is eagle and mesh.sequence is 2, but the queries of an EAGLE draft "
        "are not split along a row; set mesh.sequence to 1"
    ) in refused(load, TARGET, *EAGLE, "mesh.sequence=2")
    load(TARGET, "mesh.sequence=2")


def test_a_dense_late_stage_simulates_as_many_steps_as_it_likes(load):
    assert load(
        TARGET, "train.late.dense=true", "train.late.simulation_steps=9"
    ).train.late == TestTimeStage(simulation_steps=9)


def test_a_dense_late_stage_has_no_windows(load):
    both = refused(load, TARGET, "train.late.dense=true", "train.late.multi_token=true")
    assert (
        "train.late.multi_token and train.late.dense are both true, but a draft that begins at "
        "every position has no window" in both
    )
    assert load(TARGET, "train.late.multi_token=true").train.late.multi_token


def test_late_stage_in_one_word(load):
    """`none` and `simulate` may stand next to the section; the last one wins."""

    def steps(text, *overrides):
        return load(TARGET + text, *overrides).train.late.steps

    section = "train: {late: {steps: 7, window: 6}}"
    assert steps("train: {late: none}") == steps(section, "train.late=none") == 0
    assert steps("train: {late: simulate}") == 500 and steps(section, "train.late=simulate") == 7
    assert (
        steps("train: {late: none}", "train.late=simulate") == 500
        and steps("train: {late: none}", "train.late.steps=9") == 9
    )
    assert load(TARGET + section, "train.late=none").train.late.window == 6


@pytest.mark.parametrize("value", [".nan", ".inf", "nan"])
def test_a_learning_rate_must_be_a_number(load, value):
    assert "train.late.learning_rate is " in refused(
        load, TARGET, f"train.late.learning_rate={value}"
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("draft.kind=medusa", "draft.kind is 'medusa'; expected one of beagle, eagle"),
        (
            "train.late=never",
            "train.late is 'never'; expected none, simulate or a section with the keys steps, ",
        ),
        ("train.beta1=1", "train.beta1 is 1.0; expected 0 or more, and less than 1"),
        ("train.beta2=-0.1", "train.beta2 is -0.1; expected 0 or more, and less than 1"),
        ("eval.suites=[]", "eval.suites is []; expected one name or more, each once"),
        (
            "eval.suites=[a, b, a]",
            "eval.suites is ['a', 'b', 'a']; expected one name or more, each once",
        ),
        ("train.accumulate=0", "train.accumulate is 0; expected at least 1"),
        (
            "train.accumulate=3",
            "train.early.steps is 1000, no multiple of train.accumulate = 3: the last batches "
            "would change nothing",
        ),
        (
            "train.early.dense=true",
            "train.early.dense is true; only a late stage can be dense; leave it out",
        ),
        (
            "train.early.multi_token=true",
            "train.early.multi_token is true; the early stage always predicts its whole "
            "window, leave it out",
        ),
        (
            "mesh.fsdp=0",
            "mesh.fsdp is 0; expected at least 1, or -1 for the devices that the others leave",
        ),
        (
            "mesh.tensor=-1",
            "mesh.data and mesh.tensor are both -1 (all devices that the others leave); expected "
            "at most one -1",
        ),
        ("train.clip_norm=0", "train.clip_norm is 0.0; expected more than 0"),
        ("data.answers=rewrite", "data.answers is 'rewrite'; expected one of keep, regenerate"),
        ("data.states=memory", "data.states is 'memory'; expected one of disk, online"),
        (
            "data.states_dtype=int4",
            "data.states_dtype is 'int4'; expected one of float32, bfloat16, int8",
        ),
        ("train.late.window=0", "train.late.window is 0; expected at least 1"),
        (
            "train.late.window=3",
            "train.late.simulation_steps is 4, more than the window 3; a window of k positions "
            "has at most k",
        ),
        ("train.early.window=0", "train.early.window is 0; expected at least 1"),
        (
            "decode.temperature=1e-40",
            "decode.temperature is 1e-40; expected 0 (greedy), or at least 1e-06",
        ),
        (
            "data.temperature=1e-9",
            "data.temperature is 1e-09; expected 0 (greedy), or at least 1e-06",
        ),
        ("train.late.simulation_steps=0", "train.late.simulation_steps is 0; expected at least 1"),
        (
            "train.late.step_weights=[2, 1]",
            "train.late.step_weights has 2 entries; expected 4, one for each of "
            "train.late.simulation_steps",
        ),
        (
            "train.early.simulation_steps=2",
            "train.early.simulation_steps is 2; expected 1: only the late stage simulates",
        ),
    ],
)
def test_out_of_range_says_what_is_expected(load, override, message):
    assert message in refused(load, TARGET, override)


def test_override_errors(load):
    assert "override 'train.batch': expected section.key=value" in refused(
        load, TARGET, "train.batch"
    )
    assert "override 'train.batch=[1': the value is not valid YAML" in refused(
        load, TARGET, "train.batch=[1"
    )
    assert "train must be a section" in refused(load, TARGET, "train=4")
    assert "train.batch: train is not a section" in refused(
        load, TARGET + "train: 5", "train.batch=4"
    )
    assert "unknown key ; valid keys: target" in refused(load, TARGET, "=4")


def test_overrides_win_over_the_file_and_the_last_one_wins(load):
    text = TARGET + "train: {batch: 4, seed: 5, late: {steps: 9}}"
    config = load(text, "train.batch=8", "train.late.steps=3", "train.batch=16", " log.every = 2")
    assert (config.train.batch, config.train.seed, config.train.late.steps, config.log.every) == (
        16,
        5,
        3,
        2,
    )


def test_overriding_a_section_keeps_its_other_keys(load):
    config = load(
        TARGET + "train: {batch: 4, late: {steps: 9, window: 6}}", "train={late: {steps: 3}}"
    )
    assert (config.train.batch, config.train.late.steps, config.train.late.window) == (4, 3, 6)


# What 5 means in its project, as the setting that it is here. EAGLE's depth counts levels below the
# first, which it drafts before its loop; num_draft_tokens and total_token count the root.
MEANT = {
    "decode.depth": ("decode.levels", 6),
    "decode.num_steps": ("decode.levels", 5),
    "decode.num_draft_tokens": ("decode.nodes", 5),
    "decode.total_token": ("decode.nodes", 5),
    "train.late.ttt_steps": ("train.late.simulation_steps", 5),
    "train.late.ttt_length": ("train.late.simulation_steps", 5),
    "base_model": ("target.source", "other/folder"),
    "verifier": ("target.source", "other/folder"),
    "target_model_path": ("target.source", "other/folder"),
}


@pytest.mark.parametrize("alias", ALIASES)
def test_aliases_mean_what_their_project_means(load, alias, capsys):
    key, expected = MEANT[alias]
    written = expected if key == "target.source" else 5
    config = load(TARGET + "train: {late: {window: 6}}", f"{alias}={written}")
    for part in key.split("."):
        config = getattr(config, part)
    assert config == expected
    printed = capsys.readouterr().err
    assert (
        "run.yaml: decode.depth 5 counts as EAGLE does; it means decode.levels 6" in printed
    ) == (alias == "decode.depth")


def test_aliases_work_in_the_file_and_give_way_to_overrides(load):
    text = "base_model: some/folder\ndecode: {depth: 2}"
    assert (load(text).target.source, load(text).decode.levels) == ("some/folder", 3)
    assert load(text, "target.source=b", "decode.levels=4", "decode.depth=6").decode.levels == 7
    assert load(text, "target.source=b", "decode.depth=6", "decode.levels=4").decode.levels == 4
    assert load(text, "target.source=b").target.source == "b"


def test_lists_become_tuples(load):
    config = load(
        TARGET + "decode: {tree: static, paths: [[0], [0, 1]]}",
        "train.late.step_weights=[4, 3.5, 2, 1]",
    )
    assert config.decode.paths == ((0,), (0, 1))
    assert config.train.late.step_weights == (4.0, 3.5, 2.0, 1.0)
    assert {type(weight) for weight in config.train.late.step_weights} == {float}
    assert isinstance(hash(config), int)  # a config of tuples is hashable


def test_numbers_that_yaml_reads_as_text_or_int(load):
    config = load(
        TARGET + "train: {early: {learning_rate: 1e-3}, clip_norm: 1}",
        "train.late.learning_rate=5e-4",
    )
    assert (config.train.early.learning_rate, config.train.late.learning_rate) == (0.001, 0.0005)
    assert type(config.train.clip_norm) is float


def test_null_where_it_is_allowed(load):
    config = load(TARGET + "draft: {path: null}\neval: {limit: null}")
    assert (config.draft.path, config.eval.limit, config.eval.compare) == (None, None, ())
