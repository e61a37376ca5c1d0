// One function per PTX instruction; kernels hold no inline assembly of their own.
//
// The functions in the second half need sm_90a (HF_LINATTN_HAS_SM90). The host pass sees them too, so that kernels that
// use them can be parsed and launched from there. emulation.h has the same names for a build without a GPU.
#ifndef HF_LINATTN_PTX_CUH_
#define HF_LINATTN_PTX_CUH_

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define HF_LINATTN_HAS_SM90 1
#else
#define HF_LINATTN_HAS_SM90 0
#endif

#ifdef HF_LINATTN_EMULATION
#include "emulation.h"
#else

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#include <type_traits>

namespace hf_linattn {
namespace ptx {

// All shared memory of a block is dynamic: the wrappers below and the emulation know one window.
__device__ __forceinline__ char* dynamic_smem() {
  extern __shared__ __align__(1024) char hf_linattn_dynamic_smem[];
  return hf_linattn_dynamic_smem;
}

__device__ __forceinline__ uint32_t smem_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Register fences: the compiler moves no access to the array across them. They go between ordinary code and wgmma,
// whose accumulators it takes for final as soon as the instruction is issued.
template <int n>
__device__ __forceinline__ void keep(float (&x)[n]) {
#pragma unroll
  for (int i = 0; i < n; ++i) asm volatile("" : "+f"(x[i])::"memory");
}

template <int n>
__device__ __forceinline__ void keep(uint32_t (&x)[n]) {
#pragma unroll
  for (int i = 0; i < n; ++i) asm volatile("" : "+r"(x[i])::"memory");
}

// 2^x; what is below the smallest normal number is 0. exp2f keeps such numbers, at four times the instructions.
__device__ __forceinline__ float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 / x, off by at most one unit in the last place.
__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Read anew at every call: a number that is seldom needed occupies no register.
__device__ __forceinline__ int lane_id() {
  int lane;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
}

// Lane l gives the address of row l % 8 of matrix l / 8 (8x8 of 16-bit elements, 16-byte rows).
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// d += a b; T is __nv_bfloat16 or __half.
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    static_assert(std::is_same_v<T, __half>, "operands are bfloat16 or half");
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

// d += a b with operands as to_tf32 gives them.
__device__ __forceinline__ void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// x y + z of two pairs of bfloat16, rounded once.
__device__ __forceinline__ uint32_t fma_bf16x2(uint32_t x, uint32_t y, uint32_t z) {
  uint32_t d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(x), "r"(y), "r"(z));
  return d;
}

__device__ __forceinline__ uint32_t to_tf32(float x) {
  uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
}

// Copies valid_bytes (0 to 16) and fills the rest of the 16 bytes with zeros; both addresses are multiples of 16.
__device__ __forceinline__ void cp_async_16(uint32_t smem, const void* global, int valid_bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(smem), "l"(__cvta_generic_to_global(global)),
               "r"(valid_bytes)
               : "memory");
}

__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most kPending of the groups committed last are under way.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// For `threads` threads of the block, in whole warps that have not diverged; id 0 is that of __syncthreads.
__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// In a kernel that launch_early started: until the kernel before it is over and what that wrote can be read.
__device__ __forceinline__ void wait_for_previous() {
#if HF_LINATTN_HAS_SM90
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The kernel after this one may start, once a thread of every block has called this or the block is over.
__device__ __forceinline__ void launch_dependents() {
#if HF_LINATTN_HAS_SM90
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

#if HF_LINATTN_HAS_SM90

__device__ __forceinline__ void stmatrix_x4(uint32_t address, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(r[0]), "r"(r[1]),
               "r"(r[2]), "r"(r[3])
               : "memory");
}

__device__ __forceinline__ void mbarrier_init(uint32_t bar, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count) : "memory");
}

// Makes mbarrier_init visible to the copy engine; a barrier of the block follows for the other threads.
__device__ __forceinline__ void mbarrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint32_t bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}

__device__ __forceinline__ void mbarrier_arrive_expect_tx(uint32_t bar, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}

// The address of the same variable in the block of this rank in the cluster (or in this block), for the functions
// that take a remote one. That block must have begun and must not have ended: a barrier of the cluster on both sides.
__device__ __forceinline__ uint32_t map_shared_rank(uint32_t address, uint32_t rank) {
  uint32_t remote;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
  return remote;
}

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ __forceinline__ void mbarrier_arrive_remote(uint32_t remote_bar) {
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(remote_bar) : "memory");
}

// Stores the value some time later and then takes its 4 bytes off what the mbarrier, of the same block, expects.
__device__ __forceinline__ void st_async(uint32_t remote_address, float value, uint32_t remote_bar) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(remote_address),
               "r"(__float_as_uint(value)), "r"(remote_bar)
               : "memory");
}

// Until the phase of this parity is over; a fresh barrier is in phase 0, so that parity 1 passes at once.
__device__ __forceinline__ void mbarrier_wait(uint32_t bar, uint32_t parity) {
  uint32_t done;
  do {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
        "selp.u32 %0, 1, 0, done;\n"
        "}"
        : "=r"(done)
        : "r"(bar), "r"(parity)
        : "memory");
  } while (done == 0);
}

// For a phase in which other blocks of the cluster arrived or stored.
__device__ __forceinline__ void mbarrier_wait_cluster(uint32_t bar, uint32_t parity) {
  uint32_t done;
  do {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%1], %2;\n"
        "selp.u32 %0, 1, 0, done;\n"
        "}"
        : "=r"(done)
        : "r"(bar), "r"(parity)
        : "memory");
  } while (done == 0);
}

__device__ __forceinline__ void prefetch_tensor_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(reinterpret_cast<uint64_t>(map)) : "memory");
}

// One thread starts the copy of the box at coordinates c0 (dim), c1 (head), c2 (token), c3 (batch).
__device__ __forceinline__ void tma_load_4d(uint32_t smem, const CUtensorMap* map, uint32_t bar, int c0, int c1, int c2,
                                            int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];"
      ::"r"(smem), "l"(reinterpret_cast<uint64_t>(map)), "r"(bar), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}

// The same, of what will be read again soon: the second-level cache keeps it longer than other lines.
__device__ __forceinline__ void tma_load_4d_kept(uint32_t smem, const CUtensorMap* map, uint32_t bar, int c0, int c1, int c2,
                                                 int c3) {
  constexpr uint64_t kEvictLast = 0x14F0000000000000;  // what createpolicy.fractional.L2::evict_last gives for all lines
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(smem),
      "l"(reinterpret_cast<uint64_t>(map)), "r"(bar), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "l"(kEvictLast)
      : "memory");
}

// The same box for every block of the cluster whose bit is set in the mask, at the same address in each; it counts at
// the mbarrier at the same address in each.
__device__ __forceinline__ void tma_load_4d_multicast(uint32_t smem, const CUtensorMap* map, uint32_t bar, int c0,
                                                      int c1, int c2, int c3, uint16_t mask) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(smem),
      "l"(reinterpret_cast<uint64_t>(map)), "r"(bar), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "h"(mask)
      : "memory");
}

// Orders this thread's ordinary accesses to shared memory before later ones of wgmma and the copy engine.
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// B operand in shared memory with 128-byte swizzle: rows of 128 bytes, groups of 8 rows back to back, atoms of
// 8 rows aligned to 1024 bytes. `smem` may be advanced inside an atom along the 128 bytes. column_stride: bytes from
// one block of 64 columns to the next, read by the hardware only for kTransB with N > 64.
__device__ __forceinline__ uint64_t wgmma_descriptor(uint32_t smem, uint32_t column_stride = 16) {
  constexpr uint64_t kRowGroupBytes = 1024, kSwizzle128 = 1;
  return static_cast<uint64_t>((smem & 0x3ffff) >> 4) | static_cast<uint64_t>(column_stride >> 4) << 16 |
         (kRowGroupBytes >> 4) << 32 | kSwizzle128 << 62;
}

// Before the first wgmma, and whenever its registers (accumulators, A) were touched by other instructions.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until at most kPending of the groups committed last are under way; keep() their accumulators behind it.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Operand lists of one wgmma: "%0, ..., %(n-1)" and "+f"(d[0]), ..., "+f"(d[n-1]).
#define HF_LINATTN_NAMES_4 "%0, %1, %2, %3"
#define HF_LINATTN_NAMES_8 HF_LINATTN_NAMES_4 ", %4, %5, %6, %7"
#define HF_LINATTN_NAMES_12 HF_LINATTN_NAMES_8 ", %8, %9, %10, %11"
#define HF_LINATTN_NAMES_16 HF_LINATTN_NAMES_12 ", %12, %13, %14, %15"
#define HF_LINATTN_NAMES_20 HF_LINATTN_NAMES_16 ", %16, %17, %18, %19"
#define HF_LINATTN_NAMES_24 HF_LINATTN_NAMES_20 ", %20, %21, %22, %23"
#define HF_LINATTN_NAMES_32 HF_LINATTN_NAMES_24 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define HF_LINATTN_NAMES_48 \
  HF_LINATTN_NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define HF_LINATTN_NAMES_64 \
  HF_LINATTN_NAMES_48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define HF_LINATTN_REGISTERS_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define HF_LINATTN_REGISTERS_8(i) HF_LINATTN_REGISTERS_4(i), HF_LINATTN_REGISTERS_4(i + 4)
#define HF_LINATTN_REGISTERS_12(i) HF_LINATTN_REGISTERS_8(i), HF_LINATTN_REGISTERS_4(i + 8)
#define HF_LINATTN_REGISTERS_16(i) HF_LINATTN_REGISTERS_8(i), HF_LINATTN_REGISTERS_8(i + 8)
#define HF_LINATTN_REGISTERS_20(i) HF_LINATTN_REGISTERS_16(i), HF_LINATTN_REGISTERS_4(i + 16)
#define HF_LINATTN_REGISTERS_24(i) HF_LINATTN_REGISTERS_16(i), HF_LINATTN_REGISTERS_8(i + 16)
#define HF_LINATTN_REGISTERS_32(i) HF_LINATTN_REGISTERS_16(i), HF_LINATTN_REGISTERS_16(i + 16)
#define HF_LINATTN_REGISTERS_48(i) HF_LINATTN_REGISTERS_32(i), HF_LINATTN_REGISTERS_16(i + 32)
#define HF_LINATTN_REGISTERS_64(i) HF_LINATTN_REGISTERS_32(i), HF_LINATTN_REGISTERS_32(i + 32)

// columns: N; registers: N / 2, the number of accumulators; then the operand names that follow these.
#define HF_LINATTN_WGMMA_TYPED(types, columns, registers, a_names, desc_name, scale_name, trans_name)             \
  asm volatile(                                                                                                   \
      "{\n"                                                                                                       \
      ".reg .pred accumulate;\n"                                                                                  \
      "setp.ne.b32 accumulate, " scale_name ", 0;\n"                                                              \
      "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." types " {" HF_LINATTN_NAMES_##registers "}, {"      \
      a_names "}, " desc_name ", accumulate, 1, 1, " trans_name ";\n"                                             \
      "}"                                                                                                         \
      : HF_LINATTN_REGISTERS_##registers(0)                                                                       \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(desc_b), "r"(static_cast<int>(accumulate)),               \
        "n"(static_cast<int>(kTransB))                                                                            \
      : "memory")

#define HF_LINATTN_WGMMA_CASE(columns, registers, a_names, desc_name, scale_name, trans_name)                     \
  if constexpr (N == columns && std::is_same_v<T, __nv_bfloat16>) {                                               \
    HF_LINATTN_WGMMA_TYPED("bf16.bf16", columns, registers, a_names, desc_name, scale_name, trans_name);          \
  } else if constexpr (N == columns) {                                                                            \
    HF_LINATTN_WGMMA_TYPED("f16.f16", columns, registers, a_names, desc_name, scale_name, trans_name);            \
  }

// d (64 x N, fp32) = a (64 x 16, registers) b (16 x N, shared memory) + (accumulate ? d : 0), for the warpgroup.
// kTransB false: rows of b in shared memory are columns of the product ([n][k]); true: [k][n].
template <class T, int N, bool kTransB>
__device__ __forceinline__ void wgmma_rs(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t desc_b, bool accumulate) {
  static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>, "operands are bfloat16 or half");
  static_assert(N == 8 || N == 16 || N == 24 || N == 32 || N == 40 || N == 48 || N == 64 || N == 96 || N == 128,
                "no operand list for this N");
  HF_LINATTN_WGMMA_CASE(8, 4, "%4, %5, %6, %7", "%8", "%9", "%10")
  HF_LINATTN_WGMMA_CASE(16, 8, "%8, %9, %10, %11", "%12", "%13", "%14")
  HF_LINATTN_WGMMA_CASE(24, 12, "%12, %13, %14, %15", "%16", "%17", "%18")
  HF_LINATTN_WGMMA_CASE(32, 16, "%16, %17, %18, %19", "%20", "%21", "%22")
  HF_LINATTN_WGMMA_CASE(40, 20, "%20, %21, %22, %23", "%24", "%25", "%26")
  HF_LINATTN_WGMMA_CASE(48, 24, "%24, %25, %26, %27", "%28", "%29", "%30")
  HF_LINATTN_WGMMA_CASE(64, 32, "%32, %33, %34, %35", "%36", "%37", "%38")
  HF_LINATTN_WGMMA_CASE(96, 48, "%48, %49, %50, %51", "%52", "%53", "%54")
  HF_LINATTN_WGMMA_CASE(128, 64, "%64, %65, %66, %67", "%68", "%69", "%70")
}

// The same for 64 columns with a in shared memory too: its rows are those of the product.
template <class T>
__device__ __forceinline__ void wgmma_ss(float (&d)[32], uint64_t desc_a, uint64_t desc_b, bool accumulate) {
  static_assert(std::is_same_v<T, __nv_bfloat16>, "operands are bfloat16");
  asm volatile(
      "{\n"
      ".reg .pred accumulate;\n"
      "setp.ne.b32 accumulate, %34, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" HF_LINATTN_NAMES_32 "}, %32, %33, accumulate, 1, 1, 0, 0;\n"
      "}"
      : HF_LINATTN_REGISTERS_32(0)
      : "l"(desc_a), "l"(desc_b), "r"(static_cast<int>(accumulate))
      : "memory");
}

#undef HF_LINATTN_WGMMA_CASE
#undef HF_LINATTN_WGMMA_TYPED
#undef HF_LINATTN_REGISTERS_64
#undef HF_LINATTN_REGISTERS_48
#undef HF_LINATTN_REGISTERS_32
#undef HF_LINATTN_REGISTERS_24
#undef HF_LINATTN_REGISTERS_20
#undef HF_LINATTN_REGISTERS_16
#undef HF_LINATTN_REGISTERS_12
#undef HF_LINATTN_REGISTERS_8
#undef HF_LINATTN_REGISTERS_4
#undef HF_LINATTN_NAMES_64
#undef HF_LINATTN_NAMES_48
#undef HF_LINATTN_NAMES_32
#undef HF_LINATTN_NAMES_24
#undef HF_LINATTN_NAMES_20
#undef HF_LINATTN_NAMES_16
#undef HF_LINATTN_NAMES_12
#undef HF_LINATTN_NAMES_8
#undef HF_LINATTN_NAMES_4

// Barrier of the cluster in two halves; between them a block may go on with work of its own.
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
}

__device__ __forceinline__ void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
}

// Registers a thread from here on, for all warps of a warpgroup.
template <int kRegisters>
__device__ __forceinline__ void register_alloc() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256, "setmaxnreg takes 24 to 256 by 8");
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void register_dealloc() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256, "setmaxnreg takes 24 to 256 by 8");
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

#endif  // HF_LINATTN_HAS_SM90

}  // namespace ptx
}  // namespace hf_linattn

#endif  // HF_LINATTN_EMULATION
#endif  // HF_LINATTN_PTX_CUH_
