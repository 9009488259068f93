"""Attention of a block's image tokens, or of its image and text tokens: projections, per-head norms, rotation, attention."""

import itertools
from typing import Any

from torch import Tensor

from dpdmd.kernels.attention.attention import attention
from dpdmd.kernels.blocks.adapters import lowered, raised
from dpdmd.kernels.blocks.fp8 import Quantized, quantize_rows
from dpdmd.kernels.blocks.packed_linear import packed_linear
from dpdmd.kernels.blocks.qk_norm import TokenStream, qk_norm, qk_norm_rope
from dpdmd.kernels.fusion.fp8_weights import Fp8Pass
from dpdmd.kernels.fusion.linear import adapter, as_autocast, base, plain, product


def image_stream(attn: Any, x: Tensor | Quantized, head_dim: int, fp8: Fp8Pass | None = None) -> TokenStream:
    """The projections of x (B, S, C) by to_q, to_k and to_v."""
    qkv, bias = _projections((attn.to_q, attn.to_k, attn.to_v), x, head_dim, fp8)
    return TokenStream(qkv, *_norm_weights(attn.norm_q, attn.norm_k), bias)


def text_stream(attn: Any, x: Tensor, head_dim: int) -> TokenStream:
    """The projections of x by add_q_proj, add_k_proj and add_v_proj."""
    qkv, bias = _projections((attn.add_q_proj, attn.add_k_proj, attn.add_v_proj), x, head_dim)
    return TokenStream(qkv, *_norm_weights(attn.norm_added_q, attn.norm_added_k), bias)


def attend(attn: Any, *streams: TokenStream, rope: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Attention over the tokens of all streams, (B, S_1 + ..., C). rope: cosines and sines of all tokens."""
    eps = None if attn.norm_q is None else attn.norm_q.eps
    if rope is None:
        q, k, v = qk_norm(*streams, eps=eps)
    else:
        q, k, v = qk_norm_rope(*streams, cos=rope[0], sin=rope[1], eps=eps)
    return attention(q, k, v).flatten(2)


def _norm_weights(norm_q: Any, norm_k: Any) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if norm_q is None else (norm_q.weight, norm_k.weight)


def _projections(
    layers: tuple[Any, ...], x: Tensor | Quantized, head_dim: int, fp8: Fp8Pass | None = None
) -> tuple[Any, Any]:
    """(qkv, bias) of a TokenStream: one product (B, S, 3, H, D), or three (B, S, H, D) where a layer must be called."""
    if isinstance(x, Tensor) and not plain(*layers):
        added = [adapter(layer) for layer in layers]
        if not all(each or plain(layer) for each, layer in zip(added, layers, strict=True)):
            each = [product(layer, x, fp8) for layer in layers]
            return tuple(y.unflatten(-1, (-1, head_dim)) for y, _ in each), tuple(bias for _, bias in each)
        layers = tuple(map(base, layers))
        ends = itertools.accumulate([layer.out_features for layer in layers], initial=0)
        added = [each._replace(column=start) for each, start in zip(added, ends, strict=False) if each]
        (x,), h = lowered(tuple(as_autocast(x)), added)
        qkv = raised(_packed(layers, x if fp8 is None else quantize_rows(x), fp8), h, added)
    else:
        layers = tuple(map(base, layers))
        qkv = _packed(layers, x, fp8)
    return qkv.unflatten(-1, (3, -1, head_dim)), tuple(layer.bias for layer in layers)


def _packed(layers: tuple[Any, ...], x: Tensor | Quantized, fp8: Fp8Pass | Any) -> Tensor:
    if isinstance(x, Quantized):
        return fp8.product(x, *layers)
    return packed_linear(x, tuple(layer.weight for layer in layers))
