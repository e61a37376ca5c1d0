"""The widest calls that the compiled kernels take on devices of each size of shared memory, emulated on a CPU."""

from dataclasses import dataclass, replace

import emulated_kernels
import pytest
import torch
from emulated_build import unavailable_reason
from numerics import assert_close

from hf_linattn.kernels import LinearAttentionState, linear_attention
from hf_linattn.kernels.state import linear_state_shapes

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(unavailable_reason() is not None, reason=str(unavailable_reason())),
]


@dataclass(frozen=True)
class WideCase:
    """A call whose kernels hold x in parts: B is 1, H is 2, H_kv is 1."""

    K: int
    V: int
    dtype: torch.dtype
    capability: int = 90
    normalize: bool = True
    causal: bool = True
    a: float = 0.5
    decay: bool = True
    lengths: tuple[int, ...] = (150,)

    def __str__(self) -> str:
        flags = [name for name in ("normalize", "causal", "decay") if getattr(self, name)]
        size = f"packed{'_'.join(map(str, self.lengths))}-K{self.K}-V{self.V}-{str(self.dtype)[6:]}-a{self.a:g}"
        return "-".join([size, *flags, f"sm{self.capability}"])


# The last dimensions of every dtype on devices with 227, 163 and 99 KiB of shared memory a block.
WIDE_CASES = [
    change(WideCase(k, v, dtype, capability))
    for k, v, dtype, capability in (
        (256, 64, torch.float32, 90),
        (192, 256, torch.float32, 80),
        (129, 1, torch.float32, 80),
        (100, 128, torch.float32, 86),
        (256, 256, torch.float16, 90),
        (64, 256, torch.float16, 80),
        (128, 128, torch.float16, 80),
        (128, 100, torch.float16, 86),
        (256, 200, torch.bfloat16, 86),
    )
    for change in (
        lambda case: case,
        lambda case: replace(case, normalize=False, decay=False, a=0.0),
        lambda case: replace(case, causal=False, decay=False),
        lambda case: replace(case, lengths=(0, 70, 1, 129)),
    )
]


@pytest.mark.parametrize("case", WIDE_CASES, ids=str)
def test_wide_dimensions(case, monkeypatch):
    monkeypatch.setenv("HF_LINATTN_EMULATED_CAPABILITY", str(case.capability))
    torch.manual_seed(0)
    tokens = sum(case.lengths)
    q, k = torch.rand(1, tokens, 2, case.K).to(case.dtype), torch.rand(1, tokens, 1, case.K).to(case.dtype)
    v, d_o = torch.rand(1, tokens, 1, case.V).to(case.dtype), torch.randn(1, tokens, 2, case.V).to(case.dtype)
    g = -0.2 * torch.rand(1, tokens, 1) if case.decay else None
    cu_seqlens = torch.tensor([0, *case.lengths]).cumsum(0) if len(case.lengths) > 1 else None
    options = {"a": case.a, "b": 0.1, "normalize": case.normalize, "causal": case.causal, "cu_seqlens": cu_seqlens}
    state = d_final = None
    if case.causal:
        shapes = linear_state_shapes(len(case.lengths), 1, case.K, case.V, a=case.a, normalize=case.normalize)
        state, d_final = (LinearAttentionState(*(x and draw(x) for x in shapes)) for draw in (torch.rand, torch.randn))

    kernels = {"initial_state": state, "path": "sm80"} | options
    o, den, final = emulated_kernels.forward(q, k, v, g, output_final_state=case.causal, **kernels)
    dq, dk, dv, dg, d_state = emulated_kernels.backward(
        d_o, q, k, v, den, g, d_final=d_final, needs_d_initial=case.causal, **kernels
    )
    actual = {"o": o, "dq": dq, "dk": dk, "dv": dv, "dg": dg}
    for name, members in (("final", final), ("dstate", d_state)):
        actual |= {f"{name}.{n}": x for n, x in zip(state._fields, members, strict=True)} if case.causal else {}

    leaves = [x if x is None else x.double().requires_grad_() for x in (q, k, v, g, *(state or ()))]
    exact_q, exact_k, exact_v, exact_g, *members = leaves
    expected_o, expected_final = linear_attention(
        *(exact_q, exact_k, exact_v),
        g=exact_g,
        initial_state=LinearAttentionState(*members) if case.causal else None,
        output_final_state=case.causal,
        backend="chunked",
        **options,
    )
    loss = (expected_o * d_o).sum()
    loss = loss + sum((x * y).sum() for x, y in zip(expected_final or (), d_final or (), strict=True) if x is not None)
    gradients = iter(torch.autograd.grad(loss, [x for x in leaves if x is not None]))
    names = ["dq", "dk", "dv", "dg", *(f"dstate.{n}" for n in (state._fields if case.causal else ()))]
    expected = {name: None if x is None else next(gradients) for name, x in zip(names, leaves, strict=True)}
    expected |= {"o": expected_o}
    expected |= {f"final.{n}": x for n, x in zip(state._fields, expected_final, strict=True)} if case.causal else {}
    assert expected.keys() == actual.keys()
    for name, x in expected.items():
        assert (x is None) == (actual[name] is None), name
        if x is not None:
            # Single numbers among them cancel more than what the bounds were measured on.
            assert_close(name, actual[name], x, case.dtype, factor=4, backend="cuda")


@pytest.mark.parametrize(
    ("capability", "largest"),
    [(c, (256, 256, 256)) for c in (80, 87, 90, 100)] + [(c, (256, 128, 128)) for c in (86, 89, 120)],
)
def test_largest_dimensions_are_those_that_fit(capability, largest, monkeypatch):
    monkeypatch.setenv("HF_LINATTN_EMULATED_CAPABILITY", str(capability))
    assert tuple(emulated_kernels.load_kernels().hf_linattn_largest_dim(x) for x in range(3)) == largest
    for dtype, dim in zip((torch.bfloat16, torch.float16, torch.float32), largest, strict=True):
        x, too_wide = torch.rand(1, 5, 1, dim, dtype=dtype), torch.rand(1, 5, 1, dim + 1, dtype=dtype)
        assert emulated_kernels.chosen_path(x, x, x, forced="sm80") == "sm80"
        for q, v in ((too_wide, x), (x, too_wide)):
            with pytest.raises(RuntimeError, match=r"shared memory|go up to 256"):
                emulated_kernels.chosen_path(q, q, v, forced="sm80")
