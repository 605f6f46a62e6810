"""Builds a decoder from a config."""

import logging

from jax.sharding import Mesh

from beagle_jax.config import Config
from beagle_jax.decoding.decoder import SpeculativeDecoder
from beagle_jax.decoding.lookup import Lookup
from beagle_jax.decoding.sampling import sampling_of
from beagle_jax.decoding.tree import Tree, lookup_tree, tree_of, with_lookup
from beagle_jax.decoding.tuning import machine, tuned_path, tuned_tree
from beagle_jax.sharding import mesh_for_decoding
from beagle_jax.weights.draft import Draft, check_there, load_draft, other_target
from beagle_jax.weights.target import Target, configured_target

LOOKUP, PLAIN = "lookup", "plain"  # allowed in place of a draft's folder


_log = logging.getLogger(__name__)


def draft_path(config: Config) -> str:
    """Returns `draft.path`, or if it is null the folder to which training exports its draft."""
    return config.draft.path or f"{config.train.folder}/draft"


def check_drafter(config: Config, path: str | None = None) -> None:
    """Checks that a draft is there (default: `draft.path`). Raises UserError if it is not."""
    path = path or draft_path(config)
    if path != LOOKUP:
        check_there(path, config.target.cache_dir)


def drafter_of(config: Config, target: Target, path: str | None = None) -> Draft | Lookup:
    """Loads the trained draft at `path` (default: `draft.path`), or sets up prompt lookup.

    Logs a warning if the draft was trained for another target.
    """
    path = path or draft_path(config)
    if path == LOOKUP:
        return Lookup(config.decode.ngram)
    draft = load_draft(path, target, cache_dir=config.target.cache_dir)
    if other := other_target(draft, target.source):
        _log.warning(
            "%s: this draft belongs to another target (%s, and target.source is %s); the text "
            "stays exact, but few drafted tokens will be accepted",
            path,
            other,
            target.source,
        )
    return draft


def decoder_of(
    config: Config,
    target: Target,
    draft: Draft | Lookup,
    *,
    context: int | None = None,
    mesh: Mesh | None = None,
    rows: int = 1,
) -> SpeculativeDecoder:
    """Builds the decoder of a config from a loaded target and draft.

    mesh: of `mesh_for_decoding`, over which the target was loaded. rows: answers decoded at once,
    for `decode.tree: auto` (`auto_tree`). Prompt lookup drafts a chain (`lookup_tree`).
    """
    decode = config.decode
    tree: Tree
    if isinstance(draft, Lookup):
        tree = lookup_tree(decode)
    elif decode.tree == "auto":
        tree = auto_tree(config, target, draft, mesh, rows)
    else:
        tree = tree_of(decode)
    return SpeculativeDecoder(
        target,
        draft,
        tree,
        context=context,
        append_predicted=decode.append_predicted,
        rule=decode.rule,
        mesh=mesh,
    )


def auto_tree(config: Config, target: Target, draft: Draft, mesh: Mesh | None, rows: int) -> Tree:
    """Returns the tree of `decode.tree: auto`, with a line in the log unless it is a tuned tree.

    It is the one that `tune` chose on this machine, or plain decoding if no tree was faster. If
    none was tuned, it is the dynamic tree of the config's levels, topk and nodes.
    """
    decode = config.decode
    tuned = tuned_tree(
        tuned_path(config.target.cache_dir, target, draft, mesh, rows, sampling_of(decode))
    )
    if tuned is None:
        tree = tree_of(decode)
        _log.info(
            "no tree was tuned for this draft on this machine (%s): using the %s of the config; "
            "python -m beagle_jax.tune --quick chooses one",
            machine(),
            tree,
        )
        return tree
    if not tuned.depth:
        _log.warning(
            "decode.tree is auto, and tune found no tree that is faster than plain decoding on "
            "this machine: decoding plainly, without the draft"
        )
    return with_lookup(tuned.grown, decode)


def decoder_from(config: Config) -> SpeculativeDecoder:
    """Loads the target and the draft of a config and builds their decoder.

    `draft.path: plain` decodes without a draft. A decoder over a mesh rounds rows up to a multiple
    of `mesh.data`. Raises UserError if the target or the draft cannot be loaded.
    """
    path = draft_path(config)
    mesh = mesh_for_decoding(config.mesh, max(config.mesh.data, 1), "a decoder")
    if path == PLAIN:
        return SpeculativeDecoder(configured_target(config.target, mesh, decoding=True), mesh=mesh)
    check_drafter(config)
    target = configured_target(config.target, mesh, decoding=True)
    return decoder_of(config, target, drafter_of(config, target), mesh=mesh)
