"""Which layers stay softmax: greedy search by how far the model with only these is from the original.

    loss(S) = mean KL(teacher || student_S) over tokens that have keys outside the window,

where student_S has softmax in the layers S and nothing but its window in the others. What the linear part of a layer
will bring is not known before it is trained; what a layer loses without any memory is, and it is the layers that
carry recall which lose most. Half of the rows repeat earlier spans (repeats.py), so that recall weighs as much as
perplexity: chosen by short perplexity alone, layers are worse than a uniform pattern (arXiv 2606.16429's logs).
"""

import logging
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_linattn import LinearAttentionConfig, linear_attention_modules, linearize, softmax_attention, window_only
from hf_linattn.conversion.config import DataConfig
from hf_linattn.conversion.data import IGNORED_TARGET, Batch, RowSampler, prepare_corpus
from hf_linattn.conversion.distillation_loss import distillation_loss
from hf_linattn.conversion.documents import read_documents
from hf_linattn.conversion.packed_softmax import packed_softmax
from hf_linattn.conversion.training_loop import evaluation_mode, logits_of, to_device
from hf_linattn.errors import UserError

logger = logging.getLogger(__name__)
REPEAT_FRACTION = 0.5


def select_layers(
    model: PreTrainedModel,
    tokenizer,
    data: DataConfig,
    count: int,
    *,
    dtype: torch.dtype,
    window: int = 64,
    rows: int = 16,
    sequence_length: int = 2048,
    batch_size: int = 8,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[tuple[int, ...], list[dict]]:
    """`select_softmax_layers` for a model that is not converted yet, on rows of `data`.

    Args:
        model (`PreTrainedModel`): is converted on the way, with untrained maps.
        tokenizer: of the model.
        data (`DataConfig`): where the text comes from.
        count, dtype, progress: as in `select_softmax_layers`.
        window (`int`): of the converted layers.
        rows, sequence_length, batch_size (`int`): text that layers are compared on.
        seed (`int`): of the choice of text.

    Returns:
        As `select_softmax_layers`.

    Raises:
        UserError: a model that cannot be converted, no text, or what `select_softmax_layers` raises it for.
    """
    tokens = rows * sequence_length
    with tempfile.TemporaryDirectory() as folder:
        documents = read_documents(data, seed)
        corpus = prepare_corpus(Path(folder), {"tokens": tokens}, lambda: documents, tokenizer, tokens)
        sampler = RowSampler(corpus, sequence_length, seed, REPEAT_FRACTION)
        starts = range(0, rows, batch_size)
        batches = [to_device(sampler.batch(i, min(batch_size, rows - i)), model.device) for i in starts]
    try:
        student = linearize(model, LinearAttentionConfig(window=window))
    except ValueError as error:
        raise UserError(str(error)) from error
    with packed_softmax(student, dtype):
        return select_softmax_layers(student, batches, count, dtype=dtype, progress=progress)


@torch.no_grad()
def select_softmax_layers(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    count: int,
    *,
    dtype: torch.dtype,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[tuple[int, ...], list[dict]]:
    """Choose `count` of the converted layers, one after the other, each time the one that brings the loss down most.

    Args:
        model (`PreTrainedModel`): converted, with a window, no layer of it softmax yet; untrained maps do not matter.
        batches (`Sequence[Batch]`): rows longer than the window, on the model's device.
        count (`int`): number of layers to keep softmax.
        dtype (`torch.dtype`): to compute in.
        progress (`Callable[[int, int], None]`, *optional*): called with (forwards done, forwards in all).

    Returns:
        The layers, ascending, and the search: one dict a round with `layer`, `loss` and `losses` of all candidates.

    Raises:
        UserError: more layers asked for than there are, a model without window, or rows no longer than the window.
    """
    modules = linear_attention_modules(model)
    if not 0 < count <= len(modules):
        raise UserError(f"softmax_layers: expected to select 1 to {len(modules)} layers, got {count}")
    if not all(m.window for m in modules.values()):
        raise UserError("softmax_layers: selection compares layers by what their window leaves out; set window > 0")
    window = max(m.window for m in modules.values())
    if min(batch.input_ids.shape[1] for batch in batches) <= window:
        raise UserError(f"softmax_layers: expected rows longer than the window of {window} tokens; raise their length")
    chosen: list[int] = []
    rounds: list[dict] = []
    total = sum(len(modules) - i for i in range(count))
    done = 0
    with evaluation_mode(model):
        with softmax_attention(model):
            targets = [logits_of(model, batch, dtype) for batch in batches]
        while len(chosen) < count:
            losses = {}
            for layer in sorted(set(modules) - set(chosen)):
                losses[layer] = _loss_with(model, {*chosen, layer}, batches, targets, window, dtype)
                done += 1
                if progress is not None:
                    progress(done, total)
            best = min(losses, key=losses.__getitem__)
            chosen.append(best)
            rounds.append({"layer": best, "loss": losses[best], "losses": losses})
            logger.info("softmax layer %d of %d: %d, KL %.4f", len(chosen), count, best, losses[best])
    return tuple(sorted(chosen)), rounds


def _loss_with(
    model: PreTrainedModel,
    layers: set[int],
    batches: Sequence[Batch],
    targets: Sequence[Tensor],
    window: int,
    dtype: torch.dtype,
) -> float:
    """Mean KL over the tokens that have lost keys, with softmax in `layers` and only windows elsewhere."""
    total, tokens = 0.0, 0
    with window_only(model), softmax_attention(model, layers):
        for batch, target in zip(batches, targets, strict=True):
            far = batch.position_ids >= window
            unused = torch.full((1, int(far.sum())), IGNORED_TARGET, device=far.device)
            _, sums = distillation_loss(logits_of(model, batch, dtype)[far][None], target[far][None], unused)
            total += float(sums[2])
            tokens += unused.numel()
    return total / tokens
