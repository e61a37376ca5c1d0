"""The arithmetic of chunked linear attention, forward and backward, on tensors in chunk layout.

One matrix carries all four sums: with k^ = [k, 1] and v^ = [v, 1], the state S^ = sum k^ v^T holds kv, key_sum,
value_sum and weight_sum, and a query row reads it as o^ = [b q, a] S^ = [numerator, denominator]. Per chunk:

    o^ = e^G [b q, a] S^_in + (D * (a + b q k^T)) v^          D_ij = e^{G_i - G_j}, j <= i

Backward (arXiv 2510.21956, equations of the analytic gradient), with u = do / den, d = (do . o) / den, u^ = [u, -d]:

    dP = D * (u^ v^T)      dq = b dP k + e^G (u^ S^_in^T)      dk = b dP^T q + e^{G_C - G} (v^ R^T)
    dv = P^T u + e^{G_C - G} (k^ R)      R = sum over later chunks of e^G [b q, a]^T u^
    dG_i = u^_i . o^_i - k^_i . dk^_i

The gradient of the chunk's whole decay is <R, S^_out>, so that dg is summed within chunks only: no difference of
sums over the whole sequence. Matrix operands are rounded to the input dtype; what cancels (z, d, denominators) is not.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from hf_linattn.kernels.sequence_layout import DenseChunks, PackedChunks
from hf_linattn.kernels.state import LinearAttentionState

MIN_CHUNK = 64
# A float32 value is the sum of three bfloat16 ones: that many ones in v^ meet its parts, and products stay exact.
SPLIT_PARTS = 3
ALIGNED_COLUMNS = 8


class LinearForm(NamedTuple):
    """Shape of the weight and the sums: f = a + b s, divided by its sum or not, causal or not."""

    a: float
    b: float
    normalize: bool
    causal: bool


class LinearOperands(NamedTuple):
    """Chunk layout of one call: M = Z * n, rows of q are G * C.

    Attributes:
        q: `[M, G * C, K^]` with a column of ones if a != 0.
        k: `[M, C, K^]` with a column that counts the token if a != 0.
        v: `[M, C, V^]` with `SPLIT_PARTS` columns of ones if normalised.
        key_count: `[M, 1, C]` 1 for a token that counts, 0 otherwise, or None where causality alone excludes the rest.
        log_decay: `[M, C]` cumulative log decay within the chunk, or None.
        coefficients: `[K^]`: b for the features, a for the column of ones, 0 for padding; just b without that column.
        feature_dim: K.
        value_dim: V.
        acc: dtype of all sums.
        rounding: dtype that matrix products may round their operands to.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    key_count: Tensor | None
    log_decay: Tensor | None
    coefficients: Tensor | float
    feature_dim: int
    value_dim: int
    acc: torch.dtype
    rounding: torch.dtype


class LinearGradients(NamedTuple):
    """Gradients in chunk layout, in the accumulation dtype; `log_decay` `[M, C]` belongs to g; `boundary` to S^_0."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    boundary: Tensor


def chunk_size_for(feature_dim: int) -> int:
    """C >= K keeps the states of all chunks, (T / C) K V numbers, within O(T V)."""
    return max(MIN_CHUNK, 1 << (feature_dim - 1).bit_length())


def chunk_operand_dtype(x: Tensor) -> torch.dtype:
    """What matrices are rounded to: bfloat16 on CUDA (bmm returns float32), otherwise the accumulation dtype.

    float16 is raised to float32: sums over a long sequence pass its largest number.
    """
    if x.dtype == torch.bfloat16 and x.is_cuda:
        return torch.bfloat16
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def chunk_matmul(x: Tensor, y: Tensor, acc: torch.dtype) -> Tensor:
    """Batched x @ y, accumulated and returned in `acc`."""
    return torch.bmm(x, y) if x.dtype == acc else torch.bmm(x, y, out_dtype=acc)


def linear_operands(
    layout: DenseChunks | PackedChunks,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    key_is_valid: Tensor | None,
    form: LinearForm,
) -> LinearOperands:
    """Bring `[B, T, H, *]` inputs into chunk layout and add the columns that carry the plain sums.

    Args:
        layout: how sequences are cut.
        q: `[B, T, H, K]`.
        k: `[B, T, H_kv, K]`, zero where a key is invalid.
        v: `[B, T, H_kv, V]`, zero where a key is invalid.
        g: `[B, T, H_kv]` or None, zero where a key is invalid.
        key_is_valid: bool `[B, T]`, or None if all keys count.
        form: of the weight.
    """
    dtype = chunk_operand_dtype(q)
    acc = torch.float64 if q.dtype == torch.float64 else torch.float32
    feature_dim, value_dim = q.shape[-1], v.shape[-1]
    key_width = _aligned_width(feature_dim + 1) if form.a != 0 else feature_dim
    q_c = layout.to_chunks(q, dtype, key_width, is_query=True)
    k_c = layout.to_chunks(k, dtype, key_width)
    v_c = layout.to_chunks(v, dtype, _aligned_width(value_dim + SPLIT_PARTS) if form.normalize else value_dim)
    if form.normalize:
        v_c[..., value_dim : value_dim + SPLIT_PARTS] = 1
    coefficients, key_count = form.b, None
    if form.a != 0:
        counts = torch.ones((), dtype=torch.bool, device=q.device) if key_is_valid is None else key_is_valid[..., None]
        key_count = layout.to_chunks(counts.expand(k.shape[:3])[..., None], dtype)
        q_c[..., feature_dim] = 1
        k_c[..., feature_dim] = key_count[..., 0]
        coefficients = torch.zeros(key_width, dtype=acc, device=q.device)
        coefficients[:feature_dim] = form.b
        coefficients[feature_dim] = form.a
        key_count = None if key_is_valid is None else key_count.to(acc).transpose(1, 2)
    log_decay = None if g is None else sum_within_chunk(layout.to_chunks(g[..., None], acc)[..., 0])
    # float32 matrices on the CPU may be multiplied as bfloat16 (torch.set_float32_matmul_precision): exact for
    # operands that are bfloat16 numbers.
    rounding = torch.bfloat16 if q.dtype == torch.bfloat16 else dtype
    return LinearOperands(q_c, k_c, v_c, key_count, log_decay, coefficients, feature_dim, value_dim, acc, rounding)


def linear_chunk_forward(
    layout: DenseChunks | PackedChunks, x: LinearOperands, boundary: Tensor | None, form: LinearForm
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Numerators, denominators and the state after the last token.

    Args:
        layout: how sequences are cut.
        x: from `linear_operands`.
        boundary: `[N, H_kv, K^, V^]` state before the first token, or None.
        form: of the weight.

    Returns:
        num `[M, G * C, V]`, den `[M, G * C]` (None without `normalize`), final `[N, H_kv, K^, V^]`.
    """
    after, incoming, key_sum = _chunk_states(layout, x, boundary, form)
    o = chunk_matmul(x.q, incoming[..., : x.value_dim], x.acc)
    den = None
    if form.normalize:
        parts = _split_parts(key_sum[..., None], x.rounding).to(x.q.dtype)
        den = chunk_matmul(x.q, parts, x.acc).sum(-1)
    if x.log_decay is not None:
        gain = x.log_decay.exp()
        o = _scale_rows(o, gain)
        den = _scale_rows(den, gain) if form.normalize else None
    if form.causal:
        weights = _chunk_weights(x, form)
        intra = chunk_matmul(weights, x.v, x.acc)
        o.add_(intra[..., : x.value_dim])
        if form.normalize:
            den.add_(intra[..., x.value_dim])
    return o, den, layout.outgoing(after, boundary)


def linear_chunk_backward(
    layout: DenseChunks | PackedChunks,
    x: LinearOperands,
    boundary: Tensor | None,
    form: LinearForm,
    u: Tensor,
    minus_d: Tensor | None,
    row_term: Tensor | None,
    final_gradient: Tensor | None,
) -> LinearGradients:
    """Gradients of everything `linear_chunk_forward` read.

    Args:
        layout, x, boundary, form: as in the forward.
        u: `[B, T, H, V]`, gradient of the numerators.
        minus_d: `[B, T, H]`, gradient of the denominators (None without `normalize`).
        row_term: `[B, T, H]`, u . num + minus_d * den; None if there is no decay.
        final_gradient: `[N, H_kv, K^, V^]`, gradient of the final state, or None.
    """
    after, incoming, key_sum = _chunk_states(layout, x, boundary, form)
    features, values = slice(0, x.feature_dim), slice(0, x.value_dim)
    u_c = layout.to_chunks(u, x.q.dtype, x.v.shape[-1], is_query=True)
    dq = chunk_matmul(u_c[..., values], incoming[:, features, values].transpose(1, 2), x.acc)
    if form.normalize:
        minus_d = layout.to_chunks(minus_d[..., None], x.acc, is_query=True)
        u_c[..., x.value_dim : x.value_dim + SPLIT_PARTS] = _split_parts(minus_d, x.rounding)
        dq.addcmul_(minus_d, key_sum[:, None, features])
    q_in, k_out, loss = x.q, x.k, None
    if x.log_decay is not None:
        gain, loss = x.log_decay.exp(), (x.log_decay[:, -1:] - x.log_decay).exp()
        dq, q_in = _scale_rows(dq, gain), _scale_rows(x.q, gain.to(x.q.dtype))
        k_out = x.k * loss[..., None].to(x.k.dtype)
    read = _weigh_features(chunk_matmul(q_in.transpose(1, 2), u_c, x.acc), x, -2).unflatten(0, (-1, layout.num_chunks))
    if form.causal:
        before = layout.carry(read, _chunk_log_decay(layout, x), final_gradient, reverse=True)
        from_later = layout.incoming(before, final_gradient, reverse=True).flatten(0, 1)
        boundary_gradient = layout.outgoing(before, final_gradient, reverse=True)
    else:
        boundary_gradient = layout.outgoing(layout.carry(read, None, final_gradient), final_gradient)
        from_later = layout.broadcast(boundary_gradient).flatten(0, 1)
    rounded = from_later[..., values].to(x.q.dtype)
    dk = chunk_matmul(x.v[..., values], rounded.transpose(1, 2), x.acc)
    if form.normalize:
        dk.add_(from_later[..., x.value_dim : x.value_dim + SPLIT_PARTS].sum(-1)[:, None])
    if loss is not None:
        dk = dk * loss[..., None]
    dv = chunk_matmul(k_out, rounded, x.acc)
    if form.causal:
        weights = _chunk_weights(x, form)
        dv.add_(chunk_matmul(weights.transpose(1, 2), u_c[..., values], x.acc))
        dp = _mask_and_decay(chunk_matmul(u_c, x.v.transpose(1, 2), x.acc), x)
        dq.add_(chunk_matmul(dp, x.k[..., features], x.acc), alpha=form.b)
        dk.add_(_weigh_features(chunk_matmul(dp.transpose(1, 2), x.q, x.acc), x, -1))
    d_log_decay = None
    if x.log_decay is not None:
        rows = layout.to_chunks(row_term[..., None], x.acc, is_query=True).view(len(dk), -1, layout.chunk).sum(1)
        whole = (from_later * after.flatten(0, 1)).sum((1, 2))
        d_log_decay = sum_within_chunk(rows - (x.k * dk).sum(-1), reverse=True) + whole[:, None]
    return LinearGradients(dq, dk[..., features], dv, d_log_decay, boundary_gradient)


def stack_linear_sums(sums: LinearAttentionState, x: LinearOperands, ones: int = SPLIT_PARTS) -> Tensor:
    """The four sums as one matrix `[N, H_kv, K^, V^]`; `ones`: how many columns repeat the plain sums."""
    stacked = sums.kv.new_zeros(*sums.kv.shape[:2], x.k.shape[-1], x.v.shape[-1], dtype=x.acc)
    features, values = slice(0, x.feature_dim), slice(0, x.value_dim)
    columns = slice(x.value_dim, x.value_dim + ones)
    stacked[..., features, values] = sums.kv
    if sums.key_sum is not None:
        stacked[..., features, columns] = sums.key_sum[..., None].to(x.acc)
    if sums.value_sum is not None:
        stacked[..., x.feature_dim, values] = sums.value_sum.to(x.acc)
    if sums.weight_sum is not None:
        stacked[..., x.feature_dim, columns] = sums.weight_sum[..., None].to(x.acc)
    return stacked


def unstack_linear_sums(
    stacked: Tensor, x: LinearOperands, form: LinearForm, is_gradient: bool = False
) -> LinearAttentionState:
    """Inverse of `stack_linear_sums`; the split columns repeat a state's plain sums, but share out a gradient's."""
    features, values = slice(0, x.feature_dim), slice(0, x.value_dim)
    plain = None
    if form.normalize:
        columns = stacked[..., x.value_dim : x.value_dim + SPLIT_PARTS]
        plain = columns.sum(-1) if is_gradient else columns[..., 0]
    return LinearAttentionState(
        kv=stacked[..., features, values].contiguous(),
        key_sum=plain[..., features].contiguous() if form.normalize else None,
        value_sum=stacked[..., x.feature_dim, values].contiguous() if form.a != 0 else None,
        weight_sum=plain[..., x.feature_dim].contiguous() if form.normalize and form.a != 0 else None,
    )


def sum_within_chunk(x: Tensor, reverse: bool = False) -> Tensor:
    """Inclusive cumulative sum over C, `[M, C]` -> `[M, C]` (torch.cumsum has no deterministic version on CUDA)."""
    chunk = x.shape[-1]
    earlier = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).tril()
    return torch.where(earlier.T if reverse else earlier, x[..., None, :], 0).sum(-1)


def _chunk_states(
    layout: DenseChunks | PackedChunks, x: LinearOperands, boundary: Tensor | None, form: LinearForm
) -> tuple[Tensor, Tensor, Tensor | None]:
    """State after each chunk `[Z, n, K^, V^]`; coefficients * the state it reads `[M, K^, V^]`, rounded; key_sum."""
    keys = x.k
    if x.log_decay is not None:
        keys = x.k * (x.log_decay[:, -1:] - x.log_decay).exp()[..., None].to(x.k.dtype)
    updates = chunk_matmul(keys.transpose(1, 2), x.v, x.acc).unflatten(0, (-1, layout.num_chunks))
    after = layout.carry(updates, _chunk_log_decay(layout, x), boundary)

    def read(values: Tensor, edge: Tensor | None) -> Tensor:
        if form.causal:
            return layout.incoming(values, edge).flatten(0, 1)
        return layout.broadcast(layout.outgoing(values, None)).flatten(0, 1)

    def rounded(values: Tensor) -> Tensor:
        return _weigh_features(values, x, -2).to(x.q.dtype)

    incoming = read(rounded(after), None if boundary is None else rounded(boundary))
    if not form.normalize:
        return after, incoming, None
    key_sum = read(after[..., x.value_dim], None if boundary is None else boundary[..., x.value_dim])
    return after, incoming, _weigh_features(key_sum, x, -1)


def _weigh_features(values: Tensor, x: LinearOperands, axis: int) -> Tensor:
    """Times the coefficients along `axis` (-1 or -2), of length K^."""
    if isinstance(x.coefficients, float):
        return values if x.coefficients == 1 else values * x.coefficients
    return values * (x.coefficients if axis == -1 else x.coefficients[:, None])


def _chunk_log_decay(layout: DenseChunks | PackedChunks, x: LinearOperands) -> Tensor | None:
    return None if x.log_decay is None else x.log_decay[:, -1].view(-1, layout.num_chunks)


def _chunk_weights(x: LinearOperands, form: LinearForm) -> Tensor:
    """Weights of the chunk's own keys `[M, G * C, C]`, decayed, masked and rounded."""
    features = slice(0, x.feature_dim)
    weights = chunk_matmul(x.q[..., features], x.k[..., features].transpose(1, 2), x.acc)
    if form.b != 1:
        weights.mul_(form.b)
    if form.a != 0:
        weights.add_(form.a if x.key_count is None else form.a * x.key_count)
    return _mask_and_decay(weights, x)


def _mask_and_decay(weights: Tensor, x: LinearOperands) -> Tensor:
    """Times e^{G_i - G_j} where j <= i, 0 elsewhere, rounded to the operands' dtype; may overwrite `weights`."""
    chunk = weights.shape[-1]
    if x.log_decay is None:
        weights = weights.to(x.q.dtype)
        weights.view(len(weights), -1, chunk, chunk).tril_()
        return weights
    by_group = weights.view(len(weights), -1, chunk, chunk)
    later = torch.ones(chunk, chunk, dtype=torch.bool, device=weights.device).triu(1)
    difference = x.log_decay[:, :, None] - x.log_decay[:, None, :]
    by_group.mul_(difference.masked_fill_(later, float("-inf")).exp_()[:, None])
    return weights.to(x.q.dtype)


def _scale_rows(x: Tensor, factor: Tensor) -> Tensor:
    """x `[M, G * C, ...]` times `factor` `[M, C]` of the row's token."""
    by_group = x.unflatten(1, (-1, factor.shape[1]))
    return (by_group * factor.view(len(factor), 1, -1, *[1] * (x.ndim - 2))).flatten(1, 2)


def _split_parts(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x `[M, R, 1]` -> `[M, R, SPLIT_PARTS]` in `dtype`, whose sum is x."""
    parts = []
    for _ in range(SPLIT_PARTS):
        part = x.to(dtype)
        parts.append(part)
        x = x - part.to(x.dtype)
    return torch.cat(parts, -1)


def _aligned_width(columns: int) -> int:
    return -(-columns // ALIGNED_COLUMNS) * ALIGNED_COLUMNS
