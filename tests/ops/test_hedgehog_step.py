"""The op hedgehog_step and the layers that use it, on a GPU."""

from dataclasses import replace

import pytest
import torch
from hedgehog_maps import MAP_CASES, SHIPPED, MapCase, assert_features, build_maps, expected_features, make_token
from op_backends import on, pairs, targets
from tiny_models import tiny_model

from hf_linattn import LinearAttentionConfig, linearize
from hf_linattn.kernels import explain, hedgehog_step
from hf_linattn.kernels.dispatch import BACKEND_VARIABLE

COMPILED = targets("cuda-cuda", "emulated-sm80")


def call(case: MapCase, maps, q, k, positions, **options):
    return hedgehog_step(q, k, positions, *(x.for_step() for x in maps), scale=case.scale, **options)


def inputs(case: MapCase, target):
    torch.manual_seed(0)
    return build_maps(case, target.device), make_token(case, target.device)


@pairs((MAP_CASES, COMPILED))
def test_features_are_those_of_the_modules(case, target):
    maps, token = inputs(case, target)
    found = call(case, maps, *token, backend=target.backend)
    assert_features(found, expected_features(case, maps, *token))
    again = call(case, maps, *token, backend=target.backend)
    assert all(torch.equal(x, y) for x, y in zip(found, again, strict=True))


@pairs(([SHIPPED, MapCase()], COMPILED))
def test_op_keeps_the_rules_of_torch_library(case, target):
    (map_q, map_k), (q, k, positions) = inputs(case, target)
    weights = [x for pair in zip(map_q.for_step()[:3], map_k.for_step()[:3], strict=True) for x in pair]
    arguments = (q, k, positions, *weights, *map_q.for_step()[3:5], case.columns, case.scale, 8.0)
    torch.library.opcheck(torch.ops.hf_linattn.hedgehog_step.default, arguments)


@pairs(([SHIPPED], targets("cuda-cuda")))
def test_step_is_one_launch(case, target):
    maps, token = inputs(case, target)
    call(case, maps, *token)
    torch.use_deterministic_algorithms(False)  # it fills new memory, which is a launch too
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call(case, maps, *token)
        torch.cuda.synchronize()
    kernels = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert len(kernels) == 1, kernels


@on("chunked-cpu")
def test_without_the_kernel_the_maps_are_asked_for(target):
    maps, token = inputs(SHIPPED, target)
    assert call(SHIPPED, maps, *token) is None
    chosen, reason = explain("cpu", torch.bfloat16, op="hedgehog_step")
    assert chosen == "chunked"
    assert "need a CUDA device" in reason
    with pytest.raises(ValueError, match="'cuda' was asked for by the backend argument, but"):
        call(SHIPPED, maps, *token, backend="cuda")


@on("chunked-cpu")
def test_bad_arguments_are_named(target):
    maps, (q, k, positions) = inputs(MapCase(), target)
    with pytest.raises(TypeError, match="^k: expected the dtype of q"):
        call(MapCase(), maps, q, k.half(), positions)


@pytest.mark.parametrize("sinks", [0, 2])
@on("cuda-cuda", "emulated-sm80")
@torch.no_grad()
def test_a_model_decodes_as_it_does_without_the_kernel(target, sinks, monkeypatch):
    form = {"magnitude": True, "hidden_dim": 8, "feature_dim": 8}
    config = LinearAttentionConfig(window=4, sinks=sinks, far_length=6, feature_map_kwargs=form)
    torch.manual_seed(0)
    model = linearize(tiny_model(), config).to(target.device).eval()
    tokens = torch.randint(0, 60, (2, 12), device=target.device)

    def logits():
        cache, steps = None, []
        for token in tokens.split(1, 1):
            output = model(token, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            steps.append(output.logits)
        return torch.cat(steps, 1)

    found = logits()
    monkeypatch.setenv(BACKEND_VARIABLE, "chunked")
    torch.testing.assert_close(found, logits(), rtol=1e-3, atol=1e-3)


@pairs(([replace(SHIPPED, B=3)], targets("cuda-cuda")))
def test_step_is_captured_in_a_cuda_graph(case, target):
    maps, token = inputs(case, target)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call(case, maps, *token)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call(case, maps, *token)
    token[0].mul_(0.5)
    graph.replay()
    assert_features(found, expected_features(case, maps, *token))
