"""Prompts for evaluation: the committed ones, published suites, or any file of prompts.

A suite is read from its file in `eval.folder` if it exists, otherwise from the Hugging Face hub. No
suite's prompts are part of this repository.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from beagle_jax.data.chats import Chat, own_prompts, read_chats
from beagle_jax.data.records import json_lines
from beagle_jax.data.template import prompt_tokens
from beagle_jax.errors import UserError


@dataclass(frozen=True)
class Suite:
    """Where the prompts of a published suite are, and the user's wording (method.md 7.1).

    A record with a list of turns, in "turns" or in the column `turns`, is used as it is. The fields
    of any other record fill in `wording`.
    """

    file: str  # its name in `eval.folder`
    dataset: tuple[str, str | None, str] | None = None  # on the hub: id, configuration, split
    turns: str = "turns"  # the dataset's column of user turns
    wording: str = ""
    tasks: Mapping[str, str] = field(
        default_factory=dict
    )  # categories that the report counts under another one


# Spec-Bench lists MT-Bench, one of its six tasks, under these eight categories.
_OF_MT_BENCH = (
    "writing",
    "roleplay",
    "reasoning",
    "math",
    "coding",
    "extraction",
    "stem",
    "humanities",
)

SUITES = {
    "mt_bench": Suite(
        "mt_bench.jsonl.gz", ("HuggingFaceH4/mt_bench_prompts", None, "train"), turns="prompt"
    ),
    "gsm8k": Suite(
        "gsm8k_test.jsonl.gz",
        ("openai/gsm8k", "main", "test"),
        wording="{question}\nThink step by step, then give the answer on a last line after ####.",
    ),
    "cnn_dm": Suite(
        "cnn_dm.jsonl.gz",
        ("abisee/cnn_dailymail", "3.0.0", "test"),
        wording="Summarize this article in a few sentences.\n\n{article}",
    ),
    "humaneval": Suite(
        "humaneval.jsonl.gz",
        ("openai/openai_humaneval", None, "test"),
        wording="Complete this code.\n\n{prompt}",
    ),
    "alpaca": Suite(
        "alpaca.jsonl.gz", ("tatsu-lab/alpaca", None, "train"), wording="{instruction}\n{input}"
    ),
    # The 80 prompts per task that the EAGLE papers report on, and Spec-Bench, are files in those
    # projects' repositories.
    "eagle_gsm8k": Suite("eagle_gsm8k.jsonl.gz"),
    "eagle_humaneval": Suite("eagle_humaneval.jsonl.gz"),
    "eagle_cnn_dm": Suite("eagle_sum.jsonl.gz"),
    "spec_bench": Suite("spec_bench.jsonl.gz", tasks=dict.fromkeys(_OF_MT_BENCH, "mt_bench")),
}


def suite(source: str, limit: int | None, folder: str | None = None) -> list[Chat]:
    """Loads the prompts of the committed set, a published suite or a file; at most `limit`.

    folder: where suite files are looked for; None: nowhere.

    Raises: UserError for chats that end with an answer, for a suite that can neither be found nor
    downloaded, and for one without prompts.
    """
    if source == "held_out":
        chats = own_prompts("held_out")
    elif source in SUITES:
        path = None if folder is None else Path(folder).expanduser() / SUITES[source].file
        chats = list(_published(source, SUITES[source], path, limit))
    else:
        if not Path(source).expanduser().exists():
            raise UserError(
                f"eval.suites: {source!r} is not a file or folder; expected held_out, "
                f"{', '.join(SUITES)} or a .jsonl[.gz] file"
            )
        chats = read_chats(source)
    if not chats:
        raise UserError(
            f"eval.suites: {source} holds no prompts; is its file in eval.folder whole?"
        )
    for chat in chats:
        if not chat.waits_for_answer:
            raise UserError(
                f"{chat.where}: the chat ends with an answer; expected chats that end with a "
                "user message"
            )
    return chats[:limit]


def tokenize(chats: Sequence[Chat], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Returns the prompt tokens of each chat's first turn."""
    return [prompt_tokens(tokenizer, chat.messages) for chat in chats]


def _published(name: str, made: Suite, path: Path | None, limit: int | None) -> Iterator[Chat]:
    if path is not None and path.exists():
        records = json_lines(path)
    else:
        records = _downloaded(name, made, path, limit)
    for record, where in records:
        if not isinstance(record, dict):
            raise UserError(
                f"{where}: the line is a {type(record).__name__}, not an object; this is not a "
                f"record of {name}"
            )
        turns = record.get("turns", record.get(made.turns))
        if not isinstance(turns, list):
            try:
                turns = [
                    made.wording.format_map(
                        {key: value for key, value in record.items() if isinstance(value, str)}
                    ).strip()
                ]
            except KeyError as error:
                raise UserError(
                    f"{where}: the key {error} with text is missing (keys: {', '.join(record)}); "
                    f"this is not a record of {name}"
                ) from None
        if not turns or not all(isinstance(turn, str) and turn.strip() for turn in turns):
            raise UserError(f"{where}: expected user turns that are not empty, found {turns!r:.80}")
        category = str(record.get("category") or name)
        yield Chat(
            ({"role": "user", "content": turns[0]},),
            where,
            made.tasks.get(category, category),
            tuple(turns[1:]),
        )


def _downloaded(
    name: str, made: Suite, path: Path | None, limit: int | None
) -> Iterator[tuple[dict[str, Any], str]]:
    """Streams the records of the hub's dataset; reads no more than `limit`."""
    missing = "eval.folder is not set" if path is None else f"there is no {path}"
    if made.dataset is None:
        raise UserError(
            f"eval.suites: {name} is not on the hub and {missing}; set eval.folder to "
            f"the folder of {made.file}"
        )
    source, configuration, split = made.dataset
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise UserError(
            f"eval.suites: {missing}, and the hub needs the datasets library ({error}); "
            "pip install datasets, or set eval.folder"
        ) from error
    try:
        records = datasets.load_dataset(source, configuration, split=split, streaming=True)
        for number, record in enumerate(records if limit is None else records.take(limit), 1):
            yield record, f"hf:{source}[{split}], record {number}"
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"eval.suites: {missing}, and hf:{source} cannot be read ({error})"
        ) from error
