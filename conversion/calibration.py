"""Closed-form start of `log_scale`, the weight of the linear part of a layer beside its softmax window, and of sinks.

For query i of head h with far keys F_i (those that have left the window), the teacher gives them the mass
sum_{F_i} exp(scale q_i.k_j) and the linear part sum_{F_i} e^{G_{i-w} - G_j} (a + b phi(q_i).phi(k_j)). log_scale_h is
the mean over queries of the difference of their logarithms: the constant under which both parts share one denominator.

Sinks (hf_linattn/sinks.py) start as softmax has them, with the mean key of their position as u and a bias that takes
log_scale back; they are no part of F_i.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from hf_linattn.attention import feature_inputs
from hf_linattn.conversion.far_keys import SMALLEST_WEIGHT, FarKeys
from hf_linattn.sinks import which_sink

# Queries per block: the N x N weights exist for one block of rows at a time.
QUERY_BLOCK = 128


class LogScaleCalibration:
    """Attention function of a calibration forward: returns the teacher's output, leaves `sums`.

    Args:
        softmax_of (`Callable`): attention module -> its softmax attention function.

    Attributes:
        sums: layer index -> (sum over queries of the log ratio `[H]`, number of queries `[]`).
        sink_keys: layer index -> (sum of sqrt(scale) k over documents `[sinks, H_kv, D]`, number of documents
            `[sinks]`), of the layers that have sinks.
    """

    def __init__(self, softmax_of: Callable):
        self.softmax_of = softmax_of
        self.sums: dict[int, tuple[Tensor, Tensor]] = {}
        self.sink_keys: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
        """AttentionInterface's contract: `[B, H, T, D]` in, `([B, T, H, V], None)` out."""
        teacher = self.softmax_of(module)(
            module, query, key, value, attention_mask, scaling=scaling, dropout=0.0, **kwargs
        )
        if module.linear_attention.window:
            keys = far_keys_of(module, query, key, scaling, kwargs)
            self.sums[module.layer_idx] = sum_log_mass_ratio(keys)
            if keys.sinks:
                self.sink_keys[module.layer_idx] = sum_sink_keys(keys)
        return teacher


def far_keys_of(module, query: Tensor, key: Tensor, scaling: float | None, kwargs: dict) -> FarKeys:
    """`FarKeys` from the arguments of an attention function (AttentionInterface's contract)."""
    return FarKeys(
        module.linear_attention,
        query,
        key,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        position_ids=kwargs.get("position_ids"),
        hidden_states=kwargs.get("linattn_hidden_states"),
        sliding_window=kwargs.get("sliding_window"),
        softcap=kwargs.get("softcap"),
        feature_inputs=feature_inputs(module, query, key, kwargs),
    )


def sum_log_mass_ratio(keys: FarKeys) -> tuple[Tensor, Tensor]:
    """Sum over queries with far keys of log(softmax mass) - log(linear mass).

    Returns:
        The sum per head, `[H]`, and the number of queries it is taken over, `[]`; 0 and 0 without far keys.
    """
    length = len(keys.index)
    heads = keys.query.shape[1]
    total = torch.zeros(keys.num_kv_heads, heads // keys.num_kv_heads, device=keys.index.device)
    count = torch.zeros((), device=keys.index.device)
    for start in range(keys.window, length, QUERY_BLOCK):
        rows = keys.index[start : start + QUERY_BLOCK]
        num_keys = int(rows[-1]) + 1 - keys.window
        logits, weights, far, _ = keys.pairs(rows, num_keys)
        far = far & (keys.positions[:, :num_keys] >= keys.sinks)[:, None, None, None]
        log_softmax_mass = logits.masked_fill(~far, -torch.inf).logsumexp(-1)
        log_linear_mass = weights.masked_fill(~far, 0).sum(-1).clamp_min(SMALLEST_WEIGHT).log()
        has_far = far.any(-1)
        total += (log_softmax_mass - log_linear_mass).masked_fill(~has_far, 0).sum((0, 3))
        count += has_far.sum()
    return total.flatten(), count


def sum_sink_keys(keys: FarKeys) -> tuple[Tensor, Tensor]:
    """sqrt(scale) k as the feature maps see it, summed over all documents, and their number, for each sink.

    Returns:
        `[sinks, H_kv, D]` float32 and `[sinks]`.
    """
    is_sink = which_sink(keys.positions, keys.sinks).float()
    total = torch.einsum("bts,bhtd->shd", is_sink, keys.feature_key.float() * keys.scale**0.5)
    return total, is_sink.sum((0, 1))
