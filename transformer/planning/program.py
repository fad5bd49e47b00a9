"""Operations of a compiled program, read from its text: collectives, products, traffic, each with its number of runs."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

_BYTES = {
    **dict.fromkeys(("pred", "s8", "u8", "f8e4m3fn", "f8e5m2"), 1),
    **dict.fromkeys(("bf16", "f16", "s16", "u16"), 2),
    **dict.fromkeys(("f32", "s32", "u32"), 4),
    **dict.fromkeys(("f64", "s64", "u64"), 8),
}
_ARRAY = re.compile(r"\b(" + "|".join(_BYTES) + r")\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^  (?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition|\w+_computations?)=(?:\{([^}]*)\}|%?([\w.\-]+))")
_NO_TRAFFIC = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all", "iota",
    "partition-id", "copy-start", "copy-done", "async-start", "async-update", "async-done", "opt-barrier",
}  # fmt: skip


class Exchange(NamedTuple):
    """Properties of a kind of collective."""

    passes: int = 1
    """How often the other devices' parts pass around a ring; 0 if everything is sent to one other device."""
    through_hosts: bool = False
    """Bytes sent to other slices, as a multiple."""
    returns_operands: bool = False
    """Whether its asynchronous form returns the operands before the results."""


COLLECTIVES = {
    "all-gather": Exchange(returns_operands=True),
    "all-reduce": Exchange(passes=2),
    "reduce-scatter": Exchange(),
    "all-to-all": Exchange(),
    "collective-permute": Exchange(passes=0),
    "send": Exchange(passes=0, through_hosts=True),
}


class Collective(NamedTuple):
    """One collective operation."""

    kind: str
    bytes: float
    """Bytes of the larger of operand and result on one device."""
    group: int
    """Number of devices in a group."""
    devices: tuple[int, ...]
    """The devices of one group, by number; empty if the program does not list them."""
    runs: float
    """Number of runs per step."""

    @property
    def exchange(self) -> Exchange:
        """Its kind."""
        return COLLECTIVES[self.kind]

    @property
    def wire_bytes(self) -> float:
        """Bytes that a device sends over all runs, by an optimal algorithm for a ring."""
        factor = self.exchange.passes * (self.group - 1) / self.group if self.exchange.passes else 1.0
        return factor * self.bytes * self.runs


class Program(NamedTuple):
    """Sums over the program of one device."""

    collectives: list[Collective]
    flops: float
    """Operations of matrix products outside custom kernels, two for each multiply-add."""
    traffic_bytes: float
    """Bytes of operands and results in main memory, assuming that only fusions and caches avoid it."""
    kernels: dict[str, float]
    """Custom calls by target, with their number of runs."""
    launches: float
    """Number of operations that move data, with their runs; a fusion counts once."""


class _Instruction(NamedTuple):
    name: str
    shape: str
    opcode: str
    rest: str


def read_program(text: str) -> Program:
    """Read the text of a compiled program (`compiled.as_text()`).

    XLA's own counts include the body of a loop once; here it is multiplied by the loop's trip count.
    """
    computations, entry = _parse(text)
    times = _multiplicities(computations, entry)
    collectives: list[Collective] = []
    flops = traffic = launches = 0.0
    kernels: dict[str, float] = {}
    # Operations inside a fused computation count where it is called.
    fused = {
        name: caller
        for caller, body in computations.items()
        for i in body
        if i.opcode == "fusion"
        for name in _called(i)
    }
    in_parts: set[tuple[str, str]] = set()
    for name, body in computations.items():
        count = times.get(name, 0.0)
        if count == 0:
            continue
        shapes = {instruction.name: instruction.shape for instruction in body}
        for instruction in body:
            found = _collective(instruction, name, shapes, count)
            if found and not _is_another_part(instruction, fused.get(name), in_parts):
                collectives.append(found)
            flops += count * _product_flops(instruction, shapes)
            if instruction.opcode == "custom-call":
                target = re.search(r'custom_call_target="([^"]*)"', instruction.rest)
                kernel = target.group(1) if target else "?"
                kernels[kernel] = kernels.get(kernel, 0.0) + count
            if name in fused or instruction.opcode in _NO_TRAFFIC:
                continue
            launches += count
            if not found:
                traffic += count * _traffic(instruction, shapes, computations)
    return Program(collectives, flops, traffic, kernels, launches)


def _parse(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    computations: dict[str, list[_Instruction]] = {}
    entry, body = "", []
    for line in text.splitlines():
        header = _COMPUTATION.match(line)
        if header:
            body = computations.setdefault(header.group(2), [])
            entry = header.group(2) if header.group(1) else entry
            continue
        found = _INSTRUCTION.match(line)
        if found:
            body.append(_Instruction(*found.groups()))
    return computations, entry


def _called(instruction: _Instruction) -> list[str]:
    groups = _CALLED.findall(instruction.rest)
    return [name.strip(" %") for listed, one in groups for name in (listed or one).split(",")]


def _multiplicities(computations: dict[str, list[_Instruction]], entry: str) -> dict[str, float]:
    """Number of runs of each computation; every branch of a conditional is assumed to run."""
    times: dict[str, float] = {}

    def visit(name: str, count: float) -> None:
        times[name] = times.get(name, 0.0) + count
        for instruction in computations.get(name, []):
            loop = count * _trip_count(instruction, computations) if instruction.opcode == "while" else count
            for called in _called(instruction):
                visit(called, loop)

    visit(entry, 1.0)
    return times


def _trip_count(loop: _Instruction, computations: dict[str, list[_Instruction]]) -> float:
    """Trip count of a loop that counts from 0, as a scan does; 1 if the program does not show it."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest)
    if known:
        return float(known.group(1))
    condition = re.search(r"condition=%?([\w.\-]+)", loop.rest)
    body = computations.get(condition.group(1), []) if condition else []
    bounds = [int(m.group(1)) for i in body if i.opcode == "constant" for m in [re.match(r"(\d+)\)", i.rest)] if m]
    return float(max(bounds, default=1) or 1)


def _collective(instruction: _Instruction, computation: str, shapes: dict[str, str], count: float) -> Collective | None:
    kind = instruction.opcode.removesuffix("-start")
    exchange = COLLECTIVES.get(kind)
    if exchange is None or (exchange.through_hosts and "is_host_transfer=true" not in instruction.rest):
        return None
    # An all-reduce followed by a slice on each device is one instruction on the hardware.
    kind = "reduce-scatter" if computation.startswith("all-reduce-scatter") else kind
    sizes = [_bytes(shapes.get(operand, "")) for operand in _operands(instruction)]
    if exchange.through_hosts:
        return Collective(kind, sizes[0], 2, (), count)
    result = _bytes(instruction.shape)
    if instruction.opcode.endswith("-start"):
        result = result - sum(sizes) if exchange.returns_operands else 0.0
    group, devices = _group(instruction.rest)
    return Collective(kind, max(sum(sizes), result), group, devices, count)


def _is_another_part(instruction: _Instruction, caller: str | None, seen: set[tuple[str, str]]) -> bool:
    """Whether a collective was counted before: an asynchronous one occurs in every fusion from its start to its end."""
    channel = re.search(r"channel_id=(\d+)", instruction.rest)
    if caller is None or channel is None:
        return False
    place = (caller, channel.group(1))
    known = place in seen
    seen.add(place)
    return known


def _group(rest: str) -> tuple[int, tuple[int, ...]]:
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", rest)
    if listed:
        devices = tuple(int(d) for d in listed.group(1).split(","))
        return len(devices), devices
    tiled = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest)
    if tiled:
        groups, size = int(tiled.group(1)), int(tiled.group(2))
        dims = [int(d) for d in tiled.group(3).split(",")]
        order = [int(d) for d in tiled.group(4).split(",")] if tiled.group(4) else list(range(len(dims)))
        return size, tuple(_first_group(dims, order, groups, size))
    meshed = re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", rest)
    if meshed:
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", meshed.group(1))}
        # 'axis' or, for a part of it, 'axis':(devices before)devices.
        taken = re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", meshed.group(2))
        strides = dict(zip(sizes, (math.prod(list(sizes.values())[i + 1 :]) for i in range(len(sizes))), strict=True))
        devices = [0]
        for name, before, part in taken:
            count = int(part or sizes[name])
            stride = strides[name] * (sizes[name] // (int(before or 1) * count))
            devices = [device + i * stride for device in devices for i in range(count)]
        return len(devices), tuple(devices)
    pair = re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", rest)
    return (2, (int(pair.group(1)), int(pair.group(2)))) if pair else (1, ())


def _first_group(dims: list[int], order: list[int], groups: int, size: int) -> Iterator[int]:
    """The first row of `arange(prod(dims)).reshape(dims).transpose(order).reshape(groups, size)`."""
    del groups
    strides = [math.prod(dims[axis + 1 :]) for axis in range(len(dims))]
    for place in range(size):
        device = 0
        for axis in reversed(order):
            place, index = divmod(place, dims[axis])
            device += index * strides[axis]
        yield device


def _product_flops(instruction: _Instruction, shapes: dict[str, str]) -> float:
    """Operations of a product, two per multiply-add; a TPU's products are convolutions, whose paddings and holes do not count."""
    if instruction.opcode not in ("dot", "convolution"):
        return 0.0
    left, right = (_dims(shapes.get(name, "")) for name in _operands(instruction)[:2])
    result = _dims(instruction.shape)
    if instruction.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]+)\}", instruction.rest)
        inner = math.prod(left[int(axis)] for axis in contracted.group(1).split(",")) if contracted else 1
        return 2.0 * math.prod(result) * inner
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.rest)
    if labels is None:
        return 0.0
    sizes = [
        dict(zip(names, dims, strict=True)) for names, dims in zip(labels.groups(), (left, right, result), strict=True)
    ]
    spatial = sorted(label for label in sizes[2] if label.isdigit())
    pairs = math.prod(_window_pairs(instruction.rest, int(x), sizes[0][x], sizes[1][x], sizes[2][x]) for x in spatial)
    return 2.0 * sizes[2]["b"] * sizes[2]["f"] * sizes[1]["i"] * pairs


def _window_pairs(rest: str, axis: int, input_size: int, window_size: int, output_size: int) -> int:
    """Pairs of an output index and a window index that meet an input element, along one axis of a convolution."""

    def field(name: str, default: str) -> str:
        found = re.search(rf"\b{name}=([\d_x]+)", rest)
        return found.group(1).split("x")[axis] if found else default

    hole, step = int(field("lhs_dilate", "1")), int(field("rhs_dilate", "1"))
    outputs = np.arange(output_size)[:, None] * int(field("stride", "1")) - int(field("pad", "0_0").split("_")[0])
    places = outputs + np.arange(window_size) * step
    return int(np.sum((places >= 0) & (places < (input_size - 1) * hole + 1) & (places % hole == 0)))


def _traffic(instruction: _Instruction, shapes: dict[str, str], computations: dict[str, list[_Instruction]]) -> float:
    """Bytes that an operation reads from and writes to main memory; of each array, only the needed elements count.

    An operation in a fusion needs as many elements of its operands as it produces. A gather of a few rows, even after elementwise
    operations, thus counts those rows only. An array that is updated in place counts by the size of the update.
    """
    operands = _operands(instruction)
    body = next((computations[name] for name in _called(instruction) if name in computations), [])
    if instruction.opcode != "fusion" or not body:
        body = [_Instruction(o, shapes.get(o, ""), "parameter", f"{i})") for i, o in enumerate(operands)] + [
            instruction
        ]
    inner = {i.name: i for i in body}
    results = _results(body[-1], inner)
    written = sum(_bytes(_updated(result, inner).shape) for result in results)
    needed = _needed(body, inner, {result.name for result in results})
    outer = [shapes.get(operand, "") for operand in operands]
    read = 0.0
    for parameter in (i for i in body if i.opcode == "parameter"):
        place = int(re.match(r"\d+", parameter.rest).group())  # type: ignore[union-attr]
        shape = outer[place] if place < len(outer) else ""
        read += _main_memory_bytes(shape) * needed.get(parameter.name, 0.0) / max(1, _elements(parameter.shape))
    return read + (written if _main_memory_bytes(instruction.shape) else 0.0)


def _results(root: _Instruction, inner: dict[str, _Instruction]) -> list[_Instruction]:
    """The outputs of a fusion."""
    if root.opcode == "tuple":
        return [result for name in _operands(root) if name in inner for result in _results(inner[name], inner)]
    if root.opcode in ("bitcast", "reshape") and _operands(root)[0] in inner:
        return _results(inner[_operands(root)[0]], inner)
    return [root]


def _updated(result: _Instruction, inner: dict[str, _Instruction]) -> _Instruction:
    """The written part of a result: everything, or only the update if it is updated in place."""
    if result.opcode != "dynamic-update-slice":
        return result
    return inner.get(_operands(result)[1], result)


def _needed(body: list[_Instruction], inner: dict[str, _Instruction], results: set[str]) -> dict[str, float]:
    """The number of needed elements of each value in a fusion; users follow the values that they use."""
    needed: dict[str, float] = {}
    for user in reversed(body):
        size = _elements(user.shape)
        given = size if user.name in results or user is body[-1] else min(needed.get(user.name, 0.0), size)
        for place, name in enumerate(_operands(user) if user.opcode != "parameter" else []):
            if name in inner:
                whole = _elements(inner[name].shape)
                count = _of_operand(user, place, given, size, whole, in_place=user.name in results)
                needed[name] = min(whole, needed.get(name, 0.0) + count)
    return needed


def _of_operand(user: _Instruction, place: int, given: float, size: int, whole: int, *, in_place: bool) -> float:
    """The number of an operand's elements that a number of the user's elements needs."""
    if user.opcode in ("slice", "dynamic-slice", "gather") and place == 0:
        return given
    if user.opcode == "dynamic-update-slice" and place == 0:
        return 0.0 if in_place else given
    if user.opcode in ("broadcast", "concatenate", "pad", "dynamic-update-slice"):
        return min(given, whole)
    # Elementwise operations and tuples: one for one; a reduction: its share of the whole.
    return whole * given / size if size else float(whole)


def _operands(instruction: _Instruction) -> list[str]:
    """Names of the operands: the text before the closing parenthesis."""
    depth, end = 1, len(instruction.rest)
    for index, character in enumerate(instruction.rest):
        depth += (character in "({[") - (character in ")}]")
        if depth == 0:
            end = index
            break
    return re.findall(r"%([\w.\-]+)", instruction.rest[:end])


def _dims(shape: str) -> list[int]:
    found = _ARRAY.search(shape)
    return [int(n) for n in found.group(2).split(",") if n] if found else []


def _elements(shape: str) -> int:
    """Number of elements in all arrays of a shape."""
    return sum(math.prod(int(n) for n in dims.split(",") if n) for _, dims in _ARRAY.findall(shape))


def _array_bytes(array: tuple[str, str]) -> float:
    return _BYTES[array[0]] * math.prod(int(n) for n in array[1].split(",") if n)


def _bytes(shape: str) -> float:
    return sum(_array_bytes(array) for array in _ARRAY.findall(shape))


def _main_memory_bytes(shape: str) -> float:
    """Bytes of the arrays of a shape in main memory, without other memory spaces such as a TPU's vector memory."""
    return 0.0 if re.search(r"S\([1-9]\)", shape) else _bytes(shape)
