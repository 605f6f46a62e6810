"""What a compiled program launches: kernels and collectives, counted in XLA's HLO text."""

import math
import re
from typing import NamedTuple

# These launch nothing: they name buffers, or call what is counted itself.
_SILENT = {
    "after-all",
    "add-dependency",
    "bitcast",
    "call",
    "conditional",
    "constant",
    "get-tuple-element",
    "iota",
    "opt-barrier",
    "parameter",
    "partition-id",
    "replica-id",
    "tuple",
    "while",
}
_COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.-]+ = (\(.*?\)|\S+) ([\w-]+)\((.*)$")
_CALLED = re.compile(r"(?:to_apply|calls|body|condition)=%?([\w.-]+)")
_BRANCHES = re.compile(
    r"(?:branch_computations=\{([^}]*)\}|(?:true|false)_computation=%?([\w.-]+))"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_SHAPE = re.compile(r"([a-z]+\d*)\[([\d,]*)\]")
_BITS = re.compile(r"\d+")


class Program(NamedTuple):
    """What one pass of a program launches; a scanned loop counts for each of its passes."""

    kernels: int
    collectives: int
    collective_bytes: int  # of their results, on each device


class _Counted(NamedTuple):
    kernels: int
    collectives: int
    sent: int

    def plus(self, other: "_Counted", times: int = 1) -> "_Counted":
        return _Counted(*(mine + times * more for mine, more in zip(self, other, strict=True)))


def program_of(text: str, *, loop: bool) -> Program:
    """Counts an optimised HLO module.

    loop: counts one pass of the entry's longest loop, such as a round of decoding, and not the
    whole program. A loop whose number of passes is not known counts once. Of the branches of a
    condition, the one with most kernels counts.
    """
    entry, computations = _computations(text)
    body = _longest_loop(entry, computations) if loop else entry
    return Program(*_count(body, computations, {}))


def _computations(text: str) -> tuple[str, dict[str, list[str]]]:
    """Returns the entry's name, and the lines of each computation."""
    entry, name = "", ""
    computations: dict[str, list[str]] = {}
    for line in text.splitlines():
        if begun := _COMPUTATION.match(line):
            name = begun[2]
            computations[name] = []
            entry = name if begun[1] else entry
        elif name and line.startswith(" "):
            computations[name].append(line)
    return entry, computations


def _longest_loop(entry: str, computations: dict[str, list[str]]) -> str:
    """Returns the body of the largest `while` that the entry runs; the entry if there is none."""
    bodies, seen, todo = [], set(), [entry]
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        for line in computations.get(name, ()):
            if " while(" in line and (body := re.search(r"body=%?([\w.-]+)", line)):
                bodies.append(body[1])
            elif " call(" in line:
                todo += _CALLED.findall(line)
    size = {body: sum(_count(body, computations, {})) for body in bodies}
    return max(bodies, key=size.__getitem__, default=entry)


def _count(name: str, computations: dict[str, list[str]], known: dict[str, _Counted]) -> _Counted:
    if name in known:
        return known[name]
    counted = _Counted(0, 0, 0)
    for line in computations.get(name, ()):
        if not (instruction := _INSTRUCTION.match(line)):
            continue
        shape, operation, rest = instruction.groups()
        if operation == "call":
            for called in _CALLED.findall(rest):
                counted = counted.plus(_count(called, computations, known))
        elif operation == "while":
            trips = _TRIPS.search(rest)
            for called in _CALLED.findall(rest):
                times = int(trips[1]) if trips else 1
                counted = counted.plus(_count(called, computations, known), times)
        elif operation == "conditional":
            counted = counted.plus(_largest(rest, computations, known))
        elif operation.removesuffix("-start") in _COLLECTIVES:
            counted = counted.plus(_Counted(0, 1, _bytes(shape, operation)))
        elif operation not in _SILENT and not operation.endswith(("-done", "-start", "-update")):
            counted = counted.plus(_Counted(1, 0, 0))
    known[name] = counted
    return counted


def _largest(rest: str, computations: dict[str, list[str]], known: dict[str, _Counted]) -> _Counted:
    names: list[str] = []
    for listed, single in _BRANCHES.findall(rest):
        names += [part.strip().lstrip("%") for part in listed.split(",")] if listed else [single]
    branches = [_count(name, computations, known) for name in names]
    return max(branches, default=_Counted(0, 0, 0))


def _bytes(shape: str, operation: str) -> int:
    """Bytes of the results; an asynchronous start lists its operands first."""
    sizes = []
    for kind, listed in _SHAPE.findall(shape):
        bits = _BITS.search(kind)
        width = 1 if kind == "pred" or bits is None else max(1, int(bits[0]) // 8)
        sizes.append(width * math.prod(int(size) for size in listed.split(",") if size))
    if operation.endswith("-start") and operation != "all-reduce-start":
        sizes = sizes[len(sizes) // 2 :]
    return sum(sizes)
