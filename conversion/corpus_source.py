"""The corpus of a run: text from `data.train` or from the teacher, tokenised once and cached in the run folder."""

import logging
import math
from pathlib import Path

from accelerate import Accelerator
from transformers import PreTrainedModel

from hf_linattn.conversion.config import DataConfig
from hf_linattn.conversion.data import Corpus, prepare_corpus, source_fingerprint, tokenizer_fingerprint
from hf_linattn.conversion.documents import local_files, read_documents
from hf_linattn.conversion.self_data import sample_documents
from hf_linattn.errors import UserError

logger = logging.getLogger(__name__)
SELF = "self"


def source_identity(config: DataConfig) -> list:
    """What a resumed run compares to know its text again. Raises UserError for a file that is missing."""
    return [SELF] if config.train == SELF else source_fingerprint(local_files(config.train), config.train)


def open_corpus(
    accelerator: Accelerator,
    folder: Path,
    config: DataConfig,
    model: PreTrainedModel,
    tokenizer,
    *,
    tokens: int,
    row_length: int,
    seed: int,
) -> tuple[Corpus, Corpus]:
    """(training, held out) corpus of at least one row each; `tokens` and `row_length` are what the stages will read.

    Args:
        folder (`Path`): where the tokenised text is kept.
        model (`PreTrainedModel`): before conversion; it writes the text when `config.train` is `self`.

    Raises:
        UserError: no file, no text, no such column, or fewer tokens than a row.
    """
    wanted = math.ceil(tokens / (1 - config.validation_fraction)) + row_length
    sampling = config.self_sampling
    if config.train == SELF:
        wanted = sampling.tokens or wanted
    key = {"data": config.model_dump(), "source": source_identity(config), "tokens": wanted, "seed": seed}
    key["tokenizer"] = tokenizer_fingerprint(tokenizer)

    def documents():
        if config.train != SELF:
            return read_documents(config, seed)
        logger.info("data: sampling %s tokens from the model", f"{wanted:,}")
        return sample_documents(
            model,
            tokenizer,
            sampling,
            tokens=wanted,
            sequence_length=sampling.sequence_length or row_length,
            seed=seed,
            report=lambda done: logger.info("data: %s of %s tokens sampled", f"{done:,}", f"{wanted:,}"),
        )

    if accelerator.is_main_process:
        prepare_corpus(folder, key, documents, tokenizer, wanted)
    accelerator.wait_for_everyone()
    corpus = prepare_corpus(folder, key, documents, tokenizer, wanted, is_main=False)
    training, held_out = corpus.split(config.validation_fraction, row_length)
    logger.info("data: %s tokens in %s documents", f"{len(corpus):,}", f"{len(corpus.starts):,}")
    if len(training) < tokens:
        logger.warning("data: %s training tokens for a budget of %s: rows repeat", f"{len(training):,}", f"{tokens:,}")
    return training, held_out


def check_row_length(model: PreTrainedModel, length: int) -> None:
    """Raise UserError if rows of `length` tokens are longer than the positions `model` was made for."""
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and length > positions:
        raise UserError(
            f"sequence_length: rows of {length} tokens are longer than the model's {positions} positions "
            "(max_position_embeddings); lower sequence_length and long_sequence_length"
        )
