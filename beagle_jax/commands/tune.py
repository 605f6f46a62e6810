"""`tune`: from a config to the tree that decode.tree=auto uses."""

from argparse import Namespace
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from beagle_jax.config import Config, read_settings
from beagle_jax.decoding.build import draft_path
from beagle_jax.decoding.tuning import (
    Choice,
    Tuning,
    answers_for_tuning,
    machine,
    remember,
    tune,
    tuned_path,
)
from beagle_jax.errors import UserError
from beagle_jax.evaluation.plots import plot_tuning
from beagle_jax.evaluation.suites import suite, tokenize
from beagle_jax.files import write_text
from beagle_jax.sharding import mesh_for_decoding
from beagle_jax.weights.draft import check_there, load_draft
from beagle_jax.weights.target import configured_target

_SHOWN = 8  # trees in the table


def choose_tree(config: Config, arguments: Namespace) -> tuple[str, dict]:
    """Measures, stores the best tree, and writes and plots what the command line requests.

    Returns the table and its figures.
    """
    if not config.decode.append_predicted:
        raise UserError(
            "decode.append_predicted is false, but tune measures trees whose deeper levels see "
            "predicted states; leave it true"
        )
    mesh = mesh_for_decoding(config.mesh, 1, "tune")
    chats = suite(config.eval.suites[0], arguments.prompts, config.eval.folder)
    check_there(draft_path(config))
    target = configured_target(config.target, mesh, decoding=True)
    draft, prompts = load_draft(draft_path(config), target.spec), tokenize(chats, target.tokenizer)
    texts = answers_for_tuning(target, prompts, config.eval.max_new_tokens, mesh)
    tuning = tune(target, draft, texts, mesh)
    path = tuned_path(config.target.cache_dir, target, draft, mesh)
    remember(path, tuning.best)
    if arguments.plot:
        plot_tuning(tuning, arguments.plot)
    if arguments.write:
        write_text(
            Path(arguments.write),
            with_tree(read_settings(arguments.config, arguments.overrides), tuning.best),
        )
    figures = {
        "machine": machine(),
        "plain_tokens_per_second": tuning.plain_tokens_per_second,
        "remembered": str(path),
        "plain": tuning.best is None,
    }
    what = "plain decoding" if tuning.best is None else "the first tree"
    return (
        f"{table(tuning)}\n{what} is saved for decode.tree=auto in {path}",
        figures | {"choices": [asdict(choice) for choice in tuning.choices]},
    )


def table(tuning: Tuning) -> str:
    """Formats the measurements and the best trees."""
    lines = [
        machine(),
        "",
        "verify, ms:      "
        + "  ".join(f"{rows}: {ms:.1f}" for rows, ms in tuning.verify_ms.items()),
    ]
    lines += [
        "draft, ms:       "
        + "  ".join(
            f"topk {topk}: {tuning.draft_ms[1, topk]:.1f} + "
            f"{tuning.draft_ms[2, topk] - tuning.draft_ms[1, topk]:.1f} a level"
            for topk in sorted({k for _, k in tuning.draft_ms})
        )
    ]
    lines += ["", f"right token by rank, {tuning.places} places (share of those right above):"]
    lines += [
        f"  depth {depth + 1}:  " + "  ".join(f"{share:.2f}" for share in row)
        for depth, row in enumerate(tuning.rank_share)
    ]
    lines += ["", "levels  topk  nodes    tau   ms/round   tok/s   against plain"]
    plain = tuning.plain_tokens_per_second
    for choice in tuning.choices[:_SHOWN]:
        lines.append(
            f"{choice.levels:6d}{choice.topk:6d}{choice.nodes:7d}{choice.tau:7.2f}{choice.milliseconds:11.1f}"
            f"{choice.tokens_per_second:8.1f}{choice.tokens_per_second / plain:11.2f}x"
        )
    lines.append(f" plain{'':13}{1:7.2f}{tuning.verify_ms[1]:11.1f}{plain:8.1f}{1:11.2f}x")
    best = tuning.choices[0]
    if tuning.best is None:
        dear = best.milliseconds / tuning.verify_ms[1]
        lines.append(
            f"no tree is faster than plain decoding: the best round takes {dear:.2f} times as long "
            f"as a plain step and writes {best.tau:.2f} tokens; decode plainly, or train the draft "
            "further"
        )
    return "\n".join(lines)


def with_tree(settings: dict[str, Any], choice: Choice | None) -> str:
    """Returns a config with these settings and this tree, as YAML.

    choice: None if no tree pays. The config then has `tree: auto`, which decodes plainly on this
    machine.
    """
    tree: dict[str, Any] = {"tree": "auto"}
    if choice is not None:
        sizes = {"levels": choice.levels, "topk": choice.topk, "nodes": choice.nodes}
        tree = {"tree": "dynamic", **sizes}
    return yaml.safe_dump(settings | {"decode": settings.get("decode", {}) | tree}, sort_keys=False)
