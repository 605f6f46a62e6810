"""Evaluation from a config to figures."""

from beagle_jax.config import Config
from beagle_jax.decoding.decoder import SpeculativeDecoder
from beagle_jax.decoding.sampling import sampling_of
from beagle_jax.decoding.tuning import decoder_of
from beagle_jax.evaluation.report import summary
from beagle_jax.evaluation.suites import measure, suite, tokenize
from beagle_jax.weights.draft import load_draft
from beagle_jax.weights.target import load_target


def evaluate(config: Config) -> list[dict]:
    """Figures of plain decoding, of the draft, and of `eval.compare` if there is one."""
    chats = suite(config.eval.prompts, config.eval.limit)
    target = load_target(config.target.source, config.target.dtype, config.target.cache_dir)
    folders = [config.draft.path or f"{config.train.folder}/draft"]
    if config.eval.compare:
        folders.append(config.eval.compare)
    drafts = {folder: load_draft(folder, target.spec) for folder in folders}
    prompts = tokenize(chats, target.tokenizer)
    limit = config.eval.max_new_tokens
    context = max(map(len, prompts)) + limit  # one cache size for all
    decoders = {"plain": SpeculativeDecoder(target, context=context)}
    for name, draft in drafts.items():
        decoders[name] = decoder_of(config, target, draft, context=context)
    results = measure(decoders, prompts, limit, sampling_of(config.decode))
    return [summary(result, results[0]) for result in results]
