"""hedgehog_step.cu on a CPU, emulated, against the maps' own modules."""

import ctypes

import pytest
import torch
from emulated_build import unavailable_reason
from emulated_kernels import DTYPES, Buffers, call_kernel, load_parts, pointer
from hedgehog_maps import MAP_CASES, SHIPPED, MapCase, assert_features, build_maps, expected_features, make_token

from hf_linattn.kernels import HedgehogMap
from hf_linattn.kernels.hedgehog_step import MAX_COLUMNS, MAX_DIM

pytestmark = pytest.mark.skipif(unavailable_reason() is not None, reason=str(unavailable_reason()))
WEIGHTS = ("weight", "output_weight", "magnitude_bias", "sink_weight", "sink_bias")
SIZES = ("dtype", "batch", "num_heads", "num_kv_heads", "head_dim", "columns", "hidden_dim", "sinks")


class _Map(ctypes.Structure):
    _fields_ = [
        ("x", ctypes.c_void_p),
        *((f"x_{axis}_stride", ctypes.c_int64) for axis in ("batch", "head")),
        *((name, ctypes.c_void_p) for name in (*WEIGHTS, "features")),
    ]


class _Problem(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in SIZES),
        *((name, ctypes.c_float) for name in ("scale", "far_length")),
        ("positions", ctypes.c_void_p),
        ("position_stride", ctypes.c_int64),
        ("q", _Map),
        ("k", _Map),
    ]


def run_step(case: MapCase, maps: tuple[HedgehogMap, HedgehogMap], q, k, positions) -> list[torch.Tensor]:
    buffers = Buffers()
    features = [buffers.empty(*x.shape[:2], 2 * case.columns + case.sinks, dtype=x.dtype) for x in (q, k)]
    described = [
        _Map(x=pointer(x), x_batch_stride=x.stride(0), x_head_stride=x.stride(1), features=pointer(phi))
        for x, phi in zip((q, k), features, strict=True)
    ]
    for target, weights in zip(described, maps, strict=True):
        for name in WEIGHTS:
            setattr(target, name, pointer(getattr(weights, name)))
    problem = _Problem(
        dtype=DTYPES[q.dtype],
        batch=case.B,
        num_heads=case.H,
        num_kv_heads=case.H_kv,
        head_dim=case.D,
        columns=case.columns,
        hidden_dim=case.hidden,
        sinks=case.sinks,
        scale=case.scale,
        far_length=float("inf") if case.far_length is None else case.far_length,
        positions=pointer(positions),
        position_stride=0 if positions.shape[0] == 1 else positions.stride(0),
        q=described[0],
        k=described[1],
    )
    call_kernel(load_parts(), "hf_linattn_hedgehog_step", ctypes.byref(problem), None)
    buffers.check()
    return features


@pytest.fixture
def machine(case, monkeypatch):
    monkeypatch.setenv("HF_LINATTN_EMULATED_SMS", str(case.processors))
    monkeypatch.setenv("HF_LINATTN_EMULATED_SEED", str(case.seed))
    torch.manual_seed(0)


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("case", MAP_CASES, ids=str)
def test_features_are_those_of_the_modules(case):
    maps, token = build_maps(case), make_token(case)
    found = run_step(case, tuple(x.for_step() for x in maps), *token)
    assert_features(found, expected_features(case, maps, *token))


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("case", [MapCase(dtype=torch.float16, magnitude=True, sinks=2)], ids=str)
def test_what_is_beyond_float16_is_its_largest_number(case):
    maps, (q, k, positions) = build_maps(case), make_token(case)
    maps[0].base.magnitude_bias.fill_(30.0)  # e^20 is the largest magnitude
    maps[0].sink_bias.fill_(15.0)
    found = run_step(case, tuple(x.for_step() for x in maps), q, k, positions)
    assert found[0].max() == torch.finfo(torch.float16).max
    assert_features(found, expected_features(case, maps, q, k, positions))


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("case", [SHIPPED], ids=str)
def test_one_position_for_all_sequences(case):
    maps, (q, k, _) = build_maps(case), make_token(case)
    position = torch.tensor([1])
    found = run_step(case, tuple(x.for_step() for x in maps), q, k, position)
    assert_features(found, expected_features(case, maps, q, k, position))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"columns": MAX_DIM + 1}, "must be 1 to 256, got 16, 257 and 0"),
        ({"columns": 256, "hidden": 256, "sinks": 1}, f"of q has 513 columns in all, more than {MAX_COLUMNS}"),
        ({"H_kv": 0}, "4 and 0 heads, expected one each at least"),
    ],
    ids=["columns", "all", "heads"],
)
def test_a_map_is_refused(change, message):
    case = MapCase(**change)
    with pytest.raises(RuntimeError, match=message):
        run_step(case, tuple(x.for_step() for x in build_maps(case)), *make_token(case))
