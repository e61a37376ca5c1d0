"""Sinks weigh as the exponential of a logit, once, wherever they are; other far keys together no more than allowed."""

import pytest
import torch
from tiny_models import tiny_model

from hf_linattn import LinearAttentionConfig, linear_attention_modules, linearize

SCALE, WINDOW = 0.5, 4


def build(**form):
    form = {"window": WINDOW} | form
    torch.manual_seed(0)
    attention = linear_attention_modules(linearize(tiny_model(), LinearAttentionConfig(**form)))[0]
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return attention


def inputs(length=24):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, heads, length, 8, generator=generator) for heads in (4, 2, 2)]


def expected(attention, query, key, value, positions, sinks, far_length):
    """Query by query, from the maps below the sinks and the logits written out."""
    map_q, map_k = attention.feature_map_q, attention.feature_map_k
    phi_q = (map_q.base if hasattr(map_q, "base") else map_q)(query * SCALE**0.5, positions)
    phi_k = (map_k.base if hasattr(map_k, "base") else map_k)(key * SCALE**0.5, positions)
    o = torch.zeros(2, query.shape[2], 4, 8)
    for row in range(2):
        for i in range(query.shape[2]):
            first = i - int(positions[row, i])
            for head in range(4):
                weights, kv = [], head // 2
                for j in range(first, i + 1):
                    position, q = j - first, query[row, head, i]
                    if j > i - WINDOW:
                        weight = (SCALE * q @ key[row, kv, j]).exp()
                    elif position < sinks:
                        u = map_q.sink_weight.view(4, 8, sinks)[head, :, position]
                        weight = (SCALE**0.5 * q @ u + map_q.sink_bias[head, position]).exp()
                        weight = weight * attention.log_scale[head].exp()
                    else:
                        weight = attention.log_scale[head].exp() * (phi_q[row, head, i] @ phi_k[row, kv, j])
                        weight = weight * min(1, far_length / (i - first + 1))
                    weights.append(weight)
                weights = torch.stack(weights)
                o[row, i, head] = weights @ value[row, kv, first : i + 1] / weights.sum()
    return o


@pytest.mark.parametrize(("sinks", "far_length"), [(2, 10), (1, None), (0, 6)])
@torch.no_grad()
def test_weights_are_those_of_the_definition(sinks, far_length):
    attention = build(sinks=sinks, far_length=far_length)
    query, key, value = inputs()
    positions = torch.tensor([[*range(24)], [*range(9), *range(15)]])
    o = attention(query, key, value, scaling=SCALE, position_ids=positions)
    far = float("inf") if far_length is None else far_length
    torch.testing.assert_close(o, expected(attention, query, key, value, positions, sinks, far), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_sink_beyond_the_range_of_float16_stays_a_weight():
    attention = build(sinks=2)
    attention.feature_map_q.sink_bias.fill_(15.0)
    query, key, value = (x.half() for x in inputs())
    o = attention(query, key, value, scaling=SCALE)
    assert o.isfinite().all()


def test_sinks_and_their_keys_get_gradients():
    attention = build(sinks=2)
    attention(*inputs(), scaling=SCALE).square().sum().backward()
    for name in ("sink_weight", "sink_bias"):
        gradient = getattr(attention.feature_map_q, name).grad
        assert gradient.isfinite().all()
        assert (gradient.abs().amax(0) > 0).all()


def test_a_constant_term_refuses_far_length():
    with pytest.raises(ValueError, match="far_length: expected None with a constant term.* got 64 with a=1.0; set a"):
        linearize(tiny_model(), LinearAttentionConfig(feature_map="identity", far_length=64))
