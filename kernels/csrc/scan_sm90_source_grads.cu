#include "scan_sm90_kinds.cuh"

namespace hf_linattn {

int run_source_gradients_sm90(bool is_causal, const ScanArgs& key, const ScanArgs& value, void* stream) {
  return with_instance_sm90(is_causal, /*by_kv_head=*/true, 2, key, [&](auto causal, auto decay, auto rows, auto cols) {
    return launch_source_gradients_sm90<causal, decay, rows, cols>(key, value, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace hf_linattn
