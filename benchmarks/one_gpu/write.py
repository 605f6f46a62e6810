"""Lets the target write training text: python -m benchmarks.one_gpu.write OUT

First answers all prompts greedily, then repeatedly with sampled answers, each pass with another
seed. Run by `__main__.py`, which stops it. The text is in OUT/work/text, in files of a few hundred
answers. A prompt answered in a pass is not answered in that pass again.
"""

import itertools
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from beagle_jax.config import Config, load_config
from beagle_jax.corpus.writer import TargetWriter, Writer
from beagle_jax.data.chats import Chat, own_prompts
from beagle_jax.data.fingerprint import fingerprints
from beagle_jax.data.source import source_chats
from beagle_jax.data.template import Row, prompt_tokens
from beagle_jax.data.vocabulary import check_ids
from beagle_jax.errors import UserError, run_main
from beagle_jax.weights.target import Target, configured_target
from benchmarks.one_gpu.parts import Settings, finish, read_settings
from benchmarks.one_gpu.text_files import Text, prompt_id, rows_of, save_text

BLOCK = 4096  # prompts per call of the writer, which takes the shortest first
SAVED = 256  # answers per file
TEMPERATURE = 0.8  # of the sampled passes; the first is greedy
# The decoder compiles for each size, so use fewer and larger batches than a config for a CPU.
ON_AN_ACCELERATOR = ("data.batch=512", "data.max_answer_tokens=160")


def config_of(settings: Settings) -> Config:
    """Returns the config for writing answers; the user's own settings take precedence."""
    given = [] if settings.prompts is None else [f"data.source={settings.prompts}"]
    larger = () if settings.toy else ON_AN_ACCELERATOR
    return load_config(settings.config, [*larger, *given, *settings.overrides])


def chats_of(config: Config, named: bool) -> list[Chat]:
    """Returns the prompts to answer.

    named: the user named them, so a missing file is an error.
    """
    source = config.data.source
    if source == "self" or not (named or Path(source).expanduser().exists()):
        if source != "self":
            print(f"data.source: there is no {source}; the target answers the package's prompts")
        return own_prompts("train")
    return [chat for chat in source_chats(config.data) if chat.waits_for_answer]


def passes(
    prompts: Sequence[list[int]], out: Path, folder: str
) -> Iterator[tuple[int, list[list[int]]]]:
    """Yields each pass's number and its prompts without an answer; pass 0 is greedy."""
    for number in itertools.count():
        kind, own = ("greedy", "greedy") if number == 0 else ("drawn", f"drawn{number:03d}")
        files = [*(out / "work" / "text").glob(f"part-{own}-*.npz")]
        files += Path(folder).glob(f"part-*{kind}-*.npz") if number < 2 else []
        answered = {tuple(row.prompt) for row in rows_of(sorted(files))}
        yield number, [prompt for prompt in prompts if tuple(prompt) not in answered]


def blocks(
    prompts: list[list[int]], write: Writer, config: Config, number: int
) -> Iterator[list[Text]]:
    """Yields the answers of one pass in groups to save.

    When few rows of the batch are busy, a block ends early and its last prompts move to the next
    block. Otherwise the writer would continue with ever smaller batches and compile for each.
    """
    waiting, ready = list(prompts), []
    while waiting:
        block, waiting = waiting[:BLOCK], waiting[BLOCK:]
        least = min(config.data.batch, len(block)) // 2 if waiting else 0
        missing = dict(enumerate(block))
        answers = write(
            block,
            max_new=config.data.max_answer_tokens,
            temperature=TEMPERATURE if number else 0.0,
            seed=config.data.seed + 1000 * number + len(waiting),
            on_tokens=lambda count: None,
        )
        for answer in answers:
            prompt = missing.pop(answer.index)
            ready.append(Text(prompt, list(map(int, answer.tokens)), prompt_id(prompt)))
            if len(ready) == SAVED:
                yield ready
                ready = []
            if len(missing) <= least:
                break
        waiting = list(missing.values()) + waiting
    if ready:
        yield ready


def write_text(out: Path, config: Config, target: Target, chats: Sequence[Chat], text: str) -> None:
    """Writes pass after pass and never returns."""
    prompts = [prompt_tokens(target.tokenizer, chat.messages, chat.where) for chat in chats]
    prompts = [prompt for prompt in prompts if len(prompt) <= config.data.max_prompt_tokens]
    if not prompts:
        raise UserError(
            f"data.max_prompt_tokens is {config.data.max_prompt_tokens}, but each of "
            f"{len(chats)} prompts is longer; raise it"
        )
    rows = [Row(prompt, [False] * len(prompt)) for prompt in prompts]
    check_ids(rows, target.spec.vocab_size, "the prompts", target.tokenizer)
    random.Random(config.data.seed).shuffle(prompts)
    write = TargetWriter(target, config.data)
    for number, waiting in passes(prompts, out, text):
        name = "greedy" if number == 0 else f"drawn{number:03d}"
        print(f"pass {number} ({name}): {len(waiting)} of {len(prompts)} prompts", flush=True)
        there = len(list((out / "work" / "text").glob(f"part-{name}-*.npz")))
        for place, rows in enumerate(blocks(waiting, write, config, number), there):
            save_text(out / "work" / "text" / f"part-{name}-{place:05d}.npz", rows)


def main(argv: Sequence[str]) -> None:
    """Entry point."""
    out = Path(argv[0])
    settings = read_settings(out)
    config = config_of(settings)
    chats = chats_of(config, settings.prompts is not None)
    target = configured_target(config.target, decoding=True)
    made_for = {"target": config.target.source, **fingerprints(target.params, target.tokenizer)}
    finish(out, "write-target", {"prompts": len(chats), **made_for})
    write_text(out, config, target, chats, settings.text)


if __name__ == "__main__":
    sys.exit(run_main(main))
