// The one scan behind forward and backward of linear attention.
//
// With decayed prefix weights w_ij = e^{G_i - G_j}, every product of the op has the form
//   out_i = r_i * sum_j w_ij (c_j x_i.y_j + e_j) z_j
// over sources j up to i (or, in a gradient, from i on), and a state S = sum_j w c_j y_j z_j^T that carries it from
// chunk to chunk:
//
//   kind       x   y   z    out  sources    c_j      e_j              r_i
//   kOutput    q   k   v    o    j <= i     b        a                1 / den_i
//   kQueryGrad do  v   k    dq   j <= i     b        -b do_i.o_i      1 / den_i   (e depends on the row i, and the
//                                                                                scan itself yields do_i.o_i)
//   kKeyGrad   v   do  q    dk   j >= i     b/den_j  -b do_j.o_j/den_j  1
//   kValueGrad k   q   do   dv   j >= i     b/den_j  a/den_j          1
//
// kState and kStateGrad form the state alone, of k, v and of q, do. The op itself: kernels/python/reference.py.
//
// With a window of w keys (hf_linattn_window) a source is w tokens further from its row: j <= i - w, or j >= i + w in a
// gradient. The sources of a chunk of rows lie that far off, so that scores, masks, decays (those of keys) and the state
// stay what they are. kOutput and kValueGrad then also add the softmax of the keys within the window, and since there is
// one denominator, 1 / den_i above is e^{log_scale - L_i}, with L_i its log.
#ifndef HF_LINATTN_SCAN_H_
#define HF_LINATTN_SCAN_H_

#include "hf_linattn.h"

#ifdef __CUDACC__
#define HF_LINATTN_BOTH_SIDES __host__ __device__
#else
#define HF_LINATTN_BOTH_SIDES
#endif

namespace hf_linattn {

constexpr int kChunk = 64;        // tokens handled by one product of scores
constexpr int kTileColumns = 64;  // columns of z, and of the state, that one warpgroup owns
constexpr int kMaxDim = 256;      // features and value channels, where shared memory allows
constexpr float kDenominatorEps = 1e-6f;  // DENOMINATOR_EPS of reference.py

enum class ScanKind { kOutput, kQueryGrad, kKeyGrad, kValueGrad, kState, kStateGrad };

// What the sources of a row are: all tokens; those up to it (kReverse: from it on); those before its window, and the window.
enum class Reach { kAll, kCausal, kWindow };

HF_LINATTN_BOTH_SIDES constexpr bool forms_state_only(ScanKind kind) { return kind == ScanKind::kState || kind == ScanKind::kStateGrad; }

// Sources come later than the row: chunks run from the last to the first.
HF_LINATTN_BOTH_SIDES constexpr bool is_reverse(ScanKind kind) {
  return kind == ScanKind::kKeyGrad || kind == ScanKind::kValueGrad || kind == ScanKind::kStateGrad;
}

// Rows of the state are value channels, columns are features: the transpose of how it is stored.
HF_LINATTN_BOTH_SIDES constexpr bool is_transposed(ScanKind kind) { return kind == ScanKind::kQueryGrad || kind == ScanKind::kKeyGrad; }

// The kind also carries z's extra column: 1 with values and keys, -do.o with gradients of values.
HF_LINATTN_BOTH_SIDES constexpr bool has_extra_column(ScanKind kind) { return kind != ScanKind::kKeyGrad; }

struct Rows {  // [batch, token, head, dim], dim contiguous, strides in elements
  void* data;
  int64_t batch_stride, token_stride, head_stride;
  int dim;
};

struct ScanArgs {
  Rows x, y, z, out;
  Rows q;  // kQueryGrad: for do.o
  int num_heads, num_kv_heads, group, feature_dim, value_dim;  // group: heads that share a kv head
  int64_t tokens;
  // Sequences are cut into segments, each owned by one CTA per head and tile. Slot numbers: see find_segment.
  int num_sequences, num_slots;
  const void* cu_seqlens;
  int cu_seqlens_is_int64;
  int64_t segment_tokens;  // a multiple of kChunk; of state kinds, which work on pieces of segments: of a piece
  int pieces;              // of a segment
  const float* g;
  int64_t g_batch_stride, g_token_stride, g_head_stride;
  float a, b;
  int normalize;
  float* den;       // [B,H,T]: written by kOutput, read by all gradients; null without normalize
  float* along;     // [B,H,T] do.o, 0 where den is held at eps: of kQueryGrad, read by the gradients; null without normalize
  float* extra_out; // [units of 32 columns,B,H,T], or null. kQueryGrad of the portable kernels: parts of do.o times den, in
                    // place of dq (run_along); with a window: parts of the gradient of log_scale, beside dq
  hf_linattn_state first;    // by sequence: state to start from; null members count as zero
  hf_linattn_state last;     // by sequence: where a scan leaves the state at the far end; null members are not wanted
  // x, y, z and q were complete before the kernel before this one began, which has waited for what came before it: tiles may
  // be loaded while that kernel ends.
  bool tiles_are_ready;
  // Between neighbouring pieces of a sequence lies a boundary; state kinds write to it what the piece on the near side adds,
  // run_segment_prefix completes those between segments, scans start from them. Where `is_summed` is set scans add up the
  // boundaries themselves. Not causal: one entry a piece instead.
  hf_linattn_state carried;
  bool is_summed;
  float* carried_log_decay;  // natural log of the decay over the piece that wrote the entry
  // With a window; 0 without.
  int window;
  int first_query;           // kOutput: rows of each sequence before that one are not wanted; at most `window`
  Rows window_x, window_y;   // of the softmax, in the place of x and y: q and k of kOutput, k and q of kValueGrad
  float softmax_scale, softcap;
  const float* log_scale;    // [H] or null
  const uint8_t* key_valid;  // [B,T] or null
  const float* lse;          // [B,H,T] L, read by kValueGrad. `den` receives it from kOutput, and holds e^{log_scale - L} for
                             // the gradients, `along` do.o
};

constexpr int kColumnUnit = 32;
HF_LINATTN_BOTH_SIDES constexpr int column_units(int dim) { return (dim + kColumnUnit - 1) / kColumnUnit; }

struct Segment {
  int slot, sequence, batch;
  int index, count;  // in its sequence
  int64_t begin, end;  // tokens of the row
  bool exists;
  HF_LINATTN_BOTH_SIDES bool is_first() const { return index == 0; }
  HF_LINATTN_BOTH_SIDES bool is_last() const { return index == count - 1; }
};

HF_LINATTN_BOTH_SIDES constexpr int window_tiles(int window) { return (window + kChunk - 1) / kChunk + 1; }  // sources that 64 rows see

// Run a scan on `stream`; `is_causal` false reads a finished state and has no scores, and there is no window. Return 0 or an error (launch.cuh).
int run_scan_sm80(ScanKind kind, bool is_causal, int dtype, const ScanArgs& args, void* stream);
int run_scan_sm90(ScanKind kind, bool is_causal, const ScanArgs& args, void* stream);
// 0 if the kernels take these arguments on the current device, else an error.
int check_scan_sm80(ScanKind kind, bool is_causal, int dtype, const ScanArgs& args);
int check_scan_sm90(ScanKind kind, int dtype, const ScanArgs& args);

// dk and dv, causal and without a window, in one kernel: its arguments are those of the two scans.
int run_key_value_grad_sm90(const ScanArgs& key, const ScanArgs& value, void* stream);
int check_key_value_grad_sm90(int dtype, const ScanArgs& key, const ScanArgs& value);

// args.along from args.extra_out of kQueryGrad.
int run_along(const ScanArgs& args, void* stream);

// Turns what each segment adds into the state at each boundary, starting from args.first; in place in args.carried.
int run_segment_prefix(const ScanArgs& args, bool is_reverse, void* stream);
// total = args.first + the sum over a sequence's slots of args.carried (not causal).
int run_segment_total(const ScanArgs& args, const hf_linattn_state& total, void* stream);

}  // namespace hf_linattn

#endif  // HF_LINATTN_SCAN_H_
