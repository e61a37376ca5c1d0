// States between the segments of a sequence: prefix over what each adds (causal), or sum (not causal).
#include "launch.cuh"
#include "scan_warpgroup.cuh"

namespace hf_linattn {

namespace {

constexpr int kThreads = 256;

// One number of every state: element e of kv, key_sum, value_sum, weight_sum in turn. Null where that member is absent.
__device__ __forceinline__ float* state_element(const hf_linattn_state& state, int64_t entry_index, int element,
                                                int feature_dim, int value_dim) {
  const int kv = feature_dim * value_dim;
  if (element < kv) return entry(state.kv, entry_index, kv) == nullptr ? nullptr : state.kv + entry_index * kv + element;
  element -= kv;
  if (element < feature_dim) return state.key_sum == nullptr ? nullptr : state.key_sum + entry_index * feature_dim + element;
  element -= feature_dim;
  if (element < value_dim) return state.value_sum == nullptr ? nullptr : state.value_sum + entry_index * value_dim + element;
  return state.weight_sum == nullptr ? nullptr : state.weight_sum + entry_index;
}

__device__ __forceinline__ int first_slot(const ScanArgs& args, int n) {
  if (args.cu_seqlens == nullptr) return n * (args.num_slots / args.num_sequences);
  return static_cast<int>(sequence_bound(args, n) / args.segment_tokens) + n;
}

__device__ __forceinline__ int segment_count(const ScanArgs& args, int n) {
  const int64_t length = sequence_bound(args, n + 1) - sequence_bound(args, n);
  return length > 0 ? static_cast<int>((length + args.segment_tokens - 1) / args.segment_tokens) : 1;
}

// Each thread carries one number along one sequence. Grid: element blocks fastest, then heads, then sequences.
__global__ void __launch_bounds__(kThreads) segment_prefix_kernel(const __grid_constant__ ScanArgs args, int is_reverse,
                                                                  int element_blocks) {
  const int elements = args.feature_dim * args.value_dim + args.feature_dim + args.value_dim + 1;
  const int element = blockIdx.x % element_blocks * kThreads + threadIdx.x;
  const int head = blockIdx.x / element_blocks % args.num_kv_heads;
  const int sequence = blockIdx.x / (element_blocks * args.num_kv_heads);
  if (element >= elements) return;
  const int boundaries = segment_count(args, sequence) - 1, first = first_slot(args, sequence) - sequence;
  const int64_t heads = args.num_kv_heads;
  const float* start = state_element(args.first, sequence * heads + head, element, args.feature_dim, args.value_dim);
  float sum = start == nullptr ? 0.f : *start;
  for (int i = 0; i < boundaries; ++i) {
    const int64_t index = (first + (is_reverse ? boundaries - 1 - i : i)) * heads + head;
    float* at = state_element(args.carried, index, element, args.feature_dim, args.value_dim);
    if (at == nullptr) return;
    sum = sum * expf(args.carried_log_decay[index]) + *at;
    *at = sum;
  }
}

__global__ void __launch_bounds__(kThreads) segment_total_kernel(const __grid_constant__ ScanArgs args,
                                                                 hf_linattn_state total, int element_blocks) {
  const int elements = args.feature_dim * args.value_dim + args.feature_dim + args.value_dim + 1;
  const int element = blockIdx.x % element_blocks * kThreads + threadIdx.x;
  const int head = blockIdx.x / element_blocks % args.num_kv_heads;
  const int sequence = blockIdx.x / (element_blocks * args.num_kv_heads);
  if (element >= elements) return;
  const int count = segment_count(args, sequence), first = first_slot(args, sequence);
  const int64_t heads = args.num_kv_heads;
  float* to = state_element(total, sequence * heads + head, element, args.feature_dim, args.value_dim);
  if (to == nullptr) return;
  const float* start = state_element(args.first, sequence * heads + head, element, args.feature_dim, args.value_dim);
  float sum = start == nullptr ? 0.f : *start;
  for (int i = 0; i < count; ++i) {
    const float* at = state_element(args.carried, (first + i) * heads + head, element, args.feature_dim, args.value_dim);
    if (at != nullptr) sum += *at;
  }
  *to = sum;
}

int element_blocks_of(const ScanArgs& args) {
  return (args.feature_dim * args.value_dim + args.feature_dim + args.value_dim + kThreads) / kThreads;
}

}  // namespace

int run_segment_prefix(const ScanArgs& args, bool is_reverse, void* stream) {
  const int blocks = element_blocks_of(args);
  return launch(segment_prefix_kernel, dim3(static_cast<unsigned>(blocks * args.num_kv_heads * args.num_sequences)),
                kThreads, 0, static_cast<cudaStream_t>(stream), args, static_cast<int>(is_reverse), blocks);
}

int run_segment_total(const ScanArgs& args, const hf_linattn_state& total, void* stream) {
  const int blocks = element_blocks_of(args);
  return launch(segment_total_kernel, dim3(static_cast<unsigned>(blocks * args.num_kv_heads * args.num_sequences)),
                kThreads, 0, static_cast<cudaStream_t>(stream), args, total, blocks);
}

}  // namespace hf_linattn
