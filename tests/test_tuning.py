"""Tuning: full trees predict what smaller trees do, and `auto` finds the stored result."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decode_cases import MARKOV, random_draft, right_draft, target_of
from tuning_cases import shrink

from beagle_jax.commands import tune as tune_command
from beagle_jax.config import load_config, read_settings
from beagle_jax.decoding import acceptance, timing, tuning
from beagle_jax.decoding.build import decoder_of, drafter_of
from beagle_jax.decoding.draft import grow
from beagle_jax.decoding.drafter import Known
from beagle_jax.decoding.kinds import trained_drafter
from beagle_jax.decoding.round import TargetModel
from beagle_jax.decoding.tree import ROOT_ONLY, dynamic_tree
from beagle_jax.decoding.tuning import Choice, remember, tuned_path
from beagle_jax.errors import UserError
from beagle_jax.evaluation.plots import plot_tuning
from beagle_jax.weights.draft import save_draft
from beagle_jax.weights.quantiser import Cost


@pytest.fixture
def small(monkeypatch):
    """A grid that compiles fast. Every pass runs, and seems slower than the one before it."""
    shrink(monkeypatch, nodes=(4, 8), levels=range(1, 4), topks=(1, 3), text=64)
    times = itertools.count(1.0)

    def seems(work: timing.Passes) -> float:
        jax.block_until_ready(work.call())
        return next(times)

    monkeypatch.setattr(tuning, "milliseconds", seems)


GRID = tuning.Effort((4, 8), (1, 3), patience=3, guesses=False)


def _answers(target, count=3):
    return tuning.answers_for_tuning(target, [[5 + n, 7, 2] for n in range(count)], 30)


def _accepted_by_drafting(target, draft, tree, text) -> list[int]:
    """Counts accepted tokens at each position by growing this very tree there."""
    drafter, model = trained_drafter(draft, target.params), TargetModel(target.spec, target.params)
    prompt, answer = text
    tokens, counts = prompt + answer, []
    grown = jax.jit(lambda *where: grow(drafter, *where, tree).nodes)
    padded = np.zeros((1, 64), np.int32)
    padded[0, : len(tokens)] = tokens
    state, states_BLD = acceptance._read_text(model, drafter, padded)
    for root in range(len(prompt), len(tokens) - 3):
        at = jnp.array([root])
        known = Known(jnp.asarray(padded[0, root : root + 1]), at)
        nodes = jax.device_get(grown(drafter.at(state, states_BLD, at), known))
        above, count = 0, 0
        while True:
            fits = [
                node
                for node in range(1, tree.size)
                if nodes.parent_BW[0, node] == above
                and nodes.token_BW[0, node] == tokens[root + 1 + count]
            ]
            if not fits or count == tree.depth:
                break
            above, count = fits[0], count + 1
            if count == tree.depth:
                break
        counts.append(count)
    return counts


@pytest.mark.parametrize(("levels", "topk", "nodes"), [(3, 3, 8), (2, 3, 5), (1, 2, 3), (3, 2, 11)])
def test_smaller_trees_are_read_off_the_full_one(small, levels, topk, nodes):
    target, draft = target_of(MARKOV), right_draft(0.15)
    [text] = _answers(target, 1)
    drafter, model = trained_drafter(draft, target.params), TargetModel(target.spec, target.params)
    grown = acceptance._full_trees(drafter, (topk,), *acceptance._read(model, drafter, *text))

    def accepted(*grown):
        return (acceptance._order_of_right_path(*grown, levels) < nodes - 1).sum(axis=1).tolist()

    assert accepted(*grown) == (
        expected := _accepted_by_drafting(target, draft, dynamic_tree(levels, topk, nodes), text)
    )
    *tree, score_MW, follows_MP = grown
    if (levels, topk, nodes) == (3, 3, 8):
        assert accepted(*tree, -score_MW, follows_MP) != expected  # planted bug: the worst first


def test_a_right_draft_is_always_first(small):
    target = target_of(MARKOV)
    texts = _answers(target)
    # Their places have no future, or lie past what is looked at.
    short, long = (
        ([5], [7, 2]),
        (list(range(61)), [3] * 30),
    )
    measured = tuning.measured_acceptance(target, right_draft(), [short, *texts, long])
    np.testing.assert_allclose(measured.rank_share[:, 0], 1.0)
    assert measured.places == 3 * (30 - 3)
    tuned = tuning.tune(target, right_draft(), measured, effort=GRID)
    with pytest.raises(
        UserError,
        match=r"no answer to the sample prompts has more than 3 tokens among the first 64 of "
        r"prompt and answer; raise eval.max",
    ):
        tuning.measured_acceptance(target, right_draft(), [short, long])
    chain = [
        choice
        for choice in tuned.choices
        if (choice.levels, choice.topk, choice.nodes) == (3, 1, 4)
    ]
    assert chain[0].tau == 4.0
    assert tuned.choices == sorted(tuned.choices, key=lambda choice: -choice.tokens_per_second)
    free = dataclasses.replace(tuned, verify_ms={1: 1e6})
    assert free.best == tuned.choices[0]
    assert dataclasses.replace(tuned, verify_ms={1: 1e-6}).best is None


def test_a_wrong_draft_does_not_pay_and_the_table_says_so(small, tmp_path):
    target = target_of()
    measured = tuning.measured_acceptance(target, random_draft(), _answers(target))
    assert measured.rank_share[0].sum() < 0.5
    tuned = tuning.tune(target, random_draft(), measured, effort=GRID)
    slow = dataclasses.replace(
        tuned, verify_ms={1: 1.0, 8: 50.0}, choices=[Choice(1, 1, 2, 1.01, 20.0)]
    )
    assert slow.best is None
    assert (
        "no tree is faster than plain decoding: the best round takes 20.00 times as long as a "
        "plain step and writes 1.01 tokens" in tune_command.table(slow)
    )
    plot_tuning(tuned, tmp_path / "tuning.png")
    assert (tmp_path / "tuning.png").read_bytes().startswith(b"\x89PNG")


def test_auto_takes_the_remembered_tree(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    target, draft = target_of(), random_draft()
    (tmp_path / "c.yaml").write_text(
        f"target: {{source: test, cache_dir: {tmp_path}}}\ndecode: {{tree: auto}}\n"
    )
    config = load_config(tmp_path / "c.yaml")
    untuned = dynamic_tree(5, 4, 8)  # the default sizes
    assert decoder_of(config, target, draft).tree == untuned
    assert "no tree was tuned for this draft on this machine (cpu " in caplog.text
    assert "using the dynamic tree, 5 levels, topk 4, 8 nodes of the config" in caplog.text
    remember(tuned_path(str(tmp_path), target, draft), Choice(2, 3, 6, 1.5, 10.0))
    assert decoder_of(config, target, draft).tree == dynamic_tree(2, 3, 6)
    remember(tuned_path(str(tmp_path), target, draft), None)
    plain = decoder_of(config, target, draft)
    assert plain.tree == ROOT_ONLY and caplog.text.count("decoding plainly") == 1
    [answer] = plain.generate([[5, 6]], max_new_tokens=5)
    assert answer.rounds == 4 and answer.tau == 1
    int8, int4 = (
        dataclasses.replace(target, quantised=Cost(kind, 64, 1, 1, 0.0, 1.0))
        for kind in ("int8", "int4")
    )
    for others in ((target, random_draft(seed=2)), (int8, draft), (int4, draft)):
        assert decoder_of(config, *others).tree == untuned
    assert decoder_of(config, target, draft, rows=8).tree == untuned
    drawn = config.changed(decode=config.decode.changed(temperature=0.5))
    assert decoder_of(drawn, target, draft).tree == untuned
    assert tuned_path(str(tmp_path), int8, draft) != tuned_path(str(tmp_path), int4, draft)
    monkeypatch.setattr(tuning, "_processor", lambda: "another")
    caplog.clear()
    assert decoder_of(config, target, draft).tree == untuned
    assert "on this machine (cpu another" in caplog.text


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"levels": "2", "topk": 3, "nodes": 6}', '{"plain": 1}']
)
def test_a_damaged_memory_is_named(tmp_path, text):
    (tmp_path / "tuned.json").write_text(text)
    with pytest.raises(UserError, match=r"tuned.json: .*; run python -m beagle_jax.tune"):
        tuning.tuned_tree(tmp_path / "tuned.json")


@pytest.mark.parametrize(
    ("source", "warned"), [("hf:org/code", True), ("hf:org/chat", False), ("a/folder", False)]
)
def test_a_draft_of_another_public_target_is_named(tmp_path, caplog, source, warned):
    target, draft = dataclasses.replace(target_of(), source=source), random_draft()
    save_draft(tmp_path / "draft", dataclasses.replace(draft, provenance={"target": "hf:org/chat"}))
    (tmp_path / "c.yaml").write_text(
        f"target: {{source: '{source}'}}\ndraft: {{path: {tmp_path}/draft}}\n"
    )
    drafter_of(load_config(tmp_path / "c.yaml"), target)
    warning = (
        f"{tmp_path}/draft: this draft belongs to another target (hf:org/chat, and "
        "target.source is hf:org/code)"
    )
    assert (warning in caplog.text) == warned


def test_the_written_config_has_the_tree_and_what_the_command_line_set(tmp_path):
    (tmp_path / "c.yaml").write_text("target: {source: x}\ndecode: {max_new_tokens: 7, topk: 9}\n")
    settings = read_settings(tmp_path / "c.yaml", ["draft.path=mine", "eval.limit=2"])
    (tmp_path / "tuned.yaml").write_text(
        tune_command.with_tree(settings, Choice(2, 3, 6, 1.5, 10.0))
    )
    config = load_config(tmp_path / "tuned.yaml")
    assert config == load_config(
        tmp_path / "c.yaml",
        [
            "draft.path=mine",
            "eval.limit=2",
            "decode.tree=dynamic",
            "decode.levels=2",
            "decode.topk=3",
            "decode.nodes=6",
        ],
    )
    assert (config.decode.max_new_tokens, config.decode.levels, config.draft.path) == (7, 2, "mine")
