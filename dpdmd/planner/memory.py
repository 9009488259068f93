"""Memory of every phase of a cycle.

Sizes of weights, gradients and optimizer state follow from the number of parameters P, of processes N and the settings;
what passes allocate is measured on the meta device (footprint.py). A phase's total is the sum at its fullest moment:

    shards      of weights, float32 masters and moments: P / N each, of every role (ZeRO stage 3)
    gathered    whole networks, by engine.residency; on one process they are views of the shards
    gradients   the role's shard, from the backward pass to the update's end, and those that autograd holds. Critic: a block's
                at a time. Student: all (its weights are used in several steps of one chain, and a gradient is complete after
                the weight's last use), and the first step's, which wait for the chain's (`Residency.in_parts`)
    activations block by block: before a block's backward pass, what it and all blocks before it have kept
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dpdmd.config import ROLES, Config
from dpdmd.engine.optimizer import STATE_BYTES
from dpdmd.engine.residency import GROUP, Residency
from dpdmd.planner.cycle import Chain, steps_with_graph
from dpdmd.planner.footprint import Footprints
from dpdmd.planner.residency import residencies

GIB = 2**30
GPUS_A_NODE = 8

# Beside what torch allocates: CUDA's context, the kernels' code and NCCL (H100: 1.68 GiB), NCCL's buffers with several
# processes; and a share for memory that the allocator holds unused (H100: 77.1 GiB reserved for 73.7 allocated, graphs
# included) and that this planner does not see.
CONTEXT, NCCL, MARGIN = 1.7 * GIB, 1.0 * GIB, 0.04
WORKSPACE = 0.1 * GIB  # cuBLAS's, latents and losses
# Elements that DeepSpeed's own reduction collects and flattens before it sends them. Under offload each role has a bucket
# of this size from the start, however small the network.
DEEPSPEED_BUCKET = 5e8

PARTS = ("weights", "gathered", "gradients", "optimizer", "ema", "activations", "buffers", "reserve")


@dataclass(frozen=True)
class Phase:
    """Memory of a GPU at the fullest moment of a phase, in bytes by part."""

    name: str
    parts: dict[str, float]

    @property
    def allocated(self) -> float:
        """As torch.cuda.max_memory_allocated counts."""
        return sum(self.parts.values()) - self.parts["reserve"]

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def stored_bytes(residency: Residency, width: int) -> float:
    """Bytes of a weight as it is kept and sent."""
    return 1 + 4 / GROUP if residency.float8 else width


class Memory:
    """The phases of one configuration without `auto`."""

    def __init__(self, config: Config, footprints: Footprints, num_gpus: int):
        self._config, self._footprints, self._gpus = config, footprints, num_gpus
        self._engine = config.engine
        self._lora = config.lora is not None
        self._at = footprints.at_work(config)
        self._residencies = residencies(config, num_gpus)
        self._state = self._persistent()
        # CUDA graphs keep a pass's intermediates, in one pool for all of them.
        kept = [fp.no_grad for role, fp in self._at.items() if self._residencies[role].replayed]
        self._graphs = max(kept, default=0.0)

    def _share(self, role: str) -> float:
        """The part of a role that a process has."""
        return 1 / self._gpus if self._residencies[role].sharded else 1.0

    def _persistent(self) -> dict[str, float]:
        """What every phase has, by part."""
        config = self._config
        parts: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        for role in ROLES:
            for part, size in self._of_role(role).items():
                parts[part] += size
        if config.ema is not None and config.ema.device == "same":
            parts["ema"] += 4 * self._at["student"].trained * self._share("student")
        if config.prompts.encoding == "stream" and not config.model.random_init:
            parts["weights"] += self._at["teacher"].dtype_bytes * self._footprints.backbone.family.text_parameters
        # A batch's embeddings: conditional and unconditional, separate and concatenated.
        elements = sum(torch.Size(shape).numel() for shape in self._footprints.backbone.text_shapes.values())
        conditions = 4 * self._engine.batch_size * elements * self._at["teacher"].dtype_bytes
        parts["buffers"] += WORKSPACE + conditions
        return parts

    def _of_role(self, role: str) -> dict[str, float]:
        fp, residency, share = self._at[role], self._residencies[role], self._share(role)
        width = fp.dtype_bytes
        if self._lora and role != "teacher":
            parts = {"weights": width * fp.trained * share}
        else:
            own = fp.parameters - fp.trained if self._lora else fp.parameters
            parts = {"weights": stored_bytes(residency, width) * own * share + fp.buffers + fp.fp8_bytes}
        if role != "teacher" and self._engine.offload == "none":
            parts["gradients"] = 0.0 if residency.reduced else self._gradient(role)  # DeepSpeed keeps them
            state = (0 if width == 4 else 4) + STATE_BYTES[self._config.optimizer(role).state]
            parts["optimizer"] = state * fp.trained * share
        elif role != "teacher":
            parts["buffers"] = width * DEEPSPEED_BUCKET
        return parts

    def _gradient(self, role: str) -> float:
        """Bytes of a process's shard of the gradient."""
        width = 4 if self._engine.accumulation > 1 else self._at[role].dtype_bytes
        return width * self._at[role].trained * self._share(role)

    def _whole(self, *roles: str) -> float:
        """Bytes of gathered weights while the last of the roles is at work and the others have a graph or wait to be released."""
        if self._lora:
            roles = ("teacher", *(role for role in roles if role != "teacher"))  # all of them need the base
        total = 0.0
        for role in ROLES:
            policy, fp = self._residencies[role].policy, self._at[role]
            if not self._residencies[role].sharded or (role not in roles and policy != "whole"):
                continue
            if self._gpus == 1:  # views of the shard, unless it is in another format
                total += fp.parameters if self._residencies[role].float8 else 0
            elif self._lora and role != "teacher":
                total += fp.trained
            elif policy == "block":
                total += fp.outer_parameters + (2 * fp.largest_block if self._lora or role == roles[-1] else 0)
            else:
                total += fp.parameters - (fp.trained if self._lora else 0)
        return self._at["teacher"].dtype_bytes * total

    def _receiving(self, role: str) -> float:
        """Bytes of a received unit, beside its copy in the parameters' order."""
        unit = self._at[role].dtype_bytes * self._at[role].largest_block
        return unit if self._gpus > 1 and self._residencies[role].sharded else 0.0

    def _reducing(self, role: str) -> float:
        """Bytes of gradients in flight: up to three units, or DeepSpeed's bucket (unless it always exists) and its copy."""
        fp = self._at[role]
        bucket = fp.dtype_bytes * min(fp.trained, DEEPSPEED_BUCKET)
        if self._engine.offload != "none":
            return bucket if self._gpus > 1 else 0.0
        if not self._residencies[role].reduced:
            return 2 * bucket
        largest = max(block.trained for block in fp.blocks)
        return 3 * fp.dtype_bytes * largest if self._gpus > 1 else 0.0

    def _begun(self, role: str) -> float:
        """Bytes of the gradient's shard from the update's earlier micro-batches."""
        return self._gradient(role) if self._engine.accumulation > 1 and self._residencies[role].reduced else 0.0

    def _phase(self, name: str, **parts: float) -> Phase:
        total = {part: self._state[part] + parts.get(part, 0.0) for part in PARTS}
        total["reserve"] = CONTEXT + (NCCL if self._gpus > 1 else 0.0) + MARGIN * sum(total.values()) + self._graphs
        return Phase(name, total)

    def _chain(self, role: str, steps: int) -> Chain:
        keep = getattr(self._engine.kept_passes, role) or 0
        return Chain(self._at[role], steps, self._engine.checkpointing, keep)

    def _rollout(self, role: str, network: str) -> Phase:
        """A network's rollout without gradient in a role's update."""
        return self._phase(
            f"{role} update, {network}'s rollout",
            gathered=self._whole(network),
            activations=self._at[network].no_grad,
            gradients=self._begun(role),
            buffers=self._receiving(network),
        )

    def _backward(self, role: str, name: str, chain: Chain, earlier: bool = False) -> Phase:
        """The backward pass whose gradients are reduced."""
        begun = self._begun(role)
        shard = self._gradient(role) if self._residencies[role].reduced and not begun else 0.0
        activations, gradients = chain.backward(held=False, earlier=earlier, shard=shard)
        return self._phase(
            f"{role} update, {name}",
            gathered=self._whole(role),
            activations=activations,
            gradients=begun + gradients,
            buffers=self._reducing(role),
        )

    def _optimizer(self, role: str) -> Phase:
        gradients = self._gradient(role) if self._residencies[role].reduced else 0.0
        return self._phase(f"{role} update, optimizer", gathered=self._whole(), gradients=gradients)

    def critic_phases(self) -> list[Phase]:
        backward = self._backward("critic", "forward and backward", self._chain("critic", 1))
        return [self._rollout("critic", "student"), backward, self._optimizer("critic")]

    def student_phases(self) -> list[Phase]:
        first_steps, rest = steps_with_graph(self._config)
        parts = self._residencies["student"].in_parts
        teacher, critic = self._at["teacher"].no_grad, self._at["critic"].no_grad
        held = self._at["student"].dtype_bytes * self._at["student"].trained if parts else 0.0
        begun = self._begun("student")
        chain = self._chain("student", rest if parts else first_steps + rest)
        phases = [self._rollout("student", "teacher")] if first_steps else []
        if parts:
            activations, gradients = self._chain("student", first_steps).backward(held=True, earlier=False)
            phases.append(
                self._phase(
                    "student update, first step's backward",
                    gathered=self._whole("student"),
                    activations=activations,
                    gradients=begun + gradients,
                )
            )
        score, gathered, receiving = max(
            (teacher, self._whole("student", "teacher"), self._receiving("teacher")),
            (critic, self._whole("student", "critic"), self._receiving("critic")),
            key=sum,
        )
        return [
            *phases,
            self._phase(
                "student update, chain and score",
                gathered=gathered,
                activations=chain.kept + score,
                gradients=begun + held,
                buffers=receiving,
            ),
            self._backward("student", "chain's backward", chain, earlier=parts),
            self._optimizer("student"),
        ]

    def other_phases(self) -> list[Phase]:
        """Starting, saving and exporting."""
        student, critic = self._at["student"], self._at["critic"]
        # A trained network comes whole to the GPU, is cut into pieces that are concatenated, and gets a buffer for gradients
        # and masters, with zeros of the masters' size for a moment. The critic is the last.
        arriving = critic.dtype_bytes * critic.parameters
        if not self._lora:
            arriving += (2 * critic.dtype_bytes + 4) * critic.trained * self._share("critic")
            arriving += self._gradient("critic") if self._engine.offload == "none" else 0.0
            arriving -= sum(self._of_role("critic").values())  # counted in every phase, but allocated later
        one = student.dtype_bytes * student.largest if self._gpus > 1 else 0.0
        return [
            self._phase("start, the networks taken over", activations=max(0.0, arriving)),
            self._phase("checkpoint", gathered=self._whole()),
            self._phase("export, a tensor at a time", gathered=self._whole() + one),
        ]

    def host(self) -> dict[str, float]:
        """Bytes of a machine's main memory, by use."""
        config, student = self._config, self._at["student"]
        local = min(self._gpus, GPUS_A_NODE)
        host = {}
        trained = {role: self._at[role].trained * self._share(role) for role in ("student", "critic")}
        if config.engine.offload == "cpu":
            # float32 master, two moments and a gradient
            host["masters, moments and gradients"] = 16 * sum(trained.values()) * local
        if config.engine.offload == "nvme":
            host["gradients on their way to NVMe"] = 4 * sum(trained.values()) * local
        if config.ema is not None and config.ema.device == "cpu":
            host["average of the student"] = 4 * trained["student"] * local
        if config.run.checkpoint_every and config.engine.offload != "nvme":
            copy = sum((4 + STATE_BYTES[config.optimizer(role).state]) * size for role, size in trained.items())
            copy += 4 * trained["student"] * (config.ema is not None)
            host["checkpoint: a copy of masters and moments"] = copy * local
        width = student.dtype_bytes
        if not config.model.random_init:
            host["start: a network's weights in each process"] = width * student.parameters * local
        host["export: the student's weights"] = width * (student.trained if self._lora else student.parameters)
        return host
