"""Text that an OpenAI-compatible server writes, with a stand-in on loopback."""

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from chat_cases import byte_tokenizer

from beagle_jax.config import DataConfig, load_config
from beagle_jax.corpus import text as corpus_text
from beagle_jax.corpus import waves
from beagle_jax.corpus.server import ServerAnswers
from beagle_jax.corpus.text import training_rows
from beagle_jax.data.chats import Chat
from beagle_jax.data.source import check_source, server_of
from beagle_jax.errors import UsageError, UserError

QUESTIONS = [f"What is {number}?" for number in range(10)]


class StandIn(ThreadingHTTPServer):
    """Answers /v1/chat/completions by what was asked last; `reply` may change that."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.requests: list[dict] = []
        self.reply = lambda request: {}
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(request | {"path": self.path})
        answer = {"role": "assistant", "content": f"On {request['messages'][-1]['content']}"}
        changes = self.server.reply(request)
        status = changes.get("status", 200)
        choice = {
            "index": 0,
            "message": answer | changes.get("message", {}),
            "finish_reason": changes.get("finish_reason", "stop"),
        }
        body = {"id": "1", "object": "chat.completion", "created": 0, "model": request["model"]}
        payload = json.dumps(body | {"choices": [choice]} if status == 200 else {"error": "no"})
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(payload.encode())

    def log_message(self, *arguments):
        """Says nothing."""


@pytest.fixture
def server():
    pytest.importorskip("openai")
    standing = StandIn()
    threading.Thread(target=standing.serve_forever, daemon=True).start()
    yield standing
    standing.shutdown()
    standing.server_close()


@pytest.fixture
def written(server, tmp_path, monkeypatch):
    """The text of a folder as `>>` supervised `<<`, and what the config is."""
    monkeypatch.setattr(waves, "SERVER_ROWS", 4)

    def run(records=None, **settings) -> list[str]:
        path = tmp_path / "prompts.jsonl"
        records = records or [{"prompt": question} for question in QUESTIONS]
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        tokenizer = byte_tokenizer()
        given = {"source": f"openai:{server.url}#org/name", "prompts": str(path)} | settings
        config = DataConfig(folder=str(tmp_path / "data"), states="online", **given)
        eos = [tokenizer.eos_token_id]
        parts = training_rows(config, {"target": "x"}, tokenizer, eos, None)
        return [spelt(tokenizer, row) for part in parts.values() for row in part]

    return run


def spelt(tokenizer, row) -> str:
    first = row.supervised.index(True)
    text = tokenizer.decode(row.tokens[:first]) + ">>" + tokenizer.decode(row.tokens[first:])
    return text.replace("<|im_start|>", "[").replace("<|im_end|>", "]").replace("\n", "/")


def expected(questions) -> list[str]:
    return [f"[user/{question}]/[assistant/>>On {question}]/" for question in questions]


def without_rest(rows: list[str]) -> list[str]:
    """What the template puts after the last answer belongs to no answer."""
    return [row.removesuffix("/") + "/" for row in rows]


def check_answers(written) -> None:
    assert without_rest(written()) == expected(QUESTIONS)


def test_a_server_answers_the_prompts_in_their_order(written, server):
    server.reply = lambda request: {}
    check_answers(written)
    assert {request["path"] for request in server.requests} == {"/v1/chat/completions"}
    request = next(r for r in server.requests if r["messages"][-1]["content"] == QUESTIONS[0])
    assert request["model"] == "org/name" and request["max_tokens"] == 96
    assert request["temperature"] == 0 and "top_k" not in request


def test_answers_of_other_questions_are_seen(written, server, monkeypatch):
    """The planted bug."""
    right = ServerAnswers._dialog
    monkeypatch.setattr(
        ServerAnswers,
        "_dialog",
        lambda self, chat, seed: right(self, Chat(({"role": "user", "content": "X?"},), "x"), seed),
    )
    with pytest.raises(AssertionError):
        check_answers(written)


def test_sampling_settings_reach_the_server(written, server):
    written(temperature=0.5, top_k=7, max_answer_tokens=20, seed=100)
    assert {(r["temperature"], r["top_k"], r["max_tokens"]) for r in server.requests} == {
        (0.5, 7, 20)
    }
    assert len({request["seed"] for request in server.requests}) == 10


def test_an_interrupted_run_asks_for_what_is_missing_only(written, server):
    def fails(request):
        return {"status": 400} if request["messages"][-1]["content"] == QUESTIONS[6] else {}

    server.reply = fails
    with pytest.raises(UserError, match=r"/v1 gave no answer of org/name .*run again to go on"):
        written()
    server.requests.clear()
    server.reply = lambda request: {}
    check_answers(written)
    again = {request["messages"][-1]["content"] for request in server.requests}
    assert again == set(QUESTIONS[4:]), "the first part is kept"


def test_a_finished_text_needs_no_server(written, server, monkeypatch):
    first = written()
    server.requests.clear()
    monkeypatch.setattr(corpus_text, "answerer_of", lambda *_: pytest.fail("asked again"))
    assert written() == first and not server.requests


def test_given_answers_stay_and_regenerated_ones_follow_each_other(written, server):
    record = {
        "messages": [
            {"role": "user", "content": "A?"},
            {"role": "assistant", "content": "old"},
            {"role": "user", "content": "B?"},
            {"role": "assistant", "content": "old"},
        ]
    }
    assert written([record]) == ["[user/A?]/[assistant/>>old]/[user/B?]/[assistant/old]/"]
    assert not server.requests


def test_every_turn_is_asked_for(written, server):
    messages = [
        {"role": "user", "content": "A?"},
        {"role": "assistant", "content": "old"},
        {"role": "user", "content": "B?"},
        {"role": "assistant", "content": "old"},
    ]
    rows = written([{"messages": messages}], answers="regenerate")
    assert rows == ["[user/A?]/[assistant/>>On A?]/[user/B?]/[assistant/On B?]/"]
    assert [len(request["messages"]) for request in server.requests] == [1, 3]


def test_an_answer_that_was_cut_has_no_end(written, server):
    server.reply = lambda request: {"finish_reason": "length"}
    rows = written([{"prompt": "A?"}])
    assert rows == ["[user/A?]/[assistant/>>On A?"]


def test_empty_answers_are_left_out_and_counted(written, server, capsys):
    def silent(request):
        first = request["messages"][-1]["content"] == QUESTIONS[1]
        return {"message": {"content": ""}} if first else {}

    server.reply = silent
    rows = written(max_bad_share=0.5)
    assert without_rest(rows) == expected([QUESTIONS[0], *QUESTIONS[2:]])
    assert "left out 1 of 4 records" in capsys.readouterr().out


def test_a_server_that_says_nothing_ends_the_run(written, server):
    server.reply = lambda request: {"message": {"content": " "}}
    with pytest.raises(UserError, match=r"the server's answer is empty; .* data.max_bad_share"):
        written()


# Without a server


@pytest.mark.parametrize("source", ["openai:", "openai:host#m", "openai:http://host/v1"])
def test_a_source_without_url_or_model_is_refused(source, tmp_path):
    with pytest.raises(UserError, match=r"is not openai:URL#MODEL; expected, for example"):
        check_source(DataConfig(source=source, folder=str(tmp_path)))
    assert server_of("openai:https://host/v1#org/m#x") == ("https://host/v1", "org/m#x")


def test_prompts_are_checked_before_anything_long(tmp_path):
    config = DataConfig(
        source="openai:http://host/v1#m", prompts=str(tmp_path / "none.jsonl"), folder="nowhere"
    )
    with pytest.raises(UserError, match="is not a file or folder"):
        check_source(config)


def test_prompts_of_another_source_are_refused(tmp_path):
    (tmp_path / "run.yaml").write_text("target: {source: x}\ndata: {prompts: a.jsonl}\n")
    with pytest.raises(UsageError, match=r"data.prompts is a.jsonl, which only an openai: source"):
        load_config(tmp_path / "run.yaml")


def test_a_source_in_a_config_is_no_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = "openai:http://127.0.0.1:8000/v1#org/name"
    (tmp_path / "run.yaml").write_text(f"target: {{source: x}}\ndata: {{source: '{source}'}}\n")
    assert load_config(tmp_path / "run.yaml").data.source == source


def test_without_the_client_the_message_says_so(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "openai", None)
    config = DataConfig(source="openai:http://host/v1#m", folder=str(tmp_path))
    with pytest.raises(UserError, match=r"needs the openai client .*pip install 'openai>=3,<4'"):
        ServerAnswers(config, byte_tokenizer(), [0])
