"""How long a call takes and how much memory it grows by: CUDA events and the allocator's peak, or clocks on a CPU."""

import functools
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

# Larger than the L2 cache of any GPU: written before every timed run, so that no run finds its inputs there.
FLUSH_BYTES = 256 * 2**20
# A fast call is repeated until this much device time is spent, a slow one `SLOW_RUNS` times.
BUDGET_MS, MAX_RUNS, SLOW_MS, SLOW_RUNS = 40.0, 100, 50.0, 5


class Timing(NamedTuple):
    """Milliseconds of a call: median, and what a tenth of the runs stayed below and above."""

    median: float
    p10: float
    p90: float


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


def time_call(call: Callable[[], object], device: torch.device, runs: int = 20) -> Timing:
    """Time `call` on `device`, warmed up.

    Args:
        call: does the work; on CUDA it queues it on the current stream.
        device: where the work runs.
        runs: the least number of timed runs (a call beyond `SLOW_MS` on CUDA gets `SLOW_RUNS`).
    """
    if device.type != "cuda":
        call()
        times = []
        for _ in range(runs):
            before = time.perf_counter()
            call()
            times.append((time.perf_counter() - before) * 1e3)
        return _summary(times)
    for _ in range(2):
        call()
    estimate = statistics.median(_event_times(call, device, 3))
    count = max(runs, min(MAX_RUNS, int(BUDGET_MS / max(estimate, 1e-3)))) if estimate < SLOW_MS else SLOW_RUNS
    return _summary(_event_times(call, device, count))


def time_graph(call: Callable[[], object], device: torch.device, runs: int = 20) -> Timing | None:
    """As `time_call`, replayed from a CUDA graph, so that launching costs the host nothing; None on other devices."""
    if device.type != "cuda":
        return None
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return time_call(graph.replay, device, runs)


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Peak growth of allocated memory during one call."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with LiveBytes() as live:
        call()
    return live.peak


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second of a large device-to-device copy, read and written bytes both counted."""
    size = (1 << 30) if device.type == "cuda" else (1 << 24)
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * size / (time_call(lambda: target.copy_(source), device).median * 1e-3)


def _event_times(call: Callable[[], object], device: torch.device, count: int) -> list[float]:
    flush, events = _flush_buffer(device), []
    for _ in range(count):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        start.record()
        call()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize(device)
    return [start.elapsed_time(end) for start, end in events]


@functools.cache
def _flush_buffer(device: torch.device) -> Tensor:
    return torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)


def _summary(times: list[float]) -> Timing:
    times = sorted(times)
    last = len(times) - 1
    return Timing(statistics.median(times), times[round(0.1 * last)], times[round(0.9 * last)])
