"""Tokens per second of many prompts at once, by the number of rows that run together.

A round of several rows reads the weights once for all of them. Plain decoding gains from that too,
so the speedup of speculation falls with the batch; the report shows from which size on it is gone.
"""

from collections.abc import Sequence
from itertools import cycle, islice

from tqdm import tqdm

from beagle_jax.evaluation.answers import Case
from beagle_jax.evaluation.measure import Bench
from beagle_jax.evaluation.report import BatchFigures, Throughput

_ANSWERS_PER_ROW = 2  # of the largest batch; so that rows are refilled


def throughput(bench: Bench, cases: Sequence[Case], batches: Sequence[int]) -> list[Throughput]:
    """Measures every system at every batch size, on the same prompts.

    The prompts are the first turns of the cases, as many as two for each row of the largest batch,
    repeated if there are fewer. Compilation is not timed; reading the prompts is.

    batches: numbers of rows; empty measures nothing.
    """
    if not batches:
        return []
    firsts = [case.turns[0][bench.plain.name].prompt for case in cases]
    prompts = list(islice(cycle(firsts), _ANSWERS_PER_ROW * max(batches)))
    made = []
    for batch in tqdm(batches, desc="throughput", unit="batch size", leave=False):
        speeds = {}
        for system in bench.systems:
            most = bench.max_new_tokens
            system.decoder.warm_up(prompts, bench.sampling, batch=batch, max_new_tokens=most)
            answers = system.decoder.generate(
                prompts, bench.sampling, batch=batch, seed=bench.seed, max_new_tokens=most
            )
            speeds[system.name] = answers.tokens_per_second
        plain = speeds[bench.plain.name]
        figures = {
            name: BatchFigures(tokens_per_second=round(speed, 2), speedup=round(speed / plain, 4))
            for name, speed in speeds.items()
        }
        made.append(Throughput(batch=batch, answers=len(prompts), systems=figures))
    return made
