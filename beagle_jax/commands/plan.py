"""`plan`: compute, memory and disk of a run before it starts.

Also whether its training steps compile and fit the devices.
"""

import math
from argparse import Namespace
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from beagle_jax.commands.plan_decode import plan_decoding
from beagle_jax.commands.plan_loader import least_seconds, loader, loader_rate, verdict
from beagle_jax.config import Config
from beagle_jax.corpus.text import expected_tokens, is_complete
from beagle_jax.data.folder import read_parts
from beagle_jax.data.state_records import record_bytes
from beagle_jax.data.states import record_width
from beagle_jax.errors import UsageError
from beagle_jax.hardware import chip_of, memory_stats
from beagle_jax.model.kinds import new_spec
from beagle_jax.sharding import check_no_experts, check_positions, check_rows, make_mesh
from beagle_jax.terminal import size
from beagle_jax.topology import topology_devices
from beagle_jax.training.cost import StageCost, stage_cost
from beagle_jax.weights.orbax_target import abstract_params
from beagle_jax.weights.shape import parameter_count, planned_spec

_UTILISATION = 0.4  # share of the chip's peak that the time estimate assumes
_GPU_SHARE = 0.75  # of a GPU's memory, which jax takes unless XLA_PYTHON_CLIENT_MEM_FRACTION is set
_CHECKPOINTS = 3  # per stage on disk at once: two complete, one being written


def plan(config: Config, arguments: Namespace) -> tuple[str, dict]:
    """Plans the stages for this machine's devices, `--devices` virtual ones or a `--topology`.

    Returns the text and the figures.
    """
    if arguments.devices and arguments.topology:
        raise UsageError(
            "--devices and --topology were both given, but a topology sets its own number of "
            "devices; leave --devices out"
        )
    if arguments.devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", arguments.devices)
    devices = topology_devices(arguments.topology) if arguments.topology else jax.devices()
    if arguments.decode:
        return plan_decoding(config, arguments, devices, memory_of(devices[0]))
    figures = _training(config, devices)
    return table(figures), figures


def _training(config: Config, devices: Sequence[jax.Device]) -> dict:
    """Returns the figures of the stages on these devices."""
    mesh = make_mesh(config.mesh, devices)
    check_no_experts(mesh, "training")
    check_rows(config.train.batch, mesh)
    check_positions(config.train.row_tokens, mesh)
    target = planned_spec(config.target)
    scored = config.draft.hot_tokens or target.vocab_size
    spec = new_spec(config.draft, target).scoring(scored)
    params = abstract_params(target, jnp.dtype(config.target.dtype), mesh)
    online, beside = (
        (params, None)
        if config.data.states == "online"
        else (None, params if config.eval.decodes else None)
    )

    def cost_of(name: str, config: Config) -> StageCost:
        return stage_cost(name, config, target, scored, mesh, online, beside)

    draft_parameters = sum(math.prod(shape) for shape in spec.param_shapes().values())
    space = disk(config, record_width(target, spec.taps), draft_parameters)
    loading = loader(config, mesh, space["state_of_a_token"])
    return {
        "target": {
            "source": config.target.source,
            "parameters": parameter_count(target),
            "dtype": config.target.dtype,
            "bytes": parameter_count(target) * jnp.dtype(config.target.dtype).itemsize,
        },
        "draft": {
            "parameters": draft_parameters,
            "scored_tokens": scored,
            "vocabulary": target.vocab_size,
        },
        "disk": space,
        "loader": loading,
        "devices": {
            "count": len(devices),
            "kind": devices[0].device_kind,
            "mesh": dict(mesh.shape),
            "memory": memory_of(devices[0]),
        },
        "stages": {
            name: stage_figures(config, name, mesh, loading, cost_of)
            for name in config.train.stages_to_run
        },
    }


def memory_of(device: jax.Device) -> float | None:
    """Bytes of a device that a program can use; None if the backend does not report it."""
    if device.platform == "cpu":  # virtual devices share the machine's memory
        return None
    chip = chip_of(device.device_kind)
    # A program has to fit the share of memory that a GPU's runtime hands out.
    limit = None if chip and device.platform == "tpu" else memory_stats(device).get("bytes_limit")
    if limit or chip is None:
        return limit
    return chip.memory if device.platform == "tpu" else _GPU_SHARE * chip.memory


def disk(config: Config, width: int, draft_parameters: int) -> dict:
    """Bytes that a run writes to disk."""
    online = config.data.states == "online"
    token = 0 if online else record_bytes(width, config.data.states_dtype or config.target.dtype)
    tokens = text_tokens(config)
    # parameters, two moments, summed gradients, the weights' average; all float32
    held = 3 + (config.train.accumulate > 1) + (config.train.ema is not None)
    checkpoint = held * 4 * draft_parameters
    return {
        "state_of_a_token": token,
        "text_tokens_at_most": tokens,
        "states_at_most": None if tokens is None else token * tokens,
        "checkpoint": checkpoint,
        "checkpoints": checkpoint * _CHECKPOINTS * len(config.train.stages_to_run),
        "draft": 4 * draft_parameters,
    }


def text_tokens(config: Config) -> int | None:
    """Tokens of the training text if it is complete, otherwise an upper bound.

    None if the source has its own answers, whose length is not known.
    """
    parts = read_parts(config.data.folder)
    if parts and is_complete(config.data, parts):
        return sum(len(row.tokens) for rows in parts.values() for row in rows)
    written = config.data.source == "self" or config.data.answers == "regenerate"
    return expected_tokens(config.data, config.data.answer_tokens) if written else None


def stage_figures(
    config: Config,
    name: str,
    mesh: Mesh,
    loading: dict,
    cost_of: Callable[[str, Config], StageCost],
) -> dict:
    """Returns a stage's cost and the figures derived from it.

    A step that does not fit is also compiled with `train.remat: block`.
    """
    device, cost = mesh.devices.flat[0], cost_of(name, config)
    memory, chip = memory_of(device), chip_of(device.device_kind)
    seconds = least_seconds(config, mesh, cost.flops)
    figures = cost._asdict() | {
        "held": cost.held,
        "steps": config.train.named_stages[name].steps,
        "tokens_a_step": config.train.batch * config.train.row_tokens,
        "fits": _fits(cost, memory),
        "with_remat": None,
        "least_seconds": seconds,
        "loader_rate": loader_rate(seconds, loading),
    }
    if figures["fits"] is False and config.train.remat == "none":
        again = cost_of(name, config.changed(train=config.train.changed(remat="block")))
        figures["with_remat"] = {
            "compiler_total": again.compiler_total,
            "fits": _fits(again, memory),
        }
    if chip and chip.bfloat16:
        rate = _UTILISATION * chip.bfloat16 * mesh.size
        figures["hours_at_40_percent"] = figures["steps"] * cost.flops / rate / 3600
    return figures


def _fits(cost: StageCost, memory: float | None) -> bool | None:
    if cost.refusal:
        return False
    if memory is None or cost.compiler_total is None:
        return None
    return cost.compiler_total <= memory


def table(figures: dict) -> str:
    """Formats the plan as a table."""
    target, draft, space, devices = (figures[key] for key in ("target", "draft", "disk", "devices"))
    sizes = " x ".join(f"{axis} {count}" for axis, count in devices["mesh"].items())
    states = (
        "for as many tokens as the source has (prepare prints their number)"
        if space["states_at_most"] is None
        else f"at most {size(space['states_at_most'])}"
    )
    memory = "" if devices["memory"] is None else f" of {devices['memory'] / 2**30:.0f} GiB"
    lines = [
        f"target     {target['source']}: {target['parameters']:,} parameters, "
        f"{size(target['bytes'])} in {target['dtype']}",
        f"draft      {draft['parameters']:,} parameters; scores {draft['scored_tokens']:,} of "
        f"{draft['vocabulary']:,} tokens",
        f"disk       states {space['state_of_a_token'] / 1e3:.2f} kB a token, {states}; "
        f"checkpoints {size(space['checkpoints'])}, {size(space['checkpoint'])} each; draft "
        f"{size(space['draft'])}",
        f"devices    {devices['count']} x {devices['kind']}{memory}, mesh {sizes}",
    ]
    rows = [
        ("stage", lambda stage: ""),
        ("steps", lambda stage: f"{stage['steps']:,}"),
        ("tokens a step, padding included", lambda stage: f"{stage['tokens_a_step']:,}"),
        ("operations a step", lambda stage: f"{stage['flops']:.3g}"),
        ("draft weights", _of("weights")),
        ("optimizer", _of("optimizer")),
        ("frozen parts of the target", _of("frozen")),
        ("tokens and states", _of("batch")),
        ("of the next batches", _of("waiting")),
        ("temporaries", _of("temporaries")),
        ("all, by the compiler", _of("compiler_total")),
        ("least time at the chips' peak", _milliseconds),
        ("compiled in", lambda stage: f"{stage['compile_seconds']:.1f} s"),
    ]
    if any("hours_at_40_percent" in stage for stage in figures["stages"].values()):
        rows.append(
            ("at 40 % of the chips' peak", lambda stage: f"{stage['hours_at_40_percent']:.1f} h")
        )
    for label, show in rows:
        cells = figures["stages"].items() if label != "stage" else ()
        values = [show(stage) for _, stage in cells] or list(figures["stages"])
        lines.append(f"{label:34}" + "".join(f"{value:>16}" for value in values))
    rates = [stage["loader_rate"] for stage in figures["stages"].values()]
    loads = [verdict(figures["loader"], rates)] if rates else []
    return "\n".join([*lines, *loads, *map(_verdict, figures["stages"].items())])


def _verdict(entry: tuple[str, dict]) -> str:
    name, stage = entry
    if stage["fits"] is None:
        return f"{name}: compiles"
    if stage["fits"]:
        return f"{name}: compiles and fits"
    again = stage["with_remat"]
    if again and again["fits"]:
        return (
            f"{name}: does NOT fit, but with train.remat=block it takes "
            f"{size(again['compiler_total'])} and fits"
        )
    if stage["refusal"]:
        return (
            f"{name}: does NOT fit: {stage['refusal']}; lower train.batch, train.row_tokens or "
            "train.loss_rows, or raise mesh.fsdp"
        )
    return f"{name}: compiles and does NOT fit; lower train.batch or raise mesh.fsdp"


def _milliseconds(stage: dict) -> str:
    seconds = stage["least_seconds"]
    return "-" if seconds is None else f"{1e3 * seconds:.1f} ms"


def _of(key: str) -> Callable[[dict], str]:
    """Returns a function that formats bytes on one device."""
    return lambda stage: "-" if stage[key] is None else size(stage[key])
