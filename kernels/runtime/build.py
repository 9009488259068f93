"""Compiles csrc/ into one shared library, with nvcc and ninja: `python -m dpdmd.kernels.runtime.build`, or setup.py, or the
first call on a GPU. With --check it only says what is missing for that.

It is built against LibTorch's stable ABI: it needs torch's headers but neither a CUDA build of torch nor a GPU, and one
library serves torch 2.11 and newer with any Python. setup.py loads this file by its path: import the standard library only.
"""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path

SOURCES = Path(__file__).resolve().parents[2] / "csrc"
ARCHITECTURES = ("compute_80,code=sm_80", "compute_90a,code=sm_90a", "compute_90,code=compute_90")
COMPILE = "-std=c++17 -O3 -DTORCH_TARGET_VERSION=0x020b000000000000"


def file_name() -> str:
    """The library's name. It has a hash of the sources, so that a stale library is never loaded."""
    digest = hashlib.sha256(COMPILE.encode() + repr(ARCHITECTURES).encode())
    for source in sorted(SOURCES.glob("*.*")):
        digest.update(source.name.encode() + source.read_bytes())
    return f"_ops_{digest.hexdigest()[:12]}.so"


def unable() -> str:
    """What is missing to compile; "" if nothing is."""
    if not _nvcc():
        return "nvcc, CUDA's compiler, is not on PATH"
    if not _ninja():
        return "ninja is not installed (pip install ninja)"
    if _torch() is None:
        return "torch, whose headers it needs, is not installed in the environment that builds (--no-build-isolation)"
    if _cublas_headers() is None:
        return "cublasLt.h is neither in nvcc's toolkit nor in a package (pip install nvidia-cublas brings it)"
    return ""


def build(folder: Path) -> Path:
    """Compile into `folder` and return the library's path. Raises RuntimeError with the compiler's last lines."""
    if reason := unable():
        raise RuntimeError(f"the CUDA kernels cannot be compiled: {reason}")
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / file_name()
    with tempfile.TemporaryDirectory(prefix="dpdmd-") as work:
        Path(work, "build.ninja").write_text(_rules())
        done = subprocess.run([_ninja() or "ninja", "-C", work], capture_output=True, text=True)
        if done.returncode:
            last = "\n".join((done.stdout + done.stderr).splitlines()[-20:])
            raise RuntimeError(f"the CUDA kernels do not compile with {_nvcc()}:\n{last}")
        half = folder / f"{uuid.uuid4().hex}.tmp"  # another process must never see half a library
        try:
            shutil.copy(Path(work, "ops.so"), half)
            os.replace(half, target)
        finally:
            half.unlink(missing_ok=True)
    return target


def _nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    return shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")


def _cublas_headers() -> Path | None:
    """The folder of cublasLt.h, which comes with a whole CUDA toolkit and with the cuBLAS that a CUDA build of torch
    installs, but not with the compiler's own packages."""
    folders = [Path(os.environ.get("CUDA_HOME") or "/usr/local/cuda") / "include"]
    if compiler := _nvcc():
        folders.append(Path(os.path.realpath(compiler)).parents[1] / "include")
    if nvidia := importlib.util.find_spec("nvidia"):  # a namespace package, which may lie in several folders
        for package in nvidia.submodule_search_locations or ():
            folders += sorted(Path(package).glob("*/include"))
    return next((folder for folder in folders if (folder / "cublasLt.h").is_file()), None)


def _ninja() -> str | None:
    return shutil.which("ninja") or shutil.which("ninja", path=str(Path(sys.executable).parent))


def _torch() -> Path | None:
    """The folder of torch, without importing it."""
    found = importlib.util.find_spec("torch")
    return Path(found.origin).parent if found and found.origin else None


def _rules() -> str:
    torch = _torch()
    codes = " ".join(f"-gencode=arch={code}" for code in ARCHITECTURES)
    sources = [*sorted(SOURCES.glob("*.cpp")), *sorted(SOURCES.glob("*.cu"))]
    objects = " ".join(f"{source.stem}.o" for source in sources)
    # nvcc compiles the host's part too: it knows where its headers and its static runtime are. The folder of cuBLAS's header
    # comes last, as it may hold the CUDA headers of another release.
    flags = f"-Xcompiler -fPIC -I{torch}/include -Xcompiler -idirafter -Xcompiler {_cublas_headers()}"
    builds = "".join(f"build {source.stem}.o: compile {source}\n" for source in sources)
    return (
        f"rule compile\n  command = {_nvcc()} {COMPILE} {codes} --threads 0 {flags} -c $in -o $out\n"
        f"rule link\n  command = {_nvcc()} -shared -o $out $in -L{torch}/lib -ltorch_cpu\n"
        f"{builds}build ops.so: link {objects}\n"
    )


if __name__ == "__main__":
    if sys.argv[1:] == ["--check"]:
        sys.exit(unable() or 0)
    here = Path(__file__).resolve().parent
    built = build(here)
    for stale in set(here.glob("_ops_*.so")) - {built}:
        stale.unlink()
    print(built)
