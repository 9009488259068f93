"""What the backbones of all families do alike: open the roles' pipelines, check that their parts fit, load, export, encode
prompts and decode latents. A family adds how its network is called, its text encoders and its time grids.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import pydantic
import torch
from torch import Tensor, nn

from dpdmd.backbones.files import (
    Weights,
    check_finite,
    check_fit,
    find_weights,
    read_json,
    read_shapes,
    reading,
    refuse_misfits,
)
from dpdmd.backbones.pipeline import PIPELINE_CLASSES, PipelineFolder
from dpdmd.config import ConfigError, ModelConfig
from dpdmd.diffusion import LATEST, Flow
from dpdmd.files import disk_errors, follow_umask

Role = Literal["teacher", "student", "critic"]
EncodePrompt = Callable[[list[str]], tuple[Tensor, Tensor]]

# Of every published model that a family knows by name.
_KNOWN_VAE_SCALE, _KNOWN_VAE_CHANNELS = 8, 16
_CLIP_LENGTH = 77
_LONGEST_T5 = 512  # the stock pipelines refuse more
_INIT_SEED = 0
# Whole numbers of an architecture that cannot be meant, and would build layers or tables without end; of others 2^20.
_MOST = {"num_layers": 1024, "num_single_layers": 1024, "pos_embed_max_size": 1024}
_NumLayers = typing.Annotated[int, pydantic.Field(ge=0, le=_MOST["num_layers"])]


class Backbone(ABC):
    """The backbone of one run: three roles on one VAE, one scheduler and one set of text encoders (the teacher's).

    Constructing it reads configuration files alone. Raises ConfigError, naming the setting and the file, for a pipeline
    that is absent, incomplete, of another class or pickled, for files of weights that are git-lfs pointers, for roles that
    do not fit each other, the text encoders or the VAE, and for a resolution that the transformer cannot take.
    `check_weights` looks further, and what loads weights raises ConfigError for numbers that are not finite too.

    config.revision is that of config.pipeline; student and critic from another hub id come from its default branch.
    Under random_init nothing but configuration is ever read: random weights, random (but repeatable) text embeddings,
    no decoder; and for a name that the family knows no file at all.

    diffusion: Flow on the teacher's scheduler. latent_shape: (C, H, W) at config.resolution. folder: the teacher's,
    None where there is none. text_shapes: of one prompt's embeddings, without the batch.
    """

    family: ClassVar[str]  # as model.family names it
    transformer_class: ClassVar[str]  # its name in diffusers
    known: ClassVar[dict[str, dict[str, Any]]]  # architectures that random_init builds where their files are not
    common: ClassVar[tuple[str, ...]]  # settings of the transformer that all roles must have alike
    optional: ClassVar[tuple[str, ...]] = ()  # settings that may be null, whatever the transformer's class says
    packing: ClassVar[int] = 1  # the pipeline makes one pixel of the network's input of packing x packing latents

    def __init__(self, config: ModelConfig):
        self.config = config
        self._pipelines: dict[str, PipelineFolder | None] = {}
        self._architectures: dict[str, dict[str, Any]] = {}
        opened: dict[str, PipelineFolder | None] = {}
        for role, key, name in (
            ("teacher", "model.pipeline", config.pipeline),
            ("student", "model.student", config.student or config.pipeline),
            ("critic", "model.critic", config.critic or config.pipeline),
        ):
            if name not in opened:
                opened[name] = self._open(key, name)
            self._pipelines[role] = pipeline = opened[name]
            if pipeline is None:
                self._architectures[role] = dict(self.known[name])
            else:
                pipeline.require("transformer", self.transformer_class)
                self._architectures[role] = self._read_architecture(
                    pipeline.read("transformer"), f"{pipeline}: transformer/config.json"
                )

        pipeline = self._pipelines["teacher"]
        self.folder = None if pipeline is None else pipeline.path
        self._vae_scale, vae_channels = (
            (_KNOWN_VAE_SCALE, _KNOWN_VAE_CHANNELS) if pipeline is None else _read_vae(pipeline)
        )
        self._check_roles(vae_channels)
        self._check_resolution()
        clip_length = _CLIP_LENGTH
        if not config.random_init:
            clip_length = self._check_text(pipeline)
            for each in opened.values():
                if each.is_local:
                    each.weights("transformer")
            if pipeline.is_local:
                for component in ("vae", *self._text_encoders):
                    pipeline.weights(component)
            for encoder in self._text_encoders:
                pipeline.check_tokenizer(_tokenizer(encoder))

        teacher = self._architectures["teacher"]
        self.text_shapes = {
            "prompt_embeds": (self._text_length(clip_length), teacher["joint_attention_dim"]),
            "pooled_prompt_embeds": (teacher["pooled_projection_dim"],),
        }
        side = config.resolution // self._vae_scale
        self.latent_shape = (vae_channels, side, side)
        self.diffusion = self._make_flow(pipeline)

    # What a family adds

    @property
    @abstractmethod
    def block_classes(self) -> tuple[type[nn.Module], ...]:
        """Classes of the transformer blocks: the units of ZeRO-3 gathering and of activation checkpointing."""

    @abstractmethod
    def predict(
        self, transformer, x: Tensor, t: Tensor, cond: dict[str, Tensor], dtype: torch.dtype | None = None
    ) -> Tensor:
        """The velocity (B, C, H, W), in the transformer's dtype.

        transformer: one of `load_transformer`'s or what wraps one and is called alike (DeepSpeedEngine, compiled
        module). x (B, C, H, W) and cond {"prompt_embeds": (B, L, D), "pooled_prompt_embeds": (B, P)} of any dtype;
        t (B,) float32 in [0, 1]. dtype: the transformer's, for one without parameters to ask.
        """

    @abstractmethod
    def attention_shapes(self) -> list[tuple[int, int]]:
        """(head dimension, tokens) of every attention in the roles' networks at config.resolution, each once, sorted."""

    @property
    def pipeline_guidance_scale(self) -> float:
        """The `guidance_scale` to call a stock pipeline with that samples the student."""
        return 1.0

    @property
    @abstractmethod
    def _text_encoders(self) -> dict[str, str]:
        """The teacher's text encoders, each with the class it must be of; text_encoder_2 has tokenizer_2."""

    @abstractmethod
    def _check_widths(self, pipeline: PipelineFolder, clips: list, t5) -> None:
        """Raises ConfigError where the transformer is made for other embeddings than the text encoders'.

        clips: the CLIPTextConfig of each CLIP encoder; t5: the T5Config, None without T5.
        """

    @abstractmethod
    def _text_length(self, clip_length: int) -> int:
        """L of prompt_embeds (L, D), where CLIP's tokenizer makes clip_length tokens."""

    @abstractmethod
    def _encode_prompt(self, parts: dict[str, Any], device: torch.device) -> EncodePrompt:
        """The stock pipeline's encode_prompt of B prompts, on its tokenizers and text encoders `parts`, as a function to
        (prompt_embeds (B, L, D), pooled_prompt_embeds (B, P))."""

    @abstractmethod
    def _flow(self, pipeline: PipelineFolder | None) -> Flow:
        """The time grids of the teacher's scheduler at config.resolution; pipeline None: a known model's."""

    def _tables(self, architecture: dict[str, Any]) -> dict[str, nn.Module]:
        """The transformer's children that hold buffers which are computed and not drawn, on the default device."""
        return {}

    # What all have

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
        if (found := settings.get("_class_name")) != self.transformer_class:
            raise ConfigError(f"{what} holds a {found}; the {self.transformer_class} of a finished run is needed")
        student, teacher = self._read_architecture(settings, f"{what}: config.json"), self._architectures["teacher"]
        for name in self.common:
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
        parts = _read_text(self._pipelines["teacher"], self._text_encoders, device, dtype)
        return TextEncoders(self._encode_prompt(parts, torch.device(device)), str(self._pipelines["teacher"]))

    @cached_property
    def text_key(self) -> str:
        """Names what embeddings depend on beside prompt and dtype: encoders and tokenizers by content, and the length.

        Files are hashed as `PipelineFolder.fingerprint` says. Weights on the hub are downloaded for it.
        """
        (length, width), (pooled,) = self.text_shapes.values()
        if self.config.random_init:
            return f"random-{length}x{width}-{pooled}"
        tokenizers = [_tokenizer(encoder) for encoder in self._text_encoders]
        return f"{self._pipelines['teacher'].fingerprint([*self._text_encoders, *tokenizers])[:24]}-{length}x{width}"

    def load_decoder(self, device: torch.device | str) -> Decoder:
        """The VAE in float32. Raises ConfigError under random_init."""
        if self.config.random_init:
            raise ConfigError("model.random_init = true: there is no VAE, so latents cannot be decoded to images")
        return Decoder(self._pipelines["teacher"], device)

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
    def _class(self) -> type[nn.Module]:
        import diffusers

        return getattr(diffusers, self.transformer_class)

    def _open(self, key: str, name: str) -> PipelineFolder | None:
        if self.config.random_init and name in self.known and not Path(name).is_dir():
            return None
        revision = self.config.revision if name == self.config.pipeline else None
        return PipelineFolder(key, name, PIPELINE_CLASSES[self.family], revision)

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
            if value is None and name in self.optional:
                continue
            check_setting(name, value, kinds.get(name, Any), what)
            if type(value) is int and value > (most := _MOST.get(name, 2**20)):
                raise ConfigError(f"{what} has {name} = {value}, where at most {most} makes sense")
            if isinstance(value, list):
                architecture[name] = tuple(value)
        with reading(what):  # Whoever builds it later has no need to ask whether it can be built.
            self._build(architecture)
        return architecture

    def _build(self, architecture: dict[str, Any]) -> nn.Module:
        """`empty_transformer` of any architecture."""
        with torch.device("meta"):
            return self._class.from_config(architecture)

    def _check_transformer(self, shapes: dict[str, tuple[int, ...]], architecture: dict[str, Any], what: str) -> None:
        transformer = self._build(architecture)
        check_fit(shapes, {name: tensor.shape for name, tensor in transformer.state_dict().items()}, what)

    def _check_roles(self, vae_channels: int) -> None:
        teacher = self._architectures["teacher"]
        for role, architecture in self._architectures.items():
            whose = f"the {role}'s transformer ({self._name(role)})"
            for name in self.common:
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
        channels = vae_channels * self.packing**2
        if channels != teacher["in_channels"]:
            raise ConfigError(
                f"model.pipeline = {self.config.pipeline!r}: vae/config.json has latent_channels = {vae_channels}, but "
                f"transformer/config.json has in_channels = {teacher['in_channels']}; {channels} would fit"
            )

    def _check_resolution(self) -> None:
        resolution = self.config.resolution
        patch = math.lcm(*(each["patch_size"] for each in self._architectures.values()))
        unit = self._vae_scale * self.packing * patch
        if resolution % unit:
            below = resolution // unit * unit
            nearest = f"{below} and {below + unit} are the nearest that would do" if below else f"{unit} would do"
            raise ConfigError(
                f"model.resolution = {resolution}: must be a multiple of {unit} (VAE scale times patch); {nearest}"
            )

    def _check_text(self, pipeline: PipelineFolder) -> int:
        """Checks encoders and tokenizers against the transformer; returns how many tokens CLIP's tokenizer makes."""
        from transformers import CLIPTextConfig, T5Config

        if self.config.max_sequence_length > _LONGEST_T5:
            raise ConfigError(
                f"model.max_sequence_length = {self.config.max_sequence_length}: "
                f"the stock pipeline takes {_LONGEST_T5} tokens at most"
            )
        for encoder, encoder_class in self._text_encoders.items():
            pipeline.require(encoder, encoder_class)
            pipeline.require(_tokenizer(encoder))

        # Through the classes: transformers leaves out of config.json what equals its defaults.
        clips, t5 = [], None
        for encoder, encoder_class in self._text_encoders.items():
            if encoder_class == "T5EncoderModel":
                config_class, widths = T5Config, ("d_model", "vocab_size")
            else:
                config_class = CLIPTextConfig
                widths = ("hidden_size", "projection_dim", "max_position_embeddings", "vocab_size")
            settings = pipeline.read(encoder)
            with pipeline.reading(encoder):
                made = config_class.from_dict(settings)
            where = f"{pipeline}: {encoder}/config.json"
            for name in widths:
                check_setting(name, getattr(made, name), int, where)
            layers = "num_layers" if config_class is T5Config else "num_hidden_layers"
            check_setting(layers, getattr(made, layers), _NumLayers, where)
            if config_class is T5Config:
                t5 = made
            else:
                clips.append(made)
        self._check_widths(pipeline, clips, t5)
        length = pipeline.read("tokenizer", "tokenizer_config.json").get("model_max_length", _CLIP_LENGTH)
        if isinstance(length, float) and length.is_integer():  # transformers' own way to write that there is no limit
            length = int(length)
        check_setting("model_max_length", length, int, f"{pipeline}: tokenizer/tokenizer_config.json")
        positions = min(clip.max_position_embeddings for clip in clips)
        if length > positions:
            raise ConfigError(
                f"{pipeline}: tokenizer/tokenizer_config.json has model_max_length = {length}, but the text encoders "
                f"have positions for {positions} tokens"
            )
        return length

    def _name(self, role: str) -> str:
        return getattr(self.config, role, None) or self.config.pipeline

    def _make_flow(self, pipeline: PipelineFolder | None) -> Flow:
        if pipeline is None:
            return self._flow(None)
        pipeline.require("scheduler", "FlowMatchEulerDiscreteScheduler")
        with pipeline.reading("scheduler", "scheduler_config.json"):
            flow = self._flow(pipeline)
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
                weight = module.weight
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


def check_setting(name: str, value: Any, kind: Any, what: str) -> None:
    """Raises ConfigError, which begins with `what`, unless a value from a JSON file is of a kind (a type or a union of
    types); a whole number has to be 1 or more."""
    if kind is int:
        kind = typing.Annotated[int, pydantic.Field(ge=1)]
    try:
        pydantic.TypeAdapter(kind).validate_json(json.dumps(value), strict=True)
    except pydantic.ValidationError as error:
        message = error.errors()[0]["msg"]
        raise ConfigError(f"{what} has {name} = {value!r}; {message[:1].lower()}{message[1:]}") from error


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


def _read_vae(pipeline: PipelineFolder) -> tuple[int, int]:
    """(pixels a latent, latent channels)"""
    from diffusers import AutoencoderKL

    pipeline.require("vae", "AutoencoderKL")
    config = pipeline.read("vae")
    kinds = {
        "block_out_channels": typing.Annotated[list[pydantic.PositiveInt], pydantic.Field(min_length=1)],
        "latent_channels": int,
        "scaling_factor": typing.Annotated[pydantic.FiniteFloat, pydantic.Field(gt=0)],
        "shift_factor": pydantic.FiniteFloat,
    }
    for name, kind in kinds.items():
        if config.get(name) is None:
            raise ConfigError(f"{pipeline}: vae/config.json has no {name}, which the stock pipeline decodes with")
        check_setting(name, config[name], kind, f"{pipeline}: vae/config.json")
    with pipeline.reading("vae"), torch.device("meta"):
        AutoencoderKL.from_config(config)
    return 2 ** (len(config["block_out_channels"]) - 1), config["latent_channels"]


def _tokenizer(encoder: str) -> str:
    return encoder.replace("text_encoder", "tokenizer")


def _read_text(
    pipeline: PipelineFolder, encoders: dict[str, str], device: torch.device | str, dtype: torch.dtype
) -> dict[str, Any]:
    """{component: tokenizer or text encoder}"""
    import transformers

    parts: dict[str, Any] = {}
    for encoder, encoder_class in encoders.items():
        tokenizer = _tokenizer(encoder)
        with reading(f"{pipeline}: {pipeline.path / tokenizer}"):
            tokenizer_class = getattr(transformers, pipeline.component_class(tokenizer))
            parts[tokenizer] = tokenizer_class.from_pretrained(pipeline.path / tokenizer, local_files_only=True)
            num_tokens = len(parts[tokenizer])
        parts[encoder] = _read_encoder(pipeline, encoder, getattr(transformers, encoder_class), device, dtype)
        rows = parts[encoder].get_input_embeddings().num_embeddings
        if num_tokens > rows:
            raise ConfigError(
                f"{pipeline}: its {tokenizer} makes {num_tokens} different tokens, but {encoder} knows {rows}"
            )
    return parts


def _read_encoder(
    pipeline: PipelineFolder, encoder: str, encoder_class, device: torch.device | str, dtype: torch.dtype
) -> nn.Module:
    from transformers.utils import logging

    folder, what = pipeline.path / encoder, f"{pipeline}: {encoder}"
    weights = pipeline.weights(encoder)
    read_shapes(weights, what)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its report of what does not fit is told here in one line
    try:
        with reading(f"{what} in {folder}"):
            model, info = encoder_class.from_pretrained(
                folder,
                dtype=dtype,
                variant=weights.variant,
                use_safetensors=True,
                local_files_only=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    finally:
        logging.set_verbosity(verbosity)
    # Tensors of other modules are those of a larger model, of which this is the encoder.
    modules = dict(model.named_children())
    besides = [name for name in info["unexpected_keys"] if name.split(".")[0] in modules]
    other = [name for name, *_ in info["mismatched_keys"]]
    refuse_misfits(f"{what} in {folder}", info["missing_keys"], besides, other)
    model = model.eval().requires_grad_(False).to(device)
    check_finite(model, f"{what}'s weights in {folder}")
    return model


class TextEncoders:
    """The pipeline's text encoders, through the stock encode_prompt; `what` names the pipeline in errors."""

    def __init__(self, encode_prompt: EncodePrompt, what: str):
        self._encode_prompt = encode_prompt
        self._what = what

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> dict[str, Tensor]:
        """{"prompt_embeds": (B, L, D), "pooled_prompt_embeds": (B, P)} on the encoders' device and in their dtype."""
        # Some settings of tokenizers and encoders are looked at here first.
        with reading(f"{self._what}: a prompt", " by its tokenizers and text encoders"):
            prompt_embeds, pooled_prompt_embeds = self._encode_prompt(prompts)
        return {"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled_prompt_embeds}


class RandomText:
    """Standard normal embeddings that depend on the prompt's text alone, on every device and in every process alike."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], device: torch.device | str, dtype: torch.dtype):
        self._shapes = shapes
        self._device = torch.device(device)
        self._dtype = dtype

    def encode(self, prompts: list[str]) -> dict[str, Tensor]:
        """As `TextEncoders.encode`."""
        generators = [torch.Generator().manual_seed(_prompt_seed(prompt)) for prompt in prompts]
        return {
            name: torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(
                self._device, self._dtype
            )
            for name, shape in self._shapes.items()
        }


def _prompt_seed(prompt: str) -> int:
    return int.from_bytes(hashlib.sha256(prompt.encode("utf-8")).digest()[:8], "little") >> 1


class Decoder:
    """The pipeline's VAE, in float32 on `device`."""

    def __init__(self, pipeline: PipelineFolder, device: torch.device | str):
        from diffusers import AutoencoderKL

        folder, what = pipeline.path / "vae", f"{pipeline}: vae"
        weights = pipeline.weights("vae")
        read_shapes(weights, what)
        with reading(f"{what} in {folder}"):
            vae, info = AutoencoderKL.from_pretrained(
                folder,
                torch_dtype=torch.float32,
                variant=weights.variant,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
            )
        refuse_misfits(f"{what} in {folder}", info["missing_keys"], info["unexpected_keys"], ())
        self._vae = vae.eval().requires_grad_(False).to(device)
        check_finite(self._vae, f"{what}'s weights in {folder}")

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """latents (B, C, H, W) -> images (B, 3, scale H, scale W) float32 in [0, 1], on the VAE's device."""
        config = self._vae.config
        latents = latents.to(self._vae.device, torch.float32)
        images = self._vae.decode(latents / config.scaling_factor + config.shift_factor, return_dict=False)[0]
        return (images * 0.5 + 0.5).clamp(0, 1)
