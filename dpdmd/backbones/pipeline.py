"""A diffusers pipeline on disk or on the hub: its configuration files first, its weights when they are wanted.

Nothing that comes from elsewhere is unpickled: weights are safetensors or refused.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

from dpdmd.config import ConfigError

# By model.family.
PIPELINE_CLASSES = {"sd3": "StableDiffusion3Pipeline", "flux": "FluxPipeline"}

_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_CONFIGURATION = ["model_index.json", "*/*config.json", "tokenizer*/*"]


class PipelineFolder:
    """The folder of a diffusers pipeline of one class.

    key: the setting that named it, for messages. name: a folder, a hub id, or "demo". revision: of a hub id.
    path: the folder; of a hub id the local snapshot, which holds the configuration and such weights as were fetched.

    Raises ConfigError where there is no such folder or repository, and where it is no pipeline or one of another class.
    """

    def __init__(self, key: str, name: str, pipeline_class: str, revision: str | None = None):
        self.key, self.name = key, name
        self._is_remote = False
        if name == "demo":
            from dpdmd.demo import TEACHER

            self.path = Path(TEACHER)
        elif Path(name).is_dir():
            self.path = Path(name)
        elif re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
            self._is_remote = True
            self.path = self._fetch(_CONFIGURATION, revision)
        else:
            raise ConfigError(f"{key} = {name!r}: neither a folder nor the id of a repository on the hub (owner/name)")
        self._index = self._read_index(pipeline_class)

    def component_class(self, component: str) -> str | None:
        """Class name of a component as model_index.json has it; None where the pipeline has none."""
        return (self._index.get(component) or [None, None])[1]

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
        return self._read_json(self.path / component / file)

    def weights(self, component: str) -> list[Path]:
        """The safetensors files of a component, fetched from the hub if need be; none is opened.

        Raises ConfigError where there are none, where a shard is missing, and where there are only pickled ones.
        """
        folder = self.path / component
        if self._is_remote:
            # The snapshot's folder bears its commit's name: a branch that has moved on since cannot mix in.
            self._fetch([f"{component}/*.json", f"{component}/*.safetensors"], self.path.name)
        for stem in ("diffusion_pytorch_model", "model"):
            index, single = folder / f"{stem}.safetensors.index.json", folder / f"{stem}.safetensors"
            if single.is_file():
                return [single]
            if index.is_file():
                shards = sorted({folder / shard for shard in self._read_json(index).get("weight_map", {}).values()})
                absent = [shard.name for shard in shards if not shard.is_file()]
                if absent:
                    raise ConfigError(f"{self}: {', '.join(absent)} of its {component} missing in {folder}")
                return shards
        pickled = [path.name for path in sorted(folder.iterdir()) if path.suffix in _PICKLED]
        if pickled:
            raise ConfigError(
                f"{self}: the weights of its {component} are pickled ({', '.join(pickled)} in {folder}), and "
                "unpickling can run any code: save them as safetensors (save_pretrained does)"
            )
        raise ConfigError(f"{self}: no weights of its {component} in {folder} (a .safetensors file is needed)")

    def check_weights(self, component: str) -> None:
        """`weights` ahead of time, where that downloads nothing."""
        if not self._is_remote:
            self.weights(component)

    def fingerprint(self, components: list[str]) -> str:
        """Hex digest of what the components compute: classes, settings, weights, vocabularies; see `_digest_file`."""
        digest = hashlib.sha256()
        for component in components:
            digest.update(f"{component} {self.component_class(component)}\n".encode())
            folder = self.path / component
            if (folder / "config.json").is_file():
                files = [folder / "config.json", *self.weights(component)]
            else:  # a tokenizer
                files = [path for path in sorted(folder.iterdir()) if path.suffix in (".json", ".txt", ".model")]
            for path in files:
                digest.update(path.name.encode() + _digest_file(path))
        return digest.hexdigest()

    def __str__(self) -> str:
        return f"{self.key} = {self.name!r}"

    def _fetch(self, patterns: list[str], revision: str | None) -> Path:
        import huggingface_hub

        try:
            # Half-precision copies stand beside the weights under names of their own.
            return Path(
                huggingface_hub.snapshot_download(
                    self.name, revision=revision, allow_patterns=patterns, ignore_patterns=["*.fp16*", "*.bf16*"]
                )
            )
        except Exception as error:  # the hub's own kinds and those of whichever HTTP client it uses
            reason = str(error).strip().split("\n")[0]
            raise ConfigError(
                f"{self}: there is no such folder here, and the hub could not deliver it "
                f"({type(error).__name__}: {reason}). A local diffusers pipeline folder would do: "
                f"set {self.key} to its path"
            ) from error

    def _read_index(self, pipeline_class: str) -> dict:
        if not (self.path / "model_index.json").is_file():
            raise ConfigError(f"{self}: {_describe(self.path)}; a diffusers pipeline folder has a model_index.json")
        index = self._read_json(self.path / "model_index.json")
        found = index.get("_class_name")
        if found != pipeline_class:
            families = [family for family, its_class in PIPELINE_CLASSES.items() if its_class == found]
            hint = f"; it takes model.family={families[0]}" if families else ""
            raise ConfigError(f"{self}: is a {found}; a {pipeline_class} is needed (model.family){hint}")
        return index

    def _read_json(self, path: Path) -> dict:
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"{self}: {path} cannot be read ({error.strerror})") from error
        except ValueError as error:
            raise ConfigError(f"{self}: {path} is not JSON ({error})") from error
        if not isinstance(values, dict):
            raise ConfigError(f"{self}: {path} holds a {type(values).__name__} where an object is needed")
        return values


def _describe(folder: Path) -> str:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        component = config.get("_class_name") or config["architectures"][0]
    except (OSError, ValueError, LookupError, AttributeError, TypeError):
        names = sorted(path.name for path in folder.iterdir())
        return f"{folder} holds {', '.join(names[:6]) + (', ...' if names[6:] else '') or 'nothing'}"
    kind = "a transformer" if "Transformer2DModel" in component else "one component's"
    return f"{folder} is {kind} folder ({component}), not a pipeline"


_WHOLE_BYTES = 64 << 20
_SAMPLES, _SAMPLE_BYTES = 64, 64 << 10


def _digest_file(path: Path) -> bytes:
    """SHA-256 of a file up to 64 MB; of a larger one, of its size, its beginning and 64 blocks of 64 kB spread over it.

    T5-XXL has 19 GB of float32 weights, which take longer to read than a small prompt file to encode. A safetensors
    header (names, shapes, offsets) lies in the beginning. Other training changes every block, so what could pass unseen
    is an edit of a few rows by hand.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size <= _WHOLE_BYTES:
            digest.update(file.read())
        else:
            digest.update(file.read(4 << 20))
            for sample in range(_SAMPLES):
                file.seek((size - _SAMPLE_BYTES) * sample // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.digest()
