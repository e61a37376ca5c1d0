"""`window_linear_attention` on the compiled kernels: the calls, gradients and fake tensors.

The ops themselves are defined in kernels/csrc/binding_torch.cpp. The backward keeps the inputs, the output and the log
of the denominators: nothing that grows with T * w or T * K * V. States are constants to it, as in the chunked form.
"""

import torch
from torch import Tensor

from hf_linattn.kernels.cuda_library import forced_cuda_path, has_compiled_op
from hf_linattn.kernels.cuda_linear import fake_state, unit_stride
from hf_linattn.kernels.dispatch import Unsupported, where_grad_is_on
from hf_linattn.kernels.state import WindowLinearAttentionState, linear_sums
from hf_linattn.kernels.window_ring import last_ring, prepend_ring

if has_compiled_op("window_linear_attention"):
    _window_forward = torch.ops.hf_linattn.window_linear_attention_forward.default
    _window_backward = torch.ops.hf_linattn.window_linear_attention_backward.default


def unsupported_by_cuda_window(
    g: Tensor | None, g_gamma: Tensor | None, a: float, initial_state: WindowLinearAttentionState | None
) -> Unsupported | None:
    """The argument that keeps a call of `window_linear_attention` off the compiled kernels, or None."""
    if torch.is_grad_enabled():
        for name, decay in (("g", g), ("g_gamma", g_gamma)):
            if decay is not None and decay.requires_grad:
                return Unsupported(name, "a decay without gradient", "one that requires grad", "detach it")
    if a != 0 and initial_state is not None:
        # Entries of its ring that do not count would add a to the far weights all the same.
        return Unsupported("initial_state", "None together with a constant term a", "a state", "set a to 0")
    return None


def cuda_window_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    phi_q: Tensor,
    phi_k: Tensor,
    g: Tensor | None,
    log_scale: Tensor | None,
    *,
    window: int,
    scale: float,
    a: float,
    b: float,
    softcap: float | None,
    initial_state: WindowLinearAttentionState | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, WindowLinearAttentionState | None]:
    """See `hf_linattn.kernels.window_linear_attention`; arguments are already checked."""
    tokens = (q, k, v, phi_q, phi_k, g)
    first, valid, restore = [], None, None
    if initial_state is not None:
        tokens, valid, cu_seqlens, restore = prepend_ring(tokens, initial_state, cu_seqlens)
        first = [x.float().contiguous() for x in linear_sums(initial_state) if x is not None]
    *rows, decay = tokens
    rows = [unit_stride(x) for x in rows]
    if decay is not None:
        decay = decay.float()
    if log_scale is not None:
        log_scale = log_scale.float().contiguous()
    needs_grad = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (*rows, log_scale))
    # The backward reads what is left out without it.
    first_query = 0 if restore is None or needs_grad else window
    options = (window, scale, softcap or 0.0, a, b, output_final_state, first_query, forced_cuda_path())
    if needs_grad:
        o, *final = CudaWindowLinearAttention.apply(options, cu_seqlens, valid, decay, log_scale, *rows, *first)
    else:
        o, _, final = _window_forward(*rows, decay, log_scale, first, valid, cu_seqlens, *options)
    if restore is not None:
        o = restore(o)
    if not output_final_state:
        return o, None
    if a == 0:
        final = [*final, None, None]
    return o, WindowLinearAttentionState(*final, *last_ring(tokens, valid, cu_seqlens, window))


class CudaWindowLinearAttention(torch.autograd.Function):
    """(o, *present sums of the final state); see `CudaLinearAttention` for why it is written like this."""

    @staticmethod
    def forward(ctx, options, cu_seqlens, key_valid, g, log_scale, q, k, v, phi_q, phi_k, *first):
        o, lse, final = _window_forward(q, k, v, phi_q, phi_k, g, log_scale, first, key_valid, cu_seqlens, *options)
        ctx.save_for_backward(cu_seqlens, key_valid, g, log_scale, q, k, v, phi_q, phi_k, o, lse, *first)
        ctx.options = options
        if final:
            ctx.mark_non_differentiable(*final)
            if not torch.compiler.is_compiling():
                ctx.set_materialize_grads(False)
        return o, *final

    @staticmethod
    @where_grad_is_on(torch.autograd.function.once_differentiable)
    def backward(ctx, d_o, *_):
        cu_seqlens, key_valid, g, log_scale, q, k, v, phi_q, phi_k, o, lse, *first = ctx.saved_tensors
        window, scale, softcap, a, b, *_, path = ctx.options
        *d_rows, d_log_scale = _window_backward(
            torch.zeros_like(o) if d_o is None else unit_stride(d_o),
            q,
            k,
            v,
            phi_q,
            phi_k,
            o,
            lse,
            g,
            log_scale,
            first,
            key_valid,
            cu_seqlens,
            window,
            scale,
            softcap,
            a,
            b,
            ctx.needs_input_grad[4],
            path,
        )
        if d_log_scale is not None:
            d_log_scale = d_log_scale.sum((0, 1, 3))
        return None, None, None, None, d_log_scale, *d_rows, *[None] * len(first)


def _fake_window_forward(q, k, v, phi_q, phi_k, *rest):
    _, _, _, _, cu_seqlens, _, _, _, a, _, output_final_state, _, _ = rest
    batch, tokens, heads, _ = q.shape
    o = q.new_empty(batch, tokens, heads, v.shape[3])
    lse = q.new_empty((batch, heads, tokens), dtype=torch.float32)
    return o, lse, fake_state(output_final_state, q, phi_k, v, cu_seqlens, a, True)


def _fake_window_backward(d_o, q, k, v, phi_q, phi_k, o, lse, *rest):
    needs_d_log_scale = rest[-2]
    # Parts, one for every 32 features.
    d_log_scale = lse.new_empty((-(-phi_q.shape[3] // 32), *lse.shape)) if needs_d_log_scale else None
    return *(x.new_empty(x.shape) for x in (q, k, v, phi_q, phi_k)), d_log_scale


if has_compiled_op("window_linear_attention"):
    torch.library.register_fake("hf_linattn::window_linear_attention_forward", _fake_window_forward)
    torch.library.register_fake("hf_linattn::window_linear_attention_backward", _fake_window_backward)
