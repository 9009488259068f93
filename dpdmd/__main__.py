"""The command `dpdmd` and `python -m dpdmd`: the first argument names a command, which gets the others.

    dpdmd train --config configs/sd35_medium.yaml    is    python -m dpdmd.train --config configs/sd35_medium.yaml

Only the module of that command is imported.
"""

from __future__ import annotations

import difflib
import importlib
import sys

import dpdmd
from dpdmd import command

# {command: (its module, whose `main` takes the arguments that follow and returns the exit status; its help)}
COMMANDS = {
    "train": ("dpdmd.train", "distil a student, in one process (in several: deepspeed dpdmd/train.py)"),
    "plan": ("dpdmd.plan", "what fits on how many GPUs, and how fast about"),
    "sample": ("dpdmd.sample", "pictures of a trained student"),
}
USAGE = "\n".join(
    (
        "usage: dpdmd [--help] [--version] COMMAND ...",
        "",
        *(f"  {name:<8}{purpose}" for name, (_, purpose) in COMMANDS.items()),
        "",
        "dpdmd COMMAND --help lists the options of a command.",
    )
)


def main(argv: list[str] | None = None) -> int:
    command.answer_signals()
    return command.run(_main, sys.argv[1:] if argv is None else argv)


def _main(argv: list[str]) -> int | None:
    name, rest = (argv[0], argv[1:]) if argv else ("", [])
    if name in COMMANDS:
        return importlib.import_module(COMMANDS[name][0]).main(rest)
    if name in ("-h", "--help"):
        return print(USAGE)
    if name == "--version":
        return print(f"dpdmd {dpdmd.__version__}")
    near = difflib.get_close_matches(name, COMMANDS, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    given = f"{name[:120]!r} is no command{hint}" if name else "no command is given"
    raise command.ConfigError(f"dpdmd: {given} (commands: {', '.join(COMMANDS)}; dpdmd --help says what each does)")


if __name__ == "__main__":
    sys.exit(main())
