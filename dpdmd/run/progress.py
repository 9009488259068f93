"""The bars that show how far a run has come, and the run's timings."""

from __future__ import annotations

import time

import torch
from tqdm import tqdm

from dpdmd.config import TRAINED, Config
from dpdmd.engine.world import World


class EncodingProgress:
    """A bar for the prompts that this process encodes."""

    def __init__(self):
        self._bar = None

    def __call__(self, done: int, to_do: int, num_bytes: int) -> None:
        if self._bar is None:
            description = f"encoding prompts ({num_bytes / 1e9:.2f} GB)"
            self._bar = tqdm(total=to_do, unit="prompt", desc=description, mininterval=1.0)
        self._bar.update(done - self._bar.n)
        if done == to_do:
            self.close()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


class Progress:
    """The bar of the main process (time left, each role's latest loss), and the run's timings."""

    def __init__(self, config: Config, first: int, world: World):
        self._world = world
        self._samples = config.engine.batch_size * config.engine.accumulation * world.size
        self._last = time.perf_counter()
        self._seconds = {role: [] for role in TRAINED}
        self._latest: dict[str, float] = {}
        self._losses: dict[str, str] = {}
        self._bar = tqdm(
            total=config.run.iterations,
            initial=first,
            unit="update",
            disable=not world.main,
            mininterval=1.0,
            smoothing=0.05,
        )

    def advance(self, role: str) -> None:
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        self._seconds[role].append(seconds)
        self._latest = {"seconds": seconds, "samples_per_second": self._samples / seconds}
        self._bar.update()

    def show(self, role: str, numbers: dict[str, float]) -> None:
        self._losses[f"{role} loss"] = f"{numbers['loss']:.4f}"
        self._bar.set_postfix(self._losses, refresh=False)

    def rates(self) -> dict[str, float]:
        return self._latest

    def summary(self, predicted_peak: float) -> dict[str, float]:
        """Median seconds an update of each role, and the peak of device memory, as planned (in bytes) and as it was."""
        summary = {
            f"{role}_seconds": sorted(seconds)[len(seconds) // 2] for role, seconds in self._seconds.items() if seconds
        }
        if self._world.device.type == "cuda":
            summary["predicted_peak_memory_gib"] = predicted_peak / 2**30
            summary["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        return summary

    def close(self) -> None:
        self._bar.close()
