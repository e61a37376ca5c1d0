"""dq and dk of the softmax part of window_linear_attention, emulated on a CPU, against float64 sums over all pairs."""

import math
import mmap
from random import Random

import pytest
import torch
from emulated_build import unavailable_reason
from emulated_kernels import DTYPES
from emulated_window_gradient import Case, Problem, call, make_problem, run, run_kernels
from numerics import assert_close
from torch import Tensor

pytestmark = pytest.mark.skipif(unavailable_reason() is not None, reason=str(unavailable_reason()))

LENGTHS = [1, 15, 64, 65, 130, 300]
WINDOWS = [1, 16, 63, 64, 65, 100, 128, 200]


def random_case(seed: int) -> Case:
    random = Random(seed)
    tokens, kv_heads = random.randint(1, 260), random.choice([1, 1, 2])
    dtype, lengths = random.choice(list(DTYPES)), None
    if random.random() < 0.5:
        left, lengths = tokens, ()
        while left > 0 and len(lengths) < 6:
            lengths += (random.choice([0, 1, 64, random.randint(0, left)]),)
            lengths = (*lengths[:-1], min(left, lengths[-1]))
            left -= lengths[-1]
    most = 128 if dtype != torch.bfloat16 else 160
    return Case(
        T=tokens,
        window=random.choice([1, 64, random.randint(1, 128), random.randint(1, 400), 2**31 - 1]),
        B=1 if lengths is not None else random.choice([1, 2]),
        H=kv_heads * random.choice([1, 1, 2, 3]),
        H_kv=kv_heads,
        D=random.choice([16, 32, 64, random.randint(1, most)]),
        V=random.choice([16, 32, 64, random.randint(1, most)]),
        dtype=dtype,
        lengths=lengths,
        wide_boundaries=random.random() < 0.5,
        invalid=random.choice([0.0, 0.0, 0.3]),
        softcap=random.choice([0.0, 0.0, 1.5]),
        log_scale=random.random() < 0.7,
        layout=random.choice(["bthd", "bhtd", "odd"]),
        capability=random.choice([80, 90]),
        order=random.randint(0, 3),
        seed=seed,
    )


CASES = [
    *(
        Case(T=tokens, window=window, dtype=dtype, layout="odd" if (i + j) % 5 == 0 else "bthd", order=(i + j) % 3)
        for dtype in DTYPES
        for i, tokens in enumerate(LENGTHS)
        for j, window in enumerate(WINDOWS)
    ),
    *(Case(D=64, V=64, window=80, H=2, H_kv=1, dtype=dtype, layout="bhtd") for dtype in DTYPES),
    *(Case(D=128, V=128, T=190, dtype=dtype, capability=80) for dtype in DTYPES),
    Case(D=128, V=128, B=2, H=2, H_kv=2, T=200, softcap=2.0, invalid=0.2),
    Case(D=256, V=256, T=140, window=70),
    Case(D=80, V=129, T=70, capability=80),
    Case(D=7, V=33, dtype=torch.float16, layout="odd"),
    Case(D=33, V=5, dtype=torch.float32),
    Case(T=200, window=300, H=3, H_kv=1, lengths=(0, 70, 0, 0, 64, 1), wide_boundaries=True),
    Case(T=200, H=2, H_kv=2, lengths=(0, 0), dtype=torch.float32),
    Case(T=260, window=20, lengths=(260,), dtype=torch.float16),
    Case(T=150, window=40, B=2, invalid=1.0, softcap=1.0, dtype=torch.float32),
    *map(random_case, range(1, 121)),
]


@pytest.fixture
def machine(case, monkeypatch):
    monkeypatch.setenv("HF_LINATTN_EMULATED_CAPABILITY", str(case.capability))
    monkeypatch.setenv("HF_LINATTN_EMULATED_SEED", str(case.order))


def check(problem: Problem, results: dict[str, Tensor], factor: float = 1) -> None:
    case, expected = problem.case, problem.expected
    behind = case.sequence_of() < 0
    for name in ("dq", "dk"):
        assert_close(name, results[name], expected[name], case.dtype, factor=factor, backend="cuda")
        assert not results[name][:, behind].any(), f"{name}: tokens of no sequence have a gradient"
    for name in set(results) - {"dq", "dk"}:
        assert not results[name][..., behind].any(), f"{name}: tokens of no sequence have one"
    torch.testing.assert_close(results["delta"].double(), expected["delta"], rtol=1e-5, atol=3e-5)
    torch.testing.assert_close(results["far_weight"].double(), expected["far_weight"], rtol=1e-5, atol=0)


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_window_gradient(case):
    problem = make_problem(case)
    check(problem, run(problem), factor=2 if case.seed else 1)


@pytest.mark.parametrize(
    "case",
    [
        Case(T=200, window=90, H=4, H_kv=2, lengths=(70, 0, 100), invalid=0.2, softcap=1.0),
        Case(T=150, window=64, H=2, H_kv=1, dtype=torch.float16, layout="odd"),
        Case(T=150, window=64, B=2, D=70, dtype=torch.float32, capability=80),
    ],
    ids=str,
)
def test_runs_are_bit_equal(case, monkeypatch):
    """In whatever order threads, blocks and copies come."""
    monkeypatch.setenv("HF_LINATTN_EMULATED_CAPABILITY", str(case.capability))
    problem, first = make_problem(case), None
    for order in range(4):
        monkeypatch.setenv("HF_LINATTN_EMULATED_SEED", str(order))
        results = run(problem)
        first = first or results
        for name, x in results.items():
            assert torch.equal(x, first[name]), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_sequences_do_not_see_each_other(dtype):
    """NaN in one of them stays there, also in a tile that it shares with its neighbours."""
    case = Case(T=200, window=100, H=2, H_kv=1, lengths=(50, 60, 80), dtype=dtype)
    problem = make_problem(case)
    clean = run(problem)
    middle = slice(50, 110)
    for x in (problem.q, problem.k, problem.v, problem.d_o, problem.o):
        x[:, middle] = math.nan
    problem.lse[..., middle] = math.nan
    for name, x in run(problem).items():
        by_token, before = (x, clean[name]) if name in ("dq", "dk") else (x.mT, clean[name].mT)
        assert by_token[:, middle].isnan().all(), name
        by_token[:, middle] = before[:, middle]
        assert torch.equal(by_token, before), name


def test_keys_later_than_a_query_or_before_its_window_do_not_count():
    """Their gradients and those of the queries before and after are bit for bit the same whatever they are."""
    case = Case(T=200, window=70)
    problem = make_problem(case)
    clean = run(problem)
    problem.k[:, 100], problem.v[:, 100] = 3.0, -2.0
    changed = run(problem)
    same = torch.tensor([not 0 <= i - 100 < case.window for i in range(case.T)])
    assert torch.equal(changed["dq"][:, same], clean["dq"][:, same])
    assert (changed["dq"] != clean["dq"]).any(-1)[:, ~same].all()


def test_more_elements_than_an_int_counts():
    """Tensors of three tokens that lie 2^30 elements apart."""
    case, stride = Case(T=3, window=2, B=1), 2**30 + 64 * 16
    problem = make_problem(case)
    with mmap.mmap(-1, 2 * (2 * stride + 64 * 16), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        whole = torch.frombuffer(memory, dtype=case.dtype)
        spread = {
            name: whole.as_strided((1, 3, 1, 16), (0, stride, 16, 1), 64 * i)
            for i, name in enumerate(("q", "k", "v", "d_o", "o", "dq", "dk"))
        }
        for name in ("q", "k", "v", "d_o", "o"):
            spread[name].copy_(getattr(problem, name))
        results = run_kernels(problem, **spread)
        check(problem, {name: x.clone() for name, x in results.items()})
        del whole, spread, results


def test_weight_of_far_keys_is_bounded():
    """Where no far key has any the denominator may be next to nothing."""
    problem = make_problem(Case(T=5, log_scale=False))
    problem.lse.fill_(-100.0)
    assert (run(problem)["far_weight"] == 2.0**126).all()


@pytest.mark.parametrize(
    ("dtype", "dims", "capability", "message"),
    [
        (torch.bfloat16, (256, 256), 90, None),
        (torch.bfloat16, (256, 256), 80, None),
        (torch.bfloat16, (128, 128), 89, None),
        (torch.float32, (128, 128), 80, None),
        (torch.float16, (64, 64), 89, None),
        (torch.bfloat16, (256, 64), 89, "up to 256 in this dtype need 131584 bytes of shared memory"),
        (torch.float32, (65, 64), 89, "up to 128 in this dtype need 139776 bytes of shared memory"),
        (torch.bfloat16, (64, 257), 90, "dimensions in this dtype go up to 256, got 257"),
        (torch.float16, (129, 64), 90, "dimensions in this dtype go up to 128, got 129"),
        (torch.bfloat16, (64, 64), 75, "need a device of compute capability 80, this one has 75"),
    ],
)
def test_what_the_kernels_take(dtype, dims, capability, message, monkeypatch):
    monkeypatch.setenv("HF_LINATTN_EMULATED_CAPABILITY", str(capability))
    if message is None:
        call("probe_check_window_gradient", DTYPES[dtype], *dims)
    else:
        with pytest.raises(RuntimeError, match=message):
            call("probe_check_window_gradient", DTYPES[dtype], *dims)
