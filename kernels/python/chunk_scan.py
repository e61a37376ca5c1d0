"""Decayed sums carried over chunks: x_c += e^{a_c} x_{c-1}, in order, for all heads at once.

On CUDA a scan is a product with a small triangular matrix per block of chunks: a handful of launches. Elsewhere, where
launches are cheap and float32 products may be set to lower precision, it is a loop of in-place updates.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

SCAN_BLOCK = 64


def scan_over_chunks(x: Tensor, log_factor: Tensor | None, reverse: bool = False) -> Tensor:
    """Inclusive scan along axis 1; may overwrite x.

    Args:
        x: `[Z, n, ...]`.
        log_factor: a, `[Z, n]` or `[1, n]`, -inf where a sequence begins, or None for 0.
        reverse: from the last chunk to the first: x_c += e^{a_c} x_{c+1}.
    """
    if x.shape[1] == 1:
        return x
    if x.is_cuda:
        return scan_by_products(x.flatten(2), log_factor, reverse).view_as(x)
    if reverse:
        x, log_factor = x.flip(1), None if log_factor is None else log_factor.flip(1)
    scan_by_updates_(x, None if log_factor is None else log_factor.exp().view(-1, x.shape[1], *[1] * (x.ndim - 2)))
    return x.flip(1) if reverse else x


def scan_by_products(x: Tensor, log_factor: Tensor | None, reverse: bool) -> Tensor:
    """`[Z, n, dim]`: triangular products inside blocks of chunks, then the same scan over the blocks' ends."""
    heads, chunks, dim = x.shape
    size = min(chunks, SCAN_BLOCK)
    blocks = -(-chunks // size)
    missing = blocks * size - chunks
    if missing:
        # Zeros on the side where the scan ends.
        padding = (missing, 0) if reverse else (0, missing)
        x = F.pad(x, (0, 0, *padding))
        log_factor = None if log_factor is None else F.pad(log_factor, padding)
    carry, reach = _block_weights(log_factor, blocks, size, reverse, x)
    inside = torch.bmm(carry.expand(heads, blocks, size, size).reshape(-1, size, size), x.reshape(-1, size, dim))
    inside = inside.view(heads, blocks, size, dim)
    if blocks > 1:
        first, last = (size - 1, 0) if reverse else (0, size - 1)
        whole = None if log_factor is None else log_factor.view(-1, blocks, size).sum(-1)
        ends = scan_by_products(inside[:, :, last], whole, reverse)
        before = ends[:, 1:] if reverse else ends[:, :-1]
        target = inside[:, :-1] if reverse else inside[:, 1:]
        if log_factor is None:
            target.add_(before[:, :, None])
        else:
            target.addcmul_((reach[:, :-1] if reverse else reach[:, 1:])[..., None], before[:, :, None])
    inside = inside.view(heads, blocks * size, dim)
    return inside if not missing else (inside[:, missing:] if reverse else inside[:, :chunks])


def _block_weights(
    log_factor: Tensor | None, blocks: int, size: int, reverse: bool, like: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Factor from chunk d to chunk c of its block `[Z | 1, blocks, size, size]`, and from the block before to c."""
    order = torch.arange(size, device=like.device)
    order = -order if reverse else order
    reached = order <= order[:, None]
    if log_factor is None:
        return reached.to(like.dtype).view(1, 1, size, size), None
    a = log_factor.view(-1, blocks, 1, size)
    # Sums of the a between d and c, not differences of cumulated ones: exact beside a -inf, and over long blocks.
    between = reached[:, None] & (order > order[:, None])
    carry = torch.where(between, a[:, :, None], 0).sum(-1).exp().masked_fill_(~reached, 0)
    return carry, torch.where(reached, a, 0).sum(-1).exp()


def scan_by_updates_(x: Tensor, factor: Tensor | None) -> None:
    """In place, blocks of sqrt(n) chunks side by side, then their ends handed on: O(n) work in O(sqrt(n)) updates."""

    def advance(target: Tensor, source: Tensor, by: Tensor | None) -> None:
        if by is None:
            target.add_(source)
        else:
            target.addcmul_(by, source)

    chunks = x.shape[1]
    size = math.isqrt(chunks)
    blocks = chunks // size
    body = x[:, : blocks * size].unflatten(1, (blocks, size))
    reach = None if factor is None else factor[:, : blocks * size].unflatten(1, (blocks, size)).clone()
    for j in range(1, size):
        advance(body[:, :, j], body[:, :, j - 1], None if reach is None else reach[:, :, j])
        if reach is not None:
            reach[:, :, j].mul_(reach[:, :, j - 1])
    for r in range(1, blocks):
        advance(body[:, r, -1], body[:, r - 1, -1], None if reach is None else reach[:, r, -1])
    if size > 1 and blocks > 1:
        advance(body[:, 1:, :-1], body[:, :-1, -1:], None if reach is None else reach[:, 1:, :-1])
    for c in range(blocks * size, chunks):
        advance(x[:, c], x[:, c - 1], None if factor is None else factor[:, c])
