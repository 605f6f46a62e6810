"""tau of a draft on both turns of MT-Bench (not part of this repository; any .jsonl with "turns" will do).

    python benchmarks/mt_bench.py PATH/mt_bench.jsonl.gz --config configs/smollm2_135m.yaml --levels 5

Greedy chain, 96 new tokens, plain and speculative in one process; prints the table of `beagle_jax.evaluate`.
"""

import argparse

from beagle_jax.commands.evaluate import evaluate
from beagle_jax.config import load_config
from beagle_jax.evaluation.report import table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts")
    parser.add_argument("--config", default="configs/smollm2_135m.yaml")
    parser.add_argument("--levels", type=int, default=5)
    parser.add_argument("--limit", type=int, default=80)
    arguments = parser.parse_args()
    overrides = [f"eval.suites=[{arguments.prompts}]", "eval.max_new_tokens=96", f"eval.limit={arguments.limit}",
                 "decode.tree=chain", f"decode.levels={arguments.levels}"]
    print(table(evaluate(load_config(arguments.config, overrides))))


if __name__ == "__main__":
    main()
