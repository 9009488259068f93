"""The matrix products of a fused block's linear layers, with their LoRA adapters, and the feed-forward.

They leave the bias to the next operation: it adds the bias at no cost and computes the bias's gradient with its own; a
matrix product would need another pass over its gradient. Only FP8 passes quantise inputs, which a checker cannot see:
what depends on it is Any.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dpdmd.kernels.blocks.activation import gelu_tanh
from dpdmd.kernels.blocks.adapters import Adapter, lowered, raised
from dpdmd.kernels.blocks.fp8 import Quantized, quantize_rows
from dpdmd.kernels.blocks.gelu_mlp import gelu_mlp
from dpdmd.kernels.blocks.linear_gelu import linear_gelu
from dpdmd.kernels.fusion.conditions import away, hooked
from dpdmd.kernels.fusion.fp8_weights import Fp8Pass
from dpdmd.kernels.runtime.rows import rows_product, rows_weight_gradient
from dpdmd.kernels.runtime.saved import Function, save, saved

try:
    from peft.tuners.lora.layer import Linear as LoraLinear  # at no cost: diffusers imports it too
except ImportError:
    LoraLinear = None


def plain(*layers: nn.Module) -> bool:
    """Whether each layer only computes x W^T + b of `base(layer)`: no quantisation, no hooks, no active LoRA adapter."""
    for layer in layers:
        if type(layer) is not nn.Linear:
            if not _lora(layer) or _active(layer):
                return False
            layer = base(layer)
            if type(layer) is not nn.Linear:
                return False
        # torchao's quantisation changes the weight's class, not the layer's.
        if type(layer._parameters.get("weight")) is not nn.Parameter:
            return False
        hooks = layer._forward_pre_hooks or layer._forward_hooks or layer._backward_pre_hooks or layer._backward_hooks
        if (hooks or "forward" in layer.__dict__) and (hooked(layer) or away(layer)):
            return False
    return True


def base(layer: nn.Module) -> Any:
    """The linear layer itself, or the one inside peft's LoRA layer."""
    return layer if type(layer) is nn.Linear else layer._modules["base_layer"]


def adapter(layer: Any) -> Adapter | None:
    """The adapter of peft's LoRA layer, where it adds scale (x A^T) B^T in the base's dtype to a plain base layer and
    nothing else. None for layers to call: with several active adapters, dropout or DoRA, or traced by torch.compile."""
    if type(layer) is nn.Linear or not _lora(layer) or torch.compiler.is_compiling():
        return None
    names = _active(layer)
    if len(names) != 1 or layer.lora_variant:
        return None
    modules, (name,) = layer._modules, names
    down, up, dropout = (modules[part]._modules[name] for part in ("lora_A", "lora_B", "lora_dropout"))
    if not plain(base(layer), down, up) or down.bias is not None or up.bias is not None:
        return None
    weight, down, up = base(layer).weight, down.weight, up.weight
    if type(dropout) is not nn.Identity or not weight.dtype == down.dtype == up.dtype:
        return None
    return Adapter(*as_autocast(down, up), scale=layer.scaling[name])


def _lora(layer: nn.Module) -> bool:
    """Whether it is peft's LoRA layer, with no merged adapters and no hooks."""
    return type(layer) is LoraLinear and not layer.merged_adapters and not hooked(layer)


def _active(layer: Any) -> list[str]:
    """The adapters that peft would apply now."""
    if layer._disable_adapters:
        return []
    active = layer._active_adapter
    adapters = layer._modules["lora_A"]._modules
    return [name for name in ([active] if isinstance(active, str) else active) if name in adapters]


def serves(fp8: Fp8Pass | None, *layers: Any) -> bool:
    """Whether the products with these layers run in FP8, so that the operation before them quantises their input."""
    return fp8 is not None and plain(*layers)


def product(layer: nn.Module, x: Tensor | Quantized, fp8: Fp8Pass | Any = None) -> tuple[Tensor, Tensor | None]:
    """(x W^T, b): the caller adds the bias. A layer that must be called adds its bias itself: (y, None)."""
    if isinstance(x, Tensor) and serves(fp8, layer):
        x = quantize_rows(x)
    if isinstance(x, Quantized):
        linear = base(layer)
        return fp8.product(x, linear), linear.bias
    if plain(layer):
        linear = base(layer)
        return _rows_linear(x, linear.weight), linear.bias
    added = adapter(layer)
    if added is None:
        return layer(x), None
    (x,), h = lowered(tuple(as_autocast(x)), [added])
    y, bias = product(base(layer), x, fp8)
    return raised(y, h, [added]), bias


def product_of_two(
    layer: nn.Module, a: Tensor, b: Tensor | Quantized, fp8: Fp8Pass | Any = None
) -> tuple[Tensor | tuple[Tensor, Tensor], Tensor | tuple[Tensor | None, None] | None]:
    """`product` of [a, b] without the concatenation. In FP8 a pair of products, which the caller adds."""
    width = a.shape[-1]
    if isinstance(b, Quantized):
        linear = base(layer)
        first = fp8.product(quantize_rows(a), linear, columns=(0, width))
        second = fp8.product(b, linear, columns=(width, linear.in_features))
        return (first, second), (linear.bias, None)
    if plain(layer):
        linear = base(layer)
        return _LinearOfTwo.apply(*as_autocast(a, b, linear.weight)), linear.bias
    added = adapter(layer)
    if added is None:
        return layer(torch.cat((a, b), dim=-1)), None
    (a, b), h = lowered(tuple(as_autocast(a, b)), [added])
    y, bias = product_of_two(base(layer), a, b if fp8 is None else quantize_rows(b), fp8)
    return ((raised(y[0], h, [added]), y[1]) if isinstance(y, tuple) else raised(y, h, [added])), bias


def feed_forward(ff: Any, x: Tensor | Any, fp8: Fp8Pass | None = None) -> tuple[Tensor, Tensor | None]:
    """(y, bias): gelu(x W_1^T + b_1) W_2^T, and the bias that the caller adds."""
    activation, _, out = ff.net
    proj = activation.proj
    if fp8 is None and plain(proj, out):
        first, second = base(proj), base(out)
        if first.bias is not None:
            return gelu_mlp(x, first.weight, first.bias, second.weight), second.bias
    return product(out, activated(proj, x, fp8, quantize=serves(fp8, out)), fp8)


def activated(layer: nn.Module, x: Tensor | Any, fp8: Fp8Pass | None, quantize: bool) -> Tensor | Quantized:
    """gelu(x W^T + b)"""
    if fp8 is None and plain(layer):
        linear = base(layer)
        if linear.bias is not None:
            return linear_gelu(x, linear.weight, linear.bias)
    return gelu_tanh(*product(layer, x, fp8), quantize=quantize)


def _rows_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (B, S, K) times weight (N, K) transposed. The samples of x may have gaps between them in memory."""
    if x.is_contiguous():
        return F.linear(x, weight)
    return _RowsLinear.apply(*as_autocast(x, weight))


class _RowsLinear(Function):
    # F.linear would copy x into one matrix. A batched product reads the samples in place.
    @staticmethod
    def forward(ctx, x, weight):
        save(ctx, x if ctx.needs_input_grad[1] else None, weight)
        return rows_product(x, weight.t())

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight = saved(ctx)
        dx = dy @ weight if ctx.needs_input_grad[0] else None
        return dx, rows_weight_gradient(dy, x) if ctx.needs_input_grad[1] else None


def split_products(
    joint: Tensor, length: int, first: Any, second: Any, fp8: tuple[Fp8Pass | None, Fp8Pass | None]
) -> tuple[tuple[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]:
    """`product` of the first `length` rows of joint (B, S, C) with `first`, of the others with `second`; fp8: one for each."""
    if fp8 == (None, None) and plain(first, second):
        first, second = base(first), base(second)
        y1, y2 = _SplitProducts.apply(*as_autocast(joint, first.weight, second.weight), length)
        return (y1, first.bias), (y2, second.bias)
    rows1, rows2 = split_rows(joint, length)
    return product(first, rows1, fp8[0]), product(second, rows2, fp8[1])


class _SplitProducts(Function):
    # Reads both parts in place and writes their gradients into one tensor: no copies, no concatenation.
    @staticmethod
    def forward(ctx, joint, weight1, weight2, length):
        save(ctx, joint if any(ctx.needs_input_grad[1:3]) else None, weight1, weight2)
        ctx.length, ctx.shape = length, joint.shape
        return rows_product(joint[:, :length], weight1.t()), rows_product(joint[:, length:], weight2.t())

    @staticmethod
    @once_differentiable
    def backward(ctx, dy1, dy2):
        joint, weight1, weight2 = saved(ctx)
        for_joint, *for_weights, _ = ctx.needs_input_grad
        parts = slice(None, ctx.length), slice(ctx.length, None)
        djoint = None
        if for_joint and torch.compiler.is_compiling():  # torch.compile takes no slice for `out`
            djoint = torch.cat((rows_product(dy1, weight1), rows_product(dy2, weight2)), dim=1)
        elif for_joint:
            djoint = dy1.new_empty(ctx.shape)
            rows_product(dy1, weight1, out=djoint[:, parts[0]])
            rows_product(dy2, weight2, out=djoint[:, parts[1]])
        dweights = [
            rows_weight_gradient(dy, joint[:, part]) if wanted else None
            for dy, part, wanted in zip((dy1, dy2), parts, for_weights, strict=True)
        ]
        return djoint, *dweights, None


class _LinearOfTwo(Function):
    # A concatenation would be written, read and saved for the backward pass, and the backward pass of two weight slices
    # adds two zero-filled weights. The price: the first product is rounded before the second is added.
    @staticmethod
    def forward(ctx, a, b, weight):
        save(ctx, *((a, b) if ctx.needs_input_grad[2] else (None, None)), weight)
        ctx.width = width = a.shape[-1]
        y = F.linear(a, weight[:, :width])  # no view of it is returned: adapters add to it in place
        y.view(-1, len(weight)).addmm_(b.flatten(0, -2), weight[:, width:].t())
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        a, b, weight = saved(ctx)
        width = ctx.width
        da = dy @ weight[:, :width] if ctx.needs_input_grad[0] else None
        db = dy @ weight[:, width:] if ctx.needs_input_grad[1] else None
        dweight = None
        if ctx.needs_input_grad[2]:
            rows, a, b = dy.flatten(0, -2).t(), a.flatten(0, -2), b.flatten(0, -2)
            if torch.compiler.is_compiling():  # torch.compile takes no slice for `out`
                dweight = torch.cat((rows @ a, rows @ b), dim=1)
            else:
                dweight = torch.empty_like(weight)
                torch.mm(rows, a, out=dweight[:, :width])
                torch.mm(rows, b, out=dweight[:, width:])
        return da, db, dweight


def as_autocast(*tensors: Tensor) -> list[Tensor]:
    """The tensors in autocast's dtype, as F.linear casts them: autocast does not reach into autograd functions."""
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):  # autocast does not know meta tensors
        return list(tensors)
    return [tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors]


def split_rows(joint: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """The first `length` rows of joint (B, S, C) and the others, as views."""
    return _SplitRows.apply(joint, length)


class _SplitRows(Function):
    # The backward passes of two slices fill two joint buffers and add them; this one writes one buffer, once.
    @staticmethod
    def forward(ctx, joint, length):
        return joint[:, :length], joint[:, length:]

    @staticmethod
    @once_differentiable
    def backward(ctx, *upstream):
        return torch.cat(upstream, dim=1), None
