"""Checks README and docs/: every command parses or dry-runs, and every name exists."""

import importlib
import itertools
import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from beagle_jax.errors import UsageError

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def commands(text: str) -> list[str]:
    """Returns the lines of ```bash blocks, and `code` that starts like a command."""
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.S | re.M)
    lines = [
        line.split("  #")[0].strip()
        for block in blocks
        for line in block.replace("\\\n", " ").splitlines()
    ]
    sentences = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M).replace("\n", " ")
    lines += re.findall(r"`((?:bash|sbatch|kubectl|python) [^`]+)`", sentences)
    return [line for line in lines if line and not line.startswith("#")]


COMMANDS = sorted({line for page in PAGES for line in commands(page.read_text(encoding="utf-8"))})


class Parsed(Exception):
    """Raised when the command line was understood."""


def check_python_m(name: str, arguments: list[str], monkeypatch) -> None:
    """Runs an entry point until its work would begin."""
    module = importlib.import_module(name)

    def stop(*_):
        raise Parsed

    monkeypatch.setattr(module, "working", stop)
    with pytest.raises(Parsed):
        module.main(arguments)


def check_script(script: str, arguments: list[str]) -> None:
    """Dry-runs a launch script and returns the `python -m` lines that it prints."""
    done = subprocess.run(
        ["bash", script, "--dry-run", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr


def check(line: str, monkeypatch) -> None:
    words = shlex.split(line)
    if words[0] == "JAX_PLATFORMS=cpu":
        words = words[1:]
    if words[:2] == ["python", "-m"] and words[2].startswith("beagle_jax."):
        if len(words) > 3:  # without arguments it is a name in a sentence
            check_python_m(words[2], words[3:], monkeypatch)
        assert importlib.util.find_spec(words[2])
    elif words[0] == "python":
        text = (ROOT / words[1]).read_text(encoding="utf-8")
        assert [
            word for word in words[2:] if word.startswith("--") and f'"{word}"' not in text
        ] == []
    elif words[0] in ("bash", "sbatch") and words[-1] != ".ci/run":
        # Options of sbatch itself.
        script, *arguments = itertools.dropwhile(lambda word: word.startswith("--"), words[1:])
        check_script(script, [argument for argument in arguments if argument != "--dry-run"])
        if {"train", "evaluate"} & set(arguments):
            first = min(
                arguments.index(name) for name in ("train", "evaluate") if name in arguments
            )
            check_python_m(f"beagle_jax.{arguments[first]}", arguments[first + 1 :], monkeypatch)
    elif words[0] in ("source", "bash", "kubectl") or words[0].startswith(".venv"):
        paths = [word for word in words[1:] if "/" in word and not word.startswith(".venv")]
        assert all((ROOT / path).exists() for path in paths)
    elif words[0] == "vllm":  # of another environment: what it says of the draft
        draft = json.loads(words[words.index("--speculative-config") + 1])
        assert draft.keys() == {"method", "model", "num_speculative_tokens"}
    else:
        assert words[0] in ("git", "docker", "mkdocs", "export", "pip"), f"no check for {line}"


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_is_real(line, monkeypatch):
    monkeypatch.chdir(ROOT)
    check(line, monkeypatch)


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("python -m beagle_jax.train --config configs/quickstart.yaml train.bach=4", UsageError),
        ("python -m beagle_jax.trian --config configs/quickstart.yaml", ModuleNotFoundError),
        ("bash launch/gpu.sh --gpus 9 train", AssertionError),
        ("bash launch/gpu.sh train --config configs/no_such.yaml", UsageError),
        ("python benchmarks/mt_bench.py x --depth 5", AssertionError),
        ("kubectl apply -f launch/none.yaml", AssertionError),
        ("""vllm serve x --speculative-config '{"model": "y"}'""", AssertionError),
    ],
)
def test_a_wrong_command_is_seen(line, error, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(error):
        check(line, monkeypatch)


def test_the_readme_has_the_commands_that_matter():
    lines = commands((ROOT / "README.md").read_text(encoding="utf-8"))
    for needed in (
        "quickstart.sh",
        "test.sh",
        "gpu.sh",
        "slurm.sbatch",
        "tpu_pod.sh",
        "gke_jobset.yaml",
        "beagle_jax.train",
        "--chat",
    ):
        assert any(needed in line for line in lines), needed


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page):
    targets = re.findall(r"\]\(([^)#:]+)(?:#[\w-]+)?\)", page.read_text(encoding="utf-8"))
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_the_faq_answers_what_users_of_such_tools_report():
    text = (ROOT / "docs" / "faq.md").read_text(encoding="utf-8")
    questions = [section.partition("\n") for section in text.split("\n## ")[1:]]
    # "trained on" stands for masks.
    for subject in (
        "memory",
        "disk",
        "trained on",
        "tau",
        "template",
        "resume",
    ):
        [(_, _, answer)] = [
            question
            for question in questions
            if subject in question[0] and "GPU" not in question[0]
        ][:1]
        assert len(answer.split()) > 30, subject
    assert (
        "mask" in text
        and len(re.findall(r"\]\(https://github.com/[\w./-]+/issues/\d+\)", text)) > 10
    )


def test_sections_that_the_code_cites_are_in_the_method_page():
    numbers = set(
        re.findall(
            r"^#+ ([\d.]+\w?)\.? ", (ROOT / "docs" / "method.md").read_text(encoding="utf-8"), re.M
        )
    )
    cited = {
        number
        for path in (ROOT / "beagle_jax").rglob("*.py")
        for number in re.findall(r"method\.md (\d+(?:\.\d+\w?)?)", path.read_text(encoding="utf-8"))
    }
    assert cited and sorted(cited - {number.rstrip(".") for number in numbers}) == []


# How it is done and what ships with exports, not what a reader of the reference would call.
INTERNAL = {
    "command",
    "compile_cache",
    "decoding.threshold",
    "config.data",
    "config.decode",
    "config.draft",
    "config.eval",
    "config.keys",
    "config.kinds",
    "config.log",
    "config.mesh",
    "config.serve",
    "config.messages",
    "config.older",
    "config.paths",
    "config.printing",
    "config.shipped",
    "config.schema",
    "config.target",
    "config.whole",
    "config.yaml_text",
    "files",
    "hub_cache",
    "interrupts",
    "terminal",
    "data.fingerprint",
    "data.prefetch",
    "data.behind",
    "data.preview",
    "json_file",
    "model.config_values",
    "training.progress",
    "training.stop",
    "weights.gguf_config",
    "weights.gguf_header",
    "weights.gguf_metadata",
    "weights.gguf_names",
    "weights.gguf_parts",
    "weights.gguf_tokenizer",
    "weights.model_files",
    "weights.safetensors_file",
    "weights.modeling_beagle",
    "weights.modeling_decoding",
    "weights.modeling_eagle",
    "weights.modeling_sampling",
    "weights.modeling_tree",
    "weights.vllm_plugin.beagle_vllm.draft",
}
ENTRY_POINTS = {"convert", "evaluate", "generate", "plan", "prepare", "serve", "train", "tune"}


def test_every_module_of_the_library_is_in_the_reference_or_not_meant_to_be():
    named = [
        name
        for page in (ROOT / "docs" / "reference").glob("*.md")
        for name in re.findall(r"^::: beagle_jax\.([\w.]+)$", page.read_text(), re.M)
    ]
    paths = [path.relative_to(ROOT / "beagle_jax") for path in (ROOT / "beagle_jax").rglob("*.py")]
    modules = {
        ".".join(path.with_suffix("").parts)
        for path in paths
        if path.name != "__init__.py" and path.parts[0] != "commands"
    }
    assert len(named) == len(set(named)) and set(named) == modules - INTERNAL - ENTRY_POINTS, (
        "name it in docs/reference, or in INTERNAL"
    )
