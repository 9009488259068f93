"""Compiles csrc/ into the package where that is possible. All metadata is in pyproject.toml.

This needs nvcc, ninja and torch (pip install --no-build-isolation). Without them, or with DPDMD_BUILD_CUDA=0, the
installation is pure Python, says so, and the kernels are compiled at their first use on a GPU.
"""

import importlib.util
import os
import shutil
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

RUNTIME = Path(__file__).resolve().parent / "dpdmd" / "kernels" / "runtime"

_spec = importlib.util.spec_from_file_location("build", RUNTIME / "build.py")
BUILD = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(BUILD)
REASON = "DPDMD_BUILD_CUDA=0" if os.environ.get("DPDMD_BUILD_CUDA") == "0" else BUILD.unable()


class BuildWithKernels(build_py):
    def run(self):
        super().run()
        if REASON:
            self.announce(f"dpdmd: installing without compiled CUDA kernels: {REASON}", level=3)
            return
        library = RUNTIME / BUILD.file_name()
        if not library.exists():
            BUILD.build(library.parent)
        if not self.editable_mode:
            shutil.copy(library, Path(self.build_lib) / "dpdmd" / "kernels" / "runtime")


class AnyPythonWheel(bdist_wheel):
    """One wheel a platform: the library knows nothing of Python."""

    def get_tag(self):
        _, _, platform = super().get_tag()
        return "py3", "none", platform


class WithLibrary(Distribution):
    def has_ext_modules(self):
        return not REASON


setup(distclass=WithLibrary, cmdclass={"build_py": BuildWithKernels, "bdist_wheel": AnyPythonWheel})
