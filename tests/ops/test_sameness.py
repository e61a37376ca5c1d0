"""What must not matter to a result: packing, splits, steps, layout in memory, expanded heads, the run."""

from dataclasses import replace

import pytest
import torch
from numerics import assert_close
from op_backends import pairs, targets
from op_inputs import (
    BY_TOKEN,
    OpCase,
    call_op,
    empty_state,
    float64_truth,
    make_inputs,
    packed,
    run_op,
    take_steps,
    tokens,
)
from torch.utils.checkpoint import checkpoint

LINEAR = OpCase(T=150, decay="scalar", a=0.5)
WINDOW = replace(LINEAR, window=20, softcap=4.0)
# What compiled kernels meet: 16-bit inputs, several chunks, an uneven end.
HALF = [replace(LINEAR, dtype=torch.bfloat16, K=d, V=d, scale=0.1, T=300) for d in (64, 128)]
SUMS = replace(HALF[1], decay=None, normalize=False, a=0.0)
PLAIN = replace(HALF[1], decay=None, a=0.0, b=0.7)
# What the compiled window op takes: no gradient of the decay, and no state together with a.
HALF_WINDOW = [
    replace(x, D=x.K, a=0.0, window=w, softcap=4.0, decay_grad=False) for x, w in zip(HALF, (64, 20), strict=True)
]
COMPILED = [LINEAR, *HALF, SUMS, PLAIN, *HALF_WINDOW]
EVERYWHERE = pairs(
    ([LINEAR, WINDOW], targets("reference-cpu", "chunked-*")), (COMPILED, targets("cuda-*", "emulated-*"))
)
CHUNKED_AND_COMPILED = pairs(
    ([LINEAR, WINDOW, *(replace(x, dtype=torch.bfloat16) for x in (LINEAR, WINDOW))], targets("chunked-*")),
    (COMPILED, targets("cuda-*", "emulated-*")),
)


@EVERYWHERE
@pytest.mark.parametrize("state", [False, True], ids=["fresh", "state"])
def test_packed_is_a_loop_over_sequences(case, target, state):
    lengths = (0, 30, 1, 0, 90, 20) if case.dtype == torch.float32 else (0, 30, 1, 0, 200, 64)
    case = replace(case, B=1, T=sum(lengths), lengths=lengths, state=state)
    inputs = make_inputs(case, device=target.device)
    together, start = run_op(case, inputs, target.backend, with_grad=False), 0
    for n, length in enumerate(lengths):
        alone_case = replace(case, T=length, lengths=None)
        alone = tokens(inputs, start, start + length)
        alone.pop("cu_seqlens")
        for name in [x for x in alone if x.startswith("state.") and x != "state.slot"]:
            alone[name] = alone[name][n : n + 1]
        results = run_op(alone_case, alone, target.backend, with_grad=False)
        same = {name: x if name == "final.slot" else x[n : n + 1] for name, x in together.items()}
        same["o"] = together["o"][:, start : start + length]
        for name, x in results.items():
            assert_close(name, same[name], x, case.dtype, factor=2, backend=target.backend)
        start += length


@pairs(
    ([packed((30, 120)), packed((30, 120), window=20)], targets("chunked-*")),
    ([SUMS, HALF_WINDOW[1]], targets("cuda-*")),
)
def test_boundaries_changed_in_place_are_noticed(case, target):
    case = replace(case, B=1, T=150, lengths=(30, 120))
    inputs = make_inputs(case, device=target.device)
    before = call_op(case, inputs, target.backend)[0]
    inputs["cu_seqlens"][1] = 70
    expected = float64_truth(case, inputs, with_grad=False)["o"]
    after = call_op(case, inputs, target.backend)[0]
    assert_close("o", after, expected, case.dtype, backend=target.backend)
    assert not torch.equal(before, after)


@EVERYWHERE
@pytest.mark.parametrize("splits", [(0, 1, 150), (0, 64, 150), (0, 19, 20, 21, 150)], ids=str)
def test_prefill_in_pieces_is_prefill_of_the_whole(case, target, splits):
    case = replace(case, T=150)
    inputs = make_inputs(case, device=target.device)
    whole = run_op(case, inputs, target.backend, with_grad=False)
    pieces, state = [], None
    for start, end in zip(splits[:-1], splits[1:], strict=True):
        o, state = call_op(case, tokens(inputs, start, end), target.backend, initial_state=state)
        pieces.append(o)
    factor = 2 if target.is_compiled else 1
    assert_close("o", torch.cat(pieces, 1), whole["o"], case.dtype, factor, target.backend)
    for field, x in zip(state._fields, state, strict=True):
        if x is not None:
            assert_close(f"final.{field}", x, whole[f"final.{field}"], case.dtype, factor, target.backend)


FORMS = [LINEAR, replace(LINEAR, normalize=False, decay=None, a=0.0), WINDOW, replace(WINDOW, decay=None, window=110)]


@pytest.mark.parametrize("prefill", [0, 7, 100])
@pairs(
    ([replace(x, dtype=dtype) for x in FORMS for dtype in (torch.float32, torch.bfloat16)], targets("chunked-*")),
    ([replace(LINEAR, H=6, H_kv=2), *(replace(x, T=150) for x in (*HALF, SUMS, PLAIN))], targets("cuda-*")),
)
def test_prefill_and_steps_are_the_full_forward(case, target, prefill):
    inputs = make_inputs(case, device=target.device)
    state = empty_state(case, target.device)
    first = call_op(case, tokens(inputs, 0, prefill), target.backend, initial_state=state)
    if prefill:
        state = first[1]
    addresses = [x.data_ptr() for x in state if x is not None]
    o = torch.cat([first[0], take_steps(case, inputs, state, prefill, target.backend)], 1)
    truth = float64_truth(case, inputs, with_grad=False)
    assert_close("o", o, truth["o"], case.dtype, backend=target.backend)
    for member in ("kv", "key_sum", "value_sum", "weight_sum"):
        if getattr(state, member) is not None:
            x = getattr(state, member)
            assert_close(f"final.{member}", x, truth[f"final.{member}"], case.dtype, backend=target.backend)
    assert addresses == [x.data_ptr() for x in state if x is not None], "a step must update the state in place"


def test_steps_skip_ring_entries_that_are_not_valid():
    case = replace(WINDOW, T=60, state=True)
    inputs = make_inputs(case)
    expected = run_op(case, inputs, "reference", with_grad=False)["o"]
    _, state = call_op(case, tokens(inputs, 0, 0), "chunked")
    for member in ("window_k", "window_v", "window_phi_k", "window_g"):
        getattr(state, member)[~state.window_valid] = torch.nan
    assert_close("o", take_steps(case, inputs, state, 0, "chunked"), expected, case.dtype)


@EVERYWHERE
def test_later_tokens_leave_earlier_outputs_bit_equal(case, target):
    inputs = make_inputs(case, device=target.device)
    changed = {n: torch.cat([x[:, :100], x[:, 100:] * 3 + 1], 1) if n in BY_TOKEN else x for n, x in inputs.items()}
    before, after = (run_op(case, x, target.backend, with_grad=False)["o"] for x in (inputs, changed))
    assert torch.equal(before[:, :100], after[:, :100])
    assert not torch.equal(before[:, 100:], after[:, 100:])


@pairs(([replace(x, T=130) for x in (PLAIN, HALF_WINDOW[1])], targets("cuda-*", "emulated-*")))
def test_earlier_gradients_of_a_later_token_alone(case, target):
    # Only the last output has a gradient: every key reaches it, and no other query has a share in it.
    inputs = make_inputs(case, device=target.device)
    leaves = {name: x.requires_grad_() for name, x in inputs.items() if name in BY_TOKEN and name != "g"}
    o = call_op(case, inputs | leaves, target.backend)[0]
    grads = dict(zip(leaves, torch.autograd.grad(o[:, -1].sum(), list(leaves.values())), strict=True))
    for name in {"q", "phi_q"} & grads.keys():
        assert (grads[name][:, :-1] == 0).all(), name
    assert (grads["v"] != 0).all(-1).all()
    assert all(dx.isfinite().all() for dx in grads.values())
    if case.window:
        # Softmax ends where the far keys begin.
        split = case.T - case.window
        assert (grads["k"][:, :split] == 0).all()
        assert (grads["phi_k"][:, split:] == 0).all()


@EVERYWHERE
def test_shared_heads_are_repeated_heads(case, target):
    if target.backend == "chunked" or target.backend == "reference":
        case = replace(case, dtype=torch.float64)
    inputs = make_inputs(case, device=target.device)
    repeated = {n: x.repeat_interleave(2, 2) if n in ("k", "v", "phi_k", "g") else x for n, x in inputs.items()}
    shared = run_op(case, inputs, target.backend)
    expected = run_op(replace(case, H_kv=case.H), repeated, target.backend)
    factor = 2 if target.is_compiled else 1
    for name in [x for x in shared if not x.startswith("final.")]:
        x = expected[name]
        summed = x.unflatten(2, (case.H_kv, 2)).sum(3) if name in ("dk", "dv", "dphi_k", "dg") else x
        if name != "o" and not case.window:
            continue  # its loss also reads the state, which has more heads here
        assert_close(name, shared[name], summed, case.dtype, factor, target.backend)


@CHUNKED_AND_COMPILED
def test_two_runs_are_bit_equal(case, target):
    case = replace(case, T=300)
    inputs = make_inputs(case, device=target.device)
    first, second = (run_op(case, inputs, target.backend) for _ in range(2))
    assert all(torch.equal(x, second[name]) for name, x in first.items())


@pairs(
    ([packed((0, 300, 1, 700)), replace(LINEAR, B=1, T=5000, H=1, H_kv=1)], targets("chunked-cuda")),
    (
        [
            packed((0, 3000, 1, 0, 4000, 129), H=2, H_kv=1, K=128, V=128, dtype=torch.bfloat16, decay="scalar"),
            replace(HALF[1], B=1, T=8191, H=2, H_kv=1, state=True),
            replace(HALF[0], T=2048, H=12, H_kv=1, causal=False, decay=None),
            replace(HALF_WINDOW[0], B=1, T=4095, H=2, H_kv=1, state=True),
        ],
        targets("cuda-*"),
    ),
)
def test_ten_runs_of_a_split_sequence_are_bit_equal(case, target):
    inputs = make_inputs(case, device=target.device)
    first = run_op(case, inputs, target.backend)
    for _ in range(9):
        again = run_op(case, inputs, target.backend)
        assert all(torch.equal(x, again[name]) for name, x in first.items())


@pairs(([LINEAR, WINDOW], targets("chunked-*")), (HALF + HALF_WINDOW, targets("cuda-*", "emulated-*")))
def test_activation_checkpointing_gives_the_same_gradients(case, target):
    inputs = make_inputs(case, device=target.device)
    leaves = [inputs[name].requires_grad_() for name in ("q", "k", "v")]

    def forward(q, k, v):
        return call_op(case, inputs | {"q": q, "k": k, "v": v}, target.backend)[0]

    plain = torch.autograd.grad(forward(*leaves).square().sum(), leaves)
    recomputed = torch.autograd.grad(checkpoint(forward, *leaves, use_reentrant=False).square().sum(), leaves)
    assert all(torch.equal(x, y) for x, y in zip(plain, recomputed, strict=True))
