"""Small calls of every kernel, for compute-sanitizer: forward, backward and steps on each path.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 \\
        python tests/ops/sanitizer_cases.py

and the same with racecheck and synccheck. Without PyTorch's cache every tensor is an allocation of its own, so that
memcheck sees a read beside it. Whether results are right is for the tests to say; here they must be finite.
"""

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from op_inputs import OpCase, empty_state, make_inputs, packed, run_op, take_steps  # noqa: E402

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
BASE = OpCase(B=1, T=130, H=2, H_kv=1, K=64, V=64, dtype=BF16, scale=0.1)
CASES = [
    BASE,
    replace(BASE, T=1),
    replace(BASE, K=128, V=128, decay="scalar", a=0.5, state=True),
    replace(BASE, K=256, V=64, dtype=FP16, normalize=False),
    replace(BASE, T=70, K=64, V=64, dtype=FP32, decay="fixed"),
    replace(BASE, T=70, K=192, V=256, dtype=FP32, decay="scalar", a=0.5, state=True),
    replace(BASE, T=70, K=33, V=80, a=0.5, state=True),
    replace(BASE, causal=False, K=128, V=128, a=0.5),
    replace(BASE, T=1100, H=1, decay="scalar", state=True),
    packed((0, 70, 1, 64), H=2, H_kv=1, K=64, V=64, dtype=BF16, scale=0.1, decay="scalar", state=True),
    packed((65, 0, 30), H=2, H_kv=1, K=128, V=128, dtype=BF16, scale=0.1, causal=False),
]
WINDOW = replace(BASE, D=64, window=64, decay_grad=False)
CASES += [
    WINDOW,
    replace(WINDOW, T=1, window=1),
    replace(WINDOW, D=128, K=128, V=128, decay="scalar", a=0.5, softcap=3.0),
    replace(WINDOW, T=70, window=16, decay="fixed", state=True),
    replace(WINDOW, T=70, window=65, D=33, K=48, V=80, state=True),
    *(replace(WINDOW, T=70, window=20, dtype=dtype, a=0.5, log_scale=False) for dtype in (FP16, FP32)),
    replace(WINDOW, T=1100, H=1, decay="scalar"),
    packed((0, 70, 1, 64), H=2, H_kv=1, D=64, K=64, V=64, dtype=BF16, scale=0.1, window=16, state=True),
]
# Of these the steps alone.
STEP_CASES = [
    replace(WINDOW, T=5, window=4, decay="scalar", a=0.5),
    replace(WINDOW, T=5, B=3, D=128, K=128, V=128),
    replace(WINDOW, T=5, window=4, D=33, K=70, V=65, H=9, dtype=FP32, softcap=3.0),
]


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Small calls of every kernel, for compute-sanitizer.")
    parser.add_argument("--backend", default="cuda")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--paths", nargs="*", default=["auto", "sm80"], help="values of HF_LINATTN_CUDA_PATH")
    parser.add_argument("--cases", type=int, default=len(CASES), help="stop after so many")
    options = parser.parse_args(arguments)
    for path in options.paths:
        os.environ["HF_LINATTN_CUDA_PATH"] = path
        for case in [*CASES[: options.cases], *STEP_CASES]:
            print(path, case, flush=True)
            inputs = make_inputs(case, device=options.device)
            results = {} if case in STEP_CASES else run_op(case, inputs, options.backend)
            if case.lengths is None and case.causal:
                steps = replace(case, T=min(case.T, 5 if case in STEP_CASES else 2))
                results["steps"] = take_steps(steps, inputs, empty_state(steps, options.device), 0, options.backend)
            wrong = [name for name, x in results.items() if not x.isfinite().all()]
            if wrong:
                raise SystemExit(f"{case} on {path}: not finite: {', '.join(wrong)}")
    print(f"{len([*CASES[: options.cases], *STEP_CASES])} cases on {len(options.paths)} paths: finite")


if __name__ == "__main__":
    main(sys.argv[1:])
