"""The training text, from prompts to answers and states, with a writer that needs no model."""

import json
from collections import Counter
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
from chat_cases import byte_tokenizer, spell

from beagle_jax.config import DataConfig
from beagle_jax.corpus import prompts, waves
from beagle_jax.corpus import text as corpus_text
from beagle_jax.corpus.text import training_rows
from beagle_jax.data import states
from beagle_jax.data.chats import Chat
from beagle_jax.data.states import target_states
from beagle_jax.data.template import Row, prompt_tokens
from beagle_jax.errors import UserError

OWN = ["What is 1?", "What is 2?", "What is 3?"]


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


class FakeWriter:
    """Answers a prompt with five tokens that depend on it, the last row first.

    For a header it makes up prompts.
    """

    def __init__(
        self,
        tokenizer,
        made_up=("Tell me more {n}", "Tell me more {n}", "too short", "Why so {n} now?"),
    ):
        self._tokenizer, self._made_up, self._eos = tokenizer, made_up, tokenizer.eos_token_id
        self.calls = []  # (prompts, settings) of every call
        self.fails_at = None  # the call that breaks off after one answer

    def __call__(self, prompts, *, max_new, temperature, seed, on_tokens):
        self.calls.append(
            (list(prompts), {"max_new": max_new, "temperature": temperature, "seed": seed})
        )
        makes_up = spell(self._tokenizer, prompts[0]).endswith("<user/")
        for index in reversed(range(len(prompts))):
            if makes_up:
                text = self._made_up[index % len(self._made_up)].format(n=seed)
                tokens = [
                    *self._tokenizer.encode(text),
                    *([self._eos] if "endless" not in text else []),
                ]
            else:
                tokens = [sum(prompts[index]) % 200, *[7] * 3, self._eos]
            on_tokens(len(tokens))
            yield SimpleNamespace(
                index=index, tokens=tokens, states_LD=fake_states(prompts[index] + tokens)
            )
            if len(self.calls) == self.fails_at:
                raise KeyboardInterrupt

    @property
    def answered(self) -> list[str]:
        """Returns every prompt that was answered, as text."""
        texts = [spell(self._tokenizer, prompt) for prompts, _ in self.calls for prompt in prompts]
        return [
            text.removeprefix("<user/").removesuffix(">/<assistant/")
            for text in texts
            if text != "<user/"
        ]


def makes_up(settings) -> bool:
    return settings["max_new"] == prompts._MADE_UP_TOKENS


def fake_states(tokens) -> np.ndarray:
    """Makes states [length, 2] that tell which token they belong to."""
    return np.stack([tokens, np.arange(len(tokens))], axis=1).astype(np.float32)


@pytest.fixture
def writer(tokenizer):
    return FakeWriter(tokenizer)


@pytest.fixture
def text(tmp_path, tokenizer, monkeypatch):
    """Writes (or reads back) the training text of a config in tmp_path."""
    own = [
        Chat(({"role": "user", "content": prompt},), f"prompts.jsonl:{line}")
        for line, prompt in enumerate(OWN, 1)
    ]
    monkeypatch.setattr(prompts, "own_prompts", lambda split: list(own) if split == "train" else [])

    def text(writer, target="a-target", **settings):
        config = DataConfig(
            **{"folder": str(tmp_path / "data"), "answer_tokens": 20, "max_answer_tokens": 10}
            | settings
        )
        parts = training_rows(
            config, {"target": target}, tokenizer, [tokenizer.eos_token_id], writer
        )
        return [row for part in parts.values() for row in part]

    return text


def source(tmp_path, *records) -> str:
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def row_for(tokenizer, question: str) -> Row:
    """Returns the row that the fake writer makes of a question."""
    prompt = prompt_tokens(tokenizer, [{"role": "user", "content": question}])
    answer = [sum(prompt) % 200, 7, 7, 7, tokenizer.eos_token_id]
    return Row(prompt + answer, [False] * len(prompt) + [True] * 5)


def by_text(rows) -> list:
    return sorted(map(tuple, ((tuple(row.tokens), tuple(row.supervised)) for row in rows)))


def same_rows(actual, expected) -> None:
    assert by_text(actual) == by_text(expected)


def test_own_prompts_come_first_then_made_up_ones(text, writer, tokenizer):
    rows = text(writer, answer_tokens=25)
    assert sorted(writer.answered[:3]) == OWN
    assert writer.answered[3:] == ["Tell me more 1", "Why so 1 now?"]
    same_rows(rows, [row_for(tokenizer, question) for question in writer.answered])


def test_made_up_prompts_are_whole_unique_and_three_words_long(text, tokenizer):
    writer = FakeWriter(
        tokenizer,
        (
            "Tell me more",
            "Tell me more",
            "too short",
            "an endless line of words",
            " One two three {n} ",
        ),
    )
    rows = text(writer, answer_tokens=40)
    # 15 tokens from OWN; one round gives two prompts, and later rounds only what they have not
    # given before.
    assert writer.answered[3:] == [
        "One two three 1",
        "Tell me more",
        "One two three 2",
        "One two three 3",
        "One two three 4",
    ]
    assert len(rows) == 8
    settings = [settings for _, settings in writer.calls if makes_up(settings)]
    assert [call["temperature"] for call in settings] == [1.0] * 4
    assert len({call["seed"] for call in settings}) == 4


def test_the_budget_stops_the_writing(text, writer, tmp_path):
    rows = text(writer, answer_tokens=15)
    assert sum(sum(row.supervised) for row in rows) == 15
    # As many as the budget has for answers at their limit of ten tokens, then as are of five.
    assert [len(prompts) for prompts, _ in writer.calls] == [2, 1]
    writer.calls.clear()
    rows = text(writer, answer_tokens=16, folder=str(tmp_path / "more"))
    # One more row, not the 2 made-up prompts that there were.
    assert sum(sum(row.supervised) for row in rows) == 20
    assert [len(prompts) for prompts, _ in writer.calls] == [2, 1, prompts._MADE_UP_AT_LEAST, 1]


@pytest.mark.parametrize(
    ("items", "rows"), [(1, 1), (127, 127), (128, 64), (834, 105), (8 * 1024, 1024), (1e6, 1024)]
)
def test_a_small_wave_is_divided_so_that_processes_have_work(items, rows):
    assert waves.part_rows(items) == rows


def test_as_many_prompts_are_made_up_as_the_budget_needs(text, tokenizer, monkeypatch):
    monkeypatch.setattr(prompts, "_MADE_UP_AT_LEAST", 2)
    writer = FakeWriter(tokenizer, [f"Tell me of {place} {{n}}" for place in range(40)])
    # 15 from OWN; answers of 10 tokens at most, so of 5 for what is known.
    text(writer, answer_tokens=100)
    assert [len(prompts) for prompts, _ in writer.calls] == [3, 17, 17]
    assert len(set(writer.answered)) == 20


def test_the_writer_is_told_the_settings(text, writer):
    text(writer, answer_tokens=30, max_answer_tokens=9, temperature=0.5, seed=11)
    given = [settings for _, settings in writer.calls if not makes_up(settings)]
    assert (
        given
        == [{"max_new": 9, "temperature": 0.5, "seed": 11 + part} for part in range(len(given))]
        and len(given) > 1
    )


def test_a_second_run_writes_nothing(text, writer):
    first, calls = text(writer), len(writer.calls)
    same_rows(text(writer, batch=3), first)
    assert len(writer.calls) == calls and len(first) >= 4


@pytest.fixture
def two_sources(tmp_path):
    """Returns settings with two sources: a file, and prompts that the target makes up itself.

    The file gives three parts of at most four prompts.
    """
    return [
        {
            "source": source(tmp_path, *({"prompt": f"Why {n}?"} for n in range(10))),
            "answer_tokens": 999,
        },
        {"source": "self", "answer_tokens": 33},
    ]


def interrupted_then_resumed(text, tokenizer, folder: str, fails_at: int, **settings) -> list[Row]:
    broken, fresh = FakeWriter(tokenizer), FakeWriter(tokenizer)
    broken.fails_at = fails_at
    with pytest.raises(KeyboardInterrupt):
        text(broken, folder=folder, **settings)
    rows = text(fresh, folder=folder, **settings)
    assert (
        fresh.calls
        and Counter(fresh.answered).keys() & Counter(broken.answered[:3]).keys() == set()
    )
    return rows


@pytest.mark.parametrize("which", [0, 1])
def test_an_interrupted_run_goes_on_after_its_last_part(
    text, writer, tokenizer, two_sources, tmp_path, monkeypatch, which
):
    monkeypatch.setattr(waves, "PART_ROWS", 4)
    settings = two_sources[which]
    expected = text(writer, **settings)
    # The second part: of our own source the second call makes up prompts.
    fails_at = 2 if which == 0 else 3
    rows = interrupted_then_resumed(text, tokenizer, str(tmp_path / "broken"), fails_at, **settings)
    same_rows(rows, expected)
    assert not list(tmp_path.glob("*/*.partial"))


def test_a_resumed_run_that_starts_over_is_seen(
    text, writer, tokenizer, two_sources, tmp_path, monkeypatch
):
    monkeypatch.setattr(waves, "PART_ROWS", 4)
    expected = text(writer, **two_sources[0])

    def from_the_start(items, wave, is_own):
        own = waves.follow(items, wave, is_own)
        return dict.fromkeys(own, own[0])

    monkeypatch.setattr(corpus_text, "follow", from_the_start)
    with pytest.raises(AssertionError):
        same_rows(
            interrupted_then_resumed(
                text, tokenizer, str(tmp_path / "broken"), 2, **two_sources[0]
            ),
            expected,
        )


@pytest.mark.parametrize("which", [0, 1])
def test_a_larger_budget_adds_to_what_is_there(text, tokenizer, two_sources, which):
    settings, first, second = two_sources[which], FakeWriter(tokenizer), FakeWriter(tokenizer)
    few = text(first, **settings | {"answer_tokens": 12})
    rows = text(second, **settings)
    assert rows[: len(few)] == few and len(rows) > len(few)
    assert len({tuple(row.tokens) for row in rows}) == len(rows)  # no prompt twice
    assert sum(sum(row.supervised) for row in rows) == (50 if which == 0 else 35)


def test_a_smaller_budget_takes_the_first_of_what_is_there(text, writer, two_sources, monkeypatch):
    monkeypatch.setattr(waves, "PART_ROWS", 4)  # of five answer tokens each: parts of 20
    rows = text(writer, **two_sources[0])
    for budget, count in ((1, 4), (20, 4), (21, 8), (999, 10)):
        assert text(writer, **two_sources[0] | {"answer_tokens": budget}) == rows[:count]


def test_a_folder_with_other_settings_is_refused(text, writer, tmp_path):
    text(writer)
    for changed, named in (
        ({"temperature": 0.5}, "temperature 0.0 there, 0.5 now"),
        ({"seed": 4}, "seed 0 there, 4 now"),
        ({"target": "b"}, "target 'a-target' there, 'b' now"),
    ):
        message = (
            f"data holds text written with other settings .{named}.; delete it or set another "
            "data.folder"
        )
        with pytest.raises(UserError, match=message):
            text(writer, **changed)


def test_long_prompts_are_left_out_and_counted(text, writer, tmp_path, capsys):
    path = source(tmp_path, {"prompt": "Why?"}, {"prompt": "Why " * 20}, {"prompt": "How?"})
    rows = text(writer, source=path, max_prompt_tokens=40)
    assert sorted(writer.answered) == ["How?", "Why?"] and len(rows) == 2
    assert "left out 1 of 3 prompts longer than 40 tokens" in capsys.readouterr().out


def test_prompts_that_are_all_too_long_are_an_error(text, writer, tmp_path):
    with pytest.raises(
        UserError, match=r"data.max_prompt_tokens is 5, but every prompt is longer; raise it"
    ):
        text(writer, source=source(tmp_path, {"prompt": "Why?"}), max_prompt_tokens=5)


@pytest.mark.parametrize("budgets", [(6, 17, 29, 46), (46,)])
def test_no_prompt_comes_twice_however_often_the_writing_goes_on(
    text, tokenizer, tmp_path, monkeypatch, budgets
):
    """Answers shorter than expected leave prompts of a group over.

    These come next, in the same run and after a resume.
    """
    monkeypatch.setattr(waves, "PART_ROWS", 4)
    path = source(tmp_path, *({"prompt": f"Why {n}?"} for n in range(12)))
    for settings in (
        {"source": path, "max_answer_tokens": 40},
        {"source": "self", "max_answer_tokens": 40},
    ):
        folder = str(tmp_path / f"data of {settings['source'][-5:]}")
        for budget in budgets:
            rows = text(FakeWriter(tokenizer), answer_tokens=budget, folder=folder, **settings)
        assert len({tuple(row.tokens) for row in rows}) == len(rows) == 10
    questions = [
        spell(tokenizer, row.tokens)
        for row in text(
            None,
            answer_tokens=46,
            folder=str(tmp_path / "data of jsonl"),
            source=path,
            max_answer_tokens=40,
        )
    ]
    assert sorted(question[:12] for question in questions) == [f"<user/Why {n}?" for n in range(10)]


def test_skipping_the_rest_of_a_cut_group_is_seen(text, tokenizer, tmp_path, monkeypatch):
    right = waves._group
    monkeypatch.setattr(waves, "PART_ROWS", 4)

    def forgets(items, missing, length, most):
        group, expected = right(items, missing, length, most)
        list(islice(items, 4 - len(group)))
        return group, expected

    monkeypatch.setattr(waves, "_group", forgets)
    with pytest.raises(AssertionError):
        test_no_prompt_comes_twice_however_often_the_writing_goes_on(
            text, tokenizer, tmp_path, monkeypatch, (6, 17, 29, 46)
        )


def test_a_target_that_makes_up_nothing_usable_is_an_error(text, tokenizer):
    with pytest.raises(UserError, match=r"data.source: self: the target wrote no usable prompt"):
        text(FakeWriter(tokenizer, ("short",)))


def test_answers_of_the_file_are_used_as_they_are(text, writer, tokenizer, tmp_path):
    answered = {
        "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    }
    path = source(tmp_path, answered, {"prompt": "Why?"}, answered)
    rows = text(writer, source=path)
    assert writer.answered == ["Why?"]
    given = [row for row in rows if spell(tokenizer, row.tokens) == "<user/Hi>/<assistant/Yo>/"]
    assert len(given) == 2 and [sum(row.supervised) for row in given] == [3, 3]
    same_rows(rows, [*given, row_for(tokenizer, "Why?")])
    assert by_text(text(writer, source=path)) == by_text(rows) and len(writer.calls) == 1


def test_a_file_of_answers_needs_no_writer(text, tmp_path):
    answered = {
        "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    }
    assert len(text(None, source=source(tmp_path, answered))) == 1


def test_states_that_came_with_the_answers_are_used(
    text, writer, tmp_path, tiny_params, monkeypatch
):
    rows = text(writer, answer_tokens=15)[:2]  # those of the first part
    monkeypatch.setattr(states, "_compute", lambda *_: pytest.fail("computed again"))
    spec = SimpleNamespace(hidden_size=2)
    states_of_rows = target_states(
        tiny_params, spec, rows, corpus_text.states_path(tmp_path / "data", 0)
    )
    for row, states_LD in zip(rows, states_of_rows, strict=True):
        np.testing.assert_array_equal(states_LD, fake_states(row.tokens))


def test_kept_states_in_another_order_are_seen(text, writer, tmp_path, tiny_params, monkeypatch):
    rows = text(writer, answer_tokens=15)[:2]
    monkeypatch.setattr(states, "_compute", lambda *_: pytest.fail("computed again"))
    with pytest.raises(pytest.fail.Exception, match="computed again"):
        target_states(
            tiny_params,
            SimpleNamespace(hidden_size=2),
            rows[::-1],
            corpus_text.states_path(tmp_path / "data", 0),
        )
