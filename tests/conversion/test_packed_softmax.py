"""Softmax of packed rows by document boundaries instead of an N x N mask."""

import pytest
import torch
import torch.nn.functional as F
from op_backends import needs_gpu
from tiny_models import tiny_model

from hf_linattn import LinearAttentionConfig, attention_modules, linearize, softmax_attention
from hf_linattn.conversion import packed_softmax as module
from hf_linattn.conversion.packed_softmax import PACKED_SOFTMAX_NAME, packed_softmax

POSITIONS = torch.tensor([[*range(40)], [*range(13), *range(20), *range(7)]])


def test_off_cuda_nothing_changes():
    model = linearize(tiny_model(), LinearAttentionConfig(softmax_layers=(0,)))
    with packed_softmax(model, torch.float32):
        names = {m.config._attn_implementation for m in attention_modules(model).values()}
        assert names == {"sdpa", "hf_linattn"}
        assert model.softmax_implementation == "sdpa"


def varlen_on_a_cpu(q, k, v, bounds_q, bounds_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
    """What PyTorch's kernel computes, one document at a time."""
    assert torch.equal(bounds_q, bounds_k)
    out = torch.empty_like(q)
    for first, last in zip(bounds_q[:-1].tolist(), bounds_q[1:].tolist(), strict=True):
        assert last - first <= max_q == max_k
        one = [x[first:last].transpose(0, 1) for x in (q, k, v)]
        place = torch.arange(last - first)
        seen = place <= place[:, None]
        if window_size[0] >= 0:
            seen = seen & (place >= place[:, None] - window_size[0])
        out[first:last] = F.scaled_dot_product_attention(*one, seen, scale=scale).transpose(0, 1)
    return out


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "granite", "mistral@sliding", "gemma3_text"])
def test_it_is_the_masked_softmax(monkeypatch, name):
    """On a CPU, with PyTorch's CUDA kernel stood in for; teacher and layers left alone."""
    monkeypatch.setattr(module, "varlen_attn", varlen_on_a_cpu)
    monkeypatch.setattr(module, "_runs", lambda *_: True)
    model = linearize(tiny_model(name), LinearAttentionConfig(window=4, softmax_layers=(0, 2)))
    ids = torch.randint(3, 128, (2, 40), generator=torch.Generator().manual_seed(0))
    run = {"input_ids": ids, "position_ids": POSITIONS, "use_cache": False}
    student = model(**run).logits
    with softmax_attention(model):
        teacher = model(**run).logits
    with packed_softmax(model, torch.float32):
        assert model.config._attn_implementation == PACKED_SOFTMAX_NAME
        torch.testing.assert_close(model(**run).logits, student, rtol=1e-4, atol=1e-4)
        with softmax_attention(model):
            torch.testing.assert_close(model(**run).logits, teacher, rtol=1e-4, atol=1e-4)
    assert model.config._attn_implementation == model.softmax_implementation == "sdpa"
    assert torch.equal(model(**run).logits, student)


@pytest.mark.gpu
@needs_gpu
def test_on_a_gpu_it_is_the_masked_softmax_with_its_gradients():
    model = linearize(tiny_model(dtype=torch.bfloat16), LinearAttentionConfig(window=4, softmax_layers=(0, 2))).cuda()
    ids = torch.randint(3, 128, (2, 40), generator=torch.Generator().manual_seed(0)).cuda()
    run = {"input_ids": ids, "position_ids": POSITIONS.cuda(), "use_cache": False}
    weight = model.model.layers[0].self_attn.q_proj.weight

    def logits_and_gradient():
        logits = model(**run).logits.float()
        return logits.detach(), torch.autograd.grad(logits.square().mean(), weight)[0]

    expected = logits_and_gradient()
    with packed_softmax(model, torch.bfloat16):
        assert model.config._attn_implementation == PACKED_SOFTMAX_NAME
        actual = logits_and_gradient()
    for x, y in zip(actual, expected, strict=True):
        assert (x - y).norm() / y.norm() < 3e-2
