"""What a round costs beyond its parts, measured with a draft that is always right.

    python benchmarks/oracle_draft.py --config configs/smollm2_135m.yaml --levels 3

The tokens are known in advance, so every round accepts its whole chain; the real draft runs all the same. Prints the time
of a round over (one verification of levels + 1 rows, alone, + the draft steps, alone), and where the rest goes.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np

from beagle_jax.config import load_config
from beagle_jax.decoding import loop
from beagle_jax.decoding.decoder import SpeculativeDecoder
from beagle_jax.decoding.tree import chain
from beagle_jax.decoding.tuning import drafting, machine, milliseconds, verifying
from beagle_jax.evaluation.suites import suite, tokenize
from beagle_jax.weights.draft import load_draft
from beagle_jax.weights.target import load_target


def knows(tokens: list[int], count: int):
    """`loop.propose`, its tokens replaced by the right ones; their dependence on the real draft keeps it from being dropped."""
    known_S = jnp.asarray(np.pad(tokens, (0, count + 1)), jnp.int32)
    right = loop.propose

    def draft(models, shapes, now):
        drafted = right(models, shapes, now)
        nodes = drafted.nodes
        told_BW = known_S[jnp.minimum(now.count_B[:, None] - 1 + nodes.depth_BW, len(known_S) - 1)]
        return drafted._replace(nodes=nodes._replace(token_BW=jnp.where(nodes.token_BW < 0, nodes.token_BW, told_BW)))

    return draft


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    prompt, answer = max(zip(prompts, answers), key=lambda pair: len(pair[1].tokens))
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
        assert first.tokens == answer.tokens and first.rounds == -(-(len(answer.tokens) - 1) // (levels + 1)), first
        whole = 1000 * float(np.median([one.decode_seconds for [one] in rounds])) / first.rounds
        verify = milliseconds(verifying(target, levels + 1))
        models = loop.Models(target.params, draft.params, loop.draft_head_of(target.params, draft.hot_ids))
        steps = milliseconds(drafting(target, draft, models, chain(levels)))
        print(f"chain of {levels}: round {whole:.1f} ms, verify alone {verify:.1f}, draft alone {steps:.1f}, "
              f"left for accept, append and loop {whole - verify - steps:.1f}; ratio {whole / (verify + steps):.3f}")


if __name__ == "__main__":
    main()
