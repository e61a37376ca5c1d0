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


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Small calls of every kernel, for compute-sanitizer.")
    parser.add_argument("--backend", default="cuda")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--paths", nargs="*", default=["auto", "sm80"], help="values of HF_LINATTN_CUDA_PATH")
    parser.add_argument("--cases", type=int, default=len(CASES), help="stop after so many")
    options = parser.parse_args(arguments)
    for path in options.paths:
        os.environ["HF_LINATTN_CUDA_PATH"] = path
        for case in CASES[: options.cases]:
            print(path, case, flush=True)
            inputs = make_inputs(case, device=options.device)
            results = run_op(case, inputs, options.backend)
            if case.lengths is None and case.causal:
                steps = replace(case, T=min(case.T, 2))
                results["steps"] = take_steps(steps, inputs, empty_state(steps, options.device), 0, options.backend)
            wrong = [name for name, x in results.items() if not x.isfinite().all()]
            if wrong:
                raise SystemExit(f"{case} on {path}: not finite: {', '.join(wrong)}")
    print(f"{len(CASES[: options.cases])} cases on {len(options.paths)} paths: finite")


if __name__ == "__main__":
    main(sys.argv[1:])
