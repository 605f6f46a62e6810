"""`evaluate`: from a config to a report."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from jax.sharding import Mesh

from beagle_jax.config import Config, DecodeConfig, Identity
from beagle_jax.data.chats import Chat
from beagle_jax.data.fingerprint import fingerprints
from beagle_jax.data.template import decoded
from beagle_jax.decoding.build import check_drafter, decoder_of, draft_path, drafter_of
from beagle_jax.decoding.decoder import SpeculativeDecoder
from beagle_jax.decoding.lookup import Lookup
from beagle_jax.decoding.sampling import sampling_of
from beagle_jax.errors import UserError
from beagle_jax.evaluation.answers import AnswerLog
from beagle_jax.evaluation.audit import audit
from beagle_jax.evaluation.cost import memory, phases
from beagle_jax.evaluation.figures import environment, report
from beagle_jax.evaluation.inside import attention, rounds
from beagle_jax.evaluation.measure import Bench, Measured, System, context_for, measure
from beagle_jax.evaluation.pages import markdown, page
from beagle_jax.evaluation.plots import (
    plot_acceptance,
    plot_attention,
    plot_masks,
    plot_phases,
    plot_training,
    plot_tree,
)
from beagle_jax.evaluation.report import Audit, Report, Throughput
from beagle_jax.evaluation.suites import suite
from beagle_jax.evaluation.throughput import throughput
from beagle_jax.files import write_text
from beagle_jax.remote import fetch, local, publish
from beagle_jax.sharding import mesh_for_decoding
from beagle_jax.terminal import listen
from beagle_jax.weights.draft import Draft
from beagle_jax.weights.target import Target, configured_target

_SHOWN_TOKENS = 48  # of the answer in the attention plot


def evaluate(config: Config, out: str | None = None, *, audited: bool = False) -> Report:
    """Returns the report on plain decoding, the draft, and the drafts of `eval.compare`.

    out: a folder for answers and report files; answers that it already has are not decoded again.
    audited: also compare all answers with teacher forcing (evaluation/audit.py). After Ctrl-C the
    report covers what was measured until then, and is marked as interrupted.
    """
    listen()
    if audited:
        check_audited(config)
    mesh = mesh_for_decoding(config.mesh, 1, "evaluate")
    suites = {
        name: suite(name, config.eval.limit, config.eval.folder) for name in config.eval.suites
    }
    names = (draft_path(config), *config.eval.compare)
    for name in names:
        check_drafter(config, name)
    if out is not None:
        fetch(out)  # raises UserError for a URL that cannot be opened
    if "plain" in names:
        raise UserError(
            "draft.path or eval.compare is plain, which means decoding without a draft and is "
            "always measured; remove it, or write ./plain for a folder of this name"
        )
    target = configured_target(config.target, mesh, decoding=True)
    drafts = {name: drafter_of(config, target, name) for name in names}
    context = context_for(
        suites, target.tokenizer, config.eval.max_new_tokens, target.spec.max_positions
    )
    bench = _bench(config, target, drafts, context, mesh)
    log = None
    if out is not None:
        folder = local(out)
        folder.mkdir(parents=True, exist_ok=True)
        log = AnswerLog(folder / "answers.jsonl", _settings(config, target, drafts, bench, suites))
    measured = measure(bench, suites, log)
    if not measured.cases:
        raise UserError(
            f"no prompt of {', '.join(suites)} fits the target's context of "
            f"{target.spec.max_positions} tokens with eval.max_new_tokens "
            f"{config.eval.max_new_tokens}; lower it, or choose other prompts"
        )
    further = _Further()
    if not measured.missing:
        further = _further(config, target, drafts, bench, measured, out is not None, audited)
    made = report(
        bench,
        measured,
        config.model_dump(),
        further.costs,
        notes=[*_notes(config, target), *further.notes],
        audit=further.audit,
        throughput=further.batches,
        interrupted=further.interrupted,
    )
    if out is not None:
        _write(config, bench, measured, made, local(out))
        publish(local(out))
    return made


@dataclass
class _Further:
    """What is measured when all prompts are answered, as far as Ctrl-C let it come."""

    costs: dict[str, dict] = field(default_factory=dict)
    batches: list[Throughput] = field(default_factory=list)
    audit: Audit | None = None
    interrupted: bool = False

    @property
    def notes(self) -> list[str]:
        """Says what is missing."""
        if not self.interrupted:
            return []
        return ["Interrupted: all prompts were answered, but not all else was measured."]


def _further(
    config: Config,
    target: Target,
    drafts: dict[str, Draft | Lookup],
    bench: Bench,
    measured: Measured,
    with_memory: bool,
    audited: bool,
) -> _Further:
    """Measures costs and throughput, and audits on request."""
    made = _Further()
    append, rule = config.decode.append_predicted, config.decode.rule
    try:
        made.costs = _costs(bench, measured, with_memory=with_memory)
        made.batches = throughput(bench, measured.cases, config.eval.batch)
        if audited:
            made.audit = audit(target, drafts, bench, measured, append_predicted=append, rule=rule)
    except KeyboardInterrupt:
        made.interrupted = True
    return made


def check_audited(config: Config) -> None:
    """Raises UserError for sampling that the audit cannot recompute."""
    if sampling_of(config.decode).penalises:
        raise UserError(
            "--audit computes each answer's tokens from the text alone, and penalties change them: "
            "leave out decode.repetition_penalty, decode.presence_penalty and "
            "decode.frequency_penalty, or --audit"
        )


def _notes(config: Config, target: Target) -> list[str]:
    notes = []
    if target.quantised:
        notes.append(f"The target, in plain decoding too, is quantised to {target.quantised}.")
    decode, default = config.decode, DecodeConfig()
    ends = ("stop", "stop_token_ids", "ignore_eos", "min_new_tokens")
    if changed := [name for name in ends if getattr(decode, name) != getattr(default, name)]:
        notes.append(
            f"{', '.join(f'decode.{name}' for name in changed)} is for generate: answers here end "
            "at stop tokens and at eval.max_new_tokens alone."
        )
    return notes


def _bench(
    config: Config,
    target: Target,
    drafts: dict[str, Draft | Lookup],
    context: int,
    mesh: Mesh | None,
) -> Bench:
    def system(name: str, draft: Draft | Lookup) -> System:
        trained = draft.provenance.get("training", {}) if isinstance(draft, Draft) else {}
        decoder = decoder_of(config, target, draft, context=context, mesh=mesh)
        return System(name, decoder, trained.get("row_tokens"))

    return Bench(
        System("plain", SpeculativeDecoder(target, context=context, mesh=mesh)),
        tuple(system(name, draft) for name, draft in drafts.items()),
        target.tokenizer,
        context,
        config.eval.max_new_tokens,
        sampling_of(config.decode),
        config.decode.seed,
    )


def _settings(
    config: Config,
    target: Target,
    drafts: dict[str, Draft | Lookup],
    bench: Bench,
    suites: Mapping[str, Sequence[Chat]],
) -> dict:
    """Everything that determines answers and times.

    Includes hashes of weights and prompts and the tuned trees, since these can change under the
    same names.
    """
    weights = {
        name: draft.fingerprint if isinstance(draft, Draft) else asdict(draft)
        for name, draft in drafts.items()
    }

    def digest(chats: Sequence[Chat]) -> str:
        return hashlib.sha256(
            json.dumps([(chat.messages, chat.later, chat.kind) for chat in chats]).encode()
        ).hexdigest()

    return {
        **Identity.of(config, "answers").values,
        "drafts": weights,
        "trees": {system.name: str(system.decoder.tree) for system in bench.systems},
        "prompts_sha256": {name: digest(chats) for name, chats in suites.items()},
        **fingerprints(target.params, target.tokenizer),
        "environment": environment().model_dump(),
    }


def _costs(bench: Bench, measured: Measured, *, with_memory: bool) -> dict[str, dict]:
    """Measures phases of each system, and on request memory, after a prompt of median length."""
    prompts = sorted(
        (entry.prompt for case in measured.cases for turn in case.turns for entry in turn.values()),
        key=len,
    )
    ask = (prompts[len(prompts) // 2], bench.sampling, bench.max_new_tokens)
    costs: dict[str, dict] = {}
    for system in bench.systems:
        costs[system.name] = {"milliseconds": phases(system.decoder, *ask)}
        if with_memory:
            costs[system.name]["bytes"] = memory(system.decoder, *ask)
    return costs


def _write(config: Config, bench: Bench, measured: Measured, made: Report, folder: Path) -> None:
    """Writes report.json, report.md and report.html with its pictures.

    An interrupted measurement gets no pictures, as some need further decoding.
    """
    pictures: dict[str, Path] = {}
    if not made.interrupted:
        pictures = _pictures(config, bench, measured, made, folder / "pictures")
    write_text(folder / "report.json", json.dumps(made.as_json(), indent=1) + "\n")
    write_text(folder / "report.md", markdown(made))
    write_text(folder / "report.html", page(made, pictures))


def _pictures(
    config: Config, bench: Bench, measured: Measured, made: Report, folder: Path
) -> dict[str, Path]:
    """Draws the figures of the report, and the first draft at work on the first prompt.

    Returns the files by title.
    """
    folder.mkdir(exist_ok=True)
    pictures = {
        "Acceptance by depth": folder / "acceptance.png",
        "Time by phase": folder / "phases.png",
    }
    plot_acceptance(made, pictures["Acceptance by depth"])
    plot_phases(made, pictures["Time by phase"])
    first = bench.speculative[0]
    decoder, prompt = first.decoder, measured.cases[0].turns[0][first.name].prompt
    played = rounds(
        decoder, prompt, bench.sampling, max_new_tokens=bench.max_new_tokens, seed=bench.seed
    )
    if played:
        pictures["A drafted tree"] = folder / "tree.png"
        plot_tree(
            max(played, key=lambda entry: len(entry.path)),
            pictures["A drafted tree"],
            lambda token: decoded(bench.tokenizer, [token]),
        )
    looked = attention(decoder, prompt, max_new_tokens=min(bench.max_new_tokens, _SHOWN_TOKENS))
    if looked is not None:
        pictures["Attention of the draft"] = folder / "attention.png"
        plot_attention(looked[0], pictures["Attention of the draft"], first=len(prompt))
    pictures["Masks of both training stages"] = folder / "masks.png"
    stages = {stage.simulation_steps > 1: stage for stage in config.train.named_stages.values()}
    early, late = (stages.get(simulated, config.train.early) for simulated in (False, True))
    plot_masks(
        early.window,
        late.window,
        late.simulation_steps,
        pictures["Masks of both training stages"],
    )
    log = fetch(f"{config.train.folder}/log.jsonl")
    if log.exists() and plot_training(log, folder / "training.png"):
        pictures["Training"] = folder / "training.png"
    return pictures
