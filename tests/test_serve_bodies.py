"""Bodies that the server refuses, each with a message that names the field."""

import json
import math

import pytest

pytest.importorskip("fastapi", reason="the serve extra is not installed")
pytest.importorskip("openai", reason="the openai client is not installed; the test extra has it")

from serve_cases import CONTEXT, serving, tiny_decoder

from beagle_jax.config import Config
from beagle_jax.serving.bodies import (
    NEUTRAL,
    NEUTRAL_IN_MESSAGES,
    ChatBody,
    CompletionBody,
    parsed,
)
from beagle_jax.serving.refusal import Refusal
from beagle_jax.serving.translation import Translator

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "HI"}], "max_tokens": 2}
TEXT = {"model": "tiny", "prompt": "HI", "max_tokens": 2}
PATHS = {"chat": ("/v1/chat/completions", CHAT), "text": ("/v1/completions", TEXT)}
REMOVED = object()


@pytest.fixture(scope="module")
def running():
    with serving(tiny_decoder(), rows=2, max_choices=4, max_body=20_000) as running:
        yield running


# Values of a wrong type, then values out of range.
WRONG: dict[str, list] = {
    "model": [1, "", None, ["tiny"]],
    "max_tokens": ["2", 1.5, True, 0, -1, 10**6],
    "n": ["1", 1.5, True, 0, -1, 5],
    "stream": ["yes", 1],
    "stream_options": [True, [], {"include_usage": "x"}, {"other": 1}, {"include_usage": True}],
    "stop": [1, "", [], ["a", ""], [1], ["a", "b", "c", "d", "e"]],
    "seed": ["1", 1.5, 2**63],
    "temperature": ["1", True, [], -0.1, 2.1, math.inf, math.nan, 1e-9],
    "top_p": ["1", 0, -0.5, 1.1],
    "presence_penalty": ["1", -2.1, 2.1],
    "frequency_penalty": ["1", -2.1, 2.1],
    "logit_bias": [1, [], {"a": 1}, {"-1": 1}, {"1": "x"}, {"1": 101}, {"61": 1}, {"1.5": 1}],
    "user": [1, "u" * 257],
    "top_k": ["1", 1.5, -2],
    "min_p": ["1", -0.1, 1.1],
    "repetition_penalty": ["1", 0, -1],
    "min_tokens": ["1", -1, 3],
    "stop_token_ids": [1, ["1"], [-1], [61], list(range(33))],
    "ignore_eos": ["no", 1],
    "beagle": [1, {"draft": 1}, {"tokens": "x"}, {"other": True}],
}
CHAT_WRONG: dict[str, list] = {
    "messages": [
        REMOVED,
        None,
        [],
        "HI",
        {},
        [1],
        [{"role": "user"}],
        [{"content": "HI"}],
        [{"role": "tool", "content": "HI"}],
        [{"role": "developer", "content": "HI"}],
        [{"role": "user", "content": 1}],
        [{"role": "user", "content": []}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}],
        [{"role": "user", "content": "HI", "name": "me"}],
        [{"role": "assistant", "content": None}],
        [{"role": "assistant", "content": "HI", "tool_calls": [{"type": "function"}]}],
        [{"role": "assistant", "content": "HI", "function_call": {"name": "f"}}],
        [{"role": "assistant", "content": "HI", "refusal": "no"}],
        [{"role": "assistant", "content": "HI", "audio": {"id": "x"}}],
        [{"role": "assistant", "content": "HI", "annotations": [{"type": "url_citation"}]}],
        [{"role": "user", "content": "A" * (CONTEXT + 1)}],
    ],
    "max_completion_tokens": ["2", 0, 3],
    "logprobs": [1, "yes"],
    "top_logprobs": ["1", -1, 21, 1],
    "prompt": ["HI"],
}
TEXT_WRONG: dict[str, list] = {
    "prompt": [
        REMOVED,
        None,
        "",
        [],
        {},
        1,
        [""],
        [1, "HI"],
        [[]],
        [-1],
        [61],
        [1.5],
        ["HI"] * 5,
        "A" * (CONTEXT + 1),
    ],
    "logprobs": [True, "1", -1, 21],
    "messages": [[{"role": "user", "content": "HI"}]],
    "top_logprobs": [1],
}
ASKING = {
    "audio": {"voice": "alloy"},
    "best_of": 2,
    "echo": True,
    "function_call": "auto",
    "functions": [{"name": "f"}],
    "metadata": {"a": "b"},
    "modalities": ["audio"],
    "moderation": {"model": "x"},
    "parallel_tool_calls": "x",
    "prediction": {"type": "content", "content": "x"},
    "prompt_cache_key": "x",
    "prompt_cache_retention": "24h",
    "reasoning_effort": "low",
    "response_format": {"type": "json_object"},
    "safety_identifier": "x",
    "service_tier": "flex",
    "store": True,
    "suffix": "x",
    "tool_choice": "required",
    "tools": [{"type": "function"}],
    "verbosity": "low",
    "web_search_options": {},
}
CASES = [
    *(("chat", name, value) for name, values in (WRONG | CHAT_WRONG).items() for value in values),
    *(("text", name, value) for name, values in (WRONG | TEXT_WRONG).items() for value in values),
    *((path, name, value) for path in PATHS for name, value in ASKING.items()),
    *((path, name, 1) for path in PATHS for name in ("temprature", "best", "Model", "")),
    *((path, "model", REMOVED) for path in PATHS),
]


def refused(running, path: str, raw: bytes, status: int = 400) -> dict:
    """The error of a body, in OpenAI's envelope."""
    answer = running.raw.post(path, content=raw, headers={"Content-Type": "application/json"})
    assert answer.status_code == status, answer.text
    assert answer.json().keys() == {"error"}
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"} and error["message"]
    return error


def test_a_wrong_field_is_refused_by_name(running):
    """More than a hundred bodies, each with one mistake."""
    assert len(CASES) > 200
    missed = []
    for kind, name, value in CASES:
        path, body = PATHS[kind]
        changed = {**body, name: value}
        if value is REMOVED:
            del changed[name]
        raw = json.dumps(changed).encode()
        answer = running.raw.post(path, content=raw, headers={"Content-Type": "application/json"})
        error = answer.json().get("error", {})
        # max_tokens: a limit that the context cannot hold, or two that differ.
        names = {name, "max_tokens"} if name.startswith("max") else {name}
        if name == "prompt" and value == ["HI"] * 5:
            names = {"n"}
        if name == "max_tokens" and kind == "chat":
            names.add("max_completion_tokens")
        named = error.get("param") in names or name in error.get("message", "")
        sound = math.nan if isinstance(value, float) and not math.isfinite(value) else value
        if answer.status_code != 400 or not (named or sound is math.nan):
            missed.append((kind, name, value, answer.status_code, answer.text[:200]))
    assert missed == []


def test_every_field_has_wrong_values_here():
    """So a new field cannot be forgotten."""
    assert set(ChatBody.model_fields) <= set(WRONG | CHAT_WRONG)
    assert set(CompletionBody.model_fields) <= set(WRONG | TEXT_WRONG)
    assert ASKING.keys() == NEUTRAL.keys()


@pytest.mark.parametrize("kind", PATHS)
def test_null_and_values_that_ask_for_nothing_are_accepted(running, kind):
    path, body = PATHS[kind]
    model = ChatBody if kind == "chat" else CompletionBody
    neutral = {name: values[-1] if values else None for name, values in NEUTRAL.items()}
    nulls = {name: None for name in model.model_fields if name not in body}
    message = {"role": "assistant", "content": "HI"}
    for values in (lambda name: None, lambda name: ([None, *NEUTRAL_IN_MESSAGES[name]])[-1]):
        message |= {name: values(name) for name in NEUTRAL_IN_MESSAGES}
        if kind == "chat":
            answer = running.raw.post(path, json={**body, "messages": [message]})
            assert answer.status_code == 200, answer.text
    for more in (neutral, nulls, dict.fromkeys(NEUTRAL), {"top_k": -1}, {"temperature": 1}):
        answer = running.raw.post(path, json={**body, **more})
        assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[]",
        b'"HI"',
        b"1",
        b"null",
        b"\xff",
        b"[" * 5000,
        b'{"model": "tiny", "prompt": "\\ud800", "max_tokens": 2}',
        b'{"model": "tiny", "prompt": "HI", "temperature": NaN}',
        b'{"model": "tiny", "prompt": "HI", "temperature": 1e999}',
        b'{"model": "tiny", "prompt": "HI", "seed": 1' + b"0" * 4000 + b"}",
    ],
)
@pytest.mark.parametrize("kind", PATHS)
def test_what_is_not_a_body_is_refused(running, raw, kind):
    refused(running, PATHS[kind][0], raw)


@pytest.mark.parametrize(
    ("kind", "name", "value", "message"),
    [
        ("text", "stop", list("abcde"), "stop: list should have at most 4 items"),
        ("text", "stop", ["a", ""], "stop.1: string should have at least 1 character"),
        ("text", "stop", 1, "stop: input should be a valid string"),
        ("text", "prompt", [], "prompt: list should have at least 1 item"),
        ("text", "prompt", "", "prompt: string should have at least 1 character"),
        ("chat", "messages", [{"role": "user"}], "messages.0.content is missing"),
    ],
)
def test_a_message_speaks_of_the_form_that_was_sent(kind, name, value, message):
    """Text or a list: pydantic has an error for each of them."""
    body = {**PATHS[kind][1], name: value}
    with pytest.raises(Refusal) as caught:
        parsed(ChatBody if kind == "chat" else CompletionBody, json.dumps(body).encode())
    error = caught.value.body()["error"]
    assert error["message"].startswith(message) and error["param"] == name


def test_other_models_paths_and_methods(running):
    body = json.dumps({**TEXT, "model": "gpt-4"}).encode()
    assert refused(running, "/v1/completions", body, 404)["code"] == "model_not_found"
    for answer, status in (
        (running.raw.get("/v1/chat/completions"), 405),
        (running.raw.post("/v1/embeddings", json={}), 404),
        (running.raw.get("/v2"), 404),
        (running.raw.get("/docs"), 404),
        (running.raw.get("/openapi.json"), 404),
    ):
        assert answer.status_code == status and answer.json()["error"]["message"]
    for method in ("PUT", "DELETE", "OPTIONS", "PATCH", "GET", "HEAD"):
        for path, allowed in (("/v1/completions", {"POST"}), ("/health", {"GET", "HEAD"})):
            answer = running.raw.request(method, path)
            if method in allowed:
                assert answer.status_code == 200
            else:
                assert answer.status_code == 405
                assert set(answer.headers["allow"].split(", ")) == allowed
    for path in ("/", "/metrics", "/v1/models", "/v1/models/tiny"):
        full, head = running.raw.get(path), running.raw.head(path)
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-type"] == full.headers["content-type"]
    assert running.raw.post("/v1/completions/", json=TEXT).status_code == 404  # no redirection


def test_long_names_are_not_repeated(running):
    for body in ({"x" * 9999: 1}, {"logit_bias": {"x" * 9999: 1e9}}, {"beagle": {"x" * 9999: 1}}):
        raw = json.dumps({**TEXT, **body}).encode()
        assert len(json.dumps(refused(running, "/v1/completions", raw))) < 500


def test_prompts_are_counted_before_they_are_encoded(running, monkeypatch):
    """So that a list of very many costs nothing."""
    encoded = []
    codec = type(running.worker._decoder.codec)
    monkeypatch.setattr(codec, "encode", lambda *_: encoded.append(1))
    raw = json.dumps({**TEXT, "prompt": ["HI"] * 3, "n": 2}).encode()
    error = refused(running, "/v1/completions", raw)
    assert error["param"] == "n" and "3 prompts times n = 2" in error["message"] and not encoded


def test_answers_that_never_fit_are_refused_for_good():
    """More than rows and queue can hold is 400, not 429, which says that it may work later."""
    serve = {"rows": 2, "max_waiting": 1, "max_choices": 16}
    translator = Translator(Config(target={"source": "tiny"}, serve=serve), tiny_decoder(), "tiny")
    assert (
        len(translator.requests(parsed(CompletionBody, b'{"model":"tiny","prompt":"A","n":3}')))
        == 3
    )
    with pytest.raises(Refusal, match="more than 3 answers"):
        translator.requests(parsed(CompletionBody, b'{"model":"tiny","prompt":"A","n":4}'))


def test_the_default_least_length_gives_way_to_a_limit():
    decode = {"min_new_tokens": 10, "max_new_tokens": 20}
    translator = Translator(
        Config(target={"source": "tiny"}, decode=decode), tiny_decoder(), "tiny"
    )
    for limit, least in ((5, 5), (15, 10)):
        raw = b'{"model":"tiny","prompt":"A","max_tokens":%d}' % limit
        [request] = translator.requests(parsed(CompletionBody, raw))
        assert (request.max_new_tokens, request.min_new_tokens) == (limit, least)


def test_a_refusal_of_a_stream_is_no_stream(running):
    long = {**CHAT, "messages": [{"role": "user", "content": "A" * 500}], "stream": True}
    error = refused(running, "/v1/chat/completions", json.dumps(long).encode())
    assert error["code"] == "context_length_exceeded"
