"""Masters and moments on a local NVMe disk: where they lie, and DeepSpeed's library that reads and writes them."""

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
    """Raises ConfigError where engine.offload = nvme cannot be had."""
    if path is None or not os.access(path, os.W_OK):
        raise ConfigError(f"engine.nvme_path = {path!r}: no folder that can be written to")
    if not _file_access().is_compatible(verbose=False):
        raise ConfigError(
            "engine.offload = nvme: DeepSpeed's asynchronous file access cannot be built here, for which it needs the headers "
            "of libaio (Debian: libaio-dev); engine.offload=cpu would run"
        )


def swap_folder(config: Config, role: str) -> Path:
    """Under engine.nvme_path, for one run and one role: DeepSpeed names files by parameters' numbers alone, and copies
    all that is there into a checkpoint."""
    run = hashlib.sha256(str(Path(config.run.output_dir).resolve()).encode()).hexdigest()[:12]
    return Path(str(config.engine.nvme_path)) / f"dpdmd-{run}" / role


def remove_swapped(folder: Path, root: Path) -> None:
    """Removes a folder with all that is in it, and those above it that are empty then, up to root, which stays."""
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):
        while (folder := folder.parent) != root:
            folder.rmdir()


def load_file_access(device: str) -> None:
    """Loads DeepSpeed's library for NVMe, which is compiled where it was not yet. Raises ConfigError where it cannot be."""
    library = _file_access()
    if device == "cuda":
        _bind_cudnn()
    try:
        with compiling("async_io", "DeepSpeed's asynchronous file access"):
            library.load(verbose=False)
    except ConfigError:
        raise
    except Exception as error:  # whatever the compiler, the linker or the environment's settings lead to
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(
            f"engine.offload = nvme: DeepSpeed's asynchronous file access could not be built or loaded ({reason[:500]}); "
            "engine.offload=cpu would run"
        ) from error


def _file_access() -> Any:
    """What compiles and loads the library."""
    return importlib.import_module("deepspeed.ops.op_builder").AsyncIOBuilder()


def _bind_cudnn() -> None:
    """Loads all parts of cuDNN, which loads each at its first use. DeepSpeed's library for NVMe makes torch's symbols
    global; a part that comes after it takes some of them for its own and crashes (torch 2.11, DeepSpeed 0.19)."""
    torch.backends.cudnn.version()  # loads the first part
    maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    for folder, version in set(re.findall(r"(/\S+)/libcudnn\.so\.(\d+)", maps)):
        for part in sorted(Path(folder).glob(f"libcudnn_*.so.{version}")):
            ctypes.CDLL(str(part), mode=os.RTLD_NOW)
