"""The output folder of a run: who may write there, and what is written while it runs.

config.yaml      the resolved configuration          metrics.jsonl   a line for each logged update and measurement
samples/         grids of pictures                   tensorboard/    the same numbers, where tensorboard is installed
finished.json    exists once the run is complete     checkpoints/, student/, embeddings/   see checkpoint.py, prompts.py
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from dpdmd.config import Config, ConfigError, to_yaml

_OWN = (
    "config.yaml",
    "metrics.jsonl",
    "finished.json",
    "samples",
    "tensorboard",
    "checkpoints",
    "student",
    "evaluation",
)


def prepare_folder(folder: Path, *, resume: bool, overwrite: bool) -> None:
    """Makes the folder of a run, or raises ConfigError where that would lose something or cannot be done.

    A folder that holds a run is taken only to resume or, told so, to overwrite; of the latter only the run's own files
    go (embeddings stay, being keyed by content).
    """
    if not resume:
        holds = [name for name in _OWN if (folder / name).exists()]
        if holds and not overwrite:
            kind = "a finished run" if (folder / "finished.json").exists() else "an unfinished run"
            raise ConfigError(
                f"run.output_dir = {str(folder)!r} holds {kind} ({', '.join(holds)}): give --resume to go on with it, "
                "--overwrite to delete it, or another run.output_dir"
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(f"run.output_dir = {str(folder)!r}: cannot be written to ({error.strerror})") from error
    if overwrite and not resume:
        for name in _OWN:
            path = folder / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def check_space(folder: Path, needed: int) -> None:
    """Raises ConfigError where fewer than `needed` bytes are free under an existing folder."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ConfigError(
            f"run.output_dir = {str(folder)!r}: {free / 1e9:.2f} GB are free, and a checkpoint and the exported student "
            f"need {needed / 1e9:.2f} GB"
        )


def check_writers(config: Config) -> None:
    """Raises ConfigError where a log is asked for whose package is not installed."""
    if config.run.wandb and importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            f"run.wandb = {config.run.wandb!r}: wandb is not installed (pip install wandb, or run.wandb=null)"
        )


class Journal:
    """Writes metrics of the main process; the other processes have none. first: the iteration that comes next."""

    def __init__(self, folder: Path, config: Config, first: int):
        self._folder = folder
        (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
        (folder / "finished.json").unlink(missing_ok=True)
        self._forget_from(first)
        self._metrics = (folder / "metrics.jsonl").open("a", encoding="utf-8")
        self._writers = []
        if config.run.tensorboard:
            self._writers.append(_tensorboard(folder / "tensorboard", first))
        if config.run.wandb:
            self._writers.append(_wandb(config, folder))

    def _forget_from(self, first: int) -> None:
        """Drops lines of updates that a resumed run makes anew."""
        path = self._folder / "metrics.jsonl"
        if not path.exists():
            return
        lines = path.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if (entry := _parse(line)) is not None and entry["iteration"] < first]
        path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")

    def write(self, iteration: int, kind: str, values: dict[str, Any]) -> None:
        """One line of numbers about `iteration`; kind: student, critic or evaluation."""
        entry = {"iteration": iteration, "kind": kind, **values}
        self._metrics.write(json.dumps(entry) + "\n")
        self._metrics.flush()
        numbers = {f"{kind}/{key}": value for key, value in values.items() if isinstance(value, (int, float))}
        for writer in self._writers:
            writer(iteration, numbers)

    def finish(self, summary: dict[str, Any]) -> None:
        (self._folder / "finished.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")

    def close(self) -> None:
        self._metrics.close()


def _parse(line: str) -> dict[str, Any] | None:
    try:
        return json.loads(line)
    except ValueError:
        return None  # the last line of a killed run


def _tensorboard(folder: Path, first: int):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return lambda iteration, numbers: None
    writer = SummaryWriter(str(folder), purge_step=first)

    def write(iteration: int, numbers: dict[str, float]) -> None:
        for key, value in numbers.items():
            writer.add_scalar(key, value, iteration)
        writer.flush()

    return write


def _wandb(config: Config, folder: Path):
    import wandb

    run = wandb.init(project=config.run.wandb, dir=str(folder), config=config.model_dump(mode="json"), resume="allow")
    return lambda iteration, numbers: run.log(numbers, step=iteration)
