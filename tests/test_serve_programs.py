"""Nothing of a request compiles once the server listens."""

import logging

import jax
import pytest

pytest.importorskip("fastapi", reason="the serve extra is not installed")
pytest.importorskip("openai", reason="the openai client is not installed; the test extra has it")

from serve_cases import cycle_decoder, serving

from beagle_jax.serving.worker import Worker

# Bodies that need each program, with the draft and without, and each end of an answer.
SETTINGS = [
    {},
    {"temperature": 0.7, "n": 2},
    {"temperature": 0.7, "top_p": 0.5},
    {"temperature": 0.7, "top_k": 5, "min_p": 0.1},
    {"temperature": 0.7, "top_k": 100},
    {"presence_penalty": 1},
    {"logit_bias": {"5": 3}},
    {"logprobs": 0},
    {"logprobs": 5, "temperature": 1},
    {"stop": "b", "max_tokens": 60},  # ended by the host
    {"stop_token_ids": list(range(32)), "min_tokens": 2},
    {"ignore_eos": True},
]
# 126: a context whose caches would have been enlarged for an answer that fills it.
CONTEXT = 126


@pytest.fixture
def compiled(monkeypatch):
    """What jax compiles, by name, from now on."""
    names = []

    class Listener(logging.Handler):
        def emit(self, record):
            message = record.getMessage()
            if message.startswith("Compiling "):
                names.append(message.split()[1])

    logger, listener = logging.getLogger("jax"), Listener()
    monkeypatch.setattr(logger, "propagate", False)
    logger.addHandler(listener)
    # Not `with jax.log_compiles()`: it holds for its own thread alone, and another one decodes.
    jax.config.update("jax_log_compiles", True)
    yield names
    jax.config.update("jax_log_compiles", False)
    logger.removeHandler(listener)


def ask_everything(running) -> None:
    for settings in SETTINGS:
        for draft in ({"draft": True, "tokens": True}, {"draft": False}):
            body = {"model": "tiny", "prompt": "!", "max_tokens": 6, "beagle": draft, **settings}
            answer = running.raw.post("/v1/completions", json=body)
            assert answer.status_code == 200, answer.text
    for length in (1, 63, 64, 65, CONTEXT - 1):
        body = {"model": "tiny", "prompt": "!" * length, "max_tokens": CONTEXT - length}
        assert running.raw.post("/v1/completions", json=body).status_code == 200


def test_no_request_compiles_anything(compiled):
    # Rows that no other test of this process has: jax keeps compiled programs.
    with serving(cycle_decoder(CONTEXT), rows=5, context=CONTEXT, warm_up=True) as running:
        assert compiled
        compiled.clear()
        ask_everything(running)
        assert compiled == []


def test_a_program_that_was_forgotten_is_seen(compiled, monkeypatch):
    """The planted twin: only greedy requests with drafts are answered before."""
    every = Worker._each_program
    monkeypatch.setattr(Worker, "_each_program", lambda worker: every(worker)[:1])
    with serving(cycle_decoder(CONTEXT), rows=3, context=CONTEXT, warm_up=True) as running:
        compiled.clear()
        ask = {"model": "tiny", "prompt": "!", "max_tokens": 6}
        assert running.raw.post("/v1/completions", json=ask).status_code == 200
        assert compiled == []
        for more in ({"temperature": 1}, {"logprobs": 1}, {"beagle": {"draft": False}}):
            assert running.raw.post("/v1/completions", json={**ask, **more}).is_success
            assert any("advance" in name for name in compiled)
            compiled.clear()
