"""Attention transfer: each converted layer learns to repeat its own softmax attention, on the teacher's own inputs.

One forward of the model does it for all layers. In each converted layer the attention function computes the teacher's
output with the model's own softmax and passes that on, so every layer sees what it would see in the teacher; beside
it, it computes the student's output, its loss

    L = mean over rows of  sum |y_student - y_teacher|^2 / sum |y_teacher|^2      (normalized_mse; fp32)

and its gradient, at once: no second copy of the weights, no backward through the rest of the model, memory for one
layer. Only the new parameters (feature maps, log_scale, gates) train. Rows are full, so every token is valid.
"""

import sys

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_linattn import dispatch_to, linear_attention_modules
from hf_linattn.attention import linear_attention_forward
from hf_linattn.conversion.attention_weights import attention_weights_divergence
from hf_linattn.conversion.calibration import LogScaleCalibration, far_keys_of
from hf_linattn.conversion.config import TransferConfig
from hf_linattn.conversion.data import Batch, Corpus, RowSampler
from hf_linattn.conversion.progress import StageProgress
from hf_linattn.conversion.run_state import RunState
from hf_linattn.conversion.schedule import learning_rate_factor, seed_step, set_learning_rates, stage_seed
from hf_linattn.errors import UserError

STAGE = "attention_transfer"
TRANSFER_NAME = "hf_linattn_transfer"


def transfer_attention(
    accelerator: Accelerator,
    model: PreTrainedModel,
    corpus: Corpus,
    config: TransferConfig,
    run: RunState,
    *,
    seed: int = 0,
    checkpoint_every: int = 200,
    first_step: int = 0,
) -> None:
    """Train the new parameters of `model` in place.

    Args:
        accelerator (`Accelerator`): gradients are averaged over its processes.
        model (`PreTrainedModel`): converted, on the accelerator's device. Its own weights are not changed.
        corpus (`Corpus`): training rows are cut from it.
        config (`TransferConfig`): budget and optimizer.
        run (`RunState`): gets metrics and checkpoints; its checkpoint is loaded when `first_step` > 0.
        seed (`int`): of the order of rows.
        checkpoint_every (`int`): steps between checkpoints.
        first_step (`int`): steps already done.

    Raises:
        UserError: a loss is NaN or infinite, or the corpus is shorter than a row.
    """
    model.requires_grad_(False)
    layers = nn.ModuleDict({str(i): module for i, module in linear_attention_modules(model).items()})
    layers.requires_grad_(True)
    if not list(layers.parameters()):
        return
    model.eval()
    rows = config.batch_size
    step_tokens = accelerator.num_processes * rows * config.sequence_length
    num_steps = max(1, config.tokens // step_tokens)
    sampler = RowSampler(corpus, config.sequence_length, stage_seed(seed, STAGE), config.repeat_fraction)
    optimizer = torch.optim.AdamW(_parameter_groups(layers, config), betas=config.betas, fused=False)

    def batch_of(step: int) -> Batch:
        first = step * accelerator.num_processes * rows + accelerator.process_index * rows
        return Batch(*(t.to(accelerator.device, non_blocking=True) for t in sampler.batch(first, rows)))

    if first_step:
        run.load(layers, optimizer)
    elif config.calibrate:
        calibrate_log_scale(accelerator, model, batch_of(0))
    observer = LayerwiseTransfer(
        model.softmax_implementation, config.loss, config.weights_loss, config.weights_queries
    )
    with StageProgress(run, STAGE, num_steps, first_step) as progress:
        for step in range(first_step, num_steps):
            # Processes draw the same queries for `weights_loss`, as one with all their rows would.
            seed_step(seed, step, process=0)
            factor = learning_rate_factor(step, num_steps, config.warmup, config.schedule)
            set_learning_rates(optimizer, factor)
            optimizer.zero_grad()
            observe(model, observer, batch_of(step))
            losses = _average_over_processes(accelerator, layers, observer.losses)
            _check_finite(losses, step, run)
            for layer in layers.values():
                torch.nn.utils.clip_grad_norm_(layer.parameters(), config.clip)
            optimizer.step()
            values = list(losses.values())
            record = {"loss": sum(values) / len(values), "lr": config.learning_rate * factor}
            record |= {"tokens": (step + 1) * step_tokens, "layer_losses": {str(i): x for i, x in losses.items()}}
            progress.step(step + 1, step_tokens, record)
            if (step + 1) % checkpoint_every == 0 or step + 1 == num_steps:
                run.save(STAGE, step + 1, progress.seconds, layers, optimizer)
    # The next stage would add its first gradients to these; a run resumed after this one has none.
    optimizer.zero_grad()


@torch.no_grad()
def calibrate_log_scale(accelerator: Accelerator, model: PreTrainedModel, batch: Batch) -> dict[int, Tensor]:
    """Set every `log_scale`, and the sinks, in closed form from one batch (calibration.py).

    Returns:
        `log_scale` by layer, `[H]` each.
    """
    modules = {i: m for i, m in linear_attention_modules(model).items() if m.window}
    if not modules:
        return {}
    observer = LogScaleCalibration(lambda module: softmax_function(model.softmax_implementation, module))
    observe(model, observer, batch)
    for i, module in modules.items():
        total, count = (accelerator.reduce(part, "sum") for part in observer.sums[i])
        # A teacher window no longer than ours has no far keys: there is nothing to fit.
        module.log_scale.copy_(torch.where(count > 0, total / count.clamp_min(1), module.log_scale))
        if module.sinks:
            total, count = (accelerator.reduce(part, "sum") for part in observer.sink_keys[i])
            module.feature_map_q.set_sinks(total / count.clamp_min(1)[:, None, None], -module.log_scale)
    return {i: module.log_scale.detach().clone() for i, module in modules.items()}


def observe(model: PreTrainedModel, observer, batch: Batch) -> None:
    """One forward of the decoder's body in which `observer` is the attention function of every converted layer."""
    AttentionInterface.register(TRANSFER_NAME, observer)
    with torch.no_grad(), dispatch_to(model, TRANSFER_NAME):
        # The body, not the model: nothing reads the logits, a fifth of the work at 135M parameters.
        model.base_model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)


def softmax_function(name: str, module: nn.Module):
    """The attention function called `name`, e.g. "sdpa", of an attention module; "eager" is in its modeling file."""
    if name == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[name]


class LayerwiseTransfer:
    """Attention function of a training forward: returns the teacher's output, leaves the student's loss and gradient.

    Args:
        softmax_name (`str`): the model's own attention implementation.
        loss (`str`): `normalized_mse` or `mse`.
        weights_loss, weights_queries: as in `TransferConfig`.
    """

    def __init__(self, softmax_name: str, loss: str, weights_loss: float = 0.0, weights_queries: int = 128):
        self.softmax_name, self.loss = softmax_name, loss
        self.weights_loss, self.weights_queries = weights_loss, weights_queries
        self.losses: dict[int, Tensor] = {}

    def __call__(self, module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
        """AttentionInterface's contract: `[B, H, T, D]` in, `([B, T, H, V], None)` out."""
        softmax = softmax_function(self.softmax_name, module)
        with torch.no_grad():
            teacher, _ = softmax(module, query, key, value, attention_mask, scaling=scaling, dropout=0.0, **kwargs)
        query, key, value = query.detach(), key.detach(), value.detach()
        with torch.enable_grad():
            student, _ = linear_attention_forward(
                module, query, key, value, None, scaling=scaling, dropout=0.0, **kwargs
            )
            loss = transfer_loss(student, teacher, self.loss)
            if self.weights_loss and module.linear_attention.window:
                keys = far_keys_of(module, query, key, scaling, kwargs)
                divergence = attention_weights_divergence(module.linear_attention, keys, self.weights_queries)
                loss = loss + self.weights_loss * divergence
            loss.backward()
        self.losses[module.layer_idx] = loss.detach()
        return teacher, None


def transfer_loss(student: Tensor, teacher: Tensor, form: str) -> Tensor:
    """Scalar loss of one layer from outputs `[B, T, H, V]`; the mean over rows, so that processes can be averaged."""
    student, teacher = student.float().flatten(1), teacher.float().flatten(1)
    if form == "mse":
        return (student - teacher).square().mean()
    # The smallest normal float32 keeps an all-zero row finite and changes no other.
    energy = teacher.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
    return ((student - teacher).square().sum(-1) / energy).mean()


def _parameter_groups(layers: nn.ModuleDict, config: TransferConfig) -> list[dict]:
    """Maps and gate weights in one group, vectors (log_scale, biases, rates) in the other."""
    matrices = [p for p in layers.parameters() if p.ndim >= 2]
    vectors = [p for p in layers.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "peak_lr": config.learning_rate, "weight_decay": config.weight_decay},
        {"params": vectors, "peak_lr": config.scalar_learning_rate, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _average_over_processes(accelerator, layers: nn.ModuleDict, losses: dict[int, Tensor]) -> dict[int, float]:
    """Average gradients and losses in one reduction; returns the losses by layer index."""
    order = sorted(losses)
    stacked = torch.stack([losses[i] for i in order])
    if accelerator.num_processes > 1:
        gradients = [p.grad for p in layers.parameters() if p.grad is not None]
        flat = torch.cat([*(g.flatten() for g in gradients), stacked])
        flat = accelerator.reduce(flat, "mean")
        *pieces, stacked = flat.split([*(g.numel() for g in gradients), len(order)])
        for gradient, piece in zip(gradients, pieces, strict=True):
            gradient.copy_(piece.view_as(gradient))
    return dict(zip(order, stacked.tolist(), strict=True))


def _check_finite(losses: dict[int, float], step: int, run: RunState) -> None:
    bad = {i: x for i, x in losses.items() if not torch.isfinite(torch.tensor(x))}
    if bad:
        layer, loss = next(iter(bad.items()))
        kept = f"; the checkpoint of step {run.checkpoint.step} is kept in {run.folder}" if run.checkpoint else ""
        raise UserError(
            f"{STAGE}: the loss of layer {layer} is {loss} at step {step + 1}; lower transfer.learning_rate and "
            f"transfer.scalar_learning_rate, or set dtype=float32, and start again with --overwrite{kept}"
        )
