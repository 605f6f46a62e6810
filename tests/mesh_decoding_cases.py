"""Tokens and drafted trees on meshes of eight virtual devices, and what their programs send.

python tests/mesh_decoding_cases.py OUT.json         # greedy and drawn, on a mesh each
python tests/mesh_decoding_cases.py OUT.json rest    # each kind of draft and tree, on more meshes
"""

import dataclasses
import json
import sys
from unittest import mock

import jax
import numpy as np
from conftest import TINY
from decode_cases import NEVER, next_stop, target_of
from mesh_cases import V, mesh_of, vocabulary_sent

from beagle_jax.decoding import engine, session
from beagle_jax.decoding.decoder import SpeculativeDecoder
from beagle_jax.decoding.round import Round
from beagle_jax.decoding.sampling import GREEDY, Sampling
from beagle_jax.decoding.tree import ROOT_ONLY, chain, dynamic_tree, static_tree
from beagle_jax.model.beagle import BeagleSpec
from beagle_jax.model.eagle import EagleSpec
from beagle_jax.model.eagle3 import Eagle3Spec
from beagle_jax.model.kinds import fresh_params
from beagle_jax.weights.draft import Draft

# Four devices for each KV head, each with one of its query heads.
SPEC = dataclasses.replace(TINY, vocab_size=V, num_layers=1, num_heads=8, head_dim=4)
KINDS = {
    "beagle": BeagleSpec.from_target(SPEC, init_std=0.3),
    "eagle": EagleSpec.from_target(SPEC, init_std=0.3),
    "eagle3": dataclasses.replace(
        Eagle3Spec.from_target(SPEC, init_std=0.3), draft_vocab_size=V // 2, state_layers=(0, 1)
    ),
}
TREES = {
    "plain": ROOT_ONLY,
    "chain": chain(2),
    "static": static_tree([(0,), (2,), (0, 1)]),
    "dynamic": dynamic_tree(2, 2, 5),
}
RULES = {"greedy": GREEDY, "drawn": Sampling(0.8, top_k=20), "ratio": Sampling(0.8)}
WIDE, ROWS = (1, 1, 8), (2, 1, 4)
# kind of draft, tree, rule, mesh
CASES = [
    ("beagle", "dynamic", "greedy", WIDE),
    ("beagle", "dynamic", "drawn", ROWS),
]
REST = [
    case
    for mesh in (WIDE, ROWS, (1, 8, 1), (2, 2, 2))
    for kind in KINDS
    for tree in TREES
    for rule in RULES
    if (rule != "ratio" or tree == "chain") and (case := (kind, tree, rule, mesh)) not in CASES
]
PROMPTS, NEW = [[5], [7, 8, 9], list(range(20))], 6
CHUNKED, CHUNK = CASES[1], 16  # whose last prompt is read in two chunks


def name_of(case: tuple) -> str:
    return " ".join(map(str, case))


def draft_of(kind: str) -> Draft:
    spec = KINDS[kind]
    hot = np.arange(0, V, 2, dtype=np.int32) if kind == "eagle3" else None
    return Draft(spec, fresh_params(spec, jax.random.key(1)), hot, {})


def decoder_of(case: tuple, *, spread: bool, eos_ids=NEVER) -> SpeculativeDecoder:
    kind, tree, rule, shape = case
    rule = "ratio" if rule == "ratio" else "match"
    mesh = mesh_of(shape) if spread else None
    target, draft = target_of(SPEC, eos_ids), draft_of(kind)
    return SpeculativeDecoder(target, draft, TREES[tree], rule=rule, mesh=mesh)


def written(decoder: SpeculativeDecoder, case: tuple) -> dict:
    """The answers, and the trees that the first round drafts."""
    sampling = RULES[case[2]]
    answers = decoder.generate(PROMPTS, sampling, max_new_tokens=NEW, seed=3)
    now, state = decoder.prefilled(PROMPTS, sampling, max_new_tokens=NEW, seed=3)
    nodes = jax.jit(Round.propose)(now, state).nodes
    rows = slice(len(PROMPTS))
    return {
        "tokens": [answer.tokens for answer in answers],
        "rounds": [answer.rounds for answer in answers],
        "drafted": np.asarray(nodes.token_BW)[rows].tolist(),
        "parents": np.asarray(nodes.parent_BW)[rows].tolist(),
    }


def parts(decoder: SpeculativeDecoder) -> dict:
    """The shape of one device's part of some arrays."""
    now = decoder._round
    state = engine.begin(now.reading, batch=4, capacity=128)
    arrays = {
        "target k_FD": now.target.params["layers"][0]["k_FD"],
        "target q_FD": now.target.params["layers"][0]["q_FD"],
        "target embed_VD": now.target.params["embed_VD"],
        "target keys": state.cache.layers[0].k_BKHS,
        "draft keys": now.drafter.rows(state.draft).k_BKHS,
        "draft q_proj": now.drafter.params["q_proj"],
        "draft gate_proj": now.drafter.params["gate_proj"],
        "draft head": now.drafter.head.rows_VD,
    }
    return {name: array.addressable_shards[0].data.shape for name, array in arrays.items()}


def sent(decoder: SpeculativeDecoder) -> list[str]:
    """Collectives of a round that move logits, or slots of a cache."""
    state = engine.begin(decoder._round.reading, batch=4, capacity=4 * V)
    lowered = engine.advance.lower(decoder._round, state, np.int32(3), np.int32(3))
    return vocabulary_sent(lowered.compile().as_text(), also=(4 * V,))


def planted(case: tuple) -> dict:
    """The same with bugs: whose tokens, drafted trees or collectives must differ."""

    def lost_place():
        with mock.patch.object(jax.lax, "axis_index", return_value=0):
            return written(decoder_of(case, spread=True, eos_ids=next_stop()), case)

    def moved(params: dict, name: str, decoder: SpeculativeDecoder) -> dict:
        rolled = np.roll(params[name], len(params[name]) // 8, axis=0)
        params[name] = jax.device_put(rolled, params[name].sharding)
        return written(decoder, case)

    target, draft, whole = (decoder_of(case, spread=True) for _ in range(3))
    with mock.patch("beagle_jax.decoding.draft.top_k", jax.lax.top_k):
        gathered = sent(whole.with_(propose=lambda now, state: now.propose(state)))
    return {
        "each part's own token ids": lost_place(),
        "the target's parts moved": moved(
            target._round.target.params["layers"][0], "gate_FD", target
        ),
        "the draft's parts moved": moved(draft._round.drafter.params, "gate_proj", draft),
        "all logits on every device": gathered,
    }


def main(out: str, which: str = "") -> None:
    measured: dict = {}
    for case in REST if which == "rest" else CASES:
        decoders = [decoder_of(case, spread=spread) for spread in (False, True)]
        chunk = CHUNK if case == CHUNKED else session.PREFILL_CHUNK
        with mock.patch.object(session, "PREFILL_CHUNK", chunk):
            measured[name_of(case)] = [written(decoder, case) for decoder in decoders]
    if which != "rest":
        case = ("beagle", "dynamic", "greedy", WIDE)
        measured["parts"] = {
            str(shape): parts(decoder_of((*case[:3], shape), spread=True)) for shape in (WIDE, ROWS)
        }
        measured["sent"] = sent(decoder_of(case, spread=True))
        measured["planted"] = planted(case)
    with open(out, "w") as stream:
        json.dump(measured, stream)


if __name__ == "__main__":
    main(*sys.argv[1:])
