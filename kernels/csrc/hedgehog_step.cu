// The Hedgehog feature maps of q and k for one token of every sequence, in one launch: e^{m(x)} [softmax(y), softmax(-y)]
// with y = x W + silu(x W1) W2 and m(x) = x.u + bias, and the features of sinks behind them. The definition, in PyTorch:
// hf_linattn/feature_maps.py and sinks.py.
//
// A block has one head, of q or of k, and some sequences. Weights are most of the bytes, 48 KB a head where x has 64
// numbers; they are asked for before x, and latencies decide. A warp takes 32 columns and a part of the rows of a
// product, a lane one column; the parts are added up through shared memory.
#include "step.cuh"

namespace hf_linattn {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / kWarp;
constexpr int kMaxColumns = kThreads;    // of a product
constexpr int kMaxBatchRows = 8;         // of a block where there are more blocks than multiprocessors otherwise
constexpr int kInFlight = 16;            // weights that a thread has asked for before x is there
constexpr int kLaneColumns = kMaxDim / kWarp;  // columns of y that a lane takes of a softmax
// As hf_linattn/feature_maps.py and sinks.py have them.
constexpr float kMaxMagnitude = 20, kMaxSinkLogit = 20;
constexpr float kLargestHalf = 65504;  // still a weight, where infinity is none

// How the warps of a block share a product of `rows` rows and `columns` columns.
struct Division {
  int column_warps, parts, part_rows;
};

__device__ __forceinline__ Division divide_product(int rows, int columns) {
  const int column_warps = divide_up(columns, kWarp), parts = kWarps / column_warps;
  return {column_warps, parts, divide_up(rows, parts)};
}

// The column of a matrix [rows, columns] that a thread multiplies, and its part of the rows.
struct WeightColumn {
  const float* first;  // element of the column in the part's first row
  int stride, rows;    // rows 0: none
  float held[kInFlight];

  __device__ __forceinline__ void load(int from) {
#pragma unroll
    for (int i = 0; i < kInFlight; ++i)
      if (from + i < rows) held[i] = first[static_cast<int64_t>(from + i) * stride];
  }

  // sums += x W for x [kRows][kMaxDim] from the part's first row on; load(0) has been called already.
  template <int kRows>
  __device__ __forceinline__ void multiply(float (&sums)[kRows], const float* x) {
#pragma unroll 1
    for (int from = hidden(0); from < rows; from += kInFlight) {
      if (from != 0) load(from);
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        if (from + i >= rows) break;
#pragma unroll
        for (int r = 0; r < kRows; ++r) sums[r] += x[r * kMaxDim + from + i] * held[i];
      }
    }
  }
};

// Parts of shared memory, all float.
template <int kRows>
struct HedgehogSmem {
  static constexpr int kInputs = 0;                                // [kRows][kMaxDim] x
  static constexpr int kHidden = kInputs + kRows * kMaxDim;        // [kRows][kMaxDim] silu(x W1)
  static constexpr int kProducts = kHidden + kRows * kMaxDim;      // [kRows][kMaxColumns] x [W, W1, u, sinks]
  static constexpr int kPartial = kProducts + kRows * kMaxColumns; // [parts][kRows][columns], no more than kThreads
  static constexpr int kBytes = (kPartial + kRows * kThreads) * static_cast<int>(sizeof(float));
};

// kRows: sequences of a block.
template <int kRows>
__global__ void __launch_bounds__(kThreads, 1) hedgehog_step_kernel(const hf_linattn_hedgehog_step_problem p) {
  float* const smem = reinterpret_cast<float*>(ptx::dynamic_smem());
  float *const inputs = smem + HedgehogSmem<kRows>::kInputs, *const activations = smem + HedgehogSmem<kRows>::kHidden;
  float *const products = smem + HedgehogSmem<kRows>::kProducts, *const partial = smem + HedgehogSmem<kRows>::kPartial;

  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;
  const int all_heads = p.num_heads + p.num_kv_heads, block = static_cast<int>(blockIdx.x);
  const int block_head = block % all_heads, first_batch = block / all_heads * kRows;
  const bool is_query = block_head < p.num_heads;
  const int head = is_query ? block_head : block_head - p.num_heads, heads = is_query ? p.num_heads : p.num_kv_heads;
  const hf_linattn_hedgehog_map& map = is_query ? p.q : p.k;
  const int columns = p.columns, hidden_dim = p.hidden_dim, dim = p.head_dim;
  const int width = columns + hidden_dim + (map.magnitude_bias != nullptr), query_sinks = is_query ? p.sinks : 0;
  const int all_columns = width + query_sinks;  // those of the sinks are the last

  const Division first = divide_product(dim, all_columns), second = divide_product(hidden_dim, columns);
  const auto column_of = [&](const Division& division) { return warp % division.column_warps * kWarp + lane; };
  const auto part_of = [&](const Division& division) { return warp / division.column_warps; };
  const auto rows_of = [&](const Division& division, int rows, int all) {
    const int before = part_of(division) * division.part_rows;
    return part_of(division) < division.parts && column_of(division) < all ? max(0, min(division.part_rows, rows - before))
                                                                          : 0;
  };

  const int column = column_of(first), first_row = part_of(first) * first.part_rows;
  const bool is_sink = column >= width;
  WeightColumn weights = {nullptr, is_sink ? query_sinks : width, rows_of(first, dim, all_columns), {}};
  if (weights.rows > 0)
    weights.first = (is_sink ? map.sink_weight + column - width : map.weight + column) +
                    (static_cast<int64_t>(head) * dim + first_row) * weights.stride;
  weights.load(0);
  const int output_column = column_of(second), first_hidden = part_of(second) * second.part_rows;
  WeightColumn output_weights = {nullptr, columns, rows_of(second, hidden_dim, columns), {}};
  if (output_weights.rows > 0)
    output_weights.first =
        map.output_weight + (static_cast<int64_t>(head) * hidden_dim + first_hidden) * columns + output_column;
  output_weights.load(0);
  // What the last part needs, of the warp's sequence and of the sink that a lane has.
  const int batch = first_batch + warp;
  const bool has_sequence = warp < kRows && batch < p.batch;
  const int64_t position = has_sequence ? p.positions[batch * p.position_stride] : 0;
  const float magnitude_bias = map.magnitude_bias != nullptr ? map.magnitude_bias[head] : 0;
  const float sink_bias = lane < query_sinks ? map.sink_bias[head * query_sinks + lane] : 0;

  for (int i = thread; i < kRows * kMaxDim; i += kThreads) {
    const int of_row = first_batch + i / kMaxDim, d = i % kMaxDim;
    float x = 0;
    if (d < dim && of_row < p.batch)
      x = p.scale * load_element(map.x, of_row * map.x_batch_stride + head * map.x_head_stride + d, p.dtype);
    inputs[i] = round_to(x, p.dtype);
  }
  __syncthreads();

  // What a product's parts leave, added up.
  const auto store_parts = [&](const Division& division, const float (&sums)[kRows], int all) {
    if (part_of(division) < division.parts && column_of(division) < all)
#pragma unroll
      for (int r = 0; r < kRows; ++r) partial[(part_of(division) * kRows + r) * all + column_of(division)] = sums[r];
  };
  const auto sum_parts = [&](const Division& division, int r, int c, int all) {
    float sum = 0;
    for (int part = 0; part < division.parts; ++part) sum += partial[(part * kRows + r) * all + c];
    return sum;
  };

  float sums[kRows] = {};
  weights.multiply(sums, inputs + first_row);
  store_parts(first, sums, all_columns);
  __syncthreads();
  for (int i = thread; i < kRows * all_columns; i += kThreads) {
    const int r = i / all_columns, c = i - r * all_columns;
    const float x = sum_parts(first, r, c, all_columns);
    products[r * kMaxColumns + c] = x;
    if (c >= columns && c < columns + hidden_dim) activations[r * kMaxDim + c - columns] = x / (1 + expf(-x));
  }
  __syncthreads();
  if (hidden_dim > 0) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) sums[r] = 0;
    output_weights.multiply(sums, activations + first_hidden);
    store_parts(second, sums, columns);
    __syncthreads();
  }

  if (!has_sequence) return;
  const float* const row = products + warp * kMaxColumns;
  float y[kLaneColumns], largest = -INFINITY, smallest = INFINITY;
#pragma unroll
  for (int i = 0; i < kLaneColumns; ++i) {
    const int c = lane + i * kWarp;
    y[i] = 0;
    if (c >= columns) continue;
    y[i] = row[c];
    if (hidden_dim > 0) y[i] += sum_parts(second, warp, c, columns);
    largest = fmaxf(largest, y[i]), smallest = fminf(smallest, y[i]);
  }
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, distance));
    smallest = fminf(smallest, __shfl_xor_sync(kAllLanes, smallest, distance));
  }
  float positive = 0, negative = 0;
#pragma unroll
  for (int i = 0; i < kLaneColumns; ++i)
    if (lane + i * kWarp < columns) positive += expf(y[i] - largest), negative += expf(smallest - y[i]);
  positive = sum_over_warp(positive), negative = sum_over_warp(negative);

  float weight = 1;
  if (map.magnitude_bias != nullptr) {
    const float size = row[columns + hidden_dim] + magnitude_bias;
    weight = expf(fminf(fmaxf(size, -kMaxMagnitude), kMaxMagnitude));
  }
  if (is_query) weight *= fminf(p.far_length / fmaxf(static_cast<float>(position + 1), 1), 1);
  if (!is_query && position < p.sinks) weight = 0;  // of that key only which sink it is
  const int64_t feature_dim = 2 * columns + p.sinks, out = (static_cast<int64_t>(batch) * heads + head) * feature_dim;
  const auto store = [&](int feature, float x) {
    store_element(map.features, out + feature, p.dtype == HF_LINATTN_FP16 ? fminf(x, kLargestHalf) : x, p.dtype);
  };
#pragma unroll
  for (int i = 0; i < kLaneColumns; ++i) {
    const int c = lane + i * kWarp;
    if (c >= columns) continue;
    store(c, weight * (expf(y[i] - largest) / positive));
    store(columns + c, weight * (expf(smallest - y[i]) / negative));
  }
  for (int s = lane; s < p.sinks; s += kWarp) {
    const float bias = s == lane || !is_query ? sink_bias : map.sink_bias[head * p.sinks + s];
    store(2 * columns + s, is_query ? expf(fminf(row[width + s] + bias, kMaxSinkLogit)) : position == s);
  }
}

int check_map(const hf_linattn_hedgehog_step_problem& p, const hf_linattn_hedgehog_map& map, bool is_query) {
  const char* name = is_query ? "q" : "k";
  if (map.weight == nullptr || (p.hidden_dim > 0) != (map.output_weight != nullptr))
    return set_error("hedgehog_step: the map of %s lacks a weight, or has one too many", name);
  if ((is_query && p.sinks > 0) != (map.sink_weight != nullptr && map.sink_bias != nullptr))
    return set_error("hedgehog_step: the map of %s has the weights of sinks exactly where it is that of q", name);
  const int all = p.columns + p.hidden_dim + (map.magnitude_bias != nullptr) + p.sinks;
  if (all > kMaxColumns)
    return set_error("hedgehog_step: the map of %s has %d columns in all, more than %d", name, all, kMaxColumns);
  return 0;
}

}  // namespace
}  // namespace hf_linattn

extern "C" int hf_linattn_hedgehog_step(const hf_linattn_hedgehog_step_problem* problem, void* stream) {
  using namespace hf_linattn;
  const hf_linattn_hedgehog_step_problem& p = *problem;
  if (p.batch == 0) return 0;
  if (int error = check_dtype("hedgehog_step", p.dtype)) return error;
  if (!is_dim(p.head_dim) || !is_dim(p.columns) || p.hidden_dim < 0 || p.hidden_dim > kMaxDim || p.sinks < 0)
    return set_error("hedgehog_step: D, columns and hidden columns must be 1 to %d, got %d, %d and %d with %d sinks",
                     kMaxDim, p.head_dim, p.columns, p.hidden_dim, p.sinks);
  if (p.num_heads < 1 || p.num_kv_heads < 1)
    return set_error("hedgehog_step: %d and %d heads, expected one each at least", p.num_heads, p.num_kv_heads);
  if (int error = check_map(p, p.q, true)) return error;
  if (int error = check_map(p, p.k, false)) return error;
  const int heads = p.num_heads + p.num_kv_heads;
  const bool is_single = static_cast<int64_t>(p.batch) * heads <= multiprocessor_count();
  const int64_t blocks = static_cast<int64_t>(is_single ? p.batch : divide_up(p.batch, kMaxBatchRows)) * heads;
  if (blocks > INT32_MAX) return set_error("hedgehog_step: %lld blocks are too many", (long long)blocks);
  return launch(is_single ? hedgehog_step_kernel<1> : hedgehog_step_kernel<kMaxBatchRows>,
                dim3(static_cast<unsigned>(blocks)), kThreads,
                is_single ? HedgehogSmem<1>::kBytes : HedgehogSmem<kMaxBatchRows>::kBytes,
                static_cast<cudaStream_t>(stream), p);
}
