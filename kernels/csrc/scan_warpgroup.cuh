// What four warps do with the chunks of one segment: the arithmetic of a scan (scan.h), for any engine and any pipe.
//
// A warpgroup owns kCols columns of z, of the output and of the state [kRows, kCols], which stays in registers as
// accumulators. Of every chunk of 64 tokens warp w owns output rows 16w .. 16w+15; of every 64 rows of the state it owns
// the same sixteen. The state is rounded to an operand in shared memory once a chunk; its accumulators never are.
#ifndef HF_LINATTN_SCAN_WARPGROUP_CUH_
#define HF_LINATTN_SCAN_WARPGROUP_CUH_

#include "engine_mma.cuh"
#include "scan.h"

namespace hf_linattn {

constexpr int kWarpgroupThreads = 128;

// Where the tiles of a chunk lie in shared memory.
struct StageTiles {
  uint32_t x, y, z;
};

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kSmallestLogDecay = -120.f;  // e^-120 is 0 in float32; -inf would leave NaN in differences

// Slot s of the grid -> its tokens. Dense: every sequence has the same number of slots. Packed: sequence n owns the slots
// from cu_seqlens[n] / segment_tokens + n, enough for its segments whatever the lengths.
__device__ __forceinline__ Segment find_segment(const ScanArgs& args, int slot) {
  Segment segment;
  int64_t start = 0, length = args.tokens;
  int index;
  int64_t first_chunk = 0;
  segment.slot = slot;
  if (args.cu_seqlens == nullptr) {
    const int per_sequence = args.num_slots / args.num_sequences;
    segment.sequence = segment.batch = slot / per_sequence;
    index = slot % per_sequence;
    first_chunk = segment.batch * ((args.tokens + kChunk - 1) / kChunk);
  } else {
    auto bound = [&](int n) -> int64_t {
      return args.cu_seqlens_is_int64 ? static_cast<const int64_t*>(args.cu_seqlens)[n]
                                      : static_cast<const int32_t*>(args.cu_seqlens)[n];
    };
    int low = 0, high = args.num_sequences - 1;  // the last n whose first slot is not beyond this one
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (bound(middle) / args.segment_tokens + middle <= slot) low = middle;
      else high = middle - 1;
    }
    segment.sequence = low;
    segment.batch = 0;
    start = bound(low);
    length = bound(low + 1) - start;
    first_chunk = start / kChunk + low;
    index = slot - static_cast<int>(start / args.segment_tokens + low);
  }
  const int64_t count = length > 0 ? (length + args.segment_tokens - 1) / args.segment_tokens : 1;
  segment.exists = index < count;
  segment.is_first = index == 0;
  segment.is_last = index == count - 1;
  const int64_t offset = index * args.segment_tokens;
  segment.first_chunk = first_chunk + offset / kChunk;
  segment.begin = start + offset;
  segment.end = start + (offset + args.segment_tokens < length ? offset + args.segment_tokens : length);
  return segment;
}

// x, which the compiler takes for a new number: what is computed from it stays where it is used. Otherwise the addresses
// of everything a chunk writes are formed before its first product, and occupy registers until the end.
__device__ __forceinline__ int hidden(int x) {
  uint32_t value[1] = {static_cast<uint32_t>(x)};
  ptx::keep(value);
  return static_cast<int>(value[0]);
}

__device__ __forceinline__ float guarded(float den) { return fabsf(den) < kDenominatorEps ? kDenominatorEps : den; }

// Whether this segment has work: one that no boundary waits for adds nothing to a state.
template <ScanKind kKind, bool kCausal>
__device__ __forceinline__ bool is_wanted(const Segment& segment) {
  constexpr bool kIsState = forms_state_only(kKind), kReverse = is_reverse(kKind);
  return segment.exists && !(kIsState && kCausal && (kReverse ? segment.is_first : segment.is_last));
}

// The n-th entry of a state member, or null.
__device__ __forceinline__ float* entry(float* member, int64_t n, int64_t size) {
  return member == nullptr ? nullptr : member + n * size;
}

template <class Engine, ScanKind kKind, bool kCausal, bool kDecay, int kRows, int kCols>
struct ScanWarpgroup {
  using Element = typename Engine::Element;
  using FragmentA = typename Engine::FragmentA;
  using FragmentB = typename Engine::FragmentB;
  using XTile = typename Engine::template Tile<kChunk, kRows>;
  // Tiles of an asynchronous engine are 64 columns wide; warpgroups with fewer share them.
  static constexpr int kSharedCols = Engine::kIsAsync ? kTileColumns : kCols;
  using ZTile = typename Engine::template Tile<kChunk, kSharedCols>;
  using StateTile = typename Engine::template Tile<kRows, kSharedCols>;
  using OnesTile = typename Engine::template Tile<8, kChunk>;
  using OutTile = typename Engine::template Tile<16, kCols>;

  static constexpr bool kStateOnly = forms_state_only(kKind);
  static constexpr bool kReverse = is_reverse(kKind);
  static constexpr bool kTransposed = is_transposed(kKind);
  static constexpr bool kExtra = has_extra_column(kKind);
  static constexpr bool kHasOutput = !kStateOnly;
  static constexpr bool kHasSources = kCausal || kStateOnly;
  static constexpr bool kRowConstant = kKind == ScanKind::kQueryGrad;
  // dq is a difference of two sums over all keys that nearly cancel: its state operand keeps twice the bits.
  // So does that of dv under decay, for dg.
  static constexpr bool kCancels = kKind == ScanKind::kQueryGrad || (kKind == ScanKind::kValueGrad && kDecay);
  static constexpr int kStateParts = kCancels && Engine::kIsRounding ? 2 : 1;
  static constexpr int kRowsPadded = kRows, kColumns = kCols;
  // An asynchronous engine reads the row sums as one more column of the state's operand, which then cannot be shared, and
  // forms them with a tile of ones as operand. The others, and the gradients, use small products.
  static constexpr bool kExtraInState = Engine::kIsAsync && kExtra && kHasOutput && kCols < kSharedCols;
  static constexpr bool kOnesTile = Engine::kIsAsync && kExtra && !kReverse;
  static constexpr bool kOwnsStateTile = kExtraInState || kSharedCols == kCols;
  // The update is under way before the weights are formed, where registers allow.
  static constexpr bool kEarlyUpdate = Engine::kIsAsync && kHasOutput && kCausal && kCols < kSharedCols &&
                                       !kDecay && (!kReverse || kRows == 64);
  // Fragments of an update in registers at a time: all, or half where 64 columns of state leave no room for more.
  static constexpr int kUpdateParts = Engine::kIsAsync && kReverse && kHasOutput && kRows * kCols > 64 * 64 ? 2 : 1;
  static constexpr int kUpdateFragments = Engine::kIsAsync ? kChunk / 16 / kUpdateParts : 1;
  static constexpr int kReadCols = kExtraInState ? kCols + 8 : kCols;
  static constexpr int kStateTiles = kRows / 64;
  static constexpr int kSteps = kRows / 16;
  // Fragments of an asynchronous engine stay in registers, which only unrolled loops can name; else small loops save them.
  static constexpr int kUnrollSteps = Engine::kIsAsync ? kSteps : 1, kUnrollChunk = Engine::kIsAsync ? kChunk / 16 : 1;
  static constexpr int kOwnColumns = kCols / 4;  // of the column sums, by warp

  // Per-token numbers of the chunk in work; every warp keeps its own copy, so that no barrier is needed.
  enum TokenArray { kLogDecay, kScoreFactor, kScoreOffset, kStateFactor, kStateOffset, kExtraValue, kTokenArrays };
  static constexpr int kStateBytes = kHasOutput ? kStateParts * StateTile::kBytes : 0;  // for kSharedCols columns
  struct Shared {
    static constexpr int kOnes = 0;
    static constexpr int kRowSums = kOnes + (kOnesTile ? OnesTile::kBytes : 0);
    static constexpr int kColumnSums = kRowSums + kRows * 4;
    static constexpr int kTokens = kColumnSums + kCols * 4;
    static constexpr int kOut = kTokens + 4 * kTokenArrays * kChunk * 4;
    static constexpr int kBytes = (kOut + (kHasOutput ? 4 * OutTile::kBytes : 0) + 1023) / 1024 * 1024;
  };

  static constexpr bool kTokenInputs = kDecay || kReverse || kRowConstant;
  struct TokenInputs {  // of tokens 2 lane and 2 lane + 1; row_den of this thread's two rows
    float g[2], den[2], along[2], row_den[2], row_along[2];
  };

  const ScanArgs& args;
  const Segment segment;
  const int head, kv_head, group, column0;  // head: of x and out
  const int barrier;                        // named barrier of this warpgroup
  uint32_t shared;                          // Shared
  const uint32_t state_tiles;               // kStateBytes
  const int lane, warp, g, t;

  float state[kStateTiles][kCols / 2];
  float row_sums[kStateTiles][4];           // sum of y over the extra column; spread over two columns of the product
  float column_sums[kCols / 32][4];         // sum of z for this warp's columns; rows 0 and 1 of a product
  float count;                              // the extra column's own sum

  __device__ __forceinline__ ScanWarpgroup(const ScanArgs& args, const Segment& segment, int head, int column0,
                                           int barrier, uint32_t shared, uint32_t state_tiles)
      : args(args),
        segment(segment),
        head(head),
        kv_head(kStateOnly || kReverse ? head : head / (args.num_heads / args.num_kv_heads)),
        group(kReverse ? args.num_heads / args.num_kv_heads : 1),
        column0(column0),
        barrier(barrier),
        shared(shared),
        state_tiles(state_tiles),
        lane(threadIdx.x % 32),
        warp(threadIdx.x / 32 % 4),
        g(threadIdx.x % 32 / 4),
        t(threadIdx.x % 4) {}

  __device__ __forceinline__ bool with_column_sums() const {
    return kTransposed ? args.normalize != 0 : args.a != 0.f;
  }
  __device__ __forceinline__ bool with_extra() const {
    const bool is_wanted = kKind != ScanKind::kValueGrad || args.extra_out != nullptr || args.last.key_sum != nullptr;
    return kExtra && args.normalize && is_wanted;
  }
  __device__ __forceinline__ float* token_array(int which) const {
    return &shared_at<float>(shared + Shared::kTokens + (warp * kTokenArrays + which) * kChunk * 4);
  }
  __device__ __forceinline__ int source_head(int member) const { return kReverse ? kv_head * group + member : kv_head; }
  // The state of the forward holds bare k v^T: b comes with every read of it. That of the backward holds b already.
  __device__ __forceinline__ float read_factor() const { return kReverse ? 1.f : args.b; }

  template <class Pipe>
  __device__ __forceinline__ void run(Pipe& pipe) {
    const int64_t length = segment.end - segment.begin;
    const int chunks = static_cast<int>((length + kChunk - 1) / kChunk);
    load_state();
    if constexpr (kOnesTile) write_ones();
    if constexpr (kExtraInState) clear_extra_columns();
    float log_decay = 0.f;  // of the whole segment, log2
    TokenInputs next;
    if (kTokenInputs && chunks > 0) load_tokens(next, kReverse ? chunks - 1 : 0, 0);
    if constexpr (kHasOutput) {
      if (chunks > 0) publish_state();
    }
    const int members = kHasSources ? group : 1;
    for (int step = 0; step < chunks; ++step) {
      const int chunk = kReverse ? chunks - 1 - step : step;
      shared = hidden(shared);
      const int64_t first = segment.begin + static_cast<int64_t>(chunk) * kChunk;
      const int valid = segment.end - first < kChunk ? static_cast<int>(segment.end - first) : kChunk;
      FragmentA x[kHasOutput && Engine::kIsAsync ? kSteps : 1];
      float o[kCols / 2], extra[4], weight_sums[2], along[2], row_factor[2], row_den[2];
      for (int member = 0; member < members; ++member) {
        const bool is_last_member = member == members - 1;
        const float chunk_decay = with_token_arrays(valid) ? publish_tokens(next, valid) : 0.f;
        if (member == 0) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            row_den[i] = next.row_den[i], along[i] = next.row_along[i];
            row_factor[i] = kDecay ? exp2f(token_array(kLogDecay)[16 * warp + g + 8 * i]) : 1.f;
            weight_sums[i] = extra[2 * i] = extra[2 * i + 1] = 0.f;
          }
        }
        const float first_count = count;
        if (kTokenInputs && !is_last_member) load_tokens(next, chunk, member + 1);
        else if (kTokenInputs && step + 1 < chunks) load_tokens(next, kReverse ? chunk - 1 : chunk + 1, 0);
        const auto stage = pipe.acquire();
        if (kHasSources && !Engine::kZeroFilled && valid < kChunk) clear_rows(stage.z, valid);
        const typename Engine::Operand z_operand = Engine::operand(stage.z, tile_column());
        FragmentA weights[kHasOutput && kCausal && Engine::kIsAsync ? kChunk / 16 : 1];
        FragmentA y[kUpdateFragments][kStateTiles];
        auto update = [&] {
          if constexpr (kHasSources) {
            if (kDecay && member == 0) {
              decay_state(exp2f(chunk_decay));
              log_decay += chunk_decay;
            }
            update_state(y, stage.y, stage.z, z_operand, valid);
          }
          Engine::commit();
        };

        // Products of an asynchronous engine run beside the ordinary code that follows them: the fragments of the update
        // are loaded under the scores, the weights formed under the read of the state and the update, the next operand
        // of the state under the values.
        if constexpr (kHasOutput && Engine::kIsAsync) {
          float p[kCausal ? kChunk / 2 : 1], read[kExtraInState ? kReadCols / 2 : 1];
          if (member == 0) {
#pragma unroll
            for (int k = 0; k < kSteps; ++k) Engine::template load_a<XTile>(x[k], stage.x, 16 * warp, 16 * k);
          }
          if (!kExtraInState && member == 0 && with_extra()) read_row_sums(extra, x, stage.x);
          Engine::fence();
          if constexpr (kCausal) {
            const typename Engine::Operand y_operand = Engine::operand(stage.y, 0);
#pragma unroll
            for (int k = 0; k < kSteps; ++k) {
              Engine::template gemm_nk<kChunk, XTile>(p, x[k], y_operand, 16 * k, k != 0);
            }
          }
          Engine::commit();
          if (member == 0) {
            if constexpr (kExtraInState) read_state(read, x, stage.x);
            else read_state(o, x, stage.x);
          }
          Engine::commit();
          if constexpr (kEarlyUpdate) update();
          if constexpr (kCausal) {
            Engine::template wait<kEarlyUpdate ? 2 : 1>();
            Engine::keep(p);
#pragma unroll
            for (int k = 0; k < kChunk / 16; ++k) weights[k] = weigh(p, k, 16 * k, weight_sums, along, valid);
          }
          Engine::template wait<kEarlyUpdate ? 1 : 0>();
          Engine::keep_fragments(x);
          if constexpr (kExtraInState) Engine::keep(read);
          else Engine::keep(o);
          if (member == 0) finish_read(o, extra, read, first_count, along, row_factor);
          if constexpr (kCausal && kReverse && kExtra) {
#pragma unroll
            for (int k = 0; k < kChunk / 16; ++k) {
              if (with_extra()) Engine::mma(extra, weights[k], extra_column(k));
            }
          }
          if constexpr (kCausal) {
            Engine::fence();
#pragma unroll
            for (int k = 0; k < kChunk / 16; ++k) {
              Engine::template gemm_kn<kCols, ZTile>(o, weights[k], z_operand, 16 * k, true);
            }
          }
          Engine::commit();
        } else if constexpr (kHasOutput) {
          if (member == 0) {
            const float nothing[1] = {};
            if (with_extra()) read_row_sums(extra, x, stage.x);
            read_state(o, x, stage.x);
            finish_read(o, extra, nothing, first_count, along, row_factor);
          }
          if constexpr (kCausal) add_sources(o, extra, weight_sums, x, stage, along, valid);
          if (is_last_member) write_output(o, extra, weight_sums, row_den, first, valid);
        }
        if constexpr (!kEarlyUpdate) {
          update();
          if constexpr (kHasOutput && Engine::kIsAsync) {
            Engine::template wait<1>();
            Engine::keep(o);
            if constexpr (kCausal) Engine::keep_fragments(weights);
            if (is_last_member) write_output(o, extra, weight_sums, row_den, first, valid);
          }
          Engine::template wait<0>();
          keep_update(y);
          pipe.release();
          if constexpr (kHasOutput && kCausal) {
            if (is_last_member && step + 1 < chunks) publish_state();
          }
        } else {
          Engine::template wait<1>();
          keep_update(y);
          if (is_last_member && step + 1 < chunks) publish_state();
          Engine::template wait<0>();
          Engine::keep(o);
          Engine::keep_fragments(weights);
          pipe.release();
          if (is_last_member) write_output(o, extra, weight_sums, row_den, first, valid);
        }
      }
    }
    if constexpr (kHasSources) store_state(log_decay);
    if constexpr (kHasOutput) clear_tail();
  }

 private:
  // Registers of an update in flight stay as they are until here.
  __device__ __forceinline__ void keep_update(FragmentA (&y)[kUpdateFragments][kStateTiles]) {
    if constexpr (Engine::kIsAsync && kHasSources) {
#pragma unroll
      for (int m = 0; m < kStateTiles; ++m) {
        Engine::keep(state[m]);
        if constexpr (kOnesTile) Engine::keep(row_sums[m]);
      }
#pragma unroll
      for (int k = 0; k < kUpdateFragments; ++k) Engine::keep_fragments(y[k]);
    }
  }

  // First state -> registers.
  __device__ __forceinline__ void load_state() {
    const bool is_carried = kCausal && !(kReverse ? segment.is_last : segment.is_first);
    const hf_linattn_state empty = {}, &from = kStateOnly ? empty : is_carried ? args.carried : args.first;
    const int64_t index = is_carried ? entry_index(boundary(!kReverse)) : entry_index(segment.sequence);
    const float* kv = entry(from.kv, index, int64_t{args.feature_dim} * args.value_dim);
    const float* key_sum = entry(from.key_sum, index, args.feature_dim);
    const float* value_sum = entry(from.value_sum, index, args.value_dim);
    const float* weight_sum = entry(from.weight_sum, index, 1);
    const int row_count = args.y.dim, column_count = args.z.dim, pitch = hidden(args.value_dim);
#pragma unroll
    for (int m = 0; m < kStateTiles; ++m) {
#pragma unroll
      for (int i = 0; i < kCols / 2; ++i) {
        const int row = state_row(m, i), column = column0 + state_column(i);
        state[m][i] = kv != nullptr && row < row_count && column < column_count ? kv[state_offset(row, column, pitch)] : 0.f;
        if (i % 16 == 15) ptx::keep(state[m]);  // few addresses at a time
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = state_row(m, i);
        const bool is_held = kExtra && key_sum != nullptr && t == 0 && i % 2 == 0 && row < row_count;
        row_sums[m][i] = is_held ? key_sum[row] : 0.f;
      }
    }
    const float* sums = kTransposed ? key_sum : value_sum;
#pragma unroll
    for (int n = 0; n < kCols / 32; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int column = column0 + own_column(n, i);
        column_sums[n][i] = sums != nullptr && g == 0 && i < 2 && column < column_count ? sums[column] : 0.f;
      }
    }
    count = weight_sum != nullptr ? *weight_sum : 0.f;
  }

  // Registers -> the entry of this segment (state kinds) or of the sequence (scans that end it).
  __device__ __forceinline__ void store_state(float log_decay) {
    if (!kStateOnly && !(kReverse ? segment.is_first : segment.is_last)) return;
    if (kTransposed) return;  // the untransposed kinds see the same state
    const bool is_writer = kStateOnly || kReverse || head % (args.num_heads / args.num_kv_heads) == 0;
    if (!is_writer) return;
    const hf_linattn_state& to = kStateOnly ? args.carried : args.last;
    const int64_t index = entry_index(!kStateOnly ? segment.sequence : kCausal ? boundary(kReverse) : segment.slot);
    float* kv = entry(to.kv, index, int64_t{args.feature_dim} * args.value_dim);
    float* key_sum = entry(to.key_sum, index, args.feature_dim);
    float* value_sum = entry(to.value_sum, index, args.value_dim);
    float* weight_sum = entry(to.weight_sum, index, 1);
    const int row_count = args.y.dim, column_count = args.z.dim, pitch = hidden(args.value_dim);
    if (kv != nullptr) {
#pragma unroll
      for (int m = 0; m < kStateTiles; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = state_row(m, 2 * half);
          if (row >= row_count) continue;
          float* entries = kv + row * pitch + column0;
#pragma unroll
          for (int i = 2 * half; i < kCols / 2; i += 4) {
            if (column0 + state_column(i) < column_count) entries[state_column(i)] = state[m][i];
            if (column0 + state_column(i + 1) < column_count) entries[state_column(i + 1)] = state[m][i + 1];
          }
        }
      }
    }
    if (key_sum != nullptr && column0 == 0 && t == 0) {
#pragma unroll
      for (int m = 0; m < kStateTiles; ++m) {
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
          const int row = state_row(m, i);
          if (row < row_count) key_sum[row] = row_sums[m][i] + row_sums[m][i + 1];
        }
      }
    }
#pragma unroll
    for (int n = 0; n < kCols / 32; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float sum = column_sums[n][i] + __shfl_xor_sync(0xffffffffu, column_sums[n][i], 4);
        const int column = column0 + own_column(n, i);
        if (value_sum != nullptr && g == 0 && column < column_count) value_sum[column] = sum;
      }
    }
    const bool is_first_thread = column0 == 0 && threadIdx.x % kWarpgroupThreads == 0;
    if (weight_sum != nullptr && is_first_thread) *weight_sum = count;
    if (kStateOnly && kCausal && is_first_thread) args.carried_log_decay[index] = log_decay / kLog2E;
  }

  // Registers -> operands in shared memory, for all four warps.
  __device__ __forceinline__ void publish_state() {
    ptx::named_barrier_sync(barrier, kWarpgroupThreads);  // the last read of the old operand is over
#pragma unroll
    for (int part = 0; part < kStateParts; ++part) {
#pragma unroll
      for (int m = 0; m < kStateTiles; ++m) {
        const uint32_t tile = state_tiles + part * StateTile::kBytes;
        Engine::template store<kCols, StateTile>(tile, 64 * m + 16 * warp, state_column0(), state[m], part);
      }
    }
    if (with_extra() && t == 0) {
      float* sums = &shared_at<float>(shared + Shared::kRowSums);
#pragma unroll
      for (int m = 0; m < kStateTiles; ++m) {
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
          const int row = state_row(m, i);
          const float sum = row_sums[m][i] + row_sums[m][i + 1], high = Engine::round(sum);
          if constexpr (kExtraInState) {
            shared_at<uint32_t>(state_tiles + StateTile::offset(row, kCols)) = pack_bf16(high, sum - high);
          } else {
            sums[row] = sum;
          }
        }
      }
    }
    if (with_column_sums()) {
      float* sums = &shared_at<float>(shared + Shared::kColumnSums);
#pragma unroll
      for (int n = 0; n < kCols / 32; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float sum = column_sums[n][i] + __shfl_xor_sync(0xffffffffu, column_sums[n][i], 4);
          if (g == 0) sums[own_column(n, i)] = sum;
        }
      }
    }
    publish_to_engine();
    ptx::named_barrier_sync(barrier, kWarpgroupThreads);
  }

  __device__ __forceinline__ void publish_to_engine() {
#if HF_LINATTN_HAS_SM90
    if (!Engine::kZeroFilled) ptx::fence_proxy_async();
#endif
  }

  // Numbers of the tokens of a chunk; all loads of a chunk are under way while the one before is worked on.
  __device__ __forceinline__ void load_tokens(TokenInputs& in, int chunk, int member) {
    const int batch = hidden(segment.batch), kv_head = hidden(this->kv_head);
    const int64_t first = segment.begin + static_cast<int64_t>(hidden(chunk)) * kChunk;
    const int64_t source = (static_cast<int64_t>(batch) * args.num_heads + source_head(member)) * args.tokens;
    const bool with_den = kReverse && args.normalize;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t token = first + 2 * lane + i;
      const bool is_valid = token < segment.end;
      in.g[i] = 0.f;
      if (kDecay && is_valid && args.g != nullptr) {
        in.g[i] = args.g[batch * args.g_batch_stride + token * args.g_token_stride + kv_head * args.g_head_stride];
      }
      in.den[i] = with_den && is_valid ? args.den[source + token] : 1.f;
      in.along[i] = with_den && is_valid ? args.along[source + token] : 0.f;
      in.row_den[i] = 1.f;
      in.row_along[i] = 0.f;
      if (kRowConstant && args.normalize) {
        const int64_t row = first + 16 * warp + g + 8 * i;
        const int64_t at = (static_cast<int64_t>(batch) * args.num_heads + head) * args.tokens + row;
        if (row < segment.end) in.row_den[i] = args.den[at], in.row_along[i] = args.along[at];
      }
    }
  }

  // Without decay every token of a full chunk counts the same.
  __device__ __forceinline__ bool with_token_arrays(int valid) const {
    return kDecay || kReverse || with_column_sums() || valid < kChunk;
  }

  // Token numbers -> this warp's arrays. Returns the log2 decay over the chunk.
  __device__ __forceinline__ float publish_tokens(const TokenInputs& in, int valid) {
    float log_decay[2] = {0.f, 0.f}, total = 0.f;
    __syncwarp();  // the arrays of the chunk before are read
    if (kDecay) {
      const float a = fmaxf(in.g[0], kSmallestLogDecay) * kLog2E, b = fmaxf(in.g[1], kSmallestLogDecay) * kLog2E;
      float sum = a + b;
#pragma unroll
      for (int distance = 1; distance < 32; distance *= 2) {
        const float other = __shfl_up_sync(0xffffffffu, sum, distance);
        if (lane >= distance) sum += other;
      }
      total = __shfl_sync(0xffffffffu, sum, 31);
      const float before = __shfl_up_sync(0xffffffffu, sum, 1);
      log_decay[0] = (lane == 0 ? 0.f : before) + a;
      log_decay[1] = sum;
    }
    float added = 0.f;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int token = 2 * lane + i;
      const bool is_valid = token < valid;
      const float up_to = kReverse ? total - log_decay[i] : log_decay[i];  // decay that a row here has seen
      const float from_here = kDecay ? exp2f(total - up_to) : 1.f;
      float factor = 1.f, offset = 1.f, extra = 1.f;
      if (kReverse) {
        const float inverse = args.normalize ? 1.f / guarded(in.den[i]) : 1.f;
        factor = args.b * inverse;
        offset = kTransposed ? -args.b * inverse * in.along[i] : args.a * inverse;
        extra = -in.along[i];
      }
      if (!is_valid) factor = offset = 0.f;
      if (kDecay) token_array(kLogDecay)[token] = up_to;
      if (kReverse) {
        token_array(kScoreFactor)[token] = factor;
        token_array(kScoreOffset)[token] = offset;
        if (kExtra) token_array(kExtraValue)[token] = extra;
      }
      token_array(kStateFactor)[token] = factor * from_here;
      token_array(kStateOffset)[token] = offset * from_here;
      added += offset * from_here * extra;
    }
    if (kExtra && with_column_sums()) {
#pragma unroll
      for (int distance = 16; distance > 0; distance /= 2) added += __shfl_xor_sync(0xffffffffu, added, distance);
      added_count = added;
    }
    __syncwarp();
    return total;
  }

  // Columns 16k .. 16k+15 of this warp's rows of x. An asynchronous engine has them all in registers, where no copy can
  // change them; the others save the registers.
  template <int kSize>
  __device__ __forceinline__ FragmentA& x_fragment(FragmentA (&x)[kSize], int k, uint32_t x_tile) {
    if constexpr (!Engine::kIsAsync) Engine::template load_a<XTile>(x[0], x_tile, 16 * warp, 16 * k);
    return x[Engine::kIsAsync ? k : 0];
  }

  // 32 columns of a chunk are 16 bytes a thread, in accumulator order; row_products.cu reads them so.
  __device__ __forceinline__ void write_residual(const float (&o)[kCols / 2], const float (&row_scale)[2], int64_t chunk) {
#pragma unroll
    for (int unit = 0; unit < kCols / kResidualColumns; ++unit) {
      if (column0 + unit * kResidualColumns >= args.value_dim) continue;
      uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        uint32_t bits[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) bits[e] = __float_as_uint(o[16 * unit + 4 * i + e] * row_scale[e / 2]) + kResidualBias;
        // Byte 1 of each. (As shifts and masks, nvcc 13.0 got bytes 2 and 3 wrong in the portable kernels.)
        words[i] = __byte_perm(__byte_perm(bits[0], bits[1], 0x0051), __byte_perm(bits[2], bits[3], 0x0051), 0x5410);
      }
      const int64_t block = (chunk * args.num_heads + head) * residual_units(args.value_dim) + column0 / kResidualColumns;
      uint4* at = reinterpret_cast<uint4*>(args.residual + (block + unit) * kResidualUnitBytes);
      at[hidden(threadIdx.x % kWarpgroupThreads)] = make_uint4(words[0], words[1], words[2], words[3]);
    }
  }

  // extra = x . row_sums: what earlier chunks contribute to the extra column. The sums enter as two
  // rounded parts, in columns 0 and 1 of the product, so that they lose nothing that matters.
  template <int kSize>
  __device__ __forceinline__ void read_row_sums(float (&extra)[4], FragmentA (&x)[kSize], uint32_t x_tile) {
    const float* sums = &shared_at<float>(shared + Shared::kRowSums);
#pragma unroll(kUnrollSteps)
    for (int k = 0; k < kSteps; ++k) {
      float part[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float sum = sums[16 * k + 2 * t + i / 2 * 8 + i % 2], high = Engine::round(sum);
        part[i] = g == 0 ? high : g == 1 ? sum - high : 0.f;
      }
      Engine::mma(extra, x_fragment(x, k, x_tile), Engine::pack_b(part));
    }
  }

  // x . state (and, kExtraInState, x . row_sums in eight more columns), in flight on return.
  template <int kSize>
  __device__ __forceinline__ void read_state(float (&read)[kReadCols / 2], FragmentA (&x)[kSize], uint32_t x_tile) {
    Engine::fence();
    Engine::start(read);
#pragma unroll
    for (int part = 0; part < kStateParts; ++part) {
#pragma unroll(kUnrollSteps)
      for (int k = 0; k < kSteps; ++k) {
        const uint32_t tile = state_tiles + part * StateTile::kBytes;
        Engine::template gemm_kn<kReadCols, StateTile>(read, x_fragment(x, k, x_tile),
                                                       Engine::operand(tile, state_column0()), 16 * k, part + k != 0);
      }
    }
  }

  // o, extra = decayed (what was read + constant * column sums, count): what earlier chunks contribute.
  __device__ __forceinline__ void finish_read(float (&o)[kCols / 2], float (&extra)[4],
                                              const float (&read)[kExtraInState ? kReadCols / 2 : 1], float first_count,
                                              const float (&along)[2], const float (&row_factor)[2]) {
#pragma unroll
    for (int i = 0; i < kCols / 2; ++i) {
      if constexpr (kExtraInState) o[i] = read[i];
      if (!kReverse) o[i] *= args.b;
    }
    if (with_column_sums()) {
      const float* sums = &shared_at<float>(shared + Shared::kColumnSums);
      float constant[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) constant[i] = kReverse ? 1.f : kRowConstant ? -args.b * along[i] : args.a;
#pragma unroll
      for (int i = 0; i < kCols / 2; ++i) o[i] += constant[i / 2 % 2] * sums[state_column(i)];
    }
    if (with_extra()) {
      const float constant = t == 0 ? (kReverse ? first_count : args.a * first_count) : 0.f;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if constexpr (kExtraInState) extra[i] = read[kCols / 2 + i];
        extra[i] *= read_factor();
        if (i % 2 == 0) extra[i] += constant;
        if (kDecay) extra[i] *= row_factor[i / 2];
      }
    }
    if (kDecay) {
#pragma unroll
      for (int i = 0; i < kCols / 2; ++i) o[i] *= row_factor[i / 2 % 2];
    }
  }

  // o += the part of this chunk's sources, for an engine that is not asynchronous: a few columns of scores at a time.
  template <int kSize, class Stage>
  __device__ __forceinline__ void add_sources(float (&o)[kCols / 2], float (&extra)[4], float (&weight_sums)[2],
                                              FragmentA (&x)[kSize], const Stage& stage, const float (&along)[2],
                                              int valid) {
    constexpr int kScores = Engine::kScoreColumns;
#pragma unroll 1
    for (int first = 0; first < kChunk; first += kScores) {
      float p[kScores / 2];
      Engine::start(p);
#pragma unroll 1
      for (int k = 0; k < kSteps; ++k) {
        const uint32_t sources = stage.y + first * XTile::kRowBytes;
        Engine::template gemm_nk<kScores, XTile>(p, x_fragment(x, k, stage.x), sources, 16 * k, true);
      }
#pragma unroll
      for (int k = 0; k < kScores / 16; ++k) {
        const FragmentA weights = weigh(p, k, first + 16 * k, weight_sums, along, valid);
        if (kReverse && with_extra()) Engine::mma(extra, weights, extra_column(first / 16 + k));
        Engine::template gemm_kn<kCols, ZTile>(o, weights, stage.z, first + 16 * k, true);
      }
    }
  }

  // Columns 16k .. 16k+15 of p, the scores of sources source .. source+15 -> masked, decayed weights as a fragment.
  // weight_sums: this thread's part of the sums of its two rows.
  template <int kSize>
  __device__ __forceinline__ FragmentA weigh(const float (&p)[kSize], int k, int source, float (&weight_sums)[2],
                                             const float (&along)[2], int valid) {
    float v[8] = {0.f, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f};
    const int first_row = 16 * warp;
    if (kReverse ? source >= first_row : source <= first_row) {  // else all of them are on the wrong side of these rows
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int row = first_row + g + i / 2 % 2 * 8, column = source + 2 * t + i / 4 * 8 + i % 2;
        float weight = p[8 * k + i];
        if (kReverse) weight = token_array(kScoreFactor)[column] * weight + token_array(kScoreOffset)[column];
        else if (kRowConstant) weight = args.b * (weight - along[i / 2 % 2]);
        else weight = args.b * weight + args.a;
        if (kDecay) weight *= exp2f(token_array(kLogDecay)[row] - token_array(kLogDecay)[column]);
        v[i] = weight;
      }
      if (source == first_row || valid < kChunk) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const int row = first_row + g + i / 2 % 2 * 8, column = source + 2 * t + i / 4 * 8 + i % 2;
          if (kReverse ? column < row || column >= valid : column > row) v[i] = 0.f;
        }
      }
      if (kExtra && !kReverse) {
#pragma unroll
        for (int i = 0; i < 8; ++i) weight_sums[i / 2 % 2] += v[i];
      }
    }
    ptx::keep(v);  // the numbers of sixteen columns at a time
    return Engine::pack_a(v);
  }

  // Fragment B of the extra column for tokens 16k .. 16k+15, in two parts.
  __device__ __forceinline__ FragmentB extra_column(int k) {
    float part[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (kReverse) {
        const float value = token_array(kExtraValue)[16 * k + 2 * t + i / 2 * 8 + i % 2], high = Engine::round(value);
        part[i] = g == 0 ? high : g == 1 ? value - high : 0.f;
      } else {
        part[i] = g == 0 ? 1.f : 0.f;
      }
    }
    return Engine::pack_b(part);
  }

  // Operand B whose first column is one: row 0 of eight.
  __device__ __forceinline__ void write_ones() {
    for (int i = threadIdx.x % kWarpgroupThreads; i < 8 * kChunk / 2; i += kWarpgroupThreads) {
      const int row = i / (kChunk / 2), column = i % (kChunk / 2) * 2;
      shared_at<uint32_t>(shared + Shared::kOnes + OnesTile::offset(row, column)) = row == 0 ? pack_bf16(1.f, 1.f) : 0;
    }
    publish_to_engine();
    ptx::named_barrier_sync(barrier, kWarpgroupThreads);
  }
  // Columns behind the state's own: two take the row sums, the others stay zero.
  __device__ __forceinline__ void clear_extra_columns() {
    for (int i = threadIdx.x % kWarpgroupThreads; i < kStateParts * kRows; i += kWarpgroupThreads) {
      const uint32_t tile = state_tiles + i / kRows * StateTile::kBytes;
      shared_at<float4>(tile + StateTile::offset(i % kRows, kCols)) = make_float4(0.f, 0.f, 0.f, 0.f);
    }
    publish_to_engine();
  }

  __device__ __forceinline__ void decay_state(float factor) {
#pragma unroll
    for (int m = 0; m < kStateTiles; ++m) {
#pragma unroll
      for (int i = 0; i < kCols / 2; ++i) state[m][i] *= factor;
#pragma unroll
      for (int i = 0; i < 4; ++i) row_sums[m][i] *= factor;
    }
#pragma unroll
    for (int n = 0; n < kCols / 32; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) column_sums[n][i] *= factor;
    }
    count *= factor;
  }

  // state += y^T z and the sums beside it. In flight on return, for an asynchronous engine; y is what it reads.
  __device__ __forceinline__ void update_state(FragmentA (&y)[kUpdateFragments][kStateTiles],
                                               uint32_t y_tile, uint32_t z_tile, typename Engine::Operand z_operand,
                                               int valid) {
    const float* factors = token_array(kStateFactor);
    const bool is_scaled = kDecay || kReverse || (!Engine::kZeroFilled && valid < kChunk);
    if (with_column_sums()) sum_columns(z_tile);
#pragma unroll(kUnrollChunk)
    for (int k = 0; k < kChunk / 16; ++k) {
      if (kUpdateParts > 1 && k == kUpdateFragments) {  // the registers of the first half are free again
        Engine::commit();
        Engine::template wait<0>();
        keep_update(y);
      }
      FragmentA(&own)[kStateTiles] = y[k % kUpdateFragments];
#pragma unroll
      for (int m = 0; m < kStateTiles; ++m) {
        Engine::template load_a_transposed<XTile>(own[m], y_tile, 64 * m + 16 * warp, 16 * k);
      }
      if (is_scaled) {
        const float factor[4] = {factors[16 * k + 2 * t], factors[16 * k + 2 * t + 1], factors[16 * k + 2 * t + 8],
                                 factors[16 * k + 2 * t + 9]};
#pragma unroll
        for (int m = 0; m < kStateTiles; ++m) Engine::scale_columns(own[m], factor);
      }
      if (!kOnesTile && with_extra()) {
#pragma unroll
        for (int m = 0; m < kStateTiles; ++m) Engine::mma(row_sums[m], own[m], extra_column(k));
      }
      if constexpr (!Engine::kIsAsync) {
#pragma unroll
        for (int m = 0; m < kStateTiles; ++m) {
          Engine::template gemm_kn<kCols, ZTile>(state[m], own[m], z_operand, 16 * k, true);
        }
      } else if ((k + 1) % kUpdateFragments == 0) {
        Engine::fence();
#pragma unroll
        for (int part = k + 1 - kUpdateFragments; part <= k; ++part) {
#pragma unroll
          for (int m = 0; m < kStateTiles; ++m) {
            Engine::template gemm_kn<kCols, ZTile>(state[m], y[part % kUpdateFragments][m], z_operand, 16 * part, true);
          }
        }
      }
    }
    if constexpr (kOnesTile) {
      const typename Engine::Operand ones = Engine::operand(shared + Shared::kOnes, 0);
#pragma unroll
      for (int k = 0; k < kChunk / 16; ++k) {
#pragma unroll
        for (int m = 0; m < kStateTiles; ++m) {
          Engine::template gemm_nk<8, OnesTile>(row_sums[m], y[k][m], ones, 16 * k, true);
        }
      }
    }
  }

  // column_sums += sum of z, weighted; the weights are rows 0 and 1 of a fragment, in two rounded parts.
  __device__ __forceinline__ void sum_columns(uint32_t z_tile) {
    const float* offsets = token_array(kStateOffset);
#pragma unroll
    for (int k = 0; k < kChunk / 32; ++k) {
      FragmentA rows[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float v[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const float value = offsets[32 * k + 16 * half + 2 * t + i / 4 * 8 + i % 2], high = Engine::round(value);
          v[i] = i / 2 % 2 == 1 ? 0.f : g == 0 ? high : g == 1 ? value - high : 0.f;
        }
        rows[half] = Engine::pack_a(v);
      }
#pragma unroll
      for (int n = 0; n < kCols / 32; ++n) {
        FragmentB columns[2];
        Engine::template load_b_pair<ZTile>(columns, z_tile, 32 * k, tile_column() + kOwnColumns * warp + 8 * n);
        Engine::mma(column_sums[n], rows[0], columns[0]);
        Engine::mma(column_sums[n], rows[1], columns[1]);
      }
    }
    if (kExtra) count += added_count;
  }

  // Rows beyond the segment belong to others and may hold anything: zero times NaN must not reach a product.
  __device__ __forceinline__ void clear_rows(uint32_t z_tile, int valid) {
    constexpr int kUnits = kCols / 8;  // of 16 bytes in a row of this warpgroup
    for (int i = threadIdx.x % kWarpgroupThreads + valid * kUnits; i < kChunk * kUnits; i += kWarpgroupThreads) {
      const uint32_t offset = ZTile::offset(i / kUnits, tile_column() + i % kUnits * 8);
      shared_at<float4>(z_tile + offset) = make_float4(0.f, 0.f, 0.f, 0.f);
    }
    publish_to_engine();
    ptx::named_barrier_sync(barrier, kWarpgroupThreads);
  }

  __device__ __forceinline__ void write_output(const float (&o)[kCols / 2], const float (&extra)[4],
                                               const float (&weight_sums)[2], const float (&row_den)[2], int64_t first,
                                               int valid) {
    float row_scale[2] = {1.f, 1.f}, extra_sum[2] = {0.f, 0.f};
    const int first_row = hidden(16 * warp + g), batch = hidden(segment.batch), head = hidden(this->head);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = first_row + 8 * i;
      if (kExtra && with_extra()) {
        float value = extra[2 * i] + extra[2 * i + 1] + weight_sums[i];
        value += __shfl_xor_sync(0xffffffffu, value, 1);
        value += __shfl_xor_sync(0xffffffffu, value, 2);
        extra_sum[i] = value;
        if (kKind == ScanKind::kOutput) {
          row_scale[i] = 1.f / guarded(value);
          const int64_t at = (static_cast<int64_t>(batch) * args.num_heads + head) * args.tokens + first + row;
          if (column0 == 0 && t == 0 && row < valid) args.den[at] = value;
        }
      }
      if (kRowConstant && args.normalize) row_scale[i] = 1.f / guarded(row_den[i]);
    }
    if constexpr (kKind == ScanKind::kValueGrad) {
      if (args.extra_out != nullptr) write_column_terms(o, extra_sum, first, valid);
    }
    if constexpr (kKind == ScanKind::kOutput) {
      if (args.residual != nullptr) {
        write_residual(o, row_scale, segment.first_chunk + (first - segment.begin) / kChunk);
      }
    }
    Element* base = static_cast<Element*>(args.out.data) + batch * args.out.batch_stride +
                    head * args.out.head_stride + first * args.out.token_stride + column0;
    const int columns = args.out.dim - column0 < kCols ? args.out.dim - column0 : kCols;
    write_rows(static_cast<Element*>(base), o, row_scale, valid, columns);
  }

  // v . dv + dvone of every row, this warpgroup's columns of it: what a token loses of dg as a key (decay_gradient.cu).
  // The two nearly cancel. Both come from the same rounded weights, and must meet before dv is rounded.
  __device__ __forceinline__ void write_column_terms(const float (&o)[kCols / 2], const float (&extra_sum)[2], int64_t first,
                                                     int valid) {
    const int units = residual_units(args.value_dim), unit = column0 / kResidualColumns;
    const int64_t rows = static_cast<int64_t>(args.cu_seqlens == nullptr ? args.num_sequences : 1) * args.num_kv_heads;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t token = first + hidden(16 * warp + g + 8 * i);
      const bool is_inside = token < first + valid;
      const Element* v = static_cast<const Element*>(args.o.data) + segment.batch * args.o.batch_stride +
                         token * args.o.token_stride + head * args.o.head_stride;
      float sum = 0.f;
#pragma unroll
      for (int e = 2 * i; e < kCols / 2; e += e % 2 == 0 ? 1 : 3) {
        const int column = column0 + state_column(e);
        if (is_inside && column < args.value_dim) sum += static_cast<float>(v[column]) * o[e];
      }
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      if (column0 == 0) sum += extra_sum[i];
      if (t != 0 || !is_inside) continue;
#pragma unroll
      for (int covered = 0; covered < kCols / kResidualColumns; ++covered) {
        if (unit + covered >= units) continue;
        const int64_t row = (unit + covered) * rows + static_cast<int64_t>(segment.batch) * args.num_kv_heads + head;
        args.extra_out[row * args.tokens + token] = covered == 0 ? sum : 0.f;
      }
    }
  }

  // This warp's 16 rows; 16-bit results pass through shared memory, so that a row leaves in one piece.
  __device__ __forceinline__ void write_rows(__nv_bfloat16* base, const float (&o)[kCols / 2],
                                             const float (&row_scale)[2], int valid, int columns) {
    const uint32_t tile = shared + Shared::kOut + warp * OutTile::kBytes;
    const uint32_t corner = tile + OutTile::offset(g, 2 * t);
    const int lane = hidden(this->lane);
    __syncwarp();  // the rows of the chunk before have left
#pragma unroll
    for (int i = 0; i < kCols / 2; i += 2) {
      const uint32_t address = OutTile::shift(corner, i / 4 * 8) + i / 2 % 2 * 8 * OutTile::kRowBytes;
      shared_at<uint32_t>(address) = pack_bf16(o[i] * row_scale[i / 2 % 2], o[i + 1] * row_scale[i / 2 % 2]);
    }
    __syncwarp();
    const bool is_aligned = (reinterpret_cast<uintptr_t>(base) | args.out.token_stride * 2) % 16 == 0 && columns % 8 == 0;
    constexpr int kUnits = kCols / 8;
    if (is_aligned) {
#pragma unroll
      for (int i = 0; i < 16 * kUnits; i += 32) {
        const int row = (i + lane) / kUnits, unit = (i + lane) % kUnits, token = 16 * warp + row;
        if (token < valid && unit * 8 < columns) {
          *reinterpret_cast<uint4*>(base + token * args.out.token_stride + unit * 8) =
              shared_at<uint4>(tile + OutTile::offset(row, unit * 8));
        }
      }
    } else {
#pragma unroll 1
      for (int i = lane; i < 16 * kCols; i += 32) {
        const int row = i / kCols, column = i % kCols, token = 16 * warp + row;
        if (token < valid && column < columns) {
          base[token * args.out.token_stride + column] = shared_at<__nv_bfloat16>(tile + OutTile::offset(row, column));
        }
      }
    }
  }
  template <class Wide>
  __device__ __forceinline__ void write_rows(Wide* base, const float (&o)[kCols / 2], const float (&row_scale)[2],
                                             int valid, int columns) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int token = hidden(16 * warp + g + 8 * half);
      if (token >= valid) continue;
      Wide* row = base + token * args.out.token_stride;
#pragma unroll
      for (int i = 0; i < kCols / 2; ++i) {
        if (i / 2 % 2 == half && state_column(i) < columns) row[state_column(i)] = static_cast<Wide>(o[i] * row_scale[half]);
      }
    }
  }

  // Tokens behind the last packed sequence belong to none: their results are zero.
  __device__ __forceinline__ void clear_tail() {
    if (args.cu_seqlens == nullptr || segment.sequence != args.num_sequences - 1 || !segment.is_last) return;
    const int columns = args.out.dim - column0 < kCols ? args.out.dim - column0 : kCols;
    Element* base = static_cast<Element*>(args.out.data) + head * args.out.head_stride + column0;
    for (int64_t token = segment.end + warp; token < args.tokens; token += 4) {
      for (int c = lane; c < columns; c += 32) base[token * args.out.token_stride + c] = static_cast<Element>(0.f);
    }
  }

  // This warpgroup's first column within tiles that it shares.
  __device__ __forceinline__ int tile_column() const { return kSharedCols > kCols ? column0 % kSharedCols : 0; }
  __device__ __forceinline__ int state_column0() const { return kOwnsStateTile ? 0 : tile_column(); }
  // Where accumulator i of state tile m, or of an output, lies.
  __device__ __forceinline__ int state_row(int m, int i) const { return 64 * m + 16 * warp + g + i / 2 % 2 * 8; }
  __device__ __forceinline__ int state_column(int i) const { return i / 4 * 8 + 2 * t + i % 2; }
  __device__ __forceinline__ int own_column(int n, int i) const { return kOwnColumns * warp + 8 * n + 2 * t + i % 2; }
  __device__ __forceinline__ int state_offset(int row, int column, int pitch) const {
    return kTransposed ? column * pitch + row : row * pitch + column;
  }
  // Boundaries are counted over all sequences: one less than slots in each.
  __device__ __forceinline__ int boundary(bool before) const { return segment.slot - segment.sequence - (before ? 1 : 0); }
  __device__ __forceinline__ int64_t entry_index(int item) const {
    return static_cast<int64_t>(item) * args.num_kv_heads + kv_head;
  }

  float added_count = 0.f;
};

}  // namespace hf_linattn

#endif  // HF_LINATTN_SCAN_WARPGROUP_CUH_
