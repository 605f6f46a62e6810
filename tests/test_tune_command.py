"""`tune`: the quick form, what is measured, and figures that other work disturbed."""

import json

import jax
import numpy as np
import pytest
from command_cases import make_workplace
from decode_cases import MARKOV, random_draft, right_draft, target_of
from tuning_cases import shrink

from beagle_jax import load_target, tune
from beagle_jax.commands import tune as tune_command
from beagle_jax.config import load_config
from beagle_jax.decoding import timing, tuning
from beagle_jax.decoding.acceptance import FILE, Acceptance
from beagle_jax.decoding.build import decoder_from
from beagle_jax.decoding.kinds import trained_drafter
from beagle_jax.decoding.sampling import Sampling
from beagle_jax.decoding.timing import Held, Situation, ending
from beagle_jax.errors import run_main
from beagle_jax.model.beagle import BeagleSpec, init_draft
from beagle_jax.weights.draft import Draft, save_draft


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuned")
    made = make_workplace(folder)
    spec = BeagleSpec.from_target(load_target(folder / "target").spec, init_std=0.3)
    save_draft(folder / "draft", Draft(spec, init_draft(spec, jax.random.key(1)), None, {}))
    made.options = [f"draft.path={folder / 'draft'}", f"target.cache_dir={folder / 'cache'}"]
    return made


@pytest.fixture
def few(monkeypatch) -> dict:
    """A small grid, and costs that are given instead of measured: plain, tree and draft."""
    shrink(monkeypatch, nodes=(4,), levels=range(1, 3), topks=(1, 2), text=128)
    monkeypatch.setattr(tuning, "TOLERANCE", 0.1)
    costs = {"plain": [10.0, 10.0], "tree": [5.0] * 99, "draft": [0.5] * 99}
    monkeypatch.setattr(
        tuning, "ending", lambda target, nodes, *_: "plain" if nodes == 1 else "tree"
    )
    monkeypatch.setattr(tuning, "drafting", lambda *_: "draft")
    monkeypatch.setattr(tuning, "compiled", lambda works: None)
    monkeypatch.setattr(tuning, "milliseconds", lambda name: costs[name].pop(0))
    return costs


def tuned(place, capsys, *options: str) -> tuple[dict, str, str]:
    """Figures, stdout and stderr of `tune`."""
    file = place.folder / "figures.json"
    command = ["--config", place.config, "--json", str(file), *options, *place.options]
    assert run_main(tune.main, command) == 0
    printed = capsys.readouterr()
    return json.loads(file.read_text()), printed.out, printed.err


def test_the_quick_form_takes_what_the_folder_keeps(place, few, capsys):
    saved = place.folder / "draft" / FILE
    figures, _, err = tuned(place, capsys, "--quick", "--prompts", "3")
    assert "draft has no figures for these weights; tune without --quick measures more" in err
    assert figures["acceptance"].startswith("answers to 3 prompts") and not saved.exists()
    few.update(plain=[10.0, 10.0])
    figures, _, err = tuned(place, capsys)
    assert saved.exists() and f"acceptance is kept in {saved.parent} for tune --quick" in err
    stored = json.loads(saved.read_text())
    few.update(plain=[10.0, 10.0])
    saved.write_text(json.dumps(stored | {"texts": "the texts of the folder"}))
    figures, out, err = tuned(place, capsys, "--quick")
    assert figures["acceptance"] == "the texts of the folder" and "the texts of the folder" in out
    few.update(plain=[10.0, 10.0])
    figures, _, err = tuned(place, capsys, "--quick", "decode.temperature=0.7")
    assert "has figures of greedy text" in err and figures["sampling"]["temperature"] == 0.7
    assert "answers to 3 prompts" in figures["acceptance"]


def test_one_line_says_what_it_brings(place, few, capsys):
    figures, out, _ = tuned(place, capsys)
    best = figures["choices"][0]
    gain = best["tau"] * 10 / 5.5
    assert f"chosen: {best['levels']} levels, topk {best['topk']}, 4 nodes: " in out
    assert f"{gain:.2f} times plain decoding" in out and "instead of 100.0 tok/s" in out


def test_disturbed_figures_are_not_remembered(place, few, capsys, tmp_path):
    few.update(plain=[10.0, 12.0, 10.0, 12.0])
    written = tmp_path / "tuned.yaml"
    other = f"target.cache_dir={tmp_path}"
    figures, out, _ = tuned(place, capsys, "--write", str(written), other)
    assert figures["disturbed"] and figures["remembered"] is None and not written.exists()
    assert "not saved: a plain step took 10.0 ms at first and 12.0 ms at the end" in out
    few.update(plain=[10.0, 12.0, 10.0, 10.9])  # the second measurement counts
    figures, out, err = tuned(place, capsys, "--write", str(written))
    assert "measuring again, as a plain step took 10.0 ms at first and 12.0 ms at the end" in err
    assert figures["remembered"] and written.exists() and " is saved for decode.tree=auto" in out


def test_the_server_has_a_tree_of_its_own(place, few, capsys):
    figures, out, _ = tuned(place, capsys, "--serve", "serve.rows=4", "serve.context=200")
    assert (figures["batch"], figures["capacity"]) == (4, 256)
    assert "batch 4, 256 cache slots, greedy" in out
    for options, there in ((["serve.rows=4"], True), (["serve.rows=2"], False)):
        config = load_config(place.config, [*place.options, *options])
        target = load_target(place.folder / "target")
        draft = tune_command.drafter_of(config, target)
        path = tuning.tuned_path(
            config.target.cache_dir, target, draft, None, rows=config.serve.rows
        )
        assert path.exists() == there


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("draft.path=lookup", "draft.path is lookup, but tune measures a trained draft"),
        ("decode.append_predicted=false", "decode.append_predicted is false, but tune measures"),
        ("decode.rule=ratio", "decode.rule is ratio, which is for chains, but tune chooses"),
    ],
)
def test_what_a_dynamic_tree_cannot_be_is_refused(place, capsys, option, message):
    assert run_main(tune.main, ["--config", place.config, *place.options, option]) == 1
    assert message in capsys.readouterr().err


def test_the_tree_of_auto_is_the_tuned_one(place, few, capsys):
    tuned(place, capsys)
    [choice, *_] = json.loads((place.folder / "figures.json").read_text())["choices"]
    config = load_config(place.config, [*place.options, "decode.tree=auto"])
    tree = decoder_from(config).tree
    assert (tree.levels, tree.topk, tree.nodes) == (choice["levels"], choice["topk"], 4)


@pytest.mark.parametrize(
    "sampling", [Sampling(), pytest.param(Sampling(0.8, top_k=20), marks=pytest.mark.slow)]
)
def test_measured_rounds_write_what_plain_decoding_writes(sampling):
    """They are whole rounds: whatever the nodes, the accepted tokens are the target's."""
    target, where = target_of(MARKOV), Situation(2, 128, sampling)
    drafter = trained_drafter(right_draft(), target.params)
    written = []
    for work in (ending(target, 1, None, where), ending(target, 5, None, where, drafter)):
        assert isinstance(work.call, Held)
        for _ in range(2):
            work.call()
        state = work.call._state
        assert state.stats.passes_B.tolist() == [2 * timing.PASSES] * 2
        written.append(np.asarray(state.transcript.out_BS)[:, : 2 * timing.PASSES].tolist())
    assert written[0] == written[1] and len(set(written[0][0])) > 1
    other = ending(target_of(), 5, None, where, trained_drafter(random_draft(), target.params))
    other.call(), other.call()
    rows = np.asarray(other.call._state.transcript.out_BS)[:, : 2 * timing.PASSES].tolist()
    assert rows != written[0]  # planted: another target


def acceptance(tau: dict) -> Acceptance:
    return Acceptance(tau, np.zeros((1, 1)), 1, "none")


TAU = {(1, 8, nodes): 1 + nodes / 20 for nodes in (4, 8, 12, 16, 24, 32)}


def costs_of(monkeypatch, verify: dict[int, float]) -> list[int]:
    """Gives costs by number of nodes; returns the numbers that were measured."""
    measured = []
    monkeypatch.setattr(tuning, "ending", lambda target, nodes, *_: nodes)
    monkeypatch.setattr(tuning, "drafting", lambda *_: 0)
    monkeypatch.setattr(tuning, "compiled", lambda works: None)

    def milliseconds(nodes: int) -> float:
        measured.extend([nodes] if nodes else [])
        return verify[nodes] if nodes else 0.1

    monkeypatch.setattr(tuning, "milliseconds", milliseconds)
    return measured


def test_sizes_that_a_device_runs_badly_are_not_offered(monkeypatch):
    verify = {1: 10.0, 4: 10.5, 8: 11.0, 12: 14.0, 16: 13.0, 24: 16.0, 32: 20.0}
    assert tuning.offered(verify) == [4, 8, 16, 24, 32]
    costs_of(monkeypatch, verify)
    monkeypatch.setattr(tuning, "LEVELS", (1,))
    effort = tuning.Effort((4, 8, 12, 16, 24, 32), (8,), 9, guesses=False)
    made = tuning.tune(target_of(), random_draft(), acceptance(TAU), effort=effort)
    assert 12 not in {choice.nodes for choice in made.choices} and made.best.nodes == 16


def test_sizes_that_cannot_pay_are_not_measured(monkeypatch):
    """The largest tree writes 2.6 tokens: at three times a plain step none can pay."""
    measured = costs_of(monkeypatch, {1: 10.0, 4: 11.0, 8: 30.0, 12: 31.0, 16: 35.0})
    monkeypatch.setattr(tuning, "LEVELS", (1,))
    effort = tuning.Effort((4, 8, 12, 16), (8,), 9, guesses=False)
    made = tuning.tune(target_of(), random_draft(), acceptance(TAU), effort=effort)
    # 8 may be a size that the device runs badly; with 12 it is certain. The plain step comes again.
    assert measured == [1, 4, 8, 12, 1] and made.best.nodes == 4


@pytest.mark.parametrize(
    ("verify", "patience", "guesses", "expected"),
    [
        # A line through 1 and 4 says that 8 takes 24 ms: too much for what it accepts.
        ({1: 10.0, 4: 16.0}, 1, True, [1, 4, 1]),
        ({1: 10.0, 4: 10.1, 8: 10.2, 12: 10.3, 16: 10.4}, 1, True, [1, 4, 8, 12, 16, 1]),
        ({1: 10.0, 4: 10.1, 8: 16.0}, 1, False, [1, 4, 8, 1]),
        ({1: 10.0, 4: 10.1, 8: 12.0, 12: 14.0, 16: 15.0}, 2, False, [1, 4, 8, 12, 1]),
    ],
)
def test_the_quick_form_measures_less(monkeypatch, verify, patience, guesses, expected):
    measured = costs_of(monkeypatch, verify)
    monkeypatch.setattr(tuning, "LEVELS", (1,))
    effort = tuning.Effort((4, 8, 12, 16), (8,), patience, guesses)
    tuning.tune(target_of(), random_draft(), acceptance(TAU), effort=effort)
    assert measured == expected
