// dg: what the loss changes by with the decay of each token.
//
// With G the sum of g up to a token, the weight of key j for query i is e^{G_i - G_j}. So dG_t is the sum of weight
// times gradient over row t (t as query) less that over column t (t as key):
//   column_t = v_t . dv_t + dvone_t, where dvone is the gradient of a value of one (the denominator's, if any): the scan
//           that forms dv leaves it in parts of 32 columns;
//   row_t = do_t . o_t, summed over the heads of the group; 0 where o is a quotient, since a common factor of numerator
//           and denominator cancels, unless the denominator is held at its eps.
// The final state counts as the row of a query at the sequence's last token. g_t is in G_s for all s >= t of its
// sequence: dg is the sum of dG from the sequence's end.
//
// Two launches, the second in place: the products are as parallel as there are tokens, the sums read one float a token.
#include "decay_gradient.h"

#include <math.h>

#include "launch.cuh"
#include "ptx.cuh"
#include "scan.h"

namespace hf_linattn {
namespace {

constexpr int kWarp = 32, kTokensPerWarp = 16;
constexpr int kTermThreads = 256, kTokensPerBlock = kTermThreads / kWarp * kTokensPerWarp;
constexpr int kSumThreads = 512, kSumWarps = kSumThreads / kWarp, kTokensPerThread = 4;
constexpr int kTile = kSumThreads * kTokensPerThread;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

__device__ __forceinline__ float sum_over_warp(float x) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(kAllLanes, x, distance);
  return x;
}

__device__ __forceinline__ int64_t boundary(const hf_linattn_problem& p, int n) {
  return p.cu_seqlens_is_int64 ? static_cast<const int64_t*>(p.cu_seqlens)[n]
                               : static_cast<int64_t>(static_cast<const int32_t*>(p.cu_seqlens)[n]);
}

template <class T>
__device__ __forceinline__ const T* vector_at(const hf_linattn_tensor& x, int64_t batch, int64_t token, int64_t head) {
  return static_cast<const T*>(x.data) + batch * x.batch_stride + token * x.token_stride + head * x.head_stride;
}

// This lane's share of x . y.
template <class T>
__device__ __forceinline__ float partial_dot(const T* x, const T* y, int dim) {
  float sum = 0;
#pragma unroll 1
  for (int c = static_cast<int>(threadIdx.x) % kWarp; c < dim; c += kWarp) sum += to_float(x[c]) * to_float(y[c]);
  return sum;
}

// This lane's share of the row terms of one token, over the heads of the group.
template <class T>
__device__ __forceinline__ float partial_row(const hf_linattn_problem& p, const hf_linattn_gradients& d,
                                             const float* along, int64_t batch, int64_t token, int kv_head) {
  const int group = p.num_heads / p.num_kv_heads, first = kv_head * group, lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t first_row = (batch * p.num_heads + first) * p.tokens + token;  // of [B, H, T]
  float sum = 0;
  if (!p.normalize && along != nullptr) {
    for (int h = lane; h < group; h += kWarp) sum += along[first_row + h * p.tokens];
    return sum;
  }
  for (int h = 0; h < group; ++h) {
    if (p.normalize && !(fabsf(d.den[first_row + h * p.tokens]) < kDenominatorEps)) continue;
    sum += partial_dot(vector_at<T>(d.d_o, batch, token, first + h), vector_at<T>(d.o, batch, token, first + h),
                       p.value_dim);
  }
  return sum;
}

// dG of kTokensPerBlock tokens of one kv head into dg, a warp for each token.
template <class T>
__global__ void __launch_bounds__(kTermThreads)
    decay_gradient_terms_kernel(const hf_linattn_problem p, const hf_linattn_gradients d, const float* columns,
                                const float* along, int blocks_per_row) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  const int row = static_cast<int>(blockIdx.x) / blocks_per_row;  // of [B, H_kv]
  const int kv_head = row % p.num_kv_heads;
  const int64_t batch = row / p.num_kv_heads;
  const int64_t first = static_cast<int64_t>(blockIdx.x) % blocks_per_row * kTokensPerBlock + warp * kTokensPerWarp;
  const int64_t end = p.cu_seqlens == nullptr ? p.tokens : boundary(p, p.num_sequences);
  float* const dg = d.dg + batch * p.tokens * p.num_kv_heads + kv_head;

  const int parts = column_units(p.value_dim);
  const int64_t part_size = static_cast<int64_t>(p.batch) * p.num_kv_heads * p.tokens;

  for (int i = 0; i < kTokensPerWarp; ++i) {
    const int64_t token = first + i;
    if (token >= p.tokens) break;
    float term = 0;
    // Tokens behind the last boundary belong to no sequence.
    if (token < end) {
      term = partial_row<T>(p, d, along, batch, token, kv_head);
      for (int part = lane; part < parts; part += kWarp) term -= columns[part * part_size + row * p.tokens + token];
    }
    term = sum_over_warp(term);
    if (lane == 0) dg[token * p.num_kv_heads] = term;
  }
}

// This thread's share of x . y over `size` elements.
__device__ __forceinline__ float partial_state_dot(const float* x, const float* y, int64_t row, int size) {
  if (x == nullptr || y == nullptr) return 0;
  float sum = 0;
  for (int i = static_cast<int>(threadIdx.x); i < size; i += kSumThreads) sum += x[row * size + i] * y[row * size + i];
  return sum;
}

// dg = its own sum from the end of each sequence; a block for one sequence and kv head.
__global__ void __launch_bounds__(kSumThreads)
    decay_gradient_sum_kernel(const hf_linattn_problem p, const hf_linattn_gradients d) {
  float* const warp_sums = reinterpret_cast<float*>(ptx::dynamic_smem());  // [2][kSumWarps]
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;
  const int sequence = static_cast<int>(blockIdx.x) / p.num_kv_heads;
  const int kv_head = static_cast<int>(blockIdx.x) % p.num_kv_heads;
  const int64_t state_row = blockIdx.x, batch = p.cu_seqlens == nullptr ? sequence : 0;
  const int64_t begin = p.cu_seqlens == nullptr ? 0 : boundary(p, sequence);
  const int64_t end = p.cu_seqlens == nullptr ? p.tokens : boundary(p, sequence + 1);
  float* const dg = d.dg + batch * p.tokens * p.num_kv_heads + kv_head;

  float share = partial_state_dot(d.d_final.kv, d.final_state.kv, state_row, p.feature_dim * p.value_dim) +
                partial_state_dot(d.d_final.key_sum, d.final_state.key_sum, state_row, p.feature_dim) +
                partial_state_dot(d.d_final.value_sum, d.final_state.value_sum, state_row, p.value_dim) +
                partial_state_dot(d.d_final.weight_sum, d.final_state.weight_sum, state_row, 1);
  share = sum_over_warp(share);
  if (lane == 0) warp_sums[kSumWarps + warp] = share;
  __syncthreads();
  float carry = 0;  // sum of all that comes later; the final state first
  for (int w = 0; w < kSumWarps; ++w) carry += warp_sums[kSumWarps + w];

  // Positions count from the sequence's end. A thread has kTokensPerThread neighbours of each tile, those of the next
  // tile already under way.
  const int64_t length = end - begin;
  float ahead[kTokensPerThread] = {};
  const auto load_tile = [&](int64_t tile) {
#pragma unroll
    for (int j = 0; j < kTokensPerThread; ++j) {
      const int64_t position = tile + thread * kTokensPerThread + j;
      ahead[j] = position < length ? dg[(end - 1 - position) * p.num_kv_heads] : 0;
    }
  };
  load_tile(0);
  int buffer = 0;
  for (int64_t tile = 0; tile < length; tile += kTile, buffer ^= 1) {
    float sums[kTokensPerThread];
#pragma unroll
    for (int j = 0; j < kTokensPerThread; ++j) sums[j] = ahead[j] + (j > 0 ? sums[j - 1] : 0);
    load_tile(tile + kTile);
    float with_lane = sums[kTokensPerThread - 1];  // becomes the sum of this lane and those before it
#pragma unroll
    for (int distance = 1; distance < kWarp; distance *= 2) {
      const float x = __shfl_up_sync(kAllLanes, with_lane, distance);
      if (lane >= distance) with_lane += x;
    }
    // Two buffers: a slow warp may still read those of the tile before.
    if (lane == kWarp - 1) warp_sums[buffer * kSumWarps + warp] = with_lane;
    float before = __shfl_up_sync(kAllLanes, with_lane, 1);
    if (lane == 0) before = 0;
    __syncthreads();
    float total = 0;
    for (int w = 0; w < kSumWarps; ++w) {
      if (w == warp) before += total;
      total += warp_sums[buffer * kSumWarps + w];
    }
#pragma unroll
    for (int j = 0; j < kTokensPerThread; ++j) {
      const int64_t position = tile + thread * kTokensPerThread + j;
      if (position < length) dg[(end - 1 - position) * p.num_kv_heads] = carry + before + sums[j];
    }
    carry += total;
  }
}

template <class T>
int launch_terms(const hf_linattn_problem& p, const hf_linattn_gradients& d, const float* columns, const float* along,
                 cudaStream_t stream) {
  const int64_t blocks_per_row = (p.tokens + kTokensPerBlock - 1) / kTokensPerBlock;
  const int64_t blocks = blocks_per_row * p.batch * p.num_kv_heads;
  if (blocks > INT32_MAX) return set_error("decay gradient: %lld blocks are too many", static_cast<long long>(blocks));
  return launch(decay_gradient_terms_kernel<T>, dim3(static_cast<unsigned>(blocks)), kTermThreads, 0, stream, p, d,
                columns, along, static_cast<int>(blocks_per_row));
}

}  // namespace

int run_decay_gradient(const hf_linattn_problem* problem, const hf_linattn_gradients* gradients, const float* columns,
                       const float* along, void* stream) {
  const hf_linattn_problem& p = *problem;
  const hf_linattn_gradients& d = *gradients;
  const cudaStream_t cuda_stream = static_cast<cudaStream_t>(stream);
  if (p.tokens == 0 || p.batch == 0) return 0;
  const int error = p.dtype == HF_LINATTN_BF16   ? launch_terms<__nv_bfloat16>(p, d, columns, along, cuda_stream)
                    : p.dtype == HF_LINATTN_FP16 ? launch_terms<__half>(p, d, columns, along, cuda_stream)
                                                 : launch_terms<float>(p, d, columns, along, cuda_stream);
  if (error != 0 || p.num_sequences == 0) return error;
  const int64_t blocks = static_cast<int64_t>(p.num_sequences) * p.num_kv_heads;
  if (blocks > INT32_MAX) return set_error("decay gradient: %lld blocks are too many", static_cast<long long>(blocks));
  return launch(decay_gradient_sum_kernel, dim3(static_cast<unsigned>(blocks)), kSumThreads,
                2 * kSumWarps * sizeof(float), cuda_stream, p, d);
}

}  // namespace hf_linattn
