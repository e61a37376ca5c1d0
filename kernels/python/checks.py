"""Argument checks of the public ops: made once, before dispatch.

Every message names the argument, what was expected, what came and the remedy.
"""

import torch
from torch import Tensor

from hf_linattn.kernels.cuda_linear import STEP_MAPS
from hf_linattn.kernels.state import (
    LinearAttentionState,
    WindowLinearAttentionState,
    linear_state_shapes,
    window_state_shapes,
)

OP_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def check_qkv(names: str, q: Tensor, k: Tensor, v: Tensor | None, num_dims: int) -> None:
    """Ranks, dtypes, devices and shapes of a query, a key and (optionally) a value with shared kv heads.

    Args:
        names: the three argument names, separated by spaces, as the caller knows them.
        q: `[B, T, H, K]` (or `[B, H, K]` with `num_dims` 3).
        k: `[B, T, H_kv, K]`.
        v: `[B, T, H_kv, V]`, or None to skip it.
        num_dims: 4 for sequences, 3 for one token.
    """
    q_name, k_name, v_name = names.split()
    # Every attribute of a tensor is read once: this runs at each call, while the device waits.
    dtype, device = q.dtype, q.device
    for name, x in ((q_name, q), (k_name, k), (v_name, v)):
        if x is None:
            continue
        if x.ndim != num_dims:
            layout = "[B, T, H, dim]" if num_dims == 4 else "[B, H, dim]"
            raise ValueError(
                f"{name}: expected {num_dims} dimensions {layout}, got shape {tuple(x.shape)}; reshape it"
            )
        x_dtype = x.dtype
        if x_dtype not in OP_DTYPES:
            raise TypeError(f"{name}: expected a bfloat16, float16, float32 or float64 tensor, got {x_dtype}; cast it")
        if x_dtype != dtype:
            raise TypeError(f"{name}: expected the dtype of {q_name}, {dtype}, got {x_dtype}; cast one of them")
        if x.device != device:
            raise ValueError(f"{name}: expected the device of {q_name}, {device}, got {x.device}; move it there")
    *q_tokens, heads, dim = q.shape
    *k_tokens, kv_heads, k_dim = k.shape
    if k_tokens != q_tokens:
        raise ValueError(
            f"{k_name}: expected leading dimensions {tuple(q_tokens)} as in {q_name}, got {tuple(k_tokens)}; "
            "keys and queries cover the same tokens"
        )
    if k_dim != dim:
        raise ValueError(f"{k_name}: expected last dimension {dim} as in {q_name}, got {k_dim}; pad one")
    if kv_heads == 0 or heads % kv_heads != 0:
        raise ValueError(
            f"{k_name}: expected a number of heads that divides {q_name}'s {heads}, got {kv_heads}; "
            "pass one kv head for each group of query heads, unexpanded"
        )
    if v is not None:
        *v_tokens, v_heads, _ = v.shape
        if v_heads != kv_heads or v_tokens != k_tokens:
            raise ValueError(
                f"{v_name}: expected shape {(*k_tokens, kv_heads, 'V')} as {k_name} has, got {tuple(v.shape)}; fix v"
            )


def check_features(names: str, x: Tensor, phi_x: Tensor) -> None:
    """phi_x has x's tokens, heads and dtype; `names` holds both argument names, separated by a space."""
    name, phi_name = names.split()
    if phi_x.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"{phi_name}: expected shape {(*x.shape[:-1], 'K')} as {name} has, got {tuple(phi_x.shape)}; "
            "map every head of every token"
        )
    if phi_x.dtype != x.dtype:
        raise TypeError(f"{phi_name}: expected the dtype of {name}, {x.dtype}, got {phi_x.dtype}; cast the features")


def check_decay(g: Tensor | None, g_gamma: Tensor | None, k: Tensor) -> Tensor | None:
    """The log decay of every token, `k.shape[:-1]`, from either argument; None without decay."""
    if g is None and g_gamma is None:
        return None
    if g is not None and g_gamma is not None:
        raise ValueError("g_gamma: expected None together with g, got a tensor; add the fixed decay to g instead")
    name, decay, shape = ("g", g, k.shape[:-1]) if g_gamma is None else ("g_gamma", g_gamma, k.shape[-2:-1])
    check_head_parameter(name, decay, shape, k)
    return decay if g_gamma is None else decay.expand(k.shape[:-1])


def check_head_parameter(name: str, x: Tensor | None, shape: torch.Size, like: Tensor) -> None:
    """A float32 (or float64) tensor of exactly this shape on the inputs' device."""
    if x is None:
        return
    if x.shape != shape:
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(x.shape)}; it has no other axes")
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"{name}: expected float32, got {x.dtype}; use {name}.float(), half precision is too coarse here"
        )
    if x.device != like.device:
        raise ValueError(f"{name}: expected device {like.device} as the inputs, got {x.device}; move it there")


def check_cu_seqlens(cu_seqlens: Tensor | None, q: Tensor) -> None:
    """Packed boundaries: an integer vector `[N + 1]`; its values are read on the CPU only (no device sync)."""
    if cu_seqlens is None:
        return
    if cu_seqlens.ndim != 1 or cu_seqlens.numel() < 2:
        raise ValueError(f"cu_seqlens: expected shape [N + 1] with N >= 1, got {tuple(cu_seqlens.shape)}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens: expected int32 or int64, got {cu_seqlens.dtype}; cast it")
    if cu_seqlens.device != q.device:
        raise ValueError(
            f"cu_seqlens: expected device {q.device} as the inputs, got {cu_seqlens.device}; move it there"
        )
    if q.shape[0] != 1:
        raise ValueError(f"cu_seqlens: expected a batch of 1 for packed input, got {q.shape[0]}; concatenate along T")
    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if cu_seqlens[0] != 0 or (cu_seqlens.diff() < 0).any() or cu_seqlens[-1] > q.shape[1]:
        raise ValueError(
            f"cu_seqlens: expected non-decreasing boundaries from 0 to at most T = {q.shape[1]}, "
            f"got {cu_seqlens.tolist()[:8]}...; pass the cumulated sequence lengths with a leading 0"
        )


def check_linear_state(
    name: str,
    state: LinearAttentionState | None,
    num_sequences: int,
    k: Tensor,
    v: Tensor,
    *,
    a: float,
    normalize: bool,
) -> None:
    """Members present exactly where this form of the op needs them, with the shapes of these inputs."""
    if state is None:
        return
    if not isinstance(state, LinearAttentionState):
        raise TypeError(
            f"{name}: expected a LinearAttentionState, got {type(state).__name__}; build it with init_state"
        )
    kv_heads, feature_dim = k.shape[-2:]
    expected = linear_state_shapes(num_sequences, kv_heads, feature_dim, v.shape[-1], a=a, normalize=normalize)
    _check_state_members(name, state, expected, "init_state", k)


def check_window_state(
    name: str,
    state: WindowLinearAttentionState | None,
    num_sequences: int,
    k: Tensor,
    v: Tensor,
    phi_k: Tensor,
    *,
    window: int,
    a: float,
    decay: bool,
) -> None:
    """As `check_linear_state`, for the window op; refuses members that require grad."""
    if state is None:
        return
    if not isinstance(state, WindowLinearAttentionState):
        raise TypeError(
            f"{name}: expected a WindowLinearAttentionState, got {type(state).__name__}; "
            "build it with init_window_state"
        )
    expected = window_state_shapes(
        num_sequences, k.shape[-2], k.shape[-1], phi_k.shape[-1], v.shape[-1], window=window, a=a, decay=decay
    )
    _check_state_members(name, state, expected, "init_window_state", k)
    if any(x is not None and x.requires_grad for x in state):
        raise ValueError(
            f"{name}: expected tensors without gradient, got one that requires grad; the window op does not "
            "differentiate its initial state: detach it"
        )


def check_window_scalars(window: int, softcap: float | None) -> None:
    """window >= 1; softcap None or positive."""
    if window < 1:
        raise ValueError(f"window: expected at least 1 key, got {window}; use linear_attention for no window at all")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap: expected a positive bound or None, got {softcap}; pass None to switch it off")


def check_feature_map(feature_map: str | None) -> None:
    """One of the maps that the step op applies itself, or None."""
    if feature_map not in STEP_MAPS:
        raise ValueError(
            f"feature_map: expected one of {', '.join(filter(None, STEP_MAPS))} or None, got {feature_map!r}; "
            "apply other maps before the call"
        )


def _check_state_members(name: str, state: tuple, expected: tuple, builder: str, like: Tensor) -> None:
    device = like.device
    for field, x, want in zip(state._fields, state, expected, strict=True):
        if (x is None) != (want is None):
            wanted, got = ("None", "a tensor") if want is None else (f"shape {want}", "None")
            raise ValueError(
                f"{name}.{field}: expected {wanted} for these a, normalize and decay, got {got}; "
                f"build the state with {builder} and the same arguments"
            )
        if x is None:
            continue
        if x.shape != want:
            raise ValueError(
                f"{name}.{field}: expected shape {want}, got {tuple(x.shape)}; "
                f"build the state with {builder} for these inputs"
            )
        if x.device != device:
            raise ValueError(f"{name}.{field}: expected device {device}, got {x.device}; move the state there")
