"""Emulated: sequences in segments, whose states come in pieces that the scans or a prefix add up, against float64."""

import itertools

import emulated_kernels
import pytest
import torch
from emulated_build import unavailable_reason
from numerics import assert_close

from hf_linattn.kernels import LinearAttentionState, init_state, linear_attention

pytestmark = pytest.mark.skipif(unavailable_reason() is not None, reason=str(unavailable_reason()))

# Multiprocessors decide how a row is cut (B, T, K and V beside them): into two segments of two pieces, into four of
# two, the same with values that no 16 bytes divide, and into three of two, of so large a state that a prefix runs.
CUTS = {
    "few-pieces": (4, 2, 2688, 64, 64),
    "many-pieces": (6, 1, 3100, 64, 64),
    "odd-values": (6, 1, 3100, 64, 62),
    "prefix": (6, 1, 3100, 128, 128),
}
CASES = [
    *itertools.product(("few-pieces", "many-pieces"), ("sums", "decayed"), ("sm80", "sm90")),
    ("odd-values", "decayed", "sm90"),
    *itertools.product(["prefix"], ["decayed"], ("sm80", "sm90")),
]


@pytest.mark.parametrize(("cut", "form", "path"), CASES)
def test_segments_agree_with_the_whole(cut, form, path, monkeypatch):
    processors, B, T, K, V = CUTS[cut]
    monkeypatch.setenv("HF_LINATTN_EMULATED_SMS", str(processors))
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.rand(B, T, 1, K, generator=generator).bfloat16() for _ in range(2))
    # Rows lie 16 bytes apart, whatever V.
    v, d_o = (torch.randn(B, T, 1, 64 * -(-V // 64), generator=generator).bfloat16()[..., :V] for _ in range(2))
    a, g, first, d_final = 0.0, None, None, None
    if form == "decayed":  # with everything that a state can have, at both ends
        a, g = 0.5, torch.full((B, T, 1), -1e-3)
        empty = init_state(B, 1, K, V, a=a, normalize=True)
        first = LinearAttentionState(*(torch.rand(x.shape, generator=generator) for x in empty))
        d_final = LinearAttentionState(*(torch.randn(x.shape, generator=generator) for x in empty))
    o, den, final = emulated_kernels.forward(
        q, k, v, g, a=a, initial_state=first, output_final_state=first is not None, path=path
    )
    gradients = emulated_kernels.backward(
        d_o, q, k, v, den, g, a=a, initial_state=first, d_final=d_final, needs_dg=False, path=path
    )

    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    double = None if first is None else LinearAttentionState(*(x.double() for x in first))
    expected, expected_final = linear_attention(
        *leaves,
        g=None if g is None else g.double(),
        a=a,
        initial_state=double,
        output_final_state=first is not None,
        backend="chunked",
    )
    assert_close("o", o, expected.detach(), torch.bfloat16, backend="cuda")
    results, d_results = [expected], [d_o.double()]
    if first is not None:
        for name, found, x in zip(final._fields, final, expected_final, strict=True):
            assert_close(f"final.{name}", found, x.detach(), torch.bfloat16, backend="cuda")
        results, d_results = [*results, *expected_final], [*d_results, *(x.double() for x in d_final)]
    exact = torch.autograd.grad(results, leaves, d_results)
    for name, found, x in zip(("dq", "dk", "dv"), gradients[:3], exact, strict=True):
        assert_close(name, found, x, torch.bfloat16, backend="cuda")
