"""Sequences cut into chunks of C tokens, each chunk owned by one sequence, and sums carried over the chunks.

Chunk layout of a tensor `[B, T, H, dim]` (H = G * heads): `[Z * n, G * C, dim]` with Z = B * heads and n chunks; the G
query heads that share a kv head are rows of one matrix. Rows without a token are zero. `delay` pairs the query of
token i + delay with the key of token i: the state as it was `delay` tokens ago; the last `delay` keys and first
`delay` queries of a sequence then have no row.
"""

import weakref

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_linattn.kernels.chunk_scan import scan_over_chunks

MAX_KEPT_LAYOUTS = 8


class DenseChunks:
    """B sequences of T tokens each; all sizes are static, so tracing sees no data-dependent shape."""

    def __init__(self, q: Tensor, k: Tensor, chunk: int, delay: int = 0):
        self.batch, self.tokens, self.num_heads = q.shape[:3]
        self.num_kv_heads = k.shape[2]
        self.chunk, self.delay = chunk, delay
        self.rows = max(self.tokens - delay, 0)
        self.num_chunks = max(-(-self.rows // chunk), 1)
        self.is_first = torch.arange(self.num_chunks, device=q.device) == 0

    def to_chunks(self, x: Tensor, dtype: torch.dtype, width: int | None = None, is_query: bool = False) -> Tensor:
        """`[B, T, H, dim]` -> `[Z * n, G * C, width]`, zero-padded on the right to `width`."""
        heads, dim = x.shape[2:]
        x = x[:, self.delay :] if is_query else x[:, : self.rows]
        padding = (0, (width or dim) - dim, 0, 0, 0, self.num_chunks * self.chunk - x.shape[1])
        x = F.pad(x, padding) if any(padding) else x
        groups = heads // self.num_kv_heads
        x = x.view(self.batch, self.num_chunks, self.chunk, self.num_kv_heads, groups, -1).permute(0, 3, 1, 4, 2, 5)
        x = x.to(dtype, memory_format=torch.contiguous_format)
        return x.reshape(self.batch * self.num_kv_heads * self.num_chunks, groups * self.chunk, -1)

    def from_chunks(self, y: Tensor, is_query: bool = False) -> Tensor:
        """Inverse of `to_chunks`, dtype kept: `[Z * n, G * C, dim]` -> `[B, T, H, dim]`, zero where no row was."""
        groups = y.shape[1] // self.chunk
        y = y.view(self.batch, self.num_kv_heads, self.num_chunks, groups, self.chunk, -1).permute(0, 2, 4, 1, 3, 5)
        y = y.reshape(self.batch, self.num_chunks * self.chunk, self.num_kv_heads * groups, -1)[:, : self.rows]
        missing = self.tokens - self.rows
        return F.pad(y, (0, 0, 0, 0, missing, 0) if is_query else (0, 0, 0, 0, 0, missing)) if missing else y

    def carry(
        self, updates: Tensor, log_decay: Tensor | None, boundary: Tensor | None, reverse: bool = False
    ) -> Tensor:
        """Inclusive decayed sums over the chunks of each sequence; may overwrite `updates`.

        after_c = updates_c + e^{log_decay_c} after_{c-1}, and `boundary` before the first chunk; c runs backwards if
        `reverse`.

        Args:
            updates: `[Z, n, ...]`.
            log_decay: `[Z, n]` or None for 0.
            boundary: `[N, heads, ...]` or None for 0.
            reverse: run from the last chunk to the first.
        """
        if boundary is not None:
            edge = -1 if reverse else 0
            first = boundary.flatten(0, 1)
            decay = 1.0 if log_decay is None else log_decay[:, edge].exp().view(-1, *[1] * (first.ndim - 1))
            updates[:, edge] += decay * first
        return scan_over_chunks(updates, log_decay, reverse)

    def incoming(self, after: Tensor, boundary: Tensor | None, reverse: bool = False) -> Tensor:
        """What each chunk receives: `after` of its predecessor, `boundary` (or 0) at the sequence's edge."""
        edge = torch.zeros_like(after[:, :1]) if boundary is None else boundary.flatten(0, 1)[:, None].to(after.dtype)
        return torch.cat([after[:, 1:], edge] if reverse else [edge, after[:, :-1]], 1)

    def outgoing(self, after: Tensor, boundary: Tensor | None, reverse: bool = False) -> Tensor:
        """The sums at the far end of each sequence: `[Z, n, ...]` -> `[N, heads, ...]`."""
        return after[:, 0 if reverse else -1].unflatten(0, (self.batch, self.num_kv_heads))

    def broadcast(self, total: Tensor) -> Tensor:
        """One value per sequence to all of its chunks: `[N, heads, ...]` -> `[Z, n, ...]`."""
        return total.flatten(0, 1)[:, None].expand(-1, self.num_chunks, *[-1] * (total.ndim - 2))


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
        is_packed = owner < num_sequences
        owner = owner.clamp(max=num_sequences - 1)
        position, length, first_row = token_index - bounds[owner], lengths[owner], starts[owner] * chunk
        self.indices: dict[tuple, Tensor | tuple[Tensor, Tensor]] = {}
        # Row of each token as a key, and as a query.
        self.has_row, self.row = [], []
        for place in (position, position - delay):
            self.has_row.append((place >= 0) & (place < length) & is_packed)
            self.row.append((first_row + place).masked_fill(~self.has_row[-1], 0))

    def to_chunks(self, x: Tensor, dtype: torch.dtype, width: int | None = None, is_query: bool = False) -> Tensor:
        """See `DenseChunks.to_chunks`."""
        heads, dim = x.shape[2:]
        if self.tokens == 0:
            x = x.new_zeros(self.num_kv_heads * self.num_chunks, heads // self.num_kv_heads * self.chunk, dim)
        else:
            # Gathers (token, head) pairs, so that rows land in their final order; models hold heads before tokens.
            heads_first = x.stride(2) > x.stride(1)
            pair, has_token = self._pairs_of_rows(heads, is_query, heads_first)
            x = (x[0].transpose(0, 1) if heads_first else x[0]).reshape(-1, dim).index_select(0, pair)
            x = x.masked_fill_(~has_token, 0).view(self.num_kv_heads * self.num_chunks, -1, dim)
        return (x if width in (None, dim) else F.pad(x, (0, width - dim))).to(dtype)

    def from_chunks(self, y: Tensor, is_query: bool = False) -> Tensor:
        """See `DenseChunks.from_chunks`."""
        heads = self.num_kv_heads * (y.shape[1] // self.chunk)
        pair = self._rows_of_tokens(heads, is_query)
        x = y.reshape(-1, y.shape[-1]).index_select(0, pair).view(1, self.tokens, heads, y.shape[-1])
        return x.masked_fill_(~self.has_row[is_query].view(1, -1, 1, 1), 0)

    def carry(
        self, updates: Tensor, log_decay: Tensor | None, boundary: Tensor | None, reverse: bool = False
    ) -> Tensor:
        """See `DenseChunks.carry`."""
        edge = self.is_last if reverse else self.is_first
        if boundary is not None:
            at_edge = edge.to(updates.dtype) if log_decay is None else log_decay.exp().masked_fill(~edge, 0)
            at_edge = at_edge.view(-1, self.num_chunks, *[1] * (updates.ndim - 2))
            updates = torch.addcmul(updates, at_edge, self.broadcast(boundary))
        # A chunk at the edge takes nothing from the one before it.
        keep = updates.new_zeros(1, self.num_chunks) if log_decay is None else log_decay
        return scan_over_chunks(updates, keep.masked_fill(edge, float("-inf")), reverse)

    def incoming(self, after: Tensor, boundary: Tensor | None, reverse: bool = False) -> Tensor:
        """See `DenseChunks.incoming`."""
        edge = (self.is_last if reverse else self.is_first).view(-1, *[1] * (after.ndim - 2))
        shifted = after.roll(-1 if reverse else 1, 1)
        if boundary is None:
            return shifted.masked_fill_(edge, 0)
        return torch.where(edge, self.broadcast(boundary).to(after.dtype), shifted)

    def outgoing(self, after: Tensor, boundary: Tensor | None, reverse: bool = False) -> Tensor:
        """See `DenseChunks.outgoing`."""
        total = after[:, self.first_of_sequence if reverse else self.last_of_sequence].transpose(0, 1)
        empty = self.is_empty.view(-1, *[1] * (total.ndim - 1))
        return torch.where(empty, 0 if boundary is None else boundary, total)

    def broadcast(self, total: Tensor) -> Tensor:
        """See `DenseChunks.broadcast`."""
        return total[self.sequence].transpose(0, 1)

    def _pairs_of_rows(self, heads: int, is_query: bool, heads_first: bool) -> tuple[Tensor, Tensor]:
        """Which (token, head) pair each row of the chunk layout holds, and whether it holds one."""
        key = ("rows", heads, is_query, heads_first)
        if key not in self.indices:
            groups = heads // self.num_kv_heads
            token = (self.token + self.delay).clamp(max=self.tokens - 1) if is_query else self.token
            token_step, head_step = (1, self.tokens) if heads_first else (heads, 1)
            head = torch.arange(heads, device=token.device).view(self.num_kv_heads, 1, groups, 1)
            pair = token.view(self.num_chunks, 1, self.chunk) * token_step + head * head_step
            has_token = self.is_token.view(self.num_chunks, 1, self.chunk).expand_as(pair).reshape(-1, 1)
            self.indices[key] = pair.flatten(), has_token
        return self.indices[key]

    def _rows_of_tokens(self, heads: int, is_query: bool) -> Tensor:
        """Which row of the chunk layout holds each (token, head) pair."""
        key = ("tokens", heads, is_query)
        if key not in self.indices:
            groups = heads // self.num_kv_heads
            row = self.row[is_query][:, None]
            head = torch.arange(heads, device=row.device)
            chunk = head // groups * self.num_chunks + row // self.chunk
            self.indices[key] = ((chunk * groups + head % groups) * self.chunk + row % self.chunk).flatten()
        return self.indices[key]


def chunk_layout(
    q: Tensor, k: Tensor, cu_seqlens: Tensor | None, chunk: int, delay: int = 0
) -> DenseChunks | PackedChunks:
    """The layout for dense (`cu_seqlens` None) or packed input, from q `[B, T, H, *]` and k `[B, T, H_kv, *]`.

    The layers of a model share their `cu_seqlens`: packed layouts of the last few tensors are kept while the tensor
    lives, unchanged. Not inside a graph capture, whose replays must form the layout anew.
    """
    if cu_seqlens is None:
        return DenseChunks(q, k, chunk, delay)
    if torch.compiler.is_compiling() or cu_seqlens.is_inference() or not _layouts_may_be_kept(cu_seqlens.device):
        return PackedChunks(q, k, cu_seqlens, chunk, delay)
    stream = torch.cuda.current_stream(cu_seqlens.device).cuda_stream if cu_seqlens.is_cuda else None
    key = (cu_seqlens._version, q.shape[1], k.shape[2], chunk, delay, stream)
    for owner, kept_key, layout in _kept_layouts:
        if owner() is cu_seqlens and kept_key == key:
            return layout
    layout = PackedChunks(q, k, cu_seqlens, chunk, delay)
    _kept_layouts[:] = [entry for entry in _kept_layouts if entry[0]() is not None][1 - MAX_KEPT_LAYOUTS :]
    _kept_layouts.append((weakref.ref(cu_seqlens), key, layout))
    return layout


_kept_layouts: list[tuple[weakref.ref, tuple, PackedChunks]] = []


def _layouts_may_be_kept(device: torch.device) -> bool:
    return device.type == "cpu" or (device.type == "cuda" and not torch.cuda.is_current_stream_capturing())
