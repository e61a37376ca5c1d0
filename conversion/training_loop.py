"""The Accelerate loop that logit distillation and fine-tuning share.

One step: `gradient_accumulation` micro-batches, one clipped AdamW update, one record. It runs on one device, under
`accelerate launch` and under torchrun on CPUs. Batches, learning rate, dropout and random state are functions of
(seed, step), so a run resumed from a checkpoint logs what the unbroken one would have logged.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from hf_linattn import linear_attention_modules, set_attention_dropout
from hf_linattn.conversion.config import TrainingConfig
from hf_linattn.conversion.data import Batch, Corpus, RowSampler
from hf_linattn.conversion.progress import StageProgress
from hf_linattn.conversion.run_state import RunState
from hf_linattn.conversion.schedule import decline, learning_rate_factor, seed_step, set_learning_rates, stage_seed
from hf_linattn.errors import UserError

LossFunction = Callable[[nn.Module, Batch], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Phase:
    """Steps `first` to `last - 1`, of `rows` rows per process and micro-batch."""

    first: int
    last: int
    sequence_length: int
    rows: int


def train(
    accelerator: Accelerator,
    student: nn.Module,
    loss_of: LossFunction,
    corpus: Corpus,
    config: TrainingConfig,
    run: RunState,
    *,
    stage: str,
    seed: int = 0,
    checkpoint_every: int = 200,
    first_step: int = 0,
) -> nn.Module:
    """Train the trainable parameters of `student` in place.

    Args:
        accelerator (`Accelerator`): device and processes.
        student (`nn.Module`): from `adapters.make_trainable`.
        loss_of (`Callable`): (prepared student, batch) -> (loss, sums), as `distillation_loss` gives them.
        corpus (`Corpus`): rows are cut from it.
        config (`TrainingConfig`): budget and optimizer.
        run (`RunState`): gets metrics and checkpoints; its checkpoint is loaded when `first_step` > 0.
        stage (`str`): its name in the metrics.
        seed, checkpoint_every, first_step (`int`): as in `transfer_attention`.

    Returns:
        The student as Accelerate prepared it.

    Raises:
        UserError: the loss or the gradient is NaN or infinite; nothing is updated then.
    """
    phases = training_phases(config, accelerator.num_processes)
    num_steps = phases[-1].last
    if config.gradient_checkpointing:
        _enable_checkpointing(student)
    accelerator.gradient_accumulation_steps = config.gradient_accumulation
    _tell_deepspeed(accelerator, config)
    prepared, optimizer = accelerator.prepare(student, torch.optim.AdamW(_groups(student, config), betas=config.betas))
    module = accelerator.unwrap_model(prepared)
    if first_step:
        run.load(module, optimizer.optimizer)
    prepared.train()
    samplers = [
        RowSampler(corpus, phase.sequence_length, stage_seed(seed, stage), config.repeat_fraction) for phase in phases
    ]
    with StageProgress(run, stage, num_steps, first_step) as progress:
        for step in range(first_step, num_steps):
            seed_step(seed, step, accelerator.process_index)
            factor = learning_rate_factor(step, num_steps, config.warmup, config.schedule)
            set_learning_rates(optimizer, factor)
            if config.attention_dropout:
                fade = decline(step, num_steps, config.attention_dropout_schedule)
                set_attention_dropout(module, config.attention_dropout * fade)
            batches = _micro_batches(accelerator, phases, samplers, config.gradient_accumulation, step)
            sums, norm = _update(
                accelerator, prepared, optimizer, loss_of, batches, config.clip, f"{stage}: step {step + 1}"
            )
            record = _record(sums, norm, config.learning_rate * factor)
            record["tokens"] = _tokens_after(
                step + 1, phases, accelerator.num_processes * config.gradient_accumulation
            )
            progress.step(step + 1, int(sums[1]), record)
            if (step + 1) % checkpoint_every == 0 or step + 1 == num_steps:
                run.save(stage, step + 1, progress.seconds, module, optimizer.optimizer)
    return prepared


def training_phases(config: TrainingConfig, num_processes: int) -> list[Phase]:
    """The steps that `config.tokens` come to: short rows, then long ones for `long_fraction` of the tokens."""
    micro_batches = num_processes * config.gradient_accumulation
    short_tokens = config.batch_size * config.sequence_length * micro_batches
    if config.long_sequence_length is None or config.long_fraction == 0:
        return [Phase(0, max(1, config.tokens // short_tokens), config.sequence_length, config.batch_size)]
    rows = max(1, config.batch_size * config.sequence_length // config.long_sequence_length)
    long_tokens = rows * config.long_sequence_length * micro_batches
    num_short = int(config.tokens * (1 - config.long_fraction)) // short_tokens
    num_long = max(1, int(config.tokens * config.long_fraction) // long_tokens)
    short = Phase(0, num_short, config.sequence_length, config.batch_size)
    long = Phase(num_short, num_short + num_long, config.long_sequence_length, rows)
    return [phase for phase in (short, long) if phase.first < phase.last]


def logits_of(model: nn.Module, batch: Batch, dtype: torch.dtype) -> Tensor:
    """`[B, T, V]` logits; bfloat16 models run under autocast, since what trains in them is float32."""
    device_type = batch.input_ids.device.type
    with torch.autocast(device_type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        return model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits


def to_device(batch: Batch, device: torch.device) -> Batch:
    """`batch` with its tensors on `device`."""
    return Batch(*(tensor.to(device, non_blocking=True) for tensor in batch))


def _enable_checkpointing(student: nn.Module) -> None:
    # Transformers 5.23 renamed it; reentrant checkpointing would find no input that requires a gradient.
    name = "activation" if hasattr(student, "activation_checkpointing_enable") else "gradient"
    enable = getattr(student, f"{name}_checkpointing_enable")
    enable(**{f"{name}_checkpointing_kwargs": {"use_reentrant": False}})


def _groups(student: nn.Module, config: TrainingConfig) -> list[dict]:
    """The new parameters in one group, LoRA or weights in the other."""
    new = {id(p) for module in linear_attention_modules(student).values() for p in module.parameters()}
    trainable = [p for p in student.parameters() if p.requires_grad]
    groups = [
        {
            "params": [p for p in trainable if id(p) not in new],
            "peak_lr": config.learning_rate,
            "weight_decay": config.weight_decay,
        },
        {
            "params": [p for p in trainable if id(p) in new],
            "peak_lr": config.feature_map_learning_rate,
            "weight_decay": 0.0,
        },
    ]
    return [group for group in groups if group["params"]]


def _tell_deepspeed(accelerator: Accelerator, config: TrainingConfig) -> None:
    """DeepSpeed wants to know the batch, which it otherwise reads off a DataLoader."""
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    if plugin is not None:
        plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = config.batch_size
        plugin.deepspeed_config["gradient_accumulation_steps"] = config.gradient_accumulation


def _micro_batches(
    accelerator: Accelerator, phases: list[Phase], samplers: list[RowSampler], accumulation: int, step: int
) -> Iterator[Batch]:
    """This process's micro-batches of `step`: the rows of a step are dealt to micro-batches, then to processes."""
    phase, sampler = next((p, s) for p, s in zip(phases, samplers, strict=True) if step < p.last)
    for micro in range(accumulation):
        first = ((step - phase.first) * accumulation + micro) * accelerator.num_processes + accelerator.process_index
        yield to_device(sampler.batch(first * phase.rows, phase.rows), accelerator.device)


def _update(
    accelerator: Accelerator,
    prepared: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_of: LossFunction,
    batches: Iterable[Batch],
    clip: float,
    where: str,
) -> tuple[list[float], float]:
    """One optimizer step; returns the sums over all processes and micro-batches, and the gradient norm."""
    sums, norm = torch.zeros(5, device=accelerator.device), None
    values: list[float] = []
    for batch in batches:
        with accelerator.accumulate(prepared):
            loss, parts = loss_of(prepared, batch)
            accelerator.backward(loss)
            sums += parts
            if accelerator.sync_gradients:
                trainable = [p for p in prepared.parameters() if p.requires_grad]
                norm = accelerator.clip_grad_norm_(trainable, clip)
                values = accelerator.reduce(sums, "sum").tolist()
                norm = math.nan if norm is None else float(norm)
                _check_finite(values[0] / values[1], norm, where)
            optimizer.step()
            optimizer.zero_grad()
    return values, norm


def _check_finite(loss: float, norm: float, where: str) -> None:
    if math.isfinite(loss) and not math.isinf(norm):
        return
    what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient norm is {norm}"
    raise UserError(
        f"{where}: {what}. Nothing was updated, and the last checkpoint is kept. Start again with --overwrite and a "
        "lower learning_rate and feature_map_learning_rate, or with dtype=float32"
    )


def _record(sums: list[float], norm: float, learning_rate: float) -> dict:
    loss, tokens, kl, ce, targets = sums
    record = {"loss": loss / tokens, "kl": kl / tokens, "ce": ce / max(targets, 1), "lr": learning_rate}
    return record | ({} if math.isnan(norm) else {"gradient_norm": norm})


def _tokens_after(steps: int, phases: list[Phase], micro_batches: int) -> int:
    return sum(max(0, min(steps, p.last) - p.first) * p.rows * p.sequence_length * micro_batches for p in phases)


@contextlib.contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Within: `module` is in evaluation mode."""
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)
