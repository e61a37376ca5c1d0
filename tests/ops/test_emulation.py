"""The emulation of a GPU itself: right products, and an error for misuse that hardware would answer with nonsense."""

import re

import emulated_kernels
import pytest
import torch
from emulated_build import at, unavailable_reason, whole_numbers

pytestmark = pytest.mark.skipif(unavailable_reason() is not None, reason=str(unavailable_reason()))
DTYPES = [torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def probe():
    return emulated_kernels.load_parts()


@pytest.fixture(params=[0, 1, 2])
def seed(request, monkeypatch):
    monkeypatch.setenv("HF_LINATTN_EMULATED_SEED", str(request.param))


def run_wgmma(probe, dtype: torch.dtype, columns: int, transposed: bool, depth: int, fault: int = 0):
    a = whole_numbers(64, depth, dtype=dtype, seed=0)
    b = whole_numbers(columns, depth, dtype=dtype, seed=1)
    stored = b.T.contiguous() if transposed else b
    c = torch.full((64, columns), float("nan"))
    code = probe.probe_wgmma(
        at(a), at(stored), at(c), emulated_kernels.DTYPES[dtype], columns, int(transposed), depth, fault
    )
    return code, c, a.float() @ b.float().T


@pytest.mark.usefixtures("seed")
@pytest.mark.parametrize("depth", [64, 200])
@pytest.mark.parametrize("dtype", DTYPES)
def test_mma(probe, dtype, depth):
    a, b = whole_numbers(64, depth, dtype=dtype, seed=0), whole_numbers(depth, 64, dtype=dtype, seed=1)
    c = torch.full((64, 64), float("nan"))
    assert probe.probe_mma(at(a), at(b), at(c), emulated_kernels.DTYPES[dtype], depth) == 0, (
        probe.hf_linattn_last_error()
    )
    assert torch.equal(c, a.float() @ b.float())


def test_tf32(probe):
    a, b = torch.randn(16, 8), torch.randn(8, 8)
    c = torch.empty(16, 8)
    assert probe.probe_tf32(at(a), at(b), at(c)) == 0, probe.hf_linattn_last_error()
    exact = a.double() @ b.double()
    assert 1e-6 < (c - exact).abs().max() < 2e-2
    a, b = a.round(), b.round()
    assert probe.probe_tf32(at(a), at(b), at(c)) == 0, probe.hf_linattn_last_error()
    assert torch.equal(c, a @ b)


@pytest.mark.usefixtures("seed")
@pytest.mark.parametrize("depth", [64, 128, 328])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("columns", [8, 32, 64, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_wgmma_with_copies(probe, dtype, columns, transposed, depth):
    code, c, expected = run_wgmma(probe, dtype, columns, transposed, depth)
    assert code == 0, probe.hf_linattn_last_error()
    assert torch.equal(c, expected)


@pytest.mark.usefixtures("seed")
def test_stmatrix_and_shuffles(probe):
    out = torch.empty(384)
    assert probe.probe_store(at(out)) == 0, probe.hf_linattn_last_error()
    lane = torch.arange(32)
    assert torch.equal(out[:256], torch.arange(256.0).bfloat16().float())
    assert torch.equal(out[256:288], torch.full((32,), 496.0))
    prefix = lane.cumsum(0)
    assert torch.equal(out[288:320], prefix.float())
    assert torch.equal(out[320:352], torch.full((32,), 15.0))
    assert torch.equal(out[352:384], torch.cat([prefix[3:], prefix[-3:]]).float())


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (2, r"wgmma: element \(k 0, n 0\) of B was written without fence_proxy_async"),
        (3, r"wgmma: no wgmma_fence"),
        (4, r"wgmma: element \(k 0, n 0\) of B was overwritten before wgmma_wait"),
    ],
    ids=["no-proxy-fence", "no-wgmma-fence", "early-reuse"],
)
def test_refused_wgmma(probe, fault, message):
    code, _, _ = run_wgmma(probe, torch.bfloat16, 64, False, 128, fault)
    assert code != 0
    assert re.search(message, probe.hf_linattn_last_error().decode())


@pytest.mark.parametrize("fault", [1, 5], ids=["no-wgmma-wait", "no-phase-wait"])
def test_missing_wait_gives_wrong_numbers(probe, fault):
    code, c, expected = run_wgmma(probe, torch.bfloat16, 64, False, 128, fault)
    assert code != 0 or not torch.equal(c, expected)


@pytest.mark.parametrize(
    ("which", "message"),
    [
        (
            0,
            r"deadlock.*\n  threads 0-31 wait for __syncthreads 0, 32 of.*\n  threads 32-127 wait for named_barrier",
        ),
        (1, r"deadlock.*\n  threads 0-127 wait for parity 0 of mbarrier at shared offset 0 \(phase 0; 1 arrivals"),
        (2, r"access to shared offset 40\d\d of 4096|access to shared offset 5\d+|access to shared offset 4096"),
        (3, r"ldmatrix_x4: 16 bytes at shared offset 4096, but the block has 4096"),
        (5, r"access to address 0x10, which is not mapped"),
        (6, r"wrote shared offset 4000, but has 3996 bytes"),
        (8, r"different instructions|deadlock"),
    ],
    ids=["barriers", "mbarrier", "guard", "range", "null", "margin", "divergence"],
)
def test_broken_kernels_are_named(probe, which, message):
    assert probe.probe_broken(which, at(torch.zeros(256))) != 0
    assert re.search(message, probe.hf_linattn_last_error().decode(), re.DOTALL)


@pytest.mark.parametrize("which", [4, 7], ids=["never-written", "not-waited-for"])
def test_unwritten_shared_memory_is_nan(probe, which):
    out = torch.zeros(256)
    assert probe.probe_broken(which, at(out)) == 0, probe.hf_linattn_last_error()
    assert out[4:128].isnan().all()
