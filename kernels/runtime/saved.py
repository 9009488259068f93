"""What an autograd function keeps for its backward pass: parameters apart from other tensors.

Under a checkpoint (and other hooks on saved tensors) each saved tensor costs Python calls when it is saved, when it is
saved again and when it is asked for, some 20 us, and half of what the fused operations of a block save are parameters.
Those are there anyway and belong to no graph, so the function's context may hold them itself.
"""

from typing import Any

import torch
from torch import Tensor

# torch's class. To a checker it is anything, as a backward pass has a parameter for each output, which torch's has not.
Function: Any = torch.autograd.Function


def save(ctx, *tensors: Tensor | None) -> None:
    """ctx.save_for_backward, in place of which `saved` gives them back."""
    if torch.compiler.is_compiling():
        ctx.save_for_backward(*tensors)
        return
    ctx.parameters = {i: (t, t._version) for i, t in enumerate(tensors) if type(t) is torch.nn.Parameter}
    ctx.save_for_backward(*[None if i in ctx.parameters else t for i, t in enumerate(tensors)])


def saved(ctx) -> tuple[Any, ...]:
    """RuntimeError where a tensor was written to since."""
    tensors = list(ctx.saved_tensors)
    for i, (parameter, version) in getattr(ctx, "parameters", {}).items():
        if parameter._version != version:
            raise RuntimeError(
                f"a parameter of shape {tuple(parameter.shape)} that the backward pass needs was modified by an inplace "
                f"operation: it is at version {parameter._version}, and was at {version} in the forward pass"
            )
        tensors[i] = parameter
    return tuple(tensors)
