"""What tests start: it ends with them, all of it, and says what was waited for; ports and slots have one owner."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from processes import LIMIT, _first_failure, reserved_port, results_of, run_command, run_script, running
from slots import slots

TESTS = Path(__file__).parents[1]
# Starts a process in a session of its own, writes down the numbers of both, and waits.
WAITS = """
import os, subprocess, sys, time
print("said on stdout", flush=True)
print("said on stderr", file=sys.stderr, flush=True)
child = subprocess.Popen(["sleep", "100000"], start_new_session=True)
file = f"{sys.argv[-1]}-{os.environ.get('RANK', 0)}"
with open(file + ".new", "w") as written:
    written.write(f"{os.getpid()} {child.pid}")
os.rename(file + ".new", file)
time.sleep(100000)
"""


def wait_until(ready):
    deadline = time.monotonic() + LIMIT
    while not (found := ready()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
    return found


def is_running(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def timed_out(start, *written: Path) -> tuple[float, str]:
    """A limit that is over after all of these are written, however slow the machine is, and what is said then."""
    for limit in (2.0**exponent for exponent in range(11)):
        with pytest.raises(TimeoutError) as error:
            start(limit)
        if all(file.exists() for file in written):
            return limit, str(error.value)
    raise AssertionError(f"{written} were not written within {limit} s")


def test_a_command_gets_a_users_surroundings(tmp_path):
    code = (
        "import os, sys; print(os.getcwd(), os.environ['WORD'], sys.stdin.read()); sys.stderr.write('e'); sys.exit(3)"
    )
    done = run_command([sys.executable, "-c", code], env={"WORD": "word"}, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (3, f"{tmp_path} word \n", "e")


def test_a_command_that_takes_too_long_says_what_it_was_and_leaves_nothing(tmp_path):
    file = tmp_path / "waits-0"
    command = [sys.executable, "-c", WAITS, tmp_path / "waits"]
    limit, said = timed_out(lambda limit: run_command(command, limit=limit), file)
    assert sys.executable in said and str(tmp_path / "waits") in said and f"did not end within {limit:g} s" in said
    assert said.index("stdout ends in:\nsaid on stdout") < said.index("stderr ends in:\nsaid on stderr")
    pids = file.read_text().split()
    assert len(pids) == 2 and not any(map(is_running, pids))


def test_what_a_command_leaves_running_ends_with_it(tmp_path):
    code = "import subprocess; print(subprocess.Popen(['sleep', '100000']).pid)"
    done = run_command([sys.executable, "-c", code])
    assert done.returncode == 0 and not is_running(done.stdout.strip())


@pytest.mark.distributed
def test_a_script_that_takes_too_long_says_what_it_was_and_leaves_nothing(tmp_path):
    script = tmp_path / "waits.py"
    script.write_text(WAITS)
    files = [tmp_path / f"waits-{rank}" for rank in (0, 1)]
    limit, said = timed_out(lambda limit: run_script(2, script, tmp_path / "waits", limit=limit), *files)
    assert f"{script} {tmp_path / 'waits'} did not end within {limit:g} s" in said
    assert said.count("said on stdout") == said.count("said on stderr") == 2
    pids = [pid for file in files for pid in file.read_text().split()]
    assert len(pids) == 4 and not any(map(is_running, pids))


@pytest.mark.distributed
def test_the_first_failure_ends_the_others(tmp_path):
    script = tmp_path / "fails.py"
    script.write_text(
        "import os, pathlib, sys, time\n"
        f"written = pathlib.Path({str(tmp_path / 'pid')!r})\n"
        "if os.environ['RANK'] == '1':\n"
        "    written.with_suffix('.new').write_text(str(os.getpid()))\n"
        "    written.with_suffix('.new').rename(written)\n"
        "    time.sleep(100000)\n"
        "while not written.exists():\n"
        "    time.sleep(0.01)\n"
        "sys.exit(7)\n"
    )
    assert run_script(2, script).returncode == 7
    assert not is_running((tmp_path / "pid").read_text())
    with pytest.raises(AssertionError, match="stdout ends in:\n\nstderr ends in:\n"):
        results_of(script)


def test_a_process_that_ends_while_it_is_looked_at():
    class Process:
        codes = iter((None, 7))
        sentinel = os.open(os.devnull, os.O_RDONLY)
        exitcode = property(lambda self: next(self.codes))

    try:
        assert _first_failure([Process()], 100.0) == 7
    finally:
        os.close(Process.sentinel)


@pytest.mark.distributed
@pytest.mark.parametrize("starts", ["run_command([sys.executable, '-c', open(script).read(), file])",
                                    "run_script(2, script, file)"], ids=["command", "script"])  # fmt: skip
def test_a_worker_that_is_killed_takes_what_it_started_with_it(tmp_path, starts):
    script, file = tmp_path / "waits.py", tmp_path / "waits"
    alone = "child = subprocess.Popen"  # which would be left, as nothing of the worker's is there to end it
    script.write_text("\n".join(line for line in WAITS.splitlines() if alone not in line).replace("child.pid", "0"))
    code = f"import sys; from processes import *; script, file = {str(script)!r}, {str(file)!r}; {starts}"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
    worker = subprocess.Popen([sys.executable, "-c", code], env=environment, cwd="/", start_new_session=True)
    try:
        wait_until(lambda: Path(f"{file}-0").exists() or worker.poll() is not None)
        assert worker.poll() is None
        started, _ = Path(f"{file}-0").read_text().split()
        worker.kill()
        wait_until(lambda: not is_running(started))
    finally:
        worker.kill()
        worker.wait()


def test_a_reserved_port_has_one_owner():
    with reserved_port() as first, reserved_port() as second:
        assert first != second
        for port in (first, second):
            with socket.socket() as server:
                server.bind(("127.0.0.1", port))
            code = f"from slots import slots; print(slots('ports').take({port}))"
            assert run_command([sys.executable, "-c", code], env={"PYTHONPATH": str(TESTS)}).stdout == "False\n"
    low = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert first < low and second < low  # where the kernel gives out none by itself
    assert slots("ports").take(first)
    slots("ports").give_back(first)


def test_a_port_that_somebody_listens_on_is_not_given(monkeypatch):
    import processes

    with socket.socket() as server, reserved_port() as free:
        server.bind(("127.0.0.1", 0))
        server.listen()
        taken = server.getsockname()[1]
        monkeypatch.setattr(processes.random, "sample", lambda ports, count: [taken, free + 0, free - 1, *ports])
        with reserved_port() as port:
            assert port not in (taken, free)


def test_slots_of_a_process_that_was_killed_are_free_again(tmp_path):
    name = f"test-{os.getpid()}"
    code = (
        "import os, sys, time; from slots import slots\n"
        f"print(all(slots({name!r}).take(number) for number in range(5)), flush=True)\n"
        "if os.fork() == 0:\n"
        "    print(slots(sys.argv[1]).take(9), slots(sys.argv[1]).take(3), flush=True)\n"
        "    os._exit(0)\n"
        "os.wait()\n"
        "time.sleep(100000)\n"
    )
    with running(sys.executable, "-c", code, name, env={**os.environ, "PYTHONPATH": str(TESTS)}) as holder:
        assert [holder.stdout.readline() for _ in range(2)] == ["True\n", "True False\n"]
        assert [slots(name).take(number) for number in range(6)] == [False] * 5 + [True]
        assert not slots(name).take(5)  # a process has it once
        slots(name).give_back(5)
        holder.kill()
        holder.wait()
        try:
            assert all(slots(name).take(number) for number in range(5))
        finally:
            next(Path(tempfile.gettempdir()).glob(f"dpdmd-tests-*-{name}.lock")).unlink()


def test_every_process_of_the_tests_is_started_here():
    """Others would have limits of their own, for a machine that is as fast as the one they were written on."""
    for file in TESTS.rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        if file not in (TESTS / "processes.py", Path(__file__)):
            assert not re.search(r"subprocess\.(run|Popen|call|check_\w+)\(|os\.(system|popen)\(", text), file


def test_no_test_measures_time():
    for file in TESTS.rglob("test_*.py"):
        text = file.read_text(encoding="utf-8")
        assert not re.search(r"time\.(perf_counter|process_time|time|thread_time)(_ns)?\(", text), file
