"""The operations of distribution matching distillation, on torch (and Triton where there is one) and nothing else."""

from dpdmd.kernels.activation import gelu_tanh, swiglu
from dpdmd.kernels.adaln_modulate import adaln_modulate
from dpdmd.kernels.adamw import Float8State, adamw_step
from dpdmd.kernels.attention import attention
from dpdmd.kernels.backend import use_backend
from dpdmd.kernels.dmd_loss import dmd_loss
from dpdmd.kernels.flow_matching_loss import flow_matching_loss
from dpdmd.kernels.fp8 import Quantized, fp8_linear, quantize_rows
from dpdmd.kernels.fuse_transformer import fuse_transformer, requantize, unfuse_transformer
from dpdmd.kernels.gated_residual import gated_residual, gated_residual_adaln
from dpdmd.kernels.gelu_mlp import gelu_mlp
from dpdmd.kernels.guided_euler_step import guided_euler_step
from dpdmd.kernels.linear_gelu import linear_gelu
from dpdmd.kernels.packed_linear import packed_linear
from dpdmd.kernels.philox import Philox
from dpdmd.kernels.qk_norm import TokenStream, qk_norm, qk_norm_rope
from dpdmd.kernels.renoise import renoise
from dpdmd.kernels.selective_checkpoint import selective_checkpoint
from dpdmd.kernels.v_prediction_loss import v_prediction_loss
from dpdmd.kernels.x_prediction_loss import x_prediction_loss

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
