"""All processes of a run, and a resumed run, use the same kernels and settings.

Attention kernels are chosen by one table of times: on a GPU for which the package ships no times, each process would
measure and might choose differently. Of the other kernels each machine uses what it has; all must have the same.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from dpdmd.backbones.base import Backbone
from dpdmd.config import Config, ConfigError, flattened
from dpdmd.engine.world import World
from dpdmd.kernels import attention
from dpdmd.kernels.attention import choice
from dpdmd.kernels.runtime.backend import FASTEST_FIRST, requested, why_not
from dpdmd.run.prompts import digest_of


def check_kernels(device: torch.device, dtype: torch.dtype, backbone: Backbone) -> None:
    """Raises ConfigError if DPDMD_KERNELS or DPDMD_ATTENTION name kernels that do not exist or cannot run here."""
    try:
        name = requested()
        if os.environ.get("DPDMD_ATTENTION"):
            for head_dim in sorted({head_dim for head_dim, _ in backbone.attention_shapes()}):
                tokens = torch.zeros(1, 8, 1, head_dim, device=device, dtype=dtype)
                attention(tokens, tokens, tokens)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"DPDMD_KERNELS or DPDMD_ATTENTION in the environment: {error}") from error
    if name in FASTEST_FIRST and (reason := why_not(name, device.type, device.index)):
        raise ConfigError(f"DPDMD_KERNELS = {name} in the environment: {reason}; auto takes kernels that can run")


def check_alike(world: World) -> None:
    """Raises ConfigError if the processes would run different kernels, whose last bits differ. All processes call."""
    device = world.device
    mine = {
        "torch": torch.__version__,
        "DPDMD_KERNELS": os.environ.get("DPDMD_KERNELS"),
        "DPDMD_ATTENTION": os.environ.get("DPDMD_ATTENTION"),
        **{f"{name} kernels": not why_not(name, device.type, device.index) for name in ("cuda", "triton")},
    }
    _check_same(
        world, mine, "all machines of a run need the same environment (DPDMD_KERNELS=triton needs no compiled kernels)"
    )


def check_settings(world: World, config: Config, prompts: list[str], **options: Any) -> None:
    """Raises ConfigError if the processes were started with different settings, prompts or options: they could hang, or
    train a student that no configuration describes. All processes call."""
    mine = {name: str(value) for name, value in flattened(config.model_dump(mode="json"))}
    mine |= {f"--{name}": str(value) for name, value in options.items()}
    mine["the content of prompts.file"] = digest_of(prompts)
    _check_same(world, mine, "start all processes of a run with the same settings")


def _check_same(world: World, mine: dict[str, Any], advice: str) -> None:
    first, *others = world.gather(mine)
    for rank, theirs in enumerate(others, start=1):
        for name in {**first, **theirs}:
            ours, other = first.get(name), theirs.get(name)
            if ours != other:
                raise ConfigError(f"{name} = {other} in process {rank} and {ours} in process 0: {advice}")


def agree_on_attention(world: World, backbone: Backbone, stored: Any) -> dict[str, Any] | None:
    """Makes every process choose by the main process's times, and returns them for checkpoints; all processes call. On
    devices other than CUDA it does nothing and returns None.

    stored: the times in the checkpoint, or None; only the main process's value counts. Times of a GPU with another name,
    and damaged ones, are measured again, which a line says.
    """
    if world.device.type != "cuda":
        return None
    table = world.gather(_main_table(world.device, backbone, stored) if world.main else None)[0]
    choice.agree_on(table)
    return table


def _main_table(device: torch.device, backbone: Backbone, stored: Any) -> dict[str, Any]:
    index = torch.cuda.current_device() if device.index is None else device.index
    gpu = choice.gpu_name(index)
    if stored is not None:
        sound = choice.is_table(stored)
        if sound and stored["gpu"] == gpu:
            return stored
        whose = f"those of the checkpoint are of {stored['gpu']}" if sound else "the checkpoint's are damaged"
        print(f"attention: kernels are chosen by times of {gpu}; {whose}: last bits may differ", flush=True)
    return choice.known_times(attention, index, backbone.attention_shapes())
