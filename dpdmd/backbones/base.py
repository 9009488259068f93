"""What the backbones of all families do alike: open the roles' pipelines, check that their parts fit, load, export.

Text encoders, VAE and folder are parts of their own (text.py, vae.py, pipeline.py), which a family picks in its `Family`.
It adds how its network is called and its prompts are encoded, and its noise process.
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
from dpdmd.backbones.text import (
    CLIP_LENGTH,
    Clip,
    EncodePrompt,
    RandomText,
    TextEncoders,
    clip_length,
    read_configs,
    read_parts,
)
from dpdmd.backbones.vae import Decoder
from dpdmd.config import Config, ConfigError, ModelConfig
from dpdmd.diffusion import LATEST, NoiseProcess
from dpdmd.files import disk_errors, follow_umask

Role = Literal["teacher", "student", "critic"]

_INIT_SEED = 0
# Whole numbers of an architecture that cannot be meant, and would build layers or tables without end; of others 2^20.
_MOST = {"num_layers": MOST_LAYERS, "num_single_layers": MOST_LAYERS, "pos_embed_max_size": 1024}


class Backbone(ABC):
    """The backbone of one run: three roles on one VAE, one scheduler and one set of text encoders (the teacher's).

    Constructing it reads configuration files alone. Raises ConfigError, naming the setting and the file, for a pipeline
    that is absent, incomplete, of another class or pickled, for files of weights that are git-lfs pointers, for roles that
    do not fit each other, the text encoders or the VAE, and for a resolution that the transformer cannot take.
    `check_weights` looks further, and what loads weights raises ConfigError for numbers that are not finite too.

    config.revision is that of config.pipeline; student and critic from another hub id come from its default branch.
    Under random_init nothing but configuration is ever read: random weights, random (but repeatable) text embeddings,
    no decoder; and for a name that the family knows no file at all.

    teacher: config.pipeline, where it has been opened. config: as given, with what the family decides (`resolved`).
    diffusion: the noise process, on the teacher's scheduler. latent_shape: (C, H, W) or (C, F, H, W) at
    config.resolution. folder: the teacher's, None where there is none. text_shapes: {name: shape} of one prompt's
    encoding, without the batch.
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
        self._pipelines: dict[str, PipelineFolder] = {}  # by role; without those whose settings the family knows
        self._architectures: dict[str, dict[str, Any]] = {}
        opened: dict[str, PipelineFolder | None] = {} if teacher is None else {config.pipeline: teacher}
        for role, key, name in (
            ("teacher", "model.pipeline", config.pipeline),
            ("student", "model.student", config.student or config.pipeline),
            ("critic", "model.critic", config.critic or config.pipeline),
        ):
            if name not in opened:
                opened[name] = self._open(key, name)
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
        text = self.family.text
        self._text = [
            each for each in text if not each.optional or (pipeline and pipeline.component_class(each.component))
        ]
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
        side = config.resolution // self._vae_scale
        self.latent_shape = self._latent_shape(vae_channels, side)
        self.diffusion = self._make_process(pipeline)

    # What a family adds

    @abstractmethod
    def predict(
        self, transformer, x: Tensor, t: Tensor, cond: dict[str, Tensor], dtype: torch.dtype | None = None
    ) -> Tensor:
        """The prediction (B, *latent_shape) that the noise process is for, in the transformer's dtype.

        transformer: one of `load_transformer`'s or what wraps one and is called alike (DeepSpeedEngine, compiled
        module). x (B, *latent_shape) and cond {name: (B, *text_shapes[name])} of any dtype; t (B,) float32, a time of the
        noise process. dtype: the transformer's, for one without parameters to ask.
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
        """Raises ConfigError where the transformer is made for other embeddings than the text encoders'.

        encoders: {component: settings} of those that are there.
        """

    @abstractmethod
    def _text_shapes(self, clip_length: int) -> dict[str, tuple[int, ...]]:
        """text_shapes, where CLIP's tokenizer makes clip_length tokens."""

    @abstractmethod
    def _encode_prompt(self, parts: dict[str, Any], device: torch.device) -> EncodePrompt:
        """What encodes B prompts, as the stock pipeline does, with its tokenizers and text encoders `parts`: a function to
        {name: (B, *text_shapes[name])}."""

    @abstractmethod
    def _process(self, scheduler, where: str) -> NoiseProcess:
        """The noise process of the teacher's scheduler at config.resolution. where: begins the message of a ConfigError."""

    def _latent_shape(self, channels: int, side: int) -> tuple[int, ...]:
        return (channels, side, side)

    def _tables(self, architecture: dict[str, Any]) -> dict[str, nn.Module]:
        """The transformer's children that hold buffers which are computed and not drawn, on the default device."""
        return {}

    # What all have

    @property
    def block_classes(self) -> tuple[type[nn.Module], ...]:
        """Classes of the transformer blocks."""
        return self.family.block_classes

    @property
    def pipeline_guidance_scale(self) -> float:
        """The `guidance_scale` to call a stock pipeline with that samples the student."""
        return self.config.embedded_guidance if self.takes_guidance else self.family.guidance.counted(1.0)

    def resolved(self, config: Config) -> Config:
        """A run's configuration with what the family decides: its name is there, and where it has no fused operations
        they are off."""
        decided = {name: getattr(self.config, name) for name in ("family", "fuse")}
        return config.model_copy(update={"model": config.model.model_copy(update=decided)})

    def transformer_config(self, role: Role) -> dict[str, Any]:
        """Every argument of the transformer's class, as the role's pipeline has it."""
        return dict(self._architectures[role])

    def check_weights(self) -> None:
        """Reads the headers of all weights that are here, which takes a second where loading them takes minutes.

        Raises ConfigError, naming setting and file, for files that are cut off or damaged, hold other numbers than floats,
        or (the transformers') lack tensors of the configuration's, or have others or of other shapes.
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
        """What a student learns from: of the teacher's transformer and text encoders hex digests, as
        `PipelineFolder.weights_fingerprint` says, and the settings of its scheduler. Weights on the hub are downloaded for
        it. Empty under random_init."""
        if self.config.random_init:
            return {}
        pipeline = self._pipelines["teacher"]
        scheduler = pipeline.read("scheduler", "scheduler_config.json")
        return {
            "scheduler": {name: value for name, value in scheduler.items() if not name.startswith("_")},
            **{name: self.weights_fingerprint(name) for name in ("transformer", *self._text_encoders)},
        }

    def weights_fingerprint(self, component: str) -> str | None:
        """Hex digest of the weights of one of the teacher's components; None under random_init."""
        if self.config.random_init:
            return None
        return self._pipelines["teacher"].weights_fingerprint(component)[:24]

    def empty_transformer(self, role: Role) -> nn.Module:
        """The role's transformer without memory: on the meta device."""
        return self._build(self._architectures[role])

    def load_transformer(self, role: Role, dtype: torch.dtype, device: torch.device | str = "cpu") -> nn.Module:
        """The role's transformer on `device`, in eval mode, its parameters requiring gradients.

        Under random_init the weights are drawn in float32 on `device`, the same for each role, and rounded to dtype; a
        CPU and a CUDA device draw different ones.
        """
        if self.config.random_init:
            return self._random_transformer(self._architectures[role], dtype, torch.device(device))
        pipeline = self._pipelines[role]
        weights = pipeline.weights("transformer")
        return self._read_transformer(
            pipeline.path / "transformer",
            weights,
            self._architectures[role],
            dtype,
            device,
            f"{pipeline}: transformer",
        )

    def load_exported(self, folder: str | Path, dtype: torch.dtype, device: torch.device | str = "cpu") -> nn.Module:
        """A transformer that `export` wrote, in eval mode. Raises ConfigError where it does not fit this pipeline."""
        folder = Path(folder)
        what = f"student folder {str(folder)!r}"
        settings = read_json(folder / "config.json", what)
        if (found := settings.get("_class_name")) != (needed := self.family.transformer_name):
            raise ConfigError(f"{what} holds a {found}; the {needed} of a finished run is needed")
        student, teacher = self._read_architecture(settings, f"{what}: config.json"), self._architectures["teacher"]
        for name in self.family.common:
            if student[name] != teacher[name]:
                raise ConfigError(
                    f"{what} has {name} = {student[name]}, but the pipeline "
                    f"{self.config.pipeline!r} has {teacher[name]}: it is not the one that the student was made from"
                )
        weights = find_weights(folder, "diffusion_pytorch_model", what)
        return self._read_transformer(folder, weights, student, dtype, device, what)

    def load_text(self, device: torch.device | str, dtype: torch.dtype) -> TextEncoders | RandomText:
        """What encodes prompts: the pipeline's own encoders; under random_init numbers drawn from the prompt."""
        if self.config.random_init:
            return RandomText(self.text_shapes, device, dtype)
        parts = read_parts(self._pipelines["teacher"], self._text, device, dtype)
        return TextEncoders(self._encode_prompt(parts, torch.device(device)), str(self._pipelines["teacher"]))

    @cached_property
    def text_key(self) -> str:
        """Names what embeddings depend on beside prompt and dtype: encoders and tokenizers by content, and the length.

        Files are hashed as `PipelineFolder.fingerprint` says. Weights on the hub are downloaded for it.
        """
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
        """Writes a stock diffusers transformer folder: config.json and safetensors, sharded where large.

        state_dict: the whole transformer's, on the CPU; every tensor keeps its dtype. Raises ValueError when its names
        or shapes are not the role's, OSError where the folder cannot be written.
        """
        transformer = self._build(self._architectures[role])
        try:
            transformer.load_state_dict(state_dict, assign=True)
        except RuntimeError as error:
            raise ValueError(f"this is not the state of the {role}'s transformer: {error}") from error
        with disk_errors(folder, sum(tensor.nbytes for tensor in state_dict.values())):
            Path(folder).mkdir(parents=True, exist_ok=True)  # save_pretrained returns without a word where it cannot
            transformer.save_pretrained(folder, safe_serialization=True)
            follow_umask(folder)

    @property
    def _class(self) -> Any:
        return self.family.transformer_class

    @property
    def _text_encoders(self) -> list[str]:
        """The teacher's, those that there are."""
        return [encoder.component for encoder in self._text]

    def _open(self, key: str, name: str) -> PipelineFolder | None:
        if self.config.random_init and name in self.family.known and not Path(name).is_dir():
            return None
        revision = self.config.revision if name == self.config.pipeline else None
        return PipelineFolder(key, name, [self.family], revision)

    def _read_architecture(self, settings: dict[str, Any], what: str) -> dict[str, Any]:
        """Every argument of the transformer's class, from its config.json, which `what` names. Raises ConfigError."""
        arguments = inspect.signature(self._class.__init__).parameters.values()
        defaults = {argument.name: argument.default for argument in arguments if argument.name != "self"}
        # Older folders lack the settings that came later; their defaults are what those models were made with.
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
        with reading(what):  # Whoever builds it later has no need to ask whether it can be built.
            self._build(architecture)
        return architecture

    def _build(self, architecture: dict[str, Any]) -> Any:
        """`empty_transformer` of any architecture: a diffusers model."""
        with torch.device("meta"):
            return self._class.from_config(architecture)

    def _check_transformer(self, shapes: dict[str, tuple[int, ...]], architecture: dict[str, Any], what: str) -> None:
        transformer = self._build(architecture)
        check_fit(shapes, {name: tensor.shape for name, tensor in transformer.state_dict().items()}, what)

    def _check_roles(self, vae_channels: int) -> None:
        teacher = self._architectures["teacher"]
        for role, architecture in self._architectures.items():
            whose = f"the {role}'s transformer ({self._name(role)})"
            for name in self.family.common:
                if architecture[name] != teacher[name]:
                    raise ConfigError(
                        f"model.{role}: {whose} has {name} = {architecture[name]}, but the teacher's "
                        f"({self._name('teacher')}) has {teacher[name]}: all roles are given the same inputs"
                    )
            if architecture["out_channels"] != architecture["in_channels"]:
                raise ConfigError(
                    f"{whose} has out_channels = {architecture['out_channels']}, but in_channels = "
                    f"{architecture['in_channels']}: a velocity has the channels of its latents"
                )
        channels = vae_channels * self.family.packing**2
        if channels != teacher["in_channels"]:
            raise ConfigError(
                f"model.pipeline = {self.config.pipeline!r}: vae/config.json has latent_channels = {vae_channels}, but "
                f"transformer/config.json has in_channels = {teacher['in_channels']}; {channels} would fit"
            )

    def _check_resolution(self) -> None:
        resolution = self.config.resolution
        patch = math.lcm(*(_patch(each["patch_size"]) for each in self._architectures.values()))
        unit = self._vae_scale * self.family.packing * patch
        if resolution % unit:
            below = resolution // unit * unit
            nearest = f"{below} and {below + unit} are the nearest that would do" if below else f"{unit} would do"
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
        configs = read_configs(pipeline, self._text)
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
        with pipeline.reading("scheduler", "scheduler_config.json"):
            flow = self._process(read_scheduler(pipeline), str(pipeline))
        for times in (flow.train_times, flow.renoise_times):
            # From noise, at 1, towards the data.
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
        """Weights as torch draws them by default, but one at a time: a float32 copy of the whole never exists."""
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
    """What a transformer computes in."""
    return next(parameter.dtype for parameter in transformer.parameters() if parameter.is_floating_point())


def _patch(size: int | tuple[int, ...]) -> int:
    """Latents a side of a patch."""
    return size if isinstance(size, int) else size[-1]


def read_scheduler(pipeline: PipelineFolder):
    """The pipeline's FlowMatchEulerDiscreteScheduler."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    settings = pipeline.read("scheduler", "scheduler_config.json")
    where = f"{pipeline}: scheduler/scheduler_config.json"
    kinds = typing.get_type_hints(FlowMatchEulerDiscreteScheduler.__init__)
    kinds["num_train_timesteps"] = typing.Annotated[int, pydantic.Field(ge=2, le=2**20)]
    kinds["shift_terminal"] = float | None  # which diffusers declares as float = None
    for name in (name for name in kinds if name in settings):
        check_setting(name, settings[name], kinds[name], where)
    if settings.get("stochastic_sampling"):
        raise ConfigError(
            f"{where} has stochastic_sampling = true: its steps would add noise, and those of the teacher that is distilled here "
            "do not; set it to false"
        )
    return FlowMatchEulerDiscreteScheduler.from_config(settings)
