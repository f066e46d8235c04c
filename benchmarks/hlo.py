"""What one device computes and exchanges in a compiled program, read from its HLO text.

XLA's own cost analysis counts the body of a loop once; here everything counts as often as it runs,
as far as the text says how often (a decode loop ends when all rows have ended: the caller says).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_SHAPE = re.compile(r"(pred|[a-z]+\d+)[a-z0-9]*\[([\d,]*)\]")
_CALLS = re.compile(
    r"(?:body|condition|calls|to_apply|\w+_computations?)=\{?((?:%[\w.\-]+(?:, )?)+)"
)
_TRIPS = re.compile(r'known_trip_count"?:\s*\{"?n"?:\s*"?(\d+)')


class Array(NamedTuple):
    """An array's type."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> float:
        bits = 8 if self.dtype == "pred" else int(re.sub(r"\D", "", self.dtype))
        return math.prod(self.shape) * bits / 8


class Collective(NamedTuple):
    """One exchange between devices."""

    kind: str  # of KINDS
    arrays: tuple[Array, ...]  # the larger of what goes in and what comes out, on one device
    times: float  # that it is done in a run of the program
    loops: tuple[str, ...]  # around it, outermost first: the names of their bodies
    source: str  # the operation of the JAX program that needs it

    @property
    def bytes(self) -> float:
        """In all, on one device: an all-reduce sends about twice that, the others about that."""
        return self.times * sum(array.bytes for array in self.arrays)


class Program(NamedTuple):
    """A compiled program, as one device runs it."""

    flops: float  # of matrix products
    collectives: list[Collective]

    def exchanged(self, kind: str) -> float:
        """Bytes of all collectives of a kind."""
        return sum(found.bytes for found in self.collectives if found.kind == kind)


class _Instruction(NamedTuple):
    name: str
    arrays: tuple[Array, ...]  # results
    opcode: str
    rest: str  # operands and attributes


def read(text: str, trips: float = 1.0) -> Program:
    """A program from `compiled.as_text()`.

    Args:
      text: optimised HLO with the collectives of CPU's compiler, which wait for their results.
      trips: of loops whose number of turns the text does not say.

    Raises:
      ValueError: no program, or one with asynchronous collectives.
    """
    computations, entry = _computations(text)
    if not entry or re.search(rf" ({'|'.join(KINDS)})-start\(", text):
        raise ValueError("wanted the text of one compiled program with synchronous collectives")
    flops, found = 0.0, []
    for instruction, operands, times, loops in _walk(computations, entry, 1.0, (), trips):
        if instruction.opcode == "dot":
            sizes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.rest)
            assert sizes, instruction
            depth = [operands[0].shape[int(i)] for i in sizes[1].split(",") if i]
            flops += 2.0 * times * math.prod((*instruction.arrays[0].shape, *depth))
        elif instruction.opcode in KINDS:
            sides = (instruction.arrays, tuple(operands))
            larger = max(sides, key=lambda arrays: sum(array.bytes for array in arrays))
            source = re.search(r'op_name="([^"]*)"', instruction.rest)
            named = source[1] if source else ""
            found.append(Collective(instruction.opcode, larger, times, loops, named))
    return Program(flops, found)


def _computations(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    """The instructions of each computation, and the name of the one that is the program."""
    out: dict[str, list[_Instruction]] = {}
    entry, name = "", ""
    for line in text.splitlines():
        if header := _HEADER.match(line):
            name = header[2]
            out[name] = []
            entry = name if header[1] else entry
        elif name and (found := _INSTRUCTION.match(line)):
            out[name].append(_Instruction(found[1], _arrays(found[2]), found[3], found[4]))
    return out, entry


def _arrays(text: str) -> tuple[Array, ...]:
    return tuple(
        Array(dtype, tuple(int(n) for n in sizes.split(",") if n))
        for dtype, sizes in _SHAPE.findall(text)
    )


def _walk(
    computations: dict[str, list[_Instruction]],
    name: str,
    times: float,
    loops: tuple[str, ...],
    trips: float,
) -> Iterator[tuple[_Instruction, list[Array], float, tuple[str, ...]]]:
    """Every instruction with its operands, how often it runs, and the loops around it."""
    known: dict[str, tuple[Array, ...]] = {}
    for instruction in computations[name]:
        known[instruction.name] = instruction.arrays
        given = re.findall(r"%([\w.\-]+)", instruction.rest.split(")")[0])
        yield instruction, [a for one in given for a in known.get(one, ())], times, loops
        called = [
            one
            for names in _CALLS.findall(instruction.rest)
            for one in re.findall(r"[\w.\-]+", names)
        ]
        if instruction.opcode == "while":
            count = _TRIPS.search(instruction.rest)
            turns = float(count[1]) if count else trips
            for one in called:
                yield from _walk(computations, one, times * turns, (*loops, one), trips)
        else:
            for one in called:
                yield from _walk(computations, one, times, loops, trips)
