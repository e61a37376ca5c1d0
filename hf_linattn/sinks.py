"""Far keys in the long run: attention sinks, and a bound on what all other far keys weigh together.

Softmax models give much of their attention to the first tokens of a sequence, whatever these say (attention sinks,
arXiv 2309.17453), and take it back where a key is worth more. In a sum over all far keys that weight drowns: it stays
what it was while the others add up. Here the first `sinks` tokens have features of their own,

    phi(k_j) = [0, e_j]  for j < sinks,   [phi(k_j), 0]  for any other key,   phi(q) = [phi(q) r, exp(x_q.u + bias)],

so that the weight of sink j is the exponential of a logit as in softmax, with a learned key u_j of each head in
place of k_j, which no state has to keep. r = min(1, far_length / (i + 1)) for query i: beyond `far_length` tokens the
weights of the other far keys shrink with their number, and weigh together what they did at that length, the one of
training.
"""

import torch
from torch import Tensor, nn
from transformers import initialization as init

from hf_linattn.feature_maps import FeatureMap
from hf_linattn.kernels import HedgehogMap

# e^20 times a million tokens is finite in float32, and no logit of a sink comes near it.
MAX_LOGIT = 20.0


class SinkQueries(FeatureMap):
    """Features of queries: those of `base`, then one for each sink.

    Args:
        base (`FeatureMap`): of the other keys.
        sinks (`int`): number of sinks, may be 0.
        far_length (`int`, *optional*): tokens beyond which the features of `base` shrink; None for none.
    """

    def __init__(self, base: FeatureMap, sinks: int, far_length: int | None):
        super().__init__(base.num_heads, base.head_dim)
        self.base, self.sinks, self.far_length = base, sinks, far_length
        self.feature_dim = base.feature_dim + sinks
        if sinks:
            self.sink_weight = self._per_head_weight(sinks)
            self.sink_bias = nn.Parameter(torch.empty(base.num_heads, sinks, dtype=torch.float32))

    def reset_parameters(self) -> None:
        self.base.reset_parameters()
        if self.sinks:
            init.zeros_(self.sink_weight)
            init.zeros_(self.sink_bias)

    @torch.no_grad()
    def set_sinks(self, keys: Tensor, bias: Tensor) -> None:
        """u from `keys` `[sinks, H_kv, D]`, the same for the query heads of a KV head; `bias` `[H]` for all sinks."""
        group = self.num_heads // keys.shape[1]
        self.sink_weight.copy_(keys.repeat_interleave(group, 1).permute(1, 2, 0).flatten(0, 1))
        self.sink_bias.copy_(bias[:, None].expand_as(self.sink_bias))

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        features = self.base(x, positions)
        if self.far_length is not None:
            share = (self.far_length / (positions + 1).clamp_min(1)).clamp_max(1)
            features = features * share[:, None, :, None]
        if not self.sinks:
            return features
        logits = self._project(x, self.sink_weight) + self.sink_bias.float().unsqueeze(-2)
        return torch.cat([features, logits.clamp_max(MAX_LOGIT).exp()], -1)

    def for_step(self) -> HedgehogMap | None:
        base = self.base.for_step()
        if base is None:
            return None
        sinks = {"sink_weight": self.sink_weight, "sink_bias": self.sink_bias} if self.sinks else {}
        return base._replace(far_length=self.far_length, **sinks)


class SinkKeys(FeatureMap):
    """Features of keys: those of `base`, or where the key is a sink, only the one that says which.

    Args:
        base, sinks: as for `SinkQueries`.
    """

    def __init__(self, base: FeatureMap, sinks: int):
        super().__init__(base.num_heads, base.head_dim)
        self.base, self.sinks = base, sinks
        self.feature_dim = base.feature_dim + sinks

    def reset_parameters(self) -> None:
        self.base.reset_parameters()

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        features = self.base(x, positions)
        which = which_sink(positions, self.sinks)[:, None]
        features = features.masked_fill(which.any(-1, keepdim=True), 0)
        return torch.cat([features, which.to(features.dtype).expand(*features.shape[:-1], self.sinks)], -1)

    def for_step(self) -> HedgehogMap | None:
        return self.base.for_step()


def which_sink(positions: Tensor, sinks: int) -> Tensor:
    """`[..., T]` -> bool `[..., T, sinks]`: is the token at this position that sink?"""
    return positions.unsqueeze(-1) == torch.arange(sinks, device=positions.device)
