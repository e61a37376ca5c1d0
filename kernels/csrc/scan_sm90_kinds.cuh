// Choice among the instances of a Hopper scan: dimensions, columns a warpgroup, decay.
#ifndef HF_LINATTN_SCAN_SM90_KINDS_CUH_
#define HF_LINATTN_SCAN_SM90_KINDS_CUH_

#include "scan_sm90.cuh"

namespace hf_linattn {

// Calls run(causal, decay, rows, cols) with compile-time constants. `launches`: how many scans share the grid.
template <class Run>
int with_instance_sm90(bool is_causal, bool by_kv_head, int launches, const ScanArgs& args, Run run) {
  // 128 columns a CTA, if that leaves a CTA for every multiprocessor.
  const int64_t heads = by_kv_head ? args.num_kv_heads : args.num_heads;
  const int64_t wide = (args.z.dim + 2 * kTileColumns - 1) / (2 * kTileColumns) * heads * args.num_slots * launches;
  const bool is_wide = args.z.dim > kTileColumns && wide * 10 >= multiprocessor_count() * 9;
  auto choose_cols = [&](auto causal, auto decay, auto rows) {
    return is_wide ? run(causal, decay, rows, std::integral_constant<int, 64>())
                   : run(causal, decay, rows, std::integral_constant<int, 32>());
  };
  auto choose_rows = [&](auto causal, auto decay) {
    return args.y.dim <= 64 ? choose_cols(causal, decay, std::integral_constant<int, 64>())
                            : choose_cols(causal, decay, std::integral_constant<int, 128>());
  };
  if (!is_causal) return choose_rows(std::false_type(), std::false_type());
  return args.g == nullptr ? choose_rows(std::true_type(), std::false_type())
                           : choose_rows(std::true_type(), std::true_type());
}

template <ScanKind kKind>
int scan_sm90_of_kind(bool is_causal, const ScanArgs& args, cudaStream_t stream) {
  constexpr bool kByKvHead = is_reverse(kKind) || forms_state_only(kKind);
  // The outputs' denominators are one more column of a state of 32, and one too many of 64.
  constexpr bool kIsNarrow = kKind == ScanKind::kOutput;
  return with_instance_sm90(is_causal, kByKvHead, 1, args, [&](auto causal, auto decay, auto rows, auto cols) {
    return launch_scan_sm90<kKind, causal, decay, rows, kIsNarrow ? 32 : decltype(cols)::value>(args, stream);
  });
}

}  // namespace hf_linattn

#endif  // HF_LINATTN_SCAN_SM90_KINDS_CUH_
