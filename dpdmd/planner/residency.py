"""How long each role's weights stay whole, and who reduces gradients and applies updates: decided here, once, from a
configuration without `auto`. The plan counts by it and the engine obeys it."""

from __future__ import annotations

from typing import Any

from dpdmd.config import ROLES, Config
from dpdmd.engine.residency import Policy, Residency


def residencies(config: Config, num_processes: int) -> dict[str, Residency]:
    """Each role's."""
    return {role: _residency(config, role, num_processes) for role in ROLES}


def _residency(config: Config, role: str, num_processes: int) -> Residency:
    engine, distill, lora = config.engine, config.distill, config.lora is not None
    teacher = role == "teacher"
    float8 = teacher and config.model.teacher_storage == "float8"
    policy = _policy(config, role, num_processes)
    reduced = not teacher and engine.offload == "none" and config.optimizer(role).name in ("auto", "fused")
    # An adapter runs on the base: both have to stay where they are.
    read = [role, "teacher"] if lora else [role]
    stay = [_policy(config, each, num_processes) == "whole" or not _sharded(config, each) for each in read]
    return Residency(
        policy=policy,
        sharded=_sharded(config, role),
        float8=float8,
        replayed=engine.cuda_graphs and all(stay),
        reduced=reduced,
        in_parts=role == "student" and reduced and distill.method == "dpdmd" and distill.detach,
    )


def _sharded(config: Config, role: str) -> bool:
    return role != "teacher" or config.engine.zero.teacher == 3


def _policy(config: Config, role: str, num_processes: int) -> Policy:
    """As configured; on one process weights are whole at no cost. A teacher kept in FP8 is made whole for a phase at most,
    and a base that all roles need is never given back as a whole."""
    policy: Any = "whole" if num_processes == 1 else config.engine.residency
    if role == "teacher" and policy != "block":
        if config.model.teacher_storage == "float8":
            return "phase"
        if config.lora is not None:
            return "whole"
    return policy
