"""What the backbones of all families share: opening the roles' pipelines, checking that their parts fit, loading, export.

A family picks its text encoders (text.py) and VAE (vae.py) in its `Family`. It adds how to call its network and encode its
prompts, and its noise process.
"""

from __future__ import annotations

import inspect
import math
import typing
from abc import ABC, abstractmethod
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import pydantic
import torch
from torch import Tensor, nn

from dpdmd.backbones.family import Family
from dpdmd.backbones.files import (
    MOST_LAYERS,
    Weights,
    check_finite,
    check_fit,
    check_setting,
    find_weights,
    read_json,
    read_shapes,
    reading,
)
from dpdmd.backbones.pipeline import PipelineFolder
from dpdmd.backbones.text import CLIP_LENGTH, Clip, EncodePrompt, RandomText, TextEncoders, clip_length
from dpdmd.backbones.vae import Decoder
from dpdmd.config import Config, ConfigError, ModelConfig
from dpdmd.diffusion import LATEST, NoiseProcess
from dpdmd.files import disk_errors, follow_umask

Role = Literal["teacher", "student", "critic"]

_INIT_SEED = 0
# Largest integers of an architecture: larger ones must be a mistake, and would build endless layers or tables. Others: 2^20.
_MOST = {"num_layers": MOST_LAYERS, "num_single_layers": MOST_LAYERS, "pos_embed_max_size": 1024}


class Backbone(ABC):
    """The backbone of one run: three roles on one VAE, one scheduler and one set of text encoders (the teacher's).

    The constructor reads configuration files only. It raises ConfigError, naming the setting and the file, for a pipeline
    that is missing, incomplete, of another class or pickled, for weights that are git-lfs pointers, for roles that do not
    fit each other, the text encoders or the VAE, and for a resolution that the transformer cannot take. `check_weights`
    checks more; loading weights also raises ConfigError for NaN and infinity.

    config.revision is that of config.pipeline; student and critic from another hub id come from its default branch.
    Under random_init only configuration is read, and for a name in `Family.known` no file at all: weights are random,
    text embeddings random but repeatable, and there is no decoder.

    teacher: config.pipeline, if already opened. config: as given, with the family's decisions (`resolved`). diffusion:
    the noise process of the teacher's scheduler. latent_shape: (C, H, W) or (C, F, H, W) at config.resolution. folder:
    the teacher's, or None. text_shapes: {name: shape} of one prompt's encoding, without the batch.
    """

    family: ClassVar[Family]

    def __init__(self, config: ModelConfig, teacher: PipelineFolder | None = None):
        self.config = config.model_copy(
            update={"family": config.family or self.family.name, "fuse": config.fuse and self.family.fused}
        )
        if config.fp8 != "off" and not self.family.fused:
            raise ConfigError(
                f"model.fp8 = {config.fp8}: there are no fused operations for the family {self.family.name}, and fp8 needs "
                "them; set model.fp8=off"
            )
        self._pipelines: dict[str, PipelineFolder] = {}  # by role; models of `Family.known` have none
        self._architectures: dict[str, dict[str, Any]] = {}
        opened: dict[str, PipelineFolder | None] = {} if teacher is None else {config.pipeline: teacher}
        for role, key, name in (
            ("teacher", "model.pipeline", config.pipeline),
            ("student", "model.student", config.student or config.pipeline),
            ("critic", "model.critic", config.critic or config.pipeline),
        ):
            if name not in opened:
                known = config.random_init and name in self.family.known and not Path(name).is_dir()
                revision = config.revision if name == config.pipeline else None
                opened[name] = None if known else PipelineFolder(key, name, [self.family], revision)
            pipeline = opened[name]
            if pipeline is None:
                self._architectures[role] = dict(self.family.known[name])
            else:
                self._pipelines[role] = pipeline
                pipeline.require("transformer", self.family.transformer_name)
                self._architectures[role] = self._read_architecture(
                    pipeline.read("transformer"), f"{pipeline}: transformer/config.json"
                )

        pipeline = self._pipelines.get("teacher")
        self.folder = None if pipeline is None else pipeline.path
        self._vae_scale, vae_channels = self.family.vae.read(pipeline)
        self._check_roles(vae_channels)
        self._check_resolution()
        self._text = [
            encoder
            for encoder in self.family.text
            if not encoder.optional or (pipeline and pipeline.component_class(encoder.component))
        ]
        self._text_encoders = [encoder.component for encoder in self._text]
        tokens = CLIP_LENGTH
        if pipeline is not None and not config.random_init:
            tokens = self._check_text(pipeline)
            for each in dict.fromkeys(self._pipelines.values()):
                if each.is_local:
                    each.weights("transformer")
            if pipeline.is_local:
                for component in ("vae", *self._text_encoders):
                    pipeline.weights(component)
            for encoder in self._text:
                pipeline.check_tokenizer(encoder.tokenizer)

        self.text_shapes = self._text_shapes(tokens)
        self.latent_shape = self._latent_shape(vae_channels, config.resolution // self._vae_scale)
        self.diffusion = self._make_process(pipeline)

    # What a family adds

    @abstractmethod
    def predict(
        self, transformer, x: Tensor, t: Tensor, cond: dict[str, Tensor], dtype: torch.dtype | None = None
    ) -> Tensor:
        """The prediction (B, *latent_shape) that the noise process expects, in the transformer's dtype.

        transformer: from `load_transformer`, or a wrapper with the same call (DeepSpeedEngine, compiled module).
        x (B, *latent_shape) and cond {name: (B, *text_shapes[name])} of any dtype; t (B,) float32, times of the noise
        process. dtype: the transformer's, needed if it has no parameters of its own.
        """

    @abstractmethod
    def attention_shapes(self) -> list[tuple[int, int]]:
        """(head dimension, tokens) of every attention in the roles' networks at config.resolution, each once, sorted."""

    @property
    def takes_guidance(self) -> bool:
        """Whether the networks take a guidance value, config.embedded_guidance, as an input."""
        return False

    @abstractmethod
    def _check_widths(self, pipeline: PipelineFolder, encoders: dict[str, Any]) -> None:
        """Raises ConfigError if the transformer does not fit the text encoders. encoders: {component: settings}."""

    @abstractmethod
    def _text_shapes(self, clip_length: int) -> dict[str, tuple[int, ...]]:
        """text_shapes, if CLIP's tokenizer makes clip_length tokens."""

    @abstractmethod
    def _encode_prompt(self, parts: dict[str, Any], device: torch.device) -> EncodePrompt:
        """A function from B prompts to {name: (B, *text_shapes[name])}, equal to the stock pipeline's. parts: {component:
        tokenizer or text encoder}."""

    @abstractmethod
    def _process(self, scheduler, where: str) -> NoiseProcess:
        """The noise process of the teacher's scheduler at config.resolution. A ConfigError begins with `where`."""

    def _latent_shape(self, channels: int, side: int) -> tuple[int, ...]:
        return (channels, side, side)

    def _tables(self, architecture: dict[str, Any]) -> dict[str, nn.Module]:
        """The transformer's children whose buffers are computed, not drawn at random; on the default device."""
        return {}

    # What all families share

    @property
    def block_classes(self) -> tuple[type[nn.Module], ...]:
        """Classes of the transformer blocks."""
        return self.family.block_classes

    @property
    def pipeline_guidance_scale(self) -> float:
        """The `guidance_scale` for a stock pipeline that samples the student."""
        return self.config.embedded_guidance if self.takes_guidance else self.family.guidance.counted(1.0)

    def resolved(self, config: Config) -> Config:
        """A run's configuration with the family's decisions: its name, and `fuse` off if it has no fused operations."""
        decided = {name: getattr(self.config, name) for name in ("family", "fuse")}
        return config.model_copy(update={"model": config.model.model_copy(update=decided)})

    def transformer_config(self, role: Role) -> dict[str, Any]:
        """Every argument of the transformer's class in the role's pipeline."""
        return dict(self._architectures[role])

    def check_weights(self) -> None:
        """Reads the headers of all local weights, which takes a second; loading them takes minutes.

        Raises ConfigError, naming setting and file, for files that are cut off or damaged or hold other numbers than
        floats, and for transformers whose tensors are not those of their configuration.
        """
        if self.config.random_init:
            return
        for pipeline, role in {pipeline: role for role, pipeline in self._pipelines.items()}.items():
            if pipeline.is_local:
                shapes = pipeline.shapes("transformer")
                self._check_transformer(shapes, self._architectures[role], f"{pipeline}: transformer")
        pipeline = self._pipelines["teacher"]
        if pipeline.is_local:
            for component in ("vae", *self._text_encoders):
                pipeline.shapes(component)

    def teacher_fingerprint(self) -> dict[str, Any]:
        """What a student learns from: `weights_fingerprint` of the teacher's transformer and text encoders, and the
        settings of its scheduler. Downloads weights from the hub. Empty under random_init."""
        if self.config.random_init:
            return {}
        pipeline = self._pipelines["teacher"]
        scheduler = pipeline.read("scheduler", "scheduler_config.json")
        return {
            "scheduler": {name: value for name, value in scheduler.items() if not name.startswith("_")},
            **{name: self.weights_fingerprint(name) for name in ("transformer", *self._text_encoders)},
        }

    def weights_fingerprint(self, component: str) -> str | None:
        """Hex digest of a teacher component's weights (`PipelineFolder.weights_fingerprint`); None under random_init."""
        if self.config.random_init:
            return None
        return self._pipelines["teacher"].weights_fingerprint(component)[:24]

    def empty_transformer(self, role: Role) -> nn.Module:
        """The role's transformer on the meta device, without memory."""
        return self._build(self._architectures[role])

    def load_transformer(self, role: Role, dtype: torch.dtype, device: torch.device | str = "cpu") -> nn.Module:
        """The role's transformer on `device`, in eval mode, its parameters requiring gradients.

        Under random_init the weights are drawn in float32 on `device`, the same for each role, and rounded to dtype; they
        differ between CPU and CUDA.
        """
        if self.config.random_init:
            return self._random_transformer(self._architectures[role], dtype, torch.device(device))
        pipeline = self._pipelines[role]
        folder, weights = pipeline.path / "transformer", pipeline.weights("transformer")
        what = f"{pipeline}: transformer"
        return self._read_transformer(folder, weights, self._architectures[role], dtype, device, what)

    def load_exported(self, folder: str | Path, dtype: torch.dtype, device: torch.device | str = "cpu") -> nn.Module:
        """A transformer that `export` wrote, in eval mode. Raises ConfigError if it does not fit this pipeline."""
        folder = Path(folder)
        what = f"student folder {str(folder)!r}"
        settings = read_json(folder / "config.json", what)
        if (found := settings.get("_class_name")) != (needed := self.family.transformer_name):
            raise ConfigError(f"{what} holds a {found}; the {needed} of a finished run is needed")
        student, teacher = self._read_architecture(settings, f"{what}: config.json"), self._architectures["teacher"]
        for name in self.family.common:
            if student[name] != teacher[name]:
                raise ConfigError(
                    f"{what} has {name} = {student[name]}, but the pipeline {self.config.pipeline!r} has {teacher[name]}: "
                    "use the pipeline that the student was trained from"
                )
        weights = find_weights(folder, "diffusion_pytorch_model", what)
        return self._read_transformer(folder, weights, student, dtype, device, what)

    def load_text(self, device: torch.device | str, dtype: torch.dtype) -> TextEncoders | RandomText:
        """The pipeline's text encoders; under random_init random embeddings that depend on the prompt."""
        if self.config.random_init:
            return RandomText(self.text_shapes, device, dtype)
        pipeline, parts = self._pipelines["teacher"], {}
        for encoder in self._text:
            parts[encoder.tokenizer], parts[encoder.component] = encoder.read(pipeline, device, dtype)
        return TextEncoders(self._encode_prompt(parts, torch.device(device)), str(pipeline))

    @cached_property
    def text_key(self) -> str:
        """Names what embeddings depend on besides prompt and dtype: encoders and tokenizers by content
        (`PipelineFolder.fingerprint`), and the length. Downloads weights from the hub."""
        shapes = ["x".join(map(str, shape)) for shape in self.text_shapes.values()]
        if self.config.random_init:
            return "-".join(["random", *shapes])
        tokenizers = [encoder.tokenizer for encoder in self._text]
        return f"{self._pipelines['teacher'].fingerprint([*self._text_encoders, *tokenizers])[:24]}-{shapes[0]}"

    def load_decoder(self, device: torch.device | str) -> Decoder:
        """The VAE, in float32 on `device`. Raises ConfigError under random_init."""
        if self.config.random_init:
            raise ConfigError("model.random_init = true: there is no VAE, so latents cannot be decoded to images")
        return self.family.vae.load(self._pipelines["teacher"], device)

    def export(self, state_dict: dict[str, Tensor], folder: str | Path, role: Role = "student") -> None:
        """Writes a stock diffusers transformer folder: config.json and safetensors, sharded if large.

        state_dict: the whole transformer's, on the CPU; every tensor keeps its dtype. Raises ValueError if its names or
        shapes are not the role's, OSError if the folder cannot be written.
        """
        transformer = self._build(self._architectures[role])
        try:
            transformer.load_state_dict(state_dict, assign=True)
        except RuntimeError as error:
            raise ValueError(f"this is not the state of the {role}'s transformer: {error}") from error
        with disk_errors(folder, sum(tensor.nbytes for tensor in state_dict.values())):
            Path(folder).mkdir(parents=True, exist_ok=True)  # save_pretrained fails silently if it cannot
            transformer.save_pretrained(folder, safe_serialization=True)
            follow_umask(folder)

    @property
    def _class(self) -> Any:
        return self.family.transformer_class

    def _read_architecture(self, settings: dict[str, Any], what: str) -> dict[str, Any]:
        """Every argument of the transformer's class, from its config.json. A ConfigError begins with `what`."""
        arguments = inspect.signature(self._class.__init__).parameters.values()
        defaults = {argument.name: argument.default for argument in arguments if argument.name != "self"}
        # Older folders lack newer settings; those models were made with the defaults.
        architecture = {**defaults, **{name: value for name, value in settings.items() if name in defaults}}
        if architecture["out_channels"] is None:
            architecture["out_channels"] = architecture["in_channels"]
        kinds = typing.get_type_hints(self._class.__init__)
        for name, value in architecture.items():
            if value is None and name in self.family.optional:
                continue
            check_setting(name, value, kinds.get(name, Any), what)
            if type(value) is int and value > (most := _MOST.get(name, 2**20)):
                raise ConfigError(f"{what} has {name} = {value}, where at most {most} makes sense")
            if isinstance(value, list):
                architecture[name] = tuple(value)
        with reading(what):  # fails now if it cannot be built later
            self._build(architecture)
        return architecture

    def _build(self, architecture: dict[str, Any]) -> Any:
        """A diffusers model of any architecture, on the meta device."""
        with torch.device("meta"):
            return self._class.from_config(architecture)

    def _check_transformer(self, shapes: dict[str, tuple[int, ...]], architecture: dict[str, Any], what: str) -> None:
        needed = {name: tensor.shape for name, tensor in self._build(architecture).state_dict().items()}
        check_fit(shapes, needed, what)

    def _check_roles(self, vae_channels: int) -> None:
        teacher = self._architectures["teacher"]
        for role, architecture in self._architectures.items():
            whose = f"the {role}'s transformer ({self._name(role)})"
            for name in self.family.common:
                if architecture[name] != teacher[name]:
                    raise ConfigError(
                        f"model.{role}: {whose} has {name} = {architecture[name]}, but the teacher's "
                        f"({self._name('teacher')}) has {teacher[name]}: all roles get the same inputs"
                    )
            if architecture["out_channels"] != architecture["in_channels"]:
                raise ConfigError(
                    f"{whose} has out_channels = {architecture['out_channels']}, but in_channels = "
                    f"{architecture['in_channels']}: they must be equal"
                )
        channels = vae_channels * self.family.packing**2
        if channels != teacher["in_channels"]:
            raise ConfigError(
                f"model.pipeline = {self.config.pipeline!r}: vae/config.json has latent_channels = {vae_channels}, but "
                f"transformer/config.json has in_channels = {teacher['in_channels']}; {channels} would fit"
            )

    def _check_resolution(self) -> None:
        resolution = self.config.resolution
        sizes = [each["patch_size"] for each in self._architectures.values()]
        patch = math.lcm(*(size if isinstance(size, int) else size[-1] for size in sizes))
        unit = self._vae_scale * self.family.packing * patch
        if resolution % unit:
            below = resolution // unit * unit
            nearest = f"the nearest are {below} and {below + unit}" if below else f"{unit} would do"
            raise ConfigError(
                f"model.resolution = {resolution}: must be a multiple of {unit} (VAE scale times patch); {nearest}"
            )

    def _check_text(self, pipeline: PipelineFolder) -> int:
        """Checks encoders and tokenizers against the transformer; returns how many tokens CLIP's tokenizer makes."""
        if self.config.max_sequence_length > self.family.longest_text:
            raise ConfigError(
                f"model.max_sequence_length = {self.config.max_sequence_length}: "
                f"the stock pipeline takes {self.family.longest_text} tokens at most"
            )
        configs = {encoder.component: encoder.read_config(pipeline) for encoder in self._text}
        self._check_widths(pipeline, configs)
        clips = [configs[encoder.component] for encoder in self._text if isinstance(encoder, Clip)]
        return clip_length(pipeline, clips) if clips else 0

    def _name(self, role: str) -> str:
        return getattr(self.config, role, None) or self.config.pipeline

    def _make_process(self, pipeline: PipelineFolder | None) -> NoiseProcess:
        from diffusers import FlowMatchEulerDiscreteScheduler

        if pipeline is None:
            settings = self.family.schedulers[self.config.pipeline]
            return self._process(FlowMatchEulerDiscreteScheduler(**settings), self.config.pipeline)
        pipeline.require("scheduler", "FlowMatchEulerDiscreteScheduler")
        settings = pipeline.read("scheduler", "scheduler_config.json")
        where = f"{pipeline}: scheduler/scheduler_config.json"
        kinds = typing.get_type_hints(FlowMatchEulerDiscreteScheduler.__init__)
        kinds["num_train_timesteps"] = typing.Annotated[int, pydantic.Field(ge=2, le=2**20)]
        kinds["shift_terminal"] = float | None  # which diffusers declares as float = None
        for name in (name for name in kinds if name in settings):
            check_setting(name, settings[name], kinds[name], where)
        if settings.get("stochastic_sampling"):
            raise ConfigError(
                f"{where} has stochastic_sampling = true: its steps add noise, and the teacher's steps here do not; "
                "set it to false"
            )
        with pipeline.reading("scheduler", "scheduler_config.json"):
            flow = self._process(FlowMatchEulerDiscreteScheduler.from_config(settings), str(pipeline))
        for times in (flow.train_times, flow.renoise_times):
            # from 1 (noise) towards 0 (data)
            if not (times.isfinite().all() and (times.diff() < 0).all() and times[0] <= LATEST and times[-1] > 0):
                raise ConfigError(
                    f"{pipeline}: the times of its scheduler/scheduler_config.json run from {times[0]:.4g} to "
                    f"{times[-1]:.4g}; times that fall from 1 towards 0 are needed"
                )
        return flow

    def _read_transformer(
        self,
        folder: Path,
        weights: Weights,
        architecture: dict[str, Any],
        dtype: torch.dtype,
        device: torch.device | str,
        what: str,
    ) -> nn.Module:
        self._check_transformer(read_shapes(weights, what), architecture, what)
        with reading(f"{what} in {folder}"):
            transformer = self._class.from_pretrained(
                folder, torch_dtype=dtype, variant=weights.variant, use_safetensors=True, local_files_only=True
            )
        transformer = transformer.to(device)
        check_finite(transformer, f"{what}'s weights in {folder}")
        return transformer

    def _random_transformer(self, architecture: dict[str, Any], dtype: torch.dtype, device: torch.device) -> nn.Module:
        """Draws weights as torch does by default, one tensor at a time, so that no float32 copy of the whole exists."""
        transformer = self._build(architecture)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.device(device):
            for name, table in self._tables(architecture).items():
                setattr(transformer, name, table)

        generator = torch.Generator(device).manual_seed(_INIT_SEED)
        for module in transformer.modules():
            for name, parameter in module.named_parameters(recurse=False):
                values = torch.empty(parameter.shape, dtype=torch.float32, device=device)
                weight = module.get_parameter("weight")
                if weight.ndim > 1:
                    bound = weight[0].numel() ** -0.5
                    values.uniform_(-bound, bound, generator=generator)
                else:  # a norm
                    values.fill_(1.0 if name == "weight" else 0.0)
                setattr(module, name, nn.Parameter(values.to(dtype)))
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(dtype))
        return transformer.eval()


def network_dtype(transformer: nn.Module) -> torch.dtype:
    """The dtype that a transformer computes in."""
    return next(parameter.dtype for parameter in transformer.parameters() if parameter.is_floating_point())
