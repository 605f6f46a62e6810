"""Estimates the cost of decoding before a device is there: bytes by shape, programs by compiler.

All arrays are shapes with the shardings of the real decoder. XLA compiles the programs that
decoding runs, for the devices of a mesh, which may belong to a topology (topology.py).
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from beagle_jax.config import Config, TargetConfig
from beagle_jax.decoding.drafter import NoDrafter
from beagle_jax.decoding.engine import admit, advance
from beagle_jax.decoding.kinds import TRAINED
from beagle_jax.decoding.lookup import Lookup, LookupBeside
from beagle_jax.decoding.round import Chunk, Round, TargetModel
from beagle_jax.decoding.rules import RULES
from beagle_jax.decoding.sampling import GREEDY, filters_of, knobs_of, sampling_of
from beagle_jax.decoding.session import CAPACITY_BUCKET, PREFILL_CHUNK
from beagle_jax.decoding.state import DecodeState, Requests, state_shardings
from beagle_jax.decoding.trained import DraftHead
from beagle_jax.decoding.tree import LookupTree, Tree
from beagle_jax.errors import UserError
from beagle_jax.model.cache import round_up
from beagle_jax.model.experts import Experts
from beagle_jax.model.joined import join_layer, turns_experts
from beagle_jax.model.kinds import new_spec
from beagle_jax.model.quantised import arranged_layer, quantise_layer, stored_bytes
from beagle_jax.model.target import TargetSpec
from beagle_jax.program import Program, program_of
from beagle_jax.sharding import (
    joins_heads,
    place_abstract,
    shardings,
    whole,
    with_experts,
)
from beagle_jax.topology import first_line, hidden_warnings
from beagle_jax.weights.orbax_target import abstract_params
from beagle_jax.weights.quantiser import check_group


class ProgramCost(NamedTuple):
    """One program as the compiler made it. Bytes are per device."""

    temporaries: int | None  # None: they do not fit into the chip's memory
    total: int | None  # by the compiler: arguments, results and temporaries
    refusal: str  # the compiler's out-of-memory message; else empty
    seconds: float  # of compilation
    program: Program | None  # kernels and collectives of a round, or of the whole program


class DecodeCost(NamedTuple):
    """Cost of decoding. Bytes are those of the device that holds the most."""

    target_weights: int
    draft_weights: int  # the head too, if it is not the target's
    target_cache: int
    draft_cache: int
    capacity: int  # slots of a row
    step: ProgramCost  # a plain step: the round without drafts
    round: ProgramCost
    reading: ProgramCost  # a later chunk of a prompt, of one row
    step_bytes: int  # at least so many bytes are read in a plain step
    round_bytes: int


@dataclass(frozen=True)
class Programs:
    """The programs of a decoder, lowered for the devices of its mesh from shapes alone.

    now: of `abstract_round`. batch: rows. context: tokens of each row.
    """

    now: Round
    batch: int
    context: int

    @property
    def capacity(self) -> int:
        """Slots of a row."""
        return round_up(self.context + self.now.tree.depth + 1, CAPACITY_BUCKET)

    @property
    def state(self) -> DecodeState:
        """Shapes of the state of rounds with drafts."""
        return _state(self.now, self.batch, self.capacity)

    def step(self) -> jax.stages.Lowered:
        """The loop of plain steps."""
        plain = replace(self.now.plain, filters=self.now.filters)
        return self._advance(plain, _state(plain, self.batch, self.capacity))

    def round(self) -> jax.stages.Lowered:
        """The loop of rounds with drafts."""
        return self._advance(self.now, self.state)

    def reading(self) -> jax.stages.Lowered:
        """Reads a later chunk of a prompt of one row."""
        chunk = _chunk(self.capacity)
        return admit.lower(self.now.reading, self.state, chunk, first=False)

    def _advance(self, now: Round, state: DecodeState) -> jax.stages.Lowered:
        return advance.lower(now, state, np.int32(2), np.int32(self.batch))


def decode_cost(
    config: Config, target: TargetSpec, tree: Tree, mesh: Mesh, *, batch: int, context: int
) -> DecodeCost:
    """Compiles a plain step, a round and the reading of a prompt, without allocating arrays.

    mesh: of `sharding.decoding_mesh`. batch: rows. context: tokens of each row.
    """
    # `exact` asks for the backend of this process, which is not the one of a topology.
    rounds = config.target.dtype == "float32" and mesh.devices.flat[0].platform != "cpu"
    with jax.default_matmul_precision("highest" if rounds else None):
        return _decode_cost(config, target, tree, mesh, batch, context)


def _decode_cost(
    config: Config, target: TargetSpec, tree: Tree, mesh: Mesh, batch: int, context: int
) -> DecodeCost:
    now = abstract_round(config, target, tree, mesh)
    programs = Programs(now, batch, context)
    state, capacity = programs.state, programs.capacity
    step = _compiled(programs.step(), loop=True)
    speculative = _compiled(programs.round(), loop=True) if tree.depth else step
    reading = _compiled(programs.reading(), loop=False)
    cache, own = state.cache.layers, state.draft
    return DecodeCost(
        target_weights=held_bytes(now.target.params),
        draft_weights=held_bytes(now.drafter.owned()),
        target_cache=held_bytes(cache),
        draft_cache=held_bytes(own),
        capacity=capacity,
        step=step,
        round=speculative,
        reading=reading,
        step_bytes=_target_bytes(now, state, batch, context),
        round_bytes=_target_bytes(now, state, batch, context) + _draft_bytes(now, state, context),
    )


def abstract_round(config: Config, target: TargetSpec, tree: Tree, mesh: Mesh) -> Round:
    """Returns the round of a config's decoder, with shapes in place of weights.

    Raises:
      UserError: the mesh cannot split the target.
    """
    target = with_experts(target, mesh)
    params = abstract_params(target, jnp.dtype(config.target.dtype), mesh)
    if config.target.quantize != "none":
        params = _quantised(params, config.target, target, mesh)
    params = _joined(params, target, mesh)
    if config.target.quantize != "none":
        params = _arranged(params, mesh)
    drafter: Any = NoDrafter()
    if config.draft.path == "lookup":
        drafter = Lookup(config.decode.ngram)
    elif tree.grown.depth:
        drafter = _drafter(config, target, params, mesh)
    if isinstance(tree, LookupTree):
        drafter = LookupBeside(drafter)
    return Round(
        TargetModel(target, params),
        drafter,
        tree,
        (0,),
        RULES[config.decode.rule if tree.depth else "match"],
        filters_of([sampling_of(config.decode)]),
        mesh,
    )


def _joined(params: Any, target: TargetSpec, mesh: Mesh) -> Any:
    """Returns the shapes of parameters whose projections are joined, as for decoding."""
    join = partial(join_layer, spec=target, heads=joins_heads(mesh, target.num_kv_heads))
    platform = mesh.devices.flat[0].platform
    layers = [
        jax.eval_shape(partial(join, turned=turns_experts(layer, platform)), layer)
        for layer in params["layers"]
    ]
    return {**params, "layers": place_abstract(layers, shardings(layers, mesh))}


def _quantised(params: Any, settings: TargetConfig, target: TargetSpec, mesh: Mesh) -> Any:
    """Returns the shapes of quantised parameters.

    Raises:
      UserError: the mesh has several devices, or the group size does not fit.
    """
    if mesh.size > 1:
        raise UserError(
            f"a quantised target is for one device, but the mesh has {mesh.size}; set "
            "target.quantize=none, or plan for one device"
        )
    assert settings.quantize != "none"
    check_group(target, settings.group_size, settings.source)
    make = partial(quantise_layer, kind=settings.quantize, group=settings.group_size)
    return {**params, "layers": [_on_all(make, layer, mesh) for layer in params["layers"]]}


def _arranged(params: Any, mesh: Mesh) -> Any:
    """Returns the shapes of quantised parameters, arranged for the devices of the mesh."""
    make = partial(arranged_layer, platform=mesh.devices.flat[0].platform)
    return {**params, "layers": [_on_all(make, layer, mesh) for layer in params["layers"]]}


def _on_all(make: Callable[[Any], Any], layer: Any, mesh: Mesh) -> Any:
    """Returns the shapes of what a function makes of a layer, whole on each device."""
    made = jax.eval_shape(make, layer)
    return place_abstract(made, jax.tree.map(lambda _: whole(mesh), made))


def _drafter(config: Config, target: TargetSpec, params: Any, mesh: Mesh) -> Any:
    """Returns the drafter of a new draft of this config, as `kinds.trained_drafter` makes it."""
    scored = config.draft.hot_tokens or target.vocab_size
    spec = new_spec(config.draft, target).scoring(scored)
    dtype = jnp.dtype(config.target.dtype)
    shapes = {
        name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in spec.param_shapes().items()
    }
    own = place_abstract(shapes, shardings(shapes, mesh))
    head_VD = params.get("head_VD", params["embed_VD"])
    ids_V: Any = None
    if scored < target.vocab_size:
        ids_V = jax.ShapeDtypeStruct((scored,), jnp.int32)
        rows = {"head_VD": jax.ShapeDtypeStruct((scored, target.hidden_size), dtype)}
        head_VD = place_abstract(rows, shardings(rows, mesh))["head_VD"]
    head = DraftHead(own.get("head_VD", head_VD), ids_V)
    embed_VD = own.get("embed_VD", params["embed_VD"])
    return TRAINED[spec.kind](spec, own, embed_VD, head, config.decode.append_predicted)


def _state(now: Round, batch: int, capacity: int) -> DecodeState:
    """Returns the shapes of a state, where decoding puts its arrays."""
    assert now.mesh is not None
    shapes = jax.eval_shape(lambda: replace(now.reading, mesh=None).empty(batch, capacity))
    return place_abstract(shapes, state_shardings(shapes, now.mesh))


def _chunk(capacity: int) -> Chunk:
    """The second chunk of one prompt, as `Session` makes it."""
    columns = min(PREFILL_CHUNK, capacity // 2)
    key_R = jax.eval_shape(lambda: jax.vmap(jax.random.key)(jnp.zeros(1, jnp.uint32)))
    requests: Any = Requests(np.ones(1, np.int32), key_R, knobs_of([GREEDY]))
    zero_R, token_RT = np.zeros(1, np.int32), np.zeros((1, columns), np.int32)
    return Chunk(zero_R, token_RT, np.array(columns, np.int32), zero_R, requests)


def _compiled(lowered: jax.stages.Lowered, *, loop: bool) -> ProgramCost:
    """Compiles a program. loop: what counts is one pass of its loop."""
    clock = time.perf_counter()
    try:
        with hidden_warnings():
            compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return ProgramCost(None, None, first_line(error), time.perf_counter() - clock, None)
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None and text is not None  # XLA's compilers give both
    total = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )
    seconds, made = time.perf_counter() - clock, program_of(text, loop=loop)
    return ProgramCost(memory.temp_size_in_bytes, total, "", seconds, made)


def held_bytes(tree: Any) -> int:
    """Returns the bytes of one device's part of all arrays."""
    return sum(_part(x) for x in jax.tree.leaves(tree))


def _part(x: Any) -> int:
    shape = x.sharding.shard_shape(x.shape) if x.sharding is not None else x.shape
    return stored_bytes(jax.ShapeDtypeStruct(shape, x.dtype))


def _target_bytes(now: Round, state: DecodeState, batch: int, context: int) -> int:
    """Bytes of the target that any round must read: weights once, live slots, few experts."""
    params, experts = now.target.params, now.target.spec.experts
    total = held_bytes([params.get("head_VD", params["embed_VD"]), params["norm_D"]])
    for layer in params["layers"]:
        for key, x in layer.items():
            routed = experts is not None and key.endswith(("_EFD", "_EDF"))
            total += int(held_bytes(x) * (_read_share(x, experts) if experts and routed else 1))
    live = context / state.cache.capacity
    return total + int(held_bytes(state.cache.layers) * live)


def _read_share(stack: jax.Array, experts: Experts) -> float:
    """The share of a device's experts that one token needs, on the device with most of them."""
    held = stack.sharding.shard_shape(stack.shape)[0]
    return -(-experts.per_token * held // experts.count) / held


def _draft_bytes(now: Round, state: DecodeState, context: int) -> int:
    """Bytes of the draft that a round must read: its weights and head once for each level."""
    if not now.drafter.attends:
        return 0
    drafter: Any = now.drafter
    own = state.draft
    if isinstance(drafter, LookupBeside):
        drafter, own = drafter.drafter, own.drafter
    tables = ("embed_VD", "head_VD")
    layer = held_bytes({name: x for name, x in drafter.params.items() if name not in tables})
    live = context / state.cache.capacity
    level = layer + _part(drafter.head.rows_VD) + int(held_bytes(drafter.rows(own)) * live)
    return level * now.tree.grown.depth
