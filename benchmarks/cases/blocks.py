"""The memory-bound operations of a transformer block: sizes, inputs, peers, and the bytes that each must move.

A peer is diffusers' code in bfloat16; the same function in float64 is the truth that everything is checked against.

Some of ours add the bias of the linear layer before them, because its gradient is a by-product there. A peer's linear layer
adds the bias at no cost: so the peer gets tensors that contain the bias, and its backward pass sums up the bias's gradient,
as the linear layer's would.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from harness.operation import Draw, Implementation, Operation, Tensors, Traffic, wide
from torch import Tensor

from dpdmd.kernels import (
    Quantized,
    TokenStream,
    adaln_modulate,
    gated_residual,
    gated_residual_adaln,
    gelu_tanh,
    qk_norm,
    qk_norm_rope,
    quantize_rows,
    swiglu,
)

EPS = 1e-6
LARGEST_E4M3 = 448.0


@dataclass(frozen=True)
class Dimensions:
    batch: int
    image: int  # tokens
    text: int
    heads: int
    head_dim: int
    mlp: int  # width of the feed-forward layer

    @property
    def channels(self) -> int:
        return self.heads * self.head_dim


SIZES = {
    "sd35-b4": Dimensions(batch=4, image=4096, text=333, heads=24, head_dim=64, mlp=6144),  # SD3.5-M, 1024 x 1024
    "flux-b4": Dimensions(batch=4, image=4096, text=512, heads=24, head_dim=128, mlp=12288),  # FLUX.1, 1024 x 1024
    "awkward": Dimensions(batch=3, image=13, text=5, heads=3, head_dim=24, mlp=200),  # no powers of two
}


@dataclass(frozen=True, kw_only=True)
class BlockOperation(Operation):
    """Forward and backward pass are timed separately; backward is torch.autograd.grad on a retained graph, for all inputs with
    a gradient. Compare the times of the GPU alone: at these sizes a call takes the host about as long."""

    sizes: Mapping[str, Dimensions] = field(default_factory=lambda: SIZES)
    biases: Mapping[str, str] = field(default_factory=dict)  # the bias of each linear layer's output, by input names

    compile_seconds: ClassVar[float] = 240.0

    def inputs_of(self, implementation: Implementation, inputs: Tensors) -> Tensors:
        """A peer's linear layers have added their biases."""
        if not implementation.peer:
            return inputs
        separate = self.separate(inputs)
        return separate | {name: separate[name] + separate[bias] for name, bias in self.biases.items()}

    def truth_inputs(self, inputs: Tensors) -> Tensors:
        """The truth adds the biases itself."""
        return self.separate(inputs)

    def separate(self, tensors: Tensors) -> Tensors:
        """Split image_qkv (B, S, 3, H, D) into image_q, image_k, image_v (B, S, H D), as from three linear layers."""
        separate = {}
        for name, tensor in tensors.items():
            if name.endswith("_qkv"):
                for each, part in zip(PROJECTIONS, tensor.unbind(2), strict=True):
                    separate[name.removesuffix("qkv") + each] = part.flatten(2).contiguous()
            else:
                separate[name] = tensor
        return separate

    def facts(self, implementation: Implementation, size: str, *checked: Any) -> dict[str, Any]:
        return {"dimensions": vars(self.sizes[size]), **super().facts(implementation, size, *checked)}


class _BiasOfProduct(torch.autograd.Function):
    """Identity on a linear layer's output that contains its bias; backward gives the gradients of both."""

    @staticmethod
    def forward(ctx, product, bias):
        ctx.rows = product.ndim - bias.ndim
        return product.view_as(product)

    @staticmethod
    def backward(ctx, upstream):
        return upstream, upstream.sum(dim=tuple(range(ctx.rows)))


def _product(product: Tensor, bias: Tensor) -> Tensor:
    return product + bias if product.dtype == torch.float64 else _BiasOfProduct.apply(product, bias)


def _quantized(x: Tensor) -> Quantized | Tensor:
    """Quantise to e4m3 with one scale a row. The truth, in float64, stays unquantised."""
    if x.dtype == torch.float64:
        return x
    scale = (x.abs().amax(dim=-1, keepdim=True).float() / LARGEST_E4M3).clamp(min=1e-12)
    return Quantized((x.float() / scale).clamp(-LARGEST_E4M3, LARGEST_E4M3).to(torch.float8_e4m3fn), scale)


def _no_grad(function: Callable) -> Callable:
    def without_gradient(**inputs):
        with torch.no_grad():
            return function(**inputs)

    return without_gradient


# adaln_modulate: LayerNorm, scale and shift. The vectors are chunks of one modulation tensor, as in the blocks.


def _chunks(dimensions: Dimensions, draw: Draw, names: tuple[str, ...]) -> Tensors:
    modulation = 0.5 * draw(dimensions.batch, max(6, len(names)) * dimensions.channels)
    return dict(zip(names, modulation.split(dimensions.channels, dim=1), strict=False))


def _image(dimensions: Dimensions, draw: Draw) -> Tensor:
    return draw(dimensions.batch, dimensions.image, dimensions.channels)


def _make_adaln(dimensions: Dimensions, draw: Draw, names=("scale", "shift")) -> Tensors:
    return {"x": _image(dimensions, draw), **_chunks(dimensions, draw, names)}


def _norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=EPS)


def _modulated(n: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return n * (1 + scale[:, None]) + shift[:, None]


def _adaln_ours(x, scale, shift, quantize=False):
    return adaln_modulate(x, scale, shift, eps=EPS, quantize=quantize)


def _adaln_peer(x, scale, shift):
    return _modulated(_norm(x), scale, shift)


def _adaln_pair_ours(x, scale, shift, scale2, shift2):
    return adaln_modulate(x, (scale, scale2), (shift, shift2), eps=EPS)


def _adaln_pair_peer(x, scale, shift, scale2, shift2):
    n = _norm(x)
    return _modulated(n, scale, shift), _modulated(n, scale2, shift2)


# gated_residual, alone and followed by the next adaln_modulate; with two branches, as in SD3.5's dual blocks.


def _make_gated(dimensions: Dimensions, draw: Draw, branches=1, adaln=True) -> Tensors:
    names = ("gate", "scale", "shift")[: 3 if adaln else 1] + (("gate2",) if branches == 2 else ())
    inputs = {"residual": _image(dimensions, draw)}
    for branch in ("", "2")[:branches]:
        inputs |= {f"y{branch}": _image(dimensions, draw), f"bias{branch}": draw(dimensions.channels)}
    return {**inputs, **_chunks(dimensions, draw, names)}


def _gated_ours(residual, gate, y, bias):
    return gated_residual(residual, gate, y, bias=bias)


def _gated_peer(residual, gate, y, bias):
    return residual + gate.unsqueeze(1) * _product(y, bias)


def _gated_adaln_ours(residual, gate, y, bias, scale, shift, quantize=False):
    return gated_residual_adaln(residual, gate, y, scale, shift, bias=bias, eps=EPS, quantize=quantize)


def _gated_adaln_peer(residual, gate, y, bias, scale, shift):
    h = _gated_peer(residual, gate, y, bias)
    return h, _modulated(_norm(h), scale, shift)


def _gated_adaln_pair_ours(residual, gate, gate2, y, y2, bias, bias2, scale, shift):
    return gated_residual_adaln(residual, (gate, gate2), (y, y2), scale, shift, bias=(bias, bias2), eps=EPS)


def _gated_adaln_pair_peer(residual, gate, gate2, y, y2, bias, bias2, scale, shift):
    h = _gated_peer(residual, gate, y, bias)
    return _gated_adaln_peer(h, gate2, y2, bias2, scale, shift)


# qk_norm: SD3.5's joint attention, image first; diffusers puts the heads before the tokens.
# qk_norm_rope: FLUX's double blocks, text first, with torch's RMSNorm.

PROJECTIONS = ("q", "k", "v")
QKV_BIASES = {f"{stream}_{each}": f"{stream}_{each}_bias" for stream in ("image", "text") for each in PROJECTIONS}


def _make_qk_norm(dimensions: Dimensions, draw: Draw) -> Tensors:
    inputs = {}
    for stream, tokens in (("image", dimensions.image), ("text", dimensions.text)):
        inputs[f"{stream}_qkv"] = draw(dimensions.batch, tokens, 3, dimensions.heads, dimensions.head_dim)
        inputs |= {f"{stream}_{each}_weight": 1 + 0.1 * draw(dimensions.head_dim) for each in ("q", "k")}
        inputs |= {f"{stream}_{each}_bias": 0.5 * draw(dimensions.channels) for each in PROJECTIONS}
    return inputs


def _make_qk_norm_rope(dimensions: Dimensions, draw: Draw) -> Tensors:
    inputs = _make_qk_norm(dimensions, draw)
    tokens, device = dimensions.text + dimensions.image, inputs["image_qkv"].device
    frequencies = 10000 ** -torch.linspace(0, 1, dimensions.head_dim // 2, device=device)
    angles = (torch.arange(tokens, device=device)[:, None] * frequencies).repeat_interleave(2, dim=1)
    return {**inputs, "cos": angles.cos(), "sin": angles.sin()}


def _stream(stream: str, inputs: Tensors) -> TokenStream:
    biases = tuple(inputs[f"{stream}_{each}_bias"] for each in PROJECTIONS)
    return TokenStream(inputs[f"{stream}_qkv"], inputs[f"{stream}_q_weight"], inputs[f"{stream}_k_weight"], bias=biases)


def _qk_norm_ours(**inputs):
    return qk_norm(_stream("image", inputs), _stream("text", inputs), eps=EPS)


def _qk_norm_rope_ours(cos, sin, **inputs):
    return qk_norm_rope(_stream("text", inputs), _stream("image", inputs), cos=cos, sin=sin, eps=EPS)


def _rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """diffusers' RMSNorm."""
    variance = wide(x).pow(2).mean(-1, keepdim=True)
    return (x * torch.rsqrt(variance + EPS)).to(weight.dtype) * weight


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """diffusers' apply_rotary_emb, use_real_unbind_dim=-1, of x (B, S, H, D)."""
    real, imaginary = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    turned = torch.stack([-imaginary, real], dim=-1).flatten(3)
    return (wide(x) * cos[None, :, None] + wide(turned) * sin[None, :, None]).to(x.dtype)


def _qk_norm_peer(**inputs):
    joint = []
    for each in PROJECTIONS:
        streams = []
        for stream in ("image", "text"):
            x = _product(inputs[f"{stream}_{each}"], inputs[f"{stream}_{each}_bias"])
            head_dim = len(inputs["image_q_weight"])
            x = x.view(len(x), -1, x.shape[-1] // head_dim, head_dim).transpose(1, 2)
            streams.append(x if each == "v" else _rms_norm(x, inputs[f"{stream}_{each}_weight"]))
        joint.append(torch.cat(streams, dim=2).transpose(1, 2))
    return tuple(joint)


def _qk_norm_rope_peer(cos, sin, **inputs):
    joint = []
    for each in PROJECTIONS:
        streams = []
        for stream in ("text", "image"):
            x = _product(inputs[f"{stream}_{each}"], inputs[f"{stream}_{each}_bias"])
            weight = inputs[f"{stream}_q_weight"]
            x = x.unflatten(-1, (-1, len(weight)))
            if each != "v":
                x = F.rms_norm(x, weight.shape, inputs[f"{stream}_{each}_weight"], EPS)
            streams.append(x)
        x = torch.cat(streams, dim=1)
        joint.append(x if each == "v" else _rotated(x, cos, sin))
    return tuple(joint)


# The activations of the feed-forward layer, and FP8 quantisation alone, as for attention's output.


def _make_activation(dimensions: Dimensions, draw: Draw, halves=1) -> Tensors:
    width = halves * dimensions.mlp
    return {"x": draw(dimensions.batch, dimensions.image, width), "bias": draw(width)}


def _gelu_peer(x, bias):
    return F.gelu(_product(x, bias), approximate="tanh")


def _swiglu_peer(x, bias):
    value, gate = _product(x, bias).chunk(2, dim=-1)
    return value * F.silu(gate)


def _quantizing(function: Callable) -> Callable:
    return _no_grad(lambda **inputs: function(**inputs, quantize=True))


def _quantizing_peer(function: Callable) -> Callable:
    """Quantise the output, or the last of several."""

    def quantizing(**inputs):
        made = function(**inputs)
        return (*made[:-1], _quantized(made[-1])) if isinstance(made, tuple) else _quantized(made)

    return _no_grad(quantizing)


OPERATIONS = (
    BlockOperation(
        name="adaln_modulate",
        make=_make_adaln,
        ours=_adaln_ours,
        peer=_adaln_peer,
        forward=Traffic(("x",), ("out",)),  # 2 tensors of tokens
        backward=Traffic(("x", "d out"), ("d x",)),  # 3
    ),
    BlockOperation(
        name="adaln_modulate_pair",
        make=functools.partial(_make_adaln, names=("scale", "shift", "scale2", "shift2")),
        ours=_adaln_pair_ours,
        peer=_adaln_pair_peer,
        outputs=("out", "out2"),
        forward=Traffic(("x",), ("out", "out2")),  # 3
        backward=Traffic(("x", "d out", "d out2"), ("d x",)),  # 4
    ),
    BlockOperation(
        name="adaln_modulate_quantize",
        make=_make_adaln,
        ours=_quantizing(_adaln_ours),
        peer=_quantizing_peer(_adaln_peer),
        forward=Traffic(("x",), ("out",)),  # 1.5: one byte an element is written
    ),
    BlockOperation(
        name="gated_residual",
        make=functools.partial(_make_gated, adaln=False),
        ours=_gated_ours,
        peer=_gated_peer,
        outputs=("h",),
        forward=Traffic(("residual", "y"), ("h",)),  # 3
        backward=Traffic(("d h", "y"), ("d y",)),  # 3: y for the gate; the gradient of residual is d h itself
        biases={"y": "bias"},
    ),
    BlockOperation(
        name="gated_residual_adaln",
        make=_make_gated,
        ours=_gated_adaln_ours,
        peer=_gated_adaln_peer,
        outputs=("h", "out"),
        forward=Traffic(("residual", "y"), ("h", "out")),  # 4
        backward=Traffic(("h", "y", "d h", "d out"), ("d residual", "d y")),  # 6
        biases={"y": "bias"},
    ),
    BlockOperation(
        name="gated_residual_adaln_pair",
        make=functools.partial(_make_gated, branches=2),
        ours=_gated_adaln_pair_ours,
        peer=_gated_adaln_pair_peer,
        outputs=("h", "out"),
        forward=Traffic(("residual", "y", "y2"), ("h", "out")),  # 5
        backward=Traffic(("h", "y", "y2", "d h", "d out"), ("d residual", "d y", "d y2")),  # 8
        biases={"y": "bias", "y2": "bias2"},
    ),
    BlockOperation(
        name="gated_residual_adaln_quantize",
        make=_make_gated,
        ours=_quantizing(_gated_adaln_ours),
        peer=_quantizing_peer(_gated_adaln_peer),
        outputs=("h", "out"),
        forward=Traffic(("residual", "y"), ("h", "out")),  # 3.5
        biases={"y": "bias"},
    ),
    BlockOperation(
        name="qk_norm",
        make=_make_qk_norm,
        ours=_qk_norm_ours,
        peer=_qk_norm_peer,
        outputs=PROJECTIONS,
        forward=Traffic(("image_qkv", "text_qkv"), PROJECTIONS),  # 6 of all tokens
        # 8: the norms read q and k again, two thirds of the packed tensors
        backward=Traffic(("d q", "d k", "d v", "q", "k"), ("d image_qkv", "d text_qkv")),
        biases=QKV_BIASES,
        sizes={size: SIZES[size] for size in ("sd35-b4", "awkward")},
    ),
    BlockOperation(
        name="qk_norm_rope",
        make=_make_qk_norm_rope,
        ours=_qk_norm_rope_ours,
        peer=_qk_norm_rope_peer,
        outputs=PROJECTIONS,
        # 6, and the float32 angles: a sixth of the bytes of one sample's q
        forward=Traffic(("image_qkv", "text_qkv", "cos", "sin"), PROJECTIONS),
        backward=Traffic(
            ("d q", "d k", "d v", "q", "k", "cos", "sin"), ("d image_qkv", "d text_qkv")
        ),  # 8, and the angles
        biases=QKV_BIASES,
        sizes={size: SIZES[size] for size in ("flux-b4", "awkward")},
        constants=("cos", "sin"),
    ),
    BlockOperation(
        name="gelu_tanh",
        make=_make_activation,
        ours=gelu_tanh,
        peer=_gelu_peer,
        forward=Traffic(("x",), ("out",)),  # 2 of the feed-forward layer's width
        backward=Traffic(("x", "d out"), ("d x",)),  # 3
        biases={"x": "bias"},
    ),
    BlockOperation(
        name="gelu_tanh_quantize",
        make=_make_activation,
        ours=_quantizing(gelu_tanh),
        peer=_quantizing_peer(_gelu_peer),
        forward=Traffic(("x",), ("out",)),  # 1.5
        biases={"x": "bias"},
    ),
    BlockOperation(
        name="swiglu",
        make=functools.partial(_make_activation, halves=2),
        ours=swiglu,
        peer=_swiglu_peer,
        forward=Traffic(("x",), ("out",)),  # 3: x has two halves
        backward=Traffic(("x", "d out"), ("d x",)),  # 5
        biases={"x": "bias"},
    ),
    BlockOperation(
        name="quantize_rows",
        make=lambda dimensions, draw: {"x": _image(dimensions, draw)},
        ours=_no_grad(quantize_rows),
        peer=_quantizing_peer(lambda x: x),
        forward=Traffic(("x",), ("out",)),  # 1.5
    ),
)
