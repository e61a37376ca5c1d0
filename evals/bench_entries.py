"""What `hf-linattn bench` compares: our implementations, PyTorch's softmax, FLA and mlstm_kernels where installed.

`ours` is the compiled kernels, `ours-sm80` the portable ones where the device would take those of Hopper; these and
`chunked` come with -window too: window_linear_attention with a window of 64 and features as wide as q and k. Names
ending in -sums do not normalise, those in -decay have one fixed decay a head and do not normalise either, which is the
only form that FLA offers with decay. `separation` is the baseline of arXiv 2510.21956: autograd over the running sums
of k v^T, all N of them kept.
"""

import importlib.util
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_linattn.kernels import linear_attention, window_linear_attention
from hf_linattn.kernels.cuda_library import CUDA_PATH_VARIABLE, compiled_kernels_problem

BENCH_WINDOW = 64
# Forward flop of one call beyond which softmax is left out: a quarter of a second on an H100.
MAX_SOFTMAX_FLOP = 1e14
MAX_STATE_SHARE = 0.5
CPU_STATE_BYTES = 2**28


class Shape(NamedTuple):
    """B sequences of N tokens, H heads of D dimensions, query and kv alike."""

    B: int
    H: int
    N: int
    D: int


class BenchEntry(NamedTuple):
    """One implementation.

    Attributes:
        op: the op it is listed under.
        impl: its name.
        call: function of its inputs and what `extras` gives.
        inputs: how many tensors of q's size it takes and has gradients of: q, k, v, and features of the window op.
        heads_first: whether it takes `[B, H, N, D]`; `[B, N, H, D]` if not.
        extras: further arguments for inputs of this shape, made outside the timing.
        environment: variables set while it runs.
        fits: whether a shape is worth trying in this dtype on this device.
    """

    op: str
    impl: str
    call: Callable[..., Tensor]
    heads_first: bool = False
    inputs: int = 3
    extras: Callable[[Shape, torch.dtype, torch.device], tuple] = lambda shape, dtype, device: ()
    environment: Mapping[str, str] = {}
    fits: Callable[[Shape, torch.dtype, torch.device], bool] = lambda shape, dtype, device: True


def bench_entries(device: torch.device, dtype: torch.dtype) -> list[BenchEntry]:
    """Implementations that can run on this device, ours first."""
    entries = [*_compiled_entries(device, dtype), *_chunked_entries(), *_softmax_entries(device, dtype)]
    if device.type == "cuda":
        entries += [*_fla_entries(), *_mlstm_entries()]
    return [*entries, BenchEntry("linear_attention", "separation", _separation, True, fits=_separation_fits)]


def minimal_flop(op: str, shape: Shape) -> tuple[float, float]:
    """Floating point operations that (forward, forward + backward) cannot do without, a product and a sum being two.

    Linear attention, per token and head: S += k v^T and q S forward, 4 D^2; backward S once more, S do, R += q do^T,
    R v and R^T k, 10 D^2. What a chunked form does inside its chunks comes on top and is not counted. Causal softmax:
    half of q k^T and p v forward, 2 N D per token, and two and a half times that backward. The window op: both
    products for the keys in each query's window, 4 D a pair, and two and a half times that backward; and what linear
    attention takes for the tokens that have older keys, all but the first w.
    """
    tokens = shape.B * shape.H * shape.N
    if op == "softmax_attention":
        return 2 * tokens * shape.N * shape.D, 7 * tokens * shape.N * shape.D
    if op == "window_linear_attention":
        inside = min(BENCH_WINDOW, shape.N)
        pairs = shape.B * shape.H * (inside * shape.N - inside * (inside - 1) // 2)
        far_tokens = shape.B * shape.H * (shape.N - inside)
        work = pairs * shape.D + far_tokens * shape.D**2
        return 4 * work, 14 * work
    return 4 * tokens * shape.D**2, 14 * tokens * shape.D**2


def _compiled_entries(device: torch.device, dtype: torch.dtype) -> list[BenchEntry]:
    return [*_compiled_linear_entries(device, dtype), *_compiled_window_entries(device, dtype)]


def _compiled_linear_entries(device: torch.device, dtype: torch.dtype) -> list[BenchEntry]:
    if compiled_kernels_problem(device, dtype, "linear_attention") is not None:
        return []
    options = {"fits": lambda shape, dtype, device: shape.D <= 256}
    entries = [
        BenchEntry("linear_attention", "ours", _ours("cuda"), **options),
        BenchEntry("linear_attention", "ours-sums", _ours("cuda", normalize=False), **options),
        BenchEntry("linear_attention", "ours-decay", _ours_decay("cuda"), extras=_fixed_decay, **options),
    ]
    if torch.cuda.get_device_capability(device)[0] == 9:
        options["environment"] = {CUDA_PATH_VARIABLE: "sm80"}
        entries.append(BenchEntry("linear_attention", "ours-sm80", _ours("cuda"), **options))
    return entries


def _compiled_window_entries(device: torch.device, dtype: torch.dtype) -> list[BenchEntry]:
    op = "window_linear_attention"
    if compiled_kernels_problem(device, dtype, op) is not None:
        return []

    def fits(shape: Shape, dtype: torch.dtype, device: torch.device) -> bool:
        return compiled_kernels_problem(device, dtype, op, shape.D, shape.D, shape.D) is None

    options = {"inputs": 5, "fits": fits}
    entries = [BenchEntry(op, "ours-window", _ours_window("cuda"), **options)]
    if torch.cuda.get_device_capability(device)[0] == 9:
        portable = {CUDA_PATH_VARIABLE: "sm80"}
        entries.append(BenchEntry(op, "ours-window-sm80", _ours_window("cuda"), environment=portable, **options))
    return entries


def _chunked_entries() -> list[BenchEntry]:
    return [
        BenchEntry("linear_attention", "chunked", _ours("chunked"), fits=_chunk_states_fit),
        BenchEntry(
            "window_linear_attention", "chunked-window", _ours_window("chunked"), inputs=5, fits=_chunk_states_fit
        ),
    ]


def _ours(backend: str, normalize: bool = True) -> Callable[..., Tensor]:
    return lambda q, k, v: linear_attention(q, k, v, normalize=normalize, backend=backend)[0]


def _ours_window(backend: str) -> Callable[..., Tensor]:
    def call(*inputs: Tensor) -> Tensor:
        scale = inputs[0].shape[-1] ** -0.5
        return window_linear_attention(*inputs, window=BENCH_WINDOW, scale=scale, backend=backend)[0]

    return call


def _ours_decay(backend: str) -> Callable[..., Tensor]:
    return lambda q, k, v, gamma: linear_attention(q, k, v, g_gamma=gamma, normalize=False, backend=backend)[0]


def _fixed_decay(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Tensor]:
    """RetNet's log(1 - 2^(-5 - h))."""
    return ((1 - 2.0 ** (-5 - torch.arange(shape.H, dtype=torch.float64) % 8)).log().float().to(device),)


def _softmax_entries(device: torch.device, dtype: torch.dtype) -> list[BenchEntry]:
    def entry(impl: str, kernel: torch.nn.attention.SDPBackend | None) -> BenchEntry:
        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            if kernel is None:
                return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
            with torch.nn.attention.sdpa_kernel(kernel):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

        return BenchEntry("softmax_attention", impl, call, fits=_softmax_fits)

    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        kernels = torch.nn.attention.SDPBackend
        return [entry("sdpa-flash", kernels.FLASH_ATTENTION), entry("sdpa-cudnn", kernels.CUDNN_ATTENTION)]
    return [entry("sdpa", None)]


def _fla_entries() -> list[BenchEntry]:
    if importlib.util.find_spec("fla") is None:
        return []
    from fla.ops.linear_attn import chunk_linear_attn, fused_chunk_linear_attn
    from fla.ops.simple_gla import chunk_simple_gla

    def linear(function: Callable, normalize: bool) -> Callable[..., Tensor]:
        return lambda q, k, v: function(q, k, v, scale=1.0, normalize=normalize)[0]

    def decay(q: Tensor, k: Tensor, v: Tensor, gamma: Tensor) -> Tensor:
        return chunk_simple_gla(q, k, v, g_gamma=gamma, scale=1.0)[0]

    return [
        BenchEntry("linear_attention", "fla", linear(chunk_linear_attn, True)),
        BenchEntry("linear_attention", "fla-unnormalized", linear(chunk_linear_attn, False)),
        BenchEntry("linear_attention", "fla-fused", linear(fused_chunk_linear_attn, True)),
        BenchEntry("linear_attention", "fla-decay", decay, extras=_fixed_decay),
    ]


def _mlstm_entries() -> list[BenchEntry]:
    if importlib.util.find_spec("mlstm_kernels") is None:
        return []
    from mlstm_kernels.torch.chunkwise.triton_xl_chunk import mlstm_chunkwise__xl_chunk

    def call(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor) -> Tensor:
        return mlstm_chunkwise__xl_chunk(q, k, v, i, f, autocast_kernel_dtype=q.dtype)

    def gates(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        generator = torch.Generator(device).manual_seed(1)
        size = (shape.B, shape.H, shape.N)
        i, f = (torch.randn(size, generator=generator, dtype=torch.float32, device=device) for _ in range(2))
        return i.to(dtype), (f + 3).to(dtype)

    return [BenchEntry("linear_attention", "mlstm", call, heads_first=True, extras=gates)]


def _separation(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`[B, H, N, D]`; memory O(N D^2)."""
    sums = (k[..., :, None] * v[..., None, :]).cumsum(2)
    den = (q * k.cumsum(2)).sum(-1, keepdim=True)
    return (q[..., None, :] @ sums)[..., 0, :] / den


def _separation_fits(shape: Shape, dtype: torch.dtype, device: torch.device) -> bool:
    # Products, sums, and in the backward gradients of both.
    return 6 * shape.B * shape.H * shape.N * shape.D**2 * dtype.itemsize <= _state_bytes(device)


def _chunk_states_fit(shape: Shape, dtype: torch.dtype, device: torch.device) -> bool:
    # The PyTorch form holds a few float32 states of every chunk of 64 tokens.
    return _state_bytes(device) >= 6 * shape.B * shape.H * (shape.N / 64) * shape.D**2 * 4


def _softmax_fits(shape: Shape, dtype: torch.dtype, device: torch.device) -> bool:
    # Flash kernels end at 256 dimensions.
    is_slow = minimal_flop("softmax_attention", shape)[0] > MAX_SOFTMAX_FLOP
    return not is_slow and (device.type != "cuda" or shape.D <= 256)


def _state_bytes(device: torch.device) -> float:
    if device.type != "cuda":
        return CPU_STATE_BYTES
    return MAX_STATE_SHARE * torch.cuda.get_device_properties(device).total_memory
