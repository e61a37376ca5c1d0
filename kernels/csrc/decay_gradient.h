// dg: what the loss changes by with the decay of each token.
#ifndef HF_LINATTN_DECAY_GRADIENT_H_
#define HF_LINATTN_DECAY_GRADIENT_H_

#include "scan.h"

namespace hf_linattn {

// The segments of all scans of a backward that forms dg: pairs of tokens within one are summed directly.
constexpr int64_t kDecaySegment = 1024;

struct DecayGradientArgs {
  ScanArgs scan;  // of a scan of the same backward: problem, segments, den, along
  Rows q, k, v, d_o;
  // States that enter a segment from before and, their gradients, from after: at the ends of sequences and, as
  // ScanArgs::carried, at the boundaries of segments.
  hf_linattn_state first, carried, d_last, d_carried;
  float* workspace;
  float* dg;  // [B,T,H_kv]
};

// Length of DecayGradientArgs::workspace.
int64_t decay_gradient_floats(const hf_linattn_problem& problem);
// 0 if the kernels take these dimensions on the current device, else an error.
int check_decay_gradient(int dtype, int feature_dim, int value_dim);
int run_decay_gradient(int dtype, const DecayGradientArgs& args, void* stream);

}  // namespace hf_linattn

#endif  // HF_LINATTN_DECAY_GRADIENT_H_
