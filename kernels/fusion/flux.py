"""The fused forwards of diffusers' FluxTransformerBlock and FluxSingleTransformerBlock (FLUX.1).

    double: as SD3's, with the text's tokens first in the joint attention, and q and k rotated by their positions
    single: x = [text; image];   n = modulated norm of x
            x += gate (W [attention(n); gelu(W_mlp n + b_mlp)] + b)

    image (B, S, C), text (B, T, C), temb (B, C); image_rotary_emb: cosines and sines (T + S, D) of all tokens

Source: diffusers' models/transformers/transformer_flux.py.
"""

import functools

import torch
import torch.nn.functional as F
from diffusers.models.normalization import AdaLayerNormZero, AdaLayerNormZeroSingle
from diffusers.models.transformers.transformer_flux import (
    FluxAttention,
    FluxAttnProcessor,
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)
from torch import Tensor, nn
from torch._C import _is_alias_of  # pyright: ignore[reportAttributeAccessIssue]

from dpdmd.kernels.blocks.adaln_modulate import adaln_modulate
from dpdmd.kernels.blocks.gated_residual import gated_residual, gated_residual_adaln
from dpdmd.kernels.fusion.conditions import (
    ADAPTIVE_NORM,
    FEED_FORWARD,
    LAYER_NORM,
    TANH_GELU,
    Fused,
    Like,
    attention_like,
    norms_away,
    or_stock,
    why_not_like,
)
from dpdmd.kernels.fusion.fp8_weights import fp8_pass
from dpdmd.kernels.fusion.joint_attention import attend, image_stream, text_stream
from dpdmd.kernels.fusion.linear import activated, feed_forward, product_of_two, serves, split_products
from dpdmd.kernels.fusion.norm_out import NORM_OUT
from dpdmd.kernels.runtime.registration import plain

LARGEST_FLOAT16 = 65504
FP8_LAYERS_DOUBLE = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "ff.net.0.proj", "ff.net.2")
FP8_LAYERS_SINGLE = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", "proj_out")


def _processor(attn: FluxAttention) -> str:
    processor = attn.processor
    if type(processor) is not FluxAttnProcessor:
        return f".processor is a {type(processor).__name__}, not a FluxAttnProcessor"
    if processor._attention_backend is not None or processor._parallel_config is not None:
        return ".processor has an attention backend or a parallel layout set"
    return " has its projections fused (fuse_qkv_projections)" if attn.fused_projections else ""


_NORM = Like(nn.RMSNorm)
_DOUBLE = {
    "norm1": Like(AdaLayerNormZero, ADAPTIVE_NORM),
    "norm1_context": Like(AdaLayerNormZero, ADAPTIVE_NORM),
    "attn": attention_like(FluxAttention, _NORM, _processor, added=True),
    "norm2": LAYER_NORM,
    "norm2_context": LAYER_NORM,
    "ff": FEED_FORWARD,
    "ff_context": FEED_FORWARD,
}
_SINGLE = {
    "norm": Like(AdaLayerNormZeroSingle, ADAPTIVE_NORM),
    "attn": attention_like(FluxAttention, _NORM, _processor, to_out=False),
    "act_mlp": TANH_GELU,
}


why_not_double = functools.partial(why_not_like, cls=FluxTransformerBlock, parts=_DOUBLE)
why_not_single = functools.partial(why_not_like, cls=FluxSingleTransformerBlock, parts=_SINGLE)


@or_stock(why_not_double)
def forward_double(
    block: FluxTransformerBlock,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    joint_attention_kwargs: dict | None = None,
) -> tuple[Tensor, Tensor] | None:
    """(text, image)"""
    attn = block.attn
    if joint_attention_kwargs or norms_away(attn):
        return None
    image, text = hidden_states, encoder_hidden_states
    fp8 = fp8_pass(block, image, text, temb)
    emb = F.silu(temb)

    shift, scale, gate, shift_ff, scale_ff, gate_ff = block.norm1.linear(emb).chunk(6, dim=1)
    quantize = serves(fp8, attn.to_q, attn.to_k, attn.to_v)
    image, x = adaln_modulate(image, scale, shift, eps=block.norm1.norm.eps, quantize=quantize, fork=True)

    modulation = block.norm1_context.linear(emb)
    shift_text, scale_text, gate_text, shift_text_ff, scale_text_ff, gate_text_ff = modulation.chunk(6, dim=1)
    text, c = adaln_modulate(text, scale_text, shift_text, eps=block.norm1_context.norm.eps, fork=True)

    o = attend(  # no name keeps the streams in memory
        attn,
        text_stream(attn, c, attn.head_dim),
        image_stream(attn, x, attn.head_dim, fp8),
        rope=image_rotary_emb,
    )
    layers = attn.to_add_out, attn.to_out[0]
    (y_text, bias_text), (y, bias) = split_products(o, text.shape[1], *layers, (None, fp8))

    image, x = gated_residual_adaln(
        image, gate, y, scale_ff, shift_ff, bias=bias, eps=block.norm2.eps, quantize=serves(fp8, block.ff.net[0].proj)
    )
    y, bias = feed_forward(block.ff, x, fp8)
    image = gated_residual(image, gate_ff, y, bias=bias)

    text, c = gated_residual_adaln(
        text, gate_text, y_text, scale_text_ff, shift_text_ff, bias=bias_text, eps=block.norm2_context.eps
    )
    y, bias = feed_forward(block.ff_context, c)
    text = gated_residual(text, gate_text_ff, y, bias=bias)
    return _finite(text), image


@or_stock(why_not_single)
def forward_single(
    block: FluxSingleTransformerBlock,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    joint_attention_kwargs: dict | None = None,
) -> tuple[Tensor, Tensor] | None:
    """(text, image)"""
    attn = block.attn
    if joint_attention_kwargs or norms_away(attn):
        return None
    x = join(encoder_hidden_states, hidden_states)
    fp8 = fp8_pass(block, x, temb)
    shift, scale, gate = block.norm.linear(F.silu(temb)).chunk(3, dim=1)
    # One product for q, k, v and the MLP would gather their gradients in a buffer of width 7 C in the backward pass: more
    # bytes than reading n twice and adding its two gradients.
    quantize = serves(fp8, attn.to_q, attn.to_k, attn.to_v, block.proj_mlp)
    x, n = adaln_modulate(x, scale, shift, eps=block.norm.norm.eps, quantize=quantize, fork=True)
    o = attend(attn, image_stream(attn, n, attn.head_dim, fp8), rope=image_rotary_emb)
    u = activated(block.proj_mlp, n, fp8, quantize=serves(fp8, block.proj_out))
    y, bias = product_of_two(block.proj_out, o, u, fp8)
    if isinstance(y, tuple):
        gate = gate, gate
    x = _finite(gated_residual(x, gate, y, bias=bias))
    return part(x, encoder_hidden_states.shape[1])


def _finite(x: Tensor) -> Tensor:
    return x.clip(-LARGEST_FLOAT16, LARGEST_FLOAT16) if x.dtype == torch.float16 else x


def part(joint: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """(text, image): views of joint (B, T + S, C), which `join` finds again."""
    return joint[:, :length], joint[:, length:]


def join(text: Tensor, image: Tensor) -> Tensor:
    """[text; image] (B, T + S, C): the tensor that `part` split, also after writes to its parts; else a copy.

    Diffusers passes both parts from single block to single block: a copy in each reads and writes 2 (T + S) C elements.
    """
    joint = None if torch.compiler.is_compiling() else _joint_of(text, image)
    return torch.cat((text, image), dim=1) if joint is None else joint


def _joint_of(text: Tensor, image: Tensor) -> Tensor | None:
    """The tensor that both are parts of, if they share its memory and their gradients go to it."""
    batch, length, channels = text.shape
    shape, stride, offset = (batch, length + image.shape[1], channels), text.stride(), text.storage_offset()
    if not plain((text, image)) or not _is_alias_of(text, image) or text.dtype != image.dtype:
        return None
    beside = (batch, channels), stride, offset + length * stride[1]
    if (image.shape[::2], image.stride(), image.storage_offset()) != beside:
        return None
    if not text.requires_grad and not image.requires_grad:
        return text.as_strided(shape, stride, offset)
    joint = text._base
    if joint is None or joint is not image._base:
        return None
    if (joint.shape, joint.stride(), joint.storage_offset()) != (shape, stride, offset):
        return None
    # The joint tensor skips what a part's gradient passes on its way to it: another view, such as a module's hooks make,
    # hooks, and the outputs of a reentrant checkpoint, whose joint tensor has no graph.
    return joint if all(_leads_to(each, joint) for each in (text, image)) else None


def _leads_to(part: Tensor, joint: Tensor) -> bool:
    """Whether the gradient of a part goes to the joint tensor directly."""
    if part.grad_fn is None or joint.grad_fn is None or part._backward_hooks or part.retains_grad:
        return False
    return part.grad_fn.next_functions[0][0] is joint.grad_fn


MODULES = {
    "transformer_blocks": Fused(why_not_double, forward_double, FP8_LAYERS_DOUBLE),
    "single_transformer_blocks": Fused(why_not_single, forward_single, FP8_LAYERS_SINGLE),
    "norm_out": NORM_OUT,
}
