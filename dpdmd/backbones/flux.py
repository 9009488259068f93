"""FLUX.1: how to call the transformer and encode prompts, and which time grids the pipeline walks.

Everything is diffusers', bit for bit: the transformer is a stock FluxTransformer2DModel, embeddings come from
FluxPipeline.encode_prompt and images from its VAE. The network predicts the velocity v = noise - x of
z_t = (1 - t) x + t noise. Its tokens are 2 x 2 latents with four times the channels, and their positions; t is a timestep
in [0, 1]. Guidance-distilled models (FLUX.1-dev) also take a guidance value.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dpdmd.backbones.base import Backbone, network_dtype
from dpdmd.backbones.family import JOINT_TARGETS, Family, register
from dpdmd.backbones.pipeline import PipelineFolder
from dpdmd.backbones.text import T5, Clip, EncodePrompt, Encoding, sequence_and_pooled, text_pipeline
from dpdmd.config import ConfigError, ModelConfig
from dpdmd.diffusion import Flow


def _architecture(guidance_embeds: bool) -> dict[str, Any]:
    return {
        "patch_size": 1,
        "in_channels": 64,
        "out_channels": 64,
        "num_layers": 19,
        "num_single_layers": 38,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
        "guidance_embeds": guidance_embeds,
        "axes_dims_rope": (16, 56, 56),
    }


# The published models' settings for random_init, so that a benchmark runs without their files.
KNOWN: dict[str, dict[str, Any]] = {
    "black-forest-labs/FLUX.1-dev": _architecture(guidance_embeds=True),
    "black-forest-labs/FLUX.1-schnell": _architecture(guidance_embeds=False),
}


@register
class Flux(Backbone):
    """Backbone of FluxPipeline folders, guidance-distilled (the guidance value is config.embedded_guidance) or not."""

    family = Family(
        name="flux",
        pipeline="FluxPipeline",
        transformer="FluxTransformer2DModel",
        blocks=("FluxTransformerBlock", "FluxSingleTransformerBlock"),
        lora_targets=(*JOINT_TARGETS, "proj_mlp", "proj_out"),
        text=(Clip("text_encoder", "CLIPTextModel"), T5("text_encoder_2", "T5EncoderModel")),
        text_parameters=4.89e9,
        common=("in_channels", "joint_attention_dim", "pooled_projection_dim", "guidance_embeds"),
        packing=2,
        known=KNOWN,
        schedulers={
            "black-forest-labs/FLUX.1-dev": {"shift": 3.0, "use_dynamic_shifting": True},
            "black-forest-labs/FLUX.1-schnell": {"shift": 1.0, "use_dynamic_shifting": False},
        },
    )

    def __init__(self, config: ModelConfig, teacher: PipelineFolder | None = None):
        super().__init__(config, teacher)
        self._places: dict[tuple, tuple[Tensor, Tensor]] = {}

    @property
    def takes_guidance(self) -> bool:
        return self._architectures["teacher"]["guidance_embeds"]

    def predict(
        self, transformer, x: Tensor, t: Tensor, cond: dict[str, Tensor], dtype: torch.dtype | None = None
    ) -> Tensor:
        dtype = dtype or network_dtype(transformer)
        height, width = x.shape[-2:]
        image_ids, text_ids = self._ids(height // 2, width // 2, cond["prompt_embeds"].shape[1], x.device)
        guidance = None
        if self.takes_guidance:
            guidance = torch.full((1,), self.config.embedded_guidance, dtype=torch.float32, device=x.device).expand(
                len(x)
            )
        # The network rounds its timestep before it multiplies by 1000, so float32 is lost anyway. Rounded here, as in the
        # pipeline, bfloat16 times are 0.9 off 1000 t on average and 2.0 at most over FLUX.1-dev's training times at
        # 1024 x 1024; with a float32 t 1.1 and 3.8, and every second step of a four-step student differs from the pipeline's.
        timestep = self.diffusion.timestep(t).to(dtype) / self.diffusion.num_train_timesteps
        velocity = transformer(
            hidden_states=pack(x.to(dtype)),
            timestep=timestep,
            guidance=guidance,
            encoder_hidden_states=cond["prompt_embeds"].to(dtype),
            pooled_projections=cond["pooled_prompt_embeds"].to(dtype),
            txt_ids=text_ids,
            img_ids=image_ids,
            return_dict=False,
        )[0]
        return unpack(velocity, height, width)

    def attention_shapes(self) -> list[tuple[int, int]]:
        """Attention over image and text, in every block."""
        _, height, width = self.latent_shape
        text, _ = self.text_shapes["prompt_embeds"]
        tokens = (height // 2) * (width // 2) + text
        return sorted({(architecture["attention_head_dim"], tokens) for architecture in self._architectures.values()})

    def _ids(self, rows: int, columns: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Positions of the tokens, float32: (0, row, column) of the image's (rows * columns, 3), and 0 of the text's
        (length, 3). Cached, as every forward pass needs them."""
        key = (rows, columns, length, device)
        if key not in self._places:
            row, column = torch.meshgrid(
                torch.arange(rows, device=device), torch.arange(columns, device=device), indexing="ij"
            )
            image_ids = torch.stack([torch.zeros_like(row), row, column], dim=-1).flatten(0, 1).float()
            self._places[key] = image_ids, torch.zeros(length, 3, device=device)
        return self._places[key]

    def _read_architecture(self, settings: dict[str, Any], what: str) -> dict[str, Any]:
        architecture = super()._read_architecture(settings, what)
        if architecture["patch_size"] != 1:
            raise ConfigError(
                f"{what} has patch_size = {architecture['patch_size']}; 1 is needed, as FluxPipeline makes the patches itself"
            )
        axes, width = architecture["axes_dims_rope"], architecture["attention_head_dim"]
        if "axes_dims_rope" in settings and (sum(axes) != width or any(axis < 1 or axis % 2 for axis in axes)):
            raise ConfigError(
                f"{what} has axes_dims_rope = {axes}; even numbers are needed whose sum is attention_head_dim = {width}"
            )
        return architecture

    def _check_widths(self, pipeline: PipelineFolder, encoders: dict[str, Any]) -> None:
        teacher = self._architectures["teacher"]
        for name, encoder, width in (
            ("pooled_projection_dim", "text_encoder", encoders["text_encoder"].hidden_size),
            ("joint_attention_dim", "text_encoder_2", encoders["text_encoder_2"].d_model),
        ):
            if teacher[name] != width:
                raise ConfigError(
                    f"{pipeline}: transformer/config.json has {name} = {teacher[name]}, but {encoder} is {width} wide"
                )

    def _text_shapes(self, clip_length: int) -> dict[str, tuple[int, ...]]:
        # CLIP gives the pooled embedding only.
        return sequence_and_pooled(self.config.max_sequence_length, self._architectures["teacher"])

    def _encode_prompt(self, parts: dict[str, Any], device: torch.device) -> EncodePrompt:
        from diffusers import FluxPipeline

        pipeline = text_pipeline(FluxPipeline, parts)

        def encode(prompts: list[str]) -> Encoding:
            prompt_embeds, pooled_prompt_embeds, _ = pipeline.encode_prompt(
                prompts, device=device, max_sequence_length=self.config.max_sequence_length
            )
            return {"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled_prompt_embeds}

        return encode

    def _process(self, scheduler, where: str) -> Flow:
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift

        settings = scheduler.config
        _, height, width = self.latent_shape
        mu = calculate_shift(
            (height // 2) * (width // 2),
            settings.base_image_seq_len,
            settings.max_image_seq_len,
            settings.base_shift,
            settings.max_shift,
        )
        return Flow(scheduler, mu=mu, even_steps=True)


def pack(x: Tensor) -> Tensor:
    """Latents (B, C, H, W), H and W even, to tokens (B, H W / 4, 4 C): a token is 2 x 2 latents, channel by channel."""
    patches = x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))  # (B, C, H / 2, 2, W / 2, 2)
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Tokens (B, H W / 4, 4 C) back to latents (B, C, H, W)."""
    patches = tokens.unflatten(2, (-1, 2, 2)).unflatten(1, (height // 2, width // 2))  # (B, H / 2, W / 2, C, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
