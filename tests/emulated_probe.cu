// Small kernels that show what the emulation of a GPU computes and what it refuses (tests/ops/test_emulation.py), and
// an entry to the one kernel that has none of its own in hf_linattn.h.
#include "decay_gradient.h"
#include "launch.cuh"
#include "ptx.cuh"

using namespace hf_linattn;

namespace {

constexpr int kTile = 64, kStages = 2, kAtomBytes = kTile * 128;

// c [64, 64] = a [64, depth] b [depth, 64], row-major, by ldmatrix and mma over a padded tile.
template <class T>
__global__ void mma_kernel(const T* a, const T* b, float* c, int depth) {
  constexpr int kRow = kTile + 8;  // elements; the padding keeps ldmatrix free of bank conflicts
  T* tile_a = reinterpret_cast<T*>(ptx::dynamic_smem());
  T* tile_b = tile_a + kTile * kRow;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float d[kTile / 8][4] = {};
  for (int k0 = 0; k0 < depth; k0 += kTile) {
    __syncthreads();
    for (int i = threadIdx.x; i < kTile * 8; i += 128) {
      const int row = i / 8, column = i % 8 * 8;
      const int valid = min(max(depth - k0 - column, 0), 8) * 2;
      ptx::cp_async_16(ptx::smem_address(tile_a + row * kRow + column), valid > 0 ? a + row * depth + k0 + column : a,
                       valid);
      ptx::cp_async_16(ptx::smem_address(tile_b + row * kRow + column),
                       k0 + row < depth ? b + (k0 + row) * kTile + column : b, k0 + row < depth ? 16 : 0);
    }
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    __syncthreads();
    for (int k = 0; k < kTile; k += 16) {
      uint32_t fragment_a[4];
      ptx::ldmatrix_x4(fragment_a, ptx::smem_address(tile_a + (warp * 16 + lane % 16) * kRow + k + lane / 16 * 8));
      for (int n = 0; n < kTile; n += 16) {
        uint32_t fragments_b[4];
        ptx::ldmatrix_x4_trans(fragments_b, ptx::smem_address(tile_b + (k + lane % 16) * kRow + n + lane / 16 * 8));
        const uint32_t low[2] = {fragments_b[0], fragments_b[1]}, high[2] = {fragments_b[2], fragments_b[3]};
        ptx::mma_m16n8k16<T>(d[n / 8], fragment_a, low);
        ptx::mma_m16n8k16<T>(d[n / 8 + 1], fragment_a, high);
      }
    }
  }
  for (int n = 0; n < kTile / 8; ++n)
    for (int i = 0; i < 4; ++i)
      c[(warp * 16 + lane / 4 + i / 2 * 8) * kTile + n * 8 + lane % 4 * 2 + i % 2] = d[n][i];
}

// c [16, 8] = a [16, 8] b [8, 8] in tf32.
__global__ void tf32_kernel(const float* a, const float* b, float* c) {
  const int row = threadIdx.x / 4, column = threadIdx.x % 4;
  const uint32_t left[4] = {ptx::to_tf32(a[row * 8 + column]), ptx::to_tf32(a[(row + 8) * 8 + column]),
                            ptx::to_tf32(a[row * 8 + column + 4]), ptx::to_tf32(a[(row + 8) * 8 + column + 4])};
  const uint32_t right[2] = {ptx::to_tf32(b[column * 8 + row]), ptx::to_tf32(b[(column + 4) * 8 + row])};
  float d[4] = {};
  ptx::mma_m16n8k8_tf32(d, left, right);
  for (int i = 0; i < 4; ++i) c[(row + i / 2 * 8) * 8 + column * 2 + i % 2] = d[i];
}

enum Fault {
  kNone,
  kNoWgmmaWait,
  kNoProxyFence,
  kNoWgmmaFence,
  kEarlyReuse,
  kNoPhaseWait,
};

// c [64, N] = a [64, depth] b by the copy engine and wgmma: one producer warp, one consumer warpgroup, a ring of two
// stages. b is [N, depth] when not kTransB, else [depth, N]; depth is cut into steps of 64.
template <class T, int N, bool kTransB>
__global__ void __launch_bounds__(160, 1)
    wgmma_kernel(const __grid_constant__ CUtensorMap map_a, const __grid_constant__ CUtensorMap map_b, float* c,
                 int depth, int fault) {
#if HF_LINATTN_HAS_SM90
  constexpr int kBytesB = (N > kTile ? N : kTile) * 128, kStageBytes = kAtomBytes + kBytesB;
  const uint32_t smem = ptx::smem_address(ptx::dynamic_smem()), bars = smem + kStages * kStageBytes;
  const uint32_t full = bars, empty = bars + kStages * 8;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, steps = (depth + kTile - 1) / kTile;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      ptx::mbarrier_init(full + i * 8, 1);
      ptx::mbarrier_init(empty + i * 8, 128);
    }
    ptx::mbarrier_init_fence();
  }
  __syncthreads();
  if (warp == 4) {
    for (int step = 0; step < steps && lane == 0; ++step) {
      const int stage = step % kStages;
      const uint32_t tile_a = smem + stage * kStageBytes, tile_b = tile_a + kAtomBytes, bar = full + stage * 8;
      ptx::mbarrier_wait(empty + stage * 8, step / kStages % 2 ^ 1);
      ptx::mbarrier_arrive_expect_tx(bar, kStageBytes);
      ptx::tma_load_4d(tile_a, &map_a, bar, step * kTile, 0, 0, 0);
      if (kTransB)
        for (int n = 0; n < (N > kTile ? N : kTile); n += kTile)
          ptx::tma_load_4d(tile_b + n * 128, &map_b, bar, n, 0, step * kTile, 0);
      else
        ptx::tma_load_4d(tile_b, &map_b, bar, step * kTile, 0, 0, 0);
    }
    return;
  }
  float d[N / 2];
  for (int i = 0; i < N / 2; ++i) d[i] = 0;
  for (int step = 0; step < steps; ++step) {
    const int stage = step % kStages;
    const uint32_t tile_a = smem + stage * kStageBytes, tile_b = tile_a + kAtomBytes;
    if (fault != kNoPhaseWait) ptx::mbarrier_wait(full + stage * 8, step / kStages % 2);
    if (fault == kNoProxyFence && step == 0) {
      // The same value again would not show; an element of its own does.
      char* element = ptx::dynamic_smem() + (tile_b - smem);
      if (threadIdx.x == 0) *reinterpret_cast<T*>(element) = T(3.f);
      ptx::named_barrier_sync(1, 128);
    }
    ptx::keep(d);
    if (fault != kNoWgmmaFence) ptx::wgmma_fence();
    for (int k = 0; k < kTile; k += 16) {
      uint32_t a[4];
      const int row = warp * 16 + lane % 16, chunk = k / 8 + lane / 16;
      ptx::ldmatrix_x4(a, tile_a + row * 128 + (chunk ^ row % 8) * 16);
      const uint32_t start = kTransB ? tile_b + k * 128 : tile_b + k * 2;
      ptx::wgmma_rs<T, N, kTransB>(d, a, ptx::wgmma_descriptor(start, kAtomBytes), step > 0 || k > 0);
    }
    ptx::wgmma_commit();
    if (fault == kEarlyReuse) {
      ptx::named_barrier_sync(1, 128);
      if (threadIdx.x == 0) *reinterpret_cast<T*>(ptx::dynamic_smem() + (tile_b - smem)) = T(7.f);
      ptx::named_barrier_sync(1, 128);
    }
    if (fault == kNoWgmmaWait && step == steps - 1) break;
    ptx::wgmma_wait<0>();
    ptx::keep(d);
    ptx::mbarrier_arrive(empty + stage * 8);
  }
  for (int n = 0; n < N / 8; ++n)
    for (int i = 0; i < 4; ++i)
      c[(warp * 16 + lane / 4 + i / 2 * 8) * N + n * 8 + lane % 4 * 2 + i % 2] = d[n * 4 + i];
  if (fault == kNoWgmmaWait) ptx::wgmma_wait<0>();
#endif
}

// stmatrix into a tile, plain reads out of it, shuffles: out[i] = the 8x8 matrices in order.
__global__ void store_kernel(float* out) {
#if HF_LINATTN_HAS_SM90
  __nv_bfloat16* tile = reinterpret_cast<__nv_bfloat16*>(ptx::dynamic_smem());
  const int lane = threadIdx.x;
  uint32_t r[4];
  for (int i = 0; i < 4; ++i) {
    const int first = i * 64 + lane / 4 * 8 + lane % 4 * 2;
    const __nv_bfloat162 pair = __floats2bfloat162_rn(float(first), float(first + 1));
    r[i] = *reinterpret_cast<const uint32_t*>(&pair);
  }
  ptx::stmatrix_x4(ptx::smem_address(tile + lane * 8), r);
  __syncwarp();
  for (int i = lane; i < 256; i += 32) out[i] = __bfloat162float(tile[i]);
  float sum = float(lane);
  for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
  float prefix = float(lane);
  for (int distance = 1; distance < 32; distance *= 2) {
    const float before = __shfl_up_sync(0xffffffffu, prefix, distance);
    if (lane >= distance) prefix += before;
  }
  out[256 + lane] = sum;
  out[288 + lane] = prefix;
  out[320 + lane] = __shfl_sync(0xffffffffu, prefix, 5);
  out[352 + lane] = __shfl_down_sync(0xffffffffu, prefix, 3);
#endif
}

__global__ void broken_kernel(int which, float* out) {
#if HF_LINATTN_HAS_SM90
  float* smem = reinterpret_cast<float*>(ptx::dynamic_smem());
  const uint32_t address = ptx::smem_address(smem);
  const int thread = threadIdx.x;
  if (which == 0 && thread < 32) __syncthreads();
  if (which == 0) ptx::named_barrier_sync(1, 128);
  if (which == 1) {
    if (thread == 0) ptx::mbarrier_init(address, 2);
    __syncthreads();
    if (thread == 1) ptx::mbarrier_arrive(address);
    ptx::mbarrier_wait(address, 0);
  }
  if (which == 2) out[thread] = smem[thread + 1024];  // as if 5 KB had been asked for
  if (which == 3) {
    uint32_t r[4];
    ptx::ldmatrix_x4(r, address + 4096 - 16 * 16 + thread % 32 * 16);
  }
  if (which == 4) out[thread] = smem[thread];  // never written: NaN
  if (which == 5) *reinterpret_cast<volatile float*>(16) = 0;
  if (which == 6) smem[thread == 0 ? 1000 : 0] = 1;  // behind the last of 3996 bytes
  if (which == 7) {
    ptx::cp_async_16(address + thread * 16, out, 16);
    ptx::cp_async_commit();
    out[thread + 4] = smem[thread * 4];  // not waited for: NaN
    ptx::cp_async_wait<0>();
  }
  if (which == 8) __shfl_xor_sync(0xffffffffu, 1.f, 1), thread == 3 ? __syncwarp() : __syncthreads();
#endif
}

template <class T>
int run_wgmma(const void* a, const void* b, float* c, int dtype, int columns, int transposed, int depth, int fault) {
  CUtensorMap map_a, map_b;
  if (make_tensor_map(&map_a, dtype, a, depth, 1, kTile, 1, depth, depth, depth, kTile, kTile)) return 1;
  const int rows = columns > kTile ? columns : kTile;
  const int inner = transposed ? columns : depth, outer = transposed ? depth : columns;
  const int error =
      make_tensor_map(&map_b, dtype, b, inner, 1, outer, 1, inner, inner, inner, kTile, transposed ? kTile : rows);
  if (error) return error;
  const size_t bytes = kStages * (kAtomBytes + rows * 128) + 2 * kStages * 8;
  void (*kernel)(CUtensorMap, CUtensorMap, float*, int, int) = nullptr;
  if (columns == 8) kernel = transposed ? wgmma_kernel<T, 8, true> : wgmma_kernel<T, 8, false>;
  if (columns == 32) kernel = transposed ? wgmma_kernel<T, 32, true> : wgmma_kernel<T, 32, false>;
  if (columns == 64) kernel = transposed ? wgmma_kernel<T, 64, true> : wgmma_kernel<T, 64, false>;
  if (columns == 128) kernel = transposed ? wgmma_kernel<T, 128, true> : wgmma_kernel<T, 128, false>;
  return launch(kernel, dim3(1), 160, bytes, nullptr, map_a, map_b, c, depth, fault);
}

}  // namespace

extern "C" {

int probe_mma(const void* a, const void* b, float* c, int dtype, int depth) {
  constexpr size_t kBytes = 2 * kTile * (kTile + 8) * 2;
  if (dtype == HF_LINATTN_BF16)
    return launch(mma_kernel<__nv_bfloat16>, dim3(1), 128, kBytes, nullptr, static_cast<const __nv_bfloat16*>(a),
                  static_cast<const __nv_bfloat16*>(b), c, depth);
  return launch(mma_kernel<__half>, dim3(1), 128, kBytes, nullptr, static_cast<const __half*>(a),
                static_cast<const __half*>(b), c, depth);
}

int probe_tf32(const float* a, const float* b, float* c) {
  return launch(tf32_kernel, dim3(1), 32, 0, nullptr, a, b, c);
}

int probe_wgmma(const void* a, const void* b, float* c, int dtype, int columns, int transposed, int depth, int fault) {
  return dtype == HF_LINATTN_BF16 ? run_wgmma<__nv_bfloat16>(a, b, c, dtype, columns, transposed, depth, fault)
                                  : run_wgmma<__half>(a, b, c, dtype, columns, transposed, depth, fault);
}

int probe_store(float* out) { return launch(store_kernel, dim3(1), 32, 512, nullptr, out); }

int probe_broken(int which, float* out) {
  return launch(broken_kernel, dim3(2), 128, which == 6 ? 3996 : 4096, nullptr, which, out);
}

// The states at boundaries of kDecaySegment tokens, and what row_products.cu forms, come from the caller.
int probe_decay_gradient(const hf_linattn_problem* problem, const hf_linattn_gradients* gradients, float* along,
                         const hf_linattn_state* carried, const hf_linattn_state* d_carried, float* workspace) {
  const auto rows = [](const hf_linattn_tensor& x, int dim) {
    return Rows{x.data, x.batch_stride, x.token_stride, x.head_stride, dim};
  };
  DecayGradientArgs args = {};
  ScanArgs& scan = args.scan;
  scan.num_heads = problem->num_heads, scan.num_kv_heads = problem->num_kv_heads;
  scan.feature_dim = problem->feature_dim, scan.value_dim = problem->value_dim;
  scan.tokens = problem->tokens, scan.num_sequences = problem->num_sequences;
  scan.cu_seqlens = problem->cu_seqlens, scan.cu_seqlens_is_int64 = problem->cu_seqlens_is_int64;
  scan.segment_tokens = kDecaySegment;
  const int64_t per_sequence = (problem->tokens + kDecaySegment - 1) / kDecaySegment;
  scan.num_slots = static_cast<int>(problem->cu_seqlens == nullptr
                                        ? problem->batch * per_sequence
                                        : problem->tokens / kDecaySegment + problem->num_sequences);
  scan.g = problem->g, scan.g_batch_stride = problem->g_batch_stride;
  scan.g_token_stride = problem->g_token_stride, scan.g_head_stride = problem->g_head_stride;
  scan.a = problem->a, scan.b = problem->b, scan.normalize = problem->normalize;
  scan.den = const_cast<float*>(gradients->den), scan.along = along;
  args.q = rows(problem->q, problem->feature_dim), args.k = rows(problem->k, problem->feature_dim);
  args.v = rows(problem->v, problem->value_dim), args.d_o = rows(gradients->d_o, problem->value_dim);
  args.first = problem->initial_state, args.carried = *carried;
  args.d_last = gradients->d_final, args.d_carried = *d_carried;
  args.workspace = workspace, args.dg = gradients->dg;
  return run_decay_gradient(problem->dtype, args, nullptr);
}

int64_t probe_decay_gradient_floats(const hf_linattn_problem* problem) { return decay_gradient_floats(*problem); }

const char* hf_linattn_last_error(void) { return last_error(); }

}  // extern "C"
