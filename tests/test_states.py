"""Stored states: each dtype, damage, full disks, and old files without checksums."""

import json
import resource
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

from beagle_jax.data import state_records, states
from beagle_jax.data.loader import BatchLoader
from beagle_jax.data.states import is_stored, keep_states, states_bytes, target_states
from beagle_jax.data.template import Row
from beagle_jax.errors import UserError

WIDTH = 16
SPEC = SimpleNamespace(hidden_size=WIDTH)
PARAMS = {"embed_VD": np.zeros((2, WIDTH), np.float32)}  # says the target's dtype
ROWS = [Row(list(range(length)), [True] * length) for length in (5, 1, 9)]


def some_states() -> list[np.ndarray]:
    """Makes states that differ greatly in size from token to token.

    One is zero: an answer's last token was never read.
    """
    rng = np.random.default_rng(0)
    made = [rng.standard_normal((len(row.tokens), WIDTH)).astype(np.float32) for row in ROWS]
    made[2][3] *= 1000
    made[0][-1] = 0
    return made


@pytest.fixture
def path(tmp_path):
    return tmp_path / "part-0000.states"


def read(path, dtype=None) -> list[np.ndarray]:
    return [np.asarray(states) for states in target_states(PARAMS, SPEC, ROWS, path, dtype)]


def check_close(stored, dtype: str) -> None:
    """Checks that the error is at most half a step of the dtype's grid.

    The grid is that of each number (bfloat16) or of the token's largest number (int8).
    """
    for was, now in zip(some_states(), stored, strict=True):
        largest = np.abs(was).max(axis=1, keepdims=True)
        step = {"float32": 0 * largest, "bfloat16": np.abs(was) / 256, "int8": largest / 254}[dtype]
        assert (np.abs(now.astype(np.float32) - was) <= step * 1.0001).all()


@pytest.mark.parametrize(("dtype", "size"), [("float32", 64), ("bfloat16", 32), ("int8", 20)])
def test_states_come_back_as_near_as_their_dtype_allows(path, dtype, size, monkeypatch):
    monkeypatch.setattr(states, "_compute", lambda *_: pytest.fail("computed again"))
    keep_states(path, ROWS, some_states(), dtype)
    assert path.stat().st_size == states_bytes(ROWS, WIDTH, dtype) == 15 * size
    stored = read(path, dtype)
    assert stored[0].dtype == (ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32)
    check_close(stored, dtype)


def test_one_scale_for_a_whole_row_is_seen(path, monkeypatch):
    """One scale per row, that of its largest token, would lose the digits of small states."""

    def coarse(states_LD, dtype):
        records = np.empty(len(states_LD), state_records.int8_record(WIDTH))
        scale = np.abs(states_LD).max() / 127 or 1.0
        records["state"], records["scale"] = np.rint(states_LD / scale), scale
        return records.tobytes()

    monkeypatch.setattr(states, "encode", coarse)
    keep_states(path, ROWS, some_states(), "int8")
    with pytest.raises(AssertionError):
        check_close(read(path, "int8"), "int8")


def test_each_row_can_be_read_alone(path):
    keep_states(path, ROWS, some_states())
    stored = target_states(PARAMS, SPEC, ROWS, path)
    assert [states.shape for states in stored] == [(5, WIDTH), (1, WIDTH), (9, WIDTH)]
    np.testing.assert_array_equal(stored[2], some_states()[2])


def test_a_changed_byte_names_its_row(path):
    keep_states(path, ROWS, some_states())
    data = bytearray(path.read_bytes())
    data[6 * WIDTH * 4 + 3] ^= 1  # row 2
    path.write_bytes(data)
    stored = target_states(PARAMS, SPEC, ROWS, path)
    np.testing.assert_array_equal(stored[1], some_states()[1])
    with pytest.raises(
        UserError, match=r"part-0000.states, row 2: the states are incomplete or were changed"
    ):
        np.asarray(stored[2])


def test_a_file_cut_off_is_not_taken_for_whole(path, monkeypatch):
    keep_states(path, ROWS, some_states())
    path.write_bytes(path.read_bytes()[:-1])
    assert not is_stored(path, ROWS, WIDTH, "float32")
    monkeypatch.setattr(states, "_compute", lambda *_: enumerate(some_states()))
    check_close(read(path), "float32")  # written anew


@pytest.mark.parametrize("text", ["", "[]", '{"shape": [15, 16'])
def test_a_damaged_index_is_named(path, text):
    keep_states(path, ROWS, some_states())
    path.with_suffix(".states.json").write_text(text)
    with pytest.raises(
        UserError, match=r"part-0000.states.json: .*; delete it and run prepare or train again"
    ):
        target_states(PARAMS, SPEC, ROWS, path)


def test_an_index_that_lacks_a_row_is_not_taken_for_whole(path):
    keep_states(path, ROWS, some_states())
    index = path.with_suffix(".states.json")
    content = json.loads(index.read_text())
    index.write_text(json.dumps(content | {"sum64": content["sum64"][:-1]}))
    assert not is_stored(path, ROWS, WIDTH, "float32")


def test_files_without_checksums_are_still_read(path, monkeypatch):
    """Versions before checksums wrote the same records and a shorter index."""
    monkeypatch.setattr(states, "_compute", lambda *_: pytest.fail("computed again"))
    keep_states(path, ROWS, some_states())
    index = path.with_suffix(".states.json")
    old = {
        key: value
        for key, value in json.loads(index.read_text()).items()
        if key in ("shape", "dtype", "tokens_sha256")
    }
    index.write_text(json.dumps(old))
    check_close(read(path), "float32")


def test_a_write_that_fails_leaves_nothing_and_says_so(path):
    """The system refuses to let the file grow, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
    try:
        with pytest.raises(
            UserError,
            match=r"part-0000.states: the target's states cannot be written .*; earlier parts "
            r"are kept",
        ):
            keep_states(path, ROWS, some_states())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(path.parent.iterdir()) == []


# Taps


def tapped_states() -> list[np.ndarray]:
    """Makes two streams in front of the states after the final norm."""
    return [np.concatenate([last + 1, last + 2, last], axis=1) for last in some_states()]


def test_stored_states_say_which_streams_stand_before_them(path, monkeypatch):
    monkeypatch.setattr(states, "_compute", lambda *_: pytest.fail("computed again"))
    keep_states(path, ROWS, tapped_states(), taps=(3, 7))
    assert json.loads(states._index(path).read_text())["taps"] == [3, 7]
    stored = target_states(PARAMS, SPEC, ROWS, path, taps=(3, 7))
    assert [states.shape for states in stored] == [(5, 48), (1, 48), (9, 48)]
    for states_LI, expected in zip(stored, tapped_states(), strict=True):
        np.testing.assert_array_equal(np.asarray(states_LI), expected)


@pytest.mark.parametrize(
    ("there", "wanted", "words"),
    [
        ((), (3, 7), "the target's final norm alone, and this draft reads the target's streams"),
        ((3, 7), (), "the target's streams [3, 7], and this draft reads the target's final norm"),
        (
            (3, 7),
            (7, 3),
            "the target's streams [3, 7], and this draft reads the target's streams",
        ),
    ],
)
def test_states_of_other_streams_are_refused(path, there, wanted, words):
    keep_states(path, ROWS, tapped_states() if there else some_states(), taps=there)
    with pytest.raises(UserError) as caught:
        target_states(PARAMS, SPEC, ROWS, path, taps=wanted)
    assert f"{path}: holds states of {words}" in str(caught.value)
    assert "set another data.folder, or delete part-0000.states" in str(caught.value)


def test_files_of_before_there_were_taps_hold_the_final_norm_alone(path, monkeypatch):
    monkeypatch.setattr(states, "_compute", lambda *_: pytest.fail("computed again"))
    keep_states(path, ROWS, some_states())
    index = json.loads(states._index(path).read_text())
    del index["taps"]
    states._index(path).write_text(json.dumps(index))
    check_close(read(path), "float32")
    with pytest.raises(UserError, match="holds states of the target's final norm alone"):
        target_states(PARAMS, SPEC, ROWS, path, taps=(3,))


@pytest.mark.parametrize("taps", [0, 2])
def test_a_batch_has_inputs_and_targets_apart_only_where_they_differ(taps):
    rows = [Row([1, 2, 3, 4, 5], [True] * 5), Row([6, 7, 8], [True] * 3)]
    states = [
        np.arange(len(row.tokens) * 4 * (taps + 1), dtype=np.float32).reshape(len(row.tokens), -1)
        for row in rows
    ]
    loader = BatchLoader(rows, states, batch=2, row_tokens=5, seed=0, taps=(0, 1)[:taps])
    batch = next(loader.samples(1, 2 * 5))
    line = int(np.flatnonzero(batch.length_BC[:, 0] == 5)[0])
    np.testing.assert_array_equal(batch.predicted_BLD[line], states[0][:, -4:])
    if taps:
        np.testing.assert_array_equal(batch.inputs_BLI[line], states[0][:, :-4])
    else:
        assert batch.targets_BLD is None and batch.predicted_BLD is batch.inputs_BLI
