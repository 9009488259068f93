"""The fused forward of diffusers' JointTransformerBlock (Stable Diffusion 3 and 3.5).

    x = modulated norm of the image tokens, c = of the text tokens
    o = attention of the two together, after per-head norms of q and k
    image += gate W o_image;   image += gate_ff FF(modulated norm of image);   the same for text
    SD3.5's dual blocks add a second attention of the image tokens alone, on a second modulation of the same norm

    image (B, S, C), text (B, T, C), temb (B, C)

Source: arXiv 2403.03206, figure 2; diffusers' models/attention.py and JointAttnProcessor2_0.
"""

import itertools

import torch.nn.functional as F
from diffusers.models.attention import JointTransformerBlock
from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0
from diffusers.models.normalization import AdaLayerNormContinuous, AdaLayerNormZero, RMSNorm, SD35AdaLayerNormZeroX
from torch import Tensor, nn

from dpdmd.kernels.attention.attention import attention
from dpdmd.kernels.blocks.adaln_modulate import adaln_modulate
from dpdmd.kernels.blocks.gated_residual import gated_residual, gated_residual_adaln
from dpdmd.kernels.blocks.qk_norm import TokenStream, qk_norm
from dpdmd.kernels.fusion.parts import (
    FEED_FORWARD,
    LAYER_NORM,
    NO_DROPOUT,
    NOTHING,
    Like,
    adaptive_norm,
    another_forward,
    feed_forward,
    fp8_pass,
    image_stream,
    norms_away,
    product,
    serves,
    split_products,
    split_rows,
    text_stream,
    unequal_eps,
    unlike_parts,
)

FP8_LAYERS = (
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
    *("attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0"),
    *("ff.net.0.proj", "ff.net.2"),
)


def _parts(dual: bool, last: bool, normed: bool) -> dict[str, Like]:
    """What a block is made of."""
    norm = Like(RMSNorm, demand=_bias) if normed else NOTHING
    own, added = {"norm_q": norm, "norm_k": norm}, {"norm_added_q": norm, "norm_added_k": norm}
    to_out = {"to_out": Like(nn.ModuleList, {"1": NO_DROPOUT})}
    parts = {
        "norm1": adaptive_norm(SD35AdaLayerNormZeroX if dual else AdaLayerNormZero),
        "norm1_context": adaptive_norm(AdaLayerNormContinuous if last else AdaLayerNormZero),
        "attn": Like(Attention, own | added | to_out, _attention),
        "norm2": LAYER_NORM,
        "ff": FEED_FORWARD,
    }
    if dual:
        parts["attn2"] = Like(Attention, own | to_out, _attention)
    if not last:
        parts |= {"norm2_context": LAYER_NORM, "ff_context": FEED_FORWARD}
    return parts


def _bias(norm: RMSNorm) -> str:
    return "" if norm.bias is None else " has a bias"


def _attention(attn: Attention) -> str:
    if type(attn.processor) is not JointAttnProcessor2_0:
        return f".processor is a {type(attn.processor).__name__}, not a JointAttnProcessor2_0"
    return unequal_eps(attn)


_PARTS = {flags: _parts(*flags) for flags in itertools.product((False, True), repeat=3)}


def why_not(block: nn.Module) -> str:
    """Why the block must run as diffusers wrote it; "" where it need not."""
    reason = another_forward(block, JointTransformerBlock)
    if reason or block._chunk_size is not None:
        return reason or "its feed-forward runs in chunks (enable_forward_chunking)"
    normed = getattr(block.attn, "norm_q", None) is not None
    return unlike_parts(block, _PARTS[block.use_dual_attention, block.context_pre_only, normed]).removeprefix(".")


def forward(
    block: nn.Module,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    joint_attention_kwargs: dict | None = None,
) -> tuple[Tensor | None, Tensor]:
    """(text, image), as the stock forward, which runs where the block cannot be fused at this call."""
    dual = block.use_dual_attention
    if joint_attention_kwargs or why_not(block) or norms_away(block.attn) or (dual and norms_away(block.attn2)):
        return type(block).forward(block, hidden_states, encoder_hidden_states, temb, joint_attention_kwargs)
    return _forward(block, hidden_states, encoder_hidden_states, temb)


def _forward(block: nn.Module, image: Tensor, text: Tensor, temb: Tensor) -> tuple[Tensor | None, Tensor]:
    fp8 = fp8_pass(block, image, text, temb)
    attn, attn2 = block.attn, block.attn2
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
    o = _attend(attn, image_stream(attn, x, head_dim, fp8), text_stream(attn, c, head_dim))
    if block.context_pre_only:
        y, bias = product(attn.to_out[0], split_rows(o, image.shape[1])[0], fp8)
    else:
        layers = attn.to_out[0], attn.to_add_out
        (y, bias), (y_text, bias_text) = split_products(o, image.shape[1], *layers, (fp8, None))
    if attn2 is not None:
        o2 = _attend(attn2, image_stream(attn2, x2, head_dim, fp8))
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


def _attend(attn: nn.Module, *streams: TokenStream) -> Tensor:
    """(B, S_1 + ..., C)"""
    q, k, v = qk_norm(*streams, eps=None if attn.norm_q is None else attn.norm_q.eps)
    return attention(q, k, v).flatten(2)
