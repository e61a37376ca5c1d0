// The torch ops of the compiled kernels, through PyTorch's stable ABI: one library for every PyTorch from 2.11 on.
//
// This is the only C++ that knows PyTorch. It allocates outputs and workspace, describes tensors to the C interface of
// hf_linattn.h and passes errors on. Fake tensors and gradients of the ops: kernels/python/cuda_*.py.
#include "hf_linattn.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

// Weak, so that the library also loads into a PyTorch without CUDA, where nothing calls it.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using TensorList = std::vector<Tensor>;
using Sizes = std::initializer_list<int64_t>;

// Takes the parts of the message unjoined, so that a check that holds builds no string.
template <class... Parts>
void require(bool holds, const Parts&... parts) {
  if (holds) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

#ifdef HF_LINATTN_EMULATION
// The emulated kernels run on the CPU: no device to select, no stream.
struct DeviceScope {
  explicit DeviceScope(const Tensor&) {}
  explicit DeviceScope(int64_t) {}
  void* stream() const { return nullptr; }
};
#else
struct DeviceScope {
  explicit DeviceScope(const Tensor& tensor) : DeviceScope(tensor.get_device_index()) {}
  explicit DeviceScope(int64_t index) : device(static_cast<int32_t>(index)), guard(device) {}

  void* stream() const {
    void* current = nullptr;
    require(aoti_torch_get_current_cuda_stream != nullptr, "hf_linattn: this PyTorch is built without CUDA");
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &current));
    return current;
  }

  int32_t device;
  torch::stable::accelerator::DeviceGuard guard;
};
#endif

int32_t dtype_of(const Tensor& tensor) {
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
  return dtype;
}

int32_t kernel_dtype(const Tensor& tensor) {
  const int32_t dtype = dtype_of(tensor);
  if (dtype == aoti_torch_dtype_bfloat16()) return HF_LINATTN_BF16;
  if (dtype == aoti_torch_dtype_float16()) return HF_LINATTN_FP16;
  require(dtype == aoti_torch_dtype_float32(),
                  "q: expected bfloat16, float16 or float32 for the compiled kernels; cast it");
  return HF_LINATTN_FP32;
}

// A new contiguous tensor on the device of `like`. Every one costs the host a microsecond or two: none is made that
// nobody reads.
Tensor allocate(const Tensor& like, Sizes sizes, int32_t dtype) {
  std::array<int64_t, 4> strides{};
  int64_t stride = 1;
  for (size_t axis = sizes.size(); axis-- > 0;) {
    strides[axis] = stride;
    stride *= std::max<int64_t>(sizes.begin()[axis], 1);
  }
  int32_t device_type, device_index;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.begin(), strides.data(),
                                                  dtype, device_type, device_index, &handle));
  return Tensor(handle);
}

Tensor allocate_float(const Tensor& like, Sizes sizes) { return allocate(like, sizes, aoti_torch_dtype_float32()); }

Tensor allocate_bytes(const Tensor& like, size_t bytes) {
  return allocate(like, {static_cast<int64_t>(bytes)}, aoti_torch_dtype_uint8());
}

OptionalTensor allocate_workspace(const Tensor& like, size_t bytes) {
  return bytes == 0 ? OptionalTensor() : allocate_bytes(like, bytes);
}

void* address(const Tensor& tensor) { return tensor.data_ptr(); }

template <class T = void>
T* address(const OptionalTensor& tensor) {
  return tensor ? static_cast<T*>(tensor->data_ptr()) : nullptr;
}

void check_shape(const char* name, const Tensor& tensor, Sizes sizes) {
  require(tensor.sizes() == sizes, name,
          ": its shape does not fit the other arguments; call it through linear_attention");
}

void check_float(const char* name, const Tensor& tensor, Sizes sizes) {
  check_shape(name, tensor, sizes);
  require(dtype_of(tensor) == aoti_torch_dtype_float32() && tensor.is_contiguous(), name,
          ": expected a contiguous float32 tensor; use .float().contiguous()");
}

void check_float(const char* name, const OptionalTensor& tensor, Sizes sizes) {
  if (tensor) check_float(name, *tensor, sizes);
}

// [B, T, H, dim] as the kernels see it.
hf_linattn_tensor describe(const char* name, const Tensor& tensor, const Tensor& like) {
  require(tensor.stride(3) == 1 || tensor.size(3) <= 1, name,
                  ": expected a contiguous last dimension; use .contiguous()");
  require(dtype_of(tensor) == dtype_of(like), name, ": expected the dtype of q; cast it");
  return {address(tensor), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

// Calls visit(member, its sizes) for each member of a state that this form of the op has. A list of tensors holds a
// state as these members in this order, or nothing where there is no state.
template <class Visit>
void for_each_state_member(const hf_linattn_problem& problem, Visit visit) {
  const int64_t n = problem.num_sequences, heads = problem.num_kv_heads;
  const bool has_constant = problem.a != 0.0f, normalize = problem.normalize != 0;
  visit(&hf_linattn_state::kv, Sizes{n, heads, problem.feature_dim, problem.value_dim});
  if (normalize) visit(&hf_linattn_state::key_sum, Sizes{n, heads, problem.feature_dim});
  if (has_constant) visit(&hf_linattn_state::value_sum, Sizes{n, heads, problem.value_dim});
  if (normalize && has_constant) visit(&hf_linattn_state::weight_sum, Sizes{n, heads});
}

hf_linattn_state describe_state(const char* name, const TensorList& state, const hf_linattn_problem& problem) {
  hf_linattn_state described{};
  if (state.empty()) return described;
  size_t count = 0;
  for_each_state_member(problem, [&](float* hf_linattn_state::*member, Sizes sizes) {
    require(count < state.size(), name, ": has too few members for these a and normalize");
    check_float(name, state[count], sizes);
    described.*member = static_cast<float*>(address(state[count]));
    ++count;
  });
  require(count == state.size(), name, ": has too many members for these a and normalize");
  return described;
}

TensorList allocate_state(const Tensor& like, const hf_linattn_problem& problem) {
  TensorList state;
  for_each_state_member(problem, [&](float* hf_linattn_state::*, Sizes sizes) {
    state.push_back(allocate_float(like, sizes));
  });
  return state;
}

// What a call without tokens leaves: `source` unchanged, or zeros.
void copy_state(const TensorList& target, const TensorList& source) {
  for (size_t i = 0; i < target.size(); ++i) {
    if (source.empty()) {
      TORCH_ERROR_CODE_CHECK(aoti_torch_zero_(target[i].get()));
    } else {
      TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(target[i].get(), source[i].get(), 1));
    }
  }
}

void check_code(int code) { require(code == 0, "hf_linattn: ", hf_linattn_last_error()); }

// Sums of a step, updated in place.
hf_linattn_state describe_sums(const Tensor& kv, const OptionalTensor& key_sum, const OptionalTensor& value_sum,
                               const OptionalTensor& weight_sum, int64_t batch, int64_t kv_heads, int64_t feature_dim,
                               int64_t value_dim) {
  check_float("state.kv", kv, {batch, kv_heads, feature_dim, value_dim});
  check_float("state.key_sum", key_sum, {batch, kv_heads, feature_dim});
  check_float("state.value_sum", value_sum, {batch, kv_heads, value_dim});
  check_float("state.weight_sum", weight_sum, {batch, kv_heads});
  return {static_cast<float*>(address(kv)), address<float>(key_sum), address<float>(value_sum),
          address<float>(weight_sum)};
}

// The decay of a step, [B, H_kv].
template <class StepProblem>
void describe_step_decay(const OptionalTensor& g, StepProblem& problem) {
  if (!g) return;
  check_shape("g", *g, {problem.batch, problem.num_kv_heads});
  require(dtype_of(*g) == aoti_torch_dtype_float32(), "g: expected float32; use g.float()");
  problem.g = static_cast<const float*>(address(*g));
  problem.g_batch_stride = g->stride(0);
  problem.g_head_stride = g->stride(1);
}

hf_linattn_problem describe_problem(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& g,
                                    const TensorList& initial_state, const OptionalTensor& cu_seqlens, double a,
                                    double b, bool normalize, bool causal, int64_t path) {
  require(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, "q, k, v: expected [B, T, H, dim]");
  hf_linattn_problem problem{};
  problem.dtype = kernel_dtype(q);
  problem.path = static_cast<int32_t>(path);
  problem.batch = static_cast<int32_t>(q.size(0));
  problem.tokens = q.size(1);
  problem.num_heads = static_cast<int32_t>(q.size(2));
  problem.num_kv_heads = static_cast<int32_t>(k.size(2));
  problem.feature_dim = static_cast<int32_t>(q.size(3));
  problem.value_dim = static_cast<int32_t>(v.size(3));
  problem.a = static_cast<float>(a);
  problem.b = static_cast<float>(b);
  problem.normalize = normalize;
  problem.causal = causal;
  problem.num_sequences = problem.batch;
  if (cu_seqlens) {
    const bool is_int64 = dtype_of(*cu_seqlens) == aoti_torch_dtype_int64();
    require(is_int64 || dtype_of(*cu_seqlens) == aoti_torch_dtype_int32(), "cu_seqlens: expected int32 or int64");
    require(cu_seqlens->dim() == 1 && cu_seqlens->size(0) >= 2 && cu_seqlens->is_contiguous() &&
                        problem.batch == 1,
                    "cu_seqlens: expected a contiguous [N + 1] together with a batch of 1");
    problem.num_sequences = static_cast<int32_t>(cu_seqlens->size(0) - 1);
    problem.cu_seqlens = address(*cu_seqlens);
    problem.cu_seqlens_is_int64 = is_int64;
  }
  check_shape("k", k, {q.size(0), q.size(1), k.size(2), q.size(3)});
  check_shape("v", v, {q.size(0), q.size(1), k.size(2), v.size(3)});
  problem.q = describe("q", q, q);
  problem.k = describe("k", k, q);
  problem.v = describe("v", v, q);
  if (g) {
    check_shape("g", *g, {q.size(0), q.size(1), k.size(2)});
    require(dtype_of(*g) == aoti_torch_dtype_float32(), "g: expected float32; use g.float()");
    problem.g = static_cast<const float*>(address(*g));
    problem.g_batch_stride = g->stride(0);
    problem.g_token_stride = g->stride(1);
    problem.g_head_stride = g->stride(2);
  }
  problem.initial_state = describe_state("initial_state", initial_state, problem);
  return problem;
}

bool has_tokens(const hf_linattn_problem& problem) { return problem.batch > 0 && problem.tokens > 0; }

std::tuple<Tensor, OptionalTensor, TensorList> linear_attention_forward(
    const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& g, const TensorList& initial_state,
    const OptionalTensor& cu_seqlens, double a, double b, bool normalize, bool causal, bool output_final_state,
    int64_t path) {
  const DeviceScope scope(q);
  const hf_linattn_problem problem =
      describe_problem(q, k, v, g, initial_state, cu_seqlens, a, b, normalize, causal, path);
  const Tensor o = allocate(q, {q.size(0), q.size(1), q.size(2), v.size(3)}, dtype_of(q));
  OptionalTensor den;
  if (normalize) den = allocate_float(q, {q.size(0), q.size(2), q.size(1)});
  TensorList final_state;
  if (output_final_state) final_state = allocate_state(q, problem);
  if (has_tokens(problem)) {
    const hf_linattn_tensor o_view = describe("o", o, q);
    const hf_linattn_state final_view = describe_state("final_state", final_state, problem);
    const OptionalTensor workspace = allocate_workspace(q, hf_linattn_forward_workspace(&problem));
    check_code(hf_linattn_forward(&problem, &o_view, address<float>(den), &final_view, address(workspace),
                                  scope.stream()));
  } else {
    copy_state(final_state, initial_state);
  }
  return {o, den, final_state};
}

std::tuple<Tensor, Tensor, Tensor, OptionalTensor, TensorList> linear_attention_backward(
    const Tensor& d_o, const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& den,
    const OptionalTensor& g, const TensorList& initial_state, const TensorList& d_final_state,
    const OptionalTensor& cu_seqlens, double a, double b, bool normalize, bool causal,
    bool needs_dg, bool needs_d_initial_state, int64_t path) {
  const DeviceScope scope(q);
  const hf_linattn_problem problem =
      describe_problem(q, k, v, g, initial_state, cu_seqlens, a, b, normalize, causal, path);
  check_shape("d_o", d_o, {q.size(0), q.size(1), q.size(2), v.size(3)});
  check_float("den", den, {q.size(0), q.size(2), q.size(1)});
  hf_linattn_gradients gradients{};
  gradients.d_final = describe_state("d_final_state", d_final_state, problem);
  require(!needs_dg || g, "g: dg needs it");

  const int32_t dtype = dtype_of(q);
  const Tensor dq = allocate(q, {q.size(0), q.size(1), q.size(2), q.size(3)}, dtype);
  const Tensor dk = allocate(q, {k.size(0), k.size(1), k.size(2), k.size(3)}, dtype);
  const Tensor dv = allocate(q, {v.size(0), v.size(1), v.size(2), v.size(3)}, dtype);
  OptionalTensor dg;
  if (needs_dg) dg = allocate_float(q, {k.size(0), k.size(1), k.size(2)});
  TensorList d_initial_state;
  if (needs_d_initial_state) d_initial_state = allocate_state(q, problem);
  if (has_tokens(problem)) {
    gradients.d_o = describe("d_o", d_o, q);
    gradients.den = address<float>(den);
    gradients.dq = describe("dq", dq, q);
    gradients.dk = describe("dk", dk, q);
    gradients.dv = describe("dv", dv, q);
    gradients.dg = address<float>(dg);
    gradients.d_initial = describe_state("d_initial_state", d_initial_state, problem);
    const OptionalTensor workspace = allocate_workspace(q, hf_linattn_backward_workspace(&problem, &gradients));
    check_code(hf_linattn_backward(&problem, &gradients, address(workspace), scope.stream()));
  } else {
    copy_state(d_initial_state, d_final_state);
  }
  return {dq, dk, dv, dg, d_initial_state};
}

// q and k are those of the softmax; phi_q and phi_k take the places of q and k in the rest of the problem.
hf_linattn_problem describe_window_problem(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& phi_q,
                                           const Tensor& phi_k, const OptionalTensor& g,
                                           const OptionalTensor& log_scale, const TensorList& initial_state,
                                           const OptionalTensor& key_valid, const OptionalTensor& cu_seqlens,
                                           int64_t window, double scale, double softcap, double a, double b,
                                           int64_t path) {
  hf_linattn_problem problem = describe_problem(phi_q, phi_k, v, g, initial_state, cu_seqlens, a, b,
                                                /*normalize=*/true, /*causal=*/true, path);
  require(q.dim() == 4 && k.dim() == 4, "q, k: expected [B, T, H, dim]");
  check_shape("q", q, {phi_q.size(0), phi_q.size(1), phi_q.size(2), q.size(3)});
  check_shape("k", k, {phi_k.size(0), phi_k.size(1), phi_k.size(2), q.size(3)});
  check_float("log_scale", log_scale, {q.size(2)});
  // A longer window reaches no more keys than all tokens.
  problem.window.size = static_cast<int32_t>(std::min(window, std::max<int64_t>(problem.tokens, 1)));
  problem.window.dim = static_cast<int32_t>(q.size(3));
  problem.window.scale = static_cast<float>(scale);
  problem.window.softcap = static_cast<float>(softcap);
  problem.window.q = describe("q", q, phi_q);
  problem.window.k = describe("k", k, phi_q);
  problem.window.log_scale = address<const float>(log_scale);
  if (key_valid) {
    check_shape("key_valid", *key_valid, {q.size(0), q.size(1)});
    const int32_t dtype = dtype_of(*key_valid);
    require((dtype == aoti_torch_dtype_bool() || dtype == aoti_torch_dtype_uint8()) && key_valid->is_contiguous(),
            "key_valid: expected a contiguous bool or uint8 tensor; use .bool().contiguous()");
    require(a == 0.0, "key_valid: expected None together with a constant term a, got a tensor; use the chunked form");
    problem.window.key_valid = address<const uint8_t>(key_valid);
  }
  return problem;
}

std::tuple<Tensor, Tensor, TensorList> window_linear_attention_forward(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& phi_q, const Tensor& phi_k,
    const OptionalTensor& g, const OptionalTensor& log_scale, const TensorList& initial_state,
    const OptionalTensor& key_valid, const OptionalTensor& cu_seqlens, int64_t window, double scale, double softcap,
    double a, double b, bool output_final_state, int64_t first_query, int64_t path) {
  const DeviceScope scope(q);
  hf_linattn_problem problem = describe_window_problem(
      q, k, v, phi_q, phi_k, g, log_scale, initial_state, key_valid, cu_seqlens, window, scale, softcap, a, b, path);
  require(first_query >= 0 && first_query <= problem.window.size,
          "first_query: expected 0 to ", problem.window.size, ", the tokens of the window, got ", first_query);
  problem.window.first_query = static_cast<int32_t>(first_query);
  const Tensor o = allocate(q, {q.size(0), q.size(1), q.size(2), v.size(3)}, dtype_of(q));
  const Tensor lse = allocate_float(q, {q.size(0), q.size(2), q.size(1)});
  TensorList final_state;
  if (output_final_state) final_state = allocate_state(q, problem);
  if (has_tokens(problem)) {
    const hf_linattn_tensor o_view = describe("o", o, q);
    const hf_linattn_state final_view = describe_state("final_state", final_state, problem);
    const OptionalTensor workspace = allocate_workspace(q, hf_linattn_forward_workspace(&problem));
    check_code(hf_linattn_forward(&problem, &o_view, static_cast<float*>(address(lse)), &final_view,
                                  address(workspace), scope.stream()));
  } else {
    copy_state(final_state, initial_state);
  }
  return {o, lse, final_state};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, OptionalTensor> window_linear_attention_backward(
    const Tensor& d_o, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& phi_q, const Tensor& phi_k,
    const Tensor& o, const Tensor& lse, const OptionalTensor& g, const OptionalTensor& log_scale,
    const TensorList& initial_state, const OptionalTensor& key_valid, const OptionalTensor& cu_seqlens,
    int64_t window, double scale, double softcap, double a, double b, bool needs_d_log_scale, int64_t path) {
  const DeviceScope scope(q);
  const hf_linattn_problem problem = describe_window_problem(
      q, k, v, phi_q, phi_k, g, log_scale, initial_state, key_valid, cu_seqlens, window, scale, softcap, a, b, path);
  check_shape("d_o", d_o, {q.size(0), q.size(1), q.size(2), v.size(3)});
  check_shape("o", o, {q.size(0), q.size(1), q.size(2), v.size(3)});
  check_float("lse", lse, {q.size(0), q.size(2), q.size(1)});

  const int32_t dtype = dtype_of(q);
  const Tensor dq = allocate(q, {q.size(0), q.size(1), q.size(2), q.size(3)}, dtype);
  const Tensor dk = allocate(q, {k.size(0), k.size(1), k.size(2), k.size(3)}, dtype);
  const Tensor dv = allocate(q, {v.size(0), v.size(1), v.size(2), v.size(3)}, dtype);
  const Tensor d_phi_q = allocate(q, {phi_q.size(0), phi_q.size(1), phi_q.size(2), phi_q.size(3)}, dtype);
  const Tensor d_phi_k = allocate(q, {phi_k.size(0), phi_k.size(1), phi_k.size(2), phi_k.size(3)}, dtype);
  OptionalTensor d_log_scale;
  constexpr int64_t kUnit = 32;  // hf_linattn_gradients
  if (needs_d_log_scale) {
    d_log_scale = allocate_float(q, {(phi_q.size(3) + kUnit - 1) / kUnit, q.size(0), q.size(2), q.size(1)});
    if (cu_seqlens) TORCH_ERROR_CODE_CHECK(aoti_torch_zero_(d_log_scale->get()));
  }
  if (has_tokens(problem)) {
    hf_linattn_gradients gradients{};
    gradients.d_o = describe("d_o", d_o, q);
    gradients.o = describe("o", o, q);
    gradients.den = static_cast<const float*>(address(lse));
    gradients.d_window_q = describe("dq", dq, q);
    gradients.d_window_k = describe("dk", dk, q);
    gradients.dv = describe("dv", dv, q);
    gradients.dq = describe("dphi_q", d_phi_q, q);
    gradients.dk = describe("dphi_k", d_phi_k, q);
    gradients.d_log_scale = address<float>(d_log_scale);
    const OptionalTensor workspace = allocate_workspace(q, hf_linattn_backward_workspace(&problem, &gradients));
    check_code(hf_linattn_backward(&problem, &gradients, address(workspace), scope.stream()));
  }
  return {dq, dk, dv, d_phi_q, d_phi_k, d_log_scale};
}

Tensor linear_attention_step(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& g,
                             const Tensor& kv, const OptionalTensor& key_sum, const OptionalTensor& value_sum,
                             const OptionalTensor& weight_sum, double a, double b, bool normalize,
                             int64_t feature_map) {
  require(q.dim() == 3 && k.dim() == 3 && v.dim() == 3, "q, k, v: expected [B, H, dim]");
  const DeviceScope scope(q);
  const int64_t batch = q.size(0), kv_heads = k.size(1), feature_dim = q.size(2), value_dim = v.size(2);
  check_shape("k", k, {batch, kv_heads, feature_dim});
  check_shape("v", v, {batch, kv_heads, value_dim});
  for (const Tensor* x : {&q, &k, &v}) {
    require(dtype_of(*x) == dtype_of(q), "k, v: expected the dtype of q; cast them");
    require(x->stride(2) == 1 || x->size(2) <= 1, "q, k, v: expected a contiguous last dimension");
  }

  hf_linattn_step_problem problem{};
  problem.dtype = kernel_dtype(q);
  problem.feature_map = static_cast<int32_t>(feature_map);
  problem.batch = static_cast<int32_t>(batch);
  problem.num_heads = static_cast<int32_t>(q.size(1));
  problem.num_kv_heads = static_cast<int32_t>(kv_heads);
  problem.feature_dim = static_cast<int32_t>(feature_dim);
  problem.value_dim = static_cast<int32_t>(value_dim);
  problem.a = static_cast<float>(a);
  problem.b = static_cast<float>(b);
  problem.normalize = normalize;
  problem.q = address(q);
  problem.k = address(k);
  problem.v = address(v);
  problem.q_batch_stride = q.stride(0);
  problem.q_head_stride = q.stride(1);
  problem.k_batch_stride = k.stride(0);
  problem.k_head_stride = k.stride(1);
  problem.v_batch_stride = v.stride(0);
  problem.v_head_stride = v.stride(1);
  describe_step_decay(g, problem);
  problem.state = describe_sums(kv, key_sum, value_sum, weight_sum, batch, kv_heads, feature_dim, value_dim);
  const Tensor o = allocate(q, {batch, q.size(1), value_dim}, dtype_of(q));
  problem.o = address(o);
  if (batch > 0) check_code(hf_linattn_step(&problem, scope.stream()));
  return o;
}

// The state is that of kernels/python/state.py, member by member.
Tensor window_linear_attention_step(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& phi_q,
                                    const Tensor& phi_k, const OptionalTensor& g, const OptionalTensor& log_scale,
                                    const Tensor& kv, const Tensor& key_sum, const OptionalTensor& value_sum,
                                    const OptionalTensor& weight_sum, const Tensor& window_k, const Tensor& window_v,
                                    const Tensor& window_phi_k, const OptionalTensor& window_g,
                                    const Tensor& window_valid, const Tensor& slot, double scale, double a, double b,
                                    double softcap) {
  for (const Tensor* x : {&q, &k, &v, &phi_q, &phi_k})
    require(x->dim() == 3, "q, k, v, phi_q, phi_k: expected [B, H, dim]");
  require(window_k.dim() == 4, "state.window_k: expected [B, w, H_kv, D]");
  const DeviceScope scope(q);
  const int64_t batch = q.size(0), heads = q.size(1), kv_heads = k.size(1), window = window_k.size(1);
  const int64_t dim = q.size(2), feature_dim = phi_q.size(2), value_dim = v.size(2);
  check_shape("k", k, {batch, kv_heads, dim});
  check_shape("v", v, {batch, kv_heads, value_dim});
  check_shape("phi_q", phi_q, {batch, heads, feature_dim});
  check_shape("phi_k", phi_k, {batch, kv_heads, feature_dim});
  for (const Tensor* x : {&q, &k, &v, &phi_q, &phi_k}) {
    require(dtype_of(*x) == dtype_of(q), "k, v, phi_q, phi_k: expected the dtype of q; cast them");
    require(x->stride(2) == 1 || x->size(2) <= 1, "q, k, v, phi_q, phi_k: expected a contiguous last dimension");
  }
  check_float("log_scale", log_scale, {heads});
  check_float("state.window_g", window_g, {batch, window, kv_heads});
  check_shape("state.window_k", window_k, {batch, window, kv_heads, dim});
  check_shape("state.window_v", window_v, {batch, window, kv_heads, value_dim});
  check_shape("state.window_phi_k", window_phi_k, {batch, window, kv_heads, feature_dim});
  check_shape("state.window_valid", window_valid, {batch, window});
  for (const Tensor* x : {&window_k, &window_v, &window_phi_k})
    require(dtype_of(*x) == dtype_of(q), "state: expected a ring in the dtype of q; build it with init_window_state");
  for (const Tensor* x : {&window_k, &window_v, &window_phi_k, &window_valid})
    require(x->is_contiguous(), "state: expected a contiguous ring; use .contiguous()");
  require(dtype_of(window_valid) == aoti_torch_dtype_bool(), "state.window_valid: expected bool");
  require(slot.dim() == 0 && dtype_of(slot) == aoti_torch_dtype_int64(), "state.slot: expected an int64 scalar");

  hf_linattn_window_step_problem problem{};
  problem.dtype = kernel_dtype(q);
  problem.batch = static_cast<int32_t>(batch);
  problem.num_heads = static_cast<int32_t>(heads);
  problem.num_kv_heads = static_cast<int32_t>(kv_heads);
  problem.feature_dim = static_cast<int32_t>(feature_dim);
  problem.value_dim = static_cast<int32_t>(value_dim);
  problem.window = static_cast<int32_t>(window);
  problem.window_dim = static_cast<int32_t>(dim);
  problem.a = static_cast<float>(a);
  problem.b = static_cast<float>(b);
  problem.scale = static_cast<float>(scale);
  problem.softcap = static_cast<float>(softcap);
  problem.q = address(q);
  problem.k = address(k);
  problem.v = address(v);
  problem.phi_q = address(phi_q);
  problem.phi_k = address(phi_k);
  problem.q_batch_stride = q.stride(0);
  problem.q_head_stride = q.stride(1);
  problem.k_batch_stride = k.stride(0);
  problem.k_head_stride = k.stride(1);
  problem.v_batch_stride = v.stride(0);
  problem.v_head_stride = v.stride(1);
  problem.phi_q_batch_stride = phi_q.stride(0);
  problem.phi_q_head_stride = phi_q.stride(1);
  problem.phi_k_batch_stride = phi_k.stride(0);
  problem.phi_k_head_stride = phi_k.stride(1);
  require(g.has_value() == window_g.has_value(), "g: expected it exactly where the state has window_g");
  describe_step_decay(g, problem);
  problem.log_scale = address<float>(log_scale);
  problem.state = describe_sums(kv, key_sum, value_sum, weight_sum, batch, kv_heads, feature_dim, value_dim);
  problem.ring_k = address(window_k);
  problem.ring_v = address(window_v);
  problem.ring_phi_k = address(window_phi_k);
  problem.ring_g = address<float>(window_g);
  problem.ring_valid = static_cast<uint8_t*>(address(window_valid));
  problem.slot = static_cast<int64_t*>(address(slot));
  const Tensor o = allocate(q, {batch, heads, value_dim}, dtype_of(q));
  problem.o = address(o);
  if (batch > 0) check_code(hf_linattn_window_step(&problem, scope.stream()));
  return o;
}

// The map of q (with sinks) or of k; x [B, H, D].
hf_linattn_hedgehog_map describe_hedgehog_map(const char* name, const Tensor& x, const Tensor& weight,
                                              const OptionalTensor& output_weight,
                                              const OptionalTensor& magnitude_bias, const OptionalTensor& sink_weight,
                                              const OptionalTensor& sink_bias, int64_t columns, int64_t sinks,
                                              const Tensor& features) {
  require(x.stride(2) == 1 || x.size(2) <= 1, name, ": expected a contiguous last dimension; use .contiguous()");
  const int64_t heads = x.size(1), dim = x.size(2);
  const int64_t hidden_dim = output_weight && columns > 0 ? output_weight->size(0) / std::max<int64_t>(heads, 1) : 0;
  check_float("weight", weight, {heads * dim, columns + hidden_dim + (magnitude_bias ? 1 : 0)});
  check_float("output_weight", output_weight, {heads * hidden_dim, columns});
  check_float("magnitude_bias", magnitude_bias, {heads});
  check_float("sink_weight", sink_weight, {heads * dim, sinks});
  check_float("sink_bias", sink_bias, {heads, sinks});
  hf_linattn_hedgehog_map map{};
  map.x = address(x);
  map.x_batch_stride = x.stride(0);
  map.x_head_stride = x.stride(1);
  map.weight = static_cast<const float*>(address(weight));
  map.output_weight = address<float>(output_weight);
  map.magnitude_bias = address<float>(magnitude_bias);
  map.sink_weight = address<float>(sink_weight);
  map.sink_bias = address<float>(sink_bias);
  map.features = address(features);
  return map;
}

// Optional weights are there in the maps of both q and k or in neither, but those of sinks, which q has alone.
std::tuple<Tensor, Tensor> hedgehog_step(const Tensor& q, const Tensor& k, const Tensor& positions,
                                         const Tensor& weight_q, const Tensor& weight_k,
                                         const OptionalTensor& output_weight_q, const OptionalTensor& output_weight_k,
                                         const OptionalTensor& magnitude_bias_q,
                                         const OptionalTensor& magnitude_bias_k, const OptionalTensor& sink_weight,
                                         const OptionalTensor& sink_bias, int64_t columns, double scale,
                                         double far_length) {
  require(q.dim() == 3 && k.dim() == 3, "q, k: expected [B, H, D]");
  const DeviceScope scope(q);
  const int64_t batch = q.size(0), heads = q.size(1), kv_heads = k.size(1), dim = q.size(2);
  check_shape("k", k, {batch, kv_heads, dim});
  require(dtype_of(k) == dtype_of(q), "k: expected the dtype of q; cast it");
  require(positions.dim() == 1 && (positions.size(0) == batch || positions.size(0) == 1) &&
              dtype_of(positions) == aoti_torch_dtype_int64(),
          "positions: expected int64 [B] or [1]");
  const int64_t sinks = sink_bias ? sink_bias->size(1) : 0, feature_dim = 2 * columns + sinks;
  const Tensor phi_q = allocate(q, {batch, heads, feature_dim}, dtype_of(q));
  const Tensor phi_k = allocate(q, {batch, kv_heads, feature_dim}, dtype_of(q));

  hf_linattn_hedgehog_step_problem problem{};
  problem.dtype = kernel_dtype(q);
  problem.batch = static_cast<int32_t>(batch);
  problem.num_heads = static_cast<int32_t>(heads);
  problem.num_kv_heads = static_cast<int32_t>(kv_heads);
  problem.head_dim = static_cast<int32_t>(dim);
  problem.columns = static_cast<int32_t>(columns);
  problem.hidden_dim = output_weight_q && heads > 0 ? static_cast<int32_t>(output_weight_q->size(0) / heads) : 0;
  problem.sinks = static_cast<int32_t>(sinks);
  problem.scale = static_cast<float>(scale);
  problem.far_length = static_cast<float>(far_length);
  problem.positions = static_cast<const int64_t*>(address(positions));
  problem.position_stride = positions.size(0) == 1 ? 0 : positions.stride(0);
  problem.q = describe_hedgehog_map("q", q, weight_q, output_weight_q, magnitude_bias_q, sink_weight, sink_bias,
                                    columns, sinks, phi_q);
  problem.k = describe_hedgehog_map("k", k, weight_k, output_weight_k, magnitude_bias_k, {}, {}, columns, sinks, phi_k);
  if (batch > 0) check_code(hf_linattn_hedgehog_step(&problem, scope.stream()));
  return {phi_q, phi_k};
}

int64_t checked_path(const hf_linattn_problem& problem) {
  const int chosen = hf_linattn_path(&problem);
  check_code(chosen < 0 ? chosen : 0);
  return chosen;
}

int64_t linear_attention_path(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& g, double a,
                              double b, bool normalize, bool causal, int64_t path) {
  const DeviceScope scope(q);
  return checked_path(describe_problem(q, k, v, g, {}, {}, a, b, normalize, causal, path));
}

int64_t window_linear_attention_path(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& phi_q,
                                     const Tensor& phi_k, const OptionalTensor& g, int64_t window, double scale,
                                     double softcap, double a, double b, int64_t path) {
  const DeviceScope scope(q);
  return checked_path(
      describe_window_problem(q, k, v, phi_q, phi_k, g, {}, {}, {}, {}, window, scale, softcap, a, b, path));
}

// Why no kernel runs on this device, for example a driver older than the library's CUDA runtime; empty if one does.
std::string device_problem(int64_t device_index) {
  const DeviceScope scope(device_index);
  constexpr int32_t kDim = 64;
  hf_linattn_problem problem{};
  problem.dtype = HF_LINATTN_BF16;
  problem.batch = problem.num_heads = problem.num_kv_heads = problem.num_sequences = 1;
  problem.feature_dim = problem.value_dim = kDim;
  problem.tokens = kDim;
  problem.b = 1.0f;
  problem.normalize = problem.causal = 1;
  problem.q = problem.k = problem.v = {nullptr, kDim * kDim, kDim, kDim};
  return hf_linattn_path(&problem) < 0 ? hf_linattn_last_error() : "";
}

int64_t largest_dim(int64_t device_index, int64_t dtype, bool is_step) {
  if (is_step) return hf_linattn_step_largest_dim();
  const DeviceScope scope(device_index);
  return hf_linattn_largest_dim(static_cast<int32_t>(dtype));
}

int64_t window_largest_dim(int64_t device_index, int64_t dtype) {
  const DeviceScope scope(device_index);
  return hf_linattn_window_largest_dim(static_cast<int32_t>(dtype));
}

std::string build_info() { return KERNELS_BUILD_INFO; }

}  // namespace

STABLE_TORCH_LIBRARY(hf_linattn, m) {
  m.def(
      "linear_attention_forward(Tensor q, Tensor k, Tensor v, Tensor? g, Tensor[] initial_state, Tensor? cu_seqlens, "
      "float a, float b, bool normalize, bool causal, bool output_final_state, int path) -> "
      "(Tensor o, Tensor? den, Tensor[] final_state)");
  m.def(
      "linear_attention_backward(Tensor d_o, Tensor q, Tensor k, Tensor v, Tensor? den, "
      "Tensor? g, Tensor[] initial_state, Tensor[] d_final_state, Tensor? cu_seqlens, float a, "
      "float b, bool normalize, bool causal, bool needs_dg, bool needs_d_initial_state, int path) -> "
      "(Tensor dq, Tensor dk, Tensor dv, Tensor? dg, Tensor[] d_initial_state)");
  m.def(
      "linear_attention_step(Tensor q, Tensor k, Tensor v, Tensor? g, Tensor(a!) kv, Tensor(b!)? key_sum, "
      "Tensor(c!)? value_sum, Tensor(d!)? weight_sum, float a, float b, bool normalize, int feature_map) -> Tensor");
  m.def(
      "window_linear_attention_step(Tensor q, Tensor k, Tensor v, Tensor phi_q, Tensor phi_k, Tensor? g, "
      "Tensor? log_scale, Tensor(a!) kv, Tensor(b!) key_sum, Tensor(c!)? value_sum, Tensor(d!)? weight_sum, "
      "Tensor(e!) window_k, Tensor(f!) window_v, Tensor(g!) window_phi_k, Tensor(h!)? window_g, "
      "Tensor(i!) window_valid, Tensor(j!) slot, float scale, float a, float b, float softcap) -> Tensor");
  m.def(
      "hedgehog_step(Tensor q, Tensor k, Tensor positions, Tensor weight_q, Tensor weight_k, Tensor? output_weight_q, "
      "Tensor? output_weight_k, Tensor? magnitude_bias_q, Tensor? magnitude_bias_k, Tensor? sink_weight, "
      "Tensor? sink_bias, int columns, float scale, float far_length) -> (Tensor phi_q, Tensor phi_k)");
  m.def(
      "linear_attention_path(Tensor q, Tensor k, Tensor v, Tensor? g, float a, float b, bool normalize, bool causal, "
      "int path) -> int");
  m.def(
      "window_linear_attention_forward(Tensor q, Tensor k, Tensor v, Tensor phi_q, Tensor phi_k, Tensor? g, "
      "Tensor? log_scale, Tensor[] initial_state, Tensor? key_valid, Tensor? cu_seqlens, int window, float scale, "
      "float softcap, float a, float b, bool output_final_state, int first_query, int path) -> "
      "(Tensor o, Tensor lse, Tensor[] final_state)");
  m.def(
      "window_linear_attention_backward(Tensor d_o, Tensor q, Tensor k, Tensor v, Tensor phi_q, Tensor phi_k, "
      "Tensor o, Tensor lse, Tensor? g, Tensor? log_scale, Tensor[] initial_state, Tensor? key_valid, "
      "Tensor? cu_seqlens, int window, float scale, float softcap, float a, float b, bool needs_d_log_scale, "
      "int path) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dphi_q, Tensor dphi_k, Tensor? d_log_scale)");
  m.def(
      "window_linear_attention_path(Tensor q, Tensor k, Tensor v, Tensor phi_q, Tensor phi_k, Tensor? g, int window, "
      "float scale, float softcap, float a, float b, int path) -> int");
  m.def("device_problem(int device_index) -> str");
  m.def("largest_dim(int device_index, int dtype, bool is_step) -> int");
  m.def("window_largest_dim(int device_index, int dtype) -> int");
  m.def("build_info() -> str");
}

#ifdef HF_LINATTN_EMULATION
STABLE_TORCH_LIBRARY_IMPL(hf_linattn, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(hf_linattn, CUDA, m) {
#endif
  m.impl("linear_attention_forward", TORCH_BOX(&linear_attention_forward));
  m.impl("linear_attention_backward", TORCH_BOX(&linear_attention_backward));
  m.impl("linear_attention_step", TORCH_BOX(&linear_attention_step));
  m.impl("window_linear_attention_step", TORCH_BOX(&window_linear_attention_step));
  m.impl("hedgehog_step", TORCH_BOX(&hedgehog_step));
  m.impl("linear_attention_path", TORCH_BOX(&linear_attention_path));
  m.impl("window_linear_attention_forward", TORCH_BOX(&window_linear_attention_forward));
  m.impl("window_linear_attention_backward", TORCH_BOX(&window_linear_attention_backward));
  m.impl("window_linear_attention_path", TORCH_BOX(&window_linear_attention_path));
}

STABLE_TORCH_LIBRARY_IMPL(hf_linattn, CompositeExplicitAutograd, m) {
  m.impl("device_problem", TORCH_BOX(&device_problem));
  m.impl("largest_dim", TORCH_BOX(&largest_dim));
  m.impl("window_largest_dim", TORCH_BOX(&window_largest_dim));
  m.impl("build_info", TORCH_BOX(&build_info));
}
