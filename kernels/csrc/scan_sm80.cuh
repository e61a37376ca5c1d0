// The scans for sm_80 and later: one warpgroup a CTA, tiles loaded by cp.async (or element by element where rows are not
// aligned or need converting), double buffered where shared memory allows. Where it is too small even for one stage, x
// comes in two parts (compact form).
#ifndef HF_LINATTN_SCAN_SM80_CUH_
#define HF_LINATTN_SCAN_SM80_CUH_

#include "launch.cuh"
#include "scan_warpgroup.cuh"
#include "tile_copy.cuh"

namespace hf_linattn {

// The tiles of a chunk, in the order of use: for each head of the group those of the scores and the state, then, with a
// window, for each head those of the window.
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
  int tile = -1;                             // of the window, or none of it

  __device__ __forceinline__ CopyPipe(const Work& work, uint32_t stages, int num_stages)
      : work(work),
        stages(stages),
        num_stages(num_stages),
        chunks(chunk_count(work.segment)),
        members(work.members()) {
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
                                                 tokens_until(first, work.segment.end), part * kXPartColumns);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    __syncthreads();
  }

 private:
  __device__ __forceinline__ void load_next() {
    if (step < chunks) {
      const int64_t first = work.first_token(work.chunk_at(step, chunks));
      const bool is_far = !Work::kHasWindow || tile < 0;
      const int64_t source = work.source_token(first, is_far ? 0 : tile);
      const uint32_t base = stages + next_stage * kStageBytes;
      const ScanArgs& args = work.args;
      const int batch = work.segment.batch;
      if (kLoadsX) {
        copy_tile<Element, XPartTile, kXPartColumns>(base, is_far ? args.x : args.window_x, batch, work.head, first,
                                                     tokens_until(first, work.segment.end), 0);
      }
      if (kLoadsSources) {
        const int head = work.source_head(member);
        const TileTokens tokens = is_far ? work.far_tokens(first) : work.source_tokens(source);
        copy_tile<Element, XTile, Work::kRowsPadded>(base + kY, is_far ? args.y : args.window_y, batch, head, source, tokens, 0);
        copy_tile<Element, ZTile, Work::kColumns>(base + kZ, args.z, batch, head, source, tokens, work.column0);
      }
      advance(first);
      ptx::cp_async_commit();
    }
    if (num_stages > 1) next_stage ^= 1;
  }
  __device__ __forceinline__ void advance(int64_t first) {
    if constexpr (Work::kHasWindow) {
      const typename Work::WindowTiles window = work.window_tiles_of(first, 1);
      if (tile >= 0 && ++tile < window.end) return;
      if (++member < members) {
        if (tile >= 0) tile = window.begin;
        return;
      }
      member = 0;
      if (tile < 0) tile = window.begin;
      else tile = -1, ++step;
    } else {
      if (++member == members) member = 0, ++step;
    }
  }
};

// The steps of a scan, all by one warpgroup.
template <class Work, class Pipe>
__device__ __forceinline__ void run_portable_scan(Work& work, Pipe& pipe) {
  const int chunks = chunk_count(work.segment), members = work.members();
  float log_decay = 0.f;  // of the whole segment, log2
  typename Work::TokenInputs next;
  work.load_state();
  if (Work::kTokenInputs && chunks > 0) work.load_tokens(next, work.chunk_at(0, chunks), 0);
  for (int step = 0; step < chunks; ++step) {
    const int chunk = work.chunk_at(step, chunks);
    const int64_t first = work.first_token(chunk);
    const TileTokens sources = work.far_tokens(first);
    typename Work::RowSums rows;
    if constexpr (Work::kHasOutput) {
      __syncthreads();  // the last read of the old operand is over
      work.publish_state();
    }
    for (int member = 0; member < members; ++member) {
      const bool is_last_member = member == members - 1;
      const float chunk_decay =
          work.with_token_arrays(sources) ? work.template publish_tokens<true, true>(next, sources) : 0.f;
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
        if constexpr (kAddsScores) work.template add_weighted<kChunk>(rows, scores, stage, 0, sources);
        else if constexpr (Work::kHasSources) work.add_sources(rows, x, stage, sources);
        if (!Work::kHasWindow && is_last_member) work.write_output(rows, first, work.valid_tokens(first));
      }
      if constexpr (Work::kHasSources) {
        if (Work::kDecays && member == 0) {
          work.decay_state(exp2f(chunk_decay));
          log_decay += chunk_decay;
        }
        work.update_state(stage);
      }
    }
    if constexpr (Work::kHasWindow) {
      work.start_window(rows);
      const typename Work::WindowTiles window = work.window_tiles_of(first, 1);
      for (int member = 0; member < members; ++member) {
        for (int tile = window.begin; tile < window.end; ++tile) {
          const int64_t source = work.source_token(first, tile);
          const TileTokens tokens = work.source_tokens(source);
          float lse[2];
          work.load_lse(lse, source, tokens, member);
          const StageTiles stage = pipe.acquire();
          work.publish_lse(lse);
          work.add_window(rows, stage, tile, first, tokens);
        }
      }
      work.write_output(rows, first, work.valid_tokens(first));
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

template <class Engine, ScanKind kKind, Reach kReach, int kRows, int kCols, int kXParts>
using Work80 = ScanWarpgroup<Engine, kKind, kReach, /*kDecay=*/kReach != Reach::kAll, kRows, kCols, kXParts>;

template <class Engine, ScanKind kKind, Reach kReach, int kRows, int kCols, int kXParts>
__global__ void __launch_bounds__(kWarpgroupThreads, 1) scan_sm80_kernel(const __grid_constant__ ScanArgs args,
                                                                      int tiles, int heads, int num_stages) {
  using Work = Work80<Engine, kKind, kReach, kRows, kCols, kXParts>;
  const int tile = blockIdx.x % tiles, head = blockIdx.x / tiles % heads, slot = blockIdx.x / (tiles * heads);
  Segment segment = find_segment(args, slot);
  if (!is_wanted<kKind, kReach>(args, segment)) return;
  if constexpr (kKind == ScanKind::kOutput && kReach == Reach::kWindow) segment = wanted_rows(args, segment);
  const uint32_t base = ptx::smem_address(ptx::dynamic_smem());
  Work work(args, segment, head, tile * kCols, Layout80<Work>::places(base, num_stages));
  CopyPipe<Work> pipe(work, base, num_stages);
  run_portable_scan(work, pipe);
}

// With as many stages as fit, of those that this form can have.
template <class Engine, ScanKind kKind, Reach kReach, int kRows, int kCols, int kXParts>
int launch_scan_form(const ScanArgs& args, bool only_check, cudaStream_t stream) {
  using Layout = Layout80<Work80<Engine, kKind, kReach, kRows, kCols, kXParts>>;
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
  return launch(scan_sm80_kernel<Engine, kKind, kReach, kRows, kCols, kXParts>, dim3(static_cast<unsigned>(blocks)),
                kWarpgroupThreads, smem_bytes, stream, args, tiles, heads, num_stages);
}

// The compact form, which has half as much of x in shared memory, is compiled where some device lacks the memory for the
// other, and by itself where most do.
template <class Engine, ScanKind kKind, Reach kReach, int kRows>
int launch_scan_sm80(const ScanArgs& args, bool only_check, cudaStream_t stream) {
  constexpr int kNarrow = kTileColumns / 2, kCols = kRows > Engine::kMaxWideRows ? kNarrow : kTileColumns;
  using Work = Work80<Engine, kKind, kReach, kRows, kCols, 1>;
  constexpr int kSmemBytes = Layout80<Work>::bytes(1);
  constexpr bool kHasCompact = Work::kHasOutput && kSmemBytes > kLeastSmemLimit;
  constexpr bool kHasWhole = !kHasCompact || kRows <= Engine::kMaxWholeRows || Work::kHasWindow;
  if constexpr (kHasWhole) {
    if (!kHasCompact || Work::kHasWindow || kSmemBytes <= smem_limit()) {
      return launch_scan_form<Engine, kKind, kReach, kRows, kCols, 1>(args, only_check, stream);
    }
  }
  if constexpr (kHasCompact && !Work::kHasWindow) {
    using Compact = std::conditional_t<Work::kStateParts == 1, Engine, typename Engine::Compact>;
    return launch_scan_form<Compact, kKind, kReach, kRows, kNarrow, 2>(args, only_check, stream);
  }
}

// One translation unit an engine and kind (scan_sm80_*.cu): they compile side by side.
template <class Engine, ScanKind kKind, Reach kReach>
int scan_sm80_for(const ScanArgs& args, bool only_check, cudaStream_t stream) {
  const int dim = kReach == Reach::kWindow && args.window_y.dim > args.y.dim ? args.window_y.dim : args.y.dim;
  if (dim <= 64) return launch_scan_sm80<Engine, kKind, kReach, 64>(args, only_check, stream);
  if (dim <= 128) return launch_scan_sm80<Engine, kKind, kReach, 128>(args, only_check, stream);
  // The gradient of a window's q and k (window_gradient.h) has no more either.
  constexpr int kLargest = kReach == Reach::kWindow && Engine::kMaxWholeRows < kMaxDim ? 128 : kMaxDim;
  if constexpr (kLargest == kMaxDim) {
    if (dim <= kMaxDim) return launch_scan_sm80<Engine, kKind, kReach, kMaxDim>(args, only_check, stream);
  }
  return set_error("feature and value dimensions go up to %d, got %d", kLargest, dim);
}

}  // namespace hf_linattn

#endif  // HF_LINATTN_SCAN_SM80_CUH_
