"""Caches are donated and written in place, in programs as XLA optimises them for users.

Three sequences, of which a chunk reads two: what is made of a chunk's own sequences is no whole
cache.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import pytest
from conftest import slow_but
from in_place_cases import CASES, CHUNK_ROWS, PLANTED, QUICK, B, copies

pytestmark = pytest.mark.timeout(900)  # up to fifteen programs, each compiled as for users

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def measure(tmp_path_factory) -> Callable[[str], dict]:
    """Runs cases in a process without the suite's compiler switches (conftest.py)."""

    @lru_cache
    def of(quick: bool) -> dict[str, dict]:
        names = [name for name in CASES | PLANTED if (name in QUICK) == quick]
        return _run(tmp_path_factory.mktemp("in_place") / "measured.json", names)

    return lambda name: of(name in QUICK)[name]


def _run(out: Path, names: list[str]) -> dict[str, dict]:
    settings = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0", "XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, str(TESTS / "in_place_cases.py"), str(out), *names],
        env={**os.environ, "PYTHONPATH": f"{TESTS.parent}:{TESTS}", **settings},
        capture_output=True,
        text=True,
        timeout=880,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


def check(case: dict, part_read: float = 0.0) -> None:
    """Checks that no array of a cache's size is made and that temporaries are small.

    part_read: the share of the sequences whose slots a later chunk copies in order to read them; 0
    if it reads none.
    """
    assert case["reused"] >= case["cache"] and case["not_donated"] == 0
    assert case["copies"] == []
    assert case["temporary"] < case["cache"] * (part_read or 0.5) * 1.15


@pytest.mark.parametrize("name", slow_but(QUICK, (name for name in CASES if "later" not in name)))
def test_caches_are_donated_and_updated_in_place(measure, name):
    check(measure(name))


@pytest.mark.parametrize("name", slow_but(QUICK, (name for name in CASES if "later" in name)))
def test_a_later_chunk_copies_no_slots_but_those_of_its_own_sequences(measure, name):
    check(measure(name), 0.0 if "only" in name else CHUNK_ROWS / B)


def test_planted_bug_caches_that_are_not_given_away(measure):
    case = measure("not given away")
    assert case["reused"] == 0 < case["not_donated"] and "copy" in case["copies"]


@pytest.mark.parametrize("name", slow_but(QUICK, (name for name in PLANTED if "at once" in name)))
def test_planted_bug_writes_that_may_come_before_reads(measure, name):
    case = measure(name)
    with pytest.raises(AssertionError):
        check(case, CHUNK_ROWS / B)
    assert "copy" in case["copies"] and case["temporary"] > case["cache"]


@pytest.mark.slow
def test_planted_bug_caches_that_leave_in_another_order(measure):
    case = measure("turned at exit")
    with pytest.raises(AssertionError):
        check(case)
    assert "reverse" in case["copies"]


PROGRAM = """
%fused (p.1: f32[2,8], p.2: f32[1,8]) -> f32[2,8] {
  %p.1 = f32[2,8]{1,0} parameter(0)
  %add.1 = f32[2,8]{1,0} add(%p.1, %p.1)
  ROOT %last = f32[2,8]{1,0} END(%p.1, %p.2)
}

ENTRY %main (a.1: f32[2,8], b.1: f32[1,8]) -> f32[2,8] {
  %a.1 = f32[2,8]{1,0:T(8)} parameter(0), metadata={op_name="a"}
  %b.1 = f32[1,8]{1,0} parameter(1)
  %small = f32[1,8]{1,0} copy(%b.1)
  %made = f32[2,8]{1,0} fusion(%a.1, %small), kind=kLoop, calls=%fused
  ROOT %out = f32[8,2]{1,0} OPERATION(%made)
}
"""


@pytest.mark.parametrize(
    ("end", "operation", "expected"),
    [
        ("dynamic-update-slice", "bitcast", []),
        ("scatter", "bitcast", []),
        ("dynamic-update-slice", "copy", ["copy"]),
        ("select", "transpose", ["select", "transpose"]),
    ],
)
def test_what_counts_as_a_copy(end, operation, expected):
    program = PROGRAM.replace("END", end).replace("OPERATION", operation)
    assert copies(program, {16}) == expected
    assert copies(program, {17}) == []
