"""Your own model family in one file; dpdmd itself does not know it:

    deepspeed dpdmd/train.py model.family=examples/toy_family.py model.pipeline=FOLDER prompts.file=PROMPTS.txt ...

It has what SD3 and FLUX lack: a language model as text encoder, with variable length and a mask; video latents, normalised by
a mean and a standard deviation a channel; a shift that depends on the number of steps; guidance counted from the conditional
prediction.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch import Tensor, nn

from dpdmd.backbones.base import Backbone, network_dtype
from dpdmd.backbones.family import Family, Guidance, register
from dpdmd.backbones.pipeline import PipelineFolder
from dpdmd.backbones.text import EncodePrompt, Encoding, Llm
from dpdmd.backbones.vae import MEAN_AND_STD, Vae
from dpdmd.config import ConfigError
from dpdmd.diffusion import Flow

FRAMES = 2
LLM = Llm("text_encoder", "Qwen2Model")


class ToyBlock(nn.Module):
    """Attention of [text, video] with the text's mask, and a feed-forward."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(width, width) for _ in range(4))
        self.net = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """tokens (B, S, D); mask (B, S), True for those that are attended to."""
        y = self.norm(tokens)
        q, k, v = (
            each(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in (self.to_q, self.to_k, self.to_v)
        )
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
        tokens = tokens + self.to_out(attended.transpose(1, 2).flatten(2))
        return tokens + self.net(self.norm(tokens))


class ToyTransformer(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(
        self,
        in_channels: int = 4,
        out_channels: int = 4,
        patch_size: tuple[int, int, int] = (1, 2, 2),
        num_layers: int = 2,
        num_attention_heads: int = 2,
        attention_head_dim: int = 8,
        caption_dim: int = 16,
    ):
        super().__init__()
        width = num_attention_heads * attention_head_dim
        self.patch = nn.Conv3d(in_channels, width, patch_size, patch_size)
        self.caption = nn.Linear(caption_dim, width)
        self.time = nn.Linear(1, width)
        self.layers = nn.ModuleList(ToyBlock(width, num_attention_heads) for _ in range(num_layers))
        self.proj_out = nn.Linear(width, out_channels * patch_size[1] * patch_size[2])

    def forward(self, hidden_states: Tensor, timestep: Tensor, caption: Tensor, caption_mask: Tensor) -> Tensor:
        _, p, q = self.config.patch_size
        video = self.patch(hidden_states)
        frames, rows, columns = video.shape[2:]
        video = video.flatten(2).transpose(1, 2) + self.time(timestep[:, None].to(video.dtype) / 1000)[:, None]
        mask = torch.cat([caption_mask > 0.5, caption_mask.new_ones(video.shape[:2]) > 0.5], dim=1)
        tokens = torch.cat([self.caption(caption), video], dim=1)
        for layer in self.layers:
            tokens = layer(tokens, mask)
        patches = self.proj_out(tokens[:, caption.shape[1] :]).unflatten(2, (-1, p, q))  # (B, F H W, C, p, q)
        patches = patches.unflatten(1, (frames, rows, columns)).permute(0, 4, 1, 2, 5, 3, 6)
        return patches.flatten(5, 6).flatten(3, 4)


@register
class Toy(Backbone):
    family = Family(
        name="toy",
        pipeline="ToyPipeline",
        transformer=ToyTransformer,
        blocks=("ToyBlock",),
        block_lists=("layers",),
        lora_targets=("to_q", "to_v", "net.0"),
        text=(LLM,),
        longest_text=32,
        vae=Vae("AutoencoderKLWan", "scale_factor_spatial", "z_dim", MEAN_AND_STD, published=(2, 4)),
        guidance=Guidance.FROM_COND,
        common=("in_channels", "caption_dim"),
        known={
            "toy/published": {
                "in_channels": 4,
                "out_channels": 4,
                "patch_size": (1, 2, 2),
                "num_layers": 3,
                "num_attention_heads": 2,
                "attention_head_dim": 8,
                "caption_dim": 16,
            }
        },
        schedulers={"toy/published": {"use_dynamic_shifting": True}},
    )

    def predict(
        self, transformer, x: Tensor, t: Tensor, cond: dict[str, Tensor], dtype: torch.dtype | None = None
    ) -> Tensor:
        dtype = dtype or network_dtype(transformer)
        return transformer(
            hidden_states=x.to(dtype),
            timestep=self.diffusion.timestep(t),
            caption=cond["caption"].to(dtype),
            caption_mask=cond["caption_mask"].to(dtype),
        )

    def attention_shapes(self) -> list[tuple[int, int]]:
        _, frames, height, width = self.latent_shape
        tokens = frames * (height // 2) * (width // 2) + self.config.max_sequence_length
        return sorted({(architecture["attention_head_dim"], tokens) for architecture in self._architectures.values()})

    def _check_widths(self, pipeline: PipelineFolder, encoders: dict[str, Any]) -> None:
        found, needed = encoders["text_encoder"].hidden_size, self._architectures["teacher"]["caption_dim"]
        if found != needed:
            raise ConfigError(f"{pipeline}: text_encoder is {found} wide, and caption_dim = {needed}")

    def _text_shapes(self, clip_length: int) -> dict[str, tuple[int, ...]]:
        length = self.config.max_sequence_length
        return {"caption": (length, self._architectures["teacher"]["caption_dim"]), "caption_mask": (length,)}

    def _encode_prompt(self, parts: dict[str, Any], device: torch.device) -> EncodePrompt:
        def encode(prompts: list[str]) -> Encoding:
            caption, mask = LLM.encode(parts, prompts, self.config.max_sequence_length, layer=-2)
            return {"caption": caption, "caption_mask": mask}

        return encode

    def _latent_shape(self, channels: int, side: int) -> tuple[int, ...]:
        return (channels, FRAMES, side, side)

    def _process(self, scheduler, where: str) -> Flow:
        return Flow(scheduler, mu=lambda num_steps: 0.5 + 1 / num_steps, even_steps=True)
