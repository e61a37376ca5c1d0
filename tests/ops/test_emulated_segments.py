"""Emulated: sequences in segments, whose states come in pieces that the scans or a prefix add up, against float64."""

import emulated_kernels
import pytest
import torch
from emulated_build import unavailable_reason
from numerics import assert_close

from hf_linattn.kernels import linear_attention

pytestmark = pytest.mark.skipif(unavailable_reason() is not None, reason=str(unavailable_reason()))

# Multiprocessors decide how a row is cut (B, T beside them): into two segments of two pieces, into four of two.
CUTS = {"few-pieces": (4, 2, 2688), "many-pieces": (6, 1, 3100)}


@pytest.mark.parametrize("path", ["sm80", "sm90"])
@pytest.mark.parametrize("decay", [False, True], ids=["nodecay", "decay"])
@pytest.mark.parametrize("cut", CUTS)
def test_segments_agree_with_the_whole(path, decay, cut, monkeypatch):
    processors, B, T = CUTS[cut]
    monkeypatch.setenv("HF_LINATTN_EMULATED_SMS", str(processors))
    generator = torch.Generator().manual_seed(0)
    H, D = 1, 64
    q, k = (torch.rand(B, T, H, D, generator=generator).bfloat16() for _ in range(2))
    v, d_o = (torch.randn(B, T, H, D, generator=generator).bfloat16() for _ in range(2))
    g = torch.full((B, T, H), -1e-3) if decay else None
    o, den, _ = emulated_kernels.forward(q, k, v, g, path=path)
    gradients = emulated_kernels.backward(d_o, q, k, v, den, g, needs_dg=False, path=path)

    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    expected, _ = linear_attention(*leaves, g=None if g is None else g.double(), backend="chunked")
    assert_close("o", o, expected.detach(), torch.bfloat16, backend="cuda")
    exact = torch.autograd.grad(expected, leaves, d_o.double())
    for name, found, x in zip(("dq", "dk", "dv"), gradients[:3], exact, strict=True):
        assert_close(name, found, x, torch.bfloat16, backend="cuda")
