"""Kinds of draft are told apart in their tables and nowhere else."""

import re
from pathlib import Path

import pytest

from beagle_jax.model.kinds import KINDS, Served
from beagle_jax.training.kinds import OBJECTIVES
from beagle_jax.weights.kinds import FILES
from beagle_jax.weights.server_files import _FORMS

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "beagle_jax"

_KIND = r"[\"'](beagle|eagle3?)(_draft)?(_torch)?[\"']"
TELLING_APART = re.compile(
    rf"""isinstance\([^()]*,\s*\(?\w*(Beagle|Eagle3?|Draft|Layer)(Spec|Block)\b
    | issubclass\(
    | \btype\(\s*\w*spec\s*\)\s*(is|==|!=|in)\b
    | \bis\s+(not\s+)?(Beagle|Eagle3?)(Spec|Block)\b
    | (==|!=|\bin\b)\s*\(?\s*{_KIND}
    | {_KIND}\s*(==|!=)
    | \bcase\s+{_KIND}
    | \.fused\b
    """,
    re.VERBOSE,
)
# Modules that exports carry import nothing of the package, and settings are read before jax is.
APART = (
    "weights/modeling_beagle.py",
    "weights/modeling_decoding.py",
    "weights/modeling_eagle.py",
    "weights/modeling_sampling.py",
    "weights/modeling_tree.py",
    "config/",
)


def tellings(text: str) -> list[str]:
    """Lists lines of code that tell kinds apart."""
    return [line.strip() for line in text.splitlines() if TELLING_APART.search(line)]


def test_no_code_tells_kinds_apart():
    telling = {
        str(path.relative_to(PACKAGE)): lines
        for path in sorted(PACKAGE.rglob("*.py"))
        if not str(path.relative_to(PACKAGE)).startswith(APART)
        and (lines := tellings(path.read_text(encoding="utf-8")))
    }
    assert telling == {}


@pytest.mark.parametrize(
    "planted",
    [
        "predict = predict_eagle if isinstance(spec, EagleSpec) else predict_late",
        "if isinstance(block, (EagleBlock, LayerBlock)):",
        "if type(spec) is EagleSpec:",
        "own = () if kind is BeagleSpec else everything",
        'if config.draft.kind == "eagle":',
        "if 'eagle_draft' == model_type:",
        'if draft.spec.kind in ("beagle", "eagle"):',
        'case "eagle":',
        "before = int(spec.fused)",
    ],
)
def test_code_that_would_is_seen(planted):
    assert tellings(f"x = 1\n    {planted}\n") == [planted]


def test_code_that_does_not_is_not_seen():
    assert (
        tellings('spec = EagleSpec.from_target(target)\nisinstance(draft, Draft)\nkind: "eagle"')
        == []
    )


def test_every_floor_has_every_kind():
    assert KINDS.keys() == OBJECTIVES.keys() == FILES.keys()
    assert {
        name for name, kind in KINDS.items() if kind.served is Served.BY_SERVERS
    } == _FORMS.keys()
    for name, kind in KINDS.items():
        assert kind.spec.kind == name
