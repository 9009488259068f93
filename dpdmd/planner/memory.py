"""Memory of every phase of a cycle.

Sizes of weights, gradients and optimizer state follow from the number of parameters P, of processes N and the settings;
what passes allocate is measured on the meta device (footprint.py). A phase's total is what there is at its fullest moment:

    shards      of weights, float32 masters and moments: P / N each, of every role (ZeRO stage 3)
    gathered    the networks that are whole, by engine.residency; on one process weights are whole where they are
    gradients   the role's shard, from the backward pass to the update's end, and those that autograd holds. Of the critic a
                block's at a time; of the student, whose weights are used in several steps of one chain, all of them (a
                gradient is complete after its weight's last use), and the first step's besides, which wait for the chain's
                (`Residency.in_parts`)
    activations walked through block by block: before a block's backward pass there is what all blocks before it have kept
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

# Beside what torch allocates: CUDA's context, the kernels' code and NCCL (H100: 1.68 GiB), NCCL's buffers where there are
# several processes; and a share for what the allocator holds without use (H100: 77.1 GiB reserved of 73.7 allocated, the
# graphs' among them) and for what this planner does not see.
CONTEXT, NCCL, MARGIN = 1.7 * GIB, 1.0 * GIB, 0.04
WORKSPACE = 0.1 * GIB  # cuBLAS's, latents and losses
# DeepSpeed's own reduction gathers so many elements before it sends them, and flattens them. Under offload each role has
# a bucket of this size from the start, however small the network.
DEEPSPEED_BUCKET = 5e8

PARTS = ("weights", "gathered", "gradients", "optimizer", "ema", "activations", "buffers", "reserve")


@dataclass(frozen=True)
class Phase:
    """What there is on a GPU at the fullest moment of a phase, in bytes by part."""

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
    """Of a weight, where it is kept and as it is sent."""
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
        # CUDA graphs keep what a pass makes on the way, once for all of them.
        kept = [fp.no_grad for role, fp in self._at.items() if self._residencies[role].replayed]
        self._graphs = max(kept, default=0.0)

    # What is there all the time

    def _share(self, role: str) -> float:
        """The part of a role that a process has."""
        return 1 / self._gpus if self._residencies[role].sharded else 1.0

    def _persistent(self) -> dict[str, float]:
        config = self._config
        parts: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        for role in ROLES:
            for part, size in self._of_role(role).items():
                parts[part] += size
        if config.ema is not None and config.ema.device == "same":
            parts["ema"] += 4 * self._at["student"].trained * self._share("student")
        if config.prompts.encoding == "stream" and not config.model.random_init:
            parts["weights"] += self._at["teacher"].dtype_bytes * self._footprints.backbone.family.text_parameters
        parts["buffers"] += WORKSPACE + self._conditions()
        return parts

    def _of_role(self, role: str) -> dict[str, float]:
        fp, config = self._at[role], self._config
        width = fp.dtype_bytes
        parts = {"weights": 0.0}
        if role == "teacher" or not self._lora:
            own = fp.parameters - fp.trained if self._lora else fp.parameters
            parts["weights"] += (
                stored_bytes(self._residencies[role], width) * own * self._share(role) + fp.buffers + fp.fp8_bytes
            )
        elif self._lora:
            parts["weights"] += width * fp.trained * self._share(role)
        if role != "teacher" and self._engine.offload == "none":
            parts["gradients"] = (
                0.0 if self._residencies[role].reduced else self._gradient(role)
            )  # which DeepSpeed keeps
            state = (0 if width == 4 else 4) + STATE_BYTES[config.optimizer(role).state]
            parts["optimizer"] = state * fp.trained * self._share(role)
        elif role != "teacher":
            parts["buffers"] = width * DEEPSPEED_BUCKET
        return parts

    def _gradient(self, role: str) -> float:
        """Bytes of a process's shard of it."""
        width = 4 if self._engine.accumulation > 1 else self._at[role].dtype_bytes
        return width * self._at[role].trained * self._share(role)

    def _conditions(self) -> float:
        """Embeddings of a batch, conditional and not, apart and side by side."""
        elements = sum(torch.Size(shape).numel() for shape in self._footprints.backbone.text_shapes.values())
        return 4 * self._engine.batch_size * elements * self._at["teacher"].dtype_bytes

    # What a phase adds

    def _whole(self, *roles: str) -> float:
        """Gathered weights while the last of the roles is at work and the others have a graph or wait to be released."""
        if self._lora:
            roles = ("teacher", *(role for role in roles if role != "teacher"))  # the base is there for all of them
        total = 0.0
        for role in ROLES:
            policy, fp = self._residencies[role].policy, self._at[role]
            if not self._residencies[role].sharded or (role not in roles and policy != "whole"):
                continue
            if self._gpus == 1:  # views of the shard, where it is not in another format
                total += fp.parameters if stored_bytes(self._residencies[role], fp.dtype_bytes) != fp.dtype_bytes else 0
            elif self._lora and role != "teacher":
                total += fp.trained
            elif policy == "block":
                total += fp.outer_parameters + (2 * fp.largest_block if self._lora or role == roles[-1] else 0)
            else:
                total += fp.parameters - (fp.trained if self._lora else 0)
        return self._at["teacher"].dtype_bytes * total

    def _block_bytes(self, role: str) -> float:
        return self._at[role].dtype_bytes * self._at[role].largest_block

    def _receiving(self, role: str) -> float:
        """A unit as it came, beside the copy in the parameters' order."""
        return self._block_bytes(role) if self._gpus > 1 and self._residencies[role].sharded else 0.0

    def _reducing(self, role: str) -> float:
        """Gradients on their way: up to three units, or DeepSpeed's bucket, where it is not always there, and its copy."""
        fp = self._at[role]
        bucket = fp.dtype_bytes * min(fp.trained, DEEPSPEED_BUCKET)
        if self._engine.offload != "none":
            return bucket if self._gpus > 1 else 0.0
        if not self._residencies[role].reduced:
            return 2 * bucket
        largest = max(block.trained for block in fp.blocks)
        return 3 * fp.dtype_bytes * largest if self._gpus > 1 else 0.0

    def _begun(self, role: str) -> float:
        """The shard of an update's gradient that earlier batches of it have left."""
        return self._gradient(role) if self._engine.accumulation > 1 and self._residencies[role].reduced else 0.0

    def _backward(self, role: str, chain: Chain, earlier: bool = False) -> dict[str, float]:
        """Activations and gradients of the backward pass that ends with their reduction."""
        begun = self._begun(role)
        shard = self._gradient(role) if self._residencies[role].reduced and not begun else 0.0
        activations, gradients = chain.backward(held=False, earlier=earlier, shard=shard)
        return {"activations": activations, "gradients": begun + gradients}

    def _phase(self, name: str, **parts: float) -> Phase:
        total = {part: self._state[part] + parts.get(part, 0.0) for part in PARTS}
        total["reserve"] = CONTEXT + (NCCL if self._gpus > 1 else 0.0) + MARGIN * sum(total.values()) + self._graphs
        return Phase(name, total)

    def _chain(self, role: str, steps: int) -> Chain:
        keep = getattr(self._engine.kept_passes, role) or 0
        return Chain(self._at[role], steps, self._engine.checkpointing, keep)

    def critic_phases(self) -> list[Phase]:
        chain = self._chain("critic", 1)
        return [
            self._phase(
                "critic update, student's rollout",
                gathered=self._whole("student"),
                activations=self._at["student"].no_grad,
                gradients=self._begun("critic"),
                buffers=self._receiving("student"),
            ),
            self._phase(
                "critic update, forward and backward",
                **self._backward("critic", chain),
                gathered=self._whole("critic"),
                buffers=self._reducing("critic"),
            ),
            self._optimizer("critic"),
        ]

    def _optimizer(self, role: str) -> Phase:
        gradients = self._gradient(role) if self._residencies[role].reduced else 0.0
        return self._phase(f"{role} update, optimizer", gathered=self._whole(), gradients=gradients)

    def student_phases(self) -> list[Phase]:
        first_steps, rest = steps_with_graph(self._config)
        parts = self._residencies["student"].in_parts
        teacher, critic = self._at["teacher"].no_grad, self._at["critic"].no_grad
        held = self._at["student"].dtype_bytes * self._at["student"].trained if parts else 0.0
        begun = self._begun("student")
        first = self._chain("student", first_steps)
        chain = self._chain("student", rest if parts else first_steps + rest)
        phases = []
        if first_steps:
            phases.append(
                self._phase(
                    "student update, teacher's rollout",
                    gathered=self._whole("teacher"),
                    activations=teacher,
                    gradients=begun,
                    buffers=self._receiving("teacher"),
                )
            )
        if parts:
            activations, gradients = first.backward(held=True, earlier=False)
            phases.append(
                self._phase(
                    "student update, first step's backward",
                    gathered=self._whole("student"),
                    activations=activations,
                    gradients=begun + gradients,
                )
            )
        score = max(
            (teacher, self._whole("student", "teacher"), self._receiving("teacher")),
            (critic, self._whole("student", "critic"), self._receiving("critic")),
            key=sum,
        )
        phases.append(
            self._phase(
                "student update, chain and score",
                gathered=score[1],
                activations=chain.kept + score[0],
                gradients=begun + held,
                buffers=score[2],
            )
        )
        phases.append(
            self._phase(
                "student update, chain's backward",
                **self._backward("student", chain, earlier=parts),
                gathered=self._whole("student"),
                buffers=self._reducing("student"),
            )
        )
        return [*phases, self._optimizer("student")]

    def other_phases(self) -> list[Phase]:
        """Starting, saving and exporting."""
        student, critic = self._at["student"], self._at["critic"]
        # A trained network comes whole to the GPU, is cut into pieces that are put side by side, and gets a buffer for
        # gradients and masters, with zeros of the masters' size for a moment. The critic is the last.
        arriving = critic.dtype_bytes * critic.parameters
        if not self._lora:
            arriving += (2 * critic.dtype_bytes + 4) * critic.trained * self._share("critic")
            arriving += self._gradient("critic") if self._engine.offload == "none" else 0.0
            arriving -= sum(self._of_role("critic").values())  # what is not there before it has come
        one = student.dtype_bytes * student.largest if self._gpus > 1 else 0.0
        return [
            self._phase("start, the networks taken over", activations=max(0.0, arriving)),
            self._phase("checkpoint", gathered=self._whole()),
            self._phase("export, a tensor at a time", gathered=self._whole() + one),
        ]

    def host(self) -> dict[str, float]:
        """Bytes of a machine's memory."""
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
            states = {role: STATE_BYTES[config.optimizer(role).state] for role in trained}
            copy = sum((4 + states[role]) * size for role, size in trained.items())
            copy += 4 * trained["student"] * (config.ema is not None)
            host["checkpoint: a copy of masters and moments"] = copy * local
        width = student.dtype_bytes
        if not config.model.random_init:
            host["start: a network's weights in each process"] = width * student.parameters * local
        host["export: the student's weights"] = width * (student.trained if self._lora else student.parameters)
        return host
