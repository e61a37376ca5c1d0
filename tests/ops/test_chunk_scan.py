"""Both ways to carry sums over chunks, against the loop they stand for."""

import pytest
import torch
from numerics import assert_close

from hf_linattn.kernels.chunk_scan import scan_by_products, scan_over_chunks

FP64 = torch.float64


def loop(x: torch.Tensor, log_factor: torch.Tensor | None, reverse: bool) -> torch.Tensor:
    x = x.flip(1) if reverse else x.clone()
    factor = torch.ones(1, x.shape[1], dtype=FP64) if log_factor is None else log_factor.exp()
    factor = factor.flip(1) if reverse else factor
    for c in range(1, x.shape[1]):
        x[:, c] += factor[:, c, None] * x[:, c - 1]
    return x.flip(1) if reverse else x


@pytest.mark.parametrize("scan", [scan_over_chunks, scan_by_products])
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("decay", ["none", "per-head", "shared-with-breaks"])
@pytest.mark.parametrize("chunks", [1, 2, 63, 64, 65, 130, 4200])
def test_scan_is_the_loop(scan, reverse, decay, chunks):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, chunks, 2, generator=generator, dtype=FP64)
    log_factor = None
    if decay != "none":
        log_factor = -torch.rand(3 if decay == "per-head" else 1, chunks, generator=generator, dtype=FP64)
    if decay == "shared-with-breaks":
        log_factor[:, ::7] = float("-inf")
    expected = loop(x, log_factor, reverse)
    assert_close("scan", scan(x.clone(), log_factor, reverse), expected, FP64, factor=10)
