"""window_step.cu on a CPU, emulated, against the float64 recurrence: several tokens, so that the ring goes round."""

from dataclasses import dataclass, replace
from random import Random

import pytest
import torch
from emulated_build import unavailable_reason
from emulated_window_step import window_step
from numerics import assert_close
from torch import Tensor

from hf_linattn.kernels import WindowLinearAttentionState, init_window_state, window_linear_attention_step
from hf_linattn.kernels.cuda_window_step import LARGEST_WINDOW

pytestmark = pytest.mark.skipif(unavailable_reason() is not None, reason=str(unavailable_reason()))
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SUMS = ("kv", "key_sum", "value_sum", "weight_sum")


@dataclass(frozen=True)
class Case:
    B: int = 2
    H: int = 2
    H_kv: int = 1
    D: int = 16
    K: int = 16
    V: int = 16
    w: int = 16
    steps: int = 3
    dtype: torch.dtype = torch.float32
    decay: bool = True
    a: float = 0.0
    softcap: float | None = None
    log_scale: bool = True
    capability: int = 90
    processors: int = 4
    seed: int = 0

    def __str__(self) -> str:
        flags = [name for name in ("decay", "log_scale") if getattr(self, name)]
        flags += [f"cap{self.softcap:g}"] if self.softcap else []
        size = f"B{self.B}-H{self.H}kv{self.H_kv}-D{self.D}-K{self.K}-V{self.V}-w{self.w}-{self.steps}steps"
        machine = [f"sm{self.capability}", f"{self.processors}sms"]
        return "-".join([size, str(self.dtype)[6:], f"a{self.a:g}", *flags, *machine])


def random_case(seed: int) -> Case:
    random = Random(seed)
    kv_heads, group = random.choice([1, 1, 2, 3]), random.choice([1, 1, 2, 3, 4, 5, 8, 11])

    def dim() -> int:
        return random.choice([1, 8, 16, 31, 40, 64, 96, 128, 256, random.randint(1, 256)])

    return Case(
        B=random.choice([1, 2, 5]),
        H=kv_heads * group,
        H_kv=kv_heads,
        D=dim(),
        K=dim(),
        V=dim(),
        w=random.choice([1, 2, 7, 16, 33, 64, 100, random.randint(1, 300)]),
        dtype=random.choice(DTYPES),
        decay=random.random() < 0.5,
        a=random.choice([0.0, 0.7]),
        softcap=random.choice([None, 2.0]),
        log_scale=random.random() < 0.5,
        capability=random.choice([80, 90]),
        processors=random.choice([4, 132]),
        seed=seed % 3,
    )


WIDE = Case(D=128, K=128, V=128, w=64, steps=2)
SPLIT = Case(B=1, H=3, D=16, K=128, V=16, w=128, processors=132)
CASES = [
    *(Case(w=w, steps=w + 3, dtype=dtype, a=0.5) for w in (1, 3, 16) for dtype in DTYPES),
    Case(w=64, steps=70, B=1, H=1, D=8, K=8, V=8, capability=80, seed=1),
    *(replace(WIDE, dtype=dtype, processors=p, capability=c) for dtype in DTYPES for p, c in ((4, 80), (132, 90))),
    replace(WIDE, B=5, H=12, H_kv=3, dtype=torch.bfloat16, processors=1, softcap=3.0, a=0.5),
    replace(WIDE, B=1, H=17, dtype=torch.float16, processors=132, seed=2, softcap=3.0),
    replace(WIDE, D=256, K=256, V=256, processors=132, a=1.0),
    replace(WIDE, D=255, K=251, V=253, w=65, processors=132, seed=1, a=1.0),
    replace(WIDE, D=1, K=1, V=1, dtype=torch.bfloat16),
    # Heads split over blocks of a cluster: uneven shares of rows and slots, blocks without any, passes over the heads.
    *(replace(SPLIT, K=K, w=w, V=V) for K, w, V in ((40, 137, 16), (1, 131, 31), (130, 5, 16), (250, 1, 3))),
    *(replace(SPLIT, H=H, w=45, V=256, dtype=dtype, a=0.7) for H, dtype in ((11, torch.bfloat16), (2, torch.float32))),
    replace(SPLIT, H=9, H_kv=3, D=64, K=128, V=64, w=128, dtype=torch.bfloat16, seed=1),
    replace(SPLIT, D=64, K=64, V=64, w=1024, dtype=torch.bfloat16, softcap=3.0),
    # All heads' weights do not fit: fewer heads a pass.
    Case(B=1, H=8, D=8, K=8, V=8, w=3000, capability=86, steps=2),
    *map(random_case, range(32)),
]


@pytest.fixture
def machine(case, monkeypatch):
    """The GPU that the emulation shows, as the case has it."""
    monkeypatch.setenv("HF_LINATTN_EMULATED_CAPABILITY", str(case.capability))
    monkeypatch.setenv("HF_LINATTN_EMULATED_SMS", str(case.processors))
    monkeypatch.setenv("HF_LINATTN_EMULATED_SEED", str(case.seed))


def first_state(case: Case, share_valid: float = 0.7) -> WindowLinearAttentionState:
    """Random sums, a ring of which some slots are invalid and hold NaN, and a slot in its middle."""
    size = (case.B, case.H_kv, case.D, case.K, case.V)
    empty = init_window_state(*size, window=case.w, a=case.a, decay=case.decay, dtype=case.dtype)
    state = WindowLinearAttentionState(
        *(torch.rand_like(x) if x is not None and x.is_floating_point() else x for x in empty)
    )
    state = state._replace(
        window_k=torch.randn_like(state.window_k),
        window_g=-0.2 * state.window_g if case.decay else None,
        window_valid=torch.rand(case.B, case.w) < share_valid,
        slot=torch.tensor(case.w // 2),
    )
    for ring in (state.window_k, state.window_v, state.window_phi_k, state.window_g):
        if ring is not None:
            ring[~state.window_valid] = torch.nan
    return state


def token(case: Case) -> dict[str, Tensor]:
    """Views into larger tensors: strides of their own, NaN around them."""

    def draw(random, heads: int, dim: int) -> Tensor:
        whole = torch.full((case.B, heads + 1, dim + 5), torch.nan, dtype=case.dtype)
        return whole[:, 1:, 3:-2].copy_(random(case.B, heads, dim))

    inputs = {"q": draw(torch.randn, case.H, case.D), "k": draw(torch.randn, case.H_kv, case.D)}
    inputs |= {"v": draw(torch.randn, case.H_kv, case.V)}
    inputs |= {"phi_q": draw(torch.rand, case.H, case.K), "phi_k": draw(torch.rand, case.H_kv, case.K)}
    return inputs | ({"g": -0.2 * torch.rand(case.H_kv, case.B).T} if case.decay else {})


def double(arguments: dict) -> dict:
    """Copies of the tensors, in float64 those of floating point; what is no tensor as it is."""
    copies = {name: x.clone() if isinstance(x, Tensor) else x for name, x in arguments.items()}
    return {n: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for n, x in copies.items()}


def same(x: Tensor | None, y: Tensor | None) -> bool:
    """Bit by bit, NaN in the same places included."""
    return x is y or torch.equal(x.nan_to_num(nan=1e4), y.nan_to_num(nan=1e4))


def options_of(case: Case) -> dict:
    log_scale = torch.randn(case.H) if case.log_scale else None
    return {"scale": case.D**-0.5, "a": case.a, "b": 0.4, "softcap": case.softcap, "log_scale": log_scale}


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_steps(case, monkeypatch):
    check_steps(case, monkeypatch)


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("case", [SPLIT, replace(SPLIT, processors=1), replace(SPLIT, K=1, a=0.7)], ids=str)
def test_steps_from_a_ring_without_a_valid_slot(case, monkeypatch):
    check_steps(case, monkeypatch, share_valid=0.0)


def check_steps(case: Case, monkeypatch, share_valid: float = 0.7) -> None:
    """The steps against the recurrence, the last one twice."""
    torch.manual_seed(0)
    state, options = first_state(case, share_valid), options_of(case)
    expected_state = WindowLinearAttentionState(**double(state._asdict()))
    for t in range(case.steps):
        inputs = token(case)
        before = state
        o, state = window_step(**inputs, state=before, **options)

        if t == case.steps - 1:
            monkeypatch.setenv("HF_LINATTN_EMULATED_SEED", str(case.seed + 1))
            again = window_step(**inputs, state=before, **options)
            assert torch.equal(o, again[0])
            assert all(map(same, state, again[1]))
        expected = window_linear_attention_step(**double(inputs), state=expected_state, **double(options))
        assert_close("o", o, expected, case.dtype, factor=2, backend="cuda")
        for name, x, y in zip(state._fields, state, expected_state, strict=True):
            assert (x is None) == (y is None)
            if name in SUMS and x is not None:
                assert_close(f"final.{name}", x, y, torch.float32, factor=2)
            elif x is not None:
                assert same(x, y.to(x.dtype)), f"{name} after step {t}"


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("case", [Case(B=1, w=4, D=8), replace(SPLIT, H=1, D=8, w=9)], ids=str)
def test_far_keys_of_no_weight_leave_softmax_over_the_window(case):
    """Logits far below the smallest float32 number: the empty far part must not swallow the window."""
    case = replace(case, decay=False, log_scale=False)
    torch.manual_seed(0)
    state, inputs = first_state(case, share_valid=1.0), token(case)
    inputs["phi_q"] = torch.zeros_like(inputs["phi_q"])
    state.window_k.abs_().mul_(-1)
    inputs["q"], inputs["k"] = inputs["q"].abs() * 1000, -inputs["k"].abs()
    o, new = window_step(**inputs, state=state, scale=1.0)
    q, keys, values = (x.double() for x in (inputs["q"], new.window_k, new.window_v))
    weights = torch.einsum("bhd,bjd->bhj", q, keys[:, :, 0]).softmax(-1)
    assert_close("o", o, weights @ values[:, :, 0], torch.float32, factor=2)


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("case", [Case(B=3, w=5), replace(SPLIT, H=1)], ids=str)
def test_features_of_both_signs(case):
    """The far sum of a block may be negative or 0 where that of all is positive."""
    case = replace(case, H=case.H_kv, decay=False, log_scale=False)
    torch.manual_seed(0)
    state, inputs = first_state(case, share_valid=0.1), token(case)
    state.key_sum[...] = torch.linspace(-1, 2, case.K)
    state.key_sum[..., : case.K // 4] = 0
    inputs["phi_q"] = torch.ones_like(inputs["phi_q"])
    expected = window_linear_attention_step(
        **double(inputs), state=WindowLinearAttentionState(**double(state._asdict())), scale=1.0
    )
    assert_close("o", window_step(**inputs, state=state, scale=1.0)[0], expected, torch.float32, factor=2)


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("case", [Case(B=3, w=5), replace(SPLIT, H=1)], ids=str)
def test_an_empty_state_gives_the_token_itself(case):
    empty = init_window_state(case.B, case.H_kv, case.D, case.K, case.V, window=case.w, decay=True)
    inputs = token(case)
    o, new = window_step(**inputs, state=empty, scale=1.0)
    assert torch.equal(o, inputs["v"].expand(o.shape))
    assert new.window_valid.sum(1).eq(1).all()
    assert new.slot == 1
    assert not any(x.any() for x in (new.kv, new.key_sum))


def test_the_longest_window():
    """LARGEST_WINDOW is what the kernel takes, with the least shared memory there is."""
    case = Case(B=1, H=3, D=8, K=8, V=8, w=LARGEST_WINDOW, capability=86)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("HF_LINATTN_EMULATED_CAPABILITY", str(case.capability))
        torch.manual_seed(0)
        state, inputs, options = first_state(case), token(case), options_of(case)
        expected_state = WindowLinearAttentionState(**double(state._asdict()))
        o, _ = window_step(**inputs, state=state, **options)
    expected = window_linear_attention_step(**double(inputs), state=expected_state, **double(options))
    assert_close("o", o, expected, case.dtype, factor=2, backend="cuda")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"K": 257}, "D, K and V must be 1 to 256, got 16, 257 and 16"),
        ({"H": 3, "H_kv": 2}, "3 heads are no multiple of 2 kv heads"),
        ({"w": LARGEST_WINDOW + 1}, "1 to 16384 slots, got 16385; use backend 'chunked'"),
    ],
    ids=["K", "heads", "window"],
)
def test_a_step_is_refused(change, message):
    case = Case(**change)
    with pytest.raises(RuntimeError, match=message):
        window_step(**token(case), state=first_state(case), **options_of(case))
