"""Acceptance by tree: all trees are grown together, and a draft's folder keeps the figures."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from command_cases import COMMANDS, workplace  # noqa: F401 (fixtures)
from decode_cases import MARKOV, right_draft, target_of
from test_tuning import _accepted_by_drafting, _answers
from tuning_cases import shrink

from beagle_jax.commands.held_out import keep_acceptance
from beagle_jax.config import load_config
from beagle_jax.data.loader import BatchLoader
from beagle_jax.data.target_forward import states_in_memory
from beagle_jax.data.template import Row
from beagle_jax.decoding import acceptance
from beagle_jax.decoding.acceptance import save_acceptance, saved_acceptance
from beagle_jax.decoding.kinds import trained_drafter
from beagle_jax.decoding.round import TargetModel
from beagle_jax.decoding.tree import dynamic_tree
from beagle_jax.decoding.tuning import measured_acceptance
from beagle_jax.errors import UserError, run_main
from beagle_jax.json_file import read_json
from beagle_jax.training.frozen import FrozenTarget
from beagle_jax.weights.draft import DIGEST


@pytest.fixture
def few(monkeypatch) -> None:
    shrink(monkeypatch, nodes=(2, 4, 8), levels=range(1, 4), topks=(1, 2, 3), text=64)


@pytest.mark.parametrize(("levels", "topk", "nodes"), [(3, 2, 8), (2, 2, 5), (3, 1, 3)])
def test_trees_grown_together_are_those_grown_alone(few, levels, topk, nodes):
    target, draft = target_of(MARKOV), right_draft(0.15)
    [text] = _answers(target, 1)
    drafter, model = trained_drafter(draft, target.params), TargetModel(target.spec, target.params)
    forest = acceptance.Forest(3, (1, 2, 3))
    grown = acceptance._full_trees(drafter, (1, 2, 3), *acceptance._read(model, drafter, *text))
    assert grown.token_MW.shape == (27, forest.size)

    def accepted(topk: int) -> list[int]:
        order_MP = acceptance._order_of_right_path(*forest.only(grown, topk), levels)
        return (order_MP < nodes - 1).sum(axis=1).tolist()

    expected = _accepted_by_drafting(target, draft, dynamic_tree(levels, topk, nodes), text)
    assert accepted(topk) == expected
    assert accepted(3 if topk == 1 else 1) != expected  # planted bug: trees of another topk


def test_a_folder_keeps_the_figures_of_its_weights(few, tmp_path):
    target, draft = target_of(MARKOV), right_draft(0.15)
    made = measured_acceptance(target, draft, _answers(target), described="three answers")
    save_acceptance(tmp_path, made, draft.fingerprint)
    figures = saved_acceptance(tmp_path, draft.fingerprint)
    assert (figures.places, figures.texts, figures.tau.keys()) == (
        81,
        "three answers",
        made.tau.keys(),
    )
    assert list(figures.tau.values()) == pytest.approx(list(made.tau.values()), abs=1e-4)
    np.testing.assert_allclose(figures.rank_share, made.rank_share, atol=1e-4)  # of rounding
    assert saved_acceptance(tmp_path, right_draft(0.2).fingerprint) is None
    assert saved_acceptance(tmp_path / "none", draft.fingerprint) is None
    for text in ("{", "{}", '{"draft": 1, "trees": 2}'):
        (tmp_path / acceptance.FILE).write_text(text)
        with pytest.raises(UserError, match=r"acceptance.json: .*; delete it, and tune measures"):
            saved_acceptance(tmp_path, 1)


def held_out(target, texts) -> tuple[BatchLoader, FrozenTarget]:
    """Chats with their states, as training holds them out, and what it reads of the target."""
    rows = [
        Row(prompt + answer, [False] * len(prompt) + [True] * len(answer))
        for prompt, answer in texts
    ]
    states = [
        states_in_memory(
            target.params, target.spec, np.array([row.tokens]), np.array([[len(row.tokens)]])
        )[0]
        for row in rows
    ]
    loader = BatchLoader(rows, states, batch=len(rows), row_tokens=64, seed=0)
    head_VD = target.params.get("head_VD", target.params["embed_VD"])
    return loader, FrozenTarget(target.params["embed_VD"], head_VD)


def test_held_out_chats_give_the_same_figures_as_the_target(few, tmp_path, caplog):
    caplog.set_level("INFO")
    target, draft = target_of(MARKOV), right_draft(0.15)
    texts = _answers(target)
    loader, frozen = held_out(target, texts)
    keep_acceptance(tmp_path, draft, frozen, loader)
    figures = saved_acceptance(tmp_path, draft.fingerprint)
    made = measured_acceptance(target, draft, texts)
    assert list(figures.tau.values()) == pytest.approx(list(made.tau.values()), abs=1e-4)
    assert (figures.places, figures.texts) == (81, "3 held-out chats of the training data")
    # Planted bug: the states are those of the places before.
    loader._chats = [
        chat._replace(states_LD=np.roll(chat.states_LD, 1, axis=0)) for chat in loader._chats
    ]
    (tmp_path / acceptance.FILE).unlink()
    keep_acceptance(tmp_path, draft, frozen, loader)
    assert not (tmp_path / acceptance.FILE).exists()
    assert "the held-out answers are not those that the target writes greedily" in caplog.text


def test_answers_of_others_and_short_ones_are_not_kept(few, tmp_path, caplog):
    caplog.set_level("INFO")
    target, draft = target_of(MARKOV), right_draft(0.15)
    other = [
        (prompt, [(token + 1) % 50 for token in answer]) for prompt, answer in _answers(target)
    ]
    short = [(prompt, answer[:3]) for prompt, answer in _answers(target)]
    for texts, why in ((other, "not those that the target writes"), (short, "too short")):
        loader, frozen = held_out(target, texts)
        keep_acceptance(tmp_path, draft, frozen, loader)
        assert why in caplog.text and not (tmp_path / acceptance.FILE).exists()


@pytest.mark.slow  # a training run; its last step alone is above
def test_training_keeps_it_beside_the_draft(workplace, monkeypatch):
    shrink(monkeypatch, nodes=(2, 4), levels=range(1, 3), topks=(1, 2), text=64)
    folder = workplace.folder / "kept"
    options = [f"train.folder={folder}", "log.eval_rows=4"]
    assert run_main(COMMANDS["train"], ["--config", workplace.config, *options]) == 0
    config = load_config(workplace.config, options)
    assert config.log.eval_rows == 4
    assert '"4 held-out chats of the training data"' in (
        folder / "draft" / acceptance.FILE
    ).read_text(encoding="utf-8")


def test_the_shipped_draft_has_its_figures(at_the_root):
    folder = Path("drafts/smollm2-135m")
    figures = saved_acceptance(folder, read_json(folder / "config.json", "")[DIGEST])
    assert figures is not None and figures.tau[2, 3, 4] > 1.5


def test_the_largest_tree_of_a_shape_accepts_most(few):
    target, draft = target_of(MARKOV), right_draft(0.15)
    made = measured_acceptance(target, draft, _answers(target, 1))
    assert made.most(3, 2) == made.tau[3, 2, 8]
    assert dataclasses.replace(made, tau={(1, 1, 2): 1.5}).most(1, 1) == 1.5
