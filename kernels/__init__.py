"""The operations of distribution matching distillation. They import torch, Triton where it is installed, and nothing else."""

from dpdmd.kernels.attention.attention import attention
from dpdmd.kernels.blocks.activation import gelu_tanh, swiglu
from dpdmd.kernels.blocks.adaln_modulate import adaln_modulate
from dpdmd.kernels.blocks.fp8 import Quantized, fp8_linear, quantize_rows
from dpdmd.kernels.blocks.gated_residual import gated_residual, gated_residual_adaln
from dpdmd.kernels.blocks.gelu_mlp import gelu_mlp
from dpdmd.kernels.blocks.linear_gelu import linear_gelu
from dpdmd.kernels.blocks.packed_linear import packed_linear
from dpdmd.kernels.blocks.qk_norm import TokenStream, qk_norm, qk_norm_rope
from dpdmd.kernels.fusion.fuse_transformer import fuse_transformer, requantize, unfuse_transformer
from dpdmd.kernels.fusion.selective_checkpoint import selective_checkpoint
from dpdmd.kernels.losses.dmd import dmd_loss
from dpdmd.kernels.losses.flow_matching import flow_matching_loss
from dpdmd.kernels.losses.v_prediction import v_prediction_loss
from dpdmd.kernels.losses.x_prediction import x_prediction_loss
from dpdmd.kernels.optim.adamw import Float8State, adamw_step
from dpdmd.kernels.runtime.backend import use_backend
from dpdmd.kernels.runtime.philox import Philox
from dpdmd.kernels.sampling.guided_euler_step import guided_euler_step
from dpdmd.kernels.sampling.renoise import renoise

__all__ = [
    "Float8State",
    "Philox",
    "Quantized",
    "TokenStream",
    "adaln_modulate",
    "adamw_step",
    "attention",
    "dmd_loss",
    "flow_matching_loss",
    "fp8_linear",
    "fuse_transformer",
    "gated_residual",
    "gated_residual_adaln",
    "gelu_mlp",
    "gelu_tanh",
    "guided_euler_step",
    "linear_gelu",
    "packed_linear",
    "qk_norm",
    "qk_norm_rope",
    "quantize_rows",
    "renoise",
    "requantize",
    "selective_checkpoint",
    "swiglu",
    "unfuse_transformer",
    "use_backend",
    "v_prediction_loss",
    "x_prediction_loss",
]
