// Entry points of the portable scans; the kernels are in scan_sm80_{bf16,fp16,fp32}.cu.
#include "engine_mma.cuh"
#include "launch.cuh"
#include "scan.h"

namespace hf_linattn {

template <class Engine>
int scan_sm80_of_kind(ScanKind kind, bool is_causal, const ScanArgs& args, bool only_check, cudaStream_t stream);

static int scan_sm80(ScanKind kind, bool is_causal, int dtype, const ScanArgs& args, bool only_check, void* stream) {
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  switch (dtype) {
    case HF_LINATTN_BF16: return scan_sm80_of_kind<Bf16Mma>(kind, is_causal, args, only_check, on);
    case HF_LINATTN_FP16: return scan_sm80_of_kind<Tf32Mma<1, __half>>(kind, is_causal, args, only_check, on);
    case HF_LINATTN_FP32: return scan_sm80_of_kind<Tf32Mma<3, float>>(kind, is_causal, args, only_check, on);
  }
  return set_error("unknown dtype %d", dtype);
}

int run_scan_sm80(ScanKind kind, bool is_causal, int dtype, const ScanArgs& args, void* stream) {
  return scan_sm80(kind, is_causal, dtype, args, /*only_check=*/false, stream);
}

int check_scan_sm80(ScanKind kind, bool is_causal, int dtype, const ScanArgs& args) {
  if (compute_capability() < 80) return set_error("the device has compute capability %d, the kernels need 80", compute_capability());
  return scan_sm80(kind, is_causal, dtype, args, /*only_check=*/true, nullptr);
}

}  // namespace hf_linattn
