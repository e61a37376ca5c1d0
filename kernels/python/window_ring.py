"""The ring of the last w keys: as tokens in front of new ones, and cut from the end of a sequence."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_linattn.kernels.state import WindowLinearAttentionState

TokenTensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]


def prepend_ring(
    tokens: TokenTensors, state: WindowLinearAttentionState, cu_seqlens: Tensor | None
) -> tuple[TokenTensors, Tensor, Tensor | None, Callable[[Tensor], Tensor]]:
    """Puts each sequence's ring, oldest entry first, before its new tokens.

    Args:
        tokens: (q, k, v, phi_q, phi_k, g), each `[B, T, H, *]`, g `[B, T, H_kv]` or None.
        state: holds the ring; queries of its entries are zero.
        cu_seqlens: packed boundaries or None.

    Returns:
        The longer tensors, bool validity of their tokens, their boundaries, and the function that cuts the new
        tokens' rows out of a result.
    """
    window, device = state.window_k.shape[1], tokens[0].device
    order = (torch.arange(window, device=device) + state.slot) % window
    valid = state.window_valid[:, order]
    q, k, v, phi_q, phi_k, g = tokens
    rings = (None, state.window_k, state.window_v, None, state.window_phi_k, state.window_g)
    joined = []
    for x, ring in zip(tokens, rings, strict=True):
        if x is None:
            joined.append(None)
            continue
        if ring is None:
            ring = x.new_zeros(len(valid), window, *x.shape[2:])
        else:
            # An invalid slot may hold anything; zeros keep 0 * NaN out of the sums.
            ring = torch.where(valid.view(*valid.shape, *[1] * (x.ndim - 2)), ring[:, order].to(x.dtype), 0)
        joined.append(ring)
    is_new = torch.ones(q.shape[:2], dtype=torch.bool, device=device)
    if cu_seqlens is None:
        longer = tuple(None if x is None else torch.cat([r, x], 1) for r, x in zip(joined, tokens, strict=True))
        return longer, torch.cat([valid, is_new], 1), None, lambda o: o[:, window:]

    count, bounds = cu_seqlens.numel() - 1, cu_seqlens.long()
    longer_bounds = bounds + window * torch.arange(count + 1, device=device)
    place = torch.arange(q.shape[1] + count * window, device=device)
    sequence = torch.searchsorted(longer_bounds[1:].contiguous(), place, right=True).clamp(max=count - 1)
    offset = place - longer_bounds[sequence]
    # Rows of (all rings, all tokens) in the order of the longer packed row.
    source = torch.where(
        offset < window, sequence * window + offset, count * window + bounds[sequence] + offset - window
    )
    token = torch.arange(q.shape[1], device=device)
    owner = torch.searchsorted(bounds[1:].contiguous(), token, right=True).clamp(max=count - 1)
    new_place = token + window * (owner + 1)

    def interleave(ring: Tensor, x: Tensor) -> Tensor:
        return torch.cat([ring.flatten(0, 1), x[0]]).index_select(0, source)[None]

    longer = tuple(None if x is None else interleave(r, x) for r, x in zip(joined, tokens, strict=True))
    return longer, interleave(valid, is_new), longer_bounds, lambda o: o.index_select(1, new_place)


@torch.no_grad()
def last_ring(
    tokens: TokenTensors, key_is_valid: Tensor | None, cu_seqlens: Tensor | None, window: int
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """(window_k, window_v, window_phi_k, window_g, window_valid, slot) after the last token: right-aligned, slot 0.

    Contiguous, however the tokens lie in memory: the compiled step takes no other.
    """
    _, k, v, _, phi_k, g = tokens
    device = k.device
    if key_is_valid is None:
        key_is_valid = torch.ones(k.shape[:2], dtype=torch.bool, device=device)
    parts = (k, v, phi_k, g, key_is_valid)
    slot = torch.zeros((), dtype=torch.int64, device=device)
    if cu_seqlens is None:
        missing = max(window - k.shape[1], 0)

        def cut(x: Tensor) -> Tensor:
            x = x[:, x.shape[1] - window + missing :]
            return F.pad(x, (0, 0) * (x.ndim - 2) + (missing, 0)).clone(memory_format=torch.contiguous_format)

        return (*(None if x is None else cut(x) for x in parts), slot)

    place = cu_seqlens[1:, None] - window + torch.arange(window, device=device)
    is_inside = place >= cu_seqlens[:-1, None]
    place = place.clamp(min=0)

    def gather(x: Tensor) -> Tensor:
        if x.shape[1] == 0:
            return x.new_zeros(*place.shape, *x.shape[2:])
        return x[0, place].masked_fill(~is_inside.view(*place.shape, *[1] * (x.ndim - 2)), 0).contiguous()

    return (*(None if x is None else gather(x) for x in parts), slot)
