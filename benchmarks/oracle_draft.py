"""Overhead of a round beyond its parts, measured with a draft that is always right.

    python benchmarks/oracle_draft.py --config configs/smollm2_135m.yaml --levels 3

The tokens are known in advance, so every round accepts its whole chain. The real draft runs all the
same. Prints the time of a round over (one verification of levels + 1 tokens, alone, + the draft
steps, alone). Also prints where the rest goes: accepting and appending, each alone, and what
remains for the loop and the host.
"""

import argparse
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from beagle_jax.config import load_config
from beagle_jax.decoding.accept import accept_matching
from beagle_jax.decoding.decoder import SpeculativeDecoder
from beagle_jax.decoding.kinds import trained_drafter
from beagle_jax.decoding.round import Round
from beagle_jax.decoding.timing import PASSES, Passes, drafting, milliseconds, verifying
from beagle_jax.decoding.tree import chain
from beagle_jax.decoding.tuning import machine
from beagle_jax.evaluation.suites import suite, tokenize
from beagle_jax.weights.draft import load_draft
from beagle_jax.weights.target import load_target


def knows(tokens: list[int], count: int):
    """Returns `Round.propose` with the correct tokens in place of the drafted ones.

    They depend on the real draft in form, so that the compiler keeps it.
    """
    known_S = jnp.asarray(np.pad(tokens, (0, count + 1)), jnp.int32)

    def propose(now, state):
        proposal = Round.propose(now, state)
        nodes = proposal.nodes
        at_BW = state.transcript.count_B[:, None] - 1 + nodes.depth_BW
        right_BW = known_S[jnp.minimum(at_BW, len(known_S) - 1)]
        token_BW = jnp.where(nodes.token_BW < 0, nodes.token_BW, right_BW)
        return proposal._replace(nodes=nodes._replace(token_BW=token_BW))

    return propose


@partial(jax.jit, static_argnames="depth")
def _accepted(nodes, wanted_BW, depth: int):
    def again(_, wanted_BW):
        return jnp.maximum(wanted_BW, accept_matching(nodes, wanted_BW, depth).bonus_B[:, None])

    return jax.lax.fori_loop(0, PASSES, again, wanted_BW)


@partial(jax.jit, donate_argnames="state")
def _appended(now, state, accepted, output):
    """The path depends on the pass in form only; otherwise the compiler would hoist it."""

    def again(index, state):
        path_BP1 = accepted.path_BP1 - index // PASSES
        return now.append(state, accepted._replace(path_BP1=path_BP1), output)

    return jax.lax.fori_loop(0, PASSES, again, state)


@jax.jit
def _verified(now, state):
    nodes = now.propose(state).nodes
    output = now.read(state, nodes)
    return nodes, output, accept_matching(nodes, nodes.token_BW, now.tree.depth)


def ending(now, state) -> tuple[float, float]:
    """Milliseconds of accepting a chain, and of appending the accepted tokens.

    The target's choice belongs to verification.
    """
    nodes, output, accepted = _verified(now, state)
    accepting = milliseconds(
        Passes(lambda: _accepted(nodes, nodes.token_BW, now.tree.depth), PASSES)
    )
    held = [state]  # donated and returned, as in decoding

    def append():
        held[0] = _appended(now, held[0], accepted, output)
        return held[0]

    return accepting, milliseconds(Passes(append, PASSES))


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
    # Take the longest of a few answers: a round that is cut short would distort the mean.
    prompts = tokenize(suite("held_out", 8), target.tokenizer)
    answers = SpeculativeDecoder(target).generate(prompts, max_new_tokens=arguments.new_tokens)
    prompt, answer = max(zip(prompts, answers, strict=True), key=lambda pair: len(pair[1].tokens))
    print(machine())
    for levels in arguments.levels:
        decoder = SpeculativeDecoder(target, draft, chain(levels), context=248)
        oracle = decoder.with_(propose=knows(answer.tokens, levels))
        oracle.generate([prompt], max_new_tokens=len(answer.tokens))
        runs = [oracle.generate([prompt], max_new_tokens=len(answer.tokens)) for _ in range(5)]
        [first] = runs[0]
        assert first.tokens == answer.tokens and first.rounds == -(
            -(len(answer.tokens) - 1) // (levels + 1)
        ), first
        whole = 1000 * float(np.median([run.decode_seconds for run in runs])) / first.rounds
        verify = milliseconds(verifying(target, levels + 1))
        drafter = trained_drafter(draft, target.params)
        steps = milliseconds(drafting(drafter, chain(levels)))
        accepting, appending = ending(
            *decoder.prefilled([prompt], max_new_tokens=len(answer.tokens))
        )
        print(
            f"chain of {levels}: round {whole:.1f} ms, verify alone {verify:.1f}, draft alone "
            f"{steps:.1f}, accept {accepting:.2f}, append {appending:.2f}, left for the loop "
            f"{whole - verify - steps - accepting - appending:.1f}; ratio "
            f"{whole / (verify + steps):.3f}"
        )


if __name__ == "__main__":
    main()
