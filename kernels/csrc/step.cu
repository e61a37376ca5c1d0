// One token for every sequence: kv = decay kv + k v^T, o = (a value_sum + b q.kv) / den, the state updated in place.
//
// A thread decays the rows of kv that it holds, adds the token, writes them back and multiplies them by q while they
// are in registers. Each block of a split head needs the whole new key_sum for the denominator, and one writes it. How
// the state is divided and heads are split: step.cuh.
#include "step.cuh"

namespace hf_linattn {
namespace {

constexpr int kMinColumns = 32;  // of a split head: whole 128-byte lines
constexpr float kDenominatorEps = 1e-6f;
constexpr float kNormEps = 1e-12f;  // of the l2 map: torch.nn.functional.normalize's

// The maps that act on one element; l2 follows when all of a vector is there.
__device__ __forceinline__ float map_element(float x, int map) {
  if (map == HF_LINATTN_MAP_ELU) return x > 0 ? x + 1 : expf(x);
  return map == HF_LINATTN_MAP_RELU && x < 0 ? 0 : x;
}

// Scales a vector in shared memory (elements `stride` apart) to unit length; called by a warp.
__device__ __forceinline__ void normalize_vector(float* x, int stride, int dim) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  float square = 0;
  for (int r = lane; r < dim; r += kWarp) square += x[r * stride] * x[r * stride];
  const float scale = 1 / fmaxf(sqrtf(sum_over_warp(square)), kNormEps);
  for (int r = lane; r < dim; r += kWarp) x[r * stride] *= scale;
}

// Parts of shared memory, all float.
template <int kHeads>
struct StepSmem {
  static constexpr int kFeatures = 0;                           // [kMaxDim][kHeads] q of the heads of a pass
  static constexpr int kKeys = kFeatures + kMaxDim * kHeads;    // [kMaxDim] k
  static constexpr int kKeySum = kKeys + kMaxDim;               // [kMaxDim] decayed, without this token
  static constexpr int kValues = kKeySum + kMaxDim;             // [kMaxDim] v of the block's columns
  static constexpr int kValueSum = kValues + kMaxDim;           // [kMaxDim] with this token
  static constexpr int kDenominators = kValueSum + kMaxDim;     // [kHeads] guarded
  static constexpr int kWeightSum = kDenominators + kMaxHeads;  // [1] with this token
  static constexpr int kPartial = kWeightSum + 4;               // [partial rows][kHeads][columns] q.kv of some rows
  static size_t bytes(const Lanes& lanes, int columns) {
    return sizeof(float) * (kPartial + lanes.partial_rows * kHeads * columns);
  }
};

// kHeads: query heads of one pass over the state. kVector: columns of one access. kClusters: blocks of a head that is
// split form a cluster.
template <int kHeads, int kVector, bool kClusters>
__global__ void __launch_bounds__(kMaxThreads, kHeads == 1 ? 2 : 1)
    linear_attention_step_kernel(const hf_linattn_step_problem p, int slices, int slice_columns) {
  if constexpr (!kClusters || HF_LINATTN_HAS_SM90) {
    using Smem = StepSmem<kHeads>;
    float* const smem = reinterpret_cast<float*>(ptx::dynamic_smem());
    float *const features = smem + Smem::kFeatures, *const keys = smem + Smem::kKeys;
    float *const key_sum = smem + Smem::kKeySum, *const values = smem + Smem::kValues;
    float *const value_sum = smem + Smem::kValueSum, *const denominators = smem + Smem::kDenominators;
    float *const weight_sum = smem + Smem::kWeightSum, *const partial = smem + Smem::kPartial;

    const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
    const int warp = thread / kWarp, lane = thread % kWarp, warps = threads / kWarp;
    const int block = static_cast<int>(blockIdx.x), slice = block % slices, task = block / slices;
    const int batch = task / p.num_kv_heads, kv_head = task % p.num_kv_heads;
    const int64_t state_row = task;  // of [N, H_kv]
    const int feature_dim = p.feature_dim, group = p.num_heads / p.num_kv_heads;
    const int first_column = slice * slice_columns, columns = min(slice_columns, p.value_dim - first_column);

    const Lanes lanes = divide_threads(threads, columns / kVector, feature_dim);
    const int row_lane = thread / lanes.vectors, column = thread % lanes.vectors * kVector;
    StateRows<kVector> state = {p.state.kv + state_row * feature_dim * p.value_dim + first_column + column, feature_dim,
                                p.value_dim, row_lane < lanes.row_lanes ? row_lane : feature_dim, lanes.row_lanes};
    state.load(state.first_row);  // under way while q, k and v are read

    const float decay = p.g == nullptr ? 1.f : expf(p.g[batch * p.g_batch_stride + kv_head * p.g_head_stride]);
    const int64_t k_offset = batch * p.k_batch_stride + kv_head * p.k_head_stride;
    const int64_t v_offset = batch * p.v_batch_stride + kv_head * p.v_head_stride + first_column;
    for (int r = thread; r < feature_dim; r += threads) {
      keys[r] = map_element(load_element(p.k, k_offset + r, p.dtype), p.feature_map);
      if (p.state.key_sum != nullptr) key_sum[r] = decay * p.state.key_sum[state_row * feature_dim + r];
    }
    for (int c = thread; c < columns; c += threads) {
      values[c] = load_element(p.v, v_offset + c, p.dtype);
      if (p.state.value_sum == nullptr) continue;
      // The columns of value_sum belong to this block alone.
      float* const element = p.state.value_sum + state_row * p.value_dim + first_column + c;
      value_sum[c] = decay * *element + values[c];
      *element = value_sum[c];
    }
    if (thread == 0 && p.state.weight_sum != nullptr) *weight_sum = decay * p.state.weight_sum[state_row] + 1;

#pragma unroll 1
    for (int first_head = 0; first_head < group; first_head += kHeads) {
      const bool is_first_pass = first_head == 0;
      const int heads = min(kHeads, group - first_head), head = kv_head * group + first_head;
      const int64_t q_offset = batch * p.q_batch_stride + head * p.q_head_stride;
      for (int i = thread; i < kHeads * kMaxDim; i += threads) {
        const int h = i / kMaxDim, r = i % kMaxDim;
        if (r < feature_dim)
          features[r * kHeads + h] =
              h < heads ? map_element(load_element(p.q, q_offset + h * p.q_head_stride + r, p.dtype), p.feature_map) : 0;
      }
      __syncthreads();
      if (p.feature_map == HF_LINATTN_MAP_L2) {
        for (int h = warp; h < heads + is_first_pass; h += warps)
          normalize_vector(h < heads ? features + h : keys, h < heads ? kHeads : 1, feature_dim);
        __syncthreads();
      }
      if (is_first_pass) arrive_at_cluster<kClusters>();  // key_sum and weight_sum have been read

      if (p.normalize)
        for (int h = warp; h < heads; h += warps) {
          float den = 0;
          for (int r = lane; r < feature_dim; r += kWarp) den += features[r * kHeads + h] * (key_sum[r] + keys[r]);
          den = p.b * sum_over_warp(den);
          if (p.state.weight_sum != nullptr) den += p.a * *weight_sum;
          if (lane == 0) denominators[h] = fabsf(den) < kDenominatorEps ? kDenominatorEps : den;
        }

      float v[kVector], sums[kHeads][kVector] = {};
      load_vector(v, values + column);
      state.multiply(sums, features, is_first_pass, decay, keys, v);
      store_partial(partial, sums, lanes, columns, row_lane, column);
      __syncthreads();

      for (int i = thread; i < heads * columns; i += threads) {
        const int h = i / columns, c = i % columns;
        float sum[1];
        sum_partial<kHeads>(sum, partial, lanes, columns, h, c);
        float o = p.b * sum[0];
        if (p.state.value_sum != nullptr) o += p.a * value_sum[c];
        if (p.normalize) o /= denominators[h];
        const int64_t row = static_cast<int64_t>(batch) * p.num_heads + head + h;
        store_element(p.o, row * p.value_dim + first_column + c, o, p.dtype);
      }
      if (first_head + kHeads < group) __syncthreads();  // the next pass writes features and partial
    }

    wait_for_cluster<kClusters>();
    if (slice != 0) return;
    if (p.state.key_sum != nullptr)
      for (int r = thread; r < feature_dim; r += threads)
        p.state.key_sum[state_row * feature_dim + r] = key_sum[r] + keys[r];
    if (p.state.weight_sum != nullptr && thread == 0) p.state.weight_sum[state_row] = *weight_sum;
  }
}

struct StepShape {
  int slices, slice_columns, threads;
};

// Blocks of a split head take columns that are whole lines.
StepShape choose_shape(const hf_linattn_step_problem& p, int64_t heads, int vector, bool may_split) {
  const int slices = may_split ? choose_slices(heads, multiprocessor_count(), p.value_dim / kMinColumns) : 1;
  const int slice_vectors = divide_up(divide_up(p.value_dim, slices), vector);
  return {slices, slice_vectors * vector, choose_threads(heads * slices, p.feature_dim, slice_vectors)};
}

// The most shared memory that any block needs: that of a whole slice or of the last one, which has fewer columns and
// may need more, where its warps do not fold.
template <int kHeads>
size_t largest_smem(const hf_linattn_step_problem& p, const StepShape& shape, int vector) {
  const auto of = [&](int columns) {
    return StepSmem<kHeads>::bytes(divide_threads(shape.threads, columns / vector, p.feature_dim), columns);
  };
  return max(of(shape.slice_columns), of(p.value_dim - (shape.slices - 1) * shape.slice_columns));
}

struct StepLaunch {
  void (*kernel)(hf_linattn_step_problem, int, int);
  size_t smem_bytes;
};

template <int kVector, bool kClusters>
StepLaunch choose_kernel(const hf_linattn_step_problem& p, const StepShape& shape) {
  return with_heads(p.num_heads / p.num_kv_heads, [&](auto heads) -> StepLaunch {
    constexpr int kHeads = decltype(heads)::value;
    return {linear_attention_step_kernel<kHeads, kVector, kClusters>, largest_smem<kHeads>(p, shape, kVector)};
  });
}

int check_step(const hf_linattn_step_problem& p) {
  if (int error = check_dtype("linear_attention_step", p.dtype)) return error;
  if (p.feature_map < HF_LINATTN_MAP_NONE || p.feature_map > HF_LINATTN_MAP_L2)
    return set_error("linear_attention_step: feature map %d is unknown", p.feature_map);
  if (!is_dim(p.feature_dim) || !is_dim(p.value_dim))
    return set_error("linear_attention_step: K and V must be 1 to %d, got %d and %d", kMaxDim, p.feature_dim,
                     p.value_dim);
  if (p.num_kv_heads < 1 || p.num_heads < 1 || p.num_heads % p.num_kv_heads != 0)
    return set_error("linear_attention_step: %d heads are no multiple of %d kv heads", p.num_heads, p.num_kv_heads);
  if (p.state.kv == nullptr || (p.normalize && p.state.key_sum == nullptr) ||
      (p.a != 0 && p.state.value_sum == nullptr) || (p.normalize && p.a != 0 && p.state.weight_sum == nullptr))
    return set_error("linear_attention_step: the state lacks a member that normalize %d and a %g need", p.normalize,
                     static_cast<double>(p.a));
  return 0;
}

}  // namespace
}  // namespace hf_linattn

extern "C" int hf_linattn_step_largest_dim(void) { return hf_linattn::kMaxDim; }

extern "C" int hf_linattn_step(const hf_linattn_step_problem* problem, void* stream) {
  using namespace hf_linattn;
  const hf_linattn_step_problem& p = *problem;
  if (p.batch == 0) return 0;
  if (int error = check_step(p)) return error;
  const int64_t heads = static_cast<int64_t>(p.batch) * p.num_kv_heads;
  const bool is_wide = p.value_dim % kWide == 0 && reinterpret_cast<uintptr_t>(p.state.kv) % 16 == 0;
  const bool shares_key_sum = p.normalize != 0;
  const bool may_split = !shares_key_sum || has_clusters(linear_attention_step_kernel<1, kWide, true>);
  const StepShape shape = choose_shape(p, heads, is_wide ? kWide : 1, may_split);
  const bool clusters = shares_key_sum && shape.slices > 1;
  const StepLaunch chosen = is_wide ? clusters ? choose_kernel<kWide, true>(p, shape)
                                               : choose_kernel<kWide, false>(p, shape)
                            : clusters ? choose_kernel<1, true>(p, shape)
                                       : choose_kernel<1, false>(p, shape);
  const int64_t blocks = heads * shape.slices;
  if (blocks > INT32_MAX) return set_error("linear_attention_step: %lld blocks are too many", (long long)blocks);
  return launch_clusters(chosen.kernel, dim3(static_cast<unsigned>(blocks)), clusters ? shape.slices : 1, shape.threads,
                         chosen.smem_bytes, static_cast<cudaStream_t>(stream), p, shape.slices, shape.slice_columns);
}
