// The scans for sm_80 and later: one warpgroup a CTA, tiles loaded by cp.async (or element by element where rows are not
// aligned or need converting), double buffered where shared memory allows.
#ifndef HF_LINATTN_SCAN_SM80_CUH_
#define HF_LINATTN_SCAN_SM80_CUH_

#include "launch.cuh"
#include "scan_warpgroup.cuh"

namespace hf_linattn {

template <class Work>
struct CopyPipe {
  using XTile = typename Work::XTile;
  using ZTile = typename Work::ZTile;
  using Element = typename Work::Element;
  static constexpr bool kLoadsX = Work::kHasOutput, kLoadsSources = Work::kHasSources;
  static constexpr int kY = kLoadsX ? XTile::kBytes : 0;
  static constexpr int kZ = kY + (kLoadsSources ? XTile::kBytes : 0);
  static constexpr int kStageBytes = kZ + (kLoadsSources ? ZTile::kBytes : 0);

  const Work& work;
  const uint32_t stages;
  const int num_stages, chunks, members;
  int step = 0, member = 0, next_stage = 0;  // of the item to load next

  __device__ __forceinline__ CopyPipe(const Work& work, uint32_t stages, int num_stages)
      : work(work),
        stages(stages),
        num_stages(num_stages),
        chunks(static_cast<int>((work.segment.end - work.segment.begin + kChunk - 1) / kChunk)),
        members(kLoadsSources ? work.group : 1) {
    if (num_stages > 1) load_next();
  }

  __device__ __forceinline__ StageTiles acquire() {
    if (num_stages == 1) {
      __syncthreads();
      load_next();
    }
    const uint32_t base = stages + (num_stages == 1 ? 0 : (next_stage ^ 1) * kStageBytes);
    ptx::cp_async_wait<0>();
    __syncthreads();
    if (num_stages > 1) load_next();
    return {base, base + kY, base + kZ};
  }
  __device__ __forceinline__ void release() {}

 private:
  __device__ __forceinline__ void load_next() {
    if (step < chunks) {
      const int chunk = Work::kReverse ? chunks - 1 - step : step;
      const int64_t first = work.segment.begin + static_cast<int64_t>(chunk) * kChunk;
      const uint32_t base = stages + next_stage * kStageBytes;
      const ScanArgs& args = work.args;
      if (kLoadsX) load<XTile, Work::kRowsPadded>(base, args.x, work.head, first, 0);
      if (kLoadsSources) {
        const int head = work.source_head(member);
        load<XTile, Work::kRowsPadded>(base + kY, args.y, head, first, 0);
        load<ZTile, Work::kColumns>(base + kZ, args.z, head, first, work.column0);
      }
      if (++member == members) member = 0, ++step;
      ptx::cp_async_commit();
    }
    if (num_stages > 1) next_stage ^= 1;
  }

  // Rows first .. first+63 of one head, columns column0 .. ; what lies beyond the segment or the tensor becomes zero.
  template <class Layout, int kWidth>
  __device__ __forceinline__ void load(uint32_t tile, const Rows& rows, int head, int64_t first, int column0) {
    const Element* base = static_cast<const Element*>(rows.data) + hidden(work.segment.batch) * rows.batch_stride +
                          hidden(head) * rows.head_stride + first * rows.token_stride + column0;
    const int columns = rows.dim - column0 < kWidth ? rows.dim - column0 : kWidth;
    const int64_t left = work.segment.end - first;
    const int valid = left < kChunk ? static_cast<int>(left) : kChunk;
    const bool is_aligned = (reinterpret_cast<uintptr_t>(base) | rows.token_stride * sizeof(Element)) % 16 == 0;
    constexpr int kPerUnit = 16 / sizeof(Element);  // elements of a 16-byte copy
    constexpr bool kConverts = std::is_same_v<Element, __half>;
    if (!kConverts && is_aligned) {
      constexpr int kUnits = kWidth / kPerUnit;
#pragma unroll 1
      for (int i = threadIdx.x; i < kChunk * kUnits; i += kWarpgroupThreads) {
        const int row = i / kUnits, column = i % kUnits * kPerUnit;
        const int elements = row >= valid ? 0 : min(max(columns - column, 0), kPerUnit);
        const Element* from = elements > 0 ? base + row * rows.token_stride + column : base;
        ptx::cp_async_16(tile + Layout::offset(row, column), from, elements * static_cast<int>(sizeof(Element)));
      }
    } else {
#pragma unroll 1
      for (int i = threadIdx.x; i < kChunk * kWidth; i += kWarpgroupThreads) {
        const int row = i / kWidth, column = i % kWidth;
        const bool is_inside = row < valid && column < columns;
        put<Layout>(tile, row, column, is_inside ? base[row * rows.token_stride + column] : Element(0.f));
      }
    }
  }
  template <class Layout>
  __device__ __forceinline__ void put(uint32_t tile, int row, int column, __nv_bfloat16 value) {
    shared_at<__nv_bfloat16>(tile + Layout::offset(row, column)) = value;
  }
  template <class Layout, class Wide>
  __device__ __forceinline__ void put(uint32_t tile, int row, int column, Wide value) {
    shared_at<float>(tile + Layout::offset(row, column)) = static_cast<float>(value);
  }
};

template <class Engine, ScanKind kKind, bool kCausal, int kRows, int kCols>
__global__ void __launch_bounds__(kWarpgroupThreads, 1) scan_sm80_kernel(const __grid_constant__ ScanArgs args,
                                                                      int tiles, int heads, int num_stages) {
  using Work = ScanWarpgroup<Engine, kKind, kCausal, /*kDecay=*/kCausal, kRows, kCols>;
  using Pipe = CopyPipe<Work>;
  const int tile = blockIdx.x % tiles, head = blockIdx.x / tiles % heads, slot = blockIdx.x / (tiles * heads);
  const Segment segment = find_segment(args, slot);
  if (!is_wanted<kKind, kCausal>(segment)) return;
  const uint32_t base = ptx::smem_address(ptx::dynamic_smem());
  const uint32_t state_tiles = base + num_stages * Pipe::kStageBytes;
  Work work(args, segment, head, tile * kCols, /*barrier=*/1, state_tiles + Work::kStateBytes, state_tiles);
  Pipe pipe(work, base, num_stages);
  work.run(pipe);
}

// Shared memory of a CTA with this many stages.
template <class Engine, ScanKind kKind, bool kCausal, int kRows, int kCols>
int sm80_smem_bytes(int num_stages) {
  using Work = ScanWarpgroup<Engine, kKind, kCausal, kCausal, kRows, kCols>;
  return num_stages * CopyPipe<Work>::kStageBytes + Work::kStateBytes + Work::Shared::kBytes;
}

// Shared memory that a CTA may ask for on this device.
int smem_limit();

template <class Engine, ScanKind kKind, bool kCausal, int kRows>
int launch_scan_sm80(const ScanArgs& args, bool only_check, cudaStream_t stream) {
  constexpr int kCols = kRows > Engine::kMaxWideRows ? kTileColumns / 2 : kTileColumns;
  const int limit = smem_limit();
  int num_stages = 2;
  if (sm80_smem_bytes<Engine, kKind, kCausal, kRows, kCols>(num_stages) > limit) num_stages = 1;
  const int smem_bytes = sm80_smem_bytes<Engine, kKind, kCausal, kRows, kCols>(num_stages);
  if (smem_bytes > limit) {
    return set_error("dimensions up to %d in this dtype need %d bytes of shared memory a block, the device has %d", kRows,
                     smem_bytes, limit);
  }
  if (only_check) return 0;
  const int tiles = (args.z.dim + kCols - 1) / kCols;
  const int heads = is_reverse(kKind) || forms_state_only(kKind) ? args.num_kv_heads : args.num_heads;
  const int64_t blocks = static_cast<int64_t>(tiles) * heads * args.num_slots;
  if (blocks > 0x7fffffff) return set_error("%lld blocks are more than a grid holds", static_cast<long long>(blocks));
  return launch(scan_sm80_kernel<Engine, kKind, kCausal, kRows, kCols>, dim3(static_cast<unsigned>(blocks)),
                kWarpgroupThreads, smem_bytes, stream, args, tiles, heads, num_stages);
}

// One translation unit an engine and kind (scan_sm80_*.cu): they compile side by side.
template <class Engine, ScanKind kKind, bool kCausal>
int scan_sm80_for(const ScanArgs& args, bool only_check, cudaStream_t stream) {
  if (args.y.dim <= 64) return launch_scan_sm80<Engine, kKind, kCausal, 64>(args, only_check, stream);
  if (args.y.dim <= 128) return launch_scan_sm80<Engine, kKind, kCausal, 128>(args, only_check, stream);
  // Four bytes an element of more rows fill the shared memory of most devices, and then the registers.
  constexpr bool kIsBf16 = std::is_same_v<typename Engine::Element, __nv_bfloat16>;
  if constexpr (kIsBf16) {
    if (args.y.dim <= 256) return launch_scan_sm80<Engine, kKind, kCausal, 256>(args, only_check, stream);
  }
  return set_error("feature and value dimensions of this dtype go up to %d, got %d", kIsBf16 ? 256 : 128, args.y.dim);
}

}  // namespace hf_linattn

#endif  // HF_LINATTN_SCAN_SM80_CUH_
