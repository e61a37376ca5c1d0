// Choice among the instances of a Hopper scan: dimensions and decay.
#ifndef HF_LINATTN_SCAN_SM90_KINDS_CUH_
#define HF_LINATTN_SCAN_SM90_KINDS_CUH_

#include "scan_sm90.cuh"

namespace hf_linattn {

// Calls run(causal, decay, rows) with compile-time constants.
template <class Run>
int with_instance_sm90(bool is_causal, const ScanArgs& args, Run run) {
  auto choose_rows = [&](auto causal, auto decay) {
    return args.y.dim <= 64 ? run(causal, decay, std::integral_constant<int, 64>())
                            : run(causal, decay, std::integral_constant<int, 128>());
  };
  if (!is_causal) return choose_rows(std::false_type(), std::false_type());
  return args.g == nullptr ? choose_rows(std::true_type(), std::false_type())
                           : choose_rows(std::true_type(), std::true_type());
}

template <ScanKind kKind>
int scan_sm90_of_kind(bool is_causal, const ScanArgs& args, cudaStream_t stream) {
  return with_instance_sm90(is_causal, args, [&](auto causal, auto decay, auto rows) {
    if (forms_state_only(kKind) && args.z.dim > kTileColumns) {
      return launch_scan_sm90<kKind, causal, decay, rows, forms_state_only(kKind) ? 2 : 1>(args, stream);
    }
    return launch_scan_sm90<kKind, causal, decay, rows, 1>(args, stream);
  });
}

}  // namespace hf_linattn

#endif  // HF_LINATTN_SCAN_SM90_KINDS_CUH_
