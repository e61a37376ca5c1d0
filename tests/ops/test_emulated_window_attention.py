"""The CUDA kernels of the window op on a CPU, emulated, against the float64 matrix of weights over all pairs."""

from dataclasses import replace
from random import Random

import pytest
import torch
from emulated_build import unavailable_reason
from emulated_window import WindowCall, window_backward, window_forward, window_path
from emulated_window_cases import BF16, FP16, FP32, KINDS, WindowCase, make_call, packed
from numerics import TOLERANCES, assert_close, rms
from op_quadratic import quadratic_window_rows
from torch import Tensor

from hf_linattn.kernels import LinearAttentionState

pytestmark = pytest.mark.skipif(unavailable_reason() is not None, reason=str(unavailable_reason()))

WINDOWS = (1, 16, 63, 64, 65, 128, 200)
LENGTHS = (1, 15, 63, 64, 65, 130, 500, 1100)  # the last is beyond kShortestSegment of linear_attention.cu
LSE_ERRORS = {BF16: 2e-2, FP16: 2e-3, FP32: 2e-4}


def mixed_cases() -> list[WindowCase]:
    """Every window with every length, every other field taking turns."""
    cases = []
    for row, window in enumerate(WINDOWS):
        for column, length in enumerate(LENGTHS):
            n = row + column
            path, dtype = KINDS[(2 * row + column) % 4]
            constant = 0.5 * (n % 3 == 0)
            dims = [(64, 64, 64), (128, 128, 128), (64, 128, 64), (128, 64, 128), (64, 64, 128)][n % 5]
            if path == "sm80" and n % 2:
                dims = [(16, 48, 32), (80, 16, 96), (33, 40, 20), (128, 65, 17)][row % 4]
            heads, kv_heads = [(2, 1), (3, 3), (4, 2), (6, 2)][(row + 3 * column) % 4] if length < 500 else (2, 1)
            cases.append(
                WindowCase(
                    T=length,
                    window=window,
                    path=path,
                    dtype=dtype,
                    B=2 if length < 500 else 1,
                    H=heads,
                    H_kv=kv_heads,
                    D=dims[0],
                    K=dims[1],
                    V=dims[2],
                    decay=(None, "fixed", "scalar")[(row + 2 * column) % 3],
                    a=constant,
                    softcap=3.0 * (n % 4 == 1),
                    log_scale=n % 5 != 2,
                    hidden=constant == 0 and column % 3 == 1,
                    sums=(row + column // 2) % 2 == 0,
                    strided=n % 3 == 1,
                    seed=n % 3,
                )
            )
    return cases


PACKED = packed(0, 70, 1, 0, 16, 129, 0)
CASES = [
    *mixed_cases(),
    *(
        replace(PACKED, window=w, path=path, dtype=dtype, decay=decay, a=a, sums=sums, strided=w == 16)
        for (path, dtype), (w, decay, a, sums) in zip(
            KINDS * 2,
            [
                *(
                    (16, "scalar", 0.5, False),
                    (64, None, 0.0, True),
                    (1, "fixed", 0.0, False),
                    (65, "scalar", 0.5, True),
                ),
                *(
                    (200, None, 0.5, True),
                    (16, "fixed", 0.0, True),
                    (64, "scalar", 0.5, True),
                    (128, None, 0.0, False),
                ),
            ],
            strict=True,
        )
    ),
    *(packed(20, 0, 60, window=16, path=p, dtype=d, hidden=True, sums=True, decay="scalar") for p, d in KINDS),
    *(packed(0, 1050, 40, window=64, path=p, dtype=d, decay="scalar", sums=True) for p, d in KINDS[:2]),
    packed(0, 0, 1, path="sm90", dtype=BF16, sums=True),
    *(WindowCase(K=256, D=d, V=v, dtype=t, decay="scalar", a=0.5) for d, v, t in ((64, 64, BF16), (128, 128, BF16))),
    *(WindowCase(D=16, K=k, V=v, dtype=FP32, sums=True) for k, v in ((128, 64), (8, 128), (128, 1))),
    *(WindowCase(T=500, path=p, dtype=d, H=3, B=2, processors=132) for p, d in KINDS),
    *(WindowCase(D=d, K=d, V=d, dtype=t, capability=80) for d, t in ((128, BF16), (64, FP32))),
    *(WindowCase(D=d, K=64, V=64, dtype=t, capability=86) for d, t in ((128, BF16), (64, FP16), (64, FP32))),
    # No key ever leaves the window, and there is no state: softmax.
    *(
        WindowCase(T=t, window=200, path=p, dtype=d, softcap=2.0)
        for t, (p, d) in zip((200, 65, 199, 64), KINDS, strict=True)
    ),
]


def random_case(seed: int) -> WindowCase:
    rng = Random(seed)
    path, dtype = rng.choice(KINDS)
    longest, lengths = rng.choice([8, 70, 140, 300]), None
    if rng.random() < 0.4:
        lengths = tuple(rng.choice([0, 1, rng.randint(0, longest // 2)]) for _ in range(rng.randint(1, 5)))
    kv_heads, a = rng.randint(1, 2), rng.choice([0.0, 0.0, 0.5])
    any_dims = (16, 32, 48, 64, 80, 128, 8 * rng.randint(2, 16), rng.randint(16, 128))
    dims = [rng.choice((64, 128) if path == "sm90" else any_dims) for _ in range(3)]
    return WindowCase(
        T=rng.randint(1, longest) if lengths is None else sum(lengths),
        window=rng.choice([1, 2, 7, 16, 31, 63, 64, 65, 100, 128, 129, 200, rng.randint(1, 300)]),
        path=path,
        dtype=dtype,
        B=rng.randint(1, 2) if lengths is None else 1,
        H=kv_heads * rng.randint(1, 3),
        H_kv=kv_heads,
        D=dims[0],
        K=dims[1],
        V=dims[2],
        decay=rng.choice([None, "fixed", "scalar"]),
        a=a,
        softcap=rng.choice([0.0, 0.0, 3.0]),
        log_scale=rng.random() < 0.7,
        hidden=a == 0 and rng.random() < 0.4,
        sums=rng.random() < 0.5,
        strided=rng.random() < 0.4,
        lengths=lengths,
        processors=rng.choice([4, 132]),
        seed=rng.randint(0, 3),
    )


def run_call(call: WindowCall, d_o: Tensor) -> dict[str, Tensor]:
    """Everything the kernels return, by name."""
    o, lse, final = window_forward(call, output_final_state=True)
    grads = window_backward(call, d_o, o, lse, needs_d_log_scale=call.log_scale is not None)
    sums = {f"final.{name}": x for name, x in zip(final._fields, final, strict=True) if x is not None}
    return {"o": o, "lse": lse} | sums | grads


def truth_of(call: WindowCall, d_o: Tensor) -> dict[str, Tensor]:
    """The same in float64; dlog_scale `[H]`."""
    used = d_o.shape[1] if call.cu_seqlens is None else int(call.cu_seqlens[-1])
    leaves = {name: getattr(call, name) for name in ("q", "k", "v", "phi_q", "phi_k", "log_scale")}
    leaves = {name: x.double().requires_grad_() for name, x in leaves.items() if x is not None}
    sums = call.initial_sums and LinearAttentionState(*(x if x is None else x.double() for x in call.initial_sums))
    constants = {"g": call.g, "key_valid": call.key_valid, "cu_seqlens": call.cu_seqlens, "initial_sums": sums}
    scalars = {name: getattr(call, name) for name in ("window", "scale", "a", "b")}
    o, lse, final = quadratic_window_rows(
        **leaves,
        **constants | {"g": None if call.g is None else call.g.double()},
        **scalars,
        softcap=call.softcap or None,
    )
    loss = (o[:, :used] * d_o[:, :used].double()).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    results = {"o": o, "lse": lse} | {
        f"final.{n}": x for n, x in zip(final._fields, final, strict=True) if x is not None
    }
    for (name, x), dx in zip(leaves.items(), grads, strict=True):
        results[f"d{name}"] = torch.zeros_like(x) if dx is None else dx
    return {name: x.detach() for name, x in results.items()}


@pytest.fixture
def machine(case, monkeypatch):
    """The GPU that the emulation shows, as the case has it."""
    monkeypatch.setenv("HF_LINATTN_EMULATED_CAPABILITY", str(case.capability))
    monkeypatch.setenv("HF_LINATTN_EMULATED_SMS", str(case.processors))
    monkeypatch.setenv("HF_LINATTN_EMULATED_SEED", str(case.seed))


def check(case: WindowCase, factor: float = 1.0) -> None:
    call, d_o = make_call(case)
    actual, expected = run_call(call, d_o), truth_of(call, d_o)
    assert actual.keys() == expected.keys()
    used = case.T
    # Behind the last sequence nothing reads the log of the denominators.
    difference = (actual["lse"].double() - expected["lse"])[..., :used].abs()
    assert used == 0 or difference.max() <= LSE_ERRORS[case.dtype], f"lse: error {difference.max():.2e}"
    if case.log_scale:
        # Rows without far keys add what rounding o left of delta, where the truth is 0.
        delta = (expected["o"] * d_o)[:, :used].sum(-1)
        rounding = 4 * torch.finfo(case.dtype).eps * rms(delta) * (case.B * used) ** 0.5
        bound = TOLERANCES["cuda"][case.dtype]["gate"] * rms(expected["dlog_scale"]) + rounding
        error = rms(actual["dlog_scale"].double().sum((0, 2)) - expected["dlog_scale"])
        assert error <= factor * bound, f"dlog_scale: error {error:.2e}, allowed {factor * bound:.2e}"
    for name in expected.keys() - {"lse", "dlog_scale"}:
        x, y = actual[name], expected[name]
        if case.hidden and name in ("dk", "dv", "dphi_k"):
            # Nobody asks for the gradient of a key that is not valid.
            assert x.isfinite().all(), name
            x, y = x[call.key_valid], y[call.key_valid]
        assert_close(name, x, y, case.dtype, factor, "cuda")


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_window_attention(case):
    check(case)


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("case", [random_case(seed) for seed in range(40)], ids=str)
def test_random_combinations(case):
    check(case, factor=4)


@pytest.mark.slow
@pytest.mark.parametrize("block", range(10))
def test_many_random_combinations(block, monkeypatch):
    for seed in range(1000 + 50 * block, 1050 + 50 * block):
        case = random_case(seed)
        monkeypatch.setenv("HF_LINATTN_EMULATED_SMS", str(case.processors))
        monkeypatch.setenv("HF_LINATTN_EMULATED_SEED", str(case.seed))
        try:
            check(case, factor=4)
        except (AssertionError, RuntimeError) as error:
            raise AssertionError(f"seed {seed}, {case}: {error}") from error


ORDERED = [
    WindowCase(T=1100, window=65, path=path, dtype=dtype, decay="scalar", sums=True, hidden=True)
    for path, dtype in KINDS
]


@pytest.mark.parametrize("case", ORDERED, ids=str)
def test_order_of_threads_changes_no_bit(case, monkeypatch):
    call, d_o = make_call(case)
    expected = run_call(call, d_o)
    for seed in (1, 2):
        monkeypatch.setenv("HF_LINATTN_EMULATED_SEED", str(seed))
        for name, x in run_call(call, d_o).items():
            assert torch.equal(x, expected[name]), name


@pytest.mark.parametrize("case", ORDERED, ids=str)
def test_later_tokens_change_no_bit_of_earlier_outputs(case):
    case = replace(case, T=200, sums=False)
    call, _ = make_call(case)
    names = ("q", "k", "v", "phi_q", "phi_k", "g")
    for split in (1, 100, 128, 199):
        later = {name: torch.cat([(x := getattr(call, name))[:, :split], 3 * x[:, split:] - 1], 1) for name in names}
        (o, lse, _), (other_o, other_lse, _) = window_forward(call), window_forward(call._replace(**later))
        assert torch.equal(o[:, :split], other_o[:, :split])
        assert torch.equal(lse[..., :split], other_lse[..., :split])
        assert not torch.equal(o[:, split:], other_o[:, split:])


@pytest.mark.parametrize("case", ORDERED, ids=str)
def test_packed_rows_are_those_of_single_sequences(case):
    lengths = (130, 0, 1, 70)
    case = replace(case, T=sum(lengths), lengths=lengths, hidden=False)
    call, d_o = make_call(case)
    together, start = run_call(call, d_o), 0
    for n, length in enumerate(lengths):
        if length == 0:
            continue
        part = slice(start, start + length)
        own = {name: getattr(call, name)[:, part] for name in ("q", "k", "v", "phi_q", "phi_k", "g")}
        sums = LinearAttentionState(*(None if x is None else x[n : n + 1] for x in call.initial_sums))
        alone = run_call(call._replace(**own, initial_sums=sums, cu_seqlens=None), d_o[:, part])
        for name, x in alone.items():
            if name.startswith("final."):
                same = together[name][n : n + 1]
            else:
                same = together[name][..., part] if name in ("lse", "dlog_scale") else together[name][:, part]
            if name not in ("lse", "dlog_scale"):
                assert_close(name, same, x.double(), case.dtype, factor=2, backend="cuda")
        start += length


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize(
    "case",
    [
        *(
            WindowCase(B=2, T=t, window=w, path=p, dtype=d, decay="scalar", sums=True, hidden=True)
            for (p, d), (t, w) in zip(
                KINDS * 2,
                zip((130, 65, 500, 63, 200, 264, 1100, 130), (1, 65, 64, 16, 200, 200, 128, 63), strict=True),
                strict=True,
            )
        ),
        # Of whose segments the first has no query, and the second some; and sequences of nothing but a ring.
        *(WindowCase(T=3000, window=1500, path=p, dtype=d, processors=8) for p, d in KINDS[:2]),
        *(packed(65, 66, 300, 65, path=p, dtype=d, window=65, sums=True, decay="scalar") for p, d in KINDS),
        *(packed(64, 1100, path=p, dtype=d, window=64, sums=True) for p, d in KINDS[:2]),
    ],
    ids=str,
)
def test_rows_without_a_query_are_left_out(case):
    call, _ = make_call(case)
    o, lse, final = window_forward(call, output_final_state=True)
    other_o, other_lse, other_final = window_forward(call._replace(first_query=case.window), output_final_state=True)
    offset = torch.cat([torch.arange(length) for length in case.lengths or (case.T,)])
    left_out = torch.zeros(call.q.shape[1], dtype=torch.bool)
    left_out[: len(offset)] = offset < case.window
    assert other_o[:, left_out].isnan().all()
    assert other_lse[..., : len(offset)][..., offset < case.window].isnan().all()
    rest = offset >= case.window
    lse, other_lse = (x[..., : len(offset)][..., rest] for x in (lse, other_lse))
    torch.testing.assert_close(other_lse, lse, rtol=0, atol=LSE_ERRORS[case.dtype])
    pairs = {"o": (other_o[:, ~left_out], o[:, ~left_out])}
    pairs |= {f"final.{n}": (x, getattr(final, n)) for n, x in other_final._asdict().items() if x is not None}
    for name, (found, expected) in pairs.items():
        assert_close(name, found, expected.double(), case.dtype, factor=2, backend="cuda")


@pytest.mark.parametrize(("path", "dtype"), KINDS, ids=str)
def test_no_far_weight_leaves_softmax_over_the_window(path, dtype):
    """Logits whose weights are below the smallest float32 number: an empty far part must not swallow the window."""
    call, d_o = make_call(WindowCase(path=path, dtype=dtype, window=16, T=100))
    far = {"phi_q": torch.zeros_like(call.phi_q), "q": 8 * call.q, "k": 8 * call.k}
    call = call._replace(**far)
    actual, expected = run_call(call, d_o), truth_of(call, d_o)
    assert expected["lse"].min() < -20
    for name in ("o", "dv"):
        assert_close(name, actual[name], expected[name], dtype, factor=10, backend="cuda")
    assert all(x.isfinite().all() for x in actual.values())
    assert not actual["dphi_k"].any()


def test_paths_that_are_chosen(monkeypatch):
    def path_of(forced, dtype=BF16, **dims):
        return window_path(make_call(WindowCase(path=forced, dtype=dtype, **dims))[0])

    assert (path_of("auto"), path_of("sm90")) == ("sm90", "sm90")
    assert path_of("sm80") == path_of("auto", FP32) == path_of("auto", FP16) == path_of("auto", V=20) == "sm80"
    for forced, dims, message in (("sm90", {}, "Hopper kernels take"), ("auto", {"K": 256}, "up to 128, got 256")):
        with pytest.raises(RuntimeError, match=message):
            path_of(forced, FP32, **dims)
    monkeypatch.setenv("HF_LINATTN_EMULATED_CAPABILITY", "86")
    with pytest.raises(RuntimeError, match="bytes of shared memory"):
        path_of("auto", FP16, D=128)
