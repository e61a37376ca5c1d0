"""The loss of logit distillation, over chunks of tokens: no full-vocabulary float32 tensor of all tokens ever exists.

    L = (kl_weight T^2 sum_n KL(softmax(t_n/T) || softmax(s_n/T)) + ce_weight sum_n -log softmax(s_n)[target_n]) / N

over N tokens, with gradient kl_weight T (softmax(s/T) - softmax(t/T)) + ce_weight (softmax(s) - onehot), all over N.
Both sums are divided by the number of all tokens, also where a target is missing, so that the loss of a batch is the
mean of the losses of its parts, whichever processes and micro-batches they fall to.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_linattn.conversion.data import IGNORED_TARGET

# Elements of a chunk, of which a handful are alive at a time in float32: few enough for a CPU's cache, many enough to
# keep a GPU busy.
CHUNK_ELEMENTS = {"cpu": 2**18, "default": 2**24}


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    targets: Tensor,
    *,
    kl_weight: float = 1.0,
    ce_weight: float = 0.0,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Scalar loss, and the sums behind it for the metrics.

    Args:
        student_logits: `[B, T, V]`, any floating dtype; its gradient has the same dtype.
        teacher_logits: `[B, T, V]`, no gradient; None trains on cross-entropy alone.
        targets: `[B, T]` int64, the next token or IGNORED_TARGET; a token without target still counts for KL.
        kl_weight, ce_weight, temperature: as in the formula above.

    Returns:
        `(loss [], sums [5])`; sums, float32, no gradient: loss x tokens, tokens, KL, cross-entropy, targets.
    """
    return _ChunkedLoss.apply(student_logits, teacher_logits, targets, kl_weight, ce_weight, temperature)


class _ChunkedLoss(torch.autograd.Function):
    """The gradient depends on nothing but the logits, so the forward writes it while it has their softmax at hand."""

    @staticmethod
    def forward(ctx, student_logits, teacher_logits, targets, kl_weight, ce_weight, temperature):
        vocab_size = student_logits.shape[-1]
        student = student_logits.reshape(-1, vocab_size)
        teacher = None if teacher_logits is None else teacher_logits.reshape(-1, vocab_size)
        targets = targets.reshape(-1)
        num_tokens = student.shape[0]
        gradient = torch.empty_like(student) if ctx.needs_input_grad[0] else None
        sums = torch.zeros(5, dtype=torch.float32, device=student.device)
        rows = max(1, CHUNK_ELEMENTS.get(student.device.type, CHUNK_ELEMENTS["default"]) // vocab_size)
        for start in range(0, num_tokens, rows):
            chunk = slice(start, start + rows)
            kl, ce, chunk_gradient = _chunk_loss(
                student[chunk],
                None if teacher is None else teacher[chunk],
                targets[chunk],
                kl_weight / num_tokens,
                ce_weight / num_tokens,
                temperature,
            )
            sums[2] += kl
            sums[3] += ce
            if gradient is not None:
                gradient[chunk] = chunk_gradient
        sums[0] = kl_weight * temperature**2 * sums[2] + ce_weight * sums[3]
        sums[1] = num_tokens
        sums[4] = (targets != IGNORED_TARGET).sum()
        ctx.gradient, ctx.logits_shape = gradient, student_logits.shape
        ctx.mark_non_differentiable(sums)
        return sums[0] / num_tokens, sums

    @staticmethod
    @once_differentiable
    def backward(ctx, d_loss, _):
        # Scaled in place: a second tensor of all tokens by the vocabulary is what this function avoids.
        gradient, ctx.gradient = ctx.gradient, None
        return gradient.mul_(d_loss).view(ctx.logits_shape), None, None, None, None, None


def _chunk_loss(
    student: Tensor, teacher: Tensor | None, targets: Tensor, kl_weight: float, ce_weight: float, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(sum of KL, sum of cross-entropy, weighted gradient) of `[n, V]` logits; `[]`, `[]`, `[n, V]`, float32.

    Passes over `[n, V]` are what this costs, so softmaxes are shared and overwritten.
    """
    log_p = torch.log_softmax(student, -1, dtype=torch.float32)
    has_target = (targets != IGNORED_TARGET).unsqueeze(-1)
    index = targets.clamp_min(0).unsqueeze(-1)
    ce = -log_p.gather(-1, index).masked_fill(~has_target, 0).sum()
    ce_weights = has_target * ce_weight
    if teacher is None:
        kl = torch.zeros_like(ce)
        gradient = log_p.exp_().mul_(ce_weights)
    elif temperature == 1:
        kl, p_teacher = _kl(log_p, torch.log_softmax(teacher, -1, dtype=torch.float32))
        gradient = log_p.exp_().mul_(ce_weights + kl_weight).sub_(p_teacher, alpha=kl_weight)
    else:
        softened = torch.log_softmax(student.float() / temperature, -1)
        kl, p_teacher = _kl(softened, torch.log_softmax(teacher.float() / temperature, -1))
        gradient = softened.exp_().sub_(p_teacher).mul_(kl_weight * temperature).add_(log_p.exp_().mul_(ce_weights))
    gradient.scatter_(-1, index, gradient.gather(-1, index) - ce_weights)
    return kl, ce, gradient


def _kl(log_p_student: Tensor, log_p_teacher: Tensor) -> tuple[Tensor, Tensor]:
    """(sum of KL(teacher || student), teacher's probabilities); overwrites `log_p_teacher`."""
    p_teacher = log_p_teacher.exp()
    return log_p_teacher.sub_(log_p_student).mul_(p_teacher).sum(), p_teacher
