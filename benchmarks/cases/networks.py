"""Whole diffusers transformers to measure: configurations, random weights, inputs and variants.

The variants switch one network in place:

    eager            diffusers' own modules
    compiled         the same, torch.compile on each block
    fused            with the fused operations
    fused_fp8        the same, FP8 in passes without gradient
    fused_selective  fused, gradient checkpointing by `selective_checkpoint` instead of torch's
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpdmd.backbones.family import families
from dpdmd.backbones.flux import KNOWN as FLUX
from dpdmd.backbones.sd3 import KNOWN as SD3
from dpdmd.kernels import selective_checkpoint
from dpdmd.kernels.attention.attention import DenseGradient
from dpdmd.kernels.fusion.fuse_transformer import fuse_transformer, unfuse_transformer

# Compiling takes minutes and comes last: an interrupted run has the others.
VARIANTS = ("eager", "fused", "fused_fp8", "fused_selective", "compiled")
PEERS = ("eager", "compiled")
BLOCKS = tuple(block for family in families() for block in family.blocks)
COMPILE = {"dynamic": False}
RECOMPILE_LIMIT = 64  # blocks share code; each kind of block, batch and gradient mode compiles it again

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Network:
    model_class: str  # in diffusers
    config: dict[str, Any]
    side: int  # latents; an image token covers 2 x 2
    text: int  # tokens


NETWORKS = {
    "full": {
        # stabilityai/stable-diffusion-3.5-medium, 1024 x 1024: 2.24 billion parameters
        "sd35": Network("SD3Transformer2DModel", SD3["stabilityai/stable-diffusion-3.5-medium"], side=128, text=333),
        # FLUX.1 with 4 of its 19 double blocks and 8 of its 38 single ones, 1024 x 1024
        "flux": Network(
            "FluxTransformer2DModel",
            {**FLUX["black-forest-labs/FLUX.1-dev"], "num_layers": 4, "num_single_layers": 8},
            side=128,
            text=512,
        ),
    },
    # Small ones, to try the benchmark without a GPU.
    "small": {
        "sd35": Network(
            "SD3Transformer2DModel",
            {
                "sample_size": 8,
                "patch_size": 2,
                "in_channels": 16,
                "out_channels": 16,
                "num_layers": 4,
                "attention_head_dim": 16,
                "num_attention_heads": 2,
                "joint_attention_dim": 48,
                "caption_projection_dim": 32,
                "pooled_projection_dim": 24,
                "pos_embed_max_size": 8,
                "dual_attention_layers": (0, 1),
                "qk_norm": "rms_norm",
            },
            side=8,
            text=5,
        ),
        "flux": Network(
            "FluxTransformer2DModel",
            {
                "in_channels": 64,
                "num_layers": 2,
                "num_single_layers": 2,
                "attention_head_dim": 16,
                "num_attention_heads": 2,
                "joint_attention_dim": 48,
                "pooled_projection_dim": 24,
                "guidance_embeds": True,
                "axes_dims_rope": (4, 6, 6),
            },
            side=8,
            text=5,
        ),
    },
}


def build(network: Network, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A network with random weights, equal at every call on a device. Norm weights are not 1, so that a gradient that lacks
    this factor shows."""
    import diffusers

    diffusers.logging.set_verbosity_error()  # warns of every change of a model's dtype
    generator = torch.Generator(device).manual_seed(1)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.device(device):
        torch.manual_seed(0)
        model = getattr(diffusers, network.model_class)(**network.config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and name.endswith(".weight"):
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator, device=device)
    return model.to(device, dtype).eval()


def make_inputs(
    network: Network, batch: int, device: torch.device, dtype: torch.dtype, seed: int = 2
) -> tuple[Inputs, Tensor]:
    """The arguments of a forward pass, and a tensor of the output's shape: an upstream gradient or a target."""
    generator = torch.Generator(device).manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    config = network.config
    times = 0.05 + 0.9 * torch.rand(batch, generator=generator, device=device)
    inputs = {
        "encoder_hidden_states": randn(batch, network.text, config["joint_attention_dim"]),
        "pooled_projections": randn(batch, config["pooled_projection_dim"]),
        "return_dict": False,
    }
    if network.model_class == "SD3Transformer2DModel":
        latents = randn(batch, config["in_channels"], network.side, network.side)
        inputs |= {"hidden_states": latents, "timestep": 1000 * times}
    else:
        side = network.side // 2
        rows, columns = torch.meshgrid(*2 * [torch.arange(side, device=device, dtype=torch.float32)], indexing="ij")
        latents = randn(batch, side * side, config["in_channels"])
        inputs |= {
            "hidden_states": latents,
            "timestep": times.to(dtype),
            "guidance": torch.full_like(times, 3.5).to(dtype),
            "img_ids": torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1),
            "txt_ids": torch.zeros(network.text, 3, device=device),
        }
    return inputs, randn(*latents.shape)


def in_float32(inputs: Inputs) -> Inputs:
    return {name: value.float() if isinstance(value, Tensor) else value for name, value in inputs.items()}


@contextlib.contextmanager
def _peers_survive(model: nn.Module) -> Iterator[None]:
    """Make attention's upstream gradients dense in FLUX. Its single blocks pass slices of a wider gradient, its double blocks
    dense ones; torch 2.11 uses one's cuDNN backward pass for the other and reads out of bounds. The copy takes about 0.3 %
    of a training pass."""
    stock = F.scaled_dot_product_attention

    def with_dense_gradient(*args, **kwargs):  # (B, H, S, D), dense as (B, S, H, D)
        return DenseGradient.apply(stock(*args, **kwargs).transpose(1, 2)).transpose(1, 2)

    if type(model).__name__ == "FluxTransformer2DModel":
        F.scaled_dot_product_attention = with_dense_gradient
    try:
        yield
    finally:
        F.scaled_dot_product_attention = stock


@contextlib.contextmanager
def as_variant(model: nn.Module, variant: str) -> Iterator[None]:
    """Make the model this variant inside the with statement."""
    if variant == "eager":
        with _peers_survive(model):
            yield
    elif variant == "compiled":
        blocks = [module for module in model.modules() if type(module).__name__ in BLOCKS]
        with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT):
            for block in blocks:
                block.compile(**COMPILE)
            try:
                with _peers_survive(model):
                    yield
            finally:
                for block in blocks:  # later compilations reuse it: the code object keeps it
                    block._compiled_call_impl = None
    else:
        fuse_transformer(model, fp8="no_grad" if variant == "fused_fp8" else None, verbose=False)
        checkpointing = model.is_gradient_checkpointing
        if variant == "fused_selective":
            model.enable_gradient_checkpointing(selective_checkpoint)
        try:
            yield
        finally:
            unfuse_transformer(model)
            (model.enable_gradient_checkpointing if checkpointing else model.disable_gradient_checkpointing)()


def graphs_and_breaks() -> tuple[int, int]:
    """Numbers of torch.compile's graphs and graph breaks in this process."""
    counters = torch._dynamo.utils.counters
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
