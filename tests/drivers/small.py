"""The real transformers of the families, small."""

import torch
from diffusers import SD3Transformer2DModel


def sd3(**changes):
    """SD3.5's with two blocks, the first of which has two attentions; the same weights each time."""
    torch.manual_seed(0)
    config = {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 16,
        "caption_projection_dim": 32,
        "pooled_projection_dim": 16,
        "pos_embed_max_size": 8,
        "qk_norm": "rms_norm",
        "dual_attention_layers": (0,),
    }
    return SD3Transformer2DModel(**config | changes)
