"""Where the op tests run: every (backend, device, kernel path) there is, decided here and nowhere else.

`@on("chunked-cpu", "cuda-*")` parametrises a test over the targets that match; the fixture `target` in
tests/ops/conftest.py puts the forced kernel path into the environment for the time of the test.
"""

import contextlib
import fnmatch
import os
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import pytest
import torch

from hf_linattn.kernels.cuda_library import CUDA_PATH_VARIABLE, compiled_build_info
from hf_linattn.kernels.dispatch import BACKEND_VARIABLE


class Target(NamedTuple):
    """One implementation of an op on one device.

    Attributes:
        backend: the op's `backend` argument.
        device: "cpu" or "cuda".
        path: compiled kernels to force, "sm80" or "sm90"; None lets the library choose.
    """

    backend: str
    device: str
    path: str | None = None

    def __str__(self) -> str:
        backend = "emulated" if self.is_compiled and self.device == "cpu" else self.backend
        return f"{backend}-{self.path or self.device}"

    @property
    def is_compiled(self) -> bool:
        return self.backend == "cuda"


TARGETS = (
    Target("reference", "cpu"),
    Target("chunked", "cpu"),
    Target("chunked", "cuda"),
    Target("cuda", "cuda"),
    Target("cuda", "cuda", "sm80"),
    Target("cuda", "cuda", "sm90"),
    # Slow, for developers of the kernels: tests of these exist only while an emulated build is loaded.
    Target("cuda", "cpu", "sm80"),
    Target("cuda", "cpu", "sm90"),
)


def _capability() -> int:
    """90 for sm_90; 0 without a CUDA device."""
    if not torch.cuda.is_available():
        return 0
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


CAPABILITY = _capability()
IS_EMULATED = (compiled_build_info() or {}).get("architectures") == "emulation"
needs_gpu = pytest.mark.skipif(CAPABILITY < 80, reason="needs a CUDA device of compute capability 8.0 or later")
needs_hopper = pytest.mark.skipif(CAPABILITY != 90, reason="needs a CUDA device of compute capability 9.0")


def marks(target: Target) -> list:
    """What a parameter with this target is marked with."""
    if target.device == "cpu":
        return []
    return [pytest.mark.gpu, needs_hopper if target.path == "sm90" else needs_gpu]


def targets(*patterns: str) -> list[Target]:
    """The targets whose name matches one of the shell patterns, in the order of `TARGETS`."""
    found = [target for target in TARGETS if any(fnmatch.fnmatchcase(str(target), p) for p in patterns)]
    unmatched = [p for p in patterns if not any(fnmatch.fnmatchcase(str(target), p) for target in TARGETS)]
    if unmatched:
        raise ValueError(f"targets: expected patterns that match one of {[*map(str, TARGETS)]}, got {unmatched}")
    return [target for target in found if IS_EMULATED or not str(target).startswith("emulated")]


def on(*patterns: str) -> pytest.MarkDecorator:
    """Parametrises `target`."""
    found = [pytest.param(target, id=str(target), marks=marks(target)) for target in targets(*patterns)]
    return pytest.mark.parametrize("target", found, indirect=True)


def pairs(*groups: tuple[Iterable, Iterable[Target]]) -> pytest.MarkDecorator:
    """Parametrises `case` and `target` together: each group's cases run on that group's targets."""
    found = [
        pytest.param(case, target, id=f"{case}-{target}", marks=marks(target))
        for cases, where in groups
        for case in cases
        for target in where
    ]
    return pytest.mark.parametrize(("case", "target"), found, indirect=["target"])


def force(monkeypatch: pytest.MonkeyPatch, path: str | None) -> None:
    """Forces a path of the compiled kernels, or none, until the test ends."""
    monkeypatch.delenv(BACKEND_VARIABLE, raising=False)
    if path is None:
        monkeypatch.delenv(CUDA_PATH_VARIABLE, raising=False)
    else:
        monkeypatch.setenv(CUDA_PATH_VARIABLE, path)


@contextlib.contextmanager
def skip_if_refused(must_run: bool) -> Iterator[None]:
    """Skips the test where compiled kernels are forced on a case that they refuse, and need not take."""
    try:
        yield
    except ValueError as error:
        # On other devices float16 and float32 may end at 128: there is less shared memory.
        if CAPABILITY in (0, 80, 90) or "dimensions of float" not in str(error):
            raise
        pytest.skip(str(error))
    except RuntimeError as error:
        is_refusal = any(words in str(error) for words in ("Hopper kernels take", "multiple of 16 bytes"))
        if must_run or os.environ.get(CUDA_PATH_VARIABLE) != "sm90" or not is_refusal:
            raise
        pytest.skip(f"no kernel for Hopper: {error}")
