"""Bad arguments: each message names the argument. And which backend runs, and why."""

import logging
from dataclasses import replace

import pytest
import torch
from op_backends import on
from op_inputs import OpCase, call_op, empty_state, make_inputs

from hf_linattn.kernels import (
    explain,
    init_state,
    linear_attention_step,
    window_linear_attention_step,
)

LINEAR = OpCase(B=1, T=8)
WINDOW = OpCase(B=1, T=8, window=4)
# (argument the message must begin with, replacement of inputs or options, error)
BAD_LINEAR = [
    ("q", {"q": torch.ones(1, 8, 16)}, ValueError),
    ("q", {"q": torch.ones(1, 8, 4, 16, dtype=torch.int64)}, TypeError),
    ("k", {"k": torch.ones(1, 8, 2, 16, dtype=torch.float64)}, TypeError),
    ("k", {"k": torch.ones(1, 9, 2, 16)}, ValueError),
    ("k", {"k": torch.ones(1, 8, 2, 15)}, ValueError),
    ("k", {"k": torch.ones(1, 8, 3, 16)}, ValueError),
    ("k", {"k": torch.ones(1, 8, 2, 16, device="meta")}, ValueError),
    ("v", {"v": torch.ones(1, 8, 4, 16)}, ValueError),
    ("g", {"g": torch.zeros(1, 8, 4)}, ValueError),
    ("g", {"g": torch.zeros(1, 8, 2, dtype=torch.bfloat16)}, TypeError),
    ("g_gamma", {"g": torch.zeros(1, 8, 2), "g_gamma": torch.zeros(2)}, ValueError),
    ("g_gamma", {"g_gamma": torch.zeros(4)}, ValueError),
    ("causal", {"causal": False, "g_gamma": torch.zeros(2)}, ValueError),
    ("causal", {"causal": False, "initial_state": init_state(1, 2, 16, 16)}, ValueError),
    ("initial_state", {"initial_state": torch.zeros(1, 2, 16, 16)}, TypeError),
    ("initial_state.kv", {"initial_state": init_state(2, 2, 16, 16)}, ValueError),
    ("initial_state.key_sum", {"initial_state": init_state(1, 2, 16, 16, normalize=False)}, ValueError),
    ("initial_state.value_sum", {"initial_state": init_state(1, 2, 16, 16, a=1.0)}, ValueError),
    ("initial_state.kv", {"initial_state": init_state(1, 2, 16, 16, device="meta")}, ValueError),
    ("cu_seqlens", {"cu_seqlens": torch.tensor([0])}, ValueError),
    ("cu_seqlens", {"cu_seqlens": torch.tensor([0.0, 8.0])}, TypeError),
    ("cu_seqlens", {"cu_seqlens": torch.tensor([0, 5, 4, 8])}, ValueError),
    ("cu_seqlens", {"cu_seqlens": torch.tensor([0, 9])}, ValueError),
    ("cu_seqlens", {"cu_seqlens": torch.tensor([0, 8], device="meta")}, ValueError),
    ("backend", {"backend": "triton"}, ValueError),
    ("backend", {"backend": "cuda", "q": torch.ones(1, 8, 4, 300), "k": torch.ones(1, 8, 2, 300)}, ValueError),
]
BAD_WINDOW = [
    ("window", {"window": 0}, ValueError),
    ("softcap", {"softcap": -1.0}, ValueError),
    ("phi_q", {"phi_q": torch.ones(1, 8, 2, 16)}, ValueError),
    ("phi_q", {"phi_q": torch.ones(1, 8, 4, 16).double(), "phi_k": torch.ones(1, 8, 2, 16).double()}, TypeError),
    ("phi_k", {"phi_k": torch.ones(1, 8, 2, 15)}, ValueError),
    ("log_scale", {"log_scale": torch.zeros(2)}, ValueError),
    ("log_scale", {"log_scale": torch.zeros(4).bfloat16()}, TypeError),
    ("initial_state", {"initial_state": init_state(1, 2, 16, 16)}, TypeError),
    ("initial_state.window_k", {"initial_state": empty_state(replace(WINDOW, window=5))}, ValueError),
    ("initial_state.window_g", {"initial_state": empty_state(replace(WINDOW, decay="fixed"))}, ValueError),
]


def check_refused(case: OpCase, name: str, changes: dict, error: type[Exception]) -> None:
    inputs = make_inputs(case)
    options = {key: x for key, x in changes.items() if key not in inputs and key not in ("g", "g_gamma", "cu_seqlens")}
    inputs |= {key: x for key, x in changes.items() if key not in options}
    with pytest.raises(error, match=rf"^{name}: "):
        call_op(case, inputs, options.pop("backend", None), **options)


@pytest.mark.parametrize(("name", "changes", "error"), BAD_LINEAR)
def test_linear_attention_refuses(name, changes, error):
    check_refused(LINEAR, name, changes, error)


@pytest.mark.parametrize(("name", "changes", "error"), BAD_WINDOW)
def test_window_linear_attention_refuses(name, changes, error):
    check_refused(WINDOW, name, changes, error)


def test_window_op_refuses_an_initial_state_that_requires_grad():
    state = empty_state(WINDOW)
    state.kv.requires_grad_()
    check_refused(WINDOW, "initial_state", {"initial_state": state}, ValueError)


def test_steps_refuse_a_state_of_another_form():
    x = torch.ones(1, 2, 16)
    with pytest.raises(ValueError, match=r"^state\.key_sum: "):
        linear_attention_step(x, x, x, init_state(1, 2, 16, 16, normalize=False))
    with pytest.raises(TypeError, match=r"^state: "):
        window_linear_attention_step(x, x, x, x, x, init_state(1, 2, 16, 16), scale=1.0)
    with pytest.raises(ValueError, match=r"^v: "):
        linear_attention_step(x, x, x[:, :1], init_state(1, 2, 16, 16))


def test_the_choice_of_backend_is_explained_and_logged_once(monkeypatch, caplog):
    monkeypatch.delenv("HF_LINATTN_BACKEND", raising=False)
    assert explain("cpu", torch.float32)[0] == "chunked"
    assert explain("cpu", torch.float32, "reference") == ("reference", "chosen by the backend argument")
    monkeypatch.setenv("HF_LINATTN_BACKEND", "reference")
    backend, reason = explain("cpu", torch.float32)
    assert backend == "reference"
    assert "HF_LINATTN_BACKEND" in reason
    inputs = make_inputs(LINEAR)
    with caplog.at_level(logging.INFO, "hf_linattn.kernels"):
        for _ in range(2):
            call_op(LINEAR, inputs, None)
    assert sum("reference" in record.message for record in caplog.records) == 1
    monkeypatch.setenv("HF_LINATTN_BACKEND", "cuda")
    with pytest.raises(ValueError, match=r"^backend: 'cuda' was asked for by the environment variable"):
        call_op(replace(LINEAR, dtype=torch.float64), make_inputs(replace(LINEAR, dtype=torch.float64)), None)


@on("cuda-cuda")
def test_the_compiled_kernels_run_where_they_can(target, caplog):
    half = explain(target.device, torch.bfloat16)
    assert half[0] == "cuda", half[1]
    double = explain(target.device, torch.float64)
    assert double[0] == "chunked"
    assert "float64" in double[1]
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert explain(target.device, dtype, feature_dim=257)[0] == "chunked"
        for op in ("linear_attention_step", "window_linear_attention_step"):
            assert explain(target.device, dtype, "cuda", op=op, feature_dim=256, value_dim=256)[0] == "cuda"
            assert explain(target.device, dtype, op=op, value_dim=257)[0] == "chunked"
        window = {"op": "window_linear_attention", "value_dim": 64}
        assert explain(target.device, dtype, **window, feature_dim=64, head_dim=64)[0] == "cuda"
        assert "head dimensions" in explain(target.device, dtype, **window, head_dim=257)[1]
    case = replace(LINEAR, K=260)
    with caplog.at_level(logging.INFO, "hf_linattn.kernels"):
        call_op(case, make_inputs(case, device=target.device), None)
    assert any("256" in record.message and "chunked" in record.message for record in caplog.records)
    with pytest.raises(ValueError, match=r"^backend: 'cuda' was asked for by the backend argument"):
        call_op(case, make_inputs(case, device=target.device), "cuda")
    inputs = make_inputs(LINEAR, device=target.device)
    with pytest.raises(ValueError, match=r"^k: "):
        call_op(LINEAR, inputs | {"k": inputs["k"].cpu()}, "cuda")


@on("cuda-cuda")
def test_an_unknown_kernel_path_is_refused(target, monkeypatch):
    monkeypatch.setenv("HF_LINATTN_CUDA_PATH", "sm75")
    with pytest.raises(ValueError, match=r"^HF_LINATTN_CUDA_PATH: .*sm75"):
        call_op(LINEAR, make_inputs(LINEAR, device=target.device), "cuda")


@on("chunked-*", "cuda-cuda")
@pytest.mark.parametrize("case", [LINEAR, replace(WINDOW, D=64, K=64, V=64, state=True)], ids=str)
def test_autocast_does_not_lower_the_precision(case, target):
    inputs = make_inputs(case, device=target.device)
    leaves = [inputs[name].requires_grad_() for name in ("q", "k", "v")]
    plain = call_op(case, inputs, target.backend)[0]
    with torch.autocast(target.device, torch.bfloat16):
        under = call_op(case, inputs, target.backend)[0]
        grads = torch.autograd.grad(under.sum(), leaves)
    assert torch.equal(under, plain)
    for dx, expected in zip(grads, torch.autograd.grad(plain.sum(), leaves), strict=True):
        assert torch.equal(dx, expected)
