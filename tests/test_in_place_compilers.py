"""What programs copy, also on platforms whose compilers are installed without their devices."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from beagle_jax.model import attention
from beagle_jax.program import Copy, copies_of

ROOT = Path(__file__).parent.parent


def attended(rows: int, least_rows: int):
    """Attention of few queries over a cache, its products padded to `least_rows` rows."""
    keys = jax.random.split(jax.random.key(rows), 3)
    q, k, v = (
        jax.random.normal(key, (2, 3, *shape))
        for key, shape in zip(keys, ((2, rows, 8), (8, 40), (40, 8)), strict=True)
    )
    mask = jnp.arange(40)[None] < 20 + jnp.arange(rows)[:, None]
    return attention._at_once(None, q, k, v, mask[None, None, None], least_rows=least_rows)


@pytest.mark.parametrize("rows", [1, 3])
def test_padded_products_are_the_same(rows):
    for padded, expected in zip(attended(rows, 8), attended(rows, 1), strict=True):
        np.testing.assert_allclose(padded, expected, rtol=1e-5, atol=1e-5)


def test_planted_bug_the_padding_comes_first(monkeypatch):
    expected, right = attended(1, 1)[0], jnp.pad

    def pad(x, widths):
        return right(x, [after_before[::-1] for after_before in widths])

    monkeypatch.setattr("jax.numpy.pad", pad)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(attended(1, 8)[0], expected, rtol=1e-5, atol=1e-5)


# Lists of copies


HLO = """
%loop (p: (bf16[8,2])) -> (bf16[8,2]) {
  %p = (bf16[8,2]{1,0}) parameter(0)
  %g = bf16[8,2]{1,0} get-tuple-element(%p), index=0
  %near = (bf16[8,2]{1,0:S(1)}, bf16[8,2]{1,0}, u32[]{:S(2)}) copy-start(%g)
  %there = bf16[8,2]{1,0:S(1)} copy-done(%near)
  %both = (bf16[8,2]{1,0}, f32[4]{0}) fusion(%g), kind=kLoop, calls=%fused
  ROOT %r = (bf16[8,2]{1,0}) tuple(%g)
}

%fused (a: bf16[8,2]) -> (bf16[8,2], f32[4]) {
  %a = bf16[8,2]{1,0} parameter(0)
  %sum = f32[4]{0} add(%a, %a)
  %written = bf16[8,2]{1,0} dynamic-update-slice(%a, %a, %a)
  %named = bf16[8,2]{1,0} bitcast(%written)
  ROOT %two = (bf16[8,2]{1,0}, f32[4]{0}) tuple(%named, %sum)
}

ENTRY %main (c: bf16[8,2]) -> bf16[2,8] {
  %c = bf16[8,2]{1,0} parameter(0)
  %w = bf16[5,4]{1,0} copy(%c)
  %turned = bf16[8,2]{0,1} copy(%c)
  %t = (bf16[8,2]{1,0}) while(%turned), condition=%c, body=%loop
  ROOT %back = bf16[2,8]{1,0} transpose(%t)
}
"""


def test_what_is_listed_as_a_copy():
    made = copies_of(HLO, 16, {20})
    assert {copy[:2] for copy in made} == {
        ("loop", "prefetch"),
        ("loop", "add"),  # beside the cache, which is written in place
        ("entry", "copy"),
        ("exit", "transpose"),
    }
    assert Copy("entry", "copy", "bf16[5,4]{1,0}") in copies_of(HLO, 16)
    assert copies_of(HLO, 17, {20}) == []


COMPILERS = {"v5e:2x2": ("libtpu",), "h100": ("jax_cuda13_plugin", "jax_cuda12_plugin")}


def compiled(topology: str, out: Path, planted: str = "") -> list[dict]:
    """Copies of a plain step of one layer of SmolLM2's shapes, by benchmarks/in_place.py."""
    if not any(importlib.util.find_spec(each) for each in COMPILERS[topology]):
        pytest.skip(
            f"{topology} is compiled for by {COMPILERS[topology][0]}, which is not installed"
        )
    script = ROOT / "benchmarks" / "in_place.py"
    run = (
        f"import sys, runpy; sys.argv = sys.argv[1:]; {planted}"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    options = ["--shapes", "smollm2_135m", "--layers", "1", "--context", "2000"]
    settings = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0", "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", run, str(script), "--topologies", topology, *options]
    subprocess.run(
        [*command, "--programs", "step", "--json", str(out)],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}", **settings},
        check=True,
        timeout=880,
    )
    return json.loads(out.read_text())[f"{topology}, 1 layers"]["programs"]["step"]["copies"]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("topology", COMPILERS)
def test_no_cache_is_copied_on_platforms_that_are_not_here(topology, tmp_path):
    made = compiled(topology, tmp_path / "made.json")
    assert [copy for copy in made if copy["operation"] != "prefetch"] == []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_planted_bug_products_of_few_rows_are_not_padded(tmp_path):
    planted = "import beagle_jax.model.attention as a; a._TPU_ROWS = 1; "
    made = compiled("v5e:2x2", tmp_path / "made.json", planted)
    assert {"entry", "exit"} <= {copy["where"] for copy in made}
