"""Speed at which the target generates training answers in batches.

    python benchmarks/writing_answers.py --config configs/quickstart.yaml

Prints answer tokens/s, prefill included and compilation excluded: the first run of the same shapes
is discarded.
"""

import argparse
import time

from tqdm import tqdm

from beagle_jax.config import load_config
from beagle_jax.corpus.writer import TargetWriter
from beagle_jax.data.chats import own_prompts
from beagle_jax.data.template import prompt_tokens
from beagle_jax.weights.target import load_target


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="configs/quickstart.yaml")
    parser.add_argument("--prompts", type=int, default=256)
    arguments = parser.parse_args()
    config = load_config(arguments.config)
    target = load_target(config.target.source, config.target.dtype, config.target.cache_dir)
    prompts = [
        prompt_tokens(target.tokenizer, chat.messages)
        for chat in own_prompts("train")[: arguments.prompts]
    ]
    write = TargetWriter(target, config.data)

    def timed(max_new: int) -> tuple[int, float]:
        clock = time.perf_counter()
        with tqdm(desc="writing", unit="tok", leave=False) as bar:
            answers = list(
                write(
                    prompts,
                    max_new=max_new,
                    temperature=config.data.temperature,
                    seed=0,
                    on_tokens=bar.update,
                )
            )
        return sum(len(answer.tokens) for answer in answers), time.perf_counter() - clock

    timed(config.data.max_answer_tokens)
    tokens, seconds = timed(config.data.max_answer_tokens)
    print(
        f"{len(prompts)} prompts, batch {config.data.batch}: {tokens} tokens in {seconds:.1f} "
        f"s = {tokens / seconds:.0f} tok/s"
    )


if __name__ == "__main__":
    main()
