"""Starts this process: its device and the device's settings, and the other processes of the run."""

from __future__ import annotations

import os

import torch

from dpdmd.config import TRAINED, Config, ConfigError, EngineConfig
from dpdmd.engine import deepspeed
from dpdmd.engine.nvme import check_nvme, load_file_access
from dpdmd.engine.optimizer import check_optimizer
from dpdmd.engine.world import World, join, resolve_device
from dpdmd.kernels.blocks.fp8 import converts


def resolve_dtype(name: str, device: str) -> torch.dtype:
    """'auto' is bfloat16 on CUDA and float32 on the CPU."""
    if name == "auto":
        return torch.bfloat16 if device == "cuda" else torch.float32
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[name]


def check(config: Config) -> None:
    """Raises ConfigError, before anything is loaded, for an unavailable device, optimizer, arithmetic or DeepSpeed."""
    device = resolve_device(config.engine.device)
    if config.model.fp8 != "off" and (device != "cuda" or not converts("cuda", torch.cuda.current_device())):
        raise ConfigError(
            f"model.fp8 = {config.model.fp8}: FP8 products need a GPU of compute capability 8.9 or newer, and this "
            f"machine's device is {torch.cuda.get_device_name() if device == 'cuda' else device}; model.fp8=off would run"
        )
    if config.engine.offload == "nvme":
        check_nvme(config.engine.nvme_path)
    for role in TRAINED:
        check_optimizer(config.optimizer(role), device, config.engine.offload)
    deepspeed.check()


def start(config: EngineConfig, run: str = "") -> World:
    """Prepares this process's device and joins the other processes, as `world.join` does."""
    device = resolve_device(config.device)
    if device == "cuda":
        _let_segments_grow()
    else:
        os.environ["DS_ACCELERATOR"] = "cpu"  # before DeepSpeed is imported, below
    if config.offload == "nvme":
        load_file_access(device)
    world = join(config, run)
    deepspeed.check_names()
    return world


def _let_segments_grow() -> None:
    """Lets torch's allocator serve a larger tensor from several freed pieces: on a GPU that is 95 % full, fragmentation would
    run out of memory. The environment's settings take precedence."""
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")
