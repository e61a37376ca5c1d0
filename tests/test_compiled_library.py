"""The library of compiled kernels, as far as no GPU is needed: what the compiler says of it, what it does in PyTorch.

Everything that builds runs with what is kept in build/kernels and build/emulated: after `make kernels` it is quick.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import emulated_build
import pytest
import torch

from hf_linattn.kernels.cuda_library import CUDA_PATHS, forced_cuda_path

ROOT = Path(__file__).resolve().parents[1]
RUNS = ROOT / "tests" / "compiled_library_runs.py"
REPORT = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z4scanv' for 'sm_80'
ptxas info    : Function properties for _Z4scanv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 254 registers, used 1 barriers, 400 bytes cmem[0]
ptxas info    : Compile time = 12.3 ms
ptxas info    : Compiling entry function '_Z4scanv' for 'sm_90a'
ptxas info    : Function properties for _Z4scanv
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 168 registers, used 9 barriers
ptxas info    : Function properties for _Z6helperv
    32 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
"""


def load_compile_kernels():
    """kernels/compile_kernels.py; the folder is no package, and must not be one."""
    spec = importlib.util.spec_from_file_location("compile_kernels", ROOT / "kernels" / "compile_kernels.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


compile_kernels = load_compile_kernels()


@pytest.fixture(scope="module")
def library():
    try:
        toolchain = compile_kernels.find_toolchain()
    except compile_kernels.Unavailable as reason:
        pytest.skip(f"the kernels cannot be compiled here: {reason}")
    return compile_kernels.build_library(toolchain)


@pytest.fixture(scope="module")
def emulated_library(tmp_path_factory):
    """The kernels for the CPU, bound to PyTorch by the same binding as on a GPU."""
    if reason := emulated_build.unavailable_reason():
        pytest.skip(reason)
    sources = emulated_build.SOURCES
    kernels = emulated_build.build_library("kernels", sorted(sources.glob("*.cu")))
    folder = tmp_path_factory.mktemp("emulated")
    stub, target = folder / "libtorch.so", folder / "emulated.so"
    gxx = ["g++", "-shared", "-fPIC", "-x", "c++"]
    subprocess.run([*gxx, os.devnull, "-Wl,-soname,libtorch.so", "-o", stub], check=True)
    info = '-DKERNELS_BUILD_INFO="cuda=13.0;architectures=emulation"'
    headers = ["-isystem", Path(torch.__file__).parent / "include"]
    binding = [*emulated_build.FLAGS, *compile_kernels.BINDING_FLAGS, info, *headers, sources / "binding_torch.cpp"]
    linked = ["-x", "none", kernels, f"-Wl,-rpath,{kernels.parent}", f"-L{folder}", "-Wl,--no-as-needed", "-ltorch"]
    subprocess.run([*gxx, *binding, *linked, "-o", target], check=True)
    return target


def run_python(*arguments, library, **environment):
    """What a fresh process prints whose compiled kernels are in `library`."""
    environment = {**os.environ, "HF_LINATTN_LIBRARY": str(library), **environment}
    environment.pop("HF_LINATTN_BACKEND", None)
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_report_of_the_compiler_is_read_in_full():
    fine, spilled, helper = compile_kernels.read_resources(REPORT)
    assert fine == ("_Z4scanv", "sm_80", 254, 0, 0)
    assert spilled == ("_Z4scanv", "sm_90a", 168, 16, 20)
    assert helper == ("_Z6helperv", "sm_90a", 0, 32, 0)


@pytest.mark.slow
def test_no_kernel_uses_local_memory(library):
    report = compile_kernels.REPORT.read_text()
    functions = compile_kernels.read_resources(report)
    entries = report.count("Compiling entry function")
    assert entries > 0
    assert sum(function.registers > 0 for function in functions) == entries, "a kernel is missing from the report"
    assert {function.architecture for function in functions} == {"sm_80", "sm_90a"}

    spilling = [x for x in functions if x.stack_bytes or x.spill_bytes]
    assert not spilling, "registers spilled or arrays in local memory:\n" + "\n".join(map(str, spilling))
    # ptxas puts waits between wgmma instructions whose registers it cannot keep apart.
    lost = [line for line in report.splitlines() if "Potential Performance Loss" in line]
    assert not lost, "\n".join(lost)


@pytest.mark.slow
def test_library_loads_and_defines_the_ops_without_a_gpu(library):
    assert "done" in run_python(RUNS, "definitions", library=library)


def test_a_broken_library_is_a_reason_and_no_error(tmp_path):
    broken = tmp_path / "broken.so"
    broken.write_text("not a library")
    source = "from hf_linattn.kernels.cuda_library import *; print(compiled_library_problem, compiled_build_info())"
    assert "could not be loaded" in run_python("-c", source, library=broken)
    assert "not installed" in run_python("-c", source, library=tmp_path / "missing.so")


def test_forced_path_is_read_from_the_environment(monkeypatch):
    monkeypatch.delenv("HF_LINATTN_CUDA_PATH", raising=False)
    assert forced_cuda_path() == CUDA_PATHS["auto"]
    monkeypatch.setenv("HF_LINATTN_CUDA_PATH", "sm90")
    assert forced_cuda_path() == CUDA_PATHS["sm90"]
    monkeypatch.setenv("HF_LINATTN_CUDA_PATH", "sm70")
    with pytest.raises(ValueError, match=r"^HF_LINATTN_CUDA_PATH: .*'sm70'"):
        forced_cuda_path()


@pytest.mark.slow
@pytest.mark.parametrize("path", ["sm80", "sm90"])
def test_binding_and_gradients_on_emulated_kernels(emulated_library, path):
    assert "done" in run_python(RUNS, "emulation", library=emulated_library, HF_LINATTN_CUDA_PATH=path)
