"""Where and how a run computes: device, processes, arithmetic, repeatability."""

import contextlib
import datetime
import os
import resource
from collections.abc import Iterator

import torch
from accelerate import Accelerator, InitProcessGroupKwargs

from hf_linattn.errors import UserError

# The other processes wait at a barrier while the main one tokenises or samples its corpus.
BARRIER_TIMEOUT = datetime.timedelta(hours=6)


def make_accelerator(device: str | None = None) -> Accelerator:
    """The `Accelerator` of this process, on `device` ("cpu", "cuda", "cuda:1"; None takes the launcher's choice).

    Raises:
        UserError: a device this machine does not have.
    """
    if device is not None and device != "cpu":
        _select_device(device)
    # Accelerate's own mixed precision returns logits in float32, a full-vocabulary tensor for all tokens; the loop
    # enters autocast itself. FSDP and DeepSpeed have theirs built in and read it from their configuration.
    sharded = any(os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true" for name in ("FSDP", "DEEPSPEED"))
    return Accelerator(
        cpu=device == "cpu",
        mixed_precision=None if sharded else "no",
        kwargs_handlers=[InitProcessGroupKwargs(timeout=BARRIER_TIMEOUT)],
    )


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """`torch.dtype` called `name`; "auto" is bfloat16 where `device` computes in it natively, else float32."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        native = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    else:
        native = False
    return torch.bfloat16 if native else torch.float32


@contextlib.contextmanager
def repeatable(enabled: bool) -> Iterator[None]:
    """Within, if `enabled`: kernels whose result varies from run to run give way to those whose does not."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    if enabled:
        # Read when cuBLAS starts; without it two streams may choose differently.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = filled


def peak_gib(device: torch.device) -> float:
    """Most memory this process has used on `device`, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def device_name(device: torch.device) -> str:
    """What a report calls `device`."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({torch.get_num_threads()} threads)"


def _select_device(device: str) -> None:
    try:
        wanted = torch.device(device)
    except RuntimeError:
        raise UserError(f"device: expected cpu, cuda or cuda:N, got {device!r}") from None
    if wanted.type != "cuda":
        raise UserError(f"device: expected cpu, cuda or cuda:N, got {device!r}")
    if not torch.cuda.is_available() or (wanted.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"device: {device!r} is not there ({torch.cuda.device_count()} CUDA devices); use device='cpu'"
        )
    if wanted.index is not None:
        torch.cuda.set_device(wanted)
