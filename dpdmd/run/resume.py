"""Where a run goes on, or begins: whose checkpoint it may take, and what is said of it."""

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
    """What a checkpoint and the run that resumes it must have in common."""
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
    """The run's folder, which the main process holds for all while the block runs. Raises ConfigError on all where it cannot
    be had."""
    with contextlib.ExitStack() as opened:
        taken = [RunFolder.held_elsewhere(path)]

        def take() -> None:
            taken[0] = opened.enter_context(contextlib.closing(RunFolder(path, resume=resume, overwrite=overwrite)))

        world.on_main(take)
        yield taken[0]


def starts(
    folder: RunFolder, config: Config, resumed: Checkpoint | None, *, resume: bool, overwrite: bool = False
) -> bool:
    """Says from where the run goes on, or that it begins. False: it is finished already, and there is nothing to do.

    Raises ConfigError where a finished student would have to be trained anew, and where the run is to end before the
    checkpoint that it would go on from.
    """
    path, iterations = folder.path, config.run.iterations
    finished = (path / "finished.json").exists()
    if resumed is None:
        left = [name for name in ("finished.json", f"student/{STUDENT_FILE}") if (path / name).exists()]
        if left and not overwrite:
            raise ConfigError(
                f"--resume: {path} holds {' and '.join(left)} of a run and no checkpoint to go on from. To train anew is to "
                "replace that student: give --overwrite for it, or take another run.output_dir"
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
            print(
                f"finished: {path} has all its {iterations} iterations, and its student; a larger run.iterations trains on"
            )
            if changed := changed_settings(resumed.index["config"], config):
                print(f"other settings than the run's, which nothing is trained with: {', '.join(changed)}")
            return False
        print(f"--resume: {problem}; the student is exported anew", file=sys.stderr, flush=True)
    print(f"going on from iteration {resumed.iteration} ({resumed.path})", flush=True)
    return True


def similar(path: Path) -> str:
    """Runs beside the folder that may have been meant."""
    runs = [mark.parent.name for mark in path.resolve().parent.glob(f"*/{MARK}") if mark.parent != path.resolve()]
    near = difflib.get_close_matches(path.name, runs, n=3, cutoff=0.5)
    return f" (there is {', '.join(near)} beside it)" if near else ""


def continued(
    config: Config, resumed: Checkpoint, checkpoints: Checkpoints, prompts: list[str], text_key: str, world: World
) -> Config:
    """`config` for updates of as many samples as the checkpoint's. What else is other than there is said, and the run goes
    on with what is given. Raises ConfigError where the number of samples cannot be had."""
    given = config.engine.accumulation
    config = with_global_batch(config, resumed.index["global_batch"], world.size)
    if world.main and (given != config.engine.accumulation or resumed.index["processes"] != world.size):
        print(
            f"{world.size} processes for {resumed.index['processes']}, engine.accumulation = {given} given: "
            f"engine.accumulation = {config.engine.accumulation}, so that an update stays one of "
            f"{resumed.index['global_batch']} samples",
            flush=True,
        )
    changed = changed_settings(resumed.index["config"], config)
    if resumed.state.get("prompts") not in (None, digest_of(prompts)):
        changed.append("the content of prompts.file")
    if resumed.state.get("text") not in (None, text_key):
        changed.append("the text encoders' settings, tokenizers or length: prompts are encoded anew")
    if changed and world.main:
        print(f"other settings than the checkpoint's: {', '.join(changed)}", flush=True)
    if not all(each.startswith("run.") for each in changed):
        checkpoints.spare(resumed.path)
    return config


def changed_settings(saved: dict[str, Any], config: Config) -> list[str]:
    """A text for each setting that differs from `saved`, an index's config. Not for where the run lies, for what was chosen
    for the machine then and now, and for settings that the program had not then."""
    before = dict(flattened(saved))
    return [
        f"{name} = {value} (was {before[name]})"
        for name, value in flattened(config.model_dump(mode="json"))
        if name in before and value != before[name] and not name.startswith(_FREE) and value != "auto"
    ]


# The planner chooses kept_passes; the accumulation follows the number of processes, which is said.
_FREE = ("run.output_dir", "engine.accumulation", "engine.kept_passes")


def with_global_batch(config: Config, wanted: int, num_processes: int) -> Config:
    """`config` with the accumulation that makes an update of `wanted` samples. Raises ConfigError where none does."""
    batch = config.engine.batch_size * num_processes
    if wanted % batch:
        fitting = [size for size in range(1, wanted + 1) if wanted % (size * num_processes) == 0]
        advice = f"engine.batch_size={fitting[-1]} would do" if fitting else f"{wanted} or fewer processes would do"
        raise ConfigError(
            f"--resume: the run's updates are of {wanted} samples, and {num_processes} process{'es' * (num_processes > 1)} with "
            f"engine.batch_size = {config.engine.batch_size} take {batch} at a time, which do not add up to that: {advice}"
        )
    return config.model_copy(update={"engine": config.engine.model_copy(update={"accumulation": wanted // batch})})
