"""Masters and moments on a local NVMe disk: their folder, and DeepSpeed's library that reads and writes them."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from dpdmd.config import Config, ConfigError
from dpdmd.engine.compilation import compiling


def check_nvme(path: str | None) -> None:
    """Raises ConfigError if engine.offload = nvme cannot work here."""
    if path is None or not os.access(path, os.W_OK):
        raise ConfigError(f"engine.nvme_path = {path!r}: no folder that can be written to")
    if not _file_access().is_compatible(verbose=False):
        raise ConfigError(
            "engine.offload = nvme: DeepSpeed's asynchronous file access cannot be built here: it needs the headers of libaio "
            "(Debian: libaio-dev); engine.offload=cpu would run"
        )


def swap_folder(config: Config, role: str) -> Path:
    """The folder of one run and role under engine.nvme_path. Roles cannot share one: DeepSpeed names files by parameters'
    numbers alone, and copies the whole folder into a checkpoint."""
    run = hashlib.sha256(str(Path(config.run.output_dir).resolve()).encode()).hexdigest()[:12]
    return Path(str(config.engine.nvme_path)) / f"dpdmd-{run}" / role


def remove_swapped(folder: Path, root: Path) -> None:
    """Removes a folder with its contents, and then-empty folders above it below root."""
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):
        while (folder := folder.parent) != root:
            folder.rmdir()


def load_file_access(device: str) -> None:
    """Loads DeepSpeed's library for NVMe, compiling it if necessary. Raises ConfigError if that fails."""
    library = _file_access()
    if device == "cuda":
        _bind_cudnn()
    try:
        with compiling("async_io", "DeepSpeed's asynchronous file access"):
            library.load(verbose=False)
    except Exception as error:  # of the compiler, the linker or the environment's settings
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(
            f"engine.offload = nvme: DeepSpeed's asynchronous file access could not be built or loaded ({reason[:500]}); "
            "engine.offload=cpu would run"
        ) from error


def _file_access() -> Any:
    return importlib.import_module("deepspeed.ops.op_builder").AsyncIOBuilder()


def _bind_cudnn() -> None:
    """Loads all parts of cuDNN, each of which would load at its first use. DeepSpeed's library for NVMe makes torch's
    symbols global; a part loaded after it takes some of them for its own and crashes (torch 2.11, DeepSpeed 0.19)."""
    torch.backends.cudnn.version()  # loads the first part
    maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    for folder, version in set(re.findall(r"(/\S+)/libcudnn\.so\.(\d+)", maps)):
        for part in sorted(Path(folder).glob(f"libcudnn_*.so.{version}")):
            ctypes.CDLL(str(part), mode=os.RTLD_NOW)
