"""A diffusers pipeline on disk or on the hub: its configuration files first, its weights on demand.

Nothing is unpickled: weights are safetensors or refused.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dpdmd.backbones.family import Family, families
from dpdmd.backbones.files import (
    PICKLED,
    VARIANTS,
    Weights,
    check_file,
    check_finite,
    find_weights,
    has_weights,
    read_json,
    read_shapes,
    reading,
    refuse_misfits,
)
from dpdmd.config import WORLDS, ConfigError
from dpdmd.files import open_file

_CONFIGURATION = ["model_index.json", "*/*config.json", "tokenizer*/*"]
_COPIES = [f"*.{variant}*" for variant in VARIANTS]  # the weights again, in another precision
_SINGLE_FILES = (".safetensors", ".gguf", *PICKLED)
_ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".7z", ".rar")


class PipelineFolder:
    """The folder of a diffusers pipeline of a family.

    key: the setting that named it, for messages. name: a folder, a hub id, or a world that ships ("demo"). expected: the
    families it may belong to. revision: of a hub id. family: its family. path: the folder, or the local snapshot of a hub
    id with the configuration and the weights fetched so far. is_local: whether `name` is no hub id, so that weights are
    read in place.

    Raises ConfigError if there is no such folder or repository, or if it is no pipeline of an expected class.
    """

    def __init__(self, key: str, name: str, expected: Sequence[Family], revision: str | None = None):
        self.key, self.name = key, name
        self.is_local = True
        needed = " or ".join(family.pipeline for family in expected)
        # os.path.isdir takes any string; Path.is_dir raises for one that is too long.
        if name.isidentifier() and os.path.isdir(WORLDS / name / "teacher"):
            self.path = WORLDS / name / "teacher"
        elif name and os.path.isdir(name):
            self.path = Path(name)
        elif re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) and not _is_file_name(name):
            self.is_local = False
            self.path = self._fetch(_CONFIGURATION, revision, _COPIES)
        else:
            raise ConfigError(f"{self}: {_no_pipeline(name, needed)}")
        if not (self.path / "model_index.json").exists():
            raise ConfigError(f"{self}: {_describe(self.path)}; a diffusers pipeline folder has a model_index.json")
        self._index = read_json(self.path / "model_index.json", str(self))
        found = self._index.get("_class_name")
        known = {family.pipeline: family for family in families()}
        if found not in [family.pipeline for family in expected]:
            hint = f"; it takes model.family={known[found].name}" if isinstance(found, str) and found in known else ""
            raise ConfigError(f"{self}: is a {found}; a {needed} is needed (model.family){hint}")
        self.family = known[found]

    def component_class(self, component: str) -> str | None:
        """Class name of a component in model_index.json; None if the pipeline has none."""
        entry = self._index.get(component)
        if entry is None:
            return None
        if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[1], str | type(None)):
            raise ConfigError(
                f"{self}: {self.path / 'model_index.json'} has {component} = {entry!r}; a library and a class are needed"
            )
        return entry[1]

    def require(self, component: str, *classes: str) -> None:
        """Raises ConfigError if a component or its folder is missing, or its class is none of `classes`."""
        found = self.component_class(component)
        if found is None or not (self.path / component).is_dir():
            where = f"no folder {self.path / component}" if found else f"none in {self.path / 'model_index.json'}"
            raise ConfigError(f"{self}: the pipeline's {component} is missing ({where})")
        if classes and found not in classes:
            raise ConfigError(f"{self}: its {component} is a {found}; {' or '.join(classes)} is needed")

    def read(self, component: str, file: str = "config.json") -> dict:
        """A JSON file of a component."""
        return read_json(self.path / component / file, str(self))

    def reading(self, component: str, file: str = "config.json"):
        """`files.reading` around a library that uses a component's file."""
        return reading(f"{self}: {self.path / component / file}")

    def weights(self, component: str) -> Weights:
        """The safetensors files of a component, fetched from the hub if need be. Raises as `files.find_weights`."""
        folder = self.path / component
        if not self.is_local:
            # The snapshot's folder is named after its commit, so files of a later commit cannot mix in.
            self._fetch([f"{component}/*.json", f"{component}/*.safetensors"], self.path.name, _COPIES)
            for variant in VARIANTS:
                if not has_weights(folder, _stem(component)):
                    self._fetch(
                        [f"{component}/*.{variant}*.json", f"{component}/*.{variant}*.safetensors"], self.path.name
                    )
        return find_weights(folder, _stem(component), str(self), f" of its {component}")

    def shapes(self, component: str) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor in a component's weights, from the files' headers. Raises as `files.read_shapes`."""
        return read_shapes(self.weights(component), f"{self}: {component}")

    def load(
        self, component: str, model_class: Any, device: torch.device | str, part: bool = False, **options: Any
    ) -> Any:
        """A component's model on `device`, frozen and in eval mode. Raises ConfigError for weights that are damaged or do
        not fit.

        part: the weights may be those of a larger model, whose other modules are ignored. options: of from_pretrained.
        """
        from transformers.utils import logging

        folder, what = self.path / component, f"{self}: {component}"
        weights = self.weights(component)
        read_shapes(weights, what)
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # the error below replaces its report of what does not fit
        try:
            with reading(f"{what} in {folder}"):
                model, info = model_class.from_pretrained(
                    folder,
                    variant=weights.variant,
                    use_safetensors=True,
                    local_files_only=True,
                    output_loading_info=True,
                    **options,
                )
        finally:
            logging.set_verbosity(verbosity)
        modules = dict(model.named_children())
        besides = [name for name in info["unexpected_keys"] if not part or name.split(".")[0] in modules]
        other = [name for name, *_ in info["mismatched_keys"]]
        refuse_misfits(f"{what} in {folder}", info["missing_keys"], besides, other)
        model = model.eval().requires_grad_(False).to(device)
        check_finite(model, f"{what}'s weights in {folder}")
        return model

    def check_tokenizer(self, component: str) -> None:
        """Raises ConfigError if one of a tokenizer's files is a git-lfs pointer."""
        for path in self._vocabularies(component):
            check_file(path, str(self))

    def fingerprint(self, components: list[str]) -> str:
        """Hex digest of the components' classes, settings, weights and vocabularies; see `_digest_file`."""
        digest = hashlib.sha256()
        for component in components:
            digest.update(f"{component} {self.component_class(component)}\n".encode())
            folder = self.path / component
            if (folder / "config.json").is_file():
                files = [folder / "config.json", *self.weights(component).files]
            else:  # a tokenizer
                files = self._vocabularies(component)
            digest.update(_digest_files(files))
        return digest.hexdigest()

    def weights_fingerprint(self, component: str) -> str:
        """Hex digest of a component's weights alone; see `_digest_file`."""
        return hashlib.sha256(_digest_files(self.weights(component).files)).hexdigest()

    def __str__(self) -> str:
        return f"{self.key} = {self.name!r}"

    def _vocabularies(self, component: str) -> list[Path]:
        paths = sorted((self.path / component).iterdir())
        return [path for path in paths if path.suffix in (".json", ".txt", ".model")]

    def _fetch(self, patterns: list[str], revision: str | None, ignored: list[str] | None = None) -> Path:
        import huggingface_hub

        try:
            return Path(
                huggingface_hub.snapshot_download(
                    self.name, revision=revision, allow_patterns=patterns, ignore_patterns=ignored
                )
            )
        except Exception as error:  # the hub's errors and its HTTP client's
            reason = str(error).strip().split("\n")[0]
            raise ConfigError(
                f"{self}: there is no such folder here, and the hub could not deliver it "
                f"({type(error).__name__}: {reason}). Set {self.key} to the path of a local diffusers pipeline folder"
            ) from error


def _stem(component: str) -> str:
    """What the names of a component's weights begin with: diffusers' models, or transformers'."""
    return "model" if component.startswith("text_encoder") else "diffusion_pytorch_model"


def _is_file_name(name: str) -> bool:
    return name.lower().endswith((*_SINGLE_FILES, *_ARCHIVES))


def _no_pipeline(name: str, pipeline_class: str) -> str:
    """The error about a name that is neither a folder nor shaped like a hub id."""
    if os.path.isfile(name) or _is_file_name(name):
        there = "is a file" if os.path.isfile(name) else "there is no such file"
        if Path(name).name == "model_index.json":
            return f"{there}; name the folder that contains it"
        if name.lower().endswith(_ARCHIVES):
            return f"{there}; a diffusers pipeline folder is needed: unpack the archive and name the folder"
        if name.lower().endswith(_SINGLE_FILES):
            return (
                f"{there}; a single-file checkpoint has to be converted to a diffusers pipeline folder: "
                f"{pipeline_class}.from_single_file(file).save_pretrained(folder), and name the folder"
            )
        return f"{there}; a diffusers pipeline folder is needed"
    hint = ""
    if "://" in name:
        hint = "; use only the last two parts of an address on the hub, owner/name"
    elif re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*/+", name):
        hint = "; a hub id has no slash at its end"
    return f"neither a folder nor the id of a repository on the hub (owner/name){hint}"


def _describe(folder: Path) -> str:
    try:
        config = read_json(folder / "config.json", "its description")
        component = str(config.get("_class_name") or config["architectures"][0])
    except (ConfigError, LookupError, TypeError):
        names = sorted(path.name for path in folder.iterdir())
        return f"{folder} holds {', '.join(names[:6]) + (', ...' if names[6:] else '') or 'nothing'}"
    kind = "a transformer" if "Transformer2DModel" in component else "one component's"
    return f"{folder} is {kind} folder ({component}), not a pipeline"


_WHOLE_BYTES = 64 << 20
_SAMPLES, _SAMPLE_BYTES = 64, 64 << 10


def _digest_files(paths: list[Path]) -> bytes:
    return b"".join(path.name.encode() + _digest_file(path) for path in paths)


def _digest_file(path: Path) -> bytes:
    """SHA-256 of a file up to 64 MB; for a larger one, of its size, its first 4 MB and 64 blocks of 64 kB spread over it.

    Reading T5-XXL's 19 GB of float32 weights takes longer than encoding a small prompt file. The safetensors header
    (names, shapes, offsets) is at the beginning. Training changes every block; only an edit of a few rows by hand could
    go unnoticed.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with open_file(path) as file:
        if size <= _WHOLE_BYTES:
            digest.update(file.read())
        else:
            digest.update(file.read(4 << 20))
            for sample in range(_SAMPLES):
                file.seek((size - _SAMPLE_BYTES) * sample // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.digest()
