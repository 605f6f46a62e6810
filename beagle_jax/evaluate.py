"""Measures a draft: python -m beagle_jax.evaluate --config configs/quickstart.yaml"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from beagle_jax.command import add_overrides, parser, read_config
from beagle_jax.config import Config
from beagle_jax.decoding.decoder import SpeculativeDecoder
from beagle_jax.decoding.sampling import sampling_of
from beagle_jax.decoding.tuning import decoder_of
from beagle_jax.errors import UsageError, run_main
from beagle_jax.evaluation.report import summary, table
from beagle_jax.evaluation.suites import measure, suite, tokenize
from beagle_jax.weights.draft import load_draft
from beagle_jax.weights.target import load_target


def main(argv: Sequence[str]) -> None:
    """Entry point."""
    made = parser("evaluate", "Compare speculative with plain decoding on the same prompts.",
                  "python -m beagle_jax.evaluate --config configs/quickstart.yaml eval.limit=10")
    made.add_argument("--json", metavar="FILE", help="also write the figures to this file")
    add_overrides(made)
    arguments = made.parse_args(argv)
    config = read_config(arguments)
    if arguments.json and not Path(arguments.json).parent.is_dir():
        raise UsageError(f"--json {arguments.json}: there is no folder {Path(arguments.json).parent}")
    summaries = evaluate(config)
    print(table(summaries))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(summaries, indent=1) + "\n", encoding="utf-8")


def evaluate(config: Config) -> list[dict]:
    """Figures of plain decoding, of the draft, and of `eval.compare` if there is one."""
    chats = suite(config.eval.prompts, config.eval.limit)
    target = load_target(config.target.source, config.target.dtype, config.target.cache_dir)
    folders = [config.draft.path or f"{config.train.folder}/draft"]
    if config.eval.compare:
        folders.append(config.eval.compare)
    drafts = {folder: load_draft(folder, target.spec) for folder in folders}
    prompts = tokenize(chats, target.tokenizer)
    limit = config.eval.max_new_tokens
    context = max(map(len, prompts)) + limit  # one cache size for all
    decoders = {"plain": SpeculativeDecoder(target, context=context)}
    for name, draft in drafts.items():
        decoders[name] = decoder_of(config, target, draft, context=context)
    results = measure(decoders, prompts, limit, sampling_of(config.decode))
    return [summary(result, results[0]) for result in results]


if __name__ == "__main__":
    sys.exit(run_main(main))
