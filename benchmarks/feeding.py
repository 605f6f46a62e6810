"""Time to read training batches, and what a step waits for them: before and after, in one process.

    python benchmarks/feeding.py --json benchmarks/results/feeding.json
    pip install grain    # then the same command also measures grain's threads

The batches are those of 7B targets: 16 rows of 2048 states of width 4096, from files in the page
cache. Three ways of reading take turns:

    before      version 0.1.0 (commit 8faa6d8): opens and reads the file for each row, CRC-32 of
                each row, int8 scaled on the host, rows joined, batch filled; one thread reads, the
                caller copies to the device
    after, N    this version with data.workers=N: mapped files, int8 shipped as int8, memory used
                again, copies to the device by a thread
    grain, N    grain's threads (ReadOptions) over this version's batches, each with one worker

`batch` is the time from the request of a batch to its arrays in host memory; `step` the time of a
step that sleeps 0.1 s, with everything before it, over 0.1 s, as the mean of four in a row. The
best of several is given, as other work of the machine only ever adds time, and the median beside
it. Every way's batches are compared with those of the first. `batch_over_copy` is
the time of a batch over that of a plain copy of its bytes, which is what the machine can do.
"""

import argparse
import json
import os
import platform
import statistics
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from beagle_jax.config import MeshConfig
from beagle_jax.data.loader import Batch, BatchLoader
from beagle_jax.data.prefetch import AHEAD, read_ahead
from beagle_jax.data.states import StoredStates, keep_states, target_states
from beagle_jax.data.template import Row
from beagle_jax.sharding import make_mesh, place_rows

ROWS, LENGTH, WIDTH = 16, 2048, 4096  # of one batch
BATCHES = 2  # in the files: an epoch
SLEEP = 0.1  # seconds of the step


def stored(
    folder: Path, dtype: str, rows: int, length: int, width: int
) -> tuple[list, list[StoredStates]]:
    """Writes a file of random states, if it is not there; returns rows and states."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{dtype}-{rows * BATCHES}x{length}x{width}.states"
    text = [Row([number % 100] * length, [True] * length) for number in range(rows * BATCHES)]
    params = {"embed_VD": np.zeros((1, width), np.float32)}
    spec = argparse.Namespace(hidden_size=width)
    if not path.exists():
        rng = np.random.default_rng(0)
        block = rng.standard_normal((length, width), np.float32).astype(ml_dtypes.bfloat16)
        keep_states(path, text, [np.roll(block, n, axis=0) for n in range(len(text))], dtype)
    return text, target_states(params, spec, text, path, dtype)


class Before:
    """Reads states as version 0.1.0 did; the rest of the batch comes from this version."""

    def __init__(self, loader: BatchLoader, states: list[StoredStates], order: Any):
        self._loader, self._states, self._order = loader, states, order
        self._crc: dict[int, int] = {}

    def batch_at(self, step: int) -> Batch:
        parts = [np.concatenate([self._read(index)]) for index in self._order(step)]
        states_BLI = np.zeros((len(parts), *parts[0].shape), parts[0].dtype)
        for line, states_LD in enumerate(parts):
            states_BLI[line, : len(states_LD)] = states_LD
        return self._loader.batch_at(step)._replace(inputs_BLI=states_BLI)

    def _read(self, index: int) -> np.ndarray:
        states = self._states[index]
        length, width = states.shape
        record = width + 4 if states.dtype == "int8" else width * 2
        with states.path.open("rb") as stream:
            stream.seek(states.start)
            data = stream.read(length * record)
        # The file of this version has no CRC: the first reading, which is not timed, computes it.
        if zlib.crc32(data) != self._crc.setdefault(index, zlib.crc32(data)):
            raise ValueError(f"row {index} was changed")
        if states.dtype != "int8":
            return np.frombuffer(data, ml_dtypes.bfloat16).reshape(length, width)
        kind = np.dtype([("state", np.int8, (width,)), ("scale", np.float32)])
        records = np.frombuffer(data, kind)
        return records["state"].astype(np.float32) * records["scale"][:, None]


def ahead_before(
    batch_at: Callable[[int], Any], steps: Iterable[int], place: Callable[[Any], Any]
) -> Iterator[Any]:
    """Version 0.1.0: one thread reads ahead, and the caller copies to the device."""
    steps = iter(steps)
    with ThreadPoolExecutor(max_workers=1) as reader:
        coming = deque(reader.submit(batch_at, step) for step in islice(steps, AHEAD))
        while coming:
            ready = coming.popleft().result()
            coming.extend(reader.submit(batch_at, step) for step in islice(steps, 1))
            yield place(ready)


def ahead_grain(
    batch_at: Callable[[int], Any],
    steps: Iterable[int],
    place: Callable[[Any], Any],
    threads: int,
) -> Iterator[Any]:
    """The same batches by grain: its threads read, copies are made ahead by one more."""
    import grain

    dataset = grain.MapDataset.source(range(10**9)).map(batch_at)
    ahead = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(AHEAD, threads))
    batches = iter(dataset.to_iter_dataset(ahead))
    return read_ahead(lambda step: next(batches), steps, place)


Ahead = Callable[..., Iterator[Any]]


def ways(
    text: list[Row], states: list[StoredStates], rows: int, workers: list[int]
) -> dict[str, tuple[Callable[[int], Batch], Ahead]]:
    """Returns, by name, how each way reads a batch and how it reads ahead."""
    settings: Any = dict(batch=rows, row_tokens=len(text[0].tokens), seed=0)
    loaders = {
        number: BatchLoader(text, states, **settings, workers=number) for number in {1, *workers}
    }
    plain = BatchLoader(text, None, **settings)

    def order(step: int) -> list[int]:
        epoch, place = divmod(step, plain.steps_per_epoch)
        return plain._order(epoch)[place * rows : (place + 1) * rows].tolist()

    made: dict[str, tuple[Callable[[int], Batch], Ahead]] = {
        "before": (Before(plain, states, order).batch_at, ahead_before)
    }
    for number in workers:
        made[f"after, {number}"] = (loaders[number].batch_at, read_ahead)
    try:
        import grain  # noqa: F401
    except ImportError:
        print("grain is not installed: its side is left out")
        return made
    for number in workers:
        made[f"grain, {number}"] = (loaders[1].batch_at, partial(ahead_grain, threads=number))
    return made


def batch_seconds(batch_at: Callable[[int], Batch], ahead: Ahead, steps: int) -> list[float]:
    """Returns the seconds of each of some batches; of grain the mean, as its threads read ahead."""
    if isinstance(ahead, partial):
        batches = ahead(batch_at, range(steps + 1), lambda batch: batch)
        next(batches)
        clock = time.perf_counter()
        for _ in batches:
            pass
        return [(time.perf_counter() - clock) / steps]
    seconds = []
    for step in range(steps):
        clock = time.perf_counter()
        batch_at(step)
        seconds.append(time.perf_counter() - clock)
    return seconds


def step_ratio(batch_at: Callable[[int], Batch], ahead: Ahead, steps: int, sleep: float) -> float:
    """Returns the time of a step that sleeps, over the sleep; the first batch is not counted."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    batches = ahead(batch_at, range(steps + 1), partial(place_rows, mesh=mesh))
    jax.block_until_ready(next(batches))
    clock = time.perf_counter()
    time.sleep(sleep)
    for number, batch in enumerate(batches, 1):
        jax.block_until_ready(batch)
        if number < steps:
            time.sleep(sleep)
    return (time.perf_counter() - clock) / steps / sleep


def copy_seconds(states: list[StoredStates], there_X: np.ndarray) -> float:
    """Returns the seconds of a plain copy of a batch's bytes from a mapped file."""
    mapped_X = np.memmap(states[0].path, np.uint8, mode="r")[: len(there_X)]
    clock = time.perf_counter()
    np.copyto(there_X, mapped_X)
    return time.perf_counter() - clock


def same(first: Batch, other: Batch) -> bool:
    """Whether two batches hold the same numbers, whatever form their states have."""
    pairs = zip(first.scaled(), other.scaled(), strict=True)
    return all(x is y is None or np.array_equal(x, y) for x, y in pairs)


def measure(
    folder: Path,
    dtype: str,
    shape: tuple[int, int, int] = (ROWS, LENGTH, WIDTH),
    workers: tuple[int, ...] = (1, 2, 4),
    repeats: int = 7,
    steps: int = 4,
    sleep: float = SLEEP,
) -> dict[str, dict[str, Any]]:
    """Measures all ways in turn; returns their figures by name, and prints them.

    Raises: ValueError if a way gives other batches than the first.
    """
    text, states = stored(folder, dtype, *shape)
    made = ways(text, states, shape[0], list(workers))
    first = made["before"][0]
    for name, (batch_at, _) in made.items():
        if not all(same(first(step), batch_at(step)) for step in range(BATCHES + 1)):
            raise ValueError(f"{name}: other batches than before")
    seconds: dict[str, list[float]] = {name: [] for name in made}
    ratios: dict[str, list[float]] = {name: [] for name in made}
    copies, there_X = [], np.ones(states[0].path.stat().st_size // BATCHES, np.uint8)
    for _ in range(repeats):
        copies += [copy_seconds(states, there_X) for _ in range(steps)]
        for name, way in made.items():
            seconds[name] += batch_seconds(*way, steps)
            ratios[name].append(step_ratio(*way, steps, sleep))
    size = np.prod(shape) * (1 if dtype == "int8" else 2)
    figures = {
        name: {
            "batch_seconds": min(seconds[name]),
            "batch_seconds_median": statistics.median(seconds[name]),
            "gigabytes_per_second": size / min(seconds[name]) / 1e9,
            "step_over_sleep": min(ratios[name]),
            "step_over_sleep_median": statistics.median(ratios[name]),
            "batch_over_copy": min(seconds[name]) / min(copies),
            "times_faster_than_before": min(seconds["before"]) / min(seconds[name]),
        }
        for name in made
    }
    print(
        f"{dtype}, {' x '.join(map(str, shape))}, {size / 1e6:.0f} MB, best of {repeats}; a "
        f"plain copy takes {min(copies) * 1e3:.1f} ms"
    )
    for name, way in figures.items():
        print(
            f"{name:10} batch {way['batch_seconds'] * 1e3:7.1f} ms (median "
            f"{way['batch_seconds_median'] * 1e3:.1f}), {way['gigabytes_per_second']:5.2f} GB/s, "
            f"{way['times_faster_than_before']:.2f}x of before; step "
            f"{way['step_over_sleep']:.3f} (median {way['step_over_sleep_median']:.3f})",
            flush=True,
        )
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/feeding"), help="for the files")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "int8"])
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path, help="figures to this file too")
    arguments = parser.parse_args()
    figures: dict[str, Any] = {}
    if arguments.json and arguments.json.exists():  # other dtypes stay
        figures = json.loads(arguments.json.read_text())
    for dtype in arguments.dtypes:
        figures[dtype] = {
            "machine": f"{os.cpu_count()} cores, {platform.machine()}, {jax.default_backend()}",
            "load": round(os.getloadavg()[0], 1),  # processes that wanted a core at the start
            "shape": [ROWS, LENGTH, WIDTH],
            "best_of": arguments.repeats,
            "ways": measure(
                arguments.folder, dtype, workers=tuple(arguments.workers), repeats=arguments.repeats
            ),
        }
        if arguments.json:
            arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
