"""Sequences cut into chunks of C tokens, each chunk owned by one sequence, and sums carried over the chunks.

Chunk layout of a tensor `[B, T, H, dim]` (H = G * heads): `[n * Z, G * C, dim]` with Z = B * heads; the chunk index
comes first so that a carry over chunks touches contiguous slices, and the G query heads that share a kv head are rows
of one matrix. Rows without a token are zero. `delay` pairs the query of token i + delay with the key of token i: the
state as it was `delay` tokens ago; the last `delay` keys and first `delay` queries of a sequence then have no row.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


class DenseChunks:
    """B sequences of T tokens each; all sizes are static, so tracing sees no data-dependent shape."""

    def __init__(self, q: Tensor, k: Tensor, chunk: int, delay: int = 0):
        self.batch, self.tokens, self.num_heads = q.shape[:3]
        self.num_kv_heads = k.shape[2]
        self.chunk, self.delay = chunk, delay
        self.rows = max(self.tokens - delay, 0)
        self.num_chunks = max(-(-self.rows // chunk), 1)

    def to_chunks(self, x: Tensor, dtype: torch.dtype, width: int | None = None, is_query: bool = False) -> Tensor:
        """`[B, T, H, dim]` -> `[n * Z, G * C, width]`, zero-padded on the right to `width`."""
        heads, dim = x.shape[2:]
        x = x[:, self.delay :] if is_query else x[:, : self.rows]
        padding = (0, (width or dim) - dim, 0, 0, 0, self.num_chunks * self.chunk - x.shape[1])
        x = (F.pad(x, padding) if any(padding) else x).to(dtype)
        x = x.unflatten(2, (self.num_kv_heads, heads // self.num_kv_heads)).unflatten(1, (self.num_chunks, self.chunk))
        return x.permute(1, 0, 3, 4, 2, 5).reshape(self.num_chunks * self.batch * self.num_kv_heads, -1, x.shape[-1])

    def from_chunks(self, y: Tensor, is_query: bool = False) -> Tensor:
        """Inverse of `to_chunks`, dtype kept: `[n * Z, G * C, dim]` -> `[B, T, H, dim]`, zero where no row was."""
        groups = y.shape[1] // self.chunk
        y = y.view(self.num_chunks, self.batch, self.num_kv_heads, groups, self.chunk, -1).permute(1, 0, 4, 2, 3, 5)
        y = y.reshape(self.batch, self.num_chunks * self.chunk, self.num_kv_heads * groups, -1)[:, : self.rows]
        missing = self.tokens - self.rows
        return F.pad(y, (0, 0, 0, 0, missing, 0) if is_query else (0, 0, 0, 0, 0, missing)) if missing else y

    def carry(self, updates: Tensor, decay: Tensor | None, boundary: Tensor | None, reverse: bool = False) -> Tensor:
        """Inclusive decayed sums over the chunks of each sequence, overwriting `updates`.

        after_c = updates_c + decay_c * after_{c-1}, and `boundary` before the first chunk; c runs backwards if
        `reverse`.

        Args:
            updates: `[n, Z, ...]`.
            decay: `[n, Z]` or None for 1.
            boundary: `[N, heads, ...]` or None for 0.
            reverse: run from the last chunk to the first.
        """
        if reverse:
            updates, decay = updates.flip(0), None if decay is None else decay.flip(0)
        factor = None if decay is None else decay.view(*decay.shape, *[1] * (updates.ndim - 2))
        if boundary is not None:
            first = boundary.reshape(updates.shape[1:])
            updates[0] += first if factor is None else factor[0] * first
        scan_over_chunks_(updates, factor)
        return updates.flip(0) if reverse else updates

    def incoming(self, after: Tensor, boundary: Tensor | None, reverse: bool = False) -> Tensor:
        """What each chunk receives: `after` of its predecessor, `boundary` (or 0) at the sequence's edge."""
        edge = torch.zeros_like(after[:1]) if boundary is None else boundary.reshape(after[:1].shape).to(after.dtype)
        return torch.cat([after[1:], edge] if reverse else [edge, after[:-1]])

    def outgoing(self, after: Tensor, boundary: Tensor | None, reverse: bool = False) -> Tensor:
        """The sums at the far end of each sequence: `[n, Z, ...]` -> `[N, heads, ...]`."""
        return (after[0] if reverse else after[-1]).unflatten(0, (self.batch, self.num_kv_heads))

    def broadcast(self, total: Tensor) -> Tensor:
        """One value per sequence to all of its chunks: `[N, heads, ...]` -> `[n, Z, ...]`."""
        return total.flatten(0, 1).expand(self.num_chunks, *[-1] * (total.ndim - 1))


class PackedChunks:
    """One row of T tokens holding N sequences; n = T // C + N chunks always suffice: no size waits for the device."""

    def __init__(self, q: Tensor, k: Tensor, cu_seqlens: Tensor, chunk: int, delay: int = 0):
        self.batch, self.tokens = 1, q.shape[1]
        self.num_kv_heads = k.shape[2]
        self.chunk, self.delay = chunk, delay
        num_sequences = cu_seqlens.numel() - 1
        self.num_chunks = self.tokens // chunk + num_sequences
        bounds = cu_seqlens.long()
        lengths = (bounds.diff() - delay).clamp(min=0)
        ends = (-(-lengths // chunk)).cumsum(0)
        starts = torch.cat([ends.new_zeros(1), ends[:-1]])

        chunk_index = torch.arange(self.num_chunks, device=q.device)
        self.sequence = torch.searchsorted(ends, chunk_index, right=True).clamp(max=num_sequences - 1)
        self.is_first = chunk_index == starts[self.sequence]
        self.is_last = chunk_index == ends[self.sequence] - 1
        self.first_of_sequence, self.last_of_sequence = starts.clamp(max=self.num_chunks - 1), (ends - 1).clamp(min=0)
        self.is_empty = lengths == 0

        offset = (chunk_index - starts[self.sequence])[:, None] * chunk + torch.arange(chunk, device=q.device)
        self.is_token = (offset < lengths[self.sequence][:, None]) & (chunk_index < ends[-1])[:, None]
        self.token = (bounds[self.sequence][:, None] + offset).masked_fill(~self.is_token, 0).flatten()

        token_index = torch.arange(self.tokens, device=q.device)
        owner = torch.searchsorted(bounds[1:].contiguous(), token_index, right=True)
        self.token_is_packed = owner < num_sequences
        owner = owner.clamp(max=num_sequences - 1)
        self.position = token_index - bounds[owner]
        self.token_length = lengths[owner]
        self.first_row = starts[owner] * chunk

    def to_chunks(self, x: Tensor, dtype: torch.dtype, width: int | None = None, is_query: bool = False) -> Tensor:
        """See `DenseChunks.to_chunks`."""
        heads, dim = x.shape[2:]
        if self.tokens == 0:
            rows = x.new_zeros(self.num_chunks * self.chunk, heads, dim)
        else:
            index = (self.token + self.delay).clamp(max=self.tokens - 1) if is_query else self.token
            rows = x[0].index_select(0, index).masked_fill_(~self.is_token.view(-1, 1, 1), 0)
        rows = (rows if width in (None, dim) else F.pad(rows, (0, width - dim))).to(dtype)
        rows = rows.view(self.num_chunks, self.chunk, self.num_kv_heads, heads // self.num_kv_heads, -1)
        return rows.permute(0, 2, 3, 1, 4).reshape(self.num_chunks * self.num_kv_heads, -1, rows.shape[-1])

    def from_chunks(self, y: Tensor, is_query: bool = False) -> Tensor:
        """See `DenseChunks.from_chunks`."""
        groups = y.shape[1] // self.chunk
        y = y.view(self.num_chunks, self.num_kv_heads, groups, self.chunk, -1).permute(0, 3, 1, 2, 4)
        y = y.reshape(self.num_chunks * self.chunk, self.num_kv_heads * groups, -1)
        position = self.position - self.delay if is_query else self.position
        has_row = (position >= 0) & (position < self.token_length) & self.token_is_packed
        row = (self.first_row + position).masked_fill(~has_row, 0)
        return y.index_select(0, row).masked_fill_(~has_row.view(-1, 1, 1), 0)[None]

    def carry(self, updates: Tensor, decay: Tensor | None, boundary: Tensor | None, reverse: bool = False) -> Tensor:
        """See `DenseChunks.carry`."""
        edge = (self.is_last if reverse else self.is_first)[:, None]
        factor = (~edge).to(updates.dtype) if decay is None else decay.masked_fill(edge, 0)
        if boundary is not None:
            first = edge.to(updates.dtype) if decay is None else decay.masked_fill(~edge, 0)
            trailing = [1] * (updates.ndim - 2)
            updates = updates + first.view(*first.shape, *trailing) * boundary[self.sequence]
        if reverse:
            updates, factor = updates.flip(0), factor.flip(0)
        scan_over_chunks_(updates, factor.view(*factor.shape, *[1] * (updates.ndim - 2)))
        return updates.flip(0) if reverse else updates

    def incoming(self, after: Tensor, boundary: Tensor | None, reverse: bool = False) -> Tensor:
        """See `DenseChunks.incoming`."""
        edge = (self.is_last if reverse else self.is_first).view(-1, *[1] * (after.ndim - 1))
        at_edge = 0 if boundary is None else boundary[self.sequence].to(after.dtype)
        return torch.where(edge, at_edge, after.roll(-1 if reverse else 1, 0))

    def outgoing(self, after: Tensor, boundary: Tensor | None, reverse: bool = False) -> Tensor:
        """See `DenseChunks.outgoing`."""
        total = after[self.first_of_sequence if reverse else self.last_of_sequence]
        empty = self.is_empty.view(-1, *[1] * (total.ndim - 1))
        return torch.where(empty, 0 if boundary is None else boundary, total)

    def broadcast(self, total: Tensor) -> Tensor:
        """See `DenseChunks.broadcast`."""
        return total[self.sequence]


def chunk_layout(
    q: Tensor, k: Tensor, cu_seqlens: Tensor | None, chunk: int, delay: int = 0
) -> DenseChunks | PackedChunks:
    """The layout for dense (`cu_seqlens` None) or packed input, from q `[B, T, H, *]` and k `[B, T, H_kv, *]`."""
    return DenseChunks(q, k, chunk, delay) if cu_seqlens is None else PackedChunks(q, k, cu_seqlens, chunk, delay)


def scan_over_chunks_(x: Tensor, factor: Tensor | None) -> None:
    """In place x_c += factor_c * x_{c-1}, c = 1, 2, ...; x `[n, ...]`, factor broadcasts over x's trailing axes.

    Blocks of sqrt(n) chunks advance side by side, then hand their ends on: O(n) work in O(sqrt(n)) launches. Written
    out because torch.cumsum has no decay, and no deterministic version on CUDA.
    """

    def advance(target: Tensor, source: Tensor, by: Tensor | None) -> None:
        if by is None:
            target.add_(source)
        else:
            target.addcmul_(by, source)

    size = math.isqrt(x.shape[0])
    blocks = x.shape[0] // size
    body = x[: blocks * size].unflatten(0, (blocks, size))
    reach = None if factor is None else factor[: blocks * size].unflatten(0, (blocks, size)).clone()
    for j in range(1, size):
        advance(body[:, j], body[:, j - 1], None if factor is None else reach[:, j])
        if reach is not None:
            reach[:, j].mul_(reach[:, j - 1])
    for r in range(1, blocks):
        advance(body[r, -1], body[r - 1, -1], None if reach is None else reach[r, -1])
    if size > 1 and blocks > 1:
        advance(body[1:, :-1], body[:-1, -1:], None if reach is None else reach[1:, :-1])
    for c in range(blocks * size, x.shape[0]):
        advance(x[c], x[c - 1], None if factor is None else factor[c])
