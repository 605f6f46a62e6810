"""`tune`: from a config to the tree that decode.tree=auto uses."""

import logging
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from jax.sharding import Mesh

from beagle_jax.config import Config, read_settings
from beagle_jax.decoding.acceptance import Acceptance, save_acceptance, saved_acceptance
from beagle_jax.decoding.build import LOOKUP, PLAIN, check_drafter, draft_path, drafter_of
from beagle_jax.decoding.sampling import Sampling, sampling_of
from beagle_jax.decoding.session import CAPACITY_BUCKET
from beagle_jax.decoding.timing import Situation
from beagle_jax.decoding.tuning import (
    FULL,
    QUICK,
    Choice,
    Tuning,
    answers_for_tuning,
    machine,
    measured_acceptance,
    remember,
    tune,
    tuned_path,
)
from beagle_jax.errors import UserError
from beagle_jax.evaluation.plots import plot_tuning
from beagle_jax.evaluation.suites import suite, tokenize
from beagle_jax.files import write_text
from beagle_jax.model.cache import round_up
from beagle_jax.remote import is_url
from beagle_jax.sharding import mesh_for_decoding
from beagle_jax.terminal import listen
from beagle_jax.weights.draft import Draft
from beagle_jax.weights.draft_source import draft_folder
from beagle_jax.weights.target import Target, configured_target

_log = logging.getLogger(__name__)

_SHOWN = 8  # trees in the table
_SHORT_PROMPTS, _SHORT_TOKENS = 3, 48  # of a short measurement of acceptance
_ROUND = 8  # cache slots for the nodes of a round


def choose_tree(config: Config, arguments: Namespace) -> tuple[str, dict]:
    """Measures, stores the best tree, and writes and plots what the command line requests.

    Returns the table and its figures.
    """
    listen()
    _check(config)
    rows = config.serve.rows if arguments.serve else 1
    mesh = mesh_for_decoding(config.mesh, rows, "tune")
    chats = suite(config.eval.suites[0], arguments.prompts, config.eval.folder)
    check_drafter(config)
    target = configured_target(config.target, mesh, decoding=True)
    draft, prompts = drafter_of(config, target), tokenize(chats, target.tokenizer)
    assert isinstance(draft, Draft)  # by `_check`
    sampling = sampling_of(config.decode)
    acceptance = _acceptance(config, target, draft, prompts, mesh, quick=arguments.quick)
    where = Situation(rows, _capacity(config, target, prompts, serve=arguments.serve), sampling)
    tuning = tune(target, draft, acceptance, mesh, where, QUICK if arguments.quick else FULL)
    if arguments.plot:
        plot_tuning(tuning, arguments.plot)
    path = tuned_path(config.target.cache_dir, target, draft, mesh, rows, sampling)
    saved = _saved(tuning, path, arguments)
    figures = {
        "machine": machine(),
        "plain_tokens_per_second": tuning.plain_tokens_per_second,
        "remembered": None if tuning.disturbed else str(path),
        "plain": tuning.best is None,
        "disturbed": tuning.disturbed,
        "batch": where.batch,
        "capacity": where.capacity,
        "sampling": where.sampling._asdict(),
        "acceptance": acceptance.texts,
    }
    return (
        f"{table(tuning)}\n{saved}",
        figures | {"choices": [asdict(choice) for choice in tuning.choices]},
    )


def _check(config: Config) -> None:
    """Raises UserError for settings with which a dynamic tree is not decoded as it is measured."""
    path, decode = draft_path(config), config.decode
    if path in (LOOKUP, PLAIN):
        raise UserError(
            f"draft.path is {path}, but tune measures a trained draft; set draft.path to its folder"
        )
    if not decode.append_predicted:
        raise UserError(
            "decode.append_predicted is false, but tune measures trees whose deeper levels see "
            "predicted states; leave it true"
        )
    if decode.rule == "ratio":
        raise UserError(
            "decode.rule is ratio, which is for chains, but tune chooses dynamic trees; set "
            "decode.rule to match"
        )


def _capacity(config: Config, target: Target, prompts: list[list[int]], *, serve: bool) -> int:
    """Returns the cache slots of a row: the server's, or those of the longest sample prompt."""
    most = target.spec.max_positions
    tokens = max(map(len, prompts)) + config.decode.max_new_tokens
    tokens = config.serve.context if serve else tokens
    return round_up(min(tokens, most) + _ROUND, CAPACITY_BUCKET)


def _acceptance(
    config: Config,
    target: Target,
    draft: Draft,
    prompts: list[list[int]],
    mesh: Mesh | None,
    *,
    quick: bool,
) -> Acceptance:
    """Measures acceptance on answers to the prompts; quick: takes that of the draft's folder.

    What was measured in full is kept in the draft's folder, if it has no figures yet.
    """
    sampling, source = sampling_of(config.decode), draft_path(config)
    folder, fingerprint = draft_folder(source, config.target.cache_dir), draft.fingerprint
    stored = saved_acceptance(folder, fingerprint) if sampling == Sampling() else None
    if quick and stored is not None:
        return stored
    most = config.eval.max_new_tokens
    if quick:
        why = "no figures for these weights" if sampling == Sampling() else "figures of greedy text"
        prompts, most = prompts[:_SHORT_PROMPTS], min(most, _SHORT_TOKENS)
        _log.info(
            f"acceptance is measured on {len(prompts)} short answers: {folder} has {why}; tune "
            "without --quick measures more"
        )
    texts = answers_for_tuning(target, prompts, most, mesh, sampling)
    described = f"answers to {len(prompts)} prompts of {config.eval.suites[0]}"
    topks = QUICK.topks if quick else FULL.topks
    measured = measured_acceptance(target, draft, texts, mesh, described, topks)
    ours = not source.startswith("hf:") and not is_url(source)
    if not quick and stored is None and sampling == Sampling() and ours:
        try:
            save_acceptance(folder, measured, fingerprint)
            _log.info(f"acceptance is kept in {folder} for tune --quick")
        except OSError as error:
            _log.info(f"acceptance is not kept for tune --quick: {folder}: {error.strerror}")
    return measured


def _saved(tuning: Tuning, path: Path, arguments: Namespace) -> str:
    """Saves the choice, for decode.tree=auto and to --write, and says so.

    Figures that other work disturbed are not saved.
    """
    if tuning.disturbed:
        return f"not saved: {tuning.steps_differ}; run tune again when nothing else runs"
    remember(path, tuning.best)
    if arguments.write:
        settings = read_settings(arguments.config, arguments.overrides)
        write_text(Path(arguments.write), with_tree(settings, tuning.best))
    what = "plain decoding" if tuning.best is None else "the first tree"
    return f"{what} is saved for decode.tree=auto in {path}"


def table(tuning: Tuning) -> str:
    """Formats the measurements and the best trees."""
    where, acceptance = tuning.where, tuning.acceptance
    lines = [
        machine(),
        f"batch {where.batch}, {where.capacity} cache slots, {_drawn(where.sampling)}",
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
    lines += [
        "",
        f"right token by rank, {acceptance.places} places of {acceptance.texts} (share of those "
        "right above):",
    ]
    lines += [
        f"  depth {depth + 1}:  " + "  ".join(f"{share:.2f}" for share in row)
        for depth, row in enumerate(acceptance.rank_share)
    ]
    lines += ["", "levels  topk  nodes    tau   ms/round   tok/s   against plain"]
    plain = tuning.plain_tokens_per_second
    for choice in tuning.choices[:_SHOWN]:
        lines.append(
            f"{choice.levels:6d}{choice.topk:6d}{choice.nodes:7d}{choice.tau:7.2f}{choice.milliseconds:11.1f}"
            f"{choice.tokens_per_second:8.1f}{choice.tokens_per_second / plain:11.2f}x"
        )
    lines.append(f" plain{'':13}{1:7.2f}{tuning.verify_ms[1]:11.1f}{plain:8.1f}{1:11.2f}x")
    return "\n".join([*lines, chosen(tuning)])


def chosen(tuning: Tuning) -> str:
    """Says in one line what was chosen, and what it brings."""
    best, plain = tuning.choices[0], tuning.plain_tokens_per_second
    if tuning.best is None:
        dear = best.milliseconds / tuning.verify_ms[1]
        return (
            f"no tree is faster than plain decoding: the best round takes {dear:.2f} times as long "
            f"as a plain step and writes {best.tau:.2f} tokens; decode plainly, or train the draft "
            "further"
        )
    tree = f"{best.levels} levels, topk {best.topk}, {best.nodes} nodes"
    rows = tuning.where.batch
    return (
        f"chosen: {tree}: {best.tau:.2f} tokens a round, {best.tokens_per_second / plain:.2f} "
        f"times plain decoding ({rows * best.tokens_per_second:.1f} instead of {rows * plain:.1f} "
        "tok/s)"
    )


def _drawn(sampling: Sampling) -> str:
    """Describes the sampling settings that differ from greedy decoding."""
    default = Sampling()._asdict()
    changed = {key: value for key, value in sampling._asdict().items() if value != default[key]}
    return ", ".join(f"{key} {value}" for key, value in changed.items()) or "greedy"


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
