"""Which implementation runs an op, and why.

`reference` is the per-token recurrence, `chunked` the O(N) PyTorch form with its own backward, `cuda` the compiled
kernels. The choice is visible: `explain` answers it, and the first use of each backend on a device is logged.
"""

import contextlib
import functools
import logging
import os
from collections.abc import Callable

import torch
from torch import Tensor

from hf_linattn.kernels.cuda_library import compiled_kernels_problem

BACKENDS = ("reference", "chunked", "cuda")
BACKEND_VARIABLE = "HF_LINATTN_BACKEND"

_dispatch_logger = logging.getLogger("hf_linattn.kernels")
_dispatch_logged: set[tuple[str, str, str, str]] = set()
_dispatch_known: dict[tuple, str] = {}


def explain(
    device: torch.device | str,
    dtype: torch.dtype,
    backend: str | None = None,
    *,
    op: str = "linear_attention",
    feature_dim: int | None = None,
    value_dim: int | None = None,
) -> tuple[str, str]:
    """Name the backend that runs for tensors of this device and dtype, and the reason.

    Args:
        device: where the inputs are.
        dtype: dtype of q, k, v.
        backend: the op's `backend` argument; None lets the environment variable HF_LINATTN_BACKEND, and without it
            the dispatcher, choose.
        op: name of the op.
        feature_dim: K, last dimension of q and k; None asks for a size that the compiled kernels take.
        value_dim: V, last dimension of v; None as for `feature_dim`.

    Returns:
        (backend, reason), for example `("chunked", "default for bfloat16 on cpu: ...")`.

    Raises:
        ValueError: for an unknown backend, or one that cannot run here; the text gives the reason.
    """
    origin = "backend argument"
    if backend is None:
        backend, origin = os.environ.get(BACKEND_VARIABLE) or None, f"environment variable {BACKEND_VARIABLE}"
    if backend not in (None, *BACKENDS):
        raise ValueError(
            f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r} from the {origin}; correct it"
        )
    if backend in ("reference", "chunked"):
        return backend, f"chosen by the {origin}"
    device = torch.device(device)
    problem = compiled_kernels_problem(device, dtype, op, feature_dim, value_dim)
    if backend == "cuda":
        if problem is not None:
            raise ValueError(f"backend: 'cuda' was asked for by the {origin}, but {problem}; use 'chunked'")
        return backend, f"chosen by the {origin}"
    default = f"default for {str(dtype).removeprefix('torch.')} on {device.type}"
    return ("cuda", f"{default}: the compiled kernels") if problem is None else ("chunked", f"{default}: {problem}")


def choose_backend(op: str, q: Tensor, v: Tensor, backend: str | None) -> str:
    """The backend for this call of `op`; says so once per op, backend and kind of device."""
    if torch.compiler.is_compiling():
        return _explain_call(op, q, v, backend)[0]
    named = os.environ.get(BACKEND_VARIABLE) if backend is None else None
    key = (op, q.device, q.dtype, q.shape[-1], v.shape[-1], backend, named)
    chosen = _dispatch_known.get(key)
    if chosen is None:
        chosen, reason = _explain_call(op, q, v, backend)
        _dispatch_known[key] = chosen
        if (op, chosen, q.device.type, reason) not in _dispatch_logged:
            _dispatch_logged.add((op, chosen, q.device.type, reason))
            _dispatch_logger.info("%s on %s runs %s (%s)", op, q.device.type, chosen, reason)
    return chosen


def _explain_call(op: str, q: Tensor, v: Tensor, backend: str | None) -> tuple[str, str]:
    return explain(q.device, q.dtype, backend, op=op, feature_dim=q.shape[-1], value_dim=v.shape[-1])


def autocast_off(device: torch.device) -> contextlib.AbstractContextManager:
    """Ops choose their own precision: autocast would round their float32 products."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def where_grad_is_on(wrap: Callable[[Callable], Callable]) -> Callable[[Callable], Callable]:
    """The decorator `wrap`, one that turns gradients off, kept out of calls where they are off already.

    `torch.no_grad` costs the host two microseconds a call, whatever it finds.
    """

    def decorator(function: Callable) -> Callable:
        wrapped = wrap(function)

        @functools.wraps(function)
        def call(*args, **kwargs):
            return (wrapped if torch.is_grad_enabled() else function)(*args, **kwargs)

        return call

    return decorator
