"""AdamW as a torch optimizer on `dpdmd.kernels.adamw_step`; then the choice of a role's optimizer, and its learning rate.

State of a parameter of n elements, in its shape, beside `step`, an int:

    float32    exp_avg, exp_avg_sq                                        8 bytes an element
    bfloat16   the same, stochastically rounded                           4
    float8     exp_avg, exp_avg_sq in uint8, and exp_avg_scale,           2 + 8 / 256
               exp_avg_sq_scale (ceil(n / 256),) in float32
"""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from dpdmd.config import ConfigError, OptimizerConfig
from dpdmd.engine.compilation import compiling
from dpdmd.kernels import Float8State, Philox, adamw_step
from dpdmd.kernels.optim.adamw import check_hyperparameters

STATE_BYTES = {"float32": 8.0, "bfloat16": 4.0, "float8": 2 + 8 / 256}  # both moments, per element
STATE_DTYPES = tuple(STATE_BYTES)


class AdamW(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101) in one pass over memory per step, with moments in 4, 2 or 1 bytes.

    params: tensors or groups, as for every torch optimizer; float32 when they are updated.
    lr, betas, eps, weight_decay: as in torch.optim.AdamW, with its float32 arithmetic.
    state_dtype: the moments' "float32", "bfloat16" or "float8"; the latter two are stochastically rounded.
    seed: keys the rounding, with the parameter's index and the step. Give processes and roles with different parameters
        different seeds.

    Raises ValueError for a number out of range or an unknown state_dtype, TypeError for a setting of another type.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        state_dtype: str = "float32",
        seed: int = 0,
    ):
        # All settings are in the groups, which is what torch saves, copies and pickles.
        settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, settings | {"state_dtype": state_dtype, "seed": seed})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if group["state_dtype"] not in STATE_DTYPES:
            raise ValueError(
                f"state_dtype is {group['state_dtype']!r}; it needs to be one of {', '.join(STATE_DTYPES)}"
            )
        if isinstance(group["seed"], bool) or not isinstance(group["seed"], int):
            raise TypeError(f"seed is a {type(group['seed']).__name__}; it needs to be an int")
        check_hyperparameters(*(group[name] for name in ("lr", "betas", "eps", "weight_decay")))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every parameter that has a gradient. Returns what the closure returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for index, group, parameter in self._parameters():
            if parameter.grad is not None:
                self._update(index, group, parameter, parameter.grad)
        return loss

    @torch.no_grad()
    def update(
        self,
        parameter: Tensor,
        gradient: Tensor,
        *,
        weight: Tensor | None = None,
        scale: Tensor | None = None,
        apply: Tensor | None = None,
    ) -> None:
        """Updates one of the optimizer's parameters, such as the flat float32 master of a shard, by a given gradient.

        gradient: float32, bfloat16 or float16, with the parameter's number of elements.
        weight: contiguous, with as many; receives the new parameter in its own dtype.
        scale: float32 (), a factor for the gradient. apply: bool (); where it is False nothing but `step` changes.

        The host does not read `apply`, so `step` counts every call. For an exact bias correction after a call that was
        not applied, subtract it: `state[parameter]["step"] -= 1`.

        Raises ValueError for a parameter that the optimizer does not have, and what `adamw_step` raises.
        """
        index, group = self._place(parameter)
        self._update(index, group, parameter, gradient, weight, scale, apply)

    def create_state(self, parameter: Tensor) -> dict[str, Any]:
        """The parameter's state, created if it has none."""
        _, group = self._place(parameter)
        return self._state(group, parameter)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict()` gave, each tensor in its own dtype (torch's method would convert to float32), on the
        device of its parameter. Raises ValueError where the groups differ, in number, size or state_dtype."""
        saved_groups = state_dict["param_groups"]
        for index, (group, saved) in enumerate(zip(self.param_groups, saved_groups, strict=False)):
            if saved.get("state_dtype") != group["state_dtype"]:
                raise ValueError(
                    f"param_groups[{index}] of the state_dict has state_dtype {saved.get('state_dtype')!r}; "
                    f"this optimizer's has {group['state_dtype']!r}"
                )
        super().load_state_dict({**state_dict, "state": {}})
        saved_ids = itertools.chain.from_iterable(group["params"] for group in saved_groups)
        for (_, _, parameter), saved_id in zip(self._parameters(), saved_ids, strict=True):
            if saved_id in state_dict["state"]:
                self.state[parameter] = {
                    name: value.to(parameter.device, copy=True) if isinstance(value, Tensor) else value
                    for name, value in state_dict["state"][saved_id].items()
                }

    def _parameters(self) -> Iterator[tuple[int, dict[str, Any], Tensor]]:
        """Every parameter with its index and group; looked up each time, as DeepSpeed replaces parameters by flat shards."""
        index = itertools.count()
        for group in self.param_groups:
            for parameter in group["params"]:
                yield next(index), group, parameter

    def _place(self, parameter: Tensor) -> tuple[int, dict[str, Any]]:
        for index, group, each in self._parameters():
            if each is parameter:
                return index, group
        raise ValueError(f"a tensor of shape {tuple(parameter.shape)} is none of the optimizer's parameters")

    def _state(self, group: dict[str, Any], parameter: Tensor) -> dict[str, Any]:
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            for name in ("exp_avg", "exp_avg_sq"):
                if group["state_dtype"] == "float8":
                    zeros = Float8State.zeros(parameter.numel(), parameter.device)
                    state |= {name: zeros.values.view(parameter.shape), f"{name}_scale": zeros.scales}
                else:
                    dtype = getattr(torch, group["state_dtype"])
                    state[name] = torch.zeros(parameter.shape, dtype=dtype, device=parameter.device)
        return state

    def _update(
        self,
        index: int,
        group: dict[str, Any],
        parameter: Tensor,
        gradient: Tensor,
        weight: Tensor | None = None,
        scale: Tensor | None = None,
        apply: Tensor | None = None,
    ) -> None:
        state = self._state(group, parameter)
        moments = [state[name].view(-1) for name in ("exp_avg", "exp_avg_sq")]
        if "exp_avg_scale" in state:
            scales = state["exp_avg_scale"], state["exp_avg_sq_scale"]
            moments = [Float8State(*moment) for moment in zip(moments, scales, strict=True)]
        flat = parameter.detach().reshape(-1)  # a copy where the parameter has strides of its own
        state["step"] += 1
        adamw_step(
            *(flat, moments[0], moments[1], gradient.detach().reshape(-1)),
            weight=None if weight is None else weight.detach().view(-1),
            **{name: group[name] for name in ("lr", "betas", "eps", "weight_decay")},
            step=state["step"],
            scale=scale,
            apply=apply,
            key=Philox.of("adamw", group["seed"], index, state["step"]),
        )
        if not parameter.is_contiguous():
            parameter.detach().copy_(flat.view(parameter.shape))


def learning_rate(config: OptimizerConfig, updates: int, total: int) -> float:
    """The learning rate of the update after `updates` applied ones, of `total` in the run."""
    share = min(1.0, (updates + 1) / max(1, config.warmup))
    if config.decay == "cosine":
        share *= 0.5 * (1.0 + math.cos(math.pi * min(1.0, updates / total)))
    return config.lr * share


def build_optimizer(
    parameters, config: OptimizerConfig, device: str, *, seed: int = 0, offload: str = "none"
) -> torch.optim.Optimizer:
    """The AdamW that config.name names; auto is `AdamW` above, with this seed. With offload "cpu" or "nvme" it is torch's,
    on the CPU. Raises ConfigError if the named one cannot be used here."""
    arguments = {"lr": config.lr, "betas": config.betas, "eps": config.eps, "weight_decay": config.weight_decay}
    if offload == "none" and config.name in ("auto", "fused"):
        return AdamW(parameters, **arguments, state_dtype=config.state, seed=seed)
    if config.name in _FUSED:
        fused_adam = _fused_adam(config.name, device)
        try:
            with compiling("fused_adam", "DeepSpeed's FusedAdam"):
                return fused_adam(parameters, adam_w_mode=True, **arguments)
        except Exception as error:  # DeepSpeed's build can fail: no compiler, another CUDA, a read-only cache
            raise _unusable(config.name, error) from error
    return torch.optim.AdamW(parameters, fused=True, **arguments)


def check_optimizer(config: OptimizerConfig, device: str, offload: str) -> None:
    """Raises ConfigError if the named optimizer is not installed."""
    if config.name in _FUSED and offload == "none":
        _fused_adam(config.name, device)


def restore_step(optimizer: torch.optim.Optimizer, master: Tensor, steps: int) -> None:
    """Sets the number of updates where this kind of optimizer keeps it: another kind may have made them."""
    if isinstance(optimizer, torch.optim.AdamW):
        optimizer.state[master]["step"] = torch.tensor(float(steps), device=master.device)
    elif type(optimizer).__module__.startswith("apex."):
        optimizer.param_groups[0]["step"] = steps
    else:
        optimizer.state[master]["step"] = steps


# NVIDIA's apex has this module; PyPI's apex is another project.
_FUSED = {"apex": "apex.optimizers", "deepspeed": "deepspeed.ops.adam"}


def _fused_adam(name: str, device: str) -> type:
    """The class FusedAdam of apex or DeepSpeed. Raises ConfigError if it cannot be used."""
    if device != "cuda":
        raise _unusable(name, "it needs a CUDA device")
    try:
        return importlib.import_module(_FUSED[name]).FusedAdam
    except (ImportError, AttributeError) as error:
        raise _unusable(name, error) from error


def _unusable(name: str, reason: object) -> ConfigError:
    return ConfigError(f"optimizer name = {name!r} cannot be used: {reason}; auto or torch would run")
