"""`linear_attention` and its step on the compiled kernels: the calls, gradients and fake tensors.

The ops themselves are defined in kernels/csrc/binding_torch.cpp. The backward keeps q, k, v, o, the denominators, the
gates, the states at both ends and, of a bfloat16 o, eight more bits (hf_linattn.h): nothing that grows with T * K * V.
"""

import torch
from torch import Tensor

from hf_linattn.kernels.cuda_library import compiled_library_problem, forced_cuda_path
from hf_linattn.kernels.state import LinearAttentionState, linear_state_shapes

# kChunk and kResidualColumns of kernels/csrc/scan.h.
CHUNK, RESIDUAL_COLUMNS = 64, 32
# `feature_map` of the step op.
STEP_MAPS = {None: 0, "elu": 1, "relu": 2, "l2": 3}


def cuda_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    *,
    a: float,
    b: float,
    normalize: bool,
    causal: bool,
    initial_state: LinearAttentionState | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, LinearAttentionState | None]:
    """See `hf_linattn.kernels.linear_attention`; arguments are already checked."""
    tensors = [_unit_stride(q), _unit_stride(k), _unit_stride(v), g if g is None else g.float()]
    if initial_state is None:
        tensors += (None, None, None, None)
    else:
        tensors += (None if x is None else x.float().contiguous() for x in initial_state)
    needs_grad = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    options = (a, b, normalize, causal, output_final_state, needs_grad, forced_cuda_path())
    if needs_grad:
        o, *sums = CudaLinearAttention.apply(*tensors, cu_seqlens, options)
    else:
        o, _, _, *sums = torch.ops.hf_linattn.linear_attention_forward.default(*tensors, cu_seqlens, *options)
    if not output_final_state:
        return o, None
    return o, LinearAttentionState(*_present_sums(sums, a, normalize))


class CudaLinearAttention(torch.autograd.Function):
    """(o, *sums of the final state) of q, k, v, g and the sums of the initial state.

    Not `torch.library.register_autograd`: its Python layer costs more than 150 microseconds a call for an op with this
    many arguments.
    """

    @staticmethod
    def forward(ctx, q, k, v, g, kv, key_sum, value_sum, weight_sum, cu_seqlens, options):
        tensors = (q, k, v, g, kv, key_sum, value_sum, weight_sum, cu_seqlens)
        o, den, residual, *final = torch.ops.hf_linattn.linear_attention_forward.default(*tensors, *options)
        a, _, normalize, _, output_final_state, _, _ = options
        # d_final enters dg through <d_final, final>.
        keeps_final = output_final_state and ctx.needs_input_grad[3]
        kept = _present_sums(final, a, normalize) if keeps_final else (None,) * 4
        den, residual = (den, residual if q.dtype == torch.bfloat16 else None) if normalize else (None, None)
        ctx.save_for_backward(*tensors, o, den, residual, *kept)
        ctx.options = options
        if not torch.compiler.is_compiling():
            ctx.set_materialize_grads(False)
        return (o, *final) if output_final_state else (o,)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_o, *d_final):
        q, k, v, g, *first, cu_seqlens, o, den, residual, kv, key_sum, value_sum, weight_sum = ctx.saved_tensors
        a, b, normalize, causal, _, _, path = ctx.options
        needs_dg, needs_d_initial = ctx.needs_input_grad[3], any(ctx.needs_input_grad[4:8])
        has_d_final = any(x is not None for x in d_final)
        dq, dk, dv, dg, *d_first = torch.ops.hf_linattn.linear_attention_backward.default(
            torch.zeros_like(o) if d_o is None else _unit_stride(d_o),
            q,
            k,
            v,
            o,
            den,
            residual,
            g,
            *first,
            *(_given_state_gradient(d_final, q, k, v, cu_seqlens, a, normalize) if has_d_final else (None,) * 4),
            *((kv, key_sum, value_sum, weight_sum) if has_d_final else (None,) * 4),
            cu_seqlens,
            a,
            b,
            normalize,
            causal,
            needs_dg,
            needs_d_initial,
            path,
        )
        d_first = (dx if needs_d_initial and x is not None else None for x, dx in zip(first, d_first, strict=True))
        return dq, dk, dv, dg if needs_dg else None, *d_first, None, None


def cuda_linear_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    state: LinearAttentionState,
    *,
    a: float,
    b: float,
    normalize: bool,
    feature_map: str | None,
) -> Tensor:
    """See `hf_linattn.kernels.linear_attention_step`; arguments are already checked."""
    if not torch.compiler.is_compiling():
        # An op of C++ does not tell autograd what it writes: a backward that saved this state must notice.
        torch.autograd.graph.increment_version([x for x in state if x is not None])
    return torch.ops.hf_linattn.linear_attention_step.default(
        _unit_stride(q),
        _unit_stride(k),
        _unit_stride(v),
        g if g is None else g.float(),
        *state,
        a,
        b,
        normalize,
        STEP_MAPS[feature_map],
    )


def cuda_step_takes(state: LinearAttentionState) -> bool:
    """The step kernel writes contiguous float32 sums in place; a state of another kind needs the PyTorch step."""
    return all(x is None or (x.dtype == torch.float32 and x.is_contiguous()) for x in state)


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _empty_state(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, a: float, normalize: bool, wanted: bool):
    n = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shapes = linear_state_shapes(n, *k.shape[2:], v.shape[3], a=a, normalize=normalize)
    return tuple(q.new_empty(shape if wanted and shape is not None else (0,), dtype=torch.float32) for shape in shapes)


def _fake_linear_forward(q, k, v, g, kv, key_sum, value_sum, weight_sum, cu_seqlens, a, b, normalize, causal, *flags):
    output_final_state, keep_residual, _ = flags
    batch, tokens, heads, _ = q.shape
    o = q.new_empty(batch, tokens, heads, v.shape[3])
    den = q.new_empty((batch, heads, tokens) if normalize else (0,), dtype=torch.float32)
    chunks = batch * (-(-tokens // CHUNK)) if cu_seqlens is None else tokens // CHUNK + cu_seqlens.shape[0] - 1
    width = -(-v.shape[3] // RESIDUAL_COLUMNS) * RESIDUAL_COLUMNS
    is_kept = keep_residual and normalize and q.dtype == torch.bfloat16
    residual = q.new_empty((chunks * CHUNK * heads * width if is_kept else 0,), dtype=torch.uint8)
    return o, den, residual, *_empty_state(q, k, v, cu_seqlens, a, normalize, output_final_state)


def _fake_linear_backward(d_o, q, k, v, o, den, residual, g, *rest):
    cu_seqlens, a, b, normalize, causal, needs_dg, needs_d_initial, path = rest[-8:]
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    dg = q.new_empty(k.shape[:3] if needs_dg else (0,), dtype=torch.float32)
    return dq, dk, dv, dg, *_empty_state(q, k, v, cu_seqlens, a, normalize, needs_d_initial)


def _fake_linear_step(q, k, v, *rest):
    return q.new_empty(q.shape[0], q.shape[1], v.shape[2])


def _given_state_gradient(d_final, q, k, v, cu_seqlens, a, normalize):
    """The final state's gradient, zeros for the members that nothing read."""
    members = _empty_state(q, k, v, cu_seqlens, a, normalize, True)
    given = (x.zero_() if dx is None else dx.contiguous() for x, dx in zip(members, d_final, strict=True))
    return _present_sums(given, a, normalize)


def _present_sums(members, a, normalize):
    """The members of a state as the ops return them, None for those that this form of the op does not have."""
    needed = (True, normalize, a != 0, normalize and a != 0)
    return tuple(x if is_needed else None for x, is_needed in zip(members, needed, strict=True))


if compiled_library_problem is None:
    torch.library.register_fake("hf_linattn::linear_attention_forward", _fake_linear_forward)
    torch.library.register_fake("hf_linattn::linear_attention_backward", _fake_linear_backward)
    torch.library.register_fake("hf_linattn::linear_attention_step", _fake_linear_step)
