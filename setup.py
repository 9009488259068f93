"""Build script: all metadata is in pyproject.toml. This file compiles csrc/ into the package where that is possible.

It needs nvcc, ninja and torch's headers, so an environment with torch in it: pip install --no-build-isolation. Without
them the installation is pure Python, says so, and the kernels are compiled at their first use on a GPU instead.
DPDMD_BUILD_CUDA=0 leaves them out.
"""

import importlib.util
import os
import shutil
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

RUNTIME = Path(__file__).resolve().parent / "dpdmd" / "kernels" / "runtime"


def _load_build():
    spec = importlib.util.spec_from_file_location("build", RUNTIME / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


BUILD = _load_build()
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
