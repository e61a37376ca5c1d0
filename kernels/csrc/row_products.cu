// do . o of every row, which every gradient of a normalised output needs.
//
// dq is a small difference of terms as large as this product: what rounding o to bfloat16 takes from it would be tens of
// percent of dq. The forward keeps eight more bits of o for it (scan.h).
#include "launch.cuh"
#include "scan_warpgroup.cuh"

namespace hf_linattn {

namespace {

__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(float x) { return x; }

// o with its residual: `byte` is the one after the upper half, biased; 0x80 stands for the bits behind it.
__device__ __forceinline__ float completed(__nv_bfloat16 o, uint32_t byte) {
  return __uint_as_float((static_cast<uint32_t>(__bfloat16_as_ushort(o)) << 16 | byte << 8 | 0x80) - kResidualBias);
}

// Two neighbouring elements, zero where there are none.
template <class Element>
__device__ __forceinline__ void load_pair(Element (&pair)[2], const Element* from, bool is_inside, int left, bool is_even) {
  pair[0] = pair[1] = Element(0.f);
  if (!is_inside || left <= 0) return;
  struct alignas(2 * sizeof(Element)) Pair {
    Element first, second;
  };
  if (is_even) {
    const Pair both = *reinterpret_cast<const Pair*>(from);
    pair[0] = both.first, pair[1] = both.second;
  } else {
    pair[0] = from[0];
    if (left > 1) pair[1] = from[1];
  }
}

// A CTA of four warps per chunk and head; warp w has rows 16w .. 16w+15, its lanes the elements that they have of
// accumulators, in which order the residual is stored.
template <class Element>
__global__ void __launch_bounds__(kWarpgroupThreads, 1) row_products_kernel(const __grid_constant__ ScanArgs args) {
  const int head = blockIdx.x % args.num_heads, slot = blockIdx.x / args.num_heads;
  const Segment segment = find_segment(args, slot);
  if (!segment.exists) return;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int64_t strides = args.x.batch_stride | args.x.token_stride | args.x.head_stride | args.o.batch_stride |
                          args.o.token_stride | args.o.head_stride | args.value_dim;
  const uintptr_t addresses = reinterpret_cast<uintptr_t>(args.x.data) | reinterpret_cast<uintptr_t>(args.o.data);
  const bool is_even = strides % 2 == 0 && addresses % (2 * sizeof(Element)) == 0;  // pairs can be loaded as one
  for (int64_t first = segment.begin; first < segment.end; first += kChunk) {
    const int64_t chunk = segment.first_chunk + (first - segment.begin) / kChunk;
    float along[2] = {0.f, 0.f};
    const Element *d_o[2], *o[2];
    bool is_inside[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t token = first + 16 * warp + g + 8 * i;
      is_inside[i] = token < segment.end;
      d_o[i] = static_cast<const Element*>(args.x.data) + segment.batch * args.x.batch_stride +
               token * args.x.token_stride + head * args.x.head_stride;
      o[i] = static_cast<const Element*>(args.o.data) + segment.batch * args.o.batch_stride + token * args.o.token_stride +
             head * args.o.head_stride;
    }
    const int64_t block = (chunk * args.num_heads + head) * residual_units(args.value_dim);
#pragma unroll 1
    for (int unit = 0; unit * kResidualColumns < args.value_dim; ++unit) {
      uint4 residual = make_uint4(0, 0, 0, 0);
      if (args.residual != nullptr) {
        residual = reinterpret_cast<const uint4*>(args.residual + (block + unit) * kResidualUnitBytes)[threadIdx.x];
      }
      const uint32_t words[4] = {residual.x, residual.y, residual.z, residual.w};
      Element from_o[4][2][2], from_d_o[4][2][2];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int column = unit * kResidualColumns + 8 * j + 2 * t;
          load_pair(from_o[j][i], o[i] + column, is_inside[i], args.value_dim - column, is_even);
          load_pair(from_d_o[j][i], d_o[i] + column, is_inside[i], args.value_dim - column, is_even);
        }
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float value = to_float(from_o[j][i][e]);
            if constexpr (std::is_same_v<Element, __nv_bfloat16>) {
              if (args.residual != nullptr) value = completed(from_o[j][i][e], words[j] >> (16 * i + 8 * e) & 0xff);
            }
            // Where there is no element, do is zero and o may be anything finite.
            along[i] += to_float(from_d_o[j][i][e]) * value;
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      along[i] += __shfl_xor_sync(0xffffffffu, along[i], 1);
      along[i] += __shfl_xor_sync(0xffffffffu, along[i], 2);
      const int64_t token = first + 16 * warp + g + 8 * i;
      if (t != 0 || token >= segment.end) continue;
      const int64_t at = (static_cast<int64_t>(segment.batch) * args.num_heads + head) * args.tokens + token;
      // A row whose denominator is held at its floor is not a quotient: scaling its weights is no longer for nothing.
      const bool is_held = args.normalize && fabsf(args.den[at]) < kDenominatorEps;
      args.along[at] = is_held ? 0.f : along[i];
    }
  }
}

constexpr int64_t kRowsPerBlock = 256;

}  // namespace

int run_row_products(int dtype, const ScanArgs& scan, void* stream) {
  ScanArgs args = scan;
  args.segment_tokens = kRowsPerBlock;
  args.num_slots = static_cast<int>(args.cu_seqlens == nullptr
                                        ? args.num_sequences * ((args.tokens + kRowsPerBlock - 1) / kRowsPerBlock)
                                        : args.tokens / kRowsPerBlock + args.num_sequences);
  if (args.num_slots == 0) return 0;
  auto kernel = dtype == HF_LINATTN_BF16   ? row_products_kernel<__nv_bfloat16>
                : dtype == HF_LINATTN_FP16 ? row_products_kernel<__half>
                                           : row_products_kernel<float>;
  return launch(kernel, dim3(static_cast<unsigned>(args.num_slots) * args.num_heads), kWarpgroupThreads, 0,
                static_cast<cudaStream_t>(stream), args);
}

}  // namespace hf_linattn
