"""`window_linear_attention` in O(T w) time and memory: window_blocks.py + delayed linear_chunks.py, one denominator.

With LSE_i the log of the whole denominator, the far part is a linear attention whose rows weigh c_i = e^{log_scale -
LSE_i}: its backward is that of linear attention with u_i = c_i do_i and d_i = c_i (do_i . o_i). What a row adds to
dlog_scale is phi_q_i . dphi_q_i; with a constant term a, minus the sum of its window's dS, since a row's sum to zero.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from hf_linattn.kernels.dispatch import autocast_off, outside_old_graphs
from hf_linattn.kernels.linear_chunks import (
    LinearForm,
    LinearGradients,
    LinearOperands,
    chunk_size_for,
    linear_chunk_backward,
    linear_chunk_forward,
    linear_operands,
    stack_linear_sums,
    unstack_linear_sums,
)
from hf_linattn.kernels.sequence_layout import DenseChunks, PackedChunks, chunk_layout
from hf_linattn.kernels.state import LinearAttentionState, WindowLinearAttentionState, init_state, linear_sums
from hf_linattn.kernels.window_blocks import (
    window_block_backward,
    window_block_forward,
    window_block_size,
    window_operands,
)
from hf_linattn.kernels.window_ring import last_ring, prepend_ring


class WindowForm(NamedTuple):
    """Scalars of the window op."""

    window: int
    scale: float
    a: float
    b: float
    softcap: float | None


@outside_old_graphs
def chunked_window_linear_attention(
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
    sums, valid, restore = LinearAttentionState(None, None, None, None), None, None
    if initial_state is not None:
        tokens, valid, cu_seqlens, restore = prepend_ring(tokens, initial_state, cu_seqlens)
        sums = linear_sums(initial_state)
    form = (window, scale, a, b, softcap)
    o, *final = ChunkedWindowLinearAttention.apply(
        *tokens, log_scale, *sums, cu_seqlens, valid, form, output_final_state
    )
    if restore is not None:
        o = restore(o)
    if not output_final_state:
        return o, None
    if a == 0:
        final = [*final, None, None]
    return o, WindowLinearAttentionState(*final, *last_ring(tokens, valid, cu_seqlens, window))


class ChunkedWindowLinearAttention(torch.autograd.Function):
    """(o, *present far sums); the ring of an initial state has become ordinary tokens, some of them invalid."""

    @staticmethod
    def forward(
        ctx,
        q,
        k,
        v,
        phi_q,
        phi_k,
        g,
        log_scale,
        kv,
        key_sum,
        value_sum,
        weight_sum,
        cu_seqlens,
        key_is_valid,
        form,
        output_final_state,
    ):
        form = WindowForm(*form)
        blocks = chunk_layout(q, k, cu_seqlens, window_block_size(form.window, q.shape[1]))
        x = window_operands(blocks, q, k, v, key_is_valid, window=form.window, scale=form.scale, softcap=form.softcap)
        num, den, peak = window_block_forward(x)
        num, den, peak = (blocks.from_chunks(y) for y in (num, den[..., None], peak[..., None]))
        sums = None if kv is None else LinearAttentionState(kv, key_sum, value_sum, weight_sum)
        # A single query beyond the window is enough to need the far part; so is a state to hand on.
        far, layout = None, None
        if q.shape[1] > form.window or sums is not None:
            layout = chunk_layout(phi_q, phi_k, cu_seqlens, chunk_size_for(phi_q.shape[-1]), delay=form.window)
            operands, boundary = _far_operands(layout, phi_q, phi_k, v, g, sums, key_is_valid, form)
            far = linear_chunk_forward(layout, operands, boundary, _far_form(form))
            far_num = layout.from_chunks(far[0], is_query=True)
            far_den = layout.from_chunks(far[1][..., None], is_query=True)
            num, den, peak = _merge_far(num, den, peak, far_num, far_den, log_scale)
        if cu_seqlens is not None:
            # Tokens behind the last boundary have no key, not even their own.
            den = den.masked_fill(den == 0, 1)
        o = num.div_(den).to(q.dtype).contiguous()
        lse = (peak + den.log())[..., 0]
        ctx.save_for_backward(
            q, k, v, phi_q, phi_k, g, log_scale, kv, key_sum, value_sum, weight_sum, key_is_valid, o, lse
        )
        ctx.form, ctx.blocks, ctx.layout = form, blocks, layout
        if not output_final_state:
            return (o,)
        if far is None:
            count = q.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
            shape = (count, k.shape[2], phi_k.shape[3], v.shape[3])
            final = init_state(*shape, a=form.a, dtype=lse.dtype, device=q.device)
        else:
            final = unstack_linear_sums(far[2], operands, _far_form(form))
        final = tuple(s for s in final if s is not None)
        ctx.mark_non_differentiable(*final)
        return (o, *final)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do, *_):
        # Unpacked once: activation checkpointing recomputes on the first access and allows no second.
        (q, k, v, phi_q, phi_k, g, log_scale, *sums, key_is_valid, o, lse) = ctx.saved_tensors
        form, blocks, layout = ctx.form, ctx.blocks, ctx.layout
        with autocast_off(q.device):
            x = window_operands(
                blocks, q, k, v, key_is_valid, window=form.window, scale=form.scale, softcap=form.softcap
            )
            delta = (do.to(x.acc) * o).sum(-1)
            dq, dk, dv, near_row = window_block_backward(blocks, x, do, lse, delta)
            far_row = -blocks.from_chunks(near_row[..., None])[..., 0]
            dq, dk, dv = blocks.from_chunks(dq.to(q.dtype)), blocks.from_chunks(dk.to(k.dtype)), blocks.from_chunks(dv)
            dphi_q, dphi_k, dg, dlog_scale = (
                None if y is None else torch.zeros_like(y) for y in (phi_q, phi_k, g, log_scale)
            )
            if layout is not None:
                sums = None if sums[0] is None else LinearAttentionState(*sums)
                operands, boundary = _far_operands(layout, phi_q, phi_k, v, g, sums, key_is_valid, form)
                weight = _far_factor(log_scale, lse)
                grads: LinearGradients = linear_chunk_backward(
                    layout,
                    operands,
                    boundary,
                    _far_form(form),
                    weight[..., None] * do.to(x.acc),
                    -weight * delta,
                    far_row,
                    None,
                )
                dphi_q = layout.from_chunks(grads.q.to(q.dtype), is_query=True)
                dphi_k = layout.from_chunks(grads.k.to(k.dtype))
                dv = dv + layout.from_chunks(grads.v)
                dg = None if g is None else layout.from_chunks(grads.log_decay[..., None])[..., 0].to(g.dtype)
                if log_scale is not None:
                    if form.a == 0:
                        # phi_q . dphi_q is the same; far_row is a small difference of what rounding leaves of o.
                        far_row = (operands.q[..., : phi_q.shape[-1]] * grads.q).sum(-1, keepdim=True)
                        far_row = layout.from_chunks(far_row, is_query=True)[..., 0]
                    dlog_scale = far_row.sum((0, 1)).to(log_scale.dtype)
        return dq, dk, dv.to(v.dtype), dphi_q, dphi_k, dg, dlog_scale, *(None,) * 8


def _far_form(form: WindowForm) -> LinearForm:
    return LinearForm(form.a, form.b, normalize=True, causal=True)


def _far_operands(
    layout: DenseChunks | PackedChunks,
    phi_q: Tensor,
    phi_k: Tensor,
    v: Tensor,
    g: Tensor | None,
    sums: LinearAttentionState | None,
    key_is_valid: Tensor | None,
    form: WindowForm,
) -> tuple[LinearOperands, Tensor | None]:
    operands = linear_operands(layout, phi_q, phi_k, v, g, key_is_valid, _far_form(form))
    return operands, None if sums is None else stack_linear_sums(sums, operands)


def _merge_far(
    num: Tensor, den: Tensor, peak: Tensor, far_num: Tensor, far_den: Tensor, log_scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of both parts relative to one peak; `[B, T, H, V]` and `[B, T, H, 1]`."""
    tiny = torch.finfo(far_den.dtype).tiny
    far_log = far_den.clamp(min=tiny).log()
    if log_scale is not None:
        far_log = far_log + log_scale.to(far_log.dtype)[:, None]
    top = torch.maximum(peak, far_log.masked_fill(far_den <= tiny, float("-inf")))
    near, far = (peak - top).exp_(), _far_factor(log_scale, top[..., 0])[..., None]
    return num.mul_(near).addcmul_(far, far_num), near * den + far * far_den, top


def _far_factor(log_scale: Tensor | None, log_weight: Tensor) -> Tensor:
    """e^{log_scale - log_weight} `[B, T, H]`; at most 1 / tiny, reached only where no far key has weight."""
    shift = -log_weight if log_scale is None else log_scale.to(log_weight.dtype) - log_weight
    return shift.clamp(max=-math.log(torch.finfo(log_weight.dtype).tiny)).exp()
