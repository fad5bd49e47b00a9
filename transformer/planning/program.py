"""What a compiled program does, read from its text: exchanges between devices, products, traffic, each as often as it runs."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
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


class Collective(NamedTuple):
    """An exchange between devices."""

    kind: str
    bytes: float
    """Of the larger of operand and result on one device."""
    group: int
    """Devices that exchange among each other."""
    devices: tuple[int, ...]
    """A group of them, by number; empty if the program does not list them."""
    count: float
    """How often a step does it."""

    @property
    def wire_bytes(self) -> float:
        """What a device sends, all times together, by an algorithm that is optimal for a ring."""
        share = (self.group - 1) / self.group
        factor = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(self.kind, share)
        return factor * self.bytes * self.count


class Program(NamedTuple):
    """Sums over one device's program."""

    collectives: list[Collective]
    flops: float
    """Of matrix products outside custom kernels, two for each multiply-add."""
    traffic_bytes: float
    """Operands and results of its operations in main memory, where they lie unless a fusion or a cache keeps them."""
    kernels: dict[str, float]
    """Custom calls by target, and how often each runs."""


class _Instruction(NamedTuple):
    name: str
    shape: str
    opcode: str
    rest: str


def read_program(text: str) -> Program:
    """Read the text of a compiled program (`compiled.as_text()`).

    XLA's own counts take a loop's body once; here it is taken as often as the loop's condition says.
    """
    computations, entry = _parse(text)
    times = _multiplicities(computations, entry)
    collectives: list[Collective] = []
    flops = traffic = 0.0
    kernels: dict[str, float] = {}
    fused = {name for body in computations.values() for i in body if i.opcode == "fusion" for name in _called(i)}
    for name, body in computations.items():
        count = times.get(name, 0.0)
        if count == 0:
            continue
        shapes = {instruction.name: instruction.shape for instruction in body}
        for instruction in body:
            found = _collective(instruction, name, shapes, count)
            collectives += [found] if found else []
            flops += count * _product_flops(instruction, shapes)
            if instruction.opcode == "custom-call":
                target = re.search(r'custom_call_target="([^"]*)"', instruction.rest)
                kernel = target.group(1) if target else "?"
                kernels[kernel] = kernels.get(kernel, 0.0) + count
            if name not in fused and instruction.opcode not in _NO_TRAFFIC and not found:
                traffic += count * _traffic(instruction, shapes, computations)
    return Program(collectives, flops, traffic, kernels)


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
    """How often each computation runs; of a conditional's branches, each is taken to run."""
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
    """Of a loop that counts from 0, as a scan does; 1 where the program does not tell."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest)
    if known:
        return float(known.group(1))
    condition = re.search(r"condition=%?([\w.\-]+)", loop.rest)
    body = computations.get(condition.group(1), []) if condition else []
    bounds = [int(m.group(1)) for i in body if i.opcode == "constant" for m in [re.match(r"(\d+)\)", i.rest)] if m]
    return float(max(bounds, default=1) or 1)


def _collective(instruction: _Instruction, computation: str, shapes: dict[str, str], count: float) -> Collective | None:
    kind = instruction.opcode.removesuffix("-start")
    if kind not in COLLECTIVES:
        return None
    # An all-reduce of which each device keeps a part is one instruction for the hardware.
    kind = "reduce-scatter" if computation.startswith("all-reduce-scatter") else kind
    sizes = [_bytes(shapes.get(operand, "")) for operand in _operands(instruction)]
    if kind == "all-gather" and instruction.opcode.endswith("-start"):
        result = max((_array_bytes(a) for a in _ARRAY.findall(instruction.shape)), default=0.0)
    else:
        result = 0.0 if instruction.opcode.endswith("-start") else _bytes(instruction.shape)
    group, devices = _group(instruction.rest)
    return Collective(kind, max(sum(sizes), result), group, devices, count)


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
        # 'axis' or, of a part of it, 'axis':(devices before)devices.
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
    """Of a product: from the sizes of its operands and its result, whichever axes are contracted."""
    if instruction.opcode not in ("dot", "convolution"):
        return 0.0
    operands = [_dims(shapes.get(name, "")) for name in _operands(instruction)[:2]]
    result = _dims(instruction.shape)
    batch = 1
    if instruction.opcode == "dot":
        axes = re.search(r"lhs_batch_dims=\{([\d,]+)\}", instruction.rest)
        batch = math.prod(operands[0][int(axis)] for axis in axes.group(1).split(",")) if axes else 1
    else:
        # Batch dimensions of a product are spatial ones of a convolution.
        labels = re.search(r"->(\w+)", instruction.rest)
        batch = math.prod(
            n for n, label in zip(result, labels.group(1) if labels else "", strict=False) if label.isdigit()
        )
    # Operands b*m*k and b*k*n and the result b*m*n multiply to b * (b*m*k*n)^2.
    sizes = math.prod(operands[0]) * math.prod(operands[1]) * math.prod(result)
    return 2.0 * math.sqrt(sizes / batch)


def _traffic(instruction: _Instruction, shapes: dict[str, str], computations: dict[str, list[_Instruction]]) -> float:
    """Bytes of operands and result in main memory; of arrays of which a slice is read or replaced, those of the slice."""
    operands = _operands(instruction)
    body = next((computations[name] for name in _called(instruction) if name in computations), [])
    if instruction.opcode != "fusion" or not body:
        body = [_Instruction(o, shapes.get(o, ""), "parameter", f"{i})") for i, o in enumerate(operands)] + [
            instruction
        ]
    inner = {i.name: i for i in body}
    users: dict[str, list[tuple[_Instruction, int]]] = {}
    for user in body:
        for place, operand in enumerate(_operands(user) if user.opcode != "parameter" else []):
            users.setdefault(operand, []).append((user, place))

    def read(name: str, shape: str) -> float:
        if _main_memory_bytes(shape) == 0:
            return 0.0
        total = 0.0
        for user, place in users.get(name, []):
            if user.opcode in ("dynamic-slice", "gather") and place == 0:
                total += _bytes(user.shape)
            elif user.opcode in ("bitcast", "reshape") and user is not body[-1]:
                total += read(user.name, shape)
            elif not (user.opcode == "dynamic-update-slice" and place == 0):
                return _bytes(shape)
        return min(total, _bytes(shape))

    def written(result: _Instruction) -> float:
        if result.opcode == "dynamic-update-slice":
            update = inner.get(_operands(result)[1])
            return _bytes(update.shape) if update else 0.0
        if result.opcode == "tuple":
            return sum(written(inner[o]) for o in _operands(result) if o in inner)
        if result.opcode in ("bitcast", "reshape") and _operands(result)[0] in inner and result is body[-1]:
            return written(inner[_operands(result)[0]])
        return _bytes(result.shape)

    out = written(body[-1]) if _main_memory_bytes(instruction.shape) else 0.0
    parameters = [i for i in body if i.opcode == "parameter"]
    places = {i.name: int(re.match(r"\d+", i.rest).group()) for i in parameters}  # type: ignore[union-attr]
    outer = [shapes.get(operand, "") for operand in operands]
    return out + sum(read(i.name, outer[places[i.name]]) for i in parameters if places[i.name] < len(outer))


def _operands(instruction: _Instruction) -> list[str]:
    """Names of the operands: what stands before the parenthesis closes."""
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


def _array_bytes(array: tuple[str, str]) -> float:
    return _BYTES[array[0]] * math.prod(int(n) for n in array[1].split(",") if n)


def _bytes(shape: str) -> float:
    return sum(_array_bytes(array) for array in _ARRAY.findall(shape))


def _main_memory_bytes(shape: str) -> float:
    """Bytes of the arrays of a shape that are not in a memory space of their own, such as a TPU's vector memory."""
    return 0.0 if re.search(r"S\([1-9]\)", shape) else _bytes(shape)
