// dg: what the loss changes by with the decay of each token.
//
// g_t is in the weight e^{G_i - G_j} of every pair of a key j < t and a query i >= t, so that
//   dg_t = sum over j < t <= i of m_ij,   m_ij = e^{G_i - G_j} (a + b q_i.k_j) (do_i.v_j - along_i) / den_i.
// The difference of neighbours, dg_t - dg_{t+1}, is cheaper to form (do_t.o_t - v_t.dv_t), but a sum of rounded
// differences drowns what is left of it: here no sum of pairs is ever the difference of two larger ones.
//
// Within a segment of kDecaySegment tokens all pairs are formed, in blocks of a chunk of queries by a chunk of keys
// (pair_sums_kernel), from inputs that are not rounded. Pairs that lie on both sides of a segment's boundary are those
// of a token with the state, or its gradient, that the scans carry over it (state_terms_kernel); pairs around a whole
// segment are the product of the two. decay_gradient_kernel adds up.
#include "decay_gradient.h"

#include <algorithm>

#include "launch.cuh"
#include "tile_copy.cuh"

namespace hf_linattn {
namespace {

constexpr int kWarps = kWarpgroupThreads / 32;
constexpr int kSegmentChunks = kDecaySegment / kChunk;
constexpr int kSumThreads = 32 * kSegmentChunks;
constexpr int kPartColumns = 64;  // of a tile that holds a part of the dimensions
constexpr unsigned kAllLanes = 0xffffffffu;

// What the kernels leave for each other: arrays [B, H_kv, T], one after the other.
struct Terms {
  float* rows;     // sum of a query's pairs with earlier chunks of its segment, over the heads of its group
  float* columns;  // array d: sum of a key's pairs with the d-th chunk after its own; array 0: pairs within the chunk
                   // that lie around the token
  float* states;   // a query's pairs with tokens before the segment, then a key's with those after it, each in parts
                   // of kTileColumns value channels; null where no segment has a neighbour
  int64_t array;   // size of one
  int columns_count, state_parts;
};

__device__ __forceinline__ float* array_at(const DecayGradientArgs& args, float* arrays, int64_t size, int which,
                                           const Segment& segment, int kv_head) {
  const int64_t row = static_cast<int64_t>(segment.batch) * args.scan.num_kv_heads + kv_head;
  return arrays + which * size + row * args.scan.tokens;
}

// log2 of the decays of tokens 2 lane and 2 lane + 1 of a chunk, 0 behind the segment.
__device__ __forceinline__ void load_log_decay(float (&log_decay)[2], const ScanArgs& scan, const Segment& segment,
                                               int kv_head, int chunk) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int64_t token = segment.begin + static_cast<int64_t>(chunk) * kChunk + 2 * (threadIdx.x % 32) + i;
    log_decay[i] = 0.f;
    if (token >= segment.end) continue;
    const int64_t at = segment.batch * scan.g_batch_stride + token * scan.g_token_stride + kv_head * scan.g_head_stride;
    log_decay[i] = fmaxf(scan.g[at], kSmallestLogDecay) * kLog2E;
  }
}

// Sums of x over tokens 0 .. 2 lane + i of a chunk.
__device__ __forceinline__ void sum_up_to(float (&sums)[2], const float (&x)[2]) {
  const int lane = threadIdx.x % 32;
  float sum = x[0] + x[1];
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const float other = __shfl_up_sync(kAllLanes, sum, distance);
    if (lane >= distance) sum += other;
  }
  const float before = __shfl_up_sync(kAllLanes, sum, 1);
  sums[0] = (lane == 0 ? 0.f : before) + x[0];
  sums[1] = sum;
}

// Sums of x over tokens 2 lane + i .. 63 of a chunk.
__device__ __forceinline__ void sum_from(float (&sums)[2], const float (&x)[2]) {
  const int lane = threadIdx.x % 32;
  float sum = x[0] + x[1];
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const float other = __shfl_down_sync(kAllLanes, sum, distance);
    if (lane + distance < 32) sum += other;
  }
  const float after = __shfl_down_sync(kAllLanes, sum, 1);
  sums[1] = (lane == 31 ? 0.f : after) + x[1];
  sums[0] = sum;
}

__device__ __forceinline__ float sum_over_warp(float x) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(kAllLanes, x, distance);
  return x;
}

// 1 / den and along of one row, 0 and 0 of no row.
struct RowNumbers {
  float scale, along;
};
__device__ __forceinline__ RowNumbers row_numbers(const ScanArgs& scan, const Segment& segment, int head,
                                                  int64_t token) {
  if (token >= segment.end) return {0.f, 0.f};
  if (!scan.normalize) return {1.f, 0.f};
  const int64_t at = (static_cast<int64_t>(segment.batch) * scan.num_heads + head) * scan.tokens + token;
  return {1.f / guarded(scan.den[at]), scan.along[at]};
}

// One chunk of queries with its own and all earlier chunks of keys of the segment. Warp w has query rows 16w .. 16w+15.
// Tiles hold kColumns dimensions: all there are, or a part, where shared memory has no place for more.
template <class Engine, int kColumns, bool kIsWhole>
struct PairSums {
  using Element = typename Engine::Element;
  using FragmentA = typename Engine::FragmentA;
  using Tile = typename Engine::template Tile<kChunk, kColumns>;
  // Parts are loaded for one product only: all of its scores are added up at once.
  static constexpr int kScores = kIsWhole ? Engine::kScoreColumns : kChunk;

  // Shared memory: q, do, the stages of k and v (in parts: one of x and one of y); then what every warp keeps for itself.
  static constexpr int kStageBytes = 2 * Tile::kBytes;
  static constexpr int kColumnBytes = kSegmentChunks * kChunk * 4, kWarpBytes = kColumnBytes + 2 * kChunk * 4;
  static constexpr int tile_bytes(int num_stages) { return (kIsWhole ? 1 + num_stages : 1) * kStageBytes; }
  static constexpr int smem_bytes(int num_stages) { return tile_bytes(num_stages) + kWarps * kWarpBytes; }

  const DecayGradientArgs& args;
  const ScanArgs& scan;
  const Segment segment;
  const int kv_head, chunk, num_stages;
  const uint32_t base, own;
  const int lane, warp, g, t;
  float row_sum[2] = {0.f, 0.f};

  __device__ __forceinline__ PairSums(const DecayGradientArgs& args, const Segment& segment, int kv_head, int chunk,
                                      int num_stages)
      : args(args),
        scan(args.scan),
        segment(segment),
        kv_head(kv_head),
        chunk(chunk),
        num_stages(num_stages),
        base(ptx::smem_address(ptx::dynamic_smem())),
        own(base + tile_bytes(num_stages) + threadIdx.x / 32 * kWarpBytes),
        lane(threadIdx.x % 32),
        warp(threadIdx.x / 32),
        g(threadIdx.x % 32 / 4),
        t(threadIdx.x % 4) {}

  __device__ __forceinline__ float* column_sums() const { return &shared_at<float>(own); }
  __device__ __forceinline__ float* row_decay() const { return &shared_at<float>(own + kColumnBytes); }
  __device__ __forceinline__ float* column_decay() const { return row_decay() + kChunk; }
  __device__ __forceinline__ int64_t first_token(int of_chunk) const {
    return segment.begin + static_cast<int64_t>(of_chunk) * kChunk;
  }

  __device__ __forceinline__ void run(const Terms& terms) {
    for (int i = lane; i < (chunk + 1) * kChunk; i += 32) column_sums()[i] = 0.f;
    float own_decay[2], sums[2];
    load_log_decay(own_decay, scan, segment, kv_head, chunk);
    sum_up_to(sums, own_decay);
    row_decay()[2 * lane] = sums[0];
    row_decay()[2 * lane + 1] = sums[1];
    __syncwarp();
    const int group = scan.num_heads / scan.num_kv_heads;
    for (int member = 0; member < group; ++member) add_head(kv_head * group + member);

#pragma unroll
    for (int i = 0; i < 2; ++i) {
      row_sum[i] += __shfl_xor_sync(kAllLanes, row_sum[i], 1);
      row_sum[i] += __shfl_xor_sync(kAllLanes, row_sum[i], 2);
      const int64_t token = first_token(chunk) + 16 * warp + g + 8 * i;
      float* const to = array_at(args, terms.rows, terms.array, 0, segment, kv_head);
      if (t == 0 && token < segment.end) to[token] = row_sum[i];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < (chunk + 1) * kChunk; i += kWarpgroupThreads) {
      const int64_t token = segment.begin + i;
      if (token >= segment.end) continue;
      float sum = 0.f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        sum += shared_at<float>(base + tile_bytes(num_stages) + w * kWarpBytes + 4 * i);
      }
      array_at(args, terms.columns, terms.array, chunk - i / kChunk, segment, kv_head)[token] = sum;
    }
  }

 private:
  __device__ __forceinline__ void load_keys(int of_chunk, uint32_t stage) {
    if (!kIsWhole) return;
    const int64_t first = first_token(of_chunk);
    copy_tile<Element, Tile, kColumns>(stage, args.k, segment.batch, kv_head, first, tokens_until(first, segment.end), 0);
    copy_tile<Element, Tile, kColumns>(stage + Tile::kBytes, args.v, segment.batch, kv_head, first, tokens_until(first, segment.end), 0);
    ptx::cp_async_commit();
  }

  __device__ __forceinline__ void add_head(int head) {
    __syncthreads();  // the tiles of the head before are read
    const int64_t first = first_token(chunk);
    if (kIsWhole) {
      copy_tile<Element, Tile, kColumns>(base, args.q, segment.batch, head, first, tokens_until(first, segment.end), 0);
      copy_tile<Element, Tile, kColumns>(base + Tile::kBytes, args.d_o, segment.batch, head, first, tokens_until(first, segment.end), 0);
    }
    load_keys(chunk, base + kStageBytes);
    float scale[2], along[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const RowNumbers row = row_numbers(scan, segment, head, first + 16 * warp + g + 8 * i);
      scale[i] = row.scale;
      along[i] = row.along;
    }
    float distance = 0.f;  // log2 of the decay of the chunks between this one and the keys'
    float next_decay[2] = {0.f, 0.f};
    if (chunk > 0) load_log_decay(next_decay, scan, segment, kv_head, chunk - 1);
    int stage = 0;
    for (int keys = chunk; keys >= 0; --keys) {
      if (keys < chunk) {
        float sums[2];
        sum_from(sums, next_decay);
        // From the token after a key on.
        const float next = __shfl_down_sync(kAllLanes, sums[0], 1);
        __syncwarp();  // the factors of the chunk before are read
        column_decay()[2 * lane] = exp2f(distance + sums[1]);
        column_decay()[2 * lane + 1] = exp2f(distance + (lane == 31 ? 0.f : next));
        distance += __shfl_sync(kAllLanes, sums[0], 0);
        __syncwarp();
        if (keys > 0) load_log_decay(next_decay, scan, segment, kv_head, keys - 1);
      }
      const bool is_last = keys == 0 || exp2f(distance) == 0.f;  // all weights beyond are 0
      const uint32_t tiles = base + kStageBytes * (1 + stage);
      ptx::cp_async_wait<0>();
      __syncthreads();
      if (num_stages > 1 && !is_last) {
        stage ^= 1;
        load_keys(keys - 1, base + kStageBytes * (1 + stage));
      }
      if (keys == chunk) {
        add_pairs<true>(tiles, head, keys, scale, along);
#pragma unroll
        for (int i = 0; i < 2; ++i) scale[i] *= exp2f(row_decay()[16 * warp + g + 8 * i]);
      } else {
        add_pairs<false>(tiles, head, keys, scale, along);
      }
      if (is_last) break;
      if (num_stages == 1) {
        __syncthreads();
        load_keys(keys - 1, base + kStageBytes);
      }
    }
  }

  // p [16, kScores] += this warp's rows of x times rows first .. of y.
  __device__ __forceinline__ void multiply(float (&p)[kScores / 2], uint32_t x, uint32_t y, int first) {
    constexpr int kUnroll = std::is_same_v<Element, __nv_bfloat16> ? kColumns / 16 : 1;
#pragma unroll(kUnroll)
    for (int k = 0; k < kColumns / 16; ++k) {
      FragmentA a;
      Engine::template load_a<Tile>(a, x, 16 * warp, 16 * k);
      Engine::template gemm_nk<kScores, Tile>(p, a, y + first * Tile::kRowBytes, 16 * k, true);
    }
  }

  // The same for all rows of y, part by part of the dimensions: x of a head's queries, y of a chunk of keys.
  __device__ __forceinline__ void multiply_parts(float (&p)[kScores / 2], const Rows& x, int head, const Rows& y,
                                                 int keys) {
#pragma unroll 1
    for (int column = 0; column < x.dim; column += kColumns) {
      __syncthreads();  // the part before is read
      copy_tile<Element, Tile, kColumns>(base, x, segment.batch, head, first_token(chunk),
                                         tokens_until(first_token(chunk), segment.end), column);
      copy_tile<Element, Tile, kColumns>(base + Tile::kBytes, y, segment.batch, kv_head, first_token(keys),
                                         tokens_until(first_token(keys), segment.end),
                                         column);
      ptx::cp_async_commit();
      ptx::cp_async_wait<0>();
      __syncthreads();
      multiply(p, base, base + Tile::kBytes, 0);
    }
  }

  // Adds the pairs of this warp's rows with a chunk of keys. Off the diagonal to row_sum and column_sums; on it, the
  // columns receive what lies around their token.
  template <bool kDiagonal>
  __device__ __forceinline__ void add_pairs(uint32_t tiles, int head, int keys, const float (&scale)[2],
                                            const float (&along)[2]) {
    float sums[kChunk / 4];  // of columns 8n + 2t + e, over rows g and g + 8: n and e
    float before[2] = {0.f, 0.f};
#pragma unroll
    for (int first = 0; first < kChunk; first += kScores) {
      float p[kScores / 2], d[kScores / 2];
      Engine::start(p);
      Engine::start(d);
      if constexpr (kIsWhole) {
        multiply(p, base, tiles, first);
        multiply(d, base + Tile::kBytes, tiles + Tile::kBytes, first);
      } else {
        multiply_parts(p, args.q, head, args.k, keys);
        multiply_parts(d, args.d_o, head, args.v, keys);
      }
#pragma unroll
      for (int i = 0; i < kScores / 2; ++i) {
        p[i] = (scan.b * p[i] + scan.a) * (d[i] - along[i / 2 % 2]) * scale[i / 2 % 2];
      }
#pragma unroll
      for (int n = 0; n < kScores / 8; ++n) {
        const int column = first + 8 * n + 2 * t;
        float(&sum)[2] = reinterpret_cast<float(&)[2]>(sums[2 * (first / 8 + n)]);
        sum[0] = sum[1] = 0.f;
        if constexpr (kDiagonal) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const float(&pair)[2] = reinterpret_cast<const float(&)[2]>(p[4 * n + 2 * half]);
            add_diagonal(sum, pair, before[half], 16 * warp + g + 8 * half, column);
          }
        } else {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const float factor = column_decay()[column + e];
            row_sum[0] += p[4 * n + e] * factor;
            row_sum[1] += p[4 * n + 2 + e] * factor;
            sum[e] = (p[4 * n + e] + p[4 * n + 2 + e]) * factor;
          }
        }
      }
    }
    add_columns(sums, keys);
  }

  // Two neighbours of a row on the diagonal, undecayed. `sum` receives the sum of the row's earlier keys, for columns
  // that are not later than the row. `before`: sum of the row in the columns before those of the four lanes.
  __device__ __forceinline__ void add_diagonal(float (&sum)[2], const float (&pair)[2], float& before, int row,
                                               int column) {
    float m[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      m[e] = column + e <= row ? pair[e] * exp2f(row_decay()[row] - row_decay()[column + e]) : 0.f;
    }
    float up_to = m[0] + m[1];
#pragma unroll
    for (int lanes = 1; lanes < 4; lanes *= 2) {
      const float other = __shfl_up_sync(kAllLanes, up_to, lanes);
      if (t >= lanes) up_to += other;
    }
    const float other = __shfl_up_sync(kAllLanes, up_to, 1);
    const float earlier = t == 0 ? before : before + other;
    if (column <= row) sum[0] += earlier;
    if (column + 1 <= row) sum[1] += earlier + m[0];
    before += __shfl_sync(kAllLanes, up_to, lane | 3);
  }

  // column_sums of a chunk of keys += sums over the eight lanes with the same columns; every step halves the columns
  // that a lane holds, until lane (g, t) has 8g + 2t and 8g + 2t + 1.
  __device__ __forceinline__ void add_columns(float (&sums)[kChunk / 4], int keys) {
    halve<8>(sums, 16);
    halve<4>(sums, 8);
    halve<2>(sums, 4);
    float* const to = column_sums() + keys * kChunk + 8 * g + 2 * t;
    to[0] += sums[0];
    to[1] += sums[1];
  }
  template <int kKept>
  __device__ __forceinline__ void halve(float (&sums)[kChunk / 4], int lanes) {
    const bool is_upper = (lane & lanes) != 0;
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
      const float lower = sums[i], upper = sums[i + kKept];
      sums[i] = (is_upper ? upper : lower) + __shfl_xor_sync(kAllLanes, is_upper ? lower : upper, lanes);
    }
  }
};

template <class Engine, int kColumns, bool kIsWhole>
__global__ void __launch_bounds__(kWarpgroupThreads, 1)
    pair_sums_kernel(const __grid_constant__ DecayGradientArgs args, Terms terms, int num_stages) {
  // Late chunks have most to do: first.
  const int heads = args.scan.num_kv_heads, slots = args.scan.num_slots;
  const int kv_head = blockIdx.x % heads, slot = blockIdx.x / heads % slots;
  const int chunk = terms.columns_count - 1 - static_cast<int>(blockIdx.x / (heads * slots));
  const Segment segment = find_segment(args.scan, slot);
  if (!segment.exists || chunk >= chunk_count(segment)) return;
  PairSums<Engine, kColumns, kIsWhole>(args, segment, kv_head, chunk, num_stages).run(terms);
}

// The state at one end of a segment; null where there is none.
struct SegmentState {
  const float *kv, *key_sum, *value_sum, *weight_sum;
};
__device__ __forceinline__ SegmentState state_at(const DecayGradientArgs& args, const Segment& segment, int kv_head,
                                                 bool is_after) {
  const bool is_end = is_after ? segment.is_last() : segment.is_first();
  const hf_linattn_state& from =
      is_after ? (is_end ? args.d_last : args.d_carried) : (is_end ? args.first : args.carried);
  const int boundary = segment.slot - segment.sequence - (is_after ? 0 : 1);
  const int64_t index = static_cast<int64_t>(is_end ? segment.sequence : boundary) * args.scan.num_kv_heads + kv_head;
  return {entry(from.kv, index, int64_t{args.scan.feature_dim} * args.scan.value_dim),
          entry(from.key_sum, index, args.scan.feature_dim), entry(from.value_sum, index, args.scan.value_dim),
          entry(from.weight_sum, index, 1)};
}

// Pairs of the tokens of a segment with the state before it (tokens as queries) or after it (as keys): with q, do or
// k, v as x, z, the row sums of z * (x . state), for kTileColumns columns of z. Warp w has rows 16w .. 16w+15 of every
// chunk. x is loaded kColumns of up to kDim dimensions at a time, for the same reason as in PairSums.
template <class Engine, int kDim, int kColumns>
struct StateTerms {
  using Element = typename Engine::Element;
  using FragmentA = typename Engine::FragmentA;
  using XTile = typename Engine::template Tile<kChunk, kColumns>;
  using ZTile = typename Engine::template Tile<kChunk, kTileColumns>;
  using StateTile = typename Engine::template Tile<kDim, kTileColumns>;
  static constexpr int kStateParts = Engine::kIsRounding ? 2 : 1;

  static constexpr int kZ = XTile::kBytes, kState = kZ + ZTile::kBytes;
  static constexpr int kKeySum = kState + kStateParts * StateTile::kBytes, kValueSum = kKeySum + kDim * 4;
  static constexpr int kDecay = kValueSum + kTileColumns * 4;  // of every warp: [kChunk]
  static constexpr int kSmemBytes = kDecay + kWarps * kChunk * 4;

  static __device__ __forceinline__ void put_state(uint32_t tile, int row, int column, float value) {
    const float high = Engine::round(value);
    put_part(tile, row, column, high);
    if (kStateParts > 1) put_part(tile + StateTile::kBytes, row, column, Engine::round(value - high));
  }
  static __device__ __forceinline__ void put_part(uint32_t tile, int row, int column, float value) {
    if constexpr (std::is_same_v<Element, __nv_bfloat16>) {
      put_element<StateTile>(tile, row, column, __float2bfloat16_rn(value));
    } else {
      put_element<StateTile>(tile, row, column, value);
    }
  }
  static __device__ __forceinline__ float z_at(uint32_t tile, int row, int column) {
    if constexpr (std::is_same_v<Element, __nv_bfloat16>) {
      return __bfloat162float(shared_at<__nv_bfloat16>(tile + ZTile::offset(row, column)));
    } else {
      return shared_at<float>(tile + ZTile::offset(row, column));
    }
  }

  static __device__ __forceinline__ void run(const DecayGradientArgs& args, const Segment& segment, int kv_head,
                                             int part, bool is_after, float* to) {
    const ScanArgs& scan = args.scan;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const SegmentState state = state_at(args, segment, kv_head, is_after);
    if (state.kv == nullptr) {
      for (int64_t i = segment.begin + threadIdx.x; i < segment.end; i += kWarpgroupThreads) to[i] = 0.f;
      return;
    }
    const uint32_t base = ptx::smem_address(ptx::dynamic_smem());
    float* const key_sum = &shared_at<float>(base + kKeySum);
    float* const value_sum = &shared_at<float>(base + kValueSum);
    float* const decay = &shared_at<float>(base + kDecay + warp * kChunk * 4);
    const int column0 = part * kTileColumns, features = scan.feature_dim, values = scan.value_dim;
    for (int i = threadIdx.x; i < kDim * kTileColumns; i += kWarpgroupThreads) {
      const int row = i / kTileColumns, column = i % kTileColumns;
      const bool is_inside = row < features && column0 + column < values;
      put_state(base + kState, row, column, is_inside ? state.kv[row * values + column0 + column] : 0.f);
    }
    // The plain sums belong to no column: the first part has them.
    const bool with_key_sum = part == 0 && state.key_sum != nullptr;
    for (int i = threadIdx.x; i < kDim; i += kWarpgroupThreads) {
      key_sum[i] = with_key_sum && i < features ? state.key_sum[i] : 0.f;
    }
    for (int i = threadIdx.x; i < kTileColumns; i += kWarpgroupThreads) {
      value_sum[i] = state.value_sum != nullptr && column0 + i < values ? state.value_sum[column0 + i] : 0.f;
    }
    const float weight_sum = part == 0 && state.weight_sum != nullptr ? *state.weight_sum : 0.f;

    const Rows &x = is_after ? args.k : args.q, &z = is_after ? args.v : args.d_o;
    const int members = is_after ? 1 : scan.num_heads / scan.num_kv_heads, chunks = chunk_count(segment);
    constexpr int kUnroll = std::is_same_v<Element, __nv_bfloat16> ? kColumns / 16 : 1;
    const int x_columns = kColumns == kDim ? kDim : x.dim;  // to load
    // The state before holds bare sums: a and b come with the read. The one after holds them already.
    const float a = is_after ? 1.f : scan.a, b = is_after ? 1.f : scan.b;
    float distance = 0.f;  // log2 of the decay between the chunk and the state
    for (int step = 0; step < chunks; ++step) {
      const int chunk = is_after ? chunks - 1 - step : step;
      const int64_t first = segment.begin + static_cast<int64_t>(chunk) * kChunk;
      const bool is_gone = exp2f(distance) == 0.f;
      float log_decay[2], sums[2];
      load_log_decay(log_decay, scan, segment, kv_head, chunk);
      if (is_after) {
        sum_from(sums, log_decay);
        const float total = __shfl_sync(kAllLanes, sums[0], 0), next = __shfl_down_sync(kAllLanes, sums[0], 1);
        sums[0] = sums[1];  // from the token after the key on
        sums[1] = lane == 31 ? 0.f : next;
        __syncwarp();
        decay[2 * lane] = exp2f(distance + sums[0]), decay[2 * lane + 1] = exp2f(distance + sums[1]);
        distance += total;
      } else {
        sum_up_to(sums, log_decay);
        __syncwarp();
        decay[2 * lane] = exp2f(distance + sums[0]), decay[2 * lane + 1] = exp2f(distance + sums[1]);
        distance += __shfl_sync(kAllLanes, sums[1], 31);
      }
      __syncwarp();
      float sum[2] = {0.f, 0.f};
      for (int member = 0; member < members && !is_gone; ++member) {
        const int head = kv_head * members + member;
        float read[kTileColumns / 2], read_sum[4] = {0.f, 0.f, 0.f, 0.f};
        Engine::start(read);
#pragma unroll 1
        for (int feature0 = 0; feature0 < x_columns; feature0 += kColumns) {
          __syncthreads();  // the tiles before are read
          copy_tile<Element, XTile, kColumns>(base, x, segment.batch, head, first, tokens_until(first, segment.end), feature0);
          if (feature0 == 0) {
            copy_tile<Element, ZTile, kTileColumns>(base + kZ, z, segment.batch, head, first, tokens_until(first, segment.end), column0);
          }
          ptx::cp_async_commit();
          ptx::cp_async_wait<0>();
          __syncthreads();
#pragma unroll(kUnroll)
          for (int k = 0; k < kColumns / 16; ++k) {
            FragmentA rows;
            Engine::template load_a<XTile>(rows, base, 16 * warp, 16 * k);
            const int row = feature0 + 16 * k;
#pragma unroll
            for (int of = 0; of < kStateParts; ++of) {
              const uint32_t tile = base + kState + of * StateTile::kBytes;
              Engine::template gemm_kn<kTileColumns, StateTile>(read, rows, tile, row, true);
            }
            if (with_key_sum) {
              float column[4];  // 0 and 1 of eight: the sums, in two rounded parts
#pragma unroll
              for (int i = 0; i < 4; ++i) {
                const float value = key_sum[row + 2 * t + i / 2 * 8 + i % 2], high = Engine::round(value);
                column[i] = g == 0 ? high : g == 1 ? value - high : 0.f;
              }
              Engine::mma(read_sum, rows, Engine::pack_b(column));
            }
          }
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = 16 * warp + g + 8 * half;
          const RowNumbers numbers =
              is_after ? RowNumbers{1.f, -1.f} : row_numbers(scan, segment, head, first + row);
          float term = 0.f;
#pragma unroll
          for (int i = 2 * half; i < kTileColumns / 2; i += i % 2 == 0 ? 1 : 3) {
            const int column = i / 4 * 8 + 2 * t + i % 2;
            term += (b * read[i] + a * value_sum[column]) * z_at(base + kZ, row, column);
          }
          // The column of the denominator: as a value, of one; as a gradient of its row, -along.
          term -= numbers.along * (b * (read_sum[2 * half] + read_sum[2 * half + 1]) + (t == 0 ? a * weight_sum : 0.f));
          sum[half] += term * numbers.scale;
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        sum[half] += __shfl_xor_sync(kAllLanes, sum[half], 1);
        sum[half] += __shfl_xor_sync(kAllLanes, sum[half], 2);
        const int row = 16 * warp + g + 8 * half;
        if (t == 0 && first + row < segment.end) to[first + row] = sum[half] * decay[row];
      }
    }
  }
};

template <class Engine, int kDim, int kColumns>
__global__ void __launch_bounds__(kWarpgroupThreads, 1)
    state_terms_kernel(const __grid_constant__ DecayGradientArgs args, Terms terms) {
  const int array = blockIdx.x % (2 * terms.state_parts), part = array % terms.state_parts;
  const int block = blockIdx.x / (2 * terms.state_parts), kv_head = block % args.scan.num_kv_heads;
  const Segment segment = find_segment(args.scan, block / args.scan.num_kv_heads);
  if (!segment.exists) return;
  StateTerms<Engine, kDim, kColumns>::run(args, segment, kv_head, part, /*is_after=*/array != part,
                                          array_at(args, terms.states, terms.array, array, segment, kv_head));
}

// This thread's share of x . y over `size` elements.
__device__ __forceinline__ float partial_dot(const float* x, const float* y, int size) {
  float sum = 0.f;
  if (x == nullptr || y == nullptr) return sum;
  for (int i = threadIdx.x; i < size; i += kSumThreads) sum += x[i] * y[i];
  return sum;
}

// What the warps of decay_gradient_kernel, each with a chunk, tell each other.
struct ChunkSums {
  float around[kSegmentChunks];                  // this warp's share of the product of the states
  float log_decay[kSegmentChunks];
  float queries[kSegmentChunks], keys[kSegmentChunks];  // pairs of the chunk's tokens with what is outside the segment
  float blocks[kSegmentChunks][kSegmentChunks];  // pairs of a chunk of keys with a later one of queries
};

// dg of the tokens of one segment and kv head; a warp for each chunk.
__global__ void __launch_bounds__(kSumThreads, 1)
    decay_gradient_kernel(const __grid_constant__ DecayGradientArgs args, Terms terms) {
  ChunkSums& shared = *reinterpret_cast<ChunkSums*>(ptx::dynamic_smem());
  const ScanArgs& scan = args.scan;
  const int lane = threadIdx.x % 32, chunk = threadIdx.x / 32;
  const int kv_head = blockIdx.x % scan.num_kv_heads;
  const Segment segment = find_segment(scan, blockIdx.x / scan.num_kv_heads);
  if (!segment.exists) return;
  const int chunks = chunk_count(segment);
  const int64_t first = segment.begin + static_cast<int64_t>(chunk) * kChunk + 2 * lane;

  const auto load = [&](float (&x)[2], float* arrays, int which) {
    const float* const from = array_at(args, arrays, terms.array, which, segment, kv_head);
#pragma unroll
    for (int i = 0; i < 2; ++i) x[i] = first + i < segment.end ? from[first + i] : 0.f;
  };
  // Of this lane's tokens: as query and as key, with tokens of other chunks, of other segments.
  float own[2] = {0.f, 0.f}, as_query[2] = {0.f, 0.f}, as_key[2] = {0.f, 0.f}, log_decay[2] = {0.f, 0.f};
  float query_outside[2] = {0.f, 0.f}, key_outside[2] = {0.f, 0.f};
  if (chunk < chunks) {
    load_log_decay(log_decay, scan, segment, kv_head, chunk);
    load(own, terms.columns, 0);
    load(as_query, terms.rows, 0);
    for (int later = chunk + 1; later < chunks; ++later) {
      float x[2];
      load(x, terms.columns, later - chunk);
      as_key[0] += x[0], as_key[1] += x[1];
      const float sum = sum_over_warp(x[0] + x[1]);
      if (lane == 0) shared.blocks[chunk][later] = sum;
    }
    for (int part = 0; part < terms.state_parts && terms.states != nullptr; ++part) {
      float x[2];
      load(x, terms.states, part);
      query_outside[0] += x[0], query_outside[1] += x[1];
      load(x, terms.states, terms.state_parts + part);
      key_outside[0] += x[0], key_outside[1] += x[1];
    }
  }
  const SegmentState before = state_at(args, segment, kv_head, false), after = state_at(args, segment, kv_head, true);
  float share = partial_dot(before.kv, after.kv, scan.feature_dim * scan.value_dim) +
                partial_dot(before.key_sum, after.key_sum, scan.feature_dim) +
                partial_dot(before.value_sum, after.value_sum, scan.value_dim) +
                partial_dot(before.weight_sum, after.weight_sum, 1);
  share = sum_over_warp(share);
  const float chunk_decay = sum_over_warp(log_decay[0] + log_decay[1]);
  const float queries_here = sum_over_warp(query_outside[0] + query_outside[1]);
  const float keys_here = sum_over_warp(key_outside[0] + key_outside[1]);
  if (lane == 0) {
    shared.around[chunk] = share;
    shared.log_decay[chunk] = chunk_decay;
    shared.queries[chunk] = queries_here;
    shared.keys[chunk] = keys_here;
  }
  __syncthreads();

  float product = 0.f, total_decay = 0.f, common = 0.f;  // common: pairs around the whole chunk
  for (int i = 0; i < kSegmentChunks; ++i) {
    product += shared.around[i];
    total_decay += shared.log_decay[i];
    common += i < chunk ? shared.keys[i] : i > chunk ? shared.queries[i] : 0.f;
    for (int later = chunk + 1; i < chunk && later < chunks; ++later) common += shared.blocks[i][later];
  }
  common += product * exp2f(total_decay);
#pragma unroll
  for (int i = 0; i < 2; ++i) as_query[i] += query_outside[i], as_key[i] += key_outside[i];
  float from_here[2], up_to_here[2];
  sum_from(from_here, as_query);
  sum_up_to(up_to_here, as_key);
  const float before_here = __shfl_up_sync(kAllLanes, up_to_here[1], 1);
  up_to_here[1] = up_to_here[0];  // a key that is the token itself does not count
  up_to_here[0] = lane == 0 ? 0.f : before_here;
  float* const dg = args.dg + static_cast<int64_t>(segment.batch) * scan.tokens * scan.num_kv_heads + kv_head;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (first + i < segment.end) dg[(first + i) * scan.num_kv_heads] = own[i] + from_here[i] + up_to_here[i] + common;
  }
  // Tokens behind the last packed sequence belong to none.
  if (scan.cu_seqlens != nullptr && segment.sequence == scan.num_sequences - 1 && segment.is_last()) {
    for (int64_t token = segment.end + threadIdx.x; token < scan.tokens; token += kSumThreads) {
      dg[token * scan.num_kv_heads] = 0.f;
    }
  }
}

int chunks_of_segment(int64_t tokens) {
  return static_cast<int>((std::min(tokens, kDecaySegment) + kChunk - 1) / kChunk);
}
int state_parts_of(int value_dim) { return (value_dim + kTileColumns - 1) / kTileColumns; }

int check_blocks(int64_t blocks) {
  if (blocks <= INT32_MAX) return 0;
  return set_error("decay gradient: %lld blocks are more than a grid holds", static_cast<long long>(blocks));
}

int check_smem(int needed) {
  if (needed <= smem_limit()) return 0;
  return set_error("decay gradient: %d bytes of shared memory a block are needed, the device has %d", needed,
                   smem_limit());
}

template <class Engine, int kColumns, bool kIsWhole>
int launch_pair_sums_form(const DecayGradientArgs& args, const Terms& terms, bool only_check, cudaStream_t stream) {
  using Pairs = PairSums<Engine, kColumns, kIsWhole>;
  const int num_stages = Pairs::smem_bytes(2) <= smem_limit() ? 2 : 1;
  if (int error = check_smem(Pairs::smem_bytes(num_stages))) return error;
  if (only_check) return 0;
  const int64_t blocks = static_cast<int64_t>(args.scan.num_kv_heads) * args.scan.num_slots * terms.columns_count;
  if (int error = check_blocks(blocks)) return error;
  return launch(pair_sums_kernel<Engine, kColumns, kIsWhole>, dim3(static_cast<unsigned>(blocks)), kWarpgroupThreads,
                Pairs::smem_bytes(num_stages), stream, args, terms, num_stages);
}

template <class Engine, int kDim, int kColumns>
int launch_state_terms_form(const DecayGradientArgs& args, const Terms& terms, bool only_check, cudaStream_t stream) {
  constexpr int kSmemBytes = StateTerms<Engine, kDim, kColumns>::kSmemBytes;
  if (int error = check_smem(kSmemBytes)) return error;
  if (only_check) return 0;
  const int64_t blocks = int64_t{2} * terms.state_parts * args.scan.num_kv_heads * args.scan.num_slots;
  if (int error = check_blocks(blocks)) return error;
  return launch(state_terms_kernel<Engine, kDim, kColumns>, dim3(static_cast<unsigned>(blocks)), kWarpgroupThreads,
                kSmemBytes, stream, args, terms);
}

// Tiles in parts, as the compact form of a scan (scan_sm80.cuh): compiled where some device lacks the memory for whole
// tiles, and by themselves where most do.
template <class Engine, int kDim>
int launch_pair_sums(const DecayGradientArgs& args, const Terms& terms, bool only_check, cudaStream_t stream) {
  constexpr int kSmemBytes = PairSums<Engine, kDim, true>::smem_bytes(1);
  constexpr bool kHasParts = kSmemBytes > kLeastSmemLimit, kHasWhole = kDim <= Engine::kMaxWholeRows;
  if constexpr (kHasWhole) {
    if (!kHasParts || kSmemBytes <= smem_limit()) {
      return launch_pair_sums_form<Engine, kDim, true>(args, terms, only_check, stream);
    }
  }
  if constexpr (kHasParts) {
    return launch_pair_sums_form<Engine, kPartColumns, false>(args, terms, only_check, stream);
  }
}

template <class Engine, int kDim>
int launch_state_terms(const DecayGradientArgs& args, const Terms& terms, bool only_check, cudaStream_t stream) {
  constexpr int kSmemBytes = StateTerms<Engine, kDim, kDim>::kSmemBytes;
  constexpr bool kHasParts = kSmemBytes > kLeastSmemLimit, kHasWhole = kDim <= Engine::kMaxWholeRows;
  if constexpr (kHasWhole) {
    if (!kHasParts || kSmemBytes <= smem_limit()) {
      return launch_state_terms_form<Engine, kDim, kDim>(args, terms, only_check, stream);
    }
  }
  if constexpr (kHasParts) {
    return launch_state_terms_form<typename Engine::Compact, kDim, kPartColumns>(args, terms, only_check, stream);
  }
}

template <class Engine, int kDim>
int launch_terms_of_dim(const DecayGradientArgs& args, const Terms& terms, bool only_check, cudaStream_t stream) {
  if (int error = launch_pair_sums<Engine, kDim>(args, terms, only_check, stream)) return error;
  if (terms.states == nullptr && !only_check) return 0;
  return launch_state_terms<Engine, kDim>(args, terms, only_check, stream);
}

template <class Engine>
int launch_terms(const DecayGradientArgs& args, const Terms& terms, bool only_check, cudaStream_t stream) {
  const int dim = std::max(args.scan.feature_dim, args.scan.value_dim);
  if (dim <= 64) return launch_terms_of_dim<Engine, 64>(args, terms, only_check, stream);
  if (dim <= 128) return launch_terms_of_dim<Engine, 128>(args, terms, only_check, stream);
  if (dim <= kMaxDim) return launch_terms_of_dim<Engine, kMaxDim>(args, terms, only_check, stream);
  return set_error("decay gradient: dimensions go up to %d, got %d", kMaxDim, dim);
}

int launch_terms_of(int dtype, const DecayGradientArgs& args, const Terms& terms, bool only_check,
                    cudaStream_t stream) {
  switch (dtype) {
    case HF_LINATTN_BF16: return launch_terms<Bf16Mma>(args, terms, only_check, stream);
    case HF_LINATTN_FP16: return launch_terms<Tf32Mma<1, __half>>(args, terms, only_check, stream);
    default: return launch_terms<Tf32Mma<3, float>>(args, terms, only_check, stream);
  }
}

}  // namespace

int64_t decay_gradient_floats(const hf_linattn_problem& problem) {
  const int64_t arrays = 1 + chunks_of_segment(problem.tokens) + 2 * state_parts_of(problem.value_dim);
  return arrays * problem.batch * problem.num_kv_heads * problem.tokens;
}

int check_decay_gradient(int dtype, int feature_dim, int value_dim) {
  DecayGradientArgs args = {};
  args.scan.feature_dim = feature_dim;
  args.scan.value_dim = value_dim;
  return launch_terms_of(dtype, args, {}, /*only_check=*/true, nullptr);
}

int run_decay_gradient(int dtype, const DecayGradientArgs& args, void* stream) {
  const ScanArgs& scan = args.scan;
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  if (scan.num_slots == 0 || scan.tokens == 0) return 0;
  Terms terms = {};
  const int64_t batch = scan.cu_seqlens == nullptr ? scan.num_sequences : 1;
  terms.array = batch * scan.num_kv_heads * scan.tokens;
  terms.columns_count = chunks_of_segment(scan.tokens);
  terms.state_parts = state_parts_of(scan.value_dim);
  terms.rows = args.workspace;
  terms.columns = terms.rows + terms.array;
  const bool has_states = args.first.kv != nullptr || args.d_last.kv != nullptr;
  if (has_states || scan.num_slots > scan.num_sequences) {
    terms.states = terms.columns + terms.columns_count * terms.array;
  }
  if (int error = launch_terms_of(dtype, args, terms, /*only_check=*/false, on)) return error;
  const int64_t blocks = static_cast<int64_t>(scan.num_kv_heads) * scan.num_slots;
  return launch(decay_gradient_kernel, dim3(static_cast<unsigned>(blocks)), kSumThreads, sizeof(ChunkSums), on,
                args, terms);
}

}  // namespace hf_linattn
