"""The fused operations put into a diffusers transformer, in place: SD3Transformer2DModel and FluxTransformer2DModel.

Each block that is understood gets a forward of its own, an attribute of the instance, which computes what the stock one
does with the operations of this package. Classes, submodules, parameters and state_dict stay as they are, so whatever
finds blocks by class or weights by name works as before: DeepSpeed, peft, save_pretrained, torch.compile of each block.
What is not understood keeps the stock forward and is named, with the reason.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import nn

from dpdmd.kernels.blocks.fp8 import converts
from dpdmd.kernels.runtime import checks

# What a fused module has beside its forward: its weights in FP8, or None where it has none.
MARK = "_fp8_weights"


@dataclass
class FusionReport:
    """What `fuse_transformer` did; str() says it in words."""

    model: str  # the model's class
    replaced: dict[str, int] = field(default_factory=dict)  # class: how many of its modules are fused
    num_fp8: int = 0  # of them, those whose large products run in FP8 where there is no gradient
    left: list[tuple[str, str]] = field(default_factory=list)  # (name, reason) of the modules that are not fused

    def __str__(self) -> str:
        fused = ", ".join(f"{count} {name}" for name, count in self.replaced.items()) or "nothing"
        fp8 = f"; {self.num_fp8} of them with FP8 where there is no gradient" if self.num_fp8 else ""
        left = [f"  {name} left as it was: {reason}" for name, reason in self.left]
        return "\n".join([f"{self.model}: fused {fused}{fp8}", *left])


def fuse_transformer(model: nn.Module, *, fp8: str | None = None, verbose: bool = True) -> FusionReport:
    """Gives the blocks of a diffusers transformer, and its last norm, fused forwards, in place. Returns what became of
    each, and prints it unless verbose is False.

    model: an SD3Transformer2DModel or a FluxTransformer2DModel, before it is wrapped (DeepSpeed, DDP, torch.compile).
    fp8: "no_grad" runs the large matrix products of the image tokens in FP8 in passes without gradient, that is where
        neither inputs nor parameters require one or torch.no_grad() holds. First and last block, modulation and text
        stay as they are. The weights' FP8 copies take half of their bfloat16 size, in every process also under ZeRO-3;
        they are made anew after an optimizer's step and where torch's version counters tell of a change. After changes
        that neither shows (weight.data written to, as fuse_lora does; weights loaded under ZeRO-3; an optimizer in a
        CUDA graph) call `requantize`. A block that torch.compile traces runs without FP8.

    A block is left as it was, and named, where it is not what diffusers makes: other norms, activations or attention
    processors, dropout in training, chunked feed-forwards, hooks inside it. Blocks check at every call: where such a
    thing comes later, or a call brings attention arguments (IP-Adapter, masks), the stock forward runs. Linear layers
    of other classes (quantised ones) or with hooks are called, in the fused forward too. peft's LoRA layers, added before
    or after, are fused: the base product runs as without them, what an adapter adds follows in place, and a layer of
    which no adapter is active is its base layer. Called, as peft has them, are those with dropout, DoRA, several active
    adapters, an adapter in another dtype than the base, and those that torch.compile traces. Gradients are first-order
    and reverse-mode: no gradient of a gradient, no torch.func.

    Under ZeRO-3 make the blocks leaves (deepspeed.utils.set_z3_leaf_modules): they are gathered as a whole either way.

    Fusing again is harmless, and takes the new `fp8`. A deepcopy and a pickled copy of a fused model are fused.

    Raises TypeError for another model, ValueError for another fp8 and for sizes that FP8 products cannot have (multiples
    of 16), RuntimeError for a GPU without FP8.
    """
    modules = _modules(model)
    checks.one_of("fp8", fp8, (None, "no_grad"))
    blocks = [name for name, _, kind in modules if kind.fp8_layers]
    report = FusionReport(type(model).__name__)
    fused = []
    for name, module, kind in modules:
        reason = _replaced(module) or kind.why_not(module)
        if reason:
            report.left.append((name, reason))
            continue
        # The first block and the last are the ones that rounding hurts most.
        in_fp8 = fp8 == "no_grad" and name in blocks[1:-1]
        fused.append((module, kind, _fp8_layers(name, module, kind.fp8_layers) if in_fp8 else None))
    from dpdmd.kernels.fusion.parts import Fp8Weights

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
    """Undoes `fuse_transformer`, in place; harmless where nothing is fused.

    Raises TypeError for another model, RuntimeError where something else has wrapped a fused forward since.
    """
    fused = [(name, module, kind) for name, module, kind in _modules(model) if MARK in module.__dict__]
    for name, module, kind in fused:
        if getattr(module.__dict__.get("forward"), "func", None) is not kind.forward:
            raise RuntimeError(f"{name} has had its fused forward wrapped or taken away since; undo that first")
    for _, module, _ in fused:
        del module.forward
        delattr(module, MARK)


def requantize(model: nn.Module) -> None:
    """Has a model fused with fp8="no_grad" make the FP8 copies of its weights anew when it next needs them. For changes
    of weights that it cannot see, which `fuse_transformer` lists.

    Raises TypeError for another model.
    """
    for _, module, _ in _modules(model):
        weights = module.__dict__.get(MARK)
        if weights is not None:
            weights.outdate()


class _Kind(NamedTuple):
    """A class of modules that there is a fused forward for."""

    why_not: Callable[[nn.Module], str]
    forward: Callable
    fp8_layers: tuple[str, ...] = ()  # where they are plain


def _modules(model: nn.Module) -> list[tuple[str, nn.Module, _Kind]]:
    """Name, module and kind of all that might be fused. Raises TypeError for a model that is not supported."""
    try:
        from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
    except ImportError:
        FluxTransformer2DModel = SD3Transformer2DModel = ()
    if isinstance(model, SD3Transformer2DModel):
        from dpdmd.kernels.fusion import sd3 as blocks

        kinds = {"transformer_blocks": _Kind(blocks.why_not, blocks.forward, blocks.FP8_LAYERS)}
    elif isinstance(model, FluxTransformer2DModel):
        from dpdmd.kernels.fusion import flux as blocks

        kinds = {
            "transformer_blocks": _Kind(blocks.why_not_double, blocks.forward_double, blocks.FP8_LAYERS_DOUBLE),
            "single_transformer_blocks": _Kind(blocks.why_not_single, blocks.forward_single, blocks.FP8_LAYERS_SINGLE),
        }
    else:
        raise TypeError(
            f"model is a {type(model).__module__}.{type(model).__name__}; it needs to be diffusers' "
            f"SD3Transformer2DModel or FluxTransformer2DModel, itself and not in a wrapper"
        )
    from dpdmd.kernels.fusion import parts

    modules = [
        (f"{name}.{i}", block, kind) for name, kind in kinds.items() for i, block in enumerate(getattr(model, name))
    ]
    return [*modules, ("norm_out", model.norm_out, _Kind(parts.why_not_norm_out, parts.forward_norm_out))]


def _replaced(module: nn.Module) -> str:
    replaced = "forward" in module.__dict__ and MARK not in module.__dict__
    return "it has a forward of its own already" if replaced else ""


def _fp8_layers(name: str, block: nn.Module, layers: tuple[str, ...]) -> tuple[str, ...]:
    """Of the named layers those that are there and linear, or LoRA's around a linear one. Raises as `fuse_transformer`
    says."""
    from dpdmd.kernels.fusion.parts import LoraLinear, base

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
