"""`data.answers: regenerate`: the target writes every answer of a chat, each after its own."""

import json

import numpy as np
import pytest
from chat_cases import byte_tokenizer

from beagle_jax.config import DataConfig
from beagle_jax.corpus import answers as corpus_answers
from beagle_jax.corpus.answers import TargetAnswers
from beagle_jax.corpus.text import training_rows
from beagle_jax.data.folder import states_path
from beagle_jax.data.state_records import record_bytes

# Drops the text before </think> from answers that are not the last, as Qwen3's template does.
FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if not loop.last and '/' in "
    "m['content'] %}{{ m['content'].split('/')[-1] }}{% else %}{{ m['content'] }}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class Counting:
    """Answers with the number of its call; `words` is put before it."""

    def __init__(self, tokenizer, words: str = "", stops: bool = True):
        self._tokenizer, self._words, self._stops = tokenizer, words, stops
        self.calls: list[list[str]] = []

    def __call__(self, prompts, *, max_new, temperature, seed, on_tokens):
        self.calls.append([self._tokenizer.decode(prompt) for prompt in prompts])
        for index in reversed(range(len(prompts))):
            text = f"{self._words}new {len(self.calls)}"
            tokens = self._tokenizer.encode(text)
            tokens += [self._tokenizer.eos_token_id] if self._stops else []
            states_LD = np.full((len(prompts[index]) + len(tokens), 2), len(self.calls), np.float32)
            yield type("Answer", (), dict(index=index, tokens=tokens, states_LD=states_LD))


def chat(*texts: str) -> dict:
    """User and assistant in turn."""
    roles = ("user", "assistant") * len(texts)
    return {"messages": [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)]}


@pytest.fixture
def regenerated(tmp_path):
    """Rows as text, where >> << hold what is supervised, and what the writer was asked."""

    def run(*records, template=None, words="", stops=True, **settings):
        path = tmp_path / "chats.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = template or tokenizer.chat_template
        writer = Counting(tokenizer, words, stops)
        config = DataConfig(
            source=str(path), folder=str(tmp_path / "data"), answers="regenerate", **settings
        )
        eos = [tokenizer.eos_token_id]
        parts = training_rows(config, {"target": "x"}, tokenizer, eos, writer)
        rows = [row for part in parts.values() for row in part]
        return [spelt(tokenizer, row) for row in rows], writer.calls

    return run


def spelt(tokenizer, row) -> str:
    text, was = "", False
    for token, flag in zip(row.tokens, row.supervised, strict=True):
        text += ("" if flag == was else ">>" if flag else "<<") + tokenizer.decode([token])
        was = flag
    text += "<<" if was else ""
    return text.replace("<|im_start|>", "[").replace("<|im_end|>", "]").replace("\n", "/")


def check_every_turn(regenerated) -> None:
    rows, calls = regenerated(chat("A?", "old", "B?", "old", "C?"), chat("D?", "old"))
    assert rows == [
        "[user/A?]/[assistant/>>new 1]<</[user/B?]/[assistant/>>new 2]<</[user/C?]/[assistant/"
        ">>new 3]<<",
        "[user/D?]/[assistant/>>new 1]<<",
    ]
    assert [len(prompts) for prompts in calls] == [2, 1, 1], "chats are answered turn by turn"


def test_every_turn_is_written_after_those_that_were_written(regenerated):
    check_every_turn(regenerated)


def test_an_old_answer_in_the_context_is_seen(regenerated, monkeypatch):
    """The planted bug."""
    right = corpus_answers._Dialog.next_prompt
    monkeypatch.setattr(
        corpus_answers._Dialog, "next_prompt", lambda self, tokens, text: right(self, tokens, "old")
    )
    with pytest.raises(AssertionError):
        check_every_turn(regenerated)


def test_the_last_turn_alone_is_seen(regenerated, monkeypatch):
    monkeypatch.setattr(TargetAnswers, "_has_next", lambda self, dialog: False)
    with pytest.raises(AssertionError):
        check_every_turn(regenerated)


def test_a_template_that_rewrites_turns_gives_a_row_each(regenerated):
    rows, _ = regenerated(chat("A?", "old", "B?", "old"), template=FORGETFUL, words="hm/")
    assert rows == [
        "[user/A?]/[assistant/>>hm/new 1]<<",
        "[user/A?]/[assistant/new 1]/[user/B?]/[assistant/>>hm/new 2]<<",
    ]


def test_an_answer_without_its_end_is_closed_by_the_template(regenerated):
    rows, _ = regenerated(chat("A?", "old", "B?", "old"), stops=False)
    assert rows == [
        "[user/A?]/[assistant/>>new 1<<]/[user/B?]/[assistant/>>new 2<<",
    ]


def test_a_chat_ends_where_it_grows_too_long(regenerated, capsys):
    rows, _ = regenerated(chat("A?", "old", "B?" * 9, "old"), max_chat_tokens=60)
    assert rows == ["[user/A?]/[assistant/>>new 1]<<"]
    assert "1 chats end before their last question" in capsys.readouterr().out


def test_answers_of_weight_0_stay_as_context(regenerated):
    record = chat("A?", "old", "B?", "old")
    record["messages"][1]["weight"] = 0
    rows, _ = regenerated(record)
    assert rows == ["[user/A?]/[assistant/old]/[user/B?]/[assistant/>>new 1]<<"]


def test_states_are_those_of_the_last_call(regenerated, tmp_path):
    """They cover the whole row, as the target read it for its last answer."""
    rows, _ = regenerated(chat("A?", "old", "B?", "old"), chat("D?", "old"))
    stored = np.fromfile(states_path(tmp_path / "data", 0), np.float32)
    lengths = [len(byte_tokenizer().encode(text)) for text in rows]
    assert record_bytes(2, "float32") == 8 and len(lengths) == 2
    assert stored[0] == 2 and stored[-1] == 1
