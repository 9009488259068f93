"""Whether a configuration fits, before anything is loaded; the choice of `auto`; and other settings that fit.

    dpdmd plan --config FILE [--gpus N ...] [--gpu-memory GIB] [section.key=value ...] [--output FILE.yaml]

It reads only configuration files and needs no GPU. planner/ computes what it prints.
"""

from __future__ import annotations

from dpdmd import command  # isort: skip  first: the others take seconds, in which a user may interrupt

import argparse
import itertools
import sys

from dpdmd.backbones import load_backbone
from dpdmd.config import Config, ConfigError, KeptPassesConfig, load_config, to_yaml
from dpdmd.engine.residency import POLICIES
from dpdmd.planner.footprint import CHECKPOINTING, Footprints
from dpdmd.planner.memory import GIB, GPUS_A_NODE, PARTS
from dpdmd.planner.plan import Plan, gib
from dpdmd.planner.search import Alternative, Planner, alternatives, gpu_bytes, recommend, refusal, with_engine

MOST_GPUS = 2**16

EXPLAINED = (  # the beginning of a setting, and what it changes and costs
    ("engine.residency=whole", "weights stay gathered until an update changes them: fewest bytes sent, most memory"),
    ("engine.residency=phase", "weights are gathered for a rollout or a chain and given back: more bytes, less memory"),
    ("engine.residency=block", "each block is gathered as it runs, in every pass: most bytes sent, beside the passes"),
    ("engine.checkpointing=none", "every activation is kept: nothing is computed twice"),
    (
        "engine.checkpointing=selective",
        "block passes beyond kept_passes are computed again in the backward pass, not attention",
    ),
    ("engine.checkpointing=full", "block passes beyond kept_passes are computed again in the backward pass, whole"),
    ("engine.checkpointing=auto", "activations are kept or computed again as memory allows"),
    ("engine.residency=auto", "weights stay gathered as long as memory allows"),
    ("engine.batch_size", "the same update from smaller batches: passes of fewer samples, gradients added in float32"),
    ("engine.offload=cpu", "masters and moments in the machine's memory: updates wait for PCIe and the CPU"),
    ("student_optimizer.state=bfloat16", "moments in 4 bytes a parameter for 8, stochastically rounded; costs no time"),
    ("student_optimizer.state=float8", "moments in 2 bytes a parameter for 8, stochastically rounded; costs no time"),
    ("student_optimizer", "moments in float32, which offload needs"),
    (
        "model.teacher_storage=float8",
        "the teacher's weights in a byte each, rounded to a 16th; made whole for its phases",
    ),
    ("lora.rank", "adapters on the teacher's weights in place of student and critic: less to train, another result"),
)


def report(config: Config, planner: Planner) -> tuple[str, Plan | None]:
    """The command's output, and the recommended plan; None if nothing fits."""
    gpus = planner.num_gpus
    plan = planner.resolve(config)
    student = planner.footprints.of(config, "student", config.engine.batch_size)
    trained = f", {student.trained / 1e6:.1f} million in each adapter" if config.lora is not None else ""
    frozen = student.parameters - (student.trained if config.lora is not None else 0)
    machines = -(-gpus // GPUS_A_NODE)
    lines = [
        f"{config.model.pipeline}: {frozen / 1e9:.2f} billion parameters{trained}; batch {config.engine.batch_size} a GPU, "
        f"{config.model.resolution} pixels",
        f"{gpus} GPU{'s' * (gpus > 1)} of {gib(planner.gpu_memory)} GiB"
        + (f" in {machines} machines of {GPUS_A_NODE}" if machines > 1 else ""),
        f"{plan.choice}",
        "",
        "GiB a GPU at the fullest moment of each phase",
        *phase_table(plan),
        "",
        f"peak: {gib(plan.peak)} GiB allocated, {gib(plan.needed)} with context and reserve: "
        + ("fits" if plan.fits else "tight" if plan.possible else "does not fit"),
        "memory of each machine: " + "; ".join(f"{name} {gib(size)} GiB" for name, size in plan.host.items()),
        f"a cycle takes about {plan.cycle:.1f} s, {plan.seconds_an_image**-1:.1f} images a second: "
        + ", ".join(f"{name} {value:.2f}" for name, value in plan.seconds.items()),
        f"a GPU receives {plan.traffic['gathered'] / 1e9:.1f} GB and sends {plan.traffic['reduced'] / 1e9:.1f} GB a cycle",
        "",
        "By residency and checkpointing, as many block passes kept as fit",
        *ways_table(config, planner),
        "",
    ]
    others = alternatives(config, planner)
    lines += [
        "Other settings: those that fit first, adapters after whole networks, then the fastest",
        *alternatives_table(others),
        "",
    ]
    best = recommend(config, planner, others)
    if best is None:
        return "\n".join([*lines, refusal(config, plan, planner)]), None
    lines += [f"recommended: {' '.join(best.changes) or 'as configured'}", f"  {best.plan.choice}"]
    for setting in (*best.changes, *best.plan.choice.split()):
        texts = [text for beginning, text in EXPLAINED if setting.startswith(beginning)]
        lines += [f"  {setting}: {text}" for text in texts[:1]]
    lines.append(
        f"  {gib(best.plan.peak)} GiB allocated at the peak, {gib(best.plan.needed)} of {gib(planner.gpu_memory)} GiB; "
        f"a cycle takes about {best.plan.cycle:.1f} s"
    )
    return "\n".join(lines), best.plan


def phase_table(plan: Plan) -> list[str]:
    rows = [[each.name, *(gib(each.parts[part]) for part in PARTS), gib(each.total)] for each in plan.phases]
    return _table([["phase", *PARTS, "total"], *rows])


def ways_table(config: Config, planner: Planner) -> list[str]:
    rows = [
        ["residency", "checkpointing", "kept student", "kept critic", "GiB", "fits", "s a cycle, about", "GB moved"]
    ]
    null = KeptPassesConfig()
    for residency, how in itertools.product(planner.policies, CHECKPOINTING):
        plan = planner.resolve(with_engine(config, residency=residency, checkpointing=how, kept_passes=null))
        kept = plan.config.engine.kept_passes
        sent = (plan.traffic["gathered"] + plan.traffic["reduced"]) / 1e9
        row = [residency, how, str(kept.student), str(kept.critic), gib(plan.needed), "yes" if plan.fits else "no"]
        rows.append([*row, f"{plan.cycle:.1f}", f"{sent:.1f}"])
    return _table(rows)


def alternatives_table(found: list[Alternative], most: int = 16) -> list[str]:
    rows = [["settings", "residency", "checkpointing", "GiB", "fits", "s a cycle, about", "GiB of the machine"]]
    for each in found[:most]:
        engine, plan = each.plan.config.engine, each.plan
        row = [" ".join(each.changes), engine.residency, engine.checkpointing, gib(plan.needed)]
        host = max(plan.host.values(), default=0.0)
        rows.append([*row, "yes" if plan.fits else "no", f"{plan.cycle:.1f}", gib(host)])
    return _table(rows)


def scaling_table(config: Config, planner: Planner, counts: list[int]) -> str:
    """A Markdown table with a line per number of GPUs: the recommendation, and what each residency would send."""
    lines = [
        "| GPUs | settings | residency | block passes kept (student, critic) | GiB | s a cycle | images a second "
        f"| GB a GPU receives and sends a cycle: {', '.join(POLICIES)} |",
        "| ---: | --- | --- | --- | ---: | ---: | ---: | --- |",
    ]
    for gpus in counts:
        there = planner.with_gpus(gpus)
        best = recommend(config, there, alternatives(config, there))
        if best is None:
            lines.append(f"| {gpus} | does not fit |  |  | {gib(there.resolve(config).needed)} |  |  |  |")
            continue
        found, engine = best.plan, best.plan.config.engine
        kept = "all" if engine.checkpointing == "none" else f"{engine.kept_passes.student}, {engine.kept_passes.critic}"
        plans = [there.plan(with_engine(found.config, residency=policy)) for policy in POLICIES]
        sent = [sum(each.traffic.values()) / 1e9 for each in plans]
        changes = "<br>".join(f"`{change}`" for change in best.changes) or "as configured"
        lines.append(
            f"| {gpus} | {changes} | {engine.residency} | {kept} | {gib(found.needed)} | {found.cycle:.1f} "
            f"| {found.seconds_an_image**-1:.1f} | {', '.join(f'{each:.0f}' for each in sent) if gpus > 1 else ''} |"
        )
    return "\n".join(lines)


def _table(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    texts = [not any(row[i].replace(".", "").isdigit() for row in rows[1:]) for i in range(len(widths))]
    lines = []
    for row in rows:
        columns = zip(row, widths, texts, strict=True)
        cells = [cell.ljust(width) if text else cell.rjust(width) for cell, width, text in columns]
        lines.append("  " + "  ".join(cells).rstrip())
    return lines


def architecture_only(config: Config):
    """The configuration's backbone, from the model's configuration files alone; known published models need none."""
    return load_backbone(config.model.model_copy(update={"random_init": True}))


_WRITTEN = "# By python -m dpdmd.plan"  # the beginning of a file of --output


def main(argv: list[str] | None = None) -> int:
    return command.run(_main, argv)


def _gpus(text: str) -> int | str:
    """A number of GPUs, or a setting that follows the numbers."""
    try:
        return text if "=" in text else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: a whole number is needed") from None


def _main(argv: list[str] | None) -> int:
    parser = argparse.ArgumentParser(prog="dpdmd plan", description=str(__doc__).split("\n")[0])
    parser.add_argument("settings", nargs="*", metavar="section.key=value", help="settings over those of the file")
    parser.add_argument("--config", metavar="FILE", help="YAML file (default: the demo)")
    parser.add_argument(
        "--gpus",
        type=_gpus,
        nargs="+",
        default=[1],
        metavar="N",
        help="GPUs, a process each (default: 1); several numbers print a table with a recommendation for each",
    )
    parser.add_argument(
        "--gpu-memory", type=command.above_0, metavar="GIB", help="memory of each GPU (default: this machine's GPU)"
    )
    parser.add_argument(
        "--output", type=command.new_file, metavar="FILE.yaml", help="write the recommended configuration"
    )
    args = parser.parse_intermixed_args(argv)
    settings = [*args.settings, *(each for each in args.gpus if isinstance(each, str))]
    args.gpus = [each for each in args.gpus if not isinstance(each, str)]
    if min(args.gpus, default=0) < 1:
        raise ConfigError(f"--gpus = {min(args.gpus, default='nothing')}: 1 or more are needed")
    if max(args.gpus) > MOST_GPUS:
        raise ConfigError(f"--gpus = {max(args.gpus)}: at most {MOST_GPUS} are planned for")
    if len(args.gpus) > 1 and args.output is not None:
        raise ConfigError(f"--gpus = {args.gpus}: one number is needed for --output")
    if args.output is not None and args.output.exists() and not args.output.read_bytes().startswith(_WRITTEN.encode()):
        raise ConfigError(f"--output {args.output}: the file exists and is not this command's: take another name")
    memory = gpu_bytes() if args.gpu_memory is None else args.gpu_memory * GIB
    if memory is None:
        raise ConfigError("--gpu-memory is not given, and there is no GPU here to take it from: for example 80, in GiB")
    # The plan is for GPUs on every machine: settings for the CPU do not count.
    config = load_config(args.config, [*settings, "engine.device=cuda"])
    config = with_engine(config, device="auto")
    backbone = architecture_only(config)
    config = backbone.resolved(config)
    planner = Planner(Footprints(backbone), args.gpus[0], memory)
    if len(args.gpus) > 1:
        print(scaling_table(config, planner, args.gpus))
        return 0
    text, plan = report(config, planner)
    print(text)
    if plan is None:
        return 1
    if args.output is not None:
        header = f"{_WRITTEN} for {args.gpus[0]} GPUs of {gib(memory)} GiB.\n"
        args.output.write_text(header + to_yaml(plan.config), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
