"""The operations of distribution matching distillation, on torch (and Triton where there is one) and nothing else."""

from dpdmd.kernels.attention import attention
from dpdmd.kernels.backend import use_backend
from dpdmd.kernels.dmd_loss import dmd_loss
from dpdmd.kernels.flow_matching_loss import flow_matching_loss
from dpdmd.kernels.guided_euler_step import guided_euler_step
from dpdmd.kernels.philox import Philox
from dpdmd.kernels.renoise import renoise
from dpdmd.kernels.v_prediction_loss import v_prediction_loss
from dpdmd.kernels.x_prediction_loss import x_prediction_loss

__all__ = [
    "Philox",
    "attention",
    "dmd_loss",
    "flow_matching_loss",
    "guided_euler_step",
    "renoise",
    "use_backend",
    "v_prediction_loss",
    "x_prediction_loss",
]
