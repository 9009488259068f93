"""Which of diffusers' modules a fused forward may replace. Where it may not, the stock forward runs."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from diffusers.models.activations import GELU
from diffusers.models.attention import FeedForward
from torch import nn

from dpdmd.kernels.runtime.registration import transformed


class Fused(NamedTuple):
    """A fused forward for a class of modules."""

    why_not: Callable[[Any], str]  # why a module must run diffusers' forward; "" where it need not
    forward: Callable  # takes the module first
    fp8_layers: tuple[str, ...] = ()  # the layers that may run in FP8, where they are plain


def or_stock(why_not: Callable[[Any], str]) -> Callable[[Callable], Callable]:
    """Make forward(module, *args, **kwargs) call the stock forward where why_not gives a reason, inside torch.func, and
    where the fused forward returns None, as it cannot serve the call."""

    def decorate(fused: Callable) -> Callable:
        @functools.wraps(fused)
        def forward(module, *args, **kwargs):
            if not transformed() and not why_not(module):
                result = fused(module, *args, **kwargs)
                if result is not None:
                    return result
            if module._fp8_weights is not None and not torch.compiler.is_compiling():
                module._fp8_weights.note_gradients(module)
            return type(module).forward(module, *args, **kwargs)

        return forward

    return decorate


class Like(NamedTuple):
    """What a module must be for a fused forward to compute its result without calling it."""

    cls: type  # exactly; NoneType for a missing module
    parts: dict[str, "Like"] = {}  # noqa: RUF012  (never written to)
    demand: Callable[[Any], str] | None = None  # a further check: what is wrong, or ""


def why_not_like(module: nn.Module, cls: type, parts: dict[str, Like]) -> str:
    """Why a module has another forward than `cls`, or other parts; "" where it has neither. A class derived from `cls` may
    have its forward, as FSDP's do. Runs at every call, as adapters, hooks and attention processors come and go."""
    if type(module).forward is not cls.forward:
        return f"it is a {type(module).__name__}, which has another forward than {cls.__name__}"
    return _unlike_parts(module, parts).removeprefix(".")


def _unlike(module: nn.Module | None, like: Like) -> str:
    """Why the module is not like that, as text to follow its name; "" where it is."""
    if type(module) is not like.cls:
        return f" is a {type(module).__name__}, not a {like.cls.__name__}"
    if module is None:
        return ""
    if hooked(module):
        return " has hooks or a forward of its own"
    reason = _unlike_parts(module, like.parts)
    return reason if reason or like.demand is None else like.demand(module)


def _unlike_parts(module: nn.Module, parts: dict[str, Like]) -> str:
    modules = module._modules  # reading attributes of a module takes five times as long
    for name, part in parts.items():
        reason = _unlike(modules.get(name), part)
        if reason:
            return f".{name}{reason}"
    return ""


def hooked(module: nn.Module) -> bool:
    """Whether calling the module does more than its class's forward. DeepSpeed's hooks, which gather the module's
    parameters, do not count: see `away`."""
    if module._forward_pre_hooks or module._forward_hooks or module._backward_pre_hooks or module._backward_hooks:
        kinds = module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks
        if not all(str(hook.__module__).startswith("deepspeed.") for hooks in kinds for hook in hooks.values()):
            return True
    return "forward" in module.__dict__


def away(module: nn.Module) -> bool:
    """Whether ZeRO-3 holds the module's parameters elsewhere, and only calling the module gathers them. In a pass of
    DeepSpeed's engine reading a parameter gathers it, and the block gathers it from then on; outside one it does not."""
    if not module._forward_pre_hooks:
        return False
    parameters = [getattr(module, name) for name in module._parameters]
    return any(parameter.numel() == 0 for parameter in parameters if parameter is not None)


def norms_away(attn: Any) -> bool:
    """Whether the norms of an attention are `away`: the fused forward reads their weights."""
    return any(away(norm) for name, norm in attn._modules.items() if name.startswith("norm_"))


def _dropout(dropout: nn.Dropout) -> str:
    return f" drops out (p = {dropout.p}, in training)" if dropout.p and dropout.training else ""


def _not_tanh(gelu: GELU | nn.GELU) -> str:
    return "" if gelu.approximate == "tanh" else f" has approximate = {gelu.approximate!r}, not 'tanh'"


TANH_GELU = Like(nn.GELU, demand=_not_tanh)
LAYER_NORM = Like(nn.LayerNorm, demand=lambda norm: " has weights" if norm.elementwise_affine else "")
ADAPTIVE_NORM = {"silu": Like(nn.SiLU), "norm": LAYER_NORM}  # the parts of diffusers' AdaLayerNorm... classes
_NO_DROPOUT = Like(nn.Dropout, demand=_dropout)
_FEED_FORWARD_NET = {"0": Like(GELU, demand=_not_tanh), "1": _NO_DROPOUT}
_NET = Like(nn.ModuleList, _FEED_FORWARD_NET, lambda net: "" if len(net) == 3 else f" has {len(net)} modules, not 3")
FEED_FORWARD = Like(FeedForward, {"net": _NET})
_NORMS, _ADDED_NORMS = ("norm_q", "norm_k"), ("norm_added_q", "norm_added_k")


def attention_like(
    cls: type, norm: Like, demand: Callable[[Any], str], *, added: bool = False, to_out: bool = True
) -> Like:
    """An attention with such norms of its heads, all of one eps. added: with norms of the text's tokens; to_out: with a
    projection of its output; demand: a further check, made before that of eps."""
    parts = dict.fromkeys((*_NORMS, *_ADDED_NORMS) if added else _NORMS, norm)
    if to_out:
        parts["to_out"] = Like(nn.ModuleList, {"1": _NO_DROPOUT})
    return Like(cls, parts, lambda attn: demand(attn) or _unequal_eps(attn))


def _unequal_eps(attn: Any) -> str:
    norms = {name: attn._modules[name] for name in (*_NORMS, *_ADDED_NORMS) if attn._modules.get(name) is not None}
    for name, norm in norms.items():
        if norm.eps is None or norm.eps != attn.norm_q.eps:
            return f".{name} has eps = {norm.eps}; it needs a number, norm_q's"
    return ""
