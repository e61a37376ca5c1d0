"""linear_attention on every backend: o, final state and every gradient against float64."""

from dataclasses import replace

import pytest
import torch
from numerics import assert_close, relative_rmse
from op_backends import on, pairs, targets
from op_inputs import OpCase, check, float64_truth, make_inputs, packed, run_op

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
BASE = OpCase()
CASES = [
    *(replace(BASE, T=t, decay=decay, state=True) for t in (1, 15, 63, 64, 65) for decay in (None, "scalar")),
    *(replace(BASE, T=500, dtype=dtype, decay="scalar", a=0.5, state=True) for dtype in (BF16, FP16, FP32)),
    *(replace(BASE, T=130, H=6, H_kv=h, dtype=dtype) for h in (1, 2, 6) for dtype in (BF16, FP32)),
    # One feature needs a constant term: without it no output depends on q, and dq is nothing but cancellation.
    *(replace(BASE, T=150, D=64, K=k, V=v, a=float(k == 1)) for k, v in ((1, 1), (64, 8), (96, 33), (128, 64))),
    *(replace(BASE, T=150, normalize=False, a=a, decay=d, state=True) for a, d in ((0.0, None), (0.5, "fixed"))),
    *(
        replace(BASE, T=150, causal=False, normalize=n, a=a, b=0.7)
        for n, a in ((True, 0.0), (True, 1.0), (False, 0.5))
    ),
    replace(BASE, T=100, a=1.0, b=0.0, decay="scalar"),
    replace(BASE, B=1, T=2048, H=2, H_kv=1, K=32, V=32, dtype=BF16, decay="scalar"),
    *(packed((0, 70, 1, 0, 64, 129, 0), decay=d, a=0.5, state=s) for d in (None, "scalar") for s in (False, True)),
    packed((3, 100), dtype=BF16, normalize=False),
    packed((0, 70, 1, 64), causal=False, a=0.5),
]
FP64_CASES = [replace(BASE, T=500, dtype=FP64, decay="scalar", a=0.5, state=True)]

WIDE = OpCase(T=200, H=6, H_kv=2, K=64, V=64, dtype=BF16, scale=0.125)
LONG = replace(WIDE, B=1, T=8191, H=2, H_kv=1)
PACKED_LENGTHS = (0, 70, 1, 0, 64, 129, 500, 0)
LENGTHS = (1, 15, 63, 64, 65, 500, 2048)
DECAYS = (None, "fixed", "scalar")
WIDE_CASES = [
    *(replace(WIDE, T=t, K=d, V=d, decay=g, state=True) for t in LENGTHS for d in (64, 128) for g in (None, "scalar")),
    *(replace(WIDE, T=t, dtype=dtype, a=0.5, state=True) for t in LENGTHS for dtype in (FP16, FP32)),
    *(replace(WIDE, T=t, causal=False, a=0.5, K=128) for t in LENGTHS),
    *(replace(LONG, K=d, V=d, decay=g, dtype=BF16, state=g is None) for d in (64, 128) for g in DECAYS),
    *(replace(LONG, K=d, V=d, decay="scalar", dtype=dtype, a=0.5) for d in (64, 128) for dtype in (FP16, FP32)),
    *(replace(LONG, causal=False, dtype=dtype) for dtype in (BF16, FP32)),
    replace(LONG, normalize=False, decay="fixed", state=True),
    packed((0, 3000, 1, 0, 4000, 129), H=1, H_kv=1, K=128, V=128, dtype=BF16, scale=0.1, decay="scalar", state=True),
    packed((5000, 0, 2000), H=2, H_kv=1, K=64, V=128, dtype=BF16, scale=0.1, a=0.5),
]
DIMENSION_CASES = [
    *(replace(WIDE, K=k, V=v) for k in (64, 128, 256) for v in (64, 128, 256)),
    *(replace(WIDE, K=k, V=v, dtype=FP16, decay="scalar", a=0.5) for k, v in ((128, 64), (256, 128), (64, 256))),
    *(replace(WIDE, K=d, V=d, dtype=x, state=True) for d in (33, 80, 96, 100, 192) for x in (BF16, FP32)),
    *(replace(WIDE, K=1, V=1, dtype=x, state=True, a=0.5) for x in (BF16, FP32)),
    *(
        replace(WIDE, K=k, V=v, dtype=dtype, decay="scalar", a=0.5, state=True)
        for k, v in ((1, 64), (64, 1), (96, 33), (33, 128), (100, 192), (256, 80))
        for dtype in (BF16, FP16)
    ),
    replace(WIDE, K=80, V=96, causal=False),
    *(
        replace(WIDE, K=256, V=256, dtype=x, decay=g, a=0.5, normalize=n, state=True)
        for x in (FP16, FP32)
        for g in (None, "scalar")
        for n in (True, False)
    ),
    *(replace(WIDE, K=k, V=v, dtype=x) for k, v in ((256, 64), (192, 256), (129, 1)) for x in (FP16, FP32)),
    *(replace(WIDE, K=256, V=192, dtype=x, causal=False, a=0.5) for x in (FP16, FP32)),
    *(replace(WIDE, T=2048, K=256, V=256, dtype=x, decay="scalar") for x in (FP16, FP32)),
    *(
        packed((0, 70, 1, 0, 300), H=4, H_kv=2, K=256, V=256, dtype=x, scale=0.125, decay="scalar", a=0.5, state=True)
        for x in (FP16, FP32)
    ),
]
FORM_CASES = [
    *(
        replace(WIDE, K=d, V=d, dtype=dtype, decay=g, a=a, normalize=n, b=0.7, state=True)
        for d, dtype in ((64, BF16), (128, BF16), (128, FP16), (64, FP32))
        for g in DECAYS
        for a, n in ((0.0, True), (0.5, True), (0.5, False))
    ),
    *(
        replace(WIDE, K=128, V=128, causal=False, dtype=dtype, normalize=n, a=a, b=0.7)
        for dtype in (BF16, FP16, FP32)
        for n, a in ((True, 0.0), (True, 1.0), (False, 0.5))
    ),
    *(replace(WIDE, H_kv=h, K=128, decay=g, state=True) for h in (1, 2, 6) for g in (None, "scalar")),
    *(replace(WIDE, H_kv=h, causal=False) for h in (1, 6)),
    *(
        packed(PACKED_LENGTHS, H=6, H_kv=2, K=d, V=d, dtype=BF16, scale=0.125, decay=g, a=0.5, state=s)
        for d in (64, 128)
        for g in DECAYS
        for s in (False, True)
    ),
    *(packed(PACKED_LENGTHS, H=6, H_kv=2, K=64, V=64, dtype=dtype, causal=False, a=0.5) for dtype in (BF16, FP32)),
    packed((0, 0), H=2, H_kv=2, K=64, V=64, dtype=BF16, state=True),
    replace(WIDE, a=1.0, b=0.0, decay="scalar"),
]


@pairs(
    (CASES + FP64_CASES, targets("chunked-*")),
    (CASES, targets("cuda-cuda", "cuda-sm80", "emulated-*")),
    (WIDE_CASES + DIMENSION_CASES + FORM_CASES, targets("cuda-sm80", "cuda-sm90")),
)
def test_linear_attention(case, target):
    check(case, make_inputs(case, device=target.device), target)


@pairs(
    ([OpCase(B=1, T=512, H=4, H_kv=4, K=64, V=64, dtype=BF16, scale=64**-0.5)], targets("chunked-*")),
    (
        [OpCase(T=n, H=4, H_kv=4, K=d, V=d, dtype=BF16, scale=d**-0.5) for n in (512, 4096) for d in (64, 128)],
        targets("cuda-sm80", "cuda-sm90"),
    ),
)
def test_normalised_gradients_in_bf16_with_positive_features(case, target):
    # The case in which a bfloat16 running key sum gives 16% to 18% error in dq.
    inputs = make_inputs(case, device=target.device)
    if target.is_compiled:
        inputs["v"] = torch.rand_like(inputs["v"])
    actual, expected = run_op(case, inputs, target.backend), float64_truth(case, inputs)
    bounds = {"o": 3e-3, "dq": 2e-2, "dk": 1.1e-2, "dv": 5e-3}
    errors = {name: relative_rmse(actual[name], expected[name]) for name in bounds}
    assert all(errors[name] <= bound for name, bound in bounds.items()), errors


@on("chunked-*", "cuda-*")
def test_denominator_near_zero_counts_as_epsilon(target):
    case = OpCase(B=1, T=70, H=1, H_kv=1, K=4, V=3, dtype=FP32 if target.is_compiled else FP64)
    inputs = make_inputs(case, device=target.device)
    inputs["q"][:, ::2] = 0
    actual, expected = run_op(case, inputs, target.backend), float64_truth(case, inputs)
    assert (expected["o"][:, ::2] == 0).all()
    for name, x in expected.items():
        # Over 1e-6 the gradients of these rows are a million times those of the others; both kinds must be right.
        if name == "dq":
            assert_close(name, actual[name][:, 1::2], x[:, 1::2], case.dtype, backend=target.backend)
        assert_close(name, actual[name], x, case.dtype, backend=target.backend)


@on("chunked-*", "cuda-*")
def test_decay_gradient_with_held_denominators(target):
    case = OpCase(B=1, T=100, H=2, H_kv=1, K=64, V=64, dtype=FP32, decay="scalar", state=True)
    inputs = make_inputs(case, device=target.device)
    inputs["q"][:, ::3] = 0
    check(case, inputs, target)


@on("chunked-*", "cuda-*")
@pytest.mark.parametrize("features", [16, 64], ids=["D16", "D64"])
def test_no_tokens(target, features):
    case = replace(BASE, T=0, K=features, V=features, a=0.5, decay="scalar", state=True)
    inputs = make_inputs(case, device=target.device)
    actual = run_op(case, inputs, target.backend)
    assert actual["o"].shape == (2, 0, 4, features)
    for member in ("kv", "key_sum", "value_sum", "weight_sum"):
        assert torch.equal(actual[f"final.{member}"], inputs[f"state.{member}"])


@pairs(
    (
        [packed((70, 20), decay="scalar", state=True), packed((0, 70), causal=False, a=0.5)],
        targets("chunked-*", "cuda-*"),
    ),
    (
        [
            packed(lengths, K=64, V=128, dtype=BF16, decay=decay, causal=causal, state=causal)
            for lengths in ((70, 20, 0), (64, 64), (1000, 29))
            for causal, decay in ((True, None), (True, "scalar"), (False, None))
        ],
        targets("cuda-*"),
    ),
)
def test_tokens_behind_the_last_boundary_are_left_out(case, target):
    inputs = make_inputs(case, device=target.device)
    longer = {
        name: torch.cat([x, torch.full_like(x[:, :9], torch.nan)], 1) if name in ("q", "k", "v", "g") else x
        for name, x in inputs.items()
    }
    actual, expected = run_op(case, longer, target.backend), run_op(case, inputs, target.backend)
    for name, x in expected.items():
        tail = actual[name][:, x.shape[1] :] if name in ("o", "dq", "dk", "dv", "dg") else x.new_zeros(0)
        assert (tail == 0).all(), name
        same = actual[name][:, : x.shape[1]] if tail.numel() else actual[name]
        # The compiled kernels may cut a longer row into other segments.
        if target.is_compiled:
            assert_close(name, same, x.double(), case.dtype, factor=2, backend=target.backend)
        else:
            assert torch.equal(same, x), name
