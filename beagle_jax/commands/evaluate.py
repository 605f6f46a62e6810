"""Evaluation from a config to a report."""

from dataclasses import asdict
from pathlib import Path

from beagle_jax.config import Config
from beagle_jax.decoding.decoder import SpeculativeDecoder
from beagle_jax.decoding.lookup import Lookup
from beagle_jax.decoding.sampling import sampling_of
from beagle_jax.decoding.tuning import decoder_of, draft_path, drafter_of
from beagle_jax.errors import UserError
from beagle_jax.evaluation.answers import AnswerLog
from beagle_jax.evaluation.cost import memory, phases
from beagle_jax.evaluation.measure import Bench, Measured, context_for, measure
from beagle_jax.evaluation.report import environment, report
from beagle_jax.evaluation.suites import suite
from beagle_jax.weights.draft import Draft
from beagle_jax.weights.target import Target, load_target


def evaluate(config: Config, out: str | None = None) -> dict:
    """The report on plain decoding, the draft, and those of `eval.compare`.

    out: a folder that keeps every answer as it comes, goes on from those it has, and gets the report's files.
    """
    suites = {name: suite(name, config.eval.limit, config.eval.folder) for name in config.eval.suites}
    target = load_target(config.target.source, config.target.dtype, config.target.cache_dir)
    drafts = {name: drafter_of(config, target, name) for name in (draft_path(config), *config.eval.compare)}
    context = context_for(suites, target.tokenizer, config.eval.max_new_tokens, target.spec.max_positions)
    bench = _bench(config, target, drafts, context)
    log = None
    if out is not None:
        Path(out).mkdir(parents=True, exist_ok=True)
        log = AnswerLog(Path(out) / "answers.jsonl", _settings(config, drafts))
    measured = measure(bench, suites, log)
    if not measured.cases:
        raise UserError(f"no prompt of {', '.join(suites)} fits the target's context of {target.spec.max_positions} tokens with "
                        f"eval.max_new_tokens {config.eval.max_new_tokens}; lower it, or choose other prompts")
    costs = {} if out is None else _costs(bench, measured)
    return report(bench, measured, asdict(config), costs)


def _bench(config: Config, target: Target, drafts: dict[str, Draft | Lookup], context: int) -> Bench:
    decoders = {"plain": SpeculativeDecoder(target, context=context)}
    for name, draft in drafts.items():
        decoders[name] = decoder_of(config, target, draft, context=context)
    return Bench(decoders, target.tokenizer, context, config.eval.max_new_tokens, sampling_of(config.decode), config.decode.seed)


def _settings(config: Config, drafts: dict[str, Draft | Lookup]) -> dict:
    """All that decides answers and times."""
    kept = {section: asdict(getattr(config, section)) for section in ("target", "decode", "eval")}
    weights = {name: draft.fingerprint if isinstance(draft, Draft) else asdict(draft) for name, draft in drafts.items()}
    return {**kept, "drafts": weights, "environment": environment()}


def _costs(bench: Bench, measured: Measured) -> dict[str, dict]:
    """Phases and memory of each system, after a prompt of middle length."""
    prompts = sorted((asked.prompt for case in measured.cases for turn in case.turns for asked in turn.values()), key=len)
    ask = (prompts[len(prompts) // 2], bench.sampling, bench.max_new_tokens)
    return {name: {"milliseconds": phases(decoder, *ask), "bytes": memory(decoder, *ask)} for name, decoder in bench.decoders.items()}
