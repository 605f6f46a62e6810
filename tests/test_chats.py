"""Reading chats: every input form, and every error with its file and line."""

import gzip
import json
from collections import Counter

import pytest

from beagle_jax.data.chats import Chat, chats_of, own_prompts, read_chats
from beagle_jax.errors import UserError

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}
SYSTEM = {"role": "system", "content": "Be brief"}
GOOD = json.dumps({"prompt": "Hi"})


@pytest.fixture
def write(tmp_path):
    """Writes lines (objects become JSON) to a file in tmp_path and returns its path as text."""

    def write(*lines, name: str = "chats.jsonl") -> str:
        text = "".join(
            (line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines
        )
        data = text.encode("utf-8")
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return str(tmp_path / name)

    return write


def error_of(source: str) -> str:
    with pytest.raises(UserError) as caught:
        read_chats(source)
    assert caught.value.exit_status == 1
    return str(caught.value)


@pytest.mark.parametrize(
    ("record", "messages", "waits"),
    [
        ({"messages": [USER]}, [USER], True),
        ({"messages": [SYSTEM, USER, ANSWER]}, [SYSTEM, USER, ANSWER], False),
        ({"messages": [USER, ANSWER, USER]}, [USER, ANSWER, USER], True),
        ({"messages": [USER | {"name": "x"}]}, [USER | {"name": "x"}], True),
        ({"messages": [{"role": "human", "content": "Hi"}]}, [USER], True),
        (
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]},
            [USER, ANSWER],
            False,
        ),
        (
            {
                "conversations": [
                    {"from": "system", "value": "Be brief"},
                    {"from": "human", "value": "Hi"},
                ]
            },
            [SYSTEM, USER],
            True,
        ),
        ({"turns": ["Hi", "and then?"]}, [USER], True),
        ({"prompt": "Hi"}, [USER], True),
        ({"prompt": "Hi", "answer": "ignored"}, [USER], True),
    ],
)
def test_input_forms(write, record, messages, waits):
    path = write(record)
    (chat,) = read_chats(path)
    assert chat == Chat(tuple(messages), f"{path}:1", later=tuple(record.get("turns", "x")[1:]))
    assert chat.waits_for_answer == waits


def test_sharegpt_leading_answer_is_dropped(write):
    turns = [
        {"from": "gpt", "value": "cut off"},
        {"from": "human", "value": "Hi"},
        {"from": "gpt", "value": "Yo"},
    ]
    (chat,) = read_chats(write({"conversations": turns}))
    assert chat.messages == (USER, ANSWER)


def test_conversations_without_a_question_are_left_out_and_counted(write, capsys):
    answer, question = {"from": "gpt", "value": "Yo"}, {"from": "human", "value": "Hi"}
    path = write(
        {"conversations": [answer]}, {"conversations": []}, {"conversations": [question, answer]}
    )
    (chat,) = read_chats(path)
    assert chat == Chat((USER, ANSWER), f"{path}:3")
    assert "left out 2 of 3 conversations without a question" in capsys.readouterr().out
    assert "the file holds no chats" in error_of(write({"conversations": [answer]}))


def test_a_conversation_of_answers_alone_does_not_end_the_reading(write, capsys):
    answer, question = {"from": "gpt", "value": "Yo"}, {"from": "human", "value": "Hi"}
    system = {"from": "system", "value": "Be brief"}
    path = write(
        {"conversations": [answer, answer]},
        {"conversations": [system, answer]},
        {"conversations": [question, answer]},
    )
    assert [chat.where for chat in read_chats(path)] == [f"{path}:3"]
    assert "left out 2 of 3 conversations without a question" in capsys.readouterr().out


def test_a_json_file_is_one_list(write, tmp_path):
    answer, question = {"from": "gpt", "value": "Yo"}, {"from": "human", "value": "Hi"}
    path = tmp_path / "sharegpt.json"
    path.write_text(
        json.dumps([{"id": "x", "conversations": [question, answer]}, {"prompt": "Hi"}], indent=1)
    )
    assert list(read_chats(str(path))) == [
        Chat((USER, ANSWER), f"{path}, entry 1"),
        Chat((USER,), f"{path}, entry 2"),
    ]
    path.write_text(json.dumps([{"prompt": "Hi"}, {"text": "Hi"}]))
    assert error_of(str(path)).startswith(f"{path}, entry 2: the keys are text; expected")
    path.write_text(json.dumps({"prompt": "Hi"}))
    assert "a .json file must be one list of chats, found a dict" in error_of(str(path))
    path.write_text("[\n{]")
    assert error_of(str(path)).startswith(f"{path}: not JSON (") and "line 2, column 2" in error_of(
        str(path)
    )


def test_contexts_are_what_stands_before_each_answer_to_write():
    again = {"role": "user", "content": "And?"}
    chat = Chat((SYSTEM, USER, ANSWER, again, ANSWER), "x")
    assert chat.contexts == [(SYSTEM, USER), (again,)]
    assert Chat((USER,), "x").contexts == [(USER,)]
    assert Chat((USER, ANSWER, again), "x").contexts == [(USER,), (again,)]
    few_shot = Chat((USER, ANSWER, again, ANSWER), "x", untrained=frozenset({1}))
    assert few_shot.contexts == [(USER, ANSWER, again)]
    call = ANSWER | {"tool_calls": [{"function": {"name": "add"}}]}
    result = {"role": "tool", "content": "4"}
    assert Chat((USER, call, result, ANSWER), "x").contexts == [(USER, call, result)]
    assert Chat((USER, call), "x").contexts == []


def test_kind_comes_from_category_or_kind(write):
    path = write(
        {"prompt": "Hi", "category": "math"}, {"prompt": "Hi", "kind": "poem"}, {"prompt": "Hi"}
    )
    assert [chat.kind for chat in read_chats(path)] == ["math", "poem", ""]


def test_text_is_kept_as_it_is(write):
    text = " caf\u00e9\u2028\u00e9t\u00e9 \n\tzwei "
    lines = [json.dumps({"prompt": text}, ensure_ascii=False), GOOD]
    assert [chat.messages[0]["content"] for chat in read_chats(write(*lines))] == [text, "Hi"]


def test_blank_lines_are_skipped_but_counted(write):
    path = write("", GOOD, "   ", GOOD + "\r")
    assert [chat.where for chat in read_chats(path)] == [f"{path}:2", f"{path}:4"]


def test_packed_files_are_read_too(write):
    path = write(GOOD, {"turns": ["Why?"]}, name="chats.jsonl.gz")
    questions = [(chat.messages[0]["content"], chat.where) for chat in read_chats(path)]
    assert questions == [("Hi", f"{path}:1"), ("Why?", f"{path}:2")]


def test_files_of_a_folder_are_taken_in_turn(write, tmp_path):
    for name, count in (("a.jsonl", 1), ("b.jsonl.gz", 3), ("c.jsonl", 2)):
        write(*({"prompt": f"{name[0]}{number}"} for number in range(count)), name=name)
    write("not read", name="notes.txt")
    texts = [chat.messages[0]["content"] for chat in read_chats(str(tmp_path))]
    assert [text[0] for text in texts] == ["a", "b", "c", "b", "c", "b"]
    assert sorted(texts) == ["a0", "b0", "b1", "b2", "c0", "c1"]
    assert texts == [chat.messages[0]["content"] for chat in read_chats(str(tmp_path))]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "Hi"', "not JSON (Expecting ',' delimiter at column 16)"),
        ("Hi", "not JSON (Expecting value at column 1)"),
        (
            [USER],
            'the line is a list, not an object; expected "messages", "conversations", "turns" '
            'or "prompt"',
        ),
        ("null", "the line is a NoneType, not an object"),
        (
            {"text": "Hi", "id": 3},
            'the keys are text, id; expected "messages", "conversations", "turns" or "prompt"',
        ),
        ({}, 'the keys are none; expected "messages"'),
        ({"messages": []}, "'messages' must have at least one entry"),
        ({"messages": "Hi"}, "'messages' must be a list"),
        ({"conversations": "Hi"}, "'conversations' must be a list"),
        ({"turns": []}, "'turns' must have at least one entry"),
        ({"messages": ["Hi"]}, "a message needs 'role' and 'content', found 'Hi'"),
        (
            {"messages": [{"role": "user"}]},
            "a message needs 'role' and 'content', found {'role': 'user'}",
        ),
        ({"conversations": [USER]}, "a message needs 'from' and 'value', found {'role': 'user'"),
        (
            {"messages": [USER, {"role": "narrator", "content": "4"}]},
            "unknown role 'narrator'; expected one of user, human, assistant",
        ),
        (
            {"messages": [{"role": ["user"], "content": "4"}]},
            "unknown role ['user']; expected one of user",
        ),
        (
            {"messages": [{"role": "user", "content": " \n"}]},
            "'content' of a message must be a non-empty string",
        ),
        (
            {"messages": [{"role": "user", "content": [{"text": "Hi"}]}]},
            "'content' of a message must be a non-empty string",
        ),
        (
            {"conversations": [{"from": "human", "value": ""}]},
            "'value' of a message must be a non-empty string",
        ),
        ({"prompt": None}, "'content' of a message must be a non-empty string"),
        (
            '{"prompt": "caf\\udce9"}',
            "the text of a message is not Unicode ('utf-8' codec can't encode character "
            "'\\udce9' in position 3",
        ),
        ('{"prompt": %s}' % ("1" * 5000), "cannot be read (Exceeds the limit"),
        ("[" * 200_000, "cannot be read (maximum recursion depth exceeded"),
        ({"turns": [""]}, "'content' of a message must be a non-empty string"),
        ({"messages": [ANSWER]}, "the chat has no user message"),
        ({"messages": [SYSTEM]}, "the chat has no user message"),
        (
            {"messages": [USER, SYSTEM]},
            "the chat ends with a system message; expected user or assistant",
        ),
    ],
)
def test_bad_line_is_named(write, line, message):
    path = write(GOOD, "", line, GOOD)
    assert error_of(path).startswith(f"{path}:3: {message}")


def test_error_in_a_packed_file_names_the_line(write):
    path = write(GOOD, "{", name="chats.jsonl.gz")
    assert error_of(path).startswith(f"{path}:2: not JSON")


def test_not_utf8_names_the_line(write, tmp_path):
    path = write(*[GOOD] * 4)
    data = (tmp_path / "chats.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "chats.jsonl").write_bytes(
        b"".join([*data[:2], b'{"prompt": "caf\xe9"}\n', *data[2:]])
    )
    assert error_of(path).startswith(f"{path}:3: not UTF-8")


@pytest.mark.parametrize("damage", ["cut", "overwritten", "not gzip"])
def test_broken_gzip_is_named(write, tmp_path, damage):
    path = write(
        *({"prompt": f"{number * 7919 % 1000003}"} for number in range(2000)), name="chats.jsonl.gz"
    )
    whole = (tmp_path / "chats.jsonl.gz").read_bytes()
    half = len(whole) // 2
    broken = {
        "cut": whole[:half],
        "overwritten": whole[:half] + bytes(64) + whole[half + 64 :],
        "not gzip": b"Hi" + whole[2:],
    }
    (tmp_path / "chats.jsonl.gz").write_bytes(broken[damage])
    message = error_of(path)
    assert (
        message.startswith(path) and "cannot be read" in message and "is the file whole?" in message
    )


def test_empty_sources(write, tmp_path):
    path = write("", "  ")
    assert error_of(path) == f"{path}: the file holds no chats"
    assert error_of(write(name="none.jsonl")).endswith("none.jsonl: the file holds no chats")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").touch()
    folder = tmp_path / "folder"
    assert (
        error_of(str(folder))
        == f"data.source: the folder {folder} holds no .jsonl or .jsonl.gz file"
    )


def test_missing_source_names_the_choices(tmp_path):
    source = str(tmp_path / "none.jsonl")
    assert (
        error_of(source)
        == f"data.source: {source!r} is not a file or folder; expected 'self', a .jsonl[.gz] "
        "or .json file, a folder of .jsonl[.gz] files, or hf:org/name"
    )


def test_own_prompts_are_many_varied_and_unique():
    train, held_out = own_prompts("train"), own_prompts("held_out")
    assert len(train) >= 300 and len(held_out) == 40
    assert len({chat.kind for chat in train}) == 12
    assert {chat.kind for chat in held_out} <= {chat.kind for chat in train}
    assert all(chat.kind and chat.waits_for_answer for chat in [*train, *held_out])


def test_no_own_prompt_is_repeated_or_held_out_and_trained_on():
    texts = [
        " ".join(chat.messages[0]["content"].lower().split())
        for split in ("train", "held_out")
        for chat in own_prompts(split)
    ]
    assert [text for text, count in Counter(texts).items() if count > 1] == []
    assert not any(text == "" for text in texts)


def test_own_prompts_have_two_splits_and_say_where_they_stand():
    train, held_out = own_prompts("train"), own_prompts("held_out")
    lines = sorted(int(chat.where.removeprefix("prompts.jsonl:")) for chat in [*train, *held_out])
    assert lines == list(range(1, len(train) + len(held_out) + 1))


# Rules for what people have


def test_roles_of_other_projects_are_mapped(write):
    turns = [{"from": "human", "value": "Hi"}, {"from": "bard", "value": "Yo"}]
    (chat,) = read_chats(write({"conversations": turns}))
    assert chat.messages == (USER, ANSWER)


def test_questions_in_a_row_become_one_and_two_answers_have_no_order(write, capsys):
    good = [{"messages": [USER, ANSWER]}] * 5
    asked_twice = {"messages": [ANSWER, USER, {"role": "user", "content": "There?"}, ANSWER]}
    answered_twice = {"messages": [USER, ANSWER, ANSWER]}
    path = write(*good, asked_twice, answered_twice)
    chats = read_chats(path)
    assert chats[-1].messages == ({"role": "user", "content": "Hi\n\nThere?"}, ANSWER)
    assert [chat.where for chat in chats] == [f"{path}:{line}" for line in range(1, 7)]
    printed = capsys.readouterr().out
    assert f"left out 1 of 7 records ({path}:7): an answer follows an answer" in printed


def test_an_empty_answer_is_left_out_counted_and_named(write, capsys):
    empty = {"messages": [USER, {"role": "assistant", "content": ""}]}
    path = write(*[{"messages": [USER, ANSWER]}] * 40, *[empty] * 5)
    assert len(read_chats(path)) == 40
    printed = capsys.readouterr().out
    assert f"left out 5 of 45 records ({path}:41, {path}:42, {path}:43, ..): 'content'" in printed
    with pytest.raises(UserError, match=r"5 of the 45 records .* data.max_bad_share = 0.1;"):
        read_chats(path, max_bad_share=0.1)


def test_a_source_that_is_mostly_unusable_is_not_read_to_its_end():
    numbers = []

    def records():
        for number in range(5000):
            numbers.append(number)
            yield {"text": "x"}, f"x:{number}"

    with pytest.raises(UserError, match=r"x:0: the keys are text; .* data.max_bad_share"):
        list(chats_of(records(), "x"))
    assert len(numbers) == 1000


@pytest.mark.parametrize("key", ["system", "system_prompt"])
def test_a_system_column_is_the_first_message(write, key):
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]
    path = write(
        {key: "Be brief", "conversations": turns},
        {key: "Be brief", "messages": [SYSTEM, USER, ANSWER]},
        {key: "", "messages": [USER, ANSWER]},
        {key: "Be brief", "prompt": "Hi"},
    )
    messages = [chat.messages for chat in read_chats(path)]
    assert messages == [
        (SYSTEM, USER, ANSWER),
        (SYSTEM, USER, ANSWER),
        (USER, ANSWER),
        (SYSTEM, USER),
    ]


def test_a_system_column_that_contradicts_the_chat_is_left_out(write):
    record = {"system": "Be long", "messages": [SYSTEM, USER, ANSWER]}
    assert "'system' and the chat's first system message differ" in error_of(write(record))


def test_what_templates_read_is_kept(write):
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add"}}]}
    thinking = {"role": "assistant", "content": "4", "reasoning_content": "2 and 2"}
    result = {"role": "tool", "content": "4", "name": "add", "tool_call_id": None}
    (chat,) = read_chats(
        write({"messages": [USER, call, result, thinking], "tools": '[{"name": "add"}]'})
    )
    assert chat.messages[1] == call | {"content": ""}
    assert chat.messages[2] == {"role": "tool", "content": "4", "name": "add"}
    assert chat.messages[3] == thinking and chat.variables == {"tools": [{"name": "add"}]}


def test_answers_of_weight_0_are_marked(write):
    second = [USER, ANSWER | {"weight": 1}]
    (chat,) = read_chats(write({"messages": [USER, ANSWER | {"weight": 0}, *second]}))
    assert chat.untrained == {1} and "weight" not in chat.messages[1]
    (chat,) = read_chats(write({"messages": [USER, ANSWER | {"train": False}, *second]}))
    assert chat.untrained == {1}
    assert "weight of a message is 0.5" in error_of(
        write({"messages": [USER, ANSWER | {"weight": 0.5}]})
    )


def test_text_in_parts_is_joined_and_pictures_are_not_text(write):
    parts = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
    (chat,) = read_chats(write({"messages": [{"role": "user", "content": parts}, ANSWER]}))
    assert chat.messages == (USER, ANSWER)
    picture = [{"type": "image_url", "image_url": {"url": "x"}}]
    assert "must be a non-empty string" in error_of(
        write({"messages": [{"role": "user", "content": picture}]})
    )


def test_keys_that_are_not_read_are_named_once(write, capsys):
    path = write(*[{"prompt": "Hi", "id": 1, "score": 2}] * 3)
    assert len(read_chats(path)) == 3
    assert capsys.readouterr().out.count("not read") == 1


@pytest.mark.parametrize("name", ["chats.json", "chats.jsonl", "list.json"])
def test_byte_order_marks_line_ends_and_lines_in_a_json_file(tmp_path, name):
    lines = [json.dumps({"prompt": text}) for text in ("a", "b")]
    text = "[" + ",".join(lines) + "]" if name == "list.json" else "\r\n".join(lines) + "\r\n"
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
    chats = read_chats(str(tmp_path / name))
    assert [chat.messages[0]["content"] for chat in chats] == ["a", "b"]
