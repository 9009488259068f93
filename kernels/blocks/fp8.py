"""Matrix products in FP8 (e4m3) with one scale a row, for passes without gradient.

    quantised row:  scale = max|x| / 448,  values = x (1 / scale) rounded to e4m3
    product:        out = (x.values weight.values^T) x.scale weight.scale^T + bias

448 is the largest e4m3 number. Source: arXiv 2209.05433 (the format). The product is torch._scaled_mm with row scales.
"""

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dpdmd.kernels.runtime import checks
from dpdmd.kernels.runtime.backend import choose, requested
from dpdmd.kernels.runtime.launch import by_warps, capability, jit, tl
from dpdmd.kernels.runtime.registration import register
from dpdmd.kernels.runtime.rows import row_starts, rows
from dpdmd.kernels.runtime.tile import multiple, power_of_two

DTYPE = torch.float8_e4m3fn
LARGEST = 448.0
# A row of smaller values becomes zeros with scale 1; from here on, the scale is a normal number and 1 / scale is finite.
SMALLEST = 2.0**-116


class Quantized(NamedTuple):
    """values.float() * scale. Neither part has a gradient."""

    values: Tensor  # (..., C), float8_e4m3fn
    scale: Tensor  # (..., 1), float32


def quantize_rows_reference(x: Tensor) -> Quantized:
    """The definition, in float32, rounded to the nearest even. No clamp: x / scale exceeds 448 only by scale's rounding."""
    x = x.float().contiguous()
    if x.shape[-1] == 0:
        return Quantized(x.to(DTYPE), x.new_ones(*x.shape[:-1], 1))
    largest = x.abs().amax(dim=-1, keepdim=True)
    # Multiplications and a reciprocal give the same bits on CPU, on CUDA and in Triton. A division by a number does not:
    # PyTorch multiplies by its reciprocal on CUDA only.
    scale = (largest * (1 / LARGEST)).masked_fill(largest < SMALLEST, 1.0)
    return Quantized((x * scale.reciprocal()).to(DTYPE), scale)


@jit
def quantized(values):
    """(values in e4m3, scale (ROWS, 1)) of whole float32 rows (ROWS, C), 0 where masked: the reference's bits."""
    largest = tl.max(tl.abs(values), 1, keep_dims=True)
    scale = tl.where(largest < 2.0**-116, 1.0, largest * (1 / 448.0))
    return (values * tl.div_rn(1.0, scale)).to(tl.float8e4nv), scale


def _quantize_kernel(
    x_ptr,
    values_ptr,
    scale_ptr,
    count: tl.int64,
    inner: tl.int64,
    outer_stride: tl.int64,
    stride: tl.int64,
    columns: tl.int64,
    NESTED: tl.constexpr,
    DIVISIBLE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A program quantises ROWS whole rows, read once."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    lanes = tl.arange(0, COLUMNS)
    columns = multiple(columns, DIVISIBLE)
    mask = (rows < count)[:, None] & (lanes < columns)[None, :]
    starts = row_starts(rows, inner, outer_stride, stride, NESTED, DIVISIBLE)
    x = tl.load(x_ptr + starts[:, None] + lanes[None, :], mask=mask, other=0.0).to(tl.float32)
    values, scale = quantized(x)
    tl.store(values_ptr + (rows * columns)[:, None] + lanes[None, :], values, mask=mask)
    tl.store(scale_ptr + rows[:, None], scale, mask=(rows < count)[:, None])


def whole_rows(columns: int) -> tuple[int, int, int]:
    """(ROWS, COLUMNS, warps) of a program on whole rows: 2048 elements or more, 16 to 32 a thread, all in registers."""
    padded = power_of_two(columns)
    return max(2048 // padded, 1), padded, min(max(padded // 1024, 4), 32)


WARPS = (4, 8, 16, 32)  # from `whole_rows`
_quantize_kernels = by_warps(_quantize_kernel, *WARPS)


def empty_quantized(shape: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Uninitialised values (..., C) and scale (..., 1)."""
    return (
        torch.empty(shape, dtype=DTYPE, device=device),
        torch.empty((*shape[:-1], 1), dtype=torch.float32, device=device),
    )


def _launch(x: Tensor) -> tuple[Tensor, Tensor]:
    values, scale = empty_quantized(x.shape, x.device)
    if x.numel() == 0:
        return values, scale.fill_(1.0)
    x, count, inner, outer_stride, stride = walk = rows(x)
    columns = x.shape[-1]
    ROWS, COLUMNS, num_warps = whole_rows(columns)
    _quantize_kernels[num_warps](
        -(-count // ROWS),
        *(x, values, scale, count, inner, outer_stride, stride, columns),
        *(walk.nested, walk.divisible and columns % 16 == 0, ROWS, COLUMNS),
    )
    return values, scale


_quantize_rows = register(
    "quantize_rows_triton(Tensor x) -> (Tensor, Tensor)",
    _launch,
    lambda x: empty_quantized(x.shape, x.device),
)


def quantize_rows_triton(x: Tensor) -> Quantized:
    if not converts(x.device.type, x.device.index):
        return quantize_rows_reference(x)
    return Quantized(*_quantize_rows(x))


_capability = functools.cache(capability)


def converts(device_type: str, index: int | None) -> bool:
    """Whether kernels on this device can round to e4m3: a GPU needs compute capability 8.9 or newer."""
    return device_type != "cuda" or _capability(index) >= (8, 9)


converts.__dict__["_dynamo_marked_constant"] = True  # torch.compile runs it while tracing

IMPLEMENTATIONS = {"reference": quantize_rows_reference, "triton": quantize_rows_triton}


def quantize_rows(x: Tensor) -> Quantized:
    """Quantise each row of x (..., C): values (..., C) in e4m3 and scale (..., 1) in float32, contiguous.

    x: float32, float16, bfloat16 or float64 (rounded to float32 first), any strides, any size. Rows at up to two strides,
        such as the image's in a joint attention's output, are read without a copy.

    A row of zeros has values 0 and scale 1. A row with NaN or infinity gets NaN. Elements below max|x| / 2^18 of their
    row become 0: e4m3 has three mantissa bits, fewer below 2^-6.

    Raises TypeError for a dtype or type, ValueError for a scalar, and where x would get a gradient.
    """
    checks.floating("x", x)
    if x.ndim == 0:
        raise ValueError("x has shape (); it needs rows: (..., C)")
    no_gradient(x=x)
    return choose("quantize_rows", IMPLEMENTATIONS, x.device, x.dtype)(x)


def no_gradient(**arguments: Tensor | None) -> None:
    if torch.is_grad_enabled():
        for name, value in arguments.items():
            if value is not None and value.requires_grad:
                raise ValueError(
                    f"{name} requires a gradient, which FP8 values do not pass on; "
                    f"call under torch.no_grad(), or with {name}.detach()"
                )


def fp8_linear_reference(x: Quantized, weight: Quantized, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The definition: float32, rounded once."""
    with torch.autocast(x.values.device.type, enabled=False):
        out = F.linear(x.values.float() * x.scale, weight.values.float() * weight.scale)
    return (out if bias is None else out + bias.float()).to(dtype)


def _scaled_product(
    x: Quantized, weight: Quantized, bias: Tensor | None, dtype: torch.dtype, fast_accum: bool
) -> Tensor:
    values = x.values.reshape(-1, x.values.shape[-1]).contiguous()
    fused = None if bias is None or dtype == torch.float32 else bias.to(dtype)  # _scaled_mm takes no float32 bias
    out = torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
        values,
        weight.values.contiguous().t(),
        scale_a=x.scale.reshape(-1, 1).contiguous(),
        scale_b=weight.scale.contiguous().t(),
        bias=fused,
        out_dtype=dtype,
        use_fast_accum=fast_accum,
    )
    if bias is not None and fused is None:
        out += bias
    return out.view(*x.values.shape[:-1], -1)


def fp8_linear(
    x: Quantized,
    weight: Quantized,
    bias: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    fast_accum: bool = True,
) -> Tensor:
    """x weight^T + bias for quantised x (..., K) and weight (N, K): (..., N) in `dtype`. No gradient.

    K and N: multiples of 16.
    bias (N,): float32, float16 or bfloat16; a GPU rounds it to `dtype` first.
    dtype: bfloat16, float16 or float32 (on GPUs, the last on Hopper alone).
    fast_accum: on a GPU, sum in the tensor cores' precision, about 14 bits; False promotes sums to float32 at intervals.

    GPUs of compute capability 8.9 and newer run torch._scaled_mm; elsewhere the reference multiplies in float32.

    Raises TypeError for a dtype or type, ValueError for a shape, a device, and where bias would get a gradient.
    """
    _check(x, weight, bias, dtype)
    device, on_gpu = x.values.device, x.values.is_cuda and x.values.numel() > 0
    if on_gpu and requested() != "reference" and converts("cuda", device.index):
        return _scaled_product(x, weight, bias, dtype, fast_accum)
    return fp8_linear_reference(x, weight, bias, dtype)


def _check(x: Quantized, weight: Quantized, bias: Tensor | None, dtype: torch.dtype) -> None:
    device = _check_quantized("x", x)
    if _check_quantized("weight", weight) != device:
        raise ValueError(f"weight is on {weight.values.device}; it needs to be on x's device {device}")
    size = weight.values.shape
    if len(size) != 2:
        raise ValueError(f"weight has shape {tuple(size)}; it needs two dimensions: (N, K)")
    N, K = size
    if x.values.ndim == 0 or x.values.shape[-1] != K:
        raise ValueError(f"x has shape {tuple(x.values.shape)}; with weight ({N}, {K}) it needs (..., {K})")
    if N % 16 or K % 16:
        raise ValueError(f"weight has shape ({N}, {K}); FP8 matrix products need multiples of 16")
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise TypeError(f"dtype is {dtype}; it needs to be torch.bfloat16, torch.float16 or torch.float32")
    if bias is not None:
        checks.floating("bias", bias)
        if bias.shape != (N,):
            raise ValueError(f"bias has shape {tuple(bias.shape)}; with weight ({N}, {K}) it needs ({N},)")
        if bias.device != device:
            raise ValueError(f"bias is on {bias.device}; it needs to be on x's device {device}")
        no_gradient(bias=bias)


def _check_quantized(name: str, value: Quantized) -> torch.device:
    """Returns the device."""
    if not isinstance(value, Quantized):
        raise TypeError(f"{name} is a {type(value).__name__}; it needs to be a Quantized, from quantize_rows")
    values, scale = value
    if values.dtype != DTYPE or scale.dtype != torch.float32:
        raise TypeError(
            f"{name} has values in {values.dtype} and scale in {scale.dtype}; "
            f"it needs torch.float8_e4m3fn and torch.float32"
        )
    if scale.shape != (*values.shape[:-1], 1):
        raise ValueError(
            f"{name} has values {tuple(values.shape)} and scale {tuple(scale.shape)}; it needs one scale a row"
        )
    device = values.device
    if scale.device != device:
        raise ValueError(f"{name} has values on {device} and scale on {scale.device}; it needs both on one device")
    return device
