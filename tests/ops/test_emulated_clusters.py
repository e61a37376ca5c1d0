"""The emulation of a GPU, blocks of a cluster that write to each other: right sums, and an error for misuse."""

import ctypes
import re

import pytest
import torch
from emulated_build import at, build_library, unavailable_reason, whole_numbers

pytestmark = pytest.mark.skipif(unavailable_reason() is not None, reason=str(unavailable_reason()))
CLUSTER_FAULTS = [
    *("kNone", "kNoWait", "kNoFence", "kNoClusterArrival", "kArrivesTwice", "kWaitsWithoutArrival"),
    *("kEndsFirst", "kEndsBeforeLast", "kNoBarrierThere", "kLocalTarget", "kTwoBlocks"),
    *("kRankOutside", "kRemoteWait", "kBlockScope"),
]

# Blocks of a cluster that write to each other. Results are [blocks, ...].
CLUSTER_SOURCE = r"""
#include "launch.cuh"
#include "ptx.cuh"
using namespace hf_linattn;

constexpr int kThreads = 128, kStages = 2, kRounds = 5, kRow = 64;

enum Fault { FAULTS };  // filled in by the fixture

__device__ void cluster_barrier() {
  ptx::cluster_arrive();
  ptx::cluster_wait();
}

// out [blocks, threads] = sum over rounds and ranks of (rank + 1) in [clusters, rounds, ranks, threads]: in each round
// every block sends its values to all blocks, itself among them, into one of two stages.
__global__ void exchange_kernel(const float* in, float* out, int ranks, int fault) {
  const int rank = static_cast<int>(ptx::cluster_rank()), thread = threadIdx.x, block = blockIdx.x;
  const float* slots = reinterpret_cast<const float*>(ptx::dynamic_smem());
  const uint32_t smem = ptx::smem_address(slots), full = smem + kStages * ranks * kThreads * 4;
  const uint32_t empty = full + kStages * 8, other = static_cast<uint32_t>(rank) ^ 1;
  const bool is_last = rank == ranks - 1;
  if (thread == 0 && (fault != kNoBarrierThere || rank == 0)) {
    for (int i = 0; i < kStages; ++i) {
      ptx::mbarrier_init(full + i * 8, 1);
      ptx::mbarrier_init(empty + i * 8, ranks);
    }
    ptx::mbarrier_init_fence();
  }
  __syncthreads();
  if (fault == kNoClusterArrival && is_last && thread >= 32) ptx::mbarrier_wait_cluster(full, 0);
  if (fault == kArrivesTwice) ptx::cluster_arrive();
  if (fault == kWaitsWithoutArrival) ptx::cluster_wait();
  cluster_barrier();
  if (fault == kEndsFirst && is_last) return;
  if (fault == kLocalTarget) ptx::st_async(smem, 1, ptx::map_shared_rank(full, other));
  if (fault == kRemoteWait) ptx::mbarrier_wait_cluster(ptx::map_shared_rank(full, other), 0);
  if (fault == kRankOutside) ptx::map_shared_rank(smem, static_cast<uint32_t>(ranks));
  if (fault == kTwoBlocks) ptx::st_async(ptx::map_shared_rank(smem, other), 1, ptx::map_shared_rank(full, rank));
  float sum = 0;
  for (int round = 0; round < kRounds; ++round) {
    const int stage = round % kStages, parity = round / kStages % 2;
    const uint32_t slot = smem + ((stage * ranks + rank) * kThreads + thread) * 4, bar = full + stage * 8;
    if (thread == 0) ptx::mbarrier_arrive_expect_tx(bar, ranks * kThreads * 4);
    if (round >= kStages) ptx::mbarrier_wait_cluster(empty + stage * 8, parity ^ 1);
    const float x = in[((block / ranks * kRounds + round) * ranks + rank) * kThreads + thread];
    for (int to = 0; to < ranks; ++to) ptx::st_async(ptx::map_shared_rank(slot, to), x, ptx::map_shared_rank(bar, to));
    if (fault == kEndsBeforeLast && is_last && round == kRounds - 1) return;
    if (fault == kBlockScope) ptx::mbarrier_wait(bar, parity);
    if (fault != kNoWait) ptx::mbarrier_wait_cluster(bar, parity);
    for (int from = 0; from < ranks; ++from) sum += (from + 1) * slots[(stage * ranks + from) * kThreads + thread];
    __syncthreads();
    if (thread < ranks) ptx::mbarrier_arrive_remote(ptx::map_shared_rank(empty + stage * 8, thread));
  }
  out[block * kThreads + thread] = sum;
  if (fault == kNoWait) ptx::mbarrier_wait_cluster(full, (kRounds - 1) / kStages % 2);
  cluster_barrier();
  for (int i = 0; i < kStages; ++i) ptx::mbarrier_wait_cluster(empty + i * 8, (kRounds - 1 - i) / kStages % 2);
}

// out [blocks, ranks, 64, 64]: each block loads the tile [64, 64] of its rank for all blocks.
__global__ void multicast_kernel(const __grid_constant__ CUtensorMap map, float* out, int ranks, int mask, int fault) {
  constexpr int kTileBytes = kRow * kRow * 2;
  const int rank = static_cast<int>(ptx::cluster_rank()), thread = threadIdx.x;
  const uint32_t smem = ptx::smem_address(ptx::dynamic_smem()), bar = smem + ranks * kTileBytes;
  if (thread == 0) {
    ptx::mbarrier_init(bar, 1);
    ptx::mbarrier_init_fence();
    ptx::mbarrier_arrive_expect_tx(bar, ranks * kTileBytes);
  }
  cluster_barrier();
  if (fault == kEndsFirst && rank == ranks - 1) return;
  if (thread == 0) ptx::tma_load_4d_multicast(smem + rank * kTileBytes, &map, bar, 0, 0, rank * kRow, 0, mask);
  if (fault != kNoWait) ptx::mbarrier_wait_cluster(bar, 0);
  for (int i = thread; i < ranks * kRow * kRow; i += kThreads) {
    const int row = i / kRow, column = i % kRow;
    const char* chunk = ptx::dynamic_smem() + row * 128 + (column / 8 ^ row % 8) * 16;
    const __nv_bfloat16 x = reinterpret_cast<const __nv_bfloat16*>(chunk)[column % 8];
    out[blockIdx.x * ranks * kRow * kRow + i] = __bfloat162float(x);
  }
  ptx::mbarrier_wait_cluster(bar, 0);
  cluster_barrier();
}

// out [blocks, 64, N] = a product of ones and b [N, 16], which the other block of the cluster sends.
template <int N>
__global__ void sent_operand_kernel(const __nv_bfloat16* b, float* out, int fault) {
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const uint32_t smem = ptx::smem_address(ptx::dynamic_smem()), bar = smem + N * 128, other = ptx::cluster_rank() ^ 1;
  if (thread == 0) {
    ptx::mbarrier_init(bar, 1);
    ptx::mbarrier_init_fence();
    ptx::mbarrier_arrive_expect_tx(bar, N * 32);
  }
  cluster_barrier();
  for (int i = thread; i < N * 8; i += kThreads) {
    const int row = i / 8, chunk = i % 8 / 4;
    const uint32_t address = smem + row * 128 + (chunk ^ row % 8) * 16 + i % 4 * 4;
    ptx::st_async(ptx::map_shared_rank(address, other), reinterpret_cast<const float*>(b)[i],
                  ptx::map_shared_rank(bar, other));
  }
  if (fault == kNoFence) ptx::fence_proxy_async();  // too early
  ptx::mbarrier_wait_cluster(bar, 0);
  if (fault != kNoFence) ptx::fence_proxy_async();
  const __nv_bfloat162 pair = __floats2bfloat162_rn(1, 1);
  const uint32_t ones = *reinterpret_cast<const uint32_t*>(&pair), a[4] = {ones, ones, ones, ones};
  float d[N / 2];
  for (int i = 0; i < N / 2; ++i) d[i] = 0;
  ptx::keep(d);
  ptx::wgmma_fence();
  ptx::wgmma_rs<__nv_bfloat16, N, false>(d, a, ptx::wgmma_descriptor(smem), false);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  ptx::keep(d);
  for (int i = 0; i < N / 2; ++i)
    out[(blockIdx.x * 64 + warp * 16 + lane / 4 + i / 2 % 2 * 8) * N + i / 4 * 8 + lane % 4 * 2 + i % 2] = d[i];
  cluster_barrier();
}

extern "C" {

int probe_exchange(const float* in, float* out, int ranks, int fault) {
  const int bytes = kStages * (ranks * kThreads * 4 + 16);
  return launch_clusters(exchange_kernel, dim3(2 * ranks), ranks, kThreads, bytes, nullptr, in, out, ranks, fault);
}

int probe_multicast(const void* in, float* out, int ranks, int mask, int fault) {
  CUtensorMap map;
  if (make_tensor_map(&map, HF_LINATTN_BF16, in, kRow, 1, ranks * kRow, 1, kRow, kRow, kRow, kRow, kRow)) return 1;
  return launch_clusters(multicast_kernel, dim3(ranks), ranks, kThreads, ranks * kRow * kRow * 2 + 8, nullptr, map,
                         out, ranks, mask, fault);
}

int probe_sent_operand(const __nv_bfloat16* b, float* out, int columns, int fault) {
  const auto wide = columns == 48 ? sent_operand_kernel<48> : sent_operand_kernel<96>;
  const auto kernel = columns == 24 ? sent_operand_kernel<24> : wide;
  return launch_clusters(kernel, dim3(2), 2, kThreads, columns * 128 + 8, nullptr, b, out, fault);
}

const char* hf_linattn_last_error(void) { return last_error(); }

}  // extern "C"
"""


@pytest.fixture(scope="module")
def clusters(tmp_path_factory):
    source = tmp_path_factory.mktemp("clusters") / "emulated_clusters.cu"
    source.write_text(CLUSTER_SOURCE.replace("FAULTS", ", ".join(CLUSTER_FAULTS)))
    library = ctypes.CDLL(str(build_library("hf_linattn_emulated_clusters", [source])))
    library.hf_linattn_last_error.restype = ctypes.c_char_p
    return library


@pytest.fixture(params=range(6))
def any_order(request, monkeypatch):
    monkeypatch.setenv("HF_LINATTN_EMULATED_SEED", str(request.param))


def run_exchange(clusters, ranks: int, fault: str = "kNone"):
    """As the next two: the error (empty without one), the result, and what it should be."""
    x = whole_numbers(2, 5, ranks, 128, dtype=torch.float32, seed=0)
    out = torch.full((2, ranks, 128), float("nan"))
    code = clusters.probe_exchange(at(x), at(out), ranks, CLUSTER_FAULTS.index(fault))
    expected = (torch.arange(1.0, ranks + 1)[:, None] * x).sum((1, 2))[:, None].expand_as(out)
    return clusters.hf_linattn_last_error().decode() if code else "", out, expected


def run_multicast(clusters, ranks: int, fault: str = "kNone", mask: int | None = None):
    tiles = whole_numbers(ranks, 64, 64, dtype=torch.bfloat16, seed=0)
    out = torch.full((ranks, ranks, 64, 64), float("nan"))
    to = (1 << ranks) - 1 if mask is None else mask
    code = clusters.probe_multicast(at(tiles), at(out), ranks, to, CLUSTER_FAULTS.index(fault))
    return clusters.hf_linattn_last_error().decode() if code else "", out, tiles.float().expand_as(out)


def run_sent_operand(clusters, columns: int, fault: str = "kNone"):
    b = whole_numbers(columns, 16, dtype=torch.bfloat16, seed=0)
    out = torch.full((2, 64, columns), float("nan"))
    code = clusters.probe_sent_operand(at(b), at(out), columns, CLUSTER_FAULTS.index(fault))
    return clusters.hf_linattn_last_error().decode() if code else "", out, b.float().sum(1).expand_as(out)


@pytest.mark.usefixtures("any_order")
@pytest.mark.parametrize(
    ("run", "size"),
    [
        *((run_exchange, ranks) for ranks in (1, 2, 4, 8)),
        *((run_multicast, ranks) for ranks in (2, 4)),
        *((run_sent_operand, columns) for columns in (24, 48, 96)),
    ],
)
def test_blocks_of_a_cluster_send_to_each_other(clusters, run, size):
    error, out, expected = run(clusters, size)
    assert error == ""
    assert torch.equal(out, expected)


def test_sent_operand_needs_a_fence(clusters):
    error, _, _ = run_sent_operand(clusters, 24, "kNoFence")
    assert "of B was written without fence_proxy_async" in error


@pytest.mark.usefixtures("any_order")
@pytest.mark.parametrize("run", [run_exchange, run_multicast])
def test_missing_wait_for_other_blocks(clusters, run):
    error, out, expected = run(clusters, 2, fault="kNoWait")
    assert error or not torch.equal(out, expected)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            "kNoClusterArrival",
            r"deadlock in block 0,0,0:\n  threads 0-127 wait for cluster_wait, 160 of 256 threads of the cluster.*\n"
            r"in block 1,0,0:\n  threads 0-31 wait for cluster_wait, 160 of.*\n  threads 32-127 wait for parity 0 of",
        ),
        ("kEndsFirst", r"st_async: block 1,0,0 has ended \[block 0,0,0 thread"),
        ("kEndsBeforeLast", r"ends with 0 copies, \d+ stores and \d+ arrivals to its shared memory under way"),
        ("kArrivesTwice", r"cluster_arrive: twice without cluster_wait"),
        ("kWaitsWithoutArrival", r"cluster_wait: without cluster_arrive"),
        ("kLocalTarget", r"st_async: shared address 0x400 is none that map_shared_rank gave"),
        ("kRemoteWait", r"mbarrier_wait: the shared address is one that map_shared_rank gave for rank [01]; it takes"),
        ("kRankOutside", r"map_shared_rank: rank 2; the cluster has 2"),
        ("kBlockScope", r"mbarrier_wait: other blocks signal the barrier at shared offset 2048"),
        ("kNoBarrierThere", r"st_async: no barrier was set up at shared offset 2048 of block 1,0,0"),
        ("kTwoBlocks", r"st_async: the address and the mbarrier are in different blocks"),
    ],
)
def test_broken_clusters_are_named(clusters, fault, message):
    error, _, _ = run_exchange(clusters, 2, fault=fault)
    assert re.search(message, error), error


@pytest.mark.usefixtures("any_order")
@pytest.mark.parametrize("fault", ["kNoClusterArrival", "kEndsFirst", "kEndsBeforeLast", "kBlockScope"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_broken_clusters_fail_in_any_order(clusters, ranks, fault):
    error, _, _ = run_exchange(clusters, ranks, fault=fault)
    assert re.search(r"deadlock in block|has ended|under way|mbarrier_wait: other blocks", error), error


@pytest.mark.parametrize(
    ("mask", "fault", "message"),
    [
        (0b101, "kNone", r"tma_load_4d: mask 0x5; the cluster has 2 blocks"),
        (0, "kNone", r"tma_load_4d: mask 0;"),
        (0b01, "kNone", r"\nin block 1,0,0:\n.*parity 0 of mbarrier .*0 arrivals, 16384 bytes short"),
        (0b11, "kEndsFirst", r"tma_load_4d: block 1,0,0 has ended"),
    ],
)
def test_refused_multicast(clusters, mask, fault, message):
    error, _, _ = run_multicast(clusters, 2, fault, mask)
    assert re.search(message, error), error
