// An entry to window_gradient.cu, which has none of its own in hf_linattn.h (emulated_window_gradient.py).
#include "launch.cuh"
#include "window_gradient.h"

extern "C" {

int probe_window_query_gradient(int dtype, const hf_linattn::WindowGradientArgs* args) {
  return hf_linattn::run_window_query_gradient(dtype, *args, nullptr);
}

int probe_window_key_gradient(int dtype, const hf_linattn::WindowGradientArgs* args) {
  return hf_linattn::run_window_key_gradient(dtype, *args, nullptr);
}

int probe_check_window_gradient(int dtype, int dim, int value_dim) {
  return hf_linattn::check_window_gradient(dtype, dim, value_dim);
}

const char* hf_linattn_last_error(void) { return hf_linattn::last_error(); }

}  // extern "C"
