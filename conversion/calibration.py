"""Closed-form start of `log_scale`: how much the linear part of a layer weighs beside its softmax window.

For query i of head h with far keys F_i (those that have left the window), the teacher gives them the mass
sum_{F_i} exp(scale q_i.k_j) and the linear part sum_{F_i} e^{G_{i-w} - G_j} (a + b phi(q_i).phi(k_j)). log_scale_h is
the mean over queries of the difference of their logarithms: the constant under which both parts share one denominator.
"""

from collections.abc import Callable

import torch
from torch import Tensor

# Queries per block: the N x N weights exist for one block of rows at a time.
QUERY_BLOCK = 128
SMALLEST_MASS = 1e-20


class LogScaleCalibration:
    """Attention function of a calibration forward: returns the teacher's output, leaves `sums`.

    Args:
        softmax_of (`Callable`): attention module -> its softmax attention function.

    Attributes:
        sums: layer index -> (sum over queries of the log ratio `[H]`, number of queries `[]`).
    """

    def __init__(self, softmax_of: Callable):
        self.softmax_of = softmax_of
        self.sums: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
        """AttentionInterface's contract: `[B, H, T, D]` in, `([B, T, H, V], None)` out."""
        teacher = self.softmax_of(module)(
            module, query, key, value, attention_mask, scaling=scaling, dropout=0.0, **kwargs
        )
        if module.linear_attention.window:
            self.sums[module.layer_idx] = sum_log_mass_ratio(
                module.linear_attention,
                query,
                key,
                scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
                position_ids=kwargs.get("position_ids"),
                hidden_states=kwargs.get("linattn_hidden_states"),
                sliding_window=kwargs.get("sliding_window"),
                softcap=kwargs.get("softcap"),
            )
        return teacher


def sum_log_mass_ratio(
    linear_attention,
    query: Tensor,
    key: Tensor,
    *,
    scale: float,
    position_ids: Tensor | None = None,
    hidden_states: Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum over queries with far keys of log(softmax mass) - log(linear mass).

    Args:
        linear_attention (`LinearAttention`): of the layer, with a window.
        query, key: `[B, H, T, D]`, `[B, H_kv, T, D]`, RoPE applied.
        scale, softcap, sliding_window: the teacher's.
        position_ids: `[B or 1, T]`; resets start a new document.
        hidden_states: `[B, T, hidden]`, for a data-dependent gate.

    Returns:
        The sum per head, `[H]`, and the number of queries it is taken over, `[]`; 0 and 0 without far keys.
    """
    batch, heads, length, _ = query.shape
    kv_heads = key.shape[1]
    index = torch.arange(length, device=query.device)
    positions = (index if position_ids is None else position_ids).expand(batch, length)
    # Keys j < document_start[i] belong to another document.
    document_start = index - positions
    phi_q = linear_attention.feature_map_q(query * scale**0.5, positions).unflatten(1, (kv_heads, -1))
    phi_k = linear_attention.feature_map_k(key * scale**0.5, positions).unsqueeze(2)
    q, k = query.float().unflatten(1, (kv_heads, -1)), key.float().unsqueeze(2)
    log_decay = _log_decay(linear_attention.gate, hidden_states, kv_heads, index)
    window = min(linear_attention.window, sliding_window or linear_attention.window)
    total = torch.zeros(kv_heads, heads // kv_heads, device=query.device)
    count = torch.zeros((), device=query.device)
    for start in range(window, length, QUERY_BLOCK):
        rows, keys = (
            slice(start, min(start + QUERY_BLOCK, length)),
            slice(0, min(start + QUERY_BLOCK, length) - window),
        )
        i, j = index[rows, None], index[None, keys]
        far = (j <= i - window) & (j >= document_start[:, rows, None])
        if sliding_window is not None:
            far = far & (j > i - sliding_window)
        far = far[:, None, None]
        logits = scale * q[..., rows, :] @ k[..., keys, :].mT
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        log_softmax_mass = logits.masked_fill(~far, -torch.inf).logsumexp(-1)
        weights = linear_attention.a + linear_attention.b * (phi_q[..., rows, :] @ phi_k[..., keys, :].mT)
        if log_decay is not None:
            entered = log_decay[..., rows.start - window : rows.stop - window, None]
            weights = weights * (entered - log_decay[..., None, keys]).clamp(max=0).exp()[:, :, None]
        log_linear_mass = weights.masked_fill(~far, 0).sum(-1).clamp_min(SMALLEST_MASS).log()
        has_far = far.any(-1)
        total += (log_softmax_mass - log_linear_mass).masked_fill(~has_far, 0).sum((0, 3))
        count += has_far.sum()
    return total.flatten(), count


def _log_decay(gate, hidden_states, kv_heads: int, index: Tensor) -> Tensor | None:
    """G, the cumulative log decay, `[B or 1, H_kv, T]` fp32; None without a gate."""
    if gate is None:
        return None
    values = gate(hidden_states)
    if "g_gamma" in values:
        return (values["g_gamma"][:, None] * (index + 1)).unsqueeze(0)
    return values["g"].transpose(1, 2).cumsum(-1)
