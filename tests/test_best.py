"""The best draft by decoded tau: what is saved, what a resumed run knows, early ends."""

import json
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
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

from beagle_jax.config import (
    Config,
    DecodeConfig,
    EarlyStage,
    EvalConfig,
    Identity,
    LateStage,
    LogConfig,
    TargetConfig,
    TrainConfig,
)
from beagle_jax.errors import UserError
from beagle_jax.training import best as best_module
from beagle_jax.training.best import Best
from beagle_jax.training.progress import Progress
from beagle_jax.training.rates import CLOCKED

pytestmark = pytest.mark.usefixtures("shared_steps")


BY_LOSS = {"best_by": "held_out_loss", "log": LogConfig(eval_rows=16)}


class Decoder:
    """Stands for a decoder: returns given taus, and records what was saved."""

    def __init__(self, path, taus: list[float], **settings):
        self.taus, self.saved, self.measured = iter(taus), [], []
        sections = ("train", "decode", "log")
        changes = {key: settings.pop(key) for key in sections if key in settings}
        config = Config(
            target=TargetConfig(source="x"), eval=EvalConfig(**{"every": 3} | settings), **changes
        )
        self.best = Best(path, config, self.measure, self.keep, self.restore)

    def measure(self, params: dict) -> dict:
        self.measured.append(params)
        return {"tau": next(self.taus), "rounds": 5}

    def keep(self, folder, params: dict, figures: dict) -> None:
        self.saved.append((figures["stage"], figures["step"], figures.get("tau")))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps({"best": figures}))
        np.savez(folder / "weights.npz", **params)

    def restore(self, folder) -> dict:
        return dict(np.load(folder / "weights.npz"))


def test_only_a_better_tau_replaces_the_best_and_stages_are_told_apart(tmp_path):
    decoder = Decoder(tmp_path / "best.json", [1.2, 1.5, 1.4, 1.3, 1.6], patience=2)
    for stage, step in (("early", 3), ("early", 6), ("early", 9), ("late", 3), ("late", 6)):
        decoder.best.look(stage, step, {})
    assert decoder.saved == [
        ("early", 3, 1.2),
        ("early", 6, 1.5),
        ("late", 3, 1.3),
        ("late", 6, 1.6),
    ]
    assert decoder.best.folder == tmp_path / "best" / "late"
    stages = json.loads((tmp_path / "best.json").read_text())["stages"]
    assert stages == {"early": {"step": 6, "tau": 1.5}, "late": {"step": 6, "tau": 1.6}}


def test_a_damaged_list_of_taus_is_named(tmp_path):
    (tmp_path / "best.json").write_text('{"stages": {')
    with pytest.raises(
        UserError, match=r"best.json: not JSON .*; delete it, and tau is compared anew"
    ):
        Decoder(tmp_path / "best.json", [])


def test_a_stage_is_exhausted_after_so_many_measurements(tmp_path):
    decoder = Decoder(tmp_path / "best.json", [1.5], patience=2)
    decoder.best.look("early", 6, {})
    assert [done for done in range(0, 16, 3) if decoder.best.exhausted("early", done)] == [12, 15]
    assert not decoder.best.exhausted("late", 99)
    never = Decoder(tmp_path / "best.json", [], patience=0)
    assert never.best.folder == tmp_path / "best" / "early" and not never.best.exhausted(
        "early", 99
    )


def test_taus_on_other_prompts_do_not_count(tmp_path):
    Decoder(tmp_path / "best.json", [1.5]).best.look("early", 3, {})
    assert Decoder(tmp_path / "best.json", []).best.folder == tmp_path / "best" / "early"
    assert Decoder(tmp_path / "best.json", [], train_prompts=9).best.folder is None


EARLY = {"early": EarlyStage(learning_rate=0.1)}
OTHER_LATE = {"late": LateStage(learning_rate=0.1)}


@pytest.mark.parametrize(
    ("settings", "stages"),
    [
        ({}, ["early", "late"]),
        ({"train": TrainConfig(checkpoint_every=3)}, ["early", "late"]),
        ({"train": TrainConfig(**EARLY)}, []),
        ({"train": TrainConfig(**OTHER_LATE)}, ["early"]),
        ({"train": TrainConfig(noise="none")}, []),
        ({"decode": DecodeConfig(levels=2)}, []),
        ({"decode": DecodeConfig(tree="dynamic")}, []),
        ({"decode": DecodeConfig(temperature=0.5)}, []),
        ({"decode": DecodeConfig(max_new_tokens=7)}, ["early", "late"]),
        ({"max_new_tokens": 5}, []),
        ({"patience": 7}, ["early", "late"]),
    ],
)
def test_taus_of_other_settings_do_not_count(tmp_path, capsys, settings, stages):
    """Neither for patience nor for the draft that is exported, and a line names the settings."""
    path = tmp_path / "best.json"
    before = Decoder(path, [1.2, 1.6])
    before.best.look("early", 3, {}), before.best.look("late", 3, {})
    again = Decoder(path, [1.1], **{"patience": 1} | settings)
    assert [stage for stage in ("early", "late") if again.best.exhausted(stage, 99)] == stages
    assert again.best.folder == (tmp_path / "best" / stages[-1] if stages else None)
    printed = capsys.readouterr().out
    assert printed.count("was measured with other settings") == 2 - len(stages)
    if not stages:
        again.best.look("early", 6, {})
        assert again.saved == [("early", 6, 1.1)]
        assert again.best.folder == tmp_path / "best" / "early"
    if settings.get("train") == TrainConfig(**EARLY):
        assert "train.early.learning_rate: 3e-05 there, 0.1 now" in printed


def test_planted_bug_taus_bound_to_the_settings_of_eval_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(best_module, "_identity", lambda config, _: Identity.of(config.eval, "tau"))
    settings = {"train": TrainConfig(**EARLY)}
    with pytest.raises(AssertionError):
        test_taus_of_other_settings_do_not_count(tmp_path, capsys, settings, [])


def test_the_best_of_version_0_1_0_counts_with_its_draft_s_settings(tmp_path):
    """It had one folder for all stages, and only the settings of `eval` beside the taus."""
    made_with = {"suites": ["held_out"], "every": 3, "prompts": 8, "max_new_tokens": 96}
    stages = {"early": {"step": 3, "tau": 1.5}, "late": {"step": 3, "tau": 1.2}}
    (tmp_path / "best.json").write_text(json.dumps({"made_with": made_with, "stages": stages}))
    (tmp_path / "best").mkdir()
    draft = {"training": TrainConfig().record(), "best": {"stage": "early", "step": 3, "tau": 1.5}}
    (tmp_path / "best" / "config.json").write_text(json.dumps(draft))
    same = Decoder(tmp_path / "best.json", [], patience=1).best
    assert same.folder == tmp_path / "best" and same.exhausted("late", 6)
    other = Decoder(tmp_path / "best.json", [], patience=1, train=TrainConfig(**EARLY)).best
    assert other.folder is None and not other.exhausted("late", 6)


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
        lines = [line for line in lines_of(of) if "split" not in line]
        return [{**line, **dict.fromkeys(CLOCKED)} for line in lines]

    assert plain(config) == plain(other) and saved_steps(config) == [10, 12]
    assert decoder.saved == [("early", 3, 1.1), ("early", 6, 1.3)]


def test_a_stage_ends_early_and_stays_ended(run, tmp_path):
    config = config_for(tmp_path)
    decoder = Decoder(tmp_path / "best.json", [1.4, 1.3], patience=1)
    ended = run(config, decoder.best)
    same_params(ended, decoder.measured[0])  # the best ones, not the last
    with pytest.raises(AssertionError):
        same_params(ended, decoder.measured[1])
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


def test_the_lowest_held_out_loss_decides_if_the_settings_say_so(run, frozen, tmp_path):
    """Nothing is decoded; the best weights come back, and the last stage's best is exported."""
    config = config_for(tmp_path, checkpoint_every=100)
    decoder = Decoder(tmp_path / "best.json", [], patience=1, **BY_LOSS)
    losses = iter([3.0, 2.0, 2.5])

    def held_out(self, done, batches):
        line = {"loss": next(losses)}
        self.aside(done, "held_out", line, "")
        return line

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Progress, "held_out", held_out)
        patch.setattr(Best, "due", lambda self, done, steps: done % 3 == 0)
        ended = train_stage(config, frozen, held_out=loader_of(8, 2), best=decoder.best)
    stored = json.loads((tmp_path / "best.json").read_text())["stages"]
    assert stored == {"early": {"step": 6, "held_out_loss": 2.0}} and decoder.measured == []
    same_params(ended, decoder.restore(decoder.best.folder))
    assert saved_steps(config)[-1] == 9
    looks = [line["step"] for line in lines_of(config) if line.get("split") == "held_out"]
    assert looks == [3, 6, 9]  # once a step, though step 9 is saved too


def test_a_later_stage_s_loss_is_not_compared_with_an_earlier_one_s(tmp_path):
    """The late stage's loss is weighted otherwise."""
    decoder = Decoder(tmp_path / "best.json", [], **BY_LOSS)
    decoder.best.look("early", 3, {}, {"held_out_loss": 1.0})
    decoder.best.look("late", 3, {}, {"held_out_loss": 7.0})
    assert decoder.best.folder == tmp_path / "best" / "late"


def test_measurements_keep_to_their_share_of_the_time(tmp_path, monkeypatch):
    clock = SimpleNamespace(now=0.0)
    clock.perf_counter = lambda: clock.now
    monkeypatch.setattr(best_module, "time", clock)
    decoder = Decoder(tmp_path / "best.json", [1.0] * 9, most_time=0.25)
    measure = decoder.best._measure

    def slow(params):
        clock.now += 1.0
        return measure(params)

    decoder.best._measure, measured = slow, []
    for done in range(3, 31):
        clock.now += 0.5  # training
        if decoder.best.due(done, 30):
            measured.append((done, decoder.best.look("early", done, {})["share_of_run"]))
    assert [done for done, _ in measured] == [3, 15, 21, 27, 30]
    assert all(share <= 0.25 for done, share in measured[1:-1])
    unbounded = Decoder(tmp_path / "other.json", [1.0] * 9)
    assert [done for done in range(3, 31) if unbounded.best.due(done, 30)] == list(range(3, 31, 3))


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
