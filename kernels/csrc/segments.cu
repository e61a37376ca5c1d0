// States between the segments of a sequence: prefix over what each adds (causal), or sum (not causal).
#include "launch.cuh"
#include "scan_warpgroup.cuh"

namespace hf_linattn {

namespace {

constexpr int kThreads = 256;

// Element e of kv, key_sum, value_sum, weight_sum in turn, in all entries of a state. Null where that member is absent.
struct StateElement {
  float* first;
  int64_t stride;
  __device__ __forceinline__ float& operator[](int64_t entry_index) const { return first[entry_index * stride]; }
};
__device__ __forceinline__ StateElement state_element(const hf_linattn_state& state, int element, int feature_dim,
                                                      int value_dim) {
  const int kv = feature_dim * value_dim;
  if (element < kv) return {entry(state.kv, element, 1), kv};
  element -= kv;
  if (element < feature_dim) return {entry(state.key_sum, element, 1), feature_dim};
  element -= feature_dim;
  if (element < value_dim) return {entry(state.value_sum, element, 1), value_dim};
  return {state.weight_sum, 1};
}

__device__ __forceinline__ int piece_count(const ScanArgs& args, int n) {
  const int64_t length = sequence_bound(args, n + 1) - sequence_bound(args, n);
  return length > 0 ? static_cast<int>((length + args.segment_tokens - 1) / args.segment_tokens) : 1;
}

// Each thread carries one number along one sequence, over what its pieces add to what boundaries between segments hold.
// Grid: element blocks fastest, then heads, then sequences.
__global__ void __launch_bounds__(kThreads) segment_prefix_kernel(const __grid_constant__ ScanArgs args, int is_reverse,
                                                                  int element_blocks) {
  ptx::wait_for_previous();
  const int elements = args.feature_dim * args.value_dim + args.feature_dim + args.value_dim + 1;
  const int element = blockIdx.x % element_blocks * kThreads + threadIdx.x;
  const int head = blockIdx.x / element_blocks % args.num_kv_heads;
  const int sequence = blockIdx.x / (element_blocks * args.num_kv_heads);
  if (element >= elements) return;
  const StateElement carried = state_element(args.carried, element, args.feature_dim, args.value_dim);
  const StateElement start = state_element(args.first, element, args.feature_dim, args.value_dim);
  if (carried.first == nullptr) return;
  const int count = piece_count(args, sequence), pieces = args.pieces;
  const int wanted = is_reverse ? count - pieces : (count - 1) / pieces * pieces;  // boundaries
  const int first = first_slot(args, sequence, args.segment_tokens, args.num_slots / args.num_sequences) - sequence;
  const int64_t heads = args.num_kv_heads;
  auto index_of = [&](int i) { return (first + (is_reverse ? count - 2 - i : i)) * heads + head; };
  float sum = start.first == nullptr ? 0.f : start[sequence * heads + head];
  constexpr int kAtOnce = 8;  // loads under way
  for (int done = 0; done < wanted; done += kAtOnce) {
    float added[kAtOnce], log_decay[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (done + i >= wanted) continue;
      const int64_t index = index_of(done + i);
      added[i] = carried[index];
      log_decay[i] = args.carried_log_decay[index];
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (done + i >= wanted) continue;
      sum = sum * expf(log_decay[i]) + added[i];
      const int pieces_before = is_reverse ? count - 1 - done - i : done + i + 1;
      if (pieces_before % pieces != 0) continue;
      carried[index_of(done + i)] = sum;
    }
  }
}

__global__ void __launch_bounds__(kThreads) segment_total_kernel(const __grid_constant__ ScanArgs args,
                                                                 hf_linattn_state total, int element_blocks) {
  ptx::wait_for_previous();
  const int elements = args.feature_dim * args.value_dim + args.feature_dim + args.value_dim + 1;
  const int element = blockIdx.x % element_blocks * kThreads + threadIdx.x;
  const int head = blockIdx.x / element_blocks % args.num_kv_heads;
  const int sequence = blockIdx.x / (element_blocks * args.num_kv_heads);
  if (element >= elements) return;
  const int count = piece_count(args, sequence);
  const int first = first_slot(args, sequence, args.segment_tokens, args.num_slots / args.num_sequences);
  const int64_t heads = args.num_kv_heads;
  const StateElement to = state_element(total, element, args.feature_dim, args.value_dim);
  const StateElement start = state_element(args.first, element, args.feature_dim, args.value_dim);
  const StateElement carried = state_element(args.carried, element, args.feature_dim, args.value_dim);
  if (to.first == nullptr) return;
  float sum = start.first == nullptr ? 0.f : start[sequence * heads + head];
  if (carried.first != nullptr) {
#pragma unroll 4
    for (int i = 0; i < count; ++i) sum += carried[(first + i) * heads + head];
  }
  to[sequence * heads + head] = sum;
}

int element_blocks_of(const ScanArgs& args) {
  return (args.feature_dim * args.value_dim + args.feature_dim + args.value_dim + kThreads) / kThreads;
}

}  // namespace

int run_segment_prefix(const ScanArgs& args, bool is_reverse, void* stream) {
  const int blocks = element_blocks_of(args);
  return launch_early(segment_prefix_kernel, dim3(static_cast<unsigned>(blocks * args.num_kv_heads * args.num_sequences)),
                      1, kThreads, 0, static_cast<cudaStream_t>(stream), args, static_cast<int>(is_reverse), blocks);
}

int run_segment_total(const ScanArgs& args, const hf_linattn_state& total, void* stream) {
  const int blocks = element_blocks_of(args);
  return launch_early(segment_total_kernel, dim3(static_cast<unsigned>(blocks * args.num_kv_heads * args.num_sequences)),
                      1, kThreads, 0, static_cast<cudaStream_t>(stream), args, total, blocks);
}

}  // namespace hf_linattn
