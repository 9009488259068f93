"""How long each role's weights stay whole, and who reduces gradients and applies updates: decided here for the plan and the
engine, from a configuration without `auto`. A new policy: see `Policy` in engine/residency.py."""

from __future__ import annotations

from typing import Any

from dpdmd.config import ROLES, Config
from dpdmd.engine.residency import Policy, Residency


def residencies(config: Config, num_processes: int) -> dict[str, Residency]:
    """Each role's residency."""
    return {role: _residency(config, role, num_processes) for role in ROLES}


def _residency(config: Config, role: str, num_processes: int) -> Residency:
    engine, distill = config.engine, config.distill
    teacher = role == "teacher"
    reduced = not teacher and engine.offload == "none" and config.optimizer(role).name in ("auto", "fused")
    # An adapter runs on the base: both must stay in place.
    read = [role] if config.lora is None else [role, "teacher"]
    stay = [_policy(config, each, num_processes) == "whole" or not _sharded(config, each) for each in read]
    return Residency(
        policy=_policy(config, role, num_processes),
        sharded=_sharded(config, role),
        float8=teacher and config.model.teacher_storage == "float8",
        replayed=engine.cuda_graphs and all(stay),
        reduced=reduced,
        in_parts=role == "student" and reduced and distill.method == "dpdmd" and distill.detach,
    )


def _sharded(config: Config, role: str) -> bool:
    return role != "teacher" or config.engine.zero.teacher == 3


def _policy(config: Config, role: str, num_processes: int) -> Policy:
    """engine.residency, but on one process "whole", which costs nothing; for "whole" and "phase", a teacher kept in FP8 is
    gathered for a phase, and the base that all roles share stays whole."""
    policy: Any = "whole" if num_processes == 1 else config.engine.residency
    if role == "teacher" and policy != "block":
        if config.model.teacher_storage == "float8":
            return "phase"
        if config.lora is not None:
            return "whole"
    return policy
