"""Section `decode`: the draft tree, how tokens are chosen, and where an answer ends."""

from typing import Literal

from beagle_jax.config.data import Temperature
from beagle_jax.config.section import Listed, Number, Section, setting


class DecodeConfig(Section):
    """The draft tree, how tokens are chosen, and where an answer ends."""

    tree: Literal["chain", "static", "dynamic", "auto"] = setting(
        "chain",
        "shape of the draft tree; static: see `paths`; auto: the tree that `tune` chose on this "
        "machine, or the dynamic one until it is tuned",
        affects=("answers",),
    )
    levels: int = setting(5, "chain, dynamic: draft steps per round", affects=("answers",), ge=1)
    topk: int = setting(
        4,
        "dynamic: children kept per node, and nodes continued per level (method.md 6.4)",
        affects=("answers",),
        ge=1,
    )
    nodes: int = setting(
        8,
        "dynamic: tokens verified per round, the root included",
        affects=("answers",),
        ge=1,
    )
    paths: Listed[Listed[int]] | None = setting(
        None,
        "static: child ranks from the root; null: EAGLE-1's 25 nodes",
        affects=("answers",),
    )
    ngram: int = setting(
        3,
        "draft.path lookup, lookup_nodes: length of the longest run of last tokens to search for; "
        "draft.path lookup drafts a chain of as many tokens as the tree has",
        affects=("answers",),
        ge=1,
    )
    lookup_nodes: int = setting(
        0,
        "tokens verified beside the draft's tree, which continue the text as it went on earlier "
        "after the same last tokens (prompt lookup)",
        affects=("answers",),
        ge=0,
    )
    append_predicted: bool = setting(
        True,
        'predicted states become keys of deeper levels (the paper\'s "concate")',
        affects=("answers",),
    )
    temperature: Temperature = setting(
        0.0, "temperature of sampling; 0: greedy", affects=("answers",), ge=0
    )
    top_k: int = setting(0, "sampling: most likely tokens kept; 0: all", affects=("answers",), ge=0)
    top_p: Number = setting(
        1.0, "sampling: share of the probability kept", affects=("answers",), gt=0, le=1
    )
    min_p: Number = setting(
        0.0,
        "sampling: tokens kept have at least this share of the largest probability; 0: all",
        affects=("answers",),
        ge=0,
        le=1,
    )
    repetition_penalty: Number = setting(
        1.0,
        "divides the positive logits of tokens of prompt and answer, and multiplies their negative "
        "ones; 1: none",
        affects=("answers",),
        gt=0,
    )
    presence_penalty: Number = setting(
        0.0, "subtracted from the logits of the answer's tokens", affects=("answers",)
    )
    frequency_penalty: Number = setting(
        0.0, "the same, once for each time that a token came", affects=("answers",)
    )
    rule: Literal["match", "ratio"] = setting(
        "match",
        "sampling: rule to accept drafts; ratio: Leviathan's rule, only for chains",
        affects=("answers",),
    )
    seed: int = setting(0, "seed of all draws", affects=("answers",), ge=0)
    max_new_tokens: int = setting(128, "limit in tokens of an answer", ge=1)
    stop: Listed[str] = setting((), "strings; an answer ends before the first of them")
    stop_token_ids: Listed[int] = setting(
        (), "tokens that end an answer, beside the end tokens of the target"
    )
    ignore_eos: bool = setting(False, "the end tokens of the target do not end an answer")
    min_new_tokens: int = setting(0, "number of tokens before an end token may come", ge=0)
