"""Forward passes that never hold `[T, vocab]` in fp32: the last rows of a batch, one loss per token of a long text.

Both evaluations of this package that run the model themselves (`perplexity`, `recall`) sit on these two functions.
They slice the hidden states at the input of the output embedding, which every causal model of Transformers has under
`get_output_embeddings()`, whatever arguments its `forward` takes.
"""

import contextlib
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from hf_linattn.errors import UserError

LOGIT_ROWS = 512
"""Rows of logits turned into fp32 at a time: 100 MB for a vocabulary of 49,152."""


def max_positions(model: PreTrainedModel) -> int | None:
    """The number of positions the model was built for, or None where its config names no limit."""
    config = model.config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "n_ctx"):
        if (limit := getattr(config, name, None)) is not None:
            return int(limit)
    return None


def check_length(model: PreTrainedModel, length: int, argument: str) -> None:
    """Refuses a sequence longer than the model's positions.

    Args:
        model (`PreTrainedModel`): the model to be run.
        length (`int`): tokens of the longest sequence.
        argument (`str`): the caller's argument the length comes from, for the message.

    Raises:
        UserError: `length` exceeds `max_position_embeddings`; names the limit and the remedy.
    """
    limit = max_positions(model)
    if limit is not None and length > limit:
        raise UserError(
            f"{argument}: expected at most {limit} tokens, the positions of {type(model).__name__} "
            f"(max_position_embeddings), got {length}; use lengths up to {limit}, or a model with more positions"
        )


@torch.no_grad()
def last_logits(model: PreTrainedModel, input_ids: Tensor, keep: int) -> Tensor:
    """Logits of the last `keep` positions, from one forward pass without a cache.

    Args:
        model (`PreTrainedModel`): causal language model in eval mode.
        input_ids (`Tensor` `[B, T]`, int64): rows of equal length, no padding.
        keep (`int`): positions to keep, counted from the end.

    Returns:
        `Tensor` `[B, keep, vocab]` in the model's dtype.
    """
    with _head_input(model, lambda hidden: hidden[:, -keep:]):
        return model(input_ids=input_ids.to(model.device), use_cache=False).logits


@torch.no_grad()
def token_losses(model: PreTrainedModel, input_ids: Tensor, *, single_forward: int = 16384) -> Tensor:
    """Cross-entropy of every token of one text given all tokens before it.

    A text of at most `single_forward` tokens takes one forward pass without a cache; its logits are then made
    `LOGIT_ROWS` rows at a time from the hidden states. A longer text, or a model that changes the logits after its
    output embedding (soft cap, scaling), is read in pieces through the cache instead, `LOGIT_ROWS` tokens each.

    Args:
        model (`PreTrainedModel`): causal language model in eval mode.
        input_ids (`Tensor` `[T]`, int64): one text.
        single_forward (`int`, defaults to 16384): longest text read in one pass; lower it when memory is short,
            0 to read through the cache always.

    Returns:
        `Tensor` `[T - 1]` fp32 on the CPU: entry i is -log p(token i + 1 | tokens 0..i).
    """
    input_ids = input_ids.to(model.device)
    if len(input_ids) <= single_forward:
        losses = _losses_in_one_pass(model, input_ids)
        if losses is not None:
            return losses
    return _losses_through_cache(model, input_ids)


def _losses_in_one_pass(model: PreTrainedModel, input_ids: Tensor) -> Tensor | None:
    captured: list[Tensor] = []

    def keep_last_row(hidden: Tensor) -> Tensor:
        captured.append(hidden[0])
        return hidden[:, -1:]

    with _head_input(model, keep_last_row):
        last = model(input_ids=input_ids[None, :-1], use_cache=False).logits[0]
    head = model.get_output_embeddings()
    (hidden,) = captured
    # The same row through the same matrix: equal bit for bit exactly when nothing follows the output embedding.
    if not torch.equal(head(hidden[-1:]).to(last.dtype), last):
        return None
    targets = input_ids[1:]
    return torch.cat(
        [
            F.cross_entropy(head(rows).float(), target, reduction="none").cpu()
            for rows, target in zip(hidden.split(LOGIT_ROWS), targets.split(LOGIT_ROWS), strict=True)
        ]
    )


def _losses_through_cache(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    losses, cache = [], None
    targets = input_ids[1:].split(LOGIT_ROWS)
    for piece, target in zip(input_ids[:-1].split(LOGIT_ROWS), targets, strict=True):
        output = model(input_ids=piece[None], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        losses.append(F.cross_entropy(output.logits[0].float(), target, reduction="none").cpu())
    return torch.cat(losses)


@contextlib.contextmanager
def _head_input(model: PreTrainedModel, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, args: (change(args[0]), *args[1:]))
    try:
        yield
    finally:
        hook.remove()
