"""Op tests run with freshly allocated memory full of NaN, so that a read of it cannot pass unnoticed.

`--errors` prints, after the tests, the largest error by backend, dtype and kind of output next to its bound.
"""

import os

import numerics
import op_backends
import pytest
import torch

# Asked for by cuBLAS where deterministic algorithms are on; read at its first call.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def pytest_addoption(parser):
    parser.addoption("--errors", action="store_true", help="print the largest errors of the op tests")


def pytest_configure(config):
    config.addinivalue_line("markers", "large: needs tens of gigabytes on the device")


@pytest.fixture(autouse=True)
def _nan_filled_memory():
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture
def target(request, monkeypatch) -> op_backends.Target:
    op_backends.force(monkeypatch, request.param.path)
    return request.param


@pytest.hookimpl
def pytest_sessionfinish(session):
    # Only a worker of xdist has this attribute.
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["errors"] = [[*place, *x] for place, x in numerics.LARGEST_ERRORS.items()]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    for *place, share, error in getattr(node, "workeroutput", {}).get("errors", ()):
        known = numerics.LARGEST_ERRORS.get(tuple(place), (0.0, 0.0))
        numerics.LARGEST_ERRORS[tuple(place)] = max(known, (share, error))


def pytest_terminal_summary(terminalreporter):
    if not terminalreporter.config.getoption("--errors", default=False):
        return
    terminalreporter.section("largest errors")
    for (backend, dtype, kind), (share, error) in sorted(numerics.LARGEST_ERRORS.items()):
        terminalreporter.write_line(f"{backend:8} {dtype:15} {kind:6} {error:.2e}, {share:.0%} of its bound")
