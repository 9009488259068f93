"""The student that a run exports, and the checks before.

student/   the distilled transformer as a stock diffusers folder (safetensors), or with LoRA the adapter for a stock
           pipeline's load_lora_weights; also its time grid (dpdmd.json) and the run's configuration (config.yaml)
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import pydantic
import torch

from dpdmd.backbones.family import backbones
from dpdmd.command import RunStopped
from dpdmd.config import SHIPPED_WORLDS, TRAINED, Config, to_yaml
from dpdmd.distill import Distillation, first_noises
from dpdmd.engine.lora import save_adapter
from dpdmd.engine.role import Trained
from dpdmd.engine.world import World
from dpdmd.files import UNFINISHED, digests, disk_errors, publish, read_json, remove, sha256, write_json, write_text
from dpdmd.run.folder import free_name

STUDENT_FILE = "dpdmd.json"
STUDENT_FORMAT = 1


def _known(family: str) -> str:
    if family not in backbones():
        known = ", ".join(sorted(backbones()))
        raise ValueError(f"there is no such family; there are {known} (your own: --family)")
    return family


class Description(pydantic.BaseModel):
    """dpdmd.json. Fields with a default are not needed for sampling."""

    model_config = pydantic.ConfigDict(strict=True, frozen=True)

    format: int = STUDENT_FORMAT
    iterations: pydantic.NonNegativeInt | None = None
    family: Annotated[str, pydantic.AfterValidator(_known)]
    adapter: bool = False
    base: str | None = None  # digest of the weights that an adapter belongs to
    pipeline: str
    revision: str | None
    prediction: str | None = None
    method: str | None = None
    num_steps: pydantic.PositiveInt | None = None
    times: list[float] = pydantic.Field(min_length=2)
    pipeline_sigmas: list[pydantic.FiniteFloat] | None = None
    guidance_scale: float = pydantic.Field(ge=0, allow_inf_nan=False)
    resolution: pydantic.PositiveInt
    max_sequence_length: pydantic.PositiveInt
    pipeline_call: dict[str, Any] | None = None  # arguments of a stock pipeline, beside the prompt


def describe_student(backbone, distillation: Distillation, config: Config) -> Description:
    model, distill, pipeline = config.model, config.distill, config.model.pipeline
    sigmas = backbone.diffusion.pipeline_sigmas(distill.student_steps, distill.student_grid)
    guidance, side, length = backbone.pipeline_guidance_scale, model.resolution, model.max_sequence_length
    if pipeline not in SHIPPED_WORLDS and Path(pipeline).is_dir():
        pipeline = str(Path(pipeline).resolve())
    call = {"sigmas": sigmas, "guidance_scale": guidance, "height": side, "width": side, "max_sequence_length": length}
    return Description(
        iterations=config.run.iterations,
        family=backbone.family.name,
        adapter=config.lora is not None,
        base=backbone.weights_fingerprint("transformer") if config.lora is not None else None,
        pipeline=pipeline,
        revision=model.revision,
        prediction=backbone.diffusion.prediction,
        method=distill.method,
        num_steps=distill.student_steps,
        times=distillation.student_times.tolist(),
        pipeline_sigmas=sigmas,
        guidance_scale=guidance,
        resolution=side,
        max_sequence_length=length,
        pipeline_call=call,
    )


def export_student(
    folder: Path, student: Trained, backbone, distillation: Distillation, config: Config, world: World
) -> None:
    """Writes the student; all processes call. An earlier, different one is renamed to student_step_<its iterations>."""
    with student.averaged():
        state_dict = student.full_state_dict()
    if state_dict is not None:  # on the main process
        unfinished = folder.with_name(UNFINISHED + folder.name)
        remove(unfinished)
        with disk_errors(folder, sum(tensor.nbytes for tensor in state_dict.values())):
            if student.base is None:
                backbone.export(state_dict, unfinished)
            else:
                save_adapter(student.base.transformer, "student", unfinished, state_dict)
        write_json(unfinished / STUDENT_FILE, describe_student(backbone, distillation, config).model_dump())
        write_text(unfinished / "config.yaml", to_yaml(config))
        _set_aside(folder, unfinished)
        publish(unfinished, folder)
    world.barrier()


def _set_aside(folder: Path, new: Path) -> None:
    """Renames an earlier student that differs from the new one or holds more files."""
    if not os.path.lexists(folder):
        return
    if folder.is_dir() and _names(folder) <= _names(new) and digests(folder) == digests(new):
        return
    try:
        earlier = read_json(folder / STUDENT_FILE).get("iterations")
    except (OSError, AttributeError):
        earlier = None
    name = f"{folder.name}_step_{earlier:06d}" if isinstance(earlier, int) else f"{folder.name}_earlier"
    with disk_errors(folder):
        os.rename(folder, free_name(folder.with_name(name)))


def _names(folder: Path) -> set[Path]:
    return {path.relative_to(folder) for path in folder.rglob("*")}


def problem_of_student(path: Path) -> str | None:
    """What has changed in the student of a finished run since its export, or None."""
    try:
        summary = read_json(path / "finished.json")
    except OSError as error:  # including DamagedFile
        return str(error)
    exported = summary.get("student") if isinstance(summary, dict) else None
    if not isinstance(exported, dict) or STUDENT_FILE not in exported:
        return f"{path / 'finished.json'} does not say what was exported"
    for name, digest in exported.items():
        file = path / "student" / name
        if not file.is_file():
            return f"{file} is missing"
        if sha256(file) != digest:
            return f"{file} is damaged or changed: its content is not what was exported (SHA-256)"
    return None


def check_export(trainer) -> None:
    """Raises RunStopped if the student is unchanged or broken after the last update. All processes call."""
    updates = trainer.networks["student"].updates
    if updates == 0:
        skipped = trainer.describe_skipped()
        raise RunStopped(f"the student was never updated, so it is not exported: it is still the teacher. {skipped}")
    if problem := _problem_of_export(trainer):
        config = trainer.config
        optimizer, average = (
            config.student_optimizer,
            "null" if config.ema is None else f"{{decay: {config.ema.decay}}}",
        )
        raise RunStopped(
            f"after {updates} updates {problem}, so it is not exported; student_optimizer.lr = {optimizer.lr:g}, warmup = "
            f"{optimizer.warmup}, eps = {optimizer.eps:g}, engine.clip = {config.engine.clip:g} and ema = {average} decide "
            "how far it moves"
        )


def _problem_of_export(trainer) -> str | None:
    networks, world = trainer.networks, trainer.world
    prompts = trainer.prompts_of_batch(0, world.rank)
    noise = first_noises(0, len(prompts), trainer.backbone.latent_shape).to(world.device)
    cond = trainer.conditioner.cond(prompts)
    with torch.no_grad(), networks["student"].averaged():
        finite = networks["student"].is_finite()
        moved = networks["student"].bits() != trainer.initial_bits
        latents = trainer.distillation.sample(networks["student"], noise, cond)
        if trainer.config.lora is not None:  # an adapter's bits always change, but rounding may hide its effect
            moved = not torch.equal(latents, trainer.distillation.sample(networks["teacher"], noise, cond))
    size = float(latents.double().square().mean().sqrt())
    finite, moved, sizes = zip(*world.gather((finite, moved, size)), strict=True)
    if not all(finite):
        return "the student's weights hold NaN or infinity"
    if exploded := [size for size in sizes if not size < _LARGEST_LATENTS]:  # also NaN
        return f"the student turns noise of size 1 into latents of size {exploded[0]:.3g} (root mean square)"
    if any(moved):
        return None
    if trainer.config.lora is None:
        return "the student's weights have not changed in any bit"
    return "the adapter does not change the teacher's latents in any bit"


_LARGEST_LATENTS = 1000.0  # latents of pictures have a root mean square of about 1


def doubts(config: Config) -> list[str]:
    """Warnings about possible settings that hardly train the student."""
    found = []
    for role in TRAINED:
        optimizer, updates = config.optimizer(role), config.num_updates(role)
        if optimizer.warmup > updates:
            found.append(
                f"{role}_optimizer.warmup = {optimizer.warmup} is longer than the run's {updates} updates of the {role}: the "
                f"rate ends at {optimizer.lr * updates / optimizer.warmup:.2g} and never reaches lr = {optimizer.lr:g}"
            )
    updates = config.num_updates("student")
    if config.ema is not None and (initial := config.ema.decay**updates) > 0.5:
        found.append(
            f"ema.decay = {config.ema.decay}: after the run's {updates} updates {initial:.0%} of the exported average is "
            f"still the initial student; {0.5 ** (4 / updates):.4g} would leave 6 %"
        )
    return found
