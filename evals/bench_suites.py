"""What `hf-linattn bench --suite` measures: shapes and implementations of each suite, on a GPU and, small, on a CPU.

bars    the shapes that the kernels are held to, every implementation
sweep   N from 1K to 128K at D = 64 and 128 with the number of tokens held constant, B N = 128K and H = 8: every point
        moves the same bytes, so linear time is a flat line, and long sequences come with few heads to fill the device
paper   the experiments of arXiv 2510.21956: time and memory against N at D = 32 and against D at N = 2000, H = 16.
        B is 4 where the paper has 32: 3e5 tokens with their gradients must fit beside the baselines
decode  one token against a state (evals/bench.py)
errors  error against float64 (evals/bench.py)
"""

from typing import NamedTuple

from hf_linattn.evals.bench_entries import Shape

SUITES = ("bars", "sweep", "paper", "decode", "errors")
SWEEP_TOKENS, SWEEP_HEADS = 2**17, 8


class Suite(NamedTuple):
    """Shapes, and the names of the implementations that are measured there; None for all."""

    shapes: tuple[Shape, ...]
    impls: tuple[str, ...] | None


_BARS = Suite(
    tuple(
        Shape(*shape)
        for shape in (
            (4, 16, 1024, 128),
            (4, 16, 2048, 128),
            (4, 16, 8192, 128),
            (1, 8, 131072, 128),
            (8, 9, 2048, 64),
            (4, 32, 8192, 64),
        )
    ),
    (
        *("ours", "ours-sums", "ours-decay", "ours-sm80", "chunked"),
        *("ours-window", "ours-window-sm80", "chunked-window"),
        *("sdpa", "sdpa-flash", "sdpa-cudnn"),
        *("fla", "fla-unnormalized", "fla-fused", "fla-decay", "mlstm"),
    ),
)
_SWEEP = Suite(
    tuple(Shape(SWEEP_TOKENS >> power, SWEEP_HEADS, 1 << power, dim) for dim in (64, 128) for power in range(10, 18)),
    ("ours", "ours-sm80", "chunked", "sdpa", "sdpa-flash", "sdpa-cudnn", "fla", "fla-unnormalized", "mlstm"),
)
_PAPER = Suite(
    tuple(Shape(4, 16, n, 32) for n in (1000, 3000, 10_000, 30_000, 100_000, 300_000))
    + tuple(Shape(4, 16, 2000, d) for d in (32, 64, 128, 256, 512, 1024)),
    ("ours", "chunked", "separation", "sdpa", "sdpa-flash", "fla", "fla-unnormalized"),
)
_CPU_SHAPES = {
    "bars": ((1, 4, 256, 32), (1, 4, 512, 32), (1, 4, 1024, 32), (1, 4, 512, 64)),
    "sweep": tuple((2048 >> power, 2, 1 << power, dim) for dim in (16, 32) for power in range(7, 11)),
    "paper": tuple((1, 2, n, 16) for n in (100, 300, 1000)) + tuple((1, 2, 200, d) for d in (16, 32, 64)),
}
DECODE_SHAPES = ((64, 32, 128), (1, 32, 128), (64, 9, 64))
CPU_DECODE_SHAPES = ((8, 4, 32), (1, 4, 32))
ERROR_SHAPES = (Shape(2, 4, 512, 64), Shape(2, 4, 512, 128), Shape(2, 4, 4096, 128))
CPU_ERROR_SHAPES = (Shape(1, 2, 256, 32),)


def timing_suite(name: str, device_type: str) -> Suite:
    """The suite "bars", "sweep" or "paper" for this kind of device."""
    suite = {"bars": _BARS, "sweep": _SWEEP, "paper": _PAPER}[name]
    if device_type == "cuda":
        return suite
    return suite._replace(shapes=tuple(Shape(*shape) for shape in _CPU_SHAPES[name]))
