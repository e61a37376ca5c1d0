"""Attention transfer trains every layer on its teacher's output and touches nothing else."""

import copy

import pytest
import torch
from tiny_models import ARCHITECTURES, tiny_model

from hf_linattn import LinearAttentionConfig, dispatch_to, linear_attention_modules, linearize, softmax_attention
from hf_linattn.conversion.attention_transfer import (
    LayerwiseTransfer,
    calibrate_log_scale,
    observe,
    transfer_attention,
    transfer_loss,
)
from hf_linattn.conversion.attention_weights import attention_weights_divergence
from hf_linattn.conversion.calibration import far_keys_of, sum_log_mass_ratio
from hf_linattn.conversion.config import TransferConfig
from hf_linattn.conversion.data import stack_rows
from hf_linattn.conversion.far_keys import FarKeys
from hf_linattn.errors import UserError


def converted(name="llama", **options):
    return linearize(tiny_model(name), LinearAttentionConfig(**{"window": 4, "softmax_layers": (0,)} | options))


def transfer_config(steps=12, **options):
    values = {"tokens": steps * 4 * 64, "sequence_length": 64, "batch_size": 4}
    return TransferConfig(**values | options)


def layer_losses(model, batch):
    observer = LayerwiseTransfer(model.softmax_implementation, "normalized_mse")
    observe(model, observer, batch)
    for module in linear_attention_modules(model).values():
        module.zero_grad()
    return {i: loss.item() for i, loss in observer.losses.items()}


@pytest.mark.parametrize("loss", ["normalized_mse", "mse"])
def test_every_layer_learns_and_base_weights_stay_bit_identical(accelerator, corpus, run, loss):
    model = converted()
    base = {name: p.clone() for name, p in model.named_parameters() if ".linear_attention." not in name}
    held_out = stack_rows(corpus, range(4), 64)
    before = layer_losses(model, held_out)
    transfer_attention(accelerator, model, corpus, transfer_config(30, loss=loss), run)
    after = layer_losses(model, held_out)
    assert set(before) == {1, 2, 3}
    for layer in before:
        assert after[layer] < 0.97 * before[layer], (layer, before, after)
    for name, parameter in model.named_parameters():
        if name in base:
            assert torch.equal(parameter, base[name]), name
    records = run.records()
    assert [r["step"] for r in records] == list(range(1, 31))
    assert set(records[0]["layer_losses"]) == {"1", "2", "3"}
    assert records[-1]["tokens"] == 30 * 4 * 64


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_passes_the_teachers_activations_on(name, corpus):
    model = converted(name)
    batch = stack_rows(corpus, [0], 64)
    seen = []
    hook = model.base_model.register_forward_hook(lambda module, args, out: seen.append(out[0]))
    losses = layer_losses(model, batch)
    with torch.no_grad(), softmax_attention(model):
        model.base_model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)
    hook.remove()
    torch.testing.assert_close(seen[0], seen[1])
    assert set(losses) == {1, 2, 3}
    assert all(0 < loss < 10 for loss in losses.values())


def test_layers_are_independent(corpus):
    """What one layer learns does not depend on what another layer's new parameters are."""
    model = converted()
    batch = stack_rows(corpus, [0, 1], 64)
    before = layer_losses(model, batch)
    with torch.no_grad():
        for parameter in linear_attention_modules(model)[1].parameters():
            parameter.mul_(2)
    after = layer_losses(model, batch)
    assert after[1] != before[1]
    assert (after[2], after[3]) == (before[2], before[3])


def test_documents_do_not_see_each_other(corpus):
    """The loss of packed documents comes from each alone: another neighbour changes nothing."""
    model = converted()
    position_ids = torch.arange(32).repeat(2).unsqueeze(0)
    row = stack_rows(corpus, [0], 64)
    outputs = []

    def keep(module, query, key, value, mask, **kwargs):
        outputs.append(
            module.linear_attention(query, key, value, **{"scaling": 8**-0.5, "position_ids": position_ids})
        )
        return outputs[-1], None

    for first_token in (5, 6):
        ids = row.input_ids.clone()
        ids[0, :32] = first_token
        observe(model, keep, row._replace(input_ids=ids, position_ids=position_ids))
    layers = len(outputs) // 2
    for a, b in zip(outputs[:layers], outputs[layers:], strict=True):
        assert not torch.equal(a[:, :32], b[:, :32])
        torch.testing.assert_close(a[:, 32:], b[:, 32:])


@pytest.mark.parametrize("decay", [None, "fixed", "scalar"])
def test_log_scale_starts_where_the_masses_agree(accelerator, corpus, decay):
    """Against the definition, query by query, over one document and all its far keys."""
    model = converted(decay=decay)
    batch = stack_rows(corpus, [0, 1], 64)
    captured = {}

    def keep(module, query, key, value, mask, scaling=None, **kwargs):
        captured[module.layer_idx] = (module, query, key, scaling, kwargs.get("linattn_hidden_states"))
        return torch.zeros_like(query).transpose(1, 2), None

    with torch.no_grad(), dispatch_to(model, "hf_linattn_transfer"):
        observe(model, keep, batch)
    module, query, key, scaling, hidden_states = captured[1]
    attention = module.linear_attention
    with torch.no_grad():
        total, count = sum_log_mass_ratio(
            FarKeys(attention, query, key, scale=scaling, position_ids=batch.position_ids, hidden_states=hidden_states)
        )
        expected, queries = torch.zeros(4), 0
        phi_q = attention.feature_map_q(query * scaling**0.5, batch.position_ids)
        phi_k = attention.feature_map_k(key * scaling**0.5, batch.position_ids)
        gate = attention.gate(hidden_states) if decay else {}
        for row in range(2):
            for i in range(64):
                first = i - int(batch.position_ids[row, i])
                far = list(range(first, i - 4 + 1))
                queries += bool(far)
                for head in range(4 if far else 0):
                    kv = head // 2
                    softmax_mass = sum(torch.exp(scaling * query[row, head, i] @ key[row, kv, j]) for j in far)
                    linear_mass = 0
                    for j in far:
                        steps = range(j + 1, i - 4 + 1)
                        decayed = 0.0
                        if decay == "scalar":
                            decayed = sum(float(gate["g"][row, t, kv]) for t in steps)
                        elif decay == "fixed":
                            decayed = len(steps) * float(gate["g_gamma"][kv])
                        weight = attention.a + attention.b * phi_q[row, head, i] @ phi_k[row, kv, j]
                        linear_mass += weight * torch.tensor(decayed).exp()
                    expected[head] += torch.log(softmax_mass / linear_mass)
    assert count == queries
    torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-3)
    values = calibrate_log_scale(accelerator, model, batch)
    assert set(values) == {1, 2, 3}


@pytest.mark.parametrize(("decay", "softcap"), [(None, None), ("scalar", None), (None, 2.0)])
def test_weights_divergence_is_the_kl_of_all_weights(decay, softcap):
    """Against both distributions written out, query by query; every query drawn, so that the sample is the whole."""
    attention = linear_attention_modules(converted(decay=decay))[1]
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, heads, 12, 8, generator=generator) for heads in (4, 2))
    hidden_states = torch.randn(2, 12, 32, generator=generator)
    positions = torch.tensor([[*range(12)], [*range(5), *range(7)]])
    with torch.no_grad():
        attention.log_scale.normal_(generator=generator)
        phi_q = attention.feature_map_q(query * 0.5**0.5, positions)
        phi_k = attention.feature_map_k(key * 0.5**0.5, positions)
    options = {"scale": 0.5, "position_ids": positions, "hidden_states": hidden_states, "softcap": softcap}
    keys = FarKeys(attention, query, key, **options)
    g = attention.gate(hidden_states)["g"] if decay else torch.zeros(2, 12, 2)
    expected = {}
    for row in range(2):
        for i in range(4, 12):
            first = i - int(positions[row, i])
            for head in range(4):
                teacher, student = [], []
                for j in range(first, i + 1):
                    logit = 0.5 * query[row, head, i] @ key[row, head // 2, j]
                    logit = logit if softcap is None else softcap * torch.tanh(logit / softcap)
                    teacher.append(logit)
                    far = attention.log_scale[head] + torch.log(phi_q[row, head, i] @ phi_k[row, head // 2, j])
                    student.append(far + g[row, j + 1 : i - 3, head // 2].sum() if j <= i - 4 else logit)
                p, q = (torch.stack(x).log_softmax(-1) for x in (teacher, student))
                if first <= i - 4:
                    expected.setdefault(i, []).append((p.exp() * (p - q)).sum())
    for i, parts in expected.items():
        # One position at a time: the draw has only that one to choose from.
        keys.index = torch.arange(12)
        original = torch.randint
        try:
            torch.randint = lambda low, high, size, i=i, **kwargs: torch.full(size, i)
            actual = attention_weights_divergence(attention, keys, 3)
        finally:
            torch.randint = original
        torch.testing.assert_close(actual, torch.stack(parts).sum() / 8, rtol=1e-4, atol=1e-5)
    actual.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in attention.parameters())


def test_sinks_start_with_the_weight_softmax_gives_them(accelerator, corpus):
    """In a layer whose first key is the same everywhere, as in layer 0 for documents that begin with one token."""
    model = converted(sinks=1, rotary_features=False, softmax_layers=())
    batch = stack_rows(corpus, range(4), 64)
    batch.input_ids[batch.position_ids == 0] = 5
    calibrate_log_scale(accelerator, model, batch)
    found = {}

    def measure(module, query, key, value, mask, scaling=None, **kwargs):
        if module.layer_idx == 0:
            found["keys"] = far_keys_of(module, query, key, scaling, kwargs)
            found["log_scale"] = module.linear_attention.log_scale.view(2, 2, 1, 1)
        return torch.zeros_like(query).transpose(1, 2), None

    observe(model, measure, batch)
    keys, queries = found["keys"], torch.arange(4, 20)
    _, weights, far, _ = keys.pairs(queries, 16)
    is_sink = far & (keys.positions[:, :16] == 0)[:, None, None, None]
    query, key = keys.feature_query, keys.feature_key
    logits = keys.scale * torch.einsum("bkgqd,bkjd->bkgqj", query[:, :, queries].unflatten(1, (2, 2)), key[:, :, :16])
    shown = is_sink.expand_as(logits)
    assert shown.any()
    torch.testing.assert_close((weights.log() + found["log_scale"])[shown], logits[shown], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("decay", [None, "fixed", "scalar"])
def test_rows_within_the_window_have_no_weights_loss(decay):
    attention = linear_attention_modules(converted(decay=decay, window=64))[1]
    query, key = torch.randn(2, 4, 12, 8), torch.randn(2, 2, 12, 8)
    keys = FarKeys(attention, query, key, scale=0.5, hidden_states=torch.randn(2, 12, 32))
    assert attention_weights_divergence(attention, keys, 8) == 0


def test_weights_loss_brings_the_weights_closer(accelerator, corpus, run):
    model = converted(feature_map_kwargs={"magnitude": True, "hidden_dim": 8})
    batch = stack_rows(corpus, range(4), 64)

    def divergence():
        found = []

        def measure(module, query, key, value, mask, scaling=None, **kwargs):
            keys = FarKeys(module.linear_attention, query, key, scale=scaling, position_ids=batch.position_ids)
            torch.manual_seed(0)
            found.append(attention_weights_divergence(module.linear_attention, keys, 64).item())
            return torch.zeros_like(query).transpose(1, 2), None

        observe(model, measure, batch)
        return sum(found) / len(found)

    before = divergence()
    config = transfer_config(20, weights_loss=1.0, weights_queries=16, repeat_fraction=0.25)
    transfer_attention(accelerator, model, corpus, config, run)
    assert divergence() < 0.9 * before


def test_calibration_lowers_the_loss(accelerator, corpus):
    model = converted()
    batch = stack_rows(corpus, range(4), 64)
    before = layer_losses(model, batch)
    calibrate_log_scale(accelerator, model, batch)
    after = layer_losses(model, batch)
    assert all(after[layer] < 0.7 * before[layer] for layer in before)


def test_forms_without_parameters_are_left_alone(accelerator, corpus, run):
    model = converted(feature_map="elu", window=0)
    transfer_attention(accelerator, model, corpus, transfer_config(), run)
    assert run.records() == []


def test_a_loss_that_is_not_finite_stops_the_run(accelerator, corpus, run):
    model = converted()
    with torch.no_grad():
        linear_attention_modules(model)[2].feature_map_q.weight.fill_(float("nan"))
    before = copy.deepcopy(linear_attention_modules(model)[1].state_dict())
    with pytest.raises(UserError, match=r"loss of layer 2 is nan at step 1; lower transfer.learning_rate"):
        transfer_attention(accelerator, model, corpus, transfer_config(calibrate=False), run)
    after = linear_attention_modules(model)[1].state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_loss_of_an_all_zero_teacher_is_finite():
    zero = torch.zeros(1, 3, 2, 4)
    assert transfer_loss(zero, zero, "normalized_mse") == 0
    assert transfer_loss(2 * torch.ones(1, 3, 2, 4), torch.ones(1, 3, 2, 4), "normalized_mse") == 1
