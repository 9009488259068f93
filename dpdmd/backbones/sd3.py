"""Stable Diffusion 3 and 3.5: how to call the transformer and encode prompts, and which time grids the pipeline walks.

Everything is diffusers', bit for bit: the transformer is a stock SD3Transformer2DModel, embeddings come from
StableDiffusion3Pipeline.encode_prompt and images from its VAE. The network predicts the velocity v = noise - x of
z_t = (1 - t) x + t noise, and takes t as a timestep in [0, 1000].
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


def _architecture(depth: int, positions: int, dual_layers: int = 0, qk_norm: str | None = "rms_norm") -> dict[str, Any]:
    """The width grows with the depth: as many heads as layers."""
    return {
        "sample_size": 128,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "attention_head_dim": 64,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 2048,
        "num_layers": depth,
        "num_attention_heads": depth,
        "caption_projection_dim": 64 * depth,
        "pos_embed_max_size": positions,
        "dual_attention_layers": tuple(range(dual_layers)),
        "qk_norm": qk_norm,
    }


# The published models' settings for random_init, so that a benchmark runs without their files.
KNOWN: dict[str, dict[str, Any]] = {
    "stabilityai/stable-diffusion-3.5-medium": _architecture(24, 384, dual_layers=13),
    "stabilityai/stable-diffusion-3.5-large": _architecture(38, 192),
    "stabilityai/stable-diffusion-3-medium-diffusers": _architecture(24, 192, qk_norm=None),
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
            # float32: the network computes its sines and cosines before it rounds.
            timestep=self.diffusion.timestep(t),
            encoder_hidden_states=cond["prompt_embeds"].to(dtype),
            pooled_projections=cond["pooled_prompt_embeds"].to(dtype),
            return_dict=False,
        )[0]

    def attention_shapes(self) -> list[tuple[int, int]]:
        """Attention over image and text, and over the image alone in the blocks of dual_attention_layers."""
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
        # encode_prompt reads only the width of the zeros that replace T5 from the transformer.
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
                f"{where}: its scheduler has use_dynamic_shifting = true, so its grid is not fixed; false is needed"
            )
        return Flow(scheduler)

    def _tables(self, architecture: dict[str, Any]) -> dict[str, nn.Module]:
        # A model of one block computes the table of positions.
        return {"pos_embed": self._class.from_config({**architecture, "num_layers": 1}).pos_embed}
