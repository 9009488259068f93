"""The fused forward of diffusers' JointTransformerBlock (Stable Diffusion 3 and 3.5).

    x = modulated norm of the image tokens, c = of the text tokens
    o = attention of the two together, after per-head norms of q and k
    image += gate W o_image;   image += gate_ff FF(modulated norm of image);   the same for text
    SD3.5's dual blocks add a second attention of the image tokens alone, on a second modulation of the same norm

    image (B, S, C), text (B, T, C), temb (B, C)

Source: arXiv 2403.03206, figure 2; diffusers' models/attention.py and JointAttnProcessor2_0.
"""

# Variables are set and read under the same condition on a block's parts.
# pyright: reportPossiblyUnboundVariable=false

import itertools
from typing import Any

import torch.nn.functional as F
from diffusers.models.attention import JointTransformerBlock
from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0
from diffusers.models.normalization import AdaLayerNormContinuous, AdaLayerNormZero, RMSNorm, SD35AdaLayerNormZeroX
from torch import Tensor

from dpdmd.kernels.blocks.adaln_modulate import adaln_modulate
from dpdmd.kernels.blocks.gated_residual import gated_residual, gated_residual_adaln
from dpdmd.kernels.fusion.conditions import (
    ADAPTIVE_NORM,
    FEED_FORWARD,
    LAYER_NORM,
    Fused,
    Like,
    attention_like,
    norms_away,
    or_stock,
    why_not_like,
)
from dpdmd.kernels.fusion.fp8_weights import fp8_pass
from dpdmd.kernels.fusion.joint_attention import attend, image_stream, text_stream
from dpdmd.kernels.fusion.linear import feed_forward, product, serves, split_products, split_rows
from dpdmd.kernels.fusion.norm_out import NORM_OUT

FP8_LAYERS = (
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
    *("attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0"),
    *("ff.net.0.proj", "ff.net.2"),
)


def _parts(dual: bool, last: bool, normed: bool) -> dict[str, Like]:
    norm = Like(type(None))
    if normed:
        norm = Like(RMSNorm, demand=lambda norm: "" if norm.bias is None else " has a bias")
    parts = {
        "norm1": Like(SD35AdaLayerNormZeroX if dual else AdaLayerNormZero, ADAPTIVE_NORM),
        "norm1_context": Like(AdaLayerNormContinuous if last else AdaLayerNormZero, ADAPTIVE_NORM),
        "attn": attention_like(Attention, norm, _processor, added=True),
        "norm2": LAYER_NORM,
        "ff": FEED_FORWARD,
    }
    if dual:
        parts["attn2"] = attention_like(Attention, norm, _processor)
    if not last:
        parts |= {"norm2_context": LAYER_NORM, "ff_context": FEED_FORWARD}
    return parts


def _processor(attn: Attention) -> str:
    kind = type(attn.processor)
    return "" if kind is JointAttnProcessor2_0 else f".processor is a {kind.__name__}, not a JointAttnProcessor2_0"


_PARTS = {flags: _parts(*flags) for flags in itertools.product((False, True), repeat=3)}


def why_not(block: Any) -> str:
    if type(block).forward is JointTransformerBlock.forward and block._chunk_size is not None:
        return "its feed-forward runs in chunks (enable_forward_chunking)"
    normed = getattr(block.attn, "norm_q", None) is not None
    return why_not_like(block, JointTransformerBlock, _PARTS[block.use_dual_attention, block.context_pre_only, normed])


@or_stock(why_not)
def forward(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    joint_attention_kwargs: dict | None = None,
) -> tuple[Tensor | None, Tensor] | None:
    """(text, image)"""
    attn, attn2 = block.attn, block.attn2
    if joint_attention_kwargs or norms_away(attn) or (attn2 is not None and norms_away(attn2)):
        return None
    image, text = hidden_states, encoder_hidden_states
    fp8 = fp8_pass(block, image, text, temb)
    emb = F.silu(temb)

    modulation = block.norm1.linear(emb)
    eps = block.norm1.norm.eps
    quantize = serves(fp8, attn.to_q, attn.to_k, attn.to_v)
    if attn2 is None:
        shift, scale, gate, shift_ff, scale_ff, gate_ff = modulation.chunk(6, dim=1)
        image, x = adaln_modulate(image, scale, shift, eps=eps, quantize=quantize, fork=True)
    else:
        shift, scale, gate, shift_ff, scale_ff, gate_ff, shift2, scale2, gate2 = modulation.chunk(9, dim=1)
        quantize = quantize and serves(fp8, attn2.to_q, attn2.to_k, attn2.to_v)
        image, x, x2 = adaln_modulate(image, (scale, scale2), (shift, shift2), eps=eps, quantize=quantize, fork=True)

    modulation = block.norm1_context.linear(emb.to(text.dtype))
    if block.context_pre_only:
        scale_text, shift_text = modulation.chunk(2, dim=1)
    else:
        shift_text, scale_text, gate_text, shift_text_ff, scale_text_ff, gate_text_ff = modulation.chunk(6, dim=1)
    text, c = adaln_modulate(text, scale_text, shift_text, eps=block.norm1_context.norm.eps, fork=True)

    head_dim = attn.inner_dim // attn.heads
    o = attend(attn, image_stream(attn, x, head_dim, fp8), text_stream(attn, c, head_dim))
    if block.context_pre_only:
        y, bias = product(attn.to_out[0], split_rows(o, image.shape[1])[0], fp8)
    else:
        layers = attn.to_out[0], attn.to_add_out
        (y, bias), (y_text, bias_text) = split_products(o, image.shape[1], *layers, (fp8, None))
    if attn2 is not None:
        o2 = attend(attn2, image_stream(attn2, x2, head_dim, fp8))
        y2, bias2 = product(attn2.to_out[0], o2, fp8)
        gate, y, bias = (gate, gate2), (y, y2), (bias, bias2)
    image, x = gated_residual_adaln(
        image, gate, y, scale_ff, shift_ff, bias=bias, eps=block.norm2.eps, quantize=serves(fp8, block.ff.net[0].proj)
    )
    y, bias = feed_forward(block.ff, x, fp8)
    image = gated_residual(image, gate_ff, y, bias=bias)
    if block.context_pre_only:
        return None, image

    text, c = gated_residual_adaln(
        text, gate_text, y_text, scale_text_ff, shift_text_ff, bias=bias_text, eps=block.norm2_context.eps
    )
    y, bias = feed_forward(block.ff_context, c)
    return gated_residual(text, gate_text_ff, y, bias=bias), image


MODULES = {"transformer_blocks": Fused(why_not, forward, FP8_LAYERS), "norm_out": NORM_OUT}
