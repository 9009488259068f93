"""Where a measurement comes from: machine, versions, commit and command, for the JSON files that others should trust."""

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
    """command: what a reader types to measure again."""
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
    """The commit measured; DPDMD_COMMIT says it where a copy without history is measured."""
    if "DPDMD_COMMIT" in os.environ:
        return os.environ["DPDMD_COMMIT"]
    try:
        answer = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.strip()
