"""The window op's kernels on a CPU, as tests/emulated_kernels.py has those of linear attention."""

import ctypes
from typing import NamedTuple

import torch
from emulated_kernels import (
    Buffers,
    Gradients,
    WindowPart,
    describe_problem,
    describe_tensor,
    empty_state,
    load_kernels,
    pointer,
    run_backward,
    run_forward,
)
from torch import Tensor

from hf_linattn.kernels import LinearAttentionState


class WindowCall(NamedTuple):
    """Arguments of one call, as `hf_linattn_problem` has them.

    Attributes:
        q, k, v, phi_q, phi_k, g, log_scale, cu_seqlens, window, scale, softcap, a, b: as in
            `hf_linattn.kernels.window_linear_attention`.
        key_valid: bool `[B, T]`; False hides a key from every query but its own.
        initial_sums: those of the keys that left the window before the first token.
        first_query: of the forward; so many tokens that each sequence begins with have no query.
        path: kernels to force.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    phi_q: Tensor
    phi_k: Tensor
    g: Tensor | None = None
    log_scale: Tensor | None = None
    key_valid: Tensor | None = None
    initial_sums: LinearAttentionState | None = None
    cu_seqlens: Tensor | None = None
    window: int = 64
    scale: float = 1.0
    softcap: float = 0.0
    a: float = 0.0
    b: float = 1.0
    first_query: int = 0
    path: str = "auto"


def window_forward(
    call: WindowCall, output_final_state: bool = False
) -> tuple[Tensor, Tensor, LinearAttentionState | None]:
    """o `[B, T, H, V]`, the log of the denominators `[B, H, T]`, sums of the final state (None unless asked)."""
    problem, buffers = _describe_call(call), Buffers()
    o = buffers.empty(*call.q.shape[:3], call.v.shape[3], dtype=call.q.dtype)
    lse = buffers.empty(call.q.shape[0], call.q.shape[2], call.q.shape[1], dtype=torch.float32)
    final = empty_state(buffers, problem) if output_final_state else None
    run_forward(buffers, problem, o, lse, final)
    return o, lse, final


def window_backward(
    call: WindowCall, d_o: Tensor, o: Tensor, lse: Tensor, needs_d_log_scale: bool = True
) -> dict[str, Tensor]:
    """dq, dk, dv, dphi_q, dphi_k as their inputs, and, where asked, dlog_scale `[B, H, T]`: a term of every row."""
    problem, buffers = _describe_call(call), Buffers()
    inputs = {"dq": call.q, "dk": call.k, "dv": call.v, "dphi_q": call.phi_q, "dphi_k": call.phi_k}
    grads = {name: buffers.empty(*x.shape, dtype=x.dtype) for name, x in inputs.items()}
    parts = None
    if needs_d_log_scale:
        parts = buffers.empty(-(-call.phi_q.shape[3] // 32), *lse.shape, dtype=torch.float32)
        if call.cu_seqlens is not None:
            parts[..., int(call.cu_seqlens[-1]) :] = 0
    gradients = Gradients(
        d_o=describe_tensor(d_o),
        den=pointer(lse),
        dq=describe_tensor(grads["dphi_q"]),
        dk=describe_tensor(grads["dphi_k"]),
        dv=describe_tensor(grads["dv"]),
        o=describe_tensor(o),
        d_window_q=describe_tensor(grads["dq"]),
        d_window_k=describe_tensor(grads["dk"]),
        d_log_scale=pointer(parts),
    )
    run_backward(buffers, problem, gradients)
    return grads if parts is None else grads | {"dlog_scale": parts.sum(0)}


def window_path(call: WindowCall) -> str:
    """Which kernels run the call, "sm80" or "sm90".

    Raises:
        RuntimeError: no kernel takes the problem.
    """
    chosen = load_kernels().hf_linattn_path(ctypes.byref(_describe_call(call)))
    if chosen < 0:
        raise RuntimeError(f"hf_linattn_path: {load_kernels().hf_linattn_last_error().decode()}")
    return {1: "sm80", 2: "sm90"}[chosen]


def _describe_call(call: WindowCall):
    rows = (call.phi_q, call.phi_k, call.v, call.g, call.a, call.b)
    problem = describe_problem(*rows, True, True, call.initial_sums, call.cu_seqlens, call.path)
    problem.window = WindowPart(
        size=call.window,
        dim=call.q.shape[3],
        first_query=call.first_query,
        scale=call.scale,
        softcap=call.softcap,
        q=describe_tensor(call.q),
        k=describe_tensor(call.k),
        log_scale=pointer(call.log_scale),
        key_valid=pointer(call.key_valid),
    )
    return problem
