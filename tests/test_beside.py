"""benchmarks/beside.py: pairs, ratios and their interval, with stand-ins for the two checkouts."""

import subprocess
import sys

import pytest
from test_benchmarks import benchmark

SERVER = """
import json, sys
print(json.dumps({"ready": []}), flush=True)
for number, line in enumerate(sys.stdin):
    seconds = SECONDS * (1 + number % 2)
    print(json.dumps({"seconds": seconds, "result": RESULT}), flush=True)
"""


def stand_in(seconds: float, result: list[int]) -> subprocess.Popen:
    code = SERVER.replace("SECONDS", str(seconds)).replace("RESULT", str(result))
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, text=True)


def test_ratios_are_of_pairs(monkeypatch, tmp_path):
    """Both checkouts take twice as long every other time, which cancels in the ratio of a pair."""
    bench = benchmark("beside")
    waiting = [stand_in(1.0, [7]), stand_in(2.0, [7])]
    monkeypatch.setattr(bench, "started", lambda checkout, draft: waiting.pop(0))
    figures = bench.compare(tmp_path, 5, ["plain"])["plain"]
    assert (figures["ratio"], figures["low"], figures["high"]) == (2.0, 2.0, 2.0)
    assert figures["pairs"] == 5


def test_other_tokens_are_no_comparison(monkeypatch, tmp_path):
    bench = benchmark("beside")
    waiting = [stand_in(1.0, [7]), stand_in(1.0, [8])]
    monkeypatch.setattr(bench, "started", lambda checkout, draft: waiting.pop(0))
    with pytest.raises(RuntimeError, match="plain: the two checkouts wrote different results"):
        bench.compare(tmp_path, 2, ["plain"])


def test_the_interval_is_that_of_the_median():
    bench = benchmark("beside")
    low, high = bench.interval([1.0] * 10 + [3.0] * 10)
    assert low == 1.0 and high == 3.0
    assert bench.interval([1.5] * 4) == (1.5, 1.5)
