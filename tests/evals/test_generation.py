"""What generation costs: every combination is measured, and the size of each cache is what its layers keep."""

import pytest
import torch
from tiny_models import tiny_model
from transformers import CompileConfig

from hf_linattn import LinearAttentionConfig, linearize, modeling
from hf_linattn.evals import generation
from hf_linattn.evals.generation import FIELDS, generation_speed

OPTIONS = {"batches": (2,), "new_tokens": (1, 5), "runs": 1}


@pytest.fixture(scope="module")
def model():
    return linearize(tiny_model(max_position_embeddings=256), LinearAttentionConfig(window=8))


def test_a_constant_state_beside_a_growing_cache(model):
    rows = list(generation_speed(model, contexts=(32, 128), caches=("dynamic",), **OPTIONS))
    assert all(tuple(row) == FIELDS for row in rows)
    assert [(row["variant"], row["context"]) for row in rows] == [
        ("softmax", 32),
        ("student", 32),
        ("softmax", 128),
        ("student", 128),
    ]
    softmax = [row["cache_mib"] * 2**20 for row in rows if row["variant"] == "softmax"]
    student = [row["cache_mib"] * 2**20 for row in rows if row["variant"] == "student"]
    # Keys and values, batch 2, 4 layers, 2 KV heads, 8 dimensions, float32; the last of the new tokens is never read.
    assert softmax == [2 * 2 * 4 * 2 * 8 * 4 * context for context in (32, 128)]
    assert student[0] == student[1]
    # Sums [16, 8] and [16], rings of keys, values and features of 8 tokens.
    state = 2 * 4 * 2 * 4 * (16 * 8 + 16 + 8 * (8 + 8 + 16))
    assert state <= student[0] <= 1.2 * state
    assert all(row["tokens_per_s"] is None or row["tokens_per_s"] > 0 for row in rows)


def test_a_static_cache_holds_no_more_than_the_state(model):
    dynamic, static = (
        next(generation_speed(model, contexts=(32,), caches=(cache,), variants=("student",), **OPTIONS))
        for cache in ("dynamic", "static")
    )
    assert static["cache"] == "static"
    assert static["cache_mib"] == pytest.approx(dynamic["cache_mib"], rel=0.05)


def test_long_contexts_are_read_in_pieces(model, monkeypatch):
    seen = []
    hook = model.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    monkeypatch.setattr(generation, "PREFILL_TOKENS", 64)
    list(generation_speed(model, contexts=(128,), caches=("dynamic",), variants=("student",), **OPTIONS))
    hook.remove()
    assert max(seen) == 32


@pytest.mark.slow
def test_timed_calls_compile_nothing(model, monkeypatch):
    """Of the static cache's calls the first one compiles, on a shorter prompt; the others find its graph."""
    monkeypatch.setattr(generation, "PREFILL_TOKENS", 8)
    frames = []

    def backend(graph, _):
        frames.append(graph)
        return graph.forward

    compiled = CompileConfig(backend=backend, mode=None)
    compiled._compile_all_devices = True
    monkeypatch.setattr(model.generation_config, "compile_config", compiled)
    after, time_call = [], generation._time_call
    monkeypatch.setattr(
        generation, "_time_call", lambda *arguments: (time_call(*arguments), after.append(len(frames)))[0]
    )
    torch.compiler.reset()
    list(generation_speed(model, contexts=(32, 16), caches=("static",), batches=(2,), new_tokens=(4, 9), runs=2))
    calls = 5
    assert [after[i] for i in range(0, 4 * calls, calls)] == [1, 2, 3, 4]
    assert all(after[i] == after[i - i % calls] for i in range(4 * calls))


def test_softmax_generates_as_transformers_does(model, monkeypatch):
    """Ours compiles a converted model's step only, and the softmax step of the variant that says so."""
    asked = []
    monkeypatch.setattr(modeling, "capture_config", lambda *_: asked.append(1))
    for variant, count in (("softmax", 0), ("softmax_captured", 1), ("student", 2)):
        with generation._run_as(model, variant):
            model.get_compiled_call(CompileConfig(backend="eager", mode=None))
        assert len(asked) == count


def test_running_out_of_memory_costs_one_row(model, monkeypatch):
    def fail(_, batch, context, *rest):
        if context == 32:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {"step_ms": 1.0}

    monkeypatch.setattr(generation, "_measure", fail)
    rows = list(generation_speed(model, contexts=(32, 64), caches=("static",), variants=("student",), **OPTIONS))
    assert [(row["note"], row["step_ms"]) for row in rows] == [("out of memory", None), (None, 1.0)]
