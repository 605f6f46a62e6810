"""Evaluates the draft on the available suites: python -m benchmarks.one_gpu.evaluate OUT

Run by `__main__.py`, which stops it when its time is over. Answers are stored as they are
generated, so that the next call continues within a suite. The drafts that the config names are
evaluated next to the trained one, as far as they exist.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from beagle_jax.commands.evaluate import evaluate
from beagle_jax.config import Config, load_config
from beagle_jax.errors import UserError, run_main
from beagle_jax.evaluation.report import table
from beagle_jax.evaluation.suites import SUITES
from beagle_jax.json_file import read_json
from benchmarks.one_gpu.parts import Settings, finish, is_finished, read_parts, read_settings


def suites_of(config: Config, settings: Settings) -> list[str]:
    """Returns the suites to evaluate.

    Named suites if there are any; otherwise the config's available suites and the published ones
    that are available.
    """
    if settings.suites is not None:
        return settings.suites
    there: list[str] = []  # a machine without a network has those of `eval.folder` alone
    if config.eval.folder is not None:
        folder = Path(config.eval.folder).expanduser()
        there = [name for name, made in SUITES.items() if (folder / made.file).exists()]
    named = [name for name in config.eval.suites if name not in SUITES or name in there]
    return list(dict.fromkeys([*named, *there]))


def drafts_of(out: Path, config: Config) -> list[str]:
    """Returns the folders of the drafts, the one to report on first."""
    folders = [str(out / "draft"), config.draft.path, *config.eval.compare]
    there = [name for name in folders if name and (Path(name) / "config.json").exists()]
    there = list(dict.fromkeys(there))
    if not there:
        raise UserError(
            f"no draft to evaluate: neither {out / 'draft'} nor draft.path ({config.draft.path}) "
            "is there; give the phase `train` more time"
        )
    return there


def run(out: Path) -> None:
    """Evaluates every suite that has no report of these drafts yet."""
    settings = read_settings(out)
    config = load_config(settings.config, settings.overrides)
    first, *others = drafts_of(out, config)
    there, digest = read_parts(out), _digest(first)
    for name in suites_of(config, settings):
        part = f"evaluate-{Path(name).name.split('.')[0]}"
        if is_finished(there.get(part)) and there[part].get("draft_digest") == digest:
            continue
        limit = [] if settings.limit is None else [f"eval.limit={settings.limit}"]
        ours = [
            f"eval.suites=[{name}]",
            f"draft.path={first}",
            f"eval.compare=[{','.join(others)}]",
        ]
        suite_config = load_config(settings.config, [*limit, *settings.overrides, *ours])
        answers = out / "work" / f"{part}-{digest[:12]}"
        try:
            made = evaluate(suite_config, str(answers))
            finish(out, part, {"suite": name, "draft_digest": digest, "report": made.as_json()})
            print(table(made), flush=True)
        except UserError as error:
            finish(out, part, {"suite": name, "error": str(error)})


def _digest(folder: str) -> str:
    settings = read_json(Path(folder) / "config.json", "a draft has it", "train it again")
    return str(settings["sha256"])


def main(argv: Sequence[str]) -> None:
    """Entry point."""
    run(Path(argv[0]))


if __name__ == "__main__":
    sys.exit(run_main(main))
