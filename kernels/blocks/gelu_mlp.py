"""The two linear layers of a transformer's feed-forward and the GELU between them.

    u = GELU(x W_1^T + b_1)     in the tanh form
    y = u W_2^T

cuBLASLt, where it runs, applies GELU in the first matmul's epilogue, and its derivative in that of the backward pass: no
pass of its own reads and writes a transformer's widest tensors. H100, SD3.5-M at batch 4, (16384, 1536) and 6144 wide:
forward 0.48 ms against 0.54 for matmul and GELU; backward, with a pass for the bias gradient, 0.59 against 0.65.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dpdmd.kernels.blocks.activation import gelu_tanh
from dpdmd.kernels.blocks.linear_gelu import check_device, check_layer, epilogue_takes, linear_gelu
from dpdmd.kernels.runtime import checks, csrc
from dpdmd.kernels.runtime.backend import why_not
from dpdmd.kernels.runtime.kept import gradients_wanted
from dpdmd.kernels.runtime.launch import capability
from dpdmd.kernels.runtime.layout import address
from dpdmd.kernels.runtime.rows import sum_rows
from dpdmd.kernels.runtime.saved import Function, save, saved


def gelu_mlp(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor) -> Tensor:
    """GELU(x W_1^T + b_1) W_2^T: (..., K_2), in F.linear's dtype. `gated_residual`, for one, can add the second bias.

    x (..., K), weight1 (N, K), bias1 (N,), weight2 (K_2, N): float32, float16, bfloat16 or float64, all of one dtype, or
        under autocast any of them. All receive gradients.

    Saved for backward: both weights and GELU's input; x if weight1, and GELU's output if weight2, needs a gradient.

    Raises TypeError for a dtype or type, ValueError for a shape or a device.
    """
    check_layer(x, weight1, bias1, layer="1")
    checks.floating("weight2", weight2)
    check_device("weight2", weight2, x)
    if weight2.ndim != 2 or weight2.shape[1] != len(weight1):
        raise ValueError(
            f"weight2 has shape {tuple(weight2.shape)}; with weight1 {tuple(weight1.shape)} it needs "
            f"(K_2, {len(weight1)})"
        )
    tensors = x, weight1, bias1, weight2
    if not gradients_wanted(*tensors):
        return F.linear(linear_gelu(x, weight1, bias1), weight2)
    if _in_epilogue(*tensors):
        return _GeluMlp.apply(*tensors)
    return F.linear(gelu_tanh(F.linear(x, weight1), bias1), weight2)


def _in_epilogue(x: Tensor, *parameters: Tensor) -> bool:
    """Whether the library's matmuls with epilogues can run, and are known to be faster."""
    if torch.compiler.is_compiling() or not epilogue_takes(x, *parameters) or not _served(x.device.index):
        return False
    if not x.is_contiguous() or any(tensor.device != x.device for tensor in parameters):
        return False
    sizes = [size for tensor in parameters for size in tensor.shape]
    return all(size % 8 == 0 for size in sizes) and all(address(tensor) % 16 == 0 for tensor in (x, *parameters))


@functools.cache
def _served(index: int) -> bool:
    """On Hopper alone, as the gain is measured there alone."""
    return capability(index)[0] == 9 and not why_not("triton", "cuda", index) and not csrc.missing("cuda", index)


class _GeluMlp(Function):
    # The older form of forward, with ctx: the newer one binds its arguments by inspection, 20 us a call.
    @staticmethod
    def forward(ctx, x, weight1, bias1, weight2):
        u, pre = torch.ops.dpdmd.linear_gelu_aux.default(x.reshape(-1, x.shape[-1]), weight1, bias1)
        _, for_weight1, _, for_weight2 = ctx.needs_input_grad
        save(ctx, x if for_weight1 else None, weight1, weight2, u if for_weight2 else None, pre)
        ctx.shape = x.shape
        return F.linear(u, weight2).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight1, weight2, u, pre = saved(ctx)
        for_x, for_weight1, for_bias1, for_weight2 = ctx.needs_input_grad
        dy = dy.reshape(len(pre), -1).contiguous()
        dweight2 = dy.t() @ u if for_weight2 else None
        if not (for_x or for_weight1 or for_bias1):
            return None, None, None, dweight2
        dpre = torch.ops.dpdmd.matmul_dgelu.default(dy, weight2, pre)
        dx = (dpre @ weight1).view(ctx.shape) if for_x else None
        dweight1 = dpre.t() @ x.reshape(len(pre), -1) if for_weight1 else None
        return dx, dweight1, sum_rows(dpre) if for_bias1 else None, dweight2
