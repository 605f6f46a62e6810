"""The answers of an evaluation on disk (answers.jsonl), one record per prompt.

A record is appended as soon as its prompt is answered, so an interrupted evaluation continues where
it stopped.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from beagle_jax.config import Config, Identity
from beagle_jax.decoding.requests import Answer
from beagle_jax.errors import BadFile, UserError
from beagle_jax.files import write_text


@dataclass(frozen=True)
class TimedAnswer(Answer):
    """An answer decoded as a batch of one, with its times in seconds."""

    prefill_seconds: float
    decode_seconds: float


class Asked(NamedTuple):
    """The prompt that one system received in one turn, and its answer.

    Systems can receive different prompts: a later turn contains the system's own earlier answers.
    """

    prompt: list[int]  # tokens
    answer: TimedAnswer


@dataclass(frozen=True)
class Case:
    """One prompt of a suite with all its turns, answered by every system."""

    suite: str
    number: int  # index of the prompt in its suite, from 0
    category: str
    turns: tuple[dict[str, Asked], ...]  # by turn, then by system


class AnswerLog:
    """The file answers.jsonl: a record of the settings, then one record per case.

    Records are only appended, each as a whole line.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        """Creates the file, or reads an existing one and drops an incomplete last line.

        settings: everything that determines the answers and their times.

        Raises: UserError if the file has other settings or cannot be parsed.
        """
        self._path = path
        self.cases: dict[tuple[str, int], Case] = {}
        settings = json.loads(json.dumps(settings))
        if not path.exists():
            write_text(path, json.dumps(settings) + "\n")
            return
        try:
            text = path.read_text(encoding="utf-8")
            whole = text[: text.rfind("\n") + 1]
            begun, *cases = map(json.loads, whole.splitlines())
            self.cases = {(record["suite"], record["number"]): _case(record) for record in cases}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadFile(
                path, f"not the answers of an evaluation ({error}); remove it to start again"
            ) from error
        if different := _differences(begun, settings):
            raise UserError(
                f"{path}: was written with other settings ({'; '.join(different)}); give another "
                "--out, or remove the file to start again"
            )
        if whole != text:
            write_text(path, whole)

    def add(self, case: Case) -> None:
        """Appends a case to the file."""
        self.cases[case.suite, case.number] = case
        turns = [
            {
                name: {"prompt": entry.prompt, "answer": _record(entry.answer)}
                for name, entry in turn.items()
            }
            for turn in case.turns
        ]
        record = {
            "suite": case.suite,
            "number": case.number,
            "category": case.category,
            "turns": turns,
        }
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")


def _case(record: dict[str, Any]) -> Case:
    turns = tuple(
        {name: Asked(entry["prompt"], _answer(entry["answer"])) for name, entry in turn.items()}
        for turn in record["turns"]
    )
    return Case(record["suite"], record["number"], record["category"], turns)


def _record(answer: TimedAnswer) -> dict[str, Any]:
    """What is kept of an answer that ended well, without log-probabilities."""
    left_out = ("logprobs", "error")
    return {name: value for name, value in asdict(answer).items() if name not in left_out}


def _answer(record: dict[str, Any]) -> TimedAnswer:
    """The answer of a record; version 0.1.0 called `finish` by another name."""
    if "stopped_by" in record:
        record = {**record, "finish": record["stopped_by"]}
        del record["stopped_by"]
    return TimedAnswer(**record)


def _differences(logged: dict[str, Any], requested: dict[str, Any]) -> list[str]:
    """Describes each setting that differs, by dotted key.

    Settings that do not affect answers, which version 0.1.0 also recorded, are ignored.
    """
    before, wanted = Identity.read(logged), Identity.read(requested)
    gone = {
        key: (value, None)
        for key, value in before.values.items()
        if key not in wanted.values and key.partition(".")[0] not in Config.model_fields
    }
    changed = sorted((wanted.diff(before) | gone).items())
    return [f"{key} {old!r} there, {new!r} here" for key, (old, new) in changed]
