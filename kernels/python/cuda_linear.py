"""`linear_attention` and its step on the compiled kernels: the calls, gradients and fake tensors.

The ops themselves are defined in kernels/csrc/binding_torch.cpp. The backward keeps q, k, v, the denominators, the
gates and the initial state: nothing that grows with T * K * V.
"""

import torch
from torch import Tensor

from hf_linattn.kernels.cuda_library import compiled_library_problem, forced_cuda_path
from hf_linattn.kernels.dispatch import Unsupported, where_grad_is_on
from hf_linattn.kernels.state import LinearAttentionState, linear_state_shapes

# `feature_map` of the step op.
STEP_MAPS = {None: 0, "elu": 1, "relu": 2, "l2": 3}

if compiled_library_problem is None:
    _linear_forward = torch.ops.hf_linattn.linear_attention_forward.default
    _linear_backward = torch.ops.hf_linattn.linear_attention_backward.default
    _linear_step = torch.ops.hf_linattn.linear_attention_step.default


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
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    if g is not None:
        g = g.float()
    first = [] if initial_state is None else [x.float().contiguous() for x in initial_state if x is not None]
    needs_grad = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, g, *first))
    options = (a, b, normalize, causal, output_final_state, forced_cuda_path())
    if not needs_grad:
        o, _, final = _linear_forward(q, k, v, g, first, cu_seqlens, *options)
    else:
        o, *final = CudaLinearAttention.apply(options, cu_seqlens, q, k, v, g, *first)
    return o, _as_state(final, a, normalize) if output_final_state else None


class CudaLinearAttention(torch.autograd.Function):
    """(o, *members of the final state) of q, k, v, g and the members of the initial state.

    Not `torch.library.register_autograd`: its Python layer costs more than 150 microseconds a call for an op with this
    many arguments. Every argument, saved tensor and output costs some here too, so that absent members are left out.
    """

    @staticmethod
    def forward(ctx, options, cu_seqlens, q, k, v, g, *first):
        _, _, _, _, output_final_state, _ = options
        o, den, final = _linear_forward(q, k, v, g, first, cu_seqlens, *options)
        ctx.save_for_backward(cu_seqlens, q, k, v, g, den, *first)
        ctx.options = options
        if output_final_state and not torch.compiler.is_compiling():
            ctx.set_materialize_grads(False)
        return o, *final

    @staticmethod
    @where_grad_is_on(torch.autograd.function.once_differentiable)
    def backward(ctx, d_o, *d_final):
        cu_seqlens, q, k, v, g, den, *first = ctx.saved_tensors
        a, b, normalize, causal, _, path = ctx.options
        needs_dg, *needs_d_first = ctx.needs_input_grad[5:]
        has_d_final = any(x is not None for x in d_final)
        dq, dk, dv, dg, d_first = _linear_backward(
            q.new_zeros(*q.shape[:3], v.shape[3]) if d_o is None else unit_stride(d_o),
            q,
            k,
            v,
            den,
            g,
            first,
            _given_state_gradient(d_final, q, k, v, cu_seqlens, a, normalize) if has_d_final else [],
            cu_seqlens,
            a,
            b,
            normalize,
            causal,
            needs_dg,
            any(needs_d_first),
            path,
        )
        return None, None, dq, dk, dv, dg, *(d_first or [None] * len(first))


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
    return _linear_step(
        unit_stride(q),
        unit_stride(k),
        unit_stride(v),
        g if g is None else g.float(),
        *state,
        a,
        b,
        normalize,
        STEP_MAPS[feature_map],
    )


def unsupported_by_cuda_step(state: LinearAttentionState) -> Unsupported | None:
    """What keeps a state off the step kernel, which writes contiguous float32 sums in place."""
    if all(x is None or (x.dtype == torch.float32 and x.is_contiguous()) for x in state):
        return None
    return Unsupported("state", "contiguous float32 tensors", "others", "make them so")


def unit_stride(x: Tensor) -> Tensor:
    """x with a contiguous last dimension, copied only where it has none: the kernels read any other strides."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _member_shapes(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, a: float, normalize: bool) -> list:
    """Shapes of the members that a state has in this form of the op; the ops take and return a list of just these."""
    n = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shapes = linear_state_shapes(n, *k.shape[2:], v.shape[3], a=a, normalize=normalize)
    return [shape for shape in shapes if shape is not None]


def _as_state(members: list[Tensor], a: float, normalize: bool) -> LinearAttentionState:
    """The state with these members, None for those that this form of the op does not have."""
    rest = iter(members)
    return LinearAttentionState(
        kv=next(rest),
        key_sum=next(rest) if normalize else None,
        value_sum=next(rest) if a != 0 else None,
        weight_sum=next(rest) if normalize and a != 0 else None,
    )


def _given_state_gradient(d_final, q, k, v, cu_seqlens, a, normalize):
    """The final state's gradient, zeros for the members that nothing read."""
    shapes = _member_shapes(q, k, v, cu_seqlens, a, normalize)
    return [
        q.new_zeros(shape, dtype=torch.float32) if dx is None else dx.contiguous()
        for shape, dx in zip(shapes, d_final, strict=True)
    ]


def fake_state(is_wanted: bool, q: Tensor, *form) -> list[Tensor]:
    """Fake members of a state, none where it is not wanted; `form` as `_member_shapes` has it."""
    return [q.new_empty(shape, dtype=torch.float32) for shape in _member_shapes(q, *form)] if is_wanted else []


def _fake_linear_forward(q, k, v, g, initial_state, cu_seqlens, a, b, normalize, causal, *flags):
    output_final_state, _ = flags
    batch, tokens, heads, _ = q.shape
    o = q.new_empty(batch, tokens, heads, v.shape[3])
    den = q.new_empty((batch, heads, tokens), dtype=torch.float32) if normalize else None
    return o, den, fake_state(output_final_state, q, k, v, cu_seqlens, a, normalize)


def _fake_linear_backward(d_o, q, k, v, den, g, initial_state, d_final_state, *rest):
    cu_seqlens, a, b, normalize, causal, needs_dg, needs_d_initial_state, path = rest
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    dg = q.new_empty(k.shape[:3], dtype=torch.float32) if needs_dg else None
    return dq, dk, dv, dg, fake_state(needs_d_initial_state, q, k, v, cu_seqlens, a, normalize)


def _fake_linear_step(q, k, v, *rest):
    return q.new_empty(q.shape[0], q.shape[1], v.shape[2])


if compiled_library_problem is None:
    torch.library.register_fake("hf_linattn::linear_attention_forward", _fake_linear_forward)
    torch.library.register_fake("hf_linattn::linear_attention_backward", _fake_linear_backward)
    torch.library.register_fake("hf_linattn::linear_attention_step", _fake_linear_step)
