"""linear_attention, chunked: o, final state and every gradient against the float64 recurrence."""

from dataclasses import replace

import pytest
import torch
from numerics import assert_close, relative_rmse
from op_inputs import OpCase, float64_truth, make_inputs, packed, run_op

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
BASE = OpCase()
CASES = [
    *(replace(BASE, T=t, decay=decay, state=True) for t in (1, 15, 63, 64, 65) for decay in (None, "scalar")),
    *(replace(BASE, T=500, dtype=dtype, decay="scalar", a=0.5, state=True) for dtype in (BF16, FP16, FP32, FP64)),
    *(replace(BASE, T=130, H=6, H_kv=h, dtype=dtype) for h in (1, 2, 6) for dtype in (BF16, FP32)),
    *(replace(BASE, T=150, D=64, K=k, V=v) for k, v in ((1, 1), (64, 8), (96, 33), (128, 64))),
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


@pytest.mark.parametrize("case", CASES, ids=str)
def test_linear_attention(case):
    inputs = make_inputs(case)
    actual, expected = run_op(case, inputs, "chunked"), float64_truth(case, inputs)
    assert actual.keys() == expected.keys()
    for name, x in expected.items():
        assert_close(name, actual[name], x, case.dtype)


def test_normalised_gradients_in_bf16_with_positive_features():
    # The case in which a bfloat16 running key sum gives 16% to 18% error in dq.
    case = OpCase(B=1, T=512, H=4, H_kv=4, K=64, V=64, dtype=BF16, scale=64**-0.5)
    inputs = make_inputs(case)
    actual, expected = run_op(case, inputs, "chunked"), float64_truth(case, inputs)
    bounds = {"o": 3e-3, "dq": 2e-2, "dk": 1.1e-2, "dv": 4e-3}
    errors = {name: relative_rmse(actual[name], expected[name]) for name in bounds}
    assert all(errors[name] <= bound for name, bound in bounds.items()), errors


def test_denominator_near_zero_counts_as_epsilon():
    case = OpCase(B=1, T=70, H=1, H_kv=1, K=4, V=3, dtype=FP64)
    inputs = make_inputs(case)
    inputs["q"][:, ::2] = 0
    actual, expected = run_op(case, inputs, "chunked"), float64_truth(case, inputs)
    assert (expected["o"][:, ::2] == 0).all()
    for name, x in expected.items():
        assert_close(name, actual[name], x, case.dtype)


def test_no_tokens():
    case = replace(BASE, T=0, a=0.5, decay="scalar", state=True)
    inputs = make_inputs(case)
    actual = run_op(case, inputs, "chunked")
    assert actual["o"].shape == (2, 0, 4, 16)
    for member in ("kv", "key_sum", "value_sum", "weight_sum"):
        assert torch.equal(actual[f"final.{member}"], inputs[f"state.{member}"])


def test_tokens_behind_the_last_boundary_are_left_out():
    case = packed((70, 20), decay="scalar", state=True)
    inputs = make_inputs(case)
    longer = {
        name: torch.cat([x, torch.full_like(x[:, :9], torch.nan)], 1) if name in ("q", "k", "v", "g") else x
        for name, x in inputs.items()
    }
    actual, expected = run_op(case, longer, "chunked"), run_op(case, inputs, "chunked")
    for name, x in expected.items():
        tail = actual[name][:, x.shape[1] :] if name in ("o", "dq", "dk", "dv", "dg") else x.new_zeros(0)
        assert (tail == 0).all(), name
        assert torch.equal(actual[name][:, : x.shape[1]] if tail.numel() else actual[name], x), name
