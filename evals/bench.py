"""Times the ops on this device against the byte floor, PyTorch's softmax attention and, where installed, FLA.

Floor: the bytes an op must move (q, k, v, o once forward; 12 such tensors forward and backward) at the copy rate
measured here. Memory: peak growth during forward + backward beyond the inputs, outputs and gradients of the caller.
"""

import importlib.util
import json
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from hf_linattn.kernels import linear_attention, window_linear_attention

MIB = 2**20
BENCH_WINDOW = 64
# Tensors of one q's size that a forward, and a forward with backward, must move at least.
FORWARD_TENSORS, FORWARD_BACKWARD_TENSORS = 4, 12
CUDA_SHAPES = ((4, 16, 1024, 128), (4, 16, 2048, 128), (4, 16, 8192, 128), (8, 9, 2048, 64), (4, 32, 8192, 64))
CPU_SHAPES = tuple((1, 4, n, 32) for n in (256, 512, 1024)) + tuple((1, 4, 512, d) for d in (16, 64, 128))
ROW_FIELDS = (
    "op",
    "impl",
    "B",
    "H",
    "N",
    "D",
    "dtype",
    "fwd_ms",
    "fwd_bwd_ms",
    "floor_fwd_ms",
    "floor_fwd_bwd_ms",
    "extra_mib",
)


class LiveBytes(TorchDispatchMode):
    """Counts the storages that ops under this mode allocate; `peak` is the largest sum of bytes alive at once."""

    def __init__(self):
        super().__init__()
        self.storages, self.peak = WeakIdKeyDictionary(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {id(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and id(x.untyped_storage()) not in given:
                self.storages[x.untyped_storage()] = x.untyped_storage().nbytes()
        self.peak = max(self.peak, sum(self.storages.values()))
        return result


class BenchEntry(NamedTuple):
    """One implementation: the op it is listed under, its name, and a function of q, k, v `[B, N, H, D]`."""

    op: str
    impl: str
    call: Callable[[Tensor, Tensor, Tensor], Tensor]


def run_bench(
    device: str | torch.device,
    dtype: torch.dtype,
    shapes: Iterable[tuple[int, int, int, int]],
    backends: Sequence[str] | None = None,
    runs: int = 20,
) -> list[dict]:
    """Measure every implementation at every shape.

    Args:
        device: "cuda" or "cpu".
        dtype: of q, k, v.
        shapes: (B, H, N, D) tuples; H query and kv heads, D for q, k and v.
        backends: names of implementations to run (see `bench_entries`); None for all that can run here.
        runs: timed repetitions; the median counts.

    Returns:
        One dict a measurement with the fields of `ROW_FIELDS`; None where an implementation does not run.

    Raises:
        ValueError: for a backend that is not available on this device.
    """
    device = torch.device(device)
    entries = bench_entries(device, dtype)
    if backends is not None:
        known = {entry.impl for entry in entries}
        unknown = sorted(set(backends) - known)
        if unknown:
            raise ValueError(
                f"backends: expected names from {sorted(known)} on {device.type}, got {unknown}; drop them"
            )
        entries = [entry for entry in entries if entry.impl in backends]
    bandwidth = copy_bandwidth(device)
    rows = []
    for batch, heads, tokens, dim in shapes:
        tensor_ms = batch * heads * tokens * dim * dtype.itemsize / bandwidth * 1e3
        for entry in entries:
            values = (
                entry.op,
                entry.impl,
                batch,
                heads,
                tokens,
                dim,
                str(dtype).removeprefix("torch."),
                *_measure_entry(entry, (batch, tokens, heads, dim), dtype, device, runs),
            )
            row = dict(zip([f for f in ROW_FIELDS if not f.startswith("floor")], values, strict=True))
            row["floor_fwd_ms"] = FORWARD_TENSORS * tensor_ms
            row["floor_fwd_bwd_ms"] = FORWARD_BACKWARD_TENSORS * tensor_ms
            rows.append({field: row[field] for field in ROW_FIELDS})
    return rows


def bench_entries(device: torch.device, dtype: torch.dtype) -> list[BenchEntry]:
    """Implementations that can run on this device: ours, softmax by PyTorch, FLA if installed (CUDA only)."""

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return linear_attention(q, k, v, backend="chunked")[0]

    def ours_window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        o, _ = window_linear_attention(
            q, k, v, q, k, window=BENCH_WINDOW, scale=q.shape[-1] ** -0.5, backend="chunked"
        )
        return o

    def softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    def softmax_by(kernel: torch.nn.attention.SDPBackend) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with torch.nn.attention.sdpa_kernel(kernel):
                return softmax(q, k, v)

        return call

    entries = [
        BenchEntry("linear_attention", "chunked", ours),
        BenchEntry("window_linear_attention", "chunked-window", ours_window),
    ]
    if device.type != "cuda":
        return [*entries, BenchEntry("softmax_attention", "sdpa", softmax)]
    if dtype in (torch.bfloat16, torch.float16):
        kernels = torch.nn.attention.SDPBackend
        entries.append(BenchEntry("softmax_attention", "sdpa-flash", softmax_by(kernels.FLASH_ATTENTION)))
        entries.append(BenchEntry("softmax_attention", "sdpa-cudnn", softmax_by(kernels.CUDNN_ATTENTION)))
    else:
        entries.append(BenchEntry("softmax_attention", "sdpa", softmax))
    if importlib.util.find_spec("fla") is not None:
        from fla.ops.linear_attn import chunk_linear_attn

        def fla(normalize: bool) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
            return lambda q, k, v: chunk_linear_attn(q, k, v, scale=1.0, normalize=normalize)[0]

        entries.append(BenchEntry("linear_attention", "fla", fla(True)))
        entries.append(BenchEntry("linear_attention", "fla-unnormalized", fla(False)))
    return entries


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second of a large device-to-device copy, read and written bytes both counted."""
    size = (1 << 28) if device.type == "cuda" else (1 << 24)
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * size / (_median_ms(lambda: target.copy_(source), device, 20) * 1e-3)


def bench_table(rows: list[dict]) -> Table:
    """The rows as a table; times also as multiples of the floor."""
    table = Table(title="Attention ops (median ms, and multiple of the byte floor)")
    for column in ("op", "impl", "B, H, N, D", "dtype", "forward", "forward + backward", "extra MiB"):
        table.add_column(column, justify="left" if column in ("op", "impl") else "right")

    def times(ms: float | None, floor: float) -> str:
        return "-" if ms is None else f"{ms:.3f} ({ms / floor:.1f}x)"

    for row in rows:
        table.add_row(
            row["op"],
            row["impl"],
            f"{row['B']}, {row['H']}, {row['N']}, {row['D']}",
            row["dtype"],
            times(row["fwd_ms"], row["floor_fwd_ms"]),
            times(row["fwd_bwd_ms"], row["floor_fwd_bwd_ms"]),
            "-" if row["extra_mib"] is None else f"{row['extra_mib']:.1f}",
        )
    return table


def print_bench(rows: list[dict], console: Console) -> None:
    """The table, then one line of JSON."""
    console.print(bench_table(rows))
    console.print(json.dumps({"rows": rows}), soft_wrap=True, highlight=False, markup=False)


def plot_bench(rows: list[dict], path: Path) -> None:
    """Log-log plots of forward + backward time and memory against N (largest D series) and against D.

    Args:
        rows: from `run_bench`.
        path: file to write; the suffix selects the format.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 8), layout="constrained")
    axes = figure.subplots(2, 2)
    measures = (("fwd_bwd_ms", "forward + backward, ms"), ("extra_mib", "extra memory, MiB"))
    for row_axes, (axis, fixed) in zip(axes.T, (("N", "D"), ("D", "N")), strict=True):
        chosen = _longest_series(rows, axis, fixed)
        for ax, (measure, label) in zip(row_axes, measures, strict=True):
            for impl in dict.fromkeys(r["impl"] for r in chosen):
                points = sorted((r[axis], r[measure]) for r in chosen if r["impl"] == impl and r[measure])
                ax.plot(*zip(*points, strict=True), marker="o", label=impl) if points else None
            ax.set(xscale="log", yscale="log", xlabel=axis, ylabel=label)
            ax.grid(True, which="both", alpha=0.3)
    axes[0, 0].legend()
    figure.savefig(path)


def _longest_series(rows: list[dict], axis: str, fixed: str) -> list[dict]:
    """The rows that share B, H, dtype and `fixed`, with the most values of `axis`."""
    series: dict[tuple, list[dict]] = {}
    for row in rows:
        series.setdefault((row["B"], row["H"], row["dtype"], row[fixed]), []).append(row)
    return max(series.values(), key=lambda s: len({r[axis] for r in s}), default=[])


def _measure_entry(
    entry: BenchEntry, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, runs: int
) -> tuple[float | None, float | None, float | None]:
    """(forward ms, forward + backward ms, extra MiB of forward + backward); None for what this device refuses."""
    generator = torch.Generator(device).manual_seed(0)
    q, k, v, do = (torch.rand(shape, generator=generator, dtype=dtype, device=device) for _ in range(4))

    def forward_backward() -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        o = entry.call(*leaves)
        return o, *torch.autograd.grad(o, leaves, do)

    try:
        with torch.no_grad():
            forward_ms = _median_ms(lambda: entry.call(q, k, v), device, runs)
        both_ms = _median_ms(forward_backward, device, runs)
    except RuntimeError as error:
        # Out of memory, or a kernel that does not take this shape: the row stays, without figures.
        Console(stderr=True).print(f"{entry.impl} {shape}: {str(error).splitlines()[0]}", markup=False)
        return None, None, None
    results = 4 * q.numel() * dtype.itemsize
    return forward_ms, both_ms, max(_peak_bytes(forward_backward, device) - results, 0) / MIB


def _median_ms(call: Callable[[], object], device: torch.device, runs: int) -> float:
    for _ in range(3 if device.type == "cuda" else 1):
        call()
    times = []
    if device.type == "cuda":
        for _ in range(max(runs, 20)):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            times.append((start, end))
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in times)
    for _ in range(runs):
        before = time.perf_counter()
        call()
        times.append((time.perf_counter() - before) * 1e3)
    return statistics.median(times)


def _peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Peak growth of allocated memory during one call."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with LiveBytes() as live:
        call()
    return live.peak
