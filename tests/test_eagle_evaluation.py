"""EAGLE drafts are audited, tuned and measured like Beagle's, and the commands take them."""

import gzip
import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import test_tuning
import yaml
from command_cases import make_target
from decode_cases import MARKOV, random_eagle, right_eagle, target_of
from test_audit import ACCEPTANCE, DRAWN, TREES, audited, failed, no_draws
from test_eagle_import import CONFIG, published, write
from test_report import check_schema
from test_suites import RECORDS
from test_tuning import small  # noqa: F401  # a fixture
from tuning_cases import shrink

from beagle_jax import convert, evaluate, generate, tune
from beagle_jax.commands.evaluate import evaluate as evaluated
from beagle_jax.config import load_config
from beagle_jax.decoding import acceptance
from beagle_jax.decoding.decoder import SpeculativeDecoder
from beagle_jax.decoding.kinds import trained_drafter
from beagle_jax.decoding.round import Round, TargetModel
from beagle_jax.decoding.sampling import GREEDY
from beagle_jax.decoding.tree import chain, dynamic_tree, static_tree
from beagle_jax.errors import UserError, run_main
from beagle_jax.evaluation import audit as audit_module
from beagle_jax.evaluation.cost import memory, phases
from beagle_jax.evaluation.forced import forced_states
from beagle_jax.evaluation.replay import replayed
from beagle_jax.evaluation.suites import SUITES
from beagle_jax.model.beagle import BeagleSpec, init_draft
from beagle_jax.model.eagle import EagleSpec
from beagle_jax.weights.draft import Draft, load_draft, save_draft
from beagle_jax.weights.target import load_target

RAGGED = static_tree([(0,), (1,), (0, 0), (0, 2), (1, 0), (0, 2, 0)])


# Acceptance, computed a second time


@pytest.mark.parametrize(
    ("tree", "append_predicted"), [(RAGGED, True), (dynamic_tree(3, 3, 7), True), (RAGGED, False)]
)
def test_replayed_rounds_are_those_that_were_run(tree, append_predicted):
    target, draft, prompt = target_of(MARKOV), right_eagle(0.05), [5, 7]
    decoder = SpeculativeDecoder(target, draft, tree, append_predicted=append_predicted)
    [answer] = decoder.generate([prompt], max_new_tokens=60)
    accepted = replayed(
        target,
        draft,
        tree,
        prompt,
        answer.tokens,
        forced_states(target, [*prompt, *answer.tokens]),
        append_predicted,
    )
    assert np.bincount(accepted, minlength=tree.depth + 1).tolist() == answer.accepted
    assert answer.accepted[0] and sum(answer.accepted[1:]) > 2, (
        "right and wrong rounds must both be there"
    )


def test_the_audit_passes(monkeypatch):
    """Greedy only; the commands below test draws."""
    monkeypatch.setattr(audit_module, "_draws", no_draws)
    made = audited(target_of(MARKOV), {"dynamic": right_eagle(0.05)}, TREES)
    assert made["passed"] and failed(made) == set()


def test_the_audit_finds_a_stale_state():
    """The root is fused with the state before the round; the answers stay right."""

    def stale(now, state):
        draft = state.draft._replace(last_B1D=-state.draft.last_B1D)
        return Round.propose(now, state._replace(draft=draft))

    made = audited(
        target_of(MARKOV),
        {"chain": right_eagle(0.1)},
        TREES,
        DRAWN,
        48,
        parts={"propose": stale},
    )
    assert failed(made) == {ACCEPTANCE}


# Costs and trees


def test_smaller_trees_are_read_off_the_full_one(small):
    target, draft = target_of(MARKOV), right_eagle(0.05)
    [text] = test_tuning._answers(target, 1)
    drafter, model = trained_drafter(draft, target.params), TargetModel(target.spec, target.params)
    grown = acceptance._full_trees(drafter, (3,), *acceptance._read(model, drafter, *text))
    order = acceptance._order_of_right_path(*grown, 3)
    accepted = (order < 7).sum(axis=1).tolist()
    assert accepted == test_tuning._accepted_by_drafting(
        target, draft, dynamic_tree(3, 3, 8), text
    ) and 0 < sum(accepted) < 3 * len(accepted)


def test_costs_are_of_the_programs_that_run():
    decoder = SpeculativeDecoder(target_of(), random_eagle(), chain(2))
    spent = phases(decoder, [5, 7], GREEDY, 8)
    assert spent["draft"] > 0 and spent["verify"] > 0
    sizes = memory(decoder, [5, 7], GREEDY, 8)
    assert sizes["draft_weights"] == sum(array.nbytes for array in random_eagle().params.values())
    assert sizes["draft_cache"] == 2 * 128 * 2 * 8 * 4


# Commands


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> SimpleNamespace:
    """A target, and an EAGLE draft for it that was imported from its authors' format."""
    folder = tmp_path_factory.mktemp("eagle")
    make_target(folder / "target")
    (folder / "eval.jsonl").write_text('{"prompt": "What is 2?"}\n{"prompt": "Name a colour."}\n')
    settings = {
        "target": {"source": str(folder / "target"), "cache_dir": str(folder / "cache")},
        "draft": {"path": str(folder / "draft")},
        "decode": {"levels": 2, "max_new_tokens": 16},
        "eval": {"suites": [str(folder / "eval.jsonl")], "max_new_tokens": 16},
    }
    config = folder / "run.yaml"
    config.write_text(yaml.safe_dump(settings))
    source = write(folder / "there", published(), CONFIG)
    assert (
        run_main(
            convert.main,
            [
                "import-eagle",
                "--config",
                str(config),
                "--source",
                str(source),
                "--out",
                str(folder / "draft"),
            ],
        )
        == 0
    )
    return SimpleNamespace(folder=folder, config=str(config))


def test_an_imported_draft_generates_what_plain_decoding_does(place, capsys):
    assert run_main(generate.main, ["--config", place.config, "What is 3?", "--json", "-"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["equal"] and report["tokens"] == 16


@pytest.fixture(scope="module")
def suites(place) -> list[str]:
    """Overrides with one record of every published suite."""
    for name, (record, *_) in RECORDS.items():
        with gzip.open(place.folder / SUITES[name].file, "wt", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")
    return [
        f"eval.suites=[{', '.join(RECORDS)}]",
        f"eval.folder={place.folder}",
        "eval.max_new_tokens=6",
    ]


@pytest.mark.slow
def test_evaluation_reports_and_audits_it(place, suites):
    out = place.folder / "report"
    assert (
        run_main(evaluate.main, ["--config", place.config, *suites, "--audit", "--out", str(out)])
        == 0
    )
    made = json.loads((out / "report.json").read_text())
    check_schema(made)
    assert made["audit"]["passed"] and [system["name"] for system in made["systems"]] == [
        "plain",
        str(place.folder / "draft"),
    ]
    assert (out / "pictures" / "attention.png").exists() and (
        out / "pictures" / "tree.png"
    ).exists()


@pytest.fixture(scope="module")
def beside(place, suites) -> list[str]:
    """Overrides with a Beagle draft and prompt lookup next to the EAGLE draft, on those suites."""
    spec = BeagleSpec.from_target(
        load_target(str(place.folder / "target"), "float32", "x").spec, init_std=0.3
    )
    save_draft(place.folder / "beside", Draft(spec, init_draft(spec, jax.random.key(0)), None, {}))
    return [f"eval.compare=[{place.folder / 'beside'}, lookup]", "decode.stop=[e]", *suites]


@pytest.mark.parametrize("temperature", [pytest.param(0.0, marks=pytest.mark.slow), 1.0])
def test_both_kinds_stand_in_one_report_of_every_suite(place, beside, temperature):
    """All turns, greedy and sampled: both drafts give plain decoding's answers.

    The audit passes.
    """
    made = evaluated(
        load_config(place.config, [*beside, f"decode.temperature={temperature}"]), audited=True
    ).as_json()
    names = ["plain", *(str(place.folder / name) for name in ("draft", "beside")), "lookup"]
    assert [system["name"] for system in made["systems"]] == names and made["audit"]["passed"], (
        made["audit"]
    )
    assert [suite["name"] for suite in made["suites"]] == list(RECORDS) and [
        note[:11] for note in made["notes"]
    ] == ["decode.stop"]
    for suite, (_, category, turns) in zip(made["suites"], RECORDS.values(), strict=True):
        assert suite["turns_left_out"] == 0 and suite["groups"][0]["prompts"] == 1, category
        for name in names:
            figures = suite["groups"][0]["systems"][name]
            assert (figures["answers"], figures["identical_to_plain"]) == (
                len(turns),
                len(turns),
            ), (category, name)
            assert figures["rounds"] > 0 and len(figures["step_alpha"]) == (
                0 if name == "plain" else 2
            ), (category, name)


def test_tuning_takes_it(place, small, monkeypatch, capsys):
    shrink(monkeypatch, nodes=(4, 8), levels=range(1, 3), topks=(2,), text=64)
    assert run_main(tune.main, ["--config", place.config, "--json", "-"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (
        report["choices"]
        and load_draft(
            place.folder / "draft", load_target(str(place.folder / "target"), "float32", "x").spec
        ).spec.kind
        == "eagle"
    )


def test_a_folder_that_holds_no_draft_is_named(place):
    target, other = (
        load_target(str(place.folder / "target"), "float32", "x").spec,
        place.folder / "target",
    )
    with pytest.raises(
        UserError,
        match=f"{other}: config.json has 2 layers; expected one plain Llama layer",
    ):
        load_draft(other, target)
    (place.folder / "beagle").mkdir()
    (place.folder / "beagle" / "config.json").write_text('{"model_type": "beagle_draft"}')
    with pytest.raises(UserError, match="model_type is 'beagle_draft', expected 'eagle_draft'"):
        load_draft(place.folder / "beagle", target, EagleSpec)
