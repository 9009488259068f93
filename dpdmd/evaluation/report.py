"""Measures a run in a world: teacher and student from the same noise, as a table and a grid of pictures.

Rows: the teacher with all its steps and guidance; the teacher in the student's steps with guidance, and without (the
student's number of network evaluations); the student.

All processes call all functions. trainer: trainer.py's, whose networks make the pictures.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpdmd.config import Config
from dpdmd.distill import first_noises, rollout, sampling_noise
from dpdmd.evaluation.pictures import decode, save_grid
from dpdmd.files import write_json
from dpdmd.run.journal import without_infinities

_BATCH = {"cpu": 128, "cuda": 1024}  # pictures a forward pass, enough to keep the device busy
_SHOWN = 6  # samples of a prompt in the grid
_EVALUATIONS = "network_evaluations"


def _images(trainer, network: str, times: Tensor, guidance_scale: float) -> Tensor:
    """Pictures (prompts * samples, 3, H, W) float32 on the CPU of every process, prompt-major.

    Each process makes its share. Noise depends only on the prompt's and the sample's number, so all rows of the table
    use the same noise.
    """
    config, world = trainer.config, trainer.world
    texts = trainer.evaluation.texts(config.evaluation)
    samples = config.evaluation.num_samples
    jobs = [(text, number * samples + index) for number, text in enumerate(texts) for index in range(samples)]
    # Every process runs the same number of batches, as each forward pass gathers weights from all processes.
    share = -(-len(jobs) // world.size)
    mine = [jobs[min(world.rank * share + place, len(jobs) - 1)] for place in range(share)]
    decoder = trainer.backbone.load_decoder(world.device)
    made = []
    with torch.no_grad():
        for start in range(0, share, _BATCH[world.device.type]):
            batch = mine[start : start + _BATCH[world.device.type]]
            noises = [sampling_noise(config.run.seed + 1, index, trainer.backbone.latent_shape) for _, index in batch]
            noise = torch.cat(noises).to(world.device)
            cond = trainer.conditioner.cond([text for text, _ in batch])
            uncond = trainer.conditioner.uncond(len(batch)) if guidance_scale != 1.0 else None
            diffusion, model = trainer.backbone.diffusion, trainer.networks[network]
            latents = rollout(diffusion, model, noise, times, cond, uncond, guidance_scale)
            made.append((decoder.decode(latents) * 255).round().byte().cpu())
    shares = world.gather(torch.cat(made))
    return torch.cat(shares)[: len(jobs)].float() / 255


def _measure(trainer, images: Tensor) -> dict[str, float]:
    evaluation = trainer.evaluation
    return evaluation.measure(images.to(trainer.world.device), evaluation.texts(trainer.config.evaluation))


def measure_student(trainer) -> dict[str, float] | None:
    """The student's measurements on the main process, None on the others."""
    with trainer.networks["student"].averaged():
        images = _images(trainer, "student", trainer.distillation.student_times, 1.0)
    return _measure(trainer, images) if trainer.world.main else None


def report(trainer, folder: Path) -> dict[str, Any] | None:
    """Measures all rows, prints the table, writes evaluation/table.json and evaluation/grid.png. Returns the rows on the
    main process, None on the others."""
    distillation, scale = trainer.distillation, trainer.config.distill.guidance_scale
    teacher_times, student_times = distillation.teacher_times, distillation.student_times
    num_teacher, num_student = len(teacher_times) - 1, len(student_times) - 1
    rows = [
        (f"teacher, {num_teacher} steps, guidance {scale:g}", "teacher", teacher_times, scale, 2 * num_teacher),
        (f"teacher, {num_student} steps, guidance {scale:g}", "teacher", student_times, scale, 2 * num_student),
        (f"teacher, {num_student} steps, no guidance", "teacher", student_times, 1.0, num_student),
        (f"student, {num_student} steps", "student", student_times, 1.0, num_student),
    ]
    table, columns = {}, []
    with trainer.networks["student"].averaged():
        for title, network, times, guidance_scale, evaluations in rows:
            images = _images(trainer, network, times, guidance_scale)
            if trainer.world.main:
                table[title] = {_EVALUATIONS: evaluations, **_measure(trainer, images)}
                columns.append((title, images))
    if not trainer.world.main:
        return None
    output, samples = folder / "evaluation", trainer.config.evaluation.num_samples
    texts = trainer.evaluation.texts(trainer.config.evaluation)
    write_json(output / "table.json", without_infinities(table))
    examples = [
        (texts[number], [(title, images[number * samples :][: min(samples, _SHOWN)]) for title, images in columns])
        for number in trainer.evaluation.shown(texts)
    ]
    save_grid(output / "grid.png", examples)
    title = f"{len(texts)} prompts x {samples} samples, the same noise in each row"
    _print_table(title, table, _measured_columns(trainer, next(iter(table.values()))))
    print(f"pictures: {output / 'grid.png'}")
    return table


def _measured_columns(trainer, found: Mapping[str, float]) -> dict[str, str]:
    """The world's columns that its measure returned; a warning names the others."""
    columns = trainer.evaluation.columns
    if absent := [name for name in columns if name not in found]:
        print(
            f"warning: evaluation.world = {trainer.config.world!r}: its columns have {', '.join(absent)}, which its measure "
            f"did not return ({', '.join(found)}); the table leaves them out",
            file=sys.stderr,
        )
    return {name: title for name, title in columns.items() if name in found}


def _print_table(title: str, table: dict[str, dict[str, float]], columns: Mapping[str, str]) -> None:
    from rich.console import Console
    from rich.table import Table

    shown = Table(title=title)
    shown.add_column("")
    for title in (*columns.values(), "network evaluations"):
        shown.add_column(title, justify="right")
    for name, values in table.items():
        shown.add_row(name, *(f"{values[key]:.3f}" for key in columns), f"{values[_EVALUATIONS]:d}")
    Console(width=120).print(shown)


def sample_prompts(config: Config, prompts: list[str]) -> list[str]:
    """The prompts of the sample grids."""
    return config.run.sample_prompts or prompts[:4]


def draw_samples(trainer, path: Path, images_a_prompt: int = 4) -> None:
    """Writes a grid with the teacher's pictures beside the student's from the same noise; it needs no world."""
    prompts = sample_prompts(trainer.config, trainer.prompts)
    shape, distill = trainer.backbone.latent_shape, trainer.config.distill
    noise = first_noises(trainer.config.run.seed, images_a_prompt, shape).to(trainer.world.device)
    distillation, teacher, student = trainer.distillation, trainer.networks["teacher"], trainer.networks["student"]
    made = []
    with torch.no_grad(), student.averaged():
        for prompt in prompts:
            cond, uncond = trainer.conditioner.cond([prompt] * len(noise)), trainer.conditioner.uncond(len(noise))
            times, scale = distillation.teacher_times, distill.guidance_scale
            of_teacher = rollout(distillation.diffusion, teacher, noise, times, cond, uncond, scale)
            made.append((prompt, of_teacher, distillation.sample(student, noise, cond)))
    if trainer.world.main:
        decoder = trainer.backbone.load_decoder(trainer.world.device)
        titles = f"teacher, {distill.teacher_steps} steps", f"student, {distill.student_steps} steps"
        rows = [
            (prompt, [(title, decode(decoder, each)) for title, each in zip(titles, latents, strict=True)])
            for prompt, *latents in made
        ]
        save_grid(path, rows)
