"""torch.compile(fullgraph=True), CUDA graphs, streams, devices, and what torch.library asks of an op."""

from dataclasses import replace

import pytest
import torch
from op_backends import CAPABILITY, pairs, targets
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
HALF = replace(LINEAR, K=64, V=64, dtype=torch.bfloat16, scale=0.1)
HALF_WINDOW = replace(HALF, D=64, window=16)
COMPILED = [
    HALF,
    replace(HALF, causal=False, decay=None),
    replace(HALF, state=True),
    replace(HALF, B=1, T=70, lengths=(30, 0, 40), normalize=False),
]
HALF_WINDOW = replace(HALF, D=64, a=0.0, window=16, softcap=3.0, decay_grad=False)
COMPILED_WINDOW = [
    HALF_WINDOW,
    replace(HALF_WINDOW, state=True),
    replace(HALF_WINDOW, decay=None, a=0.5, log_scale=False),
    replace(HALF_WINDOW, B=1, T=70, lengths=(30, 0, 40), decay="fixed"),
]
LEAVES = ("q", "k", "v", "phi_q", "phi_k", "log_scale")


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pairs((ALL, targets("chunked-cpu")), (COMPILED + COMPILED_WINDOW, targets("cuda-*")))
def test_forward_and_backward_are_one_graph(case, target):
    inputs = make_inputs(case, device=target.device)
    expected = run_op(case, inputs, target.backend)
    leaves = {n: x.clone().requires_grad_(n in LEAVES) for n, x in inputs.items()}
    compiled = torch.compile(lambda x: call_op(case, x, target.backend), fullgraph=True, backend="aot_eager")
    o, final = compiled(leaves)
    torch.testing.assert_close(o, expected["o"])
    assert all(x is None or torch.equal(x, expected[f"final.{n}"]) for n, x in zip(final._fields, final, strict=True))
    eager, _ = call_op(case, leaves, target.backend)
    wanted = [leaves[name] for name in LEAVES if name in leaves]
    grads, eager_grads = (torch.autograd.grad((x * output_gradient(x)).sum(), wanted) for x in (o, eager))
    for dx, eager_dx in zip(grads, eager_grads, strict=True):
        torch.testing.assert_close(dx, eager_dx)


@pairs(([replace(HALF, decay=None), replace(HALF_WINDOW, decay=None)], targets("cuda-cuda")))
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_new_lengths_do_not_recompile(case, target, compiler):
    def loss(*leaves):
        given = dict(zip(inputs, leaves, strict=True))
        return call_op(case, given, target.backend, output_final_state=False)[0].square().sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=compiler)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (70, 64, 200, 1000, 257):
            inputs = make_inputs(replace(case, T=length), device=target.device)
            leaves = [x.requires_grad_() for x in inputs.values()]
            grads, expected = (torch.autograd.grad(f(*leaves), leaves) for f in (compiled, loss))
            for dx, eager_dx in zip(grads, expected, strict=True):
                torch.testing.assert_close(dx, eager_dx, rtol=2e-2, atol=2e-2)


def step_arguments(case: OpCase, inputs: dict, t: int) -> tuple:
    names = ("q", "k", "v", "phi_q", "phi_k") if case.window else ("q", "k", "v")
    return tuple(inputs[name][:, t] for name in names)


def take_step(case: OpCase, arguments: tuple, state: tuple, backend: str | None) -> torch.Tensor:
    if case.window:
        return window_linear_attention_step(*arguments, state, scale=case.scale, a=case.a, backend=backend)
    return linear_attention_step(*arguments, state, scale=case.scale, a=case.a, backend=backend)


@pairs(([LINEAR, WINDOW], targets("chunked-cpu")), ([HALF, HALF_WINDOW], targets("cuda-cuda", "emulated-sm80")))
def test_step_is_one_graph(case, target):
    case = replace(case, decay=None, T=20)
    inputs, states = make_inputs(case, device=target.device), [empty_state(case, target.device) for _ in range(2)]
    compiled = torch.compile(lambda x, s: take_step(case, x, s, target.backend), fullgraph=True, backend="aot_eager")
    for t in range(case.T):
        arguments = step_arguments(case, inputs, t)
        expected = take_step(case, arguments, states[1], target.backend)
        torch.testing.assert_close(compiled(arguments, states[0]), expected)
    for x, y in zip(*states, strict=True):
        assert x is None or torch.equal(x, y)


@pairs(
    ([LINEAR, WINDOW], targets("chunked-cuda")),
    ([LINEAR, HALF, replace(HALF, B=3, K=128), HALF_WINDOW, replace(HALF_WINDOW, B=3, V=128)], targets("cuda-cuda")),
)
def test_step_is_captured_in_a_cuda_graph(case, target):
    case = replace(case, decay=None, T=40)
    inputs, eager_state = make_inputs(case, device="cuda"), empty_state(case, "cuda")
    state = empty_state(case, "cuda")
    arguments = tuple(x.clone() for x in step_arguments(case, inputs, 0))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        take_step(case, arguments, empty_state(case, "cuda"), target.backend)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = take_step(case, arguments, state, target.backend)
    for t in range(case.T):
        for x, new in zip(arguments, step_arguments(case, inputs, t), strict=True):
            x.copy_(new)
        graph.replay()
        expected = take_step(case, step_arguments(case, inputs, t), eager_state, target.backend)
        torch.testing.assert_close(o, expected)
    for x, y in zip(state, eager_state, strict=True):
        assert x is None or torch.equal(x, y)


@pairs(([HALF, HALF_WINDOW], targets("cuda-*", "chunked-cuda")))
def test_work_is_queued_on_the_current_stream(case, target):
    case = replace(case, T=500)
    inputs = make_inputs(case, device="cuda")
    expected = run_op(case, inputs, target.backend)
    late = {n: torch.full_like(x, torch.nan) for n, x in inputs.items()}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # Inputs arrive some milliseconds after the op is called: on any other stream it reads NaN.
        torch.cuda._sleep(20_000_000)
        for name, x in inputs.items():
            late[name].copy_(x)
        actual = run_op(case, late, target.backend)
    torch.cuda.synchronize()
    assert all(torch.equal(x, expected[name]) for name, x in actual.items())


@pairs(([HALF, HALF_WINDOW], targets("cuda-*")))
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_inputs_on_the_device_that_is_not_current(case, target):
    case = replace(case, T=200)
    inputs = make_inputs(case, device="cuda:0")
    expected = run_op(case, inputs, target.backend)
    actual = run_op(case, {n: x.to("cuda:1") for n, x in inputs.items()}, target.backend)
    assert torch.cuda.current_device() == 0
    for name, x in actual.items():
        assert x.device == torch.device("cuda:1")
        assert torch.equal(x.cpu(), expected[name].cpu()), name


def window_op_arguments(case: OpCase, inputs: dict) -> tuple:
    """Arguments of torch.ops.hf_linattn.window_linear_attention_forward, a ring left out."""
    rows = [inputs[name] for name in ("q", "k", "v", "phi_q", "phi_k")]
    first = [inputs[f"state.{member}"] for member in ("kv", "key_sum") if case.state]
    valid = torch.rand(rows[0].shape[:2], device=rows[0].device) < 0.9 if case.state else None
    constants = (inputs.get("g"), inputs.get("log_scale"), first, valid, inputs.get("cu_seqlens"))
    return (*rows, *constants, case.window, case.scale, case.softcap or 0.0, case.a, case.b, True, 0, 0)


@pairs((COMPILED_WINDOW, targets("cuda-cuda")))
def test_window_ops_keep_the_rules_of_torch_library(case, target):
    inputs = make_inputs(case, device=target.device)
    arguments = window_op_arguments(case, inputs)
    ops = torch.ops.hf_linattn
    torch.library.opcheck(ops.window_linear_attention_forward.default, arguments)
    o, lse, _ = ops.window_linear_attention_forward.default(*arguments)
    *scalars, _, _, path = arguments[10:]
    arguments = (torch.rand_like(o), *arguments[:5], o, lse, *arguments[5:10], *scalars, case.log_scale, path)
    torch.library.opcheck(ops.window_linear_attention_backward.default, arguments)


def op_arguments(case: OpCase, inputs: dict) -> tuple:
    """Arguments of torch.ops.hf_linattn.linear_attention_forward."""
    first = [x for name, x in inputs.items() if name.startswith("state.")]
    tensors = [inputs.get(name) for name in ("q", "k", "v", "g")] + [first, inputs.get("cu_seqlens")]
    return (*tensors, case.a, case.b * case.scale, case.normalize, case.causal, True, 0)


@pairs(([*COMPILED, replace(HALF, state=True, a=0.0)], targets("cuda-cuda")))
def test_forward_op_keeps_the_rules_of_torch_library(case, target):
    inputs = make_inputs(case, device=target.device)
    for with_grad in (False, True):
        leaves = {n: x.detach().requires_grad_(with_grad and x.is_floating_point()) for n, x in inputs.items()}
        torch.library.opcheck(torch.ops.hf_linattn.linear_attention_forward.default, op_arguments(case, leaves))


@pairs((COMPILED[:3], targets("cuda-cuda")))
def test_backward_op_keeps_the_rules_of_torch_library(case, target):
    inputs = make_inputs(case, device=target.device)
    arguments = op_arguments(case, inputs)
    o, den, final = torch.ops.hf_linattn.linear_attention_forward.default(*arguments)
    given = [torch.rand_like(x) for x in final]
    with_dg = case.decay is not None
    arguments = (torch.rand_like(o), *arguments[:3], den, arguments[3], arguments[4], given)
    arguments += (None, case.a, case.b * case.scale, case.normalize, case.causal, with_dg, case.state, 0)
    torch.library.opcheck(torch.ops.hf_linattn.linear_attention_backward.default, arguments)


@pairs(([HALF, replace(HALF, decay=None, a=0.0, normalize=False)], targets("cuda-cuda")))
def test_step_op_keeps_the_rules_of_torch_library(case, target):
    inputs, state = make_inputs(case, device=target.device), empty_state(case, target.device)
    now = [inputs[name][:, 0] if name in inputs else None for name in ("q", "k", "v", "g")]
    arguments = (*now, *state, case.a, case.b * case.scale, case.normalize, 0)
    torch.library.opcheck(torch.ops.hf_linattn.linear_attention_step.default, arguments)


WINDOW_FORMS = [replace(HALF_WINDOW, decay=d, a=a) for d, a in ((None, 0.0), ("scalar", 0.5))]


@pairs((WINDOW_FORMS, targets("cuda-cuda", "emulated-sm80")))
def test_window_step_op_keeps_the_rules_of_torch_library(case, target):
    inputs, state = make_inputs(case, device=target.device), empty_state(case, target.device)
    now = [inputs[name][:, 0] if name in inputs else None for name in ("q", "k", "v", "phi_q", "phi_k", "g")]
    arguments = (*now, inputs["log_scale"], *state, case.scale, case.a, case.b, 3.0)
    torch.library.opcheck(torch.ops.hf_linattn.window_linear_attention_step.default, arguments)


@pytest.mark.gpu
@pytest.mark.skipif(CAPABILITY != 90, reason="needs a CUDA device of compute capability 9.0")
def test_hopper_takes_its_own_kernels(monkeypatch):
    monkeypatch.delenv("HF_LINATTN_CUDA_PATH", raising=False)
    for dim in (64, 128):
        inputs = make_inputs(replace(HALF_WINDOW, D=dim, K=dim, V=dim, decay=None), device="cuda")
        rows = [inputs[name] for name in ("q", "k", "v", "phi_q", "phi_k")]
        path_of = torch.ops.hf_linattn.window_linear_attention_path
        assert [path_of(*rows, None, 64, 1.0, 0.0, 0.0, 1.0, forced) for forced in (0, 1)] == [2, 1]
        q, k, v = rows[:3]
        assert torch.ops.hf_linattn.linear_attention_path(q, k, v, None, 0.0, 1.0, True, True, 0) == 2
        assert torch.ops.hf_linattn.linear_attention_path(q, k, v, None, 0.0, 1.0, True, True, 1) == 1
