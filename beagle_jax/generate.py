"""Answers a prompt with and without the draft, or chats.

python -m beagle_jax.generate --config FILE "prompt"
"""

import sys
from collections.abc import Sequence

from beagle_jax.command import add_overrides, parser, read_config
from beagle_jax.errors import UsageError, run_main
from beagle_jax.terminal import working


def main(argv: Sequence[str]) -> None:
    """Entry point."""
    made = parser(
        "generate",
        "Answer a prompt by speculative decoding and compare with plain; or chat.",
        'python -m beagle_jax.generate --config configs/smollm2_135m.yaml "Why is the sky blue?"',
        takes='["prompt"]',
    )
    made.add_argument(
        "--chat", action="store_true", help="talk with the model instead, without a prompt"
    )
    made.add_argument("prompt", nargs="?", help="the user's message")
    add_overrides(made)
    arguments = made.parse_args(argv)
    shows = arguments.print_config
    if arguments.prompt and (arguments.chat or (shows and "=" in arguments.prompt)):
        arguments.overrides.insert(0, arguments.prompt)
    elif not arguments.chat and not shows and not (arguments.prompt or "").strip():
        raise UsageError("the prompt is empty; give one, or --chat")
    if arguments.chat and arguments.json:
        raise UsageError("--chat has no figures to write; leave --json out")
    config = read_config(arguments)
    with working(arguments):
        from beagle_jax.commands import generate

        target, fast = generate.load(config)
    if arguments.chat:
        generate.chat(config, fast)
    else:
        generate.answer(config, target, fast, arguments)


if __name__ == "__main__":
    sys.exit(run_main(main))
