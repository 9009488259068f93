"""AdamW on a flat shard of a network in one pass: each tensor is read once and written once.

    g = scale gradient
    m = beta1 m + (1 - beta1) g,    v = beta2 v + (1 - beta2) g^2
    p = (1 - lr weight_decay) p - lr / (1 - beta1^step) m / (sqrt(v) / sqrt(1 - beta2^step) + eps)

p is the float32 master; the network computes with the weight, a rounded copy of it. The update uses m and v as computed;
stored for the next step, they have 4, 2 or 1 bytes an element.

2 bytes and 1 are rounded stochastically, so that the expectation is the value itself. Rounded to the nearest, v would
stand still: with beta2 = 0.999 a step lowers it by at most 0.1 %, and bfloat16's neighbours are 0.4 to 0.8 % apart.

bfloat16 holds m and v. The 8-bit form holds m and sqrt(v): a scale for each block of 256, and for each element a code c of
4 exponent bits and M mantissa bits, with the value

    c 2^-M if c < 2^M,    else (1 + (c mod 2^M) 2^-M) 2^(c // 2^M - 1),    times the scale

M is 3 for m, beside a sign, and 4 for sqrt(v). Every code is finite. A block reaches from its largest value down to about
2^-17 of it (m) and 2^-18 (sqrt(v)). A v above 0 never gets the code 0, which would divide its update by eps: such a small
element gets too large a v, and moves less. Scales are powers of two, so that dividing by one is exact: an unchanged
element keeps its value when its block's scale changes.

Element i takes 16 random bits for each moment from word i % 4 of Philox4x32-10's counter i // 4, the upper half for m.
Every operation is rounded by itself and no elements are added up: all devices write the same bits.

Sources: arXiv 1711.05101 (AdamW), in the order of torch.optim.AdamW; arXiv 2110.02861 (8-bit moments in blocks).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dpdmd.kernels.runtime import checks
from dpdmd.kernels.runtime.backend import choose
from dpdmd.kernels.runtime.launch import jit, kernel, tl
from dpdmd.kernels.runtime.philox import LOW, Philox, philox4x32
from dpdmd.kernels.runtime.registration import register
from dpdmd.kernels.runtime.tile import multiple

BLOCK = 256  # elements a scale, whose four bytes are 1.6 % of theirs
MANTISSA = 3  # of exp_avg, beside its sign
ROOT_MANTISSA = 4  # of sqrt(exp_avg_sq)
NUM_WARPS = 8
# Blocks of a program. Four elements a thread: float32's accesses are 16 bytes wide, and threads exchange no values. In 8
# bits eight, so that one warp finds a block's largest.
ROWS, ROWS_FLOAT8 = 4, 8
CHUNK = 1 << 18  # elements of the reference's temporaries, which stay in a CPU's cache


@dataclass(frozen=True)
class Float8State:
    """A moment in 8 bits; zeros are a moment of zeros."""

    values: Tensor  # (n,) uint8: codes, of the moment or of its root
    scales: Tensor  # (ceil(n / 256),) float32

    @staticmethod
    def zeros(size: int, device: torch.device | str | None = None) -> "Float8State":
        return Float8State(
            torch.zeros(size, dtype=torch.uint8, device=device), torch.zeros(-(-size // BLOCK), device=device)
        )


class Coefficients(NamedTuple):
    """The factors in an element's arithmetic, computed from the hyperparameters in float64."""

    beta1: float
    rest1: float  # 1 - beta1
    beta2: float
    rest2: float
    decay: float  # 1 - lr weight_decay
    step_size: float  # lr / (1 - beta1^step)
    root_factor: float  # 1 / sqrt(1 - beta2^step)
    eps: float

    @staticmethod
    def of(lr: float, betas: tuple[float, float], eps: float, weight_decay: float, step: int) -> "Coefficients":
        beta1, beta2 = betas
        return Coefficients(
            *(float(beta1), 1.0 - beta1, float(beta2), 1.0 - beta2, 1.0 - lr * weight_decay),
            *(lr / (1 - beta1**step), (1 - beta2**step) ** -0.5, float(eps)),
        )


# A position is a code in fixed point, with 23 - M fractional bits: from 1.0 on, float32's bits minus POSITIONS.
POSITIONS = 126 << 23  # 1.0 then has the code 2^M
TOP = 14  # exponent of the largest code's number
INFINITE = 0x7F800000


def _power(field: Tensor) -> Tensor:
    """The power of two with this exponent field in float32."""
    return (field << 23).view(torch.float32)


def encode(x: Tensor, random: Tensor, mantissa: int) -> tuple[Tensor, Tensor]:
    """Codes (blocks, 256), int32, and scales (blocks, 1) of x (blocks, 256), float32, not negative, with 16 random bits an
    element. A block with NaN or infinity gets the scale NaN."""
    shift = 23 - mantissa
    largest = x.view(torch.int32).amax(dim=1, keepdim=True)
    # The largest is rounded up before it sets the scale, so no value exceeds the largest code.
    field = (((largest + (1 << shift)) >> 23) - TOP).clamp(min=1)
    number = x * _power(254 - field)
    fixed = (number.clamp(max=1) * 2.0**23).to(torch.int32)
    position = torch.where(number < 1, fixed, number.view(torch.int32) - POSITIONS)
    dither = (random << (shift - 16)) + (1 << (shift - 17))  # plus half of the last random bit: unbiased
    return (position + dither) >> shift, torch.where(largest < INFINITE, _power(field), torch.nan)


def decode(codes: Tensor, scales: Tensor, mantissa: int) -> Tensor:
    """The float32 values (blocks, 256) of codes (blocks, 256), int32, and scales (blocks, 1)."""
    position = codes << (23 - mantissa)
    number = torch.where(position < 1 << 23, position * 2.0**-23, (position + POSITIONS).view(torch.float32))
    return number * scales


def exp_avg_of(state: Float8State) -> Tensor:
    """The first moment (n,), float32, of a state."""
    codes = _blocks(state.values.int())
    magnitude = decode(codes & 127, state.scales[:, None], MANTISSA)
    signed = (magnitude.view(torch.int32) | ((codes >> 7) << 31)).view(torch.float32)
    return signed.flatten()[: state.values.numel()]


def exp_avg_sq_of(state: Float8State) -> Tensor:
    """The second moment (n,), float32, of a state."""
    root = decode(_blocks(state.values.int()), state.scales[:, None], ROOT_MANTISSA)
    return (root * root).flatten()[: state.values.numel()]


def _blocks(x: Tensor) -> Tensor:
    """x (n,) as (ceil(n / 256), 256), padded with zeros."""
    return F.pad(x, (0, -x.numel() % BLOCK)).view(-1, BLOCK)


def random_halves(key: Philox, first: int, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(count,) int32 in [0, 2^16), for each moment, of elements from `first`, a multiple of 4."""
    counter = torch.arange(first // 4, (first + count + 3) // 4, device=device)
    zero = torch.zeros_like(counter)
    words = torch.stack(philox4x32((counter & LOW, counter >> 32, zero, zero), key.words), dim=-1).flatten()[:count]
    return (words >> 16).int(), (words & 0xFFFF).int()


def round_to_bfloat16(x: Tensor, random: Tensor) -> Tensor:
    """x, float32, stochastically rounded by 16 random bits, as many as bfloat16 drops."""
    rounded = ((x.view(torch.int32) + random) & -0x10000).view(torch.float32)
    return torch.where(x.isnan(), x, rounded).to(torch.bfloat16)  # NaN's bits may overflow


class Moments(NamedTuple):
    """Both moments of some elements, as they are stored."""

    exp_avg: Tensor
    exp_avg_scale: Tensor | None
    exp_avg_sq: Tensor
    exp_avg_sq_scale: Tensor | None

    def part(self, elements: slice) -> "Moments":
        """Those of some elements, which begin and end with a block."""
        blocks = slice(elements.start // BLOCK, elements.stop // BLOCK)
        return Moments(
            *(self.exp_avg[elements], None if self.exp_avg_scale is None else self.exp_avg_scale[blocks]),
            *(self.exp_avg_sq[elements], None if self.exp_avg_sq_scale is None else self.exp_avg_sq_scale[blocks]),
        )

    def read(self) -> tuple[Tensor, Tensor]:
        if self.exp_avg_scale is None or self.exp_avg_sq_scale is None:
            return self.exp_avg.float(), self.exp_avg_sq.float()
        return (
            exp_avg_of(Float8State(self.exp_avg, self.exp_avg_scale)),
            exp_avg_sq_of(Float8State(self.exp_avg_sq, self.exp_avg_sq_scale)),
        )

    def write(
        self, m: Tensor, v: Tensor, root: Tensor, apply: Tensor | None, random: tuple[Tensor, Tensor] | None
    ) -> None:
        if random is None or self.exp_avg.dtype == torch.float32:
            _write(self.exp_avg, m, apply)
            _write(self.exp_avg_sq, v, apply)
        elif self.exp_avg_scale is None or self.exp_avg_sq_scale is None:
            _write(self.exp_avg, round_to_bfloat16(m, random[0]), apply)
            _write(self.exp_avg_sq, round_to_bfloat16(v, random[1]), apply)
        else:
            codes, scales = encode(_blocks(m.abs()), _blocks(random[0]), MANTISSA)
            codes |= (_blocks(m.view(torch.int32)) >> 24) & 128  # the sign
            _write(self.exp_avg, codes.flatten()[: m.numel()], apply)
            _write(self.exp_avg_scale, scales.flatten(), apply)
            root = _blocks(root)
            codes, scales = encode(root, _blocks(random[1]), ROOT_MANTISSA)
            codes = torch.maximum(codes, (root > 0).int())
            _write(self.exp_avg_sq, codes.flatten()[: m.numel()], apply)
            _write(self.exp_avg_sq_scale, scales.flatten(), apply)


def _write(target: Tensor, value: Tensor, apply: Tensor | None) -> None:
    """Write where `apply` is True, without a synchronisation to read it."""
    value = value.to(target.dtype)
    target.copy_(value if apply is None else torch.where(apply, value, target))


def adamw_step_reference(
    master: Tensor,
    moments: Moments,
    gradient: Tensor,
    weight: Tensor | None,
    scale: Tensor | None,
    apply: Tensor | None,
    c: Coefficients,
    key: Philox | None,
    first: int = 0,
) -> None:
    """The definition, in chunks; master[0] is element `first`, a multiple of 256, of the stream `key`. Products and sums are
    separate operations: whether PyTorch's compound ones round once or twice depends on the device."""
    for start in range(0, master.numel(), CHUNK):
        elements = slice(start, start + CHUNK)
        p, g, stored = master[elements], gradient[elements].float(), moments.part(elements)
        m, v = stored.read()
        if scale is not None:
            g = g * scale
        m = c.beta1 * m + c.rest1 * g
        v = c.beta2 * v + c.rest2 * (g * g)
        root = v.double().sqrt().float()  # rounded once; a CPU's float32 root may be an ulp off
        new = c.decay * p - c.step_size * (m / (root * c.root_factor + c.eps))
        _write(p, new, apply)
        if weight is not None:
            _write(weight[elements], new, apply)
        stored.write(m, v, root, apply, random_halves(key, first + start, p.numel(), p.device) if key else None)


@jit
def _power_of(field):
    return (field << 23).to(tl.float32, bitcast=True)


@jit
def _encoded(x, random, MANTISSA: tl.constexpr):
    """`encode` of (ROWS, BLOCK)."""
    SHIFT: tl.constexpr = 23 - MANTISSA
    largest = tl.max(x.to(tl.int32, bitcast=True), 1, keep_dims=True)
    field = tl.maximum(((largest + (1 << SHIFT)) >> 23) - 14, 1)
    number = x * _power_of(254 - field)
    fixed = (tl.minimum(number, 1.0) * 8388608.0).to(tl.int32)
    position = tl.where(number < 1, fixed, number.to(tl.int32, bitcast=True) - (126 << 23))
    dither = (random << (SHIFT - 16)) + (1 << (SHIFT - 17))
    scale = tl.where(largest < 0x7F800000, _power_of(field), float("nan"))
    return (position + dither) >> SHIFT, scale


@jit
def _decoded(codes, scale, MANTISSA: tl.constexpr):
    """`decode` of (ROWS, BLOCK)."""
    position = codes << (23 - MANTISSA)
    number = (position + (126 << 23)).to(tl.float32, bitcast=True)
    return tl.where(position < (1 << 23), position.to(tl.float32) * (1.0 / 8388608.0), number) * scale


@jit
def _random_words(key, blocks, BLOCK: tl.constexpr):
    """(ROWS, BLOCK) uint32; the four words of a counter are consecutive."""
    counters = (blocks * (BLOCK // 4))[:, None] + tl.arange(0, BLOCK // 4)[None, :]
    zero = tl.zeros_like(counters).to(tl.uint32)
    r0, r1, r2, r3 = tl.philox(key, counters.to(tl.uint32), (counters >> 32).to(tl.uint32), zero, zero)
    return tl.interleave(tl.interleave(r0, r2), tl.interleave(r1, r3))


@jit
def _rounded(x, random):
    """`round_to_bfloat16`."""
    bits = (x.to(tl.int32, bitcast=True) + random) & -65536
    return tl.where(x == x, bits.to(tl.float32, bitcast=True), x).to(tl.bfloat16)


@kernel(NUM_WARPS, multiply_add=False)
def _adamw_kernel(
    master_ptr,
    exp_avg_ptr,
    exp_avg_scale_ptr,
    exp_avg_sq_ptr,
    exp_avg_sq_scale_ptr,
    gradient_ptr,
    weight_ptr,
    scale_ptr,
    apply_ptr,
    beta1,
    rest1,
    beta2,
    rest2,
    decay,
    step_size,
    root_factor,
    eps,
    key: tl.int64,
    first_block: tl.int64,
    size: tl.int64,
    DIVISIBLE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    MANTISSA: tl.constexpr,
    ROOT_MANTISSA: tl.constexpr,
):
    blocks = first_block + tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    offsets = (blocks * BLOCK)[:, None] + tl.arange(0, BLOCK)[None, :]
    mask = offsets < multiple(size, DIVISIBLE)
    inside = (blocks * BLOCK < size)[:, None]
    if apply_ptr is not None:  # else there is nothing to read or write anywhere
        applied = tl.load(apply_ptr) != 0
        mask = mask & applied
        inside = inside & applied

    g = tl.load(gradient_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if scale_ptr is not None:
        g = g * tl.load(scale_ptr)
    p = tl.load(master_ptr + offsets, mask=mask, other=0.0)
    if exp_avg_scale_ptr is None:
        m = tl.load(exp_avg_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        v = tl.load(exp_avg_sq_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    else:
        codes = tl.load(exp_avg_ptr + offsets, mask=mask, other=0).to(tl.int32)
        scale = tl.load(exp_avg_scale_ptr + blocks[:, None], mask=inside, other=0.0)
        m = _decoded(codes & 127, scale, MANTISSA)
        m = (m.to(tl.int32, bitcast=True) | ((codes >> 7) << 31)).to(tl.float32, bitcast=True)
        codes = tl.load(exp_avg_sq_ptr + offsets, mask=mask, other=0).to(tl.int32)
        scale = tl.load(exp_avg_sq_scale_ptr + blocks[:, None], mask=inside, other=0.0)
        v = _decoded(codes, scale, ROOT_MANTISSA)
        v = v * v

    m = beta1 * m + rest1 * g
    v = beta2 * v + rest2 * (g * g)
    root = tl.sqrt_rn(v)
    p = decay * p - step_size * tl.div_rn(m, root * root_factor + eps)

    tl.store(master_ptr + offsets, p, mask=mask)
    if weight_ptr is not None:
        tl.store(weight_ptr + offsets, p.to(weight_ptr.dtype.element_ty), mask=mask)
    if exp_avg_ptr.dtype.element_ty == tl.float32:
        tl.store(exp_avg_ptr + offsets, m, mask=mask)
        tl.store(exp_avg_sq_ptr + offsets, v, mask=mask)
    else:
        words = _random_words(key, blocks, BLOCK)
        upper = (words >> 16).to(tl.int32)
        lower = (words & 65535).to(tl.int32)
        if exp_avg_scale_ptr is None:
            tl.store(exp_avg_ptr + offsets, _rounded(m, upper), mask=mask)
            tl.store(exp_avg_sq_ptr + offsets, _rounded(v, lower), mask=mask)
        else:
            codes, scale = _encoded(tl.abs(m), upper, MANTISSA)
            codes = codes | ((m.to(tl.int32, bitcast=True) >> 24) & 128)
            tl.store(exp_avg_ptr + offsets, codes.to(tl.uint8), mask=mask)
            tl.store(exp_avg_scale_ptr + blocks[:, None], scale, mask=inside)
            codes, scale = _encoded(root, lower, ROOT_MANTISSA)
            codes = tl.maximum(codes, (root > 0).to(tl.int32))
            tl.store(exp_avg_sq_ptr + offsets, codes.to(tl.uint8), mask=mask)
            tl.store(exp_avg_sq_scale_ptr + blocks[:, None], scale, mask=inside)


def _launch(*arguments) -> None:
    """arguments: in the order of the registered operation."""
    *tensors, apply, coefficients, key = arguments
    master, exp_avg, exp_avg_scale, exp_avg_sq, exp_avg_sq_scale, _, weight, _ = tensors
    size = master.numel()
    whole = size // BLOCK  # blocks; the rest is another launch, as its accesses are one element wide
    rows = ROWS if exp_avg_scale is None else ROWS_FLOAT8
    apply = None if apply is None else apply.view(torch.uint8)
    for blocks, first, end in ((whole, 0, whole * BLOCK), (int(size % BLOCK > 0), whole, size)):
        if blocks:
            _adamw_kernel(
                -(-blocks // rows),
                *(*tensors, apply, *coefficients, key, first, end),
                *(end % BLOCK == 0, rows, BLOCK, MANTISSA, ROOT_MANTISSA),
            )
    # For autograd: a backward pass may still need a written tensor, such as a weight.
    written = (master, exp_avg, exp_avg_scale, exp_avg_sq, exp_avg_sq_scale, weight)
    torch.autograd.graph.increment_version([tensor for tensor in written if tensor is not None])


_adamw_step = register(
    "adamw_step_triton(Tensor(a!) master, Tensor(b!) exp_avg, Tensor(c!)? exp_avg_scale, Tensor(d!) exp_avg_sq, "
    "Tensor(e!)? exp_avg_sq_scale, Tensor gradient, Tensor(f!)? weight, Tensor? scale, Tensor? apply, "
    "float[] coefficients, int key) -> ()",
    _launch,
    lambda *arguments: None,
)


def adamw_step_triton(master, moments, gradient, weight, scale, apply, c, key) -> None:
    _adamw_step(master, *moments, gradient, weight, scale, apply, list(c), 0 if key is None else key.key)


IMPLEMENTATIONS = {"reference": adamw_step_reference, "triton": adamw_step_triton}


def adamw_step(
    master: Tensor,
    exp_avg: Tensor | Float8State,
    exp_avg_sq: Tensor | Float8State,
    gradient: Tensor,
    *,
    weight: Tensor | None = None,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
    scale: Tensor | None = None,
    apply: Tensor | None = None,
    key: Philox | None = None,
) -> None:
    """One step of AdamW, in place: writes master, both moments and weight. Not differentiable.

    master (n,): float32.
    exp_avg, exp_avg_sq (n,): both float32; both bfloat16, stochastically rounded; or both a `Float8State`. Zeros before
        the first step.
    gradient (n,): float32, bfloat16 or float16.
    weight (n,): float32, bfloat16 or float16; receives the new master, rounded to the nearest.
    step: 1 for the first, for the bias correction.
    scale: float32 (), a factor for the gradient: 1 / accumulated batches, clipping.
    apply: bool (); if False, nothing is written. Neither scale nor apply makes the host wait.
    key: the stream of the random bits, another one for each tensor and step; required unless the moments are float32.

    All are contiguous, on one device, of any size. Arithmetic is float32, and all implementations write the same bits, as
    long as the gradient is finite. A gradient that is not, with `apply` None or True, makes its element's master and
    moments NaN or infinite; in 8 bits, its block's moments NaN. CUDA graphs and torch.compile bake in numbers and key.

    Raises TypeError for a dtype or type, ValueError for a shape, strides, a device, a number out of range or a missing key.
    """
    moments = _check(master, exp_avg, exp_avg_sq, gradient, weight, scale, apply)
    check_hyperparameters(lr, betas, eps, weight_decay)
    if isinstance(step, bool) or not isinstance(step, int):
        raise TypeError(f"step is a {type(step).__name__}; it needs to be an int")
    if step < 1:
        raise ValueError(f"step is {step}; it needs to be 1 for the first, 2 for the next")
    if key is not None and not isinstance(key, Philox):
        raise TypeError(f"key is a {type(key).__name__}; it needs to be a Philox")
    if moments.exp_avg.dtype == torch.float32:
        key = None
    elif key is None:
        raise ValueError("key is None; moments of fewer than 4 bytes need a Philox, as they are stochastically rounded")
    if master.numel() == 0:
        return
    coefficients = Coefficients.of(lr, betas, eps, weight_decay, step)
    with torch.no_grad():
        run = choose("adamw_step", IMPLEMENTATIONS, master.device, torch.float32)
        run(master, moments, gradient, weight, scale, apply, coefficients, key)


_ROUNDED = (torch.float32, torch.bfloat16, torch.float16)


def _check(master, exp_avg, exp_avg_sq, gradient, weight, scale, apply) -> Moments:
    _check_dtype("master", master, (torch.float32,))
    if master.ndim != 1:
        raise ValueError(f"master has shape {tuple(master.shape)}; it needs one dimension: (n,)")
    if isinstance(exp_avg, Float8State) != isinstance(exp_avg_sq, Float8State):
        raise TypeError(
            f"exp_avg is a {type(exp_avg).__name__} and exp_avg_sq a {type(exp_avg_sq).__name__}; both need to be the same"
        )
    size = master.shape
    wanted = [("master", master, (torch.float32,), size), ("gradient", gradient, _ROUNDED, size)]
    if isinstance(exp_avg, Float8State):
        moments = Moments(exp_avg.values, exp_avg.scales, exp_avg_sq.values, exp_avg_sq.scales)
        blocks = (-(-size[0] // BLOCK),)
        for name, state in (("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
            wanted.append((f"{name}.values", state.values, (torch.uint8,), size))
            wanted.append((f"{name}.scales", state.scales, (torch.float32,), blocks))
    else:
        moments = Moments(exp_avg, None, exp_avg_sq, None)
        for name, values in (("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
            wanted.append((name, values, (torch.float32, torch.bfloat16), size))
    options = (
        ("weight", weight, _ROUNDED, size),
        ("scale", scale, (torch.float32,), ()),
        ("apply", apply, (torch.bool,), ()),
    )
    wanted += [option for option in options if option[1] is not None]
    for name, value, dtypes, shape in wanted:
        _check_dtype(name, value, dtypes)
        if value.shape != shape:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}; with master {tuple(size)} it needs {tuple(shape)}"
            )
        if not value.is_contiguous():
            raise ValueError(f"{name} has strides {value.stride()}; it needs to be contiguous")
        if value.device != master.device:
            raise ValueError(f"{name} is on {value.device}; it needs to be on master's device {master.device}")
    if moments.exp_avg.dtype != moments.exp_avg_sq.dtype:
        raise TypeError(f"exp_avg_sq has dtype {moments.exp_avg_sq.dtype}; it needs exp_avg's, {moments.exp_avg.dtype}")
    return moments


def _check_dtype(name: str, value: object, dtypes: tuple[torch.dtype, ...]) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; it needs to be a torch.Tensor")
    if value.dtype not in dtypes:
        raise TypeError(f"{name} has dtype {value.dtype}; it needs {' or '.join(map(str, dtypes))}")


def check_hyperparameters(lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"betas is {betas!r}; it needs to be a pair (beta1, beta2)")
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        checks.number(name, value)
        if not 0 <= value < float("inf"):
            raise ValueError(f"{name} is {value}; it needs to be finite, and 0 or above")
    for index, beta in enumerate(betas):
        checks.number(f"betas[{index}]", beta)
        if not 0 <= beta < 1:
            raise ValueError(f"betas[{index}] is {beta}; it needs to be in [0, 1)")
