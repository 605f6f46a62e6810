"""A kind of draft that only this file defines decodes through the public interface."""

from dataclasses import dataclass, field
from typing import ClassVar

import jax
import jax.numpy as jnp
import pytest
from conftest import TINY
from decode_cases import letters, naive_greedy, target_of

from beagle_jax.decoding.decoder import SpeculativeDecoder
from beagle_jax.decoding.draft import Frontier, LevelOutput, TreeDrafter
from beagle_jax.decoding.drafter import Drafter, Draw, Known, Proposal, Seen
from beagle_jax.decoding.nodes import chain_nodes
from beagle_jax.decoding.sampling import GREEDY, Sampling
from beagle_jax.decoding.tree import Tree, chain, dynamic_tree

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
