"""Builds CUDA sources for the CPU, with a host compiler and kernels/csrc/emulation.h in the place of a GPU.

The environment variable HF_LINATTN_EMULATED_BUILD names the folder of the libraries (build/emulated).
"""

import ctypes
import fcntl
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "kernels" / "csrc"
# No unique symbols: two libraries in one process must not share the emulation's state.
FLAGS = ["-std=c++20", "-DHF_LINATTN_EMULATION", "-O1", "-fPIC", "-fno-gnu-unique", "-w"]


def unavailable_reason() -> str | None:
    """Why the kernels cannot be emulated here; None where they can."""
    if shutil.which("g++") is None:
        return "no g++ to compile the emulated kernels with"
    return None if cuda_headers() else "no CUDA headers beside nvcc or in CUDA_HOME"


@functools.cache
def cuda_headers() -> Path | None:
    """The folder with cuda_bf16.h."""
    homes = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    if shutil.which("nvcc"):
        # nvcc may be a wrapper script far from its toolkit; a dry run names the toolkit.
        dry = subprocess.run(["nvcc", "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=False)
        homes += [Path(top) for top in re.findall(r"^#\$ TOP=(.+)$", dry.stderr, re.MULTILINE)]
    return next((home / "include" for home in homes if (home / "include" / "cuda_bf16.h").exists()), None)


def build_library(name: str, sources: Iterable[Path]) -> Path:
    """lib<name>.so of these .cu files, compiled only where a source, a header or the flags changed.

    Raises:
        RuntimeError: with the compiler's output.
    """
    folder = Path(os.environ.get("HF_LINATTN_EMULATED_BUILD") or ROOT / "build" / "emulated")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # test workers build the same library at once
        return _build(folder, name, sources)


def _build(folder: Path, name: str, sources: Iterable[Path]) -> Path:
    headers = b"".join(p.read_bytes() for p in sorted([*SOURCES.glob("*.h"), *SOURCES.glob("*.cuh")]))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda source: _build_object(folder, headers, source), sources))
    library = folder / f"lib{name}.so"
    if not library.exists() or any(x.stat().st_mtime > library.stat().st_mtime for x in objects):
        _compile(["-shared", *map(str, objects)], library)
    return library


def _build_object(folder: Path, headers: bytes, source: Path) -> Path:
    content = headers + source.read_bytes() + " ".join(FLAGS).encode()
    target = folder / f"{source.stem}-{hashlib.sha256(content).hexdigest()[:16]}.o"
    if not target.exists():
        for stale in folder.glob(f"{source.stem}-*.o"):
            stale.unlink()
        include = [f"-I{SOURCES}", "-isystem", str(cuda_headers())]
        _compile([*FLAGS, *include, "-x", "c++", "-c", str(source)], target)
    return target


def _compile(arguments: Sequence[str], target: Path) -> None:
    # Renamed into place: a library that another process has loaded must not change under it.
    with tempfile.NamedTemporaryFile(dir=target.parent, suffix=target.suffix, delete=False) as file:
        temporary = Path(file.name)
    done = subprocess.run(["g++", *arguments, "-o", str(temporary)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        temporary.unlink()
        raise RuntimeError(f"g++ failed for {target.name}:\n{done.stderr[-4000:]}")
    temporary.replace(target)


def at(x: torch.Tensor) -> ctypes.c_void_p:
    """As an argument of such a library's functions."""
    return ctypes.c_void_p(x.data_ptr())


def whole_numbers(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Small enough for every product and sum to be exact in float32."""
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
