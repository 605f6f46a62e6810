"""Time of a decoding step and of a round against the capacity of the caches.

    python benchmarks/live_attention.py --json live.json

Decodes the same answer of SmolLM2 (about 52 live tokens) with caches of several capacities, plainly
and with the shipped draft in a tree of four nodes, in turn. Prints the median time of a step and of
a round, as ratios to the smallest capacity with 95 % intervals by bootstrap. With --all-keys
attention reads all keys of a cache, as version 0.1.0 did.
"""

import argparse
import json
import random
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from beside import PROMPT, SOURCE

from beagle_jax.decoding.decoder import SpeculativeDecoder
from beagle_jax.decoding.tree import dynamic_tree
from beagle_jax.model import attention
from beagle_jax.weights.draft import load_draft
from beagle_jax.weights.target import load_target

DRAFT = Path(__file__).resolve().parent.parent / "drafts" / "smollm2-135m"
NEW = 20


def seconds(decoder: SpeculativeDecoder) -> float:
    """Time of a round, without the prompt's."""
    answers = decoder.generate([PROMPT], max_new_tokens=NEW)
    return answers.decode_seconds / answers[0].rounds


def interval(ratios: list[float]) -> list[float]:
    """Median and 95 % interval, by bootstrap."""
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(ratios, k=len(ratios))) for _ in range(2000))
    return [round(x, 3) for x in (statistics.median(ratios), medians[50], medians[-51])]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--capacities", type=int, nargs="+", default=[320, 2048, 8256])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--all-keys", action="store_true", help="read all keys of a cache")
    parser.add_argument("--json", help="a file for the figures")
    arguments = parser.parse_args()
    if arguments.all_keys:
        attention.MANY_KEYS = 10**9
    target = load_target(SOURCE, "float32", "~/.cache/beagle_jax")
    draft, tree = load_draft(DRAFT, target.spec), dynamic_tree(levels=2, topk=3, nodes=4)
    decoders = {
        (kind, capacity): SpeculativeDecoder(target, *more, context=capacity - 64)
        for capacity in arguments.capacities
        for kind, more in (("step", ()), ("round", (draft, tree)))
    }
    times: dict = {key: [] for key in decoders}
    for repeat in range(arguments.repeats + 1):
        for key, decoder in decoders.items():
            taken = seconds(decoder)
            if repeat:  # the first one compiles
                times[key].append(taken)
        print(f"\r{repeat} of {arguments.repeats}", end="", file=sys.stderr, flush=True)
        time.sleep(0.05)
    print(file=sys.stderr)
    smallest, figures = arguments.capacities[0], {}
    for (kind, capacity), measured in times.items():
        ratios = [a / b for a, b in zip(measured, times[kind, smallest], strict=True)]
        figures[f"{kind} at {capacity}"] = {
            "ms": round(1e3 * statistics.median(measured), 2),
            "ratio": interval(ratios),
        }
        line = figures[f"{kind} at {capacity}"]
        print(f"{kind:6} capacity {capacity:6}: {line['ms']:8.2f} ms, ratio {line['ratio']}")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
