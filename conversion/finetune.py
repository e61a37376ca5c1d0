"""`finetune`: keep training a converted model on next tokens, with LoRA (merged at the end) or in full.

The same rows, loop, checkpoints and folder as a conversion; also `accelerate launch -m hf_linattn finetune`.
"""

import json
import logging
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn

from hf_linattn import linear_attention_modules
from hf_linattn.conversion.adapters import make_trainable, merged
from hf_linattn.conversion.config import FinetuneConfig
from hf_linattn.conversion.corpus_source import check_row_length, open_corpus, source_identity
from hf_linattn.conversion.data import Batch, Corpus, stack_rows
from hf_linattn.conversion.distillation_loss import distillation_loss
from hf_linattn.conversion.execution import choose_dtype, make_accelerator, repeatable
from hf_linattn.conversion.packed_softmax import packed_softmax
from hf_linattn.conversion.result_folder import (
    SUMMARY_FILE,
    VALIDATION,
    fill_folder,
    finished,
    source_name,
    summarize,
)
from hf_linattn.conversion.run_state import RunState, open_run
from hf_linattn.conversion.saving import check_disk_space, check_output, write_folder
from hf_linattn.conversion.training_loop import evaluation_mode, logits_of, to_device, train
from hf_linattn.errors import UserError
from hf_linattn.loading import load_model

logger = logging.getLogger(__name__)
STAGE = "finetuning"


def finetune(
    folder: str,
    output: str | Path,
    data: str | None = None,
    config: FinetuneConfig | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    device: str | None = None,
) -> dict[str, Any]:
    """Train a converted model further and write the result to `output`.

    Args:
        folder (`str`): converted model, folder or Hub id.
        output (`str` or `Path`): folder to create; the run's state is kept in `OUTPUT.run` until it is done.
        data (`str`, *optional*): in place of `config.data.train`, `subset` and `split`.
        config (`FinetuneConfig`, *optional*): from `load_finetune_config`.
        resume, overwrite (`bool`), device (`str`): as in `convert`.

    Returns:
        Summary, as `convert` returns it.

    Raises:
        UserError: the model is not a converted one, and all that `convert` raises it for.
    """
    output = Path(output)
    config = config or FinetuneConfig()
    if data is not None:
        config = config.model_copy(update={"data": config.data.with_source(data)})
    accelerator = make_accelerator(device)
    identity = {
        "command": "finetune",
        "model": source_name(folder),
        "gguf_file": None,
        "num_processes": accelerator.num_processes,
        "config": config.model_dump(mode="json", exclude={"checkpoint_every"}),
        "source": source_identity(config.data),
    }
    if resume and (summary := finished(output, identity)):
        logger.info("%s is complete already", output)
        return summary
    check_output(output, overwrite=overwrite, source=folder)
    with open_run(output, identity, accelerator, resume=resume, overwrite=overwrite) as run:
        dtype = choose_dtype(config.dtype, accelerator.device)
        row_length = max(config.sequence_length, config.long_sequence_length or 0)
        with repeatable(config.deterministic):
            model, tokenizer = load_converted(folder, dtype, accelerator.device)
            check_row_length(model, row_length)
            check_disk_space(output, model)
            corpus, held_out = open_corpus(
                accelerator,
                run.folder / "data",
                config.data,
                model,
                tokenizer,
                tokens=config.tokens,
                row_length=row_length,
                seed=config.seed,
            )
            with packed_softmax(model, dtype):
                model = _train(accelerator, model, corpus, held_out, config, run, dtype, row_length, folder)
        summary = summarize(output.name, run, identity, model, accelerator, config) | _origin(folder)
        if accelerator.is_main_process:
            write_folder(output, lambda temporary: fill_folder(temporary, model, tokenizer, config, run, summary))
        accelerator.wait_for_everyone()
        run.remove()
    return summary


def load_converted(folder: str, dtype: torch.dtype, device: torch.device | None = None):
    """`(model, tokenizer)` of a converted model. Raises UserError for one that was never converted."""
    model, tokenizer = load_model(folder, dtype=dtype, device=device)
    if not linear_attention_modules(model):
        raise UserError(f"model: {folder} is not a converted model; run `hf-linattn convert` on it first")
    return model, tokenizer


def _train(accelerator, model, corpus, held_out, config, run: RunState, dtype, row_length, source) -> nn.Module:
    def loss_of(prepared: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        return distillation_loss(logits_of(prepared, batch, dtype), None, batch.targets, ce_weight=1.0)

    student = make_trainable(
        model, config, seed=config.seed, whole_model=True, new_parameters=config.train_new_parameters
    )
    prepared = train(
        accelerator,
        student,
        loss_of,
        corpus,
        config,
        run,
        stage=STAGE,
        seed=config.seed,
        checkpoint_every=config.checkpoint_every,
        first_step=run.first_step(STAGE, (STAGE,)),
    )
    if accelerator.distributed_type == DistributedType.FSDP:
        # Sharded parameters are merged in a fresh model, filled from the final checkpoint.
        fresh, _ = load_converted(source, dtype)
        student = make_trainable(fresh, config, whole_model=True, new_parameters=config.train_new_parameters)
        run.load(student)
    else:
        student = accelerator.unwrap_model(prepared)
    converted = merged(student, dtype)
    if accelerator.is_main_process:
        ce = _cross_entropy(converted, held_out, row_length, config.data.validation_rows, dtype)
        if ce is not None:
            run.log({"stage": VALIDATION, "after": STAGE, "ce": ce})
    accelerator.wait_for_everyone()
    return converted


@torch.no_grad()
def _cross_entropy(model: nn.Module, held_out: Corpus, length: int, num_rows: int, dtype) -> float | None:
    """Mean over held-out targets; None without a held-out row."""
    rows = range(min(num_rows, len(held_out) // length))
    if not rows:
        return None
    sums = torch.zeros(5)
    with evaluation_mode(model):
        for row in rows:
            batch = to_device(stack_rows(held_out, [row], length), next(model.parameters()).device)
            sums += distillation_loss(logits_of(model, batch, dtype), None, batch.targets)[1].cpu()
    return float(sums[3] / sums[4])


def _origin(folder: str) -> dict[str, Any]:
    """The original model and recipe, when `folder` says what it was converted from."""
    path = Path(folder) / SUMMARY_FILE
    if not path.is_file():
        return {}
    summary = json.loads(path.read_text(encoding="utf-8"))
    return {"model": summary["model"], "recipe": summary["recipe"]}
