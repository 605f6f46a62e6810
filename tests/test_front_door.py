"""What `from beagle_jax import ..` offers, and how little `import beagle_jax` loads."""

import subprocess
import sys
from pathlib import Path

import pytest
from command_cases import make_workplace

import beagle_jax
from beagle_jax import Sampling, SpeculativeDecoder, load_config
from beagle_jax.errors import UsageError

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("front_door")
    return make_workplace(folder).config


@pytest.mark.parametrize("name", beagle_jax.__all__)
def test_every_public_name_is_there_and_documented(name):
    assert getattr(beagle_jax, name).__doc__
    assert name in dir(beagle_jax)


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'Decoder'"):
        _ = beagle_jax.Decoder


def test_the_table_and_the_list_of_public_names_are_one():
    assert list(beagle_jax._PUBLIC) == beagle_jax.__all__


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import beagle_jax", ("jax", "numpy", "pydantic", "torch", "transformers")),
        ("from beagle_jax import SpeculativeDecoder", ("torch", "flax.nnx", "datasets")),
    ],
)
def test_importing_loads_little(code, absent):
    modules = subprocess.run(
        [sys.executable, "-c", f"{code}; import sys; print(*sys.modules)"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
        check=True,
    ).stdout.split()
    assert [name for name in absent if name in modules] == []


def test_a_decoder_from_a_config_writes_what_its_parts_write(config):
    decoder = SpeculativeDecoder.from_config(config, "draft.path=lookup", "decode.levels=3")
    plain = SpeculativeDecoder.from_config(config, "draft.path=plain")
    [answer] = decoder.generate(["What is 1?"], max_new_tokens=8)
    [other] = plain.generate(["What is 1?"], max_new_tokens=8)
    assert answer.tokens == other.tokens and decoder.tree.depth == 3 and plain.tree.depth == 0
    drawn = [
        made.generate(["What is 1?"], Sampling(0.8, top_k=5), max_new_tokens=8, seed=3)[0].tokens
        for made in (decoder, plain)
    ]
    assert drawn[0] == drawn[1]
    whole = SpeculativeDecoder.from_config(load_config(config, ["draft.path=plain"]))
    assert whole.generate(["What is 1?"], max_new_tokens=8)[0].tokens == answer.tokens


def test_overrides_belong_to_a_file(config):
    with pytest.raises(UsageError, match=r"overrides .* cannot be applied to a Config object"):
        SpeculativeDecoder.from_config(load_config(config), "draft.path=lookup")
