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

# Elements of a chunk: 64 MiB in float32, of which a handful are alive at a time.
CHUNK_ELEMENTS = 2**24


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
        rows = max(1, CHUNK_ELEMENTS // vocab_size)
        for start in range(0, num_tokens, rows):
            chunk = slice(start, start + rows)
            s = student[chunk].float()
            chunk_gradient = None
            if teacher is not None:
                kl_sum, chunk_gradient = _kl(s, teacher[chunk].float(), temperature, kl_weight)
                sums[2] += kl_sum
            # Cross-entropy is measured even at weight 0: it is the loss that users of language models know.
            ce_sum, ce_gradient = _cross_entropy(s, targets[chunk], ce_weight)
            sums[3] += ce_sum
            if gradient is not None:
                if ce_gradient is not None:
                    chunk_gradient = ce_gradient if chunk_gradient is None else chunk_gradient.add_(ce_gradient)
                gradient[chunk] = chunk_gradient.div_(num_tokens) if chunk_gradient is not None else 0
        sums[1] = num_tokens
        sums[4] = (targets != IGNORED_TARGET).sum()
        sums[0] = kl_weight * temperature**2 * sums[2] + ce_weight * sums[3]
        loss = sums[0] / num_tokens
        ctx.gradient, ctx.logits_shape = gradient, student_logits.shape
        ctx.mark_non_differentiable(sums)
        return loss, sums

    @staticmethod
    @once_differentiable
    def backward(ctx, d_loss, _):
        # Scaled in place: a second tensor of all tokens by the vocabulary is what this function avoids.
        gradient, ctx.gradient = ctx.gradient, None
        return gradient.mul_(d_loss).view(ctx.logits_shape), None, None, None, None, None


def _kl(student: Tensor, teacher: Tensor, temperature: float, weight: float) -> tuple[Tensor, Tensor]:
    """(sum of KL(teacher || student), gradient of weight T^2 times it); `[n, V]` float32 each."""
    log_p_student = torch.log_softmax(student / temperature, -1)
    log_p_teacher = torch.log_softmax(teacher / temperature, -1)
    p_teacher = log_p_teacher.exp()
    kl_sum = (p_teacher * log_p_teacher.sub_(log_p_student)).sum()
    return kl_sum, log_p_student.exp_().sub_(p_teacher).mul_(weight * temperature)


def _cross_entropy(student: Tensor, targets: Tensor, weight: float) -> tuple[Tensor, Tensor | None]:
    """(sum over tokens with target of -log p, gradient of weight times it)."""
    has_target = targets != IGNORED_TARGET
    index = targets.clamp_min(0).unsqueeze(-1)
    ce = student.logsumexp(-1) - student.gather(-1, index).squeeze(-1)
    ce_sum = ce.masked_fill(~has_target, 0).sum()
    if weight == 0:
        return ce_sum, None
    gradient = student.softmax(-1)
    gradient.scatter_(-1, index, gradient.gather(-1, index) - 1)
    return ce_sum, gradient.mul_(has_target.unsqueeze(-1) * weight)
