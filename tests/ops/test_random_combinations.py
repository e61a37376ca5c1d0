"""Shapes and flags in any combination: chunked in float64 on the CPU, compiled kernels in every dtype on a GPU."""

import random

import op_backends
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import assert_close
from op_backends import on
from op_inputs import OpCase, check, float64_truth, make_inputs, run_op

COMBINATIONS, BLOCKS = 1000, 10
FEW_TOKENS = 32


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


def random_case(rng: random.Random) -> OpCase:
    """Small cases mostly; dimensions that the kernels were written for half of the time, any other the other half."""
    longest = rng.choice([8, 40, 70, 70, 140, 140, 300, 700])
    causal = rng.random() < 0.8
    lengths = None
    if rng.random() < 0.4:
        count = rng.randint(1, 6)
        lengths = tuple(rng.choice([0, 1, rng.randint(0, max(1, longest // count))]) for _ in range(count))
    dim = (64, 128, 128, 256) if rng.random() < 0.5 else (rng.randint(1, 256), 8 * rng.randint(1, 32))
    kv_heads, features = rng.randint(1, 3), rng.choice(dim)
    # With few features and no constant term a first denominator can be next to nothing, and dq all cancellation.
    weights = [0.0, 0.0, 0.5, 1.0] if features >= 16 else [0.5, 1.0]
    window = rng.choice([0, 0, 0, 1, 16, 63, 64, 65, 128, rng.randint(1, 200)]) if causal and features >= 16 else 0
    a = rng.choice(weights)
    has_state = causal and rng.random() < 0.5 and not (window and a)
    dtype = rng.choice([torch.bfloat16, torch.bfloat16, torch.float16, torch.float32])
    if window:
        dim = (64, 128) if rng.random() < 0.5 else (rng.randint(16, 128), 8 * rng.randint(2, 16))
        if dtype != torch.bfloat16:
            # All that the compiled window op takes of these (kernels/README.md).
            features = min(features, 128)
        # The gradients of a few tokens are all cancellation, of what the output was rounded to; other tests, whose
        # bounds were measured, have those. Beside more tokens short sequences are drawn here, too.
        longest = max(longest, 2 * FEW_TOKENS)
        if lengths is not None and sum(lengths) < FEW_TOKENS:
            lengths = (*lengths, FEW_TOKENS)
    return OpCase(
        B=1 if lengths is not None else rng.randint(1, 3),
        T=sum(lengths) if lengths is not None else rng.randint(FEW_TOKENS if window else 1, longest),
        H=kv_heads * rng.randint(1, 3),
        H_kv=kv_heads,
        D=rng.choice(dim) if window else 16,
        K=features,
        V=rng.choice(dim),
        dtype=dtype,
        decay=rng.choice([None, "fixed", "scalar"]) if causal else None,
        a=a,
        b=rng.choice([1.0, 0.7]),
        scale=rng.choice([1.0, 0.125]),
        normalize=bool(window) or rng.random() < 0.7,
        causal=causal,
        window=window,
        softcap=rng.choice([None, None, 3.0]) if window else None,
        state=has_state,
        lengths=lengths,
        decay_grad=not window,
    )


@on("cuda-cuda")
@pytest.mark.parametrize("block", range(BLOCKS))
def test_thousand_combinations_agree_with_float64(block, target, monkeypatch):
    first = random.SystemRandom().randrange(2**31)
    for seed in range(first, first + COMBINATIONS // BLOCKS):
        rng = random.Random(seed)
        case, path = random_case(rng), rng.choice([None, None, "sm80"])
        op_backends.force(monkeypatch, path)
        inputs = make_inputs(case, seed=seed, device=target.device)
        try:
            check(case, inputs, target, factor=4)
        except (AssertionError, RuntimeError, ValueError) as error:
            raise AssertionError(f"seed {seed}, path {path}, {case}: {error}") from error


def test_random_cases_are_all_kinds_of_cases():
    cases = [random_case(random.Random(seed)) for seed in range(300)]
    assert len(set(cases)) > 290
    for field in ("decay", "normalize", "causal", "state", "dtype", "a", "b", "scale", "window", "softcap"):
        assert len({getattr(case, field) for case in cases}) > 1, field
    assert any(case.lengths and 0 in case.lengths for case in cases)
    assert {case.T for case in cases} & {0, 1}
    assert max(case.T for case in cases) > 500
    assert min(case.K for case in cases) < 16
