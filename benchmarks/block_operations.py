"""The memory-bound operations of a transformer block: their sizes, inputs and peers, and the bytes that they must move.

A peer is what diffusers writes, in bfloat16 as it comes; the same function in float64 is the truth that everything is
checked against.

Some of ours add the bias of the matrix product before them, as its gradient is a by-product there. A peer has it added
by the product, for nothing: so it gets tensors with the bias in them, and its backward pass sums up the gradient of the
bias, as that of the product would.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dpdmd.kernels.blocks.activation import gelu_tanh, swiglu
from dpdmd.kernels.blocks.adaln_modulate import adaln_modulate
from dpdmd.kernels.blocks.fp8 import Quantized, quantize_rows
from dpdmd.kernels.blocks.gated_residual import gated_residual, gated_residual_adaln
from dpdmd.kernels.blocks.qk_norm import TokenStream, qk_norm, qk_norm_rope

DTYPE = torch.bfloat16
EPS = 1e-6
LARGEST_E4M3 = 448.0

Tensors = dict[str, Tensor]


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
    "awkward": Dimensions(batch=3, image=13, text=5, heads=3, head_dim=24, mlp=200),  # powers of two nowhere
}


@dataclass(frozen=True)
class Traffic:
    """The tensors that a pass must read and write, each once, by name: the fewest bytes that any implementation can do
    with. "d x" is the gradient of x and has its bytes. Left out is what a sample or a layer has one of: gates, scales,
    shifts, biases, weights and the scales of quantised rows, a thousandth of the tokens' bytes."""

    reads: tuple[str, ...]
    writes: tuple[str, ...]

    def bytes(self, tensors: Mapping[str, Tensor]) -> int:
        return sum(tensors[name.removeprefix("d ")].nbytes for name in (*self.reads, *self.writes))

    def __str__(self) -> str:
        return f"reads {', '.join(self.reads)}; writes {', '.join(self.writes)}"


@dataclass(frozen=True)
class BlockOperation:
    """`ours` takes the inputs by name, `peer` the separate ones; both return the outputs in order."""

    make: Callable[[Dimensions, Callable[..., Tensor]], Tensors]
    ours: Callable[..., tuple[Tensor | Quantized, ...]]
    peer: Callable[..., tuple[Tensor | Quantized, ...]]
    outputs: tuple[str, ...]
    forward: Traffic
    backward: Traffic | None  # None: without gradient
    biases: Mapping[str, str]  # the products among the separate inputs, and the bias of each
    sizes: tuple[str, ...] = tuple(SIZES)
    constants: tuple[str, ...] = ()  # inputs without a gradient
    separate: Callable[[Tensors], Tensors] = lambda tensors: tensors  # q, k and v out of packed ones


def make_inputs(operation: BlockOperation, size: str, device: torch.device, seed: int) -> Tensors:
    """One set of random inputs in bfloat16; no two sets are equal."""
    generator = torch.Generator(device).manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=DTYPE)

    return operation.make(SIZES[size], randn)


def peer_inputs(operation: BlockOperation, inputs: Tensors) -> Tensors:
    """As a peer takes them: separate, with the biases in the products."""
    separate = operation.separate(inputs)
    return separate | {name: separate[name] + separate[bias] for name, bias in operation.biases.items()}


def truth_inputs(operation: BlockOperation, inputs: Tensors) -> Tensors:
    """Separate, in float64: the biases are still to be added."""
    return {name: tensor.double() for name, tensor in operation.separate(inputs).items()}


def leaves(operation: BlockOperation, inputs: Tensors) -> Tensors:
    """The same memory, in new tensors that receive gradients where the operation has any."""
    wanted = operation.backward is not None
    return {
        name: tensor.detach().requires_grad_(wanted and name not in operation.constants)
        for name, tensor in inputs.items()
    }


def sets_needed(operation: BlockOperation, inputs: Tensors, cache_bytes: int) -> int:
    """Input sets that together are more than twice the cache, so that no call finds its inputs there."""
    return max(2, math.ceil((2 * cache_bytes + 1) / sum(inputs[name].nbytes for name in operation.forward.reads)))


class _BiasOfProduct(torch.autograd.Function):
    """The identity of a product that holds its bias, and the gradients of both."""

    @staticmethod
    def forward(ctx, product, bias):
        ctx.rows = product.ndim - bias.ndim
        return product.view_as(product)

    @staticmethod
    def backward(ctx, upstream):
        return upstream, upstream.sum(dim=tuple(range(ctx.rows)))


def _product(product: Tensor, bias: Tensor) -> Tensor:
    return product + bias if product.dtype == torch.float64 else _BiasOfProduct.apply(product, bias)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _quantized(x: Tensor) -> Quantized | Tensor:
    """e4m3 with one scale a row. The truth, in float64, is what is quantised."""
    if x.dtype == torch.float64:
        return x
    scale = (x.abs().amax(dim=-1, keepdim=True).float() / LARGEST_E4M3).clamp(min=1e-12)
    return Quantized((x.float() / scale).clamp(-LARGEST_E4M3, LARGEST_E4M3).to(torch.float8_e4m3fn), scale)


def _no_grad(function: Callable) -> Callable:
    def without_gradient(**inputs):
        with torch.no_grad():
            return function(**inputs)

    return without_gradient


# adaln_modulate: LayerNorm, scale and shift. The vectors are chunks of a modulation of six or nine, as in the blocks.


def _chunks(dimensions: Dimensions, randn, names: tuple[str, ...]) -> Tensors:
    modulation = 0.5 * randn(dimensions.batch, max(6, len(names)) * dimensions.channels)
    return dict(zip(names, modulation.split(dimensions.channels, dim=1), strict=False))


def _image(dimensions: Dimensions, randn) -> Tensor:
    return randn(dimensions.batch, dimensions.image, dimensions.channels)


def _make_adaln(dimensions: Dimensions, randn, names=("scale", "shift")) -> Tensors:
    return {"x": _image(dimensions, randn), **_chunks(dimensions, randn, names)}


def _norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=EPS)


def _modulated(n: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return n * (1 + scale[:, None]) + shift[:, None]


def _adaln_ours(x, scale, shift, quantize=False):
    return (adaln_modulate(x, scale, shift, eps=EPS, quantize=quantize),)


def _adaln_peer(x, scale, shift):
    return (_modulated(_norm(x), scale, shift),)


def _adaln_pair_ours(x, scale, shift, scale2, shift2):
    return adaln_modulate(x, (scale, scale2), (shift, shift2), eps=EPS)


def _adaln_pair_peer(x, scale, shift, scale2, shift2):
    n = _norm(x)
    return _modulated(n, scale, shift), _modulated(n, scale2, shift2)


# gated_residual, alone and followed by the next adaln_modulate; with a pair of branches as SD3.5's dual blocks have.


def _make_gated(dimensions: Dimensions, randn, branches=1, adaln=True) -> Tensors:
    names = ("gate", "scale", "shift")[: 3 if adaln else 1] + (("gate2",) if branches == 2 else ())
    inputs = {"residual": _image(dimensions, randn)}
    for branch in ("", "2")[:branches]:
        inputs |= {f"y{branch}": _image(dimensions, randn), f"bias{branch}": randn(dimensions.channels)}
    return {**inputs, **_chunks(dimensions, randn, names)}


def _gated_ours(residual, gate, y, bias):
    return (gated_residual(residual, gate, y, bias=bias),)


def _gated_peer(residual, gate, y, bias):
    return (residual + gate.unsqueeze(1) * _product(y, bias),)


def _gated_adaln_ours(residual, gate, y, bias, scale, shift, quantize=False):
    return gated_residual_adaln(residual, gate, y, scale, shift, bias=bias, eps=EPS, quantize=quantize)


def _gated_adaln_peer(residual, gate, y, bias, scale, shift):
    (h,) = _gated_peer(residual, gate, y, bias)
    return h, _modulated(_norm(h), scale, shift)


def _gated_adaln_pair_ours(residual, gate, gate2, y, y2, bias, bias2, scale, shift):
    return gated_residual_adaln(residual, (gate, gate2), (y, y2), scale, shift, bias=(bias, bias2), eps=EPS)


def _gated_adaln_pair_peer(residual, gate, gate2, y, y2, bias, bias2, scale, shift):
    (h,) = _gated_peer(residual, gate, y, bias)
    return _gated_adaln_peer(h, gate2, y2, bias2, scale, shift)


# qk_norm: SD3.5's joint attention, image first; diffusers has the heads before the tokens.
# qk_norm_rope: FLUX's double blocks, text first, torch's own RMSNorm.

PROJECTIONS = ("q", "k", "v")
QKV_BIASES = {f"{stream}_{each}": f"{stream}_{each}_bias" for stream in ("image", "text") for each in PROJECTIONS}


def _make_qk_norm(dimensions: Dimensions, randn) -> Tensors:
    inputs = {}
    for stream, tokens in (("image", dimensions.image), ("text", dimensions.text)):
        inputs[f"{stream}_qkv"] = randn(dimensions.batch, tokens, 3, dimensions.heads, dimensions.head_dim)
        inputs |= {f"{stream}_{each}_weight": 1 + 0.1 * randn(dimensions.head_dim) for each in ("q", "k")}
        inputs |= {f"{stream}_{each}_bias": 0.5 * randn(dimensions.channels) for each in PROJECTIONS}
    return inputs


def _make_qk_norm_rope(dimensions: Dimensions, randn) -> Tensors:
    inputs = _make_qk_norm(dimensions, randn)
    tokens, device = dimensions.text + dimensions.image, inputs["image_qkv"].device
    frequencies = 10000 ** -torch.linspace(0, 1, dimensions.head_dim // 2, device=device)
    angles = (torch.arange(tokens, device=device)[:, None] * frequencies).repeat_interleave(2, dim=1)
    return {**inputs, "cos": angles.cos(), "sin": angles.sin()}


def _separate_qkv(tensors: Tensors) -> Tensors:
    """image_qkv (B, S, 3, H, D) as image_q, image_k, image_v (B, S, H D), as three linear layers make them."""
    separate = {}
    for name, tensor in tensors.items():
        if name.endswith("_qkv"):
            parts = (part.flatten(2).contiguous() for part in tensor.unbind(2))
            separate |= {name.removesuffix("qkv") + each: part for each, part in zip(PROJECTIONS, parts, strict=True)}
        else:
            separate[name] = tensor
    return separate


def _stream(stream: str, inputs: Tensors) -> TokenStream:
    biases = tuple(inputs[f"{stream}_{each}_bias"] for each in PROJECTIONS)
    return TokenStream(inputs[f"{stream}_qkv"], inputs[f"{stream}_q_weight"], inputs[f"{stream}_k_weight"], bias=biases)


def _qk_norm_ours(**inputs):
    return qk_norm(_stream("image", inputs), _stream("text", inputs), eps=EPS)


def _qk_norm_rope_ours(cos, sin, **inputs):
    return qk_norm_rope(_stream("text", inputs), _stream("image", inputs), cos=cos, sin=sin, eps=EPS)


def _rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """diffusers' RMSNorm."""
    variance = _wide(x).pow(2).mean(-1, keepdim=True)
    return (x * torch.rsqrt(variance + EPS)).to(weight.dtype) * weight


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """diffusers' apply_rotary_emb, use_real_unbind_dim=-1, of x (B, S, H, D)."""
    real, imaginary = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    turned = torch.stack([-imaginary, real], dim=-1).flatten(3)
    return (_wide(x) * cos[None, :, None] + _wide(turned) * sin[None, :, None]).to(x.dtype)


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


# The activations of the feed-forward layer, and FP8's quantisation of what nothing else writes: attention's output.


def _make_activation(dimensions: Dimensions, randn, halves=1) -> Tensors:
    width = halves * dimensions.mlp
    return {"x": randn(dimensions.batch, dimensions.image, width), "bias": randn(width)}


def _gelu_ours(x, bias, quantize=False):
    return (gelu_tanh(x, bias, quantize=quantize),)


def _gelu_peer(x, bias):
    return (F.gelu(_product(x, bias), approximate="tanh"),)


def _swiglu_ours(x, bias):
    return (swiglu(x, bias),)


def _swiglu_peer(x, bias):
    value, gate = _product(x, bias).chunk(2, dim=-1)
    return (value * F.silu(gate),)


def _make_quantize_rows(dimensions: Dimensions, randn) -> Tensors:
    return {"x": _image(dimensions, randn)}


def _quantizing(function: Callable) -> Callable:
    return _no_grad(lambda **inputs: function(**inputs, quantize=True))


def _quantizing_peer(function: Callable) -> Callable:
    """Quantises the last output."""

    def quantizing(**inputs):
        *others, last = function(**inputs)
        return *others, _quantized(last)

    return _no_grad(quantizing)


def _variant(function: Callable, **settings: Any) -> Callable:
    return lambda dimensions, randn: function(dimensions, randn, **settings)


BLOCK_OPERATIONS = {
    "adaln_modulate": BlockOperation(
        make=_make_adaln,
        ours=_adaln_ours,
        peer=_adaln_peer,
        outputs=("out",),
        forward=Traffic(("x",), ("out",)),  # 2 tensors of tokens
        backward=Traffic(("x", "d out"), ("d x",)),  # 3
        biases={},
    ),
    "adaln_modulate_pair": BlockOperation(
        make=_variant(_make_adaln, names=("scale", "shift", "scale2", "shift2")),
        ours=_adaln_pair_ours,
        peer=_adaln_pair_peer,
        outputs=("out", "out2"),
        forward=Traffic(("x",), ("out", "out2")),  # 3
        backward=Traffic(("x", "d out", "d out2"), ("d x",)),  # 4
        biases={},
    ),
    "adaln_modulate_quantize": BlockOperation(
        make=_make_adaln,
        ours=_quantizing(_adaln_ours),
        peer=_quantizing_peer(_adaln_peer),
        outputs=("out",),
        forward=Traffic(("x",), ("out",)),  # 1.5: a byte an element is written
        backward=None,
        biases={},
    ),
    "gated_residual": BlockOperation(
        make=_variant(_make_gated, adaln=False),
        ours=_gated_ours,
        peer=_gated_peer,
        outputs=("h",),
        forward=Traffic(("residual", "y"), ("h",)),  # 3
        backward=Traffic(("d h", "y"), ("d y",)),  # 3: y for the gate; the gradient of residual is d h itself
        biases={"y": "bias"},
    ),
    "gated_residual_adaln": BlockOperation(
        make=_make_gated,
        ours=_gated_adaln_ours,
        peer=_gated_adaln_peer,
        outputs=("h", "out"),
        forward=Traffic(("residual", "y"), ("h", "out")),  # 4
        backward=Traffic(("h", "y", "d h", "d out"), ("d residual", "d y")),  # 6
        biases={"y": "bias"},
    ),
    "gated_residual_adaln_pair": BlockOperation(
        make=_variant(_make_gated, branches=2),
        ours=_gated_adaln_pair_ours,
        peer=_gated_adaln_pair_peer,
        outputs=("h", "out"),
        forward=Traffic(("residual", "y", "y2"), ("h", "out")),  # 5
        backward=Traffic(("h", "y", "y2", "d h", "d out"), ("d residual", "d y", "d y2")),  # 8
        biases={"y": "bias", "y2": "bias2"},
    ),
    "gated_residual_adaln_quantize": BlockOperation(
        make=_make_gated,
        ours=_quantizing(_gated_adaln_ours),
        peer=_quantizing_peer(_gated_adaln_peer),
        outputs=("h", "out"),
        forward=Traffic(("residual", "y"), ("h", "out")),  # 3.5
        backward=None,
        biases={"y": "bias"},
    ),
    "qk_norm": BlockOperation(
        make=_make_qk_norm,
        ours=_qk_norm_ours,
        peer=_qk_norm_peer,
        outputs=PROJECTIONS,
        forward=Traffic(("image_qkv", "text_qkv"), PROJECTIONS),  # 6 of all tokens
        # 8: the norms want q and k again, of the packed tensors two thirds
        backward=Traffic(("d q", "d k", "d v", "q", "k"), ("d image_qkv", "d text_qkv")),
        biases=QKV_BIASES,
        sizes=("sd35-b4", "awkward"),
        separate=_separate_qkv,
    ),
    "qk_norm_rope": BlockOperation(
        make=_make_qk_norm_rope,
        ours=_qk_norm_rope_ours,
        peer=_qk_norm_rope_peer,
        outputs=PROJECTIONS,
        # 6, and the angles in float32, which a sample in bfloat16 has a sixth of the bytes of q for
        forward=Traffic(("image_qkv", "text_qkv", "cos", "sin"), PROJECTIONS),
        backward=Traffic(("d q", "d k", "d v", "q", "k", "cos", "sin"), ("d image_qkv", "d text_qkv")),  # 8 and them
        biases=QKV_BIASES,
        sizes=("flux-b4", "awkward"),
        constants=("cos", "sin"),
        separate=_separate_qkv,
    ),
    "gelu_tanh": BlockOperation(
        make=_make_activation,
        ours=_gelu_ours,
        peer=_gelu_peer,
        outputs=("out",),
        forward=Traffic(("x",), ("out",)),  # 2 of the feed-forward layer's width
        backward=Traffic(("x", "d out"), ("d x",)),  # 3
        biases={"x": "bias"},
    ),
    "gelu_tanh_quantize": BlockOperation(
        make=_make_activation,
        ours=_quantizing(_gelu_ours),
        peer=_quantizing_peer(_gelu_peer),
        outputs=("out",),
        forward=Traffic(("x",), ("out",)),  # 1.5
        backward=None,
        biases={"x": "bias"},
    ),
    "swiglu": BlockOperation(
        make=_variant(_make_activation, halves=2),
        ours=_swiglu_ours,
        peer=_swiglu_peer,
        outputs=("out",),
        forward=Traffic(("x",), ("out",)),  # 3: x has two halves
        backward=Traffic(("x", "d out"), ("d x",)),  # 5
        biases={"x": "bias"},
    ),
    "quantize_rows": BlockOperation(
        make=_make_quantize_rows,
        ours=_no_grad(lambda x: (quantize_rows(x),)),
        peer=_quantizing_peer(lambda x: (x,)),
        outputs=("out",),
        forward=Traffic(("x",), ("out",)),  # 1.5
        backward=None,
        biases={},
    ),
}
