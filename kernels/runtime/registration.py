"""Operations made known to torch: registered with torch.library under the name dpdmd, and called without the dispatcher
where nobody looks."""

import functools
import itertools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch._C._autograd import _profiler_enabled
from torch.utils._device import DeviceContext

LIBRARY = torch.library.Library("dpdmd", "FRAGMENT")

# Set by backend.shapes_only: the registered operations are called, which on meta tensors run their fakes.
shapes_only = False

# Whether torch.func's grad, vmap or another of its transforms is at work: what it wraps has no memory of its own.
transformed = torch._C._are_functorch_transforms_active

_dispatch_modes = torch._C._len_torch_dispatch_stack  # FakeTensorMode is one of them
_function_mode = torch._C._is_torch_function_mode_enabled
# The types of arguments that need no dispatcher. Subclasses of Tensor do, such as FakeTensor and DTensor.
_PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None), bool, int, float, str, torch.dtype, list, tuple))


def plain(values: Iterable[object]) -> bool:
    """Whether none of these arguments is of a subclass of Tensor. (isinstance would take three times as long.)"""
    return _PLAIN.issuperset(map(type, values))


def observed(arguments: Iterable[object]) -> bool:
    """Whether the dispatcher must see a call with these arguments: for a profiler, a mode (FakeTensorMode, a
    TorchDispatchMode, a TorchFunctionMode), a transform of torch.func, or a subclass of Tensor among them."""
    if _profiler_enabled() or _dispatch_modes() > 0 or transformed() or not plain(arguments):
        return True
    return _function_mode() and not _default_device_alone()


def _default_device_alone() -> bool:
    """Whether torch.set_default_device is the only function mode: it looks at functions that make tensors alone."""
    return torch._C._len_torch_function_stack() == 1 and type(torch._C._get_function_stack_at(0)) is DeviceContext


def register(schema: str, function: Callable, fake: Callable) -> Callable:
    """Registers `function` as dpdmd::<schema> and returns what to call: the registered operation under torch.compile and
    where a call is `observed`, else the function itself. (The dispatcher and back costs 5 us a call on H100.)"""
    name = LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, function, "CUDA")
    LIBRARY.impl(name, function, "CPU")
    register_traced(name, fake)
    operation = getattr(torch.ops.dpdmd, name).default
    parameters = enumerate(operation._schema.arguments)
    lists = [i for i, parameter in parameters if isinstance(parameter.type, torch.ListType)]

    @functools.wraps(function)
    def call(*arguments):
        if shapes_only or torch.compiler.is_compiling() or observed(arguments):
            return operation(*arguments)
        if lists and not plain(itertools.chain.from_iterable(arguments[i] for i in lists)):
            return operation(*arguments)
        return function(*arguments)

    return call


def register_traced(name: str, fake: Callable) -> None:
    """What torch.compile needs of an operation whose gradient is defined in Python: its fake, and no autograd kernel."""
    LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"dpdmd::{name}", fake, lib=LIBRARY)
