"""Saves tensors for an autograd function's backward pass: parameters in its context, others with save_for_backward.

Under a checkpoint (and other hooks on saved tensors) each saved tensor costs some 20 us of Python calls, and half of what
a block's fused operations save are parameters. These outlive the graph and are leaves, so the context may hold them.
"""

from typing import Any

import torch
from torch import Tensor

# Any to a checker, as a backward pass has a parameter for each output, unlike that of torch's class.
Function: Any = torch.autograd.Function


def save(ctx, *tensors: Tensor | None) -> None:
    """As ctx.save_for_backward(*tensors), to be read with `saved`."""
    if torch.compiler.is_compiling():
        ctx.save_for_backward(*tensors)
        return
    ctx.parameters = {i: (t, t._version) for i, t in enumerate(tensors) if type(t) is torch.nn.Parameter}
    ctx.save_for_backward(*[None if i in ctx.parameters else t for i, t in enumerate(tensors)])


def saved(ctx) -> tuple[Any, ...]:
    """The tensors that `save` was given. Raises RuntimeError where one was written to since."""
    tensors = list(ctx.saved_tensors)
    for i, (parameter, version) in getattr(ctx, "parameters", {}).items():
        if parameter._version != version:
            raise RuntimeError(
                f"a parameter of shape {tuple(parameter.shape)} that the backward pass needs was modified by an inplace "
                f"operation: it is at version {parameter._version}, and was at {version} in the forward pass"
            )
        tensors[i] = parameter
    return tuple(tensors)
