"""Tiny targets of the laboratory: text, training that goes on where it stopped, and the folder."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from experiment_cases import ROOT

from beagle_jax import load_target
from beagle_jax.errors import UserError
from beagle_jax.model.target import TargetSpec
from benchmarks.one_gpu.text_files import Text, save_text

sys.path.insert(0, str(ROOT))
from experiments import tiny_target
from experiments.tiny_text import BEGIN, END, byte_level, dialogues, packed

LAB = tiny_target.Lab(
    vocab_size=300,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    max_positions=64,
    row_tokens=16,
    batch=2,
    learning_rate=0.02,
    warmup=2,
    every=4,
    steps=12,
)
LOSS = jax.jit(tiny_target.loss_of, static_argnames="spec")
WORDS = ["the", "dog", "and", "a", "cat", "saw", "tree,", "then", "ran", "to"]


class Characters:
    """A tokenizer of the target that wrote the text: one token a character."""

    def decode(self, tokens, **_) -> str:
        return "".join(map(chr, tokens))


def written(folder, count: int = 40):
    """A part of text: a prompt with a system turn, and an answer."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(count):
        question, answer = (" ".join(rng.choice(WORDS, 9)) for _ in range(2))
        prompt = f"{BEGIN}system\nBe\nkind{END}\n{BEGIN}user\n{question}{END}\n{BEGIN}assistant\n"
        rows.append(Text([*map(ord, prompt)], [*map(ord, answer + END)], f"made/{number}"))
    save_text(folder / "part-greedy-000.npz", rows)
    return folder / "part-greedy-000.npz"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Tokenizer and rows of the small lab."""
    folder = tmp_path_factory.mktemp("tiny")
    lab = LAB.model_copy(update={"text": written(folder).name})
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(
            tiny_target, "load_target", lambda *_: SimpleNamespace(tokenizer=Characters())
        )
        return tiny_target.text_of(lab, folder)


def test_the_system_turn_is_left_out_and_prompts_are_held_out_whole(tmp_path):
    file = written(tmp_path, 400)
    made = list(dialogues([file, file], Characters()))
    assert all(f"user\n{turn.prompt}{END}\n{BEGIN}assistant" in turn.text for turn in made)
    assert all(turn.text.startswith(f"{BEGIN}user\n") and turn.text.endswith(END) for turn in made)
    assert [turn.held_out for turn in made[:400]] == [turn.held_out for turn in made[400:]]
    assert 3 <= sum(turn.held_out for turn in made[:400]) <= 30  # one in 32


def test_tokens_give_the_text_and_the_template_the_turns(text):
    tokenizer, rows = text
    words = f"{BEGIN}user\nÜber 🐶 the dog{END}\n"
    assert tokenizer.decode(tokenizer.encode(words, add_special_tokens=False)) == words
    chat = [{"role": "user", "content": "the dog"}]
    rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert rendered == f"{BEGIN}user\nthe dog{END}\n{BEGIN}assistant\n"
    assert len(tokenizer) == 300 and rows.training.shape[1] == 17
    np.testing.assert_array_equal(rows.training[:-1, -1], rows.training[1:, 0])


def test_held_out_prompts_are_written(text):
    file = Path(text[0].name_or_path).parent / "held_out.jsonl"
    prompts = [json.loads(line)["prompt"] for line in file.read_text().splitlines()]
    assert prompts and all(len(prompt.split()) == 9 for prompt in prompts)


def test_rows_are_the_whole_text(text):
    texts = ["the dog", "a tree and a cat, then"]
    tokenizer = byte_level(iter(texts), 280)
    ids = [token for piece in texts for token in tokenizer.encode(piece)]
    rows = packed(texts, tokenizer, 4)
    assert rows[:, :-1].ravel().tolist() == ids[: rows.size - len(rows)]


def test_it_learns_and_goes_on_where_it_stopped(text, tmp_path):
    _, rows = text
    whole = tiny_target.train(LAB, rows, tmp_path / "whole")
    first = float(LOSS(*start_of(), rows.held_out))
    assert float(whole.best) < first - 0.3
    (tmp_path / "cut").mkdir()
    tiny_target.train(LAB.model_copy(update={"steps": 8}), rows, tmp_path / "cut")
    resumed = tiny_target.train(LAB, rows, tmp_path / "cut")
    np.testing.assert_array_equal(resumed.params["embed_VD"], whole.params["embed_VD"])
    log = (tmp_path / "cut" / "log.jsonl").read_text().splitlines()
    assert [line.split(",")[0] for line in log] == [f'{{"step": {step}' for step in (4, 8, 12)]


def test_planted_bug_another_order_after_the_restart(text, tmp_path, monkeypatch):
    _, rows = text
    (tmp_path / "whole").mkdir()
    whole = tiny_target.train(LAB, rows, tmp_path / "whole")
    (tmp_path / "cut").mkdir()
    tiny_target.train(LAB.model_copy(update={"steps": 8}), rows, tmp_path / "cut")
    batches = tiny_target._batches
    monkeypatch.setattr(tiny_target, "_batches", lambda rows, lab, first: batches(rows, lab, 0))
    resumed = tiny_target.train(LAB, rows, tmp_path / "cut")
    assert not np.array_equal(resumed.params["embed_VD"], whole.params["embed_VD"])


def start_of():
    spec = TargetSpec.from_hf_config(LAB.hf_config, "test")
    return tiny_target.initial(spec, LAB.seed), spec


def test_the_rate_falls_where_the_loss_is_flat():
    lab = LAB.model_copy(update={"patience": 2, "steps": 1000, "cooling": 100, "warmup": 1})
    zero = jnp.int32(0)
    state = tiny_target.State({}, None, zero, jnp.float32(99), zero, jnp.int32(900))
    seen = []
    for place, loss in enumerate((3.0, 2.9, 2.899, 2.895, 2.5, 2.6), 1):
        state = tiny_target.looked(state._replace(step=jnp.int32(50 * place)), loss, lab)
        rate = float(tiny_target.rate_of(state, lab)) / lab.learning_rate
        seen.append((int(state.since), int(state.cools), round(rate, 3)))
    assert seen == [(0, 900, 1), (0, 900, 1), (1, 900, 1), (2, 200, 1), (0, 200, 0.5), (1, 200, 0)]


def test_the_rate_falls_before_the_steps_are_used_up():
    lab = LAB.model_copy(update={"steps": 10, "cooling": 4, "warmup": 2})
    state = tiny_target.State({}, None, *map(jnp.int32, (0, 9, 0, 6)))
    rates = [float(tiny_target.rate_of(state._replace(step=jnp.int32(n)), lab)) for n in range(10)]
    expected = [0.5, *[1] * 6, 0.75, 0.5, 0.25]
    np.testing.assert_allclose(rates, lab.learning_rate * np.array(expected), rtol=1e-6)


def test_the_folder_is_a_target(text, tmp_path):
    tokenizer, rows = text
    params, spec = start_of()
    state = tiny_target.State(params, None, *([jnp.int32(0)] * 4))
    written = tiny_target.export(LAB, state, tokenizer, tmp_path / "target")
    target = load_target(tmp_path / "target", "float32")
    assert target.spec == spec and target.eos_ids == (tokenizer.eos_token_id,)
    assert written == 2 * sum(x.size for x in jax.tree.leaves(params))
    expected, actual = (float(LOSS(of, spec, rows.held_out)) for of in (params, target.params))
    assert actual == pytest.approx(expected, rel=1e-3)  # bfloat16


def test_settings_are_checked(tmp_path):
    assert tiny_target.read_lab(ROOT / "experiments" / "tiny_target.yaml").num_layers == 6
    (tmp_path / "lab.yaml").write_text("batch: 0\n")
    with pytest.raises(UserError, match=r"lab.yaml: batch: Input should be greater than 0"):
        tiny_target.read_lab(tmp_path / "lab.yaml")
    (tmp_path / "run").mkdir()
    tiny_target._claim(tmp_path / "run", LAB)
    tiny_target._claim(tmp_path / "run", LAB)
    with pytest.raises(UserError, match=r"made with other settings \(batch\); use another"):
        tiny_target._claim(tmp_path / "run", LAB.model_copy(update={"batch": 3}))
