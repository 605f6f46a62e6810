"""Converts drafts to PyTorch, to other servers' forms and back, and targets to other formats.

python -m beagle_jax.convert to-torch --config FILE --out FOLDER
"""

import sys
from collections.abc import Sequence

from beagle_jax.command import add_overrides, parser, read_config
from beagle_jax.config.paths import home
from beagle_jax.errors import UsageError, run_main
from beagle_jax.interrupts import leaves
from beagle_jax.terminal import show, working

# Options of each direction besides --out and --overwrite.
_OPTIONS = {
    "to-torch": ("report",),
    "from-torch": ("source", "allow_pickle"),
    "import-eagle": ("source", "allow_pickle"),
    "to-jax": (),
    "to-hf": (),
    "to-eagle": ("server",),
    "to-speculators": (),
    "to-vllm": (),
}
_SERVERS = ("eagle", "sglang", "vllm")
_FOR = f"--for: {', '.join(_SERVERS)}"
_SOURCE = "--source: the folder or weights file to read"


def main(argv: Sequence[str]) -> None:
    """Entry point."""
    made = parser(
        "convert",
        "Convert drafts and targets to the files of other programs, and back.",
        "python -m beagle_jax.convert --config quickstart to-jax --out out",
        takes="DIRECTION --out FOLDER",
    )
    made.usage = "python -m beagle_jax.convert --config FILE DIRECTION --out FOLDER [..]"
    made.add_argument(
        "direction",
        choices=_OPTIONS,
        metavar="DIRECTION",
        help="to-torch, from-torch, to-eagle, to-speculators, to-vllm, import-eagle; for targets: "
        "to-jax, to-hf",
    )
    made.add_argument("--out", required=True, type=home, metavar="FOLDER", help="folder to write")
    made.add_argument("--overwrite", action="store_true", help="replace the folder if it exists")
    source = "from-torch, import-eagle: folder, file or hf:org/name"
    made.add_argument("--source", type=home, metavar="PATH", help=source)
    pickles = "from-torch, import-eagle: read .bin and .pt too"
    made.add_argument("--allow-pickle", action="store_true", help=pickles)
    loads = "to-eagle: what loads it, eagle, sglang or vllm"
    made.add_argument("--for", dest="server", choices=_SERVERS, metavar="SERVER", help=loads)
    made.add_argument(
        "--report", type=home, metavar="FILE", help="to-torch: evaluate --json, for the model card"
    )
    add_overrides(made)
    arguments = made.parse_args(argv)
    direction = arguments.direction
    options = {"source": "--source", "allow_pickle": "--allow-pickle", "report": "--report"}
    for option, name in (options | {"server": "--for"}).items():
        if getattr(arguments, option) and option not in _OPTIONS[direction]:
            raise UsageError(f"{name} is not an option of {direction}")
    for option, needs in (("server", _FOR), ("source", _SOURCE)):
        if option in _OPTIONS[direction] and not getattr(arguments, option):
            raise UsageError(f"{direction} needs {needs}")
    config = read_config(arguments)
    leaves(f"{arguments.out} is as it was before; run the same command again")
    with working(arguments):
        from beagle_jax.commands import convert

        text, figures = getattr(convert, direction.replace("-", "_"))(config, arguments)
    show(arguments, text, figures)


if __name__ == "__main__":
    sys.exit(run_main(main))
