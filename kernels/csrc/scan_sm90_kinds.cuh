// Choice among the instances of a Hopper scan: dimensions and decay.
#ifndef HF_LINATTN_SCAN_SM90_KINDS_CUH_
#define HF_LINATTN_SCAN_SM90_KINDS_CUH_

#include "scan_sm90.cuh"

namespace hf_linattn {

template <Reach kReach>
using ReachConstant = std::integral_constant<Reach, kReach>;

// Calls run(reach, decay, rows) with compile-time constants.
template <class Run>
int with_instance_sm90(bool is_causal, const ScanArgs& args, Run run) {
  auto choose_rows = [&](auto reach, auto decay) {
    const bool is_narrow = args.y.dim <= 64 && args.window_y.dim <= 64;
    return is_narrow ? run(reach, decay, std::integral_constant<int, 64>())
                     : run(reach, decay, std::integral_constant<int, 128>());
  };
  auto choose_decay = [&](auto reach) {
    return args.g == nullptr ? choose_rows(reach, std::false_type()) : choose_rows(reach, std::true_type());
  };
  if (!is_causal) return choose_rows(ReachConstant<Reach::kAll>(), std::false_type());
  if (args.window > 0) return choose_decay(ReachConstant<Reach::kWindow>());
  return choose_decay(ReachConstant<Reach::kCausal>());
}

template <ScanKind kKind>
int scan_sm90_of_kind(bool is_causal, const ScanArgs& args, cudaStream_t stream) {
  return with_instance_sm90(is_causal, args, [&](auto reach, auto decay, auto rows) {
    if (forms_state_only(kKind) && args.z.dim > kTileColumns) {
      return launch_scan_sm90<kKind, reach, decay, rows, forms_state_only(kKind) ? 2 : 1>(args, stream);
    }
    return launch_scan_sm90<kKind, reach, decay, rows, 1>(args, stream);
  });
}

}  // namespace hf_linattn

#endif  // HF_LINATTN_SCAN_SM90_KINDS_CUH_
