// What four warps do with the chunks of one segment: the arithmetic of a scan (scan.h), for any engine.
//
// A warpgroup owns kCols columns of z, of the output and of the state [kRows, kCols], which stays in registers as
// accumulators. Of every chunk of 64 tokens warp w owns output rows 16w .. 16w+15; of every 64 rows of the state it owns
// the same sixteen. The state is rounded to an operand in shared memory once a chunk; its accumulators never are.
//
// ScanWarpgroup has the steps. scan_sm80.cuh puts them in one order for one warpgroup; scan_sm90.cuh gives those of the
// rows and those of the state to different warpgroups.
#ifndef HF_LINATTN_SCAN_WARPGROUP_CUH_
#define HF_LINATTN_SCAN_WARPGROUP_CUH_

#include "engine_mma.cuh"
#include "scan.h"

namespace hf_linattn {

constexpr int kWarpgroupThreads = 128;

// Where the tiles of a chunk lie in shared memory.
struct StageTiles {
  uint32_t x, y, z, q;
};

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kSmallestFloat = 1.1754944e-38f;
constexpr float kSmallestLogDecay = -120.f;  // e^-120 is 0 in float32; -inf would leave NaN in differences

// Where sequence n begins, counted over all of them. Args here and below: ScanArgs, or what has its members of that name.
template <class Args>
__device__ __forceinline__ int64_t sequence_bound(const Args& args, int n) {
  if (args.cu_seqlens == nullptr) return n * args.tokens;
  return args.cu_seqlens_is_int64 ? static_cast<const int64_t*>(args.cu_seqlens)[n]
                                  : static_cast<const int32_t*>(args.cu_seqlens)[n];
}

__device__ __forceinline__ int chunk_count(const Segment& segment) {
  return static_cast<int>((segment.end - segment.begin + kChunk - 1) / kChunk);
}

// The first slot of sequence n, of those `tokens` long of which dense sequences have `per_sequence`.
template <class Args>
__device__ __forceinline__ int first_slot(const Args& args, int n, int64_t tokens, int per_sequence) {
  return args.cu_seqlens == nullptr ? n * per_sequence : static_cast<int>(sequence_bound(args, n) / tokens) + n;
}

// Slot s of the grid -> its tokens. Dense: every sequence has the same number of slots. Packed: sequence n owns the slots
// from cu_seqlens[n] / segment_tokens + n, enough for its segments whatever the lengths.
template <class Args>
__device__ __forceinline__ Segment find_segment(const Args& args, int slot) {
  Segment segment;
  int64_t start = 0, length = args.tokens;
  int index;
  segment.slot = slot;
  if (args.cu_seqlens == nullptr) {
    const int per_sequence = args.num_slots / args.num_sequences;
    segment.sequence = segment.batch = slot / per_sequence;
    index = slot % per_sequence;
  } else {
    int low = 0, high = args.num_sequences - 1;  // the last n whose first slot is not beyond this one
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (sequence_bound(args, middle) / args.segment_tokens + middle <= slot) low = middle;
      else high = middle - 1;
    }
    segment.sequence = low;
    segment.batch = 0;
    start = sequence_bound(args, low);
    length = sequence_bound(args, low + 1) - start;
    index = slot - first_slot(args, low, args.segment_tokens, 0);
  }
  const int64_t count = length > 0 ? (length + args.segment_tokens - 1) / args.segment_tokens : 1;
  segment.index = index;
  segment.count = static_cast<int>(count);
  segment.exists = index < count;
  const int64_t offset = index * args.segment_tokens;
  segment.begin = start + offset;
  segment.end = start + (offset + args.segment_tokens < length ? offset + args.segment_tokens : length);
  return segment;
}

// The rows of a segment that are wanted. Those before args.first_query see no source outside of their window, so that the
// rest starts from the same state.
__device__ __forceinline__ Segment wanted_rows(const ScanArgs& args, Segment segment) {
  const int64_t start = args.cu_seqlens == nullptr ? 0 : sequence_bound(args, segment.sequence);
  segment.begin = min(max(segment.begin, start + args.first_query), segment.end);
  return segment;
}

// Which of the 64 tokens of a tile are there: begin .. end-1.
struct TileTokens {
  int begin, end;
  __device__ __forceinline__ bool is_whole() const { return begin == 0 && end == kChunk; }
  __device__ __forceinline__ bool has(int token) const { return token >= begin && token < end; }
};

// Of the 64 tokens from `first` on, those before `end`.
__device__ __forceinline__ TileTokens tokens_until(int64_t first, int64_t end) {
  return {0, end - first < kChunk ? static_cast<int>(end - first) : kChunk};
}

// x, which the compiler takes for a new number: what is computed from it stays where it is used. Otherwise the addresses
// of everything a chunk writes are formed before its first product, and occupy registers until the end.
__device__ __forceinline__ int hidden(int x) {
  uint32_t value[1] = {static_cast<uint32_t>(x)};
  ptx::keep(value);
  return static_cast<int>(value[0]);
}

__device__ __forceinline__ float guarded(float den) { return fabsf(den) < kDenominatorEps ? kDenominatorEps : den; }

// Whether this segment has work. Of state kinds those do not that no boundary between segments waits for.
template <ScanKind kKind, Reach kReach>
__device__ __forceinline__ bool is_wanted(const ScanArgs& args, const Segment& segment) {
  if (!forms_state_only(kKind) || kReach == Reach::kAll || !segment.exists) return segment.exists;
  if (is_reverse(kKind)) return segment.index >= args.pieces;
  return segment.index < (segment.count - 1) / args.pieces * args.pieces;
}

// The n-th entry of a state member, or null.
__device__ __forceinline__ float* entry(float* member, int64_t n, int64_t size) {
  return member == nullptr ? nullptr : member + n * size;
}

// kXParts: x is in shared memory as so many equal parts of its columns, one after the other.
// kPaired: dk and dv of the same CTA, which has the state of dv; dk reads it transposed.
template <class Engine, ScanKind kKind, Reach kReach, bool kDecay, int kRows, int kCols, int kXParts = 1, bool kPaired = false>
struct ScanWarpgroup {
  using EngineType = Engine;
  using Element = typename Engine::Element;
  using OperandElement = typename Engine::OperandElement;
  using FragmentA = typename Engine::FragmentA;
  using FragmentB = typename Engine::FragmentB;
  using XTile = typename Engine::template Tile<kChunk, kRows>;  // of x whole, and of y
  using XPartTile = typename Engine::template Tile<kChunk, kRows / kXParts>;
  using ZTile = typename Engine::template Tile<kChunk, kCols>;
  using StateTile = typename Engine::template Tile<kRows, kCols>;
  using OutTile = typename Engine::template Tile<16, kCols>;

  static constexpr ScanKind kScanKind = kKind;
  static constexpr bool kCausal = kReach != Reach::kAll, kWindowed = kReach == Reach::kWindow;
  static constexpr bool kDecays = kDecay;
  static constexpr bool kStateOnly = forms_state_only(kKind);
  static constexpr bool kReverse = is_reverse(kKind);
  static constexpr bool kTransposed = is_transposed(kKind);
  static constexpr bool kExtra = has_extra_column(kKind);
  static constexpr bool kIsPaired = kPaired, kReadsTransposed = kPaired && kTransposed;
  static constexpr bool kHasOutput = !kStateOnly;
  static constexpr bool kHasSources = kCausal || kStateOnly;
  // The scan adds the softmax of the keys in the window, or of the queries that see these keys.
  static constexpr bool kHasWindow = kWindowed && (kKind == ScanKind::kOutput || kKind == ScanKind::kValueGrad);
  static constexpr bool kRowConstant = kKind == ScanKind::kQueryGrad;
  // dq = b (u - (do.o) z) / den with u = sum w (do.v) k, z = sum w k, and do.o = (q.u b + a sum w (do.v)) / den: the
  // asynchronous kernels form both sums, then do.o, then dq. The others run twice: for do.o, then with it in the weights.
  // With a window do.o has more in it than these sums, and is given.
  static constexpr bool kProjects = kRowConstant && Engine::kIsAsync && !kWindowed;
  static constexpr int kKeyParts = kDecay ? 2 : 1;  // of the weights in z, whose error would not cancel
  // dq is a difference of two sums over all keys that nearly cancel: its state operand keeps twice the bits.
  static constexpr int kStateParts = kRowConstant && Engine::kIsRounding ? 2 : 1;
  // Tensor cores truncate where they accumulate, a bias that grows with the number of chunks: the products of a chunk are
  // summed by themselves and then added, where registers allow. dk and dq are small differences of what the state and the
  // sums beside it give: either both have the bias, or neither.
  // State kinds see one segment only.
  static constexpr bool kHasRegisters = kWindowed ? kRowConstant : kKind == ScanKind::kOutput || kKind == ScanKind::kKeyGrad;
  static constexpr bool kSumsApart = Engine::kTruncates && !(Engine::kIsAsync && kRows > 64 && !kHasRegisters);
  static constexpr int kRowsPadded = kRows, kColumns = kCols, kPartsOfX = kXParts;
  static constexpr int kStateTiles = kRows / 64;
  static constexpr int kSteps = kRows / 16, kPartSteps = kSteps / kXParts;
  // The state of dq has the sum of its weights where the scan knows do.o before it reads the state.
  static constexpr bool kCountsTokens = !kRowConstant || kWindowed;
  // An asynchronous engine has all fragments of a chunk in registers, where no copy can change them, and only unrolled
  // loops can name them; the others save the registers.
  static constexpr int kXFragments = Engine::kIsAsync ? kSteps : 1;
  static constexpr int kUnrollSteps = kXFragments;
  static constexpr int kOwnColumns = kCols / 4;  // of the column sums, by warp

  // There are registers for numbers that stay the same over all chunks; elsewhere each chunk forms them anew.
  static constexpr bool kHasRoom = Engine::kIsAsync && kRows == 64 && !kDecay && !kWindowed;
  template <class T>
  static __device__ __forceinline__ T formed_anew(T x) {
    return kHasRoom ? x : hidden(x);
  }

  // Per-token numbers of the chunk in work; every warp keeps its own copy, so that no barrier is needed. Rows need the
  // first three, the state the others.
  enum TokenArray { kLogDecay, kScoreFactor, kScoreOffset, kStateFactor, kStateOffset, kExtraValue, kTokenArrays };
  static constexpr int kTokenArrayBytes = kChunk * 4, kFirstStateArray = kStateFactor, kRowArrays = kFirstStateArray;
  static constexpr int kOperandBytes = kHasOutput ? kStateParts * StateTile::kBytes : 0;
  // Beside the operand: row sums in two parts, each an operand; column sums; the extra column's own sum.
  static constexpr int kRowSums = 0, kColumnSums = 2 * kRows * sizeof(OperandElement);
  static constexpr int kCount = kColumnSums + kCols * 4, kSumBytes = kCount + 16;
  struct SharedPlaces {
    uint32_t operand, sums;  // of the state
    uint32_t tokens, out;    // of this warp: token arrays, and OutTile
  };

  static constexpr bool kTokenInputs = kDecay || kReverse || kRowConstant;
  struct TokenInputs {  // of tokens 2 lane and 2 lane + 1; row_den of this thread's two rows
    float g[2], den[2], along[2], row_den[2], row_along[2];
  };

  // What is known of this thread's two rows (16 warp + g and 8 further) of the chunk in work.
  struct RowSums {
    float o[kCols / 2];      // the output, before it is divided
    float extra[4];          // the extra column of the output, spread over two columns of a product
    float weights[2];        // sums of weights, this thread's part
    float factor[2], den[2], along[2];  // decay since the chunk began; the denominator and do . o of the row
    float keys[kProjects ? kCols / 2 : 1];  // z of the row
    // With a window o and sum, this thread's part of the sum of weights, are relative to 2^unit; peak: the largest log2 of a
    // weight, for which the sum of all far keys counts as one.
    float unit[2], peak[2], sum[2];
  };

  const ScanArgs& args;
  const Segment segment;
  const int head, kv_head, column0;  // head: of x and out
  SharedPlaces places;
  const int lane, warp, g, t;

  float state[kStateTiles][kCols / 2];
  float row_sums[kStateTiles][4];           // sum of y over the extra column; spread over two columns of the product
  float column_sums[kCols / 32][4];         // sum of z for this warp's columns; rows 0 and 1 of a product
  float count;                              // the extra column's own sum

  __device__ __forceinline__ ScanWarpgroup(const ScanArgs& args, const Segment& segment, int head, int column0,
                                           const SharedPlaces& places)
      : args(args),
        segment(segment),
        head(head),
        kv_head(kStateOnly || kReverse ? head : head / args.group),
        column0(column0),
        places(places),
        lane(threadIdx.x % 32),
        warp(threadIdx.x / 32 % 4),
        g(threadIdx.x % 32 / 4),
        t(threadIdx.x % 4) {}

  // The asynchronous dk and dv of a window have no register left for `lane`.
  __device__ __forceinline__ int current_lane() const {
    return kWindowed && Engine::kIsAsync && kReverse ? ptx::lane_id() : lane;
  }
  __device__ __forceinline__ bool with_column_sums() const {
    return kTransposed ? args.normalize != 0 : args.a != 0.f;
  }
  // The extra column is added to the state. dv only carries it, to the state that it leaves and to dk.
  __device__ __forceinline__ bool with_extra() const {
    const bool is_wanted = kRowConstant                       ? args.a != 0.f && (kProjects || args.extra_out != nullptr)
                           : kKind == ScanKind::kValueGrad ? kPaired || args.last.key_sum != nullptr
                                                           : true;
    return kExtra && args.normalize && is_wanted;
  }
  // ... and read with it.
  static constexpr bool kReadsExtra = kKind == ScanKind::kOutput || kRowConstant;
  __device__ __forceinline__ bool reads_extra() const { return kReadsExtra && with_extra(); }
  __device__ __forceinline__ float* token_array(int which) const {
    return &shared_at<float>(places.tokens + which * kTokenArrayBytes);
  }
  // Heads whose queries are sources.
  static __device__ __forceinline__ int members(const ScanArgs& args) { return kHasSources && kReverse ? args.group : 1; }
  __device__ __forceinline__ int members() const { return members(args); }
  __device__ __forceinline__ int source_head(int member) const { return kReverse ? kv_head * args.group + member : kv_head; }
  // The chunk of a step, its first token and how many it has. A state without decay adds up in any order: last come the chunks
  // that the scan after it begins with, which it then finds in the second-level cache.
  static constexpr bool kMeetsScan = kStateOnly && kCausal && !kDecay, kFromTheEnd = kReverse != kMeetsScan;
  static __device__ __forceinline__ int chunk_at(int step, int chunks) { return kFromTheEnd ? chunks - 1 - step : step; }
  __device__ __forceinline__ int64_t first_token(int chunk) const {
    return segment.begin + static_cast<int64_t>(chunk) * kChunk;
  }
  __device__ __forceinline__ int valid_tokens(int64_t first) const {
    return segment.end - first < kChunk ? static_cast<int>(segment.end - first) : kChunk;
  }
  // The first source of tile `tile` of those that the rows from `first` on see; tile 0 is where the window ends.
  __device__ __forceinline__ int64_t source_token(int64_t first, int tile = 0) const {
    if (!kWindowed) return first;
    const int64_t away = args.window - kChunk * tile;
    return kReverse ? first + away : first - away;
  }
  // The sequence's first token, or what follows its last.
  __device__ __forceinline__ int sequence_end(bool at_end) const {
    if (args.cu_seqlens == nullptr) return at_end ? static_cast<int>(args.tokens) : 0;
    return static_cast<int>(sequence_bound(args, segment.sequence + at_end));
  }
  // Which of the tokens from `source` on are sources. With a window a row has fewer than 2^31 tokens.
  __device__ __forceinline__ TileTokens source_tokens(int64_t source) const {
    if (!kWindowed) return {0, valid_tokens(source)};
    const int from = static_cast<int>(source);
    return {min(max(sequence_end(false) - from, 0), kChunk), min(max(sequence_end(true) - from, 0), kChunk)};
  }
  // Of tile 0, those that are no further on than the last row: what the state of a sequence ends with.
  __device__ __forceinline__ TileTokens far_tokens(int64_t first) const {
    TileTokens tokens = source_tokens(source_token(first));
    const int valid = valid_tokens(first);
    if (kWindowed && tokens.end > valid) tokens.end = valid;
    return tokens;
  }

  // First state -> registers: the entry of the sequence, of the boundary, or what the pieces in between add to the former.
  __device__ __forceinline__ void load_state() {
    const bool is_carried = kCausal && !kStateOnly && !(kReverse ? segment.is_last() : segment.is_first());
    const bool is_whole = is_carried && !args.is_summed;
    int added = 0, next = 0;
    if (is_carried) {
      const int64_t piece = args.segment_tokens / args.pieces;
      const int own = boundary(!kReverse);
      const int after = static_cast<int>((args.tokens + piece - 1) / piece) - (segment.index + 1) * args.pieces;
      added = is_whole ? 1 : kReverse ? after : segment.index * args.pieces;
      next = kReverse ? own + added - 1 : own - added + 1;
    }
    clear_state();
    if (!kStateOnly && !is_whole) add_to_state(args.first, entry_index(segment.sequence), 1.f);
    const int64_t step = kReverse ? -args.num_kv_heads : args.num_kv_heads;
    int64_t index = entry_index(next);
    if constexpr (kAddsEntries) {
      if (args.value_dim % 4 == 0) {
        if (added > 0) add_entries(args.carried, index, step, added, !is_whole);
        return;
      }
    }
#pragma unroll 1
    for (; added > 0; --added, index += step) {
      add_to_state(args.carried, index, kDecay && !is_whole ? expf(args.carried_log_decay[index]) : 1.f);
    }
  }
  __device__ __forceinline__ void clear_state() {
#pragma unroll
    for (int m = 0; m < kStateTiles; ++m) {
#pragma unroll
      for (int i = 0; i < kCols / 2; ++i) state[m][i] = 0.f;
#pragma unroll
      for (int i = 0; i < 4; ++i) row_sums[m][i] = 0.f;
    }
#pragma unroll
    for (int n = 0; n < kCols / 32; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) column_sums[n][i] = 0.f;
    }
    count = 0.f;
  }
  // state = factor state + the entry.
  __device__ __forceinline__ void add_to_state(const hf_linattn_state& from, int64_t index, float factor) {
    const float* kv = entry(from.kv, index, int64_t{args.feature_dim} * args.value_dim);
    const float* key_sum = entry(from.key_sum, index, args.feature_dim);
    const float* value_sum = entry(from.value_sum, index, args.value_dim);
    const float* weight_sum = entry(from.weight_sum, index, 1);
    const int row_count = args.y.dim, column_count = args.z.dim, pitch = hidden(args.value_dim);
    if (kDecay) decay_state(factor);
#pragma unroll
    for (int m = 0; m < kStateTiles; ++m) {
#pragma unroll
      for (int i = 0; i < kCols / 2; ++i) {
        const int row = state_row(m, i), column = column0 + state_column(i);
        if (kv != nullptr && row < row_count && column < column_count) state[m][i] += kv[state_offset(row, column, pitch)];
        if (i % 16 == 15) ptx::keep(state[m]);  // few addresses at a time
      }
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        const int row = state_row(m, i);
        const float* sums = kTransposed ? value_sum : key_sum;
        if (kExtra && sums != nullptr && t == 0 && row < row_count) row_sums[m][i] += sums[row];
      }
    }
    const float* sums = kTransposed ? key_sum : value_sum;
#pragma unroll
    for (int n = 0; n < kCols / 32; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int column = column0 + own_column(n, i);
        if (sums != nullptr && g == 0 && column < column_count) column_sums[n][i] += sums[column];
      }
    }
    if (weight_sum != nullptr) count += *weight_sum;
  }

  // state = the state, decayed, + those entries in turn: in the order in which they are stored, so that loads are of whole
  // lines and many are under way, then through the places of the operands in shared memory.
  static constexpr bool kAddsEntries = Engine::kIsAsync && kRows == 64 && kHasOutput && kCausal;
  __device__ __forceinline__ void add_entries(const hf_linattn_state& from, int64_t index, int64_t step, int entries,
                                              bool is_decayed) {
    constexpr int kAtOnce = kKind == ScanKind::kOutput || kPaired ? 3 : 2, kRowsAtOnce = kWarpgroupThreads / 16, kPieces = 64 / kRowsAtOnce;
    static_assert(!kAddsEntries || 64 * 64 * sizeof(float) <= 2 * kOperandBytes, "an entry fits into two operands");
    static_assert(!kAddsEntries || 128 * sizeof(float) <= kSumBytes, "and its sums");
    const int thread = threadIdx.x % kWarpgroupThreads, row = thread / 16, column = thread % 16 * 4;
    const int first_row = kTransposed ? column0 : 0, first_column = kTransposed ? 0 : column0;
    const bool is_inside = first_column + column < args.value_dim;
    // Of the sums along rows and columns one a thread.
    const float* sums = thread < 64 ? (kTransposed ? from.value_sum : from.key_sum) : kTransposed ? from.key_sum : from.value_sum;
    const int place = thread < 64 ? thread : column0 + thread - 64, places_there = thread < 64 ? args.y.dim : args.z.dim;
    const bool has_sum = sums != nullptr && place < places_there && (thread >= 64 || kExtra);
    float4 pieces[kPieces] = {};
    float sum = 0.f, weight = 0.f, decay = 1.f;
#pragma unroll 1
    for (; entries > 0; entries -= kAtOnce, index += kAtOnce * step) {
      float4 loaded[kAtOnce][kPieces];
      float loaded_sum[kAtOnce], loaded_weight[kAtOnce], factor[kAtOnce];
#pragma unroll
      for (int e = 0; e < kAtOnce; ++e) {
        const bool exists = e < entries;
        const int64_t at = index + e * step;
        const float* kv = from.kv + at * args.feature_dim * args.value_dim + first_column + column;
#pragma unroll
        for (int i = 0; i < kPieces; ++i) {
          const int feature = first_row + row + kRowsAtOnce * i;
          const bool is_there = exists && is_inside && feature < args.feature_dim;
          loaded[e][i] = is_there ? *reinterpret_cast<const float4*>(kv + feature * args.value_dim) : float4{};
        }
        loaded_sum[e] = exists && has_sum ? sums[at * places_there + place] : 0.f;
        loaded_weight[e] = exists && from.weight_sum != nullptr ? from.weight_sum[at] : 0.f;
        factor[e] = kDecay && exists && is_decayed ? expf(args.carried_log_decay[at]) : 1.f;
      }
#pragma unroll
      for (int e = 0; e < kAtOnce; ++e) {
        const float f = factor[e];
#pragma unroll
        for (int i = 0; i < kPieces; ++i) {
          const float4 x = pieces[i], y = loaded[e][i];
          pieces[i] = kDecay ? float4{x.x * f + y.x, x.y * f + y.y, x.z * f + y.z, x.w * f + y.w}
                             : float4{x.x + y.x, x.y + y.y, x.z + y.z, x.w + y.w};
        }
        sum = sum * f + loaded_sum[e];
        weight = weight * f + loaded_weight[e];
        decay *= f;
      }
    }
    if (kDecay) decay_state(decay);
    // A row's groups of eight columns change places, so that neither way of reading meets a bank twice.
    auto shared_place = [&](int row, int column) { return places.operand + (row * 64 + (column ^ row % 8 * 8)) * 4; };
#pragma unroll
    for (int i = 0; i < kPieces; ++i) shared_at<float4>(shared_place(row + kRowsAtOnce * i, column)) = pieces[i];
    shared_at<float>(places.sums + thread * 4) = sum;
    ptx::named_barrier_sync(1, kWarpgroupThreads);
#pragma unroll
    for (int i = 0; i < kCols / 2; ++i) {
      const int own = state_row(0, i), other = state_column(i);
      state[0][i] += shared_at<float>(kTransposed ? shared_place(other, own) : shared_place(own, other));
    }
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      if (t == 0) row_sums[0][i] += shared_at<float>(places.sums + state_row(0, i) * 4);
    }
#pragma unroll
    for (int n = 0; n < kCols / 32; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (g == 0) column_sums[n][i] += shared_at<float>(places.sums + (64 + own_column(n, i)) * 4);
      }
    }
    count += weight;
    ptx::named_barrier_sync(1, kWarpgroupThreads);
  }

  // Registers -> the entry of this segment (state kinds) or of the sequence (scans that end it).
  __device__ __forceinline__ void store_state(float log_decay) {
    if (!kStateOnly && !(kReverse ? segment.is_first() : segment.is_last())) return;
    if (kTransposed) return;  // the untransposed kinds see the same state
    const bool is_writer = kStateOnly || kReverse || head % args.group == 0;
    if (!is_writer) return;
    const hf_linattn_state& to = kStateOnly ? args.carried : args.last;
    const int64_t index = entry_index(!kStateOnly ? segment.sequence : kCausal ? boundary(kReverse) : segment.slot);
    float* kv = entry(to.kv, index, int64_t{args.feature_dim} * args.value_dim);
    float* key_sum = entry(to.key_sum, index, args.feature_dim);
    float* value_sum = entry(to.value_sum, index, args.value_dim);
    float* weight_sum = entry(to.weight_sum, index, 1);
    const int row_count = args.y.dim, column_count = args.z.dim, pitch = hidden(args.value_dim);
    const int column0 = hidden(this->column0);  // what load_state has formed of it occupies no register until now
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
            float* two = entries + state_column(i);
            const int left = column_count - column0 - state_column(i);
            if (kStateOnly && pitch % 2 == 0) {  // the workspace is aligned
              if (left > 0) *reinterpret_cast<float2*>(two) = make_float2(state[m][i], state[m][i + 1]);
            } else {
              if (left > 0) two[0] = state[m][i];
              if (left > 1) two[1] = state[m][i + 1];
            }
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

  // Registers -> operand and sums in shared memory.
  __device__ __forceinline__ void publish_state() {
#pragma unroll
    for (int part = 0; part < kStateParts; ++part) {
#pragma unroll
      for (int m = 0; m < kStateTiles; ++m) {
        Engine::template store<kCols, StateTile>(places.operand + part * StateTile::kBytes, 64 * m + 16 * warp, 0,
                                                 state[m], part);
      }
    }
    if (reads_extra()) {
      OperandElement* sums = &shared_at<OperandElement>(places.sums + kRowSums);
#pragma unroll
      for (int m = 0; m < kStateTiles; ++m) {
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
          const float sum = row_sums[m][i] + row_sums[m][i + 1], high = Engine::round(sum);
          if (t == 0) {
            sums[state_row(m, i)] = static_cast<OperandElement>(high);
            sums[kRows + state_row(m, i)] = static_cast<OperandElement>(sum - high);
          }
        }
      }
      if (warp == 0 && lane == 0) shared_at<float>(places.sums + kCount) = count;
    }
    if (kPaired && with_extra()) {  // the column sums of dk
#pragma unroll
      for (int m = 0; m < kStateTiles; ++m) {
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
          const float sum = row_sums[m][i] + row_sums[m][i + 1];
          if (t == 0) shared_at<float>(places.sums + kRowSums + 4 * state_row(m, i)) = sum;
        }
      }
    }
    if (with_column_sums()) {
      float* sums = &shared_at<float>(places.sums + kColumnSums);
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
  }

  // What this thread wrote to shared memory, an asynchronous engine may read.
  __device__ __forceinline__ void publish_to_engine() const {
#if HF_LINATTN_HAS_SM90
    if (Engine::kIsAsync) ptx::fence_proxy_async();
#endif
  }

  // With a window `den` holds the quotient itself, of one denominator for both parts.
  static __device__ __forceinline__ float inverse_den(float den) { return kWindowed ? den : ptx::reciprocal(guarded(den)); }

  // Numbers of the tokens of a chunk; all loads of a chunk are under way while the one before is worked on.
  __device__ __forceinline__ void load_tokens(TokenInputs& in, int chunk, int member) {
    const int batch = formed_anew(segment.batch), kv_head = formed_anew(this->kv_head), lane = current_lane();
    const int64_t first = segment.begin + static_cast<int64_t>(formed_anew(chunk)) * kChunk, first_source = source_token(first);
    const TileTokens inside = far_tokens(first);
    const int64_t source = (static_cast<int64_t>(batch) * args.num_heads + source_head(member)) * args.tokens;
    const bool with_den = kReverse && args.normalize;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t token = first_source + 2 * lane + i, key = kReverse ? first + 2 * lane + i : token;
      const bool is_source = inside.has(2 * lane + i), is_key = kReverse ? key < segment.end : is_source;
      in.g[i] = 0.f;
      if (kDecay && is_key && args.g != nullptr) {
        in.g[i] = args.g[batch * args.g_batch_stride + key * args.g_token_stride + kv_head * args.g_head_stride];
      }
      in.den[i] = with_den && is_source ? args.den[source + token] : 1.f;
      in.along[i] = with_den && is_source ? args.along[source + token] : 0.f;
      in.row_den[i] = 1.f;
      in.row_along[i] = 0.f;
      if (kRowConstant && args.normalize) {
        const int64_t row = first + 16 * warp + g + 8 * i;
        const int64_t at = (static_cast<int64_t>(batch) * args.num_heads + head) * args.tokens + row;
        if (row >= segment.end) continue;
        in.row_den[i] = args.den[at];
        if (!kProjects && args.along != nullptr) in.row_along[i] = args.along[at];
      }
    }
  }

  // Without decay every token of a full chunk counts the same.
  __device__ __forceinline__ bool with_token_arrays(const TileTokens& sources) const {
    return kDecay || kReverse || with_column_sums() || !sources.is_whole();
  }

  // Token numbers -> this warp's arrays, those of rows, of the state or both. Returns the log2 decay over the chunk.
  template <bool kOfRows, bool kOfState>
  __device__ __forceinline__ float publish_tokens(const TokenInputs& in, const TileTokens& sources) {
    float log_decay[2] = {0.f, 0.f}, total = 0.f;
    const int lane = current_lane();
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
      const bool is_source = sources.has(token);
      const float up_to = kReverse ? total - log_decay[i] : log_decay[i];  // decay that a row here has seen
      const float from_here = kDecay ? exp2f(total - up_to) : 1.f;
      float factor = 1.f, offset = 1.f, extra = 1.f;
      if (kReverse) {
        const float inverse = args.normalize ? inverse_den(in.den[i]) : 1.f;
        factor = args.b * inverse;
        offset = kTransposed ? -args.b * inverse * in.along[i] : args.a * inverse;
        extra = -in.along[i];
      }
      if (!is_source) factor = offset = 0.f;
      if (kOfRows && kDecay) token_array(kLogDecay)[token] = up_to;
      if (kOfRows && kReverse) {
        token_array(kScoreFactor)[token] = factor;
        token_array(kScoreOffset)[token] = offset;
      }
      if (kOfState) {
        token_array(kStateFactor)[token] = factor * from_here;
        token_array(kStateOffset)[token] = offset * from_here;
        if (kReverse && kExtra) token_array(kExtraValue)[token] = extra;
      }
      added += offset * from_here * extra;
    }
    if (kOfState && kExtra && kCountsTokens && with_column_sums()) {
#pragma unroll
      for (int distance = 16; distance > 0; distance /= 2) added += __shfl_xor_sync(0xffffffffu, added, distance);
      added_count = added;
    }
    __syncwarp();
    return total;
  }

  // After publish_tokens: nothing is added up yet.
  __device__ __forceinline__ void start_rows(RowSums& rows, const TokenInputs& in) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      rows.den[i] = in.row_den[i], rows.along[i] = in.row_along[i];
      rows.factor[i] = kDecay ? exp2f(token_array(kLogDecay)[16 * warp + g + 8 * i]) : 1.f;
      rows.weights[i] = rows.extra[2 * i] = rows.extra[2 * i + 1] = 0.f;
    }
  }

  // Columns 16k .. 16k+15 of this warp's rows of x, or of the part of x that is there.
  template <int kSize>
  __device__ __forceinline__ FragmentA& x_fragment(FragmentA (&x)[kSize], int k, uint32_t x_tile) {
    if constexpr (!Engine::kIsAsync) Engine::template load_a<XPartTile>(x[0], x_tile, 16 * warp, 16 * k);
    return x[Engine::kIsAsync ? k : 0];
  }

  // All fragments of this warp's rows of x.
  __device__ __forceinline__ void load_rows(FragmentA (&x)[kSteps], uint32_t x_tile) {
#pragma unroll
    for (int k = 0; k < kSteps; ++k) Engine::template load_a<XTile>(x[k], x_tile, 16 * warp, 16 * k);
  }

  // extra += x . row_sums: what earlier chunks contribute to the extra column. The sums enter as two
  // rounded parts, in columns 0 and 1 of the product, so that they lose nothing that matters.
  template <int kSize>
  __device__ __forceinline__ void read_row_sums(float (&extra)[4], FragmentA (&x)[kSize], uint32_t x_tile,
                                                int x_part = 0) {
    const OperandElement* sums = &shared_at<OperandElement>(places.sums + kRowSums) + g % 2 * kRows + 2 * t;
#pragma unroll(kUnrollSteps)
    for (int k = 0; k < kPartSteps; ++k) {
      const FragmentB part = Engine::load_b_column(sums + 16 * (x_part * kPartSteps + k), g < 2);
      Engine::mma(extra, x_fragment(x, k, x_tile), part);
    }
  }

  // x . state, in flight on return; later parts of x add to it.
  template <int kSize>
  __device__ __forceinline__ void read_state(float (&o)[kCols / 2], FragmentA (&x)[kSize], uint32_t x_tile,
                                             int x_part = 0) {
    Engine::fence();
    if (kXParts == 1 || x_part == 0) Engine::start(o);
#pragma unroll
    for (int part = 0; part < kStateParts; ++part) {
      const typename Engine::Operand operand = Engine::operand(places.operand + part * StateTile::kBytes);
#pragma unroll(kUnrollSteps)
      for (int k = 0; k < kPartSteps; ++k) {
        const int row = 16 * (x_part * kPartSteps + k);
        if constexpr (kReadsTransposed) {
          Engine::template gemm_nk<kCols, StateTile>(o, x_fragment(x, k, x_tile), operand, row, row != 0);
        } else {
          Engine::template gemm_kn<kCols, StateTile>(o, x_fragment(x, k, x_tile), operand, row, part + row != 0);
        }
      }
    }
  }

  // o, extra = decayed (what was read + constant * column sums, count): what earlier chunks contribute.
  __device__ __forceinline__ void finish_read(RowSums& rows) {
    float(&o)[kCols / 2] = rows.o;
    if (!kReverse && !kRowConstant && args.b != 1.f) {  // the row constant's b waits for the division
#pragma unroll
      for (int i = 0; i < kCols / 2; ++i) o[i] *= args.b;
    }
    if (!kProjects && with_column_sums()) {
      const float* sums = &shared_at<float>(places.sums + (kReadsTransposed ? kRowSums : kColumnSums));
      float constant[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) constant[i] = kReverse ? 1.f : kRowConstant ? -rows.along[i] : args.a;
#pragma unroll
      for (int i = 0; i < kCols / 2; ++i) o[i] += constant[i / 2 % 2] * sums[state_column(i)];
    }
    if (reads_extra()) {
      const float before = t == 0 && kCountsTokens ? shared_at<float>(places.sums + kCount) : 0.f;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (!kRowConstant) rows.extra[i] *= args.b;
        if (i % 2 == 0) rows.extra[i] += before * (kRowConstant ? -rows.along[i / 2] : args.a);
        if (kDecay) rows.extra[i] *= rows.factor[i / 2];
      }
    }
    if (kDecay) {
#pragma unroll
      for (int i = 0; i < kCols / 2; ++i) o[i] *= rows.factor[i / 2 % 2];
    }
  }

  // o += the part of this chunk's sources, for an engine that is not asynchronous: a few columns of scores at a time.
  template <int kSize>
  __device__ __forceinline__ void add_sources(RowSums& rows, FragmentA (&x)[kSize], const StageTiles& stage,
                                              const TileTokens& sources) {
    constexpr int kScores = Engine::kScoreColumns;
#pragma unroll 1
    for (int first = 0; first < kChunk; first += kScores) {
      float p[kScores / 2];
      Engine::start(p);
      add_scores<kScores>(p, x, stage, first, 0);
      add_weighted<kScores>(rows, p, stage, first, sources);
    }
  }

  // p += x . y for this part of x and kScores sources.
  template <int kScores, int kSize>
  __device__ __forceinline__ void add_scores(float (&p)[kScores / 2], FragmentA (&x)[kSize], const StageTiles& stage,
                                             int first, int x_part) {
#pragma unroll 1
    for (int k = 0; k < kPartSteps; ++k) {
      const uint32_t sources = stage.y + first * XTile::kRowBytes;
      const int column = 16 * (x_part * kPartSteps + k);
      Engine::template gemm_nk<kScores, XTile>(p, x_fragment(x, k, stage.x), sources, column, true);
    }
  }

  // o += z of these sources, weighed by their scores p.
  template <int kScores>
  __device__ __forceinline__ void add_weighted(RowSums& rows, const float (&p)[kScores / 2], const StageTiles& stage,
                                               int first, const TileTokens& sources) {
#pragma unroll
    for (int k = 0; k < kScores / 16; ++k) {
      const FragmentA weights = weigh(p, k, first + 16 * k, rows, sources);
      Engine::template gemm_kn<kCols, ZTile>(rows.o, weights, stage.z, first + 16 * k, true);
    }
  }

  // Columns 16k .. 16k+15 of p, the scores of sources source .. source+15 -> masked, decayed weights as a fragment.
  template <int kSize>
  __device__ __forceinline__ FragmentA weigh(const float (&p)[kSize], int k, int source, RowSums& rows,
                                             const TileTokens& sources) {
    float v[8] = {0.f, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f};
    const int first_row = 16 * warp;
    if (kReverse ? source >= first_row : source <= first_row) {  // else all of them are on the wrong side of these rows
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int row = first_row + g + i / 2 % 2 * 8, column = source + 2 * t + i / 4 * 8 + i % 2;
        float weight = p[8 * k + i];
        if (kReverse) weight = token_array(kScoreFactor)[column] * weight + token_array(kScoreOffset)[column];
        else if (kRowConstant) weight -= rows.along[i / 2 % 2];
        else weight = args.b * weight + args.a;
        if (kDecay) weight *= exp2f(token_array(kLogDecay)[row] - token_array(kLogDecay)[column]);
        v[i] = weight;
      }
      if (source == first_row || !sources.is_whole()) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const int row = first_row + g + i / 2 % 2 * 8, column = source + 2 * t + i / 4 * 8 + i % 2;
          if (kReverse ? column < row || column >= sources.end : column > row) v[i] = 0.f;
          if (kWindowed && column < sources.begin) v[i] = 0.f;
        }
      }
      if (kReadsExtra) {
#pragma unroll
        for (int i = 0; i < 8; ++i) rows.weights[i / 2 % 2] += v[i];
      }
    }
    ptx::keep(v);  // the numbers of sixteen columns at a time
    return Engine::pack_a(v);
  }

  // The weights in z of sources source .. source+15: decays alone; `part` 1 is what rounding takes from part 0.
  __device__ __forceinline__ FragmentA key_weights(int source, int part) {
    float v[8] = {0.f, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f};
    const int first_row = 16 * warp;
    if (source <= first_row) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int row = first_row + g + i / 2 % 2 * 8, column = source + 2 * t + i / 4 * 8 + i % 2;
        if (column > row) continue;
        v[i] = kDecay ? exp2f(token_array(kLogDecay)[row] - token_array(kLogDecay)[column]) : 1.f;
        if (part == 1) v[i] -= Engine::round(v[i]);
      }
    }
    ptx::keep(v);
    return Engine::pack_a(v);
  }

  // z of the rows as far as earlier chunks go.
  __device__ __forceinline__ void start_keys(RowSums& rows) {
    const float* sums = &shared_at<float>(places.sums + kColumnSums);
#pragma unroll
    for (int i = 0; i < kCols / 2; ++i) rows.keys[i] = sums[state_column(i)] * rows.factor[i / 2 % 2];
  }

  // This warpgroup's part of do.o den for both rows: q . o over its columns, the extra column with the first.
  __device__ __forceinline__ void partial_along(const RowSums& rows, uint32_t q_tile, float (&along)[2]) {
    along[0] = along[1] = 0.f;
#pragma unroll
    for (int k = 0; k < kCols / 16; ++k) {
      FragmentA q;
      Engine::template load_a<ZTile>(q, q_tile, 16 * warp, 16 * k);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at = 8 * k + i / 2 * 4 + i % 2 * 2;
        along[i % 2] += low_of(q.r[i]) * rows.o[at] + high_of(q.r[i]) * rows.o[at + 1];
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      along[i] += __shfl_xor_sync(0xffffffffu, along[i], 1);
      along[i] += __shfl_xor_sync(0xffffffffu, along[i], 2);
      along[i] *= args.b;
      if (column0 == 0 && reads_extra()) along[i] += extra_sum(rows, i);
    }
  }

  // With do.o of both rows: dq.
  __device__ __forceinline__ void project(RowSums& rows, const float (&along)[2], int64_t first, int valid) {
    const int first_row = formed_anew(16 * warp + g), batch = formed_anew(segment.batch), head = formed_anew(this->head);
    const int64_t at = (static_cast<int64_t>(batch) * args.num_heads + head) * args.tokens + first + first_row;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      // A row whose denominator is held at its floor is not a quotient: scaling its weights is no longer for nothing.
      rows.along[i] = fabsf(rows.den[i]) < kDenominatorEps ? 0.f : along[i] * ptx::reciprocal(rows.den[i]);
      if (column0 == 0 && t == 0 && first_row + 8 * i < valid) args.along[at + 8 * i] = rows.along[i];
    }
#pragma unroll
    for (int i = 0; i < kCols / 2; ++i) rows.o[i] -= rows.along[i / 2 % 2] * rows.keys[i];
  }

  // The extra column of row i of this thread's two, summed over the four lanes that share the row.
  __device__ __forceinline__ float extra_sum(const RowSums& rows, int i) const {
    const float value = sum_over_row(rows.extra[2 * i] + rows.extra[2 * i + 1] + rows.weights[i]);
    return kRowConstant ? args.a * value : value;
  }
  static __device__ __forceinline__ float sum_over_row(float value) {
    value += __shfl_xor_sync(0xffffffffu, value, 1);
    return value + __shfl_xor_sync(0xffffffffu, value, 2);
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

  // Rows of state tile m, tokens 16k .. 16k+15 of y^T, weighted for the state.
  __device__ __forceinline__ void load_update(FragmentA& y, uint32_t y_tile, int m, int k) {
    Engine::template load_a_transposed<XTile>(y, y_tile, 64 * m + 16 * warp, 16 * k);
    if constexpr (kDecay || kReverse) {
      const float* factors = token_array(kStateFactor) + 16 * k + 2 * (kWindowed || kRowConstant ? hidden(t) : t);
      const float factor[4] = {factors[0], factors[1], factors[8], factors[9]};
      Engine::scale_columns(y, Engine::pack_factors(factor));
    }
  }

  // state += y^T z and the sums beside it, one fragment after the other.
  __device__ __forceinline__ void update_state(const StageTiles& stage) {
    if (with_column_sums()) sum_columns(stage.z);
#pragma unroll
    for (int m = 0; m < kStateTiles; ++m) {
      float added[kCols / 2], added_to_row[4];
      float(&sum)[kCols / 2] = kSumsApart ? added : state[m];
      float(&row_sum)[4] = kSumsApart ? added_to_row : row_sums[m];
      if (kSumsApart) Engine::start(added), Engine::start(added_to_row);
#pragma unroll 1
      for (int k = 0; k < kChunk / 16; ++k) {
        FragmentA y;
        load_update(y, stage.y, m, k);
        if (with_extra()) Engine::mma(row_sum, y, extra_column(k));
        Engine::template gemm_kn<kCols, ZTile>(sum, y, Engine::operand(stage.z), 16 * k, true);
      }
      if (kSumsApart) add_to(state[m], added), add_to(row_sums[m], added_to_row);
    }
  }
  template <int kSize>
  __device__ __forceinline__ void add_to(float (&sum)[kSize], const float (&added)[kSize]) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) sum[i] += added[i];
  }

  // All fragments of tile m, for an asynchronous engine.
  using UpdateFragments = FragmentA[kChunk / 16];
  __device__ __forceinline__ void load_update(UpdateFragments& y, uint32_t y_tile, int m) {
#pragma unroll
    for (int k = 0; k < kChunk / 16; ++k) load_update(y[k], y_tile, m, k);
  }

  // The products of tiles m .. m + kTilesAtOnce - 1 into the state; `meanwhile` runs beside them.
  static constexpr int kTilesAtOnce = kSumsApart ? 1 : kStateTiles;
  template <class Meanwhile>
  __device__ __forceinline__ void update_tiles(int m, UpdateFragments (&y)[kStateTiles], typename Engine::Operand z,
                                               Meanwhile meanwhile) {
    float added[kTilesAtOnce][kCols / 2];
    Engine::fence();
#pragma unroll
    for (int k = 0; k < kChunk / 16; ++k) {
#pragma unroll
      for (int i = 0; i < kTilesAtOnce; ++i) {
        float(&sum)[kCols / 2] = kSumsApart ? added[i] : state[m + i];
        Engine::template gemm_kn<kCols, ZTile>(sum, y[m + i][k], z, 16 * k, !kSumsApart || k != 0);
      }
    }
    Engine::commit();
    if (with_extra()) {
      float added_to_row[kTilesAtOnce][4] = {};
#pragma unroll
      for (int k = 0; k < kChunk / 16; ++k) {
        const FragmentB extra = extra_column(k);
#pragma unroll
        for (int i = 0; i < kTilesAtOnce; ++i) Engine::mma(kSumsApart ? added_to_row[i] : row_sums[m + i], y[m + i][k], extra);
      }
#pragma unroll
      for (int i = 0; i < kTilesAtOnce && kSumsApart; ++i) add_to(row_sums[m + i], added_to_row[i]);
    }
    meanwhile();
    Engine::template wait<0>();
#pragma unroll
    for (int i = 0; i < kTilesAtOnce; ++i) {
      if constexpr (kSumsApart) {
        Engine::keep(added[i]);
        add_to(state[m + i], added[i]);
      } else {
        Engine::keep(state[m + i]);
      }
      Engine::keep_fragments(y[m + i]);
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
        Engine::template load_b_pair<ZTile>(columns, z_tile, 32 * k, kOwnColumns * warp + 8 * n);
        float apart[4] = {0.f, 0.f, 0.f, 0.f};
        float(&sums)[4] = kSumsApart ? apart : column_sums[n];
        Engine::mma(sums, rows[0], columns[0]);
        Engine::mma(sums, rows[1], columns[1]);
        if (kSumsApart) add_to(column_sums[n], apart);
      }
    }
    if (kExtra && kCountsTokens) count += added_count;
  }

  // Rows of a tile that are not `valid` -> zeros, by one warp.
  template <class Layout, int kWidth>
  __device__ __forceinline__ void clear_rows(uint32_t tile, const TileTokens& valid) const {
    constexpr int kUnits = kWidth / 8;  // of 16 bytes in a row
#pragma unroll 1
    for (int i = lane; i < kChunk * kUnits; i += 32) {
      if (!valid.has(i / kUnits)) {
        shared_at<float4>(tile + Layout::offset(i / kUnits, i % kUnits * 8)) = make_float4(0.f, 0.f, 0.f, 0.f);
      }
    }
  }

  // What the far keys gave: the start of a softmax that goes on with the window's keys.
  __device__ __forceinline__ void start_window(RowSums& rows) {
    if constexpr (kKind == ScanKind::kOutput) {
      const float log_scale = args.log_scale == nullptr ? 0.f : args.log_scale[hidden(head)] * kLog2E;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float den = extra_sum(rows, i);
        const bool has_far = den > kSmallestFloat;
        rows.unit[i] = has_far ? log_scale : -INFINITY;
        rows.peak[i] = has_far ? log2f(den) + log_scale : -INFINITY;
        rows.sum[i] = has_far && t == 0 ? den : 0.f;
      }
    }
  }

  // L of sources 2 lane and 2 lane + 1 of a tile, for the rows of keys; in units of log2.
  __device__ __forceinline__ void load_lse(float (&lse)[2], int64_t first_source, const TileTokens& sources, int member) {
    if constexpr (kKind == ScanKind::kValueGrad) {
      const int lane = current_lane();
      const int64_t at = (static_cast<int64_t>(hidden(segment.batch)) * args.num_heads + source_head(member)) * args.tokens;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        lse[i] = sources.has(2 * lane + i) ? args.lse[at + first_source + 2 * lane + i] * kLog2E : 0.f;
      }
    }
  }
  __device__ __forceinline__ void publish_lse(const float (&lse)[2]) {
    if constexpr (kKind == ScanKind::kValueGrad) {
      const int lane = current_lane();
      __syncwarp();
#pragma unroll
      for (int i = 0; i < 2; ++i) token_array(kScoreFactor)[2 * lane + i] = lse[i];
      __syncwarp();
    }
  }

  // p, products of this warp's rows with sources source .. source + 2 kSize - 1 of tile `tile`, -> weights of a softmax. The
  // sums of kOutput become relative to a peak that holds for these weights too; those of kValueGrad are relative to L.
  template <int kSize>
  __device__ __forceinline__ void weigh_window(float (&p)[kSize], RowSums& rows, FragmentA (&weights)[kSize / 8], int source,
                                               int tile, int64_t first, const TileTokens& sources) {
    const float to_log2 = start_scores(p);
    hide_scores(p, source, tile, first, sources);
    if constexpr (kKind == ScanKind::kOutput) {
      float peak[2] = {-INFINITY, -INFINITY};
#pragma unroll
      for (int i = 0; i < kSize; ++i) peak[i / 2 % 2] = fmaxf(peak[i / 2 % 2], p[i]);
      float factor[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        peak[i] = fmaxf(peak[i], __shfl_xor_sync(0xffffffffu, peak[i], 1));
        peak[i] = fmaxf(peak[i], __shfl_xor_sync(0xffffffffu, peak[i], 2));
        rows.peak[i] = fmaxf(rows.peak[i], peak[i] * to_log2);
        peak[i] = rows.peak[i] == -INFINITY ? 0.f : rows.peak[i];
        factor[i] = ptx::exp2(rows.unit[i] - peak[i]);
        rows.sum[i] *= factor[i];
        rows.unit[i] = rows.peak[i];
      }
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        p[i] = ptx::exp2(p[i] * to_log2 - peak[i / 2 % 2]);
        rows.sum[i / 2 % 2] += p[i];
      }
#pragma unroll
      for (int i = 0; i < kCols / 2; ++i) rows.o[i] *= factor[i / 2 % 2];
    } else {
      const float* lse = token_array(kScoreFactor) + source + 2 * t;
#pragma unroll
      for (int i = 0; i < kSize; ++i) p[i] = ptx::exp2(p[i] * to_log2 - lse[i / 4 * 8 + i % 2]);
    }
#pragma unroll
    for (int k = 0; k < kSize / 8; ++k) {
      weights[k] = Engine::pack_a(reinterpret_cast<const float(&)[8]>(p[8 * k]));
    }
  }
  // Products of queries and keys -> numbers that grow with their weight; the factor, above 0, that makes them log2 of it.
  template <int kSize>
  __device__ __forceinline__ float start_scores(float (&p)[kSize]) const {
    const float to_log2 = args.softmax_scale * kLog2E;
    if (args.softcap == 0.f && to_log2 > 0.f) return to_log2;
    if (args.softcap == 0.f) {
#pragma unroll
      for (int i = 0; i < kSize; ++i) p[i] *= to_log2;
    } else {
      const float inward = 2.f * to_log2 / args.softcap, cap = args.softcap * kLog2E;
#pragma unroll
      for (int i = 0; i < kSize; ++i) p[i] = cap - __fdividef(2.f * cap, 1.f + ptx::exp2(p[i] * inward));  // cap tanh(s / cap)
    }
    return 1.f;
  }
  // Scores of what these rows do not see -> -inf.
  template <int kSize>
  __device__ __forceinline__ void hide_scores(float (&p)[kSize], int source, int tile, int64_t first,
                                              const TileTokens& sources) const {
    const bool is_between = tile > 0 && kChunk * (tile + 1) <= args.window + 1;  // inside the window, whatever the row
    if (is_between && sources.is_whole() && args.key_valid == nullptr) return;
    // Of its columns from first_column on each of this thread's two rows sees those from `low` on and before `high`.
    const int first_row = 16 * warp + g, first_column = source + 2 * t, up = kChunk * tile + first_column - first_row;
    int low[2], high[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      // The token that has just left the window of the row (kReverse: that has the row in its window no more).
      const int left = kReverse ? first_row + 8 * i - first_column + kChunk * tile : 8 * i - up;
      low[i] = max(kReverse ? left - args.window : left + 1, sources.begin - first_column);
      high[i] = min(kReverse ? left : left + args.window + 1, sources.end - first_column);
      if (kReverse && args.key_valid != nullptr) {  // a hidden key is one for the query at its own place
        const int key = static_cast<int>(first) + first_row + 8 * i;
        const bool is_hidden = key < sequence_end(true) && args.key_valid[segment.batch * args.tokens + key] == 0;
        if (is_hidden) high[i] = min(high[i], left - args.window + 1);
      }
    }
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const int row = i / 2 % 2, right = i / 4 * 8 + i % 2;
      if (right < low[row] || right >= high[row]) p[i] = -INFINITY;
    }
    if (!kReverse && args.key_valid != nullptr) {
      const uint8_t* valid = args.key_valid + segment.batch * args.tokens + source_token(first, tile) + first_column;
      uint32_t hidden_columns = 0;  // a bit each
#pragma unroll 1
      for (int i = 0; i < kSize / 2; ++i) {
        const int right = i / 2 * 8 + i % 2;
        if (sources.has(first_column + right) && valid[right] == 0) hidden_columns |= 1u << i;
      }
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        const int right = i / 4 * 8 + i % 2;
        const int own = 8 * (i / 2 % 2) - up + args.window;
        if ((hidden_columns >> (i / 4 * 2 + i % 2) & 1) != 0 && right != own) p[i] = -INFINITY;
      }
    }
  }
  // o += the softmax part of a tile, for an engine that is not asynchronous: a few columns of scores at a time.
  __device__ __forceinline__ void add_window(RowSums& rows, const StageTiles& stage, int tile, int64_t first,
                                             const TileTokens& sources) {
    constexpr int kScores = kRows > 64 && Engine::kScoreColumns == 32 ? 16 : Engine::kScoreColumns;  // of wide tiles in tf32
#pragma unroll 1
    for (int source = 0; source < kChunk; source += kScores) {
      FragmentA x[1], weights[kScores / 16];
      float p[kScores / 2];
      Engine::start(p);
      add_scores<kScores>(p, x, stage, source, 0);
      weigh_window(p, rows, weights, source, tile, first, sources);
#pragma unroll
      for (int k = 0; k < kScores / 16; ++k) {
        Engine::template gemm_kn<kCols, ZTile>(rows.o, weights[k], Engine::operand(stage.z), source + 16 * k, true);
      }
    }
  }
  // The window's tiles of up to two neighbouring chunks of rows, the first from token `first` on; the second chunk sees the
  // tiles that come one later. Those before `begin` and from `end` on hold no source, but for one that may bring rows.
  struct WindowTiles {
    int begin, end;
  };
  __device__ __forceinline__ WindowTiles window_tiles_of(int64_t first, int chunks) const {
    const int source = static_cast<int>(source_token(first));
    const int before = kReverse ? source - sequence_end(true) : sequence_end(false) - source;
    const int until = kReverse ? source + kChunk - sequence_end(false) : sequence_end(true) - source;
    const int skipped = before < 0 ? 0 : before / kChunk + kReverse;
    return {max(skipped - 1, 0), min((until + kChunk - 1) / kChunk, window_tiles(args.window) + chunks - 1)};
  }

  __device__ __forceinline__ void write_output(const RowSums& rows, int64_t first, int valid) {
    const float(&o)[kCols / 2] = rows.o;
    float row_scale[2] = {1.f, 1.f}, extra[2] = {0.f, 0.f};
    const int first_row = formed_anew(16 * warp + g), batch = formed_anew(segment.batch), head = formed_anew(this->head);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (!kProjects && reads_extra()) {
        extra[i] = kHasWindow ? sum_over_row(rows.sum[i]) : extra_sum(rows, i);
        if (kKind == ScanKind::kOutput) row_scale[i] = ptx::reciprocal(kHasWindow ? extra[i] : guarded(extra[i]));
      }
      if (kRowConstant) row_scale[i] = args.normalize ? args.b * inverse_den(rows.den[i]) : args.b;
    }
    if (kKind == ScanKind::kOutput && reads_extra() && column0 == 0 && t == 0) {
      float* den = args.den + (static_cast<int64_t>(batch) * args.num_heads + head) * args.tokens + first + first_row;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (first_row + 8 * i < valid) den[8 * i] = kHasWindow ? (rows.unit[i] + log2f(extra[i])) / kLog2E : extra[i];
      }
    }
    if constexpr (kRowConstant && !kProjects) {
      if (args.extra_out != nullptr) write_column_terms(rows, extra, first, valid);
      if (args.out.data == nullptr) return;
    }
    Element* base = static_cast<Element*>(args.out.data) + batch * args.out.batch_stride +
                    head * args.out.head_stride + first * args.out.token_stride + column0;
    const int columns = args.out.dim - column0 < kCols ? args.out.dim - column0 : kCols;
    write_rows(static_cast<Element*>(base), o, row_scale, valid, columns);
  }

  // q . dq over this warpgroup's columns, and with the first the extra column. Before do.o is known (dq is not wanted then):
  // do.o times the denominator. With a window: the gradient of log_scale.
  __device__ __forceinline__ void write_column_terms(const RowSums& rows, const float (&extra)[2], int64_t first, int valid) {
    const float(&o)[kCols / 2] = rows.o;
    const int units = column_units(args.z.dim);
    const int64_t all_rows = static_cast<int64_t>(args.cu_seqlens == nullptr ? args.num_sequences : 1) * args.num_heads;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t token = first + hidden(16 * warp + g + 8 * i);
      const bool is_inside = token < first + valid;
      const Element* q = static_cast<const Element*>(args.q.data) + segment.batch * args.q.batch_stride +
                         token * args.q.token_stride + head * args.q.head_stride;
      float sum = 0.f;
#pragma unroll
      for (int e = 2 * i; e < kCols / 2; e += e % 2 == 0 ? 1 : 3) {
        const int column = column0 + state_column(e);
        if (is_inside && column < args.z.dim) sum += static_cast<float>(q[column]) * o[e];
      }
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      sum *= args.b;
      if (column0 == 0) sum += extra[i];
      if (kWindowed) sum *= inverse_den(rows.den[i]);
      if (t != 0 || !is_inside) continue;
#pragma unroll
      for (int covered = 0; covered < kCols / kColumnUnit; ++covered) {
        const int unit = column0 / kColumnUnit + covered;
        if (unit >= units) continue;
        const int64_t row = unit * all_rows + static_cast<int64_t>(segment.batch) * args.num_heads + head;
        args.extra_out[row * args.tokens + token] = covered == 0 ? sum : 0.f;
      }
    }
  }

  // This warp's 16 rows; 16-bit results pass through shared memory, so that a row leaves in one piece.
  __device__ __forceinline__ void write_rows(__nv_bfloat16* base, const float (&o)[kCols / 2],
                                             const float (&row_scale)[2], int valid, int columns) {
    const uint32_t tile = places.out, lane = formed_anew(this->lane);
    float scaled[kCols / 2];
#pragma unroll
    for (int i = 0; i < kCols / 2; ++i) scaled[i] = o[i] * row_scale[i / 2 % 2];
    __syncwarp();  // the rows of the chunk before have left
    Engine::template store<kCols, OutTile>(tile, 0, 0, scaled, 0);
    __syncwarp();
    const int64_t stride = args.out.token_stride;
    const bool is_aligned = (reinterpret_cast<uintptr_t>(base) | stride * 2) % 16 == 0 && columns % 8 == 0;
    if (is_aligned) {
      constexpr int kUnits = kCols / 8, kRowsAtOnce = 32 / kUnits;
      const uint32_t row = lane / kUnits, column = lane % kUnits * 8;
      const uint32_t from = tile + OutTile::offset(row, column);
      const int token = 16 * warp + row, rows_left = static_cast<int>(column) < columns ? valid - token : 0;
      __nv_bfloat16* to = base + token * stride + column;
#pragma unroll
      for (int i = 0; i < 16; i += kRowsAtOnce, to += kRowsAtOnce * stride) {
        const uint4 piece = shared_at<uint4>(OutTile::below(from, i));
        if (i < rows_left) *reinterpret_cast<uint4*>(to) = piece;
      }
    } else {
#pragma unroll 1
      for (int i = lane; i < 16 * kCols; i += 32) {
        const int row = i / kCols, column = i % kCols, token = 16 * warp + row;
        if (token < valid && column < columns) {
          base[token * stride + column] = shared_at<__nv_bfloat16>(tile + OutTile::offset(row, column));
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
    if (args.cu_seqlens == nullptr || segment.sequence != args.num_sequences - 1 || !segment.is_last()) return;
    if (args.out.data == nullptr) return;
    const int columns = args.out.dim - column0 < kCols ? args.out.dim - column0 : kCols;
    Element* base = static_cast<Element*>(args.out.data) + head * args.out.head_stride + column0;
    for (int64_t token = segment.end + warp; token < args.tokens; token += 4) {
      for (int c = lane; c < columns; c += 32) base[token * args.out.token_stride + c] = static_cast<Element>(0.f);
    }
  }

  // Where accumulator i of state tile m, or of an output, lies.
  __device__ __forceinline__ int state_row(int m, int i) const { return 64 * m + 16 * warp + g + i / 2 % 2 * 8; }
  __device__ __forceinline__ int state_column(int i) const { return i / 4 * 8 + 2 * t + i % 2; }
  __device__ __forceinline__ int own_column(int n, int i) const { return kOwnColumns * warp + 8 * n + 2 * t + i % 2; }
  __device__ __forceinline__ int state_offset(int row, int column, int pitch) const {
    return kTransposed ? column * pitch + row : row * pitch + column;
  }
  // Boundaries are counted over all sequences: one less than pieces in each.
  __device__ __forceinline__ int boundary(bool before) const {
    const int pieces = kStateOnly ? 1 : args.pieces, place = (segment.index + (before ? 0 : 1)) * pieces;
    const int first = first_slot(args, segment.sequence, args.segment_tokens / pieces, args.num_slots / args.num_sequences * pieces);
    return first - segment.sequence + place - 1;
  }
  __device__ __forceinline__ int64_t entry_index(int item) const {
    return static_cast<int64_t>(hidden(item)) * args.num_kv_heads + kv_head;
  }

  float added_count = 0.f;  // to count, by the chunk in work
};

}  // namespace hf_linattn

#endif  // HF_LINATTN_SCAN_WARPGROUP_CUH_
