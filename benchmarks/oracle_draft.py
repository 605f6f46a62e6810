"""What a round costs beyond its parts, measured with a draft that is always right.

    python benchmarks/oracle_draft.py --config configs/smollm2_135m.yaml --levels 3

The tokens are known in advance, so every round accepts its whole chain; the real draft runs all the
same. Prints the time of a round over (one verification of levels + 1 rows, alone, + the draft
steps, alone), and where the rest goes: accepting and appending, each alone, and what is left for
the loop and the host.
"""

import argparse
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from beagle_jax.config import load_config
from beagle_jax.decoding import loop
from beagle_jax.decoding.decoder import SpeculativeDecoder
from beagle_jax.decoding.tree import chain
from beagle_jax.decoding.tuning import PASSES, drafting, machine, milliseconds, verifying
from beagle_jax.decoding.verify import accept_matching
from beagle_jax.evaluation.suites import suite, tokenize
from beagle_jax.weights.draft import load_draft
from beagle_jax.weights.target import load_target


def knows(tokens: list[int], count: int):
    """`loop.propose`, its tokens replaced by the right ones; their dependence on the real draft
    keeps it from being dropped.
    """
    known_S = jnp.asarray(np.pad(tokens, (0, count + 1)), jnp.int32)
    right = loop.propose

    def draft(models, shapes, now):
        drafted = right(models, shapes, now)
        nodes = drafted.nodes
        told_BW = known_S[jnp.minimum(now.count_B[:, None] - 1 + nodes.depth_BW, len(known_S) - 1)]
        return drafted._replace(
            nodes=nodes._replace(token_BW=jnp.where(nodes.token_BW < 0, nodes.token_BW, told_BW))
        )

    return draft


@partial(jax.jit, static_argnames="depth")
def _accepted(nodes, wanted_BW, depth: int):
    def again(_, wanted_BW):
        return jnp.maximum(wanted_BW, accept_matching(nodes, wanted_BW, depth).bonus_B[:, None])

    return jax.lax.fori_loop(0, PASSES, again, wanted_BW)


@partial(jax.jit, static_argnames="shapes", donate_argnames="state")
def _appended(models, shapes, state, found, states_BWD, rows):
    """The path depends on the pass only in form, or a compiler would take it once for all."""

    def again(index, now):
        return loop.append(
            models,
            shapes,
            now,
            found._replace(path_BP1=found.path_BP1 - index // PASSES),
            states_BWD,
            rows,
        )

    return jax.lax.fori_loop(0, PASSES, again, state)


@partial(jax.jit, static_argnames="shapes")
def _verified(models, shapes, state):
    nodes = loop.propose(models, shapes, state).nodes
    states_BWD, rows = loop.read_tree(models, shapes, state, nodes)
    return nodes, states_BWD, rows, accept_matching(nodes, nodes.token_BW, shapes.tree.depth)


def ending(models, shapes, state) -> tuple[float, float]:
    """Milliseconds of accepting a chain (the target's choice is part of verifying), and of
    appending what was accepted.
    """
    nodes, states_BWD, rows, found = _verified(models, shapes, state)
    accepting = milliseconds(lambda: _accepted(nodes, nodes.token_BW, shapes.tree.depth))
    held = [state]  # given away and got back, as decoding does

    def append():
        held[0] = _appended(models, shapes, held[0], found, states_BWD, rows)
        return held[0]

    return accepting, milliseconds(append)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="configs/smollm2_135m.yaml")
    parser.add_argument("--levels", type=int, nargs="+", default=[3, 7])
    parser.add_argument("--new-tokens", type=int, default=96)
    arguments = parser.parse_args()
    config = load_config(arguments.config)
    target = load_target(config.target.source, config.target.dtype, config.target.cache_dir)
    draft = load_draft(config.draft.path or f"{config.train.folder}/draft", target.spec)
    # The longest answer of a few: a round cut short would spoil the mean.
    prompts = tokenize(suite("held_out", 8), target.tokenizer)
    answers = SpeculativeDecoder(target).generate(prompts, max_new_tokens=arguments.new_tokens)
    prompt, answer = max(zip(prompts, answers, strict=True), key=lambda pair: len(pair[1].tokens))
    print(machine())
    right = loop.propose
    for levels in arguments.levels:
        loop.propose = knows(answer.tokens, levels)
        jax.clear_caches()
        decoder = SpeculativeDecoder(target, draft, chain(levels), context=248)
        decoder.generate([prompt], max_new_tokens=len(answer.tokens))
        rounds = [decoder.generate([prompt], max_new_tokens=len(answer.tokens)) for _ in range(5)]
        loop.propose = right
        [first] = rounds[0]
        assert first.tokens == answer.tokens and first.rounds == -(
            -(len(answer.tokens) - 1) // (levels + 1)
        ), first
        whole = 1000 * float(np.median([one.decode_seconds for [one] in rounds])) / first.rounds
        verify = milliseconds(verifying(target, levels + 1))
        models = loop.Models(
            target.params, draft.params, loop.draft_head_of(target.params, draft.hot_ids)
        )
        steps = milliseconds(drafting(target, draft, models, chain(levels)))
        accepting, appending = ending(*decoder.prefilled(prompt, max_new_tokens=len(answer.tokens)))
        print(
            f"chain of {levels}: round {whole:.1f} ms, verify alone {verify:.1f}, draft alone "
            f"{steps:.1f}, accept {accepting:.2f}, append {appending:.2f}, left for the loop "
            f"{whole - verify - steps - accepting - appending:.1f}; ratio "
            f"{whole / (verify + steps):.3f}"
        )


if __name__ == "__main__":
    main()
