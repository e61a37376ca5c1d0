"""Conversion in place: what is replaced, what is refused, and that a refusal changes nothing."""

import copy
import dataclasses
import sys

import pytest
import torch
from tiny_models import ARCHITECTURES, tiny_model
from transformers import AttentionInterface, AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import hf_linattn
from hf_linattn import LinearAttentionConfig, linearize
from hf_linattn.feature_maps import FEATURE_MAPS


def ids(length=30, batch=1):
    return torch.randint(3, 128, (batch, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_in_place_and_only_the_chosen_layers():
    model = tiny_model("llama")
    weight = model.model.layers[0].self_attn.q_proj.weight
    assert linearize(model, LinearAttentionConfig(softmax_layers=(1, 3))) is model
    assert model.model.layers[0].self_attn.q_proj.weight is weight
    assert sorted(hf_linattn.linear_attention_modules(model)) == [0, 2]
    assert sorted(hf_linattn.attention_modules(model)) == [0, 1, 2, 3]
    assert type(model).__name__ == "LinAttnLlamaForCausalLM"
    assert model.config.model_type == "hf_linattn"
    assert model.config.base_model_type == "llama"


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gemma2", "opt", "granite", "gpt2", "mistral@sliding"])
def test_prompt_shorter_than_the_window_is_exactly_the_teacher(name):
    teacher = tiny_model(name)
    expected = teacher(ids(8), use_cache=False).logits
    model = linearize(copy.deepcopy(teacher), LinearAttentionConfig(window=16))
    assert (model(ids(8), use_cache=False).logits - expected).abs().max() < 1e-4 * expected.abs().max()


@torch.no_grad()
def test_softmax_attention_is_the_teacher_bit_for_bit():
    teacher = tiny_model("llama")
    expected = teacher(ids(), use_cache=False).logits
    model = linearize(copy.deepcopy(teacher), LinearAttentionConfig(window=4))
    changed = model(ids(), use_cache=False).logits
    assert not torch.allclose(changed, expected, atol=1e-2)
    with hf_linattn.softmax_attention(model):
        assert torch.equal(model(ids(), use_cache=False).logits, expected)
        generated = model.generate(ids(), max_new_tokens=5, do_sample=False)
    assert torch.equal(generated, teacher.generate(ids(), max_new_tokens=5, do_sample=False))
    assert torch.equal(model(ids(), use_cache=False).logits, changed)


@torch.no_grad()
def test_window_only_is_a_sliding_window_softmax():
    teacher = tiny_model("mistral", sliding_window=4)
    expected = teacher(ids(), use_cache=False).logits
    model = linearize(copy.deepcopy(teacher), LinearAttentionConfig(window=64))
    with hf_linattn.window_only(model):
        assert (model(ids(), use_cache=False).logits - expected).abs().max() < 1e-4 * expected.abs().max()
    assert not torch.allclose(model(ids(), use_cache=False).logits, expected, atol=1e-2)


@torch.no_grad()
def test_windows_of_at_most_are_those_of_a_model_built_with_them():
    config = LinearAttentionConfig(window=4, layer_windows={1: 8, 2: 20})
    model, shorter = (
        linearize(tiny_model("llama"), dataclasses.replace(config, layer_windows=windows))
        for windows in ({1: 8, 2: 20}, {1: 8, 2: 8})
    )
    before = model(ids(), use_cache=False).logits
    with hf_linattn.windows_of_at_most(model, 8):
        assert torch.equal(model(ids(), use_cache=False).logits, shorter(ids(), use_cache=False).logits)
    assert torch.equal(model(ids(), use_cache=False).logits, before)
    with hf_linattn.windows_of_at_most(model, None):
        assert torch.equal(model(ids(), use_cache=False).logits, before)


def test_window_only_refuses_a_model_without_window():
    model = linearize(tiny_model("llama"), LinearAttentionConfig(window=0))
    with pytest.raises(ValueError, match="no softmax window"), hf_linattn.window_only(model):
        pass


@torch.no_grad()
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize("window", [0, 4])
@pytest.mark.parametrize("decay", [None, "fixed", "scalar"])
def test_every_attention_form_decodes_as_it_prefills(feature_map, window, decay):
    model = linearize(
        tiny_model("llama"),
        LinearAttentionConfig(feature_map=feature_map, window=window, decay=decay, softmax_layers=(1,)),
    )
    x = ids(20, batch=2)
    whole = model(x, use_cache=False).logits
    assert torch.isfinite(whole).all()
    cache = model(x[:, :7], use_cache=True).past_key_values
    middle = model(x[:, 7:15], past_key_values=cache, use_cache=True).logits
    steps = [model(x[:, t : t + 1], past_key_values=cache, use_cache=True).logits for t in range(15, 20)]
    split = torch.cat([middle, *steps], 1)
    assert (split - whole[:, 7:]).abs().max() < 1e-4 * whole.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in ("gpt2", "opt")])
def test_features_without_rope_see_what_the_projections_gave(name, monkeypatch):
    model = linearize(tiny_model(name), LinearAttentionConfig(window=4, rotary_features=False))
    attention = sys.modules[type(hf_linattn.attention_modules(model)[0]).__module__]
    rotate, before, seen = attention.apply_rotary_pos_emb, [], []
    with monkeypatch.context() as patch:
        # Turning back calls it too, with what it has returned.
        patch.setattr(
            attention, "apply_rotary_pos_emb", lambda q, *a, **kw: (before.append(q), rotate(q, *a, **kw))[1]
        )
        for module in hf_linattn.linear_attention_modules(model).values():
            module.feature_map_q.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        model(ids(30), use_cache=False)
    scaling = hf_linattn.attention_modules(model)[0].scaling
    # A layer without RoPE (SmolLM3) calls no rotation.
    rotated = [i for i, m in hf_linattn.attention_modules(model).items() if getattr(m, "use_rope", True)]
    assert len(before) == 2 * len(rotated)
    for first, i in zip(before[::2], rotated, strict=True):
        assert torch.allclose(
            seen[i][..., : first.shape[-1]], first * scaling**0.5, atol=1e-4 * float(first.abs().max())
        )


@torch.no_grad()
def test_features_without_rope_decode_as_they_prefill():
    model = linearize(tiny_model("llama"), LinearAttentionConfig(window=4, rotary_features=False))
    x = ids(20, batch=2)
    whole = model(x, use_cache=False).logits
    cache = model(x[:, :15], use_cache=True).past_key_values
    split = torch.cat([model(x[:, t : t + 1], past_key_values=cache).logits for t in range(15, 20)], 1)
    assert (split - whole[:, 15:]).abs().max() < 1e-4 * whole.abs().max()


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_features_without_rope_need_a_model_with_it(name):
    with pytest.raises(ValueError, match="^rotary_features: expected True for .*no rotary embedding"):
        linearize(tiny_model(name), LinearAttentionConfig(window=4, rotary_features=False))


@torch.no_grad()
def test_windows_of_single_layers(tmp_path):
    """A layer's own window holds in prefill, in decoding and in a model read back; which layer has it matters."""
    teacher = tiny_model("llama")
    x = ids(30, batch=2)
    logits = {}
    for layer in (1, 2):
        model = linearize(copy.deepcopy(teacher), LinearAttentionConfig(window=4, layer_windows={layer: 12}))
        windows = {i: m.window for i, m in hf_linattn.linear_attention_modules(model).items()}
        assert windows == {i: 12 if i == layer else 4 for i in range(4)}
        logits[layer] = model(x, use_cache=False).logits
        cache = model(x[:, :17], use_cache=True).past_key_values
        steps = [model(x[:, t : t + 1], past_key_values=cache, use_cache=True).logits for t in range(17, 30)]
        assert (torch.cat(steps, 1) - logits[layer][:, 17:]).abs().max() < 1e-4 * logits[layer].abs().max()
    assert not torch.allclose(logits[1], logits[2], atol=1e-2)
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(x, use_cache=False).logits, logits[2])


def test_a_window_of_a_layer_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"layer_windows: \[7\] are not layers of this model, which has 0 to 3"):
        linearize(tiny_model("llama"), LinearAttentionConfig(layer_windows={7: 12}))


@torch.no_grad()
def test_unnormalised_form():
    model = linearize(tiny_model("llama"), LinearAttentionConfig(feature_map="identity", window=0, normalize=False))
    x = ids(12)
    whole = model(x, use_cache=False).logits
    cache = model(x[:, :11], use_cache=True).past_key_values
    assert torch.allclose(model(x[:, 11:], past_key_values=cache).logits[:, -1], whole[:, -1], atol=1e-4)


UNSUPPORTED = {
    "falcon": {"num_hidden_layers": 2},
    "gptj": {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64, "rotary_dim": 4},
    "bloom": {"n_head": 4, "n_layer": 2},
}


@torch.no_grad()
@pytest.mark.parametrize("model_type", UNSUPPORTED)
def test_refusal_names_the_type_and_leaves_the_model_alone(model_type):
    values = {"vocab_size": 128, "hidden_size": 32, "num_attention_heads": 4} | UNSUPPORTED[model_type]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **values)).eval()
    before, cls, logits = model.config.to_dict(), type(model), model(ids(), use_cache=False).logits
    with pytest.raises(ValueError, match=f"cannot convert a '{model_type}' model"):
        linearize(model, LinearAttentionConfig())
    assert type(model) is cls
    assert model.config.to_dict() == before
    assert torch.equal(model(ids(), use_cache=False).logits, logits)


def test_a_failing_conversion_leaves_the_model_alone():
    model = tiny_model("llama")
    before, cls = model.config.to_dict(), type(model)
    with pytest.raises(ValueError, match=r"softmax_layers: \[9\] are not layers of this model, which has 0 to 3"):
        linearize(model, LinearAttentionConfig(softmax_layers=(9,)))
    assert type(model) is cls
    assert model.config.to_dict() == before
    assert model.config._attn_implementation == "sdpa"
    assert not hf_linattn.linear_attention_modules(model)
    linearize(model, LinearAttentionConfig())
    assert len(hf_linattn.linear_attention_modules(model)) == 4


def test_refuses_what_is_converted_or_no_language_model():
    model = linearize(tiny_model("llama"), LinearAttentionConfig())
    with pytest.raises(ValueError, match="is converted already"):
        linearize(model, LinearAttentionConfig())
    with pytest.raises(ValueError, match="expected a causal language model"):
        linearize(AutoModel.from_config(tiny_model("llama").config), LinearAttentionConfig())


def test_probe_catches_attention_that_is_not_softmax_of_scaled_dot_products(monkeypatch):
    def biased(module, query, key, value, *args, **kwargs):
        o, weights = sdpa(module, query, key, value, *args, **kwargs)
        return o * 1.5, weights

    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", biased)
    with pytest.raises(ValueError, match=r"its attention is not softmax\(scale q.k\)"):
        linearize(tiny_model("llama"), LinearAttentionConfig())


def test_probe_catches_a_future_leak(monkeypatch):
    leaking = hf_linattn.LinearAttention.forward

    def forward(self, query, key, value, *args, **kwargs):
        return leaking(self, query, key, value, *args, **kwargs) + value.mean((1, 2))[:, None, None]

    monkeypatch.setattr(hf_linattn.LinearAttention, "forward", forward)
    with pytest.raises(ValueError, match="not causal"):
        linearize(tiny_model("llama"), LinearAttentionConfig())


def test_probe_catches_layers_that_are_not_called():
    model = tiny_model("llama")
    model.model.layers[2].self_attn.forward = lambda hidden_states, **kwargs: (hidden_states, None)
    with pytest.raises(ValueError, match=r"layers \[2\] never call"):
        linearize(model, LinearAttentionConfig())


@torch.no_grad()
def test_survives_set_attn_implementation():
    model = linearize(tiny_model("llama"), LinearAttentionConfig(window=4, softmax_layers=(0,)))
    expected = model(ids(), use_cache=False).logits
    model.set_attn_implementation("eager")
    assert torch.allclose(model(ids(), use_cache=False).logits, expected, atol=1e-4)
    assert not torch.allclose(tiny_model("llama")(ids()).logits, expected, atol=1e-2)


def test_paged_cache_is_refused():
    model = linearize(tiny_model("llama"), LinearAttentionConfig(window=4))
    module = hf_linattn.attention_modules(model)[0]
    x = torch.randn(1, 4, 3, 8)
    with pytest.raises(NotImplementedError, match="no paged key-value cache"):
        hf_linattn.attention.linear_attention_forward(module, x, x[:, :2], x[:, :2], None, cache=object())
