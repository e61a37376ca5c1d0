// All kinds of the portable scans for one engine.
#ifndef HF_LINATTN_SCAN_SM80_KINDS_CUH_
#define HF_LINATTN_SCAN_SM80_KINDS_CUH_

#include "scan_sm80.cuh"

namespace hf_linattn {

template <class Engine>
int scan_sm80_of_kind(ScanKind kind, bool is_causal, const ScanArgs& args, bool only_check, cudaStream_t stream) {
  const bool is_windowed = args.window > 0;
  switch (kind) {
#define HF_LINATTN_KIND(kind)                                                                             \
  case ScanKind::kind:                                                                                    \
    return is_windowed ? scan_sm80_for<Engine, ScanKind::kind, Reach::kWindow>(args, only_check, stream)  \
           : is_causal ? scan_sm80_for<Engine, ScanKind::kind, Reach::kCausal>(args, only_check, stream)  \
                       : scan_sm80_for<Engine, ScanKind::kind, Reach::kAll>(args, only_check, stream);
    HF_LINATTN_KIND(kOutput)
    HF_LINATTN_KIND(kQueryGrad)
    HF_LINATTN_KIND(kKeyGrad)
    HF_LINATTN_KIND(kValueGrad)
    HF_LINATTN_KIND(kState)
    HF_LINATTN_KIND(kStateGrad)
#undef HF_LINATTN_KIND
  }
  return set_error("unknown kind of scan");
}

}  // namespace hf_linattn

#endif  // HF_LINATTN_SCAN_SM80_KINDS_CUH_
