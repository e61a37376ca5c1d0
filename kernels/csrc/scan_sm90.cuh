// The scans for Hopper (sm_90a): a producer feeds a ring of stages through the copy engine; two consumer warpgroups, each
// with its columns of the state in registers, multiply with wgmma.
//
// A CTA owns 64 columns (32 a warpgroup) where there are few heads, 128 (64 a warpgroup) where there are many: the
// scores, which every warpgroup forms for itself, then serve twice the columns.
#ifndef HF_LINATTN_SCAN_SM90_CUH_
#define HF_LINATTN_SCAN_SM90_CUH_

#include "engine_wgmma.cuh"
#include "launch.cuh"
#include "scan_warpgroup.cuh"

namespace hf_linattn {

constexpr int kWarpgroups90 = 2;

struct TileMaps {
  CUtensorMap x, y, z;
};

#if HF_LINATTN_HAS_SM90

// Shared memory of a CTA: barriers, stages, operand copies of the state, then what each warpgroup keeps for itself.
template <class Work>
struct Layout90 {
  static constexpr int kXBytes = Work::XTile::kBytes, kZBytes = Work::ZTile::kBytes;
  static constexpr int kZTiles = kWarpgroups90 * Work::kColumns / kTileColumns;
  static constexpr int kY = Work::kHasOutput ? kXBytes : 0;
  static constexpr int kZ = kY + (Work::kHasSources ? kXBytes : 0);
  static constexpr int kStageBytes = kZ + (Work::kHasSources ? kZTiles * kZBytes : 0);
  static constexpr int kBarrierBytes = 1024;
  static constexpr int kStateTiles = Work::kOwnsStateTile ? kWarpgroups90 : kZTiles;
  static constexpr int kSmemLimit = 227 * 1024;
  static constexpr int kFixedBytes = kBarrierBytes + kStateTiles * Work::kStateBytes + kWarpgroups90 * Work::Shared::kBytes;
  static constexpr int kMaxStages = 4;
  static constexpr int kStages = (kSmemLimit - kFixedBytes) / kStageBytes < kMaxStages
                                     ? (kSmemLimit - kFixedBytes) / kStageBytes
                                     : kMaxStages;
  static constexpr int kBytes = kFixedBytes + kStages * kStageBytes;
  static_assert(kStages >= 2, "a ring has at least two stages");

  static __device__ __forceinline__ uint32_t full(uint32_t base, int stage) { return base + 8 * stage; }
  static __device__ __forceinline__ uint32_t empty(uint32_t base, int stage) { return base + 8 * (kMaxStages + stage); }
  static __device__ __forceinline__ uint32_t stage(uint32_t base, int stage) {
    return base + kBarrierBytes + stage * kStageBytes;
  }
  static __device__ __forceinline__ uint32_t states(uint32_t base) { return stage(base, kStages); }
  static __device__ __forceinline__ uint32_t own(uint32_t base, int warpgroup) {
    return states(base) + kStateTiles * Work::kStateBytes + warpgroup * Work::Shared::kBytes;
  }
};

// The consumers' end of the ring.
template <class Work>
struct RingPipe {
  using Layout = Layout90<Work>;
  const uint32_t base;
  const int z_tile;
  int taken = 0, freed = 0;  // stages; one more may be taken before the last is freed
  uint32_t parity = 0;

  __device__ __forceinline__ StageTiles acquire() {
    ptx::mbarrier_wait(Layout::full(base, taken), parity);
    const uint32_t tiles = Layout::stage(base, taken);
    if (++taken == Layout::kStages) taken = 0, parity ^= 1;
    return {tiles, tiles + Layout::kY, tiles + Layout::kZ + z_tile * Layout::kZBytes};
  }
  __device__ __forceinline__ void release() {
    __syncwarp();
    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(Layout::empty(base, freed));
    if (++freed == Layout::kStages) freed = 0;
  }
};

// The producer's end: one thread asks for every tile of the segment, in the order in which the consumers take them.
template <class Work>
__device__ __forceinline__ void produce(const ScanArgs& args, const TileMaps& maps, const Segment& segment, int head,
                                        int column0, uint32_t base) {
  using Layout = Layout90<Work>;
  constexpr int kHalves = Work::kRowsPadded / 64, kHalfBytes = kChunk * 128;
  const int chunks = static_cast<int>((segment.end - segment.begin + kChunk - 1) / kChunk);
  const int group = args.num_heads / args.num_kv_heads;
  const int members = Work::kReverse && Work::kHasSources ? group : 1;
  int stage = 0;
  uint32_t parity = 1;
  for (int step = 0; step < chunks; ++step) {
    const int chunk = Work::kReverse ? chunks - 1 - step : step;
    const int token = static_cast<int>(segment.begin + static_cast<int64_t>(chunk) * kChunk);
    for (int member = 0; member < members; ++member) {
      ptx::mbarrier_wait(Layout::empty(base, stage), parity);
      const uint32_t full = Layout::full(base, stage), tiles = Layout::stage(base, stage);
      const bool with_x = Work::kHasOutput && member == 0;
      const int x_bytes = with_x ? Layout::kXBytes : 0;
      const int source_bytes = Work::kHasSources ? Layout::kXBytes + Layout::kZTiles * Layout::kZBytes : 0;
      ptx::mbarrier_arrive_expect_tx(full, x_bytes + source_bytes);
      auto load = [&](uint32_t to, const CUtensorMap& map, int column, int from_head) {
        ptx::tma_load_4d(to, &map, full, column, from_head, token, segment.batch);
      };
      for (int half = 0; with_x && half < kHalves; ++half) load(tiles + half * kHalfBytes, maps.x, 64 * half, head);
      if (Work::kHasSources) {
        const int source_head = Work::kReverse ? head * group + member : Work::kStateOnly ? head : head / group;
        for (int half = 0; half < kHalves; ++half) {
          load(tiles + Layout::kY + half * kHalfBytes, maps.y, 64 * half, source_head);
        }
        for (int i = 0; i < Layout::kZTiles; ++i) {
          load(tiles + Layout::kZ + i * Layout::kZBytes, maps.z, column0 + 64 * i, source_head);
        }
      }
      if (++stage == Layout::kStages) stage = 0, parity ^= 1;
    }
  }
}

// A CTA's whole work: `block` counts tiles, then heads, then slots.
template <class Work, ScanKind kKind, bool kCausal>
__device__ __forceinline__ void scan_sm90(const ScanArgs& args, const TileMaps& maps, int block, int tiles, int heads) {
  using Layout = Layout90<Work>;
  const int tile = block % tiles, head = block / tiles % heads, slot = block / (tiles * heads);
  const Segment segment = find_segment(args, slot);
  if (!is_wanted<kKind, kCausal>(segment)) return;
  const uint32_t base = ptx::smem_address(ptx::dynamic_smem());
  const int column0 = tile * kWarpgroups90 * Work::kColumns;
  if (threadIdx.x == 0) {
    for (int i = 0; i < Layout::kStages; ++i) {
      ptx::mbarrier_init(Layout::full(base, i), 1);
      ptx::mbarrier_init(Layout::empty(base, i), kWarpgroups90 * kWarpgroupThreads / 32);
    }
    ptx::mbarrier_init_fence();
  }
  __syncthreads();
  const int warpgroup = threadIdx.x / kWarpgroupThreads;
  if (warpgroup == kWarpgroups90) {
    ptx::register_dealloc<24>();
    if (threadIdx.x % kWarpgroupThreads == 0) produce<Work>(args, maps, segment, head, column0, base);
  } else {
    ptx::register_alloc<240>();
    const int z_tile = warpgroup * Work::kColumns / kTileColumns;
    Work work(args, segment, head, column0 + warpgroup * Work::kColumns, /*barrier=*/1 + warpgroup,
              Layout::own(base, warpgroup),
              Layout::states(base) + (Work::kOwnsStateTile ? warpgroup : z_tile) * Work::kStateBytes);
    RingPipe<Work> pipe{base, z_tile};
    work.run(pipe);
  }
}

template <ScanKind kKind, bool kCausal, bool kDecay, int kRows, int kCols>
using Work90 = ScanWarpgroup<Bf16Wgmma, kKind, kCausal, kDecay, kRows, kCols>;

#endif  // HF_LINATTN_HAS_SM90

constexpr int kThreads90 = (kWarpgroups90 + 1) * kWarpgroupThreads;

template <ScanKind kKind, bool kCausal, bool kDecay, int kRows, int kCols>
__global__ void __launch_bounds__(kThreads90, 1)
    scan_sm90_kernel(const __grid_constant__ ScanArgs args, const __grid_constant__ TileMaps maps, int tiles, int heads) {
#if HF_LINATTN_HAS_SM90
  scan_sm90<Work90<kKind, kCausal, kDecay, kRows, kCols>, kKind, kCausal>(args, maps, blockIdx.x, tiles, heads);
#endif
}

// dk and dv side by side: both read q and do, one of the two from the second-level cache.
template <bool kCausal, bool kDecay, int kRows, int kCols>
__global__ void __launch_bounds__(kThreads90, 1)
    source_gradients_sm90_kernel(const __grid_constant__ ScanArgs key_args, const __grid_constant__ TileMaps key_maps,
                                 const __grid_constant__ ScanArgs value_args, const __grid_constant__ TileMaps value_maps,
                                 int tiles, int heads) {
#if HF_LINATTN_HAS_SM90
  if (blockIdx.x % 2 == 0) {
    scan_sm90<Work90<ScanKind::kKeyGrad, kCausal, kDecay, kRows, kCols>, ScanKind::kKeyGrad, kCausal>(
        key_args, key_maps, blockIdx.x / 2, tiles, heads);
  } else {
    scan_sm90<Work90<ScanKind::kValueGrad, kCausal, kDecay, kRows, kCols>, ScanKind::kValueGrad, kCausal>(
        value_args, value_maps, blockIdx.x / 2, tiles, heads);
  }
#endif
}

// Whether the copy engine takes this tensor: 16-byte steps, and a base on one.
inline bool is_tileable(const Rows& rows) {
  const bool base = reinterpret_cast<uintptr_t>(rows.data) % 16 == 0;
  return base && rows.token_stride % 8 == 0 && rows.head_stride % 8 == 0 && rows.batch_stride % 8 == 0;
}

inline int make_tile_maps(ScanKind kind, bool is_causal, const ScanArgs& args, TileMaps& maps) {
  const bool by_kv_head = is_reverse(kind) || forms_state_only(kind);
  const int64_t batch = args.cu_seqlens == nullptr ? args.num_sequences : 1;
  auto map = [&](CUtensorMap* to, const Rows& rows, int num_heads) {
    return make_tensor_map(to, HF_LINATTN_BF16, rows.data, rows.dim, num_heads, args.tokens, batch, rows.head_stride,
                           rows.token_stride, rows.batch_stride, 64, kChunk);
  };
  if (!forms_state_only(kind)) {
    const int heads = by_kv_head ? args.num_kv_heads : args.num_heads;
    if (int error = map(&maps.x, args.x, heads)) return error;
  }
  if (is_causal || forms_state_only(kind)) {
    const int source_heads = is_reverse(kind) ? args.num_heads : args.num_kv_heads;
    if (int error = map(&maps.y, args.y, source_heads)) return error;
    if (int error = map(&maps.z, args.z, source_heads)) return error;
  }
  return 0;
}

template <ScanKind kKind, bool kCausal, bool kDecay, int kRows, int kCols>
int launch_scan_sm90(const ScanArgs& args, cudaStream_t stream) {
  using Work = Work90<kKind, kCausal, kDecay, kRows, kCols>;
  const int columns = kWarpgroups90 * kCols, tiles = (args.z.dim + columns - 1) / columns;
  const int heads = is_reverse(kKind) || forms_state_only(kKind) ? args.num_kv_heads : args.num_heads;
  const int64_t blocks = static_cast<int64_t>(tiles) * heads * args.num_slots;
  if (blocks > 0x7fffffff) return set_error("%lld blocks are more than a grid holds", static_cast<long long>(blocks));
  TileMaps maps = {};
  if (int error = make_tile_maps(kKind, kCausal, args, maps)) return error;
  return launch(scan_sm90_kernel<kKind, kCausal, kDecay, kRows, kCols>, dim3(static_cast<unsigned>(blocks)), kThreads90,
                Layout90<Work>::kBytes, stream, args, maps, tiles, heads);
}

template <bool kCausal, bool kDecay, int kRows, int kCols>
int launch_source_gradients_sm90(const ScanArgs& key, const ScanArgs& value, cudaStream_t stream) {
  constexpr int kKeyBytes = Layout90<Work90<ScanKind::kKeyGrad, kCausal, kDecay, kRows, kCols>>::kBytes;
  constexpr int kValueBytes = Layout90<Work90<ScanKind::kValueGrad, kCausal, kDecay, kRows, kCols>>::kBytes;
  const int columns = kWarpgroups90 * kCols, tiles = (key.z.dim + columns - 1) / columns;
  const int64_t blocks = static_cast<int64_t>(tiles) * key.num_kv_heads * key.num_slots * 2;
  if (blocks > 0x7fffffff) return set_error("%lld blocks are more than a grid holds", static_cast<long long>(blocks));
  TileMaps key_maps = {}, value_maps = {};
  if (int error = make_tile_maps(ScanKind::kKeyGrad, kCausal, key, key_maps)) return error;
  if (int error = make_tile_maps(ScanKind::kValueGrad, kCausal, value, value_maps)) return error;
  return launch(source_gradients_sm90_kernel<kCausal, kDecay, kRows, kCols>, dim3(static_cast<unsigned>(blocks)),
                kThreads90, kKeyBytes > kValueBytes ? kKeyBytes : kValueBytes, stream, key, key_maps, value, value_maps,
                tiles, key.num_kv_heads);
}

}  // namespace hf_linattn

#endif  // HF_LINATTN_SCAN_SM90_CUH_
