"""Both ops as the recurrence they are: one token at a time, plain PyTorch, differentiable by autograd, exact in fp64.

The ground truth of the tests and the definition of the ops. Formulas: f(s) = a + b s (arXiv 2510.21956, equations of
the factorised form); decay multiplies the sums before a token is added. `b` arrives with `scale` multiplied in, `g`
with `g_gamma` expanded: `ops.py` has checked and normalised the arguments.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from hf_linattn.kernels.state import (
    LinearAttentionState,
    WindowLinearAttentionState,
    init_state,
    init_window_state,
    linear_sums,
)

DENOMINATOR_EPS = 1e-6


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64 inputs, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def reference_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    *,
    a: float,
    b: float,
    normalize: bool,
    causal: bool,
    initial_state: LinearAttentionState | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, LinearAttentionState | None]:
    """See `hf_linattn.kernels.linear_attention`; arguments are already checked."""
    acc = accumulation_dtype(q.dtype)
    outputs, finals = [], []
    for tokens, rows in _reference_sequences(q, cu_seqlens):
        q_s, k_s, v_s = (x[:, tokens].to(acc) for x in (q, k, v))
        sums = _reference_first_sums(initial_state, rows, k_s, v_s, acc)
        o = []
        for t in range(q_s.shape[1]):
            sums = _reference_add(sums, k_s[:, t], v_s[:, t], None if g is None else g[:, tokens][:, t].to(acc))
            if causal:
                o.append(_reference_read(q_s[:, t], sums, a, b, normalize))
        if not causal:
            o = [_reference_read(q_s[:, t], sums, a, b, normalize) for t in range(q_s.shape[1])]
        outputs.append(torch.stack(o, 1) if o else v_s.new_zeros(v.shape[0], 0, q.shape[2], v.shape[3]))
        finals.append(sums)
    o = _reference_join(outputs, q)
    if not output_final_state:
        return o, None
    kv, key_sum, value_sum, weight_sum = (torch.cat(x) for x in zip(*finals, strict=True))
    return o, LinearAttentionState(
        kv,
        key_sum if normalize else None,
        value_sum if a != 0 else None,
        weight_sum if normalize and a != 0 else None,
    )


def reference_window_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    phi_q: Tensor,
    phi_k: Tensor,
    g: Tensor | None,
    log_scale: Tensor | None,
    *,
    window: int,
    scale: float,
    a: float,
    b: float,
    softcap: float | None,
    initial_state: WindowLinearAttentionState | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, WindowLinearAttentionState | None]:
    """See `hf_linattn.kernels.window_linear_attention`; arguments are already checked."""
    acc = accumulation_dtype(q.dtype)
    outputs, finals = [], []
    for tokens, rows in _reference_sequences(q, cu_seqlens):
        ring = _reference_first_ring(initial_state, rows, k, v, phi_k, g, window)
        new = tuple(None if x is None else x[:, tokens] for x in (k, v, phi_k, g))
        keys, values, features, gates = (
            None if x is None else torch.cat([r, x], 1).to(acc) for r, x in zip(ring[:4], new, strict=True)
        )
        valid = torch.cat([ring[4], ring[4].new_ones(new[0].shape[:2])], 1)
        sums = _reference_first_sums(initial_state, rows, features, values, acc)
        o = []
        for t in range(new[0].shape[1]):
            # With the ring in front, entry t is the one that leaves when token t arrives.
            added = _reference_add(
                sums, features[:, t], values[:, t], None if gates is None else gates[:, t], valid[:, t].to(acc)
            )
            sums = LinearAttentionState(
                *(
                    torch.where(valid[:, t].view(-1, *[1] * (x.ndim - 1)), x, y)
                    for x, y in zip(added, sums, strict=True)
                )
            )
            inside = slice(t + 1, t + 1 + window)
            logits = _reference_logits(q[:, tokens][:, t].to(acc), keys[:, inside], scale, softcap)
            logits = logits.masked_fill(~valid[:, None, None, inside], float("-inf"))
            far_o = _reference_sums_read(phi_q[:, tokens][:, t].to(acc), sums, a, b)
            o.append(merge_window_and_linear(logits, values[:, inside].transpose(1, 2), *far_o, log_scale))
        outputs.append(torch.stack(o, 1) if o else values.new_zeros(q.shape[0], 0, q.shape[2], v.shape[3]))
        # Ring in chronological order: the last w of (old ring, new tokens).
        last = [None if r is None else torch.cat([r, x], 1)[:, -window:] for r, x in zip(ring[:4], new, strict=True)]
        finals.append((*sums, *last, valid[:, -window:]))
    o = _reference_join(outputs, q)
    if not output_final_state:
        return o, None
    kv, key_sum, value_sum, weight_sum, *ring = (
        None if x[0] is None else torch.cat(x).detach() for x in zip(*finals, strict=True)
    )
    far = (kv, key_sum, value_sum if a != 0 else None, weight_sum if a != 0 else None)
    return o, WindowLinearAttentionState(*far, *ring, torch.zeros((), dtype=torch.int64, device=q.device))


def merge_window_and_linear(
    logits: Tensor, values: Tensor, far_num: Tensor, far_den: Tensor, log_scale: Tensor | None
) -> Tensor:
    """One softmax-like quotient over window and linear part, in log space.

    Args:
        logits: `[B, H_kv, G, w]`, -inf where a key does not count.
        values: `[B, H_kv, w, V]`.
        far_num: `[B, H_kv, G, V]`, sum of weight * value over the far keys.
        far_den: `[B, H_kv, G]`, sum of weights.
        log_scale: `[H]` natural log of the linear part's weight, or None for 0.

    Returns:
        `[B, H, V]`.
    """
    kv_heads, groups = far_den.shape[1:]
    shift = 0.0 if log_scale is None else log_scale.to(far_den.dtype).view(kv_heads, groups)
    limits = torch.finfo(far_den.dtype)
    far_log = torch.where(far_den > limits.tiny, far_den.clamp(min=limits.tiny).log() + shift, float("-inf"))
    peak = torch.maximum(logits.amax(-1), far_log).detach()
    near = (logits - peak[..., None]).exp()
    # far_den == 0 must not meet an infinite factor: 1 / tiny bounds it in every other case.
    far = (shift - peak).clamp(max=-math.log(limits.tiny)).exp()
    num = near @ values + far[..., None] * far_num
    den = near.sum(-1) + far * far_den
    return (num / den[..., None]).flatten(1, 2)


def guarded_denominator(den: Tensor) -> Tensor:
    """`den`, with every entry of magnitude below `DENOMINATOR_EPS` replaced by `DENOMINATOR_EPS`."""
    return torch.where(den.abs() < DENOMINATOR_EPS, DENOMINATOR_EPS, den)


def _reference_sequences(q: Tensor, cu_seqlens: Tensor | None) -> Iterator[tuple[slice, slice]]:
    """(tokens, rows of the state) of every group of sequences that can run together."""
    if cu_seqlens is None:
        yield slice(0, q.shape[1]), slice(0, q.shape[0])
        return
    bounds = cu_seqlens.tolist()
    for n, (start, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        yield slice(start, end), slice(n, n + 1)


def _reference_first_sums(
    initial_state: LinearAttentionState | WindowLinearAttentionState | None,
    rows: slice,
    k: Tensor,
    v: Tensor,
    acc: torch.dtype,
) -> LinearAttentionState:
    """All four sums for these rows: the reference keeps them whether they are read or not."""
    empty = init_state(k.shape[0], k.shape[2], k.shape[3], v.shape[3], a=1.0, dtype=acc, device=k.device)
    if initial_state is None:
        return empty
    given = linear_sums(initial_state)
    return LinearAttentionState(
        *(zero if x is None else x[rows].to(acc) for x, zero in zip(given, empty, strict=True))
    )


def _reference_first_ring(
    initial_state: WindowLinearAttentionState | None,
    rows: slice,
    k: Tensor,
    v: Tensor,
    phi_k: Tensor,
    g: Tensor | None,
    window: int,
) -> tuple[Tensor | None, ...]:
    """(k, v, phi_k, g, valid) of the ring in chronological order; all invalid without an initial state."""
    if initial_state is None:
        count = rows.stop - rows.start
        empty = init_window_state(
            count,
            k.shape[2],
            k.shape[3],
            phi_k.shape[3],
            v.shape[3],
            window=window,
            decay=g is not None,
            dtype=k.dtype,
        )
        ring = tuple(None if x is None else x.to(k.device) for x in empty[4:9])
    else:
        order = (torch.arange(window, device=k.device) + initial_state.slot) % window
        ring = tuple(None if x is None else x[rows][:, order] for x in initial_state[4:9])
    valid = ring[4]
    # An invalid slot may hold anything; zeros keep 0 * NaN out of the products.
    return (
        *(None if x is None else torch.where(valid.view(*valid.shape, *[1] * (x.ndim - 2)), x, 0) for x in ring[:4]),
        valid,
    )


def _reference_add(
    sums: LinearAttentionState, k: Tensor, v: Tensor, g: Tensor | None, weight: Tensor | float = 1.0
) -> LinearAttentionState:
    """Decay, then add one token: k `[B, H_kv, K]`, v `[B, H_kv, V]`, g `[B, H_kv]`, weight `[B]`."""
    decay = torch.ones_like(k[..., 0]) if g is None else g.exp()
    count = weight[:, None] if isinstance(weight, Tensor) else weight
    return LinearAttentionState(
        kv=decay[..., None, None] * sums.kv + k[..., :, None] * v[..., None, :],
        key_sum=decay[..., None] * sums.key_sum + k,
        value_sum=decay[..., None] * sums.value_sum + v,
        weight_sum=decay * sums.weight_sum + count,
    )


def _reference_sums_read(q: Tensor, sums: LinearAttentionState, a: float, b: float) -> tuple[Tensor, Tensor]:
    """(sum of weight * value `[B, H_kv, G, V]`, sum of weights `[B, H_kv, G]`) for q `[B, H, K]`."""
    q = q.unflatten(1, (sums.kv.shape[1], -1))
    num = a * sums.value_sum[:, :, None] + b * torch.einsum("bhgk,bhkv->bhgv", q, sums.kv)
    den = a * sums.weight_sum[:, :, None] + b * torch.einsum("bhgk,bhk->bhg", q, sums.key_sum)
    return num, den


def _reference_read(q: Tensor, sums: LinearAttentionState, a: float, b: float, normalize: bool) -> Tensor:
    num, den = _reference_sums_read(q, sums, a, b)
    return (num / guarded_denominator(den)[..., None] if normalize else num).flatten(1, 2)


def _reference_logits(q: Tensor, keys: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Window logits `[B, H_kv, G, w]` of q `[B, H, D]` against keys `[B, w, H_kv, D]`."""
    logits = scale * torch.einsum("bhgd,bwhd->bhgw", q.unflatten(1, (keys.shape[2], -1)), keys)
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _reference_join(outputs: list[Tensor], q: Tensor) -> Tensor:
    o = torch.cat(outputs, 1)
    # Packed tokens behind the last boundary belong to no sequence.
    return torch.nn.functional.pad(o, (0, 0, 0, 0, 0, q.shape[1] - o.shape[1])).to(q.dtype)
