// The scans for sm_80 and later: one warpgroup a CTA, tiles loaded by cp.async (or element by element where rows are not
// aligned or need converting), double buffered where shared memory allows. Where it is too small even for one stage, x
// comes in two parts (compact form).
#ifndef HF_LINATTN_SCAN_SM80_CUH_
#define HF_LINATTN_SCAN_SM80_CUH_

#include "launch.cuh"
#include "scan_warpgroup.cuh"
#include "tile_copy.cuh"

namespace hf_linattn {

template <class Work>
struct CopyPipe {
  using XTile = typename Work::XTile;
  using XPartTile = typename Work::XPartTile;
  using ZTile = typename Work::ZTile;
  using Element = typename Work::Element;
  static constexpr bool kLoadsX = Work::kHasOutput, kLoadsSources = Work::kHasSources;
  static constexpr int kXPartColumns = Work::kRowsPadded / Work::kPartsOfX;
  static constexpr int kY = kLoadsX ? XPartTile::kBytes : 0;
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
        chunks(chunk_count(work.segment)),
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

  // Another part of the x of this item, in the place of the one before; with one stage only.
  __device__ __forceinline__ void load_x_part(const StageTiles& stage, int64_t first, int part) {
    __syncthreads();  // the part before is read
    copy_tile<Element, XPartTile, kXPartColumns>(stage.x, work.args.x, work.segment.batch, work.head, first,
                                                 work.segment.end, part * kXPartColumns);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    __syncthreads();
  }

 private:
  __device__ __forceinline__ void load_next() {
    if (step < chunks) {
      const int64_t first = work.first_token(work.chunk_at(step, chunks));
      const uint32_t base = stages + next_stage * kStageBytes;
      const ScanArgs& args = work.args;
      const int batch = work.segment.batch;
      const int64_t end = work.segment.end;
      if (kLoadsX) copy_tile<Element, XPartTile, kXPartColumns>(base, args.x, batch, work.head, first, end, 0);
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
  const int chunks = chunk_count(work.segment), members = Work::kHasSources ? work.group : 1;
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
        // Parts of x leave no time to form scores a few columns at a time: all of them are added up.
        constexpr bool kAddsScores = Work::kPartsOfX > 1 && Work::kHasSources;
        float scores[kAddsScores ? kChunk / 2 : 1] = {};
#pragma unroll 1
        for (int part = 0; part < Work::kPartsOfX; ++part) {
          if (part > 0) pipe.load_x_part(stage, first, part);
          if (member == 0) {
            if (work.reads_extra()) work.read_row_sums(rows.extra, x, stage.x, part);
            work.read_state(rows.o, x, stage.x, part);
          }
          if constexpr (kAddsScores) work.template add_scores<kChunk>(scores, x, stage, 0, part);
        }
        if (member == 0) work.finish_read(rows);
        if constexpr (kAddsScores) work.template add_weighted<kChunk>(rows, scores, stage, 0, valid);
        else if constexpr (Work::kHasSources) work.add_sources(rows, x, stage, valid);
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

// Shared memory of a CTA: stages, the state's operand, an output tile a warp (for results of two bytes that pass through
// it); then sums, and token arrays a warp.
template <class Work>
struct Layout80 {
  static constexpr int kWarps = kWarpgroupThreads / 32;
  static constexpr bool kHasOutTile = Work::kHasOutput && std::is_same_v<typename Work::Element, __nv_bfloat16>;
  static constexpr int kOutBytes = kHasOutTile ? Work::OutTile::kBytes : 0;
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

template <class Engine, ScanKind kKind, bool kCausal, int kRows, int kCols, int kXParts>
using Work80 = ScanWarpgroup<Engine, kKind, kCausal, /*kDecay=*/kCausal, kRows, kCols, kXParts>;

template <class Engine, ScanKind kKind, bool kCausal, int kRows, int kCols, int kXParts>
__global__ void __launch_bounds__(kWarpgroupThreads, 1) scan_sm80_kernel(const __grid_constant__ ScanArgs args,
                                                                      int tiles, int heads, int num_stages) {
  using Work = Work80<Engine, kKind, kCausal, kRows, kCols, kXParts>;
  const int tile = blockIdx.x % tiles, head = blockIdx.x / tiles % heads, slot = blockIdx.x / (tiles * heads);
  const Segment segment = find_segment(args, slot);
  if (!is_wanted<kKind, kCausal>(segment)) return;
  const uint32_t base = ptx::smem_address(ptx::dynamic_smem());
  Work work(args, segment, head, tile * kCols, Layout80<Work>::places(base, num_stages));
  CopyPipe<Work> pipe(work, base, num_stages);
  run_portable_scan(work, pipe);
}

// With as many stages as fit, of those that this form can have.
template <class Engine, ScanKind kKind, bool kCausal, int kRows, int kCols, int kXParts>
int launch_scan_form(const ScanArgs& args, bool only_check, cudaStream_t stream) {
  using Layout = Layout80<Work80<Engine, kKind, kCausal, kRows, kCols, kXParts>>;
  const int limit = smem_limit(), num_stages = kXParts > 1 || Layout::bytes(2) > limit ? 1 : 2;
  const int smem_bytes = Layout::bytes(num_stages);
  if (smem_bytes > limit) {
    return set_error("dimensions up to %d in this dtype need %d bytes of shared memory a block, the device has %d", kRows,
                     smem_bytes, limit);
  }
  if (only_check) return 0;
  const int tiles = (args.z.dim + kCols - 1) / kCols;
  const int heads = is_reverse(kKind) || forms_state_only(kKind) ? args.num_kv_heads : args.num_heads;
  const int64_t blocks = static_cast<int64_t>(tiles) * heads * args.num_slots;
  if (blocks > 0x7fffffff) return set_error("%lld blocks are more than a grid holds", static_cast<long long>(blocks));
  return launch(scan_sm80_kernel<Engine, kKind, kCausal, kRows, kCols, kXParts>, dim3(static_cast<unsigned>(blocks)),
                kWarpgroupThreads, smem_bytes, stream, args, tiles, heads, num_stages);
}

// The compact form, which has half as much of x in shared memory, is compiled where some device lacks the memory for the
// other, and by itself where most do.
template <class Engine, ScanKind kKind, bool kCausal, int kRows>
int launch_scan_sm80(const ScanArgs& args, bool only_check, cudaStream_t stream) {
  constexpr int kNarrow = kTileColumns / 2, kCols = kRows > Engine::kMaxWideRows ? kNarrow : kTileColumns;
  using Work = Work80<Engine, kKind, kCausal, kRows, kCols, 1>;
  constexpr int kSmemBytes = Layout80<Work>::bytes(1);
  constexpr bool kHasCompact = Work::kHasOutput && kSmemBytes > kLeastSmemLimit;
  constexpr bool kHasWhole = !kHasCompact || kRows <= Engine::kMaxWholeRows;
  if constexpr (kHasWhole) {
    if (!kHasCompact || kSmemBytes <= smem_limit()) {
      return launch_scan_form<Engine, kKind, kCausal, kRows, kCols, 1>(args, only_check, stream);
    }
  }
  if constexpr (kHasCompact) {
    using Compact = std::conditional_t<Work::kStateParts == 1, Engine, typename Engine::Compact>;
    return launch_scan_form<Compact, kKind, kCausal, kRows, kNarrow, 2>(args, only_check, stream);
  }
}

// One translation unit an engine and kind (scan_sm80_*.cu): they compile side by side.
template <class Engine, ScanKind kKind, bool kCausal>
int scan_sm80_for(const ScanArgs& args, bool only_check, cudaStream_t stream) {
  if (args.y.dim <= 64) return launch_scan_sm80<Engine, kKind, kCausal, 64>(args, only_check, stream);
  if (args.y.dim <= 128) return launch_scan_sm80<Engine, kKind, kCausal, 128>(args, only_check, stream);
  if (args.y.dim <= kMaxDim) return launch_scan_sm80<Engine, kKind, kCausal, kMaxDim>(args, only_check, stream);
  return set_error("feature and value dimensions go up to %d, got %d", kMaxDim, args.y.dim);
}

}  // namespace hf_linattn

#endif  // HF_LINATTN_SCAN_SM80_CUH_
