"""Plots: masks against the worked example, trees and attention against decoding itself."""

import json
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decode_cases import MARKOV, random_draft, right_draft, target_of
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from test_masks import EXAMPLE

from beagle_jax.decoding.decoder import SpeculativeDecoder
from beagle_jax.decoding.tree import dynamic_tree
from beagle_jax.evaluation import inside
from beagle_jax.evaluation.inside import Played, attention, rounds
from beagle_jax.evaluation.plots import (
    _heights,
    mask_levels,
    plot_acceptance,
    plot_attention,
    plot_masks,
    plot_phases,
    plot_training,
    plot_tree,
)
from beagle_jax.model.beagle import BeagleBlock
from beagle_jax.model.masks import causal_mask
from beagle_jax.model.target import forward

TREE = dynamic_tree(3, 3, 8)


def is_picture(path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_masks_are_the_worked_example(steps, tmp_path):
    levels = mask_levels(8, 3, steps, 2)
    for query, (true, predicted) in EXAMPLE.items():
        assert np.flatnonzero(levels[query] == 1).tolist() == true
        trained = query < 2 or (query - 2) % 3 < steps
        assert np.flatnonzero(levels[query] == 2).tolist() == (
            predicted[steps - 1] if trained else []
        )
    assert not np.array_equal(levels, mask_levels(8, 3, steps, 1)) and not np.array_equal(
        levels, mask_levels(8, 2, min(steps, 2), 2)
    )
    plot_masks(3, 3, steps, tmp_path / "m.png")
    assert is_picture(tmp_path / "m.png")


def check_rounds(decoder) -> list[Played]:
    [answer] = decoder.generate([[5, 7]], max_new_tokens=30)
    played = rounds(decoder, [5, 7], most=99, max_new_tokens=30)
    assert [token for round_ in played for token in round_.written] == answer.tokens[1:] and len(
        played
    ) == answer.rounds
    # A round cut short by the limit may have accepted all that it wrote.
    assert (
        np.bincount([len(round_.path) - 1 for round_ in played], minlength=4).tolist()
        == answer.accepted
    )
    return played


def test_planted_bug_the_tree_of_another_round(monkeypatch):
    decoder, proposals, right = (
        SpeculativeDecoder(target_of(MARKOV), right_draft(0.15), TREE),
        [],
        inside._propose,
    )
    monkeypatch.setattr(
        inside,
        "_propose",
        lambda *a: proposals.append(right(*a)) or proposals[max(0, len(proposals) - 2)],
    )
    with pytest.raises(AssertionError):
        check_rounds(decoder)


def test_rounds_are_those_of_the_answer(tmp_path):
    decoder = SpeculativeDecoder(target_of(MARKOV), right_draft(0.15), TREE)
    played = check_rounds(decoder)
    assert len(rounds(decoder, [5, 7], most=2, max_new_tokens=30)) == 2
    longest = max(played, key=lambda round_: len(round_.path))
    for above, node, token in zip(longest.path, longest.path[1:], longest.written, strict=False):
        assert longest.parent_W[node] == above and longest.token_W[node] == token
    plot_tree(longest, tmp_path / "t.png", lambda token: f"$x{token}_")
    assert is_picture(tmp_path / "t.png")


def test_a_tree_is_drawn_without_crossings():
    drawn = Played(
        np.arange(6), np.array([0, 0, 0, 2, 1, 1]), np.array([0, 1, 1, 2, 2, 2]), [], [0]
    )
    assert _heights(drawn).tolist() == [1.25, 0.5, 2.0, 2.0, 0.0, 1.0]


@pytest.mark.parametrize("bug", ["another place", "itself seen"])
def test_planted_bugs_in_attention(tmp_path, monkeypatch, bug):
    right = inside._weights
    wrong = {
        "another place": lambda w_TS: jnp.roll(w_TS, 1, axis=0),
        "itself seen": lambda w_TS: jnp.roll(w_TS, 1, axis=1),
    }[bug]
    monkeypatch.setattr(inside, "_weights", lambda *a: wrong(right(*a)))
    with pytest.raises(AssertionError):
        test_attention_is_that_of_the_block(tmp_path)


def test_attention_is_that_of_the_block(tmp_path):
    target, draft, prompt = target_of(), random_draft(), [5, 7, 9]
    weights_TS, tokens = attention(
        SpeculativeDecoder(target, draft, TREE), prompt, max_new_tokens=12
    )
    np.testing.assert_allclose(weights_TS.sum(axis=1), 1.0, rtol=1e-5)
    assert weights_TS.shape == (len(tokens) - 3, len(tokens) - 1)
    # By hand: the true states of the text, and one head after another.
    text_1L = jnp.array([tokens])
    places_1L = jnp.arange(len(tokens))[None]
    mask = causal_mask(jnp.array([len(tokens)]), len(tokens))
    states = jax.jit(
        lambda params: forward(params, target.spec, text_1L, places_1L, mask).states_BTD
    )(target.params)
    block = BeagleBlock(draft.spec).bind({"params": draft.params})
    q_KGLH = np.asarray(block.queries(target.params["embed_VD"][text_1L], places_1L))[0]
    k_KHL = np.asarray(block.keys_values(states, places_1L).k_BKHS)[0]
    for row, place in enumerate(range(3, len(tokens))):
        heads = [
            np.exp(q_KGLH[k, g, place] @ k_KHL[k, :, :place] / np.sqrt(8))
            for k in range(2)
            for g in range(2)
        ]
        np.testing.assert_allclose(
            weights_TS[row, :place],
            np.mean([head / head.sum() for head in heads], axis=0),
            atol=1e-5,
        )
        assert not weights_TS[row, place:].any()
    plot_attention(weights_TS, tmp_path / "a.png", first=3)
    assert is_picture(tmp_path / "a.png")


def test_plain_decoding_has_no_draft_to_look_at():
    assert attention(SpeculativeDecoder(target_of()), [5], max_new_tokens=4) is None


def test_training_curves(tmp_path):
    lines = [
        {"stage": stage, "step": step, "loss": 1 / step, "top1_by_offset": [0.5, 0.4], **split}
        for stage in ("early", "late")
        for split in ({}, {"split": "held_out"})
        for step in (1, 2, 3)
    ]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert plot_training(tmp_path / "log.jsonl", tmp_path / "c.png") and is_picture(
        tmp_path / "c.png"
    )


def test_steps_that_were_logged_again_are_drawn_once(tmp_path, monkeypatch):
    """A run that was killed after step 3 and resumed from a checkpoint after step 1."""
    lines = [
        {"stage": "early", "step": step, "loss": loss, "top1_by_offset": [0.5]}
        for step, loss in ((1, 9), (2, 8), (3, 7), (2, 8.5), (3, 7.5), (4, 6))
    ]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    drawn, right = [], Axes.plot
    monkeypatch.setattr(
        Axes, "plot", lambda self, x, y, *a, **o: drawn.append((x, y)) or right(self, x, y, *a, **o)
    )
    assert plot_training(tmp_path / "log.jsonl", tmp_path / "c.png")
    assert drawn[0] == ([1, 2, 3, 4], [9, 8.5, 7.5, 6])


def test_a_picture_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    path = tmp_path / "m.png"
    plot_masks(3, 3, 2, path)
    before = path.read_bytes()

    def cut_off(self, where, **options):
        Path(where).write_bytes(before[:99])
        raise OSError("no space left")

    monkeypatch.setattr(Figure, "savefig", cut_off)
    with pytest.raises(OSError, match="no space"):
        plot_masks(4, 4, 2, path)
    assert path.read_bytes() == before and [entry.name for entry in tmp_path.iterdir()] == ["m.png"]


@pytest.mark.parametrize("logged", ['{"stage": "data"}\n', "", '{"stage": "early", "st'])
def test_a_log_without_a_loss_or_with_a_cut_line_is_no_picture(tmp_path, logged):
    (tmp_path / "log.jsonl").write_text(logged)
    assert (
        plot_training(tmp_path / "log.jsonl", tmp_path / "c.png") is False
        and not (tmp_path / "c.png").exists()
    )


def drawn_with_long_names(folder) -> None:
    name = "/one/folder/of/many" * 6 + "/draft"
    group = SimpleNamespace(systems={name: SimpleNamespace(step_alpha=[0.5, 0.4], tau=1.5)})
    milliseconds = SimpleNamespace(draft=1.0, verify=2.0, rest=0.5)
    report = SimpleNamespace(
        suites=[SimpleNamespace(name=name, whole=group)],
        systems=[SimpleNamespace(name=name, milliseconds=milliseconds)],
    )
    plot_acceptance(report, folder / "a.png")
    plot_phases(report, folder / "p.png")


@pytest.mark.filterwarnings("error")
def test_long_names_leave_room_for_what_is_drawn(tmp_path):
    drawn_with_long_names(tmp_path)
    assert is_picture(tmp_path / "a.png") and is_picture(tmp_path / "p.png")


def test_names_that_take_all_room_are_seen(tmp_path, monkeypatch):
    monkeypatch.setattr("beagle_jax.evaluation.plots._NAME", 999)
    with pytest.warns(UserWarning, match="constrained_layout not applied"):
        drawn_with_long_names(tmp_path)
