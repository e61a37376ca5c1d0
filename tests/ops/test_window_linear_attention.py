"""window_linear_attention, chunked: o, final state and every gradient against the float64 recurrence."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_close
from op_backends import pairs, targets
from op_inputs import OpCase, check, make_inputs, packed, run_op

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
BASE = OpCase(window=16, scale=0.25)
CASES = [
    *(replace(BASE, T=t, window=w, state=s) for t in (1, 15, 65) for w in (1, 64) for s in (False, True)),
    *(replace(BASE, T=t, window=64, decay="scalar") for t in (63, 64, 65)),
    *(replace(BASE, T=300, dtype=d, decay="scalar", a=0.5, softcap=3.0) for d in (BF16, FP16, FP32, FP64)),
    *(replace(BASE, T=130, H=6, H_kv=h, dtype=dtype) for h in (1, 2, 6) for dtype in (BF16, FP32)),
    *(replace(BASE, T=150, D=d, K=k, V=v, window=70) for d, k, v in ((8, 1, 1), (8, 128, 5), (64, 64, 64))),
    replace(BASE, T=500, decay="fixed", a=0.5, b=0.7, state=True, softcap=5.0),
    replace(BASE, T=100, log_scale=False),
    replace(BASE, B=1, T=2048, H=2, H_kv=1, D=32, K=32, V=32, dtype=BF16, window=64),
    *(packed((0, 70, 1, 0, 16, 129, 0), window=16, decay=d, a=0.5, state=s) for d in (None, "scalar") for s in (0, 1)),
    packed((3, 100), window=8, dtype=BF16),
]


@pairs((CASES, targets("chunked-*")))
def test_window_linear_attention(case, target):
    check(case, make_inputs(case, device=target.device), target)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_window_longer_than_the_sequence_is_softmax(backend):
    case = replace(BASE, T=40, window=64, dtype=FP64)
    inputs = make_inputs(case)
    q, k, v = (inputs[name].transpose(1, 2) for name in ("q", "k", "v"))
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=case.scale, enable_gqa=True)
    assert_close("o", run_op(case, inputs, backend)["o"], expected.transpose(1, 2), FP64)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_far_keys_of_no_weight_leave_softmax_over_the_window(backend):
    case = replace(BASE, T=100, dtype=FP32)
    inputs = make_inputs(case)
    inputs["phi_q"].zero_()
    # Logits far below the smallest float32 number: the empty far part must not swallow the window.
    inputs["q"] *= 100
    q, k, v = (inputs[name].double().transpose(1, 2) for name in ("q", "k", "v"))
    place = torch.arange(case.T)
    inside = (place <= place[:, None]) & (place > place[:, None] - case.window)
    expected = F.scaled_dot_product_attention(q, k, v, inside, scale=case.scale, enable_gqa=True)
    actual = run_op(case, inputs, backend)
    assert_close("o", actual["o"], expected.transpose(1, 2), FP32, factor=10)
    assert all(x.isfinite().all() for x in actual.values())


def test_invalid_ring_entries_may_hold_anything():
    case = replace(BASE, T=70, decay="scalar", a=0.5, state=True)
    inputs = make_inputs(case)
    expected = run_op(case, inputs, "chunked")
    for member in ("window_k", "window_v", "window_phi_k", "window_g"):
        inputs[f"state.{member}"][~inputs["state.window_valid"]] = torch.nan
    for name, x in run_op(case, inputs, "chunked").items():
        assert torch.equal(x, expected[name]), name


def test_no_tokens():
    case = replace(BASE, T=0, state=True)
    inputs = make_inputs(case)
    actual = run_op(case, inputs, "chunked")
    assert actual["o"].shape == (2, 0, 4, 16)
    order = (torch.arange(case.window) + inputs["state.slot"]) % case.window
    assert torch.equal(actual["final.window_valid"], inputs["state.window_valid"][:, order])
    assert torch.equal(actual["final.kv"], inputs["state.kv"])
