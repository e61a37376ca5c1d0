"""Every architecture, half and wholly converted: the rows of the sameness table that need a whole model."""

import pytest
import torch
from tiny_models import ARCHITECTURES, tiny_model
from transformers import AutoModelForCausalLM

import hf_linattn
from hf_linattn import LinearAttentionConfig, linearize

HALF, WHOLE = (0, 2), ()
PROMPT = 21  # several windows, and no multiple of one
WINDOW = 4


def converted(name, softmax_layers, **kwargs):
    model = linearize(tiny_model(name), LinearAttentionConfig(window=WINDOW, softmax_layers=softmax_layers, **kwargs))
    return disturbed(model)


def disturbed(model):
    """Feature maps away from their initial values, so that a parameter lost on the way shows."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in hf_linattn.linear_attention_modules(model).values():
            for parameter in module.parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def prompt(batch=1, length=PROMPT, seed=3):
    return torch.randint(3, 128, (batch, length), generator=torch.Generator().manual_seed(seed))


def recomputed(model, ids, steps):
    """Greedy continuation without any cache."""
    for _ in range(steps):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return ids


def close(a, b, tolerance=1e-4):
    return (a - b).abs().max() <= tolerance * b.abs().max()


@pytest.fixture(params=[pytest.param(HALF, id="half"), pytest.param(WHOLE, id="whole")])
def softmax_layers(request):
    return request.param


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_save_reload_generate(name, softmax_layers, tmp_path):
    model = converted(name, softmax_layers)
    ids = prompt()
    logits = model(ids, use_cache=False).logits

    model.save_pretrained(tmp_path)
    softmax = {"attn_implementation": model.softmax_implementation}
    reloaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True, **softmax)
    assert type(reloaded) is type(model)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert torch.equal(reloaded(ids, use_cache=False).logits, logits)

    # The state carries everything: each step's logits are those of the whole sequence.
    continuation = prompt(length=12, seed=5)
    whole = model(torch.cat([ids, continuation], 1), use_cache=False).logits
    cache = model(ids, use_cache=True).past_key_values
    for t in range(continuation.shape[1]):
        step = model(continuation[:, t : t + 1], past_key_values=cache, use_cache=True).logits
        assert close(step[:, -1], whole[:, PROMPT + t])

    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    greedy = model.generate(ids, **options)
    assert torch.equal(greedy, recomputed(model, ids, 6))
    assert torch.equal(model.generate(ids, cache_implementation="static", disable_compile=True, **options), greedy)
    beams = model.generate(ids, num_beams=3, **options)
    assert torch.equal(beams, model.generate(ids, num_beams=3, use_cache=False, **options))


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_left_padded_batch_equals_each_row_alone(name, softmax_layers):
    model = converted(name, softmax_layers)
    lengths = (PROMPT, 9, 2)
    rows = [prompt(length=n, seed=n) for n in lengths]
    ids = torch.zeros(3, PROMPT, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, PROMPT - row.shape[1] :] = row
        mask[i, PROMPT - row.shape[1] :] = 1
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(ids, attention_mask=mask, position_ids=position_ids, use_cache=False).logits
    for i, row in enumerate(rows):
        assert close(logits[i, -row.shape[1] :], model(row, use_cache=False).logits[0])

    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    together = model.generate(ids, attention_mask=mask, output_logits=True, return_dict_in_generate=True, **options)
    for i, row in enumerate(rows):
        alone = model.generate(row, output_logits=True, return_dict_in_generate=True, **options)
        assert close(together.logits[0][i], alone.logits[0][0])
        assert torch.equal(together.sequences[i, PROMPT:], alone.sequences[0, row.shape[1] :])
