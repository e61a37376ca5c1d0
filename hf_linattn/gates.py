"""Decay of the state, per KV head: `g` (per token) or `g_gamma` (constant), natural log, <= 0, float32."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from hf_linattn.options import check_options, known_options


class FixedDecay(nn.Module):
    """One decay per KV head: g_gamma = -exp(log_rate).

    Half-lives are log-spaced over the heads: the forgetting of RetNet (arXiv 2307.08621), slowed to the lengths at
    which a converted model's state, not its window, has to remember.

    Args:
        half_life (`list[float]`, defaults to `[256, 16384]`): tokens, of the first and of the last KV head.
        learned (`bool`, defaults to `True`): train the rates. The compiled window kernels have no gradient for them,
            so that training runs on PyTorch's op; with `False` it runs on the kernels.
    """

    def __init__(
        self,
        num_kv_heads: int,
        hidden_size: int,
        half_life: tuple[float, float] = (256, 16_384),
        learned: bool = True,
    ):
        super().__init__()
        self.half_life = _check_half_life(half_life)
        rates = torch.empty(num_kv_heads, dtype=torch.float32)
        if learned:
            self.log_rate = nn.Parameter(rates)
        else:
            self.register_buffer("log_rate", rates)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        first, last = (math.log2(tokens) for tokens in self.half_life)
        half_life = torch.logspace(first, last, len(self.log_rate), base=2.0, device=self.log_rate.device)
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


def build_gate(name: str, num_kv_heads: int, hidden_size: int, options: dict[str, Any]) -> nn.Module:
    """The decay called `name`.

    Raises:
        ValueError: an option that it does not have, naming those it has, or a value outside its range.
    """
    cls = GATES[name]
    check_options("decay_kwargs", name, options, known_options(cls, "num_kv_heads", "hidden_size"))
    return cls(num_kv_heads, hidden_size, **options)


def _check_half_life(value: Any) -> tuple[float, float]:
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    if len(values) != 2 or not all(isinstance(x, (int, float)) and x > 0 for x in values):
        raise ValueError(
            "decay_kwargs: half_life must be two positive numbers of tokens, for the first and the last KV head, "
            f"got {value!r}"
        )
    return values
