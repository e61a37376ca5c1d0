"""The chunked loss against the formula in plain PyTorch, value and gradient."""

import pytest
import torch
import torch.nn.functional as F

from hf_linattn.conversion import distillation_loss as module
from hf_linattn.conversion.data import IGNORED_TARGET
from hf_linattn.conversion.distillation_loss import distillation_loss


def plain_loss(student, teacher, targets, kl_weight, ce_weight, temperature):
    tokens = targets.numel()
    ce = F.cross_entropy(student.flatten(0, 1), targets.flatten(), ignore_index=IGNORED_TARGET, reduction="sum")
    loss = ce_weight * ce / tokens
    if teacher is not None:
        log_p = F.log_softmax(student / temperature, -1)
        kl = F.kl_div(log_p, F.log_softmax(teacher / temperature, -1), log_target=True, reduction="sum")
        loss = loss + kl_weight * temperature**2 * kl / tokens
    return loss


def inputs(dtype=torch.float32):
    torch.manual_seed(0)
    student = (3 * torch.randn(2, 9, 50)).to(dtype).requires_grad_()
    teacher = (3 * torch.randn(2, 9, 50)).to(dtype)
    targets = torch.randint(0, 50, (2, 9))
    targets[:, ::4] = IGNORED_TARGET
    return student, teacher, targets


@pytest.mark.parametrize("rows", [1, 4, 1000])
@pytest.mark.parametrize(
    ("kl_weight", "ce_weight", "temperature"), [(1.0, 0.0, 1.0), (0.7, 0.3, 1.0), (1.0, 0.2, 2.5), (0.0, 1.0, 1.0)]
)
def test_value_and_gradient(monkeypatch, rows, kl_weight, ce_weight, temperature):
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", {"default": rows * 50})
    student, teacher, targets = inputs()
    weights = {"kl_weight": kl_weight, "ce_weight": ce_weight, "temperature": temperature}
    loss, sums = distillation_loss(student, teacher, targets, **weights)
    (2 * loss).backward()
    expected_student = student.detach().clone().requires_grad_()
    expected = plain_loss(expected_student, teacher, targets, **weights)
    (2 * expected).backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(student.grad, expected_student.grad)
    assert sums[1] == 18
    assert sums[4] == (targets != IGNORED_TARGET).sum()
    torch.testing.assert_close(sums[0] / 18, loss)


def test_cross_entropy_alone():
    student, _, targets = inputs()
    loss, sums = distillation_loss(student, None, targets, ce_weight=1.0)
    loss.backward()
    expected_student = student.detach().clone().requires_grad_()
    expected = plain_loss(expected_student, None, targets, 0.0, 1.0, 1.0)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(student.grad, expected_student.grad)
    torch.testing.assert_close(sums[3], expected * 18)


def test_gradient_keeps_the_dtype_of_the_logits():
    student, teacher, targets = inputs(torch.bfloat16)
    loss, _ = distillation_loss(student, teacher, targets, ce_weight=0.1)
    loss.backward()
    assert loss.dtype == torch.float32
    assert student.grad.dtype == torch.bfloat16
    expected_student = student.detach().float().requires_grad_()
    plain_loss(expected_student, teacher.float(), targets, 1.0, 0.1, 1.0).backward()
    torch.testing.assert_close(student.grad.float(), expected_student.grad, rtol=1e-2, atol=1e-5)


def test_equal_logits_have_no_divergence_and_no_gradient():
    student, _, targets = inputs()
    loss, _ = distillation_loss(student, student.detach().clone(), targets)
    loss.backward()
    assert loss.abs() < 1e-6
    assert student.grad.abs().max() < 1e-7


def test_the_loss_of_a_batch_is_the_mean_of_its_rows():
    student, teacher, targets = inputs()
    whole, _ = distillation_loss(student, teacher, targets, ce_weight=0.5)
    parts = [distillation_loss(student[i, None], teacher[i, None], targets[i, None], ce_weight=0.5)[0] for i in (0, 1)]
    torch.testing.assert_close(whole, sum(parts) / 2)


def test_no_full_vocabulary_float32_tensor_of_all_tokens(monkeypatch):
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", {"default": 2 * 50})
    student, teacher, targets = inputs(torch.bfloat16)
    largest = 0

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dtype == torch.float32:
                largest = max(largest, out.numel())
            return out

    with Largest():
        distillation_loss(student, teacher, targets, ce_weight=0.1)[0].backward()
    assert 0 < largest <= 2 * 50
