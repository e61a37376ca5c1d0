// One token of window_linear_attention for every sequence, state and ring updated in place: the oldest entry of the
// ring joins the sums, the token takes its slot, the query reads both under one denominator.
//
// Bytes decide where heads are many: kv is read and written once, the valid part of the ring read once. Where they are
// few, latencies do: a head is then split over the blocks of a cluster by rows of kv and slots of the ring, each byte
// is read by one block, and all that does not depend on `slot` is asked for before anything is waited for. A block sums
// its slots' e^{logit - peak} v and its rows' e^{log_scale - peak} q.kv under a peak of its own, over its logits and
// its part of the far sum, and sends the sums of some columns to the block that writes these columns of o. That one
// brings them under one peak. A head that is not split is a cluster of one block.
//
// To a thread the slots of ring_v are rows like those of kv, with softmax weights from shared memory in the place of
// features. The token itself is a slot behind those of the first block.
//
// Who may overwrite what others still read:
//   - rows of kv, key_sum and ring_phi_k[slot]: one block's own, which alone reads them;
//   - what every block of a head reads, once the sums of all have come: ring_v[slot], ring_g[slot] and weight_sum by
//     the first block, columns of value_sum by the one that writes them of o;
//   - ring_k[slot]: the first block too; whose slot it is may load the old or the new key and uses neither;
//   - ring_valid[:, slot] and slot, which every block reads: the last block of the grid to have read them. Blocks count
//     themselves in the upper half of *slot, which is 0 between launches, and the last one writes the whole of it. No
//     memory, no second launch and nothing to reset, so that a captured graph can replay the step, and launches on
//     different states never meet. Which block is last does not show in the results.
// Invalid slots may hold anything. The first slots of a thread are loaded before it knows which are valid: what is
// invalid is then not used, not even multiplied by 0.
#include <float.h>

#include "step.cuh"

namespace hf_linattn {
namespace {

constexpr int kMaxWarps = kMaxThreads / kWarp;
constexpr int kPiece = 8;           // elements of a key that one lane holds
constexpr int kValueBytes = 32;     // of the ring's values that a thread loads before the first use
constexpr int kMinRows = 16;        // of a block of a split head
constexpr int kMaxWindow = 16384;   // what shared memory holds beside the rest on every device, by one head a pass
constexpr float kMaxExponent = 87;  // a sum of 0 must not meet an infinite factor; 1 / FLT_MIN bounds every other one
constexpr uint64_t kArrival = uint64_t{1} << 32, kSlotMask = kArrival - 1;

__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(float x) { return x; }

__device__ __forceinline__ void store_rounded(__nv_bfloat16* p, float x) { *p = __float2bfloat16(x); }
__device__ __forceinline__ void store_rounded(__half* p, float x) { *p = __float2half(x); }
__device__ __forceinline__ void store_rounded(float* p, float x) { *p = x; }

template <class Element>
__device__ __forceinline__ float2 unpack_pair(uint32_t pair) {
  if constexpr (std::is_same_v<Element, __nv_bfloat16>)
    return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
  else
    return __half22float2(*reinterpret_cast<const __half2*>(&pair));
}

// n elements as they lie in memory: what is loaded ahead takes few registers and waits for nothing. Of more than one,
// by accesses of up to 16 bytes to an aligned address.
template <class Element, int n>
struct Packed {
  static constexpr int kWords = n * static_cast<int>(sizeof(Element)) / 4;
  static_assert(kWords == 2 || kWords % 4 == 0, "an access is 8 or 16 bytes");
  uint32_t words[kWords];

  __device__ __forceinline__ void load(const Element* p) {
    if constexpr (kWords == 2) {
      const uint2 y = *reinterpret_cast<const uint2*>(p);
      words[0] = y.x, words[1] = y.y;
    } else {
#pragma unroll
      for (int i = 0; i < kWords; i += 4) {
        const uint4 y = reinterpret_cast<const uint4*>(p)[i / 4];
        words[i] = y.x, words[i + 1] = y.y, words[i + 2] = y.z, words[i + 3] = y.w;
      }
    }
  }

  __device__ __forceinline__ void unpack(float* x) const {
    if constexpr (std::is_same_v<Element, float>) {
#pragma unroll
      for (int i = 0; i < n; ++i) x[i] = __uint_as_float(words[i]);
    } else {
#pragma unroll
      for (int i = 0; i < n / 2; ++i) {
        const float2 y = unpack_pair<Element>(words[i]);
        x[2 * i] = y.x, x[2 * i + 1] = y.y;
      }
    }
  }
};

template <class Element>
struct Packed<Element, 1> {
  Element element;
  __device__ __forceinline__ void load(const Element* p) { element = *p; }
  __device__ __forceinline__ void unpack(float* x) const { *x = to_float(element); }
};

// A block's share of some rows, slots or columns. `first` is one that there is even where count is 0.
struct Part {
  int first, count;
};

__device__ __forceinline__ Part part_of(int whole, int share, int slice) {
  const int before = slice * share;
  return {min(before, whole - 1), max(0, min(share, whole - before))};
}

// The most that a block has of each: rows of kv, slots of the ring, columns of o.
struct Shares {
  int features, slots, columns;
};

// Parts of shared memory, all float but the last. A head's rows, slots and columns are those of the block.
template <int kHeads>
struct WindowStepSmem {
  static constexpr int kBarrier = 0;                                          // uint64_t of Exchange
  static constexpr int kFeatures = kBarrier + kWide;                          // [kMaxDim][kHeads] phi_q of a pass
  static constexpr int kQueries = kFeatures + kMaxDim * kHeads;               // [kHeads][kMaxDim] q, zeros behind
  static constexpr int kKey = kQueries + kHeads * kMaxDim;                    // [kMaxDim] k of the token
  static constexpr int kValue = kKey + kMaxDim;                               // [kMaxDim] v of the token
  static constexpr int kReceived = kValue + kMaxDim;                          // [slices][kHeads][columns] sums
  static constexpr int kNewKeys = kReceived + kHeads * kMaxDim;               // [kMaxDim] phi_k of the token
  static constexpr int kLeavingKeys = kNewKeys + kMaxDim;                     // [kMaxDim] phi_k that leaves
  static constexpr int kLeavingValues = kLeavingKeys + kMaxDim;               // [kMaxDim] v that leaves
  static constexpr int kKeySum = kLeavingValues + kMaxDim;                    // [kMaxDim] with what leaves
  static constexpr int kValueSum = kKeySum + kMaxDim;                         // [kMaxDim] likewise
  static constexpr int kMaxima = kValueSum + kMaxDim;                         // [warps][kHeads] of logits
  static constexpr int kNearSums = kMaxima + kMaxWarps * kHeads;              // [warps][kHeads] of near weights
  static constexpr int kFarSums = kNearSums + kMaxWarps * kHeads;             // [warps][kHeads] of far weights
  static constexpr int kTokenLogits = kFarSums + kMaxWarps * kHeads;          // [kHeads] -inf but in the first block
  static constexpr int kShifts = kTokenLogits + kHeads;                       // [kHeads] log_scale
  static constexpr int kWeightSum = kShifts + kHeads;                         // [1] behind them, with what leaves
  static constexpr int kFarFactors = kWeightSum + 1;                          // [kHeads] of the far sums
  static constexpr int kPeaks = kFarFactors + kHeads;                         // [slices][kHeads] received
  static constexpr int kAllNearSums = kPeaks + kMaxCluster * kHeads;          // [slices][kHeads] received
  static constexpr int kAllFarSums = kAllNearSums + kMaxCluster * kHeads;     // [slices][kHeads] received
  static constexpr int kWeights = (kAllFarSums + kMaxCluster * kHeads + kWide - 1) / kWide * kWide;
  // ... [slots + 1][kHeads] logits, then near weights, the token's last
  __host__ __device__ static int partial(int slots) {
    return kWeights + ((slots + 1) * kHeads + kWide - 1) / kWide * kWide;
  }
  // ... [partial rows][kHeads][V] sums over some rows and slots, then uint8_t [slots + 1]: is it valid, with a weight?
  static size_t bytes(const Lanes& lanes, int value_dim, int slots) {
    return sizeof(float) * (partial(slots) + lanes.partial_rows * kHeads * value_dim) + static_cast<size_t>(slots) + 1;
  }
};

// The pieces of the ring's keys that a thread holds. Groups of lanes, a power of two so that shuffles add up their
// products, take slots in turn, so that a warp reads whole keys. A lane behind the end of a key holds its start, which
// meets queries of 0.
template <class Element, bool kIsWide, int kBytes>
struct RingKeys {
  static constexpr int kAccess = kIsWide ? kPiece : 1;
  static constexpr int kInFlight = kIsWide ? kBytes / (kPiece * static_cast<int>(sizeof(Element))) : 1;
  const Element* ring;  // the block's first slot
  int stride;           // from slot to slot
  int slots, dim;
  Packed<Element, kAccess> pieces[kInFlight][kPiece / kAccess];

  __device__ __forceinline__ int lane_bits() const {
    int bits = 0;
    while ((kPiece << bits) < dim) ++bits;
    return bits;
  }

  // Slots first + group, every groups-th; is_valid null: whether or not they are valid.
  __device__ __forceinline__ void load(int first, const uint8_t* is_valid) {
    const int thread = hidden(static_cast<int>(threadIdx.x)), bits = lane_bits();
    const int group = thread >> bits, groups = static_cast<int>(blockDim.x) >> bits;
    const int piece = (thread - (group << bits)) * kPiece, last = max(hidden(slots) - 1, 0);
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int j = min(first + i * groups + group, last);
      if (is_valid != nullptr && !is_valid[j]) continue;
#pragma unroll
      for (int e = 0; e < kPiece; e += kAccess)
        pieces[i][e / kAccess].load(ring + static_cast<int64_t>(j) * stride + (piece + e < dim ? piece + e : 0));
    }
  }

  // weights [slots][kHeads] = logits before the cap; maxima [warps][kHeads] of each warp's valid slots. is_loaded:
  // load(0) has been called already.
  template <int kHeads>
  __device__ __forceinline__ void write_logits(float scale, const uint8_t* is_valid, const float* queries,
                                               bool is_loaded, float* weights, float* maxima) {
    const int thread = hidden(static_cast<int>(threadIdx.x)), warp = thread / kWarp, lane = thread % kWarp;
    const int bits = lane_bits(), group = thread >> bits, groups = static_cast<int>(blockDim.x) >> bits;
    const int piece = (thread - (group << bits)) * kPiece;
    float largest[kHeads];
#pragma unroll
    for (int h = 0; h < kHeads; ++h) largest[h] = -INFINITY;
#pragma unroll 1
    for (int first = hidden(0); first < slots; first += kInFlight * groups) {
      if (!is_loaded || first != 0) load(first, is_valid);
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        if (first + i * groups >= slots) break;
        float key[kPiece], logits[kHeads];
#pragma unroll
        for (int e = 0; e < kPiece; e += kAccess) pieces[i][e / kAccess].unpack(key + e);
#pragma unroll
        for (int h = 0; h < kHeads; ++h) {
          logits[h] = 0;
#pragma unroll
          for (int e = 0; e < kPiece; ++e) logits[h] += (piece < dim ? queries[h * kMaxDim + piece + e] : 0) * key[e];
        }
        for (int distance = 1 << bits >> 1; distance > 0; distance /= 2)
#pragma unroll
          for (int h = 0; h < kHeads; ++h) logits[h] += __shfl_xor_sync(kAllLanes, logits[h], distance);
        const int j = first + i * groups + group;
        if (j >= slots || !is_valid[j]) continue;
#pragma unroll
        for (int h = 0; h < kHeads; ++h) {
          logits[h] *= scale;
          largest[h] = fmaxf(largest[h], logits[h]);
          if (piece == 0) weights[j * kHeads + h] = logits[h];
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
};

// The slots of ring_v that a thread holds kVector columns of: first_row, then every row_lanes-th.
template <class Element, int kVector>
struct RingValues {
  static constexpr int kInFlight =
      kVector == kWide ? kValueBytes / (kWide * static_cast<int>(sizeof(Element))) : kRowsInFlight;
  const Element* ring;  // the block's first slot, the thread's columns
  int stride, slots, first_row, row_lanes;
  Packed<Element, kVector> rows[kInFlight];

  // is_valid null: whether or not slots are valid.
  __device__ __forceinline__ void load(int from, const uint8_t* is_valid) {
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int j = from + i * row_lanes;
      if (j < slots && (is_valid == nullptr || is_valid[j])) rows[i].load(ring + static_cast<int64_t>(j) * stride);
    }
  }

  // sums += weights v over valid slots. is_loaded: load(first_row) has been called already.
  template <int kHeads>
  __device__ __forceinline__ void multiply(float (&sums)[kHeads][kVector], const float* weights,
                                           const uint8_t* is_valid, bool is_loaded) {
#pragma unroll 1
    for (int from = hidden(first_row); from < slots; from += kInFlight * row_lanes) {
      if (!is_loaded || from != first_row) load(from, is_valid);
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        const int j = from + i * row_lanes;
        if (j >= slots) break;
        if (!is_valid[j]) continue;
        float v[kVector];
        rows[i].unpack(v);
#pragma unroll
        for (int h = 0; h < kHeads; ++h) {
          const float weight = weights[j * kHeads + h];
#pragma unroll
          for (int c = 0; c < kVector; ++c) sums[h][c] += weight * v[c];
        }
      }
    }
  }
};

// Of the thread's head, thread % kHeads.
struct BlockSums {
  float peak;  // -inf where neither a slot nor the far sum has a weight
  float far_sum;
};

// Caps the logits and turns them into near weights e^{logit - peak}, 0 in invalid slots, with the block's own peak over
// near and far; near_sums [warps][kHeads] of each warp. far_factors: b e^{shift - peak}, of the block's q.kv.
template <int kHeads>
__device__ __forceinline__ BlockSums weigh_slots(const hf_linattn_window_step_problem& p, int slots,
                                                 const uint8_t* is_valid, const float* maxima,
                                                 const float* token_logits, const float* far_sums, const float* shifts,
                                                 float* weights, float* near_sums, float* far_factors) {
  const int threads = static_cast<int>(blockDim.x), thread = hidden(static_cast<int>(threadIdx.x));
  const int warp = thread / kWarp, lane = thread % kWarp, warps = threads / kWarp;
  const auto cap = [&](float x) { return p.softcap != 0 ? p.softcap * tanhf(x / p.softcap) : x; };
  const int h = thread % kHeads;  // of all elements of weights that this thread gets to
  float peak = token_logits[h], far_sum = 0;
#pragma unroll 4
  for (int w = 0; w < warps; ++w) {
    peak = fmaxf(peak, maxima[w * kHeads + h]);
    far_sum += far_sums[w * kHeads + h];
  }
  if (peak != -INFINITY) peak = cap(peak);  // the cap is monotonic
  far_sum *= p.b;
  const float shift = shifts[h];
  // Features of any sign: what is a weight in all may be negative in this block.
  if (fabsf(far_sum) > FLT_MIN) peak = fmaxf(peak, logf(fabsf(far_sum)) + shift);
  const float reference = peak == -INFINITY ? shift : peak;
  float near_sum = 0;
#pragma unroll 1
  for (int i = thread; i < (slots + 1) * kHeads; i += threads) {
    const float weight = is_valid[i / kHeads] ? expf(cap(weights[i]) - reference) : 0;
    weights[i] = weight;
    near_sum += weight;
  }
#pragma unroll
  for (int distance = kWarp / 2; distance >= kHeads; distance /= 2)
    near_sum += __shfl_xor_sync(kAllLanes, near_sum, distance);
  if (lane < kHeads) near_sums[warp * kHeads + h] = near_sum;
  if (thread < kHeads) far_factors[h] = p.b * expf(fminf(shift - reference, kMaxExponent));
  return {peak, far_sum};
}

// The entry of [B, w, H_kv] of this slot.
__device__ __forceinline__ int64_t entry_of(const hf_linattn_window_step_problem& p, int batch, int kv_head, int slot) {
  return (static_cast<int64_t>(batch) * p.window + slot) * p.num_kv_heads + kv_head;
}

// What a thread reads of the entry that leaves, and of the sums that it joins, for one row and one column.
template <class Element>
struct Leaving {
  Element key, value;
  float key_sum, value_sum;
};

// What the blocks of a head send one another, counted by a barrier in shared memory. The barrier of the cluster would
// do, but waits for the stores to kv that are under way. A head of one block takes __syncthreads.
template <bool kClusters>
struct Exchange {
  uint32_t barrier;  // shared address

  // By one thread, before the block arrives at the cluster's barrier.
  __device__ __forceinline__ void init() const {
#if HF_LINATTN_HAS_SM90
    if constexpr (kClusters) ptx::mbarrier_init(barrier, 1), ptx::mbarrier_init_fence();
#endif
  }

  // By one thread: floats that this block receives in this pass.
  __device__ __forceinline__ void expect(int floats) const {
#if HF_LINATTN_HAS_SM90
    if constexpr (kClusters) ptx::mbarrier_arrive_expect_tx(barrier, static_cast<uint32_t>(floats) * sizeof(float));
#endif
  }

  // *element = x in the shared memory of the block of this rank.
  __device__ __forceinline__ void send(float* element, int rank, float x) const {
#if HF_LINATTN_HAS_SM90
    if constexpr (kClusters) {
      const uint32_t to = static_cast<uint32_t>(rank);
      return ptx::st_async(ptx::map_shared_rank(ptx::smem_address(element), to), x, ptx::map_shared_rank(barrier, to));
    }
#endif
    *element = x;
  }

  __device__ __forceinline__ void wait(int pass) const {
#if HF_LINATTN_HAS_SM90
    if constexpr (kClusters) return ptx::mbarrier_wait_cluster(barrier, static_cast<uint32_t>(pass) % 2);
#endif
    __syncthreads();
  }
};

// kHeads: query heads of one pass. kVector: columns of one access, kWide where keys, too, can be loaded by 16 bytes.
// kClusters: the blocks of a head form a cluster.
template <class Element, int kHeads, int kVector, bool kClusters>
__global__ void __launch_bounds__(kMaxThreads, 1)
    window_linear_attention_step_kernel(const hf_linattn_window_step_problem p, int slices, const Shares shares) {
  if constexpr (!kClusters || HF_LINATTN_HAS_SM90) {
    using Smem = WindowStepSmem<kHeads>;
    float* const smem = reinterpret_cast<float*>(ptx::dynamic_smem());
    const Exchange<kClusters> exchange = {ptx::smem_address(smem + Smem::kBarrier)};
    if (threadIdx.x == 0) exchange.init();
    arrive_at_cluster<kClusters>();  // others may write to this block

    float *const features = smem + Smem::kFeatures, *const queries = smem + Smem::kQueries;
    float *const key = smem + Smem::kKey, *const value = smem + Smem::kValue, *const new_keys = smem + Smem::kNewKeys;
    float *const leaving_keys = smem + Smem::kLeavingKeys, *const leaving_values = smem + Smem::kLeavingValues;
    float *const key_sum = smem + Smem::kKeySum, *const value_sum = smem + Smem::kValueSum;
    float *const maxima = smem + Smem::kMaxima, *const near_sums = smem + Smem::kNearSums;
    float *const far_sums = smem + Smem::kFarSums, *const token_logits = smem + Smem::kTokenLogits;
    float *const shifts = smem + Smem::kShifts, *const far_factors = smem + Smem::kFarFactors;
    float *const received = smem + Smem::kReceived, *const peaks = smem + Smem::kPeaks;
    float *const all_near_sums = smem + Smem::kAllNearSums, *const all_far_sums = smem + Smem::kAllFarSums;
    float* const weight_sum = smem + Smem::kWeightSum;
    float *const weights = smem + Smem::kWeights, *const partial = smem + Smem::partial(shares.slots);

    const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
    const int warp = thread / kWarp, lane = thread % kWarp, warps = threads / kWarp;  // blocks of a head
    const int block = static_cast<int>(blockIdx.x), slice = block % slices, task = block / slices;
    const auto own_slice = [&] { return kClusters ? hidden(slice) : 0; };
    const int batch = task / p.num_kv_heads, kv_head = task % p.num_kv_heads;
    const int64_t state_row = task;  // of [N, H_kv]
    const int feature_dim = p.feature_dim, value_dim = p.value_dim, group = p.num_heads / p.num_kv_heads;
    const Part rows = part_of(feature_dim, shares.features, slice), slots = part_of(p.window, shares.slots, slice);

    constexpr int kNoRow = kMaxWindow;
    const Lanes lanes = divide_threads(threads, value_dim / kVector, max(shares.features, shares.slots));
    const int first_row = thread < lanes.row_lanes * lanes.vectors ? thread / lanes.vectors : kNoRow;
    const int column = thread % lanes.vectors * kVector;
    uint8_t* const is_valid = reinterpret_cast<uint8_t*>(partial + lanes.partial_rows * kHeads * value_dim);

    // Under way before anything is waited for. Volatile: other blocks count themselves in the upper half of *slot.
    const int loaded_slot = static_cast<int>(*reinterpret_cast<const volatile uint64_t*>(p.slot) & kSlotMask);
    const int64_t first_own = entry_of(p, batch, kv_head, slots.first);
    Element *const ring_k = static_cast<Element*>(p.ring_k), *const ring_v = static_cast<Element*>(p.ring_v);
    Element* const ring_phi_k = static_cast<Element*>(p.ring_phi_k);
    uint8_t* const valid_row = p.ring_valid + static_cast<int64_t>(batch) * p.window;
    // That a thread holds; more heads leave fewer registers.
    constexpr int kKeyBytes = kHeads * sizeof(Element) < kMaxHeads * 2 ? 64 : 32;
    RingKeys<Element, kVector == kWide, kKeyBytes> keys = {
        ring_k + first_own * p.window_dim, p.num_kv_heads * p.window_dim, slots.count, p.window_dim};
    StateRows<kVector> state = {p.state.kv + (state_row * feature_dim + rows.first) * value_dim + column, rows.count,
                                value_dim, first_row, lanes.row_lanes};
    RingValues<Element, kVector> values = {ring_v + first_own * value_dim + column, p.num_kv_heads * value_dim,
                                           slots.count, first_row, lanes.row_lanes};
    keys.load(0, nullptr);
    state.load(first_row);
    values.load(first_row, nullptr);
    const uint8_t first_valid = valid_row[slots.first + min(hidden(thread), max(slots.count - 1, 0))];

    int slot = 0;
    const auto load_leaving = [&](int i) {
      const int r = part_of(feature_dim, shares.features, own_slice()).first + min(i, max(rows.count - 1, 0));
      const int c = min(i, value_dim - 1);
      const int64_t entry = entry_of(p, batch, hidden(kv_head), slot);
      const int64_t state_row = static_cast<int64_t>(hidden(batch)) * p.num_kv_heads + kv_head;  // of [N, H_kv]
      return Leaving<Element>{ring_phi_k[entry * feature_dim + r], ring_v[entry * value_dim + c],
                              p.state.key_sum[state_row * feature_dim + r],
                              p.state.value_sum != nullptr ? p.state.value_sum[state_row * value_dim + c] : 0};
    };
    Leaving<Element> first_leaving = {};
    bool leaves = false;
    float decay = 1;
    uint32_t arrived = 0;  // blocks before this one, for thread 0
#pragma unroll 1
    for (int first_head = 0; first_head < group; first_head += kHeads) {
      const bool is_first_pass = first_head == 0;
      const int heads = min(kHeads, group - first_head), head = hidden(kv_head) * group + first_head;
      float scalar = 0;
      if (thread < heads && p.log_scale != nullptr) scalar = p.log_scale[head + thread];
      const bool has_weight_sum = is_first_pass && thread == kHeads;
      if (has_weight_sum && p.state.weight_sum != nullptr) scalar = p.state.weight_sum[hidden(task)];
      // A warp takes elements of a head's q and phi_q, or of k and phi_k, or of v, two a lane.
      const int largest_dim = max(max(divide_up(hidden(p.window_dim), kPiece) * kPiece, shares.features), value_dim);
      int part_bits = 0;
      while ((2 * kWarp << part_bits) < largest_dim) ++part_bits;
#pragma unroll 1
      for (int part = hidden(warp); part < (is_first_pass ? kHeads + 2 : kHeads) << part_bits; part += warps) {
        const int h = part >> part_bits, first = (part - (h << part_bits)) * 2 * kWarp + hidden(lane);
        const auto vector_of = [&](const void* data, int64_t batch_stride, int64_t head_stride, int head) {
          return static_cast<const Element*>(data) + hidden(batch) * batch_stride + head * head_stride;
        };
        const bool is_value = h == kHeads + 1, is_head = h < kHeads, is_there = h < heads || !is_head;
        const Element* const of_window = is_head    ? vector_of(p.q, p.q_batch_stride, p.q_head_stride, head + h)
                                         : is_value ? vector_of(p.v, p.v_batch_stride, p.v_head_stride, kv_head)
                                                    : vector_of(p.k, p.k_batch_stride, p.k_head_stride, kv_head);
        const Element* const of_features =
            (is_head ? vector_of(p.phi_q, p.phi_q_batch_stride, p.phi_q_head_stride, head + h)
                     : vector_of(p.phi_k, p.phi_k_batch_stride, p.phi_k_head_stride, kv_head)) +
            part_of(feature_dim, shares.features, own_slice()).first;
        const int window_dim = !is_there ? 0 : is_value ? value_dim : p.window_dim;
        const int row_count = is_there && !is_value ? rows.count : 0;
        Element x[2], y[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int i = first + e * kWarp;
          x[e] = y[e] = Element(0.f);
          if (i < window_dim) x[e] = of_window[i];
          if (i < row_count) y[e] = of_features[i];
        }
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int i = first + e * kWarp;
          if (i >= largest_dim) break;
          queries[h * kMaxDim + i] = to_float(x[e]);
          if (is_head)
            features[i * kHeads + h] = to_float(y[e]);
          else if (!is_value)
            new_keys[i] = to_float(y[e]);
        }
      }
      if (thread < kHeads || has_weight_sum) shifts[thread] = scalar;
      if (is_first_pass) {
        // Hidden: all that is formed of it would wait for it before the loads above.
        slot = hidden(loaded_slot);
        const int first_slot = part_of(p.window, shares.slots, own_slice()).first;
        if (thread < slots.count) is_valid[thread] = first_slot + thread != slot && hidden(first_valid) != 0;
        leaves = valid_row[slot] != 0;
        if (p.g != nullptr) decay = p.ring_g[entry_of(p, batch, kv_head, slot)];
        first_leaving = load_leaving(thread);
#pragma unroll 1
        for (int j = hidden(thread) + threads; j < slots.count; j += threads)
          is_valid[j] = first_slot + j != slot && valid_row[first_slot + j] != 0;
        if (thread == 0) is_valid[hidden(slots.count)] = slice == 0;
      }
      __syncthreads();

      keys.template write_logits<kHeads>(p.scale, is_valid, queries, is_first_pass, weights, maxima);
      for (int h = hidden(warp); h < kHeads; h += warps) {
        float logit = -INFINITY;
        if (slice == 0) {
          logit = 0;
#pragma unroll 1
          for (int d = lane; d < p.window_dim; d += kWarp) logit += queries[h * kMaxDim + d] * key[d];
          logit = p.scale * sum_over_warp(logit);
        }
        if (lane == 0) weights[hidden(slots.count) * kHeads + h] = token_logits[h] = logit;
      }

      // An invalid slot may hold anything: nothing of it is used, and exp(0) decays nothing.
      if (is_first_pass) {
        decay = p.g != nullptr && leaves ? expf(decay) : 1.f;
        if (thread == 0) *weight_sum = decay * *weight_sum + leaves;
      }
      float far[kHeads] = {};
#pragma unroll 1
      for (int i = hidden(thread); i < max(rows.count, value_dim); i += threads) {
        if (is_first_pass) {
          const Leaving<Element> x = i == thread ? first_leaving : load_leaving(i);
          const float leaving_key = leaves ? to_float(x.key) : 0, leaving_value = leaves ? to_float(x.value) : 0;
          if (i < rows.count) {
            leaving_keys[i] = leaving_key;
            key_sum[i] = decay * x.key_sum + leaving_key;
          }
          if (i < value_dim) {
            leaving_values[i] = leaving_value;
            value_sum[i] = decay * x.value_sum + leaving_value;
          }
        }
        if (i < rows.count)
#pragma unroll
          for (int h = 0; h < kHeads; ++h) far[h] += features[i * kHeads + h] * key_sum[i];
      }
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        far[h] = sum_over_warp(far[h]);
        if (lane == 0) far_sums[warp * kHeads + h] = far[h];
      }
      __syncthreads();

      if (is_first_pass && thread == 0) {
        __threadfence();  // the block has read slot and ring_valid before it counts
        // The upper half: nothing waits for it here.
        arrived = static_cast<uint32_t>(atomicAdd(reinterpret_cast<unsigned long long*>(p.slot), kArrival) >> 32);
      }
      const BlockSums block_sums = weigh_slots<kHeads>(p, slots.count, is_valid, maxima, token_logits, far_sums,
                                                       shifts, weights, near_sums, far_factors);
      float leaving_v[kVector], sums[kHeads][kVector] = {};
      load_vector(leaving_v, leaving_values + hidden(column));
      state.multiply(sums, features, is_first_pass, decay, leaving_keys, leaving_v);
      __syncthreads();

      wait_for_cluster<kClusters>();  // all blocks have begun, and are done with what the pass before sent
      if (const int thread = hidden(static_cast<int>(threadIdx.x)); thread < slices * kHeads) {
        const int rank = thread / kHeads, h = thread % kHeads, i = slice * kHeads + h;
        float near_sum = 0;
#pragma unroll 4
        for (int w = 0; w < warps; ++w) near_sum += near_sums[w * kHeads + h];
        exchange.send(peaks + i, rank, block_sums.peak);
        exchange.send(all_near_sums + i, rank, near_sum);
        exchange.send(all_far_sums + i, rank, block_sums.far_sum);
      }
#pragma unroll
      for (int h = 0; h < kHeads; ++h)
#pragma unroll
        for (int c = 0; c < kVector; ++c) sums[h][c] *= far_factors[h];
      values.multiply(sums, weights, is_valid, is_first_pass);
      if (slice == 0 && first_row == 0) {
        const float* const token_weights = weights + hidden(slots.count) * kHeads;
        float token[kVector];
        load_vector(token, value + hidden(column));
#pragma unroll
        for (int h = 0; h < kHeads; ++h)
#pragma unroll
          for (int c = 0; c < kVector; ++c) sums[h][c] += token_weights[h] * token[c];
      }
      store_partial(partial, sums, lanes, hidden(value_dim), hidden(first_row), hidden(column));
      __syncthreads();

#pragma unroll 1
      for (int h = hidden(first_row); h < heads; h += lanes.row_lanes) {
        float sum[kVector];
        sum_partial<kHeads>(sum, partial, lanes, hidden(value_dim), h, column);
        const int rank = hidden(column) / shares.columns, c = column - rank * shares.columns;
#pragma unroll
        for (int j = 0; j < kVector; ++j)
          exchange.send(received + (slice * kHeads + h) * shares.columns + c + j, rank, sum[j]);
      }
      const Part columns = part_of(value_dim, shares.columns, own_slice());
      if (hidden(thread) == 0) exchange.expect(slices * (3 * kHeads + heads * columns.count));
      exchange.wait(first_head / kHeads);

      if (is_first_pass) {
        // All blocks of the cluster have sent, and read before that what this one overwrites.
        const int first_feature = part_of(feature_dim, shares.features, own_slice()).first;
        const int of_kv = hidden(kv_head), of_batch = hidden(batch);
        const int64_t entry = entry_of(p, of_batch, of_kv, hidden(slot));
        const int64_t of_state = static_cast<int64_t>(of_batch) * p.num_kv_heads + of_kv;
        if (warp == 0 && __shfl_sync(kAllLanes, static_cast<int>(arrived == gridDim.x - 1), 0) != 0) {
          __threadfence();  // all other blocks of the grid have counted, and read before that
#pragma unroll 1
          for (int n = lane; n < p.batch; n += kWarp) p.ring_valid[static_cast<int64_t>(n) * p.window + slot] = 1;
          if (lane == 0) *p.slot = slot + 1 == p.window ? 0 : slot + 1;
        }
#pragma unroll 1
        for (int r = thread; r < rows.count; r += threads) {
          p.state.key_sum[of_state * feature_dim + first_feature + r] = key_sum[r];
          store_rounded(ring_phi_k + entry * feature_dim + first_feature + r, new_keys[r]);
        }
        if (p.state.value_sum != nullptr)
#pragma unroll 1
          for (int c = columns.first + thread; c < columns.first + columns.count; c += threads)
            p.state.value_sum[of_state * value_dim + c] = value_sum[c];
        if (slice == 0) {
#pragma unroll 1
          for (int d = thread; d < p.window_dim; d += threads) store_rounded(ring_k + entry * p.window_dim + d, key[d]);
#pragma unroll 1
          for (int c = thread; c < value_dim; c += threads) store_rounded(ring_v + entry * value_dim + c, value[c]);
          if (thread == 0 && p.state.weight_sum != nullptr) p.state.weight_sum[of_state] = *weight_sum;
          if (thread == 0 && p.g != nullptr)
            p.ring_g[entry] = p.g[of_batch * p.g_batch_stride + of_kv * p.g_head_stride];
        }
      }

      const int vectors = hidden(shares.columns) / kVector, c = thread % vectors * kVector;
#pragma unroll 1
      for (int h = c < columns.count ? thread / vectors : heads; h < heads; h += threads / vectors) {
        const float log_scale = shifts[h];
        float peak = -INFINITY, far_sum = p.state.weight_sum != nullptr ? p.a * *weight_sum : 0;
        for (int s = 0; s < slices; ++s) {
          peak = fmaxf(peak, peaks[s * kHeads + h]);
          far_sum += all_far_sums[s * kHeads + h];
        }
        if (far_sum > FLT_MIN) peak = fmaxf(peak, logf(far_sum) + log_scale);
        const float far_factor = expf(fminf(log_scale - peak, kMaxExponent));
        float den = far_factor * far_sum, o[kVector] = {};
        if (p.state.value_sum != nullptr)
#pragma unroll
          for (int j = 0; j < kVector; ++j) o[j] = far_factor * p.a * value_sum[columns.first + c + j];
        for (int s = 0; s < slices; ++s) {
          const float reference = peaks[s * kHeads + h] == -INFINITY ? log_scale : peaks[s * kHeads + h];
          const float factor = expf(fminf(reference - peak, kMaxExponent));
          float sum[kVector];
          load_vector(sum, received + (s * kHeads + h) * shares.columns + c);
          den += factor * all_near_sums[s * kHeads + h];
#pragma unroll
          for (int j = 0; j < kVector; ++j) o[j] += factor * sum[j];
        }
        const int64_t row = static_cast<int64_t>(hidden(batch)) * p.num_heads + head + h;
#pragma unroll
        for (int j = 0; j < kVector; ++j)
          store_rounded(static_cast<Element*>(p.o) + row * value_dim + columns.first + c + j, o[j] / den);
      }
      if (first_head + kHeads < group) {
        __syncthreads();                 // the next pass writes what this one has read,
        arrive_at_cluster<kClusters>();  // and so do the other blocks
      }
    }
  }
}

struct WindowStepLaunch {
  void (*kernel)(hf_linattn_window_step_problem, int, Shares);
  size_t smem_bytes;
};

// As many query heads a pass as shared memory has room for beside their weights.
template <class Element, int kVector, bool kClusters>
WindowStepLaunch choose_kernel(const hf_linattn_window_step_problem& p, const Shares& shares, int threads) {
  const Lanes lanes = divide_threads(threads, p.value_dim / kVector, max(shares.features, shares.slots));
  const int limit = smem_limit(), group = p.num_heads / p.num_kv_heads;
  for (int most = min(group, kMaxHeads);; most /= 2) {
    const WindowStepLaunch chosen = with_heads(most, [&](auto heads) -> WindowStepLaunch {
      constexpr int kHeads = decltype(heads)::value;
      most = kHeads;
      return {window_linear_attention_step_kernel<Element, kHeads, kVector, kClusters>,
              WindowStepSmem<kHeads>::bytes(lanes, p.value_dim, shares.slots)};
    });
    if (most == 1 || static_cast<int64_t>(chosen.smem_bytes) <= limit) return chosen;
  }
}
// A thread leaves at most kWide partial sums a head.
static_assert(sizeof(float) * (WindowStepSmem<1>::kWeights + kMaxThreads * kWide + kWide) +
                      (sizeof(float) + 1) * (kMaxWindow + 1) <=
                  kLeastSmemLimit,
              "the longest window does not fit beside the rest");

template <class Element>
int run_window_step(const hf_linattn_window_step_problem& p, cudaStream_t stream) {
  const auto is_aligned = [](const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; };
  const int64_t heads = static_cast<int64_t>(p.batch) * p.num_kv_heads;
  const bool is_wide = p.value_dim % kWide == 0 && p.window_dim % kPiece == 0 && is_aligned(p.state.kv) &&
                       is_aligned(p.ring_k) && is_aligned(p.ring_v);
  const int vector = is_wide ? kWide : 1;
  const bool may_split = has_clusters(window_linear_attention_step_kernel<Element, 1, kWide, true>);
  // A block's registers fill a multiprocessor: enough are half as many, since twice as many still run at once.
  const int enough = multiprocessor_count() / 2, rows = max(p.feature_dim, p.window);
  const int slices = may_split ? choose_slices(heads, enough, rows / kMinRows) : 1;
  const Shares shares = {divide_up(p.feature_dim, slices), divide_up(p.window, slices),
                         divide_up(p.value_dim / vector, slices) * vector};
  const int64_t blocks = heads * slices;
  const int threads = choose_threads(blocks, shares.features + shares.slots, p.value_dim / vector);
  const WindowStepLaunch chosen = is_wide ? slices > 1 ? choose_kernel<Element, kWide, true>(p, shares, threads)
                                                       : choose_kernel<Element, kWide, false>(p, shares, threads)
                                  : slices > 1 ? choose_kernel<Element, 1, true>(p, shares, threads)
                                               : choose_kernel<Element, 1, false>(p, shares, threads);
  if (blocks > INT32_MAX)
    return set_error("window_linear_attention_step: %lld blocks are too many", (long long)blocks);
  return launch_clusters(chosen.kernel, dim3(static_cast<unsigned>(blocks)), slices, threads, chosen.smem_bytes, stream,
                         p, slices, shares);
}

int check_window_step(const hf_linattn_window_step_problem& p) {
  if (int error = check_dtype("window_linear_attention_step", p.dtype)) return error;
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
