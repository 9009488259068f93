"""The fused forwards of diffusers' FluxTransformerBlock and FluxSingleTransformerBlock (FLUX.1).

    double: as SD3's, the text's tokens first in the joint attention, q and k rotated by their positions
    single: x = [text; image];   n = modulated norm of x
            x += gate (W [attention(n); gelu(W_mlp n + b_mlp)] + b)

    image (B, S, C), text (B, T, C), temb (B, C); image_rotary_emb: cosines and sines (T + S, D) of all tokens

Source: diffusers' models/transformers/transformer_flux.py.
"""

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

from dpdmd.kernels.attention.attention import attention
from dpdmd.kernels.blocks.adaln_modulate import adaln_modulate
from dpdmd.kernels.blocks.gated_residual import gated_residual, gated_residual_adaln
from dpdmd.kernels.blocks.qk_norm import TokenStream, qk_norm, qk_norm_rope
from dpdmd.kernels.fusion.parts import (
    FEED_FORWARD,
    LAYER_NORM,
    NO_DROPOUT,
    TANH_GELU,
    Like,
    activated,
    adaptive_norm,
    another_forward,
    feed_forward,
    fp8_pass,
    image_stream,
    norms_away,
    product_of_two,
    serves,
    split_products,
    text_stream,
    unequal_eps,
    unlike_parts,
)

LARGEST_FLOAT16 = 65504
FP8_LAYERS_DOUBLE = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "ff.net.0.proj", "ff.net.2")
FP8_LAYERS_SINGLE = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", "proj_out")


def _attention(attn: FluxAttention) -> str:
    processor = attn.processor
    if type(processor) is not FluxAttnProcessor:
        return f".processor is a {type(processor).__name__}, not a FluxAttnProcessor"
    if processor._attention_backend is not None or processor._parallel_config is not None:
        return ".processor has an attention backend or a parallel layout set"
    if attn.fused_projections:
        return " has its projections fused (fuse_qkv_projections)"
    return unequal_eps(attn)


_NORM = Like(nn.RMSNorm)
_NORMS = {"norm_q": _NORM, "norm_k": _NORM}
_ADDED_NORMS = {"norm_added_q": _NORM, "norm_added_k": _NORM}
_TO_OUT = {"to_out": Like(nn.ModuleList, {"1": NO_DROPOUT})}
_DOUBLE = {
    "norm1": adaptive_norm(AdaLayerNormZero),
    "norm1_context": adaptive_norm(AdaLayerNormZero),
    "attn": Like(FluxAttention, _NORMS | _ADDED_NORMS | _TO_OUT, _attention),
    "norm2": LAYER_NORM,
    "norm2_context": LAYER_NORM,
    "ff": FEED_FORWARD,
    "ff_context": FEED_FORWARD,
}
_SINGLE = {
    "norm": adaptive_norm(AdaLayerNormZeroSingle),
    "attn": Like(FluxAttention, _NORMS, _attention),
    "act_mlp": TANH_GELU,
}


def why_not_double(block: nn.Module) -> str:
    """Why the block must run as diffusers wrote it; "" where it need not."""
    return another_forward(block, FluxTransformerBlock) or unlike_parts(block, _DOUBLE).removeprefix(".")


def why_not_single(block: nn.Module) -> str:
    """The same."""
    return another_forward(block, FluxSingleTransformerBlock) or unlike_parts(block, _SINGLE).removeprefix(".")


def forward_double(
    block: nn.Module,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    joint_attention_kwargs: dict | None = None,
) -> tuple[Tensor, Tensor]:
    """(text, image), as the stock forward, which runs where the block cannot be fused at this call."""
    if joint_attention_kwargs or why_not_double(block) or norms_away(block.attn):
        return type(block).forward(
            block, hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs
        )
    return _double(block, hidden_states, encoder_hidden_states, temb, image_rotary_emb)


def _double(
    block: nn.Module, image: Tensor, text: Tensor, temb: Tensor, rope: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    fp8 = fp8_pass(block, image, text, temb)
    attn = block.attn
    emb = F.silu(temb)

    shift, scale, gate, shift_ff, scale_ff, gate_ff = block.norm1.linear(emb).chunk(6, dim=1)
    quantize = serves(fp8, attn.to_q, attn.to_k, attn.to_v)
    image, x = adaln_modulate(image, scale, shift, eps=block.norm1.norm.eps, quantize=quantize, fork=True)

    modulation = block.norm1_context.linear(emb)
    shift_text, scale_text, gate_text, shift_text_ff, scale_text_ff, gate_text_ff = modulation.chunk(6, dim=1)
    text, c = adaln_modulate(text, scale_text, shift_text, eps=block.norm1_context.norm.eps, fork=True)

    o = _attend(attn, rope, text_stream(attn, c, attn.head_dim), image_stream(attn, x, attn.head_dim, fp8))
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


def forward_single(
    block: nn.Module,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    joint_attention_kwargs: dict | None = None,
) -> tuple[Tensor, Tensor]:
    """(text, image), as the stock forward, which runs where the block cannot be fused at this call."""
    if joint_attention_kwargs or why_not_single(block) or norms_away(block.attn):
        return type(block).forward(
            block, hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs
        )
    x = _single(block, join(encoder_hidden_states, hidden_states), temb, image_rotary_emb)
    return part(x, encoder_hidden_states.shape[1])


def _single(block: nn.Module, x: Tensor, temb: Tensor, rope: tuple[Tensor, Tensor] | None) -> Tensor:
    fp8 = fp8_pass(block, x, temb)
    attn = block.attn
    shift, scale, gate = block.norm.linear(F.silu(temb)).chunk(3, dim=1)
    # One product for q, k, v and the MLP would make its backward pass gather their gradients in a buffer of width 7 C:
    # more bytes than a second reading of n and the addition of its two gradients.
    quantize = serves(fp8, attn.to_q, attn.to_k, attn.to_v, block.proj_mlp)
    x, n = adaln_modulate(x, scale, shift, eps=block.norm.norm.eps, quantize=quantize, fork=True)
    o = _attend(attn, rope, image_stream(attn, n, attn.head_dim, fp8))
    u = activated(block.proj_mlp, n, fp8, quantize=serves(fp8, block.proj_out))
    y, bias = product_of_two(block.proj_out, o, u, fp8)
    if isinstance(y, tuple):
        gate = gate, gate
    return _finite(gated_residual(x, gate, y, bias=bias))


def _attend(attn: nn.Module, rope: tuple[Tensor, Tensor] | None, *streams: TokenStream) -> Tensor:
    """(B, S_1 + ..., C)"""
    eps = attn.norm_q.eps
    if rope is None:
        q, k, v = qk_norm(*streams, eps=eps)
    else:
        cos, sin = rope
        q, k, v = qk_norm_rope(*streams, cos=cos, sin=sin, eps=eps)
    return attention(q, k, v).flatten(2)


def _finite(x: Tensor) -> Tensor:
    return x.clip(-LARGEST_FLOAT16, LARGEST_FLOAT16) if x.dtype == torch.float16 else x


# Diffusers hands the two parts of the joint tokens from single block to single block, and each block would join them
# again: 2 (T + S) C elements read and written a block. So the joint tensor travels with its parts, as an attribute.


def part(joint: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """(text, image): views of joint (B, T + S, C), which `join` finds again."""
    text, image = joint[:, :length], joint[:, length:]
    if not torch.compiler.is_compiling():
        text._joint = image._joint = joint
    return text, image


def join(text: Tensor, image: Tensor) -> Tensor:
    """[text; image] (B, T + S, C): the tensor that they are the parts of, if they are as `part` left them, also after
    writing into them; else a copy of the two."""
    if not torch.compiler.is_compiling():
        joint = getattr(text, "_joint", None)
        if joint is not None and joint is getattr(image, "_joint", None) and _intact(joint, text, image):
            return joint
    return torch.cat((text, image), dim=1)


def _intact(joint: Tensor, text: Tensor, image: Tensor) -> bool:
    """Whether memory and gradients of the parts are still the joint tensor's. The outputs of a reentrant checkpoint are
    not: they have a gradient where the joint tensor, made in no_grad mode, has none. Hooks on a part want its gradient,
    which would not pass there."""
    offset = text.shape[1] * joint.stride(1) * joint.element_size()
    return (
        type(joint) is Tensor
        and text.shape[1] + image.shape[1] == joint.shape[1]
        and text.data_ptr() == joint.data_ptr()
        and image.data_ptr() == joint.data_ptr() + offset
        and all(
            each.requires_grad == joint.requires_grad and not each._backward_hooks and not each.retains_grad
            for each in (text, image)
        )
    )
