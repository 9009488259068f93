"""What the references share."""

import torch
from torch import Tensor


def widen(arithmetic: torch.dtype, *tensors: Tensor | None) -> list:
    """The tensors in `arithmetic`. None stays None."""
    return [None if tensor is None else tensor.to(arithmetic) for tensor in tensors]


def column(coefficient: float | Tensor, like: Tensor) -> float | Tensor:
    """A coefficient (B,) as a constant (B, 1, ..., 1) that multiplies `like` (B, ...). A float stays a float."""
    if not isinstance(coefficient, Tensor):
        return coefficient
    return coefficient.detach().view(-1, *[1] * (like.ndim - 1))


def guided(cond: Tensor, uncond: Tensor | None, guidance_scale: float) -> Tensor:
    """Classifier-free guidance: uncond + s (cond - uncond). At s = 1, or without uncond, that is cond."""
    return cond if uncond is None or guidance_scale == 1 else uncond + guidance_scale * (cond - uncond)


def sample_sum(y: Tensor) -> Tensor:
    """(B, ...) to (B,): the sum over all dimensions but the batch."""
    return y.sum(dim=tuple(range(1, y.ndim))) if y.ndim > 1 else y


def sample_size(y: Tensor) -> int:
    """Number of elements in one sample; 1 for an empty sample, so that its mean is 0 and not 0 / 0."""
    return max(y.shape[1:].numel(), 1)


def sample_mean(y: Tensor) -> Tensor:
    return sample_sum(y) / sample_size(y)
