"""EAGLE-3 drafts are replayed, audited, tuned, measured and compared as the others are."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import test_tuning
import yaml
from command_cases import make_target
from decode_cases import MARKOV, target_of
from eagle3_cases import random_eagle3, right_eagle3
from test_audit import ACCEPTANCE, DRAWN, TREES, audited, failed, no_draws
from test_eagle3_import import CONFIG, LIST, published, write
from test_eagle_evaluation import RAGGED
from test_tuning import small  # noqa: F401  # a fixture
from tuning_cases import shrink

from beagle_jax import convert, evaluate, generate, tune
from beagle_jax.decoding import acceptance
from beagle_jax.decoding.decoder import SpeculativeDecoder
from beagle_jax.decoding.kinds import trained_drafter
from beagle_jax.decoding.round import Round, TargetModel
from beagle_jax.decoding.sampling import GREEDY
from beagle_jax.decoding.tree import chain, dynamic_tree
from beagle_jax.errors import run_main
from beagle_jax.evaluation import audit as audit_module
from beagle_jax.evaluation.cost import memory
from beagle_jax.evaluation.forced import forced_reads
from beagle_jax.evaluation.inside import attention
from beagle_jax.evaluation.replay import replayed


def check_replayed(draft, target, tree, append_predicted, bug: int = 0) -> list[int]:
    prompt = [5, 7]
    decoder = SpeculativeDecoder(target, draft, tree, append_predicted=append_predicted)
    [answer] = decoder.generate([prompt], max_new_tokens=60)
    reads_LX = forced_reads(target, [*prompt, *answer.tokens], draft.taps)
    reads_LX = np.roll(reads_LX, bug, axis=0)
    arguments = (target, draft, tree, prompt, answer.tokens, reads_LX, append_predicted)
    accepted = np.bincount(replayed(*arguments), minlength=tree.depth + 1).tolist()
    assert accepted == answer.accepted
    return accepted


@pytest.mark.parametrize(
    ("tree", "append_predicted"), [(RAGGED, True), (dynamic_tree(3, 3, 7), True), (RAGGED, False)]
)
def test_replayed_rounds_are_those_that_were_run(tree, append_predicted):
    accepted = check_replayed(right_eagle3(0.1), target_of(MARKOV), tree, append_predicted)
    assert accepted[0] and sum(accepted[1:]) > 2, "right and wrong rounds must both be there"


def test_planted_bug_streams_of_the_token_before():
    with pytest.raises(AssertionError):
        check_replayed(right_eagle3(0.3), target_of(MARKOV), RAGGED, True, bug=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["speculators", "narrow"])
def test_published_forms_are_replayed(name):
    """A norm over the output, features of another width, an embedding of its own."""
    check_replayed(random_eagle3(name), target_of(), dynamic_tree(3, 4, 10), True)


def test_the_audit_passes(monkeypatch):
    monkeypatch.setattr(audit_module, "_draws", no_draws)
    made = audited(target_of(MARKOV), {"dynamic": right_eagle3(0.05)}, TREES)
    assert made["passed"] and failed(made) == set()


def test_the_audit_finds_a_stale_feature():
    def stale(now, state):
        draft = state.draft._replace(last_B1D=-3 * state.draft.last_B1D)
        return Round.propose(now, state._replace(draft=draft))

    made = audited(
        target_of(MARKOV),
        {"chain": right_eagle3(0.3)},
        TREES,
        DRAWN,
        48,
        parts={"propose": stale},
    )
    assert failed(made) == {ACCEPTANCE}


def test_smaller_trees_are_read_off_the_full_one(small):
    target, draft = target_of(MARKOV), right_eagle3(0.05)
    [text] = test_tuning._answers(target, 1)
    drafter, model = trained_drafter(draft, target.params), TargetModel(target.spec, target.params)
    grown = acceptance._full_trees(drafter, (3,), *acceptance._read(model, drafter, *text))
    order = acceptance._order_of_right_path(*grown, 3)
    accepted = (order < 7).sum(axis=1).tolist()
    assert accepted == test_tuning._accepted_by_drafting(
        target, draft, dynamic_tree(3, 3, 8), text
    ) and 0 < sum(accepted) < 3 * len(accepted)


def test_its_weights_are_counted_once():
    draft = random_eagle3()
    sizes = memory(SpeculativeDecoder(target_of(), draft, chain(2)), [5, 7], GREEDY, 8)
    own = [*draft.params.values(), draft.hot_ids]
    assert sizes["draft_weights"] == sum(array.nbytes for array in own)


def test_its_attention_sums_to_one():
    decoder = SpeculativeDecoder(target_of(), random_eagle3(), chain(2))
    weights_TS, tokens = attention(decoder, [5, 7, 9], max_new_tokens=8)
    assert weights_TS.shape == (len(tokens) - 3, len(tokens) - 1)
    np.testing.assert_allclose(weights_TS.sum(axis=1), 1, atol=1e-5)


# Commands


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> SimpleNamespace:
    """A target, and a draft for it that was imported from SafeAILab's format."""
    folder = tmp_path_factory.mktemp("eagle3")
    make_target(folder / "target")
    (folder / "eval.jsonl").write_text('{"prompt": "What is 2?"}\n{"prompt": "Name a colour."}\n')
    settings = {
        "target": {"source": str(folder / "target"), "cache_dir": str(folder / "cache")},
        "draft": {"path": str(folder / "draft")},
        "decode": {"levels": 2, "max_new_tokens": 12},
        "eval": {"suites": [str(folder / "eval.jsonl")], "max_new_tokens": 12},
    }
    config = folder / "run.yaml"
    config.write_text(yaml.safe_dump(settings))
    tensors = published("SafeAILab")
    tensors.pop("t2d")
    source = write(folder / "there", tensors, CONFIG | {"vocab_size": 300, LIST: [0, 1, 2]})
    arguments = ["--config", str(config), "--source", str(source), "--out", str(folder / "draft")]
    assert run_main(convert.main, ["import-eagle", *arguments]) == 0
    return SimpleNamespace(folder=folder, config=str(config))


def test_an_imported_draft_generates_what_plain_decoding_does(place, capsys):
    assert run_main(generate.main, ["--config", place.config, "What is 3?", "--json", "-"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["equal"] and report["tokens"] == 12


def test_evaluation_reports_audits_and_compares_it(place):
    out = place.folder / "report"
    arguments = ["--config", place.config, "eval.compare=[lookup]", "--audit", "--out", str(out)]
    assert run_main(evaluate.main, arguments) == 0
    made = json.loads((out / "report.json").read_text())
    names = [system["name"] for system in made["systems"]]
    assert made["audit"]["passed"] and names == ["plain", str(place.folder / "draft"), "lookup"]


@pytest.mark.slow
def test_tuning_takes_it(place, small, monkeypatch, capsys):
    shrink(monkeypatch, nodes=(4, 8), levels=range(1, 3), topks=(2,), text=64)
    assert run_main(tune.main, ["--config", place.config, "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["choices"]
