"""Which implementation runs an op, and why.

`reference` is the per-token recurrence, `chunked` the O(N) PyTorch form with its own backward, `cuda` the compiled
kernels. The choice is visible: `explain` answers it, and the first use of each backend on a device is logged.
"""

import contextlib
import functools
import logging
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from hf_linattn.kernels.cuda_library import compiled_kernels_problem

BACKENDS = ("reference", "chunked", "cuda")
BACKEND_VARIABLE = "HF_LINATTN_BACKEND"

_dispatch_logger = logging.getLogger("hf_linattn.kernels")
_dispatch_logged: set[tuple[str, str, str, str]] = set()
_dispatch_known: dict[tuple, str] = {}


class Unsupported(NamedTuple):
    """What keeps one call off the compiled kernels, beyond device, dtype and dimensions.

    Attributes:
        argument: name of the argument.
        expected: what the kernels take there.
        got: what came.
        remedy: what to do to have them run.
    """

    argument: str
    expected: str
    got: str
    remedy: str


def explain(
    device: torch.device | str,
    dtype: torch.dtype,
    backend: str | None = None,
    *,
    op: str = "linear_attention",
    feature_dim: int | None = None,
    value_dim: int | None = None,
    head_dim: int | None = None,
) -> tuple[str, str]:
    """Name the backend that runs for tensors of this device and dtype, and the reason.

    Single arguments may keep a call of the window op off the compiled kernels: a decay that requires grad, or an
    initial state together with a constant term a. The log says so.

    Args:
        device: where the inputs are.
        dtype: dtype of q, k, v.
        backend: the op's `backend` argument; None lets the environment variable HF_LINATTN_BACKEND, and without it
            the dispatcher, choose.
        op: name of the op.
        feature_dim: K, last dimension of q and k, or of phi_q and phi_k; None asks for a size that the compiled
            kernels take.
        value_dim: V, last dimension of v; None as for `feature_dim`.
        head_dim: D, last dimension of q and k of the window ops; None as for `feature_dim`.

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
    problem = compiled_kernels_problem(device, dtype, op, feature_dim, value_dim, head_dim)
    if backend == "cuda":
        if problem is not None:
            raise ValueError(f"backend: 'cuda' was asked for by the {origin}, but {problem}; use 'chunked'")
        return backend, f"chosen by the {origin}"
    default = _default_for(device, dtype)
    return ("cuda", f"{default}: the compiled kernels") if problem is None else ("chunked", f"{default}: {problem}")


def choose_backend(
    op: str,
    q: Tensor,
    v: Tensor,
    backend: str | None,
    head_dim: int | None = None,
    unsupported: Unsupported | None = None,
) -> str:
    """The backend for this call of `op`; says so once per op, backend and kind of device.

    Args:
        op: its name.
        q: queries whose last dimension is that of the features: phi_q of the window ops.
        v: values.
        backend: the op's `backend` argument.
        head_dim: D of the window ops.
        unsupported: the argument of this call that the compiled kernels do not take.
    """
    if torch.compiler.is_compiling():
        return _explain_call(op, q, v, backend, head_dim, unsupported)[0]
    named = os.environ.get(BACKEND_VARIABLE) if backend is None else None
    key = (op, q.device, q.dtype, q.shape[-1], v.shape[-1], backend, named, head_dim, unsupported)
    chosen = _dispatch_known.get(key)
    if chosen is None:
        chosen, reason = _explain_call(op, q, v, backend, head_dim, unsupported)
        _dispatch_known[key] = chosen
        if (op, chosen, q.device.type, reason) not in _dispatch_logged:
            _dispatch_logged.add((op, chosen, q.device.type, reason))
            _dispatch_logger.info("%s on %s runs %s (%s)", op, q.device.type, chosen, reason)
    return chosen


def _explain_call(
    op: str, q: Tensor, v: Tensor, backend: str | None, head_dim: int | None, unsupported: Unsupported | None
) -> tuple[str, str]:
    dims = {"feature_dim": q.shape[-1], "value_dim": v.shape[-1], "head_dim": head_dim}
    chosen, reason = explain(q.device, q.dtype, backend, op=op, **dims)
    if chosen != "cuda" or unsupported is None:
        return chosen, reason
    argument, expected, got, remedy = unsupported
    if (backend or os.environ.get(BACKEND_VARIABLE)) == "cuda":
        raise ValueError(f"{argument}: expected {expected} for backend 'cuda', got {got}; {remedy} or use 'chunked'")
    default = _default_for(q.device, q.dtype)
    return "chunked", f"{default}: the compiled kernels expect {argument} to be {expected}, not {got}"


def _default_for(device: torch.device, dtype: torch.dtype) -> str:
    return f"default for {str(dtype).removeprefix('torch.')} on {device.type}"


def autocast_off(device: torch.device) -> contextlib.AbstractContextManager:
    """Ops choose their own precision: autocast would round their float32 products."""
    # Asked before, since entering `torch.autocast` costs the host microseconds at every call. "meta" has no autocast;
    # PyTorch 2.11 cannot compile `torch.amp.is_autocast_available`.
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def outside_old_graphs(function: Callable) -> Callable:
    """`function`, kept out of graphs of PyTorch before 2.13.

    These compile in-place work in the forward of an autograd function to gradients of zero.
    """
    return function if torch.__version__ >= (2, 13) else torch.compiler.disable(function)


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
