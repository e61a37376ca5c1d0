"""The steps of both ops: one token, or some, against the float64 recurrence, in place, from any state."""

from dataclasses import replace

import pytest
import torch
from numerics import assert_close
from op_backends import on, pairs, targets
from op_inputs import OpCase, empty_state, make_inputs, state_from, take_steps

from hf_linattn.kernels import linear_attention_step, window_linear_attention_step

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
BASE = OpCase(B=3, T=1, H=4, H_kv=2, state=True, scale=0.5)
WIDE = replace(BASE, K=64, V=64, dtype=BF16, H=6, H_kv=2)
CASES = [
    *(replace(BASE, decay=d, a=a, normalize=n) for d in (None, "scalar", "fixed") for a in (0.0, 0.5) for n in (1, 0)),
    *(replace(BASE, K=k, V=v, H_kv=h) for k, v in ((1, 5), (33, 7), (70, 65)) for h in (1, 4)),
]
WIDE_CASES = [
    *(replace(WIDE, K=d, V=d, dtype=dtype) for d in (64, 128, 256) for dtype in (BF16, FP16, FP32)),
    *(
        replace(WIDE, K=k, V=v, decay="scalar", a=0.5)
        for k, v in ((256, 128), (128, 64), (1, 1), (33, 80), (100, 192))
    ),
    *(replace(WIDE, H_kv=h, K=128, V=128, decay="scalar") for h in (1, 2, 6)),
    *(replace(WIDE, B=b, H=32, H_kv=8, K=128, V=128) for b in (1, 64)),
    *(replace(WIDE, normalize=False, a=a) for a in (0.0, 1.0)),
]
WINDOW = replace(BASE, T=20, window=16, scale=0.25)
WINDOW_CASES = [
    *(
        replace(WINDOW, decay=d, a=a, softcap=3.0 if a else None)
        for d in (None, "scalar", "fixed")
        for a in (0.0, 0.5)
    ),
    *(replace(WINDOW, window=w, log_scale=w > 1) for w in (1, 3, 64)),
    *(replace(WINDOW, D=d, K=k, V=v, H_kv=h) for d, k, v in ((3, 1, 5), (16, 70, 65)) for h in (1, 4)),
    replace(WINDOW, dtype=BF16, decay="scalar"),
]
WIDE_WINDOW = replace(WINDOW, D=64, K=64, V=64, dtype=BF16, H=6, H_kv=2, window=64, T=70)
WIDE_WINDOW_CASES = [
    *(replace(WIDE_WINDOW, D=d, K=d, V=d, dtype=dtype) for d in (64, 128, 256) for dtype in (BF16, FP16, FP32)),
    *(replace(WIDE_WINDOW, D=d, K=k, V=v, decay="scalar", a=0.5) for d, k, v in ((256, 33, 80), (60, 100, 192))),
    *(replace(WIDE_WINDOW, H_kv=h, D=128, K=128, V=128, decay="fixed", softcap=5.0) for h in (1, 2, 6)),
    *(replace(WIDE_WINDOW, B=b, H=32, H_kv=8, D=128, K=128, V=128, T=5) for b in (1, 64)),
    *(replace(WIDE_WINDOW, window=w, H=8, H_kv=1, T=5) for w in (1000, 4096)),
]
MAPS = {
    None: lambda x: x,
    "elu": lambda x: torch.nn.functional.elu(x) + 1,
    "relu": torch.relu,
    "l2": lambda x: torch.nn.functional.normalize(x, dim=-1),
}


def step(case: OpCase, inputs: dict, backend: str, **options) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(o, members of the state afterwards) of one step from the case's initial state."""
    state = state_from(case, {n: x.clone() if n.startswith("state.") else x for n, x in inputs.items()})
    now = {name: inputs[name][:, 0] for name in ("q", "k", "v", "g") if name in inputs}
    now |= {name: inputs[name] for name in ("g_gamma",) if name in inputs}
    options |= {"scale": case.scale, "a": case.a, "b": case.b, "normalize": bool(case.normalize), "backend": backend}
    o = linear_attention_step(now.pop("q"), now.pop("k"), now.pop("v"), state, **now, **options)
    return o, {f"final.{n}": x for n, x in zip(state._fields, state, strict=True) if x is not None}


def check_step(case: OpCase, inputs: dict, target, feature_map: str | None = None) -> None:
    options = {} if feature_map is None else {"feature_map": feature_map}
    o, state = step(case, inputs, target.backend, **options)
    exact = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    exact |= {name: MAPS[feature_map](exact[name]) for name in ("q", "k")}
    expected_o, expected = step(replace(case, dtype=torch.float64), exact, "reference")
    assert_close("o", o, expected_o, case.dtype, backend=target.backend)
    assert state.keys() == expected.keys()
    for name, x in expected.items():
        # The step multiplies no rounded operands: its state is float32 whatever the inputs are.
        assert_close(name, state[name], x, torch.float32, backend="chunked")


@pairs((CASES, targets("chunked-*", "cuda-cuda", "emulated-sm80")), (WIDE_CASES, targets("cuda-cuda")))
def test_step(case, target):
    check_step(case, make_inputs(case, device=target.device), target)


@pytest.mark.parametrize("feature_map", [x for x in MAPS if x])
@pairs(
    ([BASE, replace(BASE, a=1.0)], targets("chunked-*")), ([WIDE, replace(WIDE, K=100, a=1.0)], targets("cuda-cuda"))
)
def test_step_applies_a_feature_map(case, target, feature_map):
    inputs = make_inputs(case, device=target.device)
    # Both signs, so that the maps differ from each other; a state of weights already there keeps the sum positive.
    inputs |= {name: inputs[name] - 0.3 for name in ("q", "k")}
    inputs["state.key_sum"] += 40
    check_step(case, inputs, target, feature_map)


@on("chunked-cpu", "cuda-cuda")
def test_unknown_feature_map_is_named(target):
    with pytest.raises(ValueError, match=r"^feature_map: .*'elup'"):
        step(BASE, make_inputs(BASE, device=target.device), target.backend, feature_map="elup")


@on("chunked-cpu", "cuda-cuda")
def test_step_reads_views(target):
    case = replace(WIDE, decay="scalar")
    inputs = make_inputs(case, device=target.device)
    # One token out of a longer row, heads before tokens, as a model's decode step holds it.
    row = {n: torch.cat([torch.full_like(x, torch.nan), x], 1) for n, x in inputs.items() if n in ("q", "k", "v", "g")}
    views = {n: x.transpose(1, 2).contiguous().transpose(1, 2)[:, 1:] for n, x in row.items()}
    plain, viewed = step(case, inputs, target.backend), step(case, inputs | views, target.backend)
    assert torch.equal(plain[0], viewed[0])
    assert all(torch.equal(x, viewed[1][name]) for name, x in plain[1].items())


def copied_state(case: OpCase, inputs: dict) -> tuple:
    return state_from(case, {n: x.clone() if n.startswith("state.") else x for n, x in inputs.items()})


@pairs((WINDOW_CASES, targets("chunked-*", "cuda-cuda", "emulated-sm80")), (WIDE_WINDOW_CASES, targets("cuda-cuda")))
def test_window_steps(case, target):
    inputs = make_inputs(case, device=target.device)
    for member in ("window_k", "window_v", "window_phi_k", "window_g"):
        if f"state.{member}" in inputs:  # an invalid slot may hold anything
            inputs[f"state.{member}"][~inputs["state.window_valid"]] = torch.nan
    exact = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    truth = replace(case, dtype=torch.float64)
    state, expected_state = copied_state(case, inputs), copied_state(truth, exact)
    o = take_steps(case, inputs, state, 0, target.backend)
    expected = take_steps(truth, exact, expected_state, 0, "reference")
    assert_close("o", o, expected, case.dtype, backend=target.backend)
    for name, x, y in zip(state._fields, state, expected_state, strict=True):
        if name in ("kv", "key_sum", "value_sum", "weight_sum") and x is not None:
            assert_close(f"final.{name}", x, y, FP32, backend="chunked")
        elif x is not None:
            y = y.to(x.dtype)
            assert torch.equal(x, y) or torch.equal(x.nan_to_num(nan=9.0), y.nan_to_num(nan=9.0)), name


@on("chunked-cpu", "cuda-cuda", "emulated-sm80")
def test_window_step_of_any_state(target):
    """What the compiled step does not write in place runs on PyTorch, unless `backend` names the compiled one."""
    case = replace(WINDOW, T=2, decay="scalar", a=0.5)
    inputs = make_inputs(case, device=target.device)
    plain = copied_state(case, inputs)
    expected = take_steps(case, inputs, plain, 0, target.backend)

    def moved(x: torch.Tensor) -> torch.Tensor:
        return x.transpose(0, 1).contiguous().transpose(0, 1) if x.ndim > 1 else x

    unlike = {
        "strided": lambda name, x: moved(x),
        "float64 sums": lambda name, x: x.double() if name in ("kv", "key_sum", "value_sum", "weight_sum") else x,
        "float64 ring": lambda name, x: x.double() if name in ("window_k", "window_v", "window_phi_k") else x,
    }
    for kind, change in unlike.items():
        first = copied_state(case, inputs)
        state = type(first)(*(None if x is None else change(n, x) for n, x in zip(first._fields, first, strict=True)))
        if target.is_compiled:
            with pytest.raises(ValueError, match=r"^state: expected contiguous float32 sums"):
                take_steps(case, inputs, state, 0, "cuda")
        o = take_steps(case, inputs, state, 0, None)
        torch.testing.assert_close(o, expected, msg=lambda text, kind=kind: f"{kind}: {text}")
        assert all(x is None or torch.allclose(x.double(), y.double()) for x, y in zip(state, plain, strict=True))


@on("chunked-cpu", "cuda-cuda", "emulated-sm80")
def test_window_step_reads_views(target):
    case = replace(WIDE_WINDOW, T=2, decay="scalar")
    inputs = make_inputs(case, device=target.device)
    views = {}
    for name in ("q", "k", "v", "phi_q", "phi_k"):
        x = inputs[name]
        # Heads before tokens, and rows that begin at no multiple of 16 bytes.
        buffer = x.new_full((*x.transpose(1, 2).shape[:-1], x.shape[-1] + 3), torch.nan)
        views[name] = buffer[..., 1:-2].copy_(x.transpose(1, 2)).transpose(1, 2)
    views["g"] = inputs["g"].transpose(1, 2).contiguous().transpose(1, 2)
    states = [empty_state(case, target.device) for _ in range(2)]
    plain = take_steps(case, inputs, states[0], 0, target.backend)
    assert torch.equal(plain, take_steps(case, inputs | views, states[1], 0, target.backend))
    assert all(x is None or torch.equal(x, y) for x, y in zip(*states, strict=True))


@on("cuda-cuda")
def test_step_of_a_misaligned_row(target):
    inputs = make_inputs(WIDE, device=target.device)
    shifted = {}
    for name in ("q", "k", "v"):
        x = inputs[name]
        buffer = x.new_full((*x.shape[:-1], x.shape[-1] + 3), torch.nan)
        shifted[name] = buffer[..., 1:-2].copy_(x)
        assert shifted[name].data_ptr() % 16
    plain, viewed = step(WIDE, inputs, target.backend), step(WIDE, inputs | shifted, target.backend)
    assert_close("o", viewed[0], plain[0].double(), BF16, 2, "cuda")


@on("chunked-*", "cuda-cuda")
def test_two_steps_are_bit_equal(target):
    case = replace(WIDE, B=8, K=128, V=128)
    inputs = make_inputs(case, device=target.device)
    first, second = (step(case, inputs, target.backend) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(x, second[1][name]) for name, x in first[1].items())


@on("chunked-*", "cuda-cuda", "emulated-sm80")
def test_window_steps_are_bit_equal_in_every_run(target):
    # Splits over blocks of a cluster, and the last block of the grid, which is another one in each run.
    for case in (replace(WIDE_WINDOW, B=2, T=5), replace(WIDE_WINDOW, B=1, H=2, H_kv=1, V=256, T=5)):
        inputs = make_inputs(case, device=target.device)
        states = [copied_state(case, inputs) for _ in range(2)]
        first, second = (take_steps(case, inputs, state, 0, target.backend) for state in states)
        assert torch.equal(first, second)
        assert all(x is None or torch.equal(x, y) for x, y in zip(*states, strict=True))


@pairs(([WIDE, WIDE_WINDOW], targets("cuda-cuda")))
def test_step_is_one_launch(case, target):
    inputs = make_inputs(case, device=target.device)
    state = state_from(case, inputs)
    arguments = [
        inputs[name][:, 0] for name in (("q", "k", "v", "phi_q", "phi_k") if case.window else ("q", "k", "v"))
    ]

    def take_step():
        if case.window:
            window_linear_attention_step(*arguments, state, scale=case.scale, backend="cuda")
        else:
            linear_attention_step(*arguments, state, backend="cuda")

    take_step()
    torch.use_deterministic_algorithms(False)  # it fills new memory, which is a launch too
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        take_step()
        torch.cuda.synchronize()
    kernels = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert len(kernels) == 1, kernels
