"""The kernels of window_gradient.cu on a CPU, with problems to run them on and what float64 says of those.

As emulated_kernels.py, whose environment variables hold here too.
"""

import ctypes
import functools
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from emulated_build import SOURCES, build_library
from emulated_kernels import DTYPES
from torch import Tensor


class _Rows(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("batch_stride", "token_stride", "head_stride")),
        ("dim", ctypes.c_int),
    ]


class _Arguments(ctypes.Structure):
    _fields_ = [
        *((name, _Rows) for name in ("q", "k", "v", "d_o", "o", "dq", "dk")),
        *((name, ctypes.c_int) for name in ("num_heads", "num_kv_heads")),
        ("tokens", ctypes.c_int64),
        ("num_sequences", ctypes.c_int),
        ("cu_seqlens", ctypes.c_void_p),
        *((name, ctypes.c_int) for name in ("cu_seqlens_is_int64", "window")),
        *((name, ctypes.c_float) for name in ("scale", "softcap")),
        *((name, ctypes.c_void_p) for name in ("log_scale", "key_valid", "lse", "delta", "far_weight")),
    ]


@dataclass(frozen=True)
class Case:
    """`lengths`: of packed sequences, whose sum is at most T; `layout`: see `place`."""

    T: int = 130
    window: int = 64
    B: int = 1
    H: int = 1
    H_kv: int = 1
    D: int = 16
    V: int = 16
    dtype: torch.dtype = torch.bfloat16
    lengths: tuple[int, ...] | None = None
    wide_boundaries: bool = False
    invalid: float = 0.0
    softcap: float = 0.0
    log_scale: bool = True
    layout: str = "bthd"
    capability: int = 90
    order: int = 0
    seed: int = 0

    def __str__(self) -> str:
        size = f"B{self.B}-T{self.T}-w{self.window}-H{self.H}kv{self.H_kv}-D{self.D}-V{self.V}"
        packed = [] if self.lengths is None else [f"packed{len(self.lengths)}"]
        flags = [f"{name}{x:g}" for name in ("invalid", "softcap") if (x := getattr(self, name))]
        return "-".join([size, str(self.dtype)[6:], *packed, *flags, self.layout, f"sm{self.capability}"])

    def sequence_of(self) -> Tensor:
        """Of each token, -1 behind the last."""
        if self.lengths is None:
            return torch.zeros(self.T, dtype=torch.int64)
        used = torch.repeat_interleave(torch.arange(len(self.lengths)), torch.tensor(self.lengths))
        return torch.cat([used, used.new_full((self.T - used.numel(),), -1)])


@functools.cache
def load_library() -> ctypes.CDLL:
    probe = Path(__file__).with_suffix(".cu")
    sources = (*sorted(SOURCES.glob("window_gradient*.cu")), probe)
    library = ctypes.CDLL(str(build_library("hf_linattn_emulated_window_gradient", sources)))
    library.hf_linattn_last_error.restype = ctypes.c_char_p
    return library


def call(function: str, *arguments) -> None:
    library = load_library()
    if getattr(library, function)(*arguments) != 0:
        raise RuntimeError(f"{function}: {library.hf_linattn_last_error().decode()}")


class Buffers:
    """Tensors that are views into larger ones full of NaN, which the kernels must leave alone."""

    def __init__(self, layout: str):
        self.layout = layout
        self._around = []

    def place(self, x: Tensor) -> Tensor:
        """A copy of x `[B, T, H, dim]`: contiguous, as [B, H, T, dim], or with odd strides and an odd address."""
        batch, tokens, heads, dim = x.shape
        if self.layout == "odd":
            whole = torch.full((batch, tokens + 2, heads + 1, dim + 5), math.nan, dtype=x.dtype)
            view = whole[:, 1:-1, 1:, 3:-2]
        else:
            # A multiple of 16 bytes before a tensor keeps its alignment.
            whole = torch.full((x.numel() + 64 + 64,), math.nan, dtype=x.dtype)
            order = (batch, heads, tokens, dim) if self.layout == "bhtd" else x.shape
            view = whole[64 : 64 + x.numel()].view(order)
            view = view.transpose(1, 2) if self.layout == "bhtd" else view
        view.copy_(x)
        self._around.append((whole, view))
        return view

    def empty(self, x: Tensor) -> Tensor:
        return self.place(torch.full_like(x, math.nan))

    def check(self) -> None:
        for whole, view in self._around:
            view.fill_(math.nan)
            assert whole.isnan().all(), "a kernel wrote outside one of its outputs"


def rows(x: Tensor) -> _Rows:
    return _Rows(x.data_ptr(), *x.stride()[:3], x.shape[3])


@dataclass
class Problem:
    """Inputs of a case, NaN where no sequence has tokens; see window_gradient.h."""

    case: Case
    q: Tensor
    k: Tensor
    v: Tensor
    d_o: Tensor
    o: Tensor
    lse: Tensor
    log_scale: Tensor | None
    key_valid: Tensor | None
    scale: float
    expected: dict[str, Tensor]


def make_problem(case: Case) -> Problem:
    generator = torch.Generator().manual_seed(case.seed)

    def normal(heads: int, dim: int) -> Tensor:
        return torch.randn(case.B, case.T, heads, dim, generator=generator).to(case.dtype)

    q, k = normal(case.H, case.D), normal(case.H_kv, case.D)
    v, d_o = normal(case.H_kv, case.V), normal(case.H, case.V)
    log_scale = torch.randn(case.H, generator=generator) if case.log_scale else None
    key_valid = None
    if case.invalid:
        key_valid = (torch.rand(case.B, case.T, generator=generator) >= case.invalid).to(torch.uint8)
    scale = 1.3 / math.sqrt(case.D)

    sequence, token = case.sequence_of(), torch.arange(case.T)
    apart = token[:, None] - token
    seen = (apart >= 0) & (apart < case.window) & (sequence[:, None] == sequence)
    seen = seen.expand(case.B, 1, case.T, case.T)
    if key_valid is not None:
        seen = seen & ((key_valid > 0)[:, None, None] | (apart == 0))

    def by_head(x: Tensor) -> Tensor:
        """`[B, H, T, dim]` in float64, kv heads once for each head of their group."""
        return x.double().transpose(1, 2).repeat_interleave(case.H // x.shape[2], 1)

    logits = scale * (by_head(q) @ by_head(k).mT)
    slope = torch.ones_like(logits)
    if case.softcap:
        logits = case.softcap * (logits / case.softcap).tanh()
        slope = 1 - (logits / case.softcap).square()
    logits = logits.masked_fill(~seen, -math.inf)
    # Far keys of some weight complete the denominator, and the output.
    far = torch.rand(case.B, case.H, case.T, generator=generator, dtype=torch.float64) * logits.exp().sum(-1)
    lse = (logits.exp().sum(-1) + far).log().float()
    weights = (logits - lse.double()[..., None]).exp()
    o = weights @ by_head(v) + (1 - weights.sum(-1))[..., None] * torch.randn(case.V, generator=generator).double()
    o = o.transpose(1, 2).to(case.dtype)

    delta = (by_head(d_o) * by_head(o)).sum(-1)
    ds = weights * (by_head(d_o) @ by_head(v).mT - delta[..., None])
    ds = ds * slope * scale
    dk = ds.mT @ by_head(q)
    shift = -lse.double() if log_scale is None else log_scale.double()[:, None] - lse.double()
    is_outside = sequence < 0
    expected = {
        "dq": (ds @ by_head(k)).transpose(1, 2),
        "dk": dk.unflatten(1, (case.H_kv, -1)).sum(2).transpose(1, 2),
        "delta": delta,
        "far_weight": shift.exp(),
    }
    for name, x in expected.items():
        (x if name in ("dq", "dk") else x.mT)[:, is_outside] = 0.0
    for x in (q, k, v, d_o, o):
        x[:, is_outside] = math.nan
    lse[..., is_outside] = math.nan
    return Problem(case, q, k, v, d_o, o, lse, log_scale, key_valid, scale, expected)


def run(problem: Problem) -> dict[str, Tensor]:
    """What the two kernels write."""
    buffers, plain = Buffers(problem.case.layout), Buffers("bthd")
    tensors = {name: buffers.place(getattr(problem, name)) for name in ("q", "k", "v", "d_o", "o")}
    tensors |= {"dq": buffers.empty(problem.q), "dk": buffers.empty(problem.k)}
    tensors |= {name: plain.empty(problem.lse[..., None])[..., 0] for name in ("delta", "far_weight")}
    results = {name: x.clone() for name, x in run_kernels(problem, **tensors).items()}
    buffers.check()
    plain.check()
    return results


def run_kernels(problem: Problem, **tensors: Tensor) -> dict[str, Tensor]:
    """Runs on the tensors given, and returns those that the kernels write."""
    case = problem.case
    for name in ("delta", "far_weight"):
        tensors.setdefault(name, torch.full_like(problem.lse, math.nan))
    boundaries = None
    if case.lengths is not None:
        dtype = torch.int64 if case.wide_boundaries else torch.int32
        boundaries = torch.tensor([0, *case.lengths]).cumsum(0).to(dtype)

    def pointer(x: Tensor | None) -> int | None:
        return None if x is None else x.data_ptr()

    arguments = _Arguments(
        **{name: rows(tensors[name]) for name in ("q", "k", "v", "d_o", "o", "dq", "dk")},
        num_heads=case.H,
        num_kv_heads=case.H_kv,
        tokens=case.T,
        num_sequences=case.B if case.lengths is None else len(case.lengths),
        cu_seqlens=pointer(boundaries),
        cu_seqlens_is_int64=case.wide_boundaries,
        window=case.window,
        scale=problem.scale,
        softcap=case.softcap,
        log_scale=pointer(problem.log_scale),
        key_valid=pointer(problem.key_valid),
        lse=pointer(problem.lse),
        **{name: pointer(tensors.get(name)) for name in ("delta", "far_weight")},
    )
    for function in ("probe_window_query_gradient", "probe_window_key_gradient"):
        call(function, DTYPES[case.dtype], ctypes.byref(arguments))
    return {name: tensors[name] for name in tensors if name not in ("q", "k", "v", "d_o", "o")}
