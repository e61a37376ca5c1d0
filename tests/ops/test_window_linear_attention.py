"""window_linear_attention on every backend: o, final state and every gradient against float64."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_close
from op_backends import on, pairs, targets
from op_inputs import BY_TOKEN, OpCase, call_op, check, make_inputs, packed, run_op

from hf_linattn.kernels import explain

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

# What the compiled kernels take: they have no gradient of the decay, and no initial state together with a.
SMALL = replace(BASE, decay_grad=False)
SMALL_CASES = [
    *(replace(SMALL, T=t, window=w, state=s) for t in (1, 15, 65) for w in (1, 64) for s in (False, True)),
    *(replace(SMALL, T=300, dtype=d, decay="scalar", a=0.5, softcap=3.0) for d in (BF16, FP16, FP32)),
    *(replace(SMALL, T=150, D=d, K=k, V=v, window=70, dtype=FP32) for d, k, v in ((8, 16, 1), (16, 128, 5))),
    replace(SMALL, T=300, decay="fixed", b=0.7, state=True, softcap=5.0),
    replace(SMALL, T=100, log_scale=False),
    *(packed((0, 70, 1, 0, 16, 129, 0), window=16, decay=d, a=0.5, decay_grad=False) for d in (None, "scalar")),
    packed((0, 70, 1, 0, 16, 129, 0), window=16, decay="scalar", state=True, decay_grad=False),
    packed((3, 100), window=8, dtype=BF16),
]
WIDE = OpCase(T=200, H=6, H_kv=2, D=64, K=64, V=64, dtype=BF16, window=64, scale=0.125, decay_grad=False)
LONG = replace(WIDE, B=1, T=4095, H=2, H_kv=1)
WINDOWS = (1, 16, 63, 64, 65, 128, 200)
PACKED_LENGTHS = (0, 70, 1, 0, 64, 129, 500, 0)
HALF_CASES = [
    *(replace(WIDE, T=500, window=w, D=d, K=d, V=d, decay="scalar") for w in WINDOWS for d in (64, 128)),
    *(replace(WIDE, T=t, K=128, state=True, decay=g) for t in (1, 63, 64, 65, 2048) for g in (None, "scalar")),
    *(replace(WIDE, D=d, K=k, V=v, a=0.5, softcap=3.0) for d, k, v in ((128, 64, 64), (64, 128, 64), (64, 64, 128))),
    *(replace(WIDE, H_kv=h, D=128, K=128, V=128, decay="fixed", log_scale=h == 1) for h in (1, 2, 6)),
    *(
        replace(LONG, D=d, K=d, V=d, decay=g, state=g is None, window=w)
        for d, w in ((64, 64), (128, 200))
        for g in (None, "fixed")
    ),
    *(
        packed(
            PACKED_LENGTHS,
            H=6,
            H_kv=2,
            D=d,
            K=d,
            V=d,
            dtype=BF16,
            scale=0.125,
            window=64,
            decay=g,
            a=0.5,
            decay_grad=False,
        )
        for d in (64, 128)
        for g in (None, "scalar")
    ),
    packed(
        PACKED_LENGTHS,
        H=6,
        H_kv=2,
        D=64,
        K=64,
        V=64,
        dtype=BF16,
        scale=0.125,
        window=16,
        decay="scalar",
        state=True,
        decay_grad=False,
    ),
    packed((0, 3000, 1, 0, 1000), H=1, H_kv=1, D=128, K=128, V=128, dtype=BF16, scale=0.1, window=128, state=True),
]
DIMENSION_CASES = [
    *(
        replace(WIDE, T=t, dtype=dtype, a=0.5, decay="scalar", window=w)
        for dtype in (FP16, FP32)
        for t, w in ((65, 1), (500, 64), (2048, 200))
    ),
    *(replace(WIDE, D=d, K=d, V=d, dtype=x, state=True) for d in (16, 33, 80, 96, 128) for x in (BF16, FP16, FP32)),
    *(replace(WIDE, D=d, K=256, V=v) for d, v in ((64, 64), (128, 128))),
    *(replace(LONG, dtype=x, decay="scalar", D=128, K=128, V=128) for x in (FP16, FP32)),
]


@pairs(
    (CASES, targets("chunked-*")),
    (SMALL_CASES, targets("cuda-cuda", "cuda-sm80", "emulated-sm80")),
    (HALF_CASES, targets("cuda-sm80", "cuda-sm90")),
    (DIMENSION_CASES, targets("cuda-sm80")),
)
def test_window_linear_attention(case, target):
    check(case, make_inputs(case, device=target.device), target)


@pairs(
    ([replace(BASE, T=40, window=64, dtype=FP64)], targets("reference-cpu", "chunked-*")),
    (
        [replace(WIDE, T=150, window=w, dtype=x) for w in (150, 200) for x in (BF16, FP16, FP32)],
        targets("cuda-*", "emulated-*"),
    ),
)
def test_window_longer_than_the_sequence_is_softmax(case, target):
    inputs = make_inputs(case, device=target.device)
    q, k, v = (inputs[name].double().transpose(1, 2) for name in ("q", "k", "v"))
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=case.scale, enable_gqa=True)
    actual = run_op(case, inputs, target.backend)
    assert_close("o", actual["o"], expected.transpose(1, 2), case.dtype, backend=target.backend)
    assert not any(actual[name].any() for name in ("dphi_q", "dphi_k", "dlog_scale"))


@pairs(
    ([replace(BASE, T=100, dtype=FP32)], targets("reference-cpu", "chunked-*")),
    ([replace(WIDE, T=100, window=16, dtype=dtype) for dtype in (BF16, FP32)], targets("cuda-*", "emulated-*")),
)
def test_far_keys_of_no_weight_leave_softmax_over_the_window(case, target):
    inputs = make_inputs(case, device=target.device)
    inputs["phi_q"].zero_()
    # Logits far below the smallest float32 number: the empty far part must not swallow the window.
    inputs["q"] *= 100
    q, k, v = (inputs[name].double().transpose(1, 2) for name in ("q", "k", "v"))
    place = torch.arange(case.T, device=target.device)
    inside = (place <= place[:, None]) & (place > place[:, None] - case.window)
    expected = F.scaled_dot_product_attention(q, k, v, inside, scale=case.scale, enable_gqa=True)
    actual = run_op(case, inputs, target.backend)
    assert_close("o", actual["o"], expected.transpose(1, 2), case.dtype, 10, target.backend)
    assert all(x.isfinite().all() for x in actual.values())


@pairs(
    ([replace(BASE, T=70, decay="scalar", a=0.5, state=True)], targets("chunked-*")),
    ([replace(x, T=70, decay="scalar", state=True) for x in (SMALL, WIDE)], targets("cuda-*", "emulated-*")),
)
def test_invalid_ring_entries_may_hold_anything(case, target):
    inputs = make_inputs(case, device=target.device)
    expected = run_op(case, inputs, target.backend)
    for member in ("window_k", "window_v", "window_phi_k", "window_g"):
        inputs[f"state.{member}"][~inputs["state.window_valid"]] = torch.nan
    for name, x in run_op(case, inputs, target.backend).items():
        assert torch.equal(x, expected[name]), name


@pairs(([BASE], targets("chunked-*")), ([SMALL, WIDE], targets("cuda-*", "emulated-*")))
def test_no_tokens(case, target):
    case = replace(case, T=0, state=True)
    inputs = make_inputs(case, device=target.device)
    actual = run_op(case, inputs, target.backend)
    assert actual["o"].shape == (2, 0, case.H, case.V)
    order = (torch.arange(case.window, device=target.device) + inputs["state.slot"]) % case.window
    assert torch.equal(actual["final.window_valid"], inputs["state.window_valid"][:, order])
    assert torch.equal(actual["final.kv"], inputs["state.kv"])


@on("cuda-*", "emulated-*")
def test_no_tokens_and_no_state(target):
    actual = run_op(replace(WIDE, T=0), make_inputs(replace(WIDE, T=0), device=target.device), target.backend)
    assert not any(actual[f"final.{member}"].any() for member in ("kv", "key_sum", "window_valid"))
    assert not actual["dlog_scale"].any()


@pairs(
    (
        [packed((70, 20), window=16, a=0.5, decay="scalar"), packed((0, 70), window=64, state=True)],
        targets("chunked-*"),
    ),
    (
        [
            packed(lengths, D=64, K=64, V=128, dtype=BF16, window=w, decay=g, state=w == 16, decay_grad=False)
            for lengths, w in (((70, 20, 0), 16), ((64, 64), 64), ((1000, 29), 65))
            for g in (None, "scalar")
        ],
        targets("cuda-*", "emulated-*"),
    ),
)
def test_tokens_behind_the_last_boundary_are_left_out(case, target):
    inputs = make_inputs(case, device=target.device)
    longer = {
        name: torch.cat([x, torch.full_like(x[:, :9], torch.nan)], 1) if name in BY_TOKEN else x
        for name, x in inputs.items()
    }
    actual, expected = run_op(case, longer, target.backend), run_op(case, inputs, target.backend)
    for name, x in expected.items():
        has_tail = name == "o" or name[1:] in BY_TOKEN
        assert not has_tail or not actual[name][:, case.T :].any(), name
        same = actual[name][:, : case.T] if has_tail else actual[name]
        # The compiled kernels may cut a longer row into other segments.
        if target.is_compiled:
            assert_close(name, same, x.double(), case.dtype, factor=2, backend=target.backend)
        else:
            assert torch.equal(same, x), name


@on("cuda-*", "emulated-*")
def test_what_the_compiled_kernels_do_not_take_runs_chunked(target):
    """By default; asked for by name, they refuse it, and the message names the argument and a way out."""
    assert explain(target.device, BF16, op="window_linear_attention")[0] == "cuda"
    for argument, case in (
        ("g", replace(SMALL, T=20, decay="scalar", decay_grad=True)),
        ("g_gamma", replace(SMALL, T=20, decay="fixed", decay_grad=True)),
        ("initial_state", replace(SMALL, T=20, a=0.5, state=True)),
    ):
        inputs = make_inputs(case, device=target.device)
        expected = run_op(case, inputs, "chunked")
        assert all(torch.equal(x, expected[name]) for name, x in run_op(case, inputs, None).items())
        with pytest.raises(ValueError, match=rf"^{argument}: .*'cuda'.* or use 'chunked'"):
            run_op(case, inputs, "cuda")
    # Without gradients a gate that could have one is like any other.
    case = replace(SMALL, decay="scalar")
    inputs = make_inputs(case, device=target.device)
    inputs["g"].requires_grad_()
    with torch.no_grad():
        call_op(case, inputs, "cuda")
