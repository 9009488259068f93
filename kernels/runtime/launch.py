"""Whether Triton kernels can run, and how they are launched at little cost."""

import functools
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:  # kernels are not Python: a checker takes what they name for Any
    triton: types.ModuleType
    knobs: Any
    TensorDescriptor: Any
    INTERPRETED: bool
    F = TypeVar("F", bound=Callable)

    class tl(Any):
        int64 = constexpr = Any

    def jit(function: F) -> F: ...

else:
    try:
        import triton
        import triton.language as tl
        from triton import jit, knobs
        from triton.tools.tensor_descriptor import TensorDescriptor

        INTERPRETED = bool(knobs.runtime.interpret)  # from TRITON_INTERPRET, when the kernels are made
    except ImportError:  # the modules with kernels must still import
        triton = TensorDescriptor = None
        tl = types.SimpleNamespace(constexpr=None, int64=None)
        INTERPRETED = False

        def jit(function):
            return function


def capability(index: int | None) -> tuple[int, int]:
    """The compute capability of CUDA device `index`. Hopper's on a machine without a GPU, where CUDA tensors are fake."""
    return torch.cuda.get_device_capability(index) if torch.cuda.is_available() else (9, 0)


@functools.cache
def missing(device_type: str, index: int | None) -> str:
    """Why Triton kernels do not run on a device, and how to get them; "" where they do."""
    if triton is None:
        return "Triton is not installed (pip install triton, in the version that this torch needs)"
    if INTERPRETED and device_type in ("cpu", "cuda"):
        return ""
    if device_type == "cpu":
        return "on CPU tensors Triton kernels run in its interpreter only (TRITON_INTERPRET=1 before the import)"
    if device_type != "cuda":
        return f"the Triton kernels need a CUDA device, and the tensors are on {device_type}"
    if torch.version.cuda and capability(index) < (8, 0):
        return "the Triton kernels need a GPU of compute capability 8.0 or newer"
    return ""


class Kernel:
    """A Triton kernel on a one-dimensional grid, made from a function by `@kernel`.

    Its parameters, all passed by position, are tensors (or None), tensor descriptors, floats, integers annotated tl.int64,
    and last the tl.constexpr ones. Triton specialises on dtypes, on which pointers are multiples of 16 bytes, and on the
    constants, but not on values of integers and floats: another value compiles nothing.

    Triton's own launch binds and inspects the arguments each time: 19 us on an H100's host. A look-up of the compiled
    kernel by what it is specialised on, and the call that Triton's launch ends in, take 8 us.
    """

    def __init__(self, function: Callable, num_warps: int, num_stages: int | None = None, multiply_add: bool = True):
        kinds = function.__annotations__
        integers = [name for name, kind in kinds.items() if kind is tl.int64]
        self._jit = triton.jit(function, do_not_specialize=integers)
        self._options = {"num_warps": num_warps} | ({"num_stages": num_stages} if num_stages else {})
        if not multiply_add:
            self._options["enable_fp_fusion"] = False
        names = function.__code__.co_varnames[: function.__code__.co_argcount]
        self._num_varying = len(names) - sum(kind is tl.constexpr for kind in kinds.values())
        self._specialised = [i for i, name in enumerate(names) if name not in kinds]
        self._compiled = {}

    def __call__(self, programs: int, *arguments) -> None:
        if INTERPRETED:
            self._jit[(programs,)](*arguments)
            return
        device, launched = None, list(arguments)
        key: list[Any] = [arguments[self._num_varying :]]
        for i in self._specialised:
            argument = arguments[i]
            if isinstance(argument, Tensor):
                launched[i] = address = argument.data_ptr()  # the launch would ask for a tensor's again, and check it
                key += argument.dtype, address % 16
                device = argument.get_device() if device is None else device
            elif type(argument) is TensorDescriptor:
                key += argument.base.dtype, *argument.block_shape
                device = argument.base.get_device() if device is None else device
            else:
                key.append(type(argument))
        current = torch.cuda.current_device()
        if device != current:
            with torch.cuda.device(device):
                self(programs, *arguments)
            return
        specialised = current, *key
        launch = self._compiled.get(specialised)
        if launch is None or _hooked():
            self._compiled[specialised] = _launch_of(self._jit[(programs,)](*arguments, **self._options))
            return
        stream = torch._C._cuda_getCurrentRawStream(current)
        run, function, metadata = launch
        run(programs, 1, 1, stream, function, metadata, None, None, None, *launched)


def descriptor(tensor: Tensor, block_shape: list[int]):
    """A tensor descriptor of a tensor with dense, 16-byte aligned rows, without Triton's check: 8 us on an H100's host."""
    made = TensorDescriptor.__new__(TensorDescriptor)
    made.base, made.shape, made.strides = tensor, list(tensor.shape), list(tensor.stride())
    made.block_shape, made.padding = block_shape, "zero"
    return made


def _launch_of(compiled) -> tuple | None:
    """The parts of the call that Triton's launch ends in; None where this version of Triton has others."""
    try:
        return compiled.run, compiled.function, compiled.packed_metadata
    except AttributeError:
        return None


def _hooked() -> bool:
    """Whether a profiler listens to launches. Only Triton's own launch calls its hooks."""
    for hook in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook):
        if hook is not None and getattr(hook, "calls", True):
            return True
    return False


def kernel(num_warps: int, multiply_add: bool = True) -> Callable[[Callable], Kernel]:
    """Make a Triton function a `Kernel`; without Triton, leave it as it is. multiply_add=False rounds a product and a sum
    each, as PyTorch does, instead of once together."""
    if triton is None:
        return lambda function: function
    return lambda function: Kernel(function, num_warps, multiply_add=multiply_add)


def by_warps(function: Callable, *counts: int) -> dict[int, Kernel]:
    """One kernel for each number of warps."""
    return {num_warps: kernel(num_warps)(function) for num_warps in counts}
