"""Builds the compiled kernels: kernels/csrc/*.cu and binding_torch.cpp into one library.

    python kernels/compile_kernels.py                # in place, where hf_linattn.kernels looks for it: `make kernels`

Needs nvcc and the headers of PyTorch, neither a GPU nor a PyTorch that can be imported. Objects are kept in
build/kernels and compiled again only if their source, a header they read, the flags or the compiler changed; beside
them lies resources.txt, what ptxas says about the registers and the local memory of every kernel.

Environment: CUDA_HOME names the toolkit, HF_LINATTN_TORCH_INCLUDE the folder that holds torch/csrc, MAX_JOBS how many
compilers run at once, HF_LINATTN_BUILD_KERNELS=0 builds nothing and =1 makes a missing compiler an error.
"""

import concurrent.futures
import contextlib
import fcntl
import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "kernels" / "csrc"
LIBRARY = ROOT / "kernels" / "python" / "_hf_linattn_kernels.so"
BUILD = ROOT / "build" / "kernels"
REPORT = BUILD / "resources.txt"

# cudaGetDriverEntryPointByVersion is as old as that.
MIN_CUDA = (12, 5)
# The oldest PyTorch that the library loads into; headers of any later one serve.
MIN_TORCH = (2, 11)
# Machine code for Ampere and Hopper; PTX for what is neither, to be compiled by the driver.
PORTABLE_CODE = ("-gencode", "arch=compute_80,code=[sm_80,compute_80]")
HOPPER_CODE = ("-gencode", "arch=compute_90a,code=sm_90a")
ARCHITECTURES = "sm_80,sm_90a,compute_80"
COMMON_FLAGS = ("-std=c++17", "-O3", f"-I{SOURCES}")
NVCC_FLAGS = ("-Xcompiler=-fPIC,-fvisibility=hidden", "-Xptxas=-v", "--expt-relaxed-constexpr")
TORCH_TARGET = f"0x{MIN_TORCH[0]:02x}{MIN_TORCH[1]:02x}000000000000"
BINDING_FLAGS = ("-fPIC", "-fvisibility=hidden", f"-DTORCH_TARGET_VERSION={TORCH_TARGET}")


class Unavailable(Exception):
    """The kernels cannot be built here; the text says what is missing."""


class KernelResources(NamedTuple):
    """What ptxas reports of one kernel (or of a function that was not inlined) for one architecture."""

    name: str
    architecture: str
    registers: int
    stack_bytes: int
    spill_bytes: int


class Toolchain(NamedTuple):
    """What was found to build with."""

    nvcc: Path
    cuda_version: str
    torch_include: Path


def find_toolchain() -> Toolchain:
    """The compiler and the headers.

    Raises:
        Unavailable: one of them is missing or too old.
    """
    nvcc = _find_nvcc()
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    version = re.search(r"release (\d+)\.(\d+)", text)
    if version is None or tuple(map(int, version.groups())) < MIN_CUDA:
        raise Unavailable(f"{nvcc} is older than CUDA {MIN_CUDA[0]}.{MIN_CUDA[1]}")
    return Toolchain(nvcc, ".".join(version.groups()), _find_torch_include())


def build_library(toolchain: Toolchain) -> Path:
    """Compile what changed, link, write the report; returns the library in build/kernels.

    Raises:
        RuntimeError: a compiler failed; the text is its output.
    """
    BUILD.mkdir(parents=True, exist_ok=True)
    with _locked(BUILD / "lock"):
        commands = _compile_commands(toolchain)
        stale = {target: command for target, command in commands.items() if not _is_current(target, command)}
        started = time.monotonic()
        if stale:
            _say(f"compiling {len(stale)} of {len(commands)} files with nvcc {toolchain.cuda_version}")
        with concurrent.futures.ThreadPoolExecutor(_jobs()) as pool:
            # Waits for all: the first failure is raised when the others have ended.
            for done in [pool.submit(_compile, target, command) for target, command in stale.items()]:
                done.result()
        built = BUILD / LIBRARY.name
        if stale or not built.exists():
            _link(toolchain, list(commands), built)
            _say(f"{built.name}, {built.stat().st_size >> 20} MiB, {time.monotonic() - started:.0f} s")
        reports = [target.with_suffix(".log").read_text() for target in sorted(commands)]
        REPORT.write_text("".join(reports))
        for gone in set(BUILD.glob("*.o")) - set(commands):
            gone.unlink()
    return built


def install_in_place() -> Path | None:
    """Build and put the library where hf_linattn.kernels finds it in a checkout; None where it cannot be built."""
    built = build_if_possible()
    if built is None:
        return None
    if not LIBRARY.exists() or LIBRARY.read_bytes() != built.read_bytes():
        # A running process keeps the old file mapped: it must not change under it.
        temporary = LIBRARY.with_suffix(f".{os.getpid()}")
        shutil.copyfile(built, temporary)
        temporary.replace(LIBRARY)
    return LIBRARY


def build_if_possible() -> Path | None:
    """The library, or None after one line that says why there is none.

    Raises:
        Unavailable: as `find_toolchain`, if HF_LINATTN_BUILD_KERNELS is 1.
        RuntimeError: as `build_library`.
    """
    wanted = os.environ.get("HF_LINATTN_BUILD_KERNELS", "auto")
    if wanted not in ("0", "1", "auto"):
        raise ValueError(f"HF_LINATTN_BUILD_KERNELS: expected 0, 1 or auto, got {wanted!r}")
    if wanted == "0":
        _say("not built, HF_LINATTN_BUILD_KERNELS is 0; the ops run on PyTorch")
        return None
    try:
        return build_library(find_toolchain())
    except Unavailable as reason:
        if wanted == "1":
            raise
        _say(f"not built, {reason}; the ops run on PyTorch")
        return None


def read_resources(report: str) -> list[KernelResources]:
    """Every function in the output of `ptxas -v`."""
    pattern = re.compile(
        r"Function properties for (?P<name>\S+)\s+"
        r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
        r"(?:\s+ptxas info\s+: Used (?P<registers>\d+) registers)?"
    )
    found, architecture, position = [], "", 0
    for match in pattern.finditer(report):
        entries = re.findall(r"Compiling entry function '\S+' for '(\w+)'", report[position : match.start()])
        architecture, position = entries[-1] if entries else architecture, match.end()
        spilled = int(match["stores"]) + int(match["loads"])
        registers = int(match["registers"] or 0)
        found.append(KernelResources(match["name"], architecture, registers, int(match["stack"]), spilled))
    return found


def _find_nvcc() -> Path:
    homes = [Path(home) for name in ("CUDA_HOME", "CUDA_PATH") if (home := os.environ.get(name))]
    for home in homes:
        if (home / "bin" / "nvcc").is_file():
            return home / "bin" / "nvcc"
        raise Unavailable(f"there is no bin/nvcc in {home} (CUDA_HOME)")
    if found := shutil.which("nvcc"):
        return Path(found)
    # The packages nvidia-cuda-nvcc and nvidia-cuda-runtime, in this environment.
    for folder in _site_folders():
        for nvcc in sorted(folder.glob("nvidia/cu*/bin/nvcc"), reverse=True):
            return nvcc
    raise Unavailable("nvcc was not found in CUDA_HOME, PATH or the nvidia packages of this environment")


def _find_torch_include() -> Path:
    """PyTorch's headers: those named, those of this interpreter, or those of the environment pip builds for."""
    if named := os.environ.get("HF_LINATTN_TORCH_INCLUDE"):
        candidates = [Path(named)]
    else:
        spec = importlib.util.find_spec("torch")
        importable = [Path(spec.origin).parent / "include"] if spec and spec.origin else []
        # An isolated build hides the environment's packages from import, but the interpreter knows where they are.
        candidates = importable + [folder / "torch" / "include" for folder in _site_folders()]
    for include in candidates:
        version = include / "torch" / "headeronly" / "version.h"
        if version.is_file():
            numbers = re.findall(r"#define TORCH_VERSION_(?:MAJOR|MINOR) (\d+)", version.read_text())
            if tuple(map(int, numbers)) >= MIN_TORCH:
                return include
            raise Unavailable(f"the PyTorch in {include} is older than {MIN_TORCH[0]}.{MIN_TORCH[1]}")
    raise Unavailable(
        "PyTorch's headers were not found: install torch first, pass --no-build-isolation where builds have an "
        "environment of their own (uv), or set HF_LINATTN_TORCH_INCLUDE"
    )


def _site_folders() -> list[Path]:
    paths = [sysconfig.get_path("platlib"), sysconfig.get_path("purelib"), *sys.path, site.getusersitepackages()]
    return [Path(path) for path in dict.fromkeys(paths) if path and Path(path).is_dir()]


def _compile_commands(toolchain: Toolchain) -> dict[Path, list[str]]:
    """Object file -> command without its output, slowest first."""
    commands = {}
    for source in sorted(SOURCES.glob("*.cu"), key=_rank):
        # Hopper's own kernels are empty for other architectures.
        code = HOPPER_CODE if "_sm90" in source.stem else (*PORTABLE_CODE, *HOPPER_CODE)
        commands[BUILD / f"{source.stem}.o"] = [
            str(toolchain.nvcc), *COMMON_FLAGS, *NVCC_FLAGS, *code, *_extra_flags(), "-c", str(source)
        ]  # fmt: skip
    info = f"cuda={toolchain.cuda_version};architectures={ARCHITECTURES}"
    binding = SOURCES / "binding_torch.cpp"
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    commands[BUILD / f"{binding.stem}.o"] = [
        *compiler, *COMMON_FLAGS, *BINDING_FLAGS, "-isystem", str(toolchain.torch_include),
        f'-DKERNELS_BUILD_INFO="{info}"', "-c", str(binding),
    ]  # fmt: skip
    return commands


def _rank(source: Path) -> tuple[float, str]:
    """Longest compile of last time first, so that no core is left with the longest one at the end."""
    stamp = BUILD / f"{source.stem}.json"
    seconds = json.loads(stamp.read_text())["seconds"] if stamp.exists() else float("inf")
    return -seconds, source.name


def _extra_flags() -> list[str]:
    return shlex.split(os.environ.get("HF_LINATTN_NVCC_FLAGS", ""))


def _is_current(target: Path, command: list[str]) -> bool:
    stamp = target.with_suffix(".json")
    if not (target.exists() and stamp.exists()):
        return False
    known = json.loads(stamp.read_text())
    return known["command"] == command and known["inputs"] == _digests(known["inputs"])


def _compile(target: Path, command: list[str]) -> None:
    started = time.monotonic()
    dependencies = target.with_suffix(".d")
    target.with_suffix(".json").unlink(missing_ok=True)
    output = _run([*command, "-o", str(target), "-MD", "-MF", str(dependencies)])
    target.with_suffix(".log").write_text(output)
    # `target: file file \` with spaces in names escaped; headers of toolkit and system change with the compiler.
    words = re.split(r"(?<!\\)\s+", dependencies.read_text().split(":", 1)[1].replace("\\\n", " ").strip())
    own = {name for word in words if Path(name := word.replace("\\ ", " ")).resolve().is_relative_to(SOURCES)}
    stamp = {"command": command, "inputs": _digests(own), "seconds": round(time.monotonic() - started, 1)}
    target.with_suffix(".json").write_text(json.dumps(stamp, indent=1))


def _digests(paths: Iterator[str] | dict | set) -> dict[str, str]:
    """Path -> hash of the content, "" for a file that is gone."""
    return {
        path: hashlib.sha256(Path(path).read_bytes()).hexdigest() if Path(path).is_file() else ""
        for path in sorted(paths)
    }


def _link(toolchain: Toolchain, objects: list[Path], library: Path) -> None:
    # PyTorch loads libtorch out of reach of other libraries; a dependency on its name finds it, whatever its version.
    # An empty library of that name is enough to link against.
    stubs = BUILD / "stubs"
    stubs.mkdir(exist_ok=True)
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    empty = stubs / "empty.cpp"
    empty.write_text("")
    _run([*compiler, "-shared", "-fPIC", str(empty), "-Wl,-soname,libtorch.so", "-o", str(stubs / "libtorch.so")])
    # The nvidia packages keep the runtime in lib, where their nvcc does not look.
    runtime = toolchain.nvcc.resolve().parents[1] / "lib"
    temporary = library.with_suffix(".tmp")
    _run([
        str(toolchain.nvcc), "-shared", "-cudart=static", *map(str, sorted(objects)), f"-L{runtime}", f"-L{stubs}",
        "-Xlinker=--no-as-needed,-ltorch,--as-needed", "-o", str(temporary),
    ])  # fmt: skip
    temporary.replace(library)


def _run(command: list[str]) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)}\n{done.stdout}")
    return done.stdout


def _say(text: str) -> None:
    # Compiling takes minutes: a line that waits in a buffer helps nobody.
    print(f"kernels: {text}", flush=True)


def _jobs() -> int:
    return int(os.environ.get("MAX_JOBS") or len(os.sched_getaffinity(0)))


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One build at a time: test processes and make may ask for it together."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    try:
        placed = install_in_place()
    except (Unavailable, RuntimeError, ValueError) as error:
        sys.exit(f"kernels: {error}")
    if placed is not None:
        _say(f"{placed.relative_to(ROOT)} is up to date")
