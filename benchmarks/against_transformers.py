"""Plain and speculative greedy decoding against transformers' generate.

    python benchmarks/against_transformers.py --config configs/smollm2_135m.yaml \\
        --prompts held_out --limit 10

transformers runs with and without its prompt-lookup decoding. All use the same weights in float32,
on the same cores, in one process. They take turns on each prompt, so that machine drift affects all
alike. Prints tokens/s of each, prefill included, the ratios, and how many answers are identical.
Needs torch (the `test` extra). --prompts takes any .jsonl[.gz] of prompts, for example MT-Bench;
overrides apply to the config, for example decode.tree=auto.
"""

import argparse
import time
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from beagle_jax.config import Config, load_config
from beagle_jax.decoding.build import decoder_of
from beagle_jax.decoding.decoder import SpeculativeDecoder
from beagle_jax.evaluation.suites import suite, tokenize
from beagle_jax.weights.draft import load_draft
from beagle_jax.weights.target import load_target, open_source


def torch_model(config: Config) -> LlamaForCausalLM:
    """Loads transformers' model with the same float32 weights."""
    opened = open_source(config.target.source, Path(config.target.cache_dir).expanduser())
    model = LlamaForCausalLM(LlamaConfig(**opened.config())).eval()
    state = {name: torch.from_numpy(array.copy()) for name, array in opened.tensors()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    model.tie_weights()
    return model


def torch_way(model: LlamaForCausalLM, eos_ids, new_tokens: int, **options):
    """Returns a function from prompt to tokens that calls transformers' generate."""

    def generate(prompt: list[int]) -> list[int]:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=new_tokens,
                eos_token_id=list(eos_ids),
                pad_token_id=eos_ids[0],
                **options,
            )
        return out[0, len(prompt) :].tolist()

    return generate


def our_way(decoder: SpeculativeDecoder, new_tokens: int):
    """Returns a function from prompt to tokens that calls our decoder."""
    return lambda prompt: decoder.generate([prompt], max_new_tokens=new_tokens)[0].tokens


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="configs/smollm2_135m.yaml")
    parser.add_argument("--prompts", default="held_out")
    parser.add_argument("--limit", type=int, default=10)
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--lookup", type=int, default=10, help="prompt_lookup_num_tokens")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_intermixed_args()
    config = load_config(arguments.config, arguments.overrides)
    target = load_target(config.target.source, "float32", config.target.cache_dir)
    draft = load_draft(config.draft.path or f"{config.train.folder}/draft", target.spec)
    prompts = tokenize(suite(arguments.prompts, arguments.limit), target.tokenizer)
    context = max(map(len, prompts)) + arguments.new_tokens
    ours = {
        "plain": SpeculativeDecoder(target, context=context),
        "speculative": decoder_of(config, target, draft, context=context),
    }
    for decoder in ours.values():
        decoder.warm_up(prompts, max_new_tokens=arguments.new_tokens)
    model = torch_model(config)
    ways = {
        "transformers": torch_way(model, target.eos_ids, arguments.new_tokens),
        "transformers, prompt lookup": torch_way(
            model, target.eos_ids, arguments.new_tokens, prompt_lookup_num_tokens=arguments.lookup
        ),
        **{name: our_way(decoder, arguments.new_tokens) for name, decoder in ours.items()},
    }
    for way in ways.values():  # one untimed call compiles
        way(prompts[0])
    seconds, tokens, same = (dict.fromkeys(ways, 0) for _ in range(3))
    for prompt in tqdm(prompts, desc="decoding", unit="prompt"):
        answers = {}
        for name, way in ways.items():
            clock = time.perf_counter()
            answers[name] = way(prompt)
            seconds[name] += time.perf_counter() - clock
            tokens[name] += len(answers[name])
        for name in ways:
            same[name] += answers[name] == answers["plain"]
    report(
        config,
        len(prompts),
        arguments.new_tokens,
        {name: tokens[name] / seconds[name] for name in ways},
        same,
    )


def report(
    config: Config, prompts: int, new_tokens: int, speed: dict[str, float], same: dict[str, int]
) -> None:
    """Prints the table and the ratios."""
    print(
        f"{prompts} prompts of at most {new_tokens} new tokens, float32, "
        f"{torch.get_num_threads()} threads, {config.decode}"
    )
    for name, value in speed.items():
        print(
            f"{name:28} {value:6.1f} tok/s   {value / speed['plain']:.2f}x of plain   same "
            f"tokens as plain {same[name]}/{prompts}"
        )
    print(f"plain / transformers      {speed['plain'] / speed['transformers']:.2f}x")
    print(f"speculative / plain       {speed['speculative'] / speed['plain']:.2f}x")


if __name__ == "__main__":
    main()
