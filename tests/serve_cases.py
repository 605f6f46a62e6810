"""A server on loopback with a tiny target, for the tests of serving."""

import dataclasses
import json
import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace

import httpx
import jax
import jax.numpy as jnp
import numpy as np
import openai
from chat_cases import byte_tokenizer
from conftest import TINY
from decode_cases import letters, random_draft, target_of

from beagle_jax.config import Config
from beagle_jax.decoding.decoder import SpeculativeDecoder
from beagle_jax.decoding.session import Session
from beagle_jax.decoding.tree import chain, dynamic_tree
from beagle_jax.model.beagle import BeagleSpec, init_draft
from beagle_jax.serving.keys import Keys, keys_of
from beagle_jax.serving.server import Server
from beagle_jax.weights.draft import Draft
from beagle_jax.weights.target import Target

CONTEXT = 192


def tiny_config(**serve) -> Config:
    """A config whose server takes any free port."""
    settings = {"port": 0, "model": "tiny", "context": CONTEXT, "warm_up": False, **serve}
    return Config(target={"source": "tiny"}, serve=settings, decode={"max_new_tokens": 24})


def tiny_decoder() -> SpeculativeDecoder:
    """A decoder of random weights whose tokens are letters."""
    target = target_of(tokenizer=letters(), eos_ids=(3,))
    return SpeculativeDecoder(target, random_draft(), chain(2), context=CONTEXT)


# The answer to a text that ends with "!", again and again. Each byte is a token.
CYCLE = "\U0001f436ab, \u00e9!"


def cycle_decoder(context: int = CONTEXT) -> SpeculativeDecoder:
    """A decoder that greedily writes CYCLE, and drafts it rightly. Each byte is a token."""
    tokenizer, V = byte_tokenizer(), 300
    spec = dataclasses.replace(
        TINY, vocab_size=V, hidden_size=V, head_dim=8, num_layers=0, tie_embeddings=False
    )
    tokens = tokenizer(CYCLE)["input_ids"]
    head_VD = np.random.default_rng(0).standard_normal((V, V)) / np.sqrt(V)
    head_VD[np.roll(tokens, -1), tokens] = 8 / np.sqrt(V)
    params = dict(target_of(spec).params)
    head = next(name for name in params if "head" in name)
    params[head] = jnp.asarray(head_VD.T if head.endswith("DV") else head_VD, jnp.float32)
    params["embed_VD"] = jnp.asarray(np.eye(V, dtype=np.float32))
    target = Target(spec, params, tokenizer, (tokenizer.eos_token_id,), "cycle")
    draft_spec = BeagleSpec.from_target(spec, init_std=0.3)
    # Without its projections the block changes nothing. Drawn weights would compile a hundred
    # small programs.
    made = {}
    for name, array in jax.eval_shape(lambda: init_draft(draft_spec, jax.random.key(1))).items():
        off = name in ("o_proj", "down_proj")
        made[name] = jnp.asarray(np.full(array.shape, not off, np.float32))
    draft = Draft(draft_spec, made, None, {})
    return SpeculativeDecoder(target, draft, dynamic_tree(2, 2, 5), context=context)


@contextmanager
def serving(decoder=None, keys: Keys | None = None, **settings):
    """Runs a server in a thread; yields its address and parts."""
    config = tiny_config(**settings)
    server = Server(config, decoder or tiny_decoder(), keys or keys_of(config.serve))
    if config.serve.warm_up:
        server.worker.warm_up()
    server.worker.start()
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    waited_for(lambda: server.started, 30)
    try:
        yield SimpleNamespace(
            server=server,
            worker=server.worker,
            url=server.address,
            client=openai.OpenAI(
                base_url=f"{server.address}/v1", api_key="none", max_retries=0, timeout=120
            ),
            raw=httpx.Client(base_url=server.address, timeout=120),
        )
    finally:
        server.worker.close(0.0)
        server.should_exit = True
        thread.join(30)
        assert server.worker.join(30) and not thread.is_alive()


def slow_rounds(patch, seconds: float) -> None:
    """Makes each look at a row take longer. patch: pytest's MonkeyPatch."""
    fast = Session._piece

    def slow(*arguments):
        time.sleep(seconds)
        return fast(*arguments)

    patch.setattr(Session, "_piece", slow)


def waited_for(condition, seconds: float = 60):
    """The first true value of a condition. Fails after so many seconds."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.01)
    return value


def events(response) -> list[dict]:
    """The chunks of a stream that was read whole, without its end mark."""
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]
