"""Chats of a source: accepted record formats, and rules that turn records into chats.

This module does not know tokenizers or models. A record has one of the formats

    {"messages": [{"role": "user", "content": ".."}, ..]}      OpenAI, Hugging Face
    {"conversations": [{"from": "human", "value": ".."}, ..]}  ShareGPT
    {"turns": ["..", ..]}    user turns: the first is the prompt, evaluation asks the others later
    {"prompt": ".."}         a prompt

and may also have the keys `system` (or `system_prompt`), `tools` and `documents`. The target
answers a chat that ends with a user message or with the result of a tool.

Rules (method.md 5.1): Role names of other projects are mapped (`human`, `gpt`, ..). Answers before
the first question are dropped. Consecutive user messages are joined by an empty line. A record that
is still unusable, because it has nothing to train on or its messages have no valid order, is
skipped and counted, and the first few are reported. Reading stops with an error if the share of
such records exceeds `data.max_bad_share`.
"""

import json
import logging
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import resources
from itertools import dropwhile, zip_longest
from pathlib import Path
from typing import Any, Literal

from beagle_jax.config import DataConfig
from beagle_jax.data.records import file_records
from beagle_jax.errors import UserError
from beagle_jax.remote import fetch

_log = logging.getLogger(__name__)

Message = dict[str, Any]  # role, content, and other fields that the chat template may read
Unread = Literal["ignore", "refuse"]  # what happens to fields that nothing reads

MAX_BAD_SHARE: float = DataConfig.model_fields["max_bad_share"].default
_EARLY_LOOK = 1000  # records after which an unusable source fails early
_NAMED = 3  # records reported for each fault

_ROLES = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "system": "system",
    "tool": "tool",
    "prompter": "user",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "developer": "system",
    "function": "tool",
    "observation": "tool",
}
_FORMS = 'expected "messages", "conversations", "turns" or "prompt"'
_SYSTEM = ("system", "system_prompt")
_FOR_TEMPLATE = ("tools", "documents")
_READ = (
    *("messages", "conversations", "turns", "prompt", "category", "kind"),
    *_SYSTEM,
    *_FOR_TEMPLATE,
)
NO_QUESTION = "no question"


class BadRecord(Exception):
    """A record that cannot be used for training; the message gives the reason."""


@dataclass(frozen=True)
class Chat:
    """Messages in order, and the place that they were read from."""

    messages: tuple[Message, ...]
    where: str  # file:line, or the record's number in its source
    kind: str = ""  # category of the prompt, if the file gives one
    later: tuple[str, ...] = ()  # the user's later turns; only evaluation asks them
    untrained: frozenset[int] = frozenset()  # message indices of answers with weight 0
    variables: Mapping[str, Any] = field(default_factory=dict)  # tools, documents, for the template

    @property
    def waits_for_answer(self) -> bool:
        """True if the last message is not the assistant's."""
        return self.messages[-1]["role"] != "assistant"

    @property
    def contexts(self) -> list[tuple[Message, ...]]:
        """The messages before each answer to write, without those before the previous one.

        Answers of weight 0, and answers that call tools, whose results follow, are not written
        anew: they are context.
        """
        contexts, begun = [], 0
        for index, message in enumerate(self.messages):
            if message["role"] != "assistant" or message.get("tool_calls"):
                continue
            if index not in self.untrained:
                contexts.append(self.messages[begun:index])
                begun = index + 1
        rest = self.messages[begun:]
        return [*contexts, rest] if rest and rest[-1]["role"] != "assistant" else contexts


def read_chats(
    source: str, max_bad_share: float = MAX_BAD_SHARE, unread: Unread = "ignore"
) -> list[Chat]:
    """Reads all chats of a .jsonl[.gz] or .json file, or of a folder of .jsonl[.gz] files.

    The files of a folder are shuffled, and their chats are interleaved. unread: `data.unread`.

    Raises:
        UserError: naming file and line, if a file cannot be read or has too many unusable records.
    """
    path = local_source(source)
    if path.is_dir():
        files = [
            file
            for file in sorted([*path.glob("*.jsonl"), *path.glob("*.jsonl.gz")])
            if not file.name.startswith("._")  # metadata files of macOS
        ]
        if not files:
            hint = f"; data.source=hf:{path} reads it" if (path / "snapshots").is_dir() else ""
            raise UserError(
                f"data.source: the folder {path} holds no .jsonl or .jsonl.gz file{hint}"
            )
        # Interleaved, so that a token budget takes chats from every file; shuffled, because files
        # are often sorted by kind.
        in_turn = zip_longest(
            *(_shuffled(_read_file(file, max_bad_share, unread)) for file in files)
        )
        return [chat for group in in_turn for chat in group if chat is not None]
    return _read_file(path, max_bad_share, unread)


def local_source(source: str) -> Path:
    """Returns the file or folder that `data.source` names.

    Raises:
        UserError: it does not exist.
    """
    path = fetch(source)
    if not (path.is_dir() or path.is_file()):
        raise UserError(
            f"data.source: {source!r} is not a file or folder; expected 'self', a .jsonl[.gz] "
            "or .json file, a folder of .jsonl[.gz] files, or hf:org/name"
        )
    return path


def own_prompts(split: str) -> list[Chat]:
    """Returns the prompts that this package contains. split: 'train' or 'held_out'."""
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


def _read_file(path: Path, max_bad_share: float, unread: Unread) -> list[Chat]:
    chats = list(chats_of(file_records(path), str(path), max_bad_share, unread))
    if not chats:
        raise UserError(f"{path}: the file holds no chats")
    return chats


class LeftOut:
    """Counts the skipped records of a source by fault; too many of them are an error."""

    def __init__(self, source: str, max_bad_share: float, report: Callable[[str], object]) -> None:
        self._source, self._max_bad_share, self._report = source, max_bad_share, report
        self._places: dict[str, list[str]] = {}  # fault -> places of its first records
        self._counts: dict[str, int] = {}
        self.seen = 0

    def add(self, fault: str, where: str) -> None:
        """Counts one of the `seen` records as skipped.

        Raises:
            UserError: too many of the first records were skipped (see `check`).
        """
        self._counts[fault] = self._counts.get(fault, 0) + 1
        places = self._places.setdefault(fault, [])
        if len(places) < _NAMED:
            places.append(where)
        if self.seen >= _EARLY_LOOK:
            self.check()

    def check(self) -> None:
        """Raises UserError if more than the allowed share of records was skipped.

        Conversations without a question do not count, as ShareGPT splits long chats at any message.
        """
        faults = {fault: n for fault, n in self._counts.items() if fault != NO_QUESTION}
        bad = sum(faults.values())
        if bad > self._max_bad_share * self.seen:
            first = next(iter(faults))
            raise UserError(
                f"{self._places[first][0]}: {first}; {bad} of the {self.seen} records read from "
                f"{self._source} cannot be used, more than data.max_bad_share = "
                f"{self._max_bad_share:g}; correct the file, or raise it to leave them out"
            )

    def tell(self) -> None:
        """Reports the skipped records; a second call reports nothing."""
        counts, self._counts = self._counts, {}
        if no_question := counts.pop(NO_QUESTION, 0):
            self._report(
                f"{self._source}: left out {no_question} of {self.seen} conversations without a "
                "question"
            )
        for fault, count in counts.items():
            named = ", ".join(self._places[fault]) + (", .." if count > _NAMED else "")
            self._report(
                f"{self._source}: left out {count} of {self.seen} records ({named}): {fault}"
            )


def chats_of(
    records: Iterable[tuple[Any, str]],
    source: str,
    max_bad_share: float = MAX_BAD_SHARE,
    unread: Unread = "ignore",
) -> Iterator[Chat]:
    """Turns (record, place) pairs into chats; unusable records are skipped and reported.

    unread: `data.unread`, for keys of records that no rule reads; each is named once.

    Raises:
        UserError: more than `max_bad_share` of the records are unusable, or `unread` is "refuse"
            and a record has such a key.
    """
    left_out = LeftOut(source, max_bad_share, _log.info)
    named: set[str] = set()
    try:
        for record, where in records:
            left_out.seen += 1
            try:
                chat = _chat(record, where)
            except BadRecord as error:
                left_out.add(str(error), where)
                continue
            if new := {key for key in record if key not in _READ} - named:
                named |= new
                listed = ", ".join(sorted(map(str, new)))
                if unread == "refuse":
                    raise UserError(
                        f"{where}: no rule reads the keys {listed}; take them out of the file, or "
                        "set data.unread: ignore"
                    )
                _log.info(f"{where}: not read: {listed}")
            yield chat
        left_out.check()
    finally:
        left_out.tell()


def _chat(record: Any, where: str) -> Chat:
    """Turns one record into a chat. Raises BadRecord if it is unusable."""
    if not isinstance(record, dict):
        raise BadRecord(f"the line is a {type(record).__name__}, not an object; {_FORMS}")
    given = {key: value for key, value in record.items() if value is not None or key == "prompt"}
    messages, later = _messages(given)
    messages = _with_system(messages, given)
    if "conversations" in given and not any(message["role"] == "user" for message in messages):
        raise BadRecord(NO_QUESTION)
    messages = _ordered(messages)
    untrained = {index for index, message in enumerate(messages) if not _trained(message)}
    return Chat(
        tuple(_without_weight(message) for message in messages),
        where,
        str(given.get("category", given.get("kind", ""))),
        tuple(later),
        frozenset(index for index in untrained if messages[index]["role"] == "assistant"),
        {key: _json_value(given[key], key) for key in _FOR_TEMPLATE if given.get(key)},
    )


def _messages(record: dict[str, Any]) -> tuple[list[Message], list[str]]:
    """Returns the messages of a record in any format, and the user's later turns."""
    if "messages" in record:
        items = _nonempty_list(record, "messages")
        return [_message(item, "role", "content") for item in items], []
    if "conversations" in record:
        items = _list(record, "conversations")
        return [_message(item, "from", "value") for item in items], []
    if "turns" in record:
        turns = [_user(text) for text in _nonempty_list(record, "turns")]
        return turns[:1], [turn["content"] for turn in turns[1:]]
    if "prompt" in record:
        return [_user(record["prompt"])], []
    raise BadRecord(f"the keys are {', '.join(map(str, record)) or 'none'}; {_FORMS}")


def _user(text: Any) -> Message:
    return _message({"role": "user", "content": text}, "role", "content")


def _with_system(messages: list[Message], record: dict[str, Any]) -> list[Message]:
    """Adds the record's system text as the first message.

    Raises BadRecord if the record has two different system texts.
    """
    given = [key for key in _SYSTEM if record.get(key)]
    if not given:
        return messages
    text = record[given[0]]
    if len(given) > 1 and record[given[1]] != text:
        raise BadRecord(f"{given[0]!r} and {given[1]!r} differ; remove one of them")
    first = _message({"role": "system", "content": text}, "role", "content")
    if messages and messages[0]["role"] == "system":
        if messages[0]["content"] != first["content"]:
            raise BadRecord(f"{given[0]!r} and the chat's first system message differ")
        return messages
    return [first, *messages]


def _ordered(messages: list[Message]) -> list[Message]:
    """Puts messages into an order that chat templates accept. Raises BadRecord if impossible."""
    opening = [message for message in messages[:1] if message["role"] == "system"]
    # Answers before the first question are dropped.
    rest = list(dropwhile(lambda message: message["role"] == "assistant", messages[len(opening) :]))
    joined: list[Message] = list(opening)
    for message in rest:
        last = joined[-1] if joined else None
        if last and last["role"] == message["role"] == "user" and _plain(last) and _plain(message):
            joined[-1] = {**last, "content": f"{last['content']}\n\n{message['content']}"}
            continue
        if last and last["role"] == message["role"] == "assistant" and not last.get("tool_calls"):
            raise BadRecord("an answer follows an answer; expected a user message between them")
        joined.append(message)
    if not any(message["role"] == "user" for message in joined):
        raise BadRecord("the chat has no user message")
    if joined[-1]["role"] == "system":
        raise BadRecord("the chat ends with a system message; expected user or assistant")
    return joined


def _plain(message: Message) -> bool:
    return set(message) == {"role", "content"}


def _list(record: dict[str, Any], key: str) -> list[Any]:
    value = _json_value(record[key], key)
    if not isinstance(value, list):
        raise BadRecord(f"{key!r} must be a list")
    return value


def _json_value(value: Any, key: str) -> Any:
    """Returns the value, parsed if it is a string of JSON (some datasets store lists so)."""
    if not isinstance(value, str) or value.strip()[:1] not in ("[", "{"):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise BadRecord(f"{key!r} is text that is not JSON") from error


def _nonempty_list(record: dict[str, Any], key: str) -> list[Any]:
    if not (value := _list(record, key)):
        raise BadRecord(f"{key!r} must have at least one entry")
    return value


def _message(item: Any, role_key: str, text_key: str) -> Message:
    """Returns a message with `role` and `content`, and its other fields that are not null."""
    if not isinstance(item, dict) or role_key not in item or text_key not in item:
        raise BadRecord(f"a message needs {role_key!r} and {text_key!r}, found {item!r:.80}")
    role = item[role_key]
    if not isinstance(role, str) or role.strip().lower() not in _ROLES:
        raise BadRecord(f"unknown role {role!r}; expected one of {', '.join(_ROLES)}")
    content = _joined_parts(item[text_key])
    spoken = any(item.get(key) for key in ("tool_calls", "reasoning_content"))
    if content is None and spoken:
        content = ""
    if not isinstance(content, str) or not (content.strip() or spoken):
        raise BadRecord(f"{text_key!r} of a message must be a non-empty string")
    _check_unicode(content)
    more = {
        key: value
        for key, value in item.items()
        if key not in (role_key, text_key) and value is not None
    }
    return {"role": _ROLES[role.strip().lower()], "content": content, **more}


def _joined_parts(content: Any) -> Any:
    """Joins text that is split into parts, as OpenAI's clients write it."""
    if not isinstance(content, list) or not content:
        return content
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text":
            return content
        if not isinstance(part.get("text"), str):
            return content
    return "".join(part["text"] for part in content)


def _trained(message: Message) -> bool:
    """Returns False for weight 0 or `train: false`.

    Raises BadRecord for a weight that is neither 0 nor 1.
    """
    weight = message.get("weight", message.get("train", 1))
    if weight not in (0, 1):
        raise BadRecord(f"the weight of a message is {weight!r}; expected 0 or 1")
    return bool(weight)


def _without_weight(message: Message) -> Message:
    return {key: value for key, value in message.items() if key not in ("weight", "train")}


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRecord(f"the text of a message is not Unicode ({error})") from error


def check_text(text: Any, where: str) -> None:
    """Raises UserError for text that no tokenizer accepts: not a string, or a lone surrogate."""
    if not isinstance(text, str):
        raise UserError(f"{where}: the text of a message is {text!r:.80}; expected a string")
    try:
        _check_unicode(text)
    except BadRecord as error:
        raise UserError(f"{where}: {error}; remove incomplete characters from it") from error
