"""Compares the speed of vLLM with that of this library on the CPU, prompt by prompt in turn.

    python benchmarks/vllm_cpu.py --work runs/vllm
    python benchmarks/vllm_speed.py --work runs/vllm --cores 1 --json speed.json

It takes the environment and the exports of vllm_cpu.py. Two processes of vLLM (without a draft, and
with the Beagle draft as a chain) and this library (without one, with the same chain, and with the
shipped tree) decode each held-out prompt one after another, in an order that changes, greedily and
to the same tokens, which are checked. Everything runs on the same cores (`--cores` many), so that
other programs of the machine slow all engines alike. Ratios of tokens/s of one prompt and turn are
printed as their median and a 95 % interval, by bootstrap. vLLM scores all tokens with the draft,
this library the draft's hot tokens. vLLM runs as `--enforce-eager`, or with `--compiled` under
`torch.compile`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from beside import interval
from vllm_cpu import (
    BEAGLE,
    LEVELS,
    ROOT,
    VERSION,
    answer_of,
    language_model,
    prompts_of,
    speculative,
    surroundings,
)

MARK = "answer: "  # before what a process of vLLM answers; its messages are on the same stream
# ratio -> faster by it, than
RATIOS = {
    "vLLM, Beagle : plain": ("vllm beagle", "vllm plain"),
    "beagle_jax, chain : plain": ("beagle_jax chain", "beagle_jax plain"),
    "beagle_jax, tree : plain": ("beagle_jax tree", "beagle_jax plain"),
    "beagle_jax : vLLM, plain": ("beagle_jax plain", "vllm plain"),
    "beagle_jax : vLLM, chain": ("beagle_jax chain", "vllm beagle"),
}


# vLLM


def answer_lines(job: dict) -> None:
    """Runs in vLLM's environment: answers each line of stdin, a prompt, with tokens and seconds."""
    llm = language_model(job)
    answer_of(llm, [1, 2, 3], 4)
    print(f"\n{MARK}{json.dumps('ready')}", flush=True)
    for line in sys.stdin:
        clock = time.perf_counter()
        tokens = answer_of(llm, json.loads(line), job["max_tokens"])
        said = {"tokens": tokens, "seconds": time.perf_counter() - clock}
        print(f"\n{MARK}{json.dumps(said)}", flush=True)


def read_answer(process: subprocess.Popen) -> object:
    """Returns what a process answers next.

    Raises:
      SystemExit: it has ended.
    """
    for line in process.stdout:
        if line.startswith(MARK):
            return json.loads(line.removeprefix(MARK))
    raise SystemExit("vLLM ended; see vllm-speed.log in the folder of --work")


@contextmanager
def vllm_engine(python: Path, job: dict, work: Path, cores: int) -> Iterator[subprocess.Popen]:
    """Yields a process of vLLM that has loaded its models."""
    environment = surroundings(cores) | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    with (work / "vllm-speed.log").open("a") as log:
        process = subprocess.Popen(
            [python, Path(__file__).resolve(), "--inside", json.dumps(job)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            cwd=work,
        )
        try:
            read_answer(process)
            yield process
        finally:
            process.kill()
            process.wait()


def by_process(process: subprocess.Popen) -> Callable[[list[int]], dict]:
    """Returns a call that has a process decode a prompt."""

    def call(prompt: list[int]) -> dict:
        process.stdin.write(json.dumps(prompt) + "\n")
        process.stdin.flush()
        return read_answer(process)

    return call


# This library


def our_engines(target, max_tokens: int) -> dict[str, Callable[[list[int]], dict]]:
    """Returns calls that decode a prompt plainly, by vLLM's chain and by the shipped tree."""
    from beagle_jax.decoding.decoder import SpeculativeDecoder
    from beagle_jax.decoding.tree import chain, dynamic_tree
    from beagle_jax.weights.draft import load_draft

    draft = load_draft(BEAGLE, target.spec)
    decoders = {
        "plain": SpeculativeDecoder(target),
        "chain": SpeculativeDecoder(target, draft, chain(LEVELS)),
        "tree": SpeculativeDecoder(target, draft, dynamic_tree(levels=2, topk=3, nodes=4)),
    }

    def call(decoder) -> Callable[[list[int]], dict]:
        def decode(prompt: list[int]) -> dict:
            clock = time.perf_counter()
            [answer] = decoder.generate([prompt], max_new_tokens=max_tokens)
            return {"tokens": list(answer.tokens), "seconds": time.perf_counter() - clock}

        return decode

    return {f"beagle_jax {name}": call(decoder) for name, decoder in decoders.items()}


# The comparison


def in_turn(engines: dict[str, Callable], prompts: list[list[int]], turns: int) -> list[dict]:
    """Decodes each prompt `turns` times by each engine; returns the seconds of each prompt.

    Raises:
      SystemExit: an engine writes other tokens than the first.
    """
    names, rows = list(engines), []
    for number, prompt in zip(count(), prompts * turns):
        first = number % len(names)
        order = names[first:] + names[:first]
        answers = {name: engines[name](prompt) for name in order}
        differing = [n for n in names if answers[n]["tokens"] != answers[names[0]]["tokens"]]
        if differing:
            raise SystemExit(f"prompt {number % len(prompts)}: {differing} wrote other tokens")
        rows.append({name: answer["seconds"] for name, answer in answers.items()})
        print(json.dumps({name: round(x, 2) for name, x in rows[-1].items()}), flush=True)
    return rows


def ratios(rows: list[dict]) -> dict[str, list[float]]:
    """Returns median and 95 % interval of each ratio of speeds."""
    result = {}
    for name, (faster, slower) in RATIOS.items():
        pairs = [row[slower] / row[faster] for row in rows]
        figures = (statistics.median(pairs), *interval(pairs))
        result[name] = [round(x, 2) for x in figures]
    return result


def table(result: dict[str, list[float]]) -> str:
    """Returns the ratios as Markdown."""
    lines = ["| ratio of tokens/s | median | 95 % interval |", "| -- | -- | -- |"]
    for name, (median, low, high) in result.items():
        lines.append(f"| {name} | {median:.2f} | {low:.2f} to {high:.2f} |")
    return "\n".join(lines)


def compare(arguments: argparse.Namespace) -> dict:
    """Runs all engines and returns the results."""
    from beagle_jax.weights.target import load_target

    work = arguments.work.resolve()
    python = arguments.env.absolute() / "bin" / "python"
    job = {
        "target": str(work / "target"),
        "max_tokens": arguments.tokens,
        "compiled": arguments.compiled,
    }
    drafted = job | {"speculative": speculative("eagle", work / "beagle")}
    with (
        vllm_engine(python, job, work, arguments.cores) as plain,
        vllm_engine(python, drafted, work, arguments.cores) as beagle,
    ):
        target = load_target(str(work / "target"), "float32", "unused")
        engines = {"vllm plain": by_process(plain), "vllm beagle": by_process(beagle)}
        engines |= our_engines(target, arguments.tokens)
        prompts = prompts_of(target, arguments.prompts)
        for engine in engines.values():
            engine(prompts[0])  # compiles
        load = os.getloadavg()[0]
        rows = in_turn(engines, prompts, arguments.turns)
    seconds = {name: round(statistics.median(row[name] for row in rows), 2) for name in engines}
    return {
        "made_with": {
            "vllm-cpu": VERSION,
            "torch.compile in vLLM": arguments.compiled,
            "cores": arguments.cores,
            "prompts": arguments.prompts,
            "turns": arguments.turns,
            "load_average": [round(load, 1), round(os.getloadavg()[0], 1)],
        },
        "median_seconds": seconds,
        "ratios": ratios(rows),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--env", type=Path, default=ROOT / ".venv-vllm", help="of vLLM")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "vllm", help="of vllm_cpu.py")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--turns", type=int, default=2, help="of each prompt")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer, at most")
    parser.add_argument("--cores", type=int, default=1, help="that all engines share")
    parser.add_argument("--compiled", action="store_true", help="vLLM under torch.compile")
    parser.add_argument("--json", type=Path, help="a file for the figures")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        answer_lines(json.loads(arguments.inside))
        return
    # before jax starts its threads; processes of vLLM inherit it
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.cores])
    result = compare(arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result["ratios"]))


if __name__ == "__main__":
    main()
