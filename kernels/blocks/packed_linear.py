"""Several linear layers of one input as one matmul, forward and backward.

    out = x [W_1; W_2; ...]^T + [b_1; b_2; ...]

In plain PyTorch. Forward reads x once. Backward is one matmul for x's gradient, which separate layers add up, and one for
the weights'. Both passes stack copies of the weights: 14 MB for q, k and v of SD3.5-M, 10 us of 340 at batch 4.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dpdmd.kernels.runtime import checks
from dpdmd.kernels.runtime.registration import transformed
from dpdmd.kernels.runtime.saved import Function, save, saved


class _PackedLinear(Function):
    # The older form of forward, with ctx: the newer one binds its arguments by inspection, 20 us a call.
    @staticmethod
    def forward(ctx, x, count, *weights_and_biases):
        weights, biases = weights_and_biases[:count], weights_and_biases[count:]
        # The weights exist anyway. Their stack is not kept, nor x where all weights are frozen.
        save(ctx, x if any(ctx.needs_input_grad[2 : 2 + count]) else None, *weights)
        ctx.shape = x.shape
        return F.linear(x, torch.cat(weights), torch.cat(biases) if biases else None)

    @staticmethod
    def backward(ctx, upstream):
        x, *weights = saved(ctx)
        for_x, _, *needed = ctx.needs_input_grad
        for_weights, for_biases = needed[: len(weights)], needed[len(weights) :]
        sizes = [len(weight) for weight in weights]
        count = ctx.shape[:-1].numel()
        columns = upstream.reshape(count, sum(sizes))
        dx = (columns @ torch.cat(weights)).view(ctx.shape) if for_x else None
        rows = x.reshape(count, x.shape[-1]) if any(for_weights) else None
        return (
            dx,
            None,
            *_parts(columns, sizes, for_weights, lambda part: part.t() @ rows),
            *_parts(columns, sizes, for_biases, lambda part: part.sum(0)),
        )


def _parts(columns: Tensor, sizes: list[int], needed: list[bool], gradient) -> list[Tensor | None]:
    """`gradient` of the columns of each layer that needs one.

    If all do, it is computed at once and returned in slices of one tensor. Each slice is dense, so AccumulateGrad keeps it
    without a clone; they do not overlap, so adding to one leaves the others alone. The memory is freed when the last
    slice is dropped: DeepSpeed, which moves gradients out as they come, gets all of them from this one node.
    """
    if needed and all(needed):
        return list(gradient(columns).split(sizes))
    parts = zip(columns.split(sizes, dim=1)[: len(needed)], needed, strict=True)
    return [gradient(part) if wanted else None for part, wanted in parts]


def packed_linear(x: Tensor, weights: tuple[Tensor, ...], bias: tuple[Tensor, ...] | None = None) -> Tensor:
    """F.linear of x and each weight and bias, side by side: (..., N_1 + N_2 + ...).

    x (..., K); weights: (N_1, K), (N_2, K), ...; bias: (N_1,), (N_2,), ..., or None. One dtype of float32, float16,
        bfloat16 and float64 (under autocast any of them, cast as for F.linear), any strides, any batch. All receive
        gradients, those of weights as slices of one tensor. Differentiable twice.

    Saved for backward, as by separate layers: the weights, and x if one of them needs a gradient.

    Raises TypeError for a dtype or type, ValueError for a shape, a device and a number of tensors.
    """
    # torch.is_autocast_enabled refuses "meta".
    autocast = isinstance(x, Tensor) and x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)
    _check(x, weights, bias, autocast)
    tensors = (x, *weights, *(bias or ()))
    if autocast:
        dtype = torch.get_autocast_dtype(x.device.type)
        tensors = [tensor if tensor.dtype == torch.float64 else tensor.to(dtype) for tensor in tensors]
    x, *parameters = tensors
    count = len(weights)
    if count == 1:
        return F.linear(x, *parameters)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors) and not transformed():
        return _PackedLinear.apply(x, count, *parameters)
    return F.linear(x, torch.cat(parameters[:count]), torch.cat(parameters[count:]) if bias else None)


def _check(x: Tensor, weights: tuple[Tensor, ...], bias: tuple[Tensor, ...] | None, autocast: bool) -> None:
    checks.floating("x", x)
    if x.ndim == 0:
        raise ValueError("x has shape (); it needs a dimension of channels: (..., K)")
    for name, value in (("weights", weights), ("bias", bias)):
        if not isinstance(value, (tuple, list)) and not (value is None and name == "bias"):
            raise TypeError(f"{name} is a {type(value).__name__}; it needs to be a tuple of tensors, one a layer")
    if not weights:
        raise ValueError("weights is empty; it needs one tensor at least")
    if bias is not None and len(bias) != len(weights):
        raise ValueError(f"bias has {len(bias)} entries; it needs one for each of the {len(weights)} weights, or None")
    K = x.shape[-1]
    for i, weight in enumerate(weights):
        _check_parameter("weights", i, weight, x, autocast)
        if weight.ndim != 2 or weight.shape[1] != K:
            raise ValueError(f"weights[{i}] has shape {tuple(weight.shape)}; with x {tuple(x.shape)} it needs (N, {K})")
    for i, vector in enumerate(bias or ()):
        _check_parameter("bias", i, vector, x, autocast)
        if vector.shape != weights[i].shape[:1]:
            raise ValueError(
                f"bias[{i}] has shape {tuple(vector.shape)}; with weights[{i}] {tuple(weights[i].shape)} "
                f"it needs ({len(weights[i])},)"
            )


def _check_parameter(name: str, i: int, value: Tensor, x: Tensor, autocast: bool) -> None:
    if isinstance(value, Tensor) and value.dtype == x.dtype and value.device == x.device:
        return  # early: making six names takes longer than all the checks
    checks.floating(f"{name}[{i}]", value)
    if value.dtype != x.dtype and not autocast:
        raise TypeError(f"{name}[{i}] has dtype {value.dtype}; it needs x's dtype {x.dtype}, or autocast")
    if value.device != x.device:
        raise ValueError(f"{name}[{i}] is on {value.device}; it needs to be on x's device {x.device}")
