"""The logs of a run: files in its folder, TensorBoard and Weights & Biases.

config.yaml      the resolved configuration          metrics.jsonl   a line for each logged update and measurement
finished.json    exists once the run is complete     tensorboard/    the same numbers, if tensorboard is installed
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
from pathlib import Path
from typing import Any

from dpdmd.config import Config, ConfigError, to_yaml
from dpdmd.files import disk_errors, write_json, write_text


def check_writers(config: Config) -> None:
    """Raises ConfigError if run.wandb is set and wandb is not installed."""
    name = config.run.wandb
    if name and importlib.util.find_spec("wandb") is None:
        raise ConfigError(f"run.wandb = {name!r}: wandb is not installed (pip install wandb, or run.wandb=null)")


class Journal:
    """Writes metrics, on the main process. first: the next iteration.

    Numbers that are not finite become null, as JSON has no others. Raises OSError, naming the file, if the disk is full.
    """

    def __init__(self, folder: Path, config: Config, first: int):
        self._folder = folder
        self._path = folder / "metrics.jsonl"
        write_text(folder / "config.yaml", to_yaml(config))
        (folder / "finished.json").unlink(missing_ok=True)
        self._forget_from(first)
        with contextlib.ExitStack() as opened:
            with disk_errors(self._path):
                self._metrics = opened.enter_context(self._path.open("a", encoding="utf-8"))
            self._writers = []
            if config.run.tensorboard:
                self._writers.append(_tensorboard(folder / "tensorboard", first, opened))
            if config.run.wandb:
                self._writers.append(_wandb(config, folder, opened))
            self._opened = opened.pop_all()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *error: Any) -> None:
        with contextlib.suppress(OSError):  # a full disk, reported before
            self._opened.__exit__(*error)

    def _forget_from(self, first: int) -> None:
        """Drops the lines of updates that a resumed run repeats."""
        if not self._path.exists():
            return
        lines = self._path.read_text(encoding="utf-8", errors="replace").splitlines()
        kept = [line for line in lines if (entry := _parse(line)) is not None and entry["iteration"] < first]
        write_text(self._path, "".join(line + "\n" for line in kept))

    def write(self, iteration: int, kind: str, values: dict[str, Any]) -> None:
        """Writes the numbers of `iteration`; kind: student, critic or evaluation."""
        entry = {"iteration": iteration, "kind": kind, **values}
        with disk_errors(self._path):
            self._metrics.write(json.dumps(without_infinities(entry), allow_nan=False) + "\n")
            self._metrics.flush()
        numbers = {f"{kind}/{key}": value for key, value in values.items() if isinstance(value, (int, float))}
        for writer in self._writers:
            with disk_errors(self._folder):
                writer(iteration, numbers)

    def finish(self, summary: dict[str, Any]) -> None:
        write_json(self._folder / "finished.json", without_infinities(summary))


def without_infinities(value: Any) -> Any:
    """The value with None for every number in it that is not finite."""
    if isinstance(value, dict):
        return {key: without_infinities(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_infinities(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _parse(line: str) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None  # the last line of a killed run
    return entry if isinstance(entry, dict) and isinstance(entry.get("iteration"), int) else None


def _tensorboard(folder: Path, first: int, opened: contextlib.ExitStack):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return lambda iteration, numbers: None
    writer = opened.enter_context(SummaryWriter(str(folder), purge_step=first))

    def write(iteration: int, numbers: dict[str, float]) -> None:
        for key, value in numbers.items():
            writer.add_scalar(key, value, iteration)
        writer.flush()

    return write


def _wandb(config: Config, folder: Path, opened: contextlib.ExitStack):
    import wandb  # pyright: ignore[reportMissingImports] - optional

    settings = config.model_dump(mode="json")
    run = opened.enter_context(wandb.init(project=config.run.wandb, dir=str(folder), config=settings, resume="allow"))
    return lambda iteration, numbers: run.log(numbers, step=iteration)
