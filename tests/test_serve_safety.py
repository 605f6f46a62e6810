"""Keys, limits, signals, metrics and the log of the server."""

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="the serve extra is not installed")
pytest.importorskip("openai", reason="the openai client is not installed; the test extra has it")

import httpx
import openai
from serve_cases import CYCLE, cycle_decoder, events, serving, slow_rounds

from beagle_jax.config import ServeConfig
from beagle_jax.decoding.origin import origins
from beagle_jax.decoding.session import Session
from beagle_jax.errors import UserError
from beagle_jax.serving import keys as keys_module
from beagle_jax.serving.journal import Journal
from beagle_jax.serving.keys import VARIABLE, keys_of
from beagle_jax.serving.metrics import Metrics
from beagle_jax.serving.server import check_address

ROOT = Path(__file__).resolve().parent.parent
KEY = "a-key-of-some-length"
TEXT = {"model": "tiny", "prompt": "!", "temperature": 0}
SECRET = "hush!"


@pytest.fixture(scope="module")
def decoder():
    return cycle_decoder()


@pytest.fixture(scope="module")
def guarded(decoder, tmp_path_factory):
    """A server with two keys and small limits."""
    path = tmp_path_factory.mktemp("keys") / "keys"
    path.write_text(f"another-key-{'x' * 20}\n{KEY}\n")
    with serving(
        decoder,
        api_key_file=str(path),
        rows=1,
        max_waiting=1,
        max_body=2000,
        body_seconds=0.5,
        queue_seconds=0.7,
    ) as running:
        running.raw.headers["Authorization"] = f"Bearer {KEY}"
        yield running


@pytest.mark.parametrize("sent", [None, "Bearer wrong", f"Basic {KEY}", "Bearer", f"Bearer {KEY}x"])
@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/v1/completions", "/none"])
def test_without_the_key_nothing_opens(guarded, path, sent):
    headers = {"Authorization": sent or ""}
    answer = guarded.raw.get(path, headers=headers)
    assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
    assert answer.headers["www-authenticate"] == "Bearer"


def test_the_key_opens_and_probes_need_none(guarded):
    client = openai.OpenAI(base_url=f"{guarded.url}/v1", api_key=KEY, max_retries=0)
    assert client.completions.create(**TEXT, max_tokens=11).choices[0].text == CYCLE
    with pytest.raises(openai.AuthenticationError, match="API key is missing or wrong"):
        client.with_options(api_key="no").models.list()
    for path in ("/health", "/"):
        assert guarded.raw.get(path, headers={"Authorization": ""}).status_code == 200


def test_every_key_is_compared_in_constant_time(monkeypatch, tmp_path):
    (tmp_path / "keys").write_text(f"{KEY}\n{KEY}2\n{KEY}3")
    keys, compared = keys_of(ServeConfig(api_key_file=str(tmp_path / "keys"))), []
    real = keys_module.hmac.compare_digest

    def counted(first, second):
        compared.append((len(first), len(second)))
        return real(first, second)

    monkeypatch.setattr(keys_module.hmac, "compare_digest", counted)
    assert keys.open_with(f"Bearer {KEY}") and not keys.open_with("Bearer x")
    assert compared == [(32, 32)] * 6 and KEY not in repr(keys)


def test_another_address_needs_a_key(monkeypatch, tmp_path):
    monkeypatch.delenv(VARIABLE, raising=False)
    for host in ("0.0.0.0", "::", "10.0.0.1", "my.host"):
        with pytest.raises(UserError, match=r"there is no API key; set serve\.api_key_file"):
            keys_of(ServeConfig(host=host))
    for host in ("127.0.0.1", "::1", "localhost"):
        assert not keys_of(ServeConfig(host=host))
    monkeypatch.setenv(VARIABLE, KEY)
    assert keys_of(ServeConfig(host="0.0.0.0"))
    monkeypatch.setenv(VARIABLE, "short")
    with pytest.raises(UserError, match="fewer than 16 characters"):
        keys_of(ServeConfig())
    (tmp_path / "none").write_text("\n")
    with pytest.raises(UserError, match="holds no key"):
        keys_of(ServeConfig(api_key_file=str(tmp_path / "none")))
    (tmp_path / "umlaut").write_text("ein-schl\u00fcssel-von-hier", encoding="utf-8")
    with pytest.raises(UserError, match="not ASCII"):
        keys_of(ServeConfig(api_key_file=str(tmp_path / "umlaut")))
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=r"serve\.api_key_file: .* cannot be read"):
            keys_of(ServeConfig(api_key_file=str(place)))


def test_an_address_that_cannot_be_bound_is_refused_before_the_weights_are_loaded():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"serve\.port={port} cannot be bound: .*in use"):
            check_address(ServeConfig(port=port))
    check_address(ServeConfig(port=port))
    with pytest.raises(UserError, match=r"serve\.host=192\.0\.2\.1 .* cannot be bound"):
        check_address(ServeConfig(host="192.0.2.1", port=0))


def test_other_hosts_and_types_are_refused_without_a_key(decoder):
    """What a web site can make a browser send to 127.0.0.1."""
    with serving(decoder, rows=1) as running:
        stranger = running.raw.get("/v1/models", headers={"Host": "evil.example:80"})
        assert stranger.status_code == 403 and "127.0.0.1" in stranger.json()["error"]["message"]
        simple = running.raw.post(
            "/v1/completions", content=b"{}", headers={"Content-Type": "text/plain"}
        )
        assert simple.status_code == 415
        for host in ("localhost", "LOCALHOST:1", "localhost.", "127.0.0.1:99", "[::1]:8000"):
            assert running.raw.get("/v1/models", headers={"Host": host}).status_code == 200


def test_large_and_slow_bodies_are_refused(guarded):
    large = {**TEXT, "prompt": "x" * 3000}
    assert guarded.raw.post("/v1/completions", json=large).status_code == 413

    def parts():
        for _ in range(30):
            yield b"x" * 100

    kind = {"Content-Type": "application/json"}
    assert guarded.raw.post("/v1/completions", content=parts(), headers=kind).status_code == 413
    with socket.create_connection(guarded.server.servers[0].sockets[0].getsockname()) as slow:
        slow.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Authorization: Bearer %s\r\nContent-Length: 100\r\n\r\n{" % KEY.encode()
        )
        assert slow.recv(1000).startswith(b"HTTP/1.1 408 ")


def test_a_full_queue_and_a_long_wait_are_429(guarded):
    ask = {**TEXT, "max_tokens": 180, "stream": True}
    post = guarded.raw.stream
    with post("POST", "/v1/completions", json=ask) as first:
        lines = first.iter_lines()
        next(lines)
        pair = guarded.raw.post("/v1/completions", json={**TEXT, "max_tokens": 2, "n": 2})
        assert pair.status_code == 429 and pair.json()["error"]["code"] == "queue_full"
        assert pair.headers["retry-after"] == "1"
        assert guarded.worker._running and not guarded.worker._waiting


def test_an_answer_that_waits_too_long_is_refused(guarded, monkeypatch):
    slow_rounds(monkeypatch, 0.05)
    long = {**TEXT, "max_tokens": 180, "stream": True}
    with guarded.raw.stream("POST", "/v1/completions", json=long) as _:
        late = guarded.raw.post("/v1/completions", json={**TEXT, "max_tokens": 2})
    assert late.status_code == 429 and late.json()["error"]["code"] == "queue_timeout"


def test_an_answer_has_a_longest_time(decoder, monkeypatch):
    slow_rounds(monkeypatch, 0.02)
    with serving(decoder, rows=1, answer_seconds=0.2) as running:
        made = running.raw.post("/v1/completions", json={**TEXT, "max_tokens": 180}).json()
    assert made["choices"][0]["finish_reason"] == "length"
    assert 0 < made["usage"]["completion_tokens"] < 180


def test_a_failing_engine_ends_its_answers_and_not_the_server(decoder, monkeypatch, caplog):
    with serving(decoder, rows=2) as running:
        ask = {**TEXT, "max_tokens": 11}

        def broken(*_):
            raise RuntimeError("out of memory")

        with monkeypatch.context() as patch:
            patch.setattr(Session, "_piece", broken)
            for times in range(1, 4):
                answer = running.raw.post("/v1/completions", json=ask)
                assert answer.status_code == 500 and "log" in answer.json()["error"]["message"]
                assert "memory" not in answer.text
                status = running.raw.get("/health").status_code
                assert status == (503 if times == 3 else 200)
        assert running.raw.post("/v1/completions", json=ask).json()["choices"][0]["text"] == CYCLE
        assert running.raw.get("/health").status_code == 200
    assert "out of memory" in caplog.text


def test_a_mistake_of_the_server_has_the_envelope_too(decoder, monkeypatch):
    def broken(*_, **__):
        raise ZeroDivisionError(SECRET)

    with serving(decoder, rows=2) as running:
        monkeypatch.setattr(type(running.worker), "submit", broken)
        answer = running.raw.post("/v1/completions", json=TEXT)
        shown = running.raw.get("/metrics").text
    assert answer.status_code == 500 and SECRET not in answer.text
    assert 'beagle_requests_total{path="/v1/completions",status="500"} 1' in shown
    assert answer.json()["error"]["type"] == "server_error"


def test_metrics_count_what_was_answered(decoder):
    with serving(decoder, rows=2) as running:
        ask = {**TEXT, "max_tokens": 13, "ignore_eos": True}
        usage = running.raw.post("/v1/completions", json=ask).json()["usage"]
        running.raw.post("/v1/completions", json={**ask, "stream": True})
        running.raw.post("/v1/completions", json={})
        text = running.raw.get("/metrics").text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert values['beagle_requests_total{path="/v1/completions",status="200"}'] == "2"
    assert values['beagle_requests_total{path="/v1/completions",status="400"}'] == "1"
    assert values['beagle_answers_total{finish="length"}'] == "2"
    assert int(values["beagle_completion_tokens_total"]) == 26
    assert int(values["beagle_rounds_total"]) == 2 * usage["rounds"] == 8
    assert values["beagle_accepted_draft_tokens_total"] == "16"
    assert values['beagle_rounds_accepting_total{depth="2"}'] == "8"
    assert values["beagle_tokens_per_round"] == "3.0"
    assert values["beagle_time_to_first_token_seconds_count"] == "2"
    assert values['beagle_time_between_tokens_seconds_bucket{le="+Inf"}'] == "8"
    assert float(values["beagle_tokens_per_second"]) == 2.6
    assert (values["beagle_rows"], values["beagle_rows_running"]) == ("2", "0")
    check_format(text)
    for mistake in (
        text.replace("# TYPE beagle_rounds_total counter\n", ""),
        text.replace('le="10.0"', 'le="1e1000"'),
        text.replace("beagle_rows 2", "beagle_rows two"),
        re.sub(r'(seconds_bucket{le="0.005"}) \d+', r"\1 9", text),
        text.removesuffix("\n"),
    ):
        with pytest.raises((AssertionError, ValueError, KeyError)):
            check_format(mistake)


def check_format(text: str) -> None:
    """Checks a page against the text format of Prometheus."""
    assert text.endswith("\n")
    kinds, series, buckets = {}, {}, {}
    name = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
    for line in text.splitlines():
        if head := re.fullmatch(rf"# HELP ({name}) [^\\]+", line):
            family = head[1]
            assert family not in kinds
        elif head := re.fullmatch(rf"# TYPE ({name}) (counter|gauge|histogram)", line):
            assert head[1] == family
            kinds[family] = head[2]
        else:
            sample = re.fullmatch(
                rf'({name})({{{name}="[^"\\]*"(,{name}="[^"\\]*")*}})? (\S+)', line
            )
            assert sample, line
            own = sample[1]
            if kinds[family] == "histogram":
                own = re.sub(r"_(bucket|sum|count)$", "", own)
            assert own == family and sample[1] + (sample[2] or "") not in series
            assert kinds[family] != "counter" or family.endswith("_total")
            series[sample[1] + (sample[2] or "")] = float(sample[4])
            if sample[1].endswith("_bucket"):
                bound = float(sample[2][5:-2].replace("+Inf", "inf"))
                buckets.setdefault(family, []).append((bound, float(sample[4])))
    for family, counts in buckets.items():
        assert counts == sorted(counts) and [count for _, count in counts] == sorted(
            count for _, count in counts
        )
        assert [bound for bound, _ in counts].count(float("inf")) == 1
        assert counts[-1][1] == series[f"{family}_count"] and f"{family}_sum" in series


@pytest.mark.parametrize("texts", [False, True])
def test_the_log_has_a_line_a_request_and_texts_only_when_asked(decoder, texts, monkeypatch):
    printed = io.StringIO()
    monkeypatch.setattr(sys, "stdout", printed)
    with serving(decoder, rows=2, log_prompts=texts) as running:
        ask = {**TEXT, "prompt": SECRET, "max_tokens": 11, "user": "me"}
        running.raw.post("/v1/completions", json=ask)
        running.raw.post("/v1/completions", json={**ask, "stream": True})
        running.raw.post("/v1/completions", json={**ask, SECRET: SECRET})
        running.raw.post("/v1/completions", json={**ask, "model": SECRET})
        running.raw.post("/v1/completions", content=SECRET, headers={"Content-Type": "text/plain"})
        running.raw.get("/" + "x" * 300)
        running.raw.get("/v1/completions")
        for path in ("/v1/models", "/health", "/v1/models/none", "/"):
            running.raw.get(path)
        shown = running.raw.get("/metrics").text
    lines = [json.loads(line) for line in printed.getvalue().splitlines() if line[0] == "{"]
    assert [line["status"] for line in lines] == [200, 200, 400, 404, 415, 404, 405, 200, 404, 200]
    assert [line["path"] for line in lines[-3::2]] == ["/v1/models", "/"]  # no line for a probe
    assert len(lines[5]["path"]) == 200  # and one name in the metrics for all made-up paths
    assert 'beagle_requests_total{path="other",status="404"} 2\n' in shown and "xxx" not in shown
    assert [line["completion_tokens"] for line in lines[:2]] == [11, 11]
    assert [line["finish"] for line in lines[:2]] == [["length"]] * 2
    assert lines[0]["user"] == "me" and lines[1]["stream"]
    assert (SECRET in printed.getvalue(), "\\ud83d" in printed.getvalue()) == (texts, texts)


def test_a_log_that_nobody_reads_stops_nothing(caplog):
    """The server goes on where its output was a pipe that was closed."""

    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError("Broken pipe")

    metrics = Metrics(1, 2)
    journal = Journal(metrics, stream=Closed())
    for _ in range(3):
        journal.entry("/v1/completions").write(200)
    assert caplog.text.count("cannot be written: Broken pipe") == 1
    assert metrics._requests["/v1/completions", 200] == 3


SERVER = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
import conftest
import pytest
from serve_cases import cycle_decoder, slow_rounds, tiny_config
from beagle_jax.serving.keys import keys_of
from beagle_jax.serving.server import run
slow_rounds(pytest.MonkeyPatch(), 0.05)
config = tiny_config(rows=2, grace_seconds={grace})
run(config, cycle_decoder(), keys_of(config.serve), lambda *where: print(*where, flush=True))
print("left")
"""


@pytest.fixture
def process(request):
    """A server in a process of its own, whose rounds take a twentieth of a second."""
    code = SERVER.format(root=str(ROOT), tests=str(ROOT / "tests"), grace=request.param)
    started = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    line = started.stdout.readline()
    started.url = line.split()[-1]
    yield started
    started.kill()
    started.wait()


def streaming(url: str, tokens: int):
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)
    stream = client.completions.create(**TEXT, max_tokens=tokens, stream=True)
    next(stream)
    return client, stream


@pytest.mark.parametrize("process", [20], indirect=True)
def test_sigterm_lets_answers_end(process):
    client, stream = streaming(process.url, 44)
    process.send_signal(signal.SIGTERM)
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks).endswith("!")
    assert chunks[-1].choices[0].finish_reason == "length"
    assert process.wait(20) == 0 and process.stdout.read().endswith("left\n")
    with pytest.raises(openai.APIConnectionError):
        client.models.list()


@pytest.mark.parametrize("process", [0.3], indirect=True)
def test_sigterm_ends_answers_that_take_longer_than_the_grace(process):
    _, stream = streaming(process.url, 170)
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    text = "".join(chunk.choices[0].text for chunk in stream)
    assert len(text) < 100 and process.wait(20) == 0
    assert time.monotonic() - began < 6


@pytest.mark.parametrize("process", [20], indirect=True)
def test_a_killed_server_breaks_its_streams(process):
    _, stream = streaming(process.url, 170)
    process.kill()
    with pytest.raises((openai.APIConnectionError, httpx.TransportError)):
        list(stream)


def test_the_origin_of_tokens():
    assert origins(True, (2, 0), 5) == [False, True, True, False, False]
    assert origins(False, (2,), 2) == [True, True]  # the end came before the target's token
    assert origins(True, (), 1) == [False] and origins(False, (), 0) == []


def test_events_end_with_their_mark():
    """The reader of streams in these tests sees a stream that breaks off."""

    class Broken:
        text = 'data: {"a": 1}\n\n'

    with pytest.raises(AssertionError):
        events(Broken())
