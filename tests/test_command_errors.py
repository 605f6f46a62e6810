"""How the commands fail: one message and an exit status, before the work begins."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from command_cases import COMMANDS, ended, workplace  # noqa: F401 (the fixture)

from beagle_jax.commands import evaluate as evaluate_command
from beagle_jax.commands import generate as generate_command
from beagle_jax.commands import prepare as prepare_command
from beagle_jax.commands import train as train_command
from beagle_jax.commands import tune as tune_command
from beagle_jax.config.shipped import shipped_configs
from beagle_jax.errors import UsageError, UserError, run_main


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_an_example(name, capsys):
    with pytest.raises(SystemExit) as caught:
        run_main(COMMANDS[name], ["--help"])
    printed = capsys.readouterr().out
    assert caught.value.code == 0
    names = "|".join(shipped_configs())
    assert re.search(rf"example:\n  python -m beagle_jax\.{name} --config ({names}) ", printed)
    assert "--config FILE" in printed and "section.key=value" in printed and "--debug" in printed


@pytest.mark.parametrize("name", COMMANDS)
def test_no_config_and_no_target_is_a_usage_error(name, capsys):
    needed = {"convert": ["to-jax", "--out", "never"], "generate": ["a prompt"]}.get(name, [])
    status, message = ended(capsys, name, *needed, "decode.levels=2")
    assert status == 2
    assert message.startswith("target.source is missing; give --config FILE, or target.source=")
    assert ", quickstart, " in message and not Path("never").exists()


def test_what_a_command_needs_is_named_with_its_usage(capsys):
    status, message = ended(capsys, "convert")
    assert status == 2 and "arguments are required: --out" in message
    assert "usage: python -m beagle_jax.convert" in message
    assert message.endswith("(--help shows an example)\n")


def test_a_name_that_is_no_config_lists_those_that_are(capsys):
    status, message = ended(capsys, "train", "--config", "quikstart")
    assert status == 2 and message.startswith("quikstart: no such config file, and no config of")
    assert "expected a YAML file, or one of llama2_7b_chat, " in message
    status, message = ended(capsys, "train", "--config", "there/quickstart.yaml")
    assert message.endswith("the one that comes with the package is --config quickstart\n")


def test_the_usage_in_an_error_has_no_colour(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # what argparse does from Python 3.14 on
    assert "\033" not in ended(capsys, "train")[1]


@pytest.mark.parametrize(
    ("name", "more", "status", "expected"),
    [
        (
            "train",
            ["train.bach=4"],
            2,
            "run.yaml: unknown key train.bach; did you mean train.batch?",
        ),
        ("train", ["train.batch=none"], 2, "run.yaml: train.batch is 'none'; expected int"),
        ("train", ["batch"], 2, "override 'batch': expected section.key=value"),
        ("train", ["--fast"], 2, "unrecognized arguments: --fast"),
        ("generate", ["  "], 2, "the prompt is empty"),
        ("generate", [], 2, "the prompt is empty; give one, or --chat"),
        ("tune", ["--prompts", "0"], 2, "--prompts is 0; expected at least 1"),
        ("prepare", ["--preview", "0"], 2, "--preview is 0; expected at least 1"),
        ("prepare", ["--part", "4/4"], 2, "--part is '4/4'; expected I/N, for example 0/4 to 3/4"),
        (
            "prepare",
            ["data.states=online", "data.states_dtype=int8"],
            2,
            "data.states: online keeps none; remove one",
        ),
        (
            "tune",
            ["--plot", "/no/such/folder/x.png"],
            2,
            "--plot /no/such/folder/x.png: there is no folder",
        ),
        (
            "generate",
            ["Hi", "decode.temperature=-1"],
            2,
            "decode.temperature is -1.0; expected 0 or more",
        ),
        (
            "evaluate",
            ["decode.top_p=0"],
            2,
            "decode.top_p is 0.0; expected more than 0 and at most 1",
        ),
        (
            "evaluate",
            ["--json", "/no/such/folder/x.json"],
            2,
            "--json /no/such/folder/x.json: there is no folder /no/such/folder",
        ),
        (
            "train",
            ["target.source=/no/such/model"],
            1,
            "target.source: '/no/such/model' is neither a folder nor a .gguf file",
        ),
        ("evaluate", ["eval.suites=[/no/such/file]"], 1, "'/no/such/file' is not a file or folder"),
        (
            "evaluate",
            ["draft.path=/no/such/draft"],
            1,
            "/no/such/draft/config.json: no such file; train a draft first",
        ),
        (
            "generate",
            ["Hi", "draft.path=/no/such/draft"],
            1,
            "/no/such/draft/config.json: no such file; train a draft first",
        ),
    ],
)
def test_exit_status_and_message(workplace, capsys, name, more, status, expected):
    ended_with, message = ended(capsys, name, "--config", workplace.config, *more)
    assert ended_with == status and expected in message


@pytest.mark.parametrize(
    ("name", "more", "expected"),
    [
        ("train", ["log.wandb=x"], "log.wandb is 'x', but wandb is not installed"),
        (
            "train",
            ["log.tensorboard=true"],
            "log.tensorboard is true, but tensorboardX is not installed",
        ),
        ("train", ["data.source=/no/chats"], "data.source: '/no/chats' is not a file or folder"),
        (
            "train",
            ["eval.every=2", "eval.suites=[/no/prompts]"],
            "eval.suites: '/no/prompts' is not a file or folder",
        ),
        ("prepare", ["data.source=/no/chats"], "data.source: '/no/chats' is not a file or folder"),
        ("generate", ["Hi", "draft.path=/no/draft"], "/no/draft/config.json: no such file"),
        (
            "evaluate",
            ["draft.path=lookup", "eval.compare=[/no/draft]"],
            "/no/draft/config.json: no such file",
        ),
        ("tune", ["draft.path=/no/draft"], "/no/draft/config.json: no such file"),
        (
            "tune",
            ["decode.append_predicted=false"],
            "decode.append_predicted is false, but tune measures trees whose deeper levels see",
        ),
        (
            "tune",
            ["eval.suites=[/no/prompts]"],
            "eval.suites: '/no/prompts' is not a file or folder",
        ),
    ],
)
def test_what_is_missing_is_said_before_the_target_is_loaded(
    workplace, capsys, monkeypatch, name, more, expected
):
    for module in (
        prepare_command,
        train_command,
        generate_command,
        evaluate_command,
        tune_command,
    ):
        monkeypatch.setattr(
            module, "configured_target", lambda *_, **__: pytest.fail("the target was loaded")
        )
    for package in ("wandb", "tensorboardX"):
        monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    status, message = ended(
        capsys, name, "--config", workplace.config, *more, f"data.folder={workplace.folder}/never"
    )
    assert status == 1 and expected in message and not (workplace.folder / "never").exists()


def test_a_missing_config_names_one_to_start_from(capsys):
    status, message = ended(capsys, "train", "--config", "none.yaml")
    assert (
        status == 2
        and message
        == "none.yaml: no such config file; start for example from configs/quickstart.yaml\n"
    )


def test_prompts_with_answers_cannot_be_evaluated(workplace, capsys):
    path = workplace.folder / "answered.jsonl"
    path.write_text(
        '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": '
        '"Yo"}]}\n'
    )
    status, message = ended(
        capsys, "evaluate", "--config", workplace.config, f"eval.suites=[{path}]"
    )
    assert status == 1 and message.startswith(
        f"{path}:1: the chat ends with an answer; expected chats that end with a user message"
    )


def test_debug_keeps_the_traceback(workplace):
    with pytest.raises(UsageError, match=r"did you mean train.batch"):
        run_main(COMMANDS["train"], ["--debug", "--config", workplace.config, "train.bach=4"])
    with pytest.raises(UserError, match="neither a folder"):
        run_main(
            COMMANDS["train"],
            ["--config", workplace.config, "target.source=/no/such/model", "--debug"],
        )


def test_interrupting_is_not_an_error(capsys):
    def main(argv):
        raise KeyboardInterrupt

    assert run_main(main, []) == 130
    assert capsys.readouterr().err == "\ninterrupted\n"


def test_errors_that_are_not_the_users_keep_their_traceback():
    def main(argv):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_main(main, [])


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            PermissionError(13, "Permission denied", "/a/place"),
            "error: /a/place: Permission denied; files that were complete before are unchanged. "
            "Free some",
        ),
        (
            OSError(28, "No space left on device"),
            "error: a file that was being written: No space left on device; files that were "
            "complete",
        ),
    ],
)
def test_what_the_file_system_refuses_is_one_message(capsys, error, message):
    def main(argv):
        raise error

    assert run_main(main, []) == 1
    assert message in capsys.readouterr().err
    with pytest.raises(type(error), match=re.escape(error.strerror)):
        run_main(main, ["--debug"])


def test_other_failures_of_the_system_keep_their_traceback():
    def main(argv):
        raise ConnectionResetError(104, "Connection reset by peer")

    with pytest.raises(ConnectionResetError):
        run_main(main, [])


def python_m(name: str, *argv: str) -> subprocess.CompletedProcess:
    """Runs the command as a user does, from another folder than the repository."""
    command = [sys.executable, "-m", f"beagle_jax.{name}", *argv]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parent.parent
    )


def test_python_m_evaluate_without_a_draft_names_the_path(workplace):
    path = str(workplace.folder / "nowhere")
    done = python_m("evaluate", "--config", workplace.config, f"draft.path={path}")
    assert done.returncode == 1
    assert (
        f"error: {path}/config.json: no such file; train a draft first (python -m beagle_jax.train)"
        in done.stderr
    )
    assert "Traceback" not in done.stderr and done.stdout == ""


@pytest.mark.parametrize("name", ["train", "generate"])
def test_python_m_ends_with_the_status(name):
    done = python_m(name, "--config", "none.yaml", "Hi")
    assert (done.returncode, done.stdout) == (2, "")
    assert "none.yaml: no such config file" in done.stderr and "Traceback" not in done.stderr
