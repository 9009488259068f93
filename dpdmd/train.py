"""Distil a text-to-image teacher into a student of a few steps.

    deepspeed dpdmd/train.py [--config FILE] [section.key=value ...]

Without arguments it runs the demo that ships with the package. `--dry-run` prints the resolved configuration and stops.
"""

from __future__ import annotations

from dpdmd import command  # isort: skip  first: the others take seconds, in which a user may interrupt

import argparse
import contextlib
import difflib
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from dpdmd.backbones import load_backbone
from dpdmd.command import RunEnded, RunStopped
from dpdmd.config import ROLES, TRAINED, Config, ConfigError, load_config, to_yaml
from dpdmd.distill import Distillation, Draws, rollout
from dpdmd.engine.body import Base
from dpdmd.engine.lora import largest_rank
from dpdmd.engine.role import Phases, Role, make
from dpdmd.engine.start import check as check_engine
from dpdmd.engine.start import resolve_dtype, start
from dpdmd.engine.step import Later, Step
from dpdmd.engine.world import World
from dpdmd.files import digests, read_json, sha256
from dpdmd.planner.plan import Plan
from dpdmd.planner.residency import residencies
from dpdmd.planner.search import gpu_bytes, resolve
from dpdmd.run.agreement import agree_on_attention, check_alike, check_kernels, check_settings
from dpdmd.run.checkpoint import (
    STUDENT_FILE,
    Checkpoint,
    Checkpoints,
    changed_settings,
    checkpoint_bytes,
    export_student,
    with_global_batch,
)
from dpdmd.run.folder import MARK, RunFolder, check_place, check_space
from dpdmd.run.journal import Journal, check_writers
from dpdmd.run.prompts import Conditioner, PromptOrder, digest_of, make_conditioner, read_prompts
from dpdmd.run.stopping import Stop
from dpdmd.sample import decode, first_noises, save_grid


class Update:
    """An update that is under way on the device; its numbers are fetched when they are asked for."""

    def __init__(self, role: str, iteration: int, step: Step, names: list[str], values: torch.Tensor):
        self.role, self.iteration = role, iteration
        self._step, self._names, self._values = step, names, Later(values)

    @property
    def applied(self) -> bool:
        return self._step.applied

    @property
    def requests(self) -> tuple[bool, bool]:
        """Whether any process was asked to end, and whether any failed to write a checkpoint: the same on all of them."""
        stop, failed = self._values.read().tolist()[-2:]
        return stop > 0, failed > 0

    def numbers(self) -> dict[str, float]:
        """Means over the processes of loss and its parts; gradient norm and rate."""
        means = dict(zip(self._names, self._values.read().tolist()[:-2], strict=True))
        return {**means, "gradient_norm": self._step.gradient_norm, "lr": self._step.lr}


def none_each() -> dict[str, int]:
    return dict.fromkeys(TRAINED, 0)


@dataclass
class Trainer:
    """Everything that an update needs, and the two updates."""

    config: Config
    world: World
    backbone: object
    distillation: Distillation
    networks: dict[str, Role]
    prompts: list[str]
    conditioner: Conditioner
    phases: Phases
    requested: Callable[[], tuple[bool, bool]] = lambda: (False, False)  # this process's `Update.requests`
    skipped: dict[str, list[int]] = field(default_factory=lambda: {role: [] for role in TRAINED})  # their iterations
    skipped_in_a_row: dict[str, int] = field(default_factory=none_each)
    outcomes: list[tuple[str, int, bool]] = field(default_factory=list)  # role, iteration, applied: not yet looked at
    initial_bits: int | None = None  # of the student's weights
    attention_times: dict | None = None  # by which all processes choose attention's kernels
    stop_requested: bool = False
    writing_failed: bool = False
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
        values = torch.stack([*totals.values()])
        requests = [values.new_full((), float(request)) for request in self.requested()]
        values = self.world.mean(torch.cat([values, torch.stack(requests)]))
        self._unsettled = Update(role, iteration, step, list(totals), values)
        self.conditioner.prefetch(self.prompts_of_batch(iteration + 1, self.world.rank))
        return self._unsettled

    def loss(self, role: str, iteration: int, shard: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """What is left to differentiate of one micro-batch's loss, and the numbers to log. shard: its place in the global
        batch of the iteration."""
        batch_size = self.config.engine.batch_size
        cond = self.conditioner.cond(self.prompts_of_batch(iteration, shard))
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

    def prompts_of_batch(self, iteration: int, shard: int) -> list[str]:
        """Those of one micro-batch."""
        num_shards = self.world.size * self.config.engine.accumulation
        indices = self.order.indices(iteration, shard, num_shards, self.config.engine.batch_size)
        return [self.prompts[index] for index in indices]

    def settle(self) -> None:
        """Waits for the update that is under way and counts it."""
        update, self._unsettled = self._unsettled, None
        if update is None:
            return
        role = update.role
        if update.applied:
            self.skipped_in_a_row[role] = 0
        else:
            self.skipped[role].append(update.iteration)
            self.skipped_in_a_row[role] += 1
        self.outcomes.append((role, update.iteration, update.applied))
        stop, failed = update.requests
        self.stop_requested |= stop
        self.writing_failed |= failed

    @property
    def num_skipped(self) -> int:
        return sum(map(len, self.skipped.values()))

    def prompts_of(self, iteration: int) -> list[str]:
        """Those of all processes."""
        num_shards = self.world.size * self.config.engine.accumulation
        batch_size = self.config.engine.batch_size
        shards = [self.order.indices(iteration, shard, num_shards, batch_size) for shard in range(num_shards)]
        return [self.prompts[index] for shard in shards for index in shard]

    def received_bytes(self) -> int:
        """By gathers and reductions of ZeRO stage 3, on this process, so far."""
        traffic = [network.traffic for network in self.networks.values() if network.traffic is not None]
        return sum(each.gathered_bytes + each.reduced_bytes for each in traffic)

    def state(self) -> dict:
        """What a checkpoint keeps beside weights and optimizer state."""
        self.settle()
        return {
            "updates": {role: self.networks[role].updates for role in TRAINED},
            "skipped": {role: list(iterations) for role, iterations in self.skipped.items()},
            "skipped_in_a_row": dict(self.skipped_in_a_row),
            "attention_times": self.attention_times,
            "prompts": digest_of(self.prompts),
            "text": self.backbone.text_key,
        }

    def restore(self, state: dict) -> None:
        """What `state` gave."""
        self.skipped = {role: list(iterations) for role, iterations in state["skipped"].items()}
        self.skipped_in_a_row = dict(state["skipped_in_a_row"])


def role_of(iteration: int, critic_updates: int) -> str:
    """Each student update follows `critic_updates` critic updates."""
    return "student" if (iteration + 1) % (critic_updates + 1) == 0 else "critic"


def train(config: Config, *, resume: bool = False, overwrite: bool = False) -> None:
    """A whole run. Raises ConfigError for what cannot be run, before it starts, RunStopped for a broken run, RunEnded for one
    that was asked to end, and OSError where something could not be written."""
    command.quieten()
    prompts = load_prompts(config)
    backbone = load_backbone(config.model)
    config = backbone.resolved(config)
    check(config, backbone)
    with contextlib.ExitStack() as opened:
        stop = opened.enter_context(Stop())
        path = Path(config.run.output_dir)
        world = start(config.engine, run=str(path.resolve()))
        check_kernels(world.device, resolve_dtype(config.model.dtype, world.device.type), backbone)
        check_alike(world)
        check_settings(world, config, prompts, resume=resume, overwrite=overwrite)
        folder = take_folder(path, world, resume=resume, overwrite=overwrite)
        opened.callback(folder.close)
        checkpoints = Checkpoints(
            path / "checkpoints", config.run.keep_checkpoints, world, identity(config, backbone, world), config
        )
        resumed = checkpoints.find() if resume else None
        if not world.on_main(starts, folder, config, resumed, resume=resume, overwrite=overwrite):
            return
        if resumed is not None:
            config, changed = continued(config, resumed, prompts, backbone.text_key, world)
            if not all(each.startswith("run.") for each in changed):
                checkpoints.spare(resumed.path)
        config, plan = plan_run(config, backbone, world)
        checkpoints.use(config)
        if world.main:
            for doubt in doubts(config):
                print(f"warning: {doubt}", file=sys.stderr, flush=True)
        attention_times = agree_on_attention(world, backbone, resumed.state.get("attention_times") if resumed else None)

        trainer = build(config, world, backbone, prompts)
        trainer.attention_times = attention_times
        trainer.requested = lambda: (stop.requested, checkpoints.failed)
        world.on_main(check_space, path, *space_needed(trainer))
        trainer.initial_bits = trainer.networks["student"].bits()
        if resumed is not None:
            checkpoints.load(resumed, trainer.networks)
            trainer.restore(resumed.state)
        first = resumed.iteration if resumed is not None else 0
        folder.clear()
        journal = opened.enter_context(Journal(path, config, first)) if world.main else None
        if world.main:
            networks = trainer.networks.values()
            print("\n".join([*(network.describe() for network in networks), plan.summary()]), flush=True)
        with stop.deferred():
            progress = Progress(config, first, world)
            opened.callback(progress.close)
            loop(trainer, checkpoints, journal, progress, path, first, stop)
        progress.close()
        finish(trainer, checkpoints, journal, progress, path, first, plan)


def loop(
    trainer: Trainer,
    checkpoints: Checkpoints,
    journal: Journal | None,
    progress: Progress,
    folder: Path,
    first: int,
    stop: Stop,
) -> None:
    """Updates number `first` (from 0) to the last, each logged, sampled and saved when that is due."""
    config, run = trainer.config, trainer.config.run
    checkpoint_due = False
    for iteration in range(first, run.iterations):
        role = role_of(iteration, config.distill.critic_updates)
        update = trainer.update(role, iteration)
        done = iteration + 1
        checkpoint_due |= due(done, run.checkpoint_every) and done < run.iterations
        logged = iteration % run.log_every == 0
        if logged or checkpoint_due or done == run.iterations:
            trainer.settle()
        progress.advance(role)
        if logged:
            numbers = {**update.numbers(), "skipped": trainer.num_skipped}
            progress.show(role, numbers)
            if journal:
                journal.write(iteration, role, {**numbers, **progress.rates()})
        while trainer.outcomes:
            checkpoints.judge(*trainer.outcomes.pop(0))
        stop_if_broken(trainer, checkpoints)
        if trainer.writing_failed:
            checkpoints.wait()  # raises what went wrong
        if trainer.stop_requested:
            saved = checkpoints.save(done, trainer.networks, trainer.state(), last=True)
            raise RunEnded(
                f"{stop.reason}: ended after {done} of {run.iterations} updates, which {saved} holds; the same command "
                "with --resume goes on from there",
                agreed=True,
            )
        student_updates = done // (config.distill.critic_updates + 1)
        if role == "student" and due(student_updates, run.sample_every):
            draw_samples(trainer, folder / "samples" / f"step_{done:06d}.png")
        if role == "student" and due(student_updates, config.evaluation.every):
            measurements = evaluate_student(trainer)
            if journal:
                journal.write(iteration, "evaluation", measurements)
        if checkpoint_due and not any(trainer.skipped_in_a_row.values()):
            checkpoints.save(done, trainer.networks, trainer.state())
            checkpoint_due = False
    if first < run.iterations:
        saved = checkpoints.save(run.iterations, trainer.networks, trainer.state(), last=True)
        if any(trainer.world.gather(stop.requested)):
            raise RunEnded(
                f"{stop.reason}: ended after all {run.iterations} updates, which {saved} holds; the same command with --resume "
                "exports the student",
                agreed=True,
            )


def stop_if_broken(trainer: Trainer, checkpoints: Checkpoints) -> None:
    """Raises RunStopped where one role's updates have failed too often in a row."""
    for role, in_a_row in trainer.skipped_in_a_row.items():
        if in_a_row >= trainer.config.run.max_bad_updates:
            good = checkpoints.give_up()
            raise RunStopped(
                f"{in_a_row} updates of the {role} in a row were not finite (the last was number "
                f"{trainer.skipped[role][-1] + 1}); the last good checkpoint is {good or 'none'}. {describe_skipped(trainer)}"
            )


def describe_skipped(trainer: Trainer, most: int = 5) -> str:
    """How many updates were not finite, and prompts that were in them, the most frequent first."""
    counts = ", ".join(
        f"{len(trainer.skipped[role])} of the {role}'s {trainer.networks[role].updates + len(trainer.skipped[role])}"
        for role in TRAINED
    )
    prompts = Counter(
        prompt
        for iterations in trainer.skipped.values()
        for each in iterations
        for prompt in set(trainer.prompts_of(each))
    )
    shown = ", ".join(f"{prompt[:60]!r} ({count})" for prompt, count in prompts.most_common(most))
    more = f" and {len(prompts) - most} more" if len(prompts) > most else ""
    return f"skipped as not finite: {counts} updates" + (f"; prompts in them: {shown}{more}" if prompts else "")


def finish(
    trainer: Trainer,
    checkpoints: Checkpoints,
    journal: Journal | None,
    progress: Progress,
    folder: Path,
    first: int,
    plan: Plan,
) -> None:
    """After the last update: the student is exported, measured and described."""
    config, world = trainer.config, trainer.world
    if trainer.networks["student"].updates == 0:
        raise RunStopped(
            f"the student was never updated, so it is not exported: it is still the teacher. {describe_skipped(trainer)}"
        )
    if problem := problem_of_export(trainer):
        raise RunStopped(
            f"after {trainer.networks['student'].updates} updates {problem}, so it is not exported; {describe_rate(config)}"
        )
    export_student(folder / "student", trainer.networks, trainer.backbone, trainer.distillation, config, world)
    state = trainer.state()
    student = digests(folder / "student") if journal else {}
    summary = {
        "iterations": config.run.iterations,
        "student": student,
        "updates": state["updates"],
        "skipped": state["skipped"],
    }
    summary |= progress.summary(plan)
    if checkpoints.pauses:
        summary["checkpoint_pause_seconds"] = checkpoints.pauses
        summary["checkpoint_write_seconds"] = checkpoints.write_seconds
    if trainer.num_skipped:
        prompts = {each: trainer.prompts_of(each) for iterations in trainer.skipped.values() for each in iterations}
        summary["skipped_prompts"] = {str(iteration + 1): texts for iteration, texts in sorted(prompts.items())}
        if world.main:
            print(describe_skipped(trainer))
    if received := trainer.received_bytes():
        cycles = (config.run.iterations - first) / (config.distill.critic_updates + 1)
        summary["received_bytes_a_cycle"] = received / max(cycles, 1)
        if world.main:
            print(f"communication: each process received {summary['received_bytes_a_cycle'] / 1e9:.3g} GB a cycle")
    if config.evaluation.enabled:
        from dpdmd.worlds.demo.report import report

        with trainer.networks["student"].averaged():
            summary["evaluation"] = report(trainer, folder)
    if journal:
        journal.finish(summary)
        if "peak_memory_gib" in summary:
            predicted, measured = summary["predicted_peak_memory_gib"], summary["peak_memory_gib"]
            print(f"peak memory: {predicted:.1f} GiB predicted, {measured:.1f} measured")
        print(f"student: {folder / 'student'}  (python -m dpdmd.sample --student {folder / 'student'} --prompt ...)")


def problem_of_export(trainer: Trainer) -> str | None:
    """Why the student is not one that anybody wants: still what it began as, or broken; None where it is neither. All
    processes call."""
    networks, world = trainer.networks, trainer.world
    prompts = trainer.prompts_of_batch(0, world.rank)
    noise = first_noises(0, len(prompts), trainer.backbone.latent_shape).to(world.device)
    cond = trainer.conditioner.cond(prompts)
    with torch.no_grad(), networks["student"].averaged():
        finite = networks["student"].is_finite()
        moved = networks["student"].bits() != trainer.initial_bits
        made = trainer.distillation.sample(networks["student"], noise, cond)
        if trainer.config.lora is not None:  # An adapter's bits change at once; what it adds may be lost in rounding.
            moved = not torch.equal(made, trainer.distillation.sample(networks["teacher"], noise, cond))
    size = float(made.double().square().mean().sqrt())
    finite, moved, sizes = zip(*world.gather((finite, moved, size)), strict=True)
    if not all(finite):
        return "the student's weights hold NaN or infinity"
    if exploded := [size for size in sizes if not size < _LARGEST_LATENTS]:  # NaN is not, either
        return f"the student makes latents of size {exploded[0]:.3g} (root mean square) of noise of size 1"
    if any(moved):
        return None
    if trainer.config.lora is None:
        return "the student's weights are to the bit those that it began with"
    return "the adapter changes no bit of what the teacher makes in as many steps"


_LARGEST_LATENTS = 1000.0  # latents of pictures have a root mean square of about 1


def describe_rate(config: Config) -> str:
    """What decides how far the exported student moves."""
    optimizer, average = config.student_optimizer, "null" if config.ema is None else f"{{decay: {config.ema.decay}}}"
    return (
        f"student_optimizer.lr = {optimizer.lr:g}, warmup = {optimizer.warmup}, eps = {optimizer.eps:g}, engine.clip = "
        f"{config.engine.clip:g} and ema = {average} decide how far it moves"
    )


def doubts(config: Config) -> list[str]:
    """What is possible, and leaves a student that has hardly been trained."""
    found = []
    for role in TRAINED:
        optimizer, updates = getattr(config, f"{role}_optimizer"), config.num_updates(role)
        if optimizer.warmup > updates:
            found.append(
                f"{role}_optimizer.warmup = {optimizer.warmup} is longer than the run's {updates} updates of the {role}: the "
                f"rate ends at {optimizer.lr * updates / optimizer.warmup:.2g} and never comes to lr = {optimizer.lr:g}"
            )
    updates = config.num_updates("student")
    if config.ema is not None and config.ema.decay**updates > 0.5:
        found.append(
            f"ema.decay = {config.ema.decay}: of the average, which is what is exported, {config.ema.decay**updates:.0%} is "
            f"still the student's beginning after the run's {updates} updates; {0.5 ** (4 / updates):.4g} would leave 6 %"
        )
    return found


def take_folder(path: Path, world: World, *, resume: bool, overwrite: bool) -> RunFolder:
    """The run's folder, which the main process holds for all. Raises ConfigError on all where it cannot be had."""
    taken = []
    world.on_main(lambda: taken.append(RunFolder(path, resume=resume, overwrite=overwrite)))
    return taken[0] if taken else RunFolder.held_elsewhere(path)


def starts(
    folder: RunFolder, config: Config, resumed: Checkpoint | None, *, resume: bool, overwrite: bool = False
) -> bool:
    """Says from where the run goes on, or that it begins. False: it is finished already, and there is nothing to do.

    Raises ConfigError where a finished student would have to be trained anew, and where the run is to end before the
    checkpoint that it would go on from.
    """
    path, iterations = folder.path, config.run.iterations
    finished = (path / "finished.json").exists()
    if resumed is None:
        left = [name for name in ("finished.json", f"student/{STUDENT_FILE}") if (path / name).exists()]
        if left and not overwrite:
            raise ConfigError(
                f"--resume: {path} holds {' and '.join(left)} of a run and no checkpoint to go on from. To train anew is to "
                "replace that student: give --overwrite for it, or take another run.output_dir"
            )
        why = f": --resume found no checkpoint in {path / 'checkpoints'}" if resume else ""
        if resume and folder.fresh:
            why += f", and no run in {path}{similar(path)}"
        print(f"starting at iteration 0{why}", flush=True)
        return True
    if resumed.iteration > iterations:
        raise ConfigError(
            f"run.iterations = {iterations}, but --resume goes on from iteration {resumed.iteration} ({resumed.path}): give "
            f"{resumed.iteration} or more"
        )
    if resumed.iteration == iterations and finished:
        problem = problem_of_student(path)
        if problem is None:
            print(
                f"finished: {path} has all its {iterations} iterations, and its student; a larger run.iterations trains on"
            )
            if changed := changed_settings(resumed.index["config"], config):
                print(f"other settings than the run's, which nothing is trained with: {', '.join(changed)}")
            return False
        print(f"--resume: {problem}; the student is exported anew", file=sys.stderr, flush=True)
    print(f"going on from iteration {resumed.iteration} ({resumed.path})", flush=True)
    return True


def problem_of_student(path: Path) -> str | None:
    """What is not as it was exported in the student of a finished run, or None."""
    try:
        summary = read_json(path / "finished.json")
    except OSError as error:  # damaged, too
        return str(error)
    exported = summary.get("student") if isinstance(summary, dict) else None
    if not isinstance(exported, dict) or STUDENT_FILE not in exported:
        return f"{path / 'finished.json'} does not say what was exported"
    for name, digest in exported.items():
        file = path / "student" / name
        if not file.is_file():
            return f"{file} is missing"
        if sha256(file) != digest:
            return f"{file} is damaged or changed: its content is not what was exported (SHA-256)"
    return None


def continued(
    config: Config, resumed: Checkpoint, prompts: list[str], text_key: str, world: World
) -> tuple[Config, list[str]]:
    """`config` for updates of as many samples as the checkpoint's, and what is another than there, which is said: the run
    goes on with what is given. Raises ConfigError where the number of samples cannot be had."""
    given = config.engine.accumulation
    config = with_global_batch(config, resumed.index["global_batch"], world.size)
    if world.main and (given != config.engine.accumulation or resumed.index["processes"] != world.size):
        print(
            f"{world.size} processes for {resumed.index['processes']}, engine.accumulation = {given} given: "
            f"engine.accumulation = {config.engine.accumulation}, so that an update stays one of "
            f"{resumed.index['global_batch']} samples",
            flush=True,
        )
    changed = changed_settings(resumed.index["config"], config)
    if resumed.state.get("prompts") not in (None, digest_of(prompts)):
        changed.append("the content of prompts.file")
    if resumed.state.get("text") not in (None, text_key):
        changed.append("the text encoders' settings, tokenizers or length: prompts are encoded anew")
    if changed and world.main:
        print(f"other settings than the checkpoint's: {', '.join(changed)}", flush=True)
    return config, changed


def similar(path: Path) -> str:
    """Runs beside the folder that may have been meant."""
    runs = [mark.parent.name for mark in path.resolve().parent.glob(f"*/{MARK}") if mark.parent != path.resolve()]
    near = difflib.get_close_matches(path.name, runs, n=3, cutoff=0.5)
    return f" (there is {', '.join(near)} beside it)" if near else ""


def check(config: Config, backbone) -> None:
    """Raises ConfigError for what can be told to be impossible before processes meet and weights are read."""
    _check_places(config)
    check_engine(config)
    check_writers(config)
    try:
        Distillation(backbone.diffusion, config.distill)
    except ValueError as error:  # a time grid that the model's scheduler cannot walk
        raise ConfigError(str(error)) from error
    if config.lora is not None:
        most = largest_rank(backbone.empty_transformer("teacher"), config.lora.targets)
        if config.lora.rank > most:
            raise ConfigError(
                f"lora.rank = {config.lora.rank}: the weights that the adapters are for have a rank of at most {most}, and an "
                f"adapter of rank {most} can be whatever one of a higher rank can"
            )
    if config.evaluation.enabled:
        from dpdmd.worlds.demo.world import SIZE

        if config.model.resolution != SIZE:
            raise ConfigError(
                f"model.resolution = {config.model.resolution} with evaluation.enabled = true: the demo's pictures are measured "
                f"at {SIZE} pixels; set evaluation.enabled=false or leave model.resolution out"
            )


def _check_places(config: Config) -> None:
    embeddings = config.prompts.cache_dir
    check_place(Path(config.run.output_dir), None if embeddings is None else Path(embeddings))


def plan_run(config: Config, backbone, world: World) -> tuple[Config, Plan]:
    """`config` with `auto` replaced by what fits the smallest GPU, the same on every process. Raises ConfigError where
    nothing does."""
    memory = min(world.gather(gpu_bytes())) if world.device.type == "cuda" else None
    return resolve(config, backbone, world.size, memory)


def due(count: int, every: int) -> bool:
    return every > 0 and count % every == 0


def load_prompts(config: Config) -> list[str]:
    if config.prompts.file is not None:
        return read_prompts(config.prompts.file, config.prompts.field)
    from dpdmd.worlds.demo import PROMPTS

    return read_prompts(PROMPTS)


def identity(config: Config, backbone, world: World) -> dict:
    """What a checkpoint and the run that resumes it must have in common."""
    return {
        "architecture": {role: backbone.transformer_config(role) for role in ROLES},
        "teacher": world.on_main(backbone.teacher_fingerprint),
        "dtype": str(resolve_dtype(config.model.dtype, world.device.type)),
        "state": {"student": config.student_optimizer.state, "critic": config.critic_optimizer.state},
        "offload": config.engine.offload,
        "ema": config.ema is not None,
        "lora": None if config.lora is None else config.lora.model_dump(),
    }


def build(config: Config, world: World, backbone, prompts: list[str]) -> Trainer:
    """Encodes the prompts, then loads the three networks."""
    backbone.check_weights()  # Encoding takes long, and what is wrong with the files shows in their headers.
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
    kept = residencies(config, world.size)
    load_to = world.device if config.model.random_init else "cpu"
    base = None
    if config.lora is not None:
        base = Base(backbone.load_transformer("teacher", dtype, load_to), backbone, config, world)
    for role in ROLES:
        module = base or backbone.load_transformer(role, dtype, load_to)
        networks[role] = make(role, module, backbone, config, world, phases, kept[role])
    if base is not None:
        base.shard(config, world, kept["teacher"])
    if world.main and not config.model.random_init and (config.run.sample_every or config.evaluation.enabled):
        backbone.load_decoder("cpu")  # for what it refuses: pictures are made much later
    distillation = Distillation(backbone.diffusion, config.distill, world.device)
    return Trainer(config, world, backbone, distillation, networks, prompts, conditioner, phases)


def space_needed(trainer: Trainer) -> tuple[int, int, int]:
    """Bytes of a checkpoint, how many there are at once at most, bytes of the exported student."""
    config, run = trainer.config, trainer.config.run
    parameters = trainer.networks["student"].num_parameters
    # Adapters are exported as their masters are.
    weight_bytes = 4 if config.lora else resolve_dtype(config.model.dtype, trainer.world.device.type).itemsize
    made = 1 + (run.iterations // run.checkpoint_every if run.checkpoint_every else 0)
    # Those that are kept, the one that is being written, and the last good one where it is older than those.
    at_once = min(made, run.keep_checkpoints + 2)
    return checkpoint_bytes(config, parameters), at_once, parameters * weight_bytes


def extra_prompts(config: Config, prompts: list[str]) -> list[str]:
    """Prompts beyond the training ones that need embeddings: those of sample grids and of the evaluation."""
    extra = sample_prompts(config, prompts) if config.run.sample_every else []
    if config.evaluation.enabled:
        from dpdmd.worlds.demo.report import evaluation_texts

        extra = [*extra, *evaluation_texts(config)]
    return extra


def sample_prompts(config: Config, prompts: list[str]) -> list[str]:
    return config.run.sample_prompts or prompts[:4]


def draw_samples(trainer: Trainer, path: Path, images_a_prompt: int = 4) -> None:
    """A grid with the teacher's pictures beside the student's from the same noise; all processes call."""
    prompts = sample_prompts(trainer.config, trainer.prompts)
    shape, scale = trainer.backbone.latent_shape, trainer.config.distill.guidance_scale
    noise = first_noises(trainer.config.run.seed, images_a_prompt, shape).to(trainer.world.device)
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
    from dpdmd.worlds.demo.report import measure_student

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
    return command.run(_main, argv)


def _main(argv: list[str] | None) -> None:
    parser = command.Parser(prog="deepspeed dpdmd/train.py", description=__doc__.split("\n")[0])
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings over those of the file")
    parser.add_argument("--config", metavar="FILE", help="YAML file (default: the demo)")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved configuration and stop")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="go on from the newest checkpoint that is whole")
    existing.add_argument("--overwrite", action="store_true", help="delete what an earlier run left in run.output_dir")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the launcher's; the environment has it too
    args = parser.parse_intermixed_args(argv)  # settings may stand between options
    config = load_config(args.config, args.overrides)
    if args.dry_run:
        _check_places(config)
        print(to_yaml(config), end="")
    else:
        train(config, resume=args.resume, overwrite=args.overwrite)


if __name__ == "__main__":
    sys.exit(main())
