"""Divergence between the attention weights of a layer and its teacher's, over a sample of queries.

    KL(a_teacher || a_student) = log den_s - log den_t + sum_{far j} a_t(j) (s_j - log_scale - log w_j)

with den_t = sum_j e^{s_j} over all keys, den_s the student's shared denominator, w_j the linear weight of far key j
(far_keys.py); inside the window both have the same numerators. Hedgehog (arXiv 2402.04347) trains feature maps on
these weights: an output hides which keys it came from, and the sharp ones that recall needs are rare in it.
"""

import torch
from torch import Tensor

from hf_linattn.conversion.far_keys import SMALLEST_WEIGHT, FarKeys


def attention_weights_divergence(linear_attention, keys: FarKeys, num_queries: int) -> Tensor:
    """Mean KL in nats, `[]` float32, over `num_queries` positions drawn at random; 0 for a query without far keys.

    Args:
        linear_attention (`LinearAttention`): whose feature maps, `log_scale` and gate get the gradient.
        keys (`FarKeys`): of the same layer.
        num_queries (`int`): positions, the same in every row.
    """
    length = len(keys.index)
    rows = torch.randint(min(keys.window, length - 1), length, (num_queries,), device=keys.index.device)
    logits, weights, far, near = keys.pairs(rows, length)
    log_scale = linear_attention.log_scale.float().view(keys.num_kv_heads, -1, 1, 1)
    log_weights = weights.clamp_min(SMALLEST_WEIGHT).log() + log_scale
    lowest = torch.finfo(logits.dtype).min
    seen = logits.masked_fill(~(far | near), lowest)
    log_den_t = seen.logsumexp(-1)
    log_den_s = torch.where(far, log_weights, logits).masked_fill(~(far | near), lowest).logsumexp(-1)
    a_far = (seen - log_den_t[..., None]).exp() * far
    divergence = log_den_s - log_den_t + (a_far * (logits - log_weights)).sum(-1)
    # Without far keys it is 0 but for rounding. The mean is over all, so that processes can be averaged.
    return (divergence * far.any(-1)).mean()
