"""The constant-size memory of both ops, as NamedTuples of tensors, and empty ones for static caches.

Four sums describe everything a linear attention head has read (seeds of the formulas: arXiv 2510.21956):
kv = sum k v^T, key_sum = sum k, value_sum = sum v, weight_sum = sum 1, each decayed. A weight a + b q.k needs
kv always, key_sum to normalise, value_sum if a != 0, weight_sum for both.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class LinearAttentionState(NamedTuple):
    """State of `linear_attention`: float32 (float64 for float64 inputs), K first.

    Attributes:
        kv: `[N, H_kv, K, V]`, decayed sum of k v^T.
        key_sum: `[N, H_kv, K]`, or None without `normalize`.
        value_sum: `[N, H_kv, V]`, or None with `a == 0`.
        weight_sum: `[N, H_kv]`, or None unless `normalize` and `a != 0`.
    """

    kv: Tensor
    key_sum: Tensor | None
    value_sum: Tensor | None
    weight_sum: Tensor | None


class WindowLinearAttentionState(NamedTuple):
    """State of `window_linear_attention`: sums over the keys that have left the window, and a ring of the last w keys.

    Attributes:
        kv: `[N, H_kv, K, V]`, decayed sum of phi_k v^T.
        key_sum: `[N, H_kv, K]`, sum of phi_k.
        value_sum: `[N, H_kv, V]`, or None with `a == 0`.
        weight_sum: `[N, H_kv]`, or None with `a == 0`.
        window_k: `[N, w, H_kv, D]`, dtype of k.
        window_v: `[N, w, H_kv, V]`, dtype of v.
        window_phi_k: `[N, w, H_kv, K]`, dtype of phi_k.
        window_g: `[N, w, H_kv]` float32 log decay of the ring's keys, or None without decay.
        window_valid: `[N, w]` bool; False marks a slot not filled yet.
        slot: int64 scalar tensor: the oldest entry, which the next token overwrites; the same for all rows.
    """

    kv: Tensor
    key_sum: Tensor
    value_sum: Tensor | None
    weight_sum: Tensor | None
    window_k: Tensor
    window_v: Tensor
    window_phi_k: Tensor
    window_g: Tensor | None
    window_valid: Tensor
    slot: Tensor


def init_state(
    num_sequences: int,
    num_kv_heads: int,
    feature_dim: int,
    value_dim: int,
    *,
    a: float = 0.0,
    normalize: bool = True,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> LinearAttentionState:
    """Empty state of `linear_attention` for `num_sequences` sequences.

    Args:
        num_sequences: N, the batch size (or the number of packed sequences).
        num_kv_heads: H_kv.
        feature_dim: K, last dimension of q and k.
        value_dim: V, last dimension of v.
        a: constant term of the weight; any value but 0 adds `value_sum` (and `weight_sum`).
        normalize: whether the op divides by the sum of weights; adds `key_sum`.
        dtype: dtype of the sums; leave at float32 unless inputs are float64.
        device: where to put it.
    """
    shapes = linear_state_shapes(num_sequences, num_kv_heads, feature_dim, value_dim, a=a, normalize=normalize)
    return LinearAttentionState(
        *(None if shape is None else torch.zeros(shape, dtype=dtype, device=device) for shape in shapes)
    )


def init_window_state(
    num_sequences: int,
    num_kv_heads: int,
    head_dim: int,
    feature_dim: int,
    value_dim: int,
    *,
    window: int,
    a: float = 0.0,
    decay: bool = False,
    dtype: torch.dtype = torch.float32,
    state_dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> WindowLinearAttentionState:
    """Empty state of `window_linear_attention`: sums at zero, every ring slot invalid.

    Args:
        num_sequences: N, the batch size (or the number of packed sequences).
        num_kv_heads: H_kv.
        head_dim: D, last dimension of q and k.
        feature_dim: K, last dimension of phi_q and phi_k.
        value_dim: V, last dimension of v.
        window: w, the number of keys that keep softmax attention.
        a: constant term of the linear weight; any value but 0 adds `value_sum` and `weight_sum`.
        decay: True if the op is called with `g` or `g_gamma`; adds `window_g`.
        dtype: dtype of the ring (that of k, v, phi_k).
        state_dtype: dtype of the sums; leave at float32 unless inputs are float64.
        device: where to put it.
    """
    shapes = window_state_shapes(
        num_sequences, num_kv_heads, head_dim, feature_dim, value_dim, window=window, a=a, decay=decay
    )
    dtypes = (*[state_dtype] * 4, dtype, dtype, dtype, state_dtype, torch.bool, torch.int64)
    return WindowLinearAttentionState(
        *(
            None if shape is None else torch.zeros(shape, dtype=kind, device=device)
            for shape, kind in zip(shapes, dtypes, strict=True)
        )
    )


def linear_state_shapes(
    num_sequences: int, num_kv_heads: int, feature_dim: int, value_dim: int, *, a: float, normalize: bool
) -> tuple[tuple[int, ...] | None, ...]:
    """Shape of each member of a `LinearAttentionState`, None for an absent one; arguments as in `init_state`."""
    heads = (num_sequences, num_kv_heads)
    return (
        (*heads, feature_dim, value_dim),
        (*heads, feature_dim) if normalize else None,
        (*heads, value_dim) if a != 0 else None,
        heads if normalize and a != 0 else None,
    )


def window_state_shapes(
    num_sequences: int,
    num_kv_heads: int,
    head_dim: int,
    feature_dim: int,
    value_dim: int,
    *,
    window: int,
    a: float,
    decay: bool,
) -> tuple[tuple[int, ...] | None, ...]:
    """As `linear_state_shapes`, for a `WindowLinearAttentionState`; arguments as in `init_window_state`."""
    ring = (num_sequences, window, num_kv_heads)
    return (
        *linear_state_shapes(num_sequences, num_kv_heads, feature_dim, value_dim, a=a, normalize=True),
        (*ring, head_dim),
        (*ring, value_dim),
        (*ring, feature_dim),
        ring if decay else None,
        ring[:2],
        (),
    )


def linear_sums(state: LinearAttentionState | WindowLinearAttentionState) -> LinearAttentionState:
    """The four sums of either state (views, not copies)."""
    return LinearAttentionState(state.kv, state.key_sum, state.value_sum, state.weight_sum)
