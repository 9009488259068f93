"""Finds or builds the library that csrc/ compiles to, loads it, and registers its operations' fakes."""

import fcntl
import functools
import os
import sys
import warnings
from pathlib import Path

import torch
from torch import Tensor

from dpdmd.kernels.runtime import build, launch, layout
from dpdmd.kernels.runtime.registration import register_traced


@functools.cache
def missing(device_type: str, index: int | None) -> str:
    """Why the CUDA kernels do not run on a device, and how to get them; "" where they do."""
    if device_type != "cuda" or not torch.version.cuda:
        return f"the CUDA kernels need tensors on an NVIDIA GPU, and these are on {device_type}"
    if launch.capability(index) < (8, 0):
        return "the CUDA kernels need a GPU of compute capability 8.0 or newer"
    return load()


@functools.cache
def load() -> str:
    """Load the library. Returns "", or why it cannot be loaded."""
    path = find()
    if path is None:
        if reason := build.unable():
            return f"csrc/ is not compiled, and {reason}. pip install --no-build-isolation compiles it where nvcc is"
        try:
            path = _build_once(cache_folder())
        except (OSError, RuntimeError) as error:
            warnings.warn(f"dpdmd runs without its CUDA kernels: {error}", RuntimeWarning, stacklevel=2)
            return str(error)
    try:
        torch.ops.load_library(path)
    except OSError as error:
        reason = f"{path} does not load ({error}); delete it, and it is compiled again"
        warnings.warn(f"dpdmd runs without its CUDA kernels: {reason}", RuntimeWarning, stacklevel=2)
        return reason
    for name, fake in FAKES.items():
        register_traced(name, fake)
    return ""


def find() -> Path | None:
    """The library compiled from these sources: beside this file (setup.py) or in the user's cache."""
    for folder in (Path(__file__).resolve().parent, cache_folder()):
        path = folder / build.file_name()
        if os.path.exists(path):  # no error in a folder that cannot be read
            return path
    return None


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dpdmd"


def _build_once(folder: Path) -> Path:
    """Compile in one of several processes, while the others wait."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        path = folder / build.file_name()
        if not path.exists():
            print(
                f"dpdmd: compiling the CUDA kernels into {folder}, once (about a minute)", file=sys.stderr, flush=True
            )
            build.build(folder)
        return path


def same_dtype(*tensors: Tensor | None) -> list:
    """The tensors, in float32 where their dtypes differ, as the kernels take one dtype. None stays None."""
    dtypes = {tensor.dtype for tensor in tensors if tensor is not None}
    if len(dtypes) < 2:
        return list(tensors)
    return [None if tensor is None else tensor.float() for tensor in tensors]


def _fake_loss(x: Tensor, *arguments) -> tuple[Tensor, Tensor]:
    per_sample = arguments[-1]
    loss = x.new_empty(x.shape[:1] if per_sample else (), dtype=torch.float32)
    return loss, layout.empty_like(x, x.dtype)


FAKES = {
    "dmd_loss": _fake_loss,
    "velocity_loss": _fake_loss,
    "x_prediction_loss": _fake_loss,
    "renoise": lambda x, *arguments: layout.empty_like(x, x.dtype),
    "guided_euler_step": lambda x, *arguments: layout.empty_like(x, x.dtype),
    "multiply": lambda x, *arguments: layout.empty_like(x, arguments[-1]),
    "linear_gelu_aux": lambda x, weight, bias: tuple(x.new_empty(len(x), len(weight)) for _ in range(2)),
    "matmul_dgelu": lambda dy, weight, pre: torch.empty_like(pre),
    "scale_": lambda *arguments: None,
}
