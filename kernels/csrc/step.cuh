// What the kernels of one token share (step.cu, window_step.cu; of hedgehog_step.cu the small things): how a [K, V] state
// is divided over threads, blocks and clusters, and how rows times weights are summed.
//
// Steps are bound by bytes: a thread holds a few 16-byte pieces of rows, uses them while they are in registers and goes
// on to the next. A block takes one kv head (or a part of it) and all query heads that read it, so that bytes move once
// whatever the group is. With groups of more than kMaxHeads, a block reads its part again, out of the L2 cache.
//
// Few sequences do not fill the GPU, so a head is split over blocks then: its value columns by the linear step, its
// rows by that with a window. What all of them read and only one may write makes them a cluster: they arrive at its
// barrier once they have read, and the first block writes when all have. Without clusters (before sm_90) such heads are
// not split.
#ifndef HF_LINATTN_STEP_CUH_
#define HF_LINATTN_STEP_CUH_

#include <math.h>

#include <type_traits>

#include "launch.cuh"
#include "ptx.cuh"

namespace hf_linattn {

constexpr int kMaxDim = 256, kMaxHeads = 8, kMaxThreads = 512, kFullThreads = 256, kWarp = 32;
constexpr int kRowsInFlight = 4;  // loads of one thread before the first use
constexpr int kMaxCluster = 8;    // the largest size that needs no opt-in
constexpr int kWide = 4;          // floats of a 16-byte access
constexpr unsigned kAllLanes = 0xffffffffu;

// x, which the compiler takes for a new number: what is computed from it is computed where it is used, and occupies no
// register before.
__device__ __forceinline__ int hidden(int x) {
  uint32_t value[1] = {static_cast<uint32_t>(x)};
  ptx::keep(value);
  return static_cast<int>(value[0]);
}

__device__ __forceinline__ float sum_over_warp(float x) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(kAllLanes, x, distance);
  return x;
}

__device__ __forceinline__ float load_element(const void* data, int64_t i, int dtype) {
  if (dtype == HF_LINATTN_BF16) return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[i]);
  if (dtype == HF_LINATTN_FP16) return __half2float(static_cast<const __half*>(data)[i]);
  return static_cast<const float*>(data)[i];
}

__device__ __forceinline__ void store_element(void* data, int64_t i, float x, int dtype) {
  if (dtype == HF_LINATTN_BF16)
    static_cast<__nv_bfloat16*>(data)[i] = __float2bfloat16(x);
  else if (dtype == HF_LINATTN_FP16)
    static_cast<__half*>(data)[i] = __float2half(x);
  else
    static_cast<float*>(data)[i] = x;
}

// x as an element of dtype holds it.
__device__ __forceinline__ float round_to(float x, int dtype) {
  if (dtype == HF_LINATTN_BF16) return __bfloat162float(__float2bfloat16(x));
  return dtype == HF_LINATTN_FP16 ? __half2float(__float2half(x)) : x;
}

template <int kVector>
__device__ __forceinline__ void load_vector(float (&x)[kVector], const float* p) {
  if constexpr (kVector == kWide) {
    const float4 y = *reinterpret_cast<const float4*>(p);
    x[0] = y.x, x[1] = y.y, x[2] = y.z, x[3] = y.w;
  } else {
#pragma unroll
    for (int j = 0; j < kVector; ++j) x[j] = p[j];
  }
}

template <int kVector>
__device__ __forceinline__ void store_vector(float* p, const float (&x)[kVector]) {
  if constexpr (kVector == kWide) {
    *reinterpret_cast<float4*>(p) = make_float4(x[0], x[1], x[2], x[3]);
  } else {
#pragma unroll
    for (int j = 0; j < kVector; ++j) p[j] = x[j];
  }
}

// Empty without clusters, and where the code is not compiled for them.
template <bool kClusters>
__device__ __forceinline__ void arrive_at_cluster() {
#if HF_LINATTN_HAS_SM90
  if constexpr (kClusters) ptx::cluster_arrive();
#endif
}

template <bool kClusters>
__device__ __forceinline__ void wait_for_cluster() {
#if HF_LINATTN_HAS_SM90
  if constexpr (kClusters) ptx::cluster_wait();
#endif
}

// How threads divide rows of the block's columns: neighbours hold neighbouring columns, rows go round the row lanes.
struct Lanes {
  int vectors;       // accesses of one row
  int row_lanes;     // rows held at a time
  bool folds;        // a warp holds several whole rows, and sums over them by shuffles
  int partial_rows;  // sums left to be added through shared memory
};

__host__ __device__ inline Lanes divide_threads(int threads, int vectors, int rows) {
  const int row_lanes = threads / vectors < rows ? threads / vectors : rows;
  const bool folds = vectors < kWarp && kWarp % vectors == 0;
  return {vectors, row_lanes, folds, folds ? threads / kWarp : row_lanes};
}

// The rows of kv that a thread holds kVector columns of: first_row, then every row_lanes-th.
template <int kVector>
struct StateRows {
  float* kv;  // [feature_dim, value_dim] from the thread's columns on
  int feature_dim, value_dim, first_row, row_lanes;
  float rows[kRowsInFlight][kVector];

  __device__ __forceinline__ void load(int from) {
#pragma unroll
    for (int i = 0; i < kRowsInFlight; ++i) {
      const int r = from + i * row_lanes;
      if (r < feature_dim) load_vector(rows[i], kv + r * value_dim);
    }
  }

  // sums += q kv for q in features [feature_dim][kHeads]. The first time, when load(first_row) has been called already,
  // kv = decay kv + k v^T before that.
  template <int kHeads>
  __device__ __forceinline__ void multiply(float (&sums)[kHeads][kVector], const float* features, bool is_first_pass,
                                           float decay, const float* keys, const float (&v)[kVector]) {
#pragma unroll 1
    for (int from = hidden(first_row); from < feature_dim; from += kRowsInFlight * row_lanes) {
      if (!is_first_pass || from != first_row) load(from);
#pragma unroll
      for (int i = 0; i < kRowsInFlight; ++i) {
        const int r = from + i * row_lanes;
        if (r >= feature_dim) break;
        if (is_first_pass) {
          const float k = keys[r];
#pragma unroll
          for (int j = 0; j < kVector; ++j) rows[i][j] = decay * rows[i][j] + k * v[j];
          store_vector(kv + r * value_dim, rows[i]);
        }
#pragma unroll
        for (int h = 0; h < kHeads; ++h) {
          const float q = features[r * kHeads + h];
#pragma unroll
          for (int j = 0; j < kVector; ++j) sums[h][j] += q * rows[i][j];
        }
      }
    }
  }
};

// Adds up what the lanes of a warp hold of the same columns and leaves it in partial [partial rows][kHeads][columns].
// row_lane, column: of the thread's sums.
template <int kHeads, int kVector>
__device__ __forceinline__ void store_partial(float* partial, float (&sums)[kHeads][kVector], const Lanes& lanes,
                                              int columns, int row_lane, int column) {
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;
  if (lanes.folds)
    for (int distance = lanes.vectors; distance < kWarp; distance *= 2)
#pragma unroll
      for (int h = 0; h < kHeads; ++h)
#pragma unroll
        for (int j = 0; j < kVector; ++j) sums[h][j] += __shfl_xor_sync(kAllLanes, sums[h][j], distance);
  const int partial_row = lanes.folds ? warp : row_lane;
  if (lanes.folds ? lane < lanes.vectors : row_lane < lanes.row_lanes)
#pragma unroll
    for (int h = 0; h < kHeads; ++h) store_vector(partial + (partial_row * kHeads + h) * columns + column, sums[h]);
}

// sums of these columns over the partial rows.
template <int kHeads, int kVector>
__device__ __forceinline__ void sum_partial(float (&sums)[kVector], const float* partial, const Lanes& lanes,
                                            int columns, int h, int column) {
#pragma unroll
  for (int j = 0; j < kVector; ++j) sums[j] = 0;
#pragma unroll 4
  for (int l = 0; l < lanes.partial_rows; ++l) {
    float x[kVector];
    load_vector(x, partial + (l * kHeads + h) * columns + column);
#pragma unroll
    for (int j = 0; j < kVector; ++j) sums[j] += x[j];
  }
}

__host__ __device__ inline int divide_up(int x, int unit) { return (x + unit - 1) / unit; }

// Blocks of one of `heads` kv heads: as few as make `enough` blocks in all, `most` at most; a power of two.
inline int choose_slices(int64_t heads, int64_t enough, int most) {
  int slices = 1;
  while (heads * slices < enough && 2 * slices <= min(most, kMaxCluster)) slices *= 2;
  return slices;
}

// Threads of one of `blocks` blocks that goes through this many rows of `vectors` accesses.
inline int choose_threads(int64_t blocks, int rows, int vectors) {
  const auto whole_warps = [](int threads) { return divide_up(threads, kWarp) * kWarp; };
  // A thread has kRowsInFlight accesses, fewer where blocks are too few to hide one another's latency.
  const bool is_full = blocks >= 2 * int64_t{multiprocessor_count()};
  const int wanted = whole_warps(rows * vectors / (is_full ? kRowsInFlight : kRowsInFlight / 2));
  const int least = whole_warps(vectors);  // every column has a thread
  return max(least, min(max(wanted, 2 * kWarp), is_full ? kFullThreads : kMaxThreads));
}

// Calls choose(std::integral_constant) with the query heads of one pass over the state: 1, 2, 4 or kMaxHeads.
template <class Choose>
auto with_heads(int group, Choose choose) {
  if (group == 1) return choose(std::integral_constant<int, 1>());
  if (group == 2) return choose(std::integral_constant<int, 2>());
  if (group <= 4) return choose(std::integral_constant<int, 4>());
  return choose(std::integral_constant<int, kMaxHeads>());
}

inline bool is_dim(int dim) { return dim >= 1 && dim <= kMaxDim; }

inline int check_dtype(const char* op, int dtype) {
  if (dtype >= HF_LINATTN_BF16 && dtype <= HF_LINATTN_FP32) return 0;
  return set_error("%s: dtype %d is none of bfloat16, float16, float32", op, dtype);
}

// Whether this device has clusters and this library was built to use them; kernel: any that does.
template <class... P>
bool has_clusters(void (*kernel)(P...)) {
  constexpr int kArchitecture = 90;
  if (compute_capability() != kArchitecture) return false;
  static const bool is_compiled = compiled_architecture(kernel) == kArchitecture;
  return is_compiled;
}

}  // namespace hf_linattn

#endif  // HF_LINATTN_STEP_CUH_
