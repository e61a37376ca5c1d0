"""Feature maps against the formulas they are named after."""

import math

import pytest
import torch

from hf_linattn import feature_maps
from hf_linattn.feature_maps import FEATURE_MAPS, build_feature_map

B, H, T, D = 2, 3, 7, 8
POSITIONS = torch.arange(T).unsqueeze(0)


def make(name, **options):
    feature_map = build_feature_map(name, H, D, max_positions=32, options=options)
    feature_map.reset_parameters()
    return feature_map


def x(seed=0, scale=1.0):
    return scale * torch.randn(B, H, T, D, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", FEATURE_MAPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_shape_and_dtype(name, dtype):
    feature_map = make(name)
    y = feature_map(x().to(dtype), POSITIONS)
    assert y.shape == (B, H, T, feature_map.feature_dim)
    assert y.dtype == torch.float32
    assert torch.isfinite(y).all()


@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_weights_are_positive(name):
    """f(phi_q . phi_k) >= 0, or the shared denominator could vanish."""
    q_map, k_map = make(name), make(name)
    phi_q, phi_k = q_map(x(1), POSITIONS), k_map(x(2), POSITIONS)
    weights = q_map.default_a + q_map.default_b * phi_q @ phi_k.transpose(-1, -2)
    assert (weights >= 0).all()
    assert weights.max() > 0


def test_hedgehog():
    feature_map = make("hedgehog")
    y = x() * D**0.25
    assert torch.allclose(feature_map(x(), POSITIONS), torch.cat([y.softmax(-1), (-y).softmax(-1)], -1), atol=1e-6)


def test_hedgehog_with_magnitude_and_hidden_layer_starts_as_hedgehog():
    plain, extended = make("hedgehog"), make("hedgehog", magnitude=True, hidden_dim=5)
    assert torch.equal(extended(x(), POSITIONS), plain(x(), POSITIONS))
    with torch.no_grad():
        for parameter in extended.parameters():
            parameter.normal_(0, 0.5, generator=torch.Generator().manual_seed(0))
    w, w1, u = extended.weight.view(H, D, D + 5 + 1).split([D, 5, 1], -1)
    w2 = extended.output_weight.view(H, 5, D)
    y = x() @ w + torch.nn.functional.silu(x() @ w1) @ w2
    size = (x() @ u + extended.magnitude_bias[:, None, None]).exp()
    expected = size * torch.cat([y.softmax(-1), (-y).softmax(-1)], -1)
    assert torch.allclose(extended(x(), POSITIONS), expected, atol=1e-5)
    assert extended(1e4 * x(), POSITIONS).isfinite().all()


@pytest.mark.parametrize("length", [3, 1500, 2048])
def test_gradients_of_weights_are_sums_over_all_rows(length):
    """However many pieces of rows they are summed over, and beside a plain product."""
    generator = torch.Generator().manual_seed(2)
    rows = torch.randn(H, B * length, D, dtype=torch.float64, generator=generator, requires_grad=True)
    weight = torch.randn(H, D, 5, dtype=torch.float64, generator=generator, requires_grad=True)
    upstream = torch.randn(H, B * length, 5, dtype=torch.float64, generator=generator)
    actual = torch.autograd.grad(feature_maps._product(rows, weight), (rows, weight), upstream)
    expected = torch.autograd.grad(rows @ weight, (rows, weight), upstream)
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)


def test_hedgehog_under_autocast():
    """Attention transfer evaluates the map within the autocast of a bf16 model."""
    feature_map = make("hedgehog", magnitude=True, hidden_dim=5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = feature_map(x(), POSITIONS)
    assert torch.allclose(y, feature_map(x(), POSITIONS), atol=0.02)


def test_t2r_elu_relu_identity():
    y = x()
    assert torch.allclose(make("t2r")(y, POSITIONS), (y * D**0.25).relu(), atol=1e-6)
    assert torch.allclose(make("elu")(y, POSITIONS), torch.where(y > 0, y + 1, y.exp()), atol=1e-6)
    assert torch.equal(make("relu")(y, POSITIONS), y.relu())
    assert torch.allclose(make("identity")(y, POSITIONS).norm(dim=-1), torch.ones(B, H, T))


def test_performer_is_unbiased_for_exp():
    q, k = x(1, 0.25), x(2, 0.25)
    estimates = []
    for seed in range(200):
        q_map, k_map = make("performer", seed=seed), make("performer", seed=seed)
        estimates.append(q_map(q, POSITIONS) @ k_map(k, POSITIONS).transpose(-1, -2))
    exact = (q @ k.transpose(-1, -2)).exp()
    error = (torch.stack(estimates).mean(0) - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert error < 0.05


def test_taylor_is_the_second_order_expansion():
    feature_map = make("taylor", projection_dim=4)
    y = [(t @ feature_map.weight.view(H, D, 4)) for t in (x(1), x(2))]
    s = y[0] @ y[1].transpose(-1, -2)
    dot = feature_map(x(1), POSITIONS) @ feature_map(x(2), POSITIONS).transpose(-1, -2)
    assert torch.allclose(dot, 1 + s + s**2 / 2, atol=1e-4)
    assert feature_map.feature_dim == 1 + 4 + 10


def test_taylor_projection_keeps_dot_products_on_average():
    q, k = x(1), x(2)
    dots = [
        (make("taylor", projection_dim=4, seed=s)._project(q, w := make("taylor", projection_dim=4, seed=s).weight))
        @ make("taylor", projection_dim=4, seed=s)._project(k, w).transpose(-1, -2)
        for s in range(300)
    ]
    exact = q @ k.transpose(-1, -2)
    assert (torch.stack(dots).mean(0) - exact).abs().mean() < 0.15 * exact.abs().mean()


def test_cosformer_reweights_by_distance():
    q, k = x(1), x(2)
    dot = make("cosformer")(q, POSITIONS) @ make("cosformer")(k, POSITIONS).transpose(-1, -2)
    i = torch.arange(T)
    weight = torch.cos(math.pi / 2 * (i[:, None] - i[None, :]) / 32)
    assert torch.allclose(dot, q.relu() @ k.relu().transpose(-1, -2) * weight, atol=1e-5)
    shifted = make("cosformer")(q, POSITIONS + 11) @ make("cosformer")(k, POSITIONS + 11).transpose(-1, -2)
    assert torch.allclose(dot, shifted, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("elu", {"feature_dim": 3}, "'elu' has no option 'feature_dim'; its options: none"),
        ("hedgehog", {"dim": 3}, "'hedgehog' has no option 'dim'; its options: feature_dim"),
        ("hedgehog", {"hidden_dim": -1}, "hidden_dim must be a positive integer, got -1"),
        ("hedgehog", {"feature_dim": -3}, "feature_dim must be a positive integer, got -3"),
        ("taylor", {"projection_dim": 1.5}, "projection_dim must be a positive integer"),
    ],
)
def test_option_errors(name, options, message):
    with pytest.raises(ValueError, match=message):
        make(name, **options)


def test_cosformer_needs_max_positions():
    with pytest.raises(ValueError, match="needs max_positions"):
        build_feature_map("cosformer", H, D)
