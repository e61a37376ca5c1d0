// Host side of a launch: grid, dynamic shared memory, error text, tensor maps, what device this is.
#ifndef HF_LINATTN_LAUNCH_CUH_
#define HF_LINATTN_LAUNCH_CUH_

#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include <utility>

#ifdef HF_LINATTN_EMULATION
#include "emulation.h"
#else
#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_runtime.h>

#include <atomic>
#include <map>
#include <mutex>
#endif

#include "hf_linattn.h"

namespace hf_linattn {

constexpr size_t kErrorBytes = 2048;
constexpr int kLeastSmemLimit = 99 * 1024;  // smem_limit() of the devices with least: compute capability 8.6, 8.9, 12.0

inline char* error_buffer() {
  static thread_local char text[kErrorBytes] = "";
  return text;
}

// Text of the last failure in this thread.
inline const char* last_error() { return error_buffer(); }

// Records the text; returns 1, so that a check can `return set_error(...)`.
inline int set_error(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(error_buffer(), kErrorBytes, format, arguments);
  va_end(arguments);
  return 1;
}

inline int64_t element_bytes(int dtype) { return dtype == HF_LINATTN_FP32 ? 4 : 2; }

// What make_tensor_map wants of its arguments; the emulation holds them to the same.
inline int check_tensor_map(int dtype, const void* base, const int64_t (&dims)[4], const int64_t (&strides)[3],
                            int box_dim, int box_tokens) {
  if (box_dim * element_bytes(dtype) != 128 || box_tokens < 1 || box_tokens > 256)
    return set_error("tensor map: a box is 128 bytes by 1 to 256 tokens, got %d elements by %d", box_dim, box_tokens);
  if (reinterpret_cast<uintptr_t>(base) % 16 != 0)
    return set_error("tensor map: the base address %p is not a multiple of 16 bytes", base);
  for (int i = 0; i < 4; ++i)
    if (dims[i] < 1 || dims[i] > int64_t{1} << 32)
      return set_error("tensor map: size %lld of dimension %d is outside 1 to 2^32", (long long)dims[i], i);
  for (int i = 0; i < 3; ++i)
    if (strides[i] % 16 != 0 || strides[i] < 0 || strides[i] >= int64_t{1} << 40)
      return set_error("tensor map: stride of %lld bytes; the copy engine takes multiples of 16 below 2^40",
                       (long long)strides[i]);
  return 0;
}

#ifdef HF_LINATTN_EMULATION

template <class... P, class... A>
int launch_clusters(void (*kernel)(P...), dim3 grid, int cluster, int threads, size_t smem_bytes, cudaStream_t,
                    A&&... arguments) {
  const char* problem =
      emulation::run_kernel(grid, cluster, threads, smem_bytes, [&] { kernel(static_cast<P>(arguments)...); });
  return problem == nullptr ? 0 : set_error("%s", problem);
}

template <class... P, class... A>
int launch_early(void (*kernel)(P...), dim3 grid, int cluster, int threads, size_t smem_bytes, cudaStream_t stream,
                 A&&... arguments) {
  return launch_clusters(kernel, grid, cluster, threads, smem_bytes, stream, std::forward<A>(arguments)...);
}

inline int multiprocessor_count() { return emulation::setting("HF_LINATTN_EMULATED_SMS", 4); }
inline int compute_capability() { return emulation::setting("HF_LINATTN_EMULATED_CAPABILITY", 90); }
inline int smem_limit() { return static_cast<int>(emulation::smem_limit(compute_capability())); }

template <class... P>
int compiled_architecture(void (*)(P...)) {
  return compute_capability();
}

inline int make_tensor_map(CUtensorMap* map, int dtype, const void* base, int64_t dim, int64_t heads, int64_t tokens,
                           int64_t batch, int64_t head_stride, int64_t token_stride, int64_t batch_stride, int box_dim,
                           int box_tokens) {
  const int64_t bytes = element_bytes(dtype), dims[4] = {dim, heads, tokens, batch};
  const int64_t strides[3] = {heads > 1 ? head_stride * bytes : 16, tokens > 1 ? token_stride * bytes : 16,
                              batch > 1 ? batch_stride * bytes : 16};
  if (int error = check_tensor_map(dtype, base, dims, strides, box_dim, box_tokens)) return error;
  *map = {static_cast<const char*>(base), bytes, {dim, heads, tokens, batch}, {strides[0], strides[1], strides[2]},
          box_tokens};
  return 0;
}

#else

inline int check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return 0;
  set_error("%s: %s (%s)", what, cudaGetErrorString(error), cudaGetErrorName(error));
  return static_cast<int>(error);
}

// More than 48 KB of dynamic shared memory must be asked for, once per kernel and device.
inline int raise_smem_limit(const void* kernel, size_t smem_bytes) {
  constexpr size_t kDefaultLimit = 48 * 1024;
  if (smem_bytes <= kDefaultLimit) return 0;
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, size_t> limits;
  int device = 0;
  if (int error = check_cuda(cudaGetDevice(&device), "cudaGetDevice")) return error;
  std::lock_guard<std::mutex> lock(mutex);
  size_t& limit = limits[{kernel, device}];
  if (smem_bytes <= limit) return 0;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(smem_bytes));
  if (error != cudaSuccess) {
    cudaGetLastError();  // not left behind for the next caller to find
    set_error("%zu bytes of shared memory: %s", smem_bytes, cudaGetErrorString(error));
    return static_cast<int>(error);
  }
  limit = smem_bytes;
  return 0;
}

// Attribute of the current device, asked once per device; negative (with the error recorded) without one.
template <cudaDeviceAttr kAttribute>
int device_attribute() {
  constexpr int kMaxDevices = 64;
  static std::atomic<int> known[kMaxDevices];  // value + 1; 0 is not asked yet
  int device = 0, value = 0;
  if (check_cuda(cudaGetDevice(&device), "cudaGetDevice") != 0) return -1;
  if (device < kMaxDevices && known[device] != 0) return known[device] - 1;
  if (check_cuda(cudaDeviceGetAttribute(&value, kAttribute, device), "cudaDeviceGetAttribute") != 0) return -1;
  if (device < kMaxDevices) known[device] = value + 1;
  return value;
}

inline int multiprocessor_count() { return device_attribute<cudaDevAttrMultiProcessorCount>(); }

// 90 for sm_90.
inline int compute_capability() {
  const int major = device_attribute<cudaDevAttrComputeCapabilityMajor>();
  const int minor = device_attribute<cudaDevAttrComputeCapabilityMinor>();
  return major < 0 || minor < 0 ? -1 : 10 * major + minor;
}

template <class... P, class... A>
int launch_with(bool is_early, void (*kernel)(P...), dim3 grid, int cluster, int threads, size_t smem_bytes,
                cudaStream_t stream, A&&... arguments) {
  if (int error = raise_smem_limit(reinterpret_cast<const void*>(kernel), smem_bytes)) return error;
  cudaLaunchAttribute attributes[2] = {};
  unsigned count = 0;
  if (cluster > 1) {
    cudaLaunchAttribute& shape = attributes[count++];
    shape.id = cudaLaunchAttributeClusterDimension;
    shape.val.clusterDim.x = static_cast<unsigned>(cluster);
    shape.val.clusterDim.y = shape.val.clusterDim.z = 1;
  }
  if (is_early) {
    cudaLaunchAttribute& early = attributes[count++];
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = smem_bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = count;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, std::forward<A>(arguments)...);
  if (error == cudaSuccess) return 0;
  cudaGetLastError();
  set_error("launch of %u x %u x %u blocks (clusters of %d) of %d threads, %zu bytes of shared memory: %s", grid.x,
            grid.y, grid.z, cluster, threads, smem_bytes, cudaGetErrorString(error));
  return static_cast<int>(error);
}

// As launch(), with blocks that are neighbours in x in clusters of this size (sm_90).
template <class... P, class... A>
int launch_clusters(void (*kernel)(P...), dim3 grid, int cluster, int threads, size_t smem_bytes, cudaStream_t stream,
                    A&&... arguments) {
  return launch_with(false, kernel, grid, cluster, threads, smem_bytes, stream, std::forward<A>(arguments)...);
}

// As launch_clusters(), for kernels that call ptx::wait_for_previous before they touch memory: where they are compiled for
// the device, they start while the kernel before ends.
template <class... P, class... A>
int launch_early(void (*kernel)(P...), dim3 grid, int cluster, int threads, size_t smem_bytes, cudaStream_t stream,
                 A&&... arguments) {
  return launch_with(compute_capability() == 90, kernel, grid, cluster, threads, smem_bytes, stream,
                     std::forward<A>(arguments)...);
}

// Shared memory that a block may ask for on the current device; negative on an error.
inline int smem_limit() { return device_attribute<cudaDevAttrMaxSharedMemoryPerBlockOptin>(); }

// Virtual architecture of the kernel's code on the current device, 90 for sm_90a; negative on an error. Lower than the
// device's where the library was built without that architecture.
template <class... P>
int compiled_architecture(void (*kernel)(P...)) {
  cudaFuncAttributes attributes = {};
  const cudaError_t error = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel));
  if (error != cudaSuccess) cudaGetLastError();
  return check_cuda(error, "cudaFuncGetAttributes") != 0 ? -1 : attributes.ptxVersion;
}

// Asked of the runtime at run time: linking libcuda would keep the library from loading where there is no driver.
inline PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder() {
  static const PFN_cuTensorMapEncodeTiled_v12000 encoder = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
    constexpr unsigned kVersion = 12000;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, kVersion, cudaEnableDefault, &found);
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(
        error == cudaSuccess && found == cudaDriverEntryPointSuccess ? function : nullptr);
  }();
  return encoder;
}

// Tensor map over [batch, tokens, heads, dim] (strides in elements) with boxes of box_dim x 1 x box_tokens x 1 in
// 128-byte swizzle; what a box holds beyond the tensor is zero. Coordinates are (dim, head, token, batch).
inline int make_tensor_map(CUtensorMap* map, int dtype, const void* base, int64_t dim, int64_t heads, int64_t tokens,
                           int64_t batch, int64_t head_stride, int64_t token_stride, int64_t batch_stride, int box_dim,
                           int box_tokens) {
  const int64_t bytes = element_bytes(dtype), sizes[4] = {dim, heads, tokens, batch};
  // The stride of a single entry is never used, and may be anything in a tensor; 16 is one that the encoder takes.
  const int64_t strides[3] = {heads > 1 ? head_stride * bytes : 16, tokens > 1 ? token_stride * bytes : 16,
                              batch > 1 ? batch_stride * bytes : 16};
  if (int error = check_tensor_map(dtype, base, sizes, strides, box_dim, box_tokens)) return error;
  const PFN_cuTensorMapEncodeTiled_v12000 encode = tensor_map_encoder();
  if (encode == nullptr) return set_error("tensor map: this driver has no cuTensorMapEncodeTiled");
  cuuint64_t dims[4], byte_strides[3];
  for (int i = 0; i < 4; ++i) dims[i] = static_cast<cuuint64_t>(sizes[i]);
  for (int i = 0; i < 3; ++i) byte_strides[i] = static_cast<cuuint64_t>(strides[i]);
  const cuuint32_t box[4] = {static_cast<cuuint32_t>(box_dim), 1, static_cast<cuuint32_t>(box_tokens), 1};
  const cuuint32_t steps[4] = {1, 1, 1, 1};
  const CUtensorMapDataType type = dtype == HF_LINATTN_BF16   ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                   : dtype == HF_LINATTN_FP16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                              : CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
  const auto run = [&] {
    return encode(map, type, 4, const_cast<void*>(base), dims, byte_strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                  CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  };
  CUresult result = run();
  if (result == CUDA_ERROR_INVALID_CONTEXT) {  // a thread, such as autograd's, that has not used the device yet
    int device = 0;
    if (int error = check_cuda(cudaGetDevice(&device), "cudaGetDevice")) return error;
    if (int error = check_cuda(cudaSetDevice(device), "cudaSetDevice")) return error;
    result = run();
  }
  return result == CUDA_SUCCESS ? 0 : set_error("tensor map: cuTensorMapEncodeTiled failed with %d", (int)result);
}

#endif  // HF_LINATTN_EMULATION

// 0, or the CUDA error with its text recorded.
template <class... P, class... A>
int launch(void (*kernel)(P...), dim3 grid, int threads, size_t smem_bytes, cudaStream_t stream, A&&... arguments) {
  return launch_clusters(kernel, grid, 1, threads, smem_bytes, stream, std::forward<A>(arguments)...);
}

}  // namespace hf_linattn

#endif  // HF_LINATTN_LAUNCH_CUH_
