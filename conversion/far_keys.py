"""The weights that softmax and the linear part of a layer give to far keys, those that have left the window.

For query i and far key j of its document: softmax logit s_ij = scale q_i.k_j (soft-capped) and linear weight
e^{G_{i-w} - G_j} (a + b phi(q_i).phi(k_j)). All pairs exist for a block of queries at a time, never N x N.
"""

from typing import NamedTuple

import torch
from torch import Tensor

SMALLEST_WEIGHT = 1e-20


class Pairs(NamedTuple):
    """A block of Q queries against the first J keys; `[B, H_kv, G, Q, J]`, `far` and `near` `[B, 1, 1, Q, J]` bool."""

    logits: Tensor
    weights: Tensor
    far: Tensor
    near: Tensor


class FarKeys:
    """Queries and keys of one layer, ready to be paired.

    Args:
        linear_attention (`LinearAttention`): of the layer, with a window.
        query, key: `[B, H, T, D]`, `[B, H_kv, T, D]`, RoPE applied.
        scale, softcap, sliding_window: the teacher's.
        position_ids: `[B or 1, T]`; resets start a new document.
        hidden_states: `[B, T, hidden]`, for a data-dependent gate.
        feature_inputs: query and key as the feature maps see them (hf_linattn.attention); None for `query`, `key`.
    """

    def __init__(
        self,
        linear_attention,
        query: Tensor,
        key: Tensor,
        *,
        scale: float,
        position_ids: Tensor | None = None,
        hidden_states: Tensor | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        feature_inputs: tuple[Tensor, Tensor] | None = None,
    ):
        batch, _, length, _ = query.shape
        self.num_kv_heads, self.scale, self.softcap = key.shape[1], scale, softcap
        self.sliding_window = sliding_window
        self.window = min(linear_attention.window, sliding_window or linear_attention.window)
        self.index = torch.arange(length, device=query.device)
        self.positions = (self.index if position_ids is None else position_ids).expand(batch, length)
        # Keys j < document_start[i] belong to another document.
        self.document_start = self.index - self.positions
        self.sinks = linear_attention.sinks
        self.map_q, self.a, self.b = linear_attention.feature_map_q, linear_attention.a, linear_attention.b
        self.query, self.key = query, key.float().unsqueeze(2)
        self.feature_query, self.feature_key = feature_inputs or (query, key)
        self.phi_k = linear_attention.feature_map_k(self.feature_key * scale**0.5, self.positions).unsqueeze(2)
        self.log_decay = _log_decay(linear_attention.gate, hidden_states, self.num_kv_heads, self.index)

    def pairs(self, rows: Tensor, num_keys: int) -> Pairs:
        """Queries `rows` (int64 `[Q]`) against the keys before `num_keys`; in the first window none is far."""
        query, positions = self.query[..., rows, :], self.positions[:, rows]
        phi_q = self.map_q(self.feature_query[..., rows, :] * self.scale**0.5, positions)
        phi_q = phi_q.unflatten(1, (self.num_kv_heads, -1))
        i, j = self.index[rows][:, None], self.index[None, :num_keys]
        seen = (j <= i) & (j >= self.document_start[:, rows, None])
        if self.sliding_window is not None:
            seen = seen & (j > i - self.sliding_window)
        is_far = j <= i - self.window
        q = query.float().unflatten(1, (self.num_kv_heads, -1))
        logits = self.scale * q @ self.key[..., :num_keys, :].mT
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        weights = self.a + self.b * (phi_q @ self.phi_k[..., :num_keys, :].mT)
        if self.log_decay is not None:
            entered = self.log_decay[..., (rows - self.window).clamp_min(0), None]
            weights = weights * (entered - self.log_decay[..., None, :num_keys]).clamp(max=0).exp()[:, :, None]
        far, near = ((seen & part)[:, None, None] for part in (is_far, ~is_far))
        return Pairs(logits, weights, far, near)


def _log_decay(gate, hidden_states, kv_heads: int, index: Tensor) -> Tensor | None:
    """G, the cumulative log decay, `[B or 1, H_kv, T]` fp32; None without a gate."""
    if gate is None:
        return None
    values = gate(hidden_states)
    if "g_gamma" in values:
        return (values["g_gamma"][:, None] * (index + 1)).unsqueeze(0)
    return values["g"].transpose(1, 2).cumsum(-1)
