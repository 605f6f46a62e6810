"""The best draft by decoded tau: what is saved, what a resumed run knows, early ends."""

import json

import jax.numpy as jnp
import pytest
from loop_cases import (
    Breaking,
    after_each_step,
    broken_at,
    config_for,
    interrupt,
    lines_of,
    loader_of,
    same_params,
    saved_steps,
    train_stage,
)

from beagle_jax.config import Config, EvalConfig
from beagle_jax.errors import UserError
from beagle_jax.training.best import Best

pytestmark = pytest.mark.usefixtures("shared_steps")


class Decoder:
    """Stands for a decoder: returns given taus, and records what was saved."""

    def __init__(self, path, taus: list[float], **settings):
        self.taus, self.saved, self.measured = iter(taus), [], []
        self.best = Best(path, EvalConfig(**{"every": 3} | settings), self.measure, self.keep)

    def measure(self, params: dict) -> dict:
        self.measured.append(params)
        return {"tau": next(self.taus), "rounds": 5}

    def keep(self, params: dict, figures: dict) -> None:
        self.saved.append((figures["stage"], figures["step"], figures["tau"]))


def test_only_a_better_tau_replaces_the_best_and_stages_are_told_apart(tmp_path):
    decoder = Decoder(tmp_path / "best.json", [1.2, 1.5, 1.4, 1.3, 1.6], patience=2)
    for stage, step in (("early", 3), ("early", 6), ("early", 9), ("late", 3), ("late", 6)):
        decoder.best.look(stage, step, {})
    assert (
        decoder.saved == [("early", 3, 1.2), ("early", 6, 1.5), ("late", 6, 1.6)]
        and decoder.best.tau == 1.6
    )
    stages = json.loads((tmp_path / "best.json").read_text())["stages"]
    assert stages == {"early": {"step": 6, "tau": 1.5}, "late": {"step": 6, "tau": 1.6}}


def test_a_damaged_list_of_taus_is_named(tmp_path):
    (tmp_path / "best.json").write_text('{"stages": {')
    with pytest.raises(
        UserError, match=r"best.json: not JSON .*; delete it, and tau is compared anew"
    ):
        Best(tmp_path / "best.json", EvalConfig(every=1), None, None)


def test_a_stage_is_exhausted_after_so_many_measurements(tmp_path):
    decoder = Decoder(tmp_path / "best.json", [1.5], patience=2)
    decoder.best.look("early", 6, {})
    assert [done for done in range(0, 16, 3) if decoder.best.exhausted("early", done)] == [12, 15]
    assert not decoder.best.exhausted("late", 99)
    never = Decoder(tmp_path / "best.json", [], patience=0)
    assert never.best.tau == 1.5 and not never.best.exhausted("early", 99)


def test_taus_on_other_prompts_do_not_count(tmp_path):
    Decoder(tmp_path / "best.json", [1.5]).best.look("early", 3, {})
    assert Decoder(tmp_path / "best.json", []).best.tau == 1.5
    assert Decoder(tmp_path / "best.json", [], train_prompts=9).best.tau == 0.0


@pytest.fixture
def run(frozen):
    def run(config: Config, best: Best | None, training=None) -> dict:
        return train_stage(config, frozen, training, best=best)

    return run


def looks_of(config: Config) -> list[tuple[int, float]]:
    return [
        (line["step"], line["tau"]) for line in lines_of(config) if line.get("split") == "decoding"
    ]


def test_measuring_changes_nothing_that_is_trained_and_is_logged(run, tmp_path):
    config, other = config_for(tmp_path / "a"), config_for(tmp_path / "b")
    decoder = Decoder(tmp_path / "best.json", [1.1, 1.3, 1.2, 1.25])
    same_params(run(config, decoder.best), run(other, None))
    assert looks_of(config) == [(3, 1.1), (6, 1.3), (9, 1.2), (12, 1.25)]

    def plain(of):
        return [{**line, "tokens_per_second": 0} for line in lines_of(of) if "split" not in line]

    assert plain(config) == plain(other) and saved_steps(config) == [10, 12]
    assert decoder.saved == [("early", 3, 1.1), ("early", 6, 1.3)]


def test_a_stage_ends_early_and_stays_ended(run, tmp_path):
    config = config_for(tmp_path)
    decoder = Decoder(tmp_path / "best.json", [1.4, 1.3], patience=1)
    ended = run(config, decoder.best)
    assert looks_of(config) == [(3, 1.4), (6, 1.3)] and saved_steps(config) == [5, 6]
    again = Decoder(tmp_path / "best.json", [], patience=1)
    same_params(run(config, again.best, Breaking(loader_of(20, 1), 6, interrupt)), ended)


def test_a_resumed_run_measures_what_was_lost_and_ends_the_same(run, tmp_path):
    config = config_for(tmp_path)
    # After the measurement of step 9, with the checkpoint of step 5.
    with pytest.raises(KeyboardInterrupt):
        run(
            config.changed(train=config.train.changed(checkpoint_every=5)),
            Decoder(tmp_path / "best.json", [1.1, 1.3, 1.2]).best,
            Breaking(loader_of(20, 1), 9, interrupt),
        )
    again = Decoder(tmp_path / "best.json", [1.3, 1.2, 1.25])
    run(config, again.best)
    assert (
        looks_of(config) == [(3, 1.1), (6, 1.3), (9, 1.2), (6, 1.3), (9, 1.2), (12, 1.25)]
        and again.saved == []
    )


def test_a_broken_draft_is_never_measured(run, tmp_path, monkeypatch):
    """Decoding is lossless with any draft, so a broken one would pass for a tau of 1."""
    after_each_step(monkeypatch, broken_at(3, jnp.nan))
    decoder = Decoder(tmp_path / "best.json", [1.0])
    config = config_for(tmp_path, checkpoint_every=100)
    with pytest.raises(
        UserError,
        match="step 3: a parameter or its optimizer state is not finite although the loss was",
    ):
        run(config.changed(log=config.log.changed(every=100)), decoder.best)
    assert decoder.measured == [] and decoder.saved == []
