// All gradients of the softmax part of window_linear_attention in one kernel for Hopper (sm_90a), for windows of at most 65
// keys: 64 queries see keys of two chunks. Formulas: window_gradient.h; dv_j of the window = sum_i p_ij do_i.
//
// A CTA walks over the chunks of a segment of one kv head. At step i are queries of chunk i and keys of chunks i - 1 and i,
// one for each of two warpgroups, which keep dk and dv of their chunk in registers for the two steps that add to it: a
// chunk of even number belongs to the first. They form s and do.v transposed, rows are keys, so that weights are operands
// as they are; ds passes through shared memory, of which both take what adds to dq. At the ends of a segment are a chunk
// of keys before it, for dq, and one of queries behind it, for dk and dv.
//
//   producer warp    asks the copy engine for k, v of a chunk, then q, do, o of each head of the group
//   numbers, 2 warps a thread a row: L and delta of queries; clears rows of other sequences
//   keys, 2 groups   the products
#include "window_gradient.h"

#include <float.h>

#include <algorithm>

#include "engine_wgmma.cuh"
#include "launch.cuh"
#include "scan_sm90.cuh"

namespace hf_linattn {
namespace {

constexpr int kGroups = 2, kNumberWarps = 2, kThreads = (kGroups + 1) * kWarpgroupThreads;
constexpr int kKeyStages = 3, kQueryStages = 2;
// Of a thread. A block starts with as many for all as 65536 leave, in eights, and deals them out anew.
constexpr int kKeyRegisters = 232, kProducerRegisters = 40;
static_assert(kGroups * kKeyRegisters + kProducerRegisters <= (kGroups + 1) * (65536 / kThreads / 8 * 8));

struct PairArgs : WindowGradientArgs {
  Rows dv;
  int num_slots;
  int64_t segment_tokens;
};

struct PairMaps {
  CUtensorMap q, k, v, d_o, o;
};

#if HF_LINATTN_HAS_SM90

// All dimensions are padded to kDim.
template <int kDim>
struct PairGradient {
  using Engine = Bf16Wgmma;
  using FragmentA = Engine::FragmentA;
  using Tile = SwizzledTile<kChunk, kDim>;
  using HalfTile = SwizzledTile<kChunk, 64>;  // 64 columns of Tile; ds, whose rows are keys
  using OutTile = SwizzledTile<16, 64>;
  static constexpr int kHalves = kDim / 64, kHalfBytes = HalfTile::kBytes;

  // Shared memory.
  static constexpr int kKeys = 1024, kQueries = kKeys + kKeyStages * 2 * Tile::kBytes;  // k, v; q, do
  static constexpr int kO = kQueries + kQueryStages * 2 * Tile::kBytes;
  static constexpr int kDs = kO + Tile::kBytes;                                        // of two steps, of two chunks of keys
  static constexpr int kOut = kDs + 4 * HalfTile::kBytes;                               // of a warp
  static constexpr int kNumbers = kOut + 4 * kGroups * OutTile::kBytes;                 // L in units of log2, delta
  static constexpr int kBytes = kNumbers + kQueryStages * 2 * kChunk * 4;
  static_assert(kBytes <= 227 * 1024);

  const PairArgs& args;
  const PairMaps& maps;
  const Segment segment;
  const int kv_head, group;
  const uint32_t base;
  const int chunks;      // of keys, and of queries whose dq is wanted
  const bool has_before, has_behind;
  const int sequence_end;

  __device__ __forceinline__ PairGradient(const PairArgs& args, const PairMaps& maps, const Segment& segment, int kv_head)
      : args(args),
        maps(maps),
        segment(segment),
        kv_head(kv_head),
        group(args.num_heads / args.num_kv_heads),
        base(ptx::smem_address(ptx::dynamic_smem())),
        chunks(chunk_count(segment)),
        has_before(!segment.is_first),
        has_behind(!segment.is_last),
        sequence_end(static_cast<int>(args.cu_seqlens == nullptr ? args.tokens : sequence_bound(args, segment.sequence + 1))) {}

  __device__ __forceinline__ int steps() const { return chunks + has_behind; }
  __device__ __forceinline__ int token(int chunk) const { return static_cast<int>(segment.begin) + chunk * kChunk; }
  __device__ __forceinline__ int valid(int chunk) const { return min(sequence_end - token(chunk), kChunk); }
  // Places of keys and queries in their rings are counted from the first on.
  __device__ __forceinline__ int key_count(int chunk) const { return chunk + has_before; }

  __device__ __forceinline__ uint32_t key_tile(int count) const { return base + kKeys + count % kKeyStages * 2 * Tile::kBytes; }
  __device__ __forceinline__ uint32_t query_tile(int stage) const { return base + kQueries + stage * 2 * Tile::kBytes; }
  __device__ __forceinline__ uint32_t ds_tile(int turn, int which) const { return base + kDs + (2 * turn + which) * HalfTile::kBytes; }
  __device__ __forceinline__ float* numbers(int stage) const { return &shared_at<float>(base + kNumbers + stage * 2 * kChunk * 4); }

  enum Barrier { kFull, kReady, kEmpty };
  static __device__ __forceinline__ uint32_t key_bar(uint32_t base, Barrier which, int count) {
    return base + 8 * (which * kKeyStages + count % kKeyStages);
  }
  static __device__ __forceinline__ uint32_t query_bar(uint32_t base, Barrier which, int stage) {
    return base + 8 * (3 * kKeyStages + which * kQueryStages + stage);
  }
  static __device__ __forceinline__ uint32_t o_bar(uint32_t base, Barrier which) {
    return base + 8 * (3 * kKeyStages + 3 * kQueryStages + which);
  }
  static __device__ __forceinline__ uint32_t full_parity(int count, int stages) { return count / stages & 1; }
  static __device__ __forceinline__ uint32_t empty_parity(int count, int stages) { return (count / stages & 1) ^ 1; }

  static __device__ __forceinline__ void init_barriers(uint32_t base) {
    for (int i = 0; i < kKeyStages; ++i) {
      ptx::mbarrier_init(key_bar(base, kFull, i), 1);
      ptx::mbarrier_init(key_bar(base, kReady, i), kNumberWarps);
      ptx::mbarrier_init(key_bar(base, kEmpty, i), 4 * kGroups);
    }
    for (int i = 0; i < kQueryStages; ++i) {
      ptx::mbarrier_init(query_bar(base, kFull, i), 1);
      ptx::mbarrier_init(query_bar(base, kReady, i), kNumberWarps);
      ptx::mbarrier_init(query_bar(base, kEmpty, i), 4 * kGroups);
    }
    ptx::mbarrier_init(o_bar(base, kFull), 1);
    ptx::mbarrier_init(o_bar(base, kEmpty), kNumberWarps);
    ptx::mbarrier_init_fence();
  }

  // One thread.
  __device__ __forceinline__ void produce() const {
    int item = 0;
    if (has_before) load_keys(-1);
    for (int step = 0; step < steps(); ++step) {
      if (step < chunks) load_keys(step);
      for (int member = 0; member < group; ++member, ++item) {
        const int stage = item % kQueryStages, head = kv_head * group + member;
        ptx::mbarrier_wait(query_bar(base, kEmpty, stage), empty_parity(item, kQueryStages));
        ptx::mbarrier_arrive_expect_tx(query_bar(base, kFull, stage), 2 * Tile::kBytes);
        load(query_tile(stage), maps.q, query_bar(base, kFull, stage), head, step);
        load(query_tile(stage) + Tile::kBytes, maps.d_o, query_bar(base, kFull, stage), head, step);
        ptx::mbarrier_wait(o_bar(base, kEmpty), empty_parity(item, 1));
        ptx::mbarrier_arrive_expect_tx(o_bar(base, kFull), Tile::kBytes);
        load(base + kO, maps.o, o_bar(base, kFull), head, step);
      }
    }
  }
  __device__ __forceinline__ void load_keys(int chunk) const {
    const int count = key_count(chunk);
    ptx::mbarrier_wait(key_bar(base, kEmpty, count), empty_parity(count, kKeyStages));
    ptx::mbarrier_arrive_expect_tx(key_bar(base, kFull, count), 2 * Tile::kBytes);
    load(key_tile(count), maps.k, key_bar(base, kFull, count), kv_head, chunk);
    load(key_tile(count) + Tile::kBytes, maps.v, key_bar(base, kFull, count), kv_head, chunk);
  }
  __device__ __forceinline__ void load(uint32_t tile, const CUtensorMap& map, uint32_t bar, int head, int chunk) const {
    for (int half = 0; half < kHalves; ++half) {
      ptx::tma_load_4d(tile + half * kHalfBytes, &map, bar, 64 * half, head, token(chunk), segment.batch);
    }
  }

  // Two warps, a thread a row.
  __device__ __forceinline__ void form_numbers(int row) const {
    int item = 0;
    if (has_before) pass_keys(-1, row);
    for (int step = 0; step < steps(); ++step) {
      if (step < chunks) pass_keys(step, row);
      const bool is_inside = row < valid(step);
      for (int member = 0; member < group; ++member, ++item) {
        const int stage = item % kQueryStages, head = kv_head * group + member;
        const auto number_at = [&] {
          return (static_cast<int64_t>(hidden(segment.batch)) * args.num_heads + head) * args.tokens + token(step) + row;
        };
        const float lse = is_inside ? args.lse[number_at()] : 0.f;
        ptx::mbarrier_wait(query_bar(base, kFull, stage), full_parity(item, kQueryStages));
        ptx::mbarrier_wait(o_bar(base, kFull), full_parity(item, 1));
        const uint32_t q = query_tile(stage), d_o = q + Tile::kBytes, o = base + kO;
        float delta = 0.f;
#pragma unroll 1
        for (int column = 0; column < kDim; column += 8) {
          const uint4 x = shared_at<uint4>(o + Tile::offset(row, column)), y = shared_at<uint4>(d_o + Tile::offset(row, column));
          delta += low_of(x.x) * low_of(y.x) + high_of(x.x) * high_of(y.x) + low_of(x.y) * low_of(y.y) + high_of(x.y) * high_of(y.y);
          delta += low_of(x.z) * low_of(y.z) + high_of(x.z) * high_of(y.z) + low_of(x.w) * low_of(y.w) + high_of(x.w) * high_of(y.w);
        }
        if (!is_inside) delta = 0.f, clear_row(q, row), clear_row(d_o, row);
        numbers(stage)[row] = lse * kLog2E;
        numbers(stage)[kChunk + row] = delta;
        arrive(query_bar(base, kReady, stage));
        if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(o_bar(base, kEmpty));
        if (is_inside && step < chunks) {
          constexpr float kMostWeight = 1.f / FLT_MIN;
          const float weight = expf((args.log_scale == nullptr ? 0.f : args.log_scale[head]) - lse);
          const int64_t at = number_at();
          args.delta[at] = delta;
          args.far_weight[at] = weight > kMostWeight ? kMostWeight : weight;  // a NaN stays one
        }
      }
    }
  }
  __device__ __forceinline__ void pass_keys(int chunk, int row) const {
    const int count = key_count(chunk);
    ptx::mbarrier_wait(key_bar(base, kFull, count), full_parity(count, kKeyStages));
    if (row >= valid(chunk)) clear_row(key_tile(count), row), clear_row(key_tile(count) + Tile::kBytes, row);
    arrive(key_bar(base, kReady, count));
  }
  __device__ __forceinline__ void clear_row(uint32_t tile, int row) const {
#pragma unroll 1
    for (int column = 0; column < kDim; column += 8) {
      shared_at<float4>(tile + Tile::offset(row, column)) = make_float4(0.f, 0.f, 0.f, 0.f);
    }
  }
  // Of this warp, after what its lanes wrote for wgmma.
  __device__ __forceinline__ void arrive(uint32_t bar) const {
    ptx::fence_proxy_async();
    __syncwarp();
    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(bar);
  }

  struct Sums {
    float dk[kHalves][32], dv[kHalves][32];
  };

  // A warpgroup of keys.
  __device__ __forceinline__ void run(int own) const {
    const int warp = threadIdx.x / 32 % 4;
    Sums sums;
    int item = 0;
    if (has_before) wait_for_keys(-1);
    for (int step = 0; step < steps(); ++step) {
      if (step < chunks) wait_for_keys(step);
      const bool is_current = step % 2 == own;
      const int chunk = is_current ? step : step - 1;
      const bool exists_before = step > 0 || has_before, exists = is_current ? step < chunks : exists_before;
      // A chunk that is not there has no keys that are seen; the other's tiles stand for its own.
      const uint32_t current = key_tile(key_count(step < chunks ? step : step - 1));
      const uint32_t before = key_tile(key_count(exists_before ? step - 1 : step));
      for (int member = 0; member < group; ++member, ++item) {
        const int stage = item % kQueryStages, turn = item % 2;
        ptx::mbarrier_wait(query_bar(base, kFull, stage), full_parity(item, kQueryStages));
        ptx::mbarrier_wait(query_bar(base, kReady, stage), full_parity(item, kQueryStages));
        const uint32_t q = query_tile(stage), d_o = q + Tile::kBytes;
        FragmentA p_operand[4], ds_operand[4];
        add_keys(sums, p_operand, ds_operand, is_current ? current : before, q, numbers(stage), exists ? step - chunk : -1,
                 valid(step), !is_current || member > 0, ds_tile(turn, is_current));
        Engine::template wait<0>();
        keep(sums);
        Engine::keep_fragments(p_operand);
        Engine::keep_fragments(ds_operand);
        ptx::named_barrier_sync(1, kGroups * kWarpgroupThreads);
        const int half = kHalves > 1 ? own : 0;
        const bool is_writer = step < chunks && (kHalves > 1 || is_current);
        if (is_writer) {
          float dq[32];
          FragmentA ds[8];
#pragma unroll
          for (int k = 0; k < 8; ++k) {
            Engine::template load_a_transposed<HalfTile>(ds[k], ds_tile(turn, k / 4), 16 * warp, 16 * (k % 4));
          }
          Engine::fence();
          const typename Engine::Operand of_before = Engine::operand(hidden(before) + half * kHalfBytes);
          const typename Engine::Operand of_current = Engine::operand(hidden(current) + half * kHalfBytes);
#pragma unroll
          for (int k = 0; k < 8; ++k) {
            Engine::template gemm_kn<64, HalfTile>(dq, ds[k], k < 4 ? of_before : of_current, 16 * (k % 4), k > 0);
          }
          Engine::commit();
          Engine::template wait<0>();
          Engine::keep(dq);
          Engine::keep_fragments(ds);
          write_rows(args.dq, kv_head * group + member, token(step), valid(step), 64 * half, dq, args.scale,
                     base + kOut + (own * 4 + warp) * OutTile::kBytes);
        }
        __syncwarp();
        if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(query_bar(base, kEmpty, stage));
      }
      const bool is_over = is_current ? step == chunks - 1 && !has_behind : step > 0;
      if (is_over) {
        // This warp's rows of v are read: their place takes the results on their way.
        const uint32_t place = (is_current ? current : before) + Tile::kBytes + warp * OutTile::kBytes;
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {
          write_rows(args.dv, kv_head, token(chunk), valid(chunk), 64 * half, sums.dv[half], 1.f, place + half * kHalfBytes);
          write_rows(args.dk, kv_head, token(chunk), valid(chunk), 64 * half, sums.dk[half], args.scale, place + half * kHalfBytes);
        }
      }
      if (exists_before) arrive(key_bar(base, kEmpty, key_count(step - 1)));
    }
    if (own == 0) clear_tail();
  }

 private:
  __device__ __forceinline__ void wait_for_keys(int chunk) const {
    const int count = key_count(chunk);
    ptx::mbarrier_wait(key_bar(base, kFull, count), full_parity(count, kKeyStages));
    ptx::mbarrier_wait(key_bar(base, kReady, count), full_parity(count, kKeyStages));
  }
  static __device__ __forceinline__ void keep(Sums& sums) {
#pragma unroll
    for (int half = 0; half < kHalves; ++half) Engine::keep(sums.dk[half]), Engine::keep(sums.dv[half]);
  }

  // dv += p^T do, dk += ds^T q, both in flight on return, and ds^T into `ds_place`. Keys are `apart` chunks before the
  // queries, or (-1) not there.
  __device__ __forceinline__ void add_keys(Sums& sums, FragmentA (&p_operand)[4], FragmentA (&ds_operand)[4], uint32_t k_tile,
                                           uint32_t q, const float* of_queries, int apart, int queries, bool accumulate,
                                           uint32_t ds_place) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, g = lane / 4, t = lane % 4;
    const uint32_t d_o = q + Tile::kBytes;
    of_queries += 2 * hidden(t);
    float p[32];
    Engine::fence();
    multiply(p, k_tile, q);
    Engine::commit();
    // Of its columns each of this thread's two rows sees those from `low` on and before `high`.
    int low[2], high[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int at = 16 * warp + g + 8 * i - 2 * t - kChunk * apart;
      low[i] = at;
      high[i] = apart < 0 ? -kChunk : min(at + args.window, queries - 2 * t);
    }
    const float to_log2 = args.scale * kLog2E;
    Engine::template wait<0>();
    Engine::keep(p);
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const float2 lse = *reinterpret_cast<const float2*>(of_queries + 8 * n);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float weight = ptx::exp2(p[4 * n + i] * to_log2 - (i % 2 ? lse.y : lse.x));
        const int right = 8 * n + i % 2;
        p[4 * n + i] = right >= low[i / 2] && right < high[i / 2] ? weight : 0.f;
      }
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) p_operand[k] = Engine::pack_a(reinterpret_cast<const float(&)[8]>(p[8 * k]));
    float(&dp)[32] = p;  // registers hold one of the two
    Engine::fence();
    multiply(dp, k_tile + Tile::kBytes, d_o);
    Engine::commit();
    Engine::fence();
    add_rows(sums.dv, p_operand, d_o, accumulate);
    Engine::commit();
    Engine::template wait<1>();
    Engine::keep(dp);
    // With the rounded weights, those of dv.
#pragma unroll
    for (int k = 0; k < 4; ++k) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float2 delta = *reinterpret_cast<const float2*>(of_queries + kChunk + 16 * k + 8 * half);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const uint32_t weight = p_operand[k].r[2 * half + i];
          float& low = dp[8 * k + 4 * half + 2 * i];
          float& high = dp[8 * k + 4 * half + 2 * i + 1];
          low = low_of(weight) * (low - delta.x);
          high = high_of(weight) * (high - delta.y);
        }
      }
      ds_operand[k] = Engine::pack_a(reinterpret_cast<const float(&)[8]>(dp[8 * k]));
    }
    Engine::fence();
    add_rows(sums.dk, ds_operand, q, accumulate);
    Engine::commit();
    const uint32_t corner = ds_place + HalfTile::offset(lane % 16, lane / 16 * 8) + 16 * warp * HalfTile::kRowBytes;
#pragma unroll
    for (int k = 0; k < 4; ++k) ptx::stmatrix_x4(HalfTile::shift(corner, 16 * k), ds_operand[k].r);
  }
  // p = rows of x by rows of y
  __device__ __forceinline__ void multiply(float (&p)[32], uint32_t x, uint32_t y) const {
    const typename Engine::Operand of_x = Engine::operand(hidden(x)), of_y = Engine::operand(hidden(y));
#pragma unroll
    for (int k = 0; k < kDim; k += 16) {
      const int at = (k / 64 * kHalfBytes + k % 64 * 2) / 16;
      ptx::wgmma_ss<__nv_bfloat16>(p, Engine::descriptor(of_x + at), Engine::descriptor(of_y + at), k > 0);
    }
  }
  __device__ __forceinline__ void add_rows(float (&sum)[kHalves][32], const FragmentA (&weights)[4], uint32_t tile,
                                           bool accumulate) const {
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      const typename Engine::Operand of_tile = Engine::operand(hidden(tile) + half * kHalfBytes);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        Engine::template gemm_kn<64, HalfTile>(sum[half], weights[k], of_tile, 16 * k, k > 0 || accumulate);
      }
    }
  }

  // This warp's 16 rows of a tile, 64 columns, by way of `place`.
  __device__ __forceinline__ void write_rows(const Rows& to, int head, int first, int count, int column0, const float (&x)[32],
                                             float factor, uint32_t place) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    float scaled[32];
#pragma unroll
    for (int i = 0; i < 32; ++i) scaled[i] = x[i] * factor;
    __syncwarp();
    Engine::template store<64, OutTile>(place, 0, 0, scaled, 0);
    __syncwarp();
    __nv_bfloat16* const out = static_cast<__nv_bfloat16*>(to.data) + segment.batch * to.batch_stride + head * to.head_stride +
                               (first + 16 * warp) * to.token_stride + column0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = 4 * i + lane / 8, column = lane % 8 * 8;
      if (16 * warp + row < count && column0 + column < to.dim) {
        *reinterpret_cast<uint4*>(out + row * to.token_stride + column) = shared_at<uint4>(place + OutTile::offset(row, column));
      }
    }
  }

  // Tokens behind the last packed sequence belong to none: what is written of them is zero.
  __device__ __forceinline__ void clear_tail() const {
    if (args.cu_seqlens == nullptr || segment.sequence != args.num_sequences - 1 || !segment.is_last) return;
    for (int64_t at = segment.end + threadIdx.x / 32; at < args.tokens; at += kWarpgroupThreads / 32) {
      clear(args.dk, kv_head, at);
      clear(args.dv, kv_head, at);
      for (int head = kv_head * group; head < (kv_head + 1) * group; ++head) {
        clear(args.dq, head, at);
        if (threadIdx.x % 32 == 0) args.delta[head * args.tokens + at] = args.far_weight[head * args.tokens + at] = 0.f;
      }
    }
  }
  __device__ __forceinline__ void clear(const Rows& to, int head, int64_t at) const {
    __nv_bfloat16* const row = static_cast<__nv_bfloat16*>(to.data) + head * to.head_stride + at * to.token_stride;
    for (int c = threadIdx.x % 32; c < to.dim; c += 32) row[c] = static_cast<__nv_bfloat16>(0.f);
  }
};

#endif  // HF_LINATTN_HAS_SM90

template <int kDim>
__global__ void __launch_bounds__(kThreads, 1)
    window_gradients_sm90_kernel(const __grid_constant__ PairArgs args, const __grid_constant__ PairMaps maps) {
#if HF_LINATTN_HAS_SM90
  if (!find_segment(args, blockIdx.x / args.num_kv_heads).exists) return;
  // Formed anew for each role: none keeps it for another.
  const auto form = [&] {
    const int block = hidden(blockIdx.x);
    return PairGradient<kDim>(args, maps, find_segment(args, block / args.num_kv_heads), block % args.num_kv_heads);
  };
  if (threadIdx.x == 0) PairGradient<kDim>::init_barriers(ptx::smem_address(ptx::dynamic_smem()));
  __syncthreads();
  const int warpgroup = threadIdx.x / kWarpgroupThreads, warp = threadIdx.x / 32 % 4;
  if (warpgroup == kGroups) {
    ptx::register_dealloc<kProducerRegisters>();
    if (warp == 0 && threadIdx.x % 32 == 0) form().produce();
    if (warp == 1 || warp == 2) form().form_numbers(threadIdx.x % kWarpgroupThreads - 32);
  } else {
    ptx::register_alloc<kKeyRegisters>();
    form().run(warpgroup);
  }
#endif
}

template <int kDim>
int launch_window_gradients(PairArgs& args, cudaStream_t stream) {
#if HF_LINATTN_HAS_SM90
  // The longest segments that leave no processor idle for long: a segment costs a step more, and its beginning.
  constexpr int kExtraSteps = 3;
  const int64_t processors = std::max(multiprocessor_count(), 1), batch = args.cu_seqlens == nullptr ? args.num_sequences : 1;
  int64_t least = INT64_MAX;
  for (int64_t length = 2 * kChunk; length <= 256 * kChunk; length *= 2) {
    const int64_t segments = (args.tokens + length - 1) / length;
    const int64_t waves = (segments * batch * args.num_kv_heads + processors - 1) / processors;
    const int64_t steps = waves * (std::min(length, args.tokens) / kChunk + kExtraSteps);
    if (steps < least) least = steps, args.segment_tokens = length;
  }
  const int64_t slots = args.cu_seqlens == nullptr
                            ? args.num_sequences * std::max<int64_t>((args.tokens + args.segment_tokens - 1) / args.segment_tokens, 1)
                            : args.tokens / args.segment_tokens + args.num_sequences;
  if (slots * args.num_kv_heads > INT32_MAX) return set_error("window gradients: too many blocks for a grid; split the batch");
  args.num_slots = static_cast<int>(slots);
  PairMaps maps = {};
  auto map = [&](CUtensorMap* to, const Rows& rows, int heads) {
    return make_tensor_map(to, HF_LINATTN_BF16, rows.data, rows.dim, heads, args.tokens, batch, rows.head_stride,
                           rows.token_stride, rows.batch_stride, 64, kChunk);
  };
  if (int error = map(&maps.q, args.q, args.num_heads)) return error;
  if (int error = map(&maps.k, args.k, args.num_kv_heads)) return error;
  if (int error = map(&maps.v, args.v, args.num_kv_heads)) return error;
  if (int error = map(&maps.d_o, args.d_o, args.num_heads)) return error;
  if (int error = map(&maps.o, args.o, args.num_heads)) return error;
  return launch(window_gradients_sm90_kernel<kDim>, dim3(static_cast<unsigned>(slots * args.num_kv_heads)), kThreads,
                PairGradient<kDim>::kBytes, stream, args, maps);
#else
  return set_error("window gradients: not compiled for sm_90a");
#endif
}

}  // namespace

bool takes_window_gradients_sm90(int dtype, const WindowGradientArgs& args, const Rows& dv) {
  const bool has_aligned_rows = is_tileable(args.q) && is_tileable(args.k) && is_tileable(args.v) && is_tileable(args.d_o) &&
                                is_tileable(args.o) && is_tileable(args.dq) && is_tileable(args.dk) && is_tileable(dv);
  return dtype == HF_LINATTN_BF16 && compute_capability() == 90 && args.tokens > 0 && args.tokens <= INT32_MAX - 2 * kChunk &&
         args.window <= kChunk + 1 && args.softcap == 0.f && args.key_valid == nullptr && args.q.dim <= 128 &&
         args.v.dim <= 128 && args.q.dim % 8 == 0 && args.v.dim % 8 == 0 && has_aligned_rows;
}

int run_window_gradients_sm90(const WindowGradientArgs& args, const Rows& dv, void* stream) {
  PairArgs pairs = {};
  static_cast<WindowGradientArgs&>(pairs) = args;
  pairs.dv = dv;
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  return std::max(args.q.dim, args.v.dim) <= 64 ? launch_window_gradients<64>(pairs, on) : launch_window_gradients<128>(pairs, on);
}

}  // namespace hf_linattn
