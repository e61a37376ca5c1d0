"""`generate` captures its decode step: the same tokens, and no capture of what a replay would get wrong."""

import types

import pytest
import torch
from tiny_models import tiny_model
from transformers import CompileConfig, StaticCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from hf_linattn import LinearAttentionConfig, decoding, linearize, modeling
from hf_linattn.decoding import CapturedStep, capture_config

FORMS = {
    "pure": LinearAttentionConfig(window=4, sinks=2, far_length=8, rotary_features=False),
    "hybrid": LinearAttentionConfig(window=4, softmax_layers=(0, 3)),
    "no-window": LinearAttentionConfig(feature_map="identity", window=0, decay="fixed"),
}
OPTIONS = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
OPTIONS |= {"cache_implementation": "static"}


@pytest.fixture(params=list(FORMS))
def model(request):
    return linearize(tiny_model("llama"), FORMS[request.param])


def prompt(batch=2, length=12, padding=0, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, :padding] = 0
    ids = torch.randint(3, 128, (batch, length), generator=generator)
    return {"inputs": ids.to(device), "attention_mask": mask.to(device)}


class Captures:
    """Stands for CUDA's: keeps functions, and runs one when it is replayed, into the result of the capture."""

    def __init__(self):
        self.count, self.replays = 0, 0

    def __call__(self, function):
        self.count += 1
        result = CausalLMOutputWithPast()

        def replay():
            self.replays += 1
            output = function()
            result.logits, result.past_key_values = output.logits, output.past_key_values

        return replay, result


@pytest.fixture
def captures(monkeypatch):
    """`generate` on a CPU as on a GPU, but for the compiler and the graph itself."""
    eager = CompileConfig(backend="eager", mode=None)
    captures = Captures()
    monkeypatch.setattr(decoding, "capture", captures)
    monkeypatch.setattr(modeling, "capture_config", lambda model, config: eager)
    torch._dynamo.reset()
    return captures


def compiled():
    config = CompileConfig(backend="eager", mode=None)
    config._compile_all_devices = True
    return {"compile_config": config} | OPTIONS


@torch.no_grad()
@pytest.mark.parametrize("padding", [0, 5])
def test_captured_tokens_are_those_of_every_step_run(model, captures, padding):
    inputs = prompt(padding=padding)
    expected = model.generate(**inputs, disable_compile=True, **OPTIONS)
    assert torch.equal(model.generate(**inputs, **compiled()), expected)
    # Prefill gives the first of the eight tokens, the first step runs, six replays give the rest.
    assert (captures.count, captures.replays) == (1, 6)


@torch.no_grad()
def test_each_call_captures_anew(model, captures):
    """A weight or an adapter may have changed between calls, and the cache is another one."""
    for change in range(3):
        inputs = prompt(batch=2 + change)
        model.lm_head.weight.copy_(torch.randn_like(model.lm_head.weight))
        expected = model.generate(**inputs, disable_compile=True, **OPTIONS)
        assert torch.equal(model.generate(**inputs, **compiled()), expected)
        assert captures.count == change + 1


@torch.no_grad()
def test_outputs_that_generate_keeps_are_not_captured(model, captures):
    inputs = prompt()
    options = {"output_hidden_states": True, "return_dict_in_generate": True}
    expected = model.generate(**inputs, disable_compile=True, **options, **OPTIONS)
    output = model.generate(**inputs, **options, **compiled())
    assert captures.count == 0
    for step, expected_step in zip(output.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(step[-1], expected_step[-1])


@torch.no_grad()
def test_a_cache_that_counts_in_python_is_not_captured(captures):
    """As the sliding windows of Transformers' static cache do: a replay would not count."""
    model = linearize(tiny_model("mistral@sliding"), LinearAttentionConfig(window=4, softmax_layers=(1,)))
    cache = StaticCache(config=model.config, max_cache_len=32)
    assert cache.layers[1].is_sliding
    inputs = prompt()
    expected = model.generate(**inputs, disable_compile=True, **OPTIONS)
    assert torch.equal(model.generate(**inputs, **compiled()), expected)
    assert captures.count == 0


@torch.no_grad()
def test_a_failed_capture_is_reported_and_steps_run(model, captures, monkeypatch, caplog):
    def fail(function):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(decoding, "capture", fail)
    inputs = prompt()
    expected = model.generate(**inputs, disable_compile=True, **OPTIONS)
    with caplog.at_level("WARNING", logger="hf_linattn"):
        assert torch.equal(model.generate(**inputs, **compiled()), expected)
    assert [r.getMessage() for r in caplog.records if r.name == decoding.__name__] == [
        "generate: the decode step runs without a CUDA graph, as it could not be captured: "
        "operation not permitted when stream is capturing"
    ]


def test_inputs_of_another_shape_are_not_replayed(captures):
    cache = types.SimpleNamespace(layers=[])
    calls = []

    def forward(input_ids, past_key_values):
        calls.append(input_ids.tolist())
        return CausalLMOutputWithPast(logits=2 * input_ids, past_key_values=past_key_values)

    step = CapturedStep(forward)
    for rows in (1, 1, 1, 2, 2, 1):
        ids = torch.randint(3, 128, (rows, 1))
        assert torch.equal(step(input_ids=ids, past_key_values=cache).logits, 2 * ids)
    assert (captures.count, captures.replays) == (2, 3)
    assert len(calls) == 6


class OnCuda(torch.nn.Linear):
    """One layer that says it is on a GPU."""

    devices = ("cuda:0", "cuda:0")

    def parameters(self):
        return [types.SimpleNamespace(device=torch.device(device)) for device in self.devices]


def test_what_is_captured():
    model = OnCuda(2, 2)
    config = capture_config(model, None)
    assert (config.backend, config.mode, config.fullgraph) == ("inductor", "default", False)
    assert capture_config(model, CompileConfig(fullgraph=True)).fullgraph
    for other in (CompileConfig(backend="eager"), CompileConfig(mode="max-autotune"), CompileConfig(options={})):
        assert capture_config(model, other) is None
    hook = model.register_forward_hook(lambda *_: None)
    assert capture_config(model, None) is None
    hook.remove()
    assert capture_config(model, None) is not None
    model.devices = ("cuda:0", "cuda:1")
    assert capture_config(model, None) is None
    assert capture_config(linearize(tiny_model("llama"), FORMS["pure"]), None) is None


@pytest.fixture
def cuda_model(model):
    torch._dynamo.reset()
    return model.to("cuda")


@torch.no_grad()
@pytest.mark.gpu
@pytest.mark.parametrize("padding", [0, 5])
def test_cuda_graph_gives_the_same_tokens(cuda_model, padding, monkeypatch):
    captured = []
    monkeypatch.setattr(decoding, "capture", lambda f, capture=decoding.capture: captured.append(1) or capture(f))
    for batch in (2, 3, 2):
        inputs = prompt(batch, padding=padding, device="cuda")
        cuda_model.lm_head.weight.copy_(torch.randn_like(cuda_model.lm_head.weight))
        expected = cuda_model.generate(**inputs, disable_compile=True, **OPTIONS)
        assert torch.equal(cuda_model.generate(**inputs, **OPTIONS), expected)
    assert len(captured) == 3


@torch.no_grad()
@pytest.mark.gpu
def test_what_cuda_cannot_capture_runs_step_by_step(cuda_model, caplog):
    class Waits(torch.nn.Module):
        def __init__(self, norm):
            super().__init__()
            self.norm = norm

        @torch.compiler.disable
        def forward(self, x):
            x = self.norm(x)
            return x if float(x.abs().max()) > 0 else x + 1

    cuda_model.model.norm = Waits(cuda_model.model.norm)
    inputs = prompt(device="cuda")
    expected = cuda_model.generate(**inputs, disable_compile=True, **OPTIONS)
    with caplog.at_level("WARNING", logger="hf_linattn"):
        assert torch.equal(cuda_model.generate(**inputs, **OPTIONS), expected)
    assert "could not be captured" in caplog.text
    assert torch.equal(cuda_model.generate(**inputs, disable_compile=True, **OPTIONS), expected)
