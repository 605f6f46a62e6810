"""The parts of experiments/text, as `data.source`."""

import importlib.util
from pathlib import Path

import pytest

from beagle_jax.data.rows_file import open_rows
from beagle_jax.errors import UserError, run_main
from benchmarks.one_gpu.text_files import Text, rows_of, save_text

ROOT = Path(__file__).resolve().parent.parent
_SPEC = importlib.util.spec_from_file_location(
    "import_text", ROOT / "experiments" / "text" / "import_text.py"
)
import_text = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(import_text)

TEXTS = [Text([1, 2], [3], "a"), Text([4], [5, 6], "b"), Text([7, 8, 9], [1, 2], "c")]


@pytest.fixture
def files(tmp_path) -> list[Path]:
    paths = [tmp_path / f"part-greedy-00{number}.npz" for number in range(2)]
    save_text(paths[0], TEXTS[:2])
    save_text(paths[1], TEXTS[2:])
    return paths


def check_rows(path: Path, texts: list[Text]) -> None:
    opened = open_rows(path)
    actual = [(row.tokens, sum(row.supervised), row.supervised.index(True)) for row in opened]
    wanted = [(text.prompt + text.answer, len(text.answer), len(text.prompt)) for text in texts]
    assert actual == wanted


def test_rows_are_those_of_the_parts_in_order(tmp_path, files):
    assert run_main(import_text.main, [str(tmp_path / "out.rows"), *map(str, files)]) == 0
    check_rows(tmp_path / "out.rows", TEXTS)
    header = open_rows(tmp_path / "out.rows").header
    assert [source["name"] for source in header.sources] == [path.name for path in files]
    assert header.made_for["tokenizer_sha256"].startswith("27c86001d8b3")


def test_rows_of_another_order_are_seen(tmp_path, files):
    """The planted bug."""
    import_text.import_text(tmp_path / "out.rows", files[::-1])
    with pytest.raises(AssertionError):
        check_rows(tmp_path / "out.rows", TEXTS)


def test_a_committed_part_is_read(tmp_path):
    part = ROOT / "experiments" / "text" / "part-greedy-000.npz"
    count = import_text.import_text(tmp_path / "out.rows", [part])
    opened = open_rows(tmp_path / "out.rows")
    assert len(opened) == count == sum(1 for _ in rows_of([part]))
    assert opened.answer_tokens_R.min() >= 1 and opened.prompt_tokens_R.max() <= 160


def test_a_readme_without_hashes_is_refused(tmp_path, files):
    (tmp_path / "README.md").write_text("nothing\n")
    with pytest.raises(UserError, match="has no target_sha256"):
        import_text.import_text(tmp_path / "out.rows", files, tmp_path / "README.md")


def test_a_name_of_another_kind_is_refused(tmp_path, files, capsys):
    assert run_main(import_text.main, [str(tmp_path / "out.npz"), str(files[0])]) == 2
    assert "expected a name that ends in .rows" in capsys.readouterr().err


def test_no_prompt_is_in_both_splits(tmp_path):
    texts = [Text([number], [1], f"prompt-{number % 300}") for number in range(400)]
    train, held_out = (import_text.split_of(texts, name) for name in ("train", "held_out"))
    assert sorted(train + held_out) == sorted(texts)
    assert not {text.prompt_id for text in train} & {text.prompt_id for text in held_out}
    assert 5 < len(held_out) < 40
    fewer = import_text.split_of([text for text in texts if text in train[:50]], "train")
    assert fewer == train[:50]
    files = [tmp_path / "part-greedy-000.npz"]
    save_text(files[0], texts)
    command = [str(tmp_path / "out.rows"), "--split", "held_out", *map(str, files)]
    assert run_main(import_text.main, command) == 0
    check_rows(tmp_path / "out.rows", held_out)
