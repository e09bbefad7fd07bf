"""Bytes that a compiled program reads and writes, counted on its text.

XLA's own figure counts the body of a loop once; here it counts as often as the loop runs. A fusion reads its operands
and writes its result once; of an operand that it only cuts a slice from it reads the slice, and of an array that it
updates in place it writes the update. The scratch space of a library's call is not counted. Caches are not modelled:
what stays in one costs less than its bytes say.
"""

import math
import re
from dataclasses import dataclass, field

_BITS = {"pred": 8, "token": 0, "opaque": 0}
_SHAPE = re.compile(r"\b([a-z]+)(\d*)(?:e\d+m\d+\w*)?\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CALLED = re.compile(r"(?:calls|to_apply|body)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_SCRATCH = re.compile(r", s8\[\d+\]\S*\)$")  # beside the result of a library's call on a GPU
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id",
         "opt-barrier", "copy-done", "all-gather-done", "all-reduce-done"}  # fmt: skip
_SLICES = {"dynamic-slice", "slice", "gather"}


@dataclass
class _Instruction:
    kind: str
    size: int
    operands: list[str]
    text: str


@dataclass
class _Computation:
    instructions: dict[str, _Instruction] = field(default_factory=dict)
    parameters: dict[int, str] = field(default_factory=dict)
    root: str = ""


def moved_bytes(program: str) -> int:
    """Bytes read and written by one run of a program, ``compiled.as_text()``.

    Raises:
      ValueError: the text holds no entry computation.
    """
    computations, entry = _parse(program)
    return _bytes(computations, entry)


def _parse(program: str) -> tuple[dict[str, _Computation], str]:
    computations: dict[str, _Computation] = {}
    current, entry = _Computation(), ""
    for line in program.splitlines():
        if head := _COMPUTATION.match(line):
            current = computations[head[2]] = _Computation()
            entry = head[2] if head[1] else entry
        elif match := _INSTRUCTION.match(line):
            root, name, shape, kind, rest = match.groups()
            shape = _SCRATCH.sub(")", shape) if kind == "custom-call" else shape
            arguments = _until_closed(rest)
            current.instructions[name] = _Instruction(kind, _size(shape), re.findall(r"%([\w.\-]+)", arguments), rest)
            if kind == "parameter":
                current.parameters[int(arguments)] = name
            if root:
                current.root = name
    if not entry:
        raise ValueError("the compiled program's text has no entry computation")
    return computations, entry


def _until_closed(rest: str) -> str:
    """What stands before the parenthesis that closes an operand list."""
    depth = 1
    for i, character in enumerate(rest):
        depth += (character == "(") - (character == ")")
        if not depth:
            return rest[:i]
    return rest


def _size(shape: str) -> int:
    """Bytes of a shape, or of all members of a tuple."""
    total = 0
    for kind, bits, sizes in _SHAPE.findall(shape):
        width = _BITS.get(kind, int(bits or 0))
        total += math.ceil(math.prod(int(size) for size in sizes.split(",") if size) * width / 8)
    return total


def _bytes(computations: dict[str, _Computation], name: str) -> int:
    computation = computations[name]
    return sum(_of_instruction(computations, computation, each) for each in computation.instructions.values())


def _of_instruction(computations: dict[str, _Computation], where: _Computation, each: _Instruction) -> int:
    if each.kind in _FREE:
        return 0
    if each.kind == "while":
        trips = _TRIPS.search(each.text)
        return (int(trips[1]) if trips else 1) * _bytes(computations, _CALLED.search(each.text)[1])
    if each.kind == "conditional":
        names = _BRANCHES.search(each.text)[1].split(",")
        return max(_bytes(computations, name.strip(" %")) for name in names)
    if each.kind == "call":
        return _bytes(computations, _CALLED.search(each.text)[1])
    if each.kind in _SLICES:
        return 2 * each.size
    if each.kind == "dynamic-update-slice":
        return 2 * where.instructions[each.operands[1]].size
    sizes = [where.instructions[operand].size for operand in each.operands]
    if each.kind == "fusion":
        return _of_fusion(computations[_CALLED.search(each.text)[1]], sizes, each.size)
    return sum(sizes) + each.size


def _of_fusion(inner: _Computation, operands: list[int], result: int) -> int:
    total = result
    in_place = None
    root = inner.instructions[inner.root]
    while root.kind == "bitcast":
        root = inner.instructions[root.operands[0]]
    if root.kind == "dynamic-update-slice":
        in_place, total = root.operands[0], inner.instructions[root.operands[1]].size
    for number, size in enumerate(operands):
        name = inner.parameters[number]
        users = [each for each in inner.instructions.values() if name in each.operands]
        if name == in_place and len(users) == 1:
            continue
        if users and all(each.kind in _SLICES and each.operands[0] == name for each in users):
            size = min(size, sum(each.size for each in users))
        total += size
    return total
