"""`convert`: from a pretrained checkpoint to a folder that holds its linear-attention version.

load -> linearize -> attention transfer -> logit distillation -> merge LoRA -> save, resumable at any step. Evaluation
is another command, so that conversion does not depend on evals.
"""

import contextlib
import logging
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from transformers import PreTrainedModel

from hf_linattn import attention_modules, linearize, softmax_attention, windows_of_at_most
from hf_linattn.conversion import attention_transfer, logit_distillation
from hf_linattn.conversion.adapters import make_trainable, merged
from hf_linattn.conversion.config import ConversionConfig
from hf_linattn.conversion.corpus_source import check_row_length, open_corpus, source_identity
from hf_linattn.conversion.data import Corpus
from hf_linattn.conversion.execution import choose_dtype, make_accelerator, repeatable
from hf_linattn.conversion.packed_softmax import packed_softmax
from hf_linattn.conversion.result_folder import VALIDATION, fill_folder, finished, source_name, summarize
from hf_linattn.conversion.run_state import RunState, open_run
from hf_linattn.conversion.saving import check_disk_space, check_output, write_folder
from hf_linattn.errors import UserError
from hf_linattn.loading import load_model, load_weights

logger = logging.getLogger(__name__)
STAGES = (attention_transfer.STAGE, logit_distillation.STAGE)
SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED)


def convert(
    model: str,
    output: str | Path,
    config: ConversionConfig,
    *,
    data: str | None = None,
    gguf_file: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    device: str | None = None,
) -> dict[str, Any]:
    """Convert `model` and write the result to `output`.

    Args:
        model (`str`): Hub id, folder, folder with one GGUF file, or GGUF file.
        output (`str` or `Path`): folder to create. The run's state is kept in `OUTPUT.run` until it is done.
        config (`ConversionConfig`): from `load_recipe`.
        data (`str`, *optional*): in place of `config.data.train`, `subset` and `split`.
        gguf_file (`str`, *optional*): which GGUF file of a folder or repository.
        resume (`bool`): continue an interrupted run; the losses are those of an unbroken one.
        overwrite (`bool`): replace `output`, once the new result is complete, and drop an unfinished run.
        device (`str`, *optional*): "cpu", "cuda", "cuda:1"; default: what Accelerate finds.

    Returns:
        Summary: `tokens`, `seconds`, `peak_gib`, `seed`, `stages` (loss, tokens and seconds of each), `validation`,
        ...: what `conversion.json` in the folder holds.

    Raises:
        UserError: anything about model, data, output or numbers that the user can mend.
    """
    output = Path(output)
    config = _with_data(config, data)
    accelerator = make_accelerator(device)
    identity = _identity(model, gguf_file, config, accelerator)
    if resume and (summary := finished(output, identity)):
        logger.info("%s is complete already", output)
        return summary
    check_output(output, overwrite=overwrite, source=model)
    with open_run(output, identity, accelerator, resume=resume, overwrite=overwrite) as run:
        dtype = choose_dtype(config.dtype, accelerator.device)
        with repeatable(config.deterministic):
            teacher, tokenizer = load_model(model, dtype=dtype, device=accelerator.device, gguf_file=gguf_file)
            check_row_length(teacher, config.longest_row)
            check_disk_space(output, teacher)
            student = train_student(accelerator, run, config, teacher, tokenizer, (model, gguf_file), dtype)
        summary = summarize(output.name, run, identity, student, accelerator, config)
        if accelerator.is_main_process:
            write_folder(output, lambda folder: fill_folder(folder, student, tokenizer, config, run, summary))
        accelerator.wait_for_everyone()
        run.remove()
    return summary


def train_student(
    accelerator: Accelerator,
    run: RunState,
    config: ConversionConfig,
    teacher: PreTrainedModel,
    tokenizer,
    source: tuple[str, str | None],
    dtype: torch.dtype,
    corpus_folder: Path | None = None,
) -> PreTrainedModel:
    """The stages of a conversion: `teacher`, converted in place, trained and merged.

    Args:
        source: (model, GGUF file) that `teacher` was loaded from, where a frozen copy of it is needed.
        corpus_folder (`Path`, *optional*): where the tokenised text is kept; None keeps it with the run.
    """
    student = linearize_or_explain(teacher, config)
    # A corpus sampled from the model itself comes from the model before conversion.
    with softmax_attention(student):
        corpus, held_out = open_corpus(
            accelerator,
            corpus_folder or run.folder / "data",
            config.data,
            student,
            tokenizer,
            tokens=config.tokens,
            row_length=config.longest_row,
            seed=config.seed,
        )
    with packed_softmax(student, dtype), windows_of_at_most(student, config.training_window):
        transfer(accelerator, student, corpus, held_out, config, run, dtype)
        return distil(accelerator, student, corpus, held_out, config, run, dtype, source)


def linearize_or_explain(model: PreTrainedModel, config: ConversionConfig) -> PreTrainedModel:
    """`linearize` with the recipe's attention form; its refusal of a model becomes a UserError."""
    try:
        return linearize(model, config.attention_for(len(attention_modules(model))))
    except ValueError as error:
        raise UserError(str(error)) from error


def transfer(
    accelerator: Accelerator,
    student: PreTrainedModel,
    corpus: Corpus,
    held_out: Corpus,
    config: ConversionConfig,
    run: RunState,
    dtype: torch.dtype,
) -> None:
    """Attention transfer, if the run has not passed it yet."""
    first_step = run.first_step(attention_transfer.STAGE, STAGES)
    if first_step is None or not config.transfer.tokens:
        return
    attention_transfer.transfer_attention(
        accelerator,
        student,
        corpus,
        config.transfer,
        run,
        seed=config.seed,
        checkpoint_every=config.checkpoint_every,
        first_step=first_step,
    )
    _validate(accelerator, run, student, held_out, config, dtype, after=attention_transfer.STAGE)


def distil(
    accelerator: Accelerator,
    model: PreTrainedModel,
    corpus: Corpus,
    held_out: Corpus,
    config: ConversionConfig,
    run: RunState,
    dtype: torch.dtype,
    source: tuple[str, str | None],
) -> PreTrainedModel:
    """Logit distillation from where the run stands; returns the model with LoRA merged."""
    settings = config.distillation
    if not settings.tokens:
        return model
    teacher = None
    if settings.full:
        teacher = load_weights(source[0], dtype=dtype, device=accelerator.device, gguf_file=source[1])
        teacher.requires_grad_(False)
    student = make_trainable(model, settings, seed=config.seed)
    with packed_softmax(teacher, dtype) if settings.full else contextlib.nullcontext():
        prepared = logit_distillation.distill_logits(
            accelerator,
            student,
            corpus,
            settings,
            run,
            dtype=dtype,
            teacher=teacher,
            seed=config.seed,
            checkpoint_every=config.checkpoint_every,
            first_step=run.first_step(logit_distillation.STAGE, STAGES),
        )
        if accelerator.distributed_type in SHARDED:
            return _merged_from_checkpoint(accelerator, run, model, config, dtype, source)
        student = accelerator.unwrap_model(prepared)
        _validate(accelerator, run, student, held_out, config, dtype, after=logit_distillation.STAGE, teacher=teacher)
    return merged(student, dtype)


def _identity(model: str, gguf_file: str | None, config: ConversionConfig, accelerator: Accelerator) -> dict[str, Any]:
    settings = config.model_dump(mode="json", exclude={"name", "description", "evaluation", "checkpoint_every"})
    return {
        "command": "convert",
        "model": source_name(model),
        "gguf_file": gguf_file,
        "num_processes": accelerator.num_processes,
        "config": settings,
        "source": source_identity(config.data),
    }


def _with_data(config: ConversionConfig, data: str | None) -> ConversionConfig:
    return config if data is None else config.model_copy(update={"data": config.data.with_source(data)})


def _validate(accelerator, run, student, held_out, config, dtype, *, after: str, teacher=None) -> None:
    """Log the divergence from the teacher on held-out rows; the main process measures, the others wait."""
    if accelerator.is_main_process:
        measured = logit_distillation.measure_divergence(
            accelerator,
            student,
            held_out,
            sequence_length=config.longest_row,
            num_rows=config.data.validation_rows,
            dtype=dtype,
            teacher=teacher,
        )
        if measured:
            run.log({"stage": VALIDATION, "after": after} | measured)
            logger.info("%s", "  ".join(f"{name} {value:.4f}" for name, value in measured.items()))
    accelerator.wait_for_everyone()


def _merged_from_checkpoint(accelerator, run, model, config, dtype, source) -> PreTrainedModel:
    """Parameters that FSDP holds in shards are merged in a fresh model, filled from the final checkpoint."""
    if not accelerator.is_main_process:
        return model
    fresh = load_weights(source[0], dtype=dtype, gguf_file=source[1])
    student = make_trainable(linearize_or_explain(fresh, config), config.distillation)
    run.load(student)
    return merged(student, dtype)
