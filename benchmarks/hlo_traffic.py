"""Device memory that a compiled program reads, counted in XLA's HLO text.

Every operation reads its operands from the device's memory, except those that the compiler keeps in
memory on the chip (`S(1)` and above in a layout). Of an operand that an operation only slices or
gathers from, the slice counts. An inner loop counts once, and all branches of a condition count.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from beagle_jax.program import branches_of, called_by, computations_of

_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*)$")
_SHAPE = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\](\{[^}]*\})?")
_NAME = re.compile(r"%([\w.-]+)")
_ON_CHIP = re.compile(r"S\([1-9]\)")
_SLICES = ("dynamic-slice", "gather", "slice")
# These move nothing: they name buffers, or call what is counted itself.
_SILENT = {
    "after-all",
    "bitcast",
    "constant",
    "get-tuple-element",
    "iota",
    "opt-barrier",
    "parameter",
    "partition-id",
    "replica-id",
    "tuple",
}


class Instruction(NamedTuple):
    """A line of HLO."""

    name: str
    shape: str
    operation: str
    operands: tuple[str, ...]
    rest: str  # operands and attributes


class Operation(NamedTuple):
    """What one operation moves."""

    name: str
    shape: str
    bytes_read: int  # from the device's memory
    bytes_written: int  # to it


def operations(text: str, *, loop: bool) -> list[Operation]:
    """Lists the operations of an optimised HLO module. loop: those of its longest loop's body."""
    entry, computations = _parsed(text)
    if not loop:
        return list(_walk(entry, computations))
    bodies = [
        match[1]
        for body in computations.values()
        for instruction in body
        if (match := re.search(r"body=%?([\w.-]+)", instruction.rest))
    ]
    listed = {body: list(_walk(body, computations)) for body in bodies}
    return max(listed.values(), key=lambda made: sum(each.bytes_read for each in made))


def conditionals(text: str) -> tuple[int, int]:
    """Counts `conditional` operations, and copies to the host, in a whole module."""
    _, computations = _parsed(text)
    every = [each for body in computations.values() for each in body]
    hosts = sum("S(5)" in each.shape and each.operation.startswith("copy") for each in every)
    return sum(each.operation == "conditional" for each in every), hosts


def size(shape: str) -> int:
    """Returns the bytes of a shape, or of all parts of a tuple."""
    return sum(
        math.ceil(_bits(kind) * math.prod(int(each) for each in listed.split(",") if each) / 8)
        for kind, listed, _ in _SHAPE.findall(shape)
    )


def _bits(kind: str) -> int:
    digits = re.search(r"\d+", kind)
    return 8 if kind == "pred" or digits is None else int(digits[0])


def _parsed(text: str) -> tuple[str, dict[str, list[Instruction]]]:
    """Returns the entry's name, and the instructions of each computation."""
    entry, listed = computations_of(text)
    return entry, {
        name: [_instruction(matched) for line in lines if (matched := _INSTRUCTION.match(line))]
        for name, lines in listed.items()
    }


def _instruction(matched: re.Match[str]) -> Instruction:
    operands = tuple(_NAME.findall(_arguments(matched[4])))
    return Instruction(*matched.group(1, 2, 3), operands, matched[4])


def _arguments(rest: str) -> str:
    """Returns what stands before the bracket that closes an operation's operands."""
    depth = 1
    for index, letter in enumerate(rest):
        depth += (letter in "({[") - (letter in ")}]")
        if depth == 0:
            return rest[:index]
    return rest


def _walk(name: str, computations: dict[str, list[Instruction]]) -> Iterator[Operation]:
    shapes = {each.name: each.shape for each in computations[name]}
    for each in computations[name]:
        if each.operation in ("call", "while", "conditional"):
            for called in called_by(each.rest) + branches_of(each.rest):
                yield from _walk(called, computations)
        elif each.operation not in _SILENT and not each.operation.endswith("-done"):
            taken = sum(
                _read(each, index, shapes[operand], computations)
                for index, operand in enumerate(each.operands)
                if operand in shapes and not _ON_CHIP.search(shapes[operand])
            )
            leaves = not (_ON_CHIP.search(each.shape) or each.operation.endswith("-start"))
            yield Operation(each.name, each.shape, taken, size(each.shape) if leaves else 0)


def _read(each: Instruction, index: int, shape: str, computations: dict) -> int:
    """Returns the bytes that an operation reads of one operand."""
    if shape.startswith("("):
        return 0
    if each.operation == "fusion":
        body = computations[called_by(each.rest)[0]]
        inner = [
            step
            for step in body
            if step.operation == "parameter" and step.rest.startswith(f"{index})")
        ]
        return min(size(shape), _read_inside(inner[0].name, shape, body, computations))
    if index == 0 and each.operation in _SLICES:
        return size(each.shape)
    if index == 0 and each.operation == "slice-start":  # (operand, result, ..)
        return size([shape[0] for shape in _SHAPE.finditer(each.shape)][1])
    if index == 0 and each.operation == "dynamic-update-slice":
        return 0
    return size(shape)


def _read_inside(name: str, shape: str, body: list[Instruction], computations: dict) -> int:
    """Returns the bytes that a fusion reads of a parameter."""
    total = 0
    for step in body:
        if name not in step.operands:
            continue
        if step.operation == "bitcast" or _only_names(step, computations):
            total += _read_inside(step.name, step.shape, body, computations)
        else:
            total += _read(step, step.operands.index(name), shape, computations)
    return total


def _only_names(step: Instruction, computations: dict) -> bool:
    """Returns whether a fusion within another moves nothing, as TPUs have them around weights."""
    return step.operation == "fusion" and all(
        inner.operation in _SILENT for inner in computations[called_by(step.rest)[0]]
    )
