"""A block's large weights in FP8, for its passes without gradient: which passes those are, and when the weights have
changed."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dpdmd.kernels.blocks.fp8 import Quantized, fp8_linear, quantize_rows
from dpdmd.kernels.runtime.kept import keeping
from dpdmd.kernels.runtime.registration import plain


class Fp8Weights:
    """Copies of weights in FP8, made when a pass without gradient first wants them. Copies of the object, also pickled
    ones, start without any.

    They are made anew where a weight's memory or its version counter tells of a change. Some optimizers write past the
    counters (apex's, DeepSpeed's), and ZeRO-3 gathers weights into new memory each time. So after a pass with gradients of
    trained weights copies serve one pass only, until a counter moves or `outdate` is called: then the update is done.

    names: the layers, in the block.
    """

    def __init__(self, names: tuple[str, ...]):
        self._names = names
        self._trained = False
        self._passes = 0  # with gradients of trained weights
        self._told = 0  # how many of them there were when `outdate` was last called
        # (layers, columns) -> the weights' versions, the passes that the last known update came after, the copies
        self._copies: dict[tuple, tuple[list | None, int, Quantized]] = {}

    def __reduce__(self):
        return Fp8Weights, (self._names,)

    def outdate(self) -> None:
        """They are made anew when they are next wanted: the weights have changed."""
        self._told = self._passes
        self._copies = {key: (None, passes, copies) for key, (_, passes, copies) in self._copies.items()}

    def note_gradients(self, block: nn.Module) -> None:
        """In a pass with gradients. The weights count as trained from then on where one of them requires gradients,
        though it may do so only now and then. Adapters on frozen weights do not change these."""
        if not self._trained:
            layers = [block.get_submodule(name) for name in self._names]
            layers = [layer._modules.get("base_layer", layer) for layer in layers]  # peft's LoRA layers have one
            self._trained = any(type(layer) is nn.Linear and layer.weight.requires_grad for layer in layers)
        self._passes += self._trained

    def of(self, *layers: nn.Linear, columns: tuple[int, int] | None = None) -> Quantized:
        """The layers' weights, stacked, or some columns of them."""
        weights = [layer.weight for layer in layers]
        versions = [_version(weight) for weight in weights]
        known, passes, copies = self._copies.get((layers, columns), (versions, self._told, None))
        if copies is not None and known == versions and passes == self._passes:
            return copies
        stacked = torch.cat(weights).detach() if len(weights) > 1 else weights[0].detach()
        made = quantize_rows(stacked if columns is None else stacked[:, slice(*columns)])
        if not plain(made):  # of a FakeTensorMode
            return made
        if copies is not None and all(map(_alike, made, copies)):  # a CUDA graph finds them where they were
            torch._foreach_copy_(list(copies), list(made))  # pyright: ignore[reportPrivateImportUsage]
        else:
            copies = made
        self._copies[layers, columns] = versions, passes if known == versions else self._passes, copies
        return copies


def _version(weight: Tensor) -> tuple:
    """What tells of a change."""
    unknown = hasattr(weight, "ds_id") or weight.is_inference()
    return () if unknown else (weight.data_ptr(), weight._version)


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.device == b.device


class Fp8Pass(NamedTuple):
    """A block's pass in FP8."""

    weights: Fp8Weights
    dtype: torch.dtype  # of what is not quantised

    def product(self, x: Quantized, *layers: nn.Linear, columns: tuple[int, int] | None = None) -> Tensor:
        return fp8_linear(x, self.weights.of(*layers, columns=columns), dtype=self.dtype)


def fp8_pass(block: Any, *inputs: Tensor) -> Fp8Pass | None:
    """None where the block has no FP8, where torch.compile traces it, and in a pass that has gradients: also in the
    first one of a checkpoint, in no_grad mode but on inputs that require them, or in `selective_checkpoint`."""
    weights = block._fp8_weights
    if weights is None or torch.compiler.is_compiling():
        return None
    if (
        keeping()
        or any(x.requires_grad for x in inputs)
        or (torch.is_grad_enabled() and any(parameter.requires_grad for parameter in block.parameters()))
    ):
        weights.note_gradients(block)
        return None
    device = inputs[0].device.type
    autocast = torch.is_autocast_enabled(device)
    return Fp8Pass(weights, torch.get_autocast_dtype(device) if autocast else inputs[0].dtype)
