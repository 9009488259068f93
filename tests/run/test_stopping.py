"""Runs that are asked to end, by signals or by an output that nobody reads: what they save, say and end with."""

from __future__ import annotations

import contextlib
import re
import shlex
import signal
import subprocess
import sys

import pytest
from processes import run_command, run_script, running
from runs import DRIVER, TRAIN, checked, same_bits, weights

from dpdmd import command
from dpdmd.backbones.files import reading
from dpdmd.run import stopping


@pytest.fixture(scope="module")
def straight_in_two(options, tmp_path_factory):
    """The same run in two processes."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    checked(run_script(2, TRAIN, *options, "engine.accumulation=1", f"run.output_dir={folder}"))
    return folder


@pytest.mark.distributed
@pytest.mark.parametrize(
    "name, processes, rank", [("SIGTERM", 0, 0), ("SIGINT", 2, 1), ("SIGHUP", 2, 0), ("SIGTERM", 2, 1)]
)
def test_a_signal_saves_a_checkpoint(options, straight, request, tmp_path, name, processes, rank):
    """Of one process or of both, which agree on the iteration; going on gives the bits of the run that was not stopped."""
    folder = tmp_path / "run"
    mine = [*options, f"run.output_dir={folder}", *(["engine.accumulation=1"] if processes == 2 else [])]
    done = checked(run_script(processes, DRIVER, f"{name}-{rank}-4", tmp_path, *mine), command.ENDED)
    ended = re.findall(
        r"ended after (\d) of 9 updates, which .*/checkpoints/step_00000(\d) holds; the same command", done.stderr
    )
    assert len(ended) == 1 and ended[0][0] == ended[0][1] == "5", done.stderr[-3000:]
    assert (name in done.stderr or rank == 1) and "a second Ctrl-C" not in done.stderr
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step_000005"]
    assert not (folder / "student").exists() and not (folder / "finished.json").exists()

    done = checked(run_script(processes, TRAIN, *mine, "--resume"))
    assert f"going on from iteration 5 ({folder / 'checkpoints' / 'step_000005'})" in done.stdout
    expected = straight if processes == 0 else request.getfixturevalue("straight_in_two")
    assert same_bits(weights(folder), weights(expected))


@pytest.mark.distributed
@pytest.mark.parametrize("processes, rank", [(0, 0), (2, 1)])
def test_a_signal_while_the_last_checkpoint_is_saved(options, tmp_path, processes, rank):
    """What comes after may take long: the student is exported when the run is resumed."""
    folder = tmp_path / "run"
    mine = [*options, f"run.output_dir={folder}", *(["engine.accumulation=1"] if processes == 2 else [])]
    done = checked(run_script(processes, DRIVER, f"last-SIGTERM-{rank}", tmp_path, *mine), command.ENDED)
    assert "ended after all 9 updates, which " in done.stderr and not (folder / "student").exists(), done.stderr
    done = checked(run_script(processes, TRAIN, *mine, "--resume"))
    assert "going on from iteration 9" in done.stdout and (folder / "finished.json").exists()


@pytest.mark.distributed
def test_a_second_interrupt_ends_at_once(options, tmp_path):
    done = run_script(0, DRIVER, "SIGINT-0-4-2", tmp_path, *options, f"run.output_dir={tmp_path / 'run'}")
    assert done.returncode == 128 + signal.SIGINT and done.stderr.count("second SIGINT: ended at once") == 1
    assert "(a second Ctrl-C ends at once)" in done.stderr
    assert "Traceback" not in done.stderr and not any((tmp_path / "run").glob("checkpoints/step_*"))


def test_a_second_interrupt_of_a_process_that_waits_in_a_library(tmp_path):
    """Where Python's own handlers never run, as in a collective whose other processes have gone."""
    script = tmp_path / "waits.py"
    script.write_text(
        "import ctypes\nfrom dpdmd.run.stopping import Stop\n"
        "library, lock = ctypes.CDLL(None), ctypes.create_string_buffer(256)\n"
        "with Stop() as stop, stop.deferred():\n    library.pthread_mutex_lock(lock)\n    print('waits', flush=True)\n"
        "    library.pthread_mutex_lock(lock)\n"
    )
    with running(sys.executable, script) as process:
        assert process.stdout.readline() == "waits\n"
        sent = 0
        while process.poll() is None:  # two that come at one time are one
            process.send_signal(signal.SIGINT)
            sent += 1
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.1)
        assert process.returncode == 128 + signal.SIGINT and sent > 1


@pytest.mark.distributed
@pytest.mark.parametrize("closed", ["", "2>&1"], ids=["stdout", "both"])
def test_output_that_nobody_reads_any_more(options, straight, tmp_path, closed):
    """The run ends as by a signal where it has something to say, and else goes on."""
    folder = tmp_path / "run"
    mine = [*options, "engine.device=cpu", f"run.output_dir={folder}"]
    command_line = shlex.join([sys.executable, str(TRAIN), *mine])
    script = f"{command_line} {closed} | grep -m 1 plan: ; exit ${{PIPESTATUS[0]}}"
    done = run_command(["bash", "-c", script])
    assert "plan:" in done.stdout and "Traceback" not in done.stderr
    if closed:
        assert done.returncode == command.ENDED and list((folder / "checkpoints").glob("step_*"))
        checked(run_script(0, TRAIN, *mine, "--resume"))
    else:
        assert done.returncode == 0, done.stderr[-3000:]
    assert same_bits(weights(folder), weights(straight))


def test_a_signal_passes_what_others_catch():
    """It may come while a library reads a file, which has its own idea of what went wrong."""
    with pytest.raises(command.RunEnded), stopping.Stop(), reading("a file"):
        try:
            signal.raise_signal(signal.SIGTERM)
        except Exception as error:
            raise RuntimeError("cannot be read") from error
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_a_signal_before_training_ends_at_once(monkeypatch):
    with pytest.raises(command.RunEnded, match="SIGTERM: ended; --resume goes on"), stopping.Stop():
        signal.raise_signal(signal.SIGTERM)
    with stopping.Stop() as stop:
        with stop.deferred():
            assert not stop.requested
            signal.raise_signal(signal.SIGHUP)
            assert stop.requested and stop.reason == "SIGHUP"
        with pytest.raises(command.RunEnded):
            signal.raise_signal(signal.SIGINT)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_a_signal_that_is_ignored_stays_so(monkeypatch):
    """nohup's."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stopping.Stop() as stop, stop.deferred():
            signal.raise_signal(signal.SIGHUP)
            assert not stop.requested
    finally:
        signal.signal(signal.SIGHUP, before)
