"""The compiled kernels: a library beside this file, and the reasons why it cannot run something.

Importing this module loads the library if it is there and never raises: a missing or broken library is a sentence that
`explain` and `hf-linattn info` repeat.
"""

import os
import pathlib

import torch

COMPILED_LIBRARY = "_hf_linattn_kernels.so"
LIBRARY_VARIABLE = "HF_LINATTN_LIBRARY"
CUDA_PATH_VARIABLE = "HF_LINATTN_CUDA_PATH"
CUDA_PATHS = {"auto": 0, "sm80": 1, "sm90": 2}
# Op: what tells that the library has it.
COMPILED_OPS = {
    "linear_attention": "linear_attention_forward",
    "linear_attention_step": "linear_attention_step",
    "window_linear_attention": "window_linear_attention_forward",
    "window_linear_attention_step": "window_linear_attention_step",
    "hedgehog_step": "hedgehog_step",
}
COMPILED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # in the order of hf_linattn.h
MIN_CAPABILITY = (8, 0)


def compiled_library_path() -> pathlib.Path:
    """Where the library is looked for: HF_LINATTN_LIBRARY, or beside this file."""
    named = os.environ.get(LIBRARY_VARIABLE)
    return pathlib.Path(named) if named else pathlib.Path(__file__).with_name(COMPILED_LIBRARY)


def _load_compiled_library() -> str | None:
    """Why the library could not be loaded, or None when its ops are registered."""
    # Registering a namespace twice ends the process; another copy of this file may have been first.
    if hasattr(torch.ops.hf_linattn, "linear_attention_forward"):
        return "another copy of hf_linattn has loaded the compiled kernels already"
    path = compiled_library_path()
    if not path.is_file():
        return (
            f"the compiled kernels are not installed (no {path}); install the package where nvcc is found, or run "
            "`make kernels` in a checkout"
        )
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"the compiled kernels in {path} could not be loaded: {error.__cause__ or error}"
    return None


compiled_library_problem = _load_compiled_library()
_loaded_ops = frozenset(
    op for op, name in COMPILED_OPS.items() if compiled_library_problem is None and hasattr(torch.ops.hf_linattn, name)
)


def has_compiled_op(op: str) -> bool:
    """Whether the library is there and has this op: one built from older sources may not."""
    return op in _loaded_ops


def compiled_build_info() -> dict[str, str] | None:
    """What the library was built for: "cuda" (version of the compiler), "architectures"; None without a library."""
    if compiled_library_problem is not None:
        return None
    return dict(entry.split("=", 1) for entry in torch.ops.hf_linattn.build_info().split(";"))


# An emulated build, made by developers to run the kernels' sources without a GPU, serves CPU tensors.
_compiled_device_type = "cpu" if (compiled_build_info() or {}).get("architectures") == "emulation" else "cuda"


def compiled_kernels_problem(
    device: torch.device,
    dtype: torch.dtype,
    op: str,
    feature_dim: int | None = None,
    value_dim: int | None = None,
    head_dim: int | None = None,
) -> str | None:
    """Why the compiled kernels do not run `op` here, or None when they do; dimensions left out count as fitting."""
    if op not in COMPILED_OPS:
        return f"there is no compiled kernel for {op} yet"
    if device.type != _compiled_device_type:
        return f"the compiled kernels need a CUDA device, not {device.type}"
    if compiled_library_problem is not None:
        return compiled_library_problem
    if not has_compiled_op(op):
        return f"the compiled kernels are of an older version, without {op}; run `make kernels` again"
    if dtype not in COMPILED_DTYPES:
        return f"the compiled kernels take bfloat16, float16 and float32, not {str(dtype).removeprefix('torch.')}"
    problem = _compiled_device_problem(device.index) if device.type == "cuda" else None
    if problem is not None:
        return problem
    for name, dim in (("feature", feature_dim), ("value", value_dim), ("head", head_dim)):
        if dim is None:
            continue
        largest = _largest_compiled_dim(device, dtype, op)
        if not 1 <= dim <= largest:
            return (
                f"the compiled kernels take 1 to {largest} {name} dimensions of {str(dtype).removeprefix('torch.')} "
                f"here, not {dim}"
            )
    return None


@torch.compiler.assume_constant_result
def _largest_compiled_dim(device: torch.device, dtype: torch.dtype, op: str) -> int:
    """The library knows what its kernels need of the device's shared memory."""
    index = device.index
    if index is None:
        index = torch.cuda.current_device() if device.type == "cuda" else 0
    if op == "window_linear_attention":
        return torch.ops.hf_linattn.window_largest_dim(index, COMPILED_DTYPES.index(dtype))
    return torch.ops.hf_linattn.largest_dim(index, COMPILED_DTYPES.index(dtype), op.endswith("_step"))


@torch.compiler.assume_constant_result
def _compiled_device_problem(index: int | None) -> str | None:
    if torch.version.cuda is None:
        return "this PyTorch is built without CUDA"
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA device"
    capability = torch.cuda.get_device_capability(index)
    if capability < MIN_CAPABILITY:
        found, least = (".".join(map(str, pair)) for pair in (capability, MIN_CAPABILITY))
        return f"the compiled kernels need compute capability {least}, this device has {found}"
    # What only a call shows: the library brings its own CUDA runtime, for which the driver may be too old.
    index = torch.cuda.current_device() if index is None else index
    reason = torch.ops.hf_linattn.device_problem(index)
    return f"the compiled kernels do not run on this device: {reason}" if reason else None


def forced_cuda_path() -> int:
    """The kernels that HF_LINATTN_CUDA_PATH asks for, as `path` of the ops; for tests and benchmarks.

    Raises:
        ValueError: for any value but auto, sm80 and sm90.
    """
    name = os.environ.get(CUDA_PATH_VARIABLE) or "auto"
    if name not in CUDA_PATHS:
        raise ValueError(
            f"{CUDA_PATH_VARIABLE}: expected one of {', '.join(CUDA_PATHS)}, got {name!r}; correct the environment"
        )
    return CUDA_PATHS[name]
