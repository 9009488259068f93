"""What the Triton kernels share.

A sample has `tiles` programs, each with `blocks` blocks of BLOCK elements. Programs are counted along the grid's first
axis only, as the others end at 65535, and in int64, as samples times stride may pass 2^31.
"""

from typing import TypeVar

from torch import Tensor

from dpdmd.kernels.runtime.launch import jit, tl

Value = TypeVar("Value", bound=float | None)

# 4096 elements over 256 threads: two 16-byte accesses a thread and tensor in bfloat16, which is enough in flight.
BLOCK = 4096
NUM_WARPS = 8
MAX_TILES = 1024  # the most partial sums of a sample: every program of the next pass reads all of them


def tiles(size: int) -> int:
    """Number of blocks for a sample of `size` elements, and of programs with one block each."""
    return -(-size // BLOCK)


def tiles_and_blocks(size: int) -> tuple[int, int]:
    """Number of programs for a sample of `size` elements, at most MAX_TILES, and of blocks for each."""
    num_blocks = tiles(size)
    blocks = -(-num_blocks // MAX_TILES)
    return -(-num_blocks // blocks), blocks


def divisible(size: int, *tensors: Tensor | None) -> bool:
    """Whether every sample starts at a multiple of 16 elements, so that accesses can be 16 bytes wide."""
    return size % 16 == 0 and all(tensor is None or tensor.stride(0) % 16 == 0 for tensor in tensors)


def multiples(*strides: int) -> bool:
    """Whether all are multiples of 16 elements, so that accesses can be 16 bytes wide."""
    return not any(stride % 16 for stride in strides)


def power_of_two(number: int) -> int:
    """The smallest power of two that is at least `number`; 1 for 0."""
    return 1 << max(number - 1, 0).bit_length()


def stride(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.stride(0)


def split(coefficient: float | Tensor) -> tuple[Tensor | None, float]:
    """A coefficient as two arguments of an operation's schema: a tensor or None, and a float."""
    return (coefficient, 0.0) if isinstance(coefficient, Tensor) else (None, float(coefficient))


def joined(tensor: Tensor | None, value: Value) -> tuple[Tensor | Value, int]:
    """A coefficient as two arguments of a kernel: a tensor or a float, and the stride."""
    return (value, 0) if tensor is None else (tensor, tensor.stride(0))


@jit
def program(tiles):
    """(sample, tile) of this program."""
    index = tl.program_id(0).to(tl.int64)
    return index // tiles, index % tiles


@jit
def multiple(number, DIVISIBLE: tl.constexpr):
    """The number. Where DIVISIBLE, the compiler then knows that it is a multiple of 16."""
    if DIVISIBLE:
        number = number // 16 * 16
    return number


@jit
def load(ptr, stride, sample, offsets, mask, DIVISIBLE: tl.constexpr):
    row = ptr + sample * multiple(stride, DIVISIBLE)
    return tl.load(row + offsets, mask=mask, other=0.0).to(tl.float32)


@jit
def store(ptr, stride, sample, offsets, values, mask, DIVISIBLE: tl.constexpr):
    row = ptr + sample * multiple(stride, DIVISIBLE)
    tl.store(row + offsets, values.to(ptr.dtype.element_ty), mask=mask)


@jit
def coefficient(value, stride, sample):
    """This sample's coefficient. value: a float, or a pointer to one float per sample."""
    value = value  # the interpreter makes a tensor of a float where it is assigned
    if value.dtype.is_ptr():
        value = tl.load(value + sample * stride)
    return value


@jit
def total(ptr, count, BLOCK: tl.constexpr):
    """The sum of `count` float32, in an order that depends on `count` only. They are read past the first-level cache, as
    other programs of the same launch may have written them."""
    lanes = tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, count, BLOCK):
        offsets = start + lanes
        sums += tl.load(ptr + offsets, mask=offsets < count, other=0.0, cache_modifier=".cg")
    return tl.sum(sums, 0)
