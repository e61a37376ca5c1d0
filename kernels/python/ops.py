"""The public ops: check the arguments once, settle defaults, hand over to a backend.

    linear_attention              linear_attention_step
    window_linear_attention       window_linear_attention_step

Formulas: f(s) = a + b s, arXiv 2510.21956; the hybrid with one denominator follows LoLCATs (arXiv 2410.10254),
merged in log space.
"""

import torch
from torch import Tensor

from hf_linattn.kernels.checks import (
    check_cu_seqlens,
    check_decay,
    check_feature_map,
    check_features,
    check_head_parameter,
    check_linear_state,
    check_qkv,
    check_window_scalars,
    check_window_state,
)
from hf_linattn.kernels.chunked_linear import chunked_linear_attention
from hf_linattn.kernels.chunked_window import chunked_window_linear_attention
from hf_linattn.kernels.cuda_linear import cuda_linear_attention, cuda_linear_attention_step, unsupported_by_cuda_step
from hf_linattn.kernels.cuda_window import cuda_window_linear_attention, unsupported_by_cuda_window
from hf_linattn.kernels.cuda_window_step import cuda_window_linear_attention_step, unsupported_by_cuda_window_step
from hf_linattn.kernels.dispatch import autocast_off, choose_backend, where_grad_is_on
from hf_linattn.kernels.reference import reference_linear_attention, reference_window_linear_attention
from hf_linattn.kernels.state import LinearAttentionState, WindowLinearAttentionState
from hf_linattn.kernels.step import recurrent_linear_attention_step, recurrent_window_linear_attention_step


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float = 1.0,
    a: float = 0.0,
    b: float = 1.0,
    normalize: bool = True,
    causal: bool = True,
    initial_state: LinearAttentionState | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, LinearAttentionState | None]:
    """Factorised linear attention with weights f_ij = a + b * scale * (q_i . k_j).

    o_i = sum_j e^{G_i - G_j} f_ij v_j, over j <= i if causal, divided by the same sum without v_j if `normalize`;
    G is the inclusive cumulative sum of the log decay. A denominator of magnitude below 1e-6 counts as 1e-6.
    Sums are kept in float32 (float64 for float64 inputs). Time O(T), memory O(T); backward saves q, k, v, one
    denominator a row and, but for the compiled kernels, o.

    Args:
        q: `[B, T, H, K]` queries after the feature map; bfloat16, float16, float32 or float64, any strides.
        k: `[B, T, H_kv, K]` keys; H must be a multiple of H_kv, query head h reads kv head h // (H / H_kv).
        v: `[B, T, H_kv, V]` values.
        g: `[B, T, H_kv]` float32 natural-log decay of each token, <= 0. Causal only.
        g_gamma: `[H_kv]` float32 fixed log decay, instead of `g`.
        scale: multiplies q . k.
        a: constant term of the weight.
        b: factor of the linear term.
        normalize: divide by the sum of weights.
        causal: False lets every query read all keys of its sequence (no decay, no initial state).
        initial_state: state to continue from (`[N, ...]`; N = B, or the number of packed sequences).
        output_final_state: also return the state after the last token.
        cu_seqlens: `[N + 1]` int32/int64 boundaries of packed sequences; then B = 1. Tokens behind the last boundary
            belong to no sequence: their output is zero.
        backend: None (dispatcher chooses), "reference", "chunked" or "cuda"; see `explain`.

    Returns:
        o `[B, T, H, V]` in q's dtype, and the final state (None unless asked). Gradients flow to q, k, v, g, g_gamma
        and the members of `initial_state`, from o and the final state.

    Raises:
        ValueError, TypeError: for shapes, dtypes or devices that do not fit; the text names the argument.
    """
    check_qkv("q k v", q, k, v, 4)
    check_cu_seqlens(cu_seqlens, q)
    decay = check_decay(g, g_gamma, k)
    if not causal and decay is not None:
        raise ValueError("causal: expected True together with g or g_gamma, got False; decay needs an order of tokens")
    if not causal and initial_state is not None:
        raise ValueError("causal: expected True together with initial_state, got False; pass all keys at once instead")
    num_sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    check_linear_state("initial_state", initial_state, num_sequences, k, v, a=a, normalize=normalize)
    options = {
        "a": float(a),
        "b": float(b * scale),
        "normalize": normalize,
        "causal": causal,
        "initial_state": initial_state,
        "output_final_state": output_final_state,
        "cu_seqlens": cu_seqlens,
    }
    chosen = choose_backend("linear_attention", q, v, backend)
    if chosen == "cuda":
        return cuda_linear_attention(q, k, v, decay, **options)
    run = reference_linear_attention if chosen == "reference" else chunked_linear_attention
    with autocast_off(q.device):
        return run(q, k, v, decay, **options)


def window_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    phi_q: Tensor,
    phi_k: Tensor,
    *,
    window: int,
    scale: float,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    log_scale: Tensor | None = None,
    a: float = 0.0,
    b: float = 1.0,
    softcap: float | None = None,
    initial_state: WindowLinearAttentionState | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, WindowLinearAttentionState | None]:
    """Softmax attention over the last `window` keys, linear attention over all older ones, one shared denominator.

    Window keys i - window < j <= i weigh e^{s_ij}, s_ij = scale * (q_i . k_j), soft-capped as c tanh(s / c). Far keys
    j <= i - window weigh e^{log_scale} e^{G_{i - window} - G_j} (a + b phi_q_i . phi_k_j): the state of
    `linear_attention`, delayed by `window` tokens. The quotient is evaluated in log space; without far keys it is
    exactly softmax. Far weights must not sum to a negative number.

    Args:
        q: `[B, T, H, D]` queries of the softmax part.
        k: `[B, T, H_kv, D]` keys; H must be a multiple of H_kv.
        v: `[B, T, H_kv, V]` values.
        phi_q: `[B, T, H, K]` feature-mapped queries, in q's dtype.
        phi_k: `[B, T, H_kv, K]` feature-mapped keys.
        window: w >= 1, number of keys (own included) that keep softmax.
        scale: multiplies q . k, usually D ** -0.5; it does not act on the features.
        g: `[B, T, H_kv]` float32 natural-log decay, <= 0, of the token that enters the state.
        g_gamma: `[H_kv]` float32 fixed log decay, instead of `g`.
        log_scale: `[H]` float32 natural log of the linear part's weight; None for 0.
        a: constant term of the far weight.
        b: factor of the far weight's linear term.
        softcap: bound c of the window logits, or None.
        initial_state: state to continue from; its ring precedes the tokens. It gets no gradient.
        output_final_state: also return the state after the last token (detached, slot 0).
        cu_seqlens: `[N + 1]` int32/int64 boundaries of packed sequences; then B = 1. Tokens behind the last boundary
            belong to no sequence: their output is zero.
        backend: None (dispatcher chooses), "reference", "chunked" or "cuda"; see `explain`.

    Returns:
        o `[B, T, H, V]` in q's dtype, and the final state (None unless asked). Gradients flow to q, k, v, phi_q,
        phi_k, g, g_gamma and log_scale.

    Raises:
        ValueError, TypeError: for shapes, dtypes or devices that do not fit; the text names the argument.
    """
    check_window_scalars(window, softcap)
    check_qkv("q k v", q, k, v, 4)
    check_features("q phi_q", q, phi_q)
    check_features("k phi_k", k, phi_k)
    check_qkv("phi_q phi_k v", phi_q, phi_k, v, 4)
    check_cu_seqlens(cu_seqlens, q)
    check_head_parameter("log_scale", log_scale, q.shape[2:3], q)
    decay = check_decay(g, g_gamma, k)
    num_sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    check_window_state(
        "initial_state", initial_state, num_sequences, k, v, phi_k, window=window, a=a, decay=decay is not None
    )
    options = {
        "window": window,
        "scale": float(scale),
        "a": float(a),
        "b": float(b),
        "softcap": softcap,
        "initial_state": initial_state,
        "output_final_state": output_final_state,
        "cu_seqlens": cu_seqlens,
    }
    unsupported = unsupported_by_cuda_window(g, g_gamma, a, initial_state)
    chosen = choose_backend("window_linear_attention", phi_q, v, backend, q.shape[-1], unsupported)
    if chosen == "cuda":
        return cuda_window_linear_attention(q, k, v, phi_q, phi_k, decay, log_scale, **options)
    run = reference_window_linear_attention if chosen == "reference" else chunked_window_linear_attention
    with autocast_off(q.device):
        return run(q, k, v, phi_q, phi_k, decay, log_scale, **options)


@where_grad_is_on(torch.no_grad())
def linear_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: LinearAttentionState,
    *,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float = 1.0,
    a: float = 0.0,
    b: float = 1.0,
    normalize: bool = True,
    feature_map: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """One token of `linear_attention`; `state` is updated in place. Inference only, CUDA-graph-capturable.

    Args:
        q: `[B, H, K]`.
        k: `[B, H_kv, K]`.
        v: `[B, H_kv, V]`.
        state: state of the B rows, from `init_state` or a prefill; its tensors are written.
        g: `[B, H_kv]` float32 log decay of this token.
        g_gamma: `[H_kv]` float32 fixed log decay, instead of `g`.
        scale, a, b, normalize: as in `linear_attention`; they must stay the same for the life of a state.
        feature_map: map applied to q and k on the way in, in the precision of the state: "elu" (elu(x) + 1), "relu",
            "l2" (x / max(|x|, 1e-12)), or None for q and k that are features already.
        backend: None, "reference" or "chunked" (both run the same recurrence), or "cuda".

    Returns:
        o `[B, H, V]` in q's dtype.

    Raises:
        ValueError, TypeError: for shapes, dtypes or devices that do not fit; the text names the argument.
    """
    check_qkv("q k v", q, k, v, 3)
    decay = check_decay(g, g_gamma, k)
    check_feature_map(feature_map)
    check_linear_state("state", state, q.shape[0], k, v, a=a, normalize=normalize)
    options = {"a": float(a), "b": float(b * scale), "normalize": normalize, "feature_map": feature_map}
    unsupported = unsupported_by_cuda_step(state)
    if choose_backend("linear_attention_step", q, v, backend, unsupported=unsupported) == "cuda":
        return cuda_linear_attention_step(q, k, v, decay, state, **options)
    with autocast_off(q.device):
        return recurrent_linear_attention_step(q, k, v, decay, state, **options)


@where_grad_is_on(torch.no_grad())
def window_linear_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    phi_q: Tensor,
    phi_k: Tensor,
    state: WindowLinearAttentionState,
    *,
    scale: float,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    log_scale: Tensor | None = None,
    a: float = 0.0,
    b: float = 1.0,
    softcap: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """One token of `window_linear_attention`; `state` is updated in place. Inference only, CUDA-graph-capturable.

    The entry that leaves the ring joins the sums (an invalid one changes nothing), the new token takes its slot, then
    the query reads ring and sums. The window length is that of the ring.

    Args:
        q: `[B, H, D]`.
        k: `[B, H_kv, D]`.
        v: `[B, H_kv, V]`.
        phi_q: `[B, H, K]`.
        phi_k: `[B, H_kv, K]`.
        state: state of the B rows, from `init_window_state` or a prefill; its tensors are written.
        scale: multiplies q . k.
        g: `[B, H_kv]` float32 log decay of this token.
        g_gamma: `[H_kv]` float32 fixed log decay, instead of `g`.
        log_scale: `[H]` float32 natural log of the linear part's weight; None for 0.
        a, b, softcap: as in `window_linear_attention`; they must stay the same for the life of a state.
        backend: None, "reference" or "chunked" (both run the same recurrence), or "cuda".

    Returns:
        o `[B, H, V]` in q's dtype.

    Raises:
        ValueError, TypeError: for shapes, dtypes or devices that do not fit; the text names the argument.
    """
    check_qkv("q k v", q, k, v, 3)
    check_features("q phi_q", q, phi_q)
    check_features("k phi_k", k, phi_k)
    check_qkv("phi_q phi_k v", phi_q, phi_k, v, 3)
    check_head_parameter("log_scale", log_scale, q.shape[1:2], q)
    decay = check_decay(g, g_gamma, k)
    if not isinstance(state, WindowLinearAttentionState):
        raise TypeError(
            f"state: expected a WindowLinearAttentionState, got {type(state).__name__}; "
            "build it with init_window_state"
        )
    window = state.window_k.shape[1]
    check_window_scalars(window, softcap)
    check_window_state("state", state, q.shape[0], k, v, phi_k, window=window, a=a, decay=decay is not None)
    options = {"scale": float(scale), "a": float(a), "b": float(b), "softcap": softcap}
    unsupported = unsupported_by_cuda_window_step(state, q.dtype)
    if choose_backend("window_linear_attention_step", phi_q, v, backend, q.shape[-1], unsupported) == "cuda":
        return cuda_window_linear_attention_step(q, k, v, phi_q, phi_k, decay, state, log_scale, **options)
    with autocast_off(q.device):
        return recurrent_window_linear_attention_step(q, k, v, phi_q, phi_k, decay, state, log_scale, **options)
