"""The memory layout of tensors (B, ...) in the fused kernels: samples are dense in memory, in one order for all tensors,
with any stride from sample to sample.

Channels-last tensors, slices of a batch, chunks of channels and a sample expanded to a batch are therefore read in place
where all tensors of a call agree. A tensor that does not agree with the first is copied.
"""

import torch
from torch import Tensor

from dpdmd.kernels.runtime.registration import plain


def address(x: Tensor) -> int | torch.SymInt:
    """Where x starts in memory, in bytes; for a subclass (a FakeTensor has no memory), where it starts in its storage."""
    return x.data_ptr() if plain((x,)) else x.storage_offset() * x.element_size()


def align(first: Tensor, *others: Tensor | None) -> list:
    """The tensors with dense samples, in first's memory order (contiguous if its samples have gaps). None stays None."""
    tensors: list = [first, *others]
    for tensor in tensors:
        if tensor is not None and not tensor.is_contiguous():
            break
    else:
        return tensors
    if not _dense(first):
        tensors[0] = first = first.contiguous()
    order = _order(first)
    for i, tensor in enumerate(others, start=1):
        if tensor is not None and _order(tensor) != order:
            tensors[i] = empty_like(first, tensor.dtype).copy_(tensor)
    return tensors


def empty_like(x: Tensor, dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor of x's shape, in the memory order that `align` gives x, without gaps between samples."""
    if x.is_contiguous() or not _dense(x):
        return torch.empty(x.shape, dtype=dtype, device=x.device)
    strides = (x.shape[1:].numel(), *x.stride()[1:])
    return torch.empty_strided(x.shape, strides, dtype=dtype, device=x.device)


def contiguous(*tensors: Tensor | None) -> list:
    """Each tensor, copied where it is not contiguous. None stays None."""
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def _order(x: Tensor) -> list[tuple[int, int]]:
    """(stride, size) of each dimension within a sample; one of size 1 may have any stride."""
    return [(stride, size) for stride, size in zip(x.stride()[1:], x.shape[1:], strict=True) if size != 1]


def _dense(x: Tensor) -> bool:
    expected = 1
    for stride, size in sorted(_order(x)):
        if stride != expected:
            return False
        expected *= size
    return True
