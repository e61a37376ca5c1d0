"""Linear attention ops: prefill / training and one-token steps, with softmax window or without."""

from hf_linattn.kernels.dispatch import explain
from hf_linattn.kernels.hedgehog_step import HedgehogMap, hedgehog_step
from hf_linattn.kernels.ops import (
    linear_attention,
    linear_attention_step,
    window_linear_attention,
    window_linear_attention_step,
)
from hf_linattn.kernels.state import (
    LinearAttentionState,
    WindowLinearAttentionState,
    init_state,
    init_window_state,
)

__all__ = [
    "HedgehogMap",
    "LinearAttentionState",
    "WindowLinearAttentionState",
    "explain",
    "hedgehog_step",
    "init_state",
    "init_window_state",
    "linear_attention",
    "linear_attention_step",
    "window_linear_attention",
    "window_linear_attention_step",
]
