"""Softmax attention over a sliding window, by blocks of queries against their own and the previous block of keys.

Block layout is the chunk layout of sequence_layout.py with C >= w, so that w keys back never reach further than one
block. Scores are `[M, G * C, 2 C]`: O(T w), never T x T.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from hf_linattn.kernels.linear_chunks import chunk_matmul, chunk_operand_dtype
from hf_linattn.kernels.sequence_layout import DenseChunks, PackedChunks

MIN_BLOCK = 64
BLOCK_STEP = 16


class WindowOperands(NamedTuple):
    """Block layout of one call, M = Z * n; keys and values of the previous block come first (J = C or 2 C).

    Attributes:
        q: `[M, G * C, D]`.
        k: `[M, J, D]`.
        v: `[M, J, V]`.
        bias: `[B | 1, 1, n, 1, C, J]`, -inf for keys outside the window, invalid, or of another sequence, else 0.
        scale: factor of the logits.
        softcap: bound of the logits or None.
        batch: B.
        acc: dtype of logits and sums.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor
    scale: float
    softcap: float | None
    batch: int
    acc: torch.dtype


def window_block_size(window: int, tokens: int) -> int:
    """At least `window`, unless one block holds all tokens; small windows share blocks big enough for matrix units."""
    return _block_ceil(min(max(MIN_BLOCK, window), max(tokens, 1)))


def window_operands(
    layout: DenseChunks | PackedChunks,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_is_valid: Tensor | None,
    *,
    window: int,
    scale: float,
    softcap: float | None,
) -> WindowOperands:
    """Bring `[B, T, H, *]` inputs into block layout, keys and values with their predecessors.

    Args:
        layout: how sequences are cut into blocks.
        q: `[B, T, H, D]`.
        k: `[B, T, H_kv, D]`.
        v: `[B, T, H_kv, V]`.
        key_is_valid: bool `[B, T]`, or None if all keys count.
        window: number of keys of a query, its own included.
        scale: factor of q . k.
        softcap: bound of the logits or None.
    """
    dtype, acc = chunk_operand_dtype(q), torch.float64 if q.dtype == torch.float64 else torch.float32
    block, device = layout.chunk, q.device
    own = torch.arange(block, device=device)
    keys = own if layout.num_chunks == 1 else torch.arange(-block, block, device=device)
    inside = (keys <= own[:, None]) & (keys > own[:, None] - window)
    # The first block of a sequence has none before it. Rows behind a sequence's end are later than all its tokens.
    seen = inside & ((keys >= 0) | ~layout.is_first[:, None])[:, None]
    seen = seen.view(1, 1, layout.num_chunks, 1, block, -1)
    if key_is_valid is not None:
        valid = layout.to_chunks(key_is_valid[..., None, None].expand(*k.shape[:3], 1), acc)
        valid = _with_previous_block(layout, valid) > 0
        valid = valid.view(layout.batch, layout.num_kv_heads, layout.num_chunks, 1, 1, -1)[:, :1]
        # A query always sees itself: rows of invalid keys stay finite.
        seen = seen & valid | (keys == own[:, None])
    # 0 and -inf are exact in bfloat16.
    bias = torch.zeros(seen.shape, dtype=torch.bfloat16, device=device).masked_fill_(~seen, float("-inf"))
    return WindowOperands(
        layout.to_chunks(q, dtype),
        _with_previous_block(layout, layout.to_chunks(k, dtype)),
        _with_previous_block(layout, layout.to_chunks(v, dtype)),
        bias,
        scale,
        softcap,
        layout.batch,
        acc,
    )


def window_block_forward(x: WindowOperands) -> tuple[Tensor, Tensor, Tensor]:
    """(sum of e^{s - peak} v `[M, G * C, V]`, sum of e^{s - peak} `[M, G * C]`, peak `[M, G * C]`)."""
    logits, _ = _window_logits(x, with_slope=False)
    peak = logits.amax(-1)
    weights = logits.sub_(peak[..., None]).exp_()
    return chunk_matmul(weights.to(x.v.dtype), x.v, x.acc), weights.sum(-1), peak


def window_block_backward(
    layout: DenseChunks | PackedChunks, x: WindowOperands, do: Tensor, lse: Tensor, delta: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients (dq, dk, dv) in block layout, and sum_j dS_ij over the window `[M, G * C]`.

    dS_ij = p_ij (do_i . v_j - delta_i), p_ij = e^{s_ij - lse_i}.

    Args:
        layout: how sequences are cut into blocks.
        x: from `window_operands`.
        do: `[B, T, H, V]`.
        lse: `[B, T, H]` log of the whole denominator.
        delta: `[B, T, H]`, do . o.
    """
    do_c = layout.to_chunks(do, x.q.dtype)
    lse_c = layout.to_chunks(lse[..., None], x.acc)
    logits, slope = _window_logits(x, with_slope=True)
    weights = logits.sub_(lse_c).exp_()
    dv = chunk_matmul(weights.to(x.q.dtype).transpose(1, 2), do_c, x.acc)
    ds = chunk_matmul(do_c, x.v.transpose(1, 2), x.acc)
    ds = ds.sub_(layout.to_chunks(delta[..., None], x.acc)).mul_(weights)
    row_sum = ds.sum(-1)
    if slope is not None:
        ds.mul_(slope)
    ds = ds.mul_(x.scale).to(x.q.dtype)
    dq = chunk_matmul(ds, x.k, x.acc)
    dk = chunk_matmul(ds.transpose(1, 2), x.q, x.acc)
    return dq, _onto_own_block(layout, dk), _onto_own_block(layout, dv), row_sum


def _window_logits(x: WindowOperands, *, with_slope: bool) -> tuple[Tensor, Tensor | None]:
    """Masked logits, and the soft cap's slope where asked and capped."""
    logits = chunk_matmul(x.q, x.k.transpose(1, 2), x.acc)
    factor, slope = x.scale, None
    if x.softcap is not None:
        logits.mul_(x.scale / x.softcap).tanh_()
        factor, slope = x.softcap, 1 - logits.square() if with_slope else None
    chunks, _, block, keys = x.bias.shape[2:]
    by_head = logits.view(x.batch, -1, chunks, logits.shape[1] // block, block, keys)
    # One pass for factor and mask.
    return torch.add(x.bias, by_head, alpha=factor).view_as(logits), slope


def _with_previous_block(layout: DenseChunks | PackedChunks, x: Tensor) -> Tensor:
    """`[M, C, dim]` -> `[M, 2 C, dim]`; a lone block has no predecessor and stays as it is."""
    if layout.num_chunks == 1:
        return x
    previous = layout.incoming(x.unflatten(0, (-1, layout.num_chunks)), None).flatten(0, 1)
    return torch.cat([previous, x], 1)


def _onto_own_block(layout: DenseChunks | PackedChunks, dx: Tensor) -> Tensor:
    """Adds what the next block found out about this one: inverse of `_with_previous_block` for gradients."""
    if layout.num_chunks == 1:
        return dx
    before, own = dx.unflatten(0, (-1, layout.num_chunks)).chunk(2, 2)
    return (own + layout.incoming(before, None, reverse=True)).flatten(0, 1)


def _block_ceil(tokens: int) -> int:
    return -(-tokens // BLOCK_STEP) * BLOCK_STEP
