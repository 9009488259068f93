"""What the fused forward passes of diffusers' transformer blocks share: which modules they may go round, matrix products
that leave the bias to the operation after them, with what LoRA adapters add to them, and weights in FP8.

A bias that the next operation adds costs nothing there, and its gradient falls out of that operation's; added by the
matrix product, its gradient is a pass of its own over the product's.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers.models.activations import GELU
from diffusers.models.attention import FeedForward
from diffusers.models.normalization import AdaLayerNormContinuous
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.optim.optimizer import register_optimizer_step_post_hook

from dpdmd.kernels.blocks.activation import gelu_tanh
from dpdmd.kernels.blocks.adaln_modulate import adaln_modulate
from dpdmd.kernels.blocks.adapters import Adapter, lowered, raised
from dpdmd.kernels.blocks.fp8 import Quantized, fp8_linear, quantize_rows
from dpdmd.kernels.blocks.gelu_mlp import gelu_mlp
from dpdmd.kernels.blocks.linear_gelu import linear_gelu
from dpdmd.kernels.blocks.packed_linear import packed_linear
from dpdmd.kernels.blocks.qk_norm import TokenStream
from dpdmd.kernels.runtime.kept import keeping
from dpdmd.kernels.runtime.rows import rows_product, rows_weight_gradient
from dpdmd.kernels.runtime.saved import save, saved

try:
    from peft.tuners.lora.layer import Linear as LoraLinear  # diffusers has imported it already
except ImportError:
    LoraLinear = None
_LINEAR = nn.Linear, LoraLinear


class Like(NamedTuple):
    """What a module must be for a fused forward to go round it, rather than call it."""

    cls: type  # exactly; NoneType for one that is not there
    parts: dict[str, "Like"] = {}  # noqa: RUF012  (never written to)
    demand: Callable[[nn.Module], str] | None = None  # further: what is wrong, "" for nothing


def unlike(module: nn.Module | None, like: Like) -> str:
    """Why the module is not so, to follow its name; "" where it is.

    Blocks ask at every call, as adapters, hooks and attention processors come and go.
    """
    if type(module) is not like.cls:
        return f" is a {type(module).__name__}, not a {like.cls.__name__}"
    if module is None:
        return ""
    if hooked(module):
        return " has hooks or a forward of its own"
    reason = unlike_parts(module, like.parts)
    return reason if reason or like.demand is None else like.demand(module)


def unlike_parts(module: nn.Module, parts: dict[str, Like]) -> str:
    """The same of some of its modules."""
    modules = module._modules  # reading attributes of a module takes five times as long
    for name, part in parts.items():
        reason = unlike(modules.get(name), part)
        if reason:
            return f".{name}{reason}"
    return ""


def another_forward(block: nn.Module, cls: type) -> str:
    """Why a block's class is not right; "" where it is, or is derived from `cls`, as FSDP's are."""
    same = type(block).forward is cls.forward
    return "" if same else f"it is a {type(block).__name__}, which has another forward than {cls.__name__}"


def hooked(module: nn.Module) -> bool:
    """Whether calling the module does more than its class says. DeepSpeed's hooks, which gather the module's parameters,
    do not count: see `away`."""
    if module._forward_pre_hooks or module._forward_hooks or module._backward_pre_hooks or module._backward_hooks:
        kinds = module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks
        if not all(str(hook.__module__).startswith("deepspeed.") for hooks in kinds for hook in hooks.values()):
            return True
    return "forward" in module.__dict__


def away(module: nn.Module) -> bool:
    """Whether ZeRO-3 has the module's parameters elsewhere, and calling it would gather them. In a pass of the engine
    reading them does, and lets the block gather them from then on; around the engine it does not."""
    if not module._forward_pre_hooks:
        return False
    parameters = [getattr(module, name) for name in module._parameters]
    return any(parameter.numel() == 0 for parameter in parameters if parameter is not None)


def norms_away(attn: nn.Module) -> bool:
    """Of an attention's norms, whose weights the fused forward reads."""
    return any(away(norm) for name, norm in attn._modules.items() if name.startswith("norm_"))


def plain(*layers: nn.Module) -> bool:
    """Whether each layer is x W^T + b and nothing else: no quantisation, no hooks, no LoRA at work. A LoRA layer of which
    no adapter is active is plain; W and b are those of `base(layer)`."""
    for layer in layers:
        if type(layer) is not nn.Linear:
            if not _lora(layer) or _active(layer):
                return False
            layer = base(layer)
            if type(layer) is not nn.Linear:
                return False
        # torchao's quantisation leaves the layer its class and changes its weight's.
        if type(layer._parameters.get("weight")) is not nn.Parameter:
            return False
        hooks = layer._forward_pre_hooks or layer._forward_hooks or layer._backward_pre_hooks or layer._backward_hooks
        if (hooks or "forward" in layer.__dict__) and (hooked(layer) or away(layer)):
            return False
    return True


def base(layer: nn.Module) -> nn.Module:
    """The linear layer itself, or the one inside peft's LoRA layer."""
    return layer if type(layer) is nn.Linear else layer._modules["base_layer"]


def adapter(layer: nn.Module) -> Adapter | None:
    """What peft's LoRA layer adds to a plain base layer, where it is one adapter's scale (x A^T) B^T in the base's dtype
    and nothing else. None for what is to be called: several adapters at once, dropout, DoRA, and whatever torch.compile
    traces."""
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
    return Adapter(*_as_autocast(down, up), layer.scaling[name])


def _lora(layer: nn.Module) -> bool:
    """Whether it is peft's LoRA layer, which adds its adapters' products to its base layer's."""
    return type(layer) is LoraLinear and not layer.merged_adapters and not hooked(layer)


def _active(layer: nn.Module) -> list[str]:
    """Of its adapters, those that peft would apply now."""
    if layer._disable_adapters:
        return []
    active = layer._active_adapter
    adapters = layer._modules["lora_A"]._modules
    return [name for name in ([active] if isinstance(active, str) else active) if name in adapters]


def _weights(norm: nn.LayerNorm) -> str:
    return " has weights" if norm.elementwise_affine else ""


def _dropout(dropout: nn.Dropout) -> str:
    return f" drops out (p = {dropout.p}, in training)" if dropout.p and dropout.training else ""


def _not_tanh(gelu: GELU | nn.GELU) -> str:
    return "" if gelu.approximate == "tanh" else f" has approximate = {gelu.approximate!r}, not 'tanh'"


def unequal_eps(attn: nn.Module) -> str:
    """For an attention's demand: its norms share one eps, a number."""
    norms = {
        name: attn._modules[name]
        for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k")
        if name in attn._modules
    }
    for name, norm in norms.items():
        if norm.eps is None or norm.eps != attn.norm_q.eps:
            return f".{name} has eps = {norm.eps}; it needs a number, norm_q's"
    return ""


def _not_three(net: nn.ModuleList) -> str:
    return "" if len(net) == 3 else f" has {len(net)} modules, not 3"


NOTHING = Like(type(None))
SILU = Like(nn.SiLU)
TANH_GELU = Like(nn.GELU, demand=_not_tanh)
LAYER_NORM = Like(nn.LayerNorm, demand=_weights)
NO_DROPOUT = Like(nn.Dropout, demand=_dropout)
FEED_FORWARD = Like(
    FeedForward, {"net": Like(nn.ModuleList, {"0": Like(GELU, demand=_not_tanh), "1": NO_DROPOUT}, _not_three)}
)
_ADAPTIVE_NORM = {"silu": SILU, "norm": LAYER_NORM}


def adaptive_norm(cls: type) -> Like:
    return Like(cls, _ADAPTIVE_NORM)


# Matrix products


class Fp8(NamedTuple):
    """A block's pass in FP8."""

    weights: "Fp8Weights"
    dtype: torch.dtype  # of what is not quantised

    def product(self, x: Quantized, *layers: nn.Linear, columns: tuple[int, int] | None = None) -> Tensor:
        return fp8_linear(x, self.weights.of(*layers, columns=columns), dtype=self.dtype)


def serves(fp8: Fp8 | None, *layers: nn.Module) -> bool:
    """Whether the products with these layers run in FP8, so that their input is quantised where it is made."""
    return fp8 is not None and plain(*layers)


def product(layer: nn.Module, x: Tensor | Quantized, fp8: Fp8 | None = None) -> tuple[Tensor, Tensor | None]:
    """(x W^T, b): the bias is still to be added. A layer that is not plain is called, and leaves none."""
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
    (x,), h = lowered(tuple(_as_autocast(x)), [added])
    y, bias = product(base(layer), x, fp8)
    return raised(y, h, [added]), bias


def product_of_two(
    layer: nn.Module, a: Tensor, b: Tensor | Quantized, fp8: Fp8 | None = None
) -> tuple[Tensor | tuple[Tensor, Tensor], Tensor | tuple[Tensor | None, None] | None]:
    """`product` with a and b side by side, where they are not put; in FP8 a pair of products, still to be added up."""
    width = a.shape[-1]
    if isinstance(b, Quantized):
        linear = base(layer)
        first = fp8.product(quantize_rows(a), linear, columns=(0, width))
        second = fp8.product(b, linear, columns=(width, linear.in_features))
        return (first, second), (linear.bias, None)
    if plain(layer):
        linear = base(layer)
        return _LinearOfTwo.apply(*_as_autocast(a, b, linear.weight)), linear.bias
    added = adapter(layer)
    if added is None:
        return layer(torch.cat((a, b), dim=-1)), None
    (a, b), h = lowered(tuple(_as_autocast(a, b)), [added])
    y, bias = product_of_two(base(layer), a, b if fp8 is None else quantize_rows(b), fp8)
    return (raised(y, h, [added]) if fp8 is None else (raised(y[0], h, [added]), y[1])), bias


def image_stream(attn: nn.Module, x: Tensor | Quantized, head_dim: int, fp8: Fp8 | None = None) -> TokenStream:
    """The projections of x (B, S, C) by those of an attention's layers that have no `add` in their names."""
    qkv, bias = _projections((attn.to_q, attn.to_k, attn.to_v), x, head_dim, fp8)
    return TokenStream(qkv, *_norm_weights(attn.norm_q, attn.norm_k), bias)


def text_stream(attn: nn.Module, x: Tensor, head_dim: int) -> TokenStream:
    """By those that have."""
    qkv, bias = _projections((attn.add_q_proj, attn.add_k_proj, attn.add_v_proj), x, head_dim)
    return TokenStream(qkv, *_norm_weights(attn.norm_added_q, attn.norm_added_k), bias)


def _projections(
    layers: tuple[nn.Module, ...], x: Tensor | Quantized, head_dim: int, fp8: Fp8 | None = None
) -> tuple[Tensor | tuple[Tensor, ...], tuple[Tensor | None, ...]]:
    """(qkv, bias) of a TokenStream: one product (B, S, 3, H, D) where all layers are plain, else three (B, S, H, D)."""
    if isinstance(x, Tensor) and not plain(*layers):
        added = [adapter(layer) for layer in layers]
        if not all(each or plain(layer) for each, layer in zip(added, layers, strict=True)):
            each = [product(layer, x, fp8) for layer in layers]
            return tuple(y.unflatten(-1, (-1, head_dim)) for y, _ in each), tuple(bias for _, bias in each)
        layers = tuple(map(base, layers))
        ends = itertools.accumulate([layer.out_features for layer in layers], initial=0)
        added = [each._replace(column=start) for each, start in zip(added, ends, strict=False) if each]
        (x,), h = lowered(tuple(_as_autocast(x)), added)
        qkv = raised(_packed(layers, x if fp8 is None else quantize_rows(x), fp8), h, added)
    else:
        layers = tuple(map(base, layers))
        qkv = _packed(layers, x, fp8)
    return qkv.unflatten(-1, (3, -1, head_dim)), tuple(layer.bias for layer in layers)


def _packed(layers: tuple[nn.Linear, ...], x: Tensor | Quantized, fp8: Fp8 | None) -> Tensor:
    if isinstance(x, Quantized):
        return fp8.product(x, *layers)
    return packed_linear(x, tuple(layer.weight for layer in layers))


def _norm_weights(norm_q: nn.Module | None, norm_k: nn.Module | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if norm_q is None else (norm_q.weight, norm_k.weight)


def feed_forward(ff: nn.Module, x: Tensor | Quantized, fp8: Fp8 | None = None) -> tuple[Tensor, Tensor | None]:
    """(y, bias): gelu(x W_1^T + b_1) W_2^T, and the bias still to be added."""
    activation, _, out = ff.net
    proj = activation.proj
    if fp8 is None and plain(proj, out):
        first, second = base(proj), base(out)
        if first.bias is not None:
            return gelu_mlp(x, first.weight, first.bias, second.weight), second.bias
    return product(out, activated(proj, x, fp8, quantize=serves(fp8, out)), fp8)


def activated(layer: nn.Module, x: Tensor | Quantized, fp8: Fp8 | None, quantize: bool) -> Tensor | Quantized:
    """gelu(x W^T + b)"""
    if fp8 is None and plain(layer):
        linear = base(layer)
        if linear.bias is not None:
            return linear_gelu(x, linear.weight, linear.bias)
    return gelu_tanh(*product(layer, x, fp8), quantize=quantize)


def _rows_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (B, S, K) times weight (N, K) transposed; the samples of x may be apart in memory."""
    if x.is_contiguous():
        return F.linear(x, weight)
    return _RowsLinear.apply(*_as_autocast(x, weight))


class _RowsLinear(torch.autograd.Function):
    # F.linear would copy x to make one matrix of it. A batched product reads the samples where they are.
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
    joint: Tensor, length: int, first: nn.Module, second: nn.Module, fp8: tuple[Fp8 | None, Fp8 | None]
) -> tuple[tuple[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]:
    """`product` of the first `length` rows of joint (B, S, C) with one layer, and of the others with another; fp8 of
    each."""
    if fp8 == (None, None) and plain(first, second):
        first, second = base(first), base(second)
        y1, y2 = _SplitProducts.apply(*_as_autocast(joint, first.weight, second.weight), length)
        return (y1, first.bias), (y2, second.bias)
    rows1, rows2 = split_rows(joint, length)
    return product(first, rows1, fp8[0]), product(second, rows2, fp8[1])


class _SplitProducts(torch.autograd.Function):
    # Reads both parts where they are, and writes their gradients side by side: no copies, no concatenation.
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
        if for_joint and torch.compiler.is_compiling():  # it takes no slice for `out`
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


class _LinearOfTwo(torch.autograd.Function):
    # A concatenation would be written, read and kept for the backward pass; slices of the weight would fill two weights
    # with zeros there and add them up. The price is that the first product is rounded before the second is added.
    @staticmethod
    def forward(ctx, a, b, weight):
        save(ctx, *((a, b) if ctx.needs_input_grad[2] else (None, None)), weight)
        ctx.width = width = a.shape[-1]
        y = F.linear(a, weight[:, :width])  # returned as it is, and not a view of it: adapters add to it in place
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
            if torch.compiler.is_compiling():  # it takes no slice for `out`
                dweight = torch.cat((rows @ a, rows @ b), dim=1)
            else:
                dweight = torch.empty_like(weight)
                torch.mm(rows, a, out=dweight[:, :width])
                torch.mm(rows, b, out=dweight[:, width:])
        return da, db, dweight


def _as_autocast(*tensors: Tensor) -> list[Tensor]:
    """As F.linear takes them under autocast, which does not reach into autograd functions."""
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):  # which knows no meta tensors
        return list(tensors)
    return [tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors]


def split_rows(joint: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """The first `length` rows of joint (B, S, C) and the others, as views."""
    return _SplitRows.apply(joint, length)


class _SplitRows(torch.autograd.Function):
    # The backward passes of two slices fill two joint buffers and add them up; this one writes one, once.
    @staticmethod
    def forward(ctx, joint, length):
        return joint[:, :length], joint[:, length:]

    @staticmethod
    @once_differentiable
    def backward(ctx, *upstream):
        return torch.cat(upstream, dim=1), None


# FP8


class Fp8Weights:
    """The large weights of a block in FP8, made when a pass without gradient first wants them.

    They are made anew where a weight's memory or version says that it changed, and, where such weights are trained, after
    any optimizer's step: some write past torch's version counters (apex, DeepSpeed), and ZeRO-3 gathers weights into
    new memory each time. Copies, also pickled ones, start without any.

    names: the layers, in the block.
    """

    _steps: int | None = None  # of all optimizers of the process, since there are such weights

    def __init__(self, names: tuple[str, ...]):
        self._names = names
        self._kept = {}
        self._trained = False
        if Fp8Weights._steps is None:
            Fp8Weights._steps = 0
            register_optimizer_step_post_hook(_count_step)

    def __reduce__(self):
        return Fp8Weights, (self._names,)

    def outdate(self) -> None:
        """They are made anew when they are next wanted."""
        self._kept = {key: (None, quantized) for key, (_, quantized) in self._kept.items()}

    def note_gradients(self, block: nn.Module) -> None:
        """In a pass with gradients. The weights count as trained from then on where one of them requires gradients,
        though it may do so only now and then. Adapters on frozen weights do not change these."""
        if not self._trained:
            layers = [block.get_submodule(name) for name in self._names]
            self._trained = any(base(layer).weight.requires_grad for layer in layers if type(layer) in _LINEAR)

    def of(self, *layers: nn.Linear, columns: tuple[int, int] | None = None) -> Quantized:
        """The layers' weights, stacked, or some columns of them."""
        weights = [layer.weight for layer in layers]
        versions = [self._version(weight) for weight in weights]
        kept, quantized = self._kept.get((layers, columns), (None, None))
        if kept != versions:
            stacked = torch.cat(weights).detach() if len(weights) > 1 else weights[0].detach()
            made = quantize_rows(stacked if columns is None else stacked[:, slice(*columns)])
            if quantized is not None and all(map(_alike, made, quantized)):  # a CUDA graph finds them where they were
                torch._foreach_copy_(list(quantized), list(made))
            else:
                quantized = made
            self._kept[layers, columns] = versions, quantized
        return quantized

    def _version(self, weight: Tensor) -> tuple:
        steps = self._steps if self._trained or weight.requires_grad else None
        if hasattr(weight, "ds_id") or weight.is_inference():
            return (steps,)
        return steps, weight.data_ptr(), weight._version


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.device == b.device


def _count_step(*_) -> None:
    Fp8Weights._steps += 1


def fp8_pass(block: nn.Module, *inputs: Tensor) -> Fp8 | None:
    """None where the block has no FP8, where torch.compile traces it, and in a pass that has gradients: also in the
    first one of a checkpoint, in no_grad mode but on inputs that require them, or in `selective_checkpoint`."""
    weights = block._fp8_weights
    if weights is None or torch.compiler.is_compiling():
        return None
    if keeping() or any(x.requires_grad for x in inputs):
        weights.note_gradients(block)
        return None
    if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in block.parameters()):
        weights.note_gradients(block)
        return None
    device = inputs[0].device.type
    autocast = torch.is_autocast_enabled(device)
    return Fp8(weights, torch.get_autocast_dtype(device) if autocast else inputs[0].dtype)


# The norm after the last block


def why_not_norm_out(norm: nn.Module) -> str:
    """Why it must run as diffusers wrote it; "" where it need not."""
    return another_forward(norm, AdaLayerNormContinuous) or unlike_parts(norm, _ADAPTIVE_NORM).removeprefix(".")


def forward_norm_out(norm: nn.Module, x: Tensor, conditioning_embedding: Tensor) -> Tensor:
    """The fused AdaLayerNormContinuous.forward: x (B, S, C), conditioning_embedding (B, C)."""
    if why_not_norm_out(norm):
        return type(norm).forward(norm, x, conditioning_embedding)
    scale, shift = norm.linear(F.silu(conditioning_embedding).to(x.dtype)).chunk(2, dim=1)
    return adaln_modulate(x, scale, shift, eps=norm.norm.eps)
