"""Checks of a user's files before a library reads them: a file that is missing or damaged, or holds NaN or infinity, is
refused in one line that names it. Weights are safetensors; nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import json
import re
import typing
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic
import torch
from torch import Tensor, nn

from dpdmd.config import POINTER_BYTES, ConfigError, refuse_pointer
from dpdmd.files import is_finite, open_file

PICKLED = (".bin", ".pt", ".pth", ".ckpt")
# In the names of a model's copies in other precisions, best first. A copy is read only if there is no file without one.
VARIANTS = ("fp32", "bf16", "fp16")

MOST_LAYERS = 1024  # of a network; more must be a mistake, and building them would take too long

_FLOATS = ("F64", "F32", "F16", "BF16")


@contextlib.contextmanager
def reading(what: str, purpose: str = "") -> Iterator[None]:
    """Turn whatever a library raises while it reads a user's file into a ConfigError of one line about `what`.

    purpose: what the file is read as, for example " as an adapter". A ConfigError, running out of memory and a device's
    errors, which say nothing about the file, pass unchanged.
    """
    try:
        yield
    except (ConfigError, MemoryError, torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except BaseException as error:
        # tokenizers and safetensors are written in Rust; a panic is not an Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ConfigError(f"{what} cannot be read{purpose} ({type(error).__name__}: {_reason(error)})") from error


def _reason(error: BaseException) -> str:
    """The first line of the message, and the second if the first ends in a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no reason given"]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


def check_file(path: Path, what: str) -> None:
    """Raises ConfigError, which begins with `what`, unless path is a readable file and not a git-lfs pointer."""
    if path.is_symlink() and not path.exists():
        raise ConfigError(f"{what}: {path} cannot be read (it is a link to {path.readlink()}, which is not there)")
    if path.is_dir():
        raise ConfigError(f"{what}: {path} cannot be read (it is a folder; a file is needed)")
    try:
        with open_file(path) as file:
            beginning = file.read(POINTER_BYTES)
    except OSError as error:
        raise ConfigError(f"{what}: {path} cannot be read ({error.strerror})") from error
    refuse_pointer(beginning, f"{what}: {path}")


def read_json(path: Path, what: str) -> dict:
    """The object in a JSON file. Raises ConfigError, which begins with `what`."""
    check_file(path, what)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{what}: {path} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{what}: {path} is not JSON ({error})") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{what}: {path} holds a {type(values).__name__} where an object is needed")
    return values


def check_setting(name: str, value: Any, kind: Any, what: str) -> None:
    """Raises ConfigError, which begins with `what`, unless a value from a JSON file has the type `kind` (or one of a union);
    an int must be 1 or more."""
    if kind is int:
        kind = typing.Annotated[int, pydantic.Field(ge=1)]
    try:
        pydantic.TypeAdapter(kind).validate_json(json.dumps(value), strict=True)
    except pydantic.ValidationError as error:
        message = error.errors()[0]["msg"]
        raise ConfigError(f"{what} has {name} = {value!r}; {message[:1].lower()}{message[1:]}") from error


@dataclass(frozen=True)
class Weights:
    """One model's safetensors files, and the variant in their names (or None), which from_pretrained takes."""

    files: list[Path]
    variant: str | None


def has_weights(folder: Path, stem: str) -> bool:
    """Whether the folder has a file or an index for `find_weights`."""
    return any(path.exists() for variant in (None, *VARIANTS) for path in _names(folder, stem, variant))


def find_weights(folder: Path, stem: str, what: str, of: str = "") -> Weights:
    """The weights that from_pretrained reads from a folder.

    stem: "diffusion_pytorch_model" for diffusers, "model" for transformers. of: for messages, as " of its vae".

    Raises ConfigError, which begins with `what`, if there are none or only pickled ones, for a shard that is missing or in
    another folder, and for a git-lfs pointer.
    """
    for variant in (None, *VARIANTS):
        index, single = _names(folder, stem, variant)
        # If both exist, diffusers reads the shards and transformers the single file.
        for path in (index, single) if stem.startswith("diffusion") else (single, index):
            if path.exists() or path.is_symlink():
                files = [single] if path == single else _shards(index, what, of)
                for file in files:
                    check_file(file, what)
                return Weights(files, variant)
    there = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    pickled = [name for name in there if Path(name).suffix in PICKLED]
    if pickled:
        raise ConfigError(
            f"{what}: the weights{of} are pickled ({', '.join(pickled)} in {folder}), and unpickling can run any code: save "
            "them as safetensors (save_pretrained does)"
        )
    others = [name for name in there if name.endswith(".safetensors")]
    found = f"; there is {', '.join(others[:3])}" if others else ""
    raise ConfigError(f"{what}: no weights{of} in {folder} ({stem}.safetensors is needed{found})")


def _names(folder: Path, stem: str, variant: str | None) -> tuple[Path, Path]:
    """Index of the shards, single file."""
    dot = f".{variant}" if variant else ""
    return folder / f"{stem}.safetensors.index{dot}.json", folder / f"{stem}{dot}.safetensors"


def _shards(index: Path, what: str, of: str) -> list[Path]:
    places = read_json(index, what).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise ConfigError(f"{what}: {index} has no weight_map that names a file for each tensor")
    names = sorted(set(places.values()))
    for name in names:
        if not re.fullmatch(r"[^/\\]+\.safetensors", name):
            raise ConfigError(
                f"{what}: {index} names {name!r}; a .safetensors file in the same folder is needed, without a path"
            )
    absent = [name for name in names if not (index.parent / name).exists()]
    if absent:
        raise ConfigError(f"{what}: {', '.join(absent)}{of} missing in {index.parent}, though {index.name} names it")
    return [index.parent / name for name in names]


def read_shapes(weights: Weights, what: str) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor, from the headers alone.

    Raises ConfigError, which begins with `what`, for a file that is empty, cut off or damaged, and for a tensor that is in
    two files or holds other numbers than floats.
    """
    from safetensors import safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    where: dict[str, Path] = {}
    for path in weights.files:
        if not path.stat().st_size:
            raise ConfigError(f"{what}: {path} cannot be read (it is empty)")
        with reading(f"{what}: {path}"), safe_open(path, framework="pt") as file:  # checks that the file is whole
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            header = {name: (each.get_dtype(), tuple(each.get_shape())) for name, each in slices.items()}
        for name, (dtype, shape) in header.items():
            if name in where:
                raise ConfigError(f"{what}: {name} is in both {where[name]} and {path.name}")
            # Old CLIP models keep the integers 0, 1, 2, ... beside their weights.
            if dtype not in _FLOATS and not name.endswith("position_ids"):
                raise ConfigError(f"{what}: {path} holds {name} as {dtype}; one of {', '.join(_FLOATS)} is needed")
            where[name], shapes[name] = path, shape
    return shapes


def check_fit(shapes: Mapping[str, tuple[int, ...]], needed: Mapping[str, tuple[int, ...]], what: str) -> None:
    """Raises ConfigError, which begins with `what`, unless exactly the needed tensors are present."""
    other = [
        f"{name} of shape {tuple(shapes[name])}, where {tuple(needed[name])} is needed"
        for name in needed.keys() & shapes.keys()
        if tuple(shapes[name]) != tuple(needed[name])
    ]
    refuse_misfits(what, needed.keys() - shapes.keys(), shapes.keys() - needed.keys(), other)


def refuse_misfits(what: str, lacking: Collection[str], besides: Collection[str], other: Collection[str]) -> None:
    """Raises ConfigError, which begins with `what`, if any of these names of tensors is given: missing ones, unexpected
    ones, and ones of another shape."""
    groups = (("lacks", lacking), ("has besides", besides), ("has in another shape", other))
    problems = [f"{verb} {_count(names)}, such as {min(names)}" for verb, names in groups if names]
    if problems:
        raise ConfigError(f"{what} {' and '.join(problems)}")


def _count(names: Collection) -> str:
    return f"{len(names)} tensor{'s' * (len(names) != 1)}"


def check_finite(tensors: Mapping[str, Tensor] | nn.Module, what: str) -> None:
    """Raises ConfigError, which begins with `what`, if a floating-point tensor holds NaN or infinity.

    It reads every number once and copies none: 3 to 8 GB/s a CPU core.
    """
    if isinstance(tensors, nn.Module):
        # A tensor under two names counts once.
        distinct = {id(tensor): (name, tensor) for name, tensor in tensors.state_dict(keep_vars=True).items()}
        tensors = dict(distinct.values())
    bad = [name for name, tensor in tensors.items() if not is_finite(tensor)]
    if bad:
        first = tensors[bad[0]]
        count = sum(int((~piece.isfinite()).sum()) for piece in first.flatten().split(1 << 20))
        raise ConfigError(
            f"{what}: NaN or infinity in {len(bad)} of {_count(tensors)}, such as {bad[0]} ({count} of {first.numel()} "
            "values): the file is damaged, or the run that wrote it had diverged"
        )
