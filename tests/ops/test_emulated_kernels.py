"""The CUDA kernels on a CPU, emulated, against float64 references."""

from dataclasses import dataclass, replace
from itertools import pairwise
from random import Random

import emulated_kernels
import pytest
import torch
from emulated_build import unavailable_reason
from numerics import TOLERANCES, assert_close, relative_rmse
from torch import Tensor
from torch.nn import functional as F

from hf_linattn.kernels import LinearAttentionState, init_state, linear_attention, linear_attention_step
from hf_linattn.kernels.reference import guarded_denominator
from hf_linattn.kernels.state import linear_state_shapes

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
    T: int = 100
    H: int = 4
    H_kv: int = 2
    K: int = 16
    V: int = 24
    dtype: torch.dtype = torch.float32
    decay: float | None = None
    a: float = 0.0
    normalize: bool = True
    held: bool = False
    state: bool = False
    lengths: tuple[int, ...] | None = None
    int64: bool = False
    capability: int = 90

    def __str__(self) -> str:
        flags = [name for name in ("normalize", "held", "state", "int64") if getattr(self, name)]
        flags += [] if self.capability == 90 else [f"sm{self.capability}"]
        size = f"B{self.B}-T{self.T}" if self.lengths is None else "packed" + "_".join(map(str, self.lengths))
        size = f"{size}-H{self.H}kv{self.H_kv}-K{self.K}-V{self.V}-{str(self.dtype)[6:]}-a{self.a:g}"
        return "-".join([size, *([] if self.decay is None else [f"decay{self.decay:g}"]), *flags])


WIDE_DECAY = DecayCase(B=1, H=1, H_kv=1, K=64, V=64, dtype=torch.bfloat16)
DECAY_CASES = [
    *(DecayCase(T=t, state=t in (1, 65)) for t in (1, 2, 63, 64, 65, 129)),
    *(DecayCase(a=0.5, state=True, dtype=dtype) for dtype in DTYPES),
    *(DecayCase(normalize=False, a=a, state=a > 0, dtype=dtype) for a in (0.0, 0.5) for dtype in DTYPES),
    *(DecayCase(held=True, state=s, H=6, H_kv=1) for s in (False, True)),
    *(replace(WIDE_DECAY, T=70, K=k, V=v, a=0.5, state=True, H=2) for k, v in ((1, 1), (65, 40), (256, 129))),
    *(DecayCase(K=100, V=65, a=0.5, state=True, H=2, H_kv=1, dtype=dtype) for dtype in (torch.float16, torch.float32)),
    DecayCase(B=1, T=60, lengths=(0, 13, 0, 1, 40), state=True),
    DecayCase(B=1, T=230, lengths=(0, 100, 0, 1, 100, 0), int64=True, normalize=False, a=1.0),
    DecayCase(B=1, T=2600, H=2, H_kv=1, lengths=(1030, 0, 1500), a=0.5, state=True),
    DecayCase(T=1100, H=1, H_kv=1, normalize=False, dtype=torch.bfloat16),
    # Less shared memory: one stage of keys and values.
    DecayCase(T=200, H=2, H_kv=1, K=128, V=128, capability=80),
    DecayCase(T=200, H=2, H_kv=1, K=128, V=128, dtype=torch.bfloat16, capability=86),
    # Tiles in parts.
    *(
        DecayCase(B=1, T=140, H=2, H_kv=1, K=k, V=v, dtype=dtype, a=0.5, state=True, normalize=k == 256, capability=c)
        for k, v, dtype, c in (
            (256, 64, torch.float32, 90),
            (192, 256, torch.float32, 80),
            (256, 256, torch.float16, 80),
            (10, 250, torch.float16, 90),
            (128, 65, torch.float32, 86),
            (128, 128, torch.float16, 86),
            (256, 129, torch.bfloat16, 86),
        )
    ),
    DecayCase(B=1, T=1100, H=2, H_kv=1, K=256, V=200, lengths=(3, 1050), state=True),
    *(replace(WIDE_DECAY, T=1100, decay=decay, normalize=n) for decay in (0.5, 0.99, 0.9999) for n in (False, True)),
]
SEGMENT = 1024  # kDecaySegment of decay_gradient.h


def with_ones(state: LinearAttentionState, normalize: bool) -> LinearAttentionState:
    """The sums as the state of plain sums whose values have a last column of ones: that of the denominators."""

    def join(x: Tensor | None, plain: Tensor | None) -> Tensor | None:
        return x if x is None else torch.cat([x, plain[..., None] if normalize else torch.zeros_like(x[..., :1])], -1)

    return LinearAttentionState(join(state.kv, state.key_sum), None, join(state.value_sum, state.weight_sum), None)


def without_ones(state: LinearAttentionState, normalize: bool) -> LinearAttentionState:
    def plain(x: Tensor | None) -> Tensor | None:
        return x[..., -1] if normalize and x is not None else None

    rest = (None if x is None else x[..., :-1] for x in (state.kv, state.value_sum))
    kv, value_sum = rest
    return LinearAttentionState(kv, plain(state.kv), value_sum, plain(state.value_sum))


@pytest.mark.parametrize("case", DECAY_CASES, ids=str)
def test_decay_gradient(case, monkeypatch):
    monkeypatch.setenv("HF_LINATTN_EMULATED_CAPABILITY", str(case.capability))
    torch.manual_seed(0)

    def draw(random, *shape: int) -> Tensor:
        return random(shape).to(case.dtype).double()

    features = torch.rand if case.normalize else torch.randn
    q, k = draw(features, case.B, case.T, case.H, case.K), draw(features, case.B, case.T, case.H_kv, case.K)
    v, d_o = draw(torch.randn, case.B, case.T, case.H_kv, case.V), draw(torch.randn, case.B, case.T, case.H, case.V)
    g = -0.2 * torch.rand(case.B, case.T, case.H_kv)
    if case.decay is not None:
        g = torch.full_like(g, case.decay).log()
    g = g.double()
    if case.held:
        # The weights that the second token sees cancel: its denominator is 0 and its numerator is not.
        k[:, 1], g[:, 1] = -k[:, 0], 0
    g.requires_grad_()
    cu_seqlens, sequences = None, [(row, 0, case.T) for row in range(case.B)]
    if case.lengths is not None:
        cu_seqlens = torch.tensor([0, *case.lengths]).cumsum(0).to(torch.int64 if case.int64 else torch.int32)
        sequences = [(0, begin, end) for begin, end in pairwise(cu_seqlens.tolist())]

    # In float64, sequence by sequence and segment by segment: the states in between are leaves of the gradient too.
    shapes = linear_state_shapes(len(sequences), case.H_kv, case.K, case.V, a=case.a, normalize=case.normalize)
    initial = d_final = None
    if case.state and not case.held:
        initial = LinearAttentionState(*(x if x is None else torch.rand(x).double() for x in shapes))
    if case.state:
        d_final = LinearAttentionState(*(x if x is None else torch.randn(x).double() for x in shapes))
    num = torch.zeros(case.B, case.T, case.H, case.V + 1).double()
    boundaries = max(1, case.T // SEGMENT if cu_seqlens is not None else case.B * ((case.T - 1) // SEGMENT))
    between: list[LinearAttentionState | None] = [None] * boundaries
    loss = 0.0
    for n, (row, begin, end) in enumerate(sequences):
        part = slice(n, n + 1)
        state = initial and with_ones(
            LinearAttentionState(*(x if x is None else x[part] for x in initial)), case.normalize
        )
        for start in range(begin, end, SEGMENT):
            tokens = slice(start, min(start + SEGMENT, end))
            ones = torch.ones_like(v[row : row + 1, tokens, :, :1])
            o, state = linear_attention(
                *(x[row : row + 1, tokens] for x in (q, k)),
                torch.cat([v[row : row + 1, tokens], ones], -1),
                g=g[row : row + 1, tokens],
                a=case.a,
                b=0.7,
                normalize=False,
                initial_state=state,
                output_final_state=True,
                backend="chunked",
            )
            num[row, tokens] = o[0]
            if tokens.stop < end:
                past = (start - begin) // SEGMENT
                first = row * ((case.T - 1) // SEGMENT) if cu_seqlens is None else begin // SEGMENT
                between[first + past] = state
        if d_final is not None and state is not None:
            last = without_ones(state, case.normalize)
            loss = loss + sum((x * y[part]).sum() for x, y in zip(last, d_final, strict=True) if x is not None)
    den = num[..., -1]
    held = guarded_denominator(den) != den
    o = num[..., :-1] / guarded_denominator(den)[..., None] if case.normalize else num[..., :-1]
    inside = case.T if cu_seqlens is None else int(cu_seqlens[-1])
    loss = loss + (o * d_o)[:, :inside].sum()
    assert bool(held[:, :inside].any()) == (case.held and case.normalize)
    leaves = [x for state in between if state is not None for x in state if x is not None]
    expected, *found = torch.autograd.grad(loss, [g, *leaves])

    def by_boundary(states) -> LinearAttentionState:
        """All boundaries' states, NaN for those that do not exist."""
        empty = linear_state_shapes(boundaries, case.H_kv, case.K, case.V, a=case.a, normalize=case.normalize)
        result = LinearAttentionState(*(x if x is None else torch.full(x, float("nan")) for x in empty))
        for n, state in enumerate(states):
            for to, x in zip(
                result, () if state is None else without_ones(state, case.normalize), strict=state is not None
            ):
                if x is not None:
                    to[n] = x.detach()[0]
        return result

    gradients = iter(found)
    d_between = [
        None if state is None else LinearAttentionState(*(None if x is None else next(gradients) for x in state))
        for state in between
    ]

    def rounded(x: Tensor) -> Tensor:
        """In the case's dtype, with heads before tokens in memory and NaN behind the last sequence."""
        x = x.detach().to(case.dtype).transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)
        x[:, inside:] = float("nan")
        return x

    def single(state: LinearAttentionState | None) -> LinearAttentionState | None:
        return state and LinearAttentionState(*(None if x is None else x.float() for x in state))

    along = (o * d_o).sum(-1).detach().masked_fill(held, 0).float().transpose(1, 2).contiguous()
    actual = emulated_kernels.decay_gradient(
        *map(rounded, (d_o, q, k, v)),
        g.detach().float(),
        den.detach().float().transpose(1, 2).contiguous() if case.normalize else None,
        along if case.normalize else None,
        a=case.a,
        b=0.7,
        initial_state=single(initial),
        d_final=single(d_final),
        carried=by_boundary(between),
        d_carried=by_boundary(d_between),
        cu_seqlens=cu_seqlens,
    )
    # Only the states are rounded, to twice the bits of an operand. The sum is the gradient of a fixed decay.
    assert relative_rmse(actual, expected) <= 1e-5
    assert relative_rmse(actual.double().sum(1), expected.sum(1)) <= 1e-4
    assert not actual[:, inside:].any()


BACKWARD_CASES = [
    *(
        replace(WIDE_DECAY, T=t, decay=decay, normalize=n)
        for t in (200, 1024, 2048)
        for decay in (0.5, 0.9, 0.99, 0.999)
        for n in (False, True)
    ),
    replace(WIDE_DECAY, T=500, H=4, H_kv=2, K=128, V=128, a=0.5),
    replace(WIDE_DECAY, T=2300, H=2, K=128, a=0.5, lengths=(0, 1030, 1, 1200)),
]


@pytest.mark.slow
@pytest.mark.parametrize("path", ["sm80", "sm90"])
@pytest.mark.parametrize("case", BACKWARD_CASES, ids=str)
def test_decay_gradient_of_bfloat16_from_end_to_end(case, path):
    """Features are positive with normalisation: every gradient is then a small difference of large sums."""
    torch.manual_seed(0)
    features, dtype = torch.rand if case.normalize else torch.randn, torch.bfloat16
    q, k = features(case.B, case.T, case.H, case.K).to(dtype), features(case.B, case.T, case.H_kv, case.K).to(dtype)
    v, d_o = (
        features(case.B, case.T, case.H_kv, case.V).to(dtype),
        torch.randn(case.B, case.T, case.H, case.V).to(dtype),
    )
    g = (
        torch.full((case.B, case.T, case.H_kv), case.decay).log()
        if case.decay
        else -0.2 * torch.rand(1, case.T, case.H_kv)
    )
    cu_seqlens = None if case.lengths is None else torch.tensor([0, *case.lengths]).cumsum(0)
    options = {"a": case.a, "b": 1.0, "normalize": case.normalize, "cu_seqlens": cu_seqlens}

    _, den, _ = emulated_kernels.forward(q, k, v, g, path=path, **options)
    actual = emulated_kernels.backward(d_o, q, k, v, den, g, path=path, **options)[3]

    exact = g.double().requires_grad_()
    expected, _ = linear_attention(q.double(), k.double(), v.double(), g=exact, backend="chunked", **options)
    (expected,) = torch.autograd.grad(expected, exact, d_o.double())
    assert_close("dg", actual, expected, dtype, backend="cuda")
    # The gradient of a fixed decay: the sum may cancel, the errors must not add up.
    bound = TOLERANCES["cuda"][dtype]["gate"] * expected.abs().sum(1)
    assert ((actual.double().sum(1) - expected.sum(1)).abs() <= bound).all()
