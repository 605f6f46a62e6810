"""How batches are fed: readers, mapped files, memory used again, int8 scaled on the device."""

import gc
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from benchmark_cases import benchmark

from beagle_jax.data import loader as loader_module
from beagle_jax.data.buffers import Buffers
from beagle_jax.data.loader import Batch, BatchLoader
from beagle_jax.data.share import ALONE, Share
from beagle_jax.data.state_records import checksum
from beagle_jax.data.states import keep_states, target_states
from beagle_jax.data.template import Row
from beagle_jax.errors import UserError
from beagle_jax.training.frozen import FrozenTarget
from beagle_jax.training.step import with_states

WIDTH = 8
LENGTHS = (5, 9, 4, 7, 12, 3, 8, 6, 10, 11)
ROWS = [Row([n, *range(length - 1)], [True] * length) for n, length in enumerate(LENGTHS)]
TAPS = (1, 3)
PARAMS = {"embed_VD": np.zeros((2, WIDTH), np.float32)}


def stored(folder, dtype: str, taps: tuple[int, ...] = ()):
    """Random states of ROWS in a file."""
    rng = np.random.default_rng(7)
    width = WIDTH * (len(taps) + 1)
    states = [rng.standard_normal((len(row.tokens), width)).astype(np.float32) for row in ROWS]
    path = folder / f"{dtype}.states"
    keep_states(path, ROWS, states, dtype, taps)
    return target_states(PARAMS, SimpleNamespace(hidden_size=WIDTH), ROWS, path, dtype, taps)


def loader_of(states, **settings) -> BatchLoader:
    return BatchLoader(ROWS, states, **{"batch": 4, "row_tokens": 10, "seed": 0} | settings)


def batches_of(states, first: int, last: int, workers: int, count: int, **settings) -> list[Batch]:
    """The batches from step `first` on, put together from those of `count` processes."""
    shares = [Share(index, count) for index in range(count)] if count > 1 else [ALONE]
    loaders = [loader_of(states, share=share, workers=workers, **settings) for share in shares]
    return [
        jax.tree.map(lambda *parts: np.concatenate(parts), *[x.batch_at(step) for x in loaders])
        for step in range(first, last)
    ]


def check_same_batches(states, first: int, workers: int, count: int, **settings) -> None:
    """Checks batches against those of one reader in one process, from step 0 on; two epochs."""
    expected = batches_of(states, 0, 5, 1, 1, **settings)[first:]
    batches = batches_of(states, first, 5, workers, count, **settings)
    for whole, batch in zip(expected, batches, strict=True):
        jax.tree.map(np.testing.assert_array_equal, whole, batch)


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize(("workers", "count", "first"), [(1, 2, 0), (3, 1, 3), (2, 4, 1)])
def test_readers_processes_and_interruptions_change_nothing(
    tmp_path, dtype, workers, count, first, pack
):
    """`first` is the integer that a run resumes from."""
    check_same_batches(stored(tmp_path, dtype), first, workers, count, pack=pack)


def test_readers_that_swap_rows_are_seen(tmp_path, monkeypatch):
    right = loader_module._in_order

    def swapping(workers):
        each = right(workers)
        if workers == 1:
            return each
        return lambda call, lines: each(lambda line: call(line ^ (line < 2)), list(lines)[:-1])

    monkeypatch.setattr(loader_module, "_in_order", swapping)
    with pytest.raises(AssertionError):
        check_same_batches(stored(tmp_path, "bfloat16"), 0, 3, 1)


def test_an_error_of_a_reader_is_raised_by_the_batch(tmp_path):
    states = stored(tmp_path, "float32")
    path = tmp_path / "float32.states"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="row 9: the states are incomplete or were changed"):
        [loader_of(states, workers=3).batch_at(step) for step in range(4)]


def check_scaled_on_the_device(states, numbers: Batch, dtype) -> None:
    """Checks int8 batches against those of the loader's floats, bit for bit.

    numbers: the int8 batch. dtype: of the target.
    """
    assert numbers.inputs_BLI.dtype == np.int8
    expected = loader_of([np.asarray(x) for x in states], taps=TAPS).batch_at(0)
    assert expected.inputs_BLI.dtype == np.float32
    table = jnp.zeros((2, WIDTH), dtype)
    scaled = jax.jit(lambda batch: with_states(FrozenTarget(table, table), batch, TAPS))
    for array, wanted in zip(scaled(numbers), scaled(expected), strict=True):
        assert (array is None) == (wanted is None)
        if array is not None:
            np.testing.assert_array_equal(array, wanted)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_int8_states_are_shipped_as_int8_and_scaled_on_the_device(tmp_path, dtype):
    states = stored(tmp_path, "int8", TAPS)
    batch = loader_of(states, taps=TAPS).batch_at(0)
    assert batch.targets_BLD.dtype == np.int8 and batch.scale_BL.dtype == np.float32
    check_scaled_on_the_device(states, batch, dtype)


def test_the_scale_of_another_token_is_seen(tmp_path):
    states = stored(tmp_path, "int8", TAPS)
    batch = loader_of(states, taps=TAPS).batch_at(0)
    wrong = batch._replace(scale_BL=np.roll(batch.scale_BL, 1, axis=1))
    with pytest.raises(AssertionError):
        check_scaled_on_the_device(states, wrong, jnp.float32)


# Memory


def check_never_written_while_read(pool: Buffers, device: jax.Device) -> None:
    """Checks that arrays on the device keep their numbers while other batches are filled."""
    on_device = []
    for number in range(6):
        host_X = pool.empty((1024,), np.float32)
        host_X[:] = number
        on_device.append(jax.device_put(host_X, device))
        del host_X
    assert [set(np.asarray(x).tolist()) for x in on_device] == [{number} for number in range(6)]


def test_memory_is_not_written_while_a_device_reads_it():
    check_never_written_while_read(Buffers(spare=2), jax.devices()[0])


def test_memory_that_is_used_again_too_early_is_seen():
    class Early(Buffers):
        def empty(self, shape, dtype):
            array = super().empty(shape, dtype)
            self._free[array.nbytes].append(array.base.base.obj)
            return array

    with pytest.raises(AssertionError):
        check_never_written_while_read(Early(spare=2), jax.devices()[0])


def test_memory_returns_with_the_last_view():
    pool = Buffers(spare=1)
    first = pool.empty((2, 3), ml_dtypes.bfloat16)
    place, view = first.ctypes.data, first[1:]
    assert place % 64 == 0 and pool.empty((2, 3), np.int16).ctypes.data != place
    del first
    gc.collect()
    assert pool.empty((2, 3), np.int16).ctypes.data != place  # `view` still reads it
    del view
    gc.collect()
    assert pool.empty((3, 2), np.int16).ctypes.data == place


def test_the_padding_of_memory_used_again_is_zero(tmp_path):
    loader = loader_of(stored(tmp_path, "float32"))
    for step in range(6):
        batch = loader.batch_at(step)
        for line, length in enumerate(batch.length_BC[:, 0]):
            assert (
                batch.inputs_BLI[line, :length].all() and not batch.inputs_BLI[line, length:].any()
            )


# Files


def test_a_file_that_was_replaced_is_mapped_anew(tmp_path):
    first = [np.array(x) for x in stored(tmp_path, "float32")]
    keep_states(tmp_path / "float32.states", ROWS, [x + 1 for x in first], "float32")
    again = target_states(
        PARAMS, SimpleNamespace(hidden_size=WIDTH), ROWS, tmp_path / "float32.states", "float32"
    )
    np.testing.assert_array_equal(again[3], first[3] + 1)


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 4100])
def test_the_checksum_is_that_of_the_words(length):
    data = np.random.default_rng(length).integers(0, 256, length, np.uint8)
    padded = data.tobytes() + bytes(-length % 8)
    words = [int.from_bytes(padded[at : at + 8], "little") for at in range(0, len(padded), 8)]
    assert checksum(data) == sum(words) % 2**64
    at_odd_place = np.concatenate([data[:0], np.zeros(3, np.uint8), data])[3:]
    assert checksum(at_odd_place) == checksum(data)
    for place in range(0, length, 1000):
        changed = data.copy()
        changed[place] ^= 16
        assert checksum(changed) != checksum(data)


def test_files_with_the_checksums_of_version_0_1_0_are_checked(tmp_path):
    import json
    import zlib

    states = stored(tmp_path, "float32")
    index = tmp_path / "float32.states.json"
    content = json.loads(index.read_text())
    del content["sum64"]
    content["crc32"] = [zlib.crc32(np.asarray(x).tobytes()) for x in states]
    index.write_text(json.dumps(content))
    path, spec = tmp_path / "float32.states", SimpleNamespace(hidden_size=WIDTH)
    old = target_states(PARAMS, spec, ROWS, path, "float32")
    np.testing.assert_array_equal(old[1], states[1])
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="row 0: the states are incomplete or were changed"):
        np.asarray(old[0])


def test_feeding_at_toy_size(tmp_path, capsys):
    figures = benchmark("feeding").measure(
        tmp_path, "int8", (2, 16, 8), workers=(1, 2), repeats=1, steps=2, sleep=0.001
    )
    assert {"before", "after, 1", "after, 2"} <= set(figures)
    assert all(part["batch_seconds"] > 0 < part["step_over_sleep"] for part in figures.values())
    assert "x of before" in capsys.readouterr().out
