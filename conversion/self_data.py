"""`data: self`: a training corpus sampled from the teacher, so that a conversion needs no data at all.

The student is to repeat the teacher's distribution, and the teacher's own samples come from it. They start from the
beginning-of-text token, from short openings of many kinds of text, and, for a chat model, from its own template at the
point where a user's turn begins, so that it writes both sides of a conversation.
"""

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from hf_linattn.conversion.config import SelfSamplingConfig
from hf_linattn.errors import UserError

OPENINGS = (
    "The", "In", "A", "It was", "When", "Once upon a time", "According to", "We", "I", "There are", "One of the",
    "Question:", "How to", "Why", "What is", "Chapter 1", "Introduction", "Abstract:", "# ", "## ", "1. ", "- ",
    "def ", "import ", "class ", "<html>", "Dear", "On Monday", "For many years", "During the war", "Scientists",
    "The history of", "She said", "He looked", "To make", "Step 1:", "Let x", "The following", "Today", "If you",
)  # fmt: skip
SHORTEST_SAMPLE = 16
PLACEHOLDER = "\x00"
# Sorting a few candidates instead of the vocabulary; beyond them a language model has next to no mass.
TOP_K = 1024


def sample_documents(
    model: PreTrainedModel,
    tokenizer,
    config: SelfSamplingConfig,
    *,
    tokens: int,
    sequence_length: int,
    seed: int,
    report: Callable[[int], None] = lambda tokens: None,
) -> Iterator[list[int]]:
    """Documents written by `model`, as token ids, until `tokens` have been given.

    Args:
        model (`PreTrainedModel`): the teacher, before it is converted.
        tokenizer: its tokenizer.
        config (`SelfSamplingConfig`): batch size, temperature, top_p.
        tokens (`int`): stop at this many.
        sequence_length (`int`): prompt and continuation together.
        seed (`int`): the same seed, model and device give the same documents.
        report (`Callable`): called with the number of tokens so far.

    Raises:
        UserError: a tokenizer without beginning- and end-of-text token, or a model whose every sample ends at once.
    """
    groups, is_chat = _prompts_by_length(tokenizer), bool(getattr(tokenizer, "chat_template", None))
    end = _end_tokens(model, tokenizer)
    given = batch_idx = 0
    while given < tokens:
        group, first = groups[batch_idx % len(groups)], batch_idx // len(groups) * config.batch_size
        prompts = [group[n % len(group)] for n in range(first, first + config.batch_size)]
        torch.manual_seed(seed + batch_idx)
        rows = sample_rows(model, prompts, sequence_length, temperature=config.temperature, top_p=config.top_p)
        # A chat model ends turns with its end-of-text token, and a conversation is one document.
        pieces = rows if is_chat else [piece for row in rows for piece in _split(row, end)]
        documents = [piece for piece in pieces if len(piece) >= min(SHORTEST_SAMPLE, sequence_length)]
        if not documents:
            raise UserError(
                "data: self: every sample of the model ends within a few tokens; give a text file or a Hub dataset"
            )
        for document in documents:
            given += len(document)
            yield document
        batch_idx += 1
        report(min(given, tokens))


@torch.inference_mode()
def sample_rows(
    model: PreTrainedModel, prompts: list[list[int]], length: int, *, temperature: float, top_p: float
) -> list[list[int]]:
    """Continue `prompts`, of one length, to `length` tokens each, from the model's distribution and nothing else.

    Not `generate`: it sorts the whole vocabulary for top_p, half the time of a step on a CPU, applies the model's own
    penalties, and stops at an end-of-text token, after which the model may as well write its next document.
    """
    was_training = model.training
    model.eval()
    rows = torch.tensor(prompts, device=next(model.parameters()).device)
    cache = DynamicCache(config=model.config)
    tokens = rows
    while rows.shape[1] < length:
        logits = model(input_ids=tokens, past_key_values=cache, use_cache=True).logits[:, -1]
        tokens = _draw(logits.float() / temperature, top_p)
        rows = torch.cat([rows, tokens], dim=1)
    model.train(was_training)
    return rows.tolist()


def _draw(logits: Tensor, top_p: float) -> Tensor:
    """`[B, V]` -> `[B, 1]`: from the smallest set of likeliest tokens that holds `top_p`, TOP_K of them at most."""
    values, candidates = logits.topk(min(TOP_K, logits.shape[-1]))
    probabilities = (values - logits.logsumexp(-1, keepdim=True)).exp()
    before = probabilities.cumsum(-1) - probabilities
    probabilities = probabilities.masked_fill(before >= top_p, 0)
    return candidates.gather(-1, torch.multinomial(probabilities, 1))


def _split(row: list[int], end: set[int]) -> list[list[int]]:
    """The documents of a row: cut after every end-of-text token but a leading one, which only starts the sample."""
    pieces, piece = [], row[:1]
    for token in row[1:]:
        piece.append(token)
        if token in end:
            pieces.append(piece)
            piece = []
    return [*pieces, piece] if piece else pieces


def _end_tokens(model, tokenizer) -> set[int]:
    configured = model.generation_config.eos_token_id
    configured = configured if isinstance(configured, list) else [configured]
    return {token for token in (*configured, tokenizer.eos_token_id) if token is not None}


def _prompts_by_length(tokenizer) -> list[list[list[int]]]:
    """Beginning-of-text alone, openings, and the start of a user's turn, grouped by length: no batch needs padding."""
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise UserError(
            "data: self: the tokenizer has neither a beginning- nor an end-of-text token to start a sample from; "
            "give a text file or a Hub dataset"
        )
    prompts = [[start], *([start, *tokenizer(text, add_special_tokens=False)["input_ids"]] for text in OPENINGS)]
    if turn := _user_turn(tokenizer):
        prompts.append(turn)
    return [list(group) for _, group in itertools.groupby(sorted(prompts, key=len), key=len)]


def _user_turn(tokenizer) -> list[int] | None:
    if not getattr(tokenizer, "chat_template", None):
        return None
    text = tokenizer.apply_chat_template([{"role": "user", "content": PLACEHOLDER}], tokenize=False)
    return tokenizer(text.split(PLACEHOLDER)[0], add_special_tokens=False)["input_ids"] or None
