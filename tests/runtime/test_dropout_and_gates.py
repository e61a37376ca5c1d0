"""The dropout substitute's statistics and schedule; decay from gates."""

import math

import pytest
import torch
from tiny_models import tiny_model

from hf_linattn import LinearAttentionConfig, linear_attention_modules, linearize, set_attention_dropout
from hf_linattn.dropout import AttentionDropout
from hf_linattn.gates import FixedDecay, ScalarGate, build_gate


@pytest.mark.parametrize(("form", "mean"), [("mean_preserving", 1.0), ("printed", 0.8)])
def test_mean_and_variance(form, mean):
    torch.manual_seed(0)
    o = torch.full((400_000,), 3.0)
    noisy = AttentionDropout(0.2, form).train()(o) / 3.0
    assert abs(noisy.mean() - mean) < 0.01
    # psi ~ N(0, p): variance p, times (1 - p)^2 in the printed form
    assert abs(noisy.var() - 0.2 * mean**2) < 0.01


@pytest.mark.parametrize("form", ["mean_preserving", "printed"])
def test_evaluation_and_p_zero_change_nothing(form):
    o = torch.randn(100)
    assert AttentionDropout(0.2, form).eval()(o) is o
    assert AttentionDropout(0.0, form).train()(o) is o


def test_model_dropout_is_used_when_none_is_configured():
    o = torch.randn(100)
    assert AttentionDropout(None, "printed").train()(o, 0.0) is o
    assert not torch.equal(AttentionDropout(None, "printed").train()(o, 0.3), o)
    assert AttentionDropout(0.0, "printed").train()(o, 0.3) is o


def test_in_a_model_training_is_noisy_and_evaluation_exact():
    model = linearize(tiny_model("llama"), LinearAttentionConfig(window=4, dropout=0.1))
    ids = torch.arange(3, 23).unsqueeze(0)
    with torch.no_grad():
        exact = model(ids, use_cache=False).logits
        model.train()
        assert not torch.allclose(model(ids, use_cache=False).logits, exact)
        set_attention_dropout(model, 0.0)
        assert torch.equal(model(ids, use_cache=False).logits, exact)
    assert all(m.dropout.p == 0.0 for m in linear_attention_modules(model).values())
    with pytest.raises(ValueError, match=r"p: expected a number in \[0, 1\), got 1.5"):
        set_attention_dropout(model, 1.5)


def test_fixed_decay_half_lives():
    gate = FixedDecay(4, 32)
    gate.reset_parameters()
    g_gamma = gate(None)["g_gamma"]
    half_lives = math.log(0.5) / g_gamma
    assert torch.allclose(half_lives, torch.tensor([256.0, 1024.0, 4096.0, 16384.0]), rtol=1e-3)


def test_a_decay_that_is_not_learned_is_saved_and_gets_no_gradient():
    form = LinearAttentionConfig(decay="fixed", decay_kwargs={"half_life": [32, 512], "learned": False})
    model = linearize(tiny_model(), form)
    gates = [m.gate for m in linear_attention_modules(model).values()]
    for gate in gates:
        assert not list(gate.parameters())
        half_lives = math.log(0.5) / gate(None)["g_gamma"]
        assert half_lives.tolist()[0] == pytest.approx(32, rel=1e-5)
        assert half_lives.tolist()[-1] == pytest.approx(512, rel=1e-5)
    assert sum(name.endswith("gate.log_rate") for name in model.state_dict()) == len(gates)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("fixed", {"halflife": 3}, "'fixed' has no option 'halflife'; its options: half_life, learned"),
        ("scalar", {"half_life": [1, 2]}, "'scalar' has no option 'half_life'; its options: none"),
        ("fixed", {"half_life": 256}, "half_life must be two positive numbers of tokens.*got 256"),
        ("fixed", {"half_life": [0, 256]}, "half_life must be two positive numbers"),
    ],
)
def test_wrong_options_of_a_decay_are_named(name, options, message):
    with pytest.raises(ValueError, match=f"^decay_kwargs: {message}"):
        build_gate(name, 2, 8, options)


def test_scalar_gate_is_a_decay_and_learns():
    gate = ScalarGate(2, 8)
    gate.reset_parameters()
    x = torch.randn(3, 5, 8)
    g = gate(x)["g"]
    assert g.shape == (3, 5, 2)
    assert g.dtype == torch.float32
    assert (g <= 0).all()
    assert 4000 < math.log(0.5) / g.mean() < 5000
    g.sum().backward()
    assert gate.weight.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="hidden_states"):
        gate(None)
