"""The list of slow cases names tests that exist."""

from pathlib import Path

from conftest import slow_cases

FOLDER = Path(__file__).parent


def missing(cases: set[str]) -> set[str]:
    """Returns the cases whose test is not in their file."""
    absent = set()
    for case in cases:
        file, _, name = case.partition("::")
        text = (FOLDER / file).read_text() if (FOLDER / file).exists() else ""
        if f"def {name.partition('[')[0]}(" not in text:
            absent.add(case)
    return absent


def test_slow_cases_exist():
    assert len(slow_cases()) > 100 and not missing(slow_cases())


def test_planted_bug_a_case_that_was_renamed():
    assert missing({"test_tree.py::test_gone[deep]", "test_gone.py::test_x"}) == {
        "test_tree.py::test_gone[deep]",
        "test_gone.py::test_x",
    }
