"""What tests/test_compiled_library.py runs in processes of their own, since a library stays loaded until the end.

HF_LINATTN_LIBRARY=<library> python tests/compiled_library_runs.py definitions|emulation
"""

import os
import sys
from dataclasses import replace

import pytest
import torch
from numerics import assert_close
from op_backends import Target
from op_inputs import OpCase, call_op, check, make_inputs, packed, run_op
from torch._subclasses.fake_tensor import FakeTensorMode

from hf_linattn.kernels import explain, init_state, init_window_state, linear_attention, linear_attention_step
from hf_linattn.kernels.cuda_library import (
    COMPILED_DTYPES,
    CUDA_PATH_VARIABLE,
    compiled_build_info,
    compiled_library_problem,
)

CASE = OpCase(B=1, T=70, K=64, V=64, dtype=torch.bfloat16, scale=0.1)
EMULATED_CASES = [
    CASE,
    replace(CASE, decay="scalar", a=0.5, state=True),
    replace(CASE, normalize=False, b=0.7, state=True),
    replace(CASE, decay="fixed"),
    replace(CASE, causal=False, a=1.0),
    packed((30, 0, 40), K=64, V=64, dtype=torch.bfloat16, scale=0.1, decay="scalar", state=True),
    replace(CASE, T=0, a=0.5, state=True),
]
WINDOW_CASE = replace(CASE, D=64, window=16, decay_grad=False)
EMULATED_CASES += [
    WINDOW_CASE,
    replace(WINDOW_CASE, decay="scalar", a=0.5, softcap=3.0),
    replace(WINDOW_CASE, decay="fixed", state=True, window=30),
    replace(WINDOW_CASE, window=100, log_scale=False),
    packed((30, 0, 40), D=64, K=64, V=64, dtype=torch.bfloat16, scale=0.1, window=16, state=True),
    replace(WINDOW_CASE, T=0, state=True),
]
# Of these there are portable kernels only.
WIDE_CASES = [
    replace(CASE, K=256, V=192, dtype=torch.float32, decay="scalar", a=0.5, state=True),
    replace(CASE, K=192, V=256, dtype=torch.float16, normalize=False, decay="fixed"),
]
# Largest dimensions of bfloat16, float16 and float32 by compute capability.
LARGEST = {90: (256, 256, 256), 80: (256, 256, 256), 86: (256, 128, 128)}


def definitions() -> None:
    """On a machine without a GPU: the ops are defined, tell shapes, and have no CPU kernel."""
    assert compiled_library_problem is None, compiled_library_problem
    assert compiled_build_info()["architectures"] == "sm_80,sm_90a,compute_80"
    assert explain("cpu", torch.bfloat16)[0] == "chunked"
    ops = torch.ops.hf_linattn
    with FakeTensorMode():
        q, k, v, g = torch.empty(2, 5, 4, 16), torch.empty(2, 5, 2, 16), torch.empty(2, 5, 2, 8), torch.empty(2, 5, 2)
        forward = (q, k, v, g, [], None, 0.5, 1.0, True, True, True, 0)
        o, den, final = ops.linear_attention_forward(*forward)
        assert o.shape == (2, 5, 4, 8)
        assert den.shape == (2, 4, 5)
        assert [x.shape for x in final] == [(2, 2, 16, 8), (2, 2, 16), (2, 2, 8), (2, 2)]
        backward = (o, q, k, v, None, g, [], [], None, 0.0, 1.0, False, True, True)
        *grads, d_initial = ops.linear_attention_backward(*backward, True, 0)
        assert [x.shape for x in grads] == [q.shape, k.shape, v.shape, g.shape]
        assert [x.shape for x in d_initial] == [(2, 2, 16, 8)]
        assert ops.linear_attention_backward(*backward, False, 0)[4] == []
        step = ops.linear_attention_step(
            q[:, 0], k[:, 0], v[:, 0], None, final[0], final[1], None, None, 0.0, 1.0, True, 0
        )
        assert step.shape == (2, 4, 8)
        rows = (torch.empty(2, 5, 4, 32), torch.empty(2, 5, 2, 32), v, q, k)
        scalars = (3, 1.0, 0.0, 0.5, 1.0, True, 0)
        constants = (g, torch.empty(4), [], None, None)
        o, lse, final = ops.window_linear_attention_forward(*rows, *constants, *scalars[:-1], 0, scalars[-1])
        assert [x.shape for x in (o, lse)] == [(2, 5, 4, 8), (2, 4, 5)]
        assert [x.shape for x in final] == [(2, 2, 16, 8), (2, 2, 16), (2, 2, 8), (2, 2)]
        backward = (o, *rows, o, lse, *constants, *scalars)
        *grads, d_log_scale = ops.window_linear_attention_backward(*backward)
        assert [x.shape for x in grads] == [x.shape for x in rows]
        assert d_log_scale.shape == (1, 2, 4, 5)
        state = init_window_state(2, 2, 16, 16, 8, window=3, decay=True)
        step = ops.window_linear_attention_step(
            q[:, 0], k[:, 0], v[:, 0], q[:, 0], k[:, 0], g[:, 0], None, *state, 1.0, 0.0, 1.0, 0.0
        )
        assert step.shape == (2, 4, 8)
    with pytest.raises(NotImplementedError, match="CPU"):
        ops.linear_attention_forward(*(torch.zeros(x.shape) for x in (q, k, v, g)), *forward[4:])


def emulation() -> None:
    """The kernels on the CPU behind the binding: outputs, states and gradients against the reference."""
    for case in EMULATED_CASES + (WIDE_CASES if os.environ[CUDA_PATH_VARIABLE] == "sm80" else []):
        check(case, make_inputs(case), Target("cuda", "cpu"))

    for capability, largest in LARGEST.items():
        os.environ["HF_LINATTN_EMULATED_CAPABILITY"] = str(capability)
        for dtype, dim in zip(COMPILED_DTYPES, largest, strict=True):
            assert explain("cpu", dtype, feature_dim=dim, value_dim=dim)[0] == "cuda"
            assert f"take 1 to {dim} value" in explain("cpu", dtype, feature_dim=1, value_dim=dim + 1)[1]
            for op in ("linear_attention_step", "window_linear_attention_step"):
                step = {"op": op, "value_dim": 1}
                assert explain("cpu", dtype, "cuda", feature_dim=256, **step)[0] == "cuda"
                assert "take 1 to 256 feature" in explain("cpu", dtype, feature_dim=257, **step)[1]
    del os.environ["HF_LINATTN_EMULATED_CAPABILITY"]

    # Without gradients the rows of a ring, which have no query, are left out.
    for case in (case for case in EMULATED_CASES if case.window and case.state):
        inputs = make_inputs(case)
        expected = run_op(case, inputs, "cuda")
        for name, x in run_op(case, inputs, "cuda", with_grad=False).items():
            assert_close(name, x, expected[name].double(), case.dtype, 2, "cuda")

    inputs = make_inputs(CASE)
    expected = call_op(CASE, inputs, "cuda")[0]
    # Memory in the order of Transformers, [B, H, T, D], and a last dimension that is not contiguous.
    for order in ((0, 2, 1, 3), (0, 1, 3, 2)):
        moved = {name: x.permute(order).contiguous().permute(order) for name, x in inputs.items()}
        assert torch.equal(call_op(CASE, moved, "cuda")[0], expected)

    # A state that a backward has saved must not change unnoticed.
    state = init_state(1, CASE.H_kv, 64, 64)
    state.kv.requires_grad_()
    o, _ = linear_attention(*(inputs[name][:, :1] for name in ("q", "k", "v")), initial_state=state, backend="cuda")
    linear_attention_step(*(inputs[name][:, 0] for name in ("q", "k", "v")), state, feature_map="l2", backend="cuda")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        o.sum().backward()

    # A gradient for what asked for one, and for the part of the output that was read.
    q, k, v = (inputs[name] for name in ("q", "k", "v"))
    v = v.clone().requires_grad_()
    o, final = linear_attention(q, k, v, output_final_state=True, backend="cuda")
    final.kv.sum().backward(retain_graph=True)
    expected = k.float().sum(-1, keepdim=True).expand(v.shape)
    torch.testing.assert_close(v.grad.float(), expected, rtol=0.02, atol=0.1)
    dv = torch.autograd.grad(o.float().square().sum(), v, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dv.sum().backward()


if __name__ == "__main__":
    {"definitions": definitions, "emulation": emulation}[sys.argv[1]]()
    print("done")
