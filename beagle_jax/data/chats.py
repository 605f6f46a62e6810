"""Reads prompts and chats from JSON files. Knows nothing of tokenizers or models.

A line of a .jsonl file, an entry of a .json file (one list, as ShareGPT is handed around) or a
record of a dataset
(data/hub.py) is one of
    {"messages": [{"role": "user", "content": "..."}, ...]}             chat, as OpenAI and Hugging
    Face write it
    {"conversations": [{"from": "human", "value": "..."}, ...]}         chat, as ShareGPT writes it
    {"turns": ["...", ...]}                                             user turns; the first is the
    prompt, the rest come later
    {"prompt": "..."}                                                   a prompt
A chat that ends with the user waits for the target's answer; one that ends with the assistant is
used as it is.
"""

import gzip
import json
import random
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import resources
from itertools import dropwhile, zip_longest
from pathlib import Path
from typing import Any

from tqdm import tqdm

from beagle_jax.errors import UserError

Message = dict[str, str]

_ROLES = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "system": "system",
}
_FORMS = 'expected "messages", "conversations", "turns" or "prompt"'


@dataclass(frozen=True)
class Chat:
    """Messages in order, and where they were read, for error messages."""

    messages: tuple[Message, ...]
    where: str  # file:line, or the place in its source
    kind: str = ""  # category of the prompt, if the file names one
    later: tuple[
        str, ...
    ] = ()  # what the user says next, once the target has answered; only evaluation asks it

    @property
    def waits_for_answer(self) -> bool:
        """The last word is the user's."""
        return self.messages[-1]["role"] == "user"

    @property
    def question(self) -> tuple[Message, ...]:
        """The messages before the first answer."""
        roles = [message["role"] for message in self.messages]
        return self.messages[: roles.index("assistant")] if "assistant" in roles else self.messages


def read_chats(source: str) -> list[Chat]:
    """All chats of a .jsonl, .jsonl.gz or .json file, or of a folder's .jsonl[.gz] files: shuffled
    and taken in turn.

    Raises UserError naming file and line for anything that is not a chat.
    """
    path = local_source(source)
    if path.is_dir():
        files = sorted([*path.glob("*.jsonl"), *path.glob("*.jsonl.gz")])
        if not files:
            raise UserError(f"data.source: the folder {path} holds no .jsonl or .jsonl.gz file")
        # In turn, so that a token budget takes from every file, and shuffled, as files are often
        # sorted by kind.
        in_turn = zip_longest(*(_shuffled(_read_file(file)) for file in files))
        return [chat for group in in_turn for chat in group if chat is not None]
    return _read_file(path)


def local_source(source: str) -> Path:
    """The file or folder that `data.source` names. Raises UserError when there is none."""
    path = Path(source).expanduser()
    if not (path.is_dir() or path.is_file()):
        raise UserError(
            f"data.source: {source!r} is not a file or folder; expected 'self', a .jsonl[.gz] "
            "or .json file, a folder of .jsonl[.gz] files, or hf:org/name"
        )
    return path


def own_prompts(split: str) -> list[Chat]:
    """The prompts committed with this package; split is 'train' or 'held_out'."""
    path = resources.files("beagle_jax.data") / "prompts.jsonl"
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [
        Chat(
            ({"role": "user", "content": record["prompt"]},),
            f"prompts.jsonl:{line}",
            record["kind"],
        )
        for line, record in enumerate(records, 1)
        if record["split"] == split
    ]


def _shuffled(chats: list[Chat]) -> list[Chat]:
    random.Random(0).shuffle(chats)
    return chats


def _read_file(path: Path) -> list[Chat]:
    records = _entries(path) if path.suffix == ".json" else json_lines(path)
    chats = list(chats_of(records, str(path)))
    if not chats:
        raise UserError(f"{path}: the file holds no chats")
    return chats


def json_lines(path: Path) -> Iterator[tuple[Any, str]]:
    """Record and place of every line of a .jsonl[.gz] file that is not blank. Raises UserError
    naming file and line.
    """
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    yield (
                        _json(line.decode("utf-8").rstrip(), f"{path}:{number}"),
                        f"{path}:{number}",
                    )
    except UnicodeDecodeError as error:
        raise UserError(f"{path}:{number}: not UTF-8 ({error})") from error
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(
            f"{path}:{number + 1}: cannot be read ({error}); is the file whole?"
        ) from error


def _entries(path: Path) -> Iterator[tuple[Any, str]]:
    """Record and place of every entry of a file that is one JSON list."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error})") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    records = _json(text, str(path))
    if not isinstance(records, list):
        raise UserError(
            f"{path}: a .json file must be one list of chats, found a {type(records).__name__}; "
            "name a file of one chat a line .jsonl"
        )
    yield from ((record, f"{path}, entry {number}") for number, record in enumerate(records, 1))


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise UserError(f"{where}: not JSON ({error.msg} at {line}column {error.colno})") from error
    except (
        ValueError,
        RecursionError,
    ) as error:  # a number of thousands of digits; thousands of brackets
        raise UserError(f"{where}: cannot be read ({error})") from error


def chats_of(records: Iterable[tuple[Any, str]], source: str) -> Iterator[Chat]:
    """The chats of records, each with its place; those without a question are left out and
    counted.
    """
    count = left_out = 0
    for record, where in records:
        count += 1
        chat = _chat(record, where)
        if chat is None:
            left_out += 1
        else:
            yield chat
    if left_out:
        tqdm.write(
            f"{source}: left out {left_out} of {count} conversations, which hold no question"
        )


def _chat(record: Any, where: str) -> Chat | None:
    """The chat of a record; None for a ShareGPT conversation that is empty or holds only answers
    (method.md 5.1).
    """
    if not isinstance(record, dict):
        raise UserError(f"{where}: the line is a {type(record).__name__}, not an object; {_FORMS}")
    record = {key: value for key, value in record.items() if value is not None or key == "prompt"}
    later: list[Message] = []
    if "messages" in record:
        messages = [
            _message(item, "role", "content", where)
            for item in _nonempty_list(record, "messages", where)
        ]
    elif "conversations" in record:
        turns = [
            _message(item, "from", "value", where) for item in _list(record, "conversations", where)
        ]
        # ShareGPT cuts long chats anywhere; leading answers have no question (method.md 5.1).
        messages = list(dropwhile(lambda message: message["role"] == "assistant", turns))
        if not any(message["role"] == "user" for message in messages):
            return None
    elif "turns" in record:
        turns = [
            _message({"role": "user", "content": text}, "role", "content", where)
            for text in _nonempty_list(record, "turns", where)
        ]
        messages, later = turns[:1], turns[1:]
    elif "prompt" in record:
        messages = [
            _message({"role": "user", "content": record["prompt"]}, "role", "content", where)
        ]
    else:
        raise UserError(f"{where}: the keys are {', '.join(record) or 'none'}; {_FORMS}")
    if not any(message["role"] == "user" for message in messages):
        raise UserError(f"{where}: the chat has no user message")
    if messages[-1]["role"] == "system":
        raise UserError(f"{where}: the chat ends with a system message; expected user or assistant")
    kind = str(record.get("category", record.get("kind", "")))
    return Chat(tuple(messages), where, kind, tuple(turn["content"] for turn in later))


def _list(record: dict[str, Any], key: str, where: str) -> list[Any]:
    if not isinstance(record[key], list):
        raise UserError(f"{where}: {key!r} must be a list")
    return record[key]


def _nonempty_list(record: dict[str, Any], key: str, where: str) -> list[Any]:
    if not (value := _list(record, key, where)):
        raise UserError(f"{where}: {key!r} must have at least one entry")
    return value


def _message(item: Any, role_key: str, text_key: str, where: str) -> Message:
    if not isinstance(item, dict) or role_key not in item or text_key not in item:
        raise UserError(
            f"{where}: a message needs {role_key!r} and {text_key!r}, found {item!r:.80}"
        )
    if not isinstance(item[role_key], str) or item[role_key] not in _ROLES:
        raise UserError(
            f"{where}: unknown role {item[role_key]!r}; expected one of {', '.join(_ROLES)}"
        )
    if not isinstance(item[text_key], str) or not item[text_key].strip():
        raise UserError(f"{where}: {text_key!r} of a message must be a non-empty string")
    check_text(item[text_key], where)
    return {"role": _ROLES[item[role_key]], "content": item[text_key]}


def check_text(text: Any, where: str) -> None:
    """Raises UserError for what no tokenizer takes: no string, or half a character, as in JSON that
    was cut inside of one.
    """
    if not isinstance(text, str):
        raise UserError(f"{where}: the text of a message is {text!r:.80}; expected a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: the text of a message is not Unicode ({error}); take half characters "
            "out of it"
        ) from error
