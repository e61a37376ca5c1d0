"""The wheel: one top-level package, the data files the code reads at run time, an entry point, nothing else but, where
it can be compiled, the library of the kernels."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SOURCE_FOLDERS = ("hf_linattn", "kernels", "conversion", "evals", "recipes")


# Answers for its version, and makes empty files of what it is asked to compile and link.
FAKE_NVCC = """#!/bin/sh
case "$*" in *--version*) echo "Cuda compilation tools, release 13.0, V13.0.88"; exit;; esac
while [ $# -gt 0 ]; do
  case "$1" in -o) : > "$2";; -MF) echo "x: " > "$2";; esac
  shift
done
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the sources: setuptools would leave its build folder in the checkout."""
    source = tmp_path_factory.mktemp("source")
    for name in SOURCE_FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    return source


def build_wheel(source, target, **environment):
    """(the wheel, what the build printed)."""
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--no-build-isolation", "--no-index"]
    built = subprocess.run(
        [*command, "--wheel-dir", target, source],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = target.glob("*.whl")
    return path, built.stdout + built.stderr


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    path, printed = build_wheel(source, tmp_path_factory.mktemp("dist"), HF_LINATTN_BUILD_KERNELS="0")
    assert path.name.endswith("-py3-none-any.whl")
    assert "kernels: not built, HF_LINATTN_BUILD_KERNELS is 0" in printed
    with zipfile.ZipFile(path) as archive:
        yield archive


def packaged_name(path):
    """Where the wheel must hold a source file."""
    inside = path.relative_to(ROOT).as_posix()
    if inside.startswith("kernels/python/"):
        return inside.replace("kernels/python/", "hf_linattn/kernels/", 1)
    return inside if inside.startswith("hf_linattn/") else f"hf_linattn/{inside}"


def test_wheel_holds_one_top_level_package(wheel):
    top_level = {name.split("/")[0] for name in wheel.namelist()}
    assert {name for name in top_level if not name.endswith(".dist-info")} == {"hf_linattn"}


@pytest.mark.parametrize("pattern", ["*.py", "*.yaml", "*.j2", "py.typed"])
def test_wheel_holds_every_file_the_code_reads(wheel, pattern):
    sources = [
        path
        for folder in ("hf_linattn", "kernels/python", "conversion", "evals", "recipes")
        for path in (ROOT / folder).rglob(pattern)
        if "results" not in path.parts and "__pycache__" not in path.parts
    ]
    assert sources, f"no {pattern} in the checkout"
    missing = {packaged_name(path) for path in sources} - set(wheel.namelist())
    assert not missing, f"not in the wheel, see [tool.setuptools] in pyproject.toml: {sorted(missing)}"


def test_wheel_leaves_results_and_sources_of_kernels_out(wheel):
    assert not [name for name in wheel.namelist() if "/results/" in name or "/csrc/" in name or name.endswith(".pyc")]


@pytest.mark.slow
def test_wheel_holds_the_library_where_there_is_a_compiler(wheel, source, tmp_path):
    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(FAKE_NVCC)
    nvcc.chmod(0o755)
    path, _ = build_wheel(source, tmp_path / "dist", CUDA_HOME=str(tmp_path / "cuda"))
    library = "hf_linattn/kernels/_hf_linattn_kernels.so"
    # No version of Python or PyTorch in the tag: the library depends on neither.
    assert path.name.endswith(f"-py3-none-{sysconfig.get_platform().replace('-', '_')}.whl")
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
        assert sorted(names) == sorted([*(n for n in wheel.namelist() if ".dist-info/" not in n), library])
        (tags,) = (name for name in archive.namelist() if name.endswith(".dist-info/WHEEL"))
        assert "Root-Is-Purelib: false" in archive.read(tags).decode()
    # The build folder is left as it is; what follows must not find the library there.
    path, printed = build_wheel(source, tmp_path / "without", CUDA_HOME=str(tmp_path / "nothing"))
    assert path.name.endswith("-py3-none-any.whl")
    assert "kernels: not built, there is no bin/nvcc in" in printed
    with zipfile.ZipFile(path) as archive:
        assert library not in archive.namelist()


def test_wheel_metadata(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = Parser().parsestr(wheel.read(name).decode())
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert any(file.endswith("licenses/LICENSE") for file in wheel.namelist())
    entry_points = wheel.read(name.replace("METADATA", "entry_points.txt")).decode()
    assert "hf-linattn = hf_linattn.cli:main" in entry_points


def test_every_package_is_mapped_to_an_existing_folder():
    mapping = PROJECT["tool"]["setuptools"]["package-dir"]
    assert set(mapping) == set(PROJECT["tool"]["setuptools"]["packages"])
    assert all((ROOT / folder / "__init__.py").is_file() for folder in mapping.values())


def test_constraints_meet_the_declared_requirements():
    """constraints.txt pins what pyproject.toml asks for: a pin outside the range would make every install fail."""
    from packaging.requirements import Requirement

    pins = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            (pin,) = requirement.specifier
            assert pin.operator == "==", f"{line}: a constraint is one exact version"
            pins[requirement.name.replace("_", "-").lower()] = pin.version
    declared = PROJECT["project"]["dependencies"] + PROJECT["project"]["optional-dependencies"]["dev"]
    for requirement in map(Requirement, declared):
        name = requirement.name.replace("_", "-").lower()
        if name in pins:
            assert requirement.specifier.contains(pins[name]), f"{requirement} against the pin {pins[name]}"
    assert {"torch", "transformers", "accelerate", "peft", "datasets", "lm-eval"} <= set(pins)
