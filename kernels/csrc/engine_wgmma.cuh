// Warpgroup-level matrix products (sm_90a): A from registers, B from a tile in shared memory, asynchronous.
//
// Fragments and accumulators of a warp are those of engine_mma.cuh; warp w of the group holds rows 16w .. 16w+15. All
// four warps issue together. Between `commit` and `wait` nothing may touch the accumulators or fragments A in flight.
#ifndef HF_LINATTN_ENGINE_WGMMA_CUH_
#define HF_LINATTN_ENGINE_WGMMA_CUH_

#include "engine_mma.cuh"

namespace hf_linattn {

#if HF_LINATTN_HAS_SM90

struct Bf16Wgmma : Bf16Mma {
  static constexpr bool kIsAsync = true;
  static constexpr bool kZeroFilled = false;  // the copy engine also brings rows of the next sequence

  // Descriptors count in units of 16 bytes: a place within a tile is a constant to add, to a field that it does not leave.
  using Operand = uint64_t;
  static __device__ __forceinline__ Operand operand(uint32_t tile) { return ptx::wgmma_descriptor(tile); }
  static __device__ __forceinline__ Operand advanced(Operand tile, uint32_t bytes) {
    return (tile & ~uint64_t{0xffffffff}) | (static_cast<uint32_t>(tile) + bytes / 16);
  }

  template <int kN, class Layout>
  static __device__ __forceinline__ void gemm_kn(float (&acc)[kN / 2], const FragmentA& a, Operand tile, int k0,
                                                 bool accumulate) {
    ptx::wgmma_rs<Element, kN, true>(acc, a.r, advanced(tile, k0 * 128), accumulate);
  }
  template <int kN, class Layout>
  static __device__ __forceinline__ void gemm_nk(float (&acc)[kN / 2], const FragmentA& a, Operand tile, int k0,
                                                 bool accumulate) {
    ptx::wgmma_rs<Element, kN, false>(acc, a.r, advanced(tile, k0 / 64 * (kN * 128) + k0 % 64 * 2), accumulate);
  }
  template <int kN, class Layout>
  static __device__ __forceinline__ void store(uint32_t tile, int row0, int n0, const float (&acc)[kN / 2],
                                               int part) {
    const int lane = threadIdx.x % 32;
    const uint32_t corner = Layout::shift(tile + Layout::offset(lane % 16, lane / 16 * 8), n0) + row0 * Layout::kRowBytes;
#pragma unroll
    for (int n = 0; n < kN / 8; n += 2) {
      float v[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        v[i] = acc[4 * n + i];
        if (part) v[i] -= round(v[i]);
      }
      ptx::stmatrix_x4(Layout::shift(corner, 8 * n), pack_a(v).r);
    }
  }
  template <int kSize>
  static __device__ __forceinline__ void start(float (&)[kSize]) {}
  static __device__ __forceinline__ void fence() { ptx::wgmma_fence(); }
  static __device__ __forceinline__ void commit() { ptx::wgmma_commit(); }
  template <int kPending>
  static __device__ __forceinline__ void wait() {
    ptx::wgmma_wait<kPending>();
  }
  template <int kSize>
  static __device__ __forceinline__ void keep(float (&x)[kSize]) {
    ptx::keep(x);
  }
  // Registers of A stay as they are until the product that reads them is over.
  template <int kSize>
  static __device__ __forceinline__ void keep_fragments(FragmentA (&a)[kSize]) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) ptx::keep(a[i].r);
  }
};

#endif  // HF_LINATTN_HAS_SM90

}  // namespace hf_linattn

#endif  // HF_LINATTN_ENGINE_WGMMA_CUH_
