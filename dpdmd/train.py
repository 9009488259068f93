"""Distil a text-to-image teacher into a student of a few steps.

    deepspeed dpdmd/train.py [--config FILE] [section.key=value ...]

Without arguments it runs the demo that ships with the package. `--dry-run` prints the resolved configuration and stops.
"""

from __future__ import annotations

from dpdmd import command  # isort: skip  first: the others take seconds, in which a user may interrupt

import argparse
import contextlib
import sys
from dataclasses import dataclass
from pathlib import Path

from dpdmd.backbones import load_backbone
from dpdmd.command import RunEnded
from dpdmd.config import Config, load_config, to_yaml
from dpdmd.engine.start import resolve_dtype, start
from dpdmd.evaluation.report import draw_samples, measure_student, report
from dpdmd.files import digests
from dpdmd.planner.plan import Plan
from dpdmd.run.agreement import agree_on_attention, check_alike, check_kernels, check_settings
from dpdmd.run.checkpoint import Checkpoints, space_needed
from dpdmd.run.export import check_export, doubts, export_student
from dpdmd.run.folder import check_place, check_space
from dpdmd.run.journal import Journal
from dpdmd.run.progress import Progress
from dpdmd.run.resume import continued, identity, run_folder, starts
from dpdmd.run.stopping import Stop
from dpdmd.trainer import Trainer, build, check, load_prompts, plan_run, role_of, updates_before


def train(config: Config, *, resume: bool = False, overwrite: bool = False) -> None:
    """A whole run. Raises ConfigError for what cannot work, before it starts; RunStopped if the run breaks; RunEnded if it
    was asked to end; OSError if a file cannot be written."""
    command.quieten()
    prompts = load_prompts(config)
    backbone = load_backbone(config.model)
    config = backbone.resolved(config)
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
            run = Run(trainer, checkpoints, journal, progress, path, first)
            loop(run, stop)
        finish(run, plan)


@dataclass(frozen=True)
class Run:
    """What the loop works with. journal: on the main process only. first: the next iteration, from 0."""

    trainer: Trainer
    checkpoints: Checkpoints
    journal: Journal | None
    progress: Progress
    folder: Path
    first: int


def loop(run: Run, stop: Stop) -> None:
    """Runs the remaining updates; logs, samples, evaluates and saves when due."""
    trainer, checkpoints, journal, progress = run.trainer, run.checkpoints, run.journal, run.progress
    config, settings = trainer.config, trainer.config.run
    checkpoint_due = False
    for iteration in range(run.first, settings.iterations):
        role = role_of(iteration, config.distill.critic_updates)
        update = trainer.update(role, iteration)
        done = iteration + 1
        checkpoint_due |= due(done, settings.checkpoint_every) and done < settings.iterations
        logged = updates_before(iteration, config.distill.critic_updates) % settings.log_every == 0
        if logged or checkpoint_due or done == settings.iterations:
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
                f"{stop.reason}: ended after {done} of {settings.iterations} updates, which {saved} holds; the same command "
                "with --resume goes on from there",
                agreed=True,
            )
        student_updates = done // (config.distill.critic_updates + 1)
        if role == "student" and due(student_updates, settings.sample_every):
            draw_samples(trainer, run.folder / "samples" / f"step_{done:06d}.png")
        if role == "student" and trainer.evaluation and due(student_updates, config.evaluation.every):
            measurements = measure_student(trainer)
            if journal and measurements is not None:
                journal.write(iteration, "evaluation", measurements)
        if checkpoint_due and not any(trainer.skipped_in_a_row.values()):
            checkpoints.save(done, trainer.networks, trainer.state())
            checkpoint_due = False
    if run.first < settings.iterations:
        saved = checkpoints.save(settings.iterations, trainer.networks, trainer.state(), last=True)
        if any(trainer.world.gather(stop.requested)):
            raise RunEnded(
                f"{stop.reason}: ended after all {settings.iterations} updates, which {saved} holds; the same command with "
                "--resume exports the student",
                agreed=True,
            )


def due(count: int, every: int) -> bool:
    return every > 0 and count % every == 0


def finish(run: Run, plan: Plan) -> None:
    """After the last update: exports, measures and describes the student."""
    trainer, student = run.trainer, run.folder / "student"
    config, main = trainer.config, trainer.world.main
    check_export(trainer)
    export_student(student, trainer.networks["student"], trainer.backbone, trainer.distillation, config, trainer.world)
    summary = {
        "iterations": config.run.iterations,
        "student": digests(student) if main else {},
        **trainer.summary(config.run.iterations - run.first),
        **run.progress.summary(plan.peak),
        **run.checkpoints.summary(),
    }
    if main and trainer.num_skipped:
        print(trainer.describe_skipped())
    if main and (received := summary.get("received_bytes_a_cycle")):
        print(f"communication: each process received {received / 1e9:.3g} GB a cycle")
    if trainer.evaluation:
        summary["evaluation"] = report(trainer, run.folder)
    if run.journal:
        run.journal.finish(summary)
        if "peak_memory_gib" in summary:
            predicted, measured = summary["predicted_peak_memory_gib"], summary["peak_memory_gib"]
            print(f"peak memory: {predicted:.1f} GiB predicted, {measured:.1f} measured")
        print(f"student: {student}  (dpdmd sample --student {student} --prompt ...)")


def main(argv: list[str] | None = None) -> int:
    return command.run(_main, argv)


def _main(argv: list[str] | None) -> None:
    parser = command.Parser(prog="deepspeed dpdmd/train.py", description=str(__doc__).split("\n")[0])
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
