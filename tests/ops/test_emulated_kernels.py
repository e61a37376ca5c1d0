"""The CUDA kernels on a CPU, emulated, against float64 references."""

from dataclasses import dataclass
from random import Random

import emulated_kernels
import pytest
import torch
from emulated_build import unavailable_reason
from numerics import assert_close
from torch import Tensor
from torch.nn import functional as F

from hf_linattn.kernels import LinearAttentionState, init_state, linear_attention, linear_attention_step
from hf_linattn.kernels.reference import guarded_denominator

pytestmark = pytest.mark.skipif(unavailable_reason() is not None, reason=str(unavailable_reason()))

FEATURE_MAPS = {
    "none": lambda x: x,
    "elu": lambda x: F.elu(x) + 1,
    "relu": F.relu,
    "l2": lambda x: F.normalize(x, dim=-1),
}
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@dataclass(frozen=True)
class StepCase:
    B: int = 1
    H: int = 1
    H_kv: int = 1
    K: int = 16
    V: int = 16
    dtype: torch.dtype = torch.float32
    decay: bool = True
    a: float = 0.0
    normalize: bool = True
    feature_map: str = "none"
    capability: int = 90
    processors: int = 4
    seed: int = 0

    def __str__(self) -> str:
        flags = [name for name in ("decay", "normalize") if getattr(self, name)] + [self.feature_map]
        size = f"B{self.B}-H{self.H}kv{self.H_kv}-K{self.K}-V{self.V}"
        return "-".join(
            [size, str(self.dtype)[6:], *flags, f"a{self.a:g}", f"sm{self.capability}", f"{self.processors}sms"]
        )


def random_step_case(seed: int) -> StepCase:
    random = Random(seed)
    kv_heads, group = random.choice([1, 1, 2, 3]), random.choice([1, 1, 2, 3, 4, 5, 8, 11])
    return StepCase(
        B=random.choice([1, 2, 3]),
        H=kv_heads * group,
        H_kv=kv_heads,
        K=random.choice([1, 8, 16, 31, 40, 64, 96, 128, random.randint(1, 256)]),
        V=random.choice([1, 4, 16, 20, 33, 64, 100, 128, random.randint(1, 256)]),
        dtype=random.choice(DTYPES),
        decay=random.random() < 0.5,
        a=random.choice([0.0, 0.7]),
        normalize=random.random() < 0.7,
        feature_map=random.choice(list(FEATURE_MAPS)),
        capability=random.choice([80, 90]),
        processors=random.choice([4, 132]),
        seed=seed % 3,
    )


STEP_CASES = [
    StepCase(),
    StepCase(K=1, V=1, dtype=torch.bfloat16),
    StepCase(K=256, V=256, a=1.0, processors=132),
    StepCase(K=255, V=253, a=1.0, processors=132, seed=1),
    StepCase(K=128, V=124, processors=132),
    StepCase(B=2, H=12, H_kv=3, K=128, V=128, dtype=torch.bfloat16, processors=1),
    StepCase(B=1, H=17, H_kv=1, K=64, V=96, dtype=torch.float16, a=0.5, processors=132, seed=2),
    *map(random_step_case, range(48)),
]


@pytest.fixture
def machine(case, monkeypatch):
    """The GPU that the emulation shows, as the case has it."""
    monkeypatch.setenv("HF_LINATTN_EMULATED_CAPABILITY", str(case.capability))
    monkeypatch.setenv("HF_LINATTN_EMULATED_SMS", str(case.processors))
    monkeypatch.setenv("HF_LINATTN_EMULATED_SEED", str(case.seed))


def double(state: LinearAttentionState | None) -> LinearAttentionState | None:
    return state and LinearAttentionState(*(None if x is None else x.double() for x in state))


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("case", STEP_CASES, ids=str)
def test_step(case):
    torch.manual_seed(0)
    # Views into larger tensors: strides of their own, NaN around them.
    q, k, v = (
        torch.full((case.B, heads + 1, dim + 5), float("nan"), dtype=case.dtype)[:, 1:, 3:-2].copy_(
            torch.rand(case.B, heads, dim) if case.feature_map in ("none", "l2") else torch.randn(case.B, heads, dim)
        )
        for heads, dim in ((case.H, case.K), (case.H_kv, case.K), (case.H_kv, case.V))
    )
    g = -torch.rand(case.H_kv, case.B).T if case.decay else None
    empty = init_state(case.B, case.H_kv, case.K, case.V, a=case.a, normalize=case.normalize)
    state = LinearAttentionState(*(None if x is None else torch.rand_like(x) for x in empty))
    options = {"a": case.a, "normalize": case.normalize}

    o, new = emulated_kernels.step(q, k, v, state, g, b=0.4, feature_map=case.feature_map, **options)

    expected_state = double(state)
    phi = FEATURE_MAPS[case.feature_map]
    expected = linear_attention_step(
        phi(q.double()),
        phi(k.double()),
        v.double(),
        expected_state,
        g=None if g is None else g.double(),
        b=0.4,
        **options,
    )
    assert_close("o", o, expected, case.dtype, factor=2)
    for name, x, y in zip(new._fields, new, expected_state, strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            assert_close(f"final.{name}", x, y, torch.float32, factor=2)


def test_step_holds_the_denominator():
    """A denominator below eps counts as eps, in magnitude and sign."""
    state = init_state(1, 1, 2, 4)
    k, v = torch.tensor([[[1.0, 1.0]]]), torch.ones(1, 1, 4)
    for q, den in (([1.0, -1.0], 1e-6), ([1e-7, -2e-7], 1e-6), ([1.0, -2.0], -1.0)):
        o, _ = emulated_kernels.step(torch.tensor([[q]]), k, v, state)
        torch.testing.assert_close(o, torch.full((1, 1, 4), (q[0] + q[1]) / den))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"K": 257}, "K and V must be 1 to 256, got 257 and 16"),
        ({"H": 3, "H_kv": 2}, "3 heads are no multiple of 2 kv heads"),
    ],
    ids=["K", "heads"],
)
def test_step_refuses(change, message):
    case = StepCase(**change)
    q, k, v = (
        torch.rand(1, heads, dim) for heads, dim in ((case.H, case.K), (case.H_kv, case.K), (case.H_kv, case.V))
    )
    with pytest.raises(RuntimeError, match=message):
        emulated_kernels.step(q, k, v, init_state(1, case.H_kv, case.K, case.V))


@dataclass(frozen=True)
class DecayCase:
    B: int = 2
    T: int = 37
    H: int = 4
    H_kv: int = 2
    K: int = 6
    V: int = 10
    dtype: torch.dtype = torch.float32
    a: float = 0.0
    normalize: bool = True
    held: bool = False
    final: bool = True
    along: bool = True
    lengths: tuple[int, ...] | None = None
    int64: bool = False

    def __str__(self) -> str:
        flags = [name for name in ("normalize", "held", "final", "along", "int64") if getattr(self, name)]
        size = f"B{self.B}-T{self.T}" if self.lengths is None else "packed" + "_".join(map(str, self.lengths))
        return "-".join([size, f"H{self.H}kv{self.H_kv}-V{self.V}", str(self.dtype)[6:], f"a{self.a:g}", *flags])


DECAY_CASES = [
    DecayCase(),
    DecayCase(T=1),
    DecayCase(a=0.5, dtype=torch.bfloat16),
    DecayCase(held=True),
    DecayCase(held=True, H=6, H_kv=1, final=False),
    DecayCase(held=True, along=False, dtype=torch.bfloat16),
    DecayCase(normalize=False, a=0.5),
    DecayCase(normalize=False, along=False, H=3, H_kv=3, V=33, dtype=torch.float16),
    DecayCase(B=1, T=60, lengths=(0, 13, 0, 1, 40)),
    DecayCase(B=1, T=60, lengths=(0, 13, 0, 1, 40, 0), int64=True, normalize=False, a=1.0),
    DecayCase(B=1, T=300, H=1, H_kv=1, lengths=(130, 170), held=True),
]


def recurrent_products(
    case: DecayCase, q: Tensor, k: Tensor, v: Tensor, g: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, LinearAttentionState]:
    """Numerators and sums of the reference; a last column of ones in v gives denominators, key_sum and weight_sum."""
    o, state = linear_attention(
        q,
        k,
        v,
        g=g,
        a=case.a,
        normalize=False,
        output_final_state=True,
        cu_seqlens=cu_seqlens,
        backend="reference",
    )
    value_sum = state.value_sum
    return o, LinearAttentionState(
        kv=state.kv[..., :-1],
        key_sum=state.kv[..., -1] if case.normalize else None,
        value_sum=None if value_sum is None else value_sum[..., :-1],
        weight_sum=value_sum[..., -1] if case.normalize and value_sum is not None else None,
    )


@pytest.mark.parametrize("case", DECAY_CASES, ids=str)
def test_decay_gradient(case):
    torch.manual_seed(0)
    q, k = torch.rand(case.B, case.T, case.H, case.K).double(), torch.rand(case.B, case.T, case.H_kv, case.K).double()
    v = torch.randn(case.B, case.T, case.H_kv, case.V).to(case.dtype).double()
    g = -0.2 * torch.rand(case.B, case.T, case.H_kv).double()
    cu_seqlens = None
    if case.lengths is not None:
        cu_seqlens = torch.tensor([0, *case.lengths]).cumsum(0).to(torch.int64 if case.int64 else torch.int32)
    if case.held:
        # The weights that the second token sees cancel: its denominator is 0 and its numerator is not.
        k[:, 1], g[:, 1] = -k[:, 0], 0
    d_o = torch.randn(case.B, case.T, case.H, case.V).to(case.dtype).double()
    ones = torch.ones_like(v[..., :1])
    leaves = [x.requires_grad_() for x in (v, ones, g)]
    products, final = recurrent_products(case, q, k, torch.cat([v, ones], -1), g, cu_seqlens)
    num, den = products[..., :-1], products[..., -1]
    inside = case.T if cu_seqlens is None else int(cu_seqlens[-1])
    o = num / guarded_denominator(den)[..., None] if case.normalize else num
    d_final = None
    loss = (o * d_o)[:, :inside].sum()
    if case.final:
        d_final = LinearAttentionState(*(None if x is None else torch.randn_like(x) for x in final))
        loss = loss + sum((x * y).sum() for x, y in zip(final, d_final, strict=True) if x is not None)
    dv, dvone, dg = torch.autograd.grad(loss, leaves)
    held = guarded_denominator(den) != den
    assert bool(held[:, :inside].any()) == (case.held and case.normalize)

    def rounded(x: Tensor) -> Tensor:
        """In the case's dtype, with heads before tokens in memory and NaN behind the last sequence."""
        x = x.detach().to(case.dtype).transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)
        x[:, inside:] = float("nan")
        return x

    def single(state: LinearAttentionState | None) -> LinearAttentionState | None:
        return state and LinearAttentionState(*(None if x is None else x.detach().float().contiguous() for x in state))

    along = (o * d_o).sum(-1).detach().masked_fill(held & case.normalize, 0)
    actual = emulated_kernels.decay_gradient(
        rounded(d_o),
        q.to(case.dtype),
        k.to(case.dtype),
        rounded(v),
        rounded(o),
        den.detach().float().transpose(1, 2).contiguous() if case.normalize else None,
        ((v * dv).sum(-1) + dvone[..., 0]).detach().float().transpose(1, 2).contiguous(),
        along.float().transpose(1, 2).contiguous() if case.along else None,
        d_final=single(d_final),
        final_state=single(final) if case.final else None,
        cu_seqlens=cu_seqlens,
    )
    assert_close("dg", actual, dg, case.dtype, factor=2)
    assert not actual[:, inside:].any()


@pytest.mark.parametrize("normalize", [True, False])
def test_decay_gradient_of_many_tokens(normalize):
    """More than one tile of the sum; every term is a whole number, so that the sum is exact."""
    tokens = 5000
    columns, rows = (
        torch.randint(-9, 10, (1, 1, tokens), generator=torch.Generator().manual_seed(i)).float() for i in (0, 1)
    )
    unread = torch.full((1, tokens, 1, 4), float("nan"))
    along, den = (torch.full_like(rows, float("nan")), torch.ones_like(rows)) if normalize else (rows, None)
    actual = emulated_kernels.decay_gradient(unread, unread, unread, unread, unread, den, columns, along)
    terms = (-columns if normalize else rows - columns)[:, 0]
    assert torch.equal(actual[..., 0], terms.flip(1).cumsum(1).flip(1))
