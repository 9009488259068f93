"""Whatever a user gives, a command answers with one line that names it: the statuses, and thousands of mutations."""

from __future__ import annotations

import argparse
import datetime
import errno
import importlib
import itertools
import json
import os
import random
import re
import signal
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import yaml
from processes import run_command

from dpdmd import command
from dpdmd.command import BUG, ConfigError, RunStopped, run
from dpdmd.config import Config, known_keys, load_config, parse_config, to_yaml
from dpdmd.run.prompts import read_prompts


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """No launcher's variables, and no real waiting."""
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    waited = []
    monkeypatch.setattr(command.time, "sleep", waited.append)
    yield waited
    assert command._publish is None


def ended(capsys, function, *arguments):
    """The status and stderr of a command that does this."""
    status = run(function, *arguments)
    return status, capsys.readouterr().err


def raising(error):
    def function():
        raise error

    return function


# How a command ends


def test_what_a_command_returns_is_its_status(capsys):
    assert [run(lambda: None), run(lambda: 3), run(lambda x: x + 1, 4)] == [0, 3, 5]
    with pytest.raises(SystemExit):
        run(raising(SystemExit(2)))
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (ConfigError("run.seed = -1: no"), 2, "error: run.seed = -1: no\n"),
        (ConfigError("a: no\nb: no"), 2, "error: a: no\nerror: b: no\n"),
        (RunStopped("3 updates"), 1, "error: 3 updates\n"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
        (FileNotFoundError(errno.ENOENT, "No such file", "/a/b"), 1, "error: /a/b: No such file\n"),
        (OSError(errno.EXDEV, "Invalid link", "/a", None, "/b"), 1, "error: /a -> /b: Invalid link\n"),
        (PermissionError(errno.EACCES, "Permission denied", b"/caf\xe9"), 1, "error: /caf\\udce9: Permission denied\n"),
        (OSError("a sentence\nof two lines"), 1, "error: a sentence of two lines\n"),
        (OSError(), 1, "error: OSError\n"),
        (MemoryError(), 1, "error: out of memory (Python's own): a smaller batch needs less"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\n3 GiB"),
            1,
            "Tried to allocate 3 GiB): a smaller",
        ),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, "error: out of memory (DefaultCPUAllocator"),
        (ModuleNotFoundError("no", name="never_there.below"), 1, "'never_there.below' is not installed for /"),
        (UnicodeEncodeError("utf-8", "\ud800", 0, 1, "no"), BUG, "this is a bug of dpdmd"),
        (ModuleNotFoundError("no", name="dpdmd.never_there"), BUG, "this is a bug of dpdmd"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 1, "error: Broken pipe\n"),  # of another pipe than ours
        (RuntimeError("Connection closed by peer"), BUG, "this is a bug of dpdmd"),  # processes have not met
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_statuses(capsys, error, status, words):
    found, err = ended(capsys, raising(error))
    assert found == status and words in err
    assert ("Traceback" in err) == (status == BUG)


def test_a_bug_shows_where_and_asks_for_a_report(capsys):
    status, err = ended(capsys, lambda: {}["a"])
    first, *_, last = err.splitlines()
    assert status == 70 and first.startswith("Traceback") and "test_errors.py" in err
    assert last.startswith("error: KeyError: 'a': this is a bug of dpdmd; please report it, with the lines above")


def test_an_error_without_a_path_says_where_it_came_from(capsys):
    class Full:
        def model_dump(self, mode):
            raise OSError(errno.ENOSPC, "No space left on device")

    _, err = ended(capsys, to_yaml, Full())
    assert err.startswith("error: No space left on device (in to_yaml, line ") and err.endswith("dpdmd/config.py)\n")


# Several processes


def test_before_processes_meet_the_first_of_a_machine_speaks_at_once(capsys, monkeypatch, alone):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert ended(capsys, raising(ConfigError("x"))) == (2, "error: x\n") and alone == []
    monkeypatch.setenv("RANK", "8")  # of a second machine
    assert ended(capsys, raising(ConfigError("x"))) == (2, "\nerror (process 8): x\n") and alone == []


def test_before_processes_meet_the_others_wait_to_be_ended_and_are_never_silent(capsys, monkeypatch, alone):
    """What is wrong for all is said by process 0, whose end makes the launcher end the others during their wait; process 1
    with an error of its own outlives it."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert ended(capsys, raising(ConfigError("x\ny")))[1] == "\nerror (process 1): x\nerror (process 1): y\n"
    assert alone == [command._PATIENCE]
    assert "error (process 1): /a: gone" in ended(capsys, raising(OSError(errno.EIO, "gone", "/a")))[1]
    assert "Traceback" in ended(capsys, raising(KeyError("x")))[1]


@pytest.mark.parametrize("rank", ["0", "1"])
def test_once_processes_have_met_they_decide_who_speaks(capsys, monkeypatch, alone, rank):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("LOCAL_RANK", rank)
    said = []

    def fail(error, answer):
        def publish(text):
            said.append(text)
            if isinstance(answer, Exception):
                raise answer
            return answer

        command.met(publish)
        raise error

    start = "error: " if rank == "0" else "\nerror (process 1): "
    assert ended(capsys, fail, ConfigError("x"), True) == (2, f"{start}x\n") and said == ["x"]
    assert ended(capsys, fail, ConfigError("x"), False) == (2, "")
    assert ended(capsys, fail, RunStopped("x"), RuntimeError("nobody answers")) == (1, f"{start}x\n")
    gone = RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:1")
    words = "another process of this run has ended: its error is the reason; if it printed none it was killed"
    assert ended(capsys, fail, gone, True)[1].startswith(f"{start}{words}")
    assert alone == []


def test_a_run_that_was_asked_to_end_says_so(capsys, monkeypatch, alone):
    """The process that was, or the main one of all that agreed."""
    for rank, agreed, said in (
        ("0", False, "SIGTERM: ended\n"),
        ("1", False, "\n(process 1): SIGTERM: ended\n"),
        ("0", True, "SIGTERM: ended\n"),
        ("1", True, ""),
    ):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
        error = command.RunEnded("SIGTERM: ended", agreed=agreed)
        assert ended(capsys, raising(error)) == (command.ENDED, said)
    assert alone == []


def test_an_interrupt_is_said_once(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert ended(capsys, raising(KeyboardInterrupt())) == (130, "")


def test_wrong_options_are_said_once(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit) as ending:
        command.Parser(prog="x").parse_args(["--none"])
    assert ending.value.code == 2 and capsys.readouterr().err == ""
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(SystemExit):
        command.Parser(prog="x").parse_args(["--none"])
    assert "unrecognized arguments: --none" in capsys.readouterr().err


# Streams


def piped(body, tail, **environment):
    """A command that does `body`, its output to a shell's `tail`: the command's status, and what both streams got."""
    code = f"import sys\nfrom dpdmd.command import *\ndef function():\n{textwrap.indent(body, ' ')}\nsys.exit(run(function))"
    done = run_command(
        ["bash", "-c", f'"$0" -c "$1" {tail}; exit ${{PIPESTATUS[0]}}', sys.executable, code],
        env={**os.environ, **environment},
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    "body",
    [
        "for i in range(100000): print(i)",
        # Its reader is gone before the first flush, at the end.
        "import time\nprint(1, flush=True)\nfor _ in range(600):\n if __import__('dpdmd').command._unread(sys.stdout): break\n"
        " time.sleep(0.1)\nprint(2)",
        "import argparse\nparser = argparse.ArgumentParser()\nfor i in range(9999): parser.add_argument(f'--option-{i}')\n"
        "parser.parse_args(['--help'])",
    ],
    ids=["while printing", "at the end", "help"],
)
def test_a_reader_that_has_gone_is_no_error(body):
    status, out, err = piped(body, "| head -n 1")
    # argparse says nothing of help that it could not write.
    assert status == 141 or ("--help" in body and status == 0)
    assert err == "" and out.count("\n") == 1


def test_an_error_into_a_pipe_that_nobody_reads():
    assert piped("raise ConfigError('x')", "2>&1 | true")[::2] == (2, "")
    assert piped("raise ConfigError('x')", ">&- 2>&-")[::2] == (2, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_output_that_cannot_be_written():
    assert piped("print(1)", "> /dev/full") == (1, "", "error: No space left on device\n")


def test_output_that_the_terminal_cannot_show():
    status, _, err = piped("print(chr(233))", "", PYTHONIOENCODING="ascii")
    said = "error: stdout takes only ascii, which lacks a character of the output: set PYTHONIOENCODING=utf-8\n"
    assert status == 1 and err == said


# Paths and numbers of command lines


def test_home_folders(monkeypatch, tmp_path):
    import pwd

    monkeypatch.setenv("HOME", str(tmp_path))
    own = pwd.getpwuid(os.getuid())
    assert command.expand("~/runs/x") == f"{tmp_path}/runs/x" and command.expand("~") == str(tmp_path)
    assert command.expand(f"~{own.pw_name}/x") == f"{own.pw_dir}/x"
    for text in ("$HOME/x", "a/~/b", "x~", "./~/x", "owner/name"):
        assert command.expand(text) == text
    with pytest.raises(
        ValueError, match=r"there is no home folder for ~nobody-here; for a folder of that name write \./~"
    ):
        command.expand("~nobody-here/x")
    for text in ("", "  ", "a\0b", "a\nb", "\x1b"):
        with pytest.raises(ValueError, match="no file or folder"):
            command.expand(text)


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (command.count, {"1": 1, "2147483647": 2**31 - 1}, ["0", "-1", "1.0", "", "x", "1" * 5000, "2147483648"]),
        (command.seed, {"0": 0, str(2**63 - 1): 2**63 - 1}, ["-1", str(2**63), "nan"]),
        (command.above_0, {"1e-3": 1e-3, "80": 80.0}, ["0", "-1", "inf", "nan", "", "x", "1e999"]),
        (command.within(0, 1e6), {"0": 0.0, "1e6": 1e6}, ["-0.1", "1000001", "inf", "nan", "x"]),
        (command.location, {"owner/name": "owner/name", "./x": "./x"}, ["", "~nobody-here", "a\nb"]),
    ],
)
def test_what_options_accept(kind, good, bad):
    import argparse

    assert {text: kind(text) for text in good} == good
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError) as refused:
            kind(text)
        assert len(str(refused.value)) < 400


def mains():
    from dpdmd import plan, sample, train
    from dpdmd.worlds.demo import train_teacher

    return {
        "train": (train.main, ["--config", "{tmp}/none.yaml"]),
        "train on a directory": (train.main, ["--config", "{tmp}"]),
        "train with a word": (train.main, ["engine=cpu"]),
        "train with a folder of prompts": (train.main, ["prompts.file={tmp}"]),
        "train on pictures of another size": (train.main, ["model.resolution=24", "run.output_dir={tmp}/x"]),
        "plan": (plan.main, ["--gpu-memory", "16", "--config", "{tmp}/none.yaml"]),
        "plan for too many": (plan.main, ["--gpu-memory", "16", "--gpus", str(10**20)]),
        "sample": (sample.main, ["--student", "{tmp}/none", "--prompt", "x"]),
        "sample with half a character": (sample.main, ["--student", "{tmp}", "--prompt", "\udcff"]),
        "teacher of another folder": (train_teacher.main, ["--evaluate", "{tmp}", "--device", "cpu"]),
        "teacher's card": (train_teacher.main, ["--evaluate", "{tmp}/none", "--device", "cpu"]),
    }


@pytest.mark.parametrize("name", sorted(mains()))
def test_every_command_answers_in_one_line(name, tmp_path, capsys):
    main, arguments = mains()[name]
    status = main([argument.format(tmp=tmp_path) for argument in arguments])
    err = capsys.readouterr().err
    assert status in (1, 2) and err.startswith("error: ") and err.count("\n") == 1, err


@pytest.mark.parametrize(
    "arguments",
    [
        ["sample", "--student", "", "--prompt", "x"],
        ["sample", "--student", "~nobody-here", "--prompt", "x"],
        ["sample", "--student", "x", "--prompt", "x", "--num-images", "0"],
        ["sample", "--student", "x", "--prompt", "x", "--seed", "-1"],
        ["plan", "--gpu-memory", "nan"],
        ["plan", "--gpu-memory", "0"],
        ["plan", "--output", "~nobody-here/x"],
        ["demo_curves", "train", "--parallel", "0"],
        ["train_teacher", "--steps", "-1"],
        ["train_teacher", "--rate", "inf"],
        ["train_teacher", "--shift", "1e300"],
        ["train_teacher", "--shift", "nan"],
        ["train_teacher", "--width", "65"],
        ["train_teacher", "--device", "toaster"],
        ["train_teacher", "--device", "cuda:99"],
        ["train_teacher", "--device", "meta"],
        ["train_teacher", "--num-prompts", "100000"],
        ["chaos", "--jobs", "0"],
        ["chaos", "--damages", "-1"],
        ["chaos", "--seed", "-1"],
        ["run", "--op", "transformer", "--batch", "x"],
        # Where what takes long would be written.
        ["sample", "--student", "x", "--prompt", "x", "--output", "/dev/null/x"],
        ["plan", "--output", "/none/x.yaml"],
        ["demo_curves", "train", "--output", "/none/x.json"],
        ["demo_curves", "train", "--runs", "/dev/null"],
        ["demo_curves", "draw", "x", "--output", "/"],
        ["train_teacher", "--out", "/dev/null"],
        ["chaos", "--json", "/none/x.json"],
        ["checkpoint", "--json", "/"],
        ["checkpoint", "--folder", "/dev/null/x"],
        ["cycle", "--json", "/none/x.json"],
        ["run", "--json", "/none/x.json"],
        ["run", "--op", "cycle", "--json", "/none/x.json"],
        ["run", "--plot", "--output", "/"],
        ["gpu_tests", "--output", "/none/x.json"],
    ],
    ids=" ".join,
)
def test_options_have_ranges(arguments, monkeypatch, capsys):
    name, *arguments = arguments
    if name in ("chaos", "checkpoint", "cycle", "demo_curves", "gpu_tests", "run"):
        monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
        package = ""
    else:
        package = "dpdmd.worlds.demo." if name == "train_teacher" else "dpdmd."
    before = set(sys.modules)
    with pytest.raises(SystemExit) as ending:
        importlib.import_module(f"{package}{name}").main(arguments)
    for each in set(sys.modules) - before:
        if str(Path(__file__).parents[1] / "benchmarks") in str(getattr(sys.modules[each], "__file__", "")):
            del sys.modules[each]
    assert ending.value.code == 2
    refused = re.search(": error: argument (--[a-z-]+): ", capsys.readouterr().err)
    assert refused is not None and refused[1] in arguments


def test_where_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert command.new_file("file") == Path("file") and command.new_file("new.json") == Path("new.json")
    assert command.new_folder("a/b/c") == Path("a/b/c") and not (tmp_path / "a").exists()
    assert command.new_folder(f"{tmp_path}") == tmp_path
    for of, text, problem in (
        (command.new_file, ".", "it is a folder, and a file is needed"),
        (command.new_file, "no/x", "there is no folder no"),
        (command.new_file, "file/x", "there is no folder file"),
        (command.new_file, "/dev/null", "it is a device or a pipe, and a file is needed"),
        (command.new_folder, "file/x", f"{tmp_path}/file is no folder"),
        (command.new_folder, "file", "file is no folder"),
    ):
        with pytest.raises(argparse.ArgumentTypeError, match=re.escape(f"{text!r}: {problem}")):
            of(text)
    monkeypatch.setattr(command.os, "access", lambda *where: False)
    for of in (command.new_file, command.new_folder):
        with pytest.raises(argparse.ArgumentTypeError, match="cannot be written to"):
            of("x")


def test_home_folders_on_command_lines(monkeypatch, tmp_path, capsys):
    from dpdmd import plan, sample, train

    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x.yaml").write_text("run: {output_dir: ~/runs/x}\n")
    assert train.main(["--config", "~/x.yaml", "--dry-run", "prompts.cache_dir=~/cache"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert (
        printed["run"]["output_dir"] == f"{tmp_path}/runs/x" and printed["prompts"]["cache_dir"] == f"{tmp_path}/cache"
    )
    assert sample.main(["--student", "~/none", "--prompt", "x"]) == 2
    assert f"--student {tmp_path}/none" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        plan.main(["--gpu-memory", "16", "--output", "~/none/x.yaml"])
    assert f"argument --output: '~/none/x.yaml': there is no folder {tmp_path}/none" in capsys.readouterr().err


# Thousands of mutations, the same in every run


def refused(function, *arguments, names=()) -> bool:
    """Whether it is refused, as it must be: in short lines, each of which names one of `names`; any other exception
    passes through."""
    try:
        function(*arguments)
    except ConfigError as error:
        lines = str(error).split("\n")
        assert all(line and len(line) < 1500 and line.isprintable() for line in lines), lines
        assert len(lines) == len(set(lines)), lines
        assert not names or all(any(name in line for name in names) for line in lines), lines
        return True
    return False


# As written after `key=`, in YAML: for every key ...
VALUES = [
    *(
        "cpu",
        "''",
        '" "',
        "no",
        "on",
        "true",
        "null",
        "~/x",
        "~none-here/x",
        "$HOME",
        "0",
        "-1",
        "1",
        "3",
        "4.0",
        "-0.0",
    ),
    *("0.5", "1e-5", "1e5", ".5", "010", "0x1F", "1_000", "1:30", "2020-12-25", "2020-13-45", str(10**20), "9" * 400),
    *("1e999", ".inf", "-.inf", ".nan", "inf", "nan", "[]", "{}", "[1, 2]", "[[]]", "[a, b]", "[null]", "[1, .nan]"),
    *(
        "[0.9, 0.7, 0.5, 0.2]",
        "{a: 1}",
        "{a: {b: [.inf]}}",
        "{a: 2020-12-25}",
        "'3'",
        '"\\0"',
        '"\\n"',
        "日本",
        "x" * 300,
    ),
]
# ... and, being YAML's matter alone, for some.
TEXTS = [
    *(
        '""',
        "yes",
        "off",
        "false",
        "Null",
        "1E+3",
        "5.",
        "+7",
        "0o17",
        "0b11",
        "_",
        "1__",
        ".",
        "._",
        "0x_",
        "0b_",
        "-",
        "+",
    ),
    *(
        "190:20:30.15",
        "2020-12-25 10:00:00",
        "2001-12-14t21:59:43.10-05:00",
        "=",
        "<<",
        "99999999999",
        "9" * 5000,
        "-1e999",
    ),
    *(".NaN", "Infinity", "0x" + "f" * 5000, "[true, false]", "{1: 2}", "{null: 1}", "{[1]: 2}", "{? {x: 1} : 2}"),
    *(
        "{a: 1, a: 2}",
        "&a [*a]",
        "&a {x: *a}",
        "*nowhere",
        "[&a 1, *a]",
        "{<<: {a: 1}}",
        "{<<: 3}",
        "{<<: {a: 1}, a: 2}",
    ),
    *("!!int x", "!!bool x", "!!timestamp x", "!!float x", "!!python/name:os.system", "!!binary aGk=", "!!set {a}"),
    *(
        "!!omap [a: 1]",
        "! x",
        "!!str 3",
        "!x y",
        "%",
        "@",
        "`",
        "|",
        ">",
        "- a",
        "a: b",
        "a:b",
        "[",
        "]",
        "{",
        "}",
        '"',
        "'",
    ),
    *(
        '"\\ud800"',
        '{"\\ud800": 1}',
        '"\\x85"',
        "\u2028",
        "\u2029x",
        "\x85",
        "\ufeff",
        "a\ufeff",
        "é",
        "😀",
        "\x00",
        "\x07",
    ),
    *("\x7f", "\ud83d", "a\tb", "\ta", "a\nb", "--- 1", "--- 1\n--- 2", "...", "# only", "x # tail", "~", "", " "),
    *("[" * 50 + "]" * 50, "[" * 600, "a" * 2000, '"\\r a \\r"', '" a"', '"a "', "'a  b'", "a" * 79 + " " + "b" * 9),
]
TEXT_KEYS = (
    "engine.deepspeed",
    "prompts.negative_prompt",
    "run.sample_prompts",
    "run.seed",
    "student_optimizer.lr",
    "lora",
)


def round_trips(config, file):
    file.write_text(to_yaml(config), encoding="utf-8")
    json.dumps(config.model_dump(mode="json"), allow_nan=False)
    assert load_config(file) == config, to_yaml(config)


def test_every_key_with_every_value(tmp_path):
    """Each is taken, and then can be written and read again, or refused by a line that names it."""
    file = tmp_path / "settings.yaml"
    file.write_text("run: {iterations: 60}\n")
    known = known_keys()
    unknown = [
        "on_cpu",
        "engine.nothing",
        "lora.rnak",
        "Engine.batch_size",
        "batch_size",
        "a.b.c.d",
        "é.ü",
        "a\nb",
        "a" * 500,
    ]
    pairs = [*itertools.product((*known, *unknown), VALUES), *itertools.product(TEXT_KEYS, TEXTS)]
    found, written = {True: 0, False: 0}, set()
    for key, value in pairs:
        section = key.split(".")[0]
        names = ("override", *(each for each in known if each.split(".")[0] == section)) if key in known else ()
        wrong = refused(load_config, file, [f"{key}={value}"], names=names)
        found[wrong] += 1
        if not wrong:
            assert key in known, key
            if (key in TEXT_KEYS, value) not in written:
                written.add((key in TEXT_KEYS, value))
                round_trips(load_config(file, [f"{key}={value}"]), tmp_path / "again.yaml")
    assert found[True] > 3000 and found[False] > 400, found


PYTHON_VALUES = [
    *(
        None,
        True,
        3,
        3.0,
        2.5,
        10**20,
        10**5000,
        -1,
        float("inf"),
        float("nan"),
        "",
        "4",
        "1e-5",
        "\ud800",
        "a\0",
        b"",
        b"a",
    ),
    *(
        datetime.date(2020, 12, 25),
        {1, 2},
        (),
        (1, 2),
        [],
        {},
        object(),
        [[]],
        {"a": {"b": b"c"}},
        {1: 2},
        {"a": (1, 2)},
    ),
    *(
        {"a": datetime.date(2020, 12, 25)},
        {"a": float("nan")},
        {"a": 2**63},
        {"\ud800": 1},
        range(3),
        print,
        1j,
        Config,
    ),
]


def test_every_key_with_every_value_of_python():
    known = known_keys()
    for key, value in itertools.product(known, PYTHON_VALUES):
        values = value
        for part in reversed(key.split(".")):
            values = {part: values}
        if not refused(parse_config, values, names=[key.split(".")[0], *known]):
            json.dumps(parse_config(values).model_dump(mode="json"), allow_nan=False)
    for values in (None, 3, "x", [], [1], {1: 2}, {"a": 1}):
        assert refused(parse_config, values) or values == {}


SETTINGS = """\
model: {pipeline: demo, resolution: 32}
prompts: &p
  negative_prompt: "a, b"  # é
distill:
  student_grid: [1.0, 0.75, 0.5, 0.25]
  teacher_steps: 30
student_optimizer: &opt {lr: 1.0e-4, betas: [0.9, 0.999]}
critic_optimizer: *opt
lora:
  targets: ['to_q', to_k]
run: {iterations: 60, output_dir: runs/x}
on_cpu:
  engine: {batch_size: 2}
"""
PIECES = [
    *(
        "\t",
        "\n",
        "  ",
        ":",
        ": ",
        "- ",
        "[",
        "]",
        "{",
        "}",
        ",",
        "#",
        "&a",
        "*opt",
        "*p",
        "<<: *opt",
        "!!int ",
        "'",
        '"',
        "|",
    ),
    *(
        "---\n",
        "...\n",
        "%YAML 1.1\n",
        "? ",
        "null",
        "~",
        ".inf",
        "2020-12-25",
        "1e-5",
        "\x00",
        "\ufeff",
        "😀",
        "\r",
        "on_cpu",
    ),
]


def mutated(text, pieces, draw):
    """`text` with one to three pieces cut, doubled, moved or put in."""
    for _ in range(draw.randint(1, 3)):
        at, length = draw.randrange(len(text) + 1), draw.randint(1, 12)
        piece = draw.choice([text[at : at + length], draw.choice(pieces)])
        cut = draw.choice([0, length])
        to = draw.choice([at, draw.randrange(len(text) + 1)])
        text = text[:at] + text[at + cut :]
        text = text[:to] + piece + text[to:]
    return text


def test_mutated_files(tmp_path):
    draw = random.Random(0)
    file, again, found = tmp_path / "settings.yaml", tmp_path / "again.yaml", {True: 0, False: 0}
    file.write_text(SETTINGS, encoding="utf-8")
    assert not refused(load_config, file)
    for _ in range(500):
        file.write_text(mutated(SETTINGS, PIECES, draw), encoding="utf-8")
        wrong = refused(load_config, file)
        found[wrong] += 1
        if not wrong:
            round_trips(load_config(file), again)
    for _ in range(250):
        data = bytearray(SETTINGS.encode())
        for _ in range(draw.randint(1, 4)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        file.write_bytes(data[: draw.choice([len(data), draw.randrange(len(data))])])
        found[refused(load_config, file)] += 1
    assert found[True] > 100 and found[False] > 30, found


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n" for a, b in itertools.pairwise("abcdefghij")
)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"engine: cpu", "engine = 'cpu': a section with keys is needed, for example engine.batch_size=4"),
        (b"on_cpu: true", "on_cpu = True: sections with keys are needed"),
        (b"on_cpu: [1]", "on_cpu = [1]: sections with keys are needed"),
        (b"on_cpu: ''", "on_cpu = '': sections with keys are needed"),
        (b"on_cpu: {engine: {batch_size: 0}}", "on_cpu.engine.batch_size = 0: "),
        (
            b"on_cpu: {engine: {bath_size: 1}}",
            "on_cpu.engine.bath_size: unknown key; the nearest known is engine.batch_size",
        ),
        (b"on_cpu: {on_cpu: {}}", "on_cpu.on_cpu: unknown key"),
        (b"run: {seed: 1, seed: 2}", "line 1, column 16: the key 'seed' stands twice, in line 1 too"),
        (b"run: {seed: 1}\nrun: {seed: 2}", "line 2, column 1: the key 'run' stands twice, in line 1 too"),
        (b'run: {seed: 1, "seed": 2}', "the key 'seed' stands twice"),
        (b"run:\n\tseed: 1", "line 2, column 1: found character '\\t'"),
        (b"run: {seed: 1}\n---\nrun: {seed: 2}", "line 2, column 1: but found another document"),
        (b"run: {seed: !!int x}", "the tag tag:yaml.org,2002:int is not read"),
        (
            b"!!python/object/apply:os.system [true]",
            "the tag tag:yaml.org,2002:python/object/apply:os.system is not read",
        ),
        (b"on: {seed: 1}", "True: a key has to be text (quote it)"),
        (b"engine.batch_size: 3", "in a file keys stand under their sections, as in `engine: {batch_size: ...}`"),
        (BOMB.encode(), "more than 100000 values"),
        (BOMB.replace("x", "[]").encode(), "more than 100000 values"),
        (b"run: &a {x: *a}", "nested more than 30 deep, or holds itself"),
        (b"run: " + b"[" * 600, "nested more than 30 deep"),
        (b"run: {seed: *none}", "found undefined alias 'none'"),
        (b"\x89PNG\r\n\x1a\n\0\0", "'utf-8' codec can't decode byte 0x89"),
        ("run: {seed: 1}".encode("utf-16"), "'utf-8' codec can't decode byte 0xff"),
        (b"run: {seed: 1}\0", "special characters are not allowed"),
        (b"x" * (2**20 + 1), "1048577 bytes; at most 1048576 are allowed"),
    ],
    ids=range(25),
)
def test_files_that_are_no_configuration(tmp_path, content, words):
    file = tmp_path / "settings.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError) as error:
        load_config(file)
    assert words in str(error.value) and "\n" not in str(error.value)


def special(folder, kind, name):
    """A path that is no readable file."""
    path = folder / name
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "nothing":
        path.symlink_to("/dev/null")
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "locked":
        path.write_text("a")
        path.chmod(0)
    elif kind == "below a file":
        path.write_text("a")
        path = path / name
    elif kind == "long":
        path = folder / (300 * "a" + name)
    return path


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("folder", "Is a directory"),
        ("pipe", "a pipe, where a file is needed"),  # nobody writes to it: opening it would wait for ever
        ("device", "a device, where a file is needed"),
        ("nothing", "a device, where a file is needed"),
        ("loop", "Too many levels of symbolic links"),
        ("locked", "Permission denied"),
        ("below a file", "Not a directory"),
        ("long", "File name too long"),
        ("absent", "No such file or directory"),
    ],
)
def test_paths_that_are_no_file(tmp_path, kind, words):
    if kind == "locked" and os.geteuid() == 0:
        pytest.skip("root reads everything")
    for name, read, key in (
        ("settings.yaml", load_config, "--config"),
        *((f"a{suffix}", read_prompts, "prompts.file") for suffix in (".txt", ".jsonl", ".csv")),
    ):
        path = special(tmp_path, kind, name)
        with pytest.raises(ConfigError) as error:
            read(path)
        shown = f"{str(path)[:20]}" if kind == "long" else f"{path}: "
        assert str(error.value).startswith(f"{key} ") and shown in str(error.value)
        assert str(error.value).endswith(f": cannot be read ({words})")


def test_a_pipe_without_a_writer_does_not_hold_up_a_run(tmp_path, capsys):
    from dpdmd import train

    os.mkfifo(tmp_path / "prompts.txt")
    assert train.main([f"prompts.file={tmp_path}/prompts.txt", f"run.output_dir={tmp_path}/run"]) == 2
    assert "a pipe, where a file is needed" in capsys.readouterr().err


@pytest.mark.parametrize("path", ["a\0b", "\ud800.txt", "", " ", "a\nb"])
def test_paths_that_no_file_has(path):
    assert refused(load_config, path) and refused(read_prompts, f"{path}.txt")


PROMPTS = {
    ".txt": "0 --- a ring\n1 --- two rings, é\n\n2 --- 日本\n",
    ".jsonl": '{"prompt": "a ring", "n": 1}\n"a cross"\n\n{"prompt": "\\ud83d\\ude00", "x": [1, {}]}\n',
    ".csv": 'id,prompt,x\r\n1,"a ring, red\nand ""big""",\r\n2,,b\r\n3,日本,c\r\n',
}
PROMPT_PIECES = [
    *(
        "\x00",
        "\n",
        "\r",
        "\r\n",
        ",",
        ",,,",
        '"',
        '""',
        "'",
        ";",
        "\t",
        "{",
        "}",
        "[",
        "]",
        "[" * 5000,
        '{"a":' * 3000,
        "null",
    ),
    *(
        "true",
        "1",
        "1e999",
        "NaN",
        "9" * 5000,
        '"\\ud800"',
        '"prompt": 3, ',
        '"prompt": null',
        "prompt",
        "prompt,prompt",
        "\ufeff",
    ),
    *(" ", "\u2028", "x" * 140_000, '"' + "x" * 140_000 + '"', "😀", "\\", "\\u12", "0 ---"),
]


@pytest.mark.parametrize("suffix", PROMPTS)
def test_mutated_prompt_files(tmp_path, suffix):
    """Each gives prompts that can be used, or is refused by a line that names the file."""
    draw = random.Random(suffix)
    file, found = tmp_path / f"prompts{suffix}", {True: 0, False: 0}

    def read(data):
        file.write_bytes(data)
        for field in ("prompt", "x"):
            wrong = refused(read_prompts, file, field, names=[f"prompts.file {file}: "])
            found[wrong] += 1
            if not wrong:
                prompts = read_prompts(file, field)
                assert prompts and all(prompt and prompt == prompt.strip() and "\0" not in prompt for prompt in prompts)
                "".join(prompts).encode("utf-8")

    text = PROMPTS[suffix]
    for _ in range(250):
        read(mutated(text, PROMPT_PIECES, draw).encode("utf-8", "surrogatepass"))
    for _ in range(150):
        data = bytearray(text.encode())
        for _ in range(draw.randint(1, 4)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        read(bytes(data[: draw.choice([len(data), draw.randrange(len(data))])]))
    for encoding in (
        "utf-8-sig",
        "utf-16",
        "utf-16-le",
        "utf-16-be",
        "utf-32",
        "utf-32-le",
        "utf-7",
        "gb18030",
        "shift-jis",
    ):
        read(text.encode(encoding, "ignore"))
    assert found[True] > 100 and found[False] > 30, found


COMMANDS = ("dpdmd/train.py", "dpdmd/sample.py", "dpdmd/plan.py", "dpdmd/worlds/demo/train_teacher.py",
            "benchmarks/demo_curves.py", "benchmarks/cycle.py", "benchmarks/gpu_tests.py", "benchmarks/checkpoint.py",
            "benchmarks/run.py", "benchmarks/chaos.py")  # fmt: skip


def test_the_planner_tries_nothing_that_cannot_be(capsys):
    from dpdmd import plan

    settings = ["engine.batch_size=65536", "engine.accumulation=65536"]  # whose parts would be of another accumulation
    assert plan.main(["--gpus", "8", "--gpu-memory", "79", *settings]) == 0
    assert not capsys.readouterr().err


@pytest.mark.parametrize("file", COMMANDS)
@pytest.mark.parametrize(
    "name, status, said",
    [
        ("SIGINT", -signal.SIGINT, "error: interrupted\n"),
        ("SIGTERM", command.ENDED, "SIGTERM: ended\n"),
        ("SIGHUP", command.ENDED, "SIGHUP: ended\n"),
    ],
)
def test_a_signal_during_imports(tmp_path, file, name, status, said):
    """Of which torch's is the longest."""
    (tmp_path / "torch.py").write_text(f"import os, signal\nos.kill(os.getpid(), signal.{name})\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = run_command([sys.executable, Path(__file__).parents[1] / file], env=environment)
    assert done.returncode == status and done.stderr == said, done.stderr


@pytest.mark.parametrize("file", COMMANDS)
def test_a_package_that_is_not_there(tmp_path, file):
    """As where the environment of an installation was not activated."""
    (tmp_path / "torch.py").write_text("import never_there\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = run_command([sys.executable, Path(__file__).parents[1] / file], env=environment)
    said = f"error: the package 'never_there' is not installed for {sys.executable}: activate the environment"
    assert done.returncode == 1 and done.stderr.startswith(said) and done.stderr.count("\n") == 1, done.stderr


def test_local_rank_alone_is_no_launchers(monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert ended(capsys, raising(ConfigError("x"))) == (2, "error: x\n")
    monkeypatch.setenv("RANK", "")
    assert ended(capsys, raising(ConfigError("x"))) == (2, "error: x\n")


@pytest.mark.parametrize(
    "override, words",
    [
        ("run.output_dir=/tmp/y #2", "a value with a # after a space needs quotes"),
        ("prompts.negative_prompt=it is\t# bad", "a value with a # after a space needs quotes"),
        ("run.output_dir=/tmp/a\nb", "a value with line ends needs quotes"),
        ("run.output_dir=/tmp/a\rb", "a value with line ends needs quotes"),
        ("prompts.negative_prompt='a\u2028b'", "a value with line ends needs quotes"),
    ],
)
def test_values_that_yaml_would_cut(override, words):
    with pytest.raises(ConfigError, match=words):
        load_config(None, [override])
    assert load_config(None, ["prompts.negative_prompt='it is # bad'"]).prompts.negative_prompt == "it is # bad"
    assert load_config(None, ["run.output_dir=/tmp/y#2"]).run.output_dir == "/tmp/y#2"
    assert load_config(None, ['prompts.negative_prompt="a\\nb"']).prompts.negative_prompt == "a\nb"
    assert load_config(None, ["ema={decay:\n  0.5}"]).ema.decay == 0.5
