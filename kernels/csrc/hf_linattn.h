// The compiled kernels of hf_linattn behind a C interface that knows nothing of PyTorch.
//
// Every function launches on `stream` and returns 0, or a non-zero code with the text in hf_linattn_last_error().
// None allocates device memory, synchronises or reads device memory on the host. Formulas: kernels/python/reference.py.
#ifndef HF_LINATTN_H_
#define HF_LINATTN_H_

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { HF_LINATTN_BF16 = 0, HF_LINATTN_FP16 = 1, HF_LINATTN_FP32 = 2 };

// Which kernels run: the library chooses, or the portable (sm_80 and later) or the Hopper (sm_90a) ones are forced.
enum { HF_LINATTN_PATH_AUTO = 0, HF_LINATTN_PATH_SM80 = 1, HF_LINATTN_PATH_SM90 = 2 };

// Feature maps that linear_attention_step applies to q and k on the way in.
enum { HF_LINATTN_MAP_NONE = 0, HF_LINATTN_MAP_ELU = 1, HF_LINATTN_MAP_RELU = 2, HF_LINATTN_MAP_L2 = 3 };

// [batch, token, head, dim] with dim contiguous; strides in elements.
typedef struct {
  void* data;
  int64_t batch_stride, token_stride, head_stride;
} hf_linattn_tensor;

// fp32, contiguous; a null member is absent. N sequences.
typedef struct {
  float* kv;          // [N, H_kv, K, V]
  float* key_sum;     // [N, H_kv, K], with normalize
  float* value_sum;   // [N, H_kv, V], with a != 0
  float* weight_sum;  // [N, H_kv], with both
} hf_linattn_state;

// The window of window_linear_attention; all zero: there is none, linear attention alone. The last `size` keys of a row,
// its own included, weigh e^{s} with s = scale q.k, capped as softcap tanh(s / softcap); all older ones weigh
// e^{log_scale} (a + b phi_q.phi_k), the state of linear attention delayed by `size` tokens; one denominator (normalize).
typedef struct {
  int32_t size, dim;          // w >= 1; D
  int32_t first_query;        // forward: so many tokens that each sequence begins with have no query, at most `size`. What
                              // would be written of them is not
  float scale, softcap;       // softcap 0: none
  hf_linattn_tensor q, k;     // [B,T,H,D], [B,T,H_kv,D]
  const float* log_scale;     // [H], or null for 0
  const uint8_t* key_valid;   // [B,T] contiguous, or null: 0 hides a key from every query but its own. Its features and
                              // value are zero, and a is 0
} hf_linattn_window;

typedef struct {
  int32_t dtype, path;
  int32_t batch, num_heads, num_kv_heads, feature_dim, value_dim;
  int64_t tokens;
  int32_t num_sequences;      // batch, or the number of packed sequences (then batch is 1)
  const void* cu_seqlens;     // [num_sequences + 1] int32 or int64 on the device; null when not packed
  int32_t cu_seqlens_is_int64;
  float a, b;                 // weight a + b q.k, scale multiplied into b
  int32_t normalize, causal;
  hf_linattn_tensor q, k, v;  // [B,T,H,K], [B,T,H_kv,K], [B,T,H_kv,V]
  const float* g;             // [B,T,H_kv] natural log decay, or null
  int64_t g_batch_stride, g_token_stride, g_head_stride;
  hf_linattn_state initial_state;
  hf_linattn_window window;   // with one, q and k are phi_q and phi_k, and causal and normalize are 1
} hf_linattn_problem;

typedef struct {
  hf_linattn_tensor d_o;          // [B,T,H,V]: gradient of the output
  const float* den;               // [B,H,T] of the forward; null without normalize
  hf_linattn_state d_final;       // gradient of the final state, or all null
  hf_linattn_tensor dq, dk, dv;   // as q, k, v
  float* dg;                      // [B,T,H_kv] contiguous, or null
  hf_linattn_state d_initial;     // gradient of the initial state; all null: not wanted
  // With a window, where there is no dg and states have no gradients:
  hf_linattn_tensor o;                    // of the forward
  hf_linattn_tensor d_window_q, d_window_k;  // as window.q, window.k
  float* d_log_scale;                     // [units of 32 features,B,H,T], or null: parts whose sum over units is what a row
                                          // adds to the gradient of its head's log_scale; not written behind the last sequence
} hf_linattn_gradients;

typedef struct {
  int32_t dtype;
  int32_t batch, num_heads, num_kv_heads, feature_dim, value_dim;
  int32_t window, window_dim;     // w slots of the ring; D
  float a, b, scale, softcap;     // softcap 0: none
  const void *q, *k, *v, *phi_q, *phi_k;  // [B,H,D], [B,H_kv,D], [B,H_kv,V], [B,H,K], [B,H_kv,K], last dim contiguous
  int64_t q_batch_stride, q_head_stride, k_batch_stride, k_head_stride, v_batch_stride, v_head_stride;
  int64_t phi_q_batch_stride, phi_q_head_stride, phi_k_batch_stride, phi_k_head_stride;
  const float* g;                 // [B,H_kv] or null
  int64_t g_batch_stride, g_head_stride;
  const float* log_scale;         // [H], or null for 0
  hf_linattn_state state;         // N = batch; updated in place, and so are the following, contiguous all
  void *ring_k, *ring_v, *ring_phi_k;  // [B,w,H_kv,D], [B,w,H_kv,V], [B,w,H_kv,K] in dtype
  float* ring_g;                  // [B,w,H_kv], with g
  uint8_t* ring_valid;            // [B,w]
  int64_t* slot;                  // the oldest entry, which this token replaces; advanced by one
  void* o;                        // [B,H,V] contiguous
} hf_linattn_window_step_problem;

typedef struct {
  int32_t dtype, feature_map;
  int32_t batch, num_heads, num_kv_heads, feature_dim, value_dim;
  float a, b;
  int32_t normalize;
  const void *q, *k, *v;          // [B,H,K], [B,H_kv,K], [B,H_kv,V], last dim contiguous
  int64_t q_batch_stride, q_head_stride, k_batch_stride, k_head_stride, v_batch_stride, v_head_stride;
  const float* g;                 // [B,H_kv] or null
  int64_t g_batch_stride, g_head_stride;
  hf_linattn_state state;         // N = batch; updated in place
  void* o;                        // [B,H,V] contiguous
} hf_linattn_step_problem;

// The Hedgehog map of q or of k, and its sinks; float, contiguous, null where there is none.
typedef struct {
  const void* x;                  // [B,H,D], last dim contiguous
  int64_t x_batch_stride, x_head_stride;
  const float* weight;            // [H,D,columns + hidden_dim + magnitude]: W, W1 and u side by side
  const float* output_weight;     // [H,hidden_dim,columns]: W2, with a hidden layer
  const float* magnitude_bias;    // [H], with a magnitude
  const float* sink_weight;       // [H,D,sinks], of q with sinks
  const float* sink_bias;         // [H,sinks], likewise
  void* features;                 // [B,H,2 columns + sinks] contiguous
} hf_linattn_hedgehog_map;

typedef struct {
  int32_t dtype;                  // of x and features
  int32_t batch, num_heads, num_kv_heads, head_dim, columns, hidden_dim, sinks;
  float scale;                    // multiplies x, which is then rounded to dtype
  float far_length;               // in tokens; infinite: none
  const int64_t* positions;       // [B or 1], that of the token in its sequence
  int64_t position_stride;
  hf_linattn_hedgehog_map q, k;
} hf_linattn_hedgehog_step_problem;

// Bytes of device workspace (256-byte aligned) that the call needs; 0 is possible.
size_t hf_linattn_forward_workspace(const hf_linattn_problem* problem);
size_t hf_linattn_backward_workspace(const hf_linattn_problem* problem, const hf_linattn_gradients* gradients);

// Writes o, den [B,H,T] (null without normalize; with a window the log of the denominator) and, where its members are
// not null, the final state.
int hf_linattn_forward(const hf_linattn_problem* problem, const hf_linattn_tensor* o, float* den,
                       const hf_linattn_state* final_state, void* workspace, void* stream);
int hf_linattn_backward(const hf_linattn_problem* problem, const hf_linattn_gradients* gradients, void* workspace,
                        void* stream);
int hf_linattn_step(const hf_linattn_step_problem* problem, void* stream);
int hf_linattn_window_step(const hf_linattn_window_step_problem* problem, void* stream);
int hf_linattn_hedgehog_step(const hf_linattn_hedgehog_step_problem* problem, void* stream);

// HF_LINATTN_PATH_SM80 or _SM90 for this problem on the current device; negative when no kernel takes it (the reason
// is the last error).
int hf_linattn_path(const hf_linattn_problem* problem);

// The largest feature and value dimensions that forward and backward take on the current device in this dtype, whatever
// else the problem is; 0 when no kernel runs (the reason is the last error). hf_linattn_step takes its own everywhere.
// With a window: the same, for window.dim too.
int hf_linattn_largest_dim(int32_t dtype);
int hf_linattn_window_largest_dim(int32_t dtype);
int hf_linattn_step_largest_dim(void);

const char* hf_linattn_last_error(void);

#ifdef __cplusplus
}
#endif

#endif  // HF_LINATTN_H_
