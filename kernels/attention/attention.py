"""Attention of every query to every key (no mask), through the fastest kernel that takes the tensors.

    o = softmax(scale q k^T) v      for each sample and head; scale = 1 / sqrt(D) unless given

Source: arXiv 1706.03762, equation 1. flash.py has the Triton kernels; choice.py picks the fastest kernel.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dpdmd.kernels.attention import choice, flash
from dpdmd.kernels.runtime import checks
from dpdmd.kernels.runtime.backend import requested, why_not
from dpdmd.kernels.runtime.kept import gradients_wanted, keeping, kept
from dpdmd.kernels.runtime.registration import transformed
from dpdmd.kernels.runtime.saved import Function

SDPA_BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
TRITON = ("triton", "triton+cudnn")
BACKENDS = ("auto", "reference", *TRITON, "sdpa", *SDPA_BACKENDS, "xformers")
# torch's own order starts with flash (FA2): 306 TFLOP/s forward at D = 64 on Hopper, against cuDNN's 459.
FASTEST_FIRST = list(SDPA_BACKENDS.values())


def attention_reference(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """The definition, in float32 (float64 for float64), also under autocast."""
    arithmetic = torch.float64 if q.dtype == torch.float64 else torch.float32
    with torch.autocast(q.device.type, enabled=False):
        scores = torch.einsum("bqhd,bkhd->bhqk", q.to(arithmetic) * scale, k.to(arithmetic))
        return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(dim=-1), v.to(arithmetic)).to(q.dtype)


class _Attention(Function):
    """Forward in Triton; backward in Triton, or in cuDNN, whose results do not repeat bit for bit."""

    @staticmethod
    def forward(ctx, q, k, v, scale, backend):
        o, lse = kept(lambda: flash.forward(q, k, v, scale))
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.scale, ctx.backend = scale, backend
        return o

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do):
        q, k, v, o, lse = ctx.saved_tensors
        run = flash.backward if ctx.backend == "triton" else _cudnn_backward
        return *run(do, q, k, v, o, lse, ctx.scale), None, None


class DenseGradient(Function):
    """The identity; its backward pass makes the upstream gradient dense. torch (2.11) caches cuDNN's backward plan by
    the strides of q, k and v alone, and reads out of bounds when the next upstream gradient has other strides. FLUX has
    both kinds: slices of a concatenation's gradient, and dense ones."""

    @staticmethod
    def forward(ctx, o):
        return o.view_as(o)

    @staticmethod
    def backward(ctx, do):
        return do.contiguous()


def _with_dense_gradient(o: Tensor) -> Tensor:
    return DenseGradient.apply(o) if o.is_cuda and o.requires_grad and not transformed() else o


def _cudnn_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    do = do.contiguous()  # see DenseGradient
    lse = flash.natural(lse, q.shape[1])
    seed = torch.zeros((), dtype=torch.int64, device=q.device)  # for dropout, which is off
    heads_first = [tensor.transpose(1, 2) for tensor in (do, q, k, v, o)]
    gradients = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        *heads_first, lse, seed, seed, None, None, None, q.shape[1], k.shape[1], 0.0, False, scale=scale
    )
    return tuple(gradient.transpose(1, 2) for gradient in gradients)


def _triton_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, backend: str) -> Tensor:
    if gradients_wanted(q, k, v):
        return _Attention.apply(q, k, v, scale, backend)
    return flash.forward(q, k, v, scale)[0]


def attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, backend: str = "auto") -> Tensor:
    """softmax(scale q k^T) v, non-causal, forward and backward. Returns (B, S, H, D) in q's dtype.

    q (B, S, H, D); k, v (B, T, H, D), T >= 1: one dtype of float32, float16, bfloat16 and float64, any strides, any
        batch. Only the Triton kernels copy, and only a tensor whose rows of D are not dense and 16-byte aligned.
    scale: a float; None means 1 / sqrt(D).
    backend: "auto": on CUDA the fastest for these shapes on this GPU, forward and backward together where gradients are
        wanted; measured beforehand on H100 and H200, elsewhere at first use (docs/transformer.md). Under
        torch.use_deterministic_algorithms the fastest whose results repeat bit for bit. Inside selective_checkpoint
        "triton+cudnn" replaces "cudnn", as its result can be kept. On other devices, and in a transform of torch.func,
        torch picks. Empty tensors, DPDMD_KERNELS=reference and use_backend("reference") select the reference; other
        values of these do not affect attention.
        DPDMD_ATTENTION in the environment sets what "auto" means.
        "triton": our kernels, float16 and bfloat16, D up to 128; they repeat bit for bit. "triton+cudnn": their forward
        pass, cuDNN's backward pass. "sdpa": torch picks. "cudnn", "flash", "efficient", "math": that kernel or an error.
        "xformers": its memory_efficient_attention, where installed. "reference".

    Saved for backward (except by reference and math): q, k, v, the output and a float32 per query and head.

    Raises TypeError for a dtype or type, ValueError for a shape, a device and an unknown backend, RuntimeError for a
    backend that cannot run these tensors on this machine.
    """
    _check(q, k, v, scale, backend)
    if scale is None:
        scale = 1 / math.sqrt(max(q.shape[-1], 1))
    if backend == "auto":
        if transformed():  # torch.func can trace torch's kernels, and they keep no scores, unlike the reference
            backend = "sdpa"
        else:
            backend = "reference" if requested() == "reference" else choice.overridden(BACKENDS)
    if backend == "reference" or q.numel() == 0:  # some kernels refuse empty tensors
        return attention_reference(q, k, v, scale)
    if backend == "auto" and q.device.type == "cuda" and not _why_not_triton(q, k, scale):
        backend = choice.fastest(
            attention, q.device.index, int(q.shape[3]), int(q.shape[1]), int(k.shape[1]), gradients_wanted(q, k, v)
        )
        if backend == "cudnn" and keeping():  # cuDNN's output cannot be kept: torch's node computes it
            backend = "triton+cudnn"
    if backend == "auto" and q.device.type == "meta" and not _why_not_triton(q, k, scale):  # in backend.shapes_only
        backend = "triton"
    if backend in TRITON:
        if reason := _why_not_triton(q, k, scale):
            raise RuntimeError(f"backend={backend!r} cannot run these tensors: {reason}; use backend='auto'")
        return _triton_attention(q, k, v, scale, backend)
    if backend == "xformers":
        return _xformers(q, k, v, scale)
    return _sdpa(q, k, v, scale, backend)


def _why_not_triton(q: Tensor, k: Tensor, scale: float) -> str:
    return why_not("triton", q.device.type, q.device.index) or flash.why_not(q, k, scale)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, backend: str) -> Tensor:
    heads_first = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if backend == "sdpa" or (backend == "auto" and q.device.type != "cuda"):
        return _with_dense_gradient(F.scaled_dot_product_attention(*heads_first, scale=scale).transpose(1, 2))
    if backend in ("cudnn", "efficient") and q.device.type != "cuda":
        raise RuntimeError(
            f"backend={backend!r} needs CUDA tensors and q is on {q.device}; use 'auto', 'sdpa', 'math' or 'reference'"
        )
    kernels = FASTEST_FIRST if backend == "auto" else [SDPA_BACKENDS[backend]]
    try:
        with sdpa_kernel(kernels, set_priority=True):
            o = F.scaled_dot_product_attention(*heads_first, scale=scale).transpose(1, 2)
        return _with_dense_gradient(o) if SDPBackend.CUDNN_ATTENTION in kernels else o
    except RuntimeError as error:
        if "No available kernel" not in str(error):
            raise
        raise RuntimeError(
            f"backend={backend!r} cannot run q {tuple(q.shape)}, k {tuple(k.shape)} in {q.dtype} on {q.device} "
            f"with torch {torch.__version__} (torch's warnings say why); use backend='auto'"
        ) from error


def _xformers(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    try:
        from xformers.ops import memory_efficient_attention  # pyright: ignore[reportMissingImports]
    except (ImportError, OSError) as error:  # OSError: a library that its wheel needs is missing
        raise RuntimeError(
            f"backend='xformers' needs the xformers package, whose import fails ({error}); "
            f"pip install 'dpdmd[xformers]', or use backend='auto'"
        ) from error
    return memory_efficient_attention(q, k, v, scale=scale)


def _check(q: Tensor, k: Tensor, v: Tensor, scale: float | None, backend: str) -> None:
    for name, value in (("q", q), ("k", k), ("v", v)):
        checks.floating(name, value)
        if value.ndim != 4:
            raise ValueError(f"{name} has shape {tuple(value.shape)}; it needs four dimensions: (B, S, H, D)")
        if value.dtype != q.dtype:
            raise TypeError(f"{name} has dtype {value.dtype}; it needs q's dtype {q.dtype}")
        if value.device != q.device:
            raise ValueError(f"{name} is on {value.device}; it needs to be on q's device {q.device}")
    B, _, H, D = q.shape
    if k.shape != (B, k.shape[1], H, D):
        raise ValueError(f"k has shape {tuple(k.shape)}; with q {tuple(q.shape)} it needs ({B}, T, {H}, {D})")
    if v.shape != k.shape:
        raise ValueError(f"v has shape {tuple(v.shape)}; it needs k's shape {tuple(k.shape)}")
    if k.shape[1] == 0:
        raise ValueError(f"k has shape {tuple(k.shape)}; it needs at least one position to attend to")
    if scale is not None:
        checks.number("scale", scale)
    checks.one_of("backend", backend, BACKENDS)
