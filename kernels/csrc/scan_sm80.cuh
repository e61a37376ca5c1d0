// The scans for sm_80 and later: one warpgroup a CTA, tiles loaded by cp.async (or element by element where rows are not
// aligned or need converting), double buffered where shared memory allows.
#ifndef HF_LINATTN_SCAN_SM80_CUH_
#define HF_LINATTN_SCAN_SM80_CUH_

#include "launch.cuh"
#include "scan_warpgroup.cuh"
#include "tile_copy.cuh"

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
        chunks(work.chunk_count()),
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

 private:
  __device__ __forceinline__ void load_next() {
    if (step < chunks) {
      const int64_t first = work.first_token(work.chunk_at(step, chunks));
      const uint32_t base = stages + next_stage * kStageBytes;
      const ScanArgs& args = work.args;
      const int batch = work.segment.batch;
      const int64_t end = work.segment.end;
      if (kLoadsX) copy_tile<Element, XTile, Work::kRowsPadded>(base, args.x, batch, work.head, first, end, 0);
      if (kLoadsSources) {
        const int head = work.source_head(member);
        copy_tile<Element, XTile, Work::kRowsPadded>(base + kY, args.y, batch, head, first, end, 0);
        copy_tile<Element, ZTile, Work::kColumns>(base + kZ, args.z, batch, head, first, end, work.column0);
      }
      if (++member == members) member = 0, ++step;
      ptx::cp_async_commit();
    }
    if (num_stages > 1) next_stage ^= 1;
  }
};

// The steps of a scan, all by one warpgroup.
template <class Work, class Pipe>
__device__ __forceinline__ void run_portable_scan(Work& work, Pipe& pipe) {
  const int chunks = work.chunk_count(), members = Work::kHasSources ? work.group : 1;
  float log_decay = 0.f;  // of the whole segment, log2
  typename Work::TokenInputs next;
  work.load_state();
  if (Work::kTokenInputs && chunks > 0) work.load_tokens(next, work.chunk_at(0, chunks), 0);
  for (int step = 0; step < chunks; ++step) {
    const int chunk = work.chunk_at(step, chunks);
    const int64_t first = work.first_token(chunk);
    const int valid = work.valid_tokens(first);
    typename Work::RowSums rows;
    if constexpr (Work::kHasOutput) {
      __syncthreads();  // the last read of the old operand is over
      work.publish_state();
    }
    for (int member = 0; member < members; ++member) {
      const bool is_last_member = member == members - 1;
      const float chunk_decay = work.with_token_arrays(valid) ? work.template publish_tokens<true, true>(next, valid) : 0.f;
      if (member == 0) work.start_rows(rows, next);
      if (Work::kTokenInputs && !is_last_member) work.load_tokens(next, chunk, member + 1);
      else if (Work::kTokenInputs && step + 1 < chunks) work.load_tokens(next, work.chunk_at(step + 1, chunks), 0);
      const StageTiles stage = pipe.acquire();
      if constexpr (Work::kHasOutput) {
        typename Work::FragmentA x[Work::kXFragments];
        if (member == 0) {
          if (work.reads_extra()) work.read_row_sums(rows.extra, x, stage.x);
          work.read_state(rows.o, x, stage.x);
          work.finish_read(rows);
        }
        if constexpr (Work::kHasSources) work.add_sources(rows, x, stage, valid);
        if (is_last_member) work.write_output(rows, first, valid);
      }
      if constexpr (Work::kHasSources) {
        if (Work::kDecays && member == 0) {
          work.decay_state(exp2f(chunk_decay));
          log_decay += chunk_decay;
        }
        work.update_state(stage);
      }
    }
  }
  if constexpr (Work::kHasSources) work.store_state(log_decay);
  if constexpr (Work::kHasOutput) work.clear_tail();
}

// Shared memory of a CTA: stages, the state's operand, an output tile a warp; then sums, and token arrays a warp.
template <class Work>
struct Layout80 {
  static constexpr int kWarps = kWarpgroupThreads / 32, kOutBytes = Work::kHasOutput ? Work::OutTile::kBytes : 0;
  static constexpr int kTokenBytes = Work::kTokenArrays * Work::kTokenArrayBytes;
  static constexpr int bytes(int num_stages) {
    return num_stages * CopyPipe<Work>::kStageBytes + Work::kOperandBytes + Work::kSumBytes +
           kWarps * (kOutBytes + kTokenBytes);
  }
  static __device__ __forceinline__ typename Work::SharedPlaces places(uint32_t base, int num_stages) {
    const uint32_t operand = base + num_stages * CopyPipe<Work>::kStageBytes, out = operand + Work::kOperandBytes;
    const uint32_t sums = out + kWarps * kOutBytes, tokens = sums + Work::kSumBytes, warp = threadIdx.x / 32;
    return {operand, sums, tokens + warp * kTokenBytes, out + warp * kOutBytes};
  }
};

template <class Engine, ScanKind kKind, bool kCausal, int kRows, int kCols>
using Work80 = ScanWarpgroup<Engine, kKind, kCausal, /*kDecay=*/kCausal, kRows, kCols>;

template <class Engine, ScanKind kKind, bool kCausal, int kRows, int kCols>
__global__ void __launch_bounds__(kWarpgroupThreads, 1) scan_sm80_kernel(const __grid_constant__ ScanArgs args,
                                                                      int tiles, int heads, int num_stages) {
  using Work = Work80<Engine, kKind, kCausal, kRows, kCols>;
  const int tile = blockIdx.x % tiles, head = blockIdx.x / tiles % heads, slot = blockIdx.x / (tiles * heads);
  const Segment segment = find_segment(args, slot);
  if (!is_wanted<kKind, kCausal>(segment)) return;
  const uint32_t base = ptx::smem_address(ptx::dynamic_smem());
  Work work(args, segment, head, tile * kCols, Layout80<Work>::places(base, num_stages));
  CopyPipe<Work> pipe(work, base, num_stages);
  run_portable_scan(work, pipe);
}

template <class Engine, ScanKind kKind, bool kCausal, int kRows>
int launch_scan_sm80(const ScanArgs& args, bool only_check, cudaStream_t stream) {
  constexpr int kCols = kRows > Engine::kMaxWideRows ? kTileColumns / 2 : kTileColumns;
  const int limit = smem_limit();
  using Layout = Layout80<Work80<Engine, kKind, kCausal, kRows, kCols>>;
  const int num_stages = Layout::bytes(2) > limit ? 1 : 2, smem_bytes = Layout::bytes(num_stages);
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
