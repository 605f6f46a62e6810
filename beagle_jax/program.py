"""What a compiled program launches and copies, read from XLA's HLO text."""

import math
import re
from collections.abc import Collection
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
_NAMED = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*)$")
_OPERAND = re.compile(r"%([\w.-]+)")
_FUSED = re.compile(r" fusion\(.*calls=%?([\w.-]+)")
_FAST = "S(1)"  # a TPU's vector memory, in a layout
_WRITES = {"dynamic-update-slice", "scatter"}  # in place, where the operand is not needed any more


class Program(NamedTuple):
    """What one pass of a program launches; a scanned loop counts for each of its passes."""

    kernels: int
    collectives: int
    collective_bytes: int  # of their results, on each device


class Copy(NamedTuple):
    """An operation that makes a large array anew."""

    where: str  # "entry", "loop" or "exit"; "entry" in programs without a loop
    operation: str  # "prefetch": into a TPU's fast memory, where it is read once
    shape: str  # with the layout


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
    entry, computations = computations_of(text)
    body = _longest_loop(entry, computations) if loop else entry
    return Program(*_count(body, computations, {}))


def computations_of(text: str) -> tuple[str, dict[str, list[str]]]:
    """Splits a module's text: returns the entry's name, and the lines of each computation."""
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


def called_by(rest: str) -> list[str]:
    """Names the computations that an operation calls, branches excepted.

    rest: what follows the operation's opening bracket.
    """
    return _CALLED.findall(rest)


def branches_of(rest: str) -> list[str]:
    """Names the branches of a `conditional`. rest: what follows its opening bracket."""
    names: list[str] = []
    for listed, single in _BRANCHES.findall(rest):
        names += [part.strip().lstrip("%") for part in listed.split(",")] if listed else [single]
    return names


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
                todo += called_by(line)
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
            for called in called_by(rest):
                counted = counted.plus(_count(called, computations, known))
        elif operation == "while":
            trips = _TRIPS.search(rest)
            for called in called_by(rest):
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
    branches = [_count(name, computations, known) for name in branches_of(rest)]
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


def copies_of(text: str, elements: int, besides: Collection[int] = ()) -> list[Copy]:
    """Lists operations of an optimised HLO module that make an array of `elements` or more.

    Writes in place are none of them. besides: sizes that do not count, in elements, such as those
    of weights that a TPU fetches before their use. An asynchronous copy counts once.
    """
    entry, computations = computations_of(text)
    fused, copies = set(_FUSED.findall(text)), []
    for name, lines in computations.items():
        where = "entry" if name == entry else "loop"
        for line in lines if name not in fused else ():
            if not (instruction := _INSTRUCTION.match(line)):
                continue
            shape, operation, _ = instruction.groups()
            if operation == "while" and name == entry:
                where = "exit"
            if operation in _SILENT or operation.endswith(("-done", "-update")):
                continue
            sizes = [
                math.prod(map(int, listed.split(",")))
                for _, listed in _SHAPE.findall(shape)
                if listed
            ]
            largest = max(sizes, default=0)
            if largest < elements or largest in besides:
                continue
            called = _FUSED.search(line)
            ends = _ends(computations[called[1]]) if called else {operation}
            if (
                operation == "copy-start"
                and _FAST in shape.split("{")[1]
                and _FAST not in shape.split("{")[2]
            ):
                ends = {"prefetch"}
            if not ends <= _WRITES:
                copies.append(Copy(where, "+".join(sorted(ends - _WRITES)), shape))
    return copies


def _ends(lines: list[str]) -> set[str]:
    """Returns the operations that make the results of a fusion."""
    made, root = {}, ""
    for line in lines:
        if instruction := _NAMED.match(line):
            is_root, name, _, operation, rest = instruction.groups()
            made[name] = operation, rest
            root = name if is_root else root

    def of(name: str) -> set[str]:
        operation, rest = made[name]
        operands = [each for each in _OPERAND.findall(rest) if each in made]
        if operation == "tuple":
            return set().union(*map(of, operands))
        return of(operands[0]) if operation == "bitcast" and operands else {operation}

    return of(root)
