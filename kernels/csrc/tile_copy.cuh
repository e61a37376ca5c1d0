// A tile of global memory into shared memory, by the threads of one warpgroup (sm_80 and later).
#ifndef HF_LINATTN_TILE_COPY_CUH_
#define HF_LINATTN_TILE_COPY_CUH_

#include "engine_mma.cuh"
#include "scan_warpgroup.cuh"

namespace hf_linattn {

template <class Layout>
__device__ __forceinline__ void put_element(uint32_t tile, int row, int column, __nv_bfloat16 value) {
  shared_at<__nv_bfloat16>(tile + Layout::offset(row, column)) = value;
}
template <class Layout, class Wide>
__device__ __forceinline__ void put_element(uint32_t tile, int row, int column, Wide value) {
  shared_at<float>(tile + Layout::offset(row, column)) = static_cast<float>(value);
}

// Rows first .. first+63 of one head, columns column0 .. column0+kWidth-1; what lies beyond `end` or the tensor becomes
// zero. By cp.async, or element by element where rows are not aligned or need converting.
template <class Element, class Layout, int kWidth>
__device__ __forceinline__ void copy_tile(uint32_t tile, const Rows& rows, int batch, int head, int64_t first,
                                          int64_t end, int column0) {
  const Element* base = static_cast<const Element*>(rows.data) + hidden(batch) * rows.batch_stride +
                        hidden(head) * rows.head_stride + first * rows.token_stride + column0;
  const int columns = rows.dim - column0 < kWidth ? rows.dim - column0 : kWidth;
  const int64_t left = end - first;
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
      put_element<Layout>(tile, row, column, is_inside ? base[row * rows.token_stride + column] : Element(0.f));
    }
  }
}

}  // namespace hf_linattn

#endif  // HF_LINATTN_TILE_COPY_CUH_
