"""Hedgehog maps of q and k with random weights, and what PyTorch makes of a token with them."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hf_linattn.feature_maps import FeatureMap, HedgehogFeatureMap
from hf_linattn.sinks import SinkKeys, SinkQueries


@dataclass(frozen=True)
class MapCase:
    B: int = 2
    H: int = 4
    H_kv: int = 2
    D: int = 16
    columns: int = 16
    hidden: int = 0
    magnitude: bool = False
    sinks: int = 0
    far_length: int | None = None
    dtype: torch.dtype = torch.float32
    scale: float = 0.5
    processors: int = 4
    seed: int = 0

    def __str__(self) -> str:
        flags = [name for name in ("magnitude", "far_length") if getattr(self, name)]
        size = f"B{self.B}-H{self.H}kv{self.H_kv}-D{self.D}-C{self.columns}-h{self.hidden}-s{self.sinks}"
        return "-".join([size, str(self.dtype)[6:], *flags, f"{self.processors}sms"])


# The form of smollm2-135m-pure.
SHIPPED = MapCase(
    H=9, H_kv=3, D=64, columns=63, hidden=64, magnitude=True, sinks=2, far_length=8, dtype=torch.bfloat16
)
MAP_CASES = [
    *(MapCase(dtype=dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32)),
    MapCase(magnitude=True),
    MapCase(hidden=24, columns=9, D=33),
    MapCase(hidden=1, columns=1, D=1, sinks=1),
    MapCase(sinks=3, far_length=5, B=11, processors=132),
    MapCase(sinks=40, B=1),
    MapCase(far_length=3, magnitude=True, B=5),
    MapCase(D=256, columns=256, hidden=250, magnitude=True, sinks=5, B=3, H=2, H_kv=1),
    MapCase(D=128, columns=127, hidden=128, magnitude=True, sinks=2, B=9, H=2, H_kv=2, dtype=torch.float16, seed=2),
    SHIPPED,
    replace(SHIPPED, B=1, processors=132, seed=1),
    replace(SHIPPED, B=33, dtype=torch.float32),
]


def build_maps(case: MapCase, device: str = "cpu") -> tuple[FeatureMap, FeatureMap]:
    """The maps of q and k; seeded by the caller."""
    options = {"feature_dim": case.columns, "hidden_dim": case.hidden, "magnitude": case.magnitude}
    map_q, map_k = (HedgehogFeatureMap(heads, case.D, **options) for heads in (case.H, case.H_kv))
    if case.sinks or case.far_length is not None:
        map_q = SinkQueries(map_q, case.sinks, case.far_length)
    if case.sinks:
        map_k = SinkKeys(map_k, case.sinks)
    for feature_map in (map_q, map_k):
        feature_map.to(device).requires_grad_(False).reset_parameters()
        for parameter in feature_map.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape).to(device))
    return map_q, map_k


def make_token(case: MapCase, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """q, k: views into larger tensors with NaN around them; positions `[B]`, some of them those of sinks."""

    def draw(heads: int) -> Tensor:
        whole = torch.full((case.B, heads + 1, case.D + 5), torch.nan, dtype=case.dtype)
        whole[:, 1:, 3:-2] = 2 * torch.randn(case.B, heads, case.D)
        return whole.to(device)[:, 1:, 3:-2]

    return draw(case.H), draw(case.H_kv), torch.arange(case.B, device=device) % 12


def expected_features(case: MapCase, maps, q: Tensor, k: Tensor, positions: Tensor) -> list[Tensor]:
    """As the attention of a layer finds them without the kernel."""
    largest = torch.finfo(case.dtype).max
    return [
        feature_map((x * case.scale)[:, :, None], positions[:, None])[:, :, 0].clamp_max(largest).to(case.dtype)
        for feature_map, x in zip(maps, (q, k), strict=True)
    ]


def assert_features(found, expected) -> None:
    """To the last digit of half precision, to float32's rounding of a sum otherwise."""
    for name, x, y in zip(("phi_q", "phi_k"), found, expected, strict=True):
        assert x.shape == y.shape
        assert x.dtype == y.dtype
        digits = {torch.float32: 1e-4, torch.float16: 1.1e-3, torch.bfloat16: 8e-3}[x.dtype]
        least = 6e-8 if x.dtype == torch.float16 else 1e-12
        torch.testing.assert_close(x, y, rtol=digits, atol=least, msg=lambda text, n=name: f"{n}: {text}")
