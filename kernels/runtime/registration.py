"""Registers operations with torch.library, and calls them without the dispatcher where nothing observes the call."""

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

# Whether a transform of torch.func (grad, vmap, ...) is active: the tensors that it wraps have no memory of their own.
transformed = torch._C._are_functorch_transforms_active

_dispatch_modes = torch._C._len_torch_dispatch_stack  # FakeTensorMode is one of them
_function_mode = torch._C._is_torch_function_mode_enabled
# Arguments of these types need no dispatcher. Subclasses of Tensor, such as FakeTensor and DTensor, need it.
_PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None), bool, int, float, str, torch.dtype, list, tuple))


def plain(values: Iterable[object]) -> bool:
    """Whether no argument is of a subclass of Tensor. (isinstance takes three times as long.)"""
    return _PLAIN.issuperset(map(type, values))


def observed(arguments: Iterable[object]) -> bool:
    """Whether the dispatcher must see a call with these arguments: for a profiler, a mode (FakeTensorMode, a
    TorchDispatchMode, a TorchFunctionMode), a transform of torch.func, or an argument of a subclass of Tensor."""
    if _profiler_enabled() or _dispatch_modes() > 0 or transformed() or not plain(arguments):
        return True
    if not _function_mode():
        return False
    # torch.set_default_device's mode only affects functions that make tensors.
    return torch._C._len_torch_function_stack() > 1 or type(torch._C._get_function_stack_at(0)) is not DeviceContext


def register(schema: str, function: Callable, fake: Callable) -> Callable:
    """Register `function` as dpdmd::<schema>. Returns the function to call: it calls the registered operation under
    torch.compile and where a call is `observed`, else `function`. (The dispatcher costs 5 us a call on an H100's host.)"""
    name = LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, function, "CUDA")
    LIBRARY.impl(name, function, "CPU")
    register_traced(name, fake)
    operation = getattr(torch.ops.dpdmd, name).default
    lists = [i for i, each in enumerate(operation._schema.arguments) if isinstance(each.type, torch.ListType)]

    @functools.wraps(function)
    def call(*arguments):
        if shapes_only or torch.compiler.is_compiling() or observed(arguments):
            return operation(*arguments)
        if lists and not plain(itertools.chain.from_iterable(arguments[i] for i in lists)):
            return operation(*arguments)
        return function(*arguments)

    return call


def register_traced(name: str, fake: Callable) -> None:
    """Register a fake and no autograd kernel: what torch.compile needs for an operation with its gradient in Python."""
    LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"dpdmd::{name}", fake, lib=LIBRARY)
