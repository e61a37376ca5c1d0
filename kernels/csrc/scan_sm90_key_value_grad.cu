#include "scan_sm90.cuh"

namespace hf_linattn {

int run_key_value_grad_sm90(const ScanArgs& key, const ScanArgs& value, void* stream) {
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  return value.g == nullptr ? launch_key_value_gradient<false>(key, value, on)
                            : launch_key_value_gradient<true>(key, value, on);
}

}  // namespace hf_linattn
