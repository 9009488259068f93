"""The command `dpdmd`: what it hands on, what it refuses, and what it imports."""

from __future__ import annotations

import os
import re
import signal
import sys
from pathlib import Path

import pytest
from processes import ends, run_command, running

import dpdmd
from dpdmd import command
from dpdmd.__main__ import COMMANDS

ROOT = Path(__file__).parents[1]


def run(*arguments: str, start: tuple[str, ...] = ("-m", "dpdmd")):
    return run_command([sys.executable, *start, *arguments])


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_says_what_it_takes(name):
    answer = run(name, "--help")
    assert answer.returncode == 0, ends(answer.stdout, answer.stderr)
    assert re.match(rf"usage: .*dpdmd.{name}", answer.stdout)


def test_a_command_gets_its_arguments_and_passes_its_status_on():
    answer = run("plan", "run.seed=3", "--gpus", "0")
    assert answer.returncode == 2 and answer.stdout == ""
    assert answer.stderr == "error: --gpus = 0: 1 or more are needed\n"


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_the_commands_are_listed(option):
    answer = run(option)
    assert answer.returncode == 0 and answer.stderr == ""
    assert re.findall(r"^  (\w+)  ", answer.stdout, re.MULTILINE) == [*COMMANDS]


def test_the_version():
    answer = run("--version")
    (declared,) = re.findall(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert (answer.returncode, answer.stdout, answer.stderr) == (0, f"dpdmd {declared}\n", "")
    assert dpdmd.__version__ == declared


def test_other_names_stay_unknown():
    with pytest.raises(AttributeError, match="module 'dpdmd' has no attribute '__versions__'"):
        _ = dpdmd.__versions__


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["trian", "--help"], "'trian' is no command; did you mean 'train'? "),
        (["xyz"], "'xyz' is no command "),
        (["--resume", "train"], "'--resume' is no command "),
        ([""], "no command is given "),
        ([], "no command is given "),
    ],
)
def test_what_is_no_command_is_refused_in_one_line(arguments, said):
    answer = run(*arguments)
    assert answer.returncode == 2 and answer.stdout == ""
    assert answer.stderr.startswith(f"error: dpdmd: {said}(commands: train, ") and answer.stderr.count("\n") == 1


def test_only_the_chosen_command_is_imported():
    heavy = "('torch', 'pydantic', 'deepspeed', 'diffusers', 'importlib.metadata')"
    code = f"import sys; from dpdmd.__main__ import main; main(sys.argv[1:]); print([n for n in {heavy} if n in sys.modules])"
    for option in ("--help", "--version"):
        answer = run(option, start=("-c", code))
        assert answer.stdout.endswith("\n[]\n"), ends(answer.stdout, answer.stderr)


def test_it_answers_signals_as_an_installed_script(tmp_path):
    """Such a script lies in another folder than the package, and the command that it starts may be importing still."""
    (tmp_path / "slow.py").write_text("import signal\nprint('imports', flush=True)\nsignal.pause()\n")
    script = tmp_path / "script"
    script.write_text(
        "import sys\nfrom dpdmd.__main__ import COMMANDS, main\n"
        "COMMANDS['slow'] = ('slow', 'for this test')\nsys.exit(main())\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    for number, status, said in (
        (signal.SIGTERM, command.ENDED, "SIGTERM: ended\n"),
        (signal.SIGINT, 130, "error: interrupted\n"),
    ):
        with running("bash", "-c", 'exec "$@" 2>&1', "bash", sys.executable, script, "slow", env=env) as process:
            assert process.stdout.readline() == "imports\n"
            process.send_signal(number)
            assert process.wait() == status
            assert process.stdout.read() == said
