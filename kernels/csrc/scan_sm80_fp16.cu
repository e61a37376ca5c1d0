// The portable scans for inputs of fp16.
#include "scan_sm80_kinds.cuh"

namespace hf_linattn {
template int scan_sm80_of_kind<Tf32Mma<1, __half>>(ScanKind, bool, const ScanArgs&, bool, cudaStream_t);
}  // namespace hf_linattn
