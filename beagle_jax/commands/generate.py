"""An answer as it comes and what it took, or a chat."""

from argparse import Namespace
from collections.abc import Iterator

from beagle_jax import terminal
from beagle_jax.config import Config
from beagle_jax.decoding.decoder import Generation, SpeculativeDecoder
from beagle_jax.decoding.sampling import sampling_of
from beagle_jax.decoding.tuning import check_drafter, decoder_of, draft_path, drafter_of
from beagle_jax.errors import UserError
from beagle_jax.weights.target import Target, configured_target


def load(config: Config) -> tuple[Target, SpeculativeDecoder]:
    """The target, and its decoder with the draft."""
    check_drafter(draft_path(config))
    target = configured_target(config.target, decoding=True)
    return target, decoder_of(config, target, drafter_of(config, target))


def answer(config: Config, target: Target, fast: SpeculativeDecoder, arguments: Namespace) -> None:
    """Prints the answer as it comes, then what both ways of decoding took."""
    if arguments.json != "-":
        show(fast.stream(arguments.prompt, sampling_of(config.decode), **_limits(config)))
    with terminal.working(arguments):
        text, figures = compare(config, fast, SpeculativeDecoder(target), arguments.prompt)
    figures["quantised"] = target.quantised and target.quantised._asdict()
    terminal.show(arguments, text, figures)


def compare(
    config: Config, fast: SpeculativeDecoder, plain: SpeculativeDecoder, prompt: str
) -> tuple[str, dict]:
    """Times both ways of decoding."""
    sampling, limits = sampling_of(config.decode), _limits(config)
    for decoder in (fast, plain):  # compiled by now, but for what streaming does not use
        decoder.warm_up([prompt], sampling, max_new_tokens=config.decode.max_new_tokens)
    [speculative], [baseline] = (
        decoder.generate([prompt], sampling, **limits) for decoder in (fast, plain)
    )
    ratio, equal = (
        speculative.tokens_per_second / baseline.tokens_per_second,
        speculative.tokens == baseline.tokens,
    )
    text = (
        f"plain        {baseline.tokens_per_second:7.1f} tok/s  {len(baseline.tokens)} "
        f"tokens\nspeculative  {speculative.tokens_per_second:7.1f} tok/s  "
        f"{len(speculative.tokens)} tokens, {speculative.rounds} rounds, tau "
        f"{speculative.tau:.2f}, speedup {ratio:.2f}x\ntoken sequences equal: "
        f"{'yes' if equal else 'NO'}"
    )
    figures = {
        "prompt": prompt,
        "text": speculative.text,
        "tokens": len(speculative.tokens),
        "rounds": speculative.rounds,
        "tau": speculative.tau,
        "tokens_per_second": speculative.tokens_per_second,
        "plain_tokens_per_second": baseline.tokens_per_second,
        "speedup": ratio,
        "equal": equal,
    }
    return text, figures


def chat(config: Config, decoder: SpeculativeDecoder) -> None:
    """A conversation on the terminal. Ctrl-C ends an answer, /clear forgets, an empty line or
    Ctrl-D leaves.
    """
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
            print(
                f"[{len(done.tokens)} tokens, {done.tokens_per_second:.1f} tok/s, tau "
                f"{done.tau:.2f}]"
            )
        except KeyboardInterrupt:
            print("\n[cut short]")
        except UserError as error:  # the conversation has outgrown the context: say so and go on
            print(f"{error}\n[/clear begins anew]")
            history.pop()
            continue
        if shown:
            history.append({"role": "assistant", "content": "".join(shown)})
        else:  # templates refuse an empty answer
            history.pop()


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
    except UnicodeDecodeError as error:
        raise UserError(
            f"what was typed is not text in this terminal's encoding ({error})"
        ) from error


def _limits(config: Config) -> dict:
    return dict(
        max_new_tokens=config.decode.max_new_tokens,
        stop=config.decode.stop,
        seed=config.decode.seed,
    )
