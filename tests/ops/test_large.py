"""Tensors of more than 2^31 elements: offsets are 64 bits wide."""

import pytest
import torch
from numerics import relative_rmse
from op_backends import on

from hf_linattn.kernels import linear_attention

HEADS, KV_HEADS, TOKENS, DIM = 128, 16, 131_328, 128


@pytest.mark.large
@on("cuda-*")
def test_more_elements_than_a_32_bit_offset_reaches(target):
    free, _ = torch.cuda.mem_get_info()
    if free < 40 * 2**30:
        pytest.skip(f"needs 40 GiB of free device memory, {free / 2**30:.0f} are")
    # Filling 4 GiB outputs with NaN first proves nothing more here.
    torch.use_deterministic_algorithms(False)
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(heads: int) -> torch.Tensor:
        return torch.rand(1, TOKENS, heads, DIM, dtype=torch.bfloat16, device="cuda", generator=generator)

    q, do = draw(HEADS), draw(HEADS)
    k, v = draw(KV_HEADS), draw(KV_HEADS)
    assert q.numel() > 2**31
    leaves = [x.requires_grad_() for x in (q, k, v)]
    o, _ = linear_attention(*leaves, scale=DIM**-0.5, backend="cuda")
    dq, dk, dv = torch.autograd.grad(o, leaves, do)
    group = HEADS // KV_HEADS
    for kv_head in (0, KV_HEADS - 1):
        one, some = slice(kv_head, kv_head + 1), slice(kv_head * group, (kv_head + 1) * group)
        parts = [x.detach()[:, :, heads].requires_grad_() for x, heads in zip(leaves, (some, one, one), strict=True)]
        o_part, _ = linear_attention(*parts, scale=DIM**-0.5, backend="cuda")
        d_parts = torch.autograd.grad(o_part, parts, do[:, :, some])
        pairs = {"o": (o[:, :, some], o_part), "dq": (dq[:, :, some], d_parts[0])}
        pairs |= {"dk": (dk[:, :, one], d_parts[1]), "dv": (dv[:, :, one], d_parts[2])}
        for name, (x, y) in pairs.items():
            # Segments may differ with the number of heads; the far end is where a wrapped offset would show.
            assert relative_rmse(x, y) < 2e-2, (name, kv_head)
            assert relative_rmse(x[:, -1000:], y[:, -1000:]) < 2e-2, (name, kv_head, "last tokens")
