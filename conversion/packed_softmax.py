"""Softmax attention of packed rows without their N x N mask, on CUDA: for the teacher and layers that stay softmax.

Transformers tells packed documents apart by a `[B, 1, T, T]` mask, which keeps PyTorch's softmax off its flash kernels
and takes a gigabyte for four rows of 16K tokens. Document boundaries as offsets need neither.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, PreTrainedModel

from hf_linattn import attention_modules
from hf_linattn.attention import in_autocast_dtype
from hf_linattn.sequence import sequence_layout

# Without an entry of this name in AttentionMaskInterface, no mask is made.
PACKED_SOFTMAX_NAME = "hf_linattn_packed_softmax"


def packed_softmax_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    position_ids: Tensor | None = None,
    sliding_window: int | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Causal softmax within documents; AttentionInterface's contract: `[B, H, T, D]` in, `([B, T, H, V], None)` out.

    Args:
        position_ids: `[B or 1, T]`; resets start a new document.
        sliding_window: keys a query sees, its own included; None for all.
    """
    batch, heads, length, _ = query.shape
    query, key, value = in_autocast_dtype(query, key, value)
    layout = sequence_layout(None, position_ids, (batch, length), query.device)
    if layout is None:
        bounds = torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=query.device)
    else:
        bounds = layout.cu_seqlens
    # The kernels read grouped keys as they are, but the interface to say so differs between versions of PyTorch.
    groups = heads // key.shape[1]
    q, k, v = (
        x.transpose(1, 2).flatten(0, 1).repeat_interleave(n, 1) if n > 1 else x.transpose(1, 2).flatten(0, 1)
        for x, n in ((query, 1), (key, groups), (value, groups))
    )
    window = (-1 if sliding_window is None else sliding_window - 1, 0)
    o = varlen_attn(q, k, v, bounds, bounds, length, length, scale=scaling, window_size=window)
    return o.view(batch, length, heads, -1), None


@contextlib.contextmanager
def packed_softmax(model: PreTrainedModel, dtype: torch.dtype) -> Iterator[None]:
    """Within: `model`'s softmax, the teacher's and that of layers left alone, is `packed_softmax_forward`.

    Nothing changes where that cannot run: off CUDA, in float32, beyond 256 dimensions, or with another softmax than
    PyTorch's (a model loaded with eager attention may cap its logits).

    Args:
        model (`PreTrainedModel`): converted, or not.
        dtype (`torch.dtype`): of q, k and v.
    """
    name = getattr(model, "softmax_implementation", model.config._attn_implementation)
    if name != "sdpa" or not _runs(model, dtype):
        yield
        return
    configs = {id(m.config): m.config for m in (model, *attention_modules(model).values())}
    changed = [c for c in configs.values() if c._attn_implementation == name]
    try:
        for config in changed:
            config._attn_implementation_internal = PACKED_SOFTMAX_NAME
        if hasattr(model, "softmax_implementation"):
            model.softmax_implementation = PACKED_SOFTMAX_NAME
        yield
    finally:
        for config in changed:
            config._attn_implementation_internal = name
        if hasattr(model, "softmax_implementation"):
            model.softmax_implementation = name


def _runs(model: PreTrainedModel, dtype: torch.dtype) -> bool:
    head_dim = max(getattr(m, "head_dim", 0) for m in attention_modules(model).values())
    return model.device.type == "cuda" and dtype in (torch.bfloat16, torch.float16) and 0 < head_dim <= 256


AttentionInterface.register(PACKED_SOFTMAX_NAME, packed_softmax_forward)
