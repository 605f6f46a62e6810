"""From a config to a decoder."""

import logging

from beagle_jax.config import Config
from beagle_jax.decoding.decoder import SpeculativeDecoder
from beagle_jax.decoding.lookup import Lookup
from beagle_jax.decoding.tree import Tree, chain, tree_of
from beagle_jax.decoding.tuning import tuned_path, tuned_tree
from beagle_jax.weights.draft import Draft, check_there, load_draft, other_target
from beagle_jax.weights.target import Target, configured_target

LOOKUP, PLAIN = "lookup", "plain"  # in the place of a draft's folder


_log = logging.getLogger(__name__)


def draft_path(config: Config) -> str:
    """`draft.path`, or where training leaves its draft."""
    return config.draft.path or f"{config.train.folder}/draft"


def check_drafter(path: str) -> None:
    """Raises UserError for a draft that is not there."""
    if path != LOOKUP:
        check_there(path)


def drafter_of(config: Config, target: Target, path: str | None = None) -> Draft | Lookup:
    """What drafts: a trained draft's folder (`draft.path` if none is given), or prompt lookup.

    Logs a warning about a draft that names another target.
    """
    path = path or draft_path(config)
    if path == LOOKUP:
        return Lookup(config.decode.ngram)
    draft = load_draft(path, target.spec)
    if other := other_target(draft, target.source):
        _log.warning(
            "%s: this draft belongs to another target (%s, and target.source is %s): the text "
            "stays right, but few drafts will be",
            path,
            other,
            target.source,
        )
    return draft


def decoder_of(
    config: Config, target: Target, draft: Draft | Lookup, *, context: int | None = None
) -> SpeculativeDecoder:
    """The decoder that a config asks for; `decode.tree: auto` takes the tree that was tuned here.

    Prompt lookup drafts a chain of as many tokens as the tree verifies, so that a round costs the
    target the same.
    """
    decode = config.decode
    if isinstance(draft, Lookup):
        tree: Tree = chain(decode.levels if decode.tree == "auto" else tree_of(decode).size - 1)
    elif decode.tree == "auto":
        tree = tuned_tree(tuned_path(config.target.cache_dir, target, draft))
    else:
        tree = tree_of(decode)
    return SpeculativeDecoder(
        target,
        draft,
        tree,
        context=context,
        append_predicted=decode.append_predicted,
        rule=decode.rule,
    )


def decoder_from(config: Config) -> SpeculativeDecoder:
    """The decoder that a config asks for, with its target and draft loaded.

    `draft.path: plain` decodes without a draft. Raises UserError for what cannot be loaded.
    """
    path = draft_path(config)
    if path == PLAIN:
        return SpeculativeDecoder(configured_target(config.target, decoding=True))
    check_drafter(path)
    target = configured_target(config.target, decoding=True)
    return decoder_of(config, target, drafter_of(config, target))
