"""`plan --decode`: memory, kernels and the least time of decoding, before a device is there."""

from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence

import jax
from jax.sharding import Mesh

from beagle_jax.config import Config
from beagle_jax.decoding.cost import DecodeCost, ProgramCost, decode_cost
from beagle_jax.decoding.tree import Tree, lookup_tree, tree_of
from beagle_jax.errors import UsageError
from beagle_jax.hardware import chip_of
from beagle_jax.sharding import decoding_mesh, mesh_for_decoding
from beagle_jax.terminal import size
from beagle_jax.weights.shape import parameter_count, planned_spec

_CONTEXT = 4096  # tokens, if neither the command line nor the target says less
_PROGRAMS = {"step": "plain step", "round": "round", "reading": "reading a prompt"}


def plan_decoding(
    config: Config, arguments: Namespace, devices: Sequence[jax.Device], memory: float | None
) -> tuple[str, dict]:
    """Plans the decoder of a config on these devices.

    memory: bytes of a device that a program can use, if known. Returns the text and the figures.

    Raises:
        UsageError: the devices, the rows and the context do not fit `mesh.*` and the target.
    """
    target, tree = planned_spec(config.target), _tree(config)
    batch = arguments.batch or 1
    context = arguments.context or min(_CONTEXT, target.max_positions)
    if context > target.max_positions:
        raise UsageError(
            f"--context is {context}, but the target's longest context is {target.max_positions}"
        )
    mesh = decoding_mesh(_mesh(config, arguments, devices), target.num_kv_heads)
    cost = decode_cost(config, target, tree, mesh, batch=batch, context=context)
    count, chip = mesh.size, chip_of(devices[0].device_kind)
    figures = {
        "target": {
            "source": config.target.source,
            "parameters": parameter_count(target),
            "dtype": config.target.dtype,
        },
        "tree": str(tree),
        "devices": {
            "count": count,
            "kind": devices[0].device_kind,
            "mesh": dict(mesh.shape),
            "memory": memory,
            "bandwidth": chip.bandwidth if chip else None,
            "source": chip.source if chip else None,
        },
        "batch": batch,
        "context": context,
        "capacity": cost.capacity,
        "bytes": {
            "target_weights": cost.target_weights,
            "draft_weights": cost.draft_weights,
            "target_cache": cost.target_cache,
            "draft_cache": cost.draft_cache,
        },
        "programs": {name: _program(getattr(cost, name), memory) for name in _PROGRAMS},
        "least_bytes": {"step": cost.step_bytes, "round": cost.round_bytes},
        "least_ms": {
            name: 1e3 * count / chip.bandwidth if chip else None
            for name, count in (("step", cost.step_bytes), ("round", cost.round_bytes))
        },
        "fits": _largest_batches(cost, memory, target.max_positions, batch),
    }
    return table(figures), figures


def _tree(config: Config) -> Tree:
    if config.draft.path == "plain":
        raise UsageError("draft.path is plain, but plan --decode plans a draft too; leave it out")
    return (lookup_tree if config.draft.path == "lookup" else tree_of)(config.decode)


def _mesh(config: Config, arguments: Namespace, devices: Sequence[jax.Device]) -> Mesh:
    """The mesh of a decoder; a topology has no devices that it leaves idle."""
    mesh = mesh_for_decoding(
        config.mesh, arguments.batch or 1, "plan --decode", devices, always=True
    )
    assert mesh is not None
    if arguments.topology and mesh.size < len(devices):
        raise UsageError(
            f"--topology {arguments.topology} has {len(devices)} devices, but a decoder of this "
            f"mesh takes {mesh.size}; set mesh.tensor={len(devices)}, or a smaller topology"
        )
    return mesh


def _program(cost: ProgramCost, memory: float | None) -> dict:
    fits = None
    if cost.refusal:
        fits = False
    elif memory is not None and cost.total is not None:
        fits = cost.total <= memory
    made = cost.program
    return {
        "temporaries": cost.temporaries,
        "total": cost.total,
        "refusal": cost.refusal,
        "compile_seconds": cost.seconds,
        "kernels": made and made.kernels,
        "collectives": made and made.collectives,
        "collective_bytes": made and made.collective_bytes,
        "fits": fits,
    }


def _largest_batches(
    cost: DecodeCost, memory: float | None, longest: int, batch: int
) -> dict[str, int]:
    """Largest batch that fits for each context, by arithmetic.

    Weights stay; caches and temporaries grow with rows times slots from what was compiled.
    """
    programs = [cost.step, cost.round, cost.reading]
    if memory is None or any(program.temporaries is None for program in programs):
        return {}
    weights = cost.target_weights + cost.draft_weights
    growing = cost.target_cache + cost.draft_cache
    growing += max(program.temporaries or 0 for program in programs)
    per_slot = growing / (batch * cost.capacity)
    return {
        str(context): max(0, int((memory - weights) / (per_slot * context)))
        for context in _contexts(longest)
    }


def _contexts(longest: int) -> Iterator[int]:
    context = min(1024, longest)
    while context < longest:
        yield context
        context *= 2
    yield longest


def table(figures: dict) -> str:
    """Formats the plan as a table."""
    target, devices, held = (figures[key] for key in ("target", "devices", "bytes"))
    sizes = " x ".join(f"{axis} {count}" for axis, count in devices["mesh"].items())
    memory = "" if devices["memory"] is None else f", {devices['memory'] / 1e9:.1f} GB usable"
    lines = [
        f"target     {target['source']}: {target['parameters']:,} parameters in {target['dtype']}",
        f"draft      {figures['tree']}",
        f"devices    {devices['count']} x {devices['kind']}{memory}, mesh {sizes}",
        f"rows       {figures['batch']}, context {figures['context']:,} tokens, "
        f"{figures['capacity']:,} slots",
        "on a device: target "
        f"{size(held['target_weights'])}, draft {size(held['draft_weights'])}, caches "
        f"{size(held['target_cache'])} and {size(held['draft_cache'])}",
        "",
        f"{'':26}" + "".join(f"{title:>18}" for title in _PROGRAMS.values()),
    ]
    rows: list[tuple[str, Callable[[dict], str]]] = [
        ("temporaries", lambda made: _bytes(made["temporaries"])),
        ("all, by the compiler", lambda made: _bytes(made["total"])),
        ("kernels", lambda made: _number(made["kernels"])),
        ("collectives", lambda made: _number(made["collectives"])),
        ("bytes of collectives", lambda made: _bytes(made["collective_bytes"])),
        ("fits", lambda made: {True: "yes", False: "NO", None: "-"}[made["fits"]]),
        ("compiled in", lambda made: f"{made['compile_seconds']:.1f} s"),
    ]
    programs = [figures["programs"][name] for name in _PROGRAMS]
    for label, show in rows:
        lines.append(f"{label:26}" + "".join(f"{show(made):>18}" for made in programs))
    least, times = figures["least_bytes"], figures["least_ms"]
    shown = [size(least["step"]), size(least["round"])]
    lines.append(f"{'bytes read at least':26}" + "".join(f"{value:>18}" for value in shown))
    if times["step"] is not None:
        shown = [f"{times[name]:.2f} ms" for name in ("step", "round")]
        lines.append(f"{'which takes at least':26}" + "".join(f"{value:>18}" for value in shown))
    if figures["fits"]:
        lines += ["", "largest batch by context: " + _listed(figures["fits"])]
    lines += [f"does NOT fit: {made['refusal']}" for made in programs if made["refusal"]]
    return "\n".join(lines)


def _listed(fits: dict[str, int]) -> str:
    return ", ".join(f"{int(context):,}: {batch:,}" for context, batch in fits.items())


def _bytes(value: int | None) -> str:
    return "-" if value is None else size(value)


def _number(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"
