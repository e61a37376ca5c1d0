"""torch.compile(fullgraph=True) and CUDA graphs."""

from dataclasses import replace

import pytest
import torch
from op_inputs import OpCase, call_op, empty_state, make_inputs, output_gradient, run_op

from hf_linattn.kernels import linear_attention_step, window_linear_attention_step

LINEAR = OpCase(B=1, T=70, decay="scalar", a=0.5)
WINDOW = OpCase(B=1, T=70, decay="fixed", window=16, softcap=3.0)
ALL = [
    LINEAR,
    replace(LINEAR, causal=False, decay=None),
    replace(LINEAR, state=True),
    WINDOW,
    replace(WINDOW, state=True),
]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("case", ALL, ids=str)
def test_dense_forward_and_backward_are_one_graph(case):
    inputs = make_inputs(case)
    expected = run_op(case, inputs, "chunked")
    leaves = {n: x.clone().requires_grad_(n in ("q", "k", "v")) for n, x in inputs.items()}
    compiled = torch.compile(lambda x: call_op(case, x, None), fullgraph=True, backend="aot_eager")
    o, final = compiled(leaves)
    torch.testing.assert_close(o, expected["o"])
    assert all(x is None or torch.equal(x, expected[f"final.{n}"]) for n, x in zip(final._fields, final, strict=True))
    eager, _ = call_op(case, leaves, "chunked")
    wanted = [leaves[name] for name in ("q", "k", "v")]
    grads, eager_grads = (torch.autograd.grad((x * output_gradient(x)).sum(), wanted) for x in (o, eager))
    for dx, eager_dx in zip(grads, eager_grads, strict=True):
        torch.testing.assert_close(dx, eager_dx)


def step_arguments(case: OpCase, inputs: dict, t: int) -> tuple:
    names = ("q", "k", "v", "phi_q", "phi_k") if case.window else ("q", "k", "v")
    return tuple(inputs[name][:, t] for name in names)


def take_step(case: OpCase, arguments: tuple, state: tuple) -> torch.Tensor:
    if case.window:
        return window_linear_attention_step(*arguments, state, scale=case.scale, a=case.a)
    return linear_attention_step(*arguments, state, scale=case.scale, a=case.a)


@pytest.mark.parametrize("case", [LINEAR, WINDOW], ids=["linear", "window"])
def test_step_is_one_graph(case):
    case = replace(case, decay=None, T=20)
    inputs, states = make_inputs(case), [empty_state(case) for _ in range(2)]
    compiled = torch.compile(lambda x, s: take_step(case, x, s), fullgraph=True, backend="aot_eager")
    for t in range(case.T):
        arguments = step_arguments(case, inputs, t)
        torch.testing.assert_close(compiled(arguments, states[0]), take_step(case, arguments, states[1]))
    for x, y in zip(*states, strict=True):
        assert x is None or torch.equal(x, y)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("case", [LINEAR, WINDOW], ids=["linear", "window"])
def test_step_is_captured_in_a_cuda_graph(case):
    case = replace(case, decay=None, T=40)
    inputs, eager_state = make_inputs(case, device="cuda"), empty_state(case, "cuda")
    state = empty_state(case, "cuda")
    arguments = tuple(x.clone() for x in step_arguments(case, inputs, 0))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        take_step(case, arguments, empty_state(case, "cuda"))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = take_step(case, arguments, state)
    for t in range(case.T):
        for x, new in zip(arguments, step_arguments(case, inputs, t), strict=True):
            x.copy_(new)
        graph.replay()
        torch.testing.assert_close(o, take_step(case, step_arguments(case, inputs, t), eager_state))
