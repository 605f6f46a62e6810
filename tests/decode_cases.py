"""Targets and drafts for the decoding tests, and plain decoding without the decoder's code."""

import dataclasses
import itertools
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from conftest import TINY, random_params
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from beagle_jax.decoding.decoder import SpeculativeDecoder
from beagle_jax.decoding.engine import admit, advance, begin
from beagle_jax.decoding.round import Chunk, Round
from beagle_jax.decoding.sampling import GREEDY, Sampling, filters_of, knobs_of
from beagle_jax.decoding.state import DecodeState, Requests, Snapshot
from beagle_jax.model.beagle import BeagleSpec, init_draft
from beagle_jax.model.eagle import EagleSpec, init_eagle
from beagle_jax.model.masks import causal_mask
from beagle_jax.model.target import forward, logits
from beagle_jax.weights.draft import Draft
from beagle_jax.weights.target import Target

NEVER = (10_000,)  # a stop token that is not in the vocabulary
_stops = itertools.count(20_000)

# Without layers the next token depends on the last one alone, so a draft without attention and MLP
# is always right.
MARKOV = dataclasses.replace(TINY, num_layers=0, tie_embeddings=False)


def next_stop() -> tuple[int]:
    """Returns stop tokens that no other test uses.

    They are static, so a program with a planted bug is compiled for its own test alone.
    """
    return (next(_stops),)


def target_of(spec=TINY, eos_ids=NEVER, seed=0, tokenizer=None) -> Target:
    """Makes a random target."""
    params = random_params(spec, seed)
    if not spec.num_layers:
        params = {**params, "norm_D": jnp.asarray(np.ones(spec.hidden_size, np.float32))}
    return Target(spec, params, tokenizer, eos_ids, "test")


def letters() -> PreTrainedTokenizerFast:
    """A tokenizer for TINY: token n is the n-th character from "!" on."""
    vocabulary = {chr(ord("!") + token): token for token in range(TINY.vocab_size)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="!"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    template = (
        "{% for message in messages %}{{ message['role'][0] + message['content'] }}{% endfor "
        "%}{% if add_generation_prompt %}a{% endif %}"
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, chat_template=template, clean_up_tokenization_spaces=False
    )


@lru_cache
def _drawn(init, spec, seed: int) -> dict:
    """Random parameters. Drawing them takes a hundred small programs, so once in a process."""
    return init(spec, jax.random.key(seed))


def random_draft(seed=1, hot_ids=None) -> Draft:
    """A draft that is nearly always wrong."""
    spec = BeagleSpec.from_target(TINY, init_std=0.3)
    return Draft(spec, dict(_drawn(init_draft, spec, seed)), hot_ids, {})


def right_draft(error: float = 0.0) -> Draft:
    """Makes the draft of a MARKOV target that is always right.

    With `error` > 0 it is wrong now and then.
    """
    draft = random_draft()
    off = {
        "o_proj": jnp.asarray(np.zeros_like(draft.params["o_proj"])),
        "down_proj": jnp.asarray(error * np.asarray(draft.params["down_proj"])),
    }
    return Draft(draft.spec, {**draft.params, **off}, None, {})


def random_eagle(seed=1, hot_ids=None) -> Draft:
    """An EAGLE draft that is nearly always wrong."""
    spec = EagleSpec.from_target(TINY, init_std=0.3)
    params = _drawn(init_eagle, spec, seed)
    bias = 0.3 * np.random.default_rng(seed).standard_normal(params["fc_bias"].shape)
    return Draft(
        spec,
        {**params, "fc_bias": jnp.asarray(bias, jnp.float32)},
        hot_ids,
        {},
    )


def right_eagle(error: float = 0.0) -> Draft:
    """Makes the EAGLE draft of a MARKOV target that is always right.

    With `error` > 0 earlier states and entries mislead it now and then.
    """
    draft, D = random_eagle(), TINY.hidden_size
    fc = np.asarray(draft.params["fc"])
    fc = jnp.asarray(np.concatenate([np.eye(D), error * fc[:, D:]], axis=1), jnp.float32)
    off = {
        name: jnp.asarray(error * np.asarray(draft.params[name]))
        for name in ("fc_bias", "o_proj", "down_proj")
    }
    return Draft(draft.spec, {**draft.params, **off, "fc": fc}, None, {})


def round_of(target, draft, tree, sampling: Sampling = GREEDY, **options) -> Round:
    """Makes a round as the decoder does."""
    decoder = SpeculativeDecoder(target, draft, tree, **options)
    return dataclasses.replace(decoder._round, filters=filters_of([sampling]))


def start(
    now: Round, prompts, limit_B, capacity, sampling: Sampling = GREEDY, seeds=None
) -> DecodeState:
    """Returns the state after reading right-padded prompts in one chunk."""
    width, B = max(map(len, prompts)), len(prompts)
    token_BT = np.array([prompt + [0] * (width - len(prompt)) for prompt in prompts], np.int32)
    key_B = jax.vmap(jax.random.key)(jnp.arange(B) if seeds is None else seeds)
    requests = Requests(np.asarray(limit_B, np.int32), key_B, knobs_of([sampling] * B))
    length_B = np.array([len(prompt) for prompt in prompts], np.int32)
    chunk = Chunk(np.arange(B, dtype=np.int32), token_BT, np.int32(0), length_B, requests)
    state = begin(now.reading, batch=B, capacity=capacity)
    return admit(now.reading, state, chunk, first=True)


def planted(kind: type, drafter):
    """Returns the same drafter as another class, which holds a planted bug."""
    if kind not in _planted:
        _register(kind)
        _planted.add(kind)
    return kind(*(getattr(drafter, field.name) for field in dataclasses.fields(drafter)))


def _register(kind: type) -> None:
    """Registers a planted class with itself as static data.

    jax 0.10.2 takes structures of dataclasses with equal fields as equal, and tells classes apart
    by a hash of addresses alone. Now and then jit so ran the class without the bug.
    """
    of_kind = dataclasses.fields(kind)
    fixed = [field.name for field in of_kind if field.metadata.get("static")]
    arrays = [field.name for field in of_kind if field.name not in fixed]

    def flat(drafter):
        values = (getattr(drafter, name) for name in fixed)
        return [getattr(drafter, name) for name in arrays], (kind, *values)

    def made(static, children):
        return kind(
            **dict(zip(fixed, static[1:], strict=True)), **dict(zip(arrays, children, strict=True))
        )

    jax.tree_util.register_pytree_node(kind, flat, made)


def cache_one_row_too_long(now: Round, state: DecodeState, *rest) -> DecodeState:
    """Planted for `Round.emit`: after the first round each cache counts a token too many."""
    after = Round.emit(now, state, *rest)
    first_B = (after.stats.rounds_B == 1).astype(jnp.int32)
    cache = after.cache.with_(length_B=after.cache.length_B + first_B)
    return after._replace(cache=cache)


def append_at_once(now: Round, state: DecodeState, accepted, output) -> DecodeState:
    """Planted for `Round.append`: the slot does not depend on the bonus token."""
    return state._replace(cache=state.cache.append(output.rows, jnp.zeros_like(accepted.bonus_B)))


_planted: set[type] = set()


def run(now: Round, state: DecodeState, rounds: int) -> tuple[DecodeState, Snapshot]:
    """Runs so many rounds, or fewer if all rows are done before."""
    return advance(now, state, np.int32(rounds), np.int32(len(state.transcript.done_B)))


_argmax_next = jax.jit(
    lambda params, spec, tokens, length: jnp.argmax(
        logits(
            params,
            spec,
            forward(
                params,
                spec,
                tokens,
                jnp.arange(tokens.shape[1])[None],
                causal_mask(length, tokens.shape[1]),
            ).states_BTD[:, length[0] - 1],
        )
    ),
    static_argnums=1,
)


def naive_greedy(target: Target, prompt: list[int], max_new: int) -> list[int]:
    """Decodes greedily by running the whole text again for each token.

    It uses no cache and no loop of the package.
    """
    tokens, end = list(prompt), len(prompt) + max_new
    width = -(-end // 64) * 64  # few widths, so that few programs are compiled
    while len(tokens) < end and (len(tokens) == len(prompt) or tokens[-1] not in target.eos_ids):
        padded = jnp.array([tokens + [0] * (width - len(tokens))], jnp.int32)
        tokens.append(
            int(_argmax_next(target.params, target.spec, padded, jnp.array([len(tokens)])))
        )
    return tokens[len(prompt) :]
