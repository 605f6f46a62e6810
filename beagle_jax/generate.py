"""Answers a prompt with and without the draft: python -m beagle_jax.generate --config FILE "prompt" """

import sys
from collections.abc import Sequence

from beagle_jax.command import add_overrides, parser, read_config
from beagle_jax.config import Config
from beagle_jax.data.template import prompt_tokens
from beagle_jax.decoding.decoder import Decoder
from beagle_jax.decoding.text import TextStream
from beagle_jax.decoding.tree import tree_of
from beagle_jax.errors import UsageError, run_main
from beagle_jax.weights.draft import load_draft
from beagle_jax.weights.target import load_target


def main(argv: Sequence[str]) -> None:
    """Entry point."""
    made = parser("generate", "Answer a prompt by speculative decoding, and compare with plain decoding.",
                  'python -m beagle_jax.generate --config configs/smollm2_135m.yaml "Why is the sky blue?"')
    made.add_argument("prompt", help="the user's message")
    add_overrides(made)
    arguments = made.parse_args(argv)
    if not arguments.prompt.strip():
        raise UsageError("the prompt is empty")
    answer(read_config(arguments), arguments.prompt)


def answer(config: Config, prompt: str) -> None:
    """Prints the answer as it comes, then what both ways of decoding took."""
    target = load_target(config.target.source, config.target.dtype, config.target.cache_dir)
    draft = load_draft(config.draft.path or f"{config.train.folder}/draft", target.spec)
    tokens = prompt_tokens(target.tokenizer, [{"role": "user", "content": prompt}])
    limits = dict(max_new_tokens=config.decode.max_new_tokens, longest_prompt=len(tokens))
    fast = Decoder(target, draft, tree_of(config.decode), **limits)
    plain = Decoder.plain(target, **limits)
    text = TextStream(target.tokenizer, target.eos_ids)
    for new in fast.stream(tokens):
        print(text.add(new), end="", flush=True)
    print(text.close() + "\n")
    for decoder in (fast, plain):
        decoder.warm_up([tokens])
    speculative, baseline = fast.generate(tokens), plain.generate(tokens)
    ratio = speculative.tokens_per_second / baseline.tokens_per_second
    print(f"plain        {baseline.tokens_per_second:7.1f} tok/s  {len(baseline.tokens)} tokens")
    print(f"speculative  {speculative.tokens_per_second:7.1f} tok/s  {len(speculative.tokens)} tokens, "
          f"{speculative.rounds} rounds, tau {speculative.tau:.2f}, speedup {ratio:.2f}x")
    print(f"token sequences equal: {'yes' if speculative.tokens == baseline.tokens else 'NO'}")


if __name__ == "__main__":
    sys.exit(run_main(main))
