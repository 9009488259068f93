"""Distil a text-to-image teacher into a student of a few steps.

    deepspeed dpdmd/train.py [--config FILE] [section.key=value ...]

Without arguments it runs the demo that ships with the package. `--dry-run` prints the resolved configuration and stops.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
import warnings
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from dpdmd import engine
from dpdmd.backbones import load_backbone
from dpdmd.checkpoint import Checkpoints, checkpoint_bytes, export_student
from dpdmd.config import Config, ConfigError, load_config, to_yaml
from dpdmd.distill import Distillation, Draws, rollout
from dpdmd.engine import Later, Network, Phases, Step, World, resolve_dtype, start
from dpdmd.journal import Journal, check_space, check_writers, prepare_folder
from dpdmd.plan import Plan, gpu_bytes, resolve
from dpdmd.prompts import Conditioner, PromptOrder, make_conditioner, read_prompts
from dpdmd.sample import decode, sampling_noise, save_grid

ROLES = ("teacher", "student", "critic")


class RunStopped(RuntimeError):
    """Too many updates in a row were not finite."""


class Update:
    """An update that is under way on the device; its numbers are fetched when they are asked for."""

    def __init__(self, role: str, iteration: int, step: Step, names: list[str], values: torch.Tensor):
        self.role, self.iteration = role, iteration
        self._step, self._names, self._values = step, names, Later(values)

    @property
    def applied(self) -> bool:
        return self._step.applied

    def numbers(self) -> dict[str, float]:
        """Means over the processes of loss and its parts; gradient norm and rate."""
        means = dict(zip(self._names, self._values.read().tolist(), strict=True))
        return {**means, "gradient_norm": self._step.gradient_norm, "lr": self._step.lr}


@dataclass
class Trainer:
    """Everything that an update needs, and the two updates."""

    config: Config
    world: World
    backbone: object
    distillation: Distillation
    networks: dict[str, Network]
    prompts: list[str]
    conditioner: Conditioner
    phases: Phases
    skipped: int = 0  # updates that were not finite, in all
    skipped_in_a_row: int = 0
    last_skipped: Update | None = None
    order: PromptOrder = field(init=False)
    _unsettled: Update | None = field(init=False, default=None)

    def __post_init__(self):
        self.order = PromptOrder(len(self.prompts), self.config.run.seed)

    def update(self, role: str, iteration: int) -> Update:
        """Queues one update of student or critic, from `accumulation` micro-batches, on the device. The host waits for
        the update before: it runs ahead of the device by one."""
        network, accumulation = self.networks[role], self.config.engine.accumulation
        totals: dict[str, torch.Tensor] = {}
        step = None
        for micro_batch in range(accumulation):
            loss, numbers = self.loss(role, iteration, micro_batch * self.world.size + self.world.rank)
            network.backward(loss)
            step = network.step()
            for name, value in numbers.items():
                totals[name] = totals.get(name, 0.0) + value.float() / accumulation
        self.phases.end()
        self.settle()
        self._unsettled = Update(role, iteration, step, list(totals), self.world.mean(torch.stack([*totals.values()])))
        self.conditioner.prefetch(self._batch(iteration + 1, self.world.rank))
        return self._unsettled

    def loss(self, role: str, iteration: int, shard: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """What is left to differentiate of one micro-batch's loss, and the numbers to log. shard: its place in the global
        batch of the iteration."""
        batch_size = self.config.engine.batch_size
        cond = self.conditioner.cond(self._batch(iteration, shard))
        draws = Draws(self.config.run.seed, iteration, role, shard, self.world.device)
        noise = draws.noise((batch_size, *self.backbone.latent_shape))
        student, critic = self.networks["student"], self.networks["critic"]
        if role == "critic":
            loss = self.distillation.critic_loss(critic, student, noise, cond, draws)
            return loss, {"loss": loss.detach()}
        uncond = self.conditioner.uncond(batch_size)
        first_part = partial(student.backward, more=True) if student.differentiates_in_parts else None
        losses = self.distillation.student_loss(
            student, self.networks["teacher"], critic, noise, cond, uncond, draws, first_part
        )
        return losses.remaining, {"loss": losses.total, "dmd": losses.dmd, "diversity": losses.diversity}

    def _batch(self, iteration: int, shard: int) -> list[str]:
        num_shards = self.world.size * self.config.engine.accumulation
        indices = self.order.indices(iteration, shard, num_shards, self.config.engine.batch_size)
        return [self.prompts[index] for index in indices]

    def settle(self) -> None:
        """Waits for the update that is under way and counts it."""
        update, self._unsettled = self._unsettled, None
        if update is not None:
            self.skipped += not update.applied
            self.skipped_in_a_row = 0 if update.applied else self.skipped_in_a_row + 1
            self.last_skipped = self.last_skipped if update.applied else update

    def received_bytes(self) -> int:
        """By gathers and reductions of ZeRO stage 3, on this process, so far."""
        traffic = [network.traffic for network in self.networks.values() if network.traffic is not None]
        return sum(each.gathered_bytes + each.reduced_bytes for each in traffic)

    def state(self) -> dict:
        """What a checkpoint keeps beside weights and optimizer state."""
        self.settle()
        return {
            "updates": {role: self.networks[role].updates for role in ("student", "critic")},
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
        }


def role_of(iteration: int, critic_updates: int) -> str:
    """Each student update follows `critic_updates` critic updates."""
    return "student" if (iteration + 1) % (critic_updates + 1) == 0 else "critic"


def train(config: Config, *, resume: bool = False, overwrite: bool = False) -> None:
    """A whole run. Raises ConfigError for what cannot be run, before it starts, and RunStopped for a broken run."""
    quieten()
    prompts = load_prompts(config)
    backbone = load_backbone(config.model)
    check(config, backbone)
    world = start(config.engine)
    config, plan = plan_run(config, backbone, world)
    folder = Path(config.run.output_dir)
    world.on_main(prepare_folder, folder, resume=resume, overwrite=overwrite)
    checkpoints = Checkpoints(
        folder / "checkpoints", config.run.keep_checkpoints, world, identity(config, backbone, world)
    )
    resumed = checkpoints.newest() if resume else None
    state = checkpoints.read_state(resumed) if resumed else None

    trainer = build(config, world, backbone, prompts)
    world.on_main(check_space, folder, space_needed(trainer))
    if resumed:
        checkpoints.load(resumed, trainer.networks, state)
        trainer.skipped, trainer.skipped_in_a_row = state["skipped"], state["skipped_in_a_row"]
    first = state["iteration"] if resumed else 0
    journal = Journal(folder, config, first) if world.main else None
    if world.main:
        print("\n".join([*(network.describe() for network in trainer.networks.values()), plan.summary()]), flush=True)
    progress = Progress(config, first, world)
    checkpoint_due = False

    for iteration in range(first, config.run.iterations):
        role = role_of(iteration, config.distill.critic_updates)
        update = trainer.update(role, iteration)
        done = iteration + 1
        checkpoint_due |= due(done, config.run.checkpoint_every) and done < config.run.iterations
        logged = iteration % config.run.log_every == 0
        if logged or checkpoint_due or done == config.run.iterations:
            trainer.settle()
        progress.advance(role)
        if logged:
            numbers = {**update.numbers(), "skipped": trainer.skipped}
            progress.show(role, numbers)
            if journal:
                journal.write(iteration, role, {**numbers, **progress.rates()})
        if trainer.skipped_in_a_row >= config.run.max_bad_updates:
            last = trainer.last_skipped
            raise RunStopped(
                f"{trainer.skipped_in_a_row} updates in a row were not finite (the last, of the {last.role}, was number "
                f"{last.iteration + 1}); the last good checkpoint is {checkpoints.newest()}"
            )
        student_updates = done // (config.distill.critic_updates + 1)
        if role == "student" and due(student_updates, config.run.sample_every):
            draw_samples(trainer, folder / "samples" / f"step_{done:06d}.png")
        if role == "student" and due(student_updates, config.evaluation.every):
            measurements = evaluate_student(trainer)
            if journal:
                journal.write(iteration, "evaluation", measurements)
        if checkpoint_due and trainer.skipped_in_a_row == 0:  # a checkpoint is a good one
            checkpoints.save(done, trainer.networks, trainer.state())
            checkpoint_due = False

    progress.close()
    if first < config.run.iterations:
        checkpoints.save(config.run.iterations, trainer.networks, trainer.state())
    export_student(folder / "student", trainer.networks, backbone, trainer.distillation, config, world)
    summary = {"iterations": config.run.iterations, **trainer.state(), **progress.summary(plan)}
    if received := trainer.received_bytes():
        cycles = (config.run.iterations - first) / (config.distill.critic_updates + 1)
        summary["received_bytes_a_cycle"] = received / max(cycles, 1)
        if world.main:
            print(f"communication: {summary['received_bytes_a_cycle'] / 1e9:.3g} GB received a cycle and process")
    if config.evaluation.enabled:
        from dpdmd.demo.report import report

        with trainer.networks["student"].averaged():
            summary["evaluation"] = report(trainer, folder)
    if journal:
        journal.finish(summary)
        journal.close()
        if "peak_memory_gib" in summary:
            predicted, measured = summary["predicted_peak_memory_gib"], summary["peak_memory_gib"]
            print(f"peak memory: {predicted:.1f} GiB predicted, {measured:.1f} measured")
        print(f"student: {folder / 'student'}  (python -m dpdmd.sample --student {folder / 'student'} --prompt ...)")


def check(config: Config, backbone) -> None:
    """Raises ConfigError for what can be told to be impossible before processes meet and weights are read."""
    engine.check(config)
    check_writers(config)
    try:
        Distillation(backbone.diffusion, config.distill)
    except ValueError as error:  # a time grid that the model's scheduler cannot walk
        raise ConfigError(str(error)) from error


def plan_run(config: Config, backbone, world: World) -> tuple[Config, Plan]:
    """`config` with `auto` replaced by what fits the smallest GPU, the same on every process. Raises ConfigError where
    nothing does."""
    memory = min(world.gather(gpu_bytes())) if world.device.type == "cuda" else None
    return resolve(config, backbone, world.size, memory)


def quieten() -> None:
    """Keeps what is nobody's concern here out of the output: other libraries' progress bars and deprecations."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # it warns of image processors that nobody asked for
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    # Embeddings have no differentiable inputs; their weights' gradients are right (tests/test_engine.py).
    warnings.filterwarnings("ignore", message="Full backward hook is firing")


def due(count: int, every: int) -> bool:
    return every > 0 and count % every == 0


def load_prompts(config: Config) -> list[str]:
    if config.prompts.file is not None:
        return read_prompts(config.prompts.file, config.prompts.field)
    from dpdmd.demo import PROMPTS

    return read_prompts(PROMPTS)


def identity(config: Config, backbone, world: World) -> dict:
    """What a checkpoint and the run that resumes it must have in common."""
    zero = config.engine.zero
    return {
        "architecture": {role: backbone.transformer_config(role) for role in ROLES},
        "dtype": str(resolve_dtype(config.model.dtype, world.device.type)),
        "processes": world.size,
        "stage": {"student": zero.student, "critic": zero.critic},
        "state": {"student": config.student_optimizer.state, "critic": config.critic_optimizer.state},
        "offload": config.engine.offload,
        "ema": config.ema is not None,
        "lora": None if config.lora is None else config.lora.model_dump(),
    }


def build(config: Config, world: World, backbone, prompts: list[str]) -> Trainer:
    """Encodes the prompts, then loads the three networks."""
    dtype = resolve_dtype(config.model.dtype, world.device.type)
    cache_dir = config.prompts.cache_dir or str(Path(config.run.output_dir) / "embeddings")
    conditioner = make_conditioner(
        backbone,
        config.prompts.model_copy(update={"cache_dir": cache_dir}),
        prompts,
        world.device,
        world.rank,
        world.size,
        world.barrier,
        extra_prompts=extra_prompts(config, prompts),
        dtype=dtype,
        progress=EncodingProgress() if world.main else None,
    )
    networks, phases = {}, Phases()
    load_to = world.device if config.model.random_init else "cpu"
    base = None
    if config.lora is not None:
        base = engine.Base(backbone.load_transformer("teacher", dtype, load_to), backbone, config, world)
    for role in ROLES:
        module = base or backbone.load_transformer(role, dtype, load_to)
        networks[role] = Network(role, module, backbone, config, world, phases)
    if base is not None:
        base.shard(config, world)
    distillation = Distillation(backbone.diffusion, config.distill, world.device)
    return Trainer(config, world, backbone, distillation, networks, prompts, conditioner, phases)


def space_needed(trainer: Trainer) -> int:
    """Bytes that one checkpoint and the exported student take."""
    parameters = trainer.networks["student"].num_parameters
    weight_bytes = resolve_dtype(trainer.config.model.dtype, trainer.world.device.type).itemsize
    return checkpoint_bytes(trainer.config, parameters, weight_bytes) + parameters * weight_bytes


def extra_prompts(config: Config, prompts: list[str]) -> list[str]:
    """Prompts beyond the training ones that need embeddings: those of sample grids and of the evaluation."""
    extra = sample_prompts(config, prompts) if config.run.sample_every else []
    if config.evaluation.enabled:
        from dpdmd.demo.report import evaluation_texts

        extra = [*extra, *evaluation_texts(config)]
    return extra


def sample_prompts(config: Config, prompts: list[str]) -> list[str]:
    return config.run.sample_prompts or prompts[:4]


def draw_samples(trainer: Trainer, path: Path, images_a_prompt: int = 4) -> None:
    """A grid with the teacher's pictures beside the student's from the same noise; all processes call."""
    prompts = sample_prompts(trainer.config, trainer.prompts)
    shape, scale = trainer.backbone.latent_shape, trainer.config.distill.guidance_scale
    noise = torch.cat([sampling_noise(trainer.config.run.seed, index, shape) for index in range(images_a_prompt)])
    noise = noise.to(trainer.world.device)
    distillation = trainer.distillation
    rows = []
    with torch.no_grad(), trainer.networks["student"].averaged():
        for prompt in prompts:
            cond, uncond = trainer.conditioner.cond([prompt] * len(noise)), trainer.conditioner.uncond(len(noise))
            teacher = rollout(
                distillation.diffusion,
                trainer.networks["teacher"],
                noise,
                distillation.teacher_times,
                cond,
                uncond,
                scale,
            )
            student = distillation.sample(trainer.networks["student"], noise, cond)
            rows.append((prompt, teacher, student))
    if trainer.world.main:
        decoder = trainer.backbone.load_decoder(trainer.world.device)
        titles = (
            f"teacher, {trainer.config.distill.teacher_steps} steps",
            f"student, {trainer.config.distill.student_steps} steps",
        )
        save_grid(path, [(p, [(titles[0], decode(decoder, t)), (titles[1], decode(decoder, s))]) for p, t, s in rows])


def evaluate_student(trainer: Trainer) -> dict[str, float] | None:
    from dpdmd.demo.report import measure_student

    with trainer.networks["student"].averaged():
        return measure_student(trainer)


class EncodingProgress:
    """A bar for the prompts that this process encodes."""

    def __init__(self):
        self._bar = None

    def __call__(self, done: int, to_do: int, num_bytes: int) -> None:
        from tqdm import tqdm

        if self._bar is None:
            description = f"encoding prompts ({num_bytes / 1e9:.2f} GB)"
            self._bar = tqdm(total=to_do, unit="prompt", desc=description, mininterval=1.0)
        self._bar.update(done - self._bar.n)
        if done == to_do:
            self._bar.close()


class Progress:
    """A bar with rates and the time left on the main process, and the run's timings."""

    def __init__(self, config: Config, first: int, world: World):
        from tqdm import tqdm

        self._world = world
        self._samples = config.engine.batch_size * config.engine.accumulation * world.size
        self._last = time.perf_counter()
        self._seconds = {"student": [], "critic": []}
        self._latest: dict[str, float] = {}
        self._bar = tqdm(
            total=config.run.iterations,
            initial=first,
            unit="update",
            disable=not world.main,
            mininterval=1.0,
            smoothing=0.05,
        )

    def advance(self, role: str) -> None:
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        self._seconds[role].append(seconds)
        self._latest = {"seconds": seconds, "samples_per_second": self._samples / seconds}
        self._bar.update()

    def show(self, role: str, numbers: dict[str, float]) -> None:
        self._bar.set_postfix({f"{role} loss": f"{numbers['loss']:.4f}"}, refresh=False)

    def rates(self) -> dict[str, float]:
        return self._latest

    def summary(self, plan: Plan) -> dict[str, float]:
        """Median seconds an update of each role, and the peak of device memory, as planned and as it was."""
        summary = {
            f"{role}_seconds": sorted(seconds)[len(seconds) // 2] for role, seconds in self._seconds.items() if seconds
        }
        if self._world.device.type == "cuda":
            summary["predicted_peak_memory_gib"] = plan.peak / 2**30
            summary["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        return summary

    def close(self) -> None:
        self._bar.close()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="deepspeed dpdmd/train.py", description=__doc__.split("\n")[0])
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings over those of the file")
    parser.add_argument("--config", metavar="FILE", help="YAML file (default: the demo)")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved configuration and stop")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="go on from the newest complete checkpoint")
    existing.add_argument("--overwrite", action="store_true", help="delete what an earlier run left in run.output_dir")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the launcher's; the environment has it too
    args = parser.parse_intermixed_args(argv)  # settings may stand between options
    try:
        config = load_config(args.config, args.overrides)
        if args.dry_run:
            print(to_yaml(config), end="")
            return 0
        train(config, resume=args.resume, overwrite=args.overwrite)
    except (ConfigError, RunStopped, OSError) as error:
        if os.environ.get("RANK", "0") == "0" or isinstance(error, OSError):
            print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
