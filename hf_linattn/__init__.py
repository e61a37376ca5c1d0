"""Linear attention for pretrained Hugging Face decoders.

    import hf_linattn
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained("path/or/hub-id-of-a-converted-model")
    model = hf_linattn.linearize(model, hf_linattn.LinearAttentionConfig(window=64))    # or convert one in place

Importing registers the model type "hf_linattn" and the attention implementation of that name with Transformers.
"""

from hf_linattn.attention import LinearAttention
from hf_linattn.config import LinearAttentionConfig
from hf_linattn.layers import (
    attention_modules,
    dispatch_to,
    linear_attention_modules,
    set_attention_dropout,
    softmax_attention,
    window_only,
    windows_of_at_most,
)
from hf_linattn.modeling import linearize

__version__ = "0.1.0"

__all__ = [
    "LinearAttention",
    "LinearAttentionConfig",
    "attention_modules",
    "dispatch_to",
    "linear_attention_modules",
    "linearize",
    "set_attention_dropout",
    "softmax_attention",
    "window_only",
    "windows_of_at_most",
]
