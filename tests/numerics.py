"""How far results may be from float64: error measures, and the one tolerance table of the ops' tests.

A bound is never loosened for an environment. Each is about twice the largest error measured over tests/ops, on a CPU
and an H100; `pytest tests/ops --errors` prints the largest ones.
"""

import torch
from torch import Tensor

# Relative root-mean-square error to the float64 reference, by dtype and kind of output: of the PyTorch forms,
PYTORCH = {
    torch.bfloat16: {"o": 4.5e-3, "state": 4.5e-3, "dq": 1.5e-2, "grad": 9e-3, "gate": 3.8e-2, "log_scale": 3.8e-2},
    torch.float16: {"o": 4e-4, "state": 6e-7, "dq": 9e-4, "grad": 8e-4, "gate": 1.8e-3, "log_scale": 1.8e-3},
    torch.float32: {"o": 7e-7, "state": 9e-7, "dq": 2.6e-6, "grad": 1e-6, "gate": 3.6e-4, "log_scale": 3.6e-4},
    torch.float64: {"o": 4.5e-15, "state": 8.5e-15, "dq": 4.8e-15, "grad": 8e-15, "gate": 9e-15, "log_scale": 4e-15},
}
# and of the compiled kernels: bfloat16 operands stay bfloat16, float16 ones are multiplied as tf32, float32 ones as
# three products of tf32 numbers. dlog_scale sums phi_q . dphi_q over a sequence, whose terms nearly cancel where far
# keys weigh little.
COMPILED = {
    torch.bfloat16: PYTORCH[torch.bfloat16] | {"o": 5.8e-3, "grad": 2e-2, "gate": 2.6e-2, "log_scale": 1.8e-1},
    torch.float16: {"o": 6e-4, "state": 6e-4, "dq": 2e-3, "grad": 2e-3, "gate": 1.2e-3, "log_scale": 9.2e-3},
    torch.float32: {"o": 9e-7, "state": 1.2e-6, "dq": 2e-5, "grad": 1.7e-6, "gate": 3e-5, "log_scale": 3e-5},
}
TOLERANCES = {"reference": PYTORCH, "chunked": PYTORCH, "quadratic": PYTORCH, "cuda": COMPILED}
# A gradient that cancels exactly (of a sum that normalising divides away) leaves only rounding.
ABSOLUTE_FLOOR = {
    "chunked": {torch.bfloat16: 2e-3, torch.float16: 5e-4, torch.float32: 3e-6, torch.float64: 1e-14},
    "cuda": {torch.bfloat16: 2e-3, torch.float16: 5e-4, torch.float32: 5e-4},
}
# Half the distance of two numbers next to zero: no result can be expected to be closer.
SMALLEST_ERROR = {torch.float16: 2.0**-25}
# (share of the bound, error) of the largest error this process has seen, by (backend, dtype, kind of output).
LARGEST_ERRORS: dict[tuple[str, str, str], tuple[float, float]] = {}


def output_kind(name: str, has_window: bool = False) -> str:
    """Column of the table for an output called o, final.<member>, or d<input>.

    Under a softmax window dk is a sum of p (dp - do.o), a difference as small beside its terms as dq's.
    """
    if name == "o":
        return "o"
    if name.startswith("final."):
        return "state"
    if name in ("dq", "dphi_q") or (has_window and name == "dk"):
        return "dq"
    if name == "dlog_scale":
        return "log_scale"
    return "gate" if name in ("dg", "dg_gamma") else "grad"


def rms(x: Tensor) -> float:
    """Root mean square in float64, 0 for an empty tensor."""
    return x.double().square().mean().sqrt().item() if x.numel() else 0.0


def relative_rmse(actual: Tensor, expected: Tensor) -> float:
    """rms(actual - expected) / rms(expected)."""
    return rms(actual.double() - expected.double()) / max(rms(expected), torch.finfo(torch.float64).tiny)


def assert_close(
    name: str,
    actual: Tensor,
    expected: Tensor,
    dtype: torch.dtype,
    factor: float = 1.0,
    backend: str = "chunked",
    has_window: bool = False,
    rounding: float = 0.0,
) -> None:
    """`actual`, computed in `dtype`, is `expected` (float64) within the table.

    Args:
        name: of the output; selects the row and appears in the failure.
        actual: the result.
        expected: same shape, the truth.
        dtype: of the inputs `actual` was computed from.
        factor: multiplies the bound; above 1 only where two rounded results are compared with each other, or where
            cases are drawn at random, so that the bound was not measured on them.
        backend: what computed `actual`.
        has_window: whether the op is the one with a softmax window.
        rounding: root mean square error that no result can be expected to stay below, whatever `expected` is.
    """
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert torch.equal(actual.isfinite(), expected.isfinite()), f"{name}: NaN or Inf where the reference has none"
    kind = output_kind(name, has_window)
    error, bound = relative_rmse(actual, expected), factor * TOLERANCES[backend][dtype][kind]
    absolute = rms(actual.double() - expected.double())
    floor = ABSOLUTE_FLOOR["cuda" if backend == "cuda" else "chunked"][dtype]
    if rms(expected) < 1e-10 and absolute <= factor * floor or absolute <= SMALLEST_ERROR.get(dtype, 0):
        return
    if rounding and absolute <= rounding:
        return
    if factor == 1:
        place = (backend, str(dtype), kind)
        LARGEST_ERRORS[place] = max(LARGEST_ERRORS.get(place, (0.0, 0.0)), (error / bound, error))
    assert error <= bound, f"{name}: relative RMSE {error:.2e}, allowed {bound:.2e} ({dtype}); rms {rms(expected):.2e}"
