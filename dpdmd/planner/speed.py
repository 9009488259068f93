"""Bytes that a cycle sends, and an estimate of its time, from rates measured elsewhere: good only to rank settings."""

from __future__ import annotations

from dpdmd.config import ROLES, Config
from dpdmd.engine.optimizer import STATE_BYTES
from dpdmd.planner.cycle import Chain, Passes, chain_lengths
from dpdmd.planner.footprint import Footprint, Footprints, Work
from dpdmd.planner.memory import GPUS_A_NODE, stored_bytes
from dpdmd.planner.residency import residencies

# Rates of an H100 or H200 (benchmarks/results/transformer.json, docs/transformer.md): bfloat16 matmuls 600 to 720 TFLOP/s;
# attention at D = 64 and D = 128, forward and backward; fused memory-bound kernels' share of 3 TB/s.
GEMM, FP8_GEMM = 660e12, 1200e12
ATTENTION = {64: (480e12, 380e12), 128: (590e12, 500e12)}
MEMORY = 2.6e12
# The best measured rates of any implementation on an H200: bfloat16 matmuls, attention, copies.
BEST_GEMM, BEST_ATTENTION, BEST_MEMORY = 764e12, {64: (480e12, 434e12), 128: (604e12, 525e12)}, 4.2e12
HOST = 3e-3, 6e-3  # seconds to launch a block's forward and backward pass: they bound small batches
NVLINK, NETWORK = 300e9, 50e9  # bytes a second and GPU that a gather receives, in a machine and between machines
BESIDE = 0.3  # share of a transfer's time by which it slows the passes beside it: both use the GPU's memory and units
# Pinned bytes each way; parameters of a process with 16 cores; bytes a second of a machine's disk (assumed).
PCIE, CPU_ADAMW, NVME = 25e9, 1.15e9, 5e9


def gathers(config: Config, num_gpus: int) -> dict[str, dict[str, float]]:
    """How often a cycle gathers each role's weights: those of its "blocks", and the "outer" ones."""
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
    chosen = {role: counts[each.policy] for role, each in residencies(config, num_gpus).items()}
    return {role: {"blocks": blocks[role], "outer": outer[role]} for role, (blocks, outer) in chosen.items()}


def traffic(config: Config, footprints: Footprints, num_gpus: int) -> dict[str, float]:
    """Bytes a cycle that one GPU receives in gathers and sends in reductions."""
    counts, chosen = gathers(config, num_gpus), residencies(config, num_gpus)
    others, gathered, reduced = (num_gpus - 1) / num_gpus, 0.0, 0.0
    updates = {"critic": config.distill.critic_updates, "student": 1}
    for role in ROLES:
        fp, each = footprints.of(config, role, config.engine.batch_size), counts[role]
        blocks, outer = sum(block.parameters for block in fp.blocks), fp.outer_parameters
        if config.lora is not None:
            if role != "teacher":
                blocks, outer = 0, fp.trained
            elif chosen[role].policy == "block":  # all roles' passes gather the blocks; the rest stays whole
                blocks = (blocks - fp.trained) * sum(of_role["blocks"] for of_role in counts.values()) / each["blocks"]
                outer = 0
        if chosen[role].sharded:
            stored = stored_bytes(chosen[role], fp.dtype_bytes)
            gathered += stored * others * (blocks * each["blocks"] + outer * each["outer"])
        if role in updates:
            reduced += fp.dtype_bytes * others * fp.trained * updates[role] * config.engine.accumulation
    return {"gathered": gathered, "reduced": reduced}


def seconds(config: Config, footprints: Footprints, num_gpus: int) -> dict[str, float]:
    """Estimated seconds of a cycle, by use."""
    engine, passes, at = config.engine, Passes.of(config), footprints.at_work(config)
    rates = ATTENTION[_kind_of_attention(footprints)]
    chosen = residencies(config, num_gpus)
    lengths = chain_lengths(config, chosen["student"].in_parts)
    of_critic = Chain(at["critic"], 1, engine.checkpointing, engine.kept_passes.critic or 0)
    kept = engine.kept_passes.student or 0
    of_student = [Chain(at["student"], steps, engine.checkpointing, kept) for steps in lengths]

    def no_grad(role: str) -> float:
        fp = at[role]
        fp8 = fp.fp8_bytes / fp.parameters
        on_gpu = _time(fp.forward, rates[0]) - fp.forward.gemm * fp8 * (1 / GEMM - 1 / FP8_GEMM)
        return on_gpu if chosen[role].replayed else max(on_gpu, HOST[0] * len(fp.blocks))

    def forward(fp: Footprint) -> float:
        return max(_time(fp.forward, rates[0]), HOST[0] * len(fp.blocks))

    def backward(chain: Chain) -> float:
        blocks = chain.footprint.blocks
        once = sum(_time(block.backward, rates[1]) for block in blocks)
        forwards = [block.forward for block in blocks]
        if chain.how != "full":
            forwards = [Work(each.gemm, 0, each.bytes) for each in forwards]
        again = sum(_time(each, rates[0]) for each in forwards)
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
        differentiated = 0.7 * (result["critic's passes"] + result["student's passes"])
        gathering = sent["gathered"] / rate
        if engine.residency == "block":
            gathering = _beside(gathering, sum(result.values()))
        result["communication"] = gathering + _beside(sent["reduced"] / rate, differentiated)
    return result


def floor(config: Config, footprints: Footprints, num_gpus: int) -> dict[str, float]:
    """Lower bound of a cycle's seconds in bfloat16: every matmul and attention once, and one read and write of the
    optimizer's state, at the best measured rates."""
    passes, at = Passes.of(config), footprints.at_work(config)
    backwards = [(passes.critic, at["critic"]), (passes.student, at["student"])]
    frozen = [(passes.rollouts, at["student"]), (passes.teacher, at["teacher"]), (passes.score, at["critic"])]
    forwards = [*backwards, *frozen]
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
    """Seconds that a transfer beside passes adds."""
    return max(BESIDE * transfer, transfer - passes)


def _time(work: Work, attention_rate: float) -> float:
    return work.gemm / GEMM + work.attention / attention_rate + work.bytes / MEMORY


def _kind_of_attention(footprints: Footprints) -> int:
    """The head dimension whose rates are used."""
    return 64 if max(head_dim for head_dim, _ in footprints.backbone.attention_shapes()) <= 64 else 128


def _update_bytes(config: Config, fp: Footprint, role: str) -> float:
    """Bytes that an update on one GPU reads and writes: gradient and weight once, master and moments twice."""
    moments = STATE_BYTES[config.optimizer(role).state]
    return fp.trained * (2 * fp.dtype_bytes + 8 + 2 * moments)


def _update_seconds(config: Config, footprints: Footprints, num_gpus: int) -> float:
    total = 0.0
    for role, count in (("student", 1), ("critic", config.distill.critic_updates)):
        fp = footprints.of(config, role, config.engine.batch_size)
        trained = fp.trained / num_gpus
        if config.engine.offload == "none":
            each = _update_bytes(config, fp, role) / num_gpus / MEMORY
        else:
            each = trained * (2 * fp.dtype_bytes / PCIE + 1 / CPU_ADAMW)
            if config.engine.offload == "nvme":
                each += 2 * 12 * trained * min(num_gpus, GPUS_A_NODE) / NVME
        total += count * each
    if config.ema is not None:
        fp = footprints.of(config, "student", config.engine.batch_size)
        total += fp.trained / num_gpus * 8 / (MEMORY if config.ema.device == "same" else PCIE)
    return total
