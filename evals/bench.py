"""Measures the ops on this device: time, bytes, flop, memory, decode steps, and error against float64.

Floor: the bytes an op must move (q, k, v, o once forward, 12 such tensors forward and backward; with features beside q
and k, as the window op has them, 6 and 18) at the copy rate measured here. GB/s: these bytes over the measured time,
and their share of the copy rate. TFLOP/s: the flop that the op cannot do without (`bench_entries.minimal_flop`) over
the time. Memory: peak growth during a call beyond its inputs and results (forward: o; with backward: o and the
gradients). Forward and backward below `GRAPH_MS` are also replayed from a CUDA graph: at such sizes a call from Python
measures the host as much as the kernels.
"""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from rich.console import Console
from torch import Tensor

from hf_linattn.evals.bench_entries import BenchEntry, Shape, bench_entries, minimal_flop
from hf_linattn.evals.bench_suites import (
    CPU_DECODE_SHAPES,
    CPU_ERROR_SHAPES,
    DECODE_SHAPES,
    ERROR_SHAPES,
    timing_suite,
)
from hf_linattn.evals.bench_timing import copy_bandwidth, peak_bytes, time_call, time_graph
from hf_linattn.kernels import init_state, linear_attention, linear_attention_step
from hf_linattn.kernels.cuda_library import compiled_kernels_problem

MIB = 2**20
GRAPH_MS = 1.0
# Tensors of one q's size that a forward, and a forward with backward, must move at least: a backward reads the inputs,
# o and do and writes the gradients of the inputs.
TENSORS_MOVED = {"linear_attention": (4, 12), "softmax_attention": (4, 12), "window_linear_attention": (6, 18)}
ROW_FIELDS = (
    *("suite", "op", "impl", "B", "H", "N", "D", "dtype"),
    *("fwd_ms", "fwd_p10_ms", "fwd_p90_ms", "fwd_bwd_ms", "fwd_bwd_p10_ms", "fwd_bwd_p90_ms", "fwd_bwd_graph_ms"),
    *("floor_fwd_ms", "floor_fwd_bwd_ms", "fwd_gbs", "fwd_bwd_gbs", "fwd_copy_share", "fwd_bwd_copy_share"),
    *("fwd_tflops", "fwd_bwd_tflops", "extra_fwd_mib", "extra_mib"),
)
DECODE_FIELDS = ("impl", "B", "H", "D", "dtype", "us", "p10_us", "p90_us", "graph_us", "floor_us")
ERROR_FORMS = {
    "normalized": ("ours", "ours-sm80", "chunked", "fla", "fla-fused"),
    "sums": ("ours-sums", "fla-unnormalized"),
}
ERROR_FIELDS = ("form", "impl", "B", "H", "N", "D", "dtype", "o", "dq", "dk", "dv")


def run_suite(
    suite: str,
    device: torch.device,
    dtype: torch.dtype,
    *,
    shapes: Sequence[Shape] | None = None,
    backends: Sequence[str] | None = None,
    skip: Sequence[str] = (),
    runs: int = 20,
    bandwidth: float | None = None,
) -> Iterator[tuple[str, dict]]:
    """Measure one suite of `bench_suites.SUITES`, row by row: a peer's compiler that aborts costs what comes after it.

    Args:
        suite: its name.
        device: where.
        dtype: of q, k, v.
        shapes: instead of the suite's own; for the timing suites.
        backends: names of implementations to run; None for those of the suite.
        skip: beginnings of names to leave out, e.g. "fla" for all of FLA.
        runs: least number of timed runs.
        bandwidth: bytes a second of a copy, measured if None.

    Yields:
        ("rows" | "decode" | "errors", one measurement in the fields of `ROW_FIELDS`, `DECODE_FIELDS` or
        `ERROR_FIELDS`); None where an implementation does not run.

    Raises:
        ValueError: for a backend that is not available on this device.
    """
    device = torch.device(device)
    bandwidth = bandwidth or copy_bandwidth(device)
    is_cuda = device.type == "cuda"
    if suite == "decode":
        section, sizes = "decode", DECODE_SHAPES if is_cuda else CPU_DECODE_SHAPES
        rows = run_decode(device, dtype, sizes, runs, bandwidth, backends, skip)
    elif suite == "errors":
        section, sizes = "errors", ERROR_SHAPES if is_cuda else CPU_ERROR_SHAPES
        rows = run_errors(device, dtype, sizes, backends, skip)
    else:
        section, plan = "rows", timing_suite(suite, device.type)
        impls = backends if backends is not None else None if shapes else plan.impls
        entries = chosen_entries(device, dtype, backends, skip)
        entries = [entry for entry in entries if impls is None or entry.impl in impls]
        rows = run_bench(device, dtype, shapes or plan.shapes, entries, runs, bandwidth, suite)
    yield from ((section, row) for row in rows)


def collect(measured: Iterable[tuple[str, dict]]) -> dict[str, list[dict]]:
    """{section: rows} of what `run_suite` yields."""
    sections: dict[str, list[dict]] = {}
    for section, row in measured:
        sections.setdefault(section, []).append(row)
    return sections


def chosen_entries(
    device: torch.device, dtype: torch.dtype, backends: Sequence[str] | None, skip: Sequence[str]
) -> list[BenchEntry]:
    """Implementations that run here, of those in `backends` (None for all) and not in `skip`."""
    entries = bench_entries(device, dtype)
    known = {entry.impl for entry in entries}
    unknown = sorted(set(backends or ()) - known)
    if unknown:
        raise ValueError(f"backends: expected names from {sorted(known)} on {device.type}, got {unknown}; drop them")
    return [
        entry
        for entry in entries
        if (backends is None or entry.impl in backends) and not entry.impl.startswith(tuple(skip))
    ]


def run_bench(
    device: torch.device,
    dtype: torch.dtype,
    shapes: Iterable[Shape],
    entries: Sequence[BenchEntry],
    runs: int,
    bandwidth: float,
    suite: str,
) -> Iterator[dict]:
    """One row for every entry that takes a shape, at every shape."""
    for shape in map(Shape._make, shapes):
        tensor_ms = shape.B * shape.H * shape.N * shape.D * dtype.itemsize / bandwidth * 1e3
        for entry in entries:
            if not entry.fits(shape, dtype, device):
                continue
            row = dict.fromkeys(ROW_FIELDS)
            row |= {"suite": suite, "op": entry.op, "impl": entry.impl, "dtype": _dtype_name(dtype)}
            row |= shape._asdict()
            for kind, tensors in zip(("fwd", "fwd_bwd"), TENSORS_MOVED[entry.op], strict=True):
                row[f"floor_{kind}_ms"] = tensors * tensor_ms
            with _environment(entry.environment):
                row |= _measure_entry(entry, shape, dtype, device, runs)
            for kind, flop in zip(("fwd", "fwd_bwd"), minimal_flop(entry.op, shape), strict=True):
                if row[f"{kind}_ms"] is not None:
                    share = row[f"floor_{kind}_ms"] / row[f"{kind}_ms"]
                    row |= {f"{kind}_copy_share": share, f"{kind}_gbs": share * bandwidth / 1e9}
                    row[f"{kind}_tflops"] = flop / row[f"{kind}_ms"] / 1e9
            yield _rounded(row)


def run_decode(
    device: torch.device,
    dtype: torch.dtype,
    shapes: Iterable[tuple[int, int, int]],
    runs: int,
    bandwidth: float,
    backends: Sequence[str] | None = None,
    skip: Sequence[str] = (),
) -> Iterator[dict]:
    """Microseconds of one step against reading and writing the float32 state once; ours normalises, FLA's does not."""
    for batch, heads, dim in shapes:
        q, k, v = (torch.rand(batch, heads, dim, dtype=dtype, device=device) for _ in range(3))
        state = init_state(batch, heads, dim, dim, device=device)
        calls = {"chunked": lambda q=q, k=k, v=v, s=state: linear_attention_step(q, k, v, s, backend="chunked")}
        if compiled_kernels_problem(device, dtype, "linear_attention_step") is None:
            calls = {"ours": lambda q=q, k=k, v=v, s=state: linear_attention_step(q, k, v, s, backend="cuda")} | calls
        calls |= _fla_step(q, k, v, state.kv) if device.type == "cuda" else {}
        floor = 2 * state.kv.nbytes / bandwidth * 1e6
        for impl, call in calls.items():
            if impl.startswith(tuple(skip)) or (backends is not None and impl not in backends):
                continue
            row = {"impl": impl, "B": batch, "H": heads, "D": dim, "dtype": _dtype_name(dtype), "floor_us": floor}
            with _reported(f"{impl} step {(batch, heads, dim)}"):
                timing, graph = time_call(call, device, runs), time_graph(call, device, runs)
                row |= dict(zip(("us", "p10_us", "p90_us"), (1e3 * ms for ms in timing), strict=True))
                row["graph_us"] = None if graph is None else 1e3 * graph.median
            yield _rounded(dict.fromkeys(DECODE_FIELDS) | row)


def run_errors(
    device: torch.device,
    dtype: torch.dtype,
    shapes: Iterable[Shape],
    backends: Sequence[str] | None = None,
    skip: Sequence[str] = (),
) -> Iterator[dict]:
    """Relative RMSE of o, dq, dk, dv against float64, with one random output gradient for all.

    Forms: `normalized`, q, k, v uniform in [0, 1], where dq is a small difference of large terms; `sums`, not
    normalised, q, k, v normal. q comes multiplied by D^-0.5: implementations differ in where they scale.
    """
    for form, impls in ERROR_FORMS.items():
        entries = [entry for entry in chosen_entries(device, dtype, backends, skip) if entry.impl in impls]
        for shape in shapes:
            draw = torch.rand if form == "normalized" else torch.randn
            generator = torch.Generator(device).manual_seed(0)
            size = (shape.B, shape.N, shape.H, shape.D)
            q, k, v = (draw(size, generator=generator, device=device) for _ in range(3))
            inputs = [x.to(dtype) for x in (q * shape.D**-0.5, k, v)]
            do = torch.randn(size, generator=generator, device=device).to(dtype)

            def exact(q: Tensor, k: Tensor, v: Tensor, normalize: bool = form == "normalized") -> Tensor:
                # tests/ops hold this backend in float64 against the per-token reference.
                return linear_attention(q, k, v, normalize=normalize, backend="chunked")[0]

            expected = _forward_backward(exact, [x.double() for x in inputs], do.double())
            for entry in entries:
                row = dict.fromkeys(ERROR_FIELDS) | {"form": form, "impl": entry.impl, "dtype": _dtype_name(dtype)}
                row |= shape._asdict()
                with _environment(entry.environment), _reported(f"{entry.impl} {tuple(shape)}"):
                    actual = _forward_backward(entry.call, inputs, do)
                    for name, x, y in zip(("o", "dq", "dk", "dv"), actual, expected, strict=True):
                        row[name] = ((x.double() - y).norm() / y.norm()).item()
                yield _rounded(row)


def _measure_entry(
    entry: BenchEntry, shape: Shape, dtype: torch.dtype, device: torch.device, runs: int
) -> dict[str, float]:
    """Times and extra memory of one implementation; what it got to, where it fails."""
    generator = torch.Generator(device).manual_seed(0)
    size = (shape.B, shape.H, shape.N, shape.D) if entry.heads_first else (shape.B, shape.N, shape.H, shape.D)
    *inputs, do = (torch.rand(size, generator=generator, dtype=dtype, device=device) for _ in range(entry.inputs + 1))
    extras = entry.extras(shape, dtype, device)

    def forward() -> Tensor:
        with torch.no_grad():
            return entry.call(*inputs, *extras)

    def forward_backward() -> list[Tensor]:
        return _forward_backward(lambda *x: entry.call(*x, *extras), inputs, do)

    found = {}
    with _reported(f"{entry.impl} {tuple(shape)}"):
        for kind, call, results in (("fwd", forward, 1), ("fwd_bwd", forward_backward, 1 + len(inputs))):
            timing = time_call(call, device, runs)
            found |= dict(zip((f"{kind}_ms", f"{kind}_p10_ms", f"{kind}_p90_ms"), timing, strict=True))
            extra = peak_bytes(call, device) - results * do.numel() * dtype.itemsize
            found["extra_fwd_mib" if kind == "fwd" else "extra_mib"] = max(extra, 0) / MIB
        if device.type == "cuda" and found["fwd_bwd_ms"] < GRAPH_MS:
            found["fwd_bwd_graph_ms"] = time_graph(forward_backward, device, runs).median
    return found


def _forward_backward(call: Callable[..., Tensor], inputs: Sequence[Tensor], do: Tensor) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    o = call(*leaves)
    return [o.detach(), *torch.autograd.grad(o, leaves, do)]


def _fla_step(q: Tensor, k: Tensor, v: Tensor, kv: Tensor) -> dict[str, Callable[[], object]]:
    try:
        from fla.ops.linear_attn import fused_recurrent_linear_attn
    except ImportError:
        return {}
    q, k, v = (x[:, None] for x in (q, k, v))
    return {
        "fla-recurrent": torch.no_grad()(
            lambda: fused_recurrent_linear_attn(q, k, v, scale=1.0, initial_state=kv, output_final_state=True)
        )
    }


@contextlib.contextmanager
def _reported(what: str) -> Iterator[None]:
    """Out of memory, or a kernel that does not take this: the row stays, without what is missing."""
    try:
        yield
    except (RuntimeError, ValueError, AssertionError, *_compiler_errors()) as error:
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        Console(stderr=True).print(f"{what}: {line}", markup=False)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _compiler_errors() -> tuple[type[Exception], ...]:
    """What Triton raises for a peer's kernel that it cannot compile here."""
    try:
        from triton.errors import TritonError
    except ImportError:
        return ()
    return (TritonError,)


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _rounded(row: dict) -> dict:
    """Five digits: more are noise."""
    return {name: float(f"{x:.5g}") if isinstance(x, float) else x for name, x in row.items()}


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
