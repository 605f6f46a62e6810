"""A Beagle draft of several layers through the commands: trained, exported, imported."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from convert_cases import from_torch, make_place, refused, to_torch, torch_draft

from beagle_jax import prepare, train
from beagle_jax.corpus import fill
from beagle_jax.data.folder import read_parts, states_path
from beagle_jax.data.states import target_states
from beagle_jax.data.target_forward import states_in_memory
from beagle_jax.errors import run_main
from beagle_jax.model.beagle import BeagleSpec
from beagle_jax.weights import torch_export
from beagle_jax.weights.draft import Draft, load_draft, save_draft

pytestmark = pytest.mark.usefixtures("shared_steps")
SETTINGS = {
    "draft": {"state_layers": [0, 1], "num_kv_heads": 4, "intermediate_size": 40},
    "train": {
        "batch": 4,
        "row_tokens": 80,
        "early": {"steps": 2, "warmup": 1, "learning_rate": 1e-3},
        "late": {"steps": 2, "warmup": 1, "learning_rate": 1e-3},
    },
    "decode": {"levels": 2, "tree": "chain"},
    "log": {"every": 1},
}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> SimpleNamespace:
    """A target, answered chats, a draft that was trained on them, and a config."""
    place = make_place(tmp_path_factory.mktemp("layers"))
    lines = [
        json.dumps(
            {
                "messages": [
                    {"role": "user", "content": f"What is {number}?"},
                    {"role": "assistant", "content": f"{number} is {number}."},
                ]
            }
        )
        for number in range(8)
    ]
    (place.folder / "chats.jsonl").write_text("\n".join(lines) + "\n")
    settings = SETTINGS | {
        "target": {"source": str(place.folder / "target")},
        "data": {
            "source": str(place.folder / "chats.jsonl"),
            "folder": str(place.folder / "data"),
        },
        "train": SETTINGS["train"] | {"folder": str(place.folder / "run")},
    }
    place.config = str(place.folder / "run.yaml")
    (place.folder / "run.yaml").write_text(yaml.safe_dump(settings))
    assert run_main(train.main, ["--config", place.config]) == 0
    return place


def draft_of(place, run: str) -> Draft:
    return load_draft(place.folder / run / "draft", place.target.spec, BeagleSpec)


def test_it_trains_from_streams_on_disk(workplace):
    draft = draft_of(workplace, "run")
    D = workplace.target.spec.hidden_size
    assert (draft.spec.state_layers, draft.spec.num_kv_heads) == ((0, 1), 4)
    assert draft.spec.intermediate_size == 40 and draft.params["k_layers"].any()
    index = json.loads((workplace.folder / "data/part-0000.states.json").read_text())
    # the streams, and the states once
    assert (index["taps"], index["shape"][1]) == ([0, 1], 3 * D)


def test_prepare_announces_the_disk_of_all_streams(workplace, tmp_path, capsys):
    folder = f"data.folder={tmp_path / 'data'}"
    assert run_main(prepare.main, ["--config", workplace.config, folder]) == 0
    printed = capsys.readouterr()
    width = 3 * workplace.target.spec.hidden_size
    assert f"tokens x {width} in float32" in printed.out + printed.err


def test_online_streams_train_the_same_draft(workplace):
    run = f"train.folder={workplace.folder / 'online'}"
    assert run_main(train.main, ["--config", workplace.config, run, "data.states=online"]) == 0
    stored, online = (draft_of(workplace, name) for name in ("run", "online"))
    for name, array in stored.params.items():
        # 1e-4: four steps of AdamW on streams computed in batches of other widths
        np.testing.assert_allclose(online.params[name], array, atol=1e-4, err_msg=name)


def _written_anew(workplace, folder) -> None:
    """Checks the states of answers that the target writes, and that some were written."""
    spec, params = workplace.target.spec, workplace.target.params
    more = ["data.answers=regenerate", "data.max_answer_tokens=5", f"data.folder={folder}"]
    assert run_main(prepare.main, ["--config", workplace.config, *more, "--quiet"]) == 0
    rows = read_parts(folder)[0]
    stored = target_states(params, spec, rows, states_path(folder, 0), None, (0, 1))
    assert rows
    for row, states in zip(rows, stored, strict=True):
        length = np.array([[len(row.tokens)]])
        [right_LI] = states_in_memory(params, spec, np.array([row.tokens]), length, (0, 1))
        # 1e-4: sums in another order
        np.testing.assert_allclose(np.asarray(states), right_LI, rtol=1e-4, atol=1e-4)


def test_answers_that_the_target_writes_get_their_streams_too(workplace, tmp_path):
    """The writer gives states after the final norm alone, so they are computed after it."""
    _written_anew(workplace, tmp_path / "data")


def test_planted_bug_the_states_of_the_writer_are_stored(workplace, tmp_path, monkeypatch):
    rows_of = fill.training_rows
    monkeypatch.setattr(
        fill, "training_rows", lambda *a, keeps_states, **k: rows_of(*a, keeps_states=True, **k)
    )
    with pytest.raises(AssertionError):
        _written_anew(workplace, tmp_path / "data")


def test_training_does_not_go_on_from_other_layers(workplace, capsys):
    more = [
        f"draft.init={workplace.folder / 'run' / 'draft'}",
        f"train.folder={workplace.folder / 'never'}",
        f"data.folder={workplace.folder / 'elsewhere'}",
        "draft.state_layers=[1]",
    ]
    message = refused(capsys, run_main(train.main, ["--config", workplace.config, *more]))
    assert "reads the target's streams [0, 1], and draft.state_layers stands for [1]" in message


@pytest.fixture(scope="module")
def random_layers(workplace):
    """The trained draft with streams that matter."""
    draft = draft_of(workplace, "run")
    params, rng = dict(draft.params), np.random.default_rng(3)
    for name in ("k_layers", "v_layers", "q_proj", "o_proj"):
        params[name] = 0.2 * rng.standard_normal(params[name].shape).astype(np.float32)
    save_draft(workplace.folder / "layers", Draft(draft.spec, params, None, draft.provenance))
    return workplace


def test_the_torch_export_comes_back_bit_equal(random_layers, tmp_path):
    place = random_layers
    assert to_torch(place, "layers", tmp_path / "torch") == 0
    assert json.loads((tmp_path / "torch/config.json").read_text())["state_layers"] == [0, 1]
    assert from_torch(place, tmp_path / "torch", tmp_path / "back") == 0
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "back" / name).read_bytes() == (
            place.folder / "layers" / name
        ).read_bytes()
    # torch reads the streams of a transformers model, and decodes the target's own text
    module, ids = torch_draft(tmp_path / "torch"), torch.tensor([[5, 9, 200, 31]])
    expected = place.model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20
    )
    for tree in (dict(levels=3), dict(paths=[(0,), (1,), (0, 0)])):
        assert torch.equal(module.generate(place.model, ids, 20, **tree).sequences, expected)


@pytest.mark.parametrize(
    ("old", "new"),
    [(" * size_BS11", ""), ("self.self_attn.k_layers(x", "self.self_attn.v_layers(x")],
    ids=["streams in unit size", "values for keys"],
)
def test_a_planted_bug_in_the_export_leaves_no_folder(
    random_layers, tmp_path, monkeypatch, capsys, old, new
):
    right = torch_export.module_source
    assert old in right("modeling_beagle")
    monkeypatch.setattr(torch_export, "module_source", lambda name: right(name).replace(old, new))
    status = to_torch(random_layers, "layers", tmp_path / "out")
    assert "differ from those of the JAX block: states by" in refused(capsys, status)
    assert not any(tmp_path.iterdir())
