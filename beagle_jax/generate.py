"""Answers a prompt with and without the draft, or chats: python -m beagle_jax.generate --config FILE "prompt" """

import sys
from collections.abc import Iterator, Sequence

from beagle_jax.command import add_overrides, parser, read_config
from beagle_jax.config import Config
from beagle_jax.decoding.decoder import Generation, SpeculativeDecoder
from beagle_jax.decoding.sampling import sampling_of
from beagle_jax.decoding.tuning import decoder_of
from beagle_jax.errors import UsageError, UserError, run_main
from beagle_jax.weights.draft import load_draft
from beagle_jax.weights.target import load_target


def main(argv: Sequence[str]) -> None:
    """Entry point."""
    made = parser("generate", "Answer a prompt by speculative decoding, and compare with plain decoding; or chat.",
                  'python -m beagle_jax.generate --config configs/smollm2_135m.yaml "Why is the sky blue?"')
    made.add_argument("--chat", action="store_true", help="talk with the model; what would be the prompt is then an override")
    made.add_argument("prompt", nargs="?", help="the user's message")
    add_overrides(made)
    arguments = made.parse_args(argv)
    if arguments.chat and arguments.prompt:
        arguments.overrides.insert(0, arguments.prompt)
    elif not arguments.chat and not (arguments.prompt or "").strip():
        raise UsageError("the prompt is empty; give one, or --chat")
    config = read_config(arguments)
    target = load_target(config.target.source, config.target.dtype, config.target.cache_dir)
    draft = load_draft(config.draft.path or f"{config.train.folder}/draft", target.spec)
    fast = decoder_of(config, target, draft)
    if arguments.chat:
        chat(config, fast)
    else:
        compare(config, fast, SpeculativeDecoder(target), arguments.prompt)


def compare(config: Config, fast: SpeculativeDecoder, plain: SpeculativeDecoder, prompt: str) -> None:
    """Prints the answer as it comes, then what both ways of decoding took."""
    sampling, limits = sampling_of(config.decode), _limits(config)
    show(fast.stream(prompt, sampling, **limits))
    for decoder in (fast, plain):  # compiled by now, but for what streaming does not use
        decoder.warm_up([prompt], sampling, max_new_tokens=config.decode.max_new_tokens)
    [speculative], [baseline] = (decoder.generate([prompt], sampling, **limits) for decoder in (fast, plain))
    ratio = speculative.tokens_per_second / baseline.tokens_per_second
    print(f"plain        {baseline.tokens_per_second:7.1f} tok/s  {len(baseline.tokens)} tokens")
    print(f"speculative  {speculative.tokens_per_second:7.1f} tok/s  {len(speculative.tokens)} tokens, "
          f"{speculative.rounds} rounds, tau {speculative.tau:.2f}, speedup {ratio:.2f}x")
    print(f"token sequences equal: {'yes' if speculative.tokens == baseline.tokens else 'NO'}")


def chat(config: Config, decoder: SpeculativeDecoder) -> None:
    """A conversation on the terminal. Ctrl-C ends an answer, /clear forgets, an empty line or Ctrl-D leaves."""
    history: list[dict[str, str]] = []
    sampling, limits = sampling_of(config.decode), _limits(config)
    print("Type a message. Ctrl-C cuts an answer short, /clear begins anew, an empty line leaves.")
    while text := _ask():
        if text == "/clear":
            history.clear()
            continue
        history.append({"role": "user", "content": text})
        shown: list[str] = []
        try:
            done = show(decoder.stream(history, sampling, **limits), shown)
            print(f"[{len(done.tokens)} tokens, {done.tokens_per_second:.1f} tok/s, tau {done.tau:.2f}]")
        except KeyboardInterrupt:
            print("\n[cut short]")
        except UserError as error:  # the conversation has outgrown the context: say so and go on
            print(f"{error}\n[/clear begins anew]")
            history.pop()
            continue
        history.append({"role": "assistant", "content": "".join(shown)})


def show(pieces: Iterator[str], shown: list[str] | None = None) -> Generation:
    """Prints text as it comes, and keeps it in `shown`; returns what the stream returns."""
    while True:
        try:
            piece = next(pieces)
        except StopIteration as end:
            print()
            return end.value
        print(piece, end="", flush=True)
        if shown is not None:
            shown.append(piece)


def _ask() -> str:
    try:
        return input("> ").strip()
    except (EOFError, KeyboardInterrupt):
        print()
        return ""


def _limits(config: Config) -> dict:
    return dict(max_new_tokens=config.decode.max_new_tokens, stop=config.decode.stop, seed=config.decode.seed)


if __name__ == "__main__":
    sys.exit(run_main(main))
