"""Decoding on eight virtual devices: the tokens of one device, and what is held and sent.

tests/mesh_decoding_cases.py runs in a process of its own.
"""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import environment
from jax.sharding import AbstractMesh
from mesh_decoding_cases import CASES, REST, ROWS, SPEC, WIDE, name_of

from beagle_jax.config import MeshConfig
from beagle_jax.decoding.decoder import SpeculativeDecoder
from beagle_jax.decoding.top_k import split_over, top_k
from beagle_jax.errors import UserError
from beagle_jax.sharding import (
    check_split,
    decoding_mesh,
    make_mesh,
    mesh_for_decoding,
)
from beagle_jax.weights.quantiser import Cost
from beagle_jax.weights.target import Target

pytestmark = pytest.mark.timeout(1800)  # dozens of programs, unless the cache has them
TESTS = Path(__file__).parent


def run(script: str, *arguments: str, seconds: int = 1700) -> subprocess.CompletedProcess:
    """Runs a file of this folder on eight virtual devices."""
    variables = environment(8) | {
        "PYTHONPATH": f"{TESTS.parent}:{TESTS}",
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.05",
    }
    done = subprocess.run(
        [sys.executable, str(TESTS / script), *arguments],
        env=variables,
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def measured(folder: Path, *which: str, seconds: int = 1700) -> dict:
    out = folder / "measured.json"
    run("mesh_decoding_cases.py", str(out), *which, seconds=seconds)
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict:
    return measured(tmp_path_factory.mktemp("decoding"))


@pytest.fixture(scope="module")
def rest(tmp_path_factory) -> dict:
    return measured(tmp_path_factory.mktemp("rest"), "rest", seconds=3500)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_a_mesh_writes_and_drafts_what_one_device_does(results, case):
    single, many = results[name_of(case)]
    assert many == single
    assert all(len(tokens) == 6 for tokens in single["tokens"])


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("case", REST, ids=name_of)
def test_every_kind_of_draft_and_tree_on_every_mesh(rest, case):
    single, many = rest[name_of(case)]
    assert many == single


def test_each_device_holds_its_part_of_target_draft_head_and_caches(results):
    D, H, V, F = SPEC.hidden_size, SPEC.head_dim, SPEC.vocab_size, SPEC.intermediate_size
    for shape, rows in ((WIDE, 4), (ROWS, 2)):
        parts = shape[2]
        assert results["parts"][str(shape)] == {
            "target k_FD": [H, D],  # one of two KV heads: a head is never split
            "target q_FD": [8 // parts * H, D],
            "target embed_VD": [V // parts, D],
            "target keys": [rows, 1, H, 128],
            "draft keys": [rows, 1, H, 128],
            "draft q_proj": [8 // parts * H, D],
            "draft gate_proj": [F // parts, D],
            "draft head": [V // parts, D],
        }


def test_a_round_sends_neither_logits_nor_caches(results):
    assert results["sent"] == []


def test_planted_bug_a_vocabulary_that_is_gathered(results):
    assert results["planted"]["all logits on every device"] != []


@pytest.mark.parametrize(
    ("bug", "seen_in"),
    [
        ("each part's own token ids", "drafted"),
        ("the target's parts moved", "tokens"),
        ("the draft's parts moved", "drafted"),
    ],
)
def test_planted_bug_parts_in_wrong_places(results, bug, seen_in):
    _, right = results[name_of(("beagle", "dynamic", "greedy", WIDE))]
    assert results["planted"][bug][seen_in] != right[seen_in]


def test_settings_that_a_decoder_cannot_honour_are_refused():
    with pytest.raises(UserError, match=r"mesh.tensor=64 needs 64 devices, but there are"):
        mesh_for_decoding(MeshConfig(tensor=64), 1, "generate")
    with pytest.raises(UserError, match=r"mesh.data is 2, but generate decodes 1 rows at once"):
        mesh_for_decoding(MeshConfig(data=2), 1, "generate")
    assert mesh_for_decoding(MeshConfig(), 1, "generate") is None
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    small = Target(SPEC, {}, None, (), "x", quantised=Cost("int8", 8, 1, 1, 0.0, 1.0))
    with pytest.raises(UserError, match="a quantised target is for one device"):
        SpeculativeDecoder(small, mesh=mesh)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 1, 7), "mesh.tensor is 7, which divides none of the widths that it splits"),
        ((1, 5, 1), "mesh.fsdp is 5, which does not divide the target's hidden size, 32"),
    ],
)
def test_an_axis_that_would_split_nothing_is_refused(shape, message):
    mesh = AbstractMesh(shape, ("data", "fsdp", "tensor"))
    with pytest.raises(UserError, match=message):
        check_split(mesh, (32, 48, 464), 32)
    check_split(AbstractMesh((1, 8, 16), mesh.axis_names), (32, 48, 464), 32)


@pytest.mark.slow
def test_commands_decode_on_a_mesh(tmp_path):
    done = run("mesh_command_cases.py", str(tmp_path))
    statuses = json.loads((tmp_path / "statuses.json").read_text())
    assert statuses == {"evaluate": 0, "generate": 0, "tune": 0, "two rows": 1}, done.stderr[-2000:]
    assert "mesh.data is 2, but generate decodes 1 rows at once" in done.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["audit"]["passed"]
    assert json.loads((tmp_path / "generate.json").read_text())["equal"]
    assert list((tmp_path / "cache" / "tuned").iterdir())


def test_top_k_without_a_mesh_or_with_too_few_parts_is_that_of_jax():
    logits = np.random.default_rng(0).integers(0, 9, (3, 40)).astype(np.float32)
    mesh = decoding_mesh(make_mesh(MeshConfig(data=1), jax.devices()[:1]), 2)
    with split_over(mesh):
        inside = top_k(logits, 5)
    for ours, theirs in zip(inside, jax.lax.top_k(logits, 5), strict=True):
        np.testing.assert_array_equal(ours, theirs)
