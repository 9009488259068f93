"""What a run leaves on disk so that it can go on, and what others can use.

checkpoints/step_000600/   student/ and critic/, each DeepSpeed's sharded weights and optimizer state, and state.json.
                           Written under a temporary name and renamed when complete: a folder of that name is whole.
student/                   the distilled transformer as a stock diffusers folder (safetensors), or under LoRA the adapter
                           that a stock pipeline's load_lora_weights takes, with its time grid
                           (dpdmd.json) and the run's configuration (config.yaml) beside it.

No generator state is kept: every draw is a function of (seed, iteration, role, shard).
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from pathlib import Path
from typing import Any

from dpdmd.config import Config, ConfigError, to_yaml
from dpdmd.distill import Distillation
from dpdmd.engine import Network, World
from dpdmd.lora import save_adapter
from dpdmd.optimizer import STATE_BYTES

_NAME = re.compile(r"step_(\d+)")
_UNFINISHED = ".unfinished-"
STUDENT_FILE = "dpdmd.json"


class Checkpoints:
    """The checkpoints of one run, in `folder`; the newest `keep` stay.

    identity: what must not change between saving and resuming (architectures, processes, stages, precision).
    """

    def __init__(self, folder: Path, keep: int, world: World, identity: dict[str, Any]):
        self._folder = folder
        self._keep = keep
        self._world = world
        self._identity = json.loads(json.dumps(identity))

    def complete(self) -> list[Path]:
        """The whole ones, oldest first."""
        if not self._folder.is_dir():
            return []
        found = [(int(match[1]), path) for path in self._folder.iterdir() if (match := _NAME.fullmatch(path.name))]
        return [path for _, path in sorted(found)]

    def newest(self) -> Path | None:
        return next(reversed(self.complete()), None)

    def save(self, iteration: int, networks: dict[str, Network], state: dict[str, Any]) -> Path:
        """Saves the state after `iteration` updates; all processes call. Raises OSError, leaving older ones whole."""
        name = f"step_{iteration:06d}"
        final, unfinished = self._folder / name, self._folder / (_UNFINISHED + name)
        if self._world.main:
            self.remove_unfinished()
            unfinished.mkdir(parents=True)
        self._world.barrier()
        try:
            for role in ("student", "critic"):
                networks[role].save(unfinished)
            self._world.barrier()
            if self._world.main:
                contents = {"iteration": iteration, "identity": self._identity, **state}
                (unfinished / "state.json").write_text(json.dumps(contents, indent=2), encoding="utf-8")
                _flush(unfinished)
                if final.exists():
                    shutil.rmtree(final)
                publish(unfinished, final)
                for old in self.complete()[: -self._keep]:
                    shutil.rmtree(old)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            shutil.rmtree(unfinished, ignore_errors=True)
            raise OSError(
                f"checkpoint {final} could not be written ({error}); the last complete one is {self.newest()}"
            ) from error
        self._world.barrier()
        return final

    def read_state(self, path: Path) -> dict[str, Any]:
        """state.json of a checkpoint. Raises ConfigError where it belongs to another architecture or process count."""
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        for key, saved in state["identity"].items():
            now = self._identity.get(key)
            if saved != now:
                raise ConfigError(
                    f"--resume: {path} was saved with {_difference(key, saved, now)}. "
                    "Resume with what it was saved with, or start a new run (another run.output_dir)"
                )
        return state

    def load(self, path: Path, networks: dict[str, Network], state: dict[str, Any]) -> None:
        """Restores weights and optimizer state bit for bit; all processes call."""
        for role in ("student", "critic"):
            networks[role].load(path, state["updates"][role])

    def remove_unfinished(self) -> None:
        """Deletes what a killed run left half-written."""
        for leftover in self._folder.glob(_UNFINISHED + "*"):
            shutil.rmtree(leftover, ignore_errors=True)


def publish(unfinished: Path, final: Path) -> None:
    """The moment at which a folder becomes the real one."""
    os.rename(unfinished, final)


def _flush(folder: Path) -> None:
    """To the disk itself, so that a rename never outlives what it names."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _difference(key: str, saved: Any, now: Any) -> str:
    if isinstance(saved, dict) and isinstance(now, dict):
        for inner in sorted({*saved, *now}):
            if saved.get(inner) != now.get(inner):
                return _difference(f"{key}.{inner}", saved.get(inner), now.get(inner))
    return f"{key} = {saved!r}, and this run has {now!r}"


def checkpoint_bytes(config: Config, num_parameters: int, weight_bytes: int) -> int:
    """Size of one checkpoint: two networks' weights, float32 masters and two moments; the student's average."""
    states = [config.student_optimizer.state, config.critic_optimizer.state]
    each = sum(weight_bytes + 4 + STATE_BYTES[state] for state in states) + 4 * (config.ema is not None)
    return math.ceil(num_parameters * each)


def export_student(
    folder: Path, networks: dict[str, Network], backbone, distillation: Distillation, config: Config, world: World
) -> None:
    """Writes the student for others to use; all processes call. An older export is replaced only when this one is whole."""
    with networks["student"].averaged():
        state_dict = networks["student"].full_state_dict()
    if world.main:
        unfinished = folder.with_name(_UNFINISHED + folder.name)
        shutil.rmtree(unfinished, ignore_errors=True)
        if config.lora is None:
            backbone.export(state_dict, unfinished)
        else:
            save_adapter(networks["student"].base.transformer, "student", unfinished, state_dict)
        diffusion, distill, pipeline = backbone.diffusion, config.distill, config.model.pipeline
        if pipeline != "demo" and Path(pipeline).is_dir():
            pipeline = str(Path(pipeline).resolve())
        description = {
            "format": 1,
            "family": config.model.family,
            "adapter": config.lora is not None,
            "pipeline": pipeline,
            "revision": config.model.revision,
            "prediction": diffusion.prediction,
            "method": distill.method,
            "num_steps": distill.student_steps,
            "times": distillation.student_times.tolist(),
            "pipeline_sigmas": diffusion.pipeline_sigmas(distill.student_steps, distill.student_grid),
            "guidance_scale": backbone.pipeline_guidance_scale,
            "resolution": config.model.resolution,
            "max_sequence_length": config.model.max_sequence_length,
        }
        (unfinished / STUDENT_FILE).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
        (unfinished / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
        _flush(unfinished)
        shutil.rmtree(folder, ignore_errors=True)
        publish(unfinished, folder)
    world.barrier()
