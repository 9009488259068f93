"""Three roles on one copy of the weights: adapters for student and critic on a frozen base, which is the teacher.

    y = x W^T + b + (alpha / rank) (x A^T) B^T      A (rank, K), B (N, rank); W and b are frozen

The layers are peft's; diffusers' pipelines load the adapter's file. All layers of a transformer share one list with the
active adapter, so that switching roles needs no walk over them; nothing is merged into W, and `requires_grad` never changes.
(LoRA: arXiv 2106.09685.)
"""

from __future__ import annotations

import difflib
import json
import math
import re
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dpdmd.backbones.family import BLOCK_LISTS, families, family_of
from dpdmd.backbones.files import check_file, check_finite, check_fit, reading
from dpdmd.config import ConfigError
from dpdmd.files import save_tensors

TEACHER = "teacher"
WEIGHTS_FILE = "pytorch_lora_weights.safetensors"  # this and the next two are diffusers' names
_METADATA_KEY = "lora_adapter_metadata"
_PREFIX = "transformer."


@dataclass
class _Roles:
    """Stored in the transformer by `add_adapters`; a copy of the transformer gets its own."""

    active: list[str]  # the active adapter, or empty: the same list object in every LoRA layer
    layer: Any  # one LoRA layer, to check that it still is


def add_adapters(
    transformer: Any,
    *,
    rank: int,
    alpha: float,
    targets: Iterable[str] | None = None,
    seed: int,
    roles: tuple[str, ...] = ("student", "critic"),
) -> None:
    """Gives a diffusers transformer a LoRA adapter for each role, in place, and leaves it in the role of the teacher.

    transformer: an SD3Transformer2DModel or a FluxTransformer2DModel (with `targets`, any with blocks of those names), on any
        device. Its own parameters become frozen; those of all adapters require gradients in every role.
    rank, alpha: an adapter's output is scaled by alpha / rank.
    targets: endings of the names of linear layers in the transformer's blocks, such as "to_q" or "ff.net.2". None: the
        model family's.
    seed: of A, uniform in +- 1 / sqrt(K) as in nn.Linear, drawn on the CPU: the same in every process and on every device.
        B is 0, so that all roles begin as the teacher.

    An adapter has the dtype and device of its layer; in bfloat16 the optimizer must keep float32 masters, as for any weight.

    Raises ConfigError for an impossible rank, alpha, role or target (naming the nearest targets), and for a transformer that
    has adapters.
    """
    from peft import LoraConfig, inject_adapter_in_model

    if getattr(transformer, "peft_config", None):
        raise ConfigError(f"{type(transformer).__name__} has adapters already: {', '.join(transformer.peft_config)}")
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ConfigError(f"rank = {rank!r}: a whole number from 1 on is needed")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
        raise ConfigError(f"alpha = {alpha!r}: a number above 0 is needed")
    roles = tuple(roles)
    if not roles or TEACHER in roles or len(set(roles)) < len(roles) or any("." in role for role in roles):
        raise ConfigError(f"roles = {roles!r}: different names without dots are needed, none of them {TEACHER!r}")
    pattern = _pattern(transformer, targets)

    transformer.requires_grad_(False)
    for role in roles:
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=pattern, init_lora_weights=False)  # pyright: ignore[reportArgumentType] - a float does
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # the first role's
            # On the meta device first: peft would draw A from torch's global generator.
            inject_adapter_in_model(config, transformer, role, low_cpu_mem_usage=True)
    transformer._hf_peft_config_loaded = True  # for diffusers' own methods
    layers = [module for module in transformer.modules() if hasattr(module, "lora_A")]
    for index, role in enumerate(roles):
        generator = torch.Generator("cpu").manual_seed(seed + index)
        for layer in layers:
            weight, down, up = layer.get_base_layer().weight, layer.lora_A[role], layer.lora_B[role]
            bound = down.in_features**-0.5
            drawn = torch.empty(down.weight.shape, device="cpu").uniform_(-bound, bound, generator=generator)
            down.weight = nn.Parameter(drawn.to(weight.device, weight.dtype))
            up.weight = nn.Parameter(torch.zeros(up.weight.shape, device=weight.device, dtype=weight.dtype))
    state = _Roles([], layers[0])
    for layer in layers:
        layer._active_adapter = state.active
    transformer._roles = state


def largest_rank(transformer: nn.Module, targets: Iterable[str] | None = None) -> int:
    """The largest useful rank: the largest smaller side of a targeted weight. Raises as `add_adapters`."""
    pattern = _pattern(transformer, targets)
    return max(
        min(module.in_features, module.out_features)
        for path, module in transformer.named_modules()
        if isinstance(module, nn.Linear) and re.fullmatch(pattern, path)
    )


def _pattern(transformer: nn.Module, targets: Iterable[str] | None) -> str:
    """A regular expression of the full names of the targeted layers."""
    name = type(transformer).__name__
    family = family_of(name)
    lists = BLOCK_LISTS if family is None else family.block_lists
    if targets is None:
        if family is None:
            known = " and ".join(each.transformer_name for each in families())
            raise ConfigError(f"targets: none is known for a {name}, only for {known}; name the layers to adapt")
        targets = family.lora_targets
    targets = tuple(targets)
    linear = {
        path.split(".", 2)[2]
        for path, module in transformer.named_modules()
        if path.startswith(tuple(f"{blocks}." for blocks in lists)) and isinstance(module, nn.Linear)
    }
    endings = {".".join(path.split(".")[start:]) for path in linear for start in range(path.count(".") + 1)}
    if not targets:
        raise ConfigError(f"targets is empty; a {name} has {', '.join(sorted(linear))}")
    for target in targets:
        if target not in endings:
            nearest = difflib.get_close_matches(target, sorted(endings), n=3, cutoff=0.0)
            raise ConfigError(
                f"target {target!r} is no linear layer in the blocks of a {name}; the nearest are {', '.join(nearest)}"
            )
    return rf"({'|'.join(lists)})\.\d+\.(.+\.)?({'|'.join(map(re.escape, targets))})"


def use(transformer: Any, role: str) -> None:
    """Puts the transformer in a role: "teacher" (no adapter), "student" or "critic". Takes about a microsecond.

    A forward pass uses the current role, and so does a recomputation in the backward pass: with activation checkpointing
    call `use` again before the backward pass, or checkpoint functions made by `remember_role`.

    Raises ValueError for an unknown role or a transformer without adapters, RuntimeError if diffusers or peft has switched
    or merged adapters since.
    """
    roles = _roles(transformer)
    layer = roles.layer
    if layer._active_adapter is not roles.active or layer._disable_adapters or layer.merged_adapters:
        raise RuntimeError(
            "the transformer's adapters have been switched or merged by something else (set_adapter, "
            "disable_adapters, fuse_lora); switch roles only with dpdmd.engine.lora.use"
        )
    if role == TEACHER:
        roles.active.clear()
    elif role in transformer.peft_config:
        roles.active[:] = (role,)
    else:
        raise ValueError(f"role is {role!r}; it needs to be one of {', '.join((TEACHER, *transformer.peft_config))}")


def remember_role(transformer: nn.Module, function: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps `function`: later calls run in the role that is current now, and restore the one current then.

    For what a checkpoint calls again in the backward pass, when another role may be current:

        selective_checkpoint(remember_role(transformer, block.forward), *args, parameters=parameters)
    """
    active = _roles(transformer).active
    role = tuple(active)

    def in_role(*args, **kwargs):
        now = tuple(active)
        active[:] = role
        try:
            return function(*args, **kwargs)
        finally:
            active[:] = now

    vars(in_role)["__wrapped__"] = function  # selective_checkpoint looks up the module by it
    return in_role


def _roles(transformer: nn.Module) -> _Roles:
    roles = transformer.__dict__.get("_roles")
    if roles is None:
        raise ValueError(f"the {type(transformer).__name__} has no adapters; dpdmd.engine.lora.add_adapters makes them")
    return roles


def adapter_parameters(transformer: nn.Module, role: str) -> dict[str, nn.Parameter]:
    """The parameters of a role's adapter, for its optimizer, in the order of the layers, A before B. Names are the file's
    without "transformer.", such as "transformer_blocks.0.attn.to_q.lora_A.weight". Raises ValueError for an unknown role."""
    _config(transformer, role)
    end = f".{role}.weight"
    return {
        f"{name.removesuffix(end)}.weight": parameter
        for name, parameter in transformer.named_parameters()
        if name.endswith((f".lora_A{end}", f".lora_B{end}"))
    }


def _config(transformer: nn.Module, role: str):
    configs = getattr(transformer, "peft_config", {})
    if role not in configs:
        raise ValueError(f"role is {role!r}; the transformer's adapters are {', '.join(configs) or 'none'}")
    return configs[role]


def save_adapter(transformer: nn.Module, role: str, folder: str | Path, state: dict[str, Tensor] | None = None) -> Path:
    """Writes a role's adapter to folder/pytorch_lora_weights.safetensors, for load_lora_weights(folder) of
    StableDiffusion3Pipeline and FluxPipeline. Returns the file's path.

    B is written multiplied by alpha / rank, and the file's alpha is its rank: W + B A is the trained weight for every loader,
    also for those that ignore alpha. All tensors are float32; bfloat16 would round the product by 1 part in 256 again, unless
    alpha / rank is a power of two.

    state: the adapter's tensors by the names of `adapter_parameters`, on any device and in any dtype, if the transformer's
        own are not whole (ZeRO-3) or not the ones to keep (float32 masters).

    Raises ValueError for an unknown role and a state of other names, OSError if the file cannot be written.
    """
    config = _config(transformer, role)
    own = adapter_parameters(transformer, role)
    state = {**own} if state is None else state
    if state.keys() != own.keys():
        raise ValueError(f"state {_difference(state.keys(), own.keys())}")
    tensors = {}
    for name in own:
        tensor = state[name].detach().to("cpu", torch.float32, copy=True).contiguous()
        tensors[f"{_PREFIX}{name}"] = tensor.mul_(_scale(config)) if _is_b(name) else tensor
    settings = {"r": config.r, "lora_alpha": config.r, "target_modules": config.target_modules}
    settings = {f"{_PREFIX}{name}": value for name, value in settings.items()}
    path = Path(folder) / WEIGHTS_FILE
    save_tensors(path, tensors, {"format": "pt", _METADATA_KEY: json.dumps(settings)})
    return path


def _scale(config) -> float:
    """The factor of B A in a peft configuration."""
    return config.lora_alpha / config.r


def _is_b(name: str) -> bool:
    return name.endswith(".lora_B.weight")


@dataclass(frozen=True)
class Adapter:
    """An adapter's file: it adds scale B A to W."""

    path: Path
    tensors: dict[str, Tensor]  # by the names of `adapter_parameters`: A (rank, K), B (N, rank)
    rank: int
    scale: float  # 1 in what `save_adapter` writes


def read_adapter(folder: str | Path) -> Adapter:
    """Reads folder/pytorch_lora_weights.safetensors. Raises ConfigError for a file that is missing or damaged, that is not an
    adapter of a transformer's linear layers with one rank and one alpha, or that holds NaN or infinity."""
    from safetensors import safe_open

    path = Path(folder) / WEIGHTS_FILE
    if path.exists():
        check_file(path, "adapter")
    with reading(str(path), " as an adapter"), safe_open(path, framework="pt") as file:
        settings = json.loads((file.metadata() or {}).get(_METADATA_KEY, "{}"))
        tensors = {name.removeprefix(_PREFIX): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        settings = {name.removeprefix(_PREFIX): value for name, value in settings.items()}
    layers = {name.rsplit(".lora_", 1)[0] for name in tensors}
    pairs = {f"{layer}.lora_{matrix}.weight" for layer in layers for matrix in "AB"}
    if not tensors or tensors.keys() != pairs:
        difference = _difference(tensors.keys(), pairs) if tensors else "holds no tensor"
        raise ConfigError(f"{path} cannot be read as an adapter (it {difference})")
    for name, tensor in tensors.items():
        if tensor.ndim != 2 or tensor.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            raise ConfigError(
                f"{path} cannot be read as an adapter ({name} is {tensor.dtype} of shape {tuple(tensor.shape)}; a matrix "
                "of floats is needed)"
            )
    ranks = {tensor.shape[_is_b(name)] for name, tensor in tensors.items()}
    rank, alpha = settings.get("r", min(ranks)), settings.get("lora_alpha", min(ranks))
    kinds = [name for name in ("rank_pattern", "alpha_pattern", "use_rslora", "use_dora") if settings.get(name)]
    if ranks != {rank} or kinds or not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
        told = ", ".join(f"{name} = {settings[name]!r}" for name in ("r", "lora_alpha", *kinds) if name in settings)
        raise ConfigError(
            f"{path} cannot be read as an adapter (one rank and one alpha above 0 are needed; its tensors have rank "
            f"{', '.join(map(str, sorted(ranks)))}, its own description is {told or 'empty'})"
        )
    check_finite(tensors, str(path))
    return Adapter(path, tensors, rank, alpha / rank)


def check_adapter(transformer: nn.Module, folder: str | Path) -> None:
    """Raises ConfigError as `read_adapter` does, and for layers that the transformer lacks, which diffusers' loaders skip."""
    adapter = read_adapter(folder)
    needed, modules = {}, dict(transformer.named_modules())
    for name in adapter.tensors:
        layer = modules.get(name.rsplit(".lora_", 1)[0])
        if isinstance(layer, nn.Linear):
            shape = (layer.out_features, adapter.rank) if _is_b(name) else (adapter.rank, layer.in_features)
            needed[name] = shape
    check_fit({name: tuple(tensor.shape) for name, tensor in adapter.tensors.items()}, needed, str(adapter.path))


def load_adapter(transformer: nn.Module, role: str, folder: str | Path) -> None:
    """Reads what `save_adapter` wrote into a role's adapter, in the adapter's dtype.

    B is divided by the role's alpha / rank, so that the role computes what the file does, whatever its alpha: exactly if
    alpha / rank is a power of two, else up to one float32 rounding.

    Under ZeRO-3 call it inside deepspeed.zero.GatheredParameters of the role's parameters, with modifier_rank=0.

    Raises ValueError for an unknown role, and ConfigError as `read_adapter` does and for other layers or another rank.
    """
    config = _config(transformer, role)
    adapter = read_adapter(folder)
    parameters = adapter_parameters(transformer, role)
    if adapter.rank != config.r:
        raise ConfigError(f"{adapter.path} has rank {adapter.rank}; the {role}'s adapter needs {config.r}")
    needed = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    check_fit({name: tuple(tensor.shape) for name, tensor in adapter.tensors.items()}, needed, str(adapter.path))
    ratio = adapter.scale / _scale(config)
    with torch.no_grad():
        for name, parameter in parameters.items():
            tensor = adapter.tensors[name]
            parameter.copy_(tensor.float() * ratio if _is_b(name) else tensor)


def _difference(names: Iterable[str], expected: Iterable[str]) -> str:
    """The difference of two unequal sets of names, in words."""
    names, expected = set(names), set(expected)
    problems = [("lacks", expected - names), ("has besides", names - expected)]
    parts = [f"{verb} {len(group)} tensors, such as {min(group)}" for verb, group in problems if group]
    return " and ".join(parts)
