"""Build backend of the package: setuptools, with the compiled kernels added to wheels where they can be built.

With nvcc and PyTorch's headers at hand a wheel is `py3-none-linux_x86_64` and holds the library: it loads into any
Python and any PyTorch from 2.11 on. Without them it is `py3-none-any`, one line says what is missing, and the ops run
on PyTorch. An editable install puts the library into the checkout, as `make kernels` does. See compile_kernels.py.
"""

import shutil
from pathlib import Path

import compile_kernels
from setuptools import build_meta
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

build_sdist = build_meta.build_sdist
get_requires_for_build_sdist = build_meta.get_requires_for_build_sdist
get_requires_for_build_wheel = build_meta.get_requires_for_build_wheel
get_requires_for_build_editable = build_meta.get_requires_for_build_editable
prepare_metadata_for_build_wheel = build_meta.prepare_metadata_for_build_wheel
prepare_metadata_for_build_editable = build_meta.prepare_metadata_for_build_editable

# What the hook has built, for the commands below, which setuptools calls.
_library: Path | None = None


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    """PEP 517 hook."""
    global _library
    _library = compile_kernels.build_if_possible()
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    """PEP 660 hook; the wheel it makes only points to the checkout."""
    compile_kernels.install_in_place()
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)


class BuildPackage(build_py):
    """Copies the library beside the modules of hf_linattn.kernels."""

    def run(self):
        super().run()
        if _library is not None and not self.editable_mode:
            shutil.copyfile(_library, Path(self.build_lib) / "hf_linattn" / "kernels" / _library.name)


class PlatformWheel(bdist_wheel):
    """Tagged for the platform, but for any Python 3: the library uses no symbol of Python."""

    def finalize_options(self):
        # The library is no extension module of setuptools, but a wheel with it is laid out as if it were one.
        self.distribution.has_ext_modules = lambda: _library is not None
        super().finalize_options()

    def get_tag(self):
        return ("py3", "none", "any" if _library is None else super().get_tag()[2])
