// do . o of every row from the parts that the portable scan for dq leaves (scan.h).
#include "launch.cuh"
#include "scan.h"

namespace hf_linattn {

namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) along_kernel(const __grid_constant__ ScanArgs args, int64_t rows) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (row >= rows) return;
  float sum = 0.f;
  for (int unit = 0; unit < column_units(args.feature_dim); ++unit) sum += args.extra_out[unit * rows + row];
  // A row whose denominator is held at its floor is not a quotient: scaling its weights is no longer for nothing.
  const float den = args.den[row];
  args.along[row] = fabsf(den) < kDenominatorEps ? 0.f : sum / den;
}

}  // namespace

int run_along(const ScanArgs& args, void* stream) {
  const int64_t batch = args.cu_seqlens == nullptr ? args.num_sequences : 1, rows = batch * args.num_heads * args.tokens;
  const int64_t blocks = (rows + kThreads - 1) / kThreads;
  if (blocks == 0) return 0;
  if (blocks > 0x7fffffff) return set_error("%lld blocks are more than a grid holds", static_cast<long long>(blocks));
  return launch(along_kernel, dim3(static_cast<unsigned>(blocks)), kThreads, 0, static_cast<cudaStream_t>(stream), args,
                rows);
}

}  // namespace hf_linattn
