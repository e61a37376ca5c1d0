// One token of window_linear_attention for every sequence, state and ring updated in place: the oldest entry of the
// ring joins the sums, the token takes its slot, the query reads both under one denominator.
//
// Bytes decide: kv is read and written once, the valid part of the ring read once. The division of work is that of the
// linear step (step.cuh); to a thread the w rows of ring_v are rows like those of kv, with softmax weights from shared
// memory in the place of features. o = (sum of near weight v + far q.kv) / den with far = e^{log_scale - peak}, and the
// peak is known only with all logits: the state is multiplied first, its sums are scaled, the ring follows. Blocks that
// share a head each form all its logits. That is w D elements of ring_k, out of the L2 cache but for the first, and
// little beside V / slices columns of kv and ring_v unless the window is much longer than K.
//
// Who may overwrite what others still read:
//   - ring_v[slot], value_sum: columns of one block, which has read them itself;
//   - key_sum, weight_sum, ring_phi_k[slot], ring_g[slot]: the first block of the head's cluster, when all have read;
//   - ring_k[slot]: nobody reads it, its logit comes from k;
//   - ring_valid[:, slot] and slot, which every block reads: the last block of the grid to have read them. Blocks count
//     themselves in the upper half of *slot, which is 0 between launches, and the last one writes the whole of it. No
//     memory, no second launch and nothing to reset, so that a captured graph can replay the step, and launches on
//     different states never meet. Which block is last does not show in the results.
#include <float.h>

#include "step.cuh"

namespace hf_linattn {
namespace {

constexpr int kMaxWarps = kMaxThreads / kWarp;
constexpr int kPiece = 8;          // elements of a key that one lane holds
constexpr int kSlotsInFlight = 4;  // pieces of one thread before the first use
constexpr int kMaxWindow = 16384;  // what shared memory holds beside the rest on every device, by one head a pass
constexpr uint64_t kArrival = uint64_t{1} << 32, kSlotMask = kArrival - 1;

__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(float x) { return x; }

__device__ __forceinline__ void store_rounded(__nv_bfloat16* p, float x) { *p = __float2bfloat16(x); }
__device__ __forceinline__ void store_rounded(__half* p, float x) { *p = __float2half(x); }
__device__ __forceinline__ void store_rounded(float* p, float x) { *p = x; }

template <class Element>
__device__ __forceinline__ float2 unpack(uint32_t pair) {
  if constexpr (std::is_same_v<Element, __nv_bfloat16>)
    return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
  else
    return __half22float2(*reinterpret_cast<const __half2*>(&pair));
}

// n elements, one or by accesses of up to 16 bytes to an aligned address.
template <int n, class Element>
__device__ __forceinline__ void load_elements(float (&x)[n], const Element* p) {
  if constexpr (n == 1) {
    x[0] = to_float(*p);
  } else if constexpr (std::is_same_v<Element, float>) {
#pragma unroll
    for (int i = 0; i < n; i += kWide) {
      const float4 y = *reinterpret_cast<const float4*>(p + i);
      x[i] = y.x, x[i + 1] = y.y, x[i + 2] = y.z, x[i + 3] = y.w;
    }
  } else {
    static_assert(n == 4 || n == 8, "an access is 8 or 16 bytes");
    uint32_t words[n / 2];
    if constexpr (n == 8) {
      const uint4 y = *reinterpret_cast<const uint4*>(p);
      words[0] = y.x, words[1] = y.y, words[2] = y.z, words[3] = y.w;
    } else {
      const uint2 y = *reinterpret_cast<const uint2*>(p);
      words[0] = y.x, words[1] = y.y;
    }
#pragma unroll
    for (int i = 0; i < n / 2; ++i) {
      const float2 y = unpack<Element>(words[i]);
      x[2 * i] = y.x, x[2 * i + 1] = y.y;
    }
  }
}

// Elements piece to piece + 7 of a key, zeros from element dim on.
template <bool kIsWide, class Element>
__device__ __forceinline__ void load_piece(float (&x)[kPiece], const Element* key, int piece, int dim) {
#pragma unroll
  for (int e = 0; e < kPiece; ++e) x[e] = 0;
  if constexpr (kIsWide) {
    if (piece < dim) load_elements(x, key + piece);
  } else {
#pragma unroll
    for (int e = 0; e < kPiece; ++e)
      if (piece + e < dim) x[e] = to_float(key[piece + e]);
  }
}

// Parts of shared memory, all float but the last.
template <int kHeads>
struct WindowStepSmem {
  static constexpr int kFeatures = 0;                                         // [kMaxDim][kHeads] phi_q of a pass
  static constexpr int kQueries = kFeatures + kMaxDim * kHeads;               // [kHeads][kMaxDim] q, zeros behind
  static constexpr int kKey = kQueries + kHeads * kMaxDim;                    // [kMaxDim] k of the token
  static constexpr int kLeavingKeys = kKey + kMaxDim;                         // [kMaxDim] phi_k that leaves
  static constexpr int kLeavingValues = kLeavingKeys + kMaxDim;               // [kMaxDim] v that leaves
  static constexpr int kKeySum = kLeavingValues + kMaxDim;                    // [kMaxDim] with what leaves
  static constexpr int kValueSum = kKeySum + kMaxDim;                         // [kMaxDim] likewise
  static constexpr int kMaxima = kValueSum + kMaxDim;                         // [warps + 1][kHeads] of logits
  static constexpr int kNearSums = kMaxima + kMaxWarps * kHeads + kMaxHeads;  // [warps][kHeads] of near weights
  static constexpr int kFarSums = kNearSums + kMaxWarps * kHeads;             // [kHeads] of far weights
  static constexpr int kFarFactors = kFarSums + kMaxHeads;                    // [kHeads] of the far sums
  static constexpr int kDenominators = kFarFactors + kMaxHeads;               // [kHeads]
  static constexpr int kWeightSum = kDenominators + kMaxHeads;                // [1] with what leaves
  static constexpr int kIsLast = kWeightSum + 1;                              // [1] is this the last block?
  static constexpr int kWeights = kIsLast + 3;                                // [w][kHeads] logits, then near weights
  static_assert(kWeights % kWide == 0, "what follows is read by 16 bytes");
  __host__ __device__ static int partial(int window) {
    return kWeights + (window * kHeads + kWide - 1) / kWide * kWide;
  }
  // ... [partial rows][kHeads][columns] sums over some rows, then uint8_t [w]: is the slot valid?
  static size_t bytes(const Lanes& lanes, int columns, int window) {
    return sizeof(float) * (partial(window) + lanes.partial_rows * kHeads * columns) + static_cast<size_t>(window);
  }
};

// Lanes that hold one key: a power of two, so that shuffles add up their products.
__device__ __forceinline__ int lanes_of_key(int dim) {
  int lanes = 1;
  while (lanes * kPiece < dim) lanes *= 2;
  return lanes;
}

// weights [w][kHeads] = logits of the ring's keys before the cap, but for that of `slot`, whose key is not there yet;
// maxima [warps][kHeads] of each warp's valid slots. Groups of lanes take slots in turn, so that a warp reads whole
// keys. ring_k: of slot 0.
template <int kHeads, bool kIsWide, class Element>
__device__ __forceinline__ void write_logits(const hf_linattn_window_step_problem& p, const Element* ring_k, int slot,
                                             const uint8_t* is_valid, const float* queries, float* weights,
                                             float* maxima) {
  constexpr int kInFlight = kIsWide ? kSlotsInFlight : 1;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;
  const int group_lanes = lanes_of_key(p.window_dim), groups = static_cast<int>(blockDim.x) / group_lanes;
  const int group = thread / group_lanes, piece = thread % group_lanes * kPiece;
  const int64_t slot_stride = static_cast<int64_t>(p.num_kv_heads) * p.window_dim;
  float largest[kHeads];
#pragma unroll
  for (int h = 0; h < kHeads; ++h) largest[h] = -INFINITY;

#pragma unroll 1
  for (int first = 0; first < p.window; first += kInFlight * groups) {
    float keys[kInFlight][kPiece];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int j = first + i * groups + group;
      const bool is_read = j < p.window && j != slot && is_valid[j];
      load_piece<kIsWide>(keys[i], ring_k + j * slot_stride, piece, is_read ? p.window_dim : 0);
    }
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      float logits[kInFlight] = {};
#pragma unroll
      for (int e = 0; e < kPiece; ++e) {
        const float q = piece < p.window_dim ? queries[h * kMaxDim + piece + e] : 0;
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) logits[i] += q * keys[i][e];
      }
      for (int distance = group_lanes / 2; distance > 0; distance /= 2)
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) logits[i] += __shfl_xor_sync(kAllLanes, logits[i], distance);
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        const int j = first + i * groups + group;
        if (j >= p.window || j == slot) continue;
        logits[i] *= p.scale;
        if (is_valid[j]) largest[h] = fmaxf(largest[h], logits[i]);
        if (piece == 0) weights[j * kHeads + h] = logits[i];
      }
    }
  }
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
#pragma unroll
    for (int distance = kWarp / 2; distance > 0; distance /= 2)
      largest[h] = fmaxf(largest[h], __shfl_xor_sync(kAllLanes, largest[h], distance));
    if (lane == 0) maxima[warp * kHeads + h] = largest[h];
  }
}

// Caps the logits and turns them into near weights e^{logit - peak}, 0 in invalid slots, with the peak over near and
// far; near_sums [warps][kHeads] of each warp. far_factors: e^{shift - peak}, of the far sums. shifts: log_scale, or
// null.
template <int kHeads>
__device__ __forceinline__ void weigh_slots(const hf_linattn_window_step_problem& p, int heads, const uint8_t* is_valid,
                                            const float* far_sums, const float* shifts, const float* maxima,
                                            float* weights, float* near_sums, float* far_factors) {
  const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
  const int warp = thread / kWarp, lane = thread % kWarp, warps = threads / kWarp;
  const auto cap = [&](float x) { return p.softcap != 0 ? p.softcap * tanhf(x / p.softcap) : x; };
  const int h = thread % kHeads;  // of all elements of weights that this thread gets to
  float peak = -INFINITY;
#pragma unroll 1
  for (int w = 0; w <= warps; ++w) peak = fmaxf(peak, maxima[w * kHeads + h]);
  peak = cap(peak);  // the cap is monotonic
  const float far_sum = far_sums[h], shift = shifts != nullptr && h < heads ? shifts[h] : 0;
  if (far_sum > FLT_MIN) peak = fmaxf(peak, logf(far_sum) + shift);
  float near_sum = 0;
#pragma unroll 1
  for (int i = thread; i < p.window * kHeads; i += threads) {
    const float weight = is_valid[i / kHeads] ? expf(cap(weights[i]) - peak) : 0;
    weights[i] = weight;
    near_sum += weight;
  }
#pragma unroll
  for (int distance = kWarp / 2; distance >= kHeads; distance /= 2)
    near_sum += __shfl_xor_sync(kAllLanes, near_sum, distance);
  if (lane < kHeads) near_sums[warp * kHeads + h] = near_sum;
  // A far sum of 0 must not meet an infinite factor: 1 / FLT_MIN bounds it in every other case.
  if (thread < kHeads) far_factors[h] = expf(fminf(shift - peak, -logf(FLT_MIN)));
}

// sums += weights ring_v for the rows of valid slots; ring_v: of slot 0 and the thread's columns.
template <int kHeads, int kVector, class Element>
__device__ __forceinline__ void multiply_ring(float (&sums)[kHeads][kVector], const float* weights,
                                              const uint8_t* is_valid, const Element* ring_v, int64_t slot_stride,
                                              int window, int first_row, int row_lanes) {
#pragma unroll 1
  for (int from = first_row; from < window; from += kRowsInFlight * row_lanes) {
    float rows[kRowsInFlight][kVector];
#pragma unroll
    for (int i = 0; i < kRowsInFlight; ++i) {
      const int j = from + i * row_lanes;
#pragma unroll
      for (int c = 0; c < kVector; ++c) rows[i][c] = 0;
      if (j < window && is_valid[j]) load_elements(rows[i], ring_v + j * slot_stride);
    }
#pragma unroll
    for (int i = 0; i < kRowsInFlight; ++i) {
      const int j = from + i * row_lanes;
      if (j >= window) break;
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        const float weight = weights[j * kHeads + h];
#pragma unroll
        for (int c = 0; c < kVector; ++c) sums[h][c] += weight * rows[i][c];
      }
    }
  }
}

// Template parameters as in step.cu. kVector is kWide where keys, too, can be loaded by 16 bytes.
template <class Element, int kHeads, int kVector, bool kClusters>
__global__ void __launch_bounds__(kMaxThreads, 1)
    window_linear_attention_step_kernel(const hf_linattn_window_step_problem p, int slices, int slice_columns) {
  if constexpr (!kClusters || HF_LINATTN_HAS_SM90) {
    using Smem = WindowStepSmem<kHeads>;
    float* const smem = reinterpret_cast<float*>(ptx::dynamic_smem());
    float *const features = smem + Smem::kFeatures, *const queries = smem + Smem::kQueries;
    float *const key = smem + Smem::kKey, *const leaving_keys = smem + Smem::kLeavingKeys;
    float *const leaving_values = smem + Smem::kLeavingValues, *const key_sum = smem + Smem::kKeySum;
    float *const value_sum = smem + Smem::kValueSum, *const far_sums = smem + Smem::kFarSums;
    float *const far_factors = smem + Smem::kFarFactors, *const denominators = smem + Smem::kDenominators;
    float *const weight_sum = smem + Smem::kWeightSum, *const is_last = smem + Smem::kIsLast;
    float *const weights = smem + Smem::kWeights, *const partial = smem + Smem::partial(p.window);
    float *const maxima = smem + Smem::kMaxima, *const near_sums = smem + Smem::kNearSums;

    const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
    const int warp = thread / kWarp, lane = thread % kWarp, warps = threads / kWarp;
    const int block = static_cast<int>(blockIdx.x), slice = block % slices, task = block / slices;
    const int batch = task / p.num_kv_heads, kv_head = task % p.num_kv_heads;
    const int64_t state_row = task;  // of [N, H_kv]
    const int feature_dim = p.feature_dim, group = p.num_heads / p.num_kv_heads;
    const int first_column = slice * slice_columns, columns = min(slice_columns, p.value_dim - first_column);

    const Lanes lanes = divide_threads(threads, columns / kVector, max(feature_dim, p.window));
    const int row_lane = thread / lanes.vectors, column = thread % lanes.vectors * kVector;
    const int no_row = max(feature_dim, p.window), first_row = row_lane < lanes.row_lanes ? row_lane : no_row;
    uint8_t* const is_valid = reinterpret_cast<uint8_t*>(partial + lanes.partial_rows * kHeads * columns);
    StateRows<kVector> state = {p.state.kv + state_row * feature_dim * p.value_dim + first_column + column, feature_dim,
                                p.value_dim, first_row, lanes.row_lanes};
    state.load(first_row);  // under way while the rest is read

    // Volatile: other blocks count themselves in the upper half meanwhile.
    const int slot = static_cast<int>(*reinterpret_cast<const volatile uint64_t*>(p.slot) & kSlotMask);
    const int64_t first_entry = static_cast<int64_t>(batch) * p.window * p.num_kv_heads + kv_head;  // of [B, w, H_kv]
    const int64_t entry = first_entry + static_cast<int64_t>(slot) * p.num_kv_heads;
    Element* const ring_k = static_cast<Element*>(p.ring_k);
    Element* const ring_v = static_cast<Element*>(p.ring_v) + first_column;
    Element* const ring_phi_k = static_cast<Element*>(p.ring_phi_k) + entry * feature_dim;
    const Element* const k = static_cast<const Element*>(p.k) + batch * p.k_batch_stride + kv_head * p.k_head_stride;
    const Element* const v =
        static_cast<const Element*>(p.v) + batch * p.v_batch_stride + kv_head * p.v_head_stride + first_column;
    const int padded_dim = (p.window_dim + kPiece - 1) / kPiece * kPiece;

    // An invalid slot may hold anything: nothing of it is used, and exp(0) decays nothing.
    const uint8_t* const valid_row = p.ring_valid + static_cast<int64_t>(batch) * p.window;
    const bool leaves = valid_row[slot] != 0;
    const float decay = p.g != nullptr && leaves ? expf(p.ring_g[entry]) : 1.f;
#pragma unroll 1
    for (int j = thread; j < p.window; j += threads) is_valid[j] = j == slot || valid_row[j] != 0;
#pragma unroll 1
    for (int d = thread; d < p.window_dim; d += threads) key[d] = to_float(k[d]);
#pragma unroll 1
    for (int r = thread; r < feature_dim; r += threads) {
      leaving_keys[r] = leaves ? to_float(ring_phi_k[r]) : 0;
      key_sum[r] = decay * p.state.key_sum[state_row * feature_dim + r] + leaving_keys[r];
    }
#pragma unroll 1
    for (int c = thread; c < columns; c += threads) {
      leaving_values[c] = leaves ? to_float(ring_v[entry * p.value_dim + c]) : 0;
      ring_v[entry * p.value_dim + c] = v[c];
      if (p.state.value_sum == nullptr) continue;
      float* const element = p.state.value_sum + state_row * p.value_dim + first_column + c;
      value_sum[c] = decay * *element + leaving_values[c];
      *element = value_sum[c];
    }
    if (thread == 0 && p.state.weight_sum != nullptr) *weight_sum = decay * p.state.weight_sum[state_row] + leaves;

    uint64_t arrived = 0;  // blocks before this one, for thread 0
#pragma unroll 1
    for (int first_head = 0; first_head < group; first_head += kHeads) {
      const bool is_first_pass = first_head == 0;
      const int heads = min(kHeads, group - first_head), head = kv_head * group + first_head;
      const Element* const q = static_cast<const Element*>(p.q) + batch * p.q_batch_stride + head * p.q_head_stride;
      const Element* const phi_q =
          static_cast<const Element*>(p.phi_q) + batch * p.phi_q_batch_stride + head * p.phi_q_head_stride;
#pragma unroll 1
      for (int i = thread; i < kHeads * kMaxDim; i += threads) {
        const int h = i / kMaxDim, r = i % kMaxDim;
        if (r < padded_dim)
          queries[i] = h < heads && r < p.window_dim ? to_float(q[h * p.q_head_stride + r]) : 0;
        if (r < feature_dim) features[r * kHeads + h] = h < heads ? to_float(phi_q[h * p.phi_q_head_stride + r]) : 0;
      }
      __syncthreads();
      if (is_first_pass) arrive_at_cluster<kClusters>();  // the sums and the entry that leaves have been read

      write_logits<kHeads, kVector == kWide>(p, ring_k + first_entry * p.window_dim, slot, is_valid, queries,
                                             weights, maxima);
      for (int h = warp; h < kHeads; h += warps) {
        float far_sum = 0, logit = 0;
#pragma unroll 1
        for (int r = lane; r < feature_dim; r += kWarp) far_sum += features[r * kHeads + h] * key_sum[r];
#pragma unroll 1
        for (int d = lane; d < p.window_dim; d += kWarp) logit += queries[h * kMaxDim + d] * key[d];
        far_sum = p.b * sum_over_warp(far_sum);
        logit = p.scale * sum_over_warp(logit);
        if (p.state.weight_sum != nullptr) far_sum += p.a * *weight_sum;
        if (lane == 0) far_sums[h] = far_sum, weights[slot * kHeads + h] = maxima[warps * kHeads + h] = logit;
      }
      if (is_first_pass && thread == 0) {
        __threadfence();  // the block has read slot and ring_valid before it counts
        arrived = atomicAdd(reinterpret_cast<unsigned long long*>(p.slot), kArrival) / kArrival;
      }
      __syncthreads();

      weigh_slots<kHeads>(p, heads, is_valid, far_sums, p.log_scale == nullptr ? nullptr : p.log_scale + head, maxima,
                          weights, near_sums, far_factors);
      float leaving_v[kVector], sums[kHeads][kVector] = {};
      load_vector(leaving_v, leaving_values + column);
      state.multiply(sums, features, is_first_pass, decay, leaving_keys, leaving_v);
      __syncthreads();

      if (thread < kHeads) {
        float den = far_factors[thread] * far_sums[thread];
        for (int w = 0; w < warps; ++w) den += near_sums[w * kHeads + thread];
        denominators[thread] = den;
      }
      if (thread == 0) *is_last = arrived == gridDim.x - 1;
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        const float factor = p.b * far_factors[h];
#pragma unroll
        for (int c = 0; c < kVector; ++c) sums[h][c] *= factor;
      }
      multiply_ring(sums, weights, is_valid, ring_v + first_entry * p.value_dim + column,
                    static_cast<int64_t>(p.num_kv_heads) * p.value_dim, p.window, first_row, lanes.row_lanes);
      store_partial(partial, sums, lanes, columns);
      __syncthreads();

#pragma unroll 1
      for (int i = thread; i < heads * columns; i += threads) {
        const int h = i / columns, c = i % columns;
        float o = sum_partial<kHeads>(partial, lanes, columns, h, c);
        if (p.state.value_sum != nullptr) o += far_factors[h] * p.a * value_sum[c];
        const int64_t row = static_cast<int64_t>(batch) * p.num_heads + head + h;
        store_rounded(static_cast<Element*>(p.o) + row * p.value_dim + first_column + c, o / denominators[h]);
      }
    }

    if (*is_last != 0) {
      __threadfence();  // all other blocks have counted, and read before that
#pragma unroll 1
      for (int n = thread; n < p.batch; n += threads) p.ring_valid[static_cast<int64_t>(n) * p.window + slot] = 1;
      if (thread == 0) *p.slot = slot + 1 == p.window ? 0 : slot + 1;
    }
    wait_for_cluster<kClusters>();
    if (slice != 0) return;
#pragma unroll 1
    for (int r = thread; r < feature_dim; r += threads) {
      p.state.key_sum[state_row * feature_dim + r] = key_sum[r];
      ring_phi_k[r] = static_cast<const Element*>(
          p.phi_k)[batch * p.phi_k_batch_stride + kv_head * p.phi_k_head_stride + r];
    }
#pragma unroll 1
    for (int d = thread; d < p.window_dim; d += threads) ring_k[entry * p.window_dim + d] = k[d];
    if (thread != 0) return;
    if (p.state.weight_sum != nullptr) p.state.weight_sum[state_row] = *weight_sum;
    if (p.g != nullptr) p.ring_g[entry] = p.g[batch * p.g_batch_stride + kv_head * p.g_head_stride];
  }
}

struct WindowStepLaunch {
  void (*kernel)(hf_linattn_window_step_problem, int, int);
  size_t smem_bytes;
};

// As many query heads a pass as shared memory has room for beside their weights.
template <class Element, int kVector, bool kClusters>
WindowStepLaunch choose_kernel(const hf_linattn_window_step_problem& p, const StepShape& shape) {
  const int limit = smem_limit(), group = p.num_heads / p.num_kv_heads;
  for (int most = min(group, kMaxHeads);; most /= 2) {
    const WindowStepLaunch chosen = with_heads(most, [&](auto heads) -> WindowStepLaunch {
      constexpr int kHeads = decltype(heads)::value;
      most = kHeads;
      const auto bytes = [&](const Lanes& lanes, int columns) {
        return WindowStepSmem<kHeads>::bytes(lanes, columns, p.window);
      };
      return {window_linear_attention_step_kernel<Element, kHeads, kVector, kClusters>,
              largest_smem(shape, p.value_dim, kVector, max(p.feature_dim, p.window), bytes)};
    });
    if (most == 1 || static_cast<int64_t>(chosen.smem_bytes) <= limit) return chosen;
  }
}
// A thread leaves at most kWide partial sums a head.
static_assert(sizeof(float) * (WindowStepSmem<1>::kWeights + kMaxThreads * kWide) + (sizeof(float) + 1) * kMaxWindow <=
                  kLeastSmemLimit,
              "the longest window does not fit beside the rest");

template <class Element>
int run_window_step(const hf_linattn_window_step_problem& p, cudaStream_t stream) {
  const auto is_aligned = [](const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; };
  const int64_t heads = static_cast<int64_t>(p.batch) * p.num_kv_heads;
  const bool is_wide = p.value_dim % kWide == 0 && p.window_dim % kPiece == 0 && is_aligned(p.state.kv) &&
                       is_aligned(p.ring_k) && is_aligned(p.ring_v);
  const bool may_split = has_clusters(window_linear_attention_step_kernel<Element, 1, kWide, true>);
  const StepShape shape =
      choose_shape(heads, max(p.feature_dim, p.window), p.value_dim, is_wide ? kWide : 1, may_split);
  const WindowStepLaunch chosen = is_wide ? shape.slices > 1 ? choose_kernel<Element, kWide, true>(p, shape)
                                                             : choose_kernel<Element, kWide, false>(p, shape)
                                  : shape.slices > 1 ? choose_kernel<Element, 1, true>(p, shape)
                                                     : choose_kernel<Element, 1, false>(p, shape);
  const int64_t blocks = heads * shape.slices;
  if (blocks > INT32_MAX)
    return set_error("window_linear_attention_step: %lld blocks are too many", (long long)blocks);
  return launch_clusters(chosen.kernel, dim3(static_cast<unsigned>(blocks)), shape.slices, shape.threads,
                         chosen.smem_bytes, stream, p, shape.slices, shape.slice_columns);
}

int check_window_step(const hf_linattn_window_step_problem& p) {
  if (p.dtype < HF_LINATTN_BF16 || p.dtype > HF_LINATTN_FP32)
    return set_error("window_linear_attention_step: dtype %d is none of bfloat16, float16, float32", p.dtype);
  const auto is_dim = [](int dim) { return dim >= 1 && dim <= kMaxDim; };
  if (!is_dim(p.window_dim) || !is_dim(p.feature_dim) || !is_dim(p.value_dim))
    return set_error("window_linear_attention_step: D, K and V must be 1 to %d, got %d, %d and %d", kMaxDim,
                     p.window_dim, p.feature_dim, p.value_dim);
  if (p.window < 1 || p.window > kMaxWindow)
    return set_error("window_linear_attention_step: the ring must have 1 to %d slots, got %d; use backend 'chunked'",
                     kMaxWindow, p.window);
  if (p.num_kv_heads < 1 || p.num_heads < 1 || p.num_heads % p.num_kv_heads != 0)
    return set_error("window_linear_attention_step: %d heads are no multiple of %d kv heads", p.num_heads,
                     p.num_kv_heads);
  if (p.state.kv == nullptr || p.state.key_sum == nullptr ||
      (p.a != 0 && (p.state.value_sum == nullptr || p.state.weight_sum == nullptr)))
    return set_error("window_linear_attention_step: the state lacks a sum that a %g needs", static_cast<double>(p.a));
  if (p.ring_k == nullptr || p.ring_v == nullptr || p.ring_phi_k == nullptr || p.ring_valid == nullptr ||
      p.slot == nullptr || (p.g != nullptr && p.ring_g == nullptr))
    return set_error("window_linear_attention_step: the state lacks a part of the ring");
  return 0;
}

}  // namespace
}  // namespace hf_linattn

extern "C" int hf_linattn_window_step(const hf_linattn_window_step_problem* problem, void* stream) {
  using namespace hf_linattn;
  const hf_linattn_window_step_problem& p = *problem;
  if (p.batch == 0) return 0;
  if (int error = check_window_step(p)) return error;
  const auto on = static_cast<cudaStream_t>(stream);
  if (p.dtype == HF_LINATTN_BF16) return run_window_step<__nv_bfloat16>(p, on);
  if (p.dtype == HF_LINATTN_FP16) return run_window_step<__half>(p, on);
  return run_window_step<float>(p, on);
}
