// Forward and backward of linear attention as a sequence of scans (scan.h), and the C interface to them.
//
//   forward    [state, prefix]  output
//   backward   [state, prefix]  dq and do.o   [state of the gradient, prefix from the end]  dk  dv  [dg]
//   (dk and dv of up to 64 dimensions in one kernel, on Hopper)
//
// The bracketed state passes run when sequences are cut into segments, and always when not causal (then a sum takes the
// place of the prefix); scans add up a few pieces themselves. Scans of one call share their workspace; the stream orders
// them. dg reads the states of both passes, at boundaries of its own choice (decay_gradient.h). With a window the backward
// begins with the gradients of its q and k (window_gradient.h), which also find do.o for the scans.
#include <algorithm>

#include "decay_gradient.h"
#include "hf_linattn.h"
#include "launch.cuh"
#include "scan.h"
#include "window_gradient.h"

namespace hf_linattn {

namespace {

constexpr int64_t kShortestSegment = 1024;  // its state, 64 KB at 128 x 128, is a tenth of what it reads
constexpr int64_t kShortestPiece = 512;
constexpr int64_t kSummedFloats = 64 * 1024;  // states at the boundaries of a sequence that a scan reads faster than a prefix
constexpr int64_t kManyChunks = 64;       // of a segment, to which one more adds little
constexpr int64_t kCutTokens = 640;       // in whose time a CTA starts and a prefix runs
constexpr int64_t kAnyLength = INT64_MAX;
constexpr size_t kAlignment = 256;

// Hands out pieces of the workspace; with a null base it only counts.
class Workspace {
 public:
  explicit Workspace(void* base) : base_(static_cast<char*>(base)) {}
  float* floats(int64_t count) {
    const size_t at = used_;
    used_ += (static_cast<size_t>(count) * sizeof(float) + kAlignment - 1) / kAlignment * kAlignment;
    return base_ == nullptr ? nullptr : reinterpret_cast<float*>(base_ + at);
  }
  hf_linattn_state state(const hf_linattn_problem& problem, int64_t entries) {
    const int64_t heads = entries * problem.num_kv_heads;
    hf_linattn_state state = {};
    state.kv = floats(heads * problem.feature_dim * problem.value_dim);
    if (problem.normalize) state.key_sum = floats(heads * problem.feature_dim);
    if (problem.a != 0.f) state.value_sum = floats(heads * problem.value_dim);
    if (problem.normalize && problem.a != 0.f) state.weight_sum = floats(heads);
    return state;
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

Rows rows_of(const hf_linattn_tensor& tensor, int dim) {
  return {tensor.data, tensor.batch_stride, tensor.token_stride, tensor.head_stride, dim};
}

int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }

bool has_window(const hf_linattn_problem& problem) { return problem.window.size > 0; }

int slot_count(const hf_linattn_problem& problem, int64_t tokens) {
  if (problem.cu_seqlens != nullptr) return static_cast<int>(problem.tokens / tokens + problem.num_sequences);
  return static_cast<int>(problem.batch * std::max<int64_t>(ceil_div(problem.tokens, tokens), 1));
}

// Cut sequences so that `units` CTAs a sequence and segment fill the multiprocessors, once. A segment costs a second read
// of k and v, so that a grid of at least `whole` CTAs stays whole. No segment is longer than `longest`.
int64_t segment_length(const hf_linattn_problem& problem, int64_t units, int64_t whole, int64_t longest) {
  const int64_t processors = std::max(multiprocessor_count(), 1);
  if (problem.cu_seqlens != nullptr) {
    return std::min(std::max(kShortestSegment, ceil_div(problem.tokens * units, processors)), longest);
  }
  const int64_t blocks = std::max<int64_t>(units * problem.batch, 1);
  const int64_t wanted = blocks >= whole && problem.causal ? 1 : std::max<int64_t>(processors / blocks, 1);
  const int64_t segment = std::min(std::max(kShortestSegment, ceil_div(problem.tokens, wanted)), longest);
  // The states of segments take half as long as one, at least.
  const bool is_worth = problem.tokens - segment > segment / 2 + kCutTokens || !problem.causal || longest != kAnyLength;
  return is_worth ? segment : problem.tokens;
}

// The segments of args for scans of this kind, each of `units` CTAs, and in how many pieces state passes of `state_units`
// CTAs take a segment, so that they fill the multiprocessors too.
void plan_segments(const hf_linattn_problem& problem, ScanKind kind, int64_t units, int64_t state_units, int64_t longest,
                   ScanArgs& args) {
  // With 64 of 132 CTAs a chunk of the output takes 1.0 us, with 128 memory makes it 1.5; dq takes 1.4 and 1.9, and with
  // a window instructions decide.
  const int64_t processors = multiprocessor_count();
  const bool is_light = kind == ScanKind::kOutput && !has_window(problem);
  const int64_t whole = is_light ? processors * 3 / 8 : processors / 2 + 1;
  const int64_t segment = std::max<int64_t>(segment_length(problem, units, whole, longest), 1);
  const int64_t boundaries = std::max(slot_count(problem, segment) - problem.num_sequences, 1);
  const int64_t pieces = std::min(processors / (state_units * boundaries), segment / kShortestPiece);
  args.pieces = longest != kAnyLength ? 1 : static_cast<int>(std::max<int64_t>(pieces, 1));
  const int64_t multiple = args.pieces * kChunk;
  args.segment_tokens = ceil_div(segment, multiple) * multiple;
  // All segments are read at the same pace: a power of two apart they would meet in the same banks of memory.
  const int64_t chunks = args.segment_tokens / kChunk;
  if (segment < problem.tokens && chunks >= kManyChunks && chunks % 16 == 0) args.segment_tokens += multiple;
  args.num_slots = slot_count(problem, args.segment_tokens);
}

ScanArgs common_args(const hf_linattn_problem& problem) {
  ScanArgs args = {};
  args.num_heads = problem.num_heads;
  args.num_kv_heads = problem.num_kv_heads;
  args.group = problem.num_kv_heads > 0 ? problem.num_heads / problem.num_kv_heads : 1;
  args.feature_dim = problem.feature_dim;
  args.value_dim = problem.value_dim;
  args.tokens = problem.tokens;
  args.num_sequences = problem.num_sequences;
  args.cu_seqlens = problem.cu_seqlens;
  args.cu_seqlens_is_int64 = problem.cu_seqlens_is_int64;
  args.g = problem.g;
  args.g_batch_stride = problem.g_batch_stride;
  args.g_token_stride = problem.g_token_stride;
  args.g_head_stride = problem.g_head_stride;
  args.a = problem.a;
  args.b = problem.b;
  args.normalize = problem.normalize;
  args.window = problem.window.size;
  args.softmax_scale = problem.window.scale;
  args.softcap = problem.window.softcap;
  args.log_scale = problem.window.log_scale;
  args.key_valid = problem.window.key_valid;
  return args;
}

Rows window_rows(const hf_linattn_problem& problem, const hf_linattn_tensor& tensor) {
  return has_window(problem) ? rows_of(tensor, problem.window.dim) : Rows{};
}

// Which kernels run a scan.
int chosen_path(const hf_linattn_problem& problem, ScanKind kind, const ScanArgs& args) {
  if (problem.path != HF_LINATTN_PATH_AUTO) return problem.path;
  const bool is_hopper = args.tokens > 0 && check_scan_sm90(kind, problem.dtype, args) == 0;
  return is_hopper ? HF_LINATTN_PATH_SM90 : HF_LINATTN_PATH_SM80;
}

int run_scan(const hf_linattn_problem& problem, ScanKind kind, const ScanArgs& args, void* stream) {
  if (chosen_path(problem, kind, args) == HF_LINATTN_PATH_SM80) {
    return run_scan_sm80(kind, problem.causal, problem.dtype, args, stream);
  }
  if (int refusal = check_scan_sm90(kind, problem.dtype, args)) return refusal;
  return run_scan_sm90(kind, problem.causal, args, stream);
}

// Readies args for scans of this kind, of `columns` columns: cuts sequences into segments and finds the state each starts
// from, by passes of `state_kind` over state_args' y and z. `total` receives what a scan that is not causal reads.
int prepare_states(const hf_linattn_problem& problem, ScanKind kind, int columns, ScanKind state_kind, ScanArgs state_args,
                   int64_t longest_segment, Workspace& workspace, const hf_linattn_state* total, bool only_count,
                   ScanArgs& args, void* stream) {
  const int64_t heads = is_reverse(kind) ? problem.num_kv_heads : problem.num_heads;
  const int64_t units = heads * ceil_div(columns, kTileColumns);
  const int64_t state_units = problem.num_kv_heads * ceil_div(problem.value_dim, 2 * kTileColumns);
  plan_segments(problem, kind, units, state_units, longest_segment, args);
  state_args.pieces = args.pieces;
  state_args.segment_tokens = args.segment_tokens / args.pieces;
  const bool is_dense = problem.cu_seqlens == nullptr;
  state_args.num_slots = is_dense ? args.num_slots * args.pieces : slot_count(problem, state_args.segment_tokens);
  state_args.first = args.first;
  if (problem.causal) {
    if (args.num_slots == problem.num_sequences) return 0;
    const int64_t boundaries = state_args.num_slots - problem.num_sequences;
    const bool is_read_by_dg = longest_segment != kAnyLength;
    const int64_t floats = boundaries / problem.num_sequences * problem.feature_dim * problem.value_dim;
    args.is_summed = is_dense && floats <= kSummedFloats && !is_read_by_dg;
    args.carried = workspace.state(problem, boundaries);
    args.carried_log_decay = workspace.floats(boundaries * problem.num_kv_heads);
    if (only_count) return 0;
    state_args.carried = args.carried;
    state_args.carried_log_decay = args.carried_log_decay;
    if (int error = run_scan(problem, state_kind, state_args, stream)) return error;
    args.tiles_are_ready = true;
    if (args.is_summed) return 0;
    return run_segment_prefix(state_args, is_reverse(state_kind), stream);
  }
  state_args.carried = workspace.state(problem, state_args.num_slots);
  const hf_linattn_state sum = total != nullptr && total->kv != nullptr ? *total
                                                                         : workspace.state(problem, problem.num_sequences);
  if (only_count) return 0;
  if (int error = run_scan(problem, state_kind, state_args, stream)) return error;
  args.first = sum;
  args.tiles_are_ready = true;
  return run_segment_total(state_args, sum, stream);
}

// k and v, the sources of the forward's state.
ScanArgs forward_state_args(const hf_linattn_problem& problem) {
  ScanArgs args = common_args(problem);
  args.y = rows_of(problem.k, problem.feature_dim);
  args.z = rows_of(problem.v, problem.value_dim);
  return args;
}

bool is_empty(const hf_linattn_problem& problem) {
  return problem.num_sequences == 0 || problem.num_heads == 0 || problem.feature_dim == 0 || problem.value_dim == 0;
}

int forward(const hf_linattn_problem& problem, const hf_linattn_tensor& o, float* den,
            const hf_linattn_state* final_state, Workspace& workspace, bool only_count, void* stream) {
  if (is_empty(problem)) return 0;
  ScanArgs args = forward_state_args(problem);
  args.x = rows_of(problem.q, problem.feature_dim);
  args.window_x = window_rows(problem, problem.window.q);
  args.window_y = window_rows(problem, problem.window.k);
  args.out = rows_of(o, problem.value_dim);
  args.first_query = problem.window.first_query;
  args.den = den;
  args.first = problem.initial_state;
  if (final_state != nullptr) args.last = *final_state;
  if (int error = prepare_states(problem, ScanKind::kOutput, problem.value_dim, ScanKind::kState, forward_state_args(problem),
                                 kAnyLength, workspace, final_state, only_count, args, stream)) {
    return error;
  }
  return only_count ? 0 : run_scan(problem, ScanKind::kOutput, args, stream);
}

// dq and dk of the window, do.o into `along`, and what the far part is weighed with into `far_weight`.
int window_gradients(const hf_linattn_problem& problem, const hf_linattn_gradients& gradients, float* along,
                     float* far_weight, void* stream) {
  const hf_linattn_window& window = problem.window;
  WindowGradientArgs args = {};
  args.q = rows_of(window.q, window.dim);
  args.k = rows_of(window.k, window.dim);
  args.v = rows_of(problem.v, problem.value_dim);
  args.d_o = rows_of(gradients.d_o, problem.value_dim);
  args.o = rows_of(gradients.o, problem.value_dim);
  args.dq = rows_of(gradients.d_window_q, window.dim);
  args.dk = rows_of(gradients.d_window_k, window.dim);
  args.num_heads = problem.num_heads;
  args.num_kv_heads = problem.num_kv_heads;
  args.tokens = problem.tokens;
  args.num_sequences = problem.num_sequences;
  args.cu_seqlens = problem.cu_seqlens;
  args.cu_seqlens_is_int64 = problem.cu_seqlens_is_int64;
  args.window = window.size;
  args.scale = window.scale;
  args.softcap = window.softcap;
  args.log_scale = window.log_scale;
  args.key_valid = window.key_valid;
  args.lse = gradients.den;
  args.delta = along;
  args.far_weight = far_weight;
  if (int error = run_window_query_gradient(problem.dtype, args, stream)) return error;
  return run_window_key_gradient(problem.dtype, args, stream);
}

int backward(const hf_linattn_problem& problem, const hf_linattn_gradients& gradients, Workspace& workspace,
             bool only_count, void* stream) {
  if (is_empty(problem)) return 0;
  const int features = problem.feature_dim, values = problem.value_dim;
  const int64_t rows = int64_t{problem.batch} * problem.num_heads * problem.tokens;
  const bool needs_dg = gradients.dg != nullptr;
  float* along = problem.normalize ? workspace.floats(rows) : nullptr;
  float* den = const_cast<float*>(gradients.den);
  if (has_window(problem)) {
    den = workspace.floats(rows);
    if (!only_count) {
      if (int error = window_gradients(problem, gradients, along, den, stream)) return error;
    }
  }
  float* dg_terms = needs_dg ? workspace.floats(decay_gradient_floats(problem)) : nullptr;
  const int64_t longest_segment = needs_dg ? kDecaySegment : kAnyLength;
  const Rows d_o = rows_of(gradients.d_o, values);

  ScanArgs query = common_args(problem);
  query.den = den;
  query.along = along;
  query.x = d_o;
  query.q = rows_of(problem.q, features);
  query.y = rows_of(problem.v, values);
  query.z = rows_of(problem.k, features);
  query.out = rows_of(gradients.dq, features);
  query.first = problem.initial_state;
  query.extra_out = gradients.d_log_scale;
  Workspace forward_states = workspace;
  if (int error = prepare_states(problem, ScanKind::kQueryGrad, features, ScanKind::kState, forward_state_args(problem),
                                 longest_segment, forward_states, nullptr, only_count, query, stream)) {
    return error;
  }
  // In the place of the others, unless dg wants both.
  Workspace backward_states = needs_dg ? forward_states : workspace;
  // The portable kernels find do.o in a run of their own.
  if (problem.normalize && !has_window(problem) && chosen_path(problem, ScanKind::kQueryGrad, query) == HF_LINATTN_PATH_SM80) {
    ScanArgs products = query;
    products.along = nullptr;
    products.out = {};
    products.extra_out = forward_states.floats(column_units(features) * rows);
    if (!only_count) {
      if (int error = run_scan(problem, ScanKind::kQueryGrad, products, stream)) return error;
      products.along = along;
      if (int error = run_along(products, stream)) return error;
    }
  }
  if (!only_count) {
    if (int error = run_scan(problem, ScanKind::kQueryGrad, query, stream)) return error;
  }

  ScanArgs sources = common_args(problem);
  sources.den = den;
  sources.along = along;
  sources.y = rows_of(problem.q, features);
  sources.z = d_o;
  sources.first = gradients.d_final;
  sources.tiles_are_ready = true;  // kernels of this call have run
  if (int error = prepare_states(problem, ScanKind::kValueGrad, std::max(features, values), ScanKind::kStateGrad, sources,
                                 longest_segment, backward_states, nullptr, only_count, sources, stream)) {
    return error;
  }
  workspace = backward_states.used() > forward_states.used() ? backward_states : forward_states;
  if (only_count) return 0;
  ScanArgs value = sources, key = sources;
  key.x = rows_of(problem.v, values);
  key.y = d_o;
  key.z = rows_of(problem.q, features);
  key.out = rows_of(gradients.dk, features);
  value.x = rows_of(problem.k, features);
  value.window_x = window_rows(problem, problem.window.k);
  value.window_y = window_rows(problem, problem.window.q);
  value.lse = gradients.den;
  value.out = rows_of(gradients.dv, values);
  value.last = gradients.d_initial;
  const bool is_hopper = chosen_path(problem, ScanKind::kKeyGrad, key) == HF_LINATTN_PATH_SM90;
  if (is_hopper && problem.causal && check_key_value_grad_sm90(problem.dtype, key, value) == 0) {
    if (int error = run_key_value_grad_sm90(key, value, stream)) return error;
  } else {
    if (int error = run_scan(problem, ScanKind::kKeyGrad, key, stream)) return error;
    if (int error = run_scan(problem, ScanKind::kValueGrad, value, stream)) return error;
  }
  if (!needs_dg) return 0;
  DecayGradientArgs decay = {};
  decay.scan = query;
  decay.q = sources.y;
  decay.k = value.x;
  decay.v = query.y;
  decay.d_o = d_o;
  decay.first = query.first;
  decay.carried = query.carried;
  decay.d_last = value.first;
  decay.d_carried = value.carried;
  decay.workspace = dg_terms;
  decay.dg = gradients.dg;
  return run_decay_gradient(problem.dtype, decay, stream);
}

}  // namespace

}  // namespace hf_linattn

using namespace hf_linattn;

extern "C" {

size_t hf_linattn_forward_workspace(const hf_linattn_problem* problem) {
  Workspace workspace(nullptr);
  const hf_linattn_tensor none = {};
  forward(*problem, none, nullptr, nullptr, workspace, /*only_count=*/true, nullptr);
  return workspace.used();
}

size_t hf_linattn_backward_workspace(const hf_linattn_problem* problem, const hf_linattn_gradients* gradients) {
  Workspace workspace(nullptr);
  backward(*problem, *gradients, workspace, /*only_count=*/true, nullptr);
  return workspace.used();
}

int hf_linattn_forward(const hf_linattn_problem* problem, const hf_linattn_tensor* o, float* den,
                       const hf_linattn_state* final_state, void* workspace, void* stream) {
  Workspace pieces(workspace);
  return forward(*problem, *o, den, final_state, pieces, /*only_count=*/false, stream);
}

int hf_linattn_backward(const hf_linattn_problem* problem, const hf_linattn_gradients* gradients, void* workspace,
                        void* stream) {
  Workspace pieces(workspace);
  return backward(*problem, *gradients, pieces, /*only_count=*/false, stream);
}

int hf_linattn_path(const hf_linattn_problem* problem) {
  ScanArgs args = forward_state_args(*problem);
  args.x = rows_of(problem->q, problem->feature_dim);
  args.window_x = window_rows(*problem, problem->window.q);
  args.window_y = window_rows(*problem, problem->window.k);
  if (has_window(*problem) && check_window_gradient(problem->dtype, problem->window.dim, problem->value_dim) != 0) {
    return -1;
  }
  if (problem->path != HF_LINATTN_PATH_SM80 && check_scan_sm90(ScanKind::kOutput, problem->dtype, args) == 0) {
    return HF_LINATTN_PATH_SM90;
  }
  if (problem->path == HF_LINATTN_PATH_SM90) return -1;
  // The kinds that need most: rows of the state are features in one, values in the other.
  ScanArgs query = args;
  std::swap(query.y, query.z);
  query.window_x = query.window_y = {};
  if (check_scan_sm80(ScanKind::kOutput, problem->causal, problem->dtype, args) != 0 ||
      check_scan_sm80(ScanKind::kQueryGrad, problem->causal, problem->dtype, query) != 0 ||
      (!has_window(*problem) &&
       check_decay_gradient(problem->dtype, problem->feature_dim, problem->value_dim) != 0)) {
    return -1;
  }
  return HF_LINATTN_PATH_SM80;
}

static int largest_dim(int32_t dtype, int window) {
  hf_linattn_problem problem = {};
  problem.dtype = dtype;
  problem.path = HF_LINATTN_PATH_SM80;
  problem.causal = 1;
  problem.window.size = window;
  for (int dim = kMaxDim; dim >= kTileColumns; dim /= 2) {
    problem.feature_dim = problem.value_dim = problem.window.dim = dim;
    if (hf_linattn_path(&problem) == HF_LINATTN_PATH_SM80) return dim;
  }
  return 0;
}

int hf_linattn_largest_dim(int32_t dtype) { return largest_dim(dtype, 0); }
int hf_linattn_window_largest_dim(int32_t dtype) { return largest_dim(dtype, kChunk); }

const char* hf_linattn_last_error(void) { return last_error(); }

}  // extern "C"
