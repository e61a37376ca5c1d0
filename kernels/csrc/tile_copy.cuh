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

// Element by element: 64 rows of kWidth columns, zero where `tokens` has no row.
template <class Element, class Layout, int kWidth>
__device__ __forceinline__ void copy_elements(uint32_t tile, const Element* base, int64_t token_stride,
                                              const TileTokens& tokens, int columns) {
#pragma unroll 1
  for (int i = threadIdx.x; i < kChunk * kWidth; i += kWarpgroupThreads) {
    const int row = i / kWidth, column = i % kWidth;
    const bool is_inside = tokens.has(row) && column < columns;
    put_element<Layout>(tile, row, column, is_inside ? base[row * token_stride + column] : Element(0.f));
  }
}

template <class Element>
__device__ __forceinline__ bool is_aligned(const Element* base, int64_t token_stride) {
  return (reinterpret_cast<uintptr_t>(base) | token_stride * sizeof(Element)) % 16 == 0;
}

// Rows first .. first+63 of one head, columns column0 .. column0+kWidth-1; rows that `tokens` does not have and columns
// beyond the tensor become zero. By cp.async, or element by element where rows are not aligned or need converting.
template <class Element, class Layout, int kWidth>
__device__ __forceinline__ void copy_tile(uint32_t tile, const Rows& rows, int batch, int head, int64_t first,
                                          const TileTokens& tokens, int column0) {
  const Element* base = static_cast<const Element*>(rows.data) + hidden(batch) * rows.batch_stride +
                        hidden(head) * rows.head_stride + first * rows.token_stride + column0;
  const int columns = rows.dim - column0 < kWidth ? rows.dim - column0 : kWidth;
  constexpr int kPerUnit = 16 / sizeof(Element);  // elements of a 16-byte copy
  constexpr bool kConverts = std::is_same_v<Element, __half>;
  if (!kConverts && is_aligned(base, rows.token_stride)) {
    constexpr int kUnits = kWidth / kPerUnit;
#pragma unroll 1
    for (int i = threadIdx.x; i < kChunk * kUnits; i += kWarpgroupThreads) {
      const int row = i / kUnits, column = i % kUnits * kPerUnit;
      const int elements = tokens.has(row) ? min(max(columns - column, 0), kPerUnit) : 0;
      const Element* from = elements > 0 ? base + row * rows.token_stride + column : static_cast<const Element*>(rows.data);
      ptx::cp_async_16(tile + Layout::offset(row, column), from, elements * static_cast<int>(sizeof(Element)));
    }
  } else {
    copy_elements<Element, Layout, kWidth>(tile, base, rows.token_stride, tokens, columns);
  }
}

// The same for all columns of the tensor, in straight code: each thread has its place in a row and goes down the rows.
// For kernels that load so often that the arithmetic of a copy counts. float16 is converted in 16-byte units.
template <class Element, class Layout, int kWidth>
__device__ __forceinline__ void copy_rows(uint32_t tile, const Rows& rows, int batch, int head, int first, int end) {
  constexpr int kPerUnit = 16 / sizeof(Element), kUnits = kWidth / kPerUnit, kStep = kWarpgroupThreads / kUnits;
  static_assert(kWarpgroupThreads % kUnits == 0 && kChunk % kStep == 0, "every thread has one place in a row");
  constexpr bool kConverts = std::is_same_v<Element, __half>;
  const Element* const base = static_cast<const Element*>(rows.data) + hidden(batch) * rows.batch_stride +
                              hidden(head) * rows.head_stride + first * rows.token_stride;
  const int valid = end - first;
  if (!is_aligned(base, rows.token_stride) || (kConverts && rows.dim % kPerUnit != 0)) {
    return copy_elements<Element, Layout, kWidth>(tile, base, rows.token_stride, tokens_until(first, end), rows.dim);
  }
  const int first_row = threadIdx.x / kUnits, column = threadIdx.x % kUnits * kPerUnit;
  const Element* from = base + first_row * rows.token_stride + column;
  if constexpr (kConverts) {
    struct alignas(16) Unit {
      Element e[kPerUnit];
    };
#pragma unroll 4
    for (int row = first_row; row < kChunk; row += kStep, from += kStep * rows.token_stride) {
      Unit unit = {};
      if (row < valid && column < rows.dim) unit = *reinterpret_cast<const Unit*>(from);
#pragma unroll
      for (int e = 0; e < kPerUnit; e += 4) {
        shared_at<float4>(tile + Layout::offset(row, column + e)) =
            make_float4(static_cast<float>(unit.e[e]), static_cast<float>(unit.e[e + 1]),
                        static_cast<float>(unit.e[e + 2]), static_cast<float>(unit.e[e + 3]));
      }
    }
  } else {
    const int bytes = min(max(rows.dim - column, 0), kPerUnit) * static_cast<int>(sizeof(Element));
#pragma unroll
    for (int i = 0; i < kChunk / kStep; ++i, from += kStep * rows.token_stride) {
      const int row = first_row + i * kStep;
      // Nothing is read of a row that is not there.
      ptx::cp_async_16(tile + Layout::offset(row, column), from, row < valid ? bytes : 0);
    }
  }
}

}  // namespace hf_linattn

#endif  // HF_LINATTN_TILE_COPY_CUH_
