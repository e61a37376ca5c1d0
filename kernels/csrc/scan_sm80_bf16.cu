// The portable scans for inputs of bf16.
#include "scan_sm80_kinds.cuh"

namespace hf_linattn {
template int scan_sm80_of_kind<Bf16Mma>(ScanKind, bool, const ScanArgs&, bool, cudaStream_t);
}  // namespace hf_linattn
