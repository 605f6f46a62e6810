"""Commands on and off a terminal: help without jax, results apart from progress, colours."""

import io
import json
import os
import pty
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from beagle_jax import terminal

ROOT = Path(__file__).resolve().parent.parent
ENTRY_POINTS = sorted(
    path.stem for path in (ROOT / "beagle_jax").glob("*.py") if "run_main(main)" in path.read_text()
)
HEAVY = ("jax", "flax", "transformers", "numpy", "tqdm")
LOADED = """
import sys
sys.argv[1:] = {argv!r}
from beagle_jax.errors import run_main
try:
    status = run_main(__import__("beagle_jax.{name}", fromlist=["main"]).main)
except SystemExit as end:
    status = end.code
print("loaded:", *[name for name in {heavy!r} if name in sys.modules])
"""


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    # Without what the commands of other tests have set for this process and those it starts.
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("TQDM_", "TRANSFORMERS_"))
    }
    settings = clean | {"COLUMNS": "80"} | environment
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        env=settings,
    )


def loaded(name: str, *argv: str) -> str:
    return run(LOADED.format(name=name, argv=list(argv), heavy=HEAVY)).stdout


def test_every_entry_point_is_here():
    assert {"train", "generate", "evaluate", "tune", "convert"} <= set(ENTRY_POINTS)


@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_help_fits_a_screen_shows_an_example_and_loads_nothing_heavy(name):
    printed = loaded(name, "--help")
    assert printed.endswith("loaded:\n"), (
        "something imported before the command line is read loads more than it needs"
    )
    lines = printed.removesuffix("loaded:\n").splitlines()
    assert sum(max(1, -(-len(line) // 80)) for line in lines) <= 24, (
        "too long for a screen of 80 columns"
    )
    assert (
        printed.startswith(f"usage: python -m beagle_jax.{name} --config FILE")
        and f"example:\n  python -m beagle_jax.{name} " in printed
    )
    assert "--json FILE" in printed and "--quiet" in printed


def test_importing_the_package_loads_nothing_heavy():
    code = f"import sys, beagle_jax; print(*[name for name in {HEAVY!r} if name in sys.modules])"
    assert run(code).stdout.strip() == ""
    assert run(code.replace("beagle_jax", "beagle_jax.model.masks")).stdout.strip() != ""


def test_a_mistyped_setting_is_answered_before_jax_is_loaded():
    assert loaded("train", "--config", "configs/quickstart.yaml", "train.bach=4").endswith(
        "loaded:\n"
    )


def test_what_loads_jax_is_seen():
    """The bug planted for the tests above: an import at the top."""
    code = "import beagle_jax.model.masks\n" + LOADED.format(
        name="train", argv=["--help"], heavy=HEAVY
    )
    assert "loaded: jax" in run(code).stdout


def arguments(**changed) -> Namespace:
    return Namespace(**{"quiet": False, "json": None} | changed)


def test_progress_goes_to_stderr_and_the_result_to_stdout(capsys):
    with terminal.working(arguments()):
        print("half way")
    terminal.show(arguments(), "done", {"rows": 3})
    assert capsys.readouterr() == ("done\n", "half way\n")


def test_quiet_drops_progress(capsys):
    with terminal.working(arguments(quiet=True)):
        print("half way")
    terminal.show(arguments(quiet=True), "done", {})
    assert capsys.readouterr() == ("done\n", "")


def test_figures_go_to_a_file_or_replace_the_text(capsys, tmp_path):
    terminal.show(arguments(json=str(tmp_path / "x.json")), "done", {"rows": 3})
    assert capsys.readouterr().out == "done\n" and json.loads(
        (tmp_path / "x.json").read_text()
    ) == {"rows": 3}
    terminal.show(arguments(json="-"), "done", {"rows": 3})
    assert json.loads(capsys.readouterr().out) == {"rows": 3}


BAR = """
import argparse
from beagle_jax import terminal
terminal.prepare(argparse.Namespace(quiet={quiet}, json=None))
from tqdm import tqdm
for _ in tqdm(range(3), desc="reading", unit="file"): pass
"""


def test_one_style_of_bar_off_when_quiet():
    shown = run(BAR.format(quiet=False)).stderr
    assert "reading                  100%|" in shown and "3/3 file [" in shown
    assert run(BAR.format(quiet=True)).stderr == ""
    # The user's own format stays.
    assert "mine 3" in run(BAR.format(quiet=False), TQDM_BAR_FORMAT="mine {n_fmt}").stderr


WITHOUT_TORCH = """
import argparse, importlib.util
from beagle_jax import terminal
find_spec = importlib.util.find_spec
importlib.util.find_spec = (
    lambda name, *package: None if name == "torch" else find_spec(name, *package)
)
{prepare}
import transformers
"""


def test_transformers_does_not_advise_to_install_torch():
    assert "PyTorch was not found" in run(WITHOUT_TORCH.format(prepare="")).stderr
    assert (
        run(
            WITHOUT_TORCH.format(
                prepare="terminal.prepare(argparse.Namespace(quiet=False, json=None))"
            )
        ).stderr
        == ""
    )


def test_sizes_are_told_in_what_a_reader_can_weigh():
    assert [terminal.size(count) for count in (0, 4_600_000, 270_000_000, 13.5e9)] == [
        "0.00 MB",
        "4.60 MB",
        "0.27 GB",
        "13.50 GB",
    ]


def test_errors_are_red_on_a_terminal_only(monkeypatch):
    assert terminal.coloured("error:", "31", io.StringIO()) == "error:"
    parent, child = pty.openpty()
    with os.fdopen(parent), os.fdopen(child, "w") as stream:
        monkeypatch.delenv("NO_COLOR", raising=False)
        assert terminal.coloured("error:", "31", stream) == "\033[31merror:\033[0m"
        monkeypatch.setenv("NO_COLOR", "1")
        assert terminal.coloured("error:", "31", stream) == "error:"


def test_what_the_package_logs_is_printed_once():
    """Also after another library, as orbax does, gave the root logger a handler."""
    code = (
        "import argparse, logging\n"
        "from beagle_jax import terminal\n"
        "terminal.prepare(argparse.Namespace(quiet=True))\n"
        "logging.basicConfig()\n"
        "logging.getLogger('beagle_jax.somewhere').warning('a word')\n"
        "logging.getLogger('beagle_jax.somewhere').info('progress')\n"
    )
    done = run(code)
    assert done.stderr == "warning: a word\n"
