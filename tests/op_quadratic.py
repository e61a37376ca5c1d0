"""linear_attention as one float64 matrix of weights over all pairs of tokens: the truth for long sequences.

The reference walks token by token: on a GPU thousands of launches. This form is a few dozen launches and knows nothing
of chunks or segments either; tests/ops/test_reference.py holds it against the reference.
"""

import torch
from torch import Tensor

from hf_linattn.kernels import LinearAttentionState
from hf_linattn.kernels.reference import guarded_denominator


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


def _bounds(q: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Boundaries of the sequences of a batch row."""
    if cu_seqlens is None:
        return torch.tensor([0, q.shape[1]], device=q.device)
    return cu_seqlens.long()


def _by_row(state: LinearAttentionState | None, batch: int) -> tuple[Tensor | None, ...] | None:
    """The members as `[B, S, H_kv, ...]`."""
    return None if state is None else tuple(None if x is None else x.unflatten(0, (batch, -1)) for x in state)
