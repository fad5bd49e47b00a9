"""Each attention backend against the definition in float32: outputs and gradients, and whether a repetition has the same bits.

Prints a line for each case and backend. `errors` are the norms of the differences from the definition, divided by its norms, for
the outputs and the gradients of queries, keys and values. `worst` are the largest differences, divided by the root mean squares.
The definition is the `xla` backend in float32 at the highest precision, on the CPU. Float32 cases are computed with
`jax.default_matmul_precision("highest")`, since float32 products of a GPU may otherwise be TF32. Another line names the
backends that refuse a case, with their reasons. The backend that `auto` chooses is called as `auto`.
"""

import functools
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from device_report import Report, Skip, describe

from transformer.model_kinds import BACKENDS, AttentionCall
from transformer.ops.attention import dot_product_attention
from transformer.ops.masks import AttentionMask

LIMITS = {"float32": (2e-5, 1e-3), "float16": (4e-3, 5e-2), "bfloat16": (2e-2, 3e-1)}
"""Limits of `errors` and `worst`, by type. One visible key too many gives a difference of about 1."""


class Case(NamedTuple):
    """A call of attention."""

    name: str
    mask: Callable[[int, int, int], AttentionMask]
    """Of rows, queries and keys."""
    rows: int = 2
    heads: tuple[int, int] = (4, 4)
    """Of queries, and of keys and values."""
    width: int = 64
    more: tuple[int, int] = (0, 0)
    """Queries and keys beyond the length of the check; -1 queries are a single one."""
    dtype: str = "bfloat16"
    soft_cap: float = 0.0
    tiny: bool = False
    """Whether `--tiny` includes the case."""


class Prepared(NamedTuple):
    """A case with its operands, results and programs."""

    operands: tuple
    expected: list[np.ndarray]
    programs: dict[str, Any]
    """Programs by backend, or the errors of compiling them."""
    refused: dict[str, str]
    chosen: str
    """The backend that `auto` chooses on this platform."""


def packed(
    mean: int, padding: int = 0, promise: bool = True, **fields: Any
) -> Callable[[int, int, int], AttentionMask]:
    """Rows of documents whose lengths have this mean (a part of the row), some ending in padding.

    With a `promise` of how many there are in a row, as training gives it; without, as a caller's own ids are.
    """

    def mask(rows: int, queries: int, keys: int) -> AttentionMask:
        del keys
        ids = segment_ids(rows, queries, max(2, queries // mean), queries // padding if padding else 0)
        most = max(32, int(ids.max())) if promise else 0
        return AttentionMask.packed(jnp.asarray(ids), max_segments=most, **fields)

    return mask


def padded(**fields: Any) -> Callable[[int, int, int], AttentionMask]:
    """One text a row, then padding, on the side of the keys and, in self-attention, of the queries: labelled texts and pairs."""

    def mask(rows: int, queries: int, keys: int) -> AttentionMask:
        ends = np.linspace(keys // 3, keys, rows).astype(np.int32)
        ids = jnp.asarray(np.arange(keys) < ends[:, None], jnp.int32)
        return AttentionMask(
            query_segment_ids=ids if queries == keys else None, key_segment_ids=ids, max_segments=1, **fields
        )

    return mask


def lengths(**fields: Any) -> Callable[[int, int, int], AttentionMask]:
    """Keys end early in each row; one row has no keys."""

    def mask(rows: int, queries: int, keys: int) -> AttentionMask:
        del queries
        ends = [0, keys // 2 + 1, keys, keys - 3][:rows]
        return AttentionMask(key_lengths=jnp.asarray(ends, jnp.int32), **fields)

    return mask


def decoding(rows: int, queries: int, keys: int) -> AttentionMask:
    """One query at a different position in each row, as with a cache."""
    del queries
    places = np.linspace(0, keys - 1, rows).astype(np.int32)
    return AttentionMask(causal=True, query_offset=jnp.asarray(places), key_lengths=jnp.asarray(places + 1))


def plain(**fields: Any) -> Callable[[int, int, int], AttentionMask]:
    """Whole rows."""
    return lambda rows, queries, keys: AttentionMask(**fields)


def windowed(part: int, make: Callable[..., Any], **fields: Any) -> Callable[[int, int, int], AttentionMask]:
    """With a window of a part of the row."""
    return lambda rows, queries, keys: make(window=queries // part + 3, **fields)(rows, queries, keys)


CASES = (
    Case("packed", packed(6, causal=True)),
    Case("packed padded", packed(6, 3, causal=True), tiny=True),
    Case("packed grouped", packed(6, causal=True), heads=(8, 2)),
    Case("packed without promise", packed(6, promise=False, causal=True)),
    Case("packed 256", packed(6, causal=True), width=256),
    Case("packed one document", packed(1, causal=True)),
    Case("packed many documents", packed(64, causal=True)),
    Case("packed float16", packed(6, causal=True), dtype="float16"),
    Case("packed float32", packed(6, causal=True), dtype="float32"),
    Case("packed odd length", packed(6, 3, causal=True), more=(1, 1)),
    Case("packed window", windowed(8, functools.partial(packed, 4), causal=True), heads=(4, 2)),
    Case("packed soft cap", packed(6, causal=True), soft_cap=20.0),
    Case("packed bidirectional", packed(3, 3)),
    Case("causal", plain(causal=True)),
    Case("causal grouped 128", plain(causal=True), heads=(8, 2), width=128),
    Case("causal 256", plain(causal=True), width=256),
    Case("causal float16", plain(causal=True), dtype="float16"),
    Case("causal float32", plain(causal=True), dtype="float32", tiny=True),
    Case("causal odd length", plain(causal=True), more=(1, 1)),
    Case("causal odd width", plain(causal=True), width=40),
    Case("window", windowed(4, plain, causal=True), heads=(4, 2)),
    Case("lengths", lengths(causal=True), rows=3, heads=(4, 2)),
    # Lengths of 64 mod 128 with a mask as a tensor: reported to give NaN in the backward pass of sm90 (pytorch/pytorch#196678).
    Case("lengths half tile", lengths(causal=True), rows=3, more=(64, 64)),
    Case("lengths odd", lengths(causal=True), rows=3, more=(1, 1), width=40),
    Case("padded", padded(), rows=3),
    Case("padded causal", padded(causal=True), rows=3, heads=(4, 2)),
    Case("padded cross", padded(), rows=3, more=(0, 128)),
    Case("cross", lengths(), heads=(4, 2), more=(0, 128)),
    Case("bidirectional", plain()),
    Case("decode", decoding, rows=4, heads=(8, 2), more=(-1, 0), tiny=True),
)


def run(report: Report) -> None:
    """Measure all cases; programs are compiled in parallel, and each is measured when it is ready."""
    cases = [case for case in CASES if case.tiny or not report.tiny]
    with ThreadPoolExecutor(max(2, min(12, (os.cpu_count() or 2) - 2))) as pool:
        jobs = {pool.submit(prepare, case, report): case for case in cases if report.is_due(case.name, needs=10)}
        for job in as_completed(jobs):
            case = jobs[job]
            shape = {"dtype": case.dtype, "shape": shape_of(case, report.tiny)}
            try:
                prepared = job.result()
            except Skip as reason:
                report.emit(case.name, **shape, skipped=str(reason))
            except Exception as error:  # of the reference
                report.emit(case.name, **shape, error=describe(error))
            else:
                report_case(report, case, prepared, shape)


def report_case(report: Report, case: Case, prepared: Prepared, shape: dict[str, Any]) -> None:
    """A line for each backend, and one for the case."""
    for backend in prepared.programs:
        chosen: dict[str, Any] = {"chosen": prepared.chosen} if backend == "auto" else {}
        report.run(f"{case.name}/{backend}", functools.partial(measure, case, prepared, backend), **shape, **chosen)
    # Last, and under this name only if nothing failed: with it the case has all its results.
    failed = [name for name, program in prepared.programs.items() if isinstance(program, Exception)]
    part = f"{case.name}, in part" if failed else case.name
    report.emit(part, auto=prepared.chosen, refused=prepared.refused)


def prepare(case: Case, report: Report) -> Prepared:
    """Operands, the reference's results, and the compiled programs of `auto` and of each other backend."""
    if report.left <= 0:
        raise Skip("no time left to compile")
    rows, queries, keys, heads, groups, width = shape_of(case, report.tiny)
    names = jax.random.split(jax.random.key(len(case.name)), 4)
    shapes = [(rows, queries, heads, width), *[(rows, keys, groups, width)] * 2, (rows, queries, heads, width)]
    query, key, value, cotangent = (
        jax.random.normal(name, shape, jnp.float32).astype(case.dtype)
        for name, shape in zip(names, shapes, strict=True)
    )
    mask = case.mask(rows, queries, keys)
    call = AttentionCall(query, key, value, mask, scale=1 / math.sqrt(width), logits_soft_cap=case.soft_cap)
    operands, platform = (query, key, value, mask, cotangent), platform_name()
    chosen, programs, refused = choice(call, platform), {}, {}
    for name in (name for name in BACKENDS.names if name != chosen):
        if reason := refusal(name, call, platform):
            refused[name] = reason
            continue
        try:
            with precision(case):
                programs[name] = jax.jit(graded(name, case)).lower(*operands).compile()
        except Exception as error:
            programs[name] = error
    return Prepared(operands, reference(case, operands), programs, refused, chosen)


def platform_name() -> str:
    """As backends name it."""
    platform = jax.devices()[0].platform
    return "cuda" if platform == "gpu" else platform


def choice(call: AttentionCall, platform: str) -> str:
    """The backend that `auto` chooses."""
    return BACKENDS.find("auto")().on(platform, call).kind


def refusal(name: str, call: AttentionCall, platform: str) -> str:
    """Why a backend does not compute a call here; empty if it does."""
    backend = BACKENDS.find(name)()
    made_for = getattr(backend, "platform", platform)
    if made_for != platform:
        return f"made for {made_for}"
    return str(backend.refusal(call))


def graded(implementation: str, case: Case) -> Callable[..., Any]:
    """Outputs and the three gradients."""

    def compute(query: Any, key: Any, value: Any, mask: AttentionMask, cotangent: Any) -> Any:
        attend = functools.partial(
            dot_product_attention, mask=mask, logits_soft_cap=case.soft_cap or None, implementation=implementation
        )
        out, pull = jax.vjp(attend, query, key, value)
        return out, *pull(cotangent.astype(out.dtype))

    return compute


def reference(case: Case, operands: tuple) -> list[np.ndarray]:
    """The definition's results."""
    cpu = jax.local_devices(backend="cpu")[0]
    exact = jax.tree.map(lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x, operands)
    with jax.default_device(cpu), jax.default_matmul_precision("highest"):
        return [np.asarray(x) for x in jax.jit(graded("xla", case))(*jax.device_put(exact, cpu))]


def precision(case: Case) -> Any:
    """Compute float32 products without TF32."""
    return jax.default_matmul_precision("highest" if case.dtype == "float32" else None)


def measure(case: Case, prepared: Prepared, backend: str) -> dict[str, Any]:
    """Differences of a backend's results from the reference and from its own repetition."""
    program = prepared.programs[backend]
    if isinstance(program, Exception):
        raise program
    found, again = ([np.asarray(x) for x in program(*prepared.operands)] for _ in range(2))
    pairs = list(zip(found, prepared.expected, strict=True))
    errors, worst = [relative(a, b) for a, b in pairs], [largest(a, b) for a, b in pairs]
    limit, worst_limit = LIMITS[case.dtype]
    right = all(e <= limit for e in errors) and all(w <= worst_limit for w in worst)  # false for NaN
    same = all(a.tobytes() == b.tobytes() for a, b in zip(found, again, strict=True))
    return {"right": right, "same_bits": same, "errors": errors, "worst": worst}


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    """Norm of the difference, divided by the norm of the expected array."""
    difference = found.astype(np.float64) - expected
    return float(f"{np.linalg.norm(difference) / max(float(np.linalg.norm(expected)), 1e-30):.3g}")


def largest(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, divided by the root mean square of the expected array."""
    difference = np.abs(found.astype(np.float64) - expected)
    return float(f"{difference.max() / max(float(np.sqrt(np.mean(np.square(expected)))), 1e-30):.3g}")


def shape_of(case: Case, tiny: bool) -> tuple[int, int, int, int, int, int]:
    """Rows, queries, keys, heads of queries and of keys, width."""
    length = 48 if tiny else 512
    queries = 1 if case.more[0] < 0 else length + case.more[0]
    return case.rows, queries, length + case.more[1], *case.heads, case.width // (4 if tiny else 1)


def segment_ids(rows: int, length: int, mean: int, padding: int = 0) -> np.ndarray:
    """Ids 1, 2, ... of documents of exponentially distributed lengths, then up to `padding` zeros, int32 [rows, length]."""
    random, ids = np.random.default_rng(0), np.zeros((rows, length), np.int32)
    for row in range(rows):
        end, start, segment = length - (int(random.integers(1, padding + 1)) if padding else 0), 0, 1
        while start < end:
            stop = min(end, start + max(1, int(random.exponential(mean))))
            ids[row, start:stop] = segment
            start, segment = stop, segment + 1
    return ids
