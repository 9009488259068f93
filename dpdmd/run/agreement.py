"""Which kernels all processes of a run take, and a run that goes on takes again.

Attention's are chosen by one table of times: each process would choose by what it measures on a GPU that the package ships no
times for, and two measurements may choose differently. Of the others each machine takes what it has: it must be the same.
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
    """Raises ConfigError where DPDMD_KERNELS or DPDMD_ATTENTION ask for what there is not, or not here."""
    try:
        name = requested()
        if os.environ.get("DPDMD_ATTENTION"):
            for head_dim in sorted({head_dim for head_dim, _ in backbone.attention_shapes()}):
                tokens = torch.zeros(1, 8, 1, head_dim, device=device, dtype=dtype)
                attention(tokens, tokens, tokens)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"DPDMD_KERNELS or DPDMD_ATTENTION in the environment: {error}") from error
    if name in FASTEST_FIRST and (reason := why_not(name, device.type, device.index)):
        raise ConfigError(f"DPDMD_KERNELS = {name} in the environment: {reason}; auto takes what serves")


def check_alike(world: World) -> None:
    """Raises ConfigError where the processes would not run the same kernels: their last bits differ, and so would the weights
    that each process computes for all. All processes call."""
    device = world.device
    mine = {
        "torch": torch.__version__,
        "DPDMD_KERNELS": os.environ.get("DPDMD_KERNELS"),
        "DPDMD_ATTENTION": os.environ.get("DPDMD_ATTENTION"),
        **{f"{name} kernels": not why_not(name, device.type, device.index) for name in ("cuda", "triton")},
    }
    for rank, theirs in enumerate(world.gather(mine)):
        for name, value in theirs.items():
            if value != mine[name]:
                raise ConfigError(
                    f"{name} = {value!r} in process {rank} and {mine[name]!r} in process {world.rank}: all machines of a "
                    "run need the same environment (where not all have compiled kernels, DPDMD_KERNELS=triton does without)"
                )


def check_settings(world: World, config: Config, prompts: list[str], **options: Any) -> None:
    """Raises ConfigError where the processes were started with other settings, prompts or options: they would train a student
    together that none of them describes, or wait for one another for ever. All processes call."""
    mine = {name: str(value) for name, value in flattened(config.model_dump(mode="json"))}
    mine |= {f"--{name}": str(value) for name, value in options.items()}
    mine["the content of prompts.file"] = digest_of(prompts)
    first, *others = world.gather(mine)
    for rank, theirs in enumerate(others, start=1):
        for name in {**first, **theirs}:
            if first.get(name) != theirs.get(name):
                raise ConfigError(
                    f"{name} = {theirs.get(name)} in process {rank} and {first.get(name)} in process 0: all processes of a run "
                    "are started with the same settings"
                )


def agree_on_attention(world: World, backbone: Backbone, stored: Any) -> dict[str, Any] | None:
    """Has every process choose by the main process's times, and returns them for a checkpoint to store; all processes
    call. None, and nothing is done, on devices other than CUDA's.

    stored: what this returned when the checkpoint was made, None without one; of the main process alone it counts. It
    is taken where it is of a GPU of the same name as the main process's. Else times are measured anew, and a line says
    so.
    """
    if world.device.type != "cuda":
        return None
    table = _main_table(world.device, backbone, stored) if world.main else None
    table = world.gather(table)[0]
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
        print(
            f"attention: kernels are chosen by times of {gpu}; {whose}: results may differ in their last bits",
            flush=True,
        )
    return choice.known_times(attention, index, backbone.attention_shapes())
