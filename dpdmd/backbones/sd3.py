"""Stable Diffusion 3 and 3.5: how to load the pipeline's parts, call the transformer, encode prompts, decode latents.

Everything stays what diffusers makes of it: the transformer is a stock SD3Transformer2DModel, embeddings come from
StableDiffusion3Pipeline.encode_prompt and images from its VAE, bit for bit. The network predicts the velocity
v = noise - x of z_t = (1 - t) x + t noise, and takes t as a timestep in [0, 1000].
"""

from __future__ import annotations

import hashlib
import inspect
import math
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dpdmd.backbones.pipeline import PipelineFolder
from dpdmd.config import ConfigError, ModelConfig
from dpdmd.diffusion import Flow

Role = Literal["teacher", "student", "critic"]


def _architecture(**values: Any) -> dict[str, Any]:
    shared = {
        "sample_size": 128,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "attention_head_dim": 64,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 2048,
    }
    return {**shared, **values}


# What random_init needs of the published models, so that a benchmark runs where their files are not.
KNOWN: dict[str, dict[str, Any]] = {
    "stabilityai/stable-diffusion-3.5-medium": _architecture(
        num_layers=24,
        num_attention_heads=24,
        caption_projection_dim=1536,
        pos_embed_max_size=384,
        dual_attention_layers=tuple(range(13)),
        qk_norm="rms_norm",
    ),
    "stabilityai/stable-diffusion-3.5-large": _architecture(
        num_layers=38,
        num_attention_heads=38,
        caption_projection_dim=2432,
        pos_embed_max_size=192,
        dual_attention_layers=(),
        qk_norm="rms_norm",
    ),
    "stabilityai/stable-diffusion-3-medium-diffusers": _architecture(
        num_layers=24,
        num_attention_heads=24,
        caption_projection_dim=1536,
        pos_embed_max_size=192,
        dual_attention_layers=(),
        qk_norm=None,
    ),
}
_KNOWN_SHIFT = 3.0
_KNOWN_VAE_SCALE = 8

_CLIP_LENGTH = 77
_LONGEST_T5 = 512  # the stock pipeline refuses more
_INIT_SEED = 0


class SD3:
    """The backbone of one run: three roles on one VAE, one scheduler and one set of text encoders (the teacher's).

    Constructing it reads configuration files alone. Raises ConfigError, naming the setting and the file, for a pipeline
    that is absent, incomplete, of another class or pickled, for roles that do not fit each other, the text encoders or
    the VAE, and for a resolution that the transformer cannot take.

    config.revision is that of config.pipeline; student and critic from another hub id come from its default branch.
    Under random_init nothing but configuration is ever read: random weights, random (but repeatable) text embeddings,
    no decoder; and for a name in KNOWN no file at all.

    diffusion: Flow on the teacher's scheduler. latent_shape: (C, H, W) at config.resolution. folder: the teacher's,
    None where there is none. text_shapes: of one prompt's embeddings, without the batch.
    """

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
            self._architectures[role] = dict(KNOWN[name]) if pipeline is None else _read_architecture(pipeline)

        pipeline = self._pipelines["teacher"]
        self.folder = None if pipeline is None else pipeline.path
        self._vae_scale, vae_channels = (_KNOWN_VAE_SCALE, 16) if pipeline is None else _read_vae(pipeline)
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
            "prompt_embeds": (clip_length + config.max_sequence_length, teacher["joint_attention_dim"]),
            "pooled_prompt_embeds": (teacher["pooled_projection_dim"],),
        }
        side = config.resolution // self._vae_scale
        self.latent_shape = (teacher["in_channels"], side, side)
        self.diffusion = Flow(_scheduler(pipeline))

    @property
    def block_classes(self) -> tuple[type[nn.Module], ...]:
        """Classes of the transformer blocks: the units of ZeRO-3 gathering and of activation checkpointing."""
        from diffusers.models.attention import JointTransformerBlock

        return (JointTransformerBlock,)

    def transformer_config(self, role: Role) -> dict[str, Any]:
        """Every argument of SD3Transformer2DModel, as the role's pipeline has it."""
        return dict(self._architectures[role])

    def load_transformer(self, role: Role, dtype: torch.dtype, device: torch.device | str = "cpu") -> nn.Module:
        """The role's SD3Transformer2DModel on `device`, in eval mode, its parameters requiring gradients.

        Under random_init the weights are drawn in float32 on `device`, the same for each role, and rounded to dtype; a
        CPU and a CUDA device draw different ones.
        """
        if self.config.random_init:
            return _random_transformer(self._architectures[role], dtype, torch.device(device))
        pipeline = self._pipelines[role]
        pipeline.weights("transformer")
        return _read_transformer(pipeline.path / "transformer", dtype, str(pipeline)).to(device)

    def load_exported(self, folder: str | Path, dtype: torch.dtype, device: torch.device | str = "cpu") -> nn.Module:
        """A transformer that `export` wrote, in eval mode. Raises ConfigError where it does not fit this pipeline."""
        transformer = _read_transformer(Path(folder), dtype, f"student folder {str(folder)!r}")
        teacher = self._architectures["teacher"]
        for name in ("in_channels", "joint_attention_dim", "pooled_projection_dim"):
            if transformer.config[name] != teacher[name]:
                raise ConfigError(
                    f"student folder {str(folder)!r} has {name} = {transformer.config[name]}, but the pipeline "
                    f"{self.config.pipeline!r} has {teacher[name]}: it is not the one that the student was made from"
                )
        return transformer.to(device)

    def predict(
        self, transformer, x: Tensor, t: Tensor, cond: dict[str, Tensor], dtype: torch.dtype | None = None
    ) -> Tensor:
        """The velocity (B, C, H, W), in the transformer's dtype.

        transformer: an SD3Transformer2DModel or what wraps one and is called alike (DeepSpeedEngine, compiled module).
        x (B, C, H, W) and cond {"prompt_embeds": (B, L, D), "pooled_prompt_embeds": (B, P)} of any dtype; t (B,)
        float32 in [0, 1]. dtype: the transformer's, for one without parameters to ask.
        """
        if dtype is None:
            dtype = next(parameter.dtype for parameter in transformer.parameters() if parameter.is_floating_point())
        return transformer(
            hidden_states=x.to(dtype),
            # Stays float32: the network makes its sines and cosines from it before it rounds.
            timestep=self.diffusion.timestep(t),
            encoder_hidden_states=cond["prompt_embeds"].to(dtype),
            pooled_projections=cond["pooled_prompt_embeds"].to(dtype),
            return_dict=False,
        )[0]

    def load_text(self, device: torch.device | str, dtype: torch.dtype) -> TextEncoders | RandomText:
        """What encodes prompts: the pipeline's own encoders; under random_init numbers drawn from the prompt."""
        if self.config.random_init:
            return RandomText(self.text_shapes, device, dtype)
        joint_attention_dim = self._architectures["teacher"]["joint_attention_dim"]
        return TextEncoders(
            self._pipelines["teacher"],
            self._text_encoders,
            joint_attention_dim,
            self.config.max_sequence_length,
            device,
            dtype,
        )

    @cached_property
    def text_key(self) -> str:
        """Names what embeddings depend on beside prompt and dtype: encoders and tokenizers by content, and the length.

        Files are hashed as `PipelineFolder.fingerprint` says. Weights on the hub are downloaded for it.
        """
        (length, width), (pooled,) = self.text_shapes.values()
        if self.config.random_init:
            return f"random-{length}x{width}-{pooled}"
        tokenizers = [encoder.replace("text_encoder", "tokenizer") for encoder in self._text_encoders]
        return f"{self._pipelines['teacher'].fingerprint([*self._text_encoders, *tokenizers])[:24]}-{length}x{width}"

    def load_decoder(self, device: torch.device | str) -> Decoder:
        """The VAE in float32. Raises ConfigError under random_init."""
        if self.config.random_init:
            raise ConfigError("model.random_init = true: there is no VAE, so latents cannot be decoded to images")
        return Decoder(self._pipelines["teacher"], device)

    def export(self, state_dict: dict[str, Tensor], folder: str | Path, role: Role = "student") -> None:
        """Writes a stock diffusers transformer folder: config.json and safetensors, sharded where large.

        state_dict: the whole transformer's, on the CPU; every tensor keeps its dtype. Raises ValueError when its names
        or shapes are not the role's.
        """
        from diffusers import SD3Transformer2DModel

        with torch.device("meta"):
            transformer = SD3Transformer2DModel.from_config(self._architectures[role])
        try:
            transformer.load_state_dict(state_dict, assign=True)
        except RuntimeError as error:
            raise ValueError(f"this is not the state of the {role}'s transformer: {error}") from error
        transformer.save_pretrained(folder, safe_serialization=True)

    @property
    def _text_encoders(self) -> list[str]:
        third = self._pipelines["teacher"].component_class("text_encoder_3")
        return ["text_encoder", "text_encoder_2"] + (["text_encoder_3"] if third else [])

    def _open(self, key: str, name: str) -> PipelineFolder | None:
        if self.config.random_init and name in KNOWN and not Path(name).is_dir():
            return None
        revision = self.config.revision if name == self.config.pipeline else None
        return PipelineFolder(key, name, "StableDiffusion3Pipeline", revision)

    def _check_roles(self, vae_channels: int) -> None:
        teacher = self._architectures["teacher"]
        for role, architecture in self._architectures.items():
            whose = f"the {role}'s transformer ({self._name(role)})"
            for name in ("in_channels", "joint_attention_dim", "pooled_projection_dim"):
                if architecture[name] != teacher[name]:
                    raise ConfigError(
                        f"model.{role}: {whose} has {name} = {architecture[name]}, but the teacher's "
                        f"({self._name('teacher')}) has {teacher[name]}: all roles see the same latents and text"
                    )
            if architecture["out_channels"] != architecture["in_channels"]:
                raise ConfigError(
                    f"{whose} has out_channels = {architecture['out_channels']}, but in_channels = "
                    f"{architecture['in_channels']}: a velocity has the channels of its latents"
                )
        if vae_channels != teacher["in_channels"]:
            raise ConfigError(
                f"model.pipeline = {self.config.pipeline!r}: vae/config.json has latent_channels = {vae_channels}, but "
                f"transformer/config.json has in_channels = {teacher['in_channels']}"
            )

    def _check_resolution(self) -> None:
        resolution = self.config.resolution
        unit = self._vae_scale * math.lcm(*(each["patch_size"] for each in self._architectures.values()))
        if resolution % unit:
            below = resolution // unit * unit
            nearest = f"{below} and {below + unit} are the nearest that would do" if below else f"{unit} would do"
            raise ConfigError(
                f"model.resolution = {resolution}: must be a multiple of {unit} (VAE scale times patch); {nearest}"
            )
        for role, architecture in self._architectures.items():
            positions = architecture["pos_embed_max_size"]
            largest = (positions or 0) * architecture["patch_size"] * self._vae_scale
            if positions and resolution > largest:
                raise ConfigError(
                    f"model.resolution = {resolution}: the {role}'s transformer ({self._name(role)}) has positions for "
                    f"{largest} pixels a side at most (pos_embed_max_size = {positions})"
                )

    def _check_text(self, pipeline: PipelineFolder) -> int:
        """Checks encoders and tokenizers against the transformer; returns how many tokens CLIP's tokenizer makes."""
        from transformers import CLIPTextConfig, T5Config

        if self.config.max_sequence_length > _LONGEST_T5:
            raise ConfigError(
                f"model.max_sequence_length = {self.config.max_sequence_length}: "
                f"the stock pipeline takes {_LONGEST_T5} tokens at most"
            )
        for encoder in self._text_encoders:
            third = encoder == "text_encoder_3"
            pipeline.require(encoder, "T5EncoderModel" if third else "CLIPTextModelWithProjection")
            pipeline.require(encoder.replace("text_encoder", "tokenizer"))

        # Through the classes: transformers leaves out of config.json what equals its defaults.
        clips = [CLIPTextConfig.from_dict(pipeline.read(encoder)) for encoder in ("text_encoder", "text_encoder_2")]
        teacher = self._architectures["teacher"]
        joint, pooled = teacher["joint_attention_dim"], teacher["pooled_projection_dim"]
        projected, width = sum(clip.projection_dim for clip in clips), sum(clip.hidden_size for clip in clips)
        where = f"{pipeline}: transformer/config.json has"
        if projected != pooled:
            raise ConfigError(
                f"{where} pooled_projection_dim = {pooled}, but text_encoder and text_encoder_2 project to {projected} "
                f"({' + '.join(str(clip.projection_dim) for clip in clips)})"
            )
        if width > joint:
            raise ConfigError(
                f"{where} joint_attention_dim = {joint}, but text_encoder and text_encoder_2 are {width} wide together"
            )
        if "text_encoder_3" in self._text_encoders:
            t5_width = T5Config.from_dict(pipeline.read("text_encoder_3")).d_model
            if t5_width != joint:
                raise ConfigError(f"{where} joint_attention_dim = {joint}, but text_encoder_3 is {t5_width} wide")
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


def _read_architecture(pipeline: PipelineFolder) -> dict[str, Any]:
    from diffusers import SD3Transformer2DModel

    pipeline.require("transformer", "SD3Transformer2DModel")
    arguments = inspect.signature(SD3Transformer2DModel.__init__).parameters.values()
    defaults = {argument.name: argument.default for argument in arguments if argument.name != "self"}
    # Older folders lack the settings that came later; their defaults are what those models were made with.
    values = {name: value for name, value in pipeline.read("transformer").items() if name in defaults}
    architecture = {**defaults, **values}
    architecture["dual_attention_layers"] = tuple(architecture["dual_attention_layers"] or ())
    if architecture["out_channels"] is None:
        architecture["out_channels"] = architecture["in_channels"]
    return architecture


def _read_vae(pipeline: PipelineFolder) -> tuple[int, int]:
    """(pixels a latent, latent channels)"""
    pipeline.require("vae", "AutoencoderKL")
    config = pipeline.read("vae")
    for name in ("block_out_channels", "latent_channels", "scaling_factor", "shift_factor"):
        if config.get(name) is None:
            raise ConfigError(f"{pipeline}: vae/config.json has no {name}, which the stock pipeline decodes with")
    return 2 ** (len(config["block_out_channels"]) - 1), config["latent_channels"]


def _scheduler(pipeline: PipelineFolder | None):
    from diffusers import FlowMatchEulerDiscreteScheduler

    if pipeline is None:
        return FlowMatchEulerDiscreteScheduler(shift=_KNOWN_SHIFT)
    pipeline.require("scheduler", "FlowMatchEulerDiscreteScheduler")
    config = pipeline.read("scheduler", "scheduler_config.json")
    if config.get("use_dynamic_shifting"):
        raise ConfigError(
            f"{pipeline}: its scheduler shifts by resolution (use_dynamic_shifting), which has no fixed grid"
        )
    return FlowMatchEulerDiscreteScheduler.from_config(config)


def _read_transformer(folder: Path, dtype: torch.dtype, what: str) -> nn.Module:
    from diffusers import SD3Transformer2DModel

    transformer, info = SD3Transformer2DModel.from_pretrained(
        folder, torch_dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True
    )
    wrong = {kind: names for kind, names in info.items() if names}
    if wrong:
        raise ConfigError(f"{what}: the weights in {folder} do not fit its config: {wrong}")
    return transformer


def _random_transformer(architecture: dict[str, Any], dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Weights as torch draws them by default, but one at a time: a float32 copy of the whole never exists."""
    from diffusers import SD3Transformer2DModel

    with torch.device("meta"):
        transformer = SD3Transformer2DModel.from_config(architecture)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.device(device):
        # The table of positions is computed, not drawn; a model of one block is the way to have it computed.
        transformer.pos_embed = SD3Transformer2DModel.from_config({**architecture, "num_layers": 1}).pos_embed

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


class TextEncoders:
    """The pipeline's text encoders on `device`, through the stock encode_prompt; without T5 its part is zeros."""

    def __init__(
        self,
        pipeline: PipelineFolder,
        encoders: list[str],
        joint_attention_dim: int,
        max_sequence_length: int,
        device: torch.device | str,
        dtype: torch.dtype,
    ):
        import transformers
        from diffusers import StableDiffusion3Pipeline

        self._device = torch.device(device)
        self._max_sequence_length = max_sequence_length
        parts: dict[str, Any] = {"text_encoder_3": None, "tokenizer_3": None}
        for encoder in encoders:
            tokenizer = encoder.replace("text_encoder", "tokenizer")
            tokenizer_class = getattr(transformers, pipeline.component_class(tokenizer))
            parts[tokenizer] = tokenizer_class.from_pretrained(pipeline.path / tokenizer, local_files_only=True)
            pipeline.weights(encoder)
            encoder_class = getattr(transformers, pipeline.component_class(encoder))
            model = encoder_class.from_pretrained(
                pipeline.path / encoder, dtype=dtype, use_safetensors=True, local_files_only=True
            )
            parts[encoder] = model.eval().requires_grad_(False).to(self._device)
        self._pipeline = StableDiffusion3Pipeline(transformer=None, vae=None, scheduler=None, **parts)
        # encode_prompt asks the transformer for nothing but the width of the zeros that stand for T5.
        self._pipeline.transformer = SimpleNamespace(config=SimpleNamespace(joint_attention_dim=joint_attention_dim))

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> dict[str, Tensor]:
        """{"prompt_embeds": (B, L, D), "pooled_prompt_embeds": (B, P)} on the encoders' device and in their dtype."""
        prompt_embeds, _, pooled_prompt_embeds, _ = self._pipeline.encode_prompt(
            prompts,
            None,
            None,
            device=self._device,
            do_classifier_free_guidance=False,
            max_sequence_length=self._max_sequence_length,
        )
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
