"""The state in Transformers' cache: constant, reorderable, undoable as far as recorded, and batched without leaks."""

import copy

import pytest
import torch
import torch._dynamo.testing
from tiny_models import tiny_model
from transformers import CompileConfig, DynamicCache, StaticCache

from hf_linattn import LinearAttentionConfig, linear_attention_modules, linearize
from hf_linattn.cache import LinearAttentionCacheLayer, convert_cache

FORMS = {
    "window": LinearAttentionConfig(window=4, decay="scalar"),
    "sinks": LinearAttentionConfig(window=4, sinks=2, far_length=8, rotary_features=False),
    "hybrid": LinearAttentionConfig(window=4, softmax_layers=(0, 3)),
    "pure": LinearAttentionConfig(feature_map="identity", window=0, decay="fixed"),
}


@pytest.fixture(params=list(FORMS))
def model(request):
    torch.manual_seed(0)
    model = linearize(tiny_model("llama"), FORMS[request.param])
    with torch.no_grad():
        for parameter in (p for m in linear_attention_modules(model).values() for p in m.parameters()):
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def ids(batch=1, length=30, seed=0):
    return torch.randint(3, 128, (batch, length), generator=torch.Generator().manual_seed(seed))


def close(a, b):
    return (a - b).abs().max() <= 1e-4 * b.abs().max()


def state_bytes(cache):
    return [
        sum(t.numel() * t.element_size() for t in layer.state if t is not None)
        for layer in cache.layers
        if isinstance(layer, LinearAttentionCacheLayer)
    ]


@torch.no_grad()
def test_state_does_not_grow_and_sums_are_fp32(model):
    short = model(ids(length=6), use_cache=True).past_key_values
    long = model(ids(length=300), use_cache=True).past_key_values
    assert state_bytes(short) == state_bytes(long)
    assert all(
        layer.state.kv.dtype == torch.float32 for layer in long.layers if isinstance(layer, LinearAttentionCacheLayer)
    )


@torch.no_grad()
@pytest.mark.parametrize("splits", [(30,), (1, 29), (29, 1), (7, 13, 10), (3, 3, 24), (1,) * 30], ids=str)
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_prefill_in_any_split(model, splits, kind):
    x = ids(batch=2)
    whole = model(x, use_cache=False).logits
    cache = (
        DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(config=model.config, max_cache_len=64)
    )
    parts = [model(part, past_key_values=cache, use_cache=True).logits for part in x.split(splits, 1)]
    assert close(torch.cat(parts, 1), whole)
    assert int(cache.get_seq_length()) == 30
    states = [layer.state for layer in cache.layers if isinstance(layer, LinearAttentionCacheLayer)]
    assert states
    assert all(x.is_contiguous() for state in states for x in state if x is not None)


@torch.no_grad()
def test_bf16_decode_follows_prefill(model):
    """Up to rounding, also after many windows: the sums stay float32."""
    model = model.to(torch.bfloat16)
    x = ids(2, 60)
    whole = model(x, use_cache=False).logits.float()
    cache = model(x[:, :7], use_cache=True).past_key_values
    steps = [model(x[:, t : t + 1], past_key_values=cache).logits.float() for t in range(7, 60)]
    error = (torch.cat(steps, 1) - whole[:, 7:]).norm(dim=(0, 2)) / whole[:, 7:].norm(dim=(0, 2))
    assert error.max() < 0.05


@torch.no_grad()
def test_continued_prefill_with_padding_inside_the_new_chunk(model):
    """A row padded in its second chunk equals the row alone (Transformers issues 46773 and 47086 are about this)."""
    first, second = ids(2, 9, seed=1), ids(2, 6, seed=2)
    mask = torch.ones(2, 15, dtype=torch.long)
    mask[1, 9:12] = 0
    second[1, :3] = 0
    positions = (mask.cumsum(1) - 1)[:, 9:]
    cache = model(first, use_cache=True).past_key_values
    logits = model(second, attention_mask=mask, position_ids=positions, past_key_values=cache).logits
    for row, real in ((0, slice(0, 6)), (1, slice(3, 6))):
        alone = torch.cat([first[row], second[row, real]])[None]
        assert close(logits[row, real], model(alone, use_cache=False).logits[0, 9:])


@torch.no_grad()
def test_right_padded_prefill_leaves_the_state_of_the_row_alone(model):
    x = ids(2, 12)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, 7:] = 0
    cache = model(x, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).past_key_values
    alone = model(x[1:, :7]).past_key_values
    for i in linear_attention_modules(model):
        padded, single = cache.layers[i], alone.layers[i]
        for name, value in single.state._asdict().items():
            if value is not None and value.ndim:
                assert torch.allclose(getattr(padded.state, name)[1:].float(), value.float(), atol=1e-4), name


@torch.no_grad()
def test_reorder_repeat_select(model):
    x = ids(3, 11)
    order = torch.tensor([2, 0, 0])
    cache = model(x, use_cache=True).past_key_values
    cache.reorder_cache(order)
    token = ids(3, 1, seed=7)
    whole = model(torch.cat([x[order], token], 1), use_cache=False).logits[:, -1]
    assert close(model(token, past_key_values=cache).logits[:, -1], whole)

    cache = model(x[:1], use_cache=True).past_key_values
    cache.batch_repeat_interleave(3)
    whole = model(torch.cat([x[:1].repeat(3, 1), token], 1), use_cache=False).logits[:, -1]
    assert close(model(token, past_key_values=cache).logits[:, -1], whole)
    cache.batch_select_indices(torch.tensor([1]))
    assert close(
        model(x[:1, :1], past_key_values=cache).logits[:, -1],
        model(torch.cat([x[:1], token[1:2], x[:1, :1]], 1), use_cache=False).logits[:, -1],
    )


@torch.no_grad()
def test_reset_starts_a_new_sequence(model):
    cache = StaticCache(config=model.config, max_cache_len=32)
    model(ids(2, 9), past_key_values=cache)
    cache.reset()
    x = ids(2, 9, seed=5)
    model(x[:, :8], past_key_values=cache)
    assert close(model(x[:, 8:], past_key_values=cache).logits[:, -1], model(x, use_cache=False).logits[:, -1])


@torch.no_grad()
def test_deepcopy_branches(model):
    cache = model(ids(1, 9), use_cache=True).past_key_values
    branch = copy.deepcopy(cache)
    model(ids(1, 3, seed=8), past_key_values=branch)
    token = ids(1, 1, seed=9)
    whole = model(torch.cat([ids(1, 9), token], 1), use_cache=False).logits[:, -1]
    assert close(model(token, past_key_values=cache).logits[:, -1], whole)


@torch.no_grad()
@pytest.mark.parametrize("undo", [1, 3, 5, 7, 8])
def test_crop_within_what_was_recorded(model, undo):
    x = ids(1, 20)
    cache = model(x[:, :9], use_cache=True).past_key_values
    cache.activate_past_recording()
    model(x[:, 9:14], past_key_values=cache)
    for t in range(14, 17):
        model(x[:, t : t + 1], past_key_values=cache)
    cache.crop(-undo)
    kept = 17 - undo
    token = x[:, 17:18]
    whole = model(torch.cat([x[:, :kept], token], 1), use_cache=False).logits[:, -1]
    assert close(model(token, past_key_values=cache).logits[:, -1], whole)


@torch.no_grad()
def test_crop_beyond_the_record_is_refused(model):
    cache = model(ids(1, 9), use_cache=True).past_key_values
    layer = next(x for x in cache.layers if isinstance(x, LinearAttentionCacheLayer))
    with pytest.raises(RuntimeError, match="cannot remove 2 tokens .* last 0 are recorded"):
        layer.crop(-2)
    layer.activate_past_recording()
    assert layer.seen == 9


@torch.no_grad()
def test_filled_softmax_cache_is_refused(model):
    cache = tiny_model("llama")(ids(), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="already holds softmax keys"):
        convert_cache(cache, [1])


@torch.no_grad()
def test_assisted_and_prompt_lookup_decoding(model):
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    x = ids(1, 12)
    expected = model.generate(x, **options)
    assert torch.equal(model.generate(x, prompt_lookup_num_tokens=3, **options), expected)
    assert torch.equal(model.generate(x, assistant_model=tiny_model("llama", seed=4), **options), expected)
    assistant = copy.deepcopy(model)
    assert torch.equal(model.generate(x, assistant_model=assistant, **options), expected)


@torch.no_grad()
def test_multi_turn_reuse_of_the_returned_cache(model):
    options = {
        "max_new_tokens": 4,
        "min_new_tokens": 4,
        "do_sample": False,
        "pad_token_id": 0,
        "return_dict_in_generate": True,
    }
    first = model.generate(ids(1, 10), attention_mask=torch.ones(1, 10, dtype=torch.long), **options)
    turn = torch.cat([first.sequences, ids(1, 5, seed=3)], 1)
    options["attention_mask"] = torch.ones_like(turn)
    second = model.generate(turn, past_key_values=first.past_key_values, **options)
    assert torch.equal(second.sequences, model.generate(turn, **options).sequences)


@torch.no_grad()
@pytest.mark.parametrize("chunk", [None, pytest.param(6, marks=pytest.mark.slow)])
def test_generate_compiles_a_static_cache_once(model, chunk):
    """As it does softmax: one graph for every step of every call, and no new one for the next call's cache."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    # A prompt in pieces is compiled too, where our prefill steps out of the graph.
    compiled = CompileConfig(backend=backend, mode=None, fullgraph=chunk is None)
    compiled._compile_all_devices = True
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    options |= {"cache_implementation": "static", "prefill_chunk_size": chunk, "return_dict_in_generate": True}
    options |= {"output_logits": True, "attention_mask": torch.ones(2, 12, dtype=torch.long)}
    eager = model.generate(ids(2, 12), disable_compile=True, **options)
    for _ in range(2):
        output = model.generate(ids(2, 12), compile_config=compiled, **options)
        assert close(torch.stack(output.logits), torch.stack(eager.logits))
        assert len(graphs) == 1 or chunk
    for layer in output.past_key_values.layers:
        if isinstance(layer, LinearAttentionCacheLayer):
            # Otherwise every replay of a CUDA graph would copy them in.
            static = [layer.seen, *(t for t in layer.state if t is not None)]
            assert all(t._dynamo_static_input_type for t in static)


@torch.no_grad()
def test_compiled_static_decode_is_one_graph(model):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    x = ids(2, 12)
    whole = model(x, use_cache=False).logits
    cache = StaticCache(config=model.config, max_cache_len=32)
    model(x[:, :6], past_key_values=cache)
    step = torch.compile(model.forward, fullgraph=True, backend=counter)
    for t in range(6, 12):
        position = torch.full((2, 1), t)
        logits = step(input_ids=x[:, t : t + 1], position_ids=position, past_key_values=cache, use_cache=True).logits
        assert close(logits[:, -1], whole[:, t])
    assert counter.frame_count == 1
