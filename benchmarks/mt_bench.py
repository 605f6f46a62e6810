"""tau of a draft on MT-Bench, first turns unless set otherwise.

    python benchmarks/mt_bench.py PATH/mt_bench.jsonl.gz --config configs/smollm2_135m.yaml \\
        --levels 5

MT-Bench is not part of this repository; any .jsonl with "turns" works. Greedy chain, 96 new tokens,
plain and speculative decoding in one process. Prints the table of `beagle_jax.evaluate`.
"""

import argparse
import json
import tempfile
from pathlib import Path

from beagle_jax.commands.evaluate import evaluate
from beagle_jax.config import load_config
from beagle_jax.data.records import json_lines
from beagle_jax.evaluation.report import table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("prompts")
    parser.add_argument("--config", default="configs/smollm2_135m.yaml")
    parser.add_argument("--levels", type=int, default=5)
    parser.add_argument("--limit", type=int, default=80)
    parser.add_argument("--turns", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "turns.jsonl"
        records = [
            {**record, "turns": record["turns"][: arguments.turns]}
            for record, _ in json_lines(Path(arguments.prompts))
        ]
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        print(table(evaluate(load_config(arguments.config, overrides(path, arguments)))))


def overrides(path: Path, arguments: argparse.Namespace) -> list[str]:
    """Settings of a greedy chain on these prompts."""
    return [
        f"eval.suites=[{path}]",
        "eval.max_new_tokens=96",
        f"eval.limit={arguments.limit}",
        "decode.tree=chain",
        f"decode.levels={arguments.levels}",
    ]


if __name__ == "__main__":
    main()
