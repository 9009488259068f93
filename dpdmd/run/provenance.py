"""Where a measurement comes from: machine, versions, commit and command, for JSON files of results."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("torch", "triton", "deepspeed", "diffusers", "transformers", "numpy")


def provenance(command: str) -> dict[str, Any]:
    """The record of this machine and process. command: what a reader types to measure again."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    cuda = torch.cuda.is_available()
    return {
        "command": command,
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
        "machine": {
            "gpu": torch.cuda.get_device_name() if cuda else None,
            "gpus": torch.cuda.device_count() if cuda else 0,
            "gpu_memory_gib": round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1) if cuda else None,
            "cores": os.cpu_count(),
            "system": platform.platform(terse=True),
        },
        "python": sys.version.split()[0],
        "cuda": torch.version.cuda,
        "packages": versions,
    }


def _commit() -> str | None:
    """The commit of this checkout; DPDMD_COMMIT gives it for a copy without history."""
    if "DPDMD_COMMIT" in os.environ:
        return os.environ["DPDMD_COMMIT"]
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.check_output(command, cwd=Path(__file__).parent, stderr=subprocess.DEVNULL, text=True).strip()
    except (OSError, subprocess.CalledProcessError):
        return None
