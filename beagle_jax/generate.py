"""Answers a prompt with and without the draft, or chats.

python -m beagle_jax.generate --config FILE "prompt"
"""

import argparse
import re
import sys
from collections.abc import Sequence

from beagle_jax.command import add_overrides, parser, read_config
from beagle_jax.errors import UsageError, run_main
from beagle_jax.terminal import working

_OVERRIDE = re.compile(r"[a-z]\w*\.[\w.]+=")


def _take_prompt(arguments: argparse.Namespace) -> None:
    """Finds the prompt: the first word, or the first that is no override if that is one."""
    given = arguments.prompt
    if given and (arguments.chat or (arguments.print_config and "=" in given)):
        arguments.overrides.insert(0, given)
    elif given and _OVERRIDE.match(given):
        words = [given, *arguments.overrides]
        place = next((i for i, word in enumerate(words) if not _OVERRIDE.match(word)), len(words))
        arguments.overrides = words[:place] + words[place + 1 :]
        arguments.prompt = words[place] if place < len(words) else None


def main(argv: Sequence[str]) -> None:
    """Entry point."""
    made = parser(
        "generate",
        "Answer a prompt by speculative decoding and compare with plain; or chat.",
        'python -m beagle_jax.generate --config smollm2_135m "Why is the sky blue?"',
        takes='["prompt"]',
    )
    made.add_argument(
        "--chat", action="store_true", help="talk with the model instead, without a prompt"
    )
    made.add_argument(
        "--colour",
        "--color",
        dest="colour",
        action="store_true",
        help="green: drafted and accepted; the rest is the target's own",
    )
    made.add_argument(
        "--raw", action="store_true", help="the prompt is plain text, without the chat template"
    )
    made.add_argument("prompt", nargs="?", help="the user's message")
    add_overrides(made)
    arguments = made.parse_args(argv)
    _take_prompt(arguments)
    if not (arguments.chat or arguments.print_config or (arguments.prompt or "").strip()):
        raise UsageError("the prompt is empty; give one, or --chat")
    if arguments.chat and arguments.json:
        raise UsageError("--chat has no figures to write; leave --json out")
    if arguments.colour and arguments.json == "-":
        raise UsageError("--json - prints no text that --colour could colour; leave one out")
    if arguments.chat and arguments.raw:
        raise UsageError(
            "--raw is for a prompt; for a chat without markup set target.chat_template=none"
        )
    config = read_config(arguments)
    with working(arguments):
        from beagle_jax.commands import generate

        target, fast = generate.load(config)
    if arguments.chat:
        generate.chat(config, fast, colour=arguments.colour)
    else:
        generate.answer(config, target, fast, arguments)


if __name__ == "__main__":
    sys.exit(run_main(main))
