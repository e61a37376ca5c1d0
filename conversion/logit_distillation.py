"""Logit distillation: the converted model learns the next-token distribution of the model it came from.

    loss = kl_weight T^2 KL(teacher || student) + ce_weight cross-entropy           (distillation_loss.py)

The teacher is the same weights: softmax attention switched back on, LoRA switched off. Only when the weights train
(`full`) is a frozen copy of the original needed.
"""

import contextlib
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor, nn

from hf_linattn import linear_attention_modules, softmax_attention, window_only
from hf_linattn.conversion.config import DistillationConfig
from hf_linattn.conversion.data import Batch, Corpus, stack_rows
from hf_linattn.conversion.distillation_loss import distillation_loss
from hf_linattn.conversion.run_state import RunState
from hf_linattn.conversion.training_loop import evaluation_mode, logits_of, to_device, train

STAGE = "logit_distillation"


def distill_logits(
    accelerator: Accelerator,
    student: nn.Module,
    corpus: Corpus,
    config: DistillationConfig,
    run: RunState,
    *,
    dtype: torch.dtype,
    teacher: nn.Module | None = None,
    seed: int = 0,
    checkpoint_every: int = 200,
    first_step: int = 0,
) -> nn.Module:
    """Train `student` in place.

    Args:
        accelerator (`Accelerator`): device and processes.
        student (`nn.Module`): from `adapters.make_trainable`.
        corpus (`Corpus`): rows are cut from it.
        config (`DistillationConfig`): budget, optimizer and loss weights.
        run (`RunState`): gets metrics and checkpoints.
        dtype (`torch.dtype`): to compute in; bfloat16 means autocast.
        teacher (`nn.Module`, *optional*): frozen original; needed when the weights train, else the student's own.
        seed, checkpoint_every, first_step (`int`): as in `transfer_attention`.

    Returns:
        The student as Accelerate prepared it.

    Raises:
        UserError: the loss or the gradient is NaN or infinite.
    """

    def loss_of(prepared: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        target = teacher_logits(prepared, batch, dtype, teacher, accelerator.unwrap_model(prepared))
        return distillation_loss(
            logits_of(prepared, batch, dtype),
            target,
            batch.targets,
            kl_weight=config.kl_weight,
            ce_weight=config.ce_weight,
            temperature=config.temperature,
        )

    return train(
        accelerator,
        student,
        loss_of,
        corpus,
        config,
        run,
        stage=STAGE,
        seed=seed,
        checkpoint_every=checkpoint_every,
        first_step=first_step,
    )


@torch.no_grad()
def teacher_logits(
    prepared: nn.Module,
    batch: Batch,
    dtype: torch.dtype,
    teacher: nn.Module | None = None,
    module: nn.Module | None = None,
) -> Tensor:
    """`[B, T, V]` logits of the original model, in its own arithmetic.

    Args:
        prepared (`nn.Module`): the student, wrapped or not; runs as its own teacher when `teacher` is None.
        module (`nn.Module`, *optional*): the student without wrapper, when `prepared` has one.
    """
    if teacher is not None:
        return logits_of(teacher, batch, dtype)
    with as_teacher(prepared if module is None else module):
        return logits_of(prepared, batch, dtype)


@contextlib.contextmanager
def as_teacher(student: nn.Module) -> Iterator[None]:
    """Within: `student` (not wrapped) computes what the model did before conversion: softmax, no LoRA, no dropout."""
    adapters_off = student.disable_adapter() if isinstance(student, PeftModel) else contextlib.nullcontext()
    with evaluation_mode(student), adapters_off, softmax_attention(student):
        yield


@torch.no_grad()
def measure_divergence(
    accelerator: Accelerator,
    student: nn.Module,
    held_out: Corpus,
    *,
    sequence_length: int,
    num_rows: int,
    dtype: torch.dtype,
    teacher: nn.Module | None = None,
) -> dict[str, float]:
    """Mean over held-out tokens, on this process, one row at a time.

    Returns:
        `kl` of the student to the teacher, `ce` of the student, `teacher_ce`, and, with a window, `window_only_kl`:
        the divergence without the linear part, which the linear part has to beat.
    """
    num_rows = min(num_rows, len(held_out) // sequence_length)
    if num_rows == 0:
        return {}
    has_window = all(m.window for m in linear_attention_modules(student).values())
    sums = torch.zeros(4, 5, device=accelerator.device)
    with evaluation_mode(student):
        for row in range(num_rows):
            batch = to_device(stack_rows(held_out, [row], sequence_length), accelerator.device)
            target = teacher_logits(student, batch, dtype, teacher)
            sums[0] += distillation_loss(logits_of(student, batch, dtype), target, batch.targets)[1]
            sums[1] += distillation_loss(target, None, batch.targets)[1]
            if has_window:
                with window_only(student):
                    sums[2] += distillation_loss(logits_of(student, batch, dtype), target, batch.targets)[1]
    _, tokens, kl, ce, targets = sums[0].tolist()
    measured = {"kl": kl / tokens, "ce": ce / targets, "teacher_ce": float(sums[1, 3]) / targets}
    return measured | ({"window_only_kl": float(sums[2, 2]) / tokens} if has_window else {})
