"""The demo's verdict: the picture world's measurements of teacher and student from the same noise, a table and a grid.

Rows: the teacher with all its steps and guidance; the teacher in the student's steps with guidance, and without (the
student's own number of network evaluations); the student.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpdmd.distill import rollout
from dpdmd.files import write_json
from dpdmd.run.journal import without_infinities
from dpdmd.sample import sampling_noise, save_grid
from dpdmd.worlds.demo import world as pictures
from dpdmd.worlds.demo.measure import measure

_BATCH = {"cpu": 128, "cuda": 1024}  # pictures a forward pass: what keeps the device busy


def evaluation_texts(config) -> list[str]:
    return [prompt.text for prompt in pictures.evaluation_prompts(config.evaluation.num_prompts)]


def _images(trainer, network: str, times: Tensor, guidance_scale: float) -> Tensor:
    """Pictures (prompts * samples, 3, H, W) float32 on the CPU of every process, prompt-major; all processes call.

    Each process makes its share. Noise depends on the prompt's and the sample's number alone, so rows of the table
    differ by the network and its steps, not by luck.
    """
    config, world = trainer.config, trainer.world
    texts = evaluation_texts(config)
    samples = config.evaluation.num_samples
    jobs = [(text, number * samples + index) for number, text in enumerate(texts) for index in range(samples)]
    # The same number of batches on every process: each forward pass gathers weights from all.
    share = -(-len(jobs) // world.size)
    mine = [jobs[min(world.rank * share + place, len(jobs) - 1)] for place in range(share)]
    decode = trainer.backbone.load_decoder(world.device).decode
    made = []
    with torch.no_grad():
        for start in range(0, share, _BATCH[world.device.type]):
            batch = mine[start : start + _BATCH[world.device.type]]
            noise = [sampling_noise(config.run.seed + 1, index, trainer.backbone.latent_shape) for _, index in batch]
            cond = trainer.conditioner.cond([text for text, _ in batch])
            uncond = trainer.conditioner.uncond(len(batch)) if guidance_scale != 1.0 else None
            latents = rollout(
                trainer.backbone.diffusion,
                trainer.networks[network],
                torch.cat(noise).to(world.device),
                times,
                cond,
                uncond,
                guidance_scale,
            )
            made.append((decode(latents) * 255).round().byte().cpu())
    shares = world.gather(torch.cat(made))
    return torch.cat(shares)[: len(jobs)].float() / 255


def _measure(trainer, images: Tensor) -> dict[str, float]:
    prompts = pictures.evaluation_prompts(trainer.config.evaluation.num_prompts)
    return measure(images.to(trainer.world.device), prompts)


def measure_student(trainer) -> dict[str, float] | None:
    """The student's measurements; all processes call, the main one gets them, the others None."""
    images = _images(trainer, "student", trainer.distillation.student_times, 1.0)
    return _measure(trainer, images) if trainer.world.main else None


def report(trainer, folder: Path) -> dict[str, Any] | None:
    """Measures all rows, prints the table, writes evaluation/table.json and evaluation/grid.png.

    All processes call; the main one gets the rows, the others None.
    """
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
    for title, network, times, guidance_scale, evaluations in rows:
        images = _images(trainer, network, times, guidance_scale)
        if trainer.world.main:
            table[title] = {"network_evaluations": evaluations, **_measure(trainer, images)}
            columns.append((title, images))
    if not trainer.world.main:
        return None
    output = folder / "evaluation"
    write_json(output / "table.json", without_infinities(table))
    _save_examples(output / "grid.png", trainer, columns)
    print_table(table, trainer.config.evaluation)
    print(f"pictures: {output / 'grid.png'}")
    return table


def _save_examples(
    path: Path, trainer, columns: list[tuple[str, Tensor]], num_prompts: int = 8, num_images: int = 6
) -> None:
    samples = trainer.config.evaluation.num_samples
    prompts = pictures.evaluation_prompts(trainer.config.evaluation.num_prompts)
    # Those that leave most free come first: variety is what there is to see.
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number].text))[:num_prompts]
    count = min(num_images, samples)
    rows = [
        (prompts[number].text, [(title, images[number * samples :][:count]) for title, images in columns])
        for number in order
    ]
    save_grid(path, rows)


def print_table(table: dict[str, dict[str, float]], evaluation) -> None:
    from rich.console import Console
    from rich.table import Table

    columns = {
        "accuracy": "accuracy",
        "validity": "valid",
        "background_entropy": "background entropy",
        "position_spread": "position spread",
        "network_evaluations": "network evaluations",
    }
    shown = Table(
        title=f"{evaluation.num_prompts} prompts x {evaluation.num_samples} samples, the same noise in each row"
    )
    shown.add_column("")
    for title in columns.values():
        shown.add_column(title, justify="right")
    for name, values in table.items():
        cells = [f"{values[key]:d}" if key == "network_evaluations" else f"{values[key]:.3f}" for key in columns]
        shown.add_row(name, *cells)
    Console(width=120).print(shown)
