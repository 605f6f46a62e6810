"""Plain and speculative greedy decoding against transformers' generate: same weights, float32, same cores, one process.

    python benchmarks/plain_decoding.py --config configs/smollm2_135m.yaml

Prints tokens/s of each, prefill included, and the ratios. Needs torch (the `test` extra). Prompts are the committed
held-out ones; the three take turns on each prompt, so that a drifting machine treats all alike.
"""

import argparse
import time

import torch
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from beagle_jax.config import load_config
from beagle_jax.decoding.decoder import SpeculativeDecoder
from beagle_jax.evaluation.suites import suite, tokenize
from beagle_jax.weights.draft import load_draft
from beagle_jax.weights.target import load_target, open_source


def torch_model(config) -> LlamaForCausalLM:
    """transformers' model with the very same float32 weights."""
    from pathlib import Path

    opened = open_source(config.target.source, Path(config.target.cache_dir).expanduser())
    model = LlamaForCausalLM(LlamaConfig(**opened.config())).eval()
    state = {name: torch.from_numpy(array.copy()) for name, array in opened.tensors()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    model.tie_weights()
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/smollm2_135m.yaml")
    parser.add_argument("--prompts", type=int, default=10)
    parser.add_argument("--new-tokens", type=int, default=96)
    arguments = parser.parse_args()
    config = load_config(arguments.config)
    target = load_target(config.target.source, "float32", config.target.cache_dir)
    draft = load_draft(config.draft.path or f"{config.train.folder}/draft", target.spec)
    prompts = tokenize(suite("held_out", arguments.prompts), target.tokenizer)
    context = max(map(len, prompts)) + arguments.new_tokens
    decoders = {
        "plain": SpeculativeDecoder(target, context=context),
        "speculative": SpeculativeDecoder.of(config.decode, target, draft, context=context),
    }
    for decoder in decoders.values():
        decoder.warm_up(prompts, max_new_tokens=arguments.new_tokens)
    reference = torch_model(config)
    seconds = dict.fromkeys(("transformers", *decoders), 0.0)
    tokens = dict.fromkeys(seconds, 0)
    equal = 0
    for prompt in tqdm(prompts, desc="decoding", unit="prompt"):
        answers = {}
        ids = torch.tensor([prompt])
        clock = time.perf_counter()
        with torch.no_grad():
            out = reference.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=arguments.new_tokens,
                eos_token_id=list(target.eos_ids), pad_token_id=target.eos_ids[0],
            )  # fmt: skip
        seconds["transformers"] += time.perf_counter() - clock
        answers["transformers"] = out[0, len(prompt) :].tolist()
        for name, decoder in decoders.items():
            clock = time.perf_counter()
            answers[name] = decoder.generate([prompt], max_new_tokens=arguments.new_tokens)[0].tokens
            seconds[name] += time.perf_counter() - clock
        for name, answer in answers.items():
            tokens[name] += len(answer)
        equal += answers["transformers"] == answers["plain"] == answers["speculative"]
    speed = {name: tokens[name] / seconds[name] for name in seconds}
    print(f"{len(prompts)} prompts, at most {arguments.new_tokens} new tokens, float32, {torch.get_num_threads()} threads")
    for name, value in speed.items():
        print(f"{name:13} {value:6.1f} tok/s")
    print(f"plain / transformers      {speed['plain'] / speed['transformers']:.2f}x")
    print(f"speculative / plain       {speed['speculative'] / speed['plain']:.2f}x")
    print(f"same tokens in all three: {equal}/{len(prompts)}")


if __name__ == "__main__":
    main()
