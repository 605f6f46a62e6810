"""All answers of an evaluation on disk, a line for each prompt as soon as it is answered, so that a
run can go on.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from beagle_jax.config import Config, Identity
from beagle_jax.decoding.requests import Answer
from beagle_jax.errors import UserError
from beagle_jax.files import write_text


@dataclass(frozen=True)
class TimedAnswer(Answer):
    """An answer that was written alone, and its time."""

    prefill_seconds: float
    decode_seconds: float


class Asked(NamedTuple):
    """One prompt as one way of decoding saw it, and its answer."""

    prompt: list[int]  # tokens
    answer: TimedAnswer


@dataclass(frozen=True)
class Case:
    """One prompt of a suite, with all its turns, answered by every way of decoding."""

    suite: str
    number: int  # of the prompt in its suite, from 0
    category: str
    turns: tuple[
        dict[str, Asked], ...
    ]  # of each turn, what each way of decoding was asked and wrote


class AnswerLog:
    """answers.jsonl: a line of settings, then a line for each case. The file only grows, by whole
    lines.
    """

    def __init__(self, path: Path, settings: dict[str, Any]):
        """Begins the file or reads what it has; a last line that was cut off is dropped.

        settings: all that decides the answers and their times. Raises UserError when the file was
        begun with others.
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
            raise UserError(
                f"{path}: not the answers of an evaluation ({error}); remove it to begin anew"
            ) from error
        if different := _differences(begun, settings):
            raise UserError(
                f"{path}: was begun with other settings ({'; '.join(different)}); give another "
                "--out, or remove the file to begin anew"
            )
        if whole != text:
            write_text(path, whole)

    def add(self, case: Case) -> None:
        """Appends a case."""
        self.cases[case.suite, case.number] = case
        turns = [
            {
                name: {"prompt": entry.prompt, "answer": asdict(entry.answer)}
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
        {
            name: Asked(entry["prompt"], TimedAnswer(**entry["answer"]))
            for name, entry in turn.items()
        }
        for turn in record["turns"]
    )
    return Case(record["suite"], record["number"], record["category"], turns)


def _differences(logged: dict[str, Any], requested: dict[str, Any]) -> list[str]:
    """Settings that differ, and facts of drafts, trees, prompts and machine, by dotted names.

    Settings that decide no answer, which 0.1.0 kept too, are passed over.
    """
    before, wanted = Identity.read(logged), Identity.read(requested)
    gone = {
        key: (value, None)
        for key, value in before.values.items()
        if key not in wanted.values and key.partition(".")[0] not in Config.model_fields
    }
    changed = sorted((wanted.diff(before) | gone).items())
    return [f"{key} {old!r} there, {new!r} here" for key, (old, new) in changed]
