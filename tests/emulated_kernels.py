"""The CUDA kernels on a CPU: kernels/csrc built with a host compiler (emulation.h), called through the C interface.

`forward`, `backward` and `step` take CPU tensors in the layout of hf_linattn.kernels and return tensors; those of the
window op are in emulated_window.py. Outputs are NaN before the call, and every buffer stands between bytes that the
kernels must leave alone.

Environment: HF_LINATTN_EMULATED_SMS (4) and HF_LINATTN_EMULATED_CAPABILITY (90) are the GPU that the launchers see;
HF_LINATTN_EMULATED_SEED other than 0 shuffles threads, blocks and copies.
"""

import ctypes
import functools
from pathlib import Path

import torch
from emulated_build import SOURCES, build_library
from torch import Tensor

from hf_linattn.kernels import LinearAttentionState
from hf_linattn.kernels.state import linear_state_shapes

DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
FEATURE_MAPS = {"none": 0, "elu": 1, "relu": 2, "l2": 3}
PATHS = {"auto": 0, "sm80": 1, "sm90": 2}
G_STRIDES = ("g_batch_stride", "g_token_stride", "g_head_stride")
MARGIN, ALIGNMENT = 1024, 256


class _Tensor(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), *((f"{x}_stride", ctypes.c_int64) for x in ("batch", "token", "head"))]


class State(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in LinearAttentionState._fields]


class WindowPart(ctypes.Structure):
    """hf_linattn_window; all zero where there is none."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("size", "dim", "first_query")),
        *((name, ctypes.c_float) for name in ("scale", "softcap")),
        *((name, _Tensor) for name in ("q", "k")),
        *((name, ctypes.c_void_p) for name in ("log_scale", "key_valid")),
    ]


class _Problem(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in ("dtype", "path", "batch", "num_heads", "num_kv_heads", "feature_dim")),
        ("value_dim", ctypes.c_int32),
        ("tokens", ctypes.c_int64),
        ("num_sequences", ctypes.c_int32),
        ("cu_seqlens", ctypes.c_void_p),
        ("cu_seqlens_is_int64", ctypes.c_int32),
        *((name, ctypes.c_float) for name in "ab"),
        ("normalize", ctypes.c_int32),
        ("causal", ctypes.c_int32),
        *((name, _Tensor) for name in ("q", "k", "v")),
        ("g", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("g_batch_stride", "g_token_stride", "g_head_stride")),
        ("initial_state", State),
        ("window", WindowPart),
    ]


class Gradients(ctypes.Structure):
    _fields_ = [
        ("d_o", _Tensor),
        ("den", ctypes.c_void_p),
        ("d_final", State),
        *((name, _Tensor) for name in ("dq", "dk", "dv")),
        ("dg", ctypes.c_void_p),
        ("d_initial", State),
        *((name, _Tensor) for name in ("o", "d_window_q", "d_window_k")),
        ("d_log_scale", ctypes.c_void_p),
    ]


class _StepProblem(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in ("dtype", "feature_map", "batch", "num_heads", "num_kv_heads")),
        *((name, ctypes.c_int32) for name in ("feature_dim", "value_dim")),
        ("a", ctypes.c_float),
        ("b", ctypes.c_float),
        ("normalize", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in ("q", "k", "v")),
        *((f"{x}_{axis}_stride", ctypes.c_int64) for x in "qkv" for axis in ("batch", "head")),
        ("g", ctypes.c_void_p),
        *((f"g_{axis}_stride", ctypes.c_int64) for axis in ("batch", "head")),
        ("state", State),
        ("o", ctypes.c_void_p),
    ]


def load_kernels() -> ctypes.CDLL:
    """All kernels; building them takes minutes."""
    return _load("hf_linattn_emulated", tuple(sorted(SOURCES.glob("*.cu"))))


def load_parts() -> ctypes.CDLL:
    """The small kernels with tests/emulated_probe.cu; built in seconds."""
    names = ("step", "window_step", "hedgehog_step", "decay_gradient")
    parts = [SOURCES / f"{name}.cu" for name in names]
    return _load("hf_linattn_emulated_parts", (*parts, Path(__file__).with_name("emulated_probe.cu")))


@functools.cache
def _load(name: str, sources: tuple[Path, ...]) -> ctypes.CDLL:
    library = ctypes.CDLL(str(build_library(name, sources)))
    library.hf_linattn_last_error.restype = ctypes.c_char_p
    for function in ("hf_linattn_forward_workspace", "hf_linattn_backward_workspace"):
        if hasattr(library, function):
            getattr(library, function).restype = ctypes.c_size_t
    return library


class Buffers:
    """Outputs of one call: NaN at first, with a margin of known bytes on both sides that `check` looks at."""

    def __init__(self):
        self._outside = []

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        size = torch.Size(shape).numel() * dtype.itemsize
        whole = torch.full((size + 2 * MARGIN + ALIGNMENT,), 0x5A, dtype=torch.uint8)
        start = MARGIN + -whole.data_ptr() % ALIGNMENT
        inside = whole[start : start + size]
        inside.fill_(0xFF)
        self._outside += [whole[:start], whole[start + size :]]
        return inside.view(dtype).view(shape)

    def copy(self, x: Tensor) -> Tensor:
        return self.empty(*x.shape, dtype=x.dtype).copy_(x)

    def check(self) -> None:
        if not all(bool((x == 0x5A).all()) for x in self._outside):
            raise RuntimeError("a kernel wrote outside one of its outputs")


def call_kernel(library: ctypes.CDLL, function: str, *arguments) -> None:
    if getattr(library, function)(*arguments) != 0:
        raise RuntimeError(f"{function}: {library.hf_linattn_last_error().decode()}")


def pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def describe_tensor(x: Tensor | None) -> _Tensor:
    return _Tensor() if x is None else _Tensor(x.data_ptr(), *x.stride()[:3])


def describe_state(state: LinearAttentionState | None) -> State:
    for x in state or ():
        if x is not None and not (x.is_contiguous() and x.dtype == torch.float32):
            raise ValueError("state: expected contiguous float32 tensors")
    return State(*(map(pointer, state) if state is not None else ()))


def describe_problem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    a: float,
    b: float,
    normalize: bool,
    causal: bool,
    initial_state: LinearAttentionState | None,
    cu_seqlens: Tensor | None,
    path: str,
) -> _Problem:
    return _Problem(
        dtype=DTYPES[q.dtype],
        path=PATHS[path],
        batch=q.shape[0],
        num_heads=q.shape[2],
        num_kv_heads=k.shape[2],
        feature_dim=q.shape[3],
        value_dim=v.shape[3],
        tokens=q.shape[1],
        num_sequences=q.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1,
        cu_seqlens=pointer(cu_seqlens),
        cu_seqlens_is_int64=cu_seqlens is not None and cu_seqlens.dtype == torch.int64,
        a=a,
        b=b,
        normalize=normalize,
        causal=causal,
        q=describe_tensor(q),
        k=describe_tensor(k),
        v=describe_tensor(v),
        g=pointer(g),
        **({} if g is None else dict(zip(G_STRIDES, g.stride(), strict=True))),
        initial_state=describe_state(initial_state),
    )


def empty_state(buffers: Buffers, problem: _Problem) -> LinearAttentionState:
    """A state to be written, with the members that the op has."""
    sizes = (problem.num_sequences, problem.num_kv_heads, problem.feature_dim, problem.value_dim)
    shapes = linear_state_shapes(*sizes, a=problem.a, normalize=bool(problem.normalize))
    return LinearAttentionState(
        *(None if shape is None else buffers.empty(*shape, dtype=torch.float32) for shape in shapes)
    )


def chosen_path(q: Tensor, k: Tensor, v: Tensor, *, forced: str = "auto", cu_seqlens: Tensor | None = None) -> str:
    """Which kernels `forward` would run, "sm80" or "sm90".

    Raises:
        RuntimeError: no kernel takes the problem.
    """
    problem = describe_problem(q, k, v, None, 0.0, 1.0, True, True, None, cu_seqlens, forced)
    chosen = load_kernels().hf_linattn_path(ctypes.byref(problem))
    if chosen < 0:
        raise RuntimeError(f"hf_linattn_path: {load_kernels().hf_linattn_last_error().decode()}")
    return next(name for name, value in PATHS.items() if value == chosen)


def run_forward(
    buffers: Buffers, problem: _Problem, o: Tensor, den: Tensor | None, final: LinearAttentionState | None
) -> None:
    """Calls the forward, with its workspace, and checks what it wrote around its outputs."""
    size = load_kernels().hf_linattn_forward_workspace(ctypes.byref(problem))
    workspace = buffers.empty(size, dtype=torch.uint8)
    outputs = ctypes.byref(describe_tensor(o)), ctypes.c_void_p(pointer(den)), ctypes.byref(describe_state(final))
    place = ctypes.c_void_p(workspace.data_ptr())
    call_kernel(load_kernels(), "hf_linattn_forward", ctypes.byref(problem), *outputs, place, None)
    buffers.check()


def run_backward(buffers: Buffers, problem: _Problem, gradients: Gradients) -> None:
    """The same of the backward."""
    arguments = ctypes.byref(problem), ctypes.byref(gradients)
    workspace = buffers.empty(load_kernels().hf_linattn_backward_workspace(*arguments), dtype=torch.uint8)
    call_kernel(load_kernels(), "hf_linattn_backward", *arguments, ctypes.c_void_p(workspace.data_ptr()), None)
    buffers.check()


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    *,
    a: float = 0.0,
    b: float = 1.0,
    normalize: bool = True,
    causal: bool = True,
    initial_state: LinearAttentionState | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    path: str = "auto",
) -> tuple[Tensor, Tensor | None, LinearAttentionState | None]:
    """o `[B, T, H, V]`, den `[B, H, T]` or None, final state (None unless asked)."""
    problem = describe_problem(q, k, v, g, a, b, normalize, causal, initial_state, cu_seqlens, path)
    buffers = Buffers()
    o = buffers.empty(*q.shape[:3], v.shape[3], dtype=q.dtype)
    den = buffers.empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32) if normalize else None
    final = empty_state(buffers, problem) if output_final_state else None
    run_forward(buffers, problem, o, den, final)
    return o, den, final


def backward(
    d_o: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    den: Tensor | None,
    g: Tensor | None = None,
    *,
    a: float = 0.0,
    b: float = 1.0,
    normalize: bool = True,
    causal: bool = True,
    initial_state: LinearAttentionState | None = None,
    d_final: LinearAttentionState | None = None,
    cu_seqlens: Tensor | None = None,
    needs_dg: bool = True,
    needs_d_initial: bool = False,
    path: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, LinearAttentionState | None]:
    """dq, dk, dv, dg `[B, T, H_kv]` (None without g or unless asked), gradient of the initial state (or None)."""
    problem = describe_problem(q, k, v, g, a, b, normalize, causal, initial_state, cu_seqlens, path)
    buffers = Buffers()
    dq, dk, dv = (buffers.empty(*x.shape, dtype=x.dtype) for x in (q, k, v))
    dg = buffers.empty(*k.shape[:3], dtype=torch.float32) if needs_dg and g is not None else None
    d_initial = empty_state(buffers, problem) if needs_d_initial else None
    gradients = Gradients(
        d_o=describe_tensor(d_o),
        den=pointer(den),
        d_final=describe_state(d_final),
        dq=describe_tensor(dq),
        dk=describe_tensor(dk),
        dv=describe_tensor(dv),
        dg=pointer(dg),
        d_initial=describe_state(d_initial),
    )
    run_backward(buffers, problem, gradients)
    return dq, dk, dv, dg, d_initial


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: LinearAttentionState,
    g: Tensor | None = None,
    *,
    a: float = 0.0,
    b: float = 1.0,
    normalize: bool = True,
    feature_map: str = "none",
) -> tuple[Tensor, LinearAttentionState]:
    """o `[B, H, V]` and the new state; the one given is left as it is."""
    buffers = Buffers()
    o = buffers.empty(*q.shape[:2], v.shape[2], dtype=q.dtype)
    new = LinearAttentionState(*(None if x is None else buffers.copy(x) for x in state))
    strides = row_strides({"q": q, "k": k, "v": v, "g": g})
    problem = _StepProblem(
        dtype=DTYPES[q.dtype],
        feature_map=FEATURE_MAPS[feature_map],
        batch=q.shape[0],
        num_heads=q.shape[1],
        num_kv_heads=k.shape[1],
        feature_dim=q.shape[2],
        value_dim=v.shape[2],
        a=a,
        b=b,
        normalize=normalize,
        q=pointer(q),
        k=pointer(k),
        v=pointer(v),
        g=pointer(g),
        state=describe_state(new),
        o=pointer(o),
        **strides,
    )
    call_kernel(load_parts(), "hf_linattn_step", ctypes.byref(problem), None)
    buffers.check()
    return o, new


def row_strides(inputs: dict[str, Tensor | None]) -> dict[str, int]:
    """Strides of one token's tensors `[B, H, ...]` as the C interface names them."""
    return {
        f"{name}_{axis}_stride": n
        for name, x in inputs.items()
        if x is not None
        for axis, n in zip(("batch", "head"), x.stride()[:2], strict=True)
    }


def decay_gradient(
    d_o: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    den: Tensor | None,
    along: Tensor | None,
    *,
    a: float = 0.0,
    b: float = 1.0,
    initial_state: LinearAttentionState | None = None,
    d_final: LinearAttentionState | None = None,
    carried: LinearAttentionState | None = None,
    d_carried: LinearAttentionState | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """dg `[B, T, H_kv]` by decay_gradient.cu alone.

    Args:
        d_o, q, k, v, g, a, b, initial_state, d_final, cu_seqlens: as for `backward`.
        den: `[B, H, T]` with normalisation, else None.
        along: `[B, H, T]` d_o . o with normalisation, 0 where den is held, else None.
        carried: states at the boundaries of segments of 1024 tokens, all sequences' after one another.
        d_carried: their gradients.
    """
    problem = describe_problem(q, k, v, g, a, b, den is not None, True, initial_state, cu_seqlens, "auto")
    buffers, library = Buffers(), load_parts()
    library.probe_decay_gradient_floats.restype = ctypes.c_int64
    dg = buffers.empty(*k.shape[:3], dtype=torch.float32)
    workspace = buffers.empty(library.probe_decay_gradient_floats(ctypes.byref(problem)), dtype=torch.float32)
    gradients = Gradients(d_o=describe_tensor(d_o), den=pointer(den), d_final=describe_state(d_final), dg=pointer(dg))
    call_kernel(
        library,
        "probe_decay_gradient",
        ctypes.byref(problem),
        ctypes.byref(gradients),
        ctypes.c_void_p(pointer(along)),
        ctypes.byref(describe_state(carried)),
        ctypes.byref(describe_state(d_carried)),
        ctypes.c_void_p(workspace.data_ptr()),
    )
    buffers.check()
    return dg
