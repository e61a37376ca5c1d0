"""Cases of the op tests: shapes and flags with readable ids, their inputs, and one function that runs an op."""

from dataclasses import dataclass, replace

import torch
from numerics import assert_close, rms
from op_backends import Target, skip_if_refused
from op_quadratic import quadratic_linear_attention, quadratic_window_linear_attention
from torch import Tensor

from hf_linattn.kernels import (
    init_state,
    init_window_state,
    linear_attention,
    linear_attention_step,
    window_linear_attention,
    window_linear_attention_step,
)

# On a GPU the reference is used up to this length, the quadratic form beyond: a token is some 50 launches.
REFERENCE_TOKENS = 65
BY_TOKEN = ("q", "k", "v", "phi_q", "phi_k", "g")
DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}


@dataclass(frozen=True)
class OpCase:
    """One call. `window` 0 means linear_attention; `lengths` packs sequences (then B is 1 and T their sum).

    `decay_grad` asks for the gradient of the decay, which the compiled window op does not have.
    """

    B: int = 2
    T: int = 65
    H: int = 4
    H_kv: int = 2
    D: int = 16
    K: int = 16
    V: int = 16
    dtype: torch.dtype = torch.float32
    decay: str | None = None
    a: float = 0.0
    b: float = 1.0
    scale: float = 0.5
    normalize: bool = True
    causal: bool = True
    window: int = 0
    softcap: float | None = None
    log_scale: bool = True
    state: bool = False
    lengths: tuple[int, ...] | None = None
    decay_grad: bool = True

    @property
    def num_sequences(self) -> int:
        return self.B if self.lengths is None else len(self.lengths)

    def __str__(self) -> str:
        size = f"B{self.B}-T{self.T}" if self.lengths is None else "packed" + "_".join(map(str, self.lengths))
        parts = [size, f"H{self.H}kv{self.H_kv}", f"D{self.D}" if self.window else f"D{self.K}"]
        if self.K != self.D and self.window:
            parts.append(f"K{self.K}")
        if self.V != self.K:
            parts.append(f"V{self.V}")
        parts += [DTYPE_NAMES[self.dtype], self.decay or "nodecay"]
        parts += [f"w{self.window}"] if self.window else []
        parts += [f"cap{self.softcap:g}"] if self.softcap else []
        parts += [f"a{self.a:g}"] if self.a else []
        parts += [name for name, on in (("state", self.state), ("sums", not self.normalize)) if on]
        return "-".join(parts + ([] if self.causal else ["bidirectional"]))


def packed(lengths: tuple[int, ...], **fields) -> OpCase:
    """A case of packed sequences."""
    return OpCase(B=1, T=sum(lengths), lengths=lengths, **fields)


def make_inputs(case: OpCase, seed: int = 0, device: str = "cpu") -> dict[str, Tensor]:
    """Inputs of the case by argument name, plus `state.<member>`; positive features, as feature maps give them.

    Values are exact in the case's dtype, so that a float64 run sees the same numbers. They are drawn on `device`.
    """
    generator = torch.Generator(device).manual_seed(seed)
    acc = torch.float64 if case.dtype == torch.float64 else torch.float32

    def draw(*shape: int, dtype: torch.dtype = case.dtype, positive: bool = False) -> Tensor:
        x = (torch.rand if positive else torch.randn)(shape, generator=generator, dtype=torch.float64, device=device)
        return x.to(dtype)

    features = (case.B, case.T, case.H, case.K), (case.B, case.T, case.H_kv, case.K)
    inputs = {}
    if case.window:
        inputs["q"] = draw(case.B, case.T, case.H, case.D)
        inputs["k"] = draw(case.B, case.T, case.H_kv, case.D)
    inputs["v"] = draw(case.B, case.T, case.H_kv, case.V)
    names = ("phi_q", "phi_k") if case.window else ("q", "k")
    for name, shape in zip(names, features, strict=True):
        inputs[name] = draw(*shape, positive=True)
    if case.decay == "scalar":
        inputs["g"] = -0.2 * draw(case.B, case.T, case.H_kv, dtype=acc, positive=True)
    if case.decay == "fixed":
        inputs["g_gamma"] = -0.2 * draw(case.H_kv, dtype=acc, positive=True)
    if case.window and case.log_scale:
        inputs["log_scale"] = draw(case.H, dtype=acc)
    if case.lengths is not None:
        inputs["cu_seqlens"] = torch.tensor([0, *case.lengths]).cumsum(0).to(device)
    if case.state:
        empty = empty_state(case, device)
        for field, x in zip(empty._fields, empty, strict=True):
            if x is not None:
                inputs[f"state.{field}"] = draw(*x.shape, dtype=x.dtype, positive=True) if x.is_floating_point() else x
        if case.window:
            inputs["state.slot"] = torch.tensor(case.window // 2, device=device)
            inputs["state.window_valid"] = draw(*empty.window_valid.shape, dtype=acc, positive=True) < 0.7
            if case.decay:
                inputs["state.window_g"] = -0.2 * inputs["state.window_g"]
    return inputs


def empty_state(case: OpCase, device: str = "cpu") -> tuple:
    """The case's empty state, sums in the accumulation dtype."""
    acc = torch.float64 if case.dtype == torch.float64 else torch.float32
    if not case.window:
        return init_state(
            case.num_sequences,
            case.H_kv,
            case.K,
            case.V,
            a=case.a,
            normalize=case.normalize,
            dtype=acc,
            device=device,
        )
    return init_window_state(
        case.num_sequences,
        case.H_kv,
        case.D,
        case.K,
        case.V,
        window=case.window,
        a=case.a,
        decay=case.decay is not None,
        dtype=case.dtype,
        state_dtype=acc,
        device=device,
    )


def state_from(case: OpCase, inputs: dict[str, Tensor]) -> tuple | None:
    """The initial state held in `inputs`, or None."""
    if not case.state:
        return None
    kind = type(empty_state(case))
    return kind(*(inputs.get(f"state.{field}") for field in kind._fields))


def call_op(case: OpCase, inputs: dict[str, Tensor], backend: str | None, **overrides) -> tuple:
    """(o, final state or None) of the case's op; backend "quadratic" is tests/op_quadratic.py."""
    tensors = {name: x for name, x in inputs.items() if not name.startswith("state.")}
    options = {"a": case.a, "b": case.b, "scale": case.scale, "output_final_state": True, "backend": backend}
    if case.window:
        options |= {"window": case.window, "softcap": case.softcap}
    else:
        options |= {"normalize": case.normalize, "causal": case.causal}
    options |= {"initial_state": state_from(case, inputs)} | overrides
    if backend == "quadratic":
        for name in ("backend", "output_final_state"):
            options.pop(name)
        quadratic = quadratic_window_linear_attention if case.window else quadratic_linear_attention
        return quadratic(**tensors, **options)
    op = window_linear_attention if case.window else linear_attention
    positional = ("q", "k", "v", "phi_q", "phi_k") if case.window else ("q", "k", "v")
    first = [tensors.pop(name) for name in positional]
    with skip_if_refused(must_run=_has_hopper_kernel(case)):
        return op(*first, **tensors, **options)


def _has_hopper_kernel(case: OpCase) -> bool:
    """Whether the Hopper kernels must take the case; those of Ampere take any."""
    dims = (case.K, case.V, *([case.D] if case.window else []))
    return case.dtype == torch.bfloat16 and all(dim in (64, 128) for dim in dims)


def tokens(inputs: dict[str, Tensor], start: int, end: int) -> dict[str, Tensor]:
    """The inputs of a stretch of tokens; what has no token axis stays."""
    return {name: x[:, start:end] if name in BY_TOKEN else x for name, x in inputs.items()}


def take_steps(case: OpCase, inputs: dict[str, Tensor], state: tuple, start: int, backend: str | None) -> Tensor:
    """Outputs of one-token steps from `start` to the end; `state` advances in place."""
    outputs = []
    for t in range(start, case.T):
        now = {name: inputs[name][:, t] for name in BY_TOKEN if name in inputs}
        options = {"g": now.pop("g", None), "a": case.a, "b": case.b, "scale": case.scale, "backend": backend}
        if "g_gamma" in inputs:
            options["g_gamma"] = inputs["g_gamma"]
        if case.window:
            first = (now[name] for name in ("q", "k", "v", "phi_q", "phi_k"))
            options |= {"log_scale": inputs.get("log_scale"), "softcap": case.softcap}
            outputs.append(window_linear_attention_step(*first, state, **options))
        else:
            options |= {"normalize": case.normalize}
            outputs.append(linear_attention_step(now["q"], now["k"], now["v"], state, **options))
    return torch.stack(outputs, 1)


def output_gradient(x: Tensor) -> Tensor:
    """A gradient for output x, uniform in (-1, 1): the same for the same leading tokens whatever follows them.

    Its values are bfloat16 numbers, so that rounding them is nobody's error.
    """
    index = torch.arange(1, x.numel() + 1, dtype=torch.float64, device=x.device)
    return ((index * 12.9898).sin() * 43758.5453).frac().bfloat16().view(x.shape).to(x)


def run_op(case: OpCase, inputs: dict[str, Tensor], backend: str | None, with_grad: bool = True) -> dict[str, Tensor]:
    """Every output and gradient by name: o, final.<member>, dq, dk, ..., dstate.<member>."""
    leaves = {}
    for name, x in inputs.items():
        needs = with_grad and x.is_floating_point() and not (case.window and name.startswith("state."))
        needs = needs and (case.decay_grad or name not in ("g", "g_gamma"))
        # No clone: it would undo the strides of a view.
        leaves[name] = x.detach().requires_grad_(needs)
    o, final = call_op(case, leaves, backend)
    results = {"o": o}
    results |= {f"final.{n}": x for n, x in zip(final._fields, final, strict=True) if x is not None}
    if with_grad:
        terms = [(x * output_gradient(x)).double().sum() for x in results.values() if x.requires_grad]
        wanted = {name: x for name, x in leaves.items() if x.requires_grad}
        grads = [None] * len(wanted)
        # Without tokens the reference reads no input at all.
        if terms:
            with skip_if_refused(must_run=_has_hopper_kernel(case)):
                grads = torch.autograd.grad(sum(terms), wanted.values(), allow_unused=True)
        for (name, x), dx in zip(wanted.items(), grads, strict=True):
            results[f"d{name}"] = torch.zeros_like(x) if dx is None else dx
    return {name: x.detach() for name, x in results.items()}


def float64_truth(case: OpCase, inputs: dict[str, Tensor], with_grad: bool = True) -> dict[str, Tensor]:
    """The same numbers in float64, where the inputs are: by the reference, or for long sequences on a GPU by the
    quadratic form, which is tested against the reference."""
    exact = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    is_long = inputs["v"].is_cuda and case.T > REFERENCE_TOKENS
    return run_op(replace(case, dtype=torch.float64), exact, "quadratic" if is_long else "reference", with_grad)


def check(case: OpCase, inputs: dict[str, Tensor], target: Target, factor: float = 1.0) -> dict[str, Tensor]:
    """Every output and gradient of the op on `target` is the truth within the tolerance table; returns them."""
    actual, expected = run_op(case, inputs, target.backend), float64_truth(case, inputs)
    assert actual.keys() == expected.keys()
    for name, x in expected.items():
        # In cases drawn at random: rows without far keys add to dlog_scale what rounding o left of do . o, where the
        # truth is 0.
        drawn = name == "dlog_scale" and factor > 1
        rounding = 4 * torch.finfo(case.dtype).eps * _output_terms(expected["o"]) if drawn else 0.0
        options = {"has_window": case.window > 0, "rounding": rounding}
        assert_close(name, actual[name], x, case.dtype, factor, target.backend, **options)
    return actual


def _output_terms(o: Tensor) -> float:
    """Root mean square of do . o over rows, times the root of their number: of a sum of that many independent ones."""
    rows = (o * output_gradient(o)).sum(-1)
    return rms(rows) * (rows.shape[0] * rows.shape[1]) ** 0.5
