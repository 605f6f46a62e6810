"""`generate`: streams an answer and compares both ways of decoding, or chats."""

from argparse import Namespace

from beagle_jax import terminal
from beagle_jax.config import Config
from beagle_jax.decoding.build import check_drafter, decoder_of, drafter_of
from beagle_jax.decoding.decoder import SpeculativeDecoder, Stream
from beagle_jax.decoding.requests import NOT_FINITE, Answers, Options
from beagle_jax.decoding.sampling import sampling_of
from beagle_jax.errors import PromptError, UserError
from beagle_jax.sharding import mesh_for_decoding
from beagle_jax.weights.target import Target, configured_target

_GREEN, _PLAIN = "\033[32m", "\033[0m"


def load(config: Config) -> tuple[Target, SpeculativeDecoder]:
    """Loads the target and its speculative decoder with the draft."""
    mesh = mesh_for_decoding(config.mesh, 1, "generate")
    check_drafter(config)
    target = configured_target(config.target, mesh, decoding=True)
    return target, decoder_of(config, target, drafter_of(config, target), mesh=mesh)


def answer(config: Config, target: Target, fast: SpeculativeDecoder, arguments: Namespace) -> None:
    """Streams the answer, then compares the speed of speculative and plain decoding."""
    options = _limits(config)
    if arguments.raw:
        options["raw"] = True
    if arguments.json != "-":
        stream = fast.stream(arguments.prompt, sampling_of(config.decode), **options)
        try:
            show(stream, colour=arguments.colour)
        except KeyboardInterrupt:  # the text so far is printed
            print("\n[stopped; both ways of decoding are not compared]")
            raise
    with terminal.working(arguments):
        plain = SpeculativeDecoder(target, mesh=fast.mesh)
        text, figures = compare(config, fast, plain, arguments.prompt, options)
    figures["quantised"] = target.quantised and target.quantised._asdict()
    terminal.show(arguments, text, figures)


def compare(
    config: Config,
    fast: SpeculativeDecoder,
    plain: SpeculativeDecoder,
    prompt: str,
    limits: Options,
) -> tuple[str, dict]:
    """Times speculative and plain decoding on one prompt; returns a text and the figures."""
    sampling = sampling_of(config.decode)
    for decoder in (fast, plain):  # streaming has compiled most programs; this compiles the rest
        decoder.warm_up([prompt], sampling, **limits)
    fast_answers, plain_answers = (
        _whole(decoder.generate([prompt], sampling, **limits)) for decoder in (fast, plain)
    )
    [speculative], [baseline] = fast_answers, plain_answers
    fast_speed, plain_speed = fast_answers.tokens_per_second, plain_answers.tokens_per_second
    ratio = fast_speed / plain_speed
    equal: bool | None = speculative.tokens == baseline.tokens
    compared = f"token sequences equal: {'yes' if equal else 'NO'}"
    if config.decode.rule == "ratio":
        equal = None  # not comparable
        compared = (
            "token sequences are not compared: decode.rule=ratio draws other tokens than plain "
            "sampling, from the same distribution (decode.rule=match draws the same)"
        )
    text = (
        f"plain        {plain_speed:7.1f} tok/s  {len(baseline.tokens)} "
        f"tokens\nspeculative  {fast_speed:7.1f} tok/s  "
        f"{len(speculative.tokens)} tokens, {speculative.rounds} rounds, tau "
        f"{speculative.tau:.2f}, speedup {ratio:.2f}x\n{compared}"
    )
    figures = {
        "prompt": prompt,
        "text": speculative.text,
        "tokens": len(speculative.tokens),
        "rounds": speculative.rounds,
        "tau": speculative.tau,
        "tokens_per_second": fast_speed,
        "plain_tokens_per_second": plain_speed,
        "speedup": ratio,
        "equal": equal,
    }
    return text, figures


def _whole(answers: Answers) -> Answers:
    """Returns the answers unchanged.

    Raises: UserError if the target produced non-finite values.
    """
    if any(answer.finish == "error" for answer in answers):
        raise UserError(NOT_FINITE)
    return answers


def chat(config: Config, decoder: SpeculativeDecoder, *, colour: bool = False) -> None:
    """Runs a conversation on the terminal, which keeps its caches between turns.

    Ctrl-C ends an answer, /clear forgets the conversation, an empty line or Ctrl-D leaves.
    """
    talk = decoder.conversation()
    sampling, limits = sampling_of(config.decode), _limits(config)
    print("Type a message. Ctrl-C stops an answer, /clear starts a new chat, an empty line quits.")
    while text := _ask():
        if text == "/clear":
            talk.clear()
            continue
        try:
            done = show(talk.stream(text, sampling, **limits), colour=colour)
            [answer], turn = done, talk.turn
            print(
                f"[{len(answer.tokens)} tokens, {done.tokens_per_second:.1f} tok/s, tau "
                f"{answer.tau:.2f}; read {turn.new_tokens} of {turn.prompt_tokens} prompt tokens "
                f"in {done.prefill_seconds:.2f} s]"
            )
        except KeyboardInterrupt:
            print("\n[stopped]")
        except PromptError as error:  # for example a full context; the conversation can continue
            print(f"{error}\n[/clear starts a new chat]")


def show(stream: Stream, *, colour: bool = False) -> Answers:
    """Prints text as it is generated, on request in colour by its origin.

    Returns the answer with its time.
    """
    if colour:
        for piece, drafted in stream.spans():
            print(f"{_GREEN}{piece}{_PLAIN}" if drafted else piece, end="", flush=True)
    else:
        for piece in stream:
            print(piece, end="", flush=True)
    print()
    return _whole(stream.answers)


def _ask() -> str:
    try:
        return input("> ").strip()
    except (EOFError, KeyboardInterrupt):
        print()
        return ""
    except UnicodeDecodeError as error:
        raise UserError(
            f"the input is not text in this terminal's encoding ({error}); start again and "
            "type text"
        ) from error


def _limits(config: Config) -> Options:
    decode = config.decode
    return Options(
        max_new_tokens=decode.max_new_tokens,
        min_new_tokens=decode.min_new_tokens,
        stop=decode.stop,
        stop_token_ids=decode.stop_token_ids,
        ignore_eos=decode.ignore_eos,
        seed=decode.seed,
    )
