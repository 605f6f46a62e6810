"""The server and the official client of OpenAI's API: answers, streams, many at a time."""

import json
import re
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="the serve extra is not installed")
pytest.importorskip("openai", reason="the openai client is not installed; the test extra has it")

import openai
from serve_cases import CYCLE, cycle_decoder, events, serving, tiny_decoder, waited_for

from beagle_jax.decoding.requests import Request
from beagle_jax.decoding.sampling import Sampling
from beagle_jax.decoding.session import Session
from beagle_jax.serving.ticket import Ticket

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "HI"}]}
BYTES = {"model": "tiny", "prompt": "!", "temperature": 0}


@pytest.fixture(scope="module")
def letters_server():
    with serving(tiny_decoder(), max_waiting=300) as running:
        yield running


@pytest.fixture(scope="module")
def bytes_server():
    with serving(cycle_decoder(), rows=4) as running:
        yield running


def text_of(chunks) -> str:
    return "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)


def test_a_chat_is_answered_as_the_decoder_answers_it(letters_server):
    decoder = tiny_decoder()
    [expected] = decoder.generate(["HI"], Sampling(1.0, top_p=0.9), seed=5, max_new_tokens=20)
    made = letters_server.client.chat.completions.create(
        **CHAT, max_tokens=20, temperature=1, top_p=0.9, seed=5
    )
    [choice], usage = made.choices, made.usage
    assert choice.message.content == expected.text and choice.message.role == "assistant"
    assert choice.finish_reason == {"length": "length", "token": "stop"}[expected.finish]
    drafts = sum(depth * count for depth, count in enumerate(expected.accepted))
    assert (usage.completion_tokens, usage.rounds) == (len(expected.tokens), expected.rounds)
    assert usage.completion_tokens_details.accepted_prediction_tokens == drafts
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_a_stream_is_the_whole_answer_in_chunks(letters_server):
    create = letters_server.client.chat.completions.create
    whole = create(**CHAT, max_tokens=20, seed=1, temperature=1, n=2)
    chunks = list(
        create(
            **CHAT,
            max_tokens=20,
            seed=1,
            temperature=1,
            n=2,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1
    for index, choice in enumerate(whole.choices):
        own = [chunk.choices[0] for chunk in chunks[:-1] if chunk.choices[0].index == index]
        assert own[0].delta.role == "assistant"
        assert "".join(part.delta.content or "" for part in own) == choice.message.content
        assert [part.finish_reason for part in own if part.finish_reason] == [choice.finish_reason]
        assert all("beagle" not in part.model_extra for part in own)
    assert whole.choices[0].message.content != whole.choices[1].message.content


def test_stop_strings_end_an_answer_over_the_borders_of_tokens(bytes_server):
    create = bytes_server.client.completions.create
    for stop, text in (("b, ", CYCLE[:2]), (["xyz", "\u00e9!"], CYCLE[:5]), (CYCLE[0], "")):
        whole = create(**BYTES, max_tokens=40, stop=stop)
        assert (whole.choices[0].text, whole.choices[0].finish_reason) == (text, "stop")
        assert text_of(create(**BYTES, max_tokens=40, stop=stop, stream=True)) == text
    free = create(**BYTES, max_tokens=22)
    assert (free.choices[0].text, free.choices[0].finish_reason) == (CYCLE * 2, "length")


def test_an_emoji_is_never_half_in_a_stream(bytes_server):
    chunks = list(bytes_server.client.completions.create(**BYTES, max_tokens=33, stream=True))
    assert text_of(chunks) == CYCLE * 3
    assert not any("\ufffd" in chunk.choices[0].text for chunk in chunks)


def test_prompts_are_lists_and_tokens_too(bytes_server):
    create = bytes_server.client.completions.create
    ids = bytes_server.server.worker._decoder.codec.tokenizer("!")["input_ids"]
    ask = dict(model="tiny", temperature=0, max_tokens=11)
    for prompt, count in ((ids, 1), ([ids, ids], 2), (["!", "x!"], 2)):
        made = create(prompt=prompt, **ask)
        assert [choice.text for choice in made.choices] == [CYCLE] * count
        assert [choice.index for choice in made.choices] == list(range(count))


def test_log_probabilities_are_those_of_the_decoder(letters_server):
    drawn = Sampling(1.0)
    [expected] = tiny_decoder().generate(["HI"], drawn, seed=2, max_new_tokens=9, logprobs=3)
    create = letters_server.client.chat.completions.create
    ask = dict(**CHAT, max_tokens=9, temperature=1, seed=2, logprobs=True, top_logprobs=3)
    content = create(**ask).choices[0].logprobs.content
    shown = expected.logprobs[: len(content)]
    assert len(content) == len(expected.text) > 3
    # 8 rows and one row are different matrix products.
    np.testing.assert_allclose(
        [entry.logprob for entry in content], [entry.logprob for entry in shown], atol=1e-5
    )
    assert [len(entry.top_logprobs) for entry in content] == [3] * len(content)
    streamed = [
        entry
        for chunk in create(**ask, stream=True)
        if chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content
    ]
    assert [entry.token for entry in streamed] == [entry.token for entry in content]
    # A session's first prompts are read in a wider batch than later ones.
    np.testing.assert_allclose(
        [entry.logprob for entry in streamed], [entry.logprob for entry in content], atol=1e-5
    )


def test_log_probabilities_of_text_are_the_same_in_a_stream(bytes_server):
    ask = dict(**BYTES, max_tokens=13, logprobs=2)
    whole = bytes_server.client.completions.create(**ask).choices[0].logprobs
    chunks = [
        chunk.choices[0].logprobs
        for chunk in bytes_server.client.completions.create(**ask, stream=True)
        if chunk.choices[0].logprobs
    ]
    assert len(chunks) > 2
    for name in ("tokens", "text_offset"):
        assert [value for part in chunks for value in getattr(part, name)] == getattr(whole, name)
    lengths = [len(token) for token in whole.tokens]
    assert whole.text_offset == [sum(lengths[:place]) for place in range(13)]
    for token, logprob, top in zip(
        whole.tokens, whole.token_logprobs, whole.top_logprobs, strict=True
    ):
        assert top[token] == pytest.approx(logprob) and 1 <= len(top) <= 3


def test_an_answer_can_be_sent_back_as_the_client_holds_it(bytes_server):
    create = bytes_server.client.chat.completions.create
    ask = {"role": "user", "content": "!"}
    first = create(model="tiny", messages=[ask], max_tokens=5).choices[0].message
    second = create(model="tiny", messages=[ask, first, ask], max_tokens=5)
    alone = create(
        model="tiny",
        messages=[ask, {"role": "assistant", "content": first.content}, ask],
        max_tokens=5,
    )
    assert second.usage == alone.usage
    assert second.choices[0].message == alone.choices[0].message


def test_settings_of_a_request_reach_the_engine(letters_server):
    """Each changes the answer, or forbids what the answer otherwise holds."""
    create = letters_server.client.chat.completions.create
    ask = dict(**CHAT, max_tokens=24)
    greedy = create(**ask, temperature=0).choices[0].message.content
    drawn = create(**ask, temperature=1, seed=4).choices[0].message.content
    assert greedy != drawn
    for extra in (dict(extra_body={"top_k": 1}), dict(extra_body={"min_p": 1.0}), dict(top_p=1e-6)):
        assert create(**ask, temperature=1, **extra).choices[0].message.content == greedy
    most = max(set(greedy), key=greedy.count)
    token = ord(most) - ord("!")
    for name, ban in (
        ("logit_bias", dict(logit_bias={str(token): -100})),
        ("frequency_penalty", dict(frequency_penalty=2.0)),
        ("presence_penalty", dict(presence_penalty=2.0)),
        ("repetition_penalty", dict(extra_body={"repetition_penalty": 5.0})),
    ):
        other = create(**ask, temperature=0, **ban).choices[0].message.content
        assert other != greedy, name
        assert name != "logit_bias" or most not in other
    place = greedy.index(greedy[5])
    stopped = create(**ask, temperature=0, extra_body={"stop_token_ids": [ord(greedy[5]) - 33]})
    assert stopped.choices[0].message.content == greedy[:place]


def test_plain_decoding_gives_the_same_answer(bytes_server):
    ask = {**BYTES, "max_tokens": 30}
    drafted, plain = (
        bytes_server.raw.post("/v1/completions", json={**ask, "beagle": {"draft": draft}}).json()
        for draft in (True, False)
    )
    assert drafted["choices"][0]["text"] == plain["choices"][0]["text"]
    assert drafted["usage"]["rounds"] * 2 < plain["usage"]["rounds"] == 29


def test_the_extension_says_how_each_token_came(bytes_server):
    """In CYCLE each round's two drafts are accepted, and the target adds one token."""
    ask = {**BYTES, "max_tokens": 13, "stream": True, "beagle": {"tokens": True}}
    chunks = events(bytes_server.raw.post("/v1/completions", json=ask))
    parts = [chunk["choices"][0]["beagle"] for chunk in chunks if "beagle" in chunk["choices"][0]]
    spans = [(text, drafted) for part in parts for text, drafted in part["spans"]]
    assert "".join(text for text, _ in spans) == "".join(
        chunk["choices"][0]["text"] for chunk in chunks
    )
    accepted = [drafts for part in parts for drafts in part["accepted"]]
    assert accepted == [2, 2, 2, 2] and sum(part["tokens"] for part in parts) == 13
    # Byte 0 is of the prefill; 3, 6, 9 and 12 are of the target. A character has the origin of
    # its last byte.
    assert spans[0] == (CYCLE[0], False) and (CYCLE[1], True) in spans
    tree = parts[1]["tree"]
    assert tree["parents"][0] == 0 and len(tree["tokens"]) == 5
    assert sum(tree["accepted"]) == 3  # the root and two drafts
    assert all(
        tree["accepted"][parent]
        for parent, own in zip(tree["parents"], tree["accepted"], strict=True)
        if own
    )


def test_64_at_a_time_get_what_each_gets_alone(letters_server):
    """Greedy and drawn ones, a few with penalties, log-probabilities or without drafts."""
    kinds = [{}, {"presence_penalty": 1.0}, {}, {"logprobs": True}]
    kinds += [{"extra_body": {"beagle": {"draft": False}}}]

    def ask(seed: int) -> str:
        made = letters_server.client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": chr(ord("A") + seed % 26) * (1 + seed % 5)}],
            max_tokens=8 + seed % 9,
            temperature=seed % 2,
            seed=seed,
            **kinds[seed % len(kinds)],
        )
        return made.choices[0].message.content

    with ThreadPoolExecutor(64) as pool:
        together = list(pool.map(ask, range(64)))
    assert together == [ask(seed) for seed in range(64)]
    assert len(set(together)) > 32


def test_a_row_that_answers_for_another_is_seen(letters_server, monkeypatch):
    """The planted twin: while two rows run, each shows the other's tokens."""
    real = Session._piece

    def piece(session, line, row, snapshot):
        others = [other for other, each in enumerate(session._lines) if each and other != row]
        return real(session, line, others[0] if others else row, snapshot)

    def ask(letter: str) -> str:
        made = letters_server.client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": letter}],
            max_tokens=40,
            temperature=0,
            extra_body={"ignore_eos": True},
        )
        return made.choices[0].message.content

    alone = [ask(letter) for letter in "ABCD"]
    monkeypatch.setattr(Session, "_piece", piece)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, "ABCD")) != alone


def test_200_answers_over_8_rows_lose_nothing_and_keep_their_order(letters_server):
    worker, ended, order = letters_server.worker, {}, []
    rng = np.random.default_rng(0)

    def deliver_to(number: int):
        def deliver(piece) -> None:
            if piece.tokens and number not in order:
                order.append(number)
            if piece.answer is not None:
                ended[number] = piece.answer

        return deliver

    kinds = [{}, {"sampling": Sampling(1.0)}, {"logprobs": 2}, {"draft": False}]
    requests = [
        Request(
            rng.integers(0, 61, 5).tolist(),
            int(rng.integers(2, 12)),
            ignore_eos=True,
            **kinds[number % 4],
        )
        for number in range(200)
    ]
    tickets = [Ticket(request, deliver_to(number)) for number, request in enumerate(requests)]
    worker.submit(tickets)
    waited_for(lambda: len(ended) == 200)
    lengths = [len(ended[number].tokens) for number in range(200)]
    assert lengths == [request.max_new_tokens for request in requests]
    began = [ticket.began for ticket in tickets]
    assert began == sorted(began) and sorted(order) == list(range(200))


def count_of(running, name: str) -> float:
    text = running.raw.get("/metrics").text
    return float(re.search(rf"^{re.escape(name)} (\S+)$", text, re.M).group(1))


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_left_frees_its_row(letters_server, stream):
    running = letters_server
    before = running.worker._metrics._finishes["cancelled"]
    body = json.dumps({**CHAT, "max_tokens": 150, "ignore_eos": True, "stream": stream}).encode()
    connection = socket.create_connection(running.server.servers[0].sockets[0].getsockname())
    connection.sendall(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json"
        b"\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    )
    waited_for(lambda: count_of(running, "beagle_rows_running") == 1)
    connection.close()
    waited_for(lambda: running.worker._metrics._finishes["cancelled"] == before + 1)
    assert count_of(running, "beagle_rows_running") == 0
    [piece] = [running.client.chat.completions.create(**CHAT, max_tokens=3)]
    assert piece.usage.completion_tokens <= 3


def test_a_killed_client_frees_its_row(letters_server):
    running = letters_server
    before = running.worker._metrics._finishes["cancelled"]
    code = (
        "import sys, httpx\n"
        f"with httpx.stream('POST', '{running.url}/v1/chat/completions', json={{**{CHAT!r},"
        "'max_tokens': 180, 'ignore_eos': True, 'stream': True}, timeout=60) as answer:\n"
        "    for line in answer.iter_lines():\n"
        "        print(line, flush=True)\n"
    )
    client = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert client.stdout.readline().startswith("data: ")
    client.kill()
    client.wait()
    waited_for(lambda: running.worker._metrics._finishes["cancelled"] == before + 1)


def test_the_client_s_close_ends_an_answer(letters_server):
    running = letters_server
    before = running.worker._metrics._finishes["cancelled"]
    stream = running.client.chat.completions.create(
        **CHAT, max_tokens=180, stream=True, extra_body={"ignore_eos": True}
    )
    next(stream)
    stream.close()
    waited_for(lambda: running.worker._metrics._finishes["cancelled"] == before + 1)


def test_an_idle_server_rests(letters_server):
    waited_for(lambda: count_of(letters_server, "beagle_rows_running") == 0)
    [thread] = [thread for thread in threading.enumerate() if thread.name == "decoding"][:1]
    assert thread.is_alive()
    time.sleep(0.2)
    before = time.process_time()
    time.sleep(1.0)
    assert time.process_time() - before < 0.3  # of all threads


def test_models(letters_server):
    [model] = letters_server.client.models.list().data
    assert model.id == "tiny" and letters_server.client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="no model 'other'"):
        letters_server.client.models.retrieve("other")
