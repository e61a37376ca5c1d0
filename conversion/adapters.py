"""What trains after attention transfer: LoRA on the attention's projections (or the weights themselves), and the new
parameters; everything else is frozen. Trained values are float32 masters whatever the dtype of the model.
"""

import re

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_linattn import attention_modules, linear_attention_modules
from hf_linattn.conversion.config import TrainingConfig
from hf_linattn.errors import UserError


def make_trainable(
    model: PreTrainedModel,
    config: TrainingConfig,
    *,
    seed: int = 0,
    whole_model: bool = False,
    new_parameters: bool = True,
) -> nn.Module:
    """Freeze `model` but for what `config` trains.

    Args:
        model (`PreTrainedModel`): converted.
        config (`TrainingConfig`): LoRA settings, or `full`.
        seed (`int`): of LoRA's random start.
        whole_model (`bool`): with `full`, train every weight and not only the attention's.
        new_parameters (`bool`): train feature maps, `log_scale` and gates too.

    Returns:
        `model` with `full`, else a `PeftModel` around it.

    Raises:
        UserError: `target_modules` name no linear layer of the attention modules.
    """
    model.requires_grad_(False)
    student = model
    if config.full:
        trained = [model] if whole_model else attention_modules(model).values()
        for module in trained:
            module.requires_grad_(True)
    else:
        student = _with_lora(model, config, seed)
    for module in linear_attention_modules(model).values():
        module.requires_grad_(new_parameters)
    for parameter in student.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return student


def _with_lora(model: PreTrainedModel, config: TrainingConfig, seed: int) -> PeftModel:
    settings = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=_target_pattern(model, config.target_modules),
        fan_in_fan_out=any(isinstance(m, Conv1D) for m in model.modules()),
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(seed)
    student = get_peft_model(model, settings)
    for module in student.modules():
        if isinstance(module, BaseTunerLayer):
            # Under autocast a copy of every input in the dtype of the masters would be cast back at once.
            module.cast_input_dtype_enabled = False
    return student


def merged(student: nn.Module, dtype: torch.dtype) -> PreTrainedModel:
    """The converted model in `dtype` with LoRA folded into its weights; the new parameters stay float32."""
    model = student
    if isinstance(student, PeftModel):
        # Folded in float32, so that weights are rounded once.
        for module in attention_modules(student).values():
            module.float()
        model = student.merge_and_unload()
    return model.requires_grad_(False).to(dtype).eval() if dtype == torch.float32 else _rounded(model, dtype)


def _rounded(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    kept = {id(t) for m in linear_attention_modules(model).values() for t in (*m.parameters(), *m.buffers())}
    with torch.no_grad():
        for parameter in model.parameters():
            if id(parameter) not in kept:
                parameter.data = parameter.data.to(dtype)
    return model.requires_grad_(False).eval()


def _target_pattern(model: PreTrainedModel, names: tuple[str, ...] | None) -> str:
    """A pattern over module names: the wanted linear layers inside attention modules, and nowhere else.

    A bare name would not do: GPT-2's `c_proj` is in its MLP too.
    """
    attention = {id(m) for m in attention_modules(model).values()}
    paths = []
    for path, module in model.named_modules():
        if id(module) in attention:
            linear = [name for name, child in module.named_children() if _is_linear(child)]
            paths += [f"{path}.{name}" for name in linear if names is None or name in names]
    if not paths:
        found = {n for m in attention_modules(model).values() for n, c in m.named_children() if _is_linear(c)}
        raise UserError(
            f"target_modules: {list(names or ())} are not linear layers of this model's attention, which has "
            f"{sorted(found)}"
        )
    shapes = sorted({re.sub(r"\\\.\d+\\\.", r"\\.\\d+\\.", re.escape(path)) for path in paths})
    return "|".join(shapes)


def _is_linear(module: nn.Module) -> bool:
    # Conv1D is GPT-2's linear layer.
    return isinstance(module, nn.Linear | Conv1D)
