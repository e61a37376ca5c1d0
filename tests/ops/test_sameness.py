"""What must not matter to a result: packing, splits, steps, layout in memory, expanded heads, the run."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import assert_close
from op_inputs import OpCase, call_op, empty_state, float64_truth, make_inputs, packed, run_op
from torch.utils.checkpoint import checkpoint

from hf_linattn.kernels import linear_attention_step, window_linear_attention_step

LINEAR = OpCase(T=150, decay="scalar", a=0.5)
WINDOW = replace(LINEAR, window=20, softcap=4.0)
BOTH = pytest.mark.parametrize("case", [LINEAR, WINDOW], ids=["linear", "window"])
EVERY_BACKEND = pytest.mark.parametrize("backend", ["reference", "chunked"])
BY_TOKEN = ("q", "k", "v", "phi_q", "phi_k", "g")


def tokens(inputs: dict, start: int, end: int) -> dict:
    """The inputs of a stretch of tokens; what has no token axis stays."""
    return {name: x[:, start:end] if name in BY_TOKEN else x for name, x in inputs.items()}


@BOTH
@EVERY_BACKEND
@pytest.mark.parametrize("state", [False, True], ids=["fresh", "state"])
def test_packed_is_a_loop_over_sequences(case, backend, state):
    lengths = (0, 30, 1, 0, 90, 20)
    case = packed(lengths, decay="scalar", a=0.5, window=case.window, softcap=case.softcap, state=state)
    inputs = make_inputs(case)
    together, start = run_op(case, inputs, backend, with_grad=False), 0
    for n, length in enumerate(lengths):
        alone_case = replace(case, T=length, lengths=None)
        alone = tokens(inputs, start, start + length)
        alone.pop("cu_seqlens")
        for name in [x for x in alone if x.startswith("state.") and x != "state.slot"]:
            alone[name] = alone[name][n : n + 1]
        results = run_op(alone_case, alone, backend, with_grad=False)
        assert_close("o", together["o"][:, start : start + length], results.pop("o"), case.dtype)
        for name, x in results.items():
            same = together[name] if name == "final.slot" else together[name][n : n + 1]
            assert_close(name, same, x, case.dtype)
        start += length


@BOTH
def test_boundaries_changed_in_place_are_noticed(case):
    case = packed((30, 120), window=case.window)
    inputs = make_inputs(case)
    before = call_op(case, inputs, "chunked")[0]
    inputs["cu_seqlens"][1] = 70
    expected = float64_truth(case, inputs, with_grad=False)["o"]
    after = call_op(case, inputs, "chunked")[0]
    assert_close("o", after, expected, case.dtype)
    assert not torch.equal(before, after)


@BOTH
@EVERY_BACKEND
@pytest.mark.parametrize("splits", [(0, 1, 150), (0, 64, 150), (0, 19, 20, 21, 150)], ids=str)
def test_prefill_in_pieces_is_prefill_of_the_whole(case, backend, splits):
    inputs = make_inputs(case)
    whole = run_op(case, inputs, backend, with_grad=False)
    pieces, state = [], None
    for start, end in zip(splits[:-1], splits[1:], strict=True):
        o, state = call_op(case, tokens(inputs, start, end), backend, initial_state=state)
        pieces.append(o)
    assert_close("o", torch.cat(pieces, 1), whole["o"], case.dtype)
    for field, x in zip(state._fields, state, strict=True):
        if x is not None:
            assert_close(f"final.{field}", x, whole[f"final.{field}"], case.dtype)


def take_steps(case: OpCase, inputs: dict, state: tuple, start: int) -> torch.Tensor:
    """Outputs of one-token steps from `start` to the end; `state` advances in place."""
    outputs = []
    for t in range(start, case.T):
        now = {name: inputs[name][:, t] for name in BY_TOKEN if name in inputs}
        options = {"g": now.pop("g", None), "a": case.a, "b": case.b, "scale": case.scale}
        if case.window:
            first = (now[name] for name in ("q", "k", "v", "phi_q", "phi_k"))
            options |= {"log_scale": inputs.get("log_scale"), "softcap": case.softcap}
            outputs.append(window_linear_attention_step(*first, state, **options))
        else:
            options |= {"normalize": case.normalize}
            outputs.append(linear_attention_step(now["q"], now["k"], now["v"], state, **options))
    return torch.stack(outputs, 1)


@pytest.mark.parametrize("prefill", [0, 7, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "case",
    [LINEAR, replace(LINEAR, normalize=False, decay=None, a=0.0), WINDOW, replace(WINDOW, decay=None, window=110)],
    ids=["linear", "linear-sums", "window", "window-longer-than-prefill"],
)
def test_prefill_and_steps_are_the_full_forward(case, prefill, dtype):
    case = replace(case, dtype=dtype)
    inputs = make_inputs(case)
    state = empty_state(case)
    first = call_op(case, tokens(inputs, 0, prefill), "chunked", initial_state=state)
    if prefill:
        state = first[1]
    addresses = [x.data_ptr() for x in state if x is not None]
    o = torch.cat([first[0], take_steps(case, inputs, state, prefill)], 1)
    truth = float64_truth(case, inputs, with_grad=False)
    assert_close("o", o, truth["o"], dtype)
    for member in ("kv", "key_sum", "value_sum", "weight_sum"):
        if getattr(state, member) is not None:
            assert_close(f"final.{member}", getattr(state, member), truth[f"final.{member}"], dtype)
    assert addresses == [x.data_ptr() for x in state if x is not None], "a step must update the state in place"


def test_steps_skip_ring_entries_that_are_not_valid():
    case = replace(WINDOW, T=60, state=True)
    inputs = make_inputs(case)
    expected = run_op(case, inputs, "reference", with_grad=False)["o"]
    _, state = call_op(case, tokens(inputs, 0, 0), "chunked")
    for member in ("window_k", "window_v", "window_phi_k", "window_g"):
        getattr(state, member)[~state.window_valid] = torch.nan
    assert_close("o", take_steps(case, inputs, state, 0), expected, case.dtype)


@BOTH
@EVERY_BACKEND
def test_later_tokens_leave_earlier_outputs_bit_equal(case, backend):
    inputs = make_inputs(case)
    changed = {n: torch.cat([x[:, :100], x[:, 100:] * 3 + 1], 1) if n in BY_TOKEN else x for n, x in inputs.items()}
    before, after = (run_op(case, x, backend, with_grad=False)["o"] for x in (inputs, changed))
    assert torch.equal(before[:, :100], after[:, :100])
    assert not torch.equal(before[:, 100:], after[:, 100:])


@BOTH
@EVERY_BACKEND
def test_strides_do_not_matter(case, backend):
    inputs = make_inputs(case)

    def strided(x: torch.Tensor) -> torch.Tensor:
        # [B, H, T, dim] in memory, as models hold it, inside a wider buffer.
        wide = torch.cat([x, torch.full_like(x, torch.nan)], -1).transpose(1, 2).contiguous().transpose(1, 2)
        return wide[..., : x.shape[-1]]

    views = {name: strided(x) if name in BY_TOKEN and x.ndim == 4 else x for name, x in inputs.items()}
    assert not views["q"].is_contiguous()
    plain, viewed = call_op(case, inputs, backend), call_op(case, views, backend)
    assert torch.equal(plain[0], viewed[0])
    assert all(x is None or torch.equal(x, y) for x, y in zip(plain[1], viewed[1], strict=True))


@BOTH
@EVERY_BACKEND
def test_shared_heads_are_repeated_heads(case, backend):
    case = replace(case, dtype=torch.float64)
    inputs = make_inputs(case)
    repeated = {n: x.repeat_interleave(2, 2) if n in ("k", "v", "phi_k", "g") else x for n, x in inputs.items()}
    shared, expected = run_op(case, inputs, backend), run_op(replace(case, H_kv=case.H), repeated, backend)
    for name in [x for x in shared if not x.startswith("final.")]:
        x = expected[name]
        summed = x.unflatten(2, (case.H_kv, 2)).sum(3) if name in ("dk", "dv", "dphi_k", "dg") else x
        if name != "o" and not case.window:
            continue  # its loss also reads the state, which has more heads here
        assert_close(name, shared[name], summed, case.dtype)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_two_runs_are_bit_equal(case, dtype):
    case = replace(case, dtype=dtype, T=300)
    inputs = make_inputs(case)
    first, second = (run_op(case, inputs, "chunked") for _ in range(2))
    assert all(torch.equal(x, second[name]) for name, x in first.items())


@BOTH
def test_activation_checkpointing_gives_the_same_gradients(case):
    inputs = make_inputs(case)
    leaves = [inputs[name].requires_grad_() for name in ("q", "k", "v")]

    def forward(q, k, v):
        return call_op(case, inputs | {"q": q, "k": k, "v": v}, "chunked")[0]

    plain = torch.autograd.grad(forward(*leaves).square().sum(), leaves)
    recomputed = torch.autograd.grad(checkpoint(forward, *leaves, use_reentrant=False).square().sum(), leaves)
    assert all(torch.equal(x, y) for x, y in zip(plain, recomputed, strict=True))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_combination_agrees_with_the_reference(data):
    window = data.draw(st.sampled_from([0, 0, 1, 5, 64]), "window")
    causal = bool(window) or data.draw(st.booleans(), "causal")
    lengths = data.draw(st.none() | st.lists(st.integers(0, 80), min_size=1, max_size=5).map(tuple), "lengths")
    groups, kv_heads = data.draw(st.integers(1, 3), "groups"), data.draw(st.integers(1, 2), "kv_heads")
    case = OpCase(
        B=1 if lengths is not None else data.draw(st.integers(1, 2), "B"),
        T=sum(lengths) if lengths is not None else data.draw(st.integers(1, 140), "T"),
        H=groups * kv_heads,
        H_kv=kv_heads,
        D=data.draw(st.integers(1, 9), "D"),
        K=data.draw(st.sampled_from([1, 4, 7, 70]), "K"),
        V=data.draw(st.integers(1, 9), "V"),
        dtype=torch.float64,
        decay=data.draw(st.sampled_from([None, "fixed", "scalar"]), "decay") if causal else None,
        a=data.draw(st.sampled_from([0.0, 0.5]), "a"),
        normalize=bool(window) or data.draw(st.booleans(), "normalize"),
        causal=causal,
        window=window,
        softcap=data.draw(st.sampled_from([None, 2.0]), "softcap") if window else None,
        log_scale=data.draw(st.booleans(), "log_scale"),
        state=causal and data.draw(st.booleans(), "state"),
        lengths=lengths,
    )
    if case.T == 0:
        return
    inputs = make_inputs(case)
    actual, expected = run_op(case, inputs, "chunked"), float64_truth(case, inputs)
    for name, x in expected.items():
        assert_close(name, actual[name], x, case.dtype, factor=100)
