"""Reproduces the paper's figures: trains drafts, measures all, and judges the claims.

    python experiments/run.py experiments/paper.yaml                # everything; hours on two cores
    python experiments/run.py experiments/paper.yaml --only fig4    # what one figure needs
    python experiments/run.py experiments/paper.yaml --short        # few steps, in its own folder
    python experiments/run.py experiments/paper.yaml --draw         # no training: draw what exists
    python experiments/run.py experiments/paper.yaml target.source=hf:org/name \\
        folder=runs/other data.folder=runs/other/data
    python experiments/run.py experiments/tiny.yaml --pilot         # what its seeds can show

A run is a folder: config.yaml (for `python -m beagle_jax.train --config`), log.jsonl, checkpoints,
draft/, and step-N.json with what its draft accepted after N steps. Finished work is not repeated,
an interrupted run continues from its last checkpoint, and the figures name a run that cannot be
made. Times are meaningful only on a machine that does nothing else: with --shared no times are
recorded, and work that only measures times is left to a later call.
"""

import argparse
import gc
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import yaml
from plan import Plan, Training, load_plan
from power import power_table, register, registered
from results import decoded, measured, write_results

from beagle_jax import terminal
from beagle_jax.commands.evaluate import evaluate
from beagle_jax.commands.train import train_draft, training_target
from beagle_jax.config import Config, Identity, Result, load_config, parse_override
from beagle_jax.decoding.build import decoder_of, draft_path, drafter_of
from beagle_jax.decoding.sampling import sampling_of
from beagle_jax.errors import UsageError, UserError, run_main
from beagle_jax.evaluation.suites import suite, tokenize
from beagle_jax.files import write_text
from beagle_jax.json_file import read_json
from beagle_jax.weights.draft import DIGEST
from beagle_jax.weights.target import Target


def main(argv: Sequence[str]) -> None:
    """Entry point."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("plan", help="file of experiments, for example experiments/paper.yaml")
    made.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="settings of all runs; folder=..: where they and the results go",
    )
    made.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="FIGURE",
        help="what this figure needs, and no more",
    )
    made.add_argument(
        "--short", action="store_true", help="a few steps and one seed, in a folder of its own"
    )
    made.add_argument(
        "--draw", action="store_true", help="train nothing: figures and table of what is there"
    )
    made.add_argument(
        "--shared",
        action="store_true",
        help="other work runs on this machine: keep no times, leave the evaluations for later",
    )
    made.add_argument(
        "--pilot",
        action="store_true",
        help="train the pilot's seeds in a folder of its own, and write what the seeds of the plan "
        "can show (power.py)",
    )
    arguments = made.parse_intermixed_args(argv)
    if arguments.pilot and arguments.only:
        raise UsageError("--pilot is of the whole plan; leave --only out")
    terminal.prepare(argparse.Namespace(quiet=False))
    overrides = dict(map(parse_override, arguments.overrides))
    load = partial(load_plan, Path(arguments.plan), overrides, short=arguments.short)
    plan = load(pilot=arguments.pilot).only(arguments.only)
    shows = {} if arguments.short or arguments.pilot else registered(plan)
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str((plan.folder / "programs").absolute()))
    failed = {} if arguments.draw else run_all(plan, shared=arguments.shared)
    if arguments.pilot:
        path = plan.results / "power.json" if arguments.short else plan.registered
        print(power_table(register(load(), measured(plan) | decoded(plan), path)))
    else:
        print(write_results(plan, failed, whole=not arguments.only, shows=shows))
    if failed:
        raise UserError(
            f"{len(failed)} could not be made:\n"
            + "\n".join(f"  {name}: {error}" for name, error in failed.items())
        )


def run_all(plan: Plan, *, shared: bool) -> dict[str, str]:
    """Makes every training and evaluation that does not exist yet.

    shared: record no times. Returns the failed ones with the reason.
    """
    trainings, failed = list(plan.trainings()), {}

    def attempt(name: str, make: Callable[[], None]) -> None:
        try:
            make()
        except UserError as error:
            failed[name] = str(error)
            print(f"{name} cannot be made: {error}", file=sys.stderr, flush=True)
        # Compiled programs of a hundred runs would not fit in memory; `programs` has them on disk.
        jax.clear_caches()
        gc.collect()

    for number, training in enumerate(trainings, 1):
        name = f"{training.name}-{training.seed}"
        print(f"[{number}/{len(trainings)}] {name}", flush=True)
        attempt(name, partial(train_and_measure, plan, training, shared=shared))
    for name in () if shared else plan.evaluations:
        for folder, drafts in plan.evaluated(name).items():
            print(f"[evaluation] {folder.name}", flush=True)
            attempt(folder.name, partial(evaluate_drafts, plan, name, folder, drafts))
    return failed


def train_and_measure(plan: Plan, training: Training, *, shared: bool) -> None:
    """Trains a run from point to point and writes what its draft accepts at each.

    Also writes the speed of training, unless `shared`.
    """
    folder, run, target = plan.folder_of(training), plan.runs[training.name], None
    folder.mkdir(parents=True, exist_ok=True)
    for steps in run.points:
        path = folder / f"step-{steps}.json"
        config = _written(
            folder / "config.yaml", plan.settings_of(training, steps), f"train.{run.stage}.steps"
        )
        if not path.exists():
            target = target or training_target(config)
            train_draft(config, target)
            speed = {"training_tokens_per_second": [] if shared else training_speed(config)}
            write_text(
                path,
                json.dumps(
                    {"step": steps, "seed": training.seed, **accepted(config, target), **speed}
                ),
            )


def _written(path: Path, settings: Mapping[str, Any], steps: str) -> Config:
    """Writes the config of a run to its folder.

    Raises: UserError if the folder was made with other settings than these, the number of steps
    excepted.
    """
    return _config(path, settings, ("text", "stage", "answers", "tau"), except_for=steps)


def _config(
    path: Path, settings: Mapping[str, Any], decided: Sequence[Result], except_for: str = ""
) -> Config:
    """Writes a config to `path` and reads it back.

    Relative paths in it refer to the working directory.

    Raises: UserError, leaving the existing file, if these results were made with other settings.
    """
    text = yaml.safe_dump(dict(settings), sort_keys=False)
    before = path.read_text(encoding="utf-8") if path.exists() else None
    there = None if before is None else load_config(path, relative_to=".")
    write_text(path, text)
    config = load_config(path, relative_to=".")
    if there is not None and before is not None:
        changed = {
            key
            for result in decided
            for key in Identity.of(config, result).diff(Identity.of(there, result))
        } - {except_for}
        if changed:
            write_text(path, before)
            raise UserError(
                f"{path}: made with other settings of {', '.join(sorted(changed))}; delete "
                f"{path.parent}, or change them back"
            )
    return config


def accepted(config: Config, target: Target) -> dict[str, list]:
    """Returns what the draft accepts in real decoding, by prompt of the first suite.

    All prompts form one batch.
    """
    prompts = tokenize(
        suite(config.eval.suites[0], config.eval.limit, config.eval.folder), target.tokenizer
    )
    decoder = decoder_of(config, target, drafter_of(config, target, draft_path(config)))
    answers = decoder.generate(
        prompts,
        sampling_of(config.decode),
        max_new_tokens=config.eval.max_new_tokens,
        seed=config.decode.seed,
    )
    # The token of the prefill belongs to no round.
    return {
        "tokens": [len(answer.tokens) - 1 for answer in answers],
        "rounds": [answer.rounds for answer in answers],
        "accepted": [answer.accepted for answer in answers],
    }


def training_speed(config: Config) -> list[float]:
    """Returns supervised tokens per second, one value per log record.

    The first record after each start of the program is left out: its time includes a compilation.
    """
    speeds, compiled = [], False
    for text in (Path(config.train.folder) / "log.jsonl").read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        if line["stage"] == "data":
            compiled = False
        elif "tokens_per_second" in line:
            speeds += [line["tokens_per_second"]] if compiled else []
            compiled = True
    return speeds


def evaluate_drafts(plan: Plan, name: str, folder: Path, drafts: Sequence[Training]) -> None:
    """Runs `evaluate` on drafts that are timed side by side (`Plan.evaluated`).

    Answers that are already in the folder are kept.

    Raises: UserError if they were measured with other settings, or if the drafts were trained again
    since.
    """
    folders = [plan.folder_of(draft) for draft in drafts]
    settings = {
        **plan.base,
        **plan.evaluations[name].set,
        "train.folder": str(folders[0]),
        "draft.path": str(folders[0] / "draft"),
        "eval.compare": [str(folder / "draft") for folder in folders[1:]],
    }
    if (folder / "report.json").exists():
        _config(folder / "config.yaml", settings, ("answers",))
        with (folder / "answers.jsonl").open(encoding="utf-8") as stream:
            measured = json.loads(stream.readline())["drafts"].values()
        if list(measured) != [
            read_json(draft / "draft" / "config.json", "train it again")[DIGEST]
            for draft in folders
        ]:
            raise UserError(
                f"{folder}: its drafts were trained again since they were measured; delete it "
                "to have them measured again"
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "config.yaml", yaml.safe_dump(settings, sort_keys=False))
    evaluate(load_config(folder / "config.yaml", relative_to="."), str(folder))


if __name__ == "__main__":
    sys.exit(run_main(main))
