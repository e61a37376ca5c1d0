// Gradients of the softmax part of window_linear_attention: dq from rows of queries, dk from rows of keys.
//
// With p_ij = e^{s_ij - L_i}, L the log of the whole denominator, and delta_i = do_i . o_i:
//   ds_ij = p_ij (do_i.v_j - delta_i) c'(s),  dq_i = scale sum_j ds_ij k_j,  dk_j = scale sum_i ds_ij q_i
// over the keys i - w < j <= i of each query. Formulas: kernels/python/chunked_window.py.
#ifndef HF_LINATTN_WINDOW_GRADIENT_H_
#define HF_LINATTN_WINDOW_GRADIENT_H_

#include "scan.h"

namespace hf_linattn {

struct WindowGradientArgs {
  Rows q, k, v, d_o, o, dq, dk;  // q, k: of the softmax; dims D, D, V, V, V, D, D
  int num_heads, num_kv_heads;
  int64_t tokens;
  int num_sequences;
  const void* cu_seqlens;
  int cu_seqlens_is_int64;
  int window;
  float scale, softcap;          // softcap 0: none
  const float* log_scale;        // [H], or null for 0
  const uint8_t* key_valid;      // [B,T] contiguous, or null
  const float* lse;              // [B,H,T] L
  // [B,H,T], written with dq, read with dk: delta.
  float* delta;
  // [B,H,T], written with dq: e^{log_scale - L}, what a far key's weight is multiplied by; at most 1 / FLT_MIN.
  float* far_weight;
};

// On `stream`; 0 or an error (launch.cuh). The call for dq comes first.
int run_window_query_gradient(int dtype, const WindowGradientArgs& args, void* stream);
int run_window_key_gradient(int dtype, const WindowGradientArgs& args, void* stream);
// 0 if the kernels take these dimensions in this dtype on the current device, else an error.
int check_window_gradient(int dtype, int dim, int value_dim);

}  // namespace hf_linattn

#endif  // HF_LINATTN_WINDOW_GRADIENT_H_
