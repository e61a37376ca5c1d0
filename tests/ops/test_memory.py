"""Memory of forward and backward grows with T * D: nothing of size T * D^2 is saved or even allocated."""

from dataclasses import replace

import pytest
import torch
from op_backends import Target, on
from op_inputs import OpCase, call_op, make_inputs

from hf_linattn.evals.bench_timing import LiveBytes


def measure(case: OpCase, target: Target) -> tuple[int, int]:
    """(bytes saved for the backward beyond the inputs, peak bytes allocated by forward and backward)."""
    inputs = {name: x.requires_grad_() for name, x in make_inputs(case, device=target.device).items()}
    own = {x.data_ptr() for x in inputs.values()}
    saved: dict[int, int] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        if x.data_ptr() not in own:
            saved[x.data_ptr()] = x.untyped_storage().nbytes()
        return x

    with LiveBytes() as live, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        o, _ = call_op(case, inputs, target.backend, output_final_state=False)
        o.backward(torch.ones_like(o))
    return sum(saved.values()), live.peak


@pytest.mark.parametrize("window", [0, 64], ids=["linear", "window"])
@pytest.mark.parametrize("decay", [None, "scalar"], ids=["nodecay", "decay"])
def test_memory_is_linear_in_tokens_and_dimension(window, decay):
    def at(tokens: int, dim: int) -> tuple[int, int]:
        case = OpCase(B=1, T=tokens, H=2, H_kv=1, D=dim, K=dim, V=dim, window=window, decay=decay)
        return measure(case, Target("chunked", "cpu"))

    base, wide, long = at(1024, 64), at(1024, 128), at(2048, 64)
    assert base[0] > 0
    for kind, narrow, wider, longer in zip(("saved", "peak"), base, wide, long, strict=True):
        assert wider / narrow < 2.5, f"{kind} bytes: x{wider / narrow:.2f} when D doubles"
        assert longer / narrow < 2.2, f"{kind} bytes: x{longer / narrow:.2f} when T doubles"


@on("chunked-cpu", "cuda-cuda")
@pytest.mark.parametrize("window", [0, 64], ids=["linear", "window"])
def test_saved_bytes_are_output_and_denominators(target, window):
    case = OpCase(B=1, T=1024, H=4, H_kv=2, D=64, K=64, V=32, window=window)
    saved, _ = measure(case, target)
    # Without a window the compiled kernels find what they need of the output on the way to dq.
    saved_of_a_row = 1 + (0 if target.backend == "cuda" and not window else case.V)
    assert saved == case.T * case.H * saved_of_a_row * 4


@on("cuda-*")
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("form", ["causal", "bidirectional", "window"])
def test_compiled_kernels_need_little_beyond_their_results(target, dim, form):
    # A budget of two tensors of q's size: FLA's normalised op takes fifteen, the states of every chunk alone K / 64.
    # The window's lse, delta and far weights are 3 numbers a row.
    case = OpCase(B=4, T=4096, H=16, H_kv=16, D=dim, K=dim, V=dim, dtype=torch.bfloat16)
    case = replace(case, causal=form != "bidirectional", window=64 if form == "window" else 0, log_scale=False)
    inputs = make_inputs(case, device=target.device)
    leaves = [x.requires_grad_() for x in inputs.values()]
    do = torch.rand_like(inputs["v"])

    def both() -> tuple[torch.Tensor, ...]:
        o, _ = call_op(case, inputs, target.backend, output_final_state=False)
        return o, *torch.autograd.grad(o, leaves, do)

    both()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = both()
    extra = torch.cuda.max_memory_allocated() - before - sum(x.nbytes for x in results)
    assert extra <= 2 * do.nbytes, f"{extra / do.nbytes:.2f} tensors of q's size"
