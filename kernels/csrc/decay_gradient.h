// dg of linear attention from the terms the scans leave behind.
#ifndef HF_LINATTN_DECAY_GRADIENT_H_
#define HF_LINATTN_DECAY_GRADIENT_H_

#include "hf_linattn.h"

namespace hf_linattn {

// columns [ceil(V/32), B, H_kv, T]: v . dv + dvone of every token, in parts to be summed. along [B, H, T] or null: do . o.
int run_decay_gradient(const hf_linattn_problem* problem, const hf_linattn_gradients* gradients, const float* columns,
                       const float* along, void* stream);

}  // namespace hf_linattn

#endif  // HF_LINATTN_DECAY_GRADIENT_H_
