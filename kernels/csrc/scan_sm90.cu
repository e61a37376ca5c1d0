// Entry points of the Hopper scans; the kernels are in scan_sm90_*.cu, one kind each.
#include "launch.cuh"
#include "scan_sm90.cuh"

namespace hf_linattn {

template <ScanKind kKind>
int scan_sm90_of_kind(bool is_causal, const ScanArgs& args, cudaStream_t stream);

int run_scan_sm90(ScanKind kind, bool is_causal, const ScanArgs& args, void* stream) {
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  switch (kind) {
    case ScanKind::kOutput: return scan_sm90_of_kind<ScanKind::kOutput>(is_causal, args, on);
    case ScanKind::kQueryGrad: return scan_sm90_of_kind<ScanKind::kQueryGrad>(is_causal, args, on);
    case ScanKind::kKeyGrad: return scan_sm90_of_kind<ScanKind::kKeyGrad>(is_causal, args, on);
    case ScanKind::kValueGrad: return scan_sm90_of_kind<ScanKind::kValueGrad>(is_causal, args, on);
    case ScanKind::kState: return scan_sm90_of_kind<ScanKind::kState>(is_causal, args, on);
    case ScanKind::kStateGrad: return scan_sm90_of_kind<ScanKind::kStateGrad>(is_causal, args, on);
  }
  return set_error("unknown kind of scan");
}

int check_scan_sm90(ScanKind kind, int dtype, const ScanArgs& args) {
  if (compute_capability() != 90) return set_error("the device has compute capability %d, not 90", compute_capability());
  if (dtype != HF_LINATTN_BF16) return set_error("the Hopper kernels take bfloat16");
  if (args.y.dim > 128) return set_error("the Hopper kernels take dimensions up to 128, got %d", args.y.dim);
  if (args.window_y.dim > 128) return set_error("the Hopper kernels take dimensions up to 128, got %d", args.window_y.dim);
  if (kind == ScanKind::kQueryGrad && args.z.dim > 4 * kTileColumns) {
    return set_error("the Hopper kernels take feature dimensions up to 256, got %d", args.z.dim);
  }
  const bool with_x = !forms_state_only(kind), with_q = kind == ScanKind::kQueryGrad;
  if (!is_tileable(args.y) || !is_tileable(args.z) || (with_x && !is_tileable(args.x)) ||
      (with_q && !is_tileable(args.q)) || !is_tileable(args.window_x) || !is_tileable(args.window_y)) {
    return set_error("an address or stride is not a multiple of 16 bytes");
  }
  return 0;
}

int check_key_value_grad_sm90(int dtype, const ScanArgs& key, const ScanArgs& value) {
  if (int refusal = check_scan_sm90(ScanKind::kKeyGrad, dtype, key)) return refusal;
  if (int refusal = check_scan_sm90(ScanKind::kValueGrad, dtype, value)) return refusal;
  if (value.window > 0) return set_error("a window's dk and dv have kernels of their own");
  if (key.y.dim > kTileColumns || value.y.dim > kTileColumns) {
    return set_error("one kernel for dk and dv takes dimensions up to %d", kTileColumns);
  }
  return 0;
}

}  // namespace hf_linattn
