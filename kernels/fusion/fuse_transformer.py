"""Puts the fused operations into a diffusers transformer whose class is among FAMILIES, in place.

Each block gets a fused forward as an attribute of the instance. Classes, submodules, parameters and state_dict stay, so
what finds blocks by class or weights by name still works: DeepSpeed, peft, save_pretrained, torch.compile of each block.
A block that is not as diffusers makes it keeps the stock forward, and is reported with the reason.
"""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import nn

from dpdmd.kernels.blocks.fp8 import converts
from dpdmd.kernels.runtime import checks

if TYPE_CHECKING:
    from dpdmd.kernels.fusion.conditions import Fused  # with diffusers

# A transformer's class in diffusers -> the file of this folder whose MODULES lists the parts that have a fused forward:
# lists of blocks in the order in which they run, and single modules.
FAMILIES = {"SD3Transformer2DModel": "sd3", "FluxTransformer2DModel": "flux"}
MARK = "_fp8_weights"  # the attribute that marks a fused module: its Fp8Weights, or None where it runs without FP8


@dataclass
class FusionReport:
    """What `fuse_transformer` did; str() gives a text."""

    model: str  # the model's class
    replaced: dict[str, int] = field(default_factory=dict)  # class: number of fused modules
    num_fp8: int = 0  # number of them whose large products run in FP8 where there is no gradient
    left: list[tuple[str, str]] = field(default_factory=list)  # (name, reason) of the modules that are not fused

    def __str__(self) -> str:
        fused = ", ".join(f"{count} {name}" for name, count in self.replaced.items()) or "nothing"
        fp8 = f"; {self.num_fp8} of them with FP8 where there is no gradient" if self.num_fp8 else ""
        left = [f"  {name} left as it was: {reason}" for name, reason in self.left]
        return "\n".join([f"{self.model}: fused {fused}{fp8}", *left])


def fuse_transformer(model: nn.Module, *, fp8: str | None = None, verbose: bool = True) -> FusionReport:
    """Give the blocks of a diffusers transformer, and its last norm, fused forwards, in place. verbose prints the report.

    model: of a class among FAMILIES (SD3Transformer2DModel, ...), before it is wrapped (DeepSpeed, DDP, torch.compile).
    fp8: "no_grad" runs the large matrix products of the image tokens in FP8 in passes without gradient: neither inputs
        nor parameters require one, or torch.no_grad() holds. First and last block, modulation, text, and blocks that
        torch.compile traces run without FP8. The weights' FP8 copies take half of their bfloat16 size, in every process
        also under ZeRO-3. They are made again where torch's version counters show a change. Some optimizers move no
        counters (apex's, DeepSpeed's, ZeRO's): then the copies are made in each such pass after one with gradients, or
        once if `requantize` is called after the step. Call `requantize` also after other changes that counters do not
        show: writes to weight.data, as by fuse_lora; weights loaded under ZeRO-3; an optimizer in a CUDA graph; a step
        of such an optimizer where torch.compile traced the pass with gradients.

    A block keeps its stock forward, and is reported, where it is not as diffusers makes it: other norms, activations or
    attention processors, dropout in training, chunked feed-forwards, hooks inside it. Blocks check this at every call; the
    stock forward also runs for calls with attention arguments (IP-Adapter, masks) and inside torch.func. The fused forward
    calls linear layers of other classes (quantised ones) or with hooks. peft's LoRA layers, added before or after, are
    fused: an adapter's product is added to the base product in place. LoRA layers with dropout, DoRA, several active
    adapters, an adapter in another dtype than the base, or under torch.compile are called. Gradients are first-order and
    reverse-mode.

    Under ZeRO-3 make the blocks leaves (deepspeed.utils.set_z3_leaf_modules): they are gathered as a whole either way.
    A model may be fused again, with another `fp8`. A deepcopy and a pickled copy of a fused model are fused.

    Raises TypeError for another model, ValueError for another fp8 and for FP8 layers of sizes that are no multiples of 16,
    RuntimeError for a GPU without FP8.
    """
    modules = _modules(model)
    checks.one_of("fp8", fp8, (None, "no_grad"))
    blocks = [name for name, _, kind in modules if kind.fp8_layers]
    report = FusionReport(type(model).__name__)
    fused = []
    for name, module, kind in modules:
        own = "forward" in module.__dict__ and MARK not in module.__dict__
        if reason := "it has a forward of its own already" if own else kind.why_not(module):
            report.left.append((name, reason))
            continue
        # Rounding hurts most in the first block and in the last.
        in_fp8 = fp8 == "no_grad" and name in blocks[1:-1]
        fused.append((module, kind, _fp8_layers(name, module, kind.fp8_layers) if in_fp8 else None))
    from dpdmd.kernels.fusion.fp8_weights import Fp8Weights

    for module, kind, fp8_layers in fused:
        if MARK not in module.__dict__:
            module.forward = functools.partial(kind.forward, module)
        setattr(module, MARK, None if fp8_layers is None else Fp8Weights(fp8_layers))
        class_name = type(module).__name__
        report.replaced[class_name] = report.replaced.get(class_name, 0) + 1
        report.num_fp8 += fp8_layers is not None
    if verbose:
        print(report)
    return report


def unfuse_transformer(model: nn.Module) -> None:
    """Undo `fuse_transformer`, in place. Does nothing where nothing is fused.

    Raises TypeError for another model, RuntimeError where something has wrapped or removed a fused forward.
    """
    fused = [(name, module, kind) for name, module, kind in _modules(model) if MARK in module.__dict__]
    for name, module, kind in fused:
        if getattr(module.__dict__.get("forward"), "func", None) is not kind.forward:
            raise RuntimeError(f"{name} has had its fused forward wrapped or removed; undo that first")
    for _, module, _ in fused:
        del module.forward
        delattr(module, MARK)


def requantize(model: nn.Module) -> None:
    """Have a model fused with fp8="no_grad" make the FP8 copies of its weights again when it next needs them. For the
    changes of weights that `fuse_transformer` lists, such as a step of an optimizer that moves no version counters:
    optimizer.register_step_post_hook(lambda *_: requantize(model)). Raises TypeError for another model.
    """
    for _, module, _ in _modules(model):
        if weights := module.__dict__.get(MARK):
            weights.outdate()


def _modules(model: nn.Module) -> list[tuple[str, nn.Module, Fused]]:
    """Name, module and kind of all modules that have a fused forward. Raises TypeError for an unsupported model."""
    classes = [cls.__name__ for cls in type(model).__mro__ if cls.__module__.startswith("diffusers.")]
    file = next((FAMILIES[name] for name in classes if name in FAMILIES), None)
    if file is None:
        raise TypeError(
            f"model is a {type(model).__module__}.{type(model).__name__}; it needs to be diffusers' "
            f"{' or '.join(FAMILIES)}, itself and not in a wrapper"
        )
    modules = []
    for name, kind in importlib.import_module(f"dpdmd.kernels.fusion.{file}").MODULES.items():
        found = getattr(model, name)
        if isinstance(found, nn.ModuleList):
            modules += [(f"{name}.{i}", block, kind) for i, block in enumerate(found)]
        else:
            modules.append((name, found, kind))
    return modules


def _fp8_layers(name: str, block: nn.Module, layers: tuple[str, ...]) -> tuple[str, ...]:
    """The named layers that exist and are linear, or LoRA's around a linear one. Raises as `fuse_transformer` says."""
    from dpdmd.kernels.fusion.linear import LoraLinear, base

    found = []
    for part, layer in block.named_modules():
        if part not in layers or type(layer) not in (nn.Linear, LoraLinear) or type(base(layer)) is not nn.Linear:
            continue
        found.append(part)
        layer = base(layer)
        if layer.in_features % 16 or layer.out_features % 16:
            raise ValueError(
                f"fp8='no_grad' needs layers of multiples of 16; {name}.{part} is "
                f"{layer.in_features} x {layer.out_features}"
            )
        device = layer.weight.device
        if not converts(device.type, device.index):
            raise RuntimeError(
                f"fp8='no_grad' needs a GPU of compute capability 8.9 or newer, and the model is on a "
                f"{torch.cuda.get_device_name(device)}; fp8=None runs everywhere"
            )
    return tuple(found)
