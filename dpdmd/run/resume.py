"""Where a run begins or resumes: which checkpoint it takes, and what it prints about that."""

from __future__ import annotations

import contextlib
import difflib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dpdmd.config import ROLES, Config, ConfigError, flattened
from dpdmd.engine.start import resolve_dtype
from dpdmd.engine.world import World
from dpdmd.run.checkpoint import Checkpoint, Checkpoints
from dpdmd.run.export import STUDENT_FILE, problem_of_student
from dpdmd.run.folder import MARK, RunFolder
from dpdmd.run.prompts import digest_of


def identity(config: Config, backbone, world: World) -> dict:
    """What must be the same in a checkpoint and the run that resumes it."""
    return {
        "architecture": {role: backbone.transformer_config(role) for role in ROLES},
        "teacher": world.on_main(backbone.teacher_fingerprint),
        "dtype": str(resolve_dtype(config.model.dtype, world.device.type)),
        "state": {"student": config.student_optimizer.state, "critic": config.critic_optimizer.state},
        "offload": config.engine.offload,
        "ema": config.ema is not None,
        "lora": None if config.lora is None else config.lora.model_dump(),
    }


@contextlib.contextmanager
def run_folder(path: Path, world: World, *, resume: bool, overwrite: bool) -> Iterator[RunFolder]:
    """The run's folder, locked by the main process during the block. Raises ConfigError on all processes."""
    with contextlib.ExitStack() as opened:
        taken = [RunFolder.held_elsewhere(path)]

        def take() -> None:
            taken[0] = opened.enter_context(contextlib.closing(RunFolder(path, resume=resume, overwrite=overwrite)))

        world.on_main(take)
        yield taken[0]


def starts(
    folder: RunFolder, config: Config, resumed: Checkpoint | None, *, resume: bool, overwrite: bool = False
) -> bool:
    """Prints where the run resumes or begins. Returns False if it is finished already.

    Raises ConfigError if a finished student would be replaced without `overwrite`, or if the checkpoint has more
    iterations than run.iterations.
    """
    path, iterations = folder.path, config.run.iterations
    finished = (path / "finished.json").exists()
    if resumed is None:
        left = [name for name in ("finished.json", f"student/{STUDENT_FILE}") if (path / name).exists()]
        if left and not overwrite:
            raise ConfigError(
                f"--resume: {path} holds {' and '.join(left)} of a run and no checkpoint to go on from: give --overwrite to "
                "train again and replace that student, or take another run.output_dir"
            )
        why = f": --resume found no checkpoint in {path / 'checkpoints'}" if resume else ""
        if resume and folder.fresh:
            why += f", and no run in {path}{similar(path)}"
        print(f"starting at iteration 0{why}", flush=True)
        return True
    if resumed.iteration > iterations:
        raise ConfigError(
            f"run.iterations = {iterations}, but --resume goes on from iteration {resumed.iteration} ({resumed.path}): give "
            f"{resumed.iteration} or more"
        )
    if resumed.iteration == iterations and finished:
        problem = problem_of_student(path)
        if problem is None:
            print(f"finished: {path} has all its {iterations} iterations, and its student; more iterations train on")
            if changed := changed_settings(resumed.index["config"], config):
                print(f"other settings than the run's, which have no effect: {', '.join(changed)}")
            return False
        print(f"--resume: {problem}; the student is exported again", file=sys.stderr, flush=True)
    print(f"going on from iteration {resumed.iteration} ({resumed.path})", flush=True)
    return True


def similar(path: Path) -> str:
    """Runs with similar names beside the folder, as text."""
    runs = [mark.parent.name for mark in path.resolve().parent.glob(f"*/{MARK}") if mark.parent != path.resolve()]
    near = difflib.get_close_matches(path.name, runs, n=3, cutoff=0.5)
    return f" (there is {', '.join(near)} beside it)" if near else ""


def continued(
    config: Config, resumed: Checkpoint, checkpoints: Checkpoints, prompts: list[str], text_key: str, world: World
) -> Config:
    """`config` with the accumulation that keeps the checkpoint's number of samples an update. Prints other settings that
    differ, which take effect. Raises ConfigError if that number of samples is impossible."""
    given = config.engine.accumulation
    config = with_global_batch(config, resumed.index["global_batch"], world.size)
    if world.main and (given != config.engine.accumulation or resumed.index["processes"] != world.size):
        print(
            f"processes: {world.size} (was {resumed.index['processes']}), engine.accumulation = {given} given: "
            f"engine.accumulation = {config.engine.accumulation}, so that an update stays one of "
            f"{resumed.index['global_batch']} samples",
            flush=True,
        )
    changed = changed_settings(resumed.index["config"], config)
    if resumed.state.get("prompts") not in (None, digest_of(prompts)):
        changed.append("the content of prompts.file")
    if resumed.state.get("text") not in (None, text_key):
        changed.append("the text encoders' settings, tokenizers or length: prompts are encoded again")
    if changed and world.main:
        print(f"other settings than the checkpoint's: {', '.join(changed)}", flush=True)
    if not all(each.startswith("run.") for each in changed):
        checkpoints.spare(resumed.path)
    return config


def changed_settings(saved: dict[str, Any], config: Config) -> list[str]:
    """A text for each setting that differs from `saved`, an index's config. Left out are the output folder, settings that
    are chosen by the machine, and settings that did not exist then."""
    before = dict(flattened(saved))
    return [
        f"{name} = {value} (was {before[name]})"
        for name, value in flattened(config.model_dump(mode="json"))
        if name in before and value != before[name] and not name.startswith(_FREE) and value != "auto"
    ]


# The planner chooses kept_passes; accumulation follows the number of processes, which `continued` prints.
_FREE = ("run.output_dir", "engine.accumulation", "engine.kept_passes")


def with_global_batch(config: Config, wanted: int, num_processes: int) -> Config:
    """`config` with the accumulation that gives updates of `wanted` samples. Raises ConfigError if none does."""
    batch = config.engine.batch_size * num_processes
    if wanted % batch:
        fitting = [size for size in range(1, wanted + 1) if wanted % (size * num_processes) == 0]
        advice = f"engine.batch_size={fitting[-1]} would do" if fitting else f"{wanted} or fewer processes would do"
        raise ConfigError(
            f"--resume: the run's updates are of {wanted} samples, and {num_processes} process{'es' * (num_processes > 1)} with "
            f"engine.batch_size = {config.engine.batch_size} take {batch} at a time, which does not divide {wanted}: {advice}"
        )
    return config.model_copy(update={"engine": config.engine.model_copy(update={"accumulation": wanted // batch})})
