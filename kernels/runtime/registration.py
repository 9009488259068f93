"""Operations made known to torch: registered with torch.library under the name dpdmd."""

import functools
from collections.abc import Callable

import torch

LIBRARY = torch.library.Library("dpdmd", "FRAGMENT")

# Set by backend.shapes_only: the registered operations are called, which on meta tensors run their fakes.
shapes_only = False


def register(schema: str, function: Callable, fake: Callable) -> Callable:
    """Registers `function` as dpdmd::<schema> and returns what to call: the function itself, or the registered
    operation under torch.compile, which cannot look into it. (The dispatcher and back costs 5 us a call on H100.)"""
    name = LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, function, "CUDA")
    LIBRARY.impl(name, function, "CPU")
    register_traced(name, fake)
    operation = getattr(torch.ops.dpdmd, name).default

    @functools.wraps(function)
    def call(*arguments):
        return (operation if shapes_only or torch.compiler.is_compiling() else function)(*arguments)

    return call


def register_traced(name: str, fake: Callable) -> None:
    """What torch.compile needs of an operation whose gradient is defined in Python: its fake, and no autograd kernel."""
    LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"dpdmd::{name}", fake, lib=LIBRARY)
