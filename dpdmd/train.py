"""Distil a text-to-image teacher into a student of a few steps.

    deepspeed dpdmd/train.py [--config FILE] [section.key=value ...]

Without arguments it runs the demo that ships with the package. `--dry-run` prints the resolved configuration and stops.
"""

from __future__ import annotations

from dpdmd import command  # isort: skip  first: the others take seconds, in which a user may interrupt

import argparse
import contextlib
import sys
from pathlib import Path

from dpdmd.backbones import load_backbone
from dpdmd.command import RunEnded
from dpdmd.config import Config, load_config, to_yaml
from dpdmd.engine.roles import resolve_dtype, start
from dpdmd.evaluation.report import draw_samples, measure_student, report
from dpdmd.files import digests
from dpdmd.plan import Plan
from dpdmd.run.agreement import agree_on_attention, check_alike, check_kernels, check_settings
from dpdmd.run.checkpoint import Checkpoints, space_needed
from dpdmd.run.export import check_export, doubts, export_student
from dpdmd.run.folder import check_place, check_space
from dpdmd.run.journal import Journal
from dpdmd.run.progress import Progress
from dpdmd.run.resume import continued, identity, run_folder, starts
from dpdmd.run.stopping import Stop
from dpdmd.trainer import Trainer, build, check, load_prompts, plan_run, role_of


def train(config: Config, *, resume: bool = False, overwrite: bool = False) -> None:
    """A whole run. Raises ConfigError for what cannot be run, before it starts, RunStopped for a broken run, RunEnded for one
    that was asked to end, and OSError where something could not be written."""
    command.quieten()
    prompts = load_prompts(config)
    backbone = load_backbone(config.model)
    check(config, backbone)
    with contextlib.ExitStack() as opened:
        stop = opened.enter_context(Stop())
        path = Path(config.run.output_dir)
        world = start(config.engine, run=str(path.resolve()))
        dtype = resolve_dtype(config.model.dtype, world.device.type)
        check_kernels(world.device, dtype, backbone)
        check_alike(world)
        check_settings(world, config, prompts, resume=resume, overwrite=overwrite)
        folder = opened.enter_context(run_folder(path, world, resume=resume, overwrite=overwrite))
        checkpoints = Checkpoints(
            path / "checkpoints", config.run.keep_checkpoints, world, identity(config, backbone, world), config
        )
        opened.callback(checkpoints.close)
        resumed = checkpoints.find() if resume else None
        if not world.on_main(starts, folder, config, resumed, resume=resume, overwrite=overwrite):
            return
        if resumed is not None:
            config = continued(config, resumed, checkpoints, prompts, backbone.text_key, world)
        config, plan = plan_run(config, backbone, world)
        checkpoints.use(config)
        if world.main:
            for doubt in doubts(config):
                print(f"warning: {doubt}", file=sys.stderr, flush=True)
        attention_times = agree_on_attention(world, backbone, resumed.state.get("attention_times") if resumed else None)

        trainer = opened.enter_context(contextlib.closing(build(config, world, backbone, prompts)))
        trainer.attention_times = attention_times
        trainer.requested = lambda: (stop.requested, checkpoints.failed)
        student = trainer.networks["student"]
        world.on_main(check_space, path, *space_needed(config, student.num_parameters, dtype))
        trainer.initial_bits = student.bits()
        if resumed is not None:
            checkpoints.load(resumed, trainer.networks)
            trainer.restore(resumed.state)
        first = resumed.iteration if resumed is not None else 0
        folder.clear()
        journal = opened.enter_context(Journal(path, config, first)) if world.main else None
        if world.main:
            networks = trainer.networks.values()
            print("\n".join([*(network.describe() for network in networks), plan.summary()]), flush=True)
        with stop.deferred(), contextlib.closing(Progress(config, first, world)) as progress:
            loop(trainer, checkpoints, journal, progress, path, first, stop)
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
        trainer.stop_if_broken(checkpoints)
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
        if role == "student" and trainer.evaluation and due(student_updates, config.evaluation.every):
            measurements = measure_student(trainer)
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


def due(count: int, every: int) -> bool:
    return every > 0 and count % every == 0


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
    check_export(trainer)
    export_student(
        folder / "student", trainer.networks["student"], trainer.backbone, trainer.distillation, config, world
    )
    state = trainer.state()
    student = digests(folder / "student") if journal else {}
    summary = {
        "iterations": config.run.iterations,
        "student": student,
        "updates": state["updates"],
        "skipped": state["skipped"],
    }
    summary |= progress.summary(plan.peak)
    if checkpoints.pauses:
        summary["checkpoint_pause_seconds"] = checkpoints.pauses
        summary["checkpoint_write_seconds"] = checkpoints.write_seconds
    if trainer.num_skipped:
        prompts = sorted(trainer.skipped_prompts().items())
        summary["skipped_prompts"] = {str(iteration + 1): texts for iteration, texts in prompts}
        if world.main:
            print(trainer.describe_skipped())
    if received := trainer.received_bytes():
        cycles = (config.run.iterations - first) / (config.distill.critic_updates + 1)
        summary["received_bytes_a_cycle"] = received / max(cycles, 1)
        if world.main:
            print(f"communication: each process received {summary['received_bytes_a_cycle'] / 1e9:.3g} GB a cycle")
    if trainer.evaluation:
        summary["evaluation"] = report(trainer, folder)
    if journal:
        journal.finish(summary)
        if "peak_memory_gib" in summary:
            predicted, measured = summary["predicted_peak_memory_gib"], summary["peak_memory_gib"]
            print(f"peak memory: {predicted:.1f} GiB predicted, {measured:.1f} measured")
        print(f"student: {folder / 'student'}  (python -m dpdmd.sample --student {folder / 'student'} --prompt ...)")


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
        check_place(Path(config.run.output_dir), config.prompts.cache_dir)
        print(to_yaml(config), end="")
    else:
        train(config, resume=args.resume, overwrite=args.overwrite)


if __name__ == "__main__":
    sys.exit(main())
