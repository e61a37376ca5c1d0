"""Where inputs lie in memory must not matter, is never mended by a copy, and what lies around them is never read."""

from dataclasses import replace

import pytest
import torch
from numerics import assert_close
from op_backends import on, pairs, skip_if_refused, targets
from op_inputs import OpCase, call_op, float64_truth, make_inputs, packed, run_op
from torch import Tensor

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
LINEAR = OpCase(T=150, decay="scalar", a=0.5)
WINDOW = replace(LINEAR, window=20, softcap=4.0)
HALF = [replace(LINEAR, dtype=dtype, K=d, V=d, scale=0.1, T=200) for d in (64, 128) for dtype in (BF16, FP16)]
ODD = replace(HALF[0], K=33, V=80)
HALF_WINDOW = [replace(x, D=x.K, window=64, softcap=4.0, decay_grad=False) for x in HALF]
COMPILED = [*HALF_WINDOW, replace(HALF_WINDOW[0], D=80, K=33, V=40)]
EVERYWHERE = pairs(
    ([LINEAR, WINDOW], targets("reference-cpu", "chunked-*")),
    ([LINEAR, *HALF, ODD, *COMPILED], targets("cuda-*")),
)
MOVED = ("q", "k", "v", "phi_q", "phi_k", "g")


def heads_first(x: Tensor) -> Tensor:
    """[B, H, T, dim] in memory, as models hold it."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def wider(x: Tensor) -> Tensor:
    """Rows of [B, H, T, dim] inside rows twice as long, NaN behind every one."""
    return heads_first(torch.cat([x, torch.full_like(x, torch.nan)], -1))[..., : x.shape[-1]]


def inside(x: Tensor, offset: int) -> Tensor:
    """A view into a buffer of NaN: rows, tokens, heads and dim all have strangers around them."""
    margins = [1, 3, 2] + [offset + 8] * (x.ndim - 3)
    buffer = x.new_full([size + 2 * margin for size, margin in zip(x.shape, margins, strict=True)], torch.nan)
    view = buffer
    for axis, margin in enumerate(margins):
        view = view.narrow(axis, margin, x.shape[axis])
    return view.copy_(x)


def fused(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """q, k and v as slices of one tensor, as a fused projection leaves them."""
    if len({inputs[name].shape[-1] for name in ("q", "k", "v")}) > 1:
        return inputs
    joined = torch.cat([inputs[name] for name in ("q", "k", "v")], 2)
    parts = joined.split([inputs[name].shape[2] for name in ("q", "k", "v")], 2)
    return inputs | dict(zip(("q", "k", "v"), parts, strict=True))


LAYOUTS = {
    "heads-first": lambda inputs: {n: heads_first(x) if n in MOVED else x for n, x in inputs.items()},
    "wider": lambda inputs: {n: wider(x) if n in MOVED and x.ndim == 4 else x for n, x in inputs.items()},
    "inside": lambda inputs: {n: inside(x, 0) if n in MOVED else x for n, x in inputs.items()},
    "misaligned": lambda inputs: {n: inside(x, 1) if n in MOVED else x for n, x in inputs.items()},
    "fused": fused,
}


@EVERYWHERE
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_do_not_matter(case, target, layout):
    inputs = make_inputs(case, device=target.device)
    views = LAYOUTS[layout](inputs)
    if layout == "misaligned" and target.path == "sm90":
        pytest.skip("TMA reads addresses that are multiples of 16 bytes")
    if layout != "fused" or not case.window and case.K == case.V:
        assert not views["q"].is_contiguous()
    plain, viewed = run_op(case, inputs, target.backend), run_op(case, views, target.backend)
    for name, x in plain.items():
        # Addresses that TMA cannot read go to the other kernels, which round in another order.
        if target.is_compiled:
            assert_close(name, viewed[name], x.double(), case.dtype, 2, target.backend)
        else:
            assert torch.equal(x, viewed[name]), name
        # A state that is not would keep every later token off the compiled step.
        assert not name.startswith("final.") or viewed[name].is_contiguous(), name


@on("cuda-*")
@pytest.mark.parametrize("case", HALF[::2] + HALF_WINDOW[::2], ids=str)
@pytest.mark.parametrize("layout", ["heads-first", "inside", "fused"])
def test_views_are_read_in_place(case, target, layout):
    inputs = make_inputs(replace(case, T=2048), device=target.device)
    views = LAYOUTS[layout](inputs)

    def extra(tensors: dict[str, Tensor]) -> int:
        leaves = {n: x.detach().requires_grad_(n in MOVED and n != "g") for n, x in tensors.items()}
        o = call_op(case, leaves, target.backend)[0]
        wanted, do = [x for x in leaves.values() if x.requires_grad], torch.ones_like(o)
        torch.autograd.grad(o, wanted, do)  # the first call of a process may leave something behind
        del o
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        # What was asked for: the allocator gives whole what is left of a piece, depending on what other tests hold.
        before = torch.cuda.memory_stats()["requested_bytes.all.current"]
        torch.autograd.grad(call_op(case, leaves, target.backend)[0], wanted, do)
        return torch.cuda.memory_stats()["requested_bytes.all.peak"] - before

    assert extra(views) <= extra(inputs) + 2**16


@on("cuda-*", "emulated-*")
@pytest.mark.parametrize("case", HALF[::2] + HALF_WINDOW[::2], ids=str)
def test_any_strides_of_the_output_gradient(case, target):
    inputs = make_inputs(case, device=target.device)
    leaves = [x.requires_grad_() for name, x in inputs.items() if name in MOVED and name != "g"]
    o = call_op(case, inputs, target.backend)[0]
    do = torch.rand_like(o)
    plain = torch.autograd.grad(o, leaves, do, retain_graph=True)
    for other in (heads_first(do), inside(do, 0), wider(do)):
        for x, y in zip(plain, torch.autograd.grad(o, leaves, other, retain_graph=True), strict=True):
            assert torch.equal(x, y)
    full = torch.autograd.grad(o, leaves, torch.ones_like(o), retain_graph=True)
    # The gradient of a sum is one number with strides 0, which TMA may not be able to read.
    with skip_if_refused(must_run=False):
        expanded = torch.autograd.grad(o.sum(), leaves, retain_graph=True)
        one_row = torch.autograd.grad(o, leaves, torch.ones_like(o[:, :1]).expand_as(o))
    for x, *others in zip(full, expanded, one_row, strict=True):
        for y in others:
            assert_close("dq", y, x.double(), case.dtype, 2, target.backend)


@on("cuda-*", "emulated-*")
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
@pytest.mark.parametrize("form", ["causal", "bidirectional", "window"])
def test_packed_rows_inside_nan(target, form, index_dtype):
    case = packed((33, 0, 100, 64, 1), D=64, K=64, V=64, dtype=BF16, a=0.5, H=6, H_kv=2)
    case = replace(case, causal=form != "bidirectional", window=20 if form == "window" else 0)
    inputs = make_inputs(case, device=target.device)
    expected = float64_truth(case, inputs)
    inputs["cu_seqlens"] = inputs["cu_seqlens"].to(index_dtype)
    for view in (inputs, LAYOUTS["inside"](inputs)):
        for name, x in run_op(case, view, target.backend).items():
            assert_close(name, x, expected[name], case.dtype, backend=target.backend)


@on("cuda-*", "emulated-*")
@pytest.mark.parametrize("case", [HALF[0], replace(HALF_WINDOW[0], a=0.0)], ids=str)
@pytest.mark.parametrize("member", ["strided", "contiguous"])
def test_state_of_any_strides(case, target, member):
    case = replace(case, state=True, T=70)
    inputs = make_inputs(case, device=target.device)
    expected = float64_truth(case, inputs)
    if member == "strided":
        # K and V swapped in memory, as a state [N, H_kv, V, K] seen from here.
        inputs["state.kv"] = inputs["state.kv"].transpose(2, 3).contiguous().transpose(2, 3)
        assert not inputs["state.kv"].is_contiguous()
    for name, x in run_op(case, inputs, target.backend).items():
        assert_close(name, x, expected[name], case.dtype, backend=target.backend)


@on("chunked-cpu", "cuda-cuda")
def test_new_memory_is_full_of_nan(target):
    assert torch.empty(1000, device=target.device).isnan().all()
    assert torch.empty_strided((10, 10), (20, 1), dtype=BF16, device=target.device).isnan().all()
