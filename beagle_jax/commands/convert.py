"""Converts drafts to PyTorch, to other servers' forms and back, and targets to other formats."""

import json
import os
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

from beagle_jax.config import Config, TargetConfig
from beagle_jax.decoding.build import draft_path
from beagle_jax.errors import UserError
from beagle_jax.evaluation.pages import acceptance
from beagle_jax.evaluation.report import Report
from beagle_jax.files import write_text
from beagle_jax.json_file import read_json
from beagle_jax.model.kinds import KINDS
from beagle_jax.model.target import TargetSpec
from beagle_jax.remote import fetch, publish, url_of
from beagle_jax.sharding import make_mesh
from beagle_jax.terminal import size
from beagle_jax.weights.copies import TensorReader, tensor_reader
from beagle_jax.weights.draft import Draft, load_draft, other_target, save_draft
from beagle_jax.weights.draft_source import draft_folder
from beagle_jax.weights.eagle_import import read_eagle_draft
from beagle_jax.weights.hf_export import write_hf_folder
from beagle_jax.weights.kinds import kind_in_torch
from beagle_jax.weights.model_card import installed, model_card
from beagle_jax.weights.orbax_target import SETTINGS, OrbaxFolder, save_target
from beagle_jax.weights.server_files import RECORD, write_published
from beagle_jax.weights.server_form import RUN, VLLM, Server
from beagle_jax.weights.target import Source, configured_target, open_source, revision
from beagle_jax.weights.torch_export import check_parity, require_torch, write_torch_folder
from beagle_jax.weights.torch_import import read_torch_draft
from beagle_jax.weights.vllm_export import PLUGIN, write_vllm_folder

_SERVERS = {"eagle": "safeailab"}  # --for, where it is not the server's own key
_SCORED = (
    ". The draft scores {count:,} tokens (draft.hot_tokens); vLLM scores all by the target's head, "
    "which costs more and accepts a little more"
)
_TRY = 'try: python -m beagle_jax.generate --config FILE "your prompt" draft.path='


def to_torch(config: Config, arguments: Namespace) -> tuple[str, dict]:
    """Exports the draft as a PyTorch folder.

    The folder appears only after torch has computed the same values from it as the JAX block.
    """
    require_torch()
    draft, target, opened, out = _exported(config, arguments)
    results = _results(arguments.report) if arguments.report else None
    with staged(out) as folder:
        write_torch_folder(
            folder, draft, target.vocab_size, model_card(draft, results, revision(opened))
        )
        differences = check_parity(folder, draft, target.vocab_size)
    measured = ", ".join(f"{name} {value:.0e}" for name, value in differences.items())
    text = (
        f"largest difference from the JAX block, as a share of its scale: {measured}\ndraft "
        f"written to {_name(out)}; load it with transformers.AutoModel.from_pretrained(FOLDER, "
        "trust_remote_code=True)"
    )
    return text, {
        "out": _name(out),
        "largest_difference": {name: float(value) for name, value in differences.items()},
    }


def to_eagle(config: Config, arguments: Namespace) -> tuple[str, dict]:
    """Exports an EAGLE draft in the form that a server loads (`--for`)."""
    return _published(config, arguments, _SERVERS.get(arguments.server, arguments.server))


def to_speculators(config: Config, arguments: Namespace) -> tuple[str, dict]:
    """Exports an EAGLE-3 draft in speculators' form, which vLLM loads too."""
    return _published(config, arguments, "speculators")


def _published(config: Config, arguments: Namespace, name: str) -> tuple[str, dict]:
    """Writes the draft for a server; the folder appears only after it reads back bit-equal."""
    draft, target, opened, out = _exported(config, arguments)
    verifier = {
        "name_or_path": config.target.source.removeprefix("hf:").partition("@")[0],
        "architectures": opened.config().get("architectures"),
    }
    with staged(out) as folder:
        write_published(folder, draft, target, server := Server(name, verifier))
    text = (
        f"draft written to {_name(out)}, in the form that {server.title} loads; it reads back "
        f"bit-equal. {_loader(name)}"
    )
    return text, {"out": _name(out), "server": name, "loader_was_run": name in RUN}


def _loader(name: str) -> str:
    """Returns a sentence that says whether a server has loaded such folders."""
    if name in RUN:
        return f"Such folders were loaded by {RUN[name]} (docs/guide/convert.md says which)"
    return (
        "That loader itself was not run: its names, shapes and settings were read off its source "
        "(docs/guide/convert.md)"
    )


def to_vllm(config: Config, arguments: Namespace) -> tuple[str, dict]:
    """Exports a Beagle draft with the plugin that computes it in vLLM."""
    draft, target, _, out = _exported(config, arguments)
    with staged(out) as folder:
        write_vllm_folder(folder, draft, target)
    name = _name(out)
    whole = "" if draft.hot_ids is None else _SCORED.format(count=len(draft.hot_ids))
    text = (
        f"draft written to {name}. In the environment of vLLM: pip install {name}/{PLUGIN}, then "
        f"serve the target with {_speculative(name)} (tried with {VLLM}){whole}"
    )
    return text, {"out": name, "plugin": f"{name}/{PLUGIN}", "scored_tokens": target.vocab_size}


def _speculative(name: str) -> str:
    settings = {"method": "eagle", "model": name, "num_speculative_tokens": 2}
    return f"--speculative-config '{json.dumps(settings)}'"


def _exported(config: Config, arguments: Namespace) -> tuple[Draft, TargetSpec, Source, Path]:
    """Loads the config's draft for an export, after a check of the folder to write.

    Returns it with its target's shape and files, and the folder.
    """
    source = draft_folder(draft_path(config), config.target.cache_dir)
    out = _free(arguments, source)
    opened = _opened(config.target)
    target = TargetSpec.from_hf_config(opened.config(), config.target.source)
    draft = load_draft(source, target)
    _check_target(draft, config.target.source, source)
    return draft, target, opened, out


def _opened(config: TargetConfig) -> Source:
    return open_source(config.source, Path(config.cache_dir).expanduser())


def from_torch(config: Config, arguments: Namespace) -> tuple[str, dict]:
    """Imports a PyTorch draft as a native folder."""
    _, out = _imported(config, arguments, read_torch_draft)
    return f"draft written to {_name(out)}; {_TRY}{_name(out)}", {"out": _name(out)}


def import_eagle(config: Config, arguments: Namespace) -> tuple[str, dict]:
    """Imports an EAGLE draft as a native folder."""
    draft, out = _imported(config, arguments, read_eagle_draft)
    count = sum(array.size for array in draft.params.values())
    text = f"EAGLE draft of {count:,} parameters written to {_name(out)}; {_TRY}{_name(out)}"
    return text, {"out": _name(out), "parameters": count}


def _imported(
    config: Config, arguments: Namespace, read_draft: Callable[..., Draft]
) -> tuple[Draft, Path]:
    """Writes the draft from `read_draft` as a native folder, and reads it back before it appears.

    Returns the draft and the folder.
    """
    source = draft_folder(
        arguments.source,
        config.target.cache_dir,
        allow_pickle=arguments.allow_pickle,
        setting="--source",
    )
    out = _free(arguments, source)
    target, reader = target_spec(config.target)
    draft = read_draft(source, target, config.target.source, arguments.allow_pickle, reader)
    _check_target(draft, config.target.source, source)
    with staged(out) as folder:
        save_draft(folder, draft)
        load_draft(folder, target)
    return draft, out


def to_jax(config: Config, arguments: Namespace) -> tuple[str, dict]:
    """Writes the target as a folder that loads fast.

    Its arrays are stored in the shards that the devices of `mesh` hold.
    """
    source, dtype = config.target.source, config.target.dtype
    opened = open_source(source, Path(config.target.cache_dir).expanduser())
    if isinstance(opened, OrbaxFolder):
        raise UserError(
            f"target.source: {source} is already an output of convert to-jax; set it to the "
            "model from which that was made"
        )
    mesh, out = make_mesh(config.mesh), _free(arguments, opened.path)
    target = configured_target(config.target, mesh, decoding=False)
    origin = {"dtype": dtype, "source": source, "revision": target.revision}
    with staged(out) as folder:
        save_target(
            folder, target.params, opened.config(), target.tokenizer, target.eos_ids, origin
        )
    count = sum(array.nbytes for array in jax.tree.leaves(target.params))
    name = _name(out)
    text = f"target written to {name}, {size(count)} in {dtype}; use it with target.source={name}"
    return text, {"out": name, "bytes": count}


def to_hf(config: Config, arguments: Namespace) -> tuple[str, dict]:
    """Writes the target as a Hugging Face folder; GGUF files and `to-jax` folders too."""
    source, dtype = config.target.source, config.target.dtype
    opened = _opened(config.target)
    out = _free(arguments, opened.path)
    target = configured_target(config.target, decoding=False)
    with staged(out) as folder:
        count = write_hf_folder(folder, target, opened.config())
        record = {"source": source, "revision": target.revision, "versions": installed(())}
        write_text(folder / RECORD, json.dumps(record, indent=1) + "\n")
    name = _name(out)
    text = (
        f"target written to {name}, {size(count)} in {dtype}; use it with target.source={name}, or "
        "with transformers.AutoModelForCausalLM.from_pretrained"
    )
    return text, {"out": name, "bytes": count}


def target_spec(config: TargetConfig) -> tuple[TargetSpec, TensorReader]:
    """Returns the target's shape and a reader of its tensors; reads no tensor."""
    opened = _opened(config)
    spec = TargetSpec.from_hf_config(opened.config(), config.source)
    return spec, tensor_reader(opened, spec)


def _check_target(draft: Draft, source: str, where: Path) -> None:
    """Raises UserError if the draft was trained for another target of the same shape."""
    if trained_for := other_target(draft, source):
        raise UserError(
            f"{where}: this draft belongs to another target ({trained_for}, and target.source is "
            f"{source}); set target.source={trained_for}"
        )


def _results(path: str) -> str:
    """Reads a report of `evaluate --json` and returns the model card's table of results."""
    report = Report.read(Path(path))
    if not report.speculative:
        raise UserError(f"{path}: a report on plain decoding only; expected results of a draft")
    return acceptance(report)


def _free(arguments: Namespace, source: Path) -> Path:
    """Returns the output folder.

    Raises: UserError if it exists and must not be replaced, or if replacing it would lose anything
    else.
    """
    out, name = fetch(arguments.out), arguments.out
    if not out.exists():
        return out
    if not out.is_dir():
        raise UserError(f"--out {name}: a file of this name exists; choose another folder")
    if not arguments.overwrite:
        raise UserError(
            f"--out {name}: this folder exists; choose another, or give --overwrite to replace "
            "it as a whole"
        )
    if source.resolve().is_relative_to(out.resolve()):
        raise UserError(
            f"--out {name}: this folder holds the files to convert, and --overwrite would remove "
            "them; choose another"
        )
    if any(out.iterdir()) and not _is_ours(out):
        raise UserError(
            f"--out {name}: this folder holds no output of convert or train, so --overwrite does "
            "not replace it; choose another"
        )
    return out


def _name(out: Path) -> str:
    """Returns the name of an output for messages: its URL, if it has one."""
    return url_of(out) or str(out)


def _is_ours(folder: Path) -> bool:
    """Whether a folder was written by convert or train.

    A mistyped path must not delete any other folder, for example one of a target.
    """
    if (folder / SETTINGS).is_file() or (folder / RECORD).is_file():
        return True
    config = folder / "config.json"
    if not config.is_file():
        return False
    model_type = read_json(config, "").get("model_type")
    native = [kind.spec.model_type for kind in KINDS.values()]
    return model_type in native or kind_in_torch(model_type) is not None


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """Yields an empty folder that replaces `out` at the end of the block.

    After an error nothing of it is left.
    """
    out = out.absolute()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(prefix=".partial-", dir=out.parent)
    except OSError as error:
        raise UserError(
            f"--out {out}: cannot be written ({error}); choose another folder"
        ) from error
    with temporary as beside:
        # It has the same name as `out`: transformers names the loaded module after its folder.
        folder = Path(beside, out.name)
        folder.mkdir()
        yield folder
        replaced = Path(beside, "replaced")
        if out.exists():
            os.replace(out, replaced)
        try:
            os.replace(folder, out)
        except OSError:
            if replaced.exists():
                os.replace(replaced, out)
            raise
    publish(out)
