"""One token of `window_linear_attention` on the compiled kernels: the call and its fake tensor.

The op is defined in kernels/csrc/binding_torch.cpp; it writes every member of the state in place, `slot` included.
"""

import torch
from torch import Tensor

from hf_linattn.kernels.cuda_library import has_compiled_op
from hf_linattn.kernels.cuda_linear import unit_stride
from hf_linattn.kernels.dispatch import Unsupported
from hf_linattn.kernels.state import WindowLinearAttentionState, linear_sums

LARGEST_WINDOW = 16384  # kMaxWindow of csrc/window_step.cu

if has_compiled_op("window_linear_attention_step"):
    _window_step = torch.ops.hf_linattn.window_linear_attention_step.default


def cuda_window_linear_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    phi_q: Tensor,
    phi_k: Tensor,
    g: Tensor | None,
    state: WindowLinearAttentionState,
    log_scale: Tensor | None,
    *,
    scale: float,
    a: float,
    b: float,
    softcap: float | None,
) -> Tensor:
    """See `hf_linattn.kernels.window_linear_attention_step`; arguments are already checked."""
    if not torch.compiler.is_compiling():
        # An op of C++ does not tell autograd what it writes.
        torch.autograd.graph.increment_version([x for x in state if x is not None])
    return _window_step(
        *(unit_stride(x) for x in (q, k, v, phi_q, phi_k)),
        g if g is None else g.float(),
        log_scale if log_scale is None else log_scale.float().contiguous(),
        *state,
        scale,
        a,
        b,
        0.0 if softcap is None else softcap,
    )


def unsupported_by_cuda_window_step(state: WindowLinearAttentionState, dtype: torch.dtype) -> Unsupported | None:
    """What keeps a state off the kernel, or None.

    It writes contiguous float32 sums and a contiguous ring in `dtype`, that of the inputs, in place, and holds the
    ring's logits in shared memory.
    """
    float32 = (*linear_sums(state), state.window_g)
    ring = (state.window_k, state.window_v, state.window_phi_k)
    if (
        state.window_k.shape[1] <= LARGEST_WINDOW
        and all(x is None or x.dtype == torch.float32 for x in float32)
        and all(x.dtype == dtype for x in ring)
        and state.window_valid.dtype == torch.bool
        and state.slot.dtype == torch.int64
        and all(x is None or x.is_contiguous() for x in state)
    ):
        return None
    expected = (
        f"contiguous float32 sums and a contiguous ring of the inputs' dtype, at most {LARGEST_WINDOW} slots long,"
    )
    return Unsupported("state", expected, "another", "make it so")


def _fake_window_step(q, k, v, *rest):
    return q.new_empty(q.shape[0], q.shape[1], v.shape[2])


if has_compiled_op("window_linear_attention_step"):
    torch.library.register_fake("hf_linattn::window_linear_attention_step", _fake_window_step)
