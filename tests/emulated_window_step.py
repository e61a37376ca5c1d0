"""window_step.cu on a CPU, as tests/emulated_kernels.py has the other kernels."""

import ctypes

from emulated_kernels import DTYPES, Buffers, State, call_kernel, describe_state, load_parts, pointer, row_strides
from torch import Tensor

from hf_linattn.kernels import WindowLinearAttentionState
from hf_linattn.kernels.state import linear_sums

INPUTS = ("q", "k", "v", "phi_q", "phi_k")


class _WindowStepProblem(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in ("dtype", "batch", "num_heads", "num_kv_heads", "feature_dim")),
        *((name, ctypes.c_int32) for name in ("value_dim", "window", "window_dim")),
        *((name, ctypes.c_float) for name in ("a", "b", "scale", "softcap")),
        *((name, ctypes.c_void_p) for name in INPUTS),
        *((f"{x}_{axis}_stride", ctypes.c_int64) for x in INPUTS for axis in ("batch", "head")),
        ("g", ctypes.c_void_p),
        *((f"g_{axis}_stride", ctypes.c_int64) for axis in ("batch", "head")),
        ("log_scale", ctypes.c_void_p),
        ("state", State),
        *((name, ctypes.c_void_p) for name in ("ring_k", "ring_v", "ring_phi_k", "ring_g", "ring_valid", "slot", "o")),
    ]


def window_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    phi_q: Tensor,
    phi_k: Tensor,
    state: WindowLinearAttentionState,
    g: Tensor | None = None,
    log_scale: Tensor | None = None,
    *,
    scale: float,
    a: float = 0.0,
    b: float = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, WindowLinearAttentionState]:
    """o `[B, H, V]` and the new state; the one given is left as it is."""
    buffers = Buffers()
    o = buffers.empty(*q.shape[:2], v.shape[2], dtype=q.dtype)
    new = WindowLinearAttentionState(*(None if x is None else buffers.copy(x) for x in state))
    inputs = dict(zip(INPUTS, (q, k, v, phi_q, phi_k), strict=True))
    problem = _WindowStepProblem(
        dtype=DTYPES[q.dtype],
        batch=q.shape[0],
        num_heads=q.shape[1],
        num_kv_heads=k.shape[1],
        feature_dim=phi_q.shape[2],
        value_dim=v.shape[2],
        window=state.window_k.shape[1],
        window_dim=q.shape[2],
        a=a,
        b=b,
        scale=scale,
        softcap=softcap or 0.0,
        g=pointer(g),
        log_scale=pointer(log_scale),
        state=describe_state(linear_sums(new)),
        ring_k=pointer(new.window_k),
        ring_v=pointer(new.window_v),
        ring_phi_k=pointer(new.window_phi_k),
        ring_g=pointer(new.window_g),
        ring_valid=pointer(new.window_valid),
        slot=pointer(new.slot),
        o=pointer(o),
        **{name: pointer(x) for name, x in inputs.items()},
        **row_strides({**inputs, "g": g}),
    )
    call_kernel(load_parts(), "hf_linattn_window_step", ctypes.byref(problem), None)
    buffers.check()
    return o, new
