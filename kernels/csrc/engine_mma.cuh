// Warp-level matrix products (sm_80 and later) over tiles in shared memory.
//
// An engine multiplies 16 rows, held by one warp as a fragment of 16 columns, with a tile. Element ownership within a
// warp is that of mma.m16n8k16 for every engine: with g = lane / 4 and t = lane % 4, an accumulator of 8 columns holds
// (g, 2t), (g, 2t+1), (g+8, 2t), (g+8, 2t+1); fragment A of 16 columns holds (g, 2t..), (g+8, 2t..), (g, 2t+8..),
// (g+8, 2t+8..) in pairs; fragment B of 16 rows holds (2t, g), (2t+1, g), (2t+8, g), (2t+9, g).
#ifndef HF_LINATTN_ENGINE_MMA_CUH_
#define HF_LINATTN_ENGINE_MMA_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "ptx.cuh"

namespace hf_linattn {

// A variable at an address of shared memory.
template <class V>
__device__ __forceinline__ V& shared_at(uint32_t address) {
  char* const window = ptx::dynamic_smem();
  return *reinterpret_cast<V*>(window + (address - ptx::smem_address(window)));
}

__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}
__device__ __forceinline__ float low_of(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_of(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }

// Tiles of bf16: 128-byte rows of 64 elements whose 16-byte units are exchanged as the copy engine and wgmma do
// (unit ^ row % 8); wider tiles are several such tiles, one after the other. 32 columns make 64-byte rows.
template <int kTileRows, int kTileCols>
struct SwizzledTile {
  static constexpr int kRowBytes = kTileCols >= 64 ? 128 : kTileCols * 2;
  static constexpr int kBytes = kTileRows * kTileCols * 2;
  static __device__ __forceinline__ uint32_t offset(int row, int col) {
    const int half = col / 64, unit = (col % 64) / 8;
    const int swizzled = kTileCols >= 64 ? unit ^ (row & 7) : unit ^ ((row >> 1) & 3);
    return half * (kTileRows * 128) + row * kRowBytes + swizzled * 16 + (col & 7) * 2;
  }
  // The address `col` columns on, for multiples of 8 that carry into no bit of the column already there: as one
  // exclusive or with a constant it needs no register of its own.
  static __device__ __forceinline__ uint32_t shift(uint32_t address, int col) {
    return (address ^ (col % 64 * 2)) + col / 64 * (kTileRows * 128);
  }
  // The address `rows` rows on, for numbers that carry into no bit of the row already there.
  static __device__ __forceinline__ uint32_t below(uint32_t address, int rows) {
    return (address ^ offset(rows, 0) % kRowBytes) + rows * kRowBytes;
  }
};

struct Bf16Mma {
  using Element = __nv_bfloat16;
  using OperandElement = __nv_bfloat16;  // of tiles in shared memory
  template <int kTileRows, int kTileCols>
  using Tile = SwizzledTile<kTileRows, kTileCols>;
  struct FragmentA {
    uint32_t r[4];
  };
  struct FragmentB {
    uint32_t r[2];
  };
  static constexpr bool kIsAsync = false;    // products are in flight between commit and wait
  static constexpr bool kIsRounding = true;  // operands carry fewer bits than float
  static constexpr bool kTruncates = true;   // where it adds to an accumulator
  static constexpr bool kZeroFilled = true;  // rows beyond the segment arrive as zeros
  static constexpr int kScoreColumns = 64;   // scores of a warp's rows in registers at a time
  static constexpr int kMaxWideRows = 128;   // rows of a state of which registers hold 64 columns, else 32
  static constexpr int kMaxWholeRows = 256;  // rows of a state beside which shared memory holds x whole, else in parts
  using Compact = Bf16Mma;                   // what scans in parts use that round a state to two operands

  // A tile as operand B.
  using Operand = uint32_t;
  static __device__ __forceinline__ Operand operand(uint32_t tile) { return tile; }

  static __device__ __forceinline__ float round(float x) { return __bfloat162float(__float2bfloat16_rn(x)); }

  // 16 rows from row0, columns col0 .. col0+15.
  template <class Layout>
  static __device__ __forceinline__ void load_a(FragmentA& a, uint32_t tile, int row0, int col0) {
    const int lane = threadIdx.x % 32;
    const uint32_t corner = tile + Layout::offset(lane % 16, lane / 16 * 8);
    ptx::ldmatrix_x4(a.r, Layout::shift(corner + row0 * Layout::kRowBytes, col0));
  }
  // The transpose: rows of the fragment are the tile's columns col0 .. col0+15, its columns the tile's rows.
  template <class Layout>
  static __device__ __forceinline__ void load_a_transposed(FragmentA& a, uint32_t tile, int col0, int row0) {
    const int lane = threadIdx.x % 32;
    const uint32_t corner = tile + Layout::offset(lane / 16 * 8 + lane % 8, lane / 8 % 2 * 8);
    ptx::ldmatrix_x4_trans(a.r, Layout::shift(corner + row0 * Layout::kRowBytes, col0));
  }
  // Two fragments: rows row0 .. row0+31 of columns col0 .. col0+7.
  template <class Layout>
  static __device__ __forceinline__ void load_b_pair(FragmentB (&b)[2], uint32_t tile, int row0, int col0) {
    uint32_t r[4];
    const uint32_t corner = tile + Layout::offset(threadIdx.x % 32, 0);
    ptx::ldmatrix_x4_trans(r, Layout::shift(corner + row0 * Layout::kRowBytes, col0));
    b[0] = {r[0], r[1]};
    b[1] = {r[2], r[3]};
  }
  static __device__ __forceinline__ FragmentA pack_a(const float (&v)[8]) {
    return {pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]), pack_bf16(v[6], v[7])};
  }
  static __device__ __forceinline__ FragmentB pack_b(const float (&v)[4]) {
    return {pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3])};
  }
  // This lane's column of a fragment: rows 0, 1, 8 and 9 from `rows` on, or zeros.
  static __device__ __forceinline__ FragmentB load_b_column(const OperandElement* rows, bool is_wanted) {
    const uint32_t* pairs = reinterpret_cast<const uint32_t*>(rows);
    return {is_wanted ? pairs[0] : 0, is_wanted ? pairs[4] : 0};
  }
  // Factors f of columns 2t, 2t+1, 2t+8, 2t+9, in two rounded parts: a scaled element is rounded once.
  struct Factors {
    uint32_t high[2], low[2];
  };
  static __device__ __forceinline__ Factors pack_factors(const float (&f)[4]) {
    Factors factors;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      factors.high[i] = pack_bf16(f[2 * i], f[2 * i + 1]);
      factors.low[i] = pack_bf16(f[2 * i] - low_of(factors.high[i]), f[2 * i + 1] - high_of(factors.high[i]));
    }
    return factors;
  }
  static __device__ __forceinline__ void scale_columns(FragmentA& a, const Factors& f) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t rest = ptx::fma_bf16x2(a.r[i], f.low[i / 2], 0x80008000u);
      a.r[i] = ptx::fma_bf16x2(a.r[i], f.high[i / 2], rest);
    }
  }
  static __device__ __forceinline__ void mma(float (&d)[4], const FragmentA& a, const FragmentB& b) {
    ptx::mma_m16n8k16<__nv_bfloat16>(d, a.r, b.r);
  }

  // acc [16, kN] += a [16, 16] times B; rows k0 .. k0+15 of a tile that stores B as [k][n]. A sum starts with start();
  // `accumulate`, false for its first product, is for engines whose products can do that themselves.
  template <int kN, class Layout>
  static __device__ __forceinline__ void gemm_kn(float (&acc)[kN / 2], const FragmentA& a, uint32_t tile, int k0,
                                                 bool /*accumulate*/) {
    const int lane = threadIdx.x % 32;
    const uint32_t corner = tile + Layout::offset(lane % 16, lane / 16 * 8) + k0 * Layout::kRowBytes;
#pragma unroll
    for (int n = 0; n < kN; n += 16) {
      uint32_t r[4];
      ptx::ldmatrix_x4_trans(r, Layout::shift(corner, n));
      multiply_two<kN>(acc, n, a, r);
    }
  }
  // The same with a tile that stores B as [n][k]: columns k0 .. k0+15 of kN rows.
  template <int kN, class Layout>
  static __device__ __forceinline__ void gemm_nk(float (&acc)[kN / 2], const FragmentA& a, uint32_t tile, int k0,
                                                 bool /*accumulate*/) {
    const int lane = threadIdx.x % 32;
    const uint32_t corner = Layout::shift(tile + Layout::offset(lane / 16 * 8 + lane % 8, lane / 8 % 2 * 8), k0);
#pragma unroll
    for (int n = 0; n < kN; n += 16) {
      uint32_t r[4];
      ptx::ldmatrix_x4(r, corner + n * Layout::kRowBytes);
      multiply_two<kN>(acc, n, a, r);
    }
  }
  // Store accumulators [16, kN] to rows row0 .. and columns n0 .. of a tile, rounded; `part` 1 stores what
  // rounding lost.
  template <int kN, class Layout>
  static __device__ __forceinline__ void store(uint32_t tile, int row0, int n0, const float (&acc)[kN / 2],
                                               int part) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const uint32_t corner = Layout::shift(tile + Layout::offset(g, 2 * t), n0) + row0 * Layout::kRowBytes;
#pragma unroll
    for (int n = 0; n < kN / 8; ++n) {
      float v[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        v[i] = acc[4 * n + i];
        if (part) v[i] -= round(v[i]);
      }
      const uint32_t address = Layout::shift(corner, 8 * n);
      shared_at<uint32_t>(address) = pack_bf16(v[0], v[1]);
      shared_at<uint32_t>(address + 8 * Layout::kRowBytes) = pack_bf16(v[2], v[3]);
    }
  }

  // Before the first product of a sum.
  template <int kSize>
  static __device__ __forceinline__ void start(float (&acc)[kSize]) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) acc[i] = 0.f;
  }
  static __device__ __forceinline__ void fence() {}
  static __device__ __forceinline__ void commit() {}
  template <int kPending>
  static __device__ __forceinline__ void wait() {}
  template <int kSize>
  static __device__ __forceinline__ void keep(float (&)[kSize]) {}
  template <int kSize>
  static __device__ __forceinline__ void keep_fragments(FragmentA (&)[kSize]) {}

 private:
  template <int kN>
  static __device__ __forceinline__ void multiply_two(float (&acc)[kN / 2], int n, const FragmentA& a,
                                                      const uint32_t (&r)[4]) {
    const uint32_t b0[2] = {r[0], r[1]}, b1[2] = {r[2], r[3]};
    ptx::mma_m16n8k16<__nv_bfloat16>(reinterpret_cast<float (&)[4]>(acc[n / 2]), a.r, b0);
    ptx::mma_m16n8k16<__nv_bfloat16>(reinterpret_cast<float (&)[4]>(acc[n / 2 + 4]), a.r, b1);
  }
};

// Tiles of float, for float32 and float16 inputs: rows padded so that neighbouring rows start in other banks.
template <int kTileRows, int kTileCols>
struct PaddedTile {
  static constexpr int kRowBytes = (kTileCols + 8) * 4;
  static constexpr int kBytes = kTileRows * kRowBytes;
  static __device__ __forceinline__ uint32_t offset(int row, int col) { return row * kRowBytes + col * 4; }
};

// kPasses 3 splits every operand in two tf32 numbers and keeps three of the four products: float32 accuracy. One pass
// keeps 11 bits of each operand, all that float16 has, with float32's range: sums over many tokens leave float16's.
template <int kPasses, class ElementType>
struct Tf32Mma {
  using Element = ElementType;
  using OperandElement = float;
  template <int kTileRows, int kTileCols>
  using Tile = PaddedTile<kTileRows, kTileCols>;
  struct FragmentA {
    float r[8];
  };
  struct FragmentB {
    float r[4];
  };
  static constexpr bool kIsAsync = false;
  static constexpr bool kIsRounding = kPasses == 1, kTruncates = kPasses == 1;
  static constexpr bool kZeroFilled = true;
  static constexpr int kScoreColumns = 32;  // splitting operands takes registers
  static constexpr int kMaxWideRows = kPasses == 3 ? 64 : 128;
  static constexpr int kMaxWholeRows = 128;
  using Compact = Tf32Mma<3, ElementType>;  // one operand of a state has all its bits

  using Operand = uint32_t;
  static __device__ __forceinline__ Operand operand(uint32_t tile) { return tile; }

  static __device__ __forceinline__ float round(float x) {
    return kPasses == 3 ? x : __uint_as_float(ptx::to_tf32(x));
  }
  template <class Layout>
  static __device__ __forceinline__ void load_a(FragmentA& a, uint32_t tile, int row0, int col0) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      a.r[i] = shared_at<float>(tile + Layout::offset(row0 + g + (i / 2 & 1) * 8, col0 + 2 * t + i / 4 * 8 + i % 2));
    }
  }
  template <class Layout>
  static __device__ __forceinline__ void load_a_transposed(FragmentA& a, uint32_t tile, int col0, int row0) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      a.r[i] = shared_at<float>(tile + Layout::offset(row0 + 2 * t + i / 4 * 8 + i % 2, col0 + g + (i / 2 & 1) * 8));
    }
  }
  template <class Layout>
  static __device__ __forceinline__ void load_b_pair(FragmentB (&b)[2], uint32_t tile, int row0, int col0) {
    load_b_kn<Layout>(b[0], tile, row0, col0);
    load_b_kn<Layout>(b[1], tile, row0 + 16, col0);
  }
  static __device__ __forceinline__ FragmentA pack_a(const float (&v)[8]) {
    FragmentA a;
#pragma unroll
    for (int i = 0; i < 8; ++i) a.r[i] = v[i];
    return a;
  }
  static __device__ __forceinline__ FragmentB pack_b(const float (&v)[4]) { return {v[0], v[1], v[2], v[3]}; }
  static __device__ __forceinline__ FragmentB load_b_column(const OperandElement* rows, bool is_wanted) {
    if (!is_wanted) return {};
    return {rows[0], rows[1], rows[8], rows[9]};
  }
  struct Factors {
    float f[4];
  };
  static __device__ __forceinline__ Factors pack_factors(const float (&f)[4]) { return {f[0], f[1], f[2], f[3]}; }
  static __device__ __forceinline__ void scale_columns(FragmentA& a, const Factors& factors) {
#pragma unroll
    for (int i = 0; i < 8; ++i) a.r[i] *= factors.f[i / 4 * 2 + i % 2];
  }
  // mma.m16n8k8 twice. The order of its k is ours to choose, as long as both operands agree: (t, t+4) are (2t, 2t+1).
  // The unit truncates where it adds to an accumulator, a bias that grows with the sum: three passes add ordinarily.
  static __device__ __forceinline__ void mma(float (&d)[4], const FragmentA& a, const FragmentB& b) {
    if constexpr (kPasses == 3) {
      float step[4] = {0.f, 0.f, 0.f, 0.f};
      multiply(step, a, b);
#pragma unroll
      for (int i = 0; i < 4; ++i) d[i] += step[i];
    } else {
      multiply(d, a, b);
    }
  }
  template <int kN, class Layout>
  static __device__ __forceinline__ void gemm_kn(float (&acc)[kN / 2], const FragmentA& a, uint32_t tile, int k0,
                                                 bool /*accumulate*/) {
    gemm<kN>(acc, a, [&](FragmentB& b, int n) { load_b_kn<Layout>(b, tile, k0, n); });
  }
  template <int kN, class Layout>
  static __device__ __forceinline__ void gemm_nk(float (&acc)[kN / 2], const FragmentA& a, uint32_t tile, int k0,
                                                 bool /*accumulate*/) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    gemm<kN>(acc, a, [&](FragmentB& b, int n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        b.r[i] = shared_at<float>(tile + Layout::offset(n + g, k0 + 2 * t + i / 2 * 8 + i % 2));
      }
    });
  }
  template <int kN, class Layout>
  static __device__ __forceinline__ void store(uint32_t tile, int row0, int n0, const float (&acc)[kN / 2],
                                               int part) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int n = 0; n < kN / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float v = acc[4 * n + i];
        shared_at<float>(tile + Layout::offset(row0 + g + i / 2 * 8, n0 + 8 * n + 2 * t + i % 2)) =
            part ? v - round(v) : round(v);
      }
    }
  }
  template <int kSize>
  static __device__ __forceinline__ void start(float (&acc)[kSize]) {
    Bf16Mma::start(acc);
  }
  static __device__ __forceinline__ void fence() {}
  static __device__ __forceinline__ void commit() {}
  template <int kPending>
  static __device__ __forceinline__ void wait() {}
  template <int kSize>
  static __device__ __forceinline__ void keep(float (&)[kSize]) {}
  template <int kSize>
  static __device__ __forceinline__ void keep_fragments(FragmentA (&)[kSize]) {}

 private:
  // x = high + low, as tf32. Three passes cut high off, which takes one instruction: low has the rest.
  static __device__ __forceinline__ void split(float x, uint32_t& high, uint32_t& low) {
    high = kPasses == 3 ? __float_as_uint(x) & 0xffffe000u : ptx::to_tf32(x);
    low = ptx::to_tf32(x - __uint_as_float(high));
  }
  static __device__ __forceinline__ void multiply(float (&d)[4], const FragmentA& a, const FragmentB& b) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float* p = a.r + 4 * half;
      const float av[4] = {p[0], p[2], p[1], p[3]}, bv[2] = {b.r[2 * half], b.r[2 * half + 1]};
      uint32_t ah[4], al[4], bh[2], bl[2];
#pragma unroll
      for (int i = 0; i < 4; ++i) split(av[i], ah[i], al[i]);
#pragma unroll
      for (int i = 0; i < 2; ++i) split(bv[i], bh[i], bl[i]);
      if (kPasses == 3) {
        ptx::mma_m16n8k8_tf32(d, al, bh);
        ptx::mma_m16n8k8_tf32(d, ah, bl);
      }
      ptx::mma_m16n8k8_tf32(d, ah, bh);
    }
  }
  template <class Layout>
  static __device__ __forceinline__ void load_b_kn(FragmentB& b, uint32_t tile, int k0, int n) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      b.r[i] = shared_at<float>(tile + Layout::offset(k0 + 2 * t + i / 2 * 8 + i % 2, n + g));
    }
  }
  template <int kN, class Load>
  static __device__ __forceinline__ void gemm(float (&acc)[kN / 2], const FragmentA& a, Load load) {
#pragma unroll
    for (int n = 0; n < kN / 8; ++n) {
      float(&d)[4] = reinterpret_cast<float(&)[4]>(acc[4 * n]);
      FragmentB b;
      load(b, 8 * n);
      mma(d, a, b);
    }
  }
};

}  // namespace hf_linattn

#endif  // HF_LINATTN_ENGINE_MMA_CUH_
