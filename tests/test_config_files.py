"""Files that extend others, paths from any working directory, and --print-config."""

from pathlib import Path

import pytest
import yaml

from beagle_jax import evaluate, generate, plan, prepare, serve, train, tune
from beagle_jax.config import (
    Config,
    EarlyStage,
    LateStage,
    TestTimeStage,
    TrainConfig,
    load_config,
)
from beagle_jax.config.keys import sections_of
from beagle_jax.config.printing import describe
from beagle_jax.config.reading import resolve_config
from beagle_jax.config.section import extra_of
from beagle_jax.errors import UsageError, run_main

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a file below a folder other than the working directory; returns its path."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")

    def write(name: str, text: str) -> Path:
        path = tmp_path / "elsewhere" / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(text)
        return path

    return write


TARGET = "target: {source: hf:org/name}\n"


def test_a_file_changes_the_one_that_it_extends(write):
    write("base.yaml", TARGET + "train: {batch: 2, late: {steps: 9, window: 6}}")
    write("middle.yaml", "extends: base.yaml\ntrain: {batch: 3}\ndecode: {levels: 2}")
    path = write("sub/top.yaml", "extends: ../middle.yaml\ndecode: {levels: 7}")
    config = load_config(path, ["train.late.steps=4"])
    assert (config.target.source, config.train.batch, config.decode.levels) == (
        "hf:org/name",
        3,
        7,
    )
    assert config.train.late == LateStage(steps=4, window=6)


def test_a_circle_is_refused_with_its_chain(write):
    write("a.yaml", "extends: b.yaml")
    write("b.yaml", "extends: c.yaml")
    path = write("c.yaml", "extends: a.yaml")
    with pytest.raises(UsageError, match=r"circle: .*c\.yaml -> .*a\.yaml -> .*b\.yaml -> .*c\."):
        load_config(path)


def test_a_missing_base_and_a_base_that_is_no_path(write):
    with pytest.raises(
        UsageError, match=r"top\.yaml: extends names .*none\.yaml, which does not exist"
    ):
        load_config(write("top.yaml", "extends: none.yaml"))
    with pytest.raises(UsageError, match=r"top\.yaml: extends is 3; expected the path"):
        load_config(write("top.yaml", "extends: 3"))


def test_an_error_names_the_file_where_it_stands(write):
    write("base.yaml", TARGET + "train: {bach: 2}")
    with pytest.raises(UsageError, match=r"base\.yaml: unknown key train\.bach; did you mean"):
        load_config(write("top.yaml", "extends: base.yaml\ntrain: {seed: 2}"))
    write("base.yaml", TARGET + "train: {batch: 0}")
    with pytest.raises(UsageError, match=r"base\.yaml: train\.batch is 0; expected at least 1"):
        load_config(write("top.yaml", "extends: base.yaml"))


INPUTS = ("target.source", "target.shape", "draft.init", "data.source", "eval.folder")


@pytest.mark.parametrize("key", INPUTS)
def test_an_input_is_found_beside_its_file_then_in_the_working_directory(write, key, capsys):
    section, name = key.split(".")

    def of(config):
        return getattr(getattr(config, section), name)

    path = write("run.yaml", TARGET + f"{section}: {{{name}: place/x}}")
    if section == "target":
        path = write("run.yaml", f"target: {{source: hf:org/name, {name}: place/x}}")
    if key == "target.source":
        path = write("run.yaml", "target: {source: place/x}")
    assert of(load_config(path)) == "place/x" and not capsys.readouterr().err
    (Path.cwd() / "place" / "x").mkdir(parents=True)
    assert of(load_config(path)) == "place/x"
    assert (
        f"run.yaml: {key}: place/x is not beside this file; the one in the working directory"
        in (capsys.readouterr().err)
    )
    (path.parent / "place" / "x").mkdir(parents=True)
    assert of(load_config(path)) == str(path.parent / "place" / "x")
    assert not capsys.readouterr().err
    assert of(load_config(path, [f"{key}=place/x"])) == "place/x"  # the command line's


def test_lists_of_inputs_and_names_that_are_no_paths(write):
    for name in ("a.jsonl", "mt_bench", "self", "lookup", "mine"):
        write(name, "x")
    path = write(
        "run.yaml",
        TARGET + "eval: {suites: [held_out, mt_bench, a.jsonl], compare: [lookup, mine]}\n"
        "data: {source: self}",
    )
    config, folder = load_config(path), str(path.parent)
    assert config.eval.suites == ("held_out", "mt_bench", f"{folder}/a.jsonl")
    assert config.eval.compare == ("lookup", f"{folder}/mine")
    assert config.data.source == "self"


def test_outputs_are_of_the_working_directory_and_home_is_known(write, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    write("runs/x", "there")
    path = write("run.yaml", TARGET + "train: {folder: runs/x}\ndata: {folder: ~/data}")
    config = load_config(
        path, ["draft.path=~/draft", "target.cache_dir=~/c", "eval.compare=[~/a, /b]"]
    )
    assert (config.train.folder, config.data.folder) == ("runs/x", "/home/me/data")
    assert (config.draft.path, config.target.cache_dir) == ("/home/me/draft", "~/c")
    assert config.eval.compare == ("/home/me/a", "/b")


def test_home_is_known_in_every_path_of_a_section_that_is_built_in_python(monkeypatch):
    """As in a file: no folder named ~ is made."""
    monkeypatch.setenv("HOME", "/home/me")
    checked = 0
    for section, field in Config.model_fields.items():
        for model in sections_of(field.annotation):
            for name in model.model_fields:
                if extra_of(model, name).get("path"):
                    given = ["~/x"] if name in ("suites", "compare") else "~/x"
                    needed = {"source": "hf:org/name"} if section == "target" else {}
                    if name == "prompts":
                        needed = {"source": "openai:http://x#y"}
                    value = getattr(model(**{**needed, name: given}), name)
                    assert value in ("/home/me/x", ("/home/me/x",)), f"{section}.{name}"
                    checked += 1
    assert checked >= 12


def test_home_of_nobody_is_refused(write, monkeypatch):
    path = write("run.yaml", TARGET)
    for key in ("data.folder", "draft.path", "eval.suites"):
        with pytest.raises(UsageError, match=rf"{key}: ~nobody_here/x: there is no home folder"):
            load_config(path, [f"{key}=~nobody_here/x"])
    with pytest.raises(UsageError, match="there is no home folder ~nobody_here"):
        load_config("~nobody_here/run.yaml")


def test_home_is_known_on_the_command_line(write, monkeypatch, capsys):
    path = write("run.yaml", TARGET)
    monkeypatch.setenv("HOME", str(path.parent))
    assert run_main(plan.main, ["--config=~/run.yaml", "--json=~/none/x.json"]) == 2
    assert f"there is no folder {path.parent}/none" in capsys.readouterr().err


def test_a_base_s_paths_are_relative_to_the_base(write):
    write("shapes/x.json", "{}")
    write("base.yaml", "target: {source: hf:org/name, shape: shapes/x.json}")
    path = write("sub/top.yaml", "extends: ../base.yaml")
    assert Path(load_config(path).target.shape).samefile(path.parent.parent / "shapes" / "x.json")


@pytest.mark.parametrize("name", ["smollm2_135m", "quickstart"])
def test_committed_configs_work_from_anywhere(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = load_config(ROOT / "configs" / f"{name}.yaml")
    box = config.draft.init if name == "smollm2_135m" else config.eval.compare[0]
    assert Path(box).samefile(ROOT / "drafts" / "smollm2-135m") and not capsys.readouterr().err
    monkeypatch.chdir(ROOT)
    config = load_config(f"configs/{name}.yaml")
    box = config.draft.init if name == "smollm2_135m" else config.eval.compare[0]
    assert box == "drafts/smollm2-135m"  # as 0.1.0 wrote it into what it made


def test_only_training_needs_the_draft_to_begin_with(write):
    config = load_config(write("run.yaml", TARGET + "draft: {init: nowhere}"))
    with pytest.raises(UsageError, match=r"draft.init is 'nowhere'; expected normal, ridge or the"):
        config.draft.check_init()


COMMANDS = {
    "train": (train, []),
    "prepare": (prepare, []),
    "plan": (plan, []),
    "generate": (generate, []),
    "evaluate": (evaluate, []),
    "tune": (tune, []),
    "serve": (serve, []),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_print_config_shows_all_and_does_nothing(write, name, capsys):
    command, rest = COMMANDS[name]
    write("base.yaml", TARGET + "train: {batch: 2}")
    path = write("top.yaml", "extends: base.yaml\ndecode: {levels: 3}")
    with pytest.raises(SystemExit) as done:
        run_main(command.main, ["--config", str(path), "--print-config", *rest, "train.seed=9"])
    text = capsys.readouterr().out
    assert done.value.code == 0
    assert f"  batch: 2  # {path.parent}/base.yaml, which top.yaml extends\n" in text
    assert f"  levels: 3  # {path}\n" in text
    assert "  seed: 9  # command line\n" in text and "  topk: 4  # default\n" in text
    assert list(Path.cwd().iterdir()) == []


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["train.late.dense=true", "decode.paths=[[0], [0, 1]]", "decode.stop=['a: b', '# c']"],
        ["train.stages=[{objective: early, window: 2}, {objective: test_time}]"],
    ],
)
def test_what_is_printed_loads_as_the_same_config(write, overrides):
    resolved = resolve_config(write("run.yaml", TARGET), overrides)
    again = write("again.yaml", describe(resolved))
    assert yaml.safe_load(again.read_text()) and load_config(again) == resolved.config


def test_stages_as_a_list(write):
    listed = (
        "train: {stages: [{objective: early, steps: 3}, {objective: late, window: 5},"
        " {objective: early, steps: 0}, {objective: late, simulation_steps: 2}]}"
    )
    train = load_config(write("run.yaml", TARGET + listed)).train
    assert train.named_stages == {
        "early": EarlyStage(steps=3),
        "late": LateStage(window=5),
        "early-2": EarlyStage(steps=0),
        "late-2": LateStage(simulation_steps=2),
    }
    assert list(train.stages_to_run) == ["early", "late", "late-2"]
    assert list(TrainConfig().stages_to_run) == ["early", "late"]
    assert train.place_of("late-2") == "train.stages[3]" and train.record()["late"]["window"] == 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "{stages: [{objective: early}], late: {steps: 3}}",
            "train.stages and train.late are both",
        ),
        ("{stages: [{objective: early, dense: true}]}", r"unknown key train.stages\[0\].dense"),
        (
            "{stages: [{objective: late, steps: 1.5}]}",
            r"train.stages\[0\].steps is 1.5; expected int",
        ),
        (
            "{stages: [{objective: never}]}",
            r"train.stages\[0\] is .*; expected a stage with an obj",
        ),
        (
            "{stages: [{steps: 3}]}",
            r"train.stages\[0\] is .*expected a stage with an objective: early",
        ),
        ("{stages: []}", r"train.stages is \[\]; expected one stage or more"),
        (
            "{stages: [{objective: late, simulation_steps: 9}]}",
            r"train.stages\[0\].simulation_steps is 9, more than the window 4",
        ),
        (
            "{stages: [{objective: early, steps: 3}], accumulate: 2}",
            r"train.stages\[0\].steps is 3, no multiple of train.accumulate = 2",
        ),
    ],
)
def test_a_wrong_list_of_stages_is_refused(write, text, message):
    with pytest.raises(UsageError, match=f"run.yaml: {message}"):
        load_config(write("run.yaml", TARGET + f"train: {text}"))


def test_stages_of_0_1_0(write, capsys):
    """Version 0.1.0 has every setting in every stage; one that had a single value is ignored."""
    old = "simulation_steps: 1, detach: false, dense: false, multi_token: false, step_weights: null"
    path = write(
        "run.yaml",
        TARGET + f"train: {{early: {{window: 3, {old}}}, late: {{dense: true, window: 6,"
        " simulation_steps: 7, multi_token: false}}",
    )
    train = load_config(path).train
    assert (train.early, train.late) == (EarlyStage(window=3), TestTimeStage(simulation_steps=7))
    assert capsys.readouterr().err == ""
    load_config(path, ["train.early.step_weights=[2.0]"])
    assert "train.early.step_weights is [2.0], but the early stage no longer uses it" in (
        capsys.readouterr().err
    )


def test_missing_file_names_one_to_start_from(tmp_path):
    with pytest.raises(
        UsageError,
        match=r"none\.yaml: no such config file; start for example from configs/quickstart\.yaml",
    ):
        load_config(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"train: [1", r"run\.yaml: not valid YAML: .*line 1"),
        (
            b"train:\n  batch: 1\n  batch: 2",
            r"run\.yaml: not valid YAML: the key 'batch' appears twice.*line 3, column 3",
        ),
        (
            b"train: {batch: 1}\ntrain: {seed: 2}",
            r"run\.yaml: not valid YAML: the key 'train' appears twice",
        ),
        (b"\xff\xfe\x00", r"run\.yaml: cannot be read \(.*expected a YAML file in UTF-8"),
        (
            b"",
            r"run\.yaml: expected a mapping with the sections target, draft, data, train, "
            r"mesh, decode, eval, log",
        ),
        (b"- 1\n- 2", r"run\.yaml: expected a mapping with the sections target"),
    ],
)
def test_unreadable_file(tmp_path, content, message):
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=f"(?s){message}"):
        load_config(path)


def test_a_folder_is_not_a_config(tmp_path):
    with pytest.raises(UsageError, match="cannot be read"):
        load_config(tmp_path)
