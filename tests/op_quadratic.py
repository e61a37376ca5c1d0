"""Both ops as one float64 matrix of weights over all pairs of tokens: the truth for long sequences.

The reference walks token by token: on a GPU thousands of launches. This form is a few dozen launches and knows nothing
of chunks or segments either; tests/ops/test_reference.py holds it against the reference.
"""

import torch
from torch import Tensor

from hf_linattn.kernels import LinearAttentionState, WindowLinearAttentionState
from hf_linattn.kernels.reference import guarded_denominator
from hf_linattn.kernels.state import linear_sums
from hf_linattn.kernels.window_ring import last_ring, prepend_ring


def quadratic_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float,
    a: float,
    b: float,
    normalize: bool,
    causal: bool,
    initial_state: LinearAttentionState | None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, LinearAttentionState]:
    """(o, final state) of `hf_linattn.kernels.linear_attention`, differentiable; memory O(T^2)."""
    tokens, bounds = q.shape[1], _bounds(q, cu_seqlens)
    used = int(bounds[-1])
    q, k, v = (x[:, :used] for x in (q, k, v))
    owner = torch.searchsorted(bounds[1:].contiguous(), torch.arange(used, device=q.device), right=True)
    # [S, T]: sequence s of a batch row holds token t.
    member = (owner == torch.arange(len(bounds) - 1, device=q.device)[:, None]).to(q)

    decay = torch.zeros_like(k[..., 0])
    if g_gamma is not None:
        decay = decay + g_gamma
    if g is not None:
        decay = decay + g[:, :used]
    total = decay.cumsum(1).transpose(1, 2)
    before = torch.nn.functional.pad(total, (1, 0))
    from_start = total - before[..., bounds[owner]]
    to_end = before[..., bounds[owner + 1]] - total
    over_all = before[..., bounds[1:]] - before[..., bounds[:-1]]

    group = q.shape[2] // k.shape[2]
    key, value = (x.repeat_interleave(group, 2) for x in (k, v))
    weights = a + b * scale * torch.einsum("bihk,bjhk->bhij", q, key)
    seen = owner[:, None] == owner
    if causal:
        seen = seen & torch.ones_like(seen).tril()
        lag = (total[..., :, None] - total[..., None, :]).masked_fill(~seen, float("-inf"))
        weights = weights * lag.exp().repeat_interleave(group, 1)
    else:
        weights = weights * seen
    num, den = torch.einsum("bhij,bjhv->bihv", weights, value), weights.sum(-1).transpose(1, 2)

    first = _by_row(initial_state, q.shape[0])
    if first is not None:
        reach = from_start.transpose(1, 2).exp().repeat_interleave(group, 2)
        kv, key_sum, value_sum, weight_sum = (None if x is None else x.repeat_interleave(group, 2) for x in first)
        num = num + b * scale * reach[..., None] * torch.einsum("bthk,bshkv,st->bthv", q, kv, member)
        if value_sum is not None:
            num = num + a * reach[..., None] * torch.einsum("bshv,st->bthv", value_sum, member)
        if key_sum is not None:
            den = den + b * scale * reach * torch.einsum("bthk,bshk,st->bth", q, key_sum, member)
        if weight_sum is not None:
            den = den + a * reach * torch.einsum("bsh,st->bth", weight_sum, member)
    o = num / guarded_denominator(den)[..., None] if normalize else num

    kept = to_end.exp()[:, None] * member[:, None]  # [B, S, H_kv, T]
    final = (
        torch.einsum("bsht,bthk,bthv->bshkv", kept, k, v),
        torch.einsum("bsht,bthk->bshk", kept, k) if normalize else None,
        torch.einsum("bsht,bthv->bshv", kept, v) if a != 0 else None,
        kept.sum(-1) if normalize and a != 0 else None,
    )
    if first is not None:
        left = over_all.transpose(1, 2).exp()
        final = tuple(
            None if x is None else x + left.view(*left.shape, *[1] * (x.ndim - 3)) * x0
            for x, x0 in zip(final, first, strict=True)
        )
    o = torch.nn.functional.pad(o, (0, 0, 0, 0, 0, tokens - used))
    return o, LinearAttentionState(*(None if x is None else x.flatten(0, 1) for x in final))


def quadratic_window_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    phi_q: Tensor,
    phi_k: Tensor,
    *,
    window: int,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    initial_state: WindowLinearAttentionState | None,
    cu_seqlens: Tensor | None = None,
    **scalars,
) -> tuple[Tensor, WindowLinearAttentionState]:
    """(o, final state) of `hf_linattn.kernels.window_linear_attention`, differentiable; memory O(T^2)."""
    if g_gamma is not None:
        g = g_gamma.expand(k.shape[:-1])
    tokens, valid, first, restore = (q, k, v, phi_q, phi_k, g), None, None, lambda o: o
    if initial_state is not None:
        tokens, valid, cu_seqlens, restore = prepend_ring(tokens, initial_state, cu_seqlens)
        first = linear_sums(initial_state)
    options = {"initial_sums": first, "key_valid": valid, "cu_seqlens": cu_seqlens}
    o, _, final = quadratic_window_rows(*tokens, window=window, **options, **scalars)
    members = (None if x is None else x.detach() for x in final)
    return restore(o), WindowLinearAttentionState(*members, *last_ring(tokens, valid, cu_seqlens, window))


def quadratic_window_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    phi_q: Tensor,
    phi_k: Tensor,
    g: Tensor | None,
    *,
    window: int,
    scale: float,
    a: float,
    b: float,
    softcap: float | None = None,
    log_scale: Tensor | None = None,
    key_valid: Tensor | None = None,
    initial_sums: LinearAttentionState | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, LinearAttentionState]:
    """What the kernels of the window op are asked for: o, the log of the denominators `[B, H, T]`, the final sums.

    Args:
        q, k, v, phi_q, phi_k, g, window, scale, a, b, softcap, log_scale, cu_seqlens: as in
            `hf_linattn.kernels.window_linear_attention`.
        key_valid: bool `[B, T]`; False hides a key from every query but its own, for the sums too.
        initial_sums: those of the keys that left the window before the first token.
    """
    tokens, bounds = q.shape[1], _bounds(q, cu_seqlens)
    used = int(bounds[-1])
    q, k, v, phi_q, phi_k = (x[:, :used] for x in (q, k, v, phi_q, phi_k))
    place = torch.arange(used, device=q.device)
    owner = torch.searchsorted(bounds[1:].contiguous(), place, right=True)
    member = (owner == torch.arange(len(bounds) - 1, device=q.device)[:, None]).to(q)
    start, end = bounds[owner], bounds[owner + 1]

    decay = torch.zeros_like(k[..., 0]) if g is None else g[:, :used]
    before = torch.nn.functional.pad(decay.cumsum(1).transpose(1, 2), (1, 0))  # [B, H_kv, T + 1]
    # Log decay from the first token to the one that leaves the window last: of each row, and of each sequence.
    leaving = (place - window + 1).clamp(min=0).maximum(start)
    left = (bounds[1:] - window).maximum(bounds[:-1])

    group = q.shape[2] // k.shape[2]
    key, value, phi_key = (x.repeat_interleave(group, 2) for x in (k, v, phi_k))
    lag = place[:, None] - place
    same = owner[:, None] == owner
    valid = torch.ones_like(q[..., 0, 0], dtype=torch.bool) if key_valid is None else key_valid[:, :used]
    near = same & (lag >= 0) & (lag < window) & (valid[:, None] | (lag == 0))
    logits = scale * torch.einsum("bihd,bjhd->bhij", q, key)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~near[:, None], float("-inf"))
    peak = logits.detach().amax(-1, keepdim=True) if used else logits.sum(-1, keepdim=True)
    beyond = (same & (lag >= window) & valid[:, None])[:, None]
    reach = (before[..., leaving, None] - before[..., None, 1:]).masked_fill(~beyond, float("-inf"))
    far_scale = 1.0 if log_scale is None else log_scale.exp()[:, None, None]
    far_scale = far_scale * (-peak).exp()
    far = (a + b * torch.einsum("bihd,bjhd->bhij", phi_q, phi_key)) * reach.exp().repeat_interleave(group, 1)
    weights = (logits - peak).exp() + far_scale * far
    num, den = torch.einsum("bhij,bjhv->bhiv", weights, value), weights.sum(-1, keepdim=True)

    first = _by_row(initial_sums, q.shape[0])
    if first is not None:
        reach = (before[..., leaving] - before[..., start]).exp().repeat_interleave(group, 1)
        reach = far_scale * reach[..., None]
        kv, key_sum, value_sum, weight_sum = (None if x is None else x.repeat_interleave(group, 2) for x in first)
        num = num + b * reach * torch.einsum("bthk,bshkv,st->bhtv", phi_q, kv, member)
        den = den + b * reach * torch.einsum("bthk,bshk,st->bht", phi_q, key_sum, member)[..., None]
        if value_sum is not None:
            num = num + a * reach * torch.einsum("bshv,st->bhtv", value_sum, member)
            den = den + a * reach * torch.einsum("bsh,st->bht", weight_sum, member)[..., None]
    o, lse = num / den, (peak + den.log())[..., 0]

    # Keys that have left the window behind the last token, decayed to the last that did.
    gone = ((place < end - window) & valid)[:, None, None]
    kept = (before[..., left, None] - before[..., None, 1:]).masked_fill(~gone, float("-inf"))
    kept = (kept.exp() * member).transpose(1, 2)  # [B, S, H_kv, T]
    final = (
        torch.einsum("bsht,bthk,bthv->bshkv", kept, phi_k, v),
        torch.einsum("bsht,bthk->bshk", kept, phi_k),
        torch.einsum("bsht,bthv->bshv", kept, v) if a != 0 else None,
        kept.sum(-1) if a != 0 else None,
    )
    if first is not None:
        over = (before[..., left] - before[..., bounds[:-1]]).exp().transpose(1, 2)
        final = tuple(
            None if x is None else x + over.view(*over.shape, *[1] * (x.ndim - 3)) * x0
            for x, x0 in zip(final, first, strict=True)
        )
    rest = tokens - used
    o = torch.nn.functional.pad(o.transpose(1, 2), (0, 0, 0, 0, 0, rest))
    lse = torch.nn.functional.pad(lse, (0, rest))
    return o, lse, LinearAttentionState(*(None if x is None else x.flatten(0, 1) for x in final))


def _bounds(q: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Boundaries of the sequences of a batch row."""
    if cu_seqlens is None:
        return torch.tensor([0, q.shape[1]], device=q.device)
    return cu_seqlens.long()


def _by_row(state: LinearAttentionState | None, batch: int) -> tuple[Tensor | None, ...] | None:
    """The members as `[B, S, H_kv, ...]`."""
    return None if state is None else tuple(None if x is None else x.unflatten(0, (batch, -1)) for x in state)
