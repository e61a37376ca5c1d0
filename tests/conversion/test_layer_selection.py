"""Which layers stay softmax: the search finds the layers that matter, and refuses what it cannot compare."""

import numpy as np
import pytest
import torch
from tiny_models import tiny_model, tiny_tokenizer

from hf_linattn import LinearAttentionConfig, linearize, softmax_attention, window_only
from hf_linattn.conversion.config import DataConfig
from hf_linattn.conversion.data import Corpus, RowSampler
from hf_linattn.conversion.layer_selection import select_layers, select_softmax_layers
from hf_linattn.errors import UserError


def batches(length=48):
    tokens = np.random.default_rng(0).integers(3, 128, 2000).astype(np.uint16)
    return [RowSampler(Corpus(tokens, np.zeros(1, np.int64)), length, 0, 0.5).batch(i, 2) for i in (0, 2)]


def converted(**options):
    return linearize(tiny_model(), LinearAttentionConfig(**{"window": 4} | options))


def silence(model, layer):
    """A layer whose attention reaches nothing: it cannot matter what it attends to."""
    with torch.no_grad():
        model.model.layers[layer].self_attn.o_proj.weight.zero_()


def test_layers_that_do_not_matter_come_last():
    model = converted()
    for layer in (0, 2):
        silence(model, layer)
    layers, rounds = select_softmax_layers(model, batches(), 2, dtype=torch.float32)
    assert layers == (1, 3)
    assert rounds[0]["loss"] > rounds[1]["loss"]
    assert set(rounds[0]["losses"]) == {0, 1, 2, 3}
    assert set(rounds[1]["losses"]) == {0, 1, 2, 3} - {rounds[0]["layer"]}
    # With every layer that matters back on softmax, the model is the teacher.
    assert rounds[1]["loss"] == pytest.approx(0, abs=1e-5)


@torch.no_grad()
def test_the_loss_is_the_divergence_with_only_these_layers():
    model, batch = converted(), batches()[0]
    _, rounds = select_softmax_layers(model, [batch], 1, dtype=torch.float32)
    run = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "use_cache": False}
    with softmax_attention(model):
        teacher = model(**run).logits.log_softmax(-1)
    for layer, loss in rounds[0]["losses"].items():
        with window_only(model), softmax_attention(model, {layer}):
            student = model(**run).logits.log_softmax(-1)
        kl = (teacher.exp() * (teacher - student)).sum(-1)[batch.position_ids >= 4].mean()
        assert loss == pytest.approx(kl.item(), rel=1e-4)


def test_from_a_model_that_is_not_converted(text_file):
    found = select_layers(
        tiny_model(),
        tiny_tokenizer(),
        DataConfig(train=str(text_file)),
        2,
        dtype=torch.float32,
        window=4,
        rows=3,
        sequence_length=32,
        batch_size=2,
    )
    assert len(found[0]) == len(found[1]) == 2


@pytest.mark.parametrize(
    ("options", "count", "length", "message"),
    [
        ({}, 5, 48, r"expected to select 1 to 4 layers, got 5"),
        ({"window": 0}, 1, 48, "set window > 0"),
        ({"window": 48}, 1, 48, "longer than the window of 48 tokens"),
    ],
)
def test_what_cannot_be_compared_is_refused(options, count, length, message):
    with pytest.raises(UserError, match=message):
        select_softmax_layers(converted(**options), batches(length), count, dtype=torch.float32)
