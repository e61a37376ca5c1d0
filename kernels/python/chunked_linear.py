"""`linear_attention` in O(T) time and memory: linear_chunks.py between one forward and one analytic backward.

The backward saves q, k, v, o, the denominators and the gates; the states of the chunks are formed again.
"""

import torch
from torch import Tensor

from hf_linattn.kernels.dispatch import autocast_off, outside_old_graphs
from hf_linattn.kernels.linear_chunks import (
    LinearForm,
    chunk_size_for,
    linear_chunk_backward,
    linear_chunk_forward,
    linear_operands,
    stack_linear_sums,
    unstack_linear_sums,
)
from hf_linattn.kernels.reference import DENOMINATOR_EPS, guarded_denominator
from hf_linattn.kernels.sequence_layout import chunk_layout
from hf_linattn.kernels.state import LinearAttentionState


@outside_old_graphs
def chunked_linear_attention(
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
    form = (a, b, normalize, causal)
    first = (None,) * 4 if initial_state is None else tuple(initial_state)
    o, *sums = ChunkedLinearAttention.apply(q, k, v, g, *first, cu_seqlens, form, output_final_state)
    if not output_final_state:
        return o, None
    present = iter(sums)
    needed = (True, normalize, a != 0, normalize and a != 0)
    return o, LinearAttentionState(*(next(present) if is_needed else None for is_needed in needed))


class ChunkedLinearAttention(torch.autograd.Function):
    """(o, *present sums of the final state) of q, k, v, g and the sums of the initial state."""

    @staticmethod
    def forward(ctx, q, k, v, g, kv, key_sum, value_sum, weight_sum, cu_seqlens, form, output_final_state):
        form = LinearForm(*form)
        layout = chunk_layout(q, k, cu_seqlens, chunk_size_for(q.shape[-1]))
        x = linear_operands(layout, q, k, v, g, None, form)
        first = None if kv is None else LinearAttentionState(kv, key_sum, value_sum, weight_sum)
        boundary = None if first is None else stack_linear_sums(first, x)
        num, den, final = linear_chunk_forward(layout, x, boundary, form)
        if form.normalize:
            num = num.div_(guarded_denominator(den)[..., None])
            den = layout.from_chunks(den[..., None], is_query=True)[..., 0]
        o = layout.from_chunks(num.to(q.dtype), is_query=True).contiguous()
        ctx.save_for_backward(q, k, v, g, kv, key_sum, value_sum, weight_sum, o, den)
        ctx.form, ctx.layout, ctx.output_final_state = form, layout, output_final_state
        if not output_final_state:
            return (o,)
        return (o, *(s for s in unstack_linear_sums(final, x, form) if s is not None))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do, *final_gradients):
        q, k, v, g, kv, key_sum, value_sum, weight_sum, o, den = ctx.saved_tensors
        form, layout = ctx.form, ctx.layout
        with autocast_off(q.device):
            x = linear_operands(layout, q, k, v, g, None, form)
            first = LinearAttentionState(kv, key_sum, value_sum, weight_sum)
            boundary = None if kv is None else stack_linear_sums(first, x)
            final_gradient = None
            if ctx.output_final_state:
                given = iter(final_gradients)
                needed = (True, form.normalize, form.a != 0, form.normalize and form.a != 0)
                sums = LinearAttentionState(*(next(given) if is_needed else None for is_needed in needed))
                final_gradient = stack_linear_sums(sums, x, ones=1)
            u, minus_d, row_term = _row_gradients(do.to(x.acc), o, den, g is not None)
            grads = linear_chunk_backward(layout, x, boundary, form, u, minus_d, row_term, final_gradient)
            dq = layout.from_chunks(grads.q.to(q.dtype), is_query=True)
            dk = layout.from_chunks(grads.k.to(k.dtype))
            dv = layout.from_chunks(grads.v.to(v.dtype))
            dg = None if g is None else layout.from_chunks(grads.log_decay[..., None])[..., 0].to(g.dtype)
            d_first = (None,) * 4
            if kv is not None:
                sums = unstack_linear_sums(grads.boundary, x, form, is_gradient=True)
                d_first = tuple(None if s is None else ds.to(s.dtype) for s, ds in zip(first, sums, strict=True))
        return dq, dk, dv, dg, *d_first, None, None, None


def _row_gradients(
    do: Tensor, o: Tensor, den: Tensor | None, has_decay: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of numerators `[B, T, H, V]` and denominators `[B, T, H]`, and what each row adds to its dG."""
    along = (do * o).sum(-1)
    if den is None:
        return do, None, along if has_decay else None
    # Scaling all weights of a row leaves its quotient alone, unless the denominator is held at its floor.
    is_held = den.abs() < DENOMINATOR_EPS
    safe = guarded_denominator(den)
    row_term = along.masked_fill(~is_held, 0) if has_decay else None
    return do / safe[..., None], (-along / safe).masked_fill(is_held, 0), row_term
