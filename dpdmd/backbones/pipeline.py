"""A diffusers pipeline on disk or on the hub: its configuration files first, its weights when they are wanted.

Nothing that comes from elsewhere is unpickled: weights are safetensors or refused.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path

from dpdmd.backbones.family import Family, families
from dpdmd.backbones.files import (
    PICKLED,
    VARIANTS,
    Weights,
    check_file,
    find_weights,
    has_weights,
    read_json,
    read_shapes,
    reading,
)
from dpdmd.config import WORLDS, ConfigError
from dpdmd.files import open_file

_CONFIGURATION = ["model_index.json", "*/*config.json", "tokenizer*/*"]
_COPIES = [f"*.{variant}*" for variant in VARIANTS]  # stand beside the weights under names of their own
_SINGLE_FILES = (".safetensors", ".gguf", *PICKLED)
_ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".7z", ".rar")


class PipelineFolder:
    """The folder of a diffusers pipeline of a family.

    key: the setting that named it, for messages. name: a folder, a hub id, or a world that ships ("demo"). expected: the
    families of which it may be. revision: of a hub id. family: the one that it is of. path: the folder; of a hub id the
    local snapshot, which holds the configuration and such weights as were fetched.

    Raises ConfigError where there is no such folder or repository, and where it is no pipeline or one of another class.
    """

    def __init__(self, key: str, name: str, expected: Sequence[Family], revision: str | None = None):
        self.key, self.name = key, name
        self._is_remote = False
        needed = " or ".join(family.pipeline for family in expected)
        # os.path.isdir takes any string, where Path.is_dir raises for one that is too long.
        if name.isidentifier() and os.path.isdir(WORLDS / name / "teacher"):
            self.path = WORLDS / name / "teacher"
        elif name and os.path.isdir(name):
            self.path = Path(name)
        elif re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) and not _is_file_name(name):
            self._is_remote = True
            self.path = self._fetch(_CONFIGURATION, revision, _COPIES)
        else:
            raise ConfigError(f"{self}: {_no_pipeline(name, needed)}")
        self._index = self._read_index()
        found = self._index.get("_class_name")
        known = {family.pipeline: family for family in families()}
        if found not in [family.pipeline for family in expected]:
            hint = f"; it takes model.family={known[found].name}" if isinstance(found, str) and found in known else ""
            raise ConfigError(f"{self}: is a {found}; a {needed} is needed (model.family){hint}")
        self.family = known[found]

    def component_class(self, component: str) -> str | None:
        """Class name of a component as model_index.json has it; None where the pipeline has none."""
        entry = self._index.get(component)
        if entry is None:
            return None
        if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[1], str | type(None)):
            raise ConfigError(
                f"{self}: {self.path / 'model_index.json'} has {component} = {entry!r}; a library and a class are needed"
            )
        return entry[1]

    def require(self, component: str, *classes: str) -> None:
        """Raises ConfigError where a component or its folder is missing, or its class is none of `classes`."""
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
        """`files.reading` around a library that makes something of a component's file."""
        return reading(f"{self}: {self.path / component / file}")

    def weights(self, component: str) -> Weights:
        """The safetensors files of a component, fetched from the hub if need be. Raises as `files.find_weights`."""
        folder = self.path / component
        if self._is_remote:
            # The snapshot's folder bears its commit's name: a branch that has moved on since cannot mix in.
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

    @property
    def is_local(self) -> bool:
        """Whether weights are read from where they are, and not first fetched from the hub."""
        return not self._is_remote

    def check_tokenizer(self, component: str) -> None:
        """Raises ConfigError where one of a tokenizer's files is a git-lfs pointer."""
        for path in self._vocabularies(component):
            check_file(path, str(self))

    def fingerprint(self, components: list[str]) -> str:
        """Hex digest of what the components compute: classes, settings, weights, vocabularies; see `_digest_file`."""
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
        except Exception as error:  # the hub's own kinds and those of whichever HTTP client it uses
            reason = str(error).strip().split("\n")[0]
            raise ConfigError(
                f"{self}: there is no such folder here, and the hub could not deliver it "
                f"({type(error).__name__}: {reason}). A local diffusers pipeline folder would do: "
                f"set {self.key} to its path"
            ) from error

    def _read_index(self) -> dict:
        if not (self.path / "model_index.json").exists():
            raise ConfigError(f"{self}: {_describe(self.path)}; a diffusers pipeline folder has a model_index.json")
        return read_json(self.path / "model_index.json", str(self))


def _stem(component: str) -> str:
    """What the names of a component's weights begin with: diffusers' models, or transformers'."""
    return "model" if component.startswith("text_encoder") else "diffusion_pytorch_model"


def _is_file_name(name: str) -> bool:
    return name.lower().endswith((*_SINGLE_FILES, *_ARCHIVES))


def _no_pipeline(name: str, pipeline_class: str) -> str:
    """What is wrong with a name that is neither a folder nor the form of a hub id."""
    if os.path.isfile(name) or _is_file_name(name):
        there = "is a file" if os.path.isfile(name) else "there is no such file, and a file would not do"
        if Path(name).name == "model_index.json":
            return f"{there}; the folder that it lies in is needed"
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
        hint = "; of an address on the hub the last two parts, owner/name, are needed"
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
    """SHA-256 of a file up to 64 MB; of a larger one, of its size, its beginning and 64 blocks of 64 kB spread over it.

    T5-XXL has 19 GB of float32 weights, which take longer to read than a small prompt file to encode. A safetensors
    header (names, shapes, offsets) lies in the beginning. Other training changes every block, so what could pass unseen
    is an edit of a few rows by hand.
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
