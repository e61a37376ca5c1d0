"""Perplexity of long documents by position, and of a corpus.

    ppl(bucket) = exp(mean over tokens x_{i+1} with i in the bucket of -log p(x_{i+1} | x_0 .. x_i))

A token belongs to the bucket of the position that predicts it, that is of the number of tokens read before it, less
one. A model that forgets everything outside its window has the same perplexity at every position beyond it; a
teacher's falls with the position.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_linattn.errors import UserError
from hf_linattn.evals.scoring import check_length, max_positions, token_losses

FIRST_EDGES = (0, 64, 256, 512)
"""Bucket borders; after them every bucket is twice as long as the one before: 1024, 2048, 4096, ..."""


def position_buckets(max_length: int) -> list[tuple[int, int]]:
    """`[(0, 64), (64, 256), (256, 512), (512, 1024), ...]`, the last one ending at `max_length`."""
    edges = list(FIRST_EDGES)
    while edges[-1] < max_length:
        edges.append(2 * edges[-1])
    edges = [edge for edge in edges if edge < max_length] + [max_length]
    return list(pairwise(edges))


def perplexity_by_position(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[str],
    *,
    max_length: int = 8192,
    max_documents: int | None = 16,
    context: int | None = None,
    single_forward: int = 16384,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """Perplexity in each bucket of positions, over the first `max_length` tokens of long documents.

    Only documents of at least `max_length` tokens count, so that every bucket averages over the same documents. One
    forward pass a document, batch 1.

    Args:
        model (`PreTrainedModel`): causal language model.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer, with its own special tokens.
        documents (`Sequence[str]`): texts, the long ones among them are taken in order.
        max_length (`int`, defaults to 8192): tokens read of each document.
        max_documents (`int`, *optional*, defaults to 16): stop after this many; None takes all.
        context (`int`, *optional*): predict every token from the last `context` tokens at most and half as many at
            least, in overlapping pieces that each start at position 0. It tells how hard a text is at positions that
            a model was not made for. None reads from the document's start.
        single_forward (`int`, defaults to 16384): longer documents are read in pieces through the cache.
        progress (`Callable[[int, int], None]`, *optional*): called with (documents done, documents in all).

    Returns:
        `dict[str, float]`: `"0-64"`, `"64-256"`, ... -> perplexity.

    Raises:
        UserError: `max_length` exceeds the model's positions, or no document is as long.
    """
    if context is not None and context < 2:
        raise UserError(f"context: expected at least 2 tokens, got {context}")
    context = min(max_length, context or max_length)
    check_length(model, context, "max_length")
    model.eval()
    texts = long_texts(tokenizer, documents, max_length, max_documents)
    losses = torch.zeros(max_length - 1, dtype=torch.float64)
    for done, ids in enumerate(texts, start=1):
        losses += _losses_in_context(model, ids, context, single_forward)
        if progress is not None:
            progress(done, len(texts))
    losses /= len(texts)
    return {f"{first}-{end}": math.exp(losses[first:end].mean()) for first, end in position_buckets(max_length)}


def _losses_in_context(model: PreTrainedModel, ids: torch.Tensor, context: int, single_forward: int) -> torch.Tensor:
    """`[T - 1]` float64: loss of every token but the first, from pieces of `context` tokens, half a piece apart."""
    losses = torch.empty(len(ids) - 1, dtype=torch.float64)
    step = context // 2
    for start in range(0, len(ids) - 1, step):
        piece = token_losses(model, ids[start : start + context], single_forward=single_forward)
        known = context - 1 - step if start else 0
        losses[start + known : start + len(piece)] = piece[known:]
        if start + context >= len(ids):
            break
    return losses


def corpus_perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[str],
    *,
    max_length: int | None = None,
    max_documents: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """Perplexity per token and bits per UTF-8 byte of whole documents.

    A document is cut into consecutive windows of `max_length` tokens, each predicted from its own start; the last
    token of a window opens the next, so that every token but a document's first is predicted once. `bits_per_byte`
    compares models of different tokenizers.

    Args:
        model, tokenizer, documents, max_documents, progress: as for `perplexity_by_position`.
        max_length (`int`, *optional*): tokens of a window; None takes the model's positions, at most 2048.

    Returns:
        `dict[str, float]`: `perplexity`, `bits_per_byte`, `tokens` (predicted).

    Raises:
        UserError: `max_length` exceeds the model's positions, or no document has two tokens.
    """
    if max_length is None:
        max_length = min(max_positions(model) or 2048, 2048)
    check_length(model, max_length, "max_length")
    model.eval()
    documents = documents[:max_documents]
    total, tokens, size = 0.0, 0, 0
    for done, text in enumerate(documents, start=1):
        ids = torch.tensor(tokenizer.encode(text))
        for start in range(0, len(ids) - 1, max_length - 1):
            losses = token_losses(model, ids[start : start + max_length])
            total += losses.double().sum().item()
            tokens += len(losses)
        size += len(text.encode())
        if progress is not None:
            progress(done, len(documents))
    if not tokens:
        raise UserError("documents: expected at least one of two tokens or more, got none; give longer texts")
    return {
        "perplexity": math.exp(total / tokens),
        "bits_per_byte": total / math.log(2) / size,
        "tokens": float(tokens),
    }


def long_texts(
    tokenizer: PreTrainedTokenizerBase, documents: Sequence[str], max_length: int, max_documents: int | None
) -> list[torch.Tensor]:
    """The first `max_length` tokens of the first `max_documents` documents that have as many.

    Returns:
        `list[Tensor]`: `[max_length]` int64 each, at least one.

    Raises:
        UserError: no document is as long; names the longest.
    """
    texts, longest = [], 0
    for text in documents:
        if len(texts) == max_documents:
            break
        ids = tokenizer.encode(text)
        longest = max(longest, len(ids))
        if len(ids) >= max_length:
            texts.append(torch.tensor(ids[:max_length]))
    if not texts:
        last_bucket = "{}-{}".format(*position_buckets(max_length)[-1])
        raise UserError(
            f"documents: expected texts of at least {max_length} tokens to fill the bucket {last_bucket}, the longest "
            f"has {longest}; lower the text length to {longest} or give longer texts"
        )
    return texts
