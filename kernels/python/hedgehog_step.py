"""The Hedgehog feature maps of q and k for one token, in one launch of the compiled kernels.

A decode step of few sequences is bound by launches, of which the two maps take about ten as PyTorch's ops. There is no
other implementation of this op: where the kernel does not run, the maps' own modules do.

The op is defined in kernels/csrc/binding_torch.cpp, its kernel in kernels/csrc/hedgehog_step.cu.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from hf_linattn.kernels.checks import check_qkv
from hf_linattn.kernels.cuda_library import has_compiled_op
from hf_linattn.kernels.cuda_linear import unit_stride
from hf_linattn.kernels.dispatch import Unsupported, choose_backend, where_grad_is_on

MAX_COLUMNS, MAX_DIM = 512, 256  # kMaxColumns and kMaxDim of csrc/hedgehog_step.cu

if has_compiled_op("hedgehog_step"):
    _hedgehog_step = torch.ops.hf_linattn.hedgehog_step.default


class HedgehogMap(NamedTuple):
    """A map of H heads: e^{m(x)} [softmax(y), softmax(-y)], y = x W + silu(x W1) W2, m(x) = x.u + bias.

    Sinks are those of hf_linattn/sinks.py: s of them make 2 C + s features of 2 C.

    Attributes:
        weight: `[H * D, C + hidden + magnitude]`, W, W1 and u side by side.
        output_weight: `[H * hidden, C]`, W2; None without a hidden layer.
        magnitude_bias: `[H]`; None without a magnitude, which is 0 then.
        sink_weight: `[H * D, sinks]`, of q with sinks only.
        sink_bias: `[H, sinks]`, likewise.
        far_length: tokens beyond which the features of q shrink; None for none.
    """

    weight: Tensor
    output_weight: Tensor | None = None
    magnitude_bias: Tensor | None = None
    sink_weight: Tensor | None = None
    sink_bias: Tensor | None = None
    far_length: int | None = None

    @property
    def columns(self) -> int:
        """C."""
        if self.output_weight is not None:
            return self.output_weight.shape[1]
        return self.weight.shape[1] - (self.magnitude_bias is not None)


@where_grad_is_on(torch.no_grad())
def hedgehog_step(
    q: Tensor,
    k: Tensor,
    positions: Tensor,
    q_map: HedgehogMap,
    k_map: HedgehogMap,
    *,
    scale: float,
    backend: str | None = None,
) -> tuple[Tensor, Tensor] | None:
    """phi_q and phi_k of one token. Inference only, one launch, CUDA-graph-capturable.

    Args:
        q: `[B, H, D]`; bfloat16, float16 or float32.
        k: `[B, H_kv, D]`.
        positions: `[B]` or `[1]` int64, the token's position in its sequence.
        q_map: the map of q.
        k_map: the map of k, of the same form, without sinks: its features say which sink a key is by its position.
        scale: multiplies q and k, which are rounded to their dtype after that, as a product in PyTorch is.
        backend: as in the other ops.

    Returns:
        phi_q `[B, H, 2 C + sinks]` and phi_k `[B, H_kv, 2 C + sinks]`, contiguous, in q's dtype; None where the
        compiled kernel does not run.

    Raises:
        ValueError, TypeError: for shapes, dtypes or devices that do not fit; the text names the argument.
    """
    check_qkv("q k v", q, k, None, 3)
    if choose_backend("hedgehog_step", q, k, backend, unsupported=_unsupported(q_map)) != "cuda":
        return None
    q_weights, k_weights = (
        [x if x is None else x.float().contiguous() for x in weights[:5]] for weights in (q_map, k_map)
    )
    pairs = zip(q_weights[:3], k_weights[:3], strict=True)
    far_length = float("inf") if q_map.far_length is None else float(q_map.far_length)
    return _hedgehog_step(
        unit_stride(q),
        unit_stride(k),
        positions.long(),
        *(x for pair in pairs for x in pair),
        *q_weights[3:],
        q_map.columns,
        scale,
        far_length,
    )


def _unsupported(q_map: HedgehogMap) -> Unsupported | None:
    """What keeps a map off the kernel, or None."""
    columns = q_map.weight.shape[1] + (0 if q_map.sink_weight is None else q_map.sink_weight.shape[1])
    hidden = q_map.weight.shape[1] - q_map.columns
    if columns <= MAX_COLUMNS and q_map.columns <= MAX_DIM and hidden <= MAX_DIM:
        return None
    expected = f"at most {MAX_DIM} columns of W, {MAX_DIM} of W1 and {MAX_COLUMNS} in all"
    return Unsupported("q_map", expected, f"{q_map.columns}, {hidden} and {columns}", "take fewer features")


def _fake_hedgehog_step(q, k, positions, weight_q, weight_k, *rest):
    sink_bias, columns = rest[5], rest[6]
    features = 2 * columns + (0 if sink_bias is None else sink_bias.shape[1])
    return tuple(x.new_empty(*x.shape[:2], features) for x in (q, k))


if has_compiled_op("hedgehog_step"):
    torch.library.register_fake("hf_linattn::hedgehog_step", _fake_hedgehog_step)
