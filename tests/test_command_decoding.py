"""The evaluate, generate and tune commands on the result of one training run."""

import json
import re
from dataclasses import replace

import pytest
from command_cases import EVAL_QUESTIONS, ended, trained, workplace, write_lines  # noqa: F401 (fixtures)
from decode_cases import MARKOV, letters, target_of
from test_report import check_schema
from tuning_cases import shrink

from beagle_jax import evaluate, generate, tune
from beagle_jax.commands import evaluate as evaluate_command
from beagle_jax.config import Config, TargetConfig, load_config
from beagle_jax.data.template import prompt_tokens
from beagle_jax.decoding.conversation import Conversation
from beagle_jax.decoding.decoder import SpeculativeDecoder
from beagle_jax.decoding.lookup import Lookup
from beagle_jax.decoding.tree import chain
from beagle_jax.errors import run_main
from beagle_jax.evaluation.measure import Bench, System
from beagle_jax.weights.target import load_target

pytestmark = pytest.mark.usefixtures("shared_steps")


def evaluated(trained, capsys) -> list[dict]:
    """Returns the figures by system that `evaluate` writes and prints."""
    figures = trained.folder / "figures.json"
    assert (
        run_main(
            evaluate.main,
            ["--config", trained.config, "eval.limit=3", "--json", str(figures), "log.every=7"],
        )
        == 0
    )
    report = json.loads(figures.read_text())
    systems = report["suites"][0]["groups"][0]["systems"]
    plain, draft = summaries = [
        {**systems[system["name"]], **system} for system in report["systems"]
    ]
    printed = capsys.readouterr().out
    for summary in summaries:
        assert (
            f"{summary['identical_to_plain']}/{summary['answers']}" in printed
            and f"{summary['tau']:5.2f}" in printed
        )
    names = ("plain", str(trained.folder / "run" / "draft"))
    assert (plain["name"], draft["name"]) == names
    assert (plain["tau"], plain["rounds"]) == (1.0, plain["tokens"] - 3)
    return summaries


def check_lossless(summaries: list[dict]) -> None:
    plain, draft = summaries
    assert plain["answers"] == draft["answers"] == draft["identical_to_plain"] == 3
    assert plain["tokens"] == draft["tokens"] > 3
    assert draft["tau"] >= 1 and draft["rounds"] <= plain["rounds"]
    assert plain["compiles_after_warm_up"] == draft["compiles_after_warm_up"] == 0


def test_evaluate_finds_all_answers_identical(trained, capsys):
    check_lossless(evaluated(trained, capsys))


class Wrong(SpeculativeDecoder):
    """A decoder that gets the last token wrong if it drafts."""

    def generate(self, *arguments, **options):
        answers = super().generate(*arguments, **options)
        [answer] = answers
        wrong = replace(answer, tokens=[*answer.tokens[:-1], answer.tokens[-1] ^ 1])
        return replace(answers, answers=(wrong,)) if self.tree.depth else answers


@pytest.mark.slow
def test_an_audit_that_fails_ends_with_status_1(trained, capsys, monkeypatch):
    command = ["--config", trained.config, "eval.limit=3", "--audit"]
    assert run_main(evaluate.main, command) == 0
    printed = capsys.readouterr().out
    assert printed.count("\npassed  ") == 6 and "FAILED" not in printed and "3/3" in printed
    monkeypatch.setattr("beagle_jax.decoding.build.SpeculativeDecoder", Wrong)
    assert run_main(evaluate.main, command) == 1
    output = capsys.readouterr()
    assert "FAILED" in output.out and " became " in output.out
    assert "error: the audit failed; see the lines above that begin with FAILED" in output.err


def test_evaluate_sees_a_wrong_token(trained, capsys, monkeypatch):
    monkeypatch.setattr("beagle_jax.decoding.build.SpeculativeDecoder", Wrong)
    summaries = evaluated(trained, capsys)
    assert summaries[1]["identical_to_plain"] == 0
    with pytest.raises(AssertionError):
        check_lossless(summaries)


def test_evaluate_leaves_a_whole_report(trained, capsys, tmp_path):
    """Two systems next to plain decoding, and every file.

    A second run decodes nothing again.
    """
    own = write_lines(tmp_path / "own.jsonl", EVAL_QUESTIONS)
    out, command = (
        tmp_path / "out",
        [
            "--config",
            trained.config,
            "eval.limit=3",
            "eval.compare=[lookup]",
            f"eval.suites=[{own}]",
        ],
    )
    assert run_main(evaluate.main, [*command, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    report = json.loads((out / "report.json").read_text())
    assert [system["name"] for system in report["systems"]] == [
        "plain",
        str(trained.folder / "run" / "draft"),
        "lookup",
    ]
    check_schema(report)
    for system in report["systems"]:
        phases, memory = system["milliseconds"], system["bytes"]
        assert (
            abs(phases["draft"] + phases["verify"] + phases["rest"] - phases["round"]) < 0.01
            and phases["verify"] > 0
        )
        assert (
            memory["target_weights"] > memory["target_cache"] > 0
            and memory["decode_temporaries"] > 0
        )
        assert (
            (memory["draft_cache"] > 0)
            == (memory["draft_weights"] > 0)
            == (system["trained_tokens"] == 48)
            == ("run" in system["name"])
        )
    assert "3/3" in printed and "texts are longer than the 48 tokens" in printed
    pictures = {path.stem for path in (out / "pictures").glob("*.png")}
    assert pictures == {"acceptance", "phases", "tree", "attention", "masks", "training"}
    assert (out / "report.html").read_text().count("data:image/png;base64,") == len(pictures)
    assert run_main(evaluate.main, [*command, "--out", str(out)]) == 0
    again = json.loads((out / "report.json").read_text())
    assert again["suites"] == report["suites"]
    status, message = ended(capsys, "evaluate", *command, "decode.levels=1", "--out", str(out))
    assert (
        status == 1
        and "answers.jsonl: was written with other settings (decode.levels 2 there, 1 here; trees."
        in message
    )
    write_lines(tmp_path / "own.jsonl", EVAL_QUESTIONS[::-1])
    status, message = ended(capsys, "evaluate", *command, "--out", str(out))
    assert (
        status == 1
        and f"answers.jsonl: was written with other settings (prompts_sha256.{own} " in message
    )


def test_answers_belong_to_a_target_and_its_tree(tmp_path):
    """Answers of other weights or of another tuned tree are not reused under the same names."""
    config = Config(target=TargetConfig(source="x"))
    records = []
    for seed, levels in ((0, 2), (1, 2), (0, 3), (0, 2)):
        target = target_of(MARKOV, seed=seed, tokenizer=letters())
        system = System("lookup", SpeculativeDecoder(target, Lookup(), chain(levels)))
        bench = Bench(system, (), target.tokenizer, 64, 8)
        records.append(evaluate_command._settings(config, target, {"lookup": Lookup()}, bench, {}))
    assert [sum(record[key] != records[0][key] for key in record) for record in records] == [
        0,
        1,
        1,
        0,
    ]
    assert records[1]["target_sha256"] != records[0]["target_sha256"] and records[2]["trees"] == {
        "lookup": "chain of 3"
    }


def test_a_draft_cannot_be_called_plain(trained, capsys, monkeypatch):
    """The name would clash with plain decoding."""
    (trained.folder / "plain").symlink_to(trained.folder / "run" / "draft")
    monkeypatch.chdir(trained.folder)
    assert ended(capsys, "evaluate", "--config", trained.config, "eval.compare=[plain]") == (
        1,
        "draft.path or eval.compare is plain, which means decoding without a draft and is always "
        "measured; remove it, or write ./plain for a folder of this name\n",
    )


def test_evaluate_shows_a_second_draft(trained, capsys):
    first = str(trained.folder / "run" / "draft")
    second = str(trained.folder / "run" / ".." / "run" / "draft")
    assert run_main(evaluate.main, ["--config", trained.config, f"eval.compare=[{second}]"]) == 0
    rows = [
        line.split("  ")[0].strip()
        for line in capsys.readouterr().out.splitlines()
        if line.endswith("3/3")
    ]
    assert rows == ["plain", first, second]


def test_generate_prints_the_answer_of_plain_decoding(trained, capsys):
    assert (
        run_main(generate.main, ["--config", trained.config, EVAL_QUESTIONS[2], "decode.levels=2"])
        == 0
    )
    printed = capsys.readouterr().out
    target = load_target(str(trained.folder / "target"), "float32", "unused")
    tokens = prompt_tokens(target.tokenizer, [{"role": "user", "content": EVAL_QUESTIONS[2]}])
    answer = SpeculativeDecoder(target).generate([tokens], max_new_tokens=20)[0].tokens
    assert len(answer) > 3
    assert printed.startswith(
        target.tokenizer.decode([token for token in answer if token not in target.eos_ids]) + "\n"
    )
    assert f"tok/s  {len(answer)} tokens" in printed and printed.endswith(
        "token sequences equal: yes\n"
    )


@pytest.mark.parametrize("rule", ["match", "ratio"])
def test_a_sampled_comparison_says_what_was_compared(trained, capsys, rule):
    """The ratio rule draws other tokens on purpose: no alarm about it."""
    drawn = ["decode.temperature=0.8", f"decode.rule={rule}", "decode.levels=2"]
    assert run_main(generate.main, ["--config", trained.config, "Hello", *drawn]) == 0
    printed = capsys.readouterr().out
    if rule == "match":
        assert printed.endswith("token sequences equal: yes\n")
    else:
        assert "equal: " not in printed and "not compared: decode.rule=ratio draws" in printed
        assert "from the same distribution" in printed


def chatted(trained, monkeypatch, lines: list, *overrides: str) -> None:
    """Runs the chat with typed lines; an exception among them is raised instead of a line."""
    waiting = iter(lines)

    def typed(_):
        line = next(waiting)
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr("builtins.input", typed)
    assert run_main(generate.main, ["--config", trained.config, "--chat", *overrides]) == 0
    assert next(waiting, None) is None


def test_chat_answers_with_the_history_before_it(trained, monkeypatch, capsys):
    histories = []
    right = SpeculativeDecoder.request
    monkeypatch.setattr(
        SpeculativeDecoder,
        "request",
        lambda self, prompt, *a, **o: (
            histories.append(list(prompt)) or right(self, prompt, *a, **o)
        ),
    )
    chatted(
        trained, monkeypatch, ["Hi", "And?", "/clear", "Hi", EOFError()], "decode.max_new_tokens=8"
    )
    printed = capsys.readouterr().out
    assert [[message["role"] for message in history] for history in histories] == [
        ["user"],
        ["user", "assistant", "user"],
        ["user"],
    ]
    target = load_target(str(trained.folder / "target"), "float32", "unused")
    [first] = SpeculativeDecoder(target).generate(["Hi"], max_new_tokens=8)
    assert histories[1][1]["content"] == first.text and printed.count(first.text) >= 2
    with monkeypatch.context() as patch:
        patch.setattr("builtins.input", lambda _: b"caf\xe9".decode())
        assert run_main(generate.main, ["--config", trained.config, "--chat"]) == 1
    assert (
        "error: the input is not text in this terminal's encoding ('utf-8' codec"
        in capsys.readouterr().err
    )
    assert printed.count(" tokens, ") == printed.count("tok/s, tau ") == 3
    reads = [list(map(int, pair)) for pair in re.findall(r"read (\d+) of (\d+) prompt", printed)]
    assert reads[0][0] == reads[0][1] and reads[1][0] < reads[1][1] - 20


def test_chat_outlives_an_interrupt_and_a_full_context(trained, monkeypatch, capsys):
    right, calls = Conversation.stream, []

    def cut(stream, pieces: int):
        for _ in range(pieces):
            yield next(stream)
        raise KeyboardInterrupt

    def interrupted(self, *arguments, **options):
        calls.append([message["role"] for message in self.messages] + ["user"])
        stream = right(self, *arguments, **options)
        return stream if len(calls) > 2 else cut(stream, len(calls) - 1)

    monkeypatch.setattr(Conversation, "stream", interrupted)
    chatted(trained, monkeypatch, ["Hi", "Hi", "x" * 300, "/clear", "Hi", ""])
    printed = capsys.readouterr().out
    assert (
        "[stopped]" in printed
        and "which leaves no room for an answer" in printed
        and printed.count("tau") == 1
    )
    # What was cut before its first word is forgotten: templates refuse an empty answer.
    assert calls == [["user"], ["user"], ["user", "assistant", "user"], ["user"]]


@pytest.mark.parametrize("pays", [True, False])
def test_tune_remembers_what_auto_takes(trained, monkeypatch, capsys, tmp_path, pays):
    """A tree where one pays, plain decoding where none does."""
    shrink(monkeypatch, nodes=(4,), levels=range(1, 3), topks=(1, 2), text=128)
    milliseconds = {"ending": 1.0, "drafting": 1e-6 if pays else 100.0}
    for name in milliseconds:
        monkeypatch.setattr(f"beagle_jax.decoding.tuning.{name}", lambda *_, name=name: name)
    monkeypatch.setattr("beagle_jax.decoding.tuning.milliseconds", milliseconds.__getitem__)
    monkeypatch.setattr("beagle_jax.decoding.tuning.compiled", lambda works: None)
    files = [
        "--plot",
        str(tmp_path / "t.svg"),
        "--write",
        str(tmp_path / "t.yaml"),
        "--prompts",
        "2",
    ]
    cache = f"target.cache_dir={tmp_path}"
    assert run_main(tune.main, ["--config", trained.config, cache, *files]) == 0
    printed = capsys.readouterr().out
    assert "levels  topk  nodes" in printed and "against plain" in printed
    assert "<svg" in (tmp_path / "t.svg").read_text()
    written = load_config(tmp_path / "t.yaml").decode
    assert written.tree == ("dynamic" if pays else "auto")
    assert ("no tree is faster than plain" in printed) == (not pays)
    assert f"{'the first tree' if pays else 'plain decoding'} is saved for" in printed
    config, auto = ["--config", trained.config], [cache, "decode.tree=auto"]
    report = tmp_path / "report.json"
    options = ["eval.limit=3", "--audit", "--json", str(report)]
    assert run_main(evaluate.main, [*config, *auto, *options]) == 0
    assert "3/3" in capsys.readouterr().out
    tree = json.loads(report.read_text())["systems"][1]["tree"]
    assert ("dynamic" in tree) == pays and ("no draft" in tree) == (not pays)
    assert run_main(generate.main, [*config, EVAL_QUESTIONS[2], *auto]) == 0
    out, err = capsys.readouterr()
    assert out.endswith("token sequences equal: yes\n")
    assert err.count("decoding plainly, without the draft") == (not pays)


@pytest.mark.slow
def test_sampled_answers_are_those_of_plain_sampling(trained, capsys):
    """From the command line, with a filter.

    tests/test_eagle_evaluation.py covers both kinds of draft.
    """
    options = ["decode.temperature=0.8", "decode.top_p=0.9", "eval.limit=3"]
    assert run_main(evaluate.main, ["--config", trained.config, *options]) == 0
    assert capsys.readouterr().out.count("3/3") == 2


def test_more_held_out_rows_than_rows_are_refused(trained, capsys):
    status, message = ended(
        capsys,
        "train",
        "--config",
        trained.config,
        "log.eval_rows=12",
        f"train.folder={trained.folder}/none",
    )
    assert status == 1 and message == "log.eval_rows is 12, but there are only 12 rows; lower it\n"


def test_a_tree_of_more_nodes_than_candidates_is_refused(trained, capsys):
    status, message = ended(
        capsys, "evaluate", "--config", trained.config, "decode.tree=dynamic", "decode.nodes=99"
    )
    assert status == 1 and "decode.nodes is 99; 2 levels of topk 4 make 20 candidates" in message
