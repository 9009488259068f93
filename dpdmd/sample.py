"""Pictures from a distilled student:  dpdmd sample --student runs/demo/student --prompt "a red ring"

The student takes the steps it was trained with (dpdmd.json beside its weights) without classifier-free guidance; a network
that takes a guidance value gets the run's. Text encoders and VAE come from the run's base pipeline unless --pipeline names
another.
"""

from __future__ import annotations

from dpdmd import command  # isort: skip  first: the others take seconds, in which a user may interrupt

import argparse
import itertools
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic
import torch
from torch import Tensor, nn

from dpdmd.backbones import load_backbone
from dpdmd.backbones.base import Backbone
from dpdmd.backbones.family import find
from dpdmd.backbones.files import read_json, reading
from dpdmd.config import ConfigError, ModelConfig
from dpdmd.diffusion import EARLIEST_START, LATEST
from dpdmd.distill import first_noises, rollout
from dpdmd.engine.lora import WEIGHTS_FILE, check_adapter
from dpdmd.engine.start import resolve_dtype
from dpdmd.engine.world import resolve_device
from dpdmd.evaluation.pictures import decode, save_png
from dpdmd.run.agreement import check_kernels
from dpdmd.run.export import STUDENT_FILE, STUDENT_FORMAT, Description


@dataclass(frozen=True)
class Student:
    """An exported student with what is needed to sample from it."""

    backbone: Backbone
    transformer: nn.Module
    times: Tensor  # (N + 1,) float32
    dtype: torch.dtype
    device: torch.device

    def encode(self, prompts: list[str]) -> dict[str, Tensor]:
        """Embeddings {name: (B, ...)} of B prompts; loads the text encoders and frees them."""
        return self.backbone.load_text(self.device, self.dtype).encode(prompts)

    @torch.no_grad()
    def latents(self, cond: dict[str, Tensor], noise: Tensor) -> Tensor:
        """Final latents (B, *latent_shape) float32 from noise of that shape and one embedding a row."""

        def network(x, t, cond):
            return self.backbone.predict(self.transformer, x, t, cond, self.dtype)

        cond = {name: value.to(self.device) for name, value in cond.items()}
        return rollout(self.backbone.diffusion, network, noise.to(self.device), self.times.to(self.device), cond)


def _read_description(folder: Path) -> Description:
    path, what = folder / STUDENT_FILE, f"--student {folder}: {STUDENT_FILE}"
    if not path.exists():
        raise ConfigError(
            f"--student {folder}: has no {STUDENT_FILE}; the folder `student` of a finished run is needed"
        )
    values = read_json(path, f"--student {folder}")
    version = values.get("format")
    if version != STUDENT_FORMAT or isinstance(version, bool):
        newer = isinstance(version, int) and version > STUDENT_FORMAT
        by = "was written by a newer dpdmd" if newer else "has an unknown format"
        raise ConfigError(f"{what} {by} (format = {version!r}; {STUDENT_FORMAT} is needed)")
    try:
        description = Description.model_validate(values)
    except pydantic.ValidationError as error:
        raise _refusal(folder, error) from error
    times = description.times
    if not all(map(math.isfinite, times)) or any(a <= b for a, b in itertools.pairwise(times)):
        raise ConfigError(f"{what} has times = {times}; falling numbers are needed")
    if not (EARLIEST_START <= times[0] <= LATEST and times[-1] == 0):
        raise ConfigError(f"{what} has times = {times}; they must fall from 1 (noise) to 0")
    if description.num_steps not in (None, len(times) - 1):
        raise ConfigError(f"{what} has num_steps = {description.num_steps} and times for {len(times) - 1}")
    return description


def _refusal(folder: Path, error: pydantic.ValidationError) -> ConfigError:
    problem = error.errors()[0]
    key = ".".join(map(str, problem["loc"])).replace("embedded_guidance", "guidance_scale")  # its name in dpdmd.json
    given = f"no {key}" if problem["type"] == "missing" else f"{key} = {problem['input']!r}"
    return ConfigError(
        f"--student {folder}: {STUDENT_FILE} has {given}; {problem['msg'][:1].lower()}{problem['msg'][1:]}"
    )


def load_student(
    folder: str | Path,
    *,
    pipeline: str | None = None,
    family: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
) -> Student:
    """Reads an exported student. family: the Python file of its model family, if that does not ship: a file that the
    student's folder names is not run. Raises ConfigError for a folder that is missing, damaged or no student, and for a
    pipeline that does not fit it."""
    if family is not None:
        find(family)
    folder = Path(folder)
    description = _read_description(folder)
    own = pipeline in (None, description.pipeline)
    try:
        model = ModelConfig(
            pipeline=pipeline or description.pipeline,
            family=description.family,
            revision=description.revision if own else None,
            resolution=description.resolution,
            max_sequence_length=description.max_sequence_length,
            embedded_guidance=description.guidance_scale,
        )
    except pydantic.ValidationError as error:
        raise _refusal(folder, error) from error
    backbone = load_backbone(model)
    if description.prediction not in (None, backbone.diffusion.prediction):
        raise ConfigError(
            f"--student {folder}: {STUDENT_FILE} has prediction = {description.prediction!r}, and the pipeline's is "
            f"{backbone.diffusion.prediction!r}"
        )
    backbone.check_weights()
    resolved = torch.device(resolve_device(device))
    precision = resolve_dtype(dtype, resolved.type)
    check_kernels(resolved, precision, backbone)
    if description.adapter:
        transformer: Any = backbone.load_transformer("teacher", precision, resolved)
        check_adapter(transformer, folder)
        if description.base not in (None, backbone.weights_fingerprint("transformer")):
            print(
                f"warning: --student {folder} is an adapter that was trained for other weights than those of {model.pipeline}",
                file=sys.stderr,
                flush=True,
            )
        with reading(str(folder / WEIGHTS_FILE), " as an adapter"):
            transformer.load_lora_adapter(folder, weight_name=WEIGHTS_FILE, local_files_only=True)
    else:
        transformer = backbone.load_exported(folder, precision, resolved)
    return Student(backbone, transformer, torch.tensor(description.times), precision, resolved)


def next_number(folder: Path) -> int:
    """Number of the next prompt's pictures, after all present ones, so that none is overwritten."""
    numbers = [int(match[1]) for path in folder.iterdir() if (match := re.fullmatch(r"(\d+)-\d+-\d+\.png", path.name))]
    return max(numbers, default=-1) + 1


def main(argv: list[str] | None = None) -> int:
    return command.run(_main, argv)


def _main(argv: list[str] | None) -> None:
    parser = argparse.ArgumentParser(prog="dpdmd sample", description=str(__doc__).split("\n")[0])
    parser.add_argument("--student", type=command.path, required=True, help="folder `student` of a finished run")
    parser.add_argument("--prompt", required=True, action="append", help="may be given more than once")
    parser.add_argument("--pipeline", type=command.location, help="base pipeline folder or hub id (default: the run's)")
    parser.add_argument(
        "--family", type=command.location, help="Python file of the student's model family, if it does not ship"
    )
    parser.add_argument("--num-images", type=command.count, default=4, help="pictures a prompt")
    parser.add_argument("--seed", type=command.seed, default=0)
    parser.add_argument("--output", type=command.new_folder, default="samples", help="folder of the PNG files")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--dtype", default="auto", choices=["auto", "bfloat16", "float32"])
    args = parser.parse_args(argv)
    command.quieten()
    for prompt in args.prompt:
        if any("\ud800" <= character <= "\udfff" for character in prompt):
            raise ConfigError(f"--prompt {prompt!r}: is not UTF-8")
    options = {name: getattr(args, name) for name in ("pipeline", "family", "device", "dtype")}
    student = load_student(args.student, **options)
    args.output.mkdir(parents=True, exist_ok=True)
    embeddings = student.encode(args.prompt)
    decoder = student.backbone.load_decoder(student.device)
    noise = first_noises(args.seed, args.num_images, student.backbone.latent_shape)
    first = next_number(args.output)
    for number in range(len(args.prompt)):
        cond = {name: value[number].expand(len(noise), *value.shape[1:]) for name, value in embeddings.items()}
        for index, image in enumerate(decode(decoder, student.latents(cond, noise))):
            path = args.output / f"{first + number:03d}-{args.seed}-{index:03d}.png"
            save_png(image, path)
            print(path)


if __name__ == "__main__":
    sys.exit(main())
