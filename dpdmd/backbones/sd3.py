"""Stable Diffusion 3 and 3.5: how to call the transformer and encode prompts, and which time grids the pipeline walks.

Everything stays what diffusers makes of it: the transformer is a stock SD3Transformer2DModel, embeddings come from
StableDiffusion3Pipeline.encode_prompt and images from its VAE, bit for bit. The network predicts the velocity
v = noise - x of z_t = (1 - t) x + t noise, and takes t as a timestep in [0, 1000].
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from dpdmd.backbones.base import Backbone, network_dtype
from dpdmd.backbones.family import Family, register
from dpdmd.backbones.pipeline import PipelineFolder
from dpdmd.backbones.text import T5, Clip, EncodePrompt, Encoding, sequence_and_pooled, text_pipeline
from dpdmd.config import ConfigError
from dpdmd.diffusion import Flow


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


@register
class SD3(Backbone):
    """Backbone of StableDiffusion3Pipeline folders, with T5 or without."""

    family = Family(
        name="sd3",
        pipeline="StableDiffusion3Pipeline",
        transformer="SD3Transformer2DModel",
        blocks=("JointTransformerBlock",),
        text=(
            Clip("text_encoder", "CLIPTextModelWithProjection"),
            Clip("text_encoder_2", "CLIPTextModelWithProjection"),
            T5("text_encoder_3", "T5EncoderModel", optional=True),
        ),
        text_parameters=5.58e9,
        common=("in_channels", "joint_attention_dim", "pooled_projection_dim"),
        optional=("pos_embed_max_size",),
        known=KNOWN,
        schedulers={name: {"shift": 3.0} for name in KNOWN},
    )

    def predict(
        self, transformer, x: Tensor, t: Tensor, cond: dict[str, Tensor], dtype: torch.dtype | None = None
    ) -> Tensor:
        dtype = dtype or network_dtype(transformer)
        return transformer(
            hidden_states=x.to(dtype),
            # Stays float32: the network makes its sines and cosines from it before it rounds.
            timestep=self.diffusion.timestep(t),
            encoder_hidden_states=cond["prompt_embeds"].to(dtype),
            pooled_projections=cond["pooled_prompt_embeds"].to(dtype),
            return_dict=False,
        )[0]

    def attention_shapes(self) -> list[tuple[int, int]]:
        """Of image and text together; of the image alone in the blocks of dual_attention_layers."""
        _, height, width = self.latent_shape
        text, _ = self.text_shapes["prompt_embeds"]
        shapes = set()
        for architecture in self._architectures.values():
            patch, head_dim = architecture["patch_size"], architecture["attention_head_dim"]
            image = (height // patch) * (width // patch)
            shapes.add((head_dim, image + text))
            if architecture["dual_attention_layers"]:
                shapes.add((head_dim, image))
        return sorted(shapes)

    def _read_architecture(self, settings: dict[str, Any], what: str) -> dict[str, Any]:
        return super()._read_architecture(
            settings | {"dual_attention_layers": settings.get("dual_attention_layers") or ()}, what
        )

    def _check_resolution(self) -> None:
        super()._check_resolution()
        for role, architecture in self._architectures.items():
            positions = architecture["pos_embed_max_size"]
            largest = (positions or 0) * architecture["patch_size"] * self._vae_scale
            if positions and self.config.resolution > largest:
                raise ConfigError(
                    f"model.resolution = {self.config.resolution}: the {role}'s transformer ({self._name(role)}) has "
                    f"positions for {largest} pixels a side at most (pos_embed_max_size = {positions})"
                )

    def _check_widths(self, pipeline: PipelineFolder, encoders: dict[str, Any]) -> None:
        teacher = self._architectures["teacher"]
        joint, pooled = teacher["joint_attention_dim"], teacher["pooled_projection_dim"]
        clips, t5 = [encoders["text_encoder"], encoders["text_encoder_2"]], encoders.get("text_encoder_3")
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
        if t5 is not None and t5.d_model != joint:
            raise ConfigError(f"{where} joint_attention_dim = {joint}, but text_encoder_3 is {t5.d_model} wide")

    def _text_shapes(self, clip_length: int) -> dict[str, tuple[int, ...]]:
        return sequence_and_pooled(clip_length + self.config.max_sequence_length, self._architectures["teacher"])

    def _encode_prompt(self, parts: dict[str, Any], device: torch.device) -> EncodePrompt:
        from diffusers import StableDiffusion3Pipeline

        pipeline = text_pipeline(StableDiffusion3Pipeline, {"text_encoder_3": None, "tokenizer_3": None, **parts})
        # encode_prompt asks the transformer for nothing but the width of the zeros that stand for T5.
        joint_attention_dim = self._architectures["teacher"]["joint_attention_dim"]
        pipeline.transformer = SimpleNamespace(config=SimpleNamespace(joint_attention_dim=joint_attention_dim))

        def encode(prompts: list[str]) -> Encoding:
            prompt_embeds, _, pooled_prompt_embeds, _ = pipeline.encode_prompt(
                prompts,
                None,
                None,
                device=device,
                do_classifier_free_guidance=False,
                max_sequence_length=self.config.max_sequence_length,
            )
            return {"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled_prompt_embeds}

        return encode

    def _process(self, scheduler, where: str) -> Flow:
        if scheduler.config.use_dynamic_shifting:
            raise ConfigError(
                f"{where}: its scheduler shifts by resolution (use_dynamic_shifting), which has no fixed grid"
            )
        return Flow(scheduler)

    def _tables(self, architecture: dict[str, Any]) -> dict[str, nn.Module]:
        # The table of positions; a model of one block is the way to have it computed.
        return {"pos_embed": self._class.from_config({**architecture, "num_layers": 1}).pos_embed}
