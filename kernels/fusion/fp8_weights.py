"""A block's large weights in FP8 for its passes without gradient: which passes use them, and when they are made again."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dpdmd.kernels.blocks.fp8 import Quantized, fp8_linear, quantize_rows
from dpdmd.kernels.runtime.kept import keeping
from dpdmd.kernels.runtime.registration import plain


class Fp8Weights:
    """FP8 copies of a block's layers `names`, made when first needed. A copied or pickled object starts without any.

    The copies are made again where a weight's address or version counter changes. Some optimizers move no counter (apex's,
    DeepSpeed's), and ZeRO-3 gathers weights into new memory each time. So after a pass with gradients of trained weights
    copies serve one pass only, until a counter moves or `outdate` is called, which shows that the update is done.
    """

    def __init__(self, names: tuple[str, ...]):
        self._names = names
        self._trained = False
        self._passes = 0  # with gradients of trained weights
        self._told = 0  # self._passes at the last call of `outdate`
        # (layers, columns) -> the weights' versions, self._passes at the last known update, the copies
        self._copies: dict[tuple, tuple[list | None, int, Quantized]] = {}

    def __reduce__(self):
        return Fp8Weights, (self._names,)

    def outdate(self) -> None:
        """Have the copies made again when they are next needed: the weights have changed."""
        self._told = self._passes
        self._copies = {key: (None, passes, copies) for key, (_, passes, copies) in self._copies.items()}

    def note_gradients(self, block: nn.Module) -> None:
        """Count a pass with gradients. The weights count as trained from the first pass on in which one of them requires a
        gradient. Adapters on frozen weights do not change the weights."""
        if not self._trained:
            layers = [block.get_submodule(name) for name in self._names]
            layers = [layer._modules.get("base_layer", layer) for layer in layers]  # peft's LoRA layers have one
            self._trained = any(type(layer) is nn.Linear and layer.weight.requires_grad for layer in layers)
        self._passes += self._trained

    def of(self, *layers: nn.Linear, columns: tuple[int, int] | None = None) -> Quantized:
        """The FP8 copies of the layers' weights, stacked, or of some columns of them."""
        weights = [layer.weight for layer in layers]
        versions = [_version(weight) for weight in weights]
        known, passes, copies = self._copies.get((layers, columns), (versions, self._told, None))
        if copies is not None and known == versions and passes == self._passes:
            return copies
        stacked = torch.cat(weights).detach() if len(weights) > 1 else weights[0].detach()
        made = quantize_rows(stacked if columns is None else stacked[:, slice(*columns)])
        if not plain(made):  # made in a FakeTensorMode
            return made
        if copies and all(a.shape == b.shape and a.device == b.device for a, b in zip(made, copies, strict=True)):
            # In the same memory, for CUDA graphs.
            torch._foreach_copy_(list(copies), list(made))  # pyright: ignore[reportPrivateImportUsage]
        else:
            copies = made
        self._copies[layers, columns] = versions, passes if known == versions else self._passes, copies
        return copies


def _version(weight: Tensor) -> tuple:
    """What changes with the weight; () where nothing reliable does: under ZeRO-3 and for inference tensors."""
    unknown = hasattr(weight, "ds_id") or weight.is_inference()
    return () if unknown else (weight.data_ptr(), weight._version)


class Fp8Pass(NamedTuple):
    """A block's pass in FP8."""

    weights: Fp8Weights
    dtype: torch.dtype  # of what is not quantised

    def product(self, x: Quantized, *layers: nn.Linear, columns: tuple[int, int] | None = None) -> Tensor:
        return fp8_linear(x, self.weights.of(*layers, columns=columns), dtype=self.dtype)


def fp8_pass(block: Any, *inputs: Tensor) -> Fp8Pass | None:
    """None where the block has no FP8, where torch.compile traces it, and in a pass with gradients. A checkpoint's first
    pass counts as one: it runs in no_grad mode, but its inputs require gradients or `selective_checkpoint` is active."""
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
