"""What one settled configuration takes: memory of every phase of a cycle, bytes sent, and about how long.

Sizes of weights, gradients and optimizer state follow from the number of parameters P, of processes N and the settings;
what passes allocate is measured on the meta device (footprint.py). A phase's total is what there is at its fullest moment:

    shards      of weights, float32 masters and moments: P / N each, of every role (ZeRO stage 3)
    gathered    the networks that are whole, by engine.residency; on one process weights are whole where they are
    gradients   the role's shard, from the backward pass to the update's end, and those that autograd holds. Of the critic a
                block's at a time; of the student, whose weights are used in several steps of one chain, all of them (a
                gradient is complete after its weight's last use), and the first step's besides, which wait for the chain's
                (`Network.backward(more=True)`)
    activations walked through block by block: before a block's backward pass there is what all blocks before it have kept

Times are estimates from rates that were measured elsewhere, good to rank settings and for nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch

from dpdmd.config import Config
from dpdmd.engine.optimizer import STATE_BYTES
from dpdmd.engine.residency import GROUP
from dpdmd.planner.footprint import Block, Footprint, Pass, Work, measure

GIB = 2**30
ROLES = ("teacher", "student", "critic")
GPUS_A_NODE = 8

# Beside what torch allocates: CUDA's context, the kernels' code and NCCL (H100: 1.68 GiB), NCCL's buffers where there are
# several processes; and a share for what the allocator holds without use (H100: 77.1 GiB reserved of 73.7 allocated, the
# graphs' among them) and for what this planner does not see.
CONTEXT, NCCL, MARGIN = 1.7 * GIB, 1.0 * GIB, 0.04
WORKSPACE = 0.1 * GIB  # cuBLAS's, latents and losses
# DeepSpeed's own reduction gathers so many elements before it sends them, and flattens them. Under offload each role has
# a bucket of this size from the start, however small the network.
DEEPSPEED_BUCKET = 5e8

# A second's work of an H100 or H200 (benchmarks/results/transformer.json, docs/transformer.md): bfloat16 products 600 to
# 720 TFLOP/s; attention at D = 64 and D = 128, forward and backward; fused memory-bound kernels' share of 3 TB/s.
GEMM, FP8_GEMM = 660e12, 1200e12
ATTENTION = {64: (480e12, 380e12), 128: (590e12, 500e12)}
MEMORY = 2.6e12
# The best rates that any implementation was measured at on an H200: bfloat16 products, attention, copies.
BEST_GEMM, BEST_ATTENTION, BEST_MEMORY = 764e12, {64: (480e12, 434e12), 128: (604e12, 525e12)}, 4.2e12
HOST = 3e-3, 6e-3  # a block's forward and its backward pass are launched in: what bounds small batches
NVLINK, NETWORK = 300e9, 50e9  # bytes a second and GPU that a gather receives, in a machine and between machines
# Of a transfer beside a pass, so much of its time is lost to the pass: both want the GPU's memory and units.
BESIDE = 0.3
# Pinned bytes each way; parameters of a process with 16 cores; bytes a second of a machine's disk (assumed).
PCIE, CPU_ADAMW, NVME = 25e9, 1.15e9, 5e9

ALIKE = 0.015  # estimates that differ by less are the same: what is simpler is taken

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


@dataclass(frozen=True)
class Plan:
    """One configuration without `auto` on num_gpus GPUs of gpu_memory bytes (None: a CPU, of which nothing is judged).

    host: bytes of a machine's memory by what they are for; traffic: bytes a cycle that a GPU receives in gathers and sends
    in reductions; seconds: about, a cycle by what they go to; floor: seconds that any implementation needs.
    """

    config: Config
    num_gpus: int
    gpu_memory: float | None
    phases: list[Phase] = field(default_factory=list)
    host: dict[str, float] = field(default_factory=dict)
    traffic: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    floor: dict[str, float] = field(default_factory=dict)

    @cached_property
    def fullest(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def peak(self) -> float:
        """Bytes that torch will have allocated at most."""
        return max((phase.allocated for phase in self.phases), default=0.0)

    @property
    def needed(self) -> float:
        """Bytes of a GPU, context and reserve included."""
        return self.fullest.total

    @property
    def fits(self) -> bool:
        """With a reserve."""
        return self.gpu_memory is None or self.needed <= self.gpu_memory

    @property
    def possible(self) -> bool:
        """Without one."""
        context = CONTEXT + (NCCL if self.num_gpus > 1 else 0.0)
        return self.gpu_memory is None or self.peak + context <= self.gpu_memory

    @property
    def cycle(self) -> float:
        return sum(self.seconds.values())

    @property
    def seconds_an_image(self) -> float:
        engine = self.config.engine
        updates = self.config.distill.critic_updates + 1
        return self.cycle / (engine.batch_size * engine.accumulation * updates * self.num_gpus)

    @property
    def choice(self) -> str:
        """What `auto` and null have become, in the settings' words."""
        engine = self.config.engine
        line = f"engine.residency={engine.residency} engine.checkpointing={engine.checkpointing}"
        if engine.checkpointing != "none":
            kept = engine.kept_passes
            line += f" engine.kept_passes.student={kept.student} engine.kept_passes.critic={kept.critic}"
        return line

    def summary(self) -> str:
        """One line for a run's beginning."""
        if self.gpu_memory is None:
            return f"plan: {self.choice}"
        tight = "" if self.fits else " (tight: less than the usual reserve is left)"
        return (
            f"plan: {self.choice}: {gib(self.peak)} GiB allocated at the peak ({self.fullest.name}), {gib(self.needed)} "
            f"of {gib(self.gpu_memory)} GiB with context and reserve{tight}; a cycle takes about {self.cycle:.1f} s"
        )


class Footprints:
    """Those of a backbone's networks, each measured once.

    Raises what the networks' classes raise for an architecture that cannot be built.
    """

    def __init__(self, backbone):
        self.backbone = backbone
        self._measured: dict[tuple, tuple[int, dict[int, Footprint]]] = {}

    def of(self, config: Config, role: str, batch: int) -> Footprint:
        """At `batch`. It is measured at the first batch that is asked for; other batches are in proportion."""
        model, lora = config.model, config.lora
        dtype = torch.float32 if model.dtype == "float32" else torch.bfloat16
        architecture = repr(self.backbone.transformer_config(role))
        key = architecture, dtype, model.fuse, model.fp8, None if lora is None else lora.model_dump_json()
        if key not in self._measured:
            footprint = measure(
                *(self.backbone, role, batch, dtype), fused=model.fuse, fp8=model.fp8 != "off", lora=lora
            )
            self._measured[key] = batch, {batch: footprint}
        first, by_batch = self._measured[key]
        if batch not in by_batch:
            by_batch[batch] = by_batch[first].scaled(batch / first)
        return by_batch[batch]

    def at_work(self, config: Config) -> dict[str, Footprint]:
        """Each role's, at the batch that its passes have: the teacher's is twice as large where it is guided."""
        batch, guided = config.engine.batch_size, config.distill.guidance_scale != 1.0
        batches = {"student": batch, "critic": batch, "teacher": 2 * batch if guided else batch}
        return {role: self.of(config, role, each) for role, each in batches.items()}


def plan_of(config: Config, footprints: Footprints, num_gpus: int, gpu_memory: float | None) -> Plan:
    """Of a configuration without `auto`."""
    memory = Memory(config, footprints, num_gpus)
    return Plan(
        *(config, num_gpus, gpu_memory),
        [*memory.critic_phases(), *memory.student_phases(), *memory.other_phases()],
        memory.host(),
        traffic(config, footprints, num_gpus),
        seconds(config, footprints, num_gpus),
        floor(config, footprints, num_gpus),
    )


def steps_with_graph(config: Config) -> tuple[int, int]:
    """The student's: of the first step alone (1 or 0), and of the chain that DMD trains."""
    distill = config.distill
    first = 1 if distill.method == "dpdmd" else 0
    rest = distill.student_steps - first
    return first, rest if distill.rollout_gradient == "full" else 1


@dataclass(frozen=True)
class Passes:
    """Of a cycle. rollouts: the student's without gradient; student, critic: those with a backward pass."""

    rollouts: int
    teacher: int
    score: int
    critic: int
    student: int

    @classmethod
    def of(cls, config: Config) -> Passes:
        distill, times = config.distill, config.engine.accumulation
        first, rest = steps_with_graph(config)
        steps = distill.student_steps
        return cls(
            rollouts=times * (distill.critic_updates * steps + steps - first - rest),
            teacher=times * ((distill.anchor if first else 0) + 1),
            score=times,
            critic=times * distill.critic_updates,
            student=times * (first + rest),
        )


def in_parts(config: Config) -> bool:
    """Whether the first step is differentiated before the others run (`Network.differentiates_in_parts`)."""
    return reduced_here(config, "student") and config.distill.method == "dpdmd" and config.distill.detach


def reduced_here(config: Config, role: str) -> bool:
    """Whether gradients are reduced in residency.py; else DeepSpeed does it."""
    return config.engine.offload == "none" and getattr(config, f"{role}_optimizer").name in ("auto", "fused")


def residency_of(config: Config, role: str) -> str:
    """A base that roles share is never released as a whole; a teacher kept in FP8 is, after each of its phases."""
    policy = config.engine.residency
    if config.lora is not None and role == "teacher":
        return "block" if policy == "block" else "whole"
    float8 = role == "teacher" and config.model.teacher_storage == "float8"
    return "phase" if float8 and policy == "whole" else policy


def replayed(config: Config, role: str, num_gpus: int) -> bool:
    """Whether passes without gradient become CUDA graphs: where the weights stay whole."""
    engine = config.engine
    if role == "teacher" and config.model.teacher_storage == "float8":
        return False
    of_teacher = role == "teacher" or config.lora is not None  # adapters run on the base
    stays = num_gpus == 1 or residency_of(config, "teacher" if of_teacher else role) == "whole"
    return engine.cuda_graphs and (stays or (of_teacher and engine.zero.teacher == 0))


def stored_bytes(config: Config, role: str, width: int) -> float:
    """Of a weight, where it is kept and as it is sent."""
    float8 = role == "teacher" and config.model.teacher_storage == "float8"
    return 1 + 4 / GROUP if float8 else width


def block_passes(config: Config, footprints: Footprints, role: str) -> int:
    """Of the longest forward chain with a graph."""
    first, rest = steps_with_graph(config)
    steps = 1 if role == "critic" else max(first, rest) if in_parts(config) else first + rest
    return steps * len(footprints.of(config, role, config.engine.batch_size).blocks)


@dataclass
class Chain:
    """A forward chain of a role's network with a graph: `steps` passes one after the other, and its backward pass."""

    footprint: Footprint
    steps: int
    how: str  # engine.checkpointing
    keep: int  # block passes, the first ones, that keep everything

    @cached_property
    def passes(self) -> list[tuple[Block, Pass]]:
        blocks = self.footprint.blocks * self.steps
        return [(block, block.passes["none" if i < self.keep else self.how]) for i, block in enumerate(blocks)]

    @property
    def recomputed(self) -> int:
        return 0 if self.how == "none" else max(0, self.steps * len(self.footprint.blocks) - self.keep)

    @cached_property
    def kept(self) -> float:
        """Bytes between forward and backward pass."""
        return sum(each.kept for _, each in self.passes) + self.steps * self.footprint.outer_kept

    def backward(self, *, held: bool, earlier: bool, shard: float = 0.0) -> tuple[float, float]:
        """(activations, gradients) at the fullest moment of the backward pass.

        held: the gradients stay with the parameters; earlier: some are there already, which these are added to. A block's
        own gradients of this pass count in full while its backward pass runs. shard: what the first gradients that are
        complete are reduced to, and all others after them.
        """
        fp = self.footprint
        width, count = fp.dtype_bytes, len(fp.blocks)
        passes = self.passes
        live = self.kept
        gradients = width * fp.trained if earlier else 0
        best = (live, gradients)
        for step in reversed(range(self.steps)):
            first_seen, last_use = step == self.steps - 1, step == 0
            if first_seen and (held or not last_use):
                gradients += width * fp.outer_trained
            for index in reversed(range(count)):
                block, each = passes[step * count + index]
                own = width * block.trained
                now = live - each.kept + each.backward, gradients + own
                best = max(best, now, key=sum)
                live -= each.kept
                if first_seen and (held or not last_use):
                    gradients += own
                if last_use and not held:
                    gradients += shard - own * ((self.steps > 1) + earlier)
                    shard = 0.0
        return best


class Memory:
    """The phases of one configuration without `auto`."""

    def __init__(self, config: Config, footprints: Footprints, num_gpus: int):
        self._config, self._footprints, self._gpus = config, footprints, num_gpus
        self._engine = config.engine
        self._lora = config.lora is not None
        self._at = footprints.at_work(config)
        self._state = self._persistent()
        # CUDA graphs keep what a pass makes on the way, once for all of them.
        kept = [fp.no_grad for role, fp in self._at.items() if replayed(config, role, num_gpus)]
        self._graphs = max(kept, default=0.0)

    # What is there all the time

    def _sharded(self, role: str) -> bool:
        return role != "teacher" or self._engine.zero.teacher == 3

    def _share(self, role: str) -> float:
        """The part of a role that a process has."""
        return 1 / self._gpus if self._sharded(role) else 1.0

    def _persistent(self) -> dict[str, float]:
        config = self._config
        parts = dict.fromkeys(PARTS, 0.0)
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
            parts["weights"] += stored_bytes(config, role, width) * own * self._share(role) + fp.buffers + fp.fp8_bytes
        elif self._lora:
            parts["weights"] += width * fp.trained * self._share(role)
        if role != "teacher" and self._engine.offload == "none":
            parts["gradients"] = 0.0 if reduced_here(config, role) else self._gradient(role)  # which DeepSpeed keeps
            state = (0 if width == 4 else 4) + STATE_BYTES[getattr(config, f"{role}_optimizer").state]
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
            policy, fp = residency_of(self._config, role), self._at[role]
            if not self._sharded(role) or (role not in roles and policy != "whole"):
                continue
            if self._gpus == 1:  # views of the shard, where it is not in another format
                total += fp.parameters if stored_bytes(self._config, role, fp.dtype_bytes) != fp.dtype_bytes else 0
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
        return self._block_bytes(role) if self._gpus > 1 and self._sharded(role) else 0.0

    def _reducing(self, role: str) -> float:
        """Gradients on their way: up to three units, or DeepSpeed's bucket, where it is not always there, and its copy."""
        fp = self._at[role]
        bucket = fp.dtype_bytes * min(fp.trained, DEEPSPEED_BUCKET)
        if self._engine.offload != "none":
            return bucket if self._gpus > 1 else 0.0
        if not reduced_here(self._config, role):
            return 2 * bucket
        largest = max(block.trained for block in fp.blocks)
        return 3 * fp.dtype_bytes * largest if self._gpus > 1 else 0.0

    def _begun(self, role: str) -> float:
        """The shard of an update's gradient that earlier batches of it have left."""
        return self._gradient(role) if self._engine.accumulation > 1 and reduced_here(self._config, role) else 0.0

    def _backward(self, role: str, chain: Chain, earlier: bool = False) -> dict[str, float]:
        """Activations and gradients of the backward pass that ends with their reduction."""
        begun = self._begun(role)
        shard = self._gradient(role) if reduced_here(self._config, role) and not begun else 0.0
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
        gradients = self._gradient(role) if reduced_here(self._config, role) else 0.0
        return self._phase(f"{role} update, optimizer", gathered=self._whole(), gradients=gradients)

    def student_phases(self) -> list[Phase]:
        first_steps, rest = steps_with_graph(self._config)
        parts = in_parts(self._config)
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
            states = {role: STATE_BYTES[getattr(config, f"{role}_optimizer").state] for role in trained}
            copy = sum((4 + states[role]) * size for role, size in trained.items())
            copy += 4 * trained["student"] * (config.ema is not None)
            host["checkpoint: a copy of masters and moments"] = copy * local
        width = student.dtype_bytes
        if not config.model.random_init:
            host["start: a network's weights in each process"] = width * student.parameters * local
        host["export: the student's weights"] = width * (student.trained if self._lora else student.parameters)
        return host


# What is sent


def gathers(config: Config) -> dict[str, dict[str, float]]:
    """How often a cycle gathers each role's weights: "blocks" and what is "outer" to them."""
    distill, engine = config.distill, config.engine
    critic_updates, times = distill.critic_updates, engine.accumulation
    phases = {
        "student": critic_updates * times + times,
        "critic": critic_updates * times + times,
        "teacher": times * (2 if distill.method == "dpdmd" else 1),
    }
    whole = {"student": 1, "critic": critic_updates, "teacher": 0}
    passes = Passes.of(config)
    each = {  # a backward pass gathers as a forward pass does
        "student": passes.rollouts + 2 * passes.student,
        "critic": 2 * passes.critic + passes.score,
        "teacher": passes.teacher,
    }
    counts = {"whole": (whole, whole), "phase": (phases, phases), "block": (each, phases)}
    chosen = {role: counts[residency_of(config, role)] for role in ROLES}
    return {role: {"blocks": blocks[role], "outer": outer[role]} for role, (blocks, outer) in chosen.items()}


def traffic(config: Config, footprints: Footprints, num_gpus: int) -> dict[str, float]:
    """Bytes a cycle that one GPU receives in gathers and sends in reductions."""
    counts = gathers(config)
    others = (num_gpus - 1) / num_gpus
    gathered = reduced = 0.0
    updates = {"critic": config.distill.critic_updates, "student": 1}
    for role in ROLES:
        fp, each = footprints.of(config, role, config.engine.batch_size), counts[role]
        blocks, outer = sum(block.parameters for block in fp.blocks), fp.outer_parameters
        if config.lora is not None:
            if role != "teacher":
                blocks, outer = 0, fp.trained
            elif config.engine.residency == "block":  # which all roles' passes gather; what is outside stays
                blocks = (blocks - fp.trained) * sum(of_role["blocks"] for of_role in counts.values()) / each["blocks"]
                outer = 0
        if role != "teacher" or config.engine.zero.teacher == 3:
            stored = stored_bytes(config, role, fp.dtype_bytes)
            gathered += stored * others * (blocks * each["blocks"] + outer * each["outer"])
        if role in updates:
            reduced += fp.dtype_bytes * others * fp.trained * updates[role] * config.engine.accumulation
    return {"gathered": gathered, "reduced": reduced}


# How long, about


def seconds(config: Config, footprints: Footprints, num_gpus: int) -> dict[str, float]:
    """A cycle by what its time goes to."""
    engine, passes, at = config.engine, Passes.of(config), footprints.at_work(config)
    rates = ATTENTION[_kind_of_attention(footprints)]
    first, rest = steps_with_graph(config)
    lengths = [first, rest] if in_parts(config) else [first + rest]
    of_critic = Chain(at["critic"], 1, engine.checkpointing, engine.kept_passes.critic or 0)
    of_student = [
        Chain(at["student"], steps, engine.checkpointing, engine.kept_passes.student or 0) for steps in lengths if steps
    ]

    def no_grad(role: str) -> float:
        fp = at[role]
        fp8 = fp.fp8_bytes / fp.parameters
        on_gpu = _time(fp.forward, rates[0]) - fp.forward.gemm * fp8 * (1 / GEMM - 1 / FP8_GEMM)
        return on_gpu if replayed(config, role, num_gpus) else max(on_gpu, HOST[0] * len(fp.blocks))

    def forward(fp: Footprint) -> float:
        return max(_time(fp.forward, rates[0]), HOST[0] * len(fp.blocks))

    def backward(chain: Chain) -> float:
        blocks = chain.footprint.blocks
        once = sum(_time(block.backward, rates[1]) for block in blocks)
        again = sum(
            _time(block.forward if chain.how == "full" else Work(block.forward.gemm, 0, block.forward.bytes), rates[0])
            for block in blocks
        )
        launched = HOST[1] * chain.steps * len(blocks) + HOST[0] * chain.recomputed
        return max(chain.steps * once + again * chain.recomputed / len(blocks), launched)

    result = {
        "student's rollouts": passes.rollouts * no_grad("student"),
        "critic's passes": passes.critic * (forward(at["critic"]) + backward(of_critic)),
        "teacher's passes": passes.teacher * no_grad("teacher"),
        "student's passes": passes.student * forward(at["student"])
        + engine.accumulation * sum(backward(chain) for chain in of_student),
        "critic's score": passes.score * no_grad("critic"),
        "optimizers": _update_seconds(config, footprints, num_gpus),
    }
    if num_gpus > 1:
        rate = NVLINK if num_gpus <= GPUS_A_NODE else NETWORK
        sent = traffic(config, footprints, num_gpus)
        everything = sum(result.values())
        differentiated = 0.7 * (result["critic's passes"] + result["student's passes"])
        gathering = sent["gathered"] / rate
        if engine.residency == "block":
            gathering = _beside(gathering, everything)
        result["communication"] = gathering + _beside(sent["reduced"] / rate, differentiated)
    return result


def floor(config: Config, footprints: Footprints, num_gpus: int) -> dict[str, float]:
    """What a cycle in bfloat16 takes at least: each product and attention once, and one read and write of the optimizer's
    state, at the best rates known of them."""
    passes, at = Passes.of(config), footprints.at_work(config)
    backwards = [(passes.critic, at["critic"]), (passes.student, at["student"])]
    forwards = [
        *backwards,
        *((passes.rollouts, at["student"]), (passes.teacher, at["teacher"]), (passes.score, at["critic"])),
    ]
    once = sum((fp.forward * count for count, fp in forwards), Work())
    again = sum((block.backward * count for count, fp in backwards for block in fp.blocks), Work())
    rates = BEST_ATTENTION[_kind_of_attention(footprints)]
    state = _update_bytes(config, at["student"], "student")
    state += config.distill.critic_updates * _update_bytes(config, at["critic"], "critic")
    return {
        "products": (once.gemm + again.gemm) / BEST_GEMM,
        "attention": once.attention / rates[0] + again.attention / rates[1],
        "optimizers": state / num_gpus / BEST_MEMORY,
    }


def _beside(transfer: float, passes: float) -> float:
    """What a transfer costs that runs beside passes."""
    return max(BESIDE * transfer, transfer - passes)


def _time(work: Work, attention_rate: float) -> float:
    return work.gemm / GEMM + work.attention / attention_rate + work.bytes / MEMORY


def _kind_of_attention(footprints: Footprints) -> int:
    """The head dimension whose rates are taken."""
    return 64 if max(head_dim for head_dim, _ in footprints.backbone.attention_shapes()) <= 64 else 128


def _update_bytes(config: Config, fp: Footprint, role: str) -> float:
    """Read and written by an update on one GPU: gradient and weight in their width, master and moments twice."""
    moments = STATE_BYTES[getattr(config, f"{role}_optimizer").state]
    return fp.trained * (2 * fp.dtype_bytes + 8 + 2 * moments)


def _update_seconds(config: Config, footprints: Footprints, num_gpus: int) -> float:
    total = 0.0
    local = min(num_gpus, GPUS_A_NODE)
    for role, count in (("student", 1), ("critic", config.distill.critic_updates)):
        fp = footprints.of(config, role, config.engine.batch_size)
        trained = fp.trained / num_gpus
        width = fp.dtype_bytes
        if config.engine.offload == "none":
            each = _update_bytes(config, fp, role) / num_gpus / MEMORY
        else:
            each = trained * (2 * width / PCIE + 1 / CPU_ADAMW)
            if config.engine.offload == "nvme":
                each += 2 * 12 * trained * local / NVME
        total += count * each
    if config.ema is not None:
        fp = footprints.of(config, "student", config.engine.batch_size)
        total += fp.trained / num_gpus * 8 / (MEMORY if config.ema.device == "same" else PCIE)
    return total


def gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.1f}"
