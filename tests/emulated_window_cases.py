"""Cases of the window op for the emulated kernels, and their inputs."""

from dataclasses import dataclass

import torch
from emulated_window import WindowCall
from torch import Tensor

from hf_linattn.kernels import LinearAttentionState
from hf_linattn.kernels.state import linear_state_shapes

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
KINDS = [("sm90", BF16), ("sm80", BF16), ("sm80", FP16), ("sm80", FP32)]
NAN_TAIL = 9


@dataclass(frozen=True)
class WindowCase:
    """One call. `hidden` keys are not valid; `strided` inputs lie heads first inside NaN."""

    T: int = 130
    window: int = 64
    path: str = "sm80"
    dtype: torch.dtype = FP32
    B: int = 1
    H: int = 2
    H_kv: int = 1
    D: int = 64
    K: int = 64
    V: int = 64
    decay: str | None = None
    a: float = 0.0
    softcap: float = 0.0
    log_scale: bool = True
    hidden: bool = False
    sums: bool = False
    strided: bool = False
    lengths: tuple[int, ...] | None = None
    capability: int = 90
    processors: int = 4
    seed: int = 0

    def __str__(self) -> str:
        size = f"B{self.B}-T{self.T}" if self.lengths is None else "packed" + "_".join(map(str, self.lengths))
        dims = f"D{self.D}-K{self.K}-V{self.V}-H{self.H}kv{self.H_kv}"
        parts = [self.path, str(self.dtype)[6:], size, f"w{self.window}", dims, self.decay or "nodecay"]
        parts += [f"a{self.a:g}"] if self.a else []
        parts += [f"cap{self.softcap:g}"] if self.softcap else []
        parts += [name for name in ("log_scale", "hidden", "sums", "strided") if getattr(self, name)]
        parts += [] if self.capability == 90 else [f"sm{self.capability}"]
        return "-".join(parts + ([f"seed{self.seed}"] if self.seed else []))


def packed(*lengths: int, **fields) -> WindowCase:
    return WindowCase(T=sum(lengths), lengths=lengths, **fields)


def make_call(case: WindowCase) -> tuple[WindowCall, Tensor]:
    """Inputs whose values are exact in the case's dtype, and a gradient of o; NaN behind the last sequence."""
    generator = torch.Generator().manual_seed(case.seed)
    used = case.T
    tokens = used + (NAN_TAIL if case.lengths is not None else 0)

    def rows(draw, heads: int, dim: int) -> Tensor:
        x = draw((case.B, used, heads, dim), generator=generator, dtype=torch.float64).to(case.dtype)
        return torch.cat([x, x.new_full((case.B, tokens - used, heads, dim), float("nan"))], 1)

    q, k = rows(torch.randn, case.H, case.D), rows(torch.randn, case.H_kv, case.D)
    phi_q, phi_k = rows(torch.rand, case.H, case.K), rows(torch.rand, case.H_kv, case.K)
    v, d_o = rows(torch.randn, case.H_kv, case.V), rows(torch.randn, case.H, case.V)
    g = None
    if case.decay == "scalar":
        g = -0.2 * rows(torch.rand, case.H_kv, 1)[..., 0].float()
    if case.decay == "fixed":
        g = (-0.2 * torch.rand(case.H_kv, generator=generator)).expand(case.B, tokens, case.H_kv)
    key_valid = None
    if case.hidden:
        # What stands for hidden keys is zero, as prepend_ring leaves it.
        key_valid = torch.rand(case.B, tokens, generator=generator) < 0.7
        v, phi_k = (x.masked_fill(~key_valid[..., None, None], 0) for x in (v, phi_k))
    cu_seqlens, count = None, case.B
    if case.lengths is not None:
        cu_seqlens, count = torch.tensor([0, *case.lengths]).cumsum(0), len(case.lengths)
        cu_seqlens = cu_seqlens if case.seed % 2 else cu_seqlens.int()
    sums = None
    if case.sums:
        shapes = linear_state_shapes(count, case.H_kv, case.K, case.V, a=case.a, normalize=True)
        sums = LinearAttentionState(*(x if x is None else 10 * torch.rand(x, generator=generator) for x in shapes))
    arrange = inside_nan if case.strided else (lambda x: x)
    q, k, v, phi_q, phi_k, d_o = map(arrange, (q, k, v, phi_q, phi_k, d_o))
    call = WindowCall(
        *(q, k, v, phi_q, phi_k, g),
        log_scale=torch.randn(case.H, generator=generator) if case.log_scale else None,
        key_valid=key_valid,
        initial_sums=sums,
        cu_seqlens=cu_seqlens,
        window=case.window,
        scale=case.D**-0.5,
        softcap=case.softcap,
        a=case.a,
        b=0.7,
        path=case.path,
    )
    return call, d_o


def inside_nan(x: Tensor) -> Tensor:
    """x as a view of heads-first memory with NaN on all sides."""
    batch, tokens, heads, dim = x.shape
    buffer = x.new_full((batch + 2, heads + 2, tokens + 6, dim + 16), float("nan"))
    return buffer[1:-1, 1:-1, 3:-3, 8:-8].transpose(1, 2).copy_(x)
