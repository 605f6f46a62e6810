"""Running a stage: progress, log, checkpoints, resuming and stopping; and the draft on disk that
comes of it.
"""

import json
import time
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ONE_DEVICE, TINY
from safetensors.numpy import load_file, save_file

from beagle_jax.commands.train import first_params, given_draft
from beagle_jax.config import Config, DraftConfig, LogConfig, StageConfig, TargetConfig, TrainConfig
from beagle_jax.data.loader import BatchLoader
from beagle_jax.data.prefetch import AHEAD
from beagle_jax.data.share import ALONE, Share
from beagle_jax.data.template import Row
from beagle_jax.errors import UserError
from beagle_jax.model.beagle import DraftSpec, init_draft
from beagle_jax.training import loop
from beagle_jax.training.checkpoint import Settings, StageCheckpoints
from beagle_jax.training.loop import run_stage
from beagle_jax.training.metrics import Log
from beagle_jax.training.progress import Progress, summary
from beagle_jax.training.step import Metrics
from beagle_jax.weights import draft as draft_module
from beagle_jax.weights.draft import Draft, draft_digest, load_draft, save_draft

pytestmark = pytest.mark.usefixtures("shared_steps")

SPEC = DraftSpec.from_target(TINY)
L = 12


def config_for(folder, **changes) -> Config:
    stage = StageConfig(steps=12, learning_rate=1e-2, warmup=2, window=3)
    # noise_scale: rows this short would get noise of width 9 at the default.
    settings = {
        "batch": 4,
        "row_tokens": L,
        "loss_rows": 16,
        "noise_scale": 0.002,
        "checkpoint_every": 5,
    }
    train = TrainConfig(folder=str(folder), **settings | {"early": stage} | changes)
    return Config(target=TargetConfig(source="tiny"), train=train, log=LogConfig(every=3))


def loader_of(count: int, seed: int, share: Share = ALONE) -> BatchLoader:
    """Rows whose states depend on their tokens, so that there is something to learn."""
    rng = np.random.default_rng(seed)
    table_VD = (
        np.random.default_rng(0)
        .standard_normal((TINY.vocab_size, TINY.hidden_size))
        .astype(np.float32)
    )
    lengths = rng.integers(L - 4, L + 3, count)
    rows = [
        Row(rng.integers(0, TINY.vocab_size, n).tolist(), [position >= 2 for position in range(n)])
        for n in lengths
    ]
    return BatchLoader(
        rows, [table_VD[row.tokens] for row in rows], batch=4, row_tokens=L, seed=1, share=share
    )


class Breaking:
    """A loader that goes wrong at one step, and remembers which steps were asked for."""

    def __init__(self, loader: BatchLoader, step: int | None = None, how=None):
        self._loader, self._step, self._how, self.asked = loader, step, how, []

    def batch_at(self, step: int):
        self.asked.append(step)
        self.steps_per_epoch = self._loader.steps_per_epoch
        batch = self._loader.batch_at(step)
        return self._how(batch) if step == self._step else batch


def interrupt(batch):
    raise KeyboardInterrupt


def infinite_state(batch):
    batch.states_BLD[0, 3] = np.inf
    return batch


@pytest.fixture(scope="module")
def frozen(tiny_params) -> dict:
    return {"embed_VD": tiny_params["embed_VD"], "head_VD": tiny_params["embed_VD"]}


@pytest.fixture(scope="module")
def start() -> dict:
    return init_draft(SPEC, jax.random.key(3))


@pytest.fixture(scope="module")
def stage(frozen, start):
    """Runs a stage of a config, from the same parameters every time."""
    training = loader_of(20, 1)

    def stage(config, training=training, held_out=None):
        return run_stage(
            "early", config, SPEC, start, frozen, ONE_DEVICE, training, held_out, Log(config)
        )

    return stage


def test_a_part_of_a_line_that_a_killed_run_left_is_taken_away(tmp_path):
    config, path = config_for(tmp_path), tmp_path / "log.jsonl"
    for left, kept in (('{"step": 1}\n{"st', [1]), ('{"st', []), ('{"step": 1}\n', [1]), ("", [])):
        path.write_text(left)
        Log(config).write({"step": 2})
        assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [*kept, 2]


@pytest.fixture(scope="module")
def whole(stage, tmp_path_factory):
    """Config and parameters of an early stage of 12 steps that nothing interrupted."""
    config = config_for(tmp_path_factory.mktemp("whole"))
    return config, stage(config)


def lines_of(config) -> list[dict]:
    with open(f"{config.train.folder}/log.jsonl", encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def saved_steps(config) -> list[int]:
    with StageCheckpoints(
        f"{config.train.folder}/checkpoints/early", Settings({}, {})
    ) as checkpoints:
        return checkpoints.steps()


def same_params(found, expected) -> None:
    """Bit for bit."""
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)


def test_the_loss_goes_down_and_is_logged(stage, tmp_path):
    config = config_for(
        tmp_path,
        early=StageConfig(steps=60, learning_rate=1e-2, warmup=2, window=3),
        checkpoint_every=30,
    )
    stage(config, held_out=loader_of(8, 2))
    lines = [line for line in lines_of(config) if "split" not in line]
    assert [line["step"] for line in lines] == list(range(3, 61, 3))
    assert lines[-1]["loss"] < 0.6 * lines[0]["loss"]
    for line in lines:
        assert line["stage"] == "early" and len(line["top1_by_offset"]) == 3
        # 1e-3: the log rounds to five digits
        assert line["loss"] == pytest.approx(line["ploss"] + 10 * line["vloss"], rel=1e-3)
        assert line["tokens_per_second"] > 0 < line["grad_norm"] and all(
            0 <= share <= 1 for share in line["top1_by_offset"]
        )
    held_out = [line for line in lines_of(config) if line.get("split") == "held_out"]
    assert [line["step"] for line in held_out] == [30, 60] and held_out[1]["loss"] < held_out[0][
        "loss"
    ]


def test_the_newest_two_checkpoints_stay_and_the_callers_parameters_too(whole, start):
    config, params = whole
    assert saved_steps(config) == [10, 12]
    assert all(np.isfinite(array).all() for array in start.values())
    with pytest.raises(AssertionError):
        same_params(params, start)


def test_a_finished_stage_is_skipped(whole, stage):
    config, params = whole
    before = lines_of(config)
    same_params(stage(config, training=Breaking(loader_of(20, 1), 0, interrupt)), params)
    assert lines_of(config) == before


def interrupted_then_resumed(stage, folder, step: int):
    config = config_for(folder)
    with pytest.raises(KeyboardInterrupt):
        stage(config, training=Breaking(loader_of(20, 1), step, interrupt))
    assert saved_steps(config)[-1] == step // 5 * 5
    return config, stage(config)


def test_every_step_takes_its_own_batch_once(stage, tmp_path):
    config, broken, resumed = (
        config_for(tmp_path),
        Breaking(loader_of(20, 1), 8, interrupt),
        Breaking(loader_of(20, 1)),
    )
    with pytest.raises(KeyboardInterrupt):
        stage(config, training=broken)
    stage(config, training=resumed)
    assert broken.asked[:9] == list(range(9)) and resumed.asked == list(
        range(5, 12)
    )  # the next batches are read ahead


def test_stop_and_resume_is_bit_equal(whole, stage, tmp_path):
    config, params = interrupted_then_resumed(stage, tmp_path, 8)
    same_params(params, whole[1])
    assert [line["step"] for line in lines_of(config)] == [
        3,
        6,
        6,
        9,
        12,
    ]  # steps 6 to 8 were run twice


@pytest.mark.parametrize("lost", ["optimizer", "step"])
def test_a_resume_that_loses_something_is_seen(whole, stage, tmp_path, monkeypatch, lost):
    restore = StageCheckpoints.restore

    def forgetful(self, fresh):
        found = restore(self, fresh)
        if found is None:
            return None
        state, waiting = found
        if (
            lost == "optimizer"
        ):  # zeroed in place: a new array would lie elsewhere and compile the step again
            return state._replace(opt_state=jax.tree.map(lambda x: x * 0, state.opt_state)), waiting
        return state._replace(step=state.step + 1), waiting

    monkeypatch.setattr(StageCheckpoints, "restore", forgetful)
    _, params = interrupted_then_resumed(stage, tmp_path, 8)
    with pytest.raises(AssertionError):
        same_params(params, whole[1])


def test_an_infinite_loss_stops_the_run_and_keeps_the_last_checkpoint(whole, stage, tmp_path):
    config = config_for(tmp_path)
    message = (
        r"early stage, step 8: the loss is (nan|inf), .* the last checkpoint is kept. Its "
        r"batch is number 2 of epoch 1; row 0 of it has states that are not finite \(row 0 "
        r"begins with the tokens \[\d+, .*\]\): delete the states in data.folder"
    )
    with pytest.raises(UserError, match=message):
        stage(config, training=Breaking(loader_of(20, 1), 7, infinite_state))
    assert saved_steps(config) == [5]
    same_params(stage(config), whole[1])


def test_a_broken_step_is_never_saved(stage, tmp_path):
    config = config_for(tmp_path)
    with pytest.raises(UserError, match="early stage, step 5: the loss is"):
        stage(config, training=Breaking(loader_of(20, 1), 4, infinite_state))
    assert saved_steps(config) == []


def after_each_step(monkeypatch, change) -> None:
    """Lets `change(state, metrics)` decide what a training step returns."""

    def make_steps(*arguments, **keywords):
        train_step, eval_step, init = true_steps(*arguments, **keywords)
        return lambda *inputs: change(*train_step(*inputs)), eval_step, init

    true_steps = loop.make_steps
    monkeypatch.setattr(loop, "make_steps", make_steps)


def broken_at(step: int, value: float):
    """A step after which one parameter is this value, whatever the loss was."""

    def change(state, metrics):
        broken = {"q_proj": jnp.where(state.step == step, value, state.params["q_proj"])}
        return state._replace(params=state.params | broken), metrics

    return change


def test_an_infinite_gradient_stops_the_run_too(stage, tmp_path, monkeypatch):
    def infinite(state, metrics):
        return metrics._replace(grad_norm=jnp.where(state.step == 5, jnp.inf, metrics.grad_norm))

    after_each_step(monkeypatch, lambda state, metrics: (state, infinite(state, metrics)))
    config = config_for(tmp_path)
    with pytest.raises(
        UserError,
        match=r"step 5: the loss is \d.*, its gradient's norm inf; .*, and its states are "
        r"finite: lower train.early.learn",
    ):
        stage(config)
    assert saved_steps(config) == []


def test_shares_by_offset_are_of_what_was_counted():
    def batch(*agree):
        return Metrics(1.0, 1.0, 1.0, 5, np.array([4, 1]), np.array(agree), 1.0)

    line = summary([batch([1, 2, 3], [0, 1, 1]), batch([0, 0, 3], [1, 1, 1])])
    shares = {
        "top1_by_offset": [0.125, 0.5],
        "top4_by_offset": [0.25, 1.0],
        "top10_by_offset": [0.75, 1.0],
    }
    assert {key: line[key] for key in line if key.startswith("top")} == shares


def test_states_that_the_step_makes_are_not_called_finite(tmp_path):
    training = BatchLoader([Row([1, 2, 3], [True] * 3)] * 4, None, batch=4, row_tokens=L, seed=1)
    progress = Progress("early", config_for(tmp_path), None, training, 0, [])
    message = (
        r"Its batch is number 0 of epoch 6. Lower train.early.learning_rate, unless it is the "
        r"target's states, made in the step"
    )
    with pytest.raises(UserError, match=message):
        progress.add(7, Metrics(*[np.float32("nan")] * len(Metrics._fields)))


def reads_ahead(stage, config, patience: float, monkeypatch) -> bool:
    """Whether the batches after a step's own are asked for while the step is under way, for so many
    seconds.
    """
    training, found = Breaking(loader_of(20, 1)), []

    def look(state, metrics):
        end = time.monotonic() + patience
        while not found and len(training.asked) < 1 + AHEAD and time.monotonic() < end:
            time.sleep(0.01)
        found.append(len(training.asked) >= 1 + AHEAD)
        return state, metrics

    after_each_step(monkeypatch, look)
    stage(config, training=training)
    return found[0]


def test_the_next_batches_are_read_while_a_step_is_under_way(stage, tmp_path, monkeypatch):
    assert reads_ahead(stage, config_for(tmp_path / "a"), 20, monkeypatch)
    monkeypatch.setattr(loop, "read_ahead", map)  # planted: read when the step is over
    assert not reads_ahead(stage, config_for(tmp_path / "b"), 0, monkeypatch)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 3}, "train.seed: 42 there, 3 now"),
        ({"noise": "none"}, "train.noise: 'uniform' there, 'none' now"),
        ({"vloss_weight": 1.0}, "train.vloss_weight: 10.0 there, 1.0 now"),
        (
            {"early": StageConfig(steps=13, learning_rate=1e-2, warmup=2, window=3)},
            "train.early.steps: 12 there, 13 now",
        ),
        (
            {
                "early": StageConfig(
                    steps=12, learning_rate=1e-2, warmup=2, window=3, step_weights=(2.0,)
                )
            },
            r"train.early.step_weights: None there, \[2.0\] now",
        ),
    ],
)
def test_a_folder_with_other_settings_is_refused(whole, stage, changes, named):
    config, _ = whole
    with pytest.raises(
        UserError,
        match=f"checkpoints/early holds a run with other settings .{named}.; delete it, set "
        "another",
    ):
        stage(replace(config, train=replace(config.train, **changes)))


def test_another_target_is_refused_by_name(whole, frozen):
    """Its state does not even fit; the message says whose it is."""
    config, _ = whole
    spec = DraftSpec.from_target(replace(TINY, intermediate_size=16))
    other = replace(config, target=TargetConfig(source="other"))
    with pytest.raises(UserError, match=r"target.source: 'tiny' there, 'other' now"):
        run_stage(
            "early",
            other,
            spec,
            init_draft(spec, jax.random.key(3)),
            frozen,
            ONE_DEVICE,
            loader_of(20, 1),
            None,
            Log(config),
        )


def test_settings_that_change_no_number_are_free(whole, stage):
    config, params = whole
    late = replace(config.train.late, steps=99)
    freed = replace(
        config,
        train=replace(config.train, late=late, checkpoint_every=7, loss_rows=99),
        log=LogConfig(every=1),
    )
    same_params(stage(freed), params)


# The draft on disk


@pytest.fixture
def draft() -> Draft:
    rng = np.random.default_rng(4)
    params = {
        name: jnp.asarray(rng.standard_normal(shape), jnp.float32)
        for name, shape in SPEC.param_shapes().items()
    }
    return Draft(
        SPEC,
        params,
        jnp.array([7, 3, 60, 0], jnp.int32),
        {"target": "tiny", "training": {"seed": 3}},
    )


def same_draft(found: Draft, expected: Draft) -> None:
    same_params(found.params, expected.params)
    assert found.spec == expected.spec and found.provenance == expected.provenance
    assert (found.hot_ids is None) == (expected.hot_ids is None)
    if expected.hot_ids is not None:
        assert found.hot_ids.dtype == jnp.int32
        np.testing.assert_array_equal(found.hot_ids, expected.hot_ids)


@pytest.mark.parametrize("hot", [True, False])
def test_a_draft_survives_the_disk_bit_for_bit(draft, tmp_path, hot):
    draft = draft if hot else replace(draft, hot_ids=None)
    save_draft(tmp_path / "new" / "draft", draft)
    same_draft(load_draft(tmp_path / "new" / "draft", TINY), draft)
    assert sorted(path.name for path in (tmp_path / "new" / "draft").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


def test_transposed_views_are_written_as_what_they_are(draft, tmp_path):
    turned = draft.params | {"q_proj": np.asarray(draft.params["q_proj"]).T}
    save_draft(tmp_path, replace(draft, params=turned))
    same_params(load_draft(tmp_path, TINY).params, turned)


@pytest.mark.parametrize("bug", ["transposed", "rounded", "hot ids sorted"])
def test_a_draft_that_changed_on_disk_is_seen(draft, tmp_path, bug):
    save_draft(tmp_path, draft)
    tensors = load_file(tmp_path / "model.safetensors")
    if bug == "transposed":
        tensors["self_attn.q_proj.weight"] = np.ascontiguousarray(
            tensors["self_attn.q_proj.weight"].T
        )
    elif bug == "rounded":
        tensors["mlp.up_proj.weight"] = (
            tensors["mlp.up_proj.weight"].astype(np.float16).astype(np.float32)
        )
    else:
        tensors["hot_tokens"] = np.sort(tensors["hot_tokens"])
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(
        UserError, match=r"settings and tensors are not those that config.json was written with"
    ):
        load_draft(tmp_path, TINY)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps({**config, "sha256": draft_digest(SPEC, tensors)})
    )
    with pytest.raises(AssertionError):
        same_draft(load_draft(tmp_path, TINY), draft)


def test_a_save_that_breaks_off_leaves_the_old_draft(draft, tmp_path, monkeypatch):
    save_draft(tmp_path, draft)

    def broken(path, tensors):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(draft_module, "write_tensors", broken)
    with pytest.raises(KeyboardInterrupt):
        save_draft(
            tmp_path,
            replace(draft, params={name: array + 1 for name, array in draft.params.items()}),
        )
    same_draft(load_draft(tmp_path, TINY), draft)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(draft, tmp_path, name):
    save_draft(tmp_path, draft)
    (tmp_path / name).unlink()
    with pytest.raises(
        UserError,
        match=rf"{tmp_path}/{name}: no such file; train a draft first .* or set draft.path",
    ):
        load_draft(tmp_path, TINY)


def test_a_broken_file_is_named(draft, tmp_path):
    save_draft(tmp_path, draft)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(
        UserError, match=rf"{weights}: cannot be read as safetensors .*; is the file whole\?"
    ):
        load_draft(tmp_path, TINY)
    config.write_text(config.read_text()[:100])
    with pytest.raises(UserError, match=rf"{config}: not JSON .*; is the file whole\?"):
        load_draft(tmp_path, TINY)
    config.write_text('{"model_type": "llama"}')
    with pytest.raises(
        UserError, match=rf"{config}: model_type is 'llama', expected 'beagle_draft'"
    ):
        load_draft(tmp_path, TINY)


def test_a_draft_of_another_target_is_refused(draft, tmp_path):
    save_draft(tmp_path, draft)
    other = replace(TINY, hidden_size=64, rope_theta=5e5)
    message = (
        r"belongs to another target \(hidden_size 32 there, 64 here; rope_theta 10000.0 there, "
        r"500000.0 here\)"
    )
    with pytest.raises(UserError, match=message):
        load_draft(tmp_path, other)
    save_draft(tmp_path, replace(draft, spec=replace(SPEC, init_std=0.5)))
    assert load_draft(tmp_path, TINY).params  # how a draft began does not matter
    with pytest.raises(
        UserError,
        match=r"belongs to another target \(it scores token 60, the vocabulary ends at 59\)",
    ):
        load_draft(tmp_path, replace(TINY, vocab_size=60))


def test_every_wrong_tensor_is_listed(draft, tmp_path):
    save_draft(tmp_path, draft)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["self_attn.q_norm.weight"] = tensors.pop("input_layernorm.weight")
    tensors["mlp.up_proj.weight"] = np.ascontiguousarray(tensors["mlp.up_proj.weight"].T)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError) as caught:
        load_draft(tmp_path, TINY)
    assert str(caught.value).splitlines() == [
        f"{tmp_path}/model.safetensors: not the weights of this draft:",
        "  missing tensor input_layernorm.weight [32]",
        "  extra tensor self_attn.q_norm.weight",
        "  mlp.up_proj.weight has shape [32, 48], expected [48, 32]",
    ]


def test_training_goes_on_from_a_draft(draft, tmp_path):
    save_draft(tmp_path, draft)
    fresh, target = config_for(tmp_path / "run"), SimpleNamespace(spec=TINY)
    config = replace(fresh, draft=DraftConfig(init=str(tmp_path)))
    same_params(given_draft(config, target).params, draft.params)
    assert given_draft(fresh, target) is None
    with pytest.raises(AssertionError):
        same_params(first_params(fresh, target, SPEC, ONE_DEVICE, None), draft.params)
    other = replace(fresh, draft=DraftConfig(init=str(tmp_path), kind="eagle"))
    with pytest.raises(
        UserError,
        match=f"{tmp_path}/config.json: model_type is 'beagle_draft', expected 'eagle_draft'",
    ):
        given_draft(other, target)
