"""Decay of the state, per KV head: `g` (per token) or `g_gamma` (constant), natural log, <= 0, float32."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init


class FixedDecay(nn.Module):
    """One learned decay per KV head: g_gamma = -exp(log_rate).

    Half-lives start log-spaced from 256 to 16,384 tokens over the heads: the forgetting of RetNet (arXiv 2307.08621),
    slowed to the lengths at which a converted model's state, not its window, has to remember.
    """

    def __init__(self, num_kv_heads: int, hidden_size: int):
        super().__init__()
        self.log_rate = nn.Parameter(torch.empty(num_kv_heads, dtype=torch.float32))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        half_life = torch.logspace(8, 14, len(self.log_rate), base=2.0, device=self.log_rate.device)
        init.copy_(self.log_rate, torch.log(math.log(2.0) / half_life))

    def forward(self, hidden_states: Tensor | None) -> dict[str, Tensor]:
        """Returns `{"g_gamma": [H_kv]}`."""
        return {"g_gamma": -self.log_rate.float().exp()}


class ScalarGate(nn.Module):
    """Data-dependent decay per token and KV head: g = logsigmoid(x W + bias) / 16 (GLA, arXiv 2312.06635, scalar).

    x are the layer's hidden states. Starts nearly open: a half-life of about 4,500 tokens for any x.
    """

    temperature = 16.0

    def __init__(self, num_kv_heads: int, hidden_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_kv_heads, hidden_size, dtype=torch.float32))
        self.bias = nn.Parameter(torch.empty(num_kv_heads, dtype=torch.float32))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        init.zeros_(self.weight)
        init.constant_(self.bias, 6.0)

    def forward(self, hidden_states: Tensor | None) -> dict[str, Tensor]:
        """hidden_states `[B, T, hidden]` -> `{"g": [B, T, H_kv]}`."""
        if hidden_states is None:
            raise ValueError('hidden_states: decay="scalar" needs the layer\'s hidden states, got None')
        logits = F.linear(hidden_states.float(), self.weight.float(), self.bias.float())
        return {"g": F.logsigmoid(logits) / self.temperature}


GATES: dict[str, type[nn.Module]] = {"fixed": FixedDecay, "scalar": ScalarGate}
