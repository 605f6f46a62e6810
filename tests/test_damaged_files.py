"""Damaged files, 800 of them, of every kind that is read for a draft or a target.

Bytes are changed or the end is cut off. Each must end in our own error, or in exactly what the
bytes still say. Folders of drafts carry a digest, so only the undamaged draft may be returned. In
foreign formats a weight may change where its own bytes did, and nowhere else.
"""

import json
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf_files import TOKENS, header_by_package, llama_tensors, write_llama
from safetensors.numpy import save_file

from beagle_jax.errors import UserError
from beagle_jax.model.beagle import BeagleSpec, init_draft
from beagle_jax.model.eagle import EagleSpec, init_eagle
from beagle_jax.model.target import TargetSpec
from beagle_jax.weights import draft as draft_module
from beagle_jax.weights import gguf as gguf_module
from beagle_jax.weights import safetensors_file
from beagle_jax.weights.draft import Draft, file_tensors, load_draft, save_draft
from beagle_jax.weights.gguf import GGUFFile
from beagle_jax.weights.hf import HFFolder
from beagle_jax.weights.target import fill_params
from beagle_jax.weights.torch_export import write_torch_folder
from beagle_jax.weights.torch_import import read_torch_draft

CONFIG = {
    "model_type": "llama",
    "vocab_size": len(TOKENS),
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": True,
    "eos_token_id": 2,
}
SPEC = TargetSpec.from_hf_config(CONFIG, "tests")
HEADER = 3000  # bytes at the beginning of a file that half of the damage goes to


def read_draft(folder: Path) -> dict:
    draft = load_draft(folder, SPEC)
    return {"spec": draft.spec, **file_tensors(draft)}


def read_exported(folder: Path) -> dict:
    draft = read_torch_draft(folder, SPEC, "a target")
    return {"spec": draft.spec, **file_tensors(draft)}


def read_folder(folder: Path) -> dict:
    opened = HFFolder(folder)
    spec = TargetSpec.from_hf_config(opened.config(), str(folder))
    params = fill_params(spec, opened, jnp.dtype("float32"), str(folder))
    return {"spec": spec, "eos": opened.eos_ids(), **_leaves(params)}


def read_tokenizer(folder: Path) -> dict:
    return {"vocabulary": HFFolder(folder).tokenizer().get_vocab()}


def read_gguf(folder: Path) -> dict:
    opened = GGUFFile(folder / "model.gguf")
    spec = TargetSpec.from_hf_config(opened.config(), str(folder))
    params = fill_params(spec, opened, jnp.dtype("float32"), str(folder))
    return {
        "spec": spec,
        "eos": opened.eos_ids(),
        "vocabulary": opened.tokenizer().get_vocab(),
        **_leaves(params),
    }


def _leaves(params) -> dict:
    return {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> SimpleNamespace:
    """One whole folder of each kind."""
    root = tmp_path_factory.mktemp("whole")
    spec = BeagleSpec.from_target(SPEC)
    draft = Draft(
        spec,
        init_draft(spec, jax.random.key(0)),
        jnp.array([3, 1, 7], jnp.int32),
        {"target": "a target"},
    )
    save_draft(root / "draft", draft)
    eagle = EagleSpec.from_target(SPEC)
    save_draft(
        root / "eagle",
        Draft(eagle, init_eagle(eagle, jax.random.key(0)), None, {"target": "a target"}),
    )
    for name in ("exported", "folder", "gguf"):
        (root / name).mkdir()
    write_torch_folder(root / "exported", draft, SPEC.vocab_size, "")
    tensors = llama_tensors()
    names = sorted(tensors)
    shards = {
        "model-00001-of-00002.safetensors": names[::2],
        "model-00002-of-00002.safetensors": names[1::2],
    }
    for file, held in shards.items():
        save_file({name: tensors[name] for name in held}, root / "folder" / file)
    index = {
        "metadata": {},
        "weight_map": {name: file for file, held in shards.items() for name in held},
    }
    (root / "folder" / "model.safetensors.index.json").write_text(json.dumps(index))
    (root / "folder" / "config.json").write_text(json.dumps(CONFIG))
    (root / "folder" / "generation_config.json").write_text('{"eos_token_id": [2, 1]}')
    write_llama(root / "gguf" / "model.gguf", tensors)
    GGUFFile(root / "gguf" / "model.gguf").tokenizer().save_pretrained(root / "folder")
    return root


def damaged(whole: bytes, seed: int) -> bytes:
    """Cuts off the end of one file in four, and changes one to three bytes of the others.

    Half of the damage is near the beginning.
    """
    rng = np.random.default_rng(seed)

    def place():
        return int(rng.integers(min(len(whole), HEADER) if rng.random() < 0.5 else len(whole)))

    if rng.random() < 0.25:
        return whole[: place()]
    changed = bytearray(whole)
    for _ in range(rng.integers(1, 4)):
        changed[place()] ^= 1 << rng.integers(8) if rng.random() < 0.5 else rng.integers(1, 256)
    return bytes(changed)


def outcomes(folder: Path, file: str, load: Callable[[Path], dict], cases: int, judge) -> list[str]:
    """Reads `cases` damaged versions of a file and returns how each ended.

    "refused", or "read" if `judge` accepted what was loaded.
    """
    whole, expected = (folder / file).read_bytes(), load(folder)
    ended = []
    try:
        for case in range(cases):
            changed = damaged(whole, zlib.crc32(file.encode()) + case)
            (folder / file).write_bytes(changed)
            try:
                loaded = load(folder)
            except UserError as error:
                if str(folder) not in str(error):
                    raise AssertionError(
                        f"case {case}: the message names no file: {error}"
                    ) from error
                ended.append("refused")
            else:
                judge(expected, loaded, whole, changed, f"case {case}")
                ended.append("read")
    finally:
        (folder / file).write_bytes(whole)
    return ended


def same(expected: dict, loaded: dict, _whole=b"", _changed=b"", where: str = "") -> None:
    assert expected.keys() == loaded.keys(), where
    for name, value in expected.items():
        equal = (
            np.array_equal(value, loaded[name], equal_nan=True)
            if isinstance(value, np.ndarray)
            else value == loaded[name]
        )
        assert equal, f"{where}: {name} changed without a word"


def as_the_config_says(
    expected: dict, loaded: dict, _whole: bytes, changed: bytes, where: str
) -> None:
    """Checks that the weights are unchanged, and that the spec follows the file."""
    same(
        {name: value for name, value in expected.items() if name not in ("spec", "eos")},
        {name: value for name, value in loaded.items() if name not in ("spec", "eos")},
        where=where,
    )
    written, spec = json.loads(changed), loaded["spec"]
    rope = written.get("rope_parameters") or {}
    assert spec.rope_theta == rope.get("rope_theta", 10000.0) and spec.rms_norm_eps == written.get(
        "rms_norm_eps", 1e-6
    ), where
    assert (
        spec.max_positions == written.get("max_position_embeddings", 2048)
        and spec.rope_scaling is None
    ), where
    assert (spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.hidden_size) == (4, 2, 16, 64), (
        where
    )


def where_its_bytes_changed(
    expected: dict, loaded: dict, whole: bytes, changed: bytes, where: str
) -> None:
    """Checks that at most as many values differ as bytes were changed in the data.

    Shapes, names and all else must be equal.
    """
    assert len(whole) == len(changed) and expected.keys() == loaded.keys(), where
    count = sum(a != b for a, b in zip(whole, changed, strict=True))
    values = 0
    for name, value in expected.items():
        if isinstance(value, np.ndarray):
            values += int((value.view(np.uint32) != loaded[name].view(np.uint32)).sum())
        elif name == "spec":
            numbers = [
                field
                for field in ("rope_theta", "rms_norm_eps", "max_positions")
                if getattr(value, field) != getattr(loaded[name], field)
            ]
            assert value == loaded[name] or len(numbers) <= count, where
    assert values <= count, f"{where}: {values} values changed for {count} bytes"


def anything(*_) -> None:
    """Accepts everything: only these files say what tokens are and which one ends an answer."""


@pytest.mark.parametrize(
    ("source", "file", "load", "cases", "judge"),
    [
        ("draft", "model.safetensors", read_draft, 120, same),
        ("draft", "config.json", read_draft, 60, same),
        ("eagle", "model.safetensors", read_draft, 40, same),
        ("eagle", "config.json", read_draft, 40, same),
        ("exported", "model.safetensors", read_exported, 80, same),
        ("exported", "config.json", read_exported, 60, same),
        ("folder", "model-00001-of-00002.safetensors", read_folder, 80, where_its_bytes_changed),
        ("folder", "config.json", read_folder, 80, as_the_config_says),
        ("folder", "generation_config.json", read_folder, 20, anything),
        ("folder", "model.safetensors.index.json", read_folder, 20, same),
        ("folder", "tokenizer.json", read_tokenizer, 60, anything),
        ("folder", "tokenizer_config.json", read_tokenizer, 20, anything),
        ("gguf", "model.gguf", read_gguf, 120, where_its_bytes_changed),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_damage_ends_in_our_error_or_in_what_the_bytes_say(
    sources, tmp_path, source, file, load, cases, judge
):
    shutil.copytree(sources / source, tmp_path / source)
    ended = outcomes(tmp_path / source, file, load, cases, judge)
    assert len(ended) == cases and ended.count("refused") >= cases / 10


def test_planted_bug_digest_not_looked_at(sources, tmp_path, monkeypatch):
    shutil.copytree(sources / "draft", tmp_path / "draft")
    monkeypatch.setattr(draft_module, "check_digest", lambda *_: None)
    with pytest.raises(AssertionError, match="changed without a word"):
        outcomes(tmp_path / "draft", "model.safetensors", read_draft, 60, same)


def test_planted_bug_any_dtype_taken_for_weights(sources, tmp_path, monkeypatch):
    shutil.copytree(sources / "draft", tmp_path / "draft")
    path = tmp_path / "draft" / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"F32"', b'"U32"', 1))
    with pytest.raises(UserError, match="is stored as U32; expected F32 or F16 or BF16"):
        read_draft(tmp_path / "draft")
    monkeypatch.setattr(safetensors_file, "WEIGHT_DTYPES", ("F32", "U32"))
    monkeypatch.setattr(draft_module, "check_digest", lambda *_: None)
    with pytest.raises(AssertionError, match="changed without a word"):
        same(read_draft(sources / "draft"), read_draft(tmp_path / "draft"))


def test_planted_bug_gguf_offsets_believed(sources, tmp_path, monkeypatch):
    """The offsets of two tensors of one size are swapped: lengths are right, weights are not."""
    shutil.copytree(sources / "gguf", tmp_path / "gguf")
    path = tmp_path / "gguf" / "model.gguf"
    whole = path.read_bytes()
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    changed = bytearray(whole)
    places = [
        whole.index(name.encode()) + len(name) + 4 + 16 + 4
        for name in ("blk.0.ffn_gate.weight", "blk.0.ffn_up.weight")
    ]
    first, second = (whole[place : place + 8] for place in places)
    changed[places[0] : places[0] + 8], changed[places[1] : places[1] + 8] = second, first
    assert (
        tensors["blk.0.ffn_gate.weight"].n_bytes == tensors["blk.0.ffn_up.weight"].n_bytes
        and first != second
    )
    path.write_bytes(changed)
    with pytest.raises(
        UserError,
        match=r"model.gguf: not a readable GGUF file \(byte [\d,]+: tensor blk.0.ffn_gate.weight "
        r"should begin at",
    ):
        read_gguf(tmp_path / "gguf")
    monkeypatch.setattr(gguf_module, "read_header", header_by_package)
    with pytest.raises(AssertionError, match="changed without a word"):
        same(read_gguf(sources / "gguf"), read_gguf(tmp_path / "gguf"))


@pytest.mark.parametrize("count", [2**20, 2**62])
def test_a_gguf_that_promises_too_much_is_refused_at_once(sources, tmp_path, count):
    """The gguf package would loop over as many values as the file promises."""
    shutil.copytree(sources / "gguf", tmp_path / "gguf")
    path = tmp_path / "gguf" / "model.gguf"
    whole = bytearray(path.read_bytes())
    for place in (8, 16, whole.index(b"tokenizer.ggml.tokens") + len("tokenizer.ggml.tokens") + 8):
        promising = whole[:]
        promising[place : place + 8] = count.to_bytes(8, "little")
        path.write_bytes(promising)
        with pytest.raises(
            UserError,
            match=r"model.gguf: not a readable GGUF file \(byte [\d,]+: .*\); is the file whole",
        ):
            read_gguf(tmp_path / "gguf")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 64.0}, "hidden_size is 64.0, expected a whole number above zero"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0, expected"),
        ({"num_hidden_layers": None}, "num_hidden_layers is null"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"num_key_value_heads": 3}, "4 attention heads cannot share 3 key/value heads"),
        ({"hidden_size": 63, "head_dim": None}, "hidden_size 63 is no multiple of 4 heads"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan, expected a number above zero"),
        ({"rope_parameters": [1]}, "rope_parameters is \\[1\\], expected an object"),
        (
            {"rope_parameters": {"rope_theta": "x"}},
            "rope_parameters.rope_theta is 'x', expected a number above zero",
        ),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no', expected true or false"),
        ({"model_type": ["llama"]}, "model_type is \\['llama'\\], expected a name"),
    ],
)
def test_values_that_no_config_has(change, message):
    with pytest.raises(UserError, match=f"here: the model config is not valid: .*{message}"):
        TargetSpec.from_hf_config({**CONFIG, **change}, "here")
