#include "scan_sm90_kinds.cuh"

namespace hf_linattn {
template int scan_sm90_of_kind<ScanKind::kOutput>(bool, const ScanArgs&, cudaStream_t);
}  // namespace hf_linattn
