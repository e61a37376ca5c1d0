"""One token for every row: the recurrence itself, state updated in place.

Shared by the reference and chunked backends, since one token has nothing to chunk. No host sync and no branch on
data, so a step can be captured in a CUDA graph and traced by torch.compile(fullgraph=True). Inference only: no
gradient flows through a step.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_linattn.kernels.reference import guarded_denominator, merge_window_and_linear
from hf_linattn.kernels.state import LinearAttentionState, WindowLinearAttentionState, linear_sums

_STEP_FEATURE_MAPS = {
    None: lambda x: x,
    "elu": lambda x: F.elu(x) + 1,
    "relu": F.relu,
    "l2": lambda x: F.normalize(x, dim=-1),
}


def recurrent_linear_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    state: LinearAttentionState,
    *,
    a: float,
    b: float,
    normalize: bool,
    feature_map: str | None,
) -> Tensor:
    """See `hf_linattn.kernels.linear_attention_step`; arguments are already checked."""
    acc, apply_map = state.kv.dtype, _STEP_FEATURE_MAPS[feature_map]
    _step_add_token(state, apply_map(k.to(acc)), v.to(acc), None if g is None else g.to(acc).exp())
    num, den = _step_read(state, apply_map(q.to(acc)), a, b, normalize)
    o = num if den is None else num / guarded_denominator(den)[..., None]
    return o.flatten(1, 2).to(q.dtype)


def recurrent_window_linear_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    phi_q: Tensor,
    phi_k: Tensor,
    g: Tensor | None,
    state: WindowLinearAttentionState,
    log_scale: Tensor | None,
    *,
    scale: float,
    a: float,
    b: float,
    softcap: float | None,
) -> Tensor:
    """See `hf_linattn.kernels.window_linear_attention_step`; arguments are already checked."""
    acc = state.kv.dtype
    slot = state.slot.view(1)
    valid = state.window_valid.index_select(1, slot)[:, 0]

    def leaving(ring: Tensor) -> Tensor:
        # An invalid slot may hold anything; zeros keep it out of the sums and turn its decay into exp(0).
        entry = ring.index_select(1, slot)[:, 0]
        return torch.where(valid.view(-1, *[1] * (entry.ndim - 1)), entry, 0).to(acc)

    decay = None if state.window_g is None else leaving(state.window_g).exp()
    _step_add_token(linear_sums(state), leaving(state.window_phi_k), leaving(state.window_v), decay, valid.to(acc))
    entering = ((state.window_k, k), (state.window_v, v), (state.window_phi_k, phi_k), (state.window_g, g))
    for ring, entry in entering:
        if ring is not None:
            ring.index_copy_(1, slot, entry.to(ring.dtype)[:, None])
    state.window_valid.index_fill_(1, slot, True)

    keys = state.window_k.to(acc).permute(0, 2, 3, 1)
    logits = scale * (q.to(acc).unflatten(1, (keys.shape[1], -1)) @ keys)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~state.window_valid[:, None, None], float("-inf"))
    values = torch.where(state.window_valid[:, :, None, None], state.window_v, 0).to(acc).transpose(1, 2)
    num, den = _step_read(linear_sums(state), phi_q.to(acc), a, b, normalize=True)
    o = merge_window_and_linear(logits, values, num, den, log_scale)
    state.slot.add_(1).remainder_(state.window_k.shape[1])
    return o.to(q.dtype)


def _step_add_token(
    state: LinearAttentionState, k: Tensor, v: Tensor, decay: Tensor | None, weight: Tensor | None = None
) -> None:
    """In place: decay the sums by `decay` `[N, H_kv]`, then add one token of count `weight` `[N]` (1 if None)."""
    if decay is not None:
        for x in state:
            if x is not None:
                x.mul_(decay.view(*decay.shape, *[1] * (x.ndim - 2)))
    state.kv.addcmul_(k[..., :, None], v[..., None, :])
    if state.key_sum is not None:
        state.key_sum.add_(k)
    if state.value_sum is not None:
        state.value_sum.add_(v)
    if state.weight_sum is not None:
        state.weight_sum.add_(1.0 if weight is None else weight[:, None])


def _step_read(
    state: LinearAttentionState, q: Tensor, a: float, b: float, normalize: bool
) -> tuple[Tensor, Tensor | None]:
    """(sum of weight * value `[N, H_kv, G, V]`, sum of weights `[N, H_kv, G]` or None) for q `[N, H, K]`."""
    q = q.unflatten(1, (state.kv.shape[1], -1))
    num = b * (q @ state.kv)
    if state.value_sum is not None:
        num = num + a * state.value_sum[:, :, None]
    if not normalize:
        return num, None
    den = b * (q * state.key_sum[:, :, None]).sum(-1)
    if state.weight_sum is not None:
        den = den + a * state.weight_sum[:, :, None]
    return num, den
