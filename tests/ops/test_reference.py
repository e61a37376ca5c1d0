"""The references themselves: token by token against the quadratic form, and gradients against finite differences."""

from dataclasses import replace

import pytest
import torch
from numerics import assert_close
from op_inputs import BY_TOKEN, OpCase, call_op, make_inputs, packed, run_op

FP64 = torch.float64
TINY = OpCase(B=1, T=5, H=2, H_kv=1, D=2, K=3, V=2, dtype=FP64, b=0.7)
LINEAR_CASES = [
    TINY,
    replace(TINY, a=0.5, decay="scalar", state=True),
    replace(TINY, a=0.5, decay="fixed", normalize=False, state=True),
    replace(TINY, causal=False, a=0.5),
    replace(TINY, T=4, B=1, lengths=(1, 0, 3), decay="scalar", state=True),
]
WINDOW_CASES = [
    replace(TINY, window=2),
    replace(TINY, window=2, a=0.5, decay="scalar", softcap=2.0, state=True),
    replace(TINY, window=3, decay="fixed", log_scale=False),
    replace(TINY, T=4, window=1, lengths=(1, 0, 3), decay="scalar"),
]


@pytest.mark.parametrize(
    "case",
    [
        *(
            OpCase(
                T=20, dtype=FP64, decay=d if c else None, normalize=n, causal=c, a=0.5, b=0.7, state=c and d != "fixed"
            )
            for d in (None, "fixed", "scalar")
            for n, c in ((True, True), (False, True), (True, False))
        ),
        *(packed((3, 0, 9, 1), dtype=FP64, decay=d, a=a, state=True) for d in (None, "scalar") for a in (0.0, 0.5)),
        packed((3, 0, 9, 1), dtype=FP64, causal=False, normalize=False, a=0.5),
        packed((0, 0), dtype=FP64, state=True),
    ],
    ids=str,
)
def test_linear_reference_is_the_quadratic_form(case):
    inputs = make_inputs(case)
    if case.lengths:
        for name in ("q", "k", "v", "g"):
            if name in inputs:
                inputs[name] = torch.cat([inputs[name], inputs[name][:, :2]], 1)
    actual, expected = (run_op(case, inputs, backend) for backend in ("reference", "quadratic"))
    assert actual.keys() == expected.keys()
    for name, x in expected.items():
        assert_close(name, actual[name], x, FP64, factor=4)


@pytest.mark.parametrize(
    "case",
    [
        *(
            OpCase(T=20, dtype=FP64, decay=d, window=w, softcap=cap, a=a, b=0.7, state=s)
            for d, cap, a in ((None, 3.0, 0.5), ("fixed", None, 0.0), ("scalar", 3.0, 0.5))
            for w in (1, 6, 30)
            for s in (False, True)
        ),
        *(
            packed((3, 0, 9, 1), dtype=FP64, decay=d, window=4, a=0.5, state=s)
            for d in (None, "scalar")
            for s in (0, 1)
        ),
        packed((0, 0), dtype=FP64, window=4, log_scale=False),
    ],
    ids=str,
)
def test_window_reference_is_the_quadratic_form(case):
    inputs = make_inputs(case)
    if case.lengths:
        inputs |= {name: torch.cat([x, x[:, :2]], 1) for name, x in inputs.items() if name in BY_TOKEN}
    actual, expected = (run_op(case, inputs, backend) for backend in ("reference", "quadratic"))
    assert actual.keys() == expected.keys()
    for name, x in expected.items():
        assert_close(name, actual[name], x, FP64, factor=4)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("case", LINEAR_CASES + WINDOW_CASES, ids=str)
def test_gradients_are_those_of_finite_differences(case, backend):
    inputs = make_inputs(case)
    wanted = [n for n, x in inputs.items() if x.is_floating_point() and not (case.window and n.startswith("state."))]

    def outputs(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        o, final = call_op(case, inputs | dict(zip(wanted, tensors, strict=True)), backend)
        return (o,) if case.window else (o, *(x for x in final if x is not None))

    assert torch.autograd.gradcheck(outputs, [inputs[name].requires_grad_() for name in wanted])
