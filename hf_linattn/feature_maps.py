"""Feature maps phi: q and k after RoPE -> features whose dot product stands for exp(scale q.k).

Shapes: every map takes `[B, H, T, D]` (Transformers' layout) and gives `[B, H, T, F]` in float32. Its input is already
multiplied by sqrt(scale), so that x_q . x_k is the softmax logit whatever scale a model uses (OPT, Granite and
Gemma do not use D**-0.5). The map of k lives on the KV head. Per-head weights are stored 2-D, `[H * D, F]`, which
sharding by rows keeps head by head.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from hf_linattn.kernels import HedgehogMap
from hf_linattn.kernels.dispatch import autocast_off
from hf_linattn.options import check_options, known_options

# The rows over which a part of a weight's gradient is summed: enough parts for every multiprocessor of a GPU.
ROWS_OF_A_PIECE = 512


class FeatureMap(nn.Module):
    """Base: `forward(x [B, H, T, D], positions [B or 1, T] int64) -> [B, H, T, feature_dim]`, float32.

    `default_a`, `default_b` are the coefficients of f(x) = a + b x the map is meant for.
    """

    default_a, default_b = 0.0, 1.0
    feature_dim: int

    def __init__(self, num_heads: int, head_dim: int):
        super().__init__()
        self.num_heads, self.head_dim, self.feature_dim = num_heads, head_dim, head_dim

    def reset_parameters(self) -> None:
        """Set the initial value of every parameter and buffer; parameters already loaded are left alone."""

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        raise NotImplementedError

    def for_step(self) -> HedgehogMap | None:
        """This map as `hf_linattn.kernels.hedgehog_step` takes it; None for any but Hedgehog."""
        return None

    def _per_head_weight(self, columns: int) -> nn.Parameter:
        return nn.Parameter(torch.empty(self.num_heads * self.head_dim, columns, dtype=torch.float32))

    def _project(self, x: Tensor, weight: Tensor) -> Tensor:
        return _heads_second(_product(_heads_first(x.float()), _per_head(weight, self.head_dim)), x)

    @torch.no_grad()
    def _init_identity(self, weight: nn.Parameter) -> None:
        init.copy_(weight, self._identity(weight.shape[-1]).to(weight))

    def _identity(self, columns: int) -> Tensor:
        # The input carries sqrt(scale) ~ D**-0.25; the gain undoes it, so that the map starts from q and k themselves.
        return torch.eye(self.head_dim, columns).mul(self.head_dim**0.25).repeat(self.num_heads, 1)


class HedgehogFeatureMap(FeatureMap):
    """e^{m(x)} [softmax(y), softmax(-y)], y = x W (Hedgehog, arXiv 2402.04347; W starts as the identity).

    The original features sum to a constant, so that every query reads as much from far away and every key weighs as
    much there. With `magnitude` both depend on the token: m(x) = x.u + bias, which starts at 0.

    Args:
        feature_dim (`int`, *optional*): columns of W per head, the map has twice as many features; default head_dim.
        magnitude (`bool`, defaults to `False`): learn m(x); without it m is 0.
        hidden_dim (`int`, defaults to 0): width of a residual silu(x W1) W2 added to y, which starts at 0; 0 for none.
        seed (`int`, defaults to 0): of the initial W1.
    """

    # e^20 twice times a million keys is still finite in float32.
    max_magnitude = 20.0

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        feature_dim: int | None = None,
        magnitude: bool = False,
        hidden_dim: int = 0,
        seed: int = 0,
    ):
        super().__init__(num_heads, head_dim)
        self.columns = _positive("feature_dim", feature_dim or head_dim)
        self.feature_dim, self.magnitude, self.seed = 2 * self.columns, bool(magnitude), seed
        self.hidden_dim = _positive("hidden_dim", hidden_dim) if hidden_dim else 0
        # W, W1 and u side by side: one product reads x for all three.
        self.weight = self._per_head_weight(self.columns + self.hidden_dim + self.magnitude)
        if self.magnitude:
            self.magnitude_bias = nn.Parameter(torch.empty(num_heads, dtype=torch.float32))
        if self.hidden_dim:
            rows = num_heads * self.hidden_dim
            self.output_weight = nn.Parameter(torch.empty(rows, self.columns, dtype=torch.float32))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        weight = torch.zeros_like(self.weight)
        weight[:, : self.columns] = self._identity(self.columns).to(weight)
        if self.magnitude:
            init.zeros_(self.magnitude_bias)
        if self.hidden_dim:
            generator = torch.Generator().manual_seed(self.seed)
            rows = torch.randn(self.num_heads * self.head_dim, self.hidden_dim, generator=generator)
            weight[:, self.columns : self.columns + self.hidden_dim] = rows.mul(self.head_dim**-0.5).to(weight)
            init.zeros_(self.output_weight)
        init.copy_(self.weight, weight)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        products = _product(_heads_first(x.float()), _per_head(self.weight, self.head_dim))
        y, hidden, size = products.split([self.columns, self.hidden_dim, int(self.magnitude)], -1)
        if self.hidden_dim:
            y = y + _product(F.silu(hidden), _per_head(self.output_weight, self.hidden_dim))
        features = torch.cat([y, -y], -1).view(*y.shape[:2], 2, y.shape[2]).softmax(-1).flatten(-2)
        if self.magnitude:
            size = size + _in_float32(self.magnitude_bias).view(-1, 1, 1)
            features = features * size.clamp(-self.max_magnitude, self.max_magnitude).exp()
        return _heads_second(features, x)

    def for_step(self) -> HedgehogMap:
        output_weight = self.output_weight if self.hidden_dim else None
        return HedgehogMap(self.weight, output_weight, self.magnitude_bias if self.magnitude else None)


class T2RFeatureMap(FeatureMap):
    """relu(x W + bias) (T2R, arXiv 2103.13076).

    Args:
        feature_dim (`int`, *optional*): features per head; default head_dim.
    """

    def __init__(self, num_heads: int, head_dim: int, feature_dim: int | None = None):
        super().__init__(num_heads, head_dim)
        self.feature_dim = _positive("feature_dim", feature_dim or head_dim)
        self.weight = self._per_head_weight(self.feature_dim)
        self.bias = nn.Parameter(torch.empty(num_heads, self.feature_dim, dtype=torch.float32))

    def reset_parameters(self) -> None:
        self._init_identity(self.weight)
        init.zeros_(self.bias)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        return F.relu(self._project(x, self.weight) + self.bias.float().unsqueeze(-2))


class EluFeatureMap(FeatureMap):
    """elu(x) + 1 (arXiv 2006.16236)."""

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        return F.elu(x.float()) + 1


class ReluFeatureMap(FeatureMap):
    """relu(x)."""

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        return F.relu(x.float())


class IdentityFeatureMap(FeatureMap):
    """x / |x|, with f(x) = 1 + x: positive, since |phi(q).phi(k)| <= 1 (arXiv 2510.21956)."""

    default_a, default_b = 1.0, 1.0

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        return F.normalize(x.float(), dim=-1)


class PerformerFeatureMap(FeatureMap):
    """Positive orthogonal random features exp(w.x - |x|^2 / 2) / sqrt(F) (FAVOR+, arXiv 2009.14794).

    Unbiased for exp(x_q . x_k), so the linear part is commensurate with the softmax window without training. q and k
    must share w: it is drawn from `seed`, the same for both, and saved with the weights.

    Args:
        feature_dim (`int`, *optional*): number of random features; default 2 * head_dim.
        seed (`int`, defaults to 0): seed of the projection.
    """

    # exp(35)**2 times a million keys is still finite in float32.
    max_exponent = 35.0

    def __init__(self, num_heads: int, head_dim: int, feature_dim: int | None = None, seed: int = 0):
        super().__init__(num_heads, head_dim)
        self.feature_dim, self.seed = _positive("feature_dim", feature_dim or 2 * head_dim), seed
        self.register_buffer("projection", torch.empty(head_dim, self.feature_dim, dtype=torch.float32))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        blocks = [_orthogonal(self.head_dim, generator) for _ in range(math.ceil(self.feature_dim / self.head_dim))]
        rows = torch.cat(blocks)[: self.feature_dim]
        # Rows of a Gaussian matrix: orthogonal directions with chi-distributed lengths.
        lengths = torch.randn(self.feature_dim, self.head_dim, generator=generator).norm(dim=-1, keepdim=True)
        init.copy_(self.projection, (rows * lengths).T.to(self.projection.device))

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        x = x.float()
        exponent = x @ self.projection.float() - x.square().sum(-1, keepdim=True) / 2
        return exponent.clamp(max=self.max_exponent).exp() * self.feature_dim**-0.5


class CosformerFeatureMap(FeatureMap):
    """[relu(x) cos(pi i / 2M), relu(x) sin(pi i / 2M)], i = position (cosFormer, arXiv 2202.08791).

    phi(q_i).phi(k_j) = relu(q).relu(k) cos(pi (i - j) / 2M) is positive while i - j < M.

    Args:
        max_positions (`int`): M; `linearize` fills in the model's `max_position_embeddings`.
    """

    def __init__(self, num_heads: int, head_dim: int, max_positions: int):
        super().__init__(num_heads, head_dim)
        self.feature_dim, self.max_positions = 2 * head_dim, _positive("max_positions", max_positions)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        y = F.relu(x.float())
        angle = positions[:, None, :, None].float() * (math.pi / 2 / self.max_positions)
        return torch.cat([y * angle.cos(), y * angle.sin()], -1)


class TaylorFeatureMap(FeatureMap):
    """1 + y.y' + (y.y')^2 / 2, exp to second order, on a learned projection y = x W (Based, arXiv 2402.18668).

    The quadratic part keeps each pair once: F = 1 + d + d (d + 1) / 2 for d = projection_dim.

    Args:
        projection_dim (`int`, defaults to 16): d.
        seed (`int`, defaults to 0): seed of W's initial value, the same for q and k.
    """

    def __init__(self, num_heads: int, head_dim: int, projection_dim: int = 16, seed: int = 0):
        super().__init__(num_heads, head_dim)
        d = min(_positive("projection_dim", projection_dim), head_dim)
        self.projection_dim, self.seed = d, seed
        self.feature_dim = 1 + d + d * (d + 1) // 2
        self.weight = self._per_head_weight(d)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        # d random directions of D keep d / D of a dot product on average; the gain restores it.
        rows = _orthogonal(self.head_dim, torch.Generator().manual_seed(self.seed))[:, : self.projection_dim]
        weight = rows.mul((self.head_dim / self.projection_dim) ** 0.5).repeat(self.num_heads, 1)
        init.copy_(self.weight, weight.to(self.weight.device))

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        y = self._project(x, self.weight)
        row, column = torch.triu_indices(self.projection_dim, self.projection_dim, device=y.device)
        # (y.y')^2 / 2 = sum_i (y_i y'_i)^2 / 2 + sum_{i<j} y_i y_j y'_i y'_j
        pairs = y[..., row] * y[..., column] * torch.where(row == column, 2**-0.5, 1.0)
        return torch.cat([torch.ones_like(y[..., :1]), y, pairs], -1)


FEATURE_MAPS: dict[str, type[FeatureMap]] = {
    "hedgehog": HedgehogFeatureMap,
    "elu": EluFeatureMap,
    "relu": ReluFeatureMap,
    "identity": IdentityFeatureMap,
    "performer": PerformerFeatureMap,
    "cosformer": CosformerFeatureMap,
    "taylor": TaylorFeatureMap,
    "t2r": T2RFeatureMap,
}


def build_feature_map(
    name: str, num_heads: int, head_dim: int, *, max_positions: int | None = None, options: dict | None = None
) -> FeatureMap:
    """The map called `name` for `num_heads` heads.

    Raises:
        ValueError: an option the map does not have, naming those it has.
    """
    cls, options = FEATURE_MAPS[name], dict(options or {})
    known = known_options(cls, "num_heads", "head_dim")
    check_options("feature_map_kwargs", name, options, known)
    if "max_positions" in known and max_positions is not None:
        options.setdefault("max_positions", max_positions)
    if "max_positions" in known and "max_positions" not in options:
        raise ValueError(f"feature_map_kwargs: {name!r} needs max_positions, which this model's config does not give")
    return cls(num_heads, head_dim, **options)


def _heads_first(x: Tensor) -> Tensor:
    """`[B, H, T, D]` -> `[H, B * T, D]`, a view where T lies outside of H in memory, as projections leave it.

    One product per head takes all rows: broadcast over B, `@` would copy the weights for each of them.
    """
    return x.transpose(0, 1).flatten(1, 2)


def _heads_second(y: Tensor, x: Tensor) -> Tensor:
    """`[H, B * T, F]` -> `[B, H, T, F]`, a view, for x `[B, H, T, D]`."""
    return y.view(y.shape[0], x.shape[0], x.shape[2], y.shape[2]).transpose(0, 1)


def _product(rows: Tensor, weight: Tensor) -> Tensor:
    """`[H, R, D] @ [H, D, F]`, float32 within autocast too."""
    with autocast_off(rows.device):
        if torch.is_grad_enabled() and (rows.requires_grad or weight.requires_grad):
            return _PerHeadProduct.apply(rows, weight)
        if torch.compiler.is_compiling() and rows.shape[1] == 1:
            # A sum that the compiler fuses with what comes before and after it, in place of a call of cuBLAS.
            return (rows.unsqueeze(-1) * weight.unsqueeze(1)).sum(2)
        return rows @ weight


class _PerHeadProduct(torch.autograd.Function):
    """The gradient of the weights is a sum over all rows with a small result for each head: as one product per head it
    would keep a few multiprocessors of a GPU busy for longer than all else in the layer takes."""

    @staticmethod
    def forward(ctx, rows: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weight)
        return rows @ weight

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        rows, weight = ctx.saved_tensors
        d_rows = grad @ weight.mT if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return d_rows, None
        pieces = 1
        while rows.shape[1] % (2 * pieces) == 0 and rows.shape[1] // (2 * pieces) >= ROWS_OF_A_PIECE:
            pieces *= 2
        # unflatten of a dimension does not copy; the product of four-dimensional tensors does.
        parts = rows.unflatten(1, (pieces, -1)).mT @ grad.unflatten(1, (pieces, -1))
        return d_rows, parts.sum(1)


def _per_head(weight: Tensor, rows: int) -> Tensor:
    """`[H * rows, F]` -> `[H, rows, F]`, float32."""
    return _in_float32(weight).view(-1, rows, weight.shape[-1])


def _in_float32(x: Tensor) -> Tensor:
    # A cast that does nothing still costs a decode step a call of an op.
    return x if x.dtype == torch.float32 else x.float()


def _positive(name: str, value: int) -> int:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"feature_map_kwargs: {name} must be a positive integer, got {value!r}")
    return value


def _orthogonal(dim: int, generator: torch.Generator) -> Tensor:
    q, r = torch.linalg.qr(torch.randn(dim, dim, generator=generator))
    # Fixing the signs of R's diagonal makes Q uniform over the orthogonal group.
    return q * r.diagonal().sign()
