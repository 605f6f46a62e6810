"""A kind of draft that only this file defines decodes through the public interface."""

from dataclasses import dataclass, field, replace
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY
from decode_cases import letters, naive_greedy, run, target_of

from beagle_jax.decoding.decoder import SpeculativeDecoder
from beagle_jax.decoding.draft import Frontier, LevelOutput, TreeDrafter
from beagle_jax.decoding.drafter import Drafter, Draw, Known, Proposal, Seen
from beagle_jax.decoding.nodes import chain_nodes
from beagle_jax.decoding.round import Round
from beagle_jax.decoding.sampling import GREEDY, Sampling
from beagle_jax.decoding.tree import Tree, chain, dynamic_tree
from beagle_jax.model.layers import rms_norm
from beagle_jax.model.masks import causal_mask
from beagle_jax.model.target import forward, head

PROMPTS = [[5], [7, 8, 9], list(range(40))]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Copies(Drafter):
    """Drafts the last token again and again; its state counts the tokens it saw."""

    kind: ClassVar[str] = "copies"

    def init(self, batch: int, capacity: int) -> jax.Array:
        return jnp.zeros(batch, jnp.int32)

    def observe(self, state: jax.Array, seen: Seen) -> jax.Array:
        return state + seen.count_B

    def propose(self, state: jax.Array, known: Known, tree: Tree, draw: Draw | None) -> Proposal:
        token_BW = jnp.broadcast_to(known.root_B[:, None], (len(known.root_B), tree.size))
        return Proposal(chain_nodes(token_BW))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Likes(TreeDrafter):
    """Has a fixed score for each token, with its own head over its own vocabulary."""

    kind: ClassVar[str] = "likes"

    score_V: jax.Array
    token_V: jax.Array
    width: int = field(default=4, metadata=dict(static=True))

    @property
    def ids_V(self) -> jax.Array:
        return self.token_V

    def init(self, batch: int, capacity: int) -> tuple:
        return ()

    def observe(self, state: tuple, seen: Seen) -> tuple:
        return ()

    def level(self, state: tuple, frontier: Frontier) -> LevelOutput:
        B, T = frontier.token_BT.shape
        logits_VM = jnp.broadcast_to(self.score_V[:, None], (len(self.score_V), B * T))
        return LevelOutput(jnp.zeros((B, T, self.width)), logits_VM, None)


def _target():
    """Makes a target that repeats itself now and then."""
    return target_of(tokenizer=letters())


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(1.0)], ids=["greedy", "drawn"])
def test_a_toy_decodes(sampling):
    target = _target()
    plain = SpeculativeDecoder(target).generate(PROMPTS, sampling, max_new_tokens=30, seed=2)
    decoder = SpeculativeDecoder(target, Copies(), chain(3))
    for batch in (None, 2):
        answers = decoder.generate(PROMPTS, sampling, max_new_tokens=30, seed=2, batch=batch)
        assert [answer.tokens for answer in answers] == [answer.tokens for answer in plain]
    if sampling.greedy:
        assert plain[0].tokens == naive_greedy(target, PROMPTS[0], 30)
    stream = decoder.stream(PROMPTS[0], sampling, max_new_tokens=30, seed=2)
    assert "".join(stream) == plain[0].text and stream.answer == answers[0]


def test_a_toy_sees_every_token_once():
    decoder = SpeculativeDecoder(target_of(), Copies(), chain(2))
    _, state = decoder.prefilled(PROMPTS, max_new_tokens=8)
    assert state.draft.tolist() == [len(prompt) for prompt in PROMPTS]
    assert state.draft.tolist() == state.cache.length_B.tolist()


@pytest.mark.parametrize("tree", [chain(2), dynamic_tree(2, 3, 6)], ids=["chain", "dynamic"])
def test_a_toy_whose_tree_is_grown_outside_decodes(tree):
    target = target_of()
    expected = [naive_greedy(target, prompt, 24) for prompt in PROMPTS]
    tokens = jnp.array([expected[0][1], 5, 17, 40], jnp.int32)
    likes = Likes(jnp.array([3.0, 2.0, 1.0, 0.0]), tokens)
    answers = SpeculativeDecoder(target, likes, tree).generate(PROMPTS, max_new_tokens=24)
    assert [answer.tokens for answer in answers] == expected
    assert sum(answer.rounds for answer in answers) < 3 * 23  # the liked token was accepted


class Wrong(Copies):
    """Planted: the second copy has the root as its parent."""

    def propose(self, state, known, tree, draw):
        nodes = super().propose(state, known, tree, draw).nodes
        return Proposal(nodes._replace(parent_BW=jnp.zeros_like(nodes.parent_BW)))


def test_planted_bug_a_node_with_another_parent():
    jax.tree_util.register_dataclass(Wrong)
    target = target_of()
    # after some of these prompts the target repeats a token once, and not twice
    answers = SpeculativeDecoder(target, Wrong(), chain(2)).generate(
        [[token] for token in range(TINY.vocab_size)], max_new_tokens=24
    )
    expected = [naive_greedy(target, [token], 24) for token in range(TINY.vocab_size)]
    assert [answer.tokens for answer in answers] != expected


# Streams of the target


class Read(NamedTuple):
    """All that a drafter got of the target."""

    input_BSI: jax.Array
    last_BI: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Taps(TreeDrafter):
    """Drafts what the target said after the last token that it read, which is the root again.

    It reads that off the stream that leaves the last layer, the last of its taps, through the
    target's own norm and head.
    """

    kind: ClassVar[str] = "taps"

    norm_D: jax.Array
    head_VD: jax.Array
    streams: tuple[int, ...] = field(default=(1, 2), metadata=dict(static=True))

    @property
    def taps(self) -> tuple[int, ...]:
        return self.streams

    def init(self, batch: int, capacity: int) -> Read:
        width = len(self.streams) * len(self.norm_D)
        return Read(jnp.zeros((batch, capacity, width)), jnp.zeros((batch, width)))

    def observe(self, state: Read, seen: Seen) -> Read:
        B, T = seen.token_BT.shape
        step_1T = jnp.arange(T)[None]
        text_BT = step_1T < seen.count_B[:, None]
        slot_BT = jnp.where(text_BT, seen.start_B[:, None] + step_1T, state.input_BSI.shape[1])
        row_B1, last_B = jnp.arange(B)[:, None], seen.count_B - 1
        return Read(
            state.input_BSI.at[row_B1, slot_BT].set(seen.input_BTI, mode="drop"),
            jnp.where(text_BT[:, :1], seen.input_BTI[row_B1[:, 0], last_B], state.last_BI),
        )

    def level(self, state: Read, frontier: Frontier) -> LevelOutput:
        B, T = frontier.token_BT.shape
        D = len(self.norm_D)
        logits_BV = rms_norm(state.last_BI[:, -D:], self.norm_D, TINY.rms_norm_eps) @ self.head_VD.T
        return LevelOutput(jnp.zeros((B, T, D)), jnp.repeat(logits_BV, T, axis=0).T, None)


def _taps(target) -> Taps:
    return Taps(target.params["norm_D"], head(target.params))


_read = jax.jit(forward, static_argnums=1, static_argnames="taps")


def check_taps(monkeypatch, tree, prompts=PROMPTS, **parts) -> None:
    """The drafter got each stream of each token of the text, from chunks and from rounds."""
    monkeypatch.setattr("beagle_jax.decoding.session.PREFILL_CHUNK", 16)
    target = target_of()
    drafter = _taps(target)
    decoder = SpeculativeDecoder(target, drafter, tree).with_(**parts)
    now, state = decoder.prefilled(prompts, max_new_tokens=24)
    state, snapshot = run(now, state, 99)
    assert sum(np.asarray(snapshot.rounds_B)) < 23 * len(prompts)  # some paths are longer than 1
    for row, prompt in enumerate(prompts):
        length = int(state.cache.length_B[row])
        text = [*prompt, *np.asarray(snapshot.out_BS[row]).tolist()][:length]
        padded_1T = np.array([text + [0] * (64 - length)])  # one program for texts of any length
        place_1T, mask_1TT = np.arange(64)[None], causal_mask(jnp.array([length]), 64)
        output = _read(target.params, target.spec, padded_1T, place_1T, mask_1TT, taps=drafter.taps)
        expected_LI = np.concatenate([stream[0, :length] for stream in output.taps], axis=-1)
        # 1e-4: several layers, read in chunks and trees here and at once there
        given_LI = state.draft.input_BSI[row, :length]
        np.testing.assert_allclose(given_LI, expected_LI, atol=1e-4, rtol=1e-5)


tapping_trees = pytest.mark.parametrize(
    "tree", [chain(2), dynamic_tree(2, 3, 6)], ids=["chain", "dynamic"]
)


@tapping_trees
def test_a_drafter_gets_the_streams_that_it_taps(monkeypatch, tree):
    check_taps(monkeypatch, tree)


def _of_unaccepted_nodes(now, state, accepted, output):
    """Each round's first nodes in the place of its path, in the taps alone."""
    path_BP1 = jnp.broadcast_to(jnp.arange(3)[None], accepted.path_BP1.shape)
    first = accepted._replace(path_BP1=path_BP1)
    wrong = Round.append(now, state, first, output).draft
    return Round.append(now, state, accepted, output)._replace(draft=wrong)


def _of_another_layer(now, state, nodes):
    output = Round.read(now, state, nodes)
    return replace(output, taps=output.taps[::-1])


def _one_token_late(now, state, chunk, first, prefix=None):
    after, states_RTD = Round.read_chunk(now, state, chunk, first, prefix)
    late = jax.tree.map(lambda x: jnp.roll(x, 1, axis=1), after.draft.input_BSI)
    return after._replace(draft=after.draft._replace(input_BSI=late)), states_RTD


@pytest.mark.parametrize(
    "planted",
    [
        {"append": _of_unaccepted_nodes},
        {"read": _of_another_layer},
        {"read_chunk": _one_token_late},
    ],
    ids=["path", "layer", "chunk"],
)
def test_planted_bugs_in_what_is_tapped(monkeypatch, planted):
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        check_taps(monkeypatch, dynamic_tree(2, 3, 6), **planted)


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(1.0)], ids=["greedy", "drawn"])
def test_a_drafter_with_taps_decodes(sampling):
    """It drafts what `Copies` drafts, so that both take the same rounds."""
    target = _target()
    plain = SpeculativeDecoder(target).generate(PROMPTS, sampling, max_new_tokens=30, seed=2)
    tapped, copies = (
        SpeculativeDecoder(target, drafter, chain(3)).generate(
            PROMPTS, sampling, max_new_tokens=30, seed=2, batch=2
        )
        for drafter in (_taps(target), Copies())
    )
    assert [answer.tokens for answer in tapped] == [answer.tokens for answer in plain]
    if sampling.greedy:
        assert [answer.rounds for answer in tapped] == [answer.rounds for answer in copies]
        assert sum(answer.rounds for answer in tapped) < sum(answer.rounds for answer in plain)


def test_without_taps_a_round_computes_nothing_for_them():
    target = target_of()

    def outputs(drafter) -> list:
        now, state = SpeculativeDecoder(target, drafter, chain(2)).prefilled([[5]])
        nodes = now.propose(state).nodes
        return jax.tree.leaves(jax.eval_shape(Round.read, now, state, nodes))

    rows = 2 * TINY.num_layers
    assert len(outputs(Copies())) == 1 + rows
    assert len(outputs(_taps(target))) == 1 + rows + 2
