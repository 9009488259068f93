"""The fused forward of diffusers' AdaLayerNormContinuous, a transformer's norm after its last block."""

from typing import Any

import torch.nn.functional as F
from diffusers.models.normalization import AdaLayerNormContinuous
from torch import Tensor, nn

from dpdmd.kernels.blocks.adaln_modulate import adaln_modulate
from dpdmd.kernels.fusion.conditions import ADAPTIVE_NORM, Fused, or_stock, why_not_like


def why_not(norm: nn.Module) -> str:
    return why_not_like(norm, AdaLayerNormContinuous, ADAPTIVE_NORM)


@or_stock(why_not)
def forward(norm: Any, x: Tensor, conditioning_embedding: Tensor) -> Any:
    """x (B, S, C), conditioning_embedding (B, C)."""
    scale, shift = norm.linear(F.silu(conditioning_embedding).to(x.dtype)).chunk(2, dim=1)
    return adaln_modulate(x, scale, shift, eps=norm.norm.eps)


NORM_OUT = Fused(why_not, forward)
