"""Which implementation runs an op, and why.

`reference` is the per-token recurrence, `chunked` the O(N) PyTorch form with its own backward, `cuda` the compiled
kernels. The choice is visible: `explain` answers it, and the first use of each backend on a device is logged.
"""

import contextlib
import logging
import os

import torch
from torch import Tensor

BACKENDS = ("reference", "chunked", "cuda")
BACKEND_VARIABLE = "HF_LINATTN_BACKEND"
CUDA_UNAVAILABLE = "the compiled kernels are not part of this version"

_dispatch_logger = logging.getLogger("hf_linattn.kernels")
_dispatch_logged: set[tuple[str, str, str]] = set()


def explain(device: torch.device | str, dtype: torch.dtype, backend: str | None = None) -> tuple[str, str]:
    """Name the backend that runs for tensors of this device and dtype, and the reason.

    Args:
        device: where the inputs are.
        dtype: dtype of q, k, v.
        backend: the op's `backend` argument; None lets the environment variable HF_LINATTN_BACKEND, and without it
            the dispatcher, choose.

    Returns:
        (backend, reason), for example `("chunked", "default for bfloat16 on cuda: ...")`.

    Raises:
        ValueError: for an unknown backend, or one that cannot run here; the text gives the reason.
    """
    origin = "backend argument"
    if backend is None:
        backend, origin = os.environ.get(BACKEND_VARIABLE) or None, f"environment variable {BACKEND_VARIABLE}"
    device_type = torch.device(device).type
    if backend is None:
        return "chunked", f"default for {str(dtype).removeprefix('torch.')} on {device_type}: {CUDA_UNAVAILABLE}"
    if backend not in BACKENDS:
        raise ValueError(
            f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r} from the {origin}; correct it"
        )
    if backend == "cuda":
        raise ValueError(f"backend: 'cuda' was asked for by the {origin}, but {CUDA_UNAVAILABLE}; use 'chunked'")
    return backend, f"chosen by the {origin}"


def choose_backend(q: Tensor, backend: str | None) -> str:
    """The backend for this call; says so once per backend and kind of device."""
    chosen, reason = explain(q.device, q.dtype, backend)
    if not torch.compiler.is_compiling() and (chosen, q.device.type, reason) not in _dispatch_logged:
        _dispatch_logged.add((chosen, q.device.type, reason))
        _dispatch_logger.info("linear attention on %s runs %s (%s)", q.device.type, chosen, reason)
    return chosen


def autocast_off(device: torch.device) -> contextlib.AbstractContextManager:
    """Ops choose their own precision: autocast would round their float32 products."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()
