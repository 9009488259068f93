"""What the backbones of all families do alike: open the roles' pipelines, check that their parts fit, load, export, encode
prompts and decode latents. A family adds how its network is called, its text encoders and its time grids.
"""

from __future__ import annotations

import hashlib
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from dpdmd.backbones.pipeline import PIPELINE_CLASSES, PipelineFolder
from dpdmd.config import ConfigError, ModelConfig
from dpdmd.diffusion import Flow
from dpdmd.files import disk_errors, follow_umask

Role = Literal["teacher", "student", "critic"]
EncodePrompt = Callable[[list[str]], tuple[Tensor, Tensor]]

# Of every published model that a family knows by name.
_KNOWN_VAE_SCALE, _KNOWN_VAE_CHANNELS = 8, 16
_CLIP_LENGTH = 77
_LONGEST_T5 = 512  # the stock pipelines refuse more
_INIT_SEED = 0


class Backbone(ABC):
    """The backbone of one run: three roles on one VAE, one scheduler and one set of text encoders (the teacher's).

    Constructing it reads configuration files alone. Raises ConfigError, naming the setting and the file, for a pipeline
    that is absent, incomplete, of another class or pickled, for roles that do not fit each other, the text encoders or
    the VAE, and for a resolution that the transformer cannot take.

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
            self._architectures[role] = (
                dict(self.known[name]) if pipeline is None else self._read_architecture(pipeline)
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
                each.check_weights("transformer")
            for component in ("vae", *self._text_encoders):
                pipeline.check_weights(component)

        teacher = self._architectures["teacher"]
        self.text_shapes = {
            "prompt_embeds": (self._text_length(clip_length), teacher["joint_attention_dim"]),
            "pooled_prompt_embeds": (teacher["pooled_projection_dim"],),
        }
        side = config.resolution // self._vae_scale
        self.latent_shape = (vae_channels, side, side)
        self.diffusion = self._flow(pipeline)

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

    def load_transformer(self, role: Role, dtype: torch.dtype, device: torch.device | str = "cpu") -> nn.Module:
        """The role's transformer on `device`, in eval mode, its parameters requiring gradients.

        Under random_init the weights are drawn in float32 on `device`, the same for each role, and rounded to dtype; a
        CPU and a CUDA device draw different ones.
        """
        if self.config.random_init:
            return self._random_transformer(self._architectures[role], dtype, torch.device(device))
        pipeline = self._pipelines[role]
        pipeline.weights("transformer")
        return self._read_transformer(pipeline.path / "transformer", dtype, str(pipeline)).to(device)

    def load_exported(self, folder: str | Path, dtype: torch.dtype, device: torch.device | str = "cpu") -> nn.Module:
        """A transformer that `export` wrote, in eval mode. Raises ConfigError where it does not fit this pipeline."""
        transformer = self._read_transformer(Path(folder), dtype, f"student folder {str(folder)!r}")
        teacher = self._architectures["teacher"]
        for name in self.common:
            if transformer.config[name] != teacher[name]:
                raise ConfigError(
                    f"student folder {str(folder)!r} has {name} = {transformer.config[name]}, but the pipeline "
                    f"{self.config.pipeline!r} has {teacher[name]}: it is not the one that the student was made from"
                )
        return transformer.to(device)

    def load_text(self, device: torch.device | str, dtype: torch.dtype) -> TextEncoders | RandomText:
        """What encodes prompts: the pipeline's own encoders; under random_init numbers drawn from the prompt."""
        if self.config.random_init:
            return RandomText(self.text_shapes, device, dtype)
        parts = _read_text(self._pipelines["teacher"], self._text_encoders, device, dtype)
        return TextEncoders(self._encode_prompt(parts, torch.device(device)))

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
        with torch.device("meta"):
            transformer = self._class.from_config(self._architectures[role])
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

    def _read_architecture(self, pipeline: PipelineFolder) -> dict[str, Any]:
        pipeline.require("transformer", self.transformer_class)
        arguments = inspect.signature(self._class.__init__).parameters.values()
        defaults = {argument.name: argument.default for argument in arguments if argument.name != "self"}
        # Older folders lack the settings that came later; their defaults are what those models were made with.
        values = {name: value for name, value in pipeline.read("transformer").items() if name in defaults}
        architecture = {**defaults, **values}
        for name, value in architecture.items():
            if isinstance(value, list):
                architecture[name] = tuple(value)
        if architecture["out_channels"] is None:
            architecture["out_channels"] = architecture["in_channels"]
        return architecture

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
                t5 = T5Config.from_dict(pipeline.read(encoder))
            else:
                clips.append(CLIPTextConfig.from_dict(pipeline.read(encoder)))
        self._check_widths(pipeline, clips, t5)
        length = int(pipeline.read("tokenizer", "tokenizer_config.json").get("model_max_length", _CLIP_LENGTH))
        positions = min(clip.max_position_embeddings for clip in clips)
        if length > positions:
            raise ConfigError(
                f"{pipeline}: tokenizer/tokenizer_config.json has model_max_length = {length}, but the text encoders "
                f"have positions for {positions} tokens"
            )
        return length

    def _name(self, role: str) -> str:
        return getattr(self.config, role, None) or self.config.pipeline

    def _read_transformer(self, folder: Path, dtype: torch.dtype, what: str) -> nn.Module:
        transformer, info = self._class.from_pretrained(
            folder, torch_dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
        wrong = {kind: names for kind, names in info.items() if names}
        if wrong:
            raise ConfigError(f"{what}: the weights in {folder} do not fit its config: {wrong}")
        return transformer

    def _random_transformer(self, architecture: dict[str, Any], dtype: torch.dtype, device: torch.device) -> nn.Module:
        """Weights as torch draws them by default, but one at a time: a float32 copy of the whole never exists."""
        with torch.device("meta"):
            transformer = self._class.from_config(architecture)
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


def read_scheduler(pipeline: PipelineFolder):
    """The pipeline's FlowMatchEulerDiscreteScheduler. Raises ConfigError for another class."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    pipeline.require("scheduler", "FlowMatchEulerDiscreteScheduler")
    return FlowMatchEulerDiscreteScheduler.from_config(pipeline.read("scheduler", "scheduler_config.json"))


def _read_vae(pipeline: PipelineFolder) -> tuple[int, int]:
    """(pixels a latent, latent channels)"""
    pipeline.require("vae", "AutoencoderKL")
    config = pipeline.read("vae")
    for name in ("block_out_channels", "latent_channels", "scaling_factor", "shift_factor"):
        if config.get(name) is None:
            raise ConfigError(f"{pipeline}: vae/config.json has no {name}, which the stock pipeline decodes with")
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
        tokenizer_class = getattr(transformers, pipeline.component_class(tokenizer))
        parts[tokenizer] = tokenizer_class.from_pretrained(pipeline.path / tokenizer, local_files_only=True)
        pipeline.weights(encoder)
        model = getattr(transformers, encoder_class).from_pretrained(
            pipeline.path / encoder, dtype=dtype, use_safetensors=True, local_files_only=True
        )
        parts[encoder] = model.eval().requires_grad_(False).to(device)
    return parts


class TextEncoders:
    """The pipeline's text encoders, through the stock encode_prompt."""

    def __init__(self, encode_prompt: EncodePrompt):
        self._encode_prompt = encode_prompt

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> dict[str, Tensor]:
        """{"prompt_embeds": (B, L, D), "pooled_prompt_embeds": (B, P)} on the encoders' device and in their dtype."""
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

        pipeline.weights("vae")
        vae = AutoencoderKL.from_pretrained(
            pipeline.path / "vae", torch_dtype=torch.float32, use_safetensors=True, local_files_only=True
        )
        self._vae = vae.eval().requires_grad_(False).to(device)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """latents (B, C, H, W) -> images (B, 3, scale H, scale W) float32 in [0, 1], on the VAE's device."""
        config = self._vae.config
        latents = latents.to(self._vae.device, torch.float32)
        images = self._vae.decode(latents / config.scaling_factor + config.shift_factor, return_dict=False)[0]
        return (images * 0.5 + 0.5).clamp(0, 1)
