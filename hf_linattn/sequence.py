"""Where sequences begin and end inside a `[B, T]` batch: padding and packing become one list of packed sequences.

Padded tokens are taken out rather than masked, so that padding of any kind cannot reach state, denominator, decay or
window, and a padded row equals the row alone. Transformers tells us about padding through the attention mask (2-D, or
4-D where softmax layers share the model) and about packed documents through `position_ids` that start over.
"""

import weakref
from typing import NamedTuple

import torch
from torch import Tensor


class SequenceLayout(NamedTuple):
    """The real tokens of a `[B, T]` batch as packed sequences."""

    cu_seqlens: Tensor  # [N + 1] int32, boundaries in the packed order
    indices: Tensor | None  # [total] int64, b * T + t of each real token; None when every token is real
    final: Tensor | None  # [B] int64, the sequence that holds each row's final state; None when sequence b is row b


def token_validity(attention_mask: Tensor | None, q_len: int, past: int) -> Tensor | None:
    """`[B, T]` bool, True for real tokens, or None when the mask says nothing.

    Args:
        attention_mask (`Tensor`, *optional*): `[B, past + T]` or `[B, T]` (1 = real), or `[B, 1, T, S]`, bool or
            additive, of a causal mask: a token is real when it may attend to itself.
        q_len (`int`): T.
        past (`int`): tokens already in the cache.
    """
    if attention_mask is None:
        return None
    if attention_mask.ndim == 2:
        mask = attention_mask[:, past : past + q_len] if attention_mask.shape[1] > q_len else attention_mask
        return mask.bool()
    mask = attention_mask[:, 0] if attention_mask.dtype == torch.bool else attention_mask[:, 0] == 0
    return mask.diagonal(offset=min(past, mask.shape[-1] - q_len), dim1=-2, dim2=-1)


class _LayoutMemo:
    """The last forward's layout: every layer of a model asks for the same one, and the answer costs a host sync."""

    def __init__(self):
        self.refs, self.key, self.layout = (), None, None

    def get(self, tensors, key):
        same = len(self.refs) == len(tensors) and all(
            (ref() is tensor) if ref is not None else (tensor is None)
            for ref, tensor in zip(self.refs, tensors, strict=True)
        )
        return (True, self.layout) if same and self.key == key else (False, None)

    def put(self, tensors, key, layout):
        self.refs = tuple(None if t is None else weakref.ref(t) for t in tensors)
        self.key, self.layout = key, layout


_layout_memo = _LayoutMemo()


@torch.compiler.disable
def sequence_layout(
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    shape: tuple[int, int],
    device: torch.device,
    past: int = 0,
    has_state: bool = False,
) -> SequenceLayout | None:
    """Layout of a `[B, T]` batch, or None for the ordinary case of B unpadded sequences of T tokens.

    Args:
        attention_mask: see `token_validity`.
        position_ids (`Tensor`, *optional*): `[B or 1, T]`; a position that does not grow starts a new sequence.
            Ignored when a state is carried in, which continues the sequence of each row.
        shape: (B, T).
        past: tokens already in the cache.
        has_state: whether a state of earlier tokens is carried in.
    """
    tensors = (attention_mask, position_ids)
    versions = tuple(0 if t is None or t.is_inference() else t._version for t in tensors)
    key = (versions, tuple(shape), device, int(past), has_state)
    known, layout = _layout_memo.get(tensors, key)
    if not known:
        layout = _sequence_layout(attention_mask, position_ids, shape, device, int(past), has_state)
        _layout_memo.put(tensors, key, layout)
    return layout


def _sequence_layout(attention_mask, position_ids, shape, device, past, has_state):
    batch, q_len = shape
    valid = token_validity(attention_mask, q_len, past)
    if valid is not None:
        valid = valid.to(device).expand(batch, q_len)
        if bool(valid.all()):
            valid = None
    indices = None if valid is None else valid.reshape(-1).nonzero().squeeze(-1)
    resets = None
    if position_ids is not None and position_ids.ndim == 2 and not has_state:
        resets = _reset_positions(position_ids.to(device).expand(batch, q_len), indices, q_len)
    if indices is None and resets is None:
        return None
    lengths = torch.full((batch,), q_len, device=device) if valid is None else valid.sum(1)
    rows = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    if resets is None:
        return SequenceLayout(rows.to(torch.int32), indices, None)
    final = torch.arange(batch, device=device) + torch.searchsorted(resets, rows[1:])
    return SequenceLayout(torch.cat([rows, resets]).sort().values.to(torch.int32), indices, final)


def _reset_positions(position_ids, indices, q_len):
    """Packed positions, inside a row, at which position_ids stop growing; None if there are none."""
    flat = position_ids.reshape(-1)
    row = torch.arange(flat.numel(), device=flat.device) // q_len
    if indices is not None:
        flat, row = flat[indices], row[indices]
    resets = ((flat[1:] <= flat[:-1]) & (row[1:] == row[:-1])).nonzero().squeeze(-1) + 1
    return resets if resets.numel() else None


def pack(x: Tensor | None, layout: SequenceLayout) -> Tensor | None:
    """`[B, T, ...]` -> `[1, total, ...]`: the real tokens, row after row."""
    if x is None:
        return None
    flat = x.reshape(-1, *x.shape[2:])
    return (flat if layout.indices is None else flat[layout.indices]).unsqueeze(0)


def unpack(x: Tensor, layout: SequenceLayout, shape: tuple[int, int]) -> Tensor:
    """`[1, total, ...]` -> `[B, T, ...]`, zeros at padded tokens."""
    if layout.indices is None:
        return x.reshape(*shape, *x.shape[2:])
    flat = x.new_zeros(shape[0] * shape[1], *x.shape[2:])
    return flat.index_copy(0, layout.indices, x[0]).view(*shape, *x.shape[2:])
