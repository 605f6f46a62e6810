"""A reduced draft vocabulary: counted on training rows, measured over all tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ONE_DEVICE, TINY
from step_cases import CLEAN, EARLY, SPEC, L

from beagle_jax.commands import train as train_command
from beagle_jax.commands.train import draft_vocabulary, frozen_parts
from beagle_jax.config import load_config
from beagle_jax.data.hot_tokens import coverage, hot_tokens
from beagle_jax.data.loader import BatchLoader
from beagle_jax.data.template import Row
from beagle_jax.model.target import head
from beagle_jax.sharding import place, place_rows
from beagle_jax.training import step
from beagle_jax.training.frozen import FrozenTarget, Vocabulary
from beagle_jax.training.step import make_steps

HOT = np.arange(20, 50)


def answer(*tokens: int) -> Row:
    return Row([1, *tokens], [False, *[True] * len(tokens)])


@pytest.fixture
def config(tmp_path):
    (tmp_path / "run.yaml").write_text(
        "target: {source: x}\ndraft: {hot_tokens: 2}\nlog: {eval_rows: 8}\ntrain: {batch: 2}\n"
    )
    return load_config(tmp_path / "run.yaml")


# The held-out rows have another token, and more often.
ROWS = [answer(5, 5, 6, 6), *[answer(9, 9, 9, 6)] * 8]


def check_counted_on_training_rows(config, capsys) -> None:
    assert draft_vocabulary(config, ROWS, 61).tolist() == [5, 6]
    output = capsys.readouterr().out
    assert "2 tokens, 100.0% of the answers trained on, 25.0% of the held-out ones" in output


def test_tokens_are_counted_on_training_rows(config, capsys):
    check_counted_on_training_rows(config, capsys)


def test_tokens_counted_on_all_rows_are_seen(config, capsys, monkeypatch):
    """The planted bug: coverage 0.973 was said where 0.926 was true."""
    monkeypatch.setattr(train_command, "hot_tokens", lambda rows, *more: hot_tokens(ROWS, *more))
    with pytest.raises(AssertionError):
        check_counted_on_training_rows(config, capsys)


# Held-out figures


def some_rows() -> list[Row]:
    rng = np.random.default_rng(2)
    lengths = (14, 9, 6, 11)
    tokens = [rng.integers(0, TINY.vocab_size, n).tolist() for n in lengths]
    return [Row(row, [place >= 3 for place in range(len(row))]) for row in tokens]


def measured(params, tiny_params, scored: np.ndarray | None, over_all: bool):
    """Held-out metrics of a draft that scores some tokens."""
    loader = BatchLoader(some_rows(), None, batch=4, row_tokens=L, seed=0)
    embed_VD = tiny_params["embed_VD"]
    whole = Vocabulary(embed_VD, jnp.zeros(TINY.vocab_size, bool).at[scored].set(True))
    frozen = FrozenTarget(
        embed_VD,
        embed_VD if scored is None else embed_VD[scored],
        tiny_params,
        TINY,
        whole if over_all else None,
    )
    _, eval_step, _ = make_steps(SPEC, CLEAN, EARLY, ONE_DEVICE)
    batch = place_rows(loader.batch_at(0), ONE_DEVICE)
    return jax.device_get(eval_step(params, place(frozen, ONE_DEVICE), batch))


def check_all_tokens(tiny_draft, tiny_params) -> None:
    every = measured(tiny_draft, tiny_params, None, False)
    over_all = measured(tiny_draft, tiny_params, HOT, True)
    np.testing.assert_allclose(over_all.ploss, every.ploss, rtol=1e-5)
    np.testing.assert_allclose(over_all.objective, every.objective, rtol=1e-5)
    # Where the target's choice is scored, fewer tokens can stand before it; elsewhere it is missed.
    some = measured(tiny_draft, tiny_params, HOT, False)
    assert over_all.agree_JK.sum() < some.agree_JK.sum()
    assert over_all.count_J.tolist() == every.count_J.tolist()


def test_held_out_figures_are_over_all_tokens(tiny_draft, tiny_params):
    check_all_tokens(tiny_draft, tiny_params)


def test_figures_over_scored_tokens_are_seen(tiny_draft, tiny_params, monkeypatch):
    """The planted bug: as version 0.1.0 measured."""
    monkeypatch.setattr(step, "over_vocabulary", lambda terms, *_: terms)
    with pytest.raises(AssertionError):
        check_all_tokens(tiny_draft, tiny_params)


def test_a_draft_that_scores_all_tokens_has_the_same_figures(tiny_draft, tiny_params):
    """With all tokens scored nothing changes."""
    every = measured(tiny_draft, tiny_params, None, False)
    all_scored = measured(tiny_draft, tiny_params, np.arange(TINY.vocab_size), True)
    assert all_scored.agree_JK.tolist() == every.agree_JK.tolist()


def test_the_whole_head_is_kept_for_held_out_rows_only(tiny_params):
    target = type("Target", (), dict(params=tiny_params, spec=TINY))
    assert frozen_parts(target, HOT, False).vocabulary is None
    assert frozen_parts(target, None, False, whole=True).vocabulary is None
    vocabulary = frozen_parts(target, HOT, False, whole=True).vocabulary
    assert vocabulary.head_VD is head(tiny_params)
    assert np.flatnonzero(vocabulary.scored_V).tolist() == HOT.tolist()
    assert coverage([answer(20, 3)], HOT) == 0.5
