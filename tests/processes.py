"""Starts the processes of tests, waits for them and leaves none behind.

`run_command` runs a command as a user would; `running` is for one that is talked with. `run_script` runs a script in several
processes that find each other, as the deepspeed launcher does, without waiting each time for imports: they are forks of a
process that has imported what they need. That process sees no GPU, since DeepSpeed decides while it is imported on which
kind of device it works; scripts for GPUs are started anew. All of these functions end every process that they started, and
those that these started, whatever happens; and they say what they waited for where it takes too long. The limit is there
for what hangs, not for what is slow.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import multiprocessing
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from unittest import mock

from slots import slots

LIMIT = 1800.0  # seconds: many times what anything takes alone, as others may be at work on the machine
SHOWN = 3000  # characters at the end of an output
IMPORTED = [
    "deepspeed",
    "peft",
    "diffusers.models.autoencoders.autoencoder_kl",
    "diffusers.models.transformers.transformer_flux",
    "diffusers.models.transformers.transformer_sd3",
    "transformers.models.clip.modeling_clip",
    "transformers.models.t5.modeling_t5",
    "dpdmd.train",
]
_forked = multiprocessing.get_context("forkserver")
_forked.set_forkserver_preload(IMPORTED)
_anew = multiprocessing.get_context("spawn")
# Ends the process with its parent, then becomes the command. A worker that is killed takes what it started with it.
_WITH_PARENT = (
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9); os.execvpe(sys.argv[1], sys.argv[1:], os.environ)"
)


@contextlib.contextmanager
def reserved_port() -> Iterator[int]:
    """A port that no other test has meanwhile, below those that the kernel gives to whoever asks for any."""
    end = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    ports = range(end // 2, end)
    for port in random.sample(ports, len(ports)):  # a seed that all workers had would make them try the same ones
        if slots("ports").take(port):
            try:
                if _is_free(port):
                    yield port
                    return
            finally:
                slots("ports").give_back(port)
    raise RuntimeError(f"no port of {ports.start} to {end - 1} is free")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        # A connection that has just ended is in nobody's way.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def run_command(
    command: Sequence[object],
    *,
    limit: float = LIMIT,
    env: dict[str, str] | None = None,
    cwd: str | Path = "/",
) -> subprocess.CompletedProcess:
    """The command's status and its two outputs. TimeoutError where it does not end within `limit` seconds."""
    command = [str(each) for each in command]
    with _outputs() as files, contextlib.ExitStack() as opened:
        stdout, stderr = (opened.enter_context(open(file, "wb")) for file in files)
        process = subprocess.Popen(
            [sys.executable, "-ISc", _WITH_PARENT, *command],
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            env=env,
            cwd=cwd,
            start_new_session=True,
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            raise _too_long(command, limit, files) from None
        finally:
            _end([process.pid])
            process.wait()
        return subprocess.CompletedProcess(command, code, *map(_read, files))


@contextlib.contextmanager
def running(*command: object, env: dict[str, str] | None = None) -> Iterator[subprocess.Popen]:
    """A command to talk with, through pipes; it is killed at the end, if it has not ended."""
    process = subprocess.Popen(
        [sys.executable, "-ISc", _WITH_PARENT, *map(str, command)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=env,
        cwd="/",
        start_new_session=True,
    )
    try:
        yield process
    finally:
        _end([process.pid])
        process.communicate()


def run_script(
    number: int, script: Path, *arguments: object, limit: float = LIMIT, gpu: bool = False
) -> subprocess.CompletedProcess:
    """The script with its arguments in `number` processes (0: in one, without a launcher's variables), which see GPUs
    where `gpu` says so; when one fails, the others are ended. returncode is the first failure's, stdout and stderr are
    those of all of them. TimeoutError where they do not end within `limit` seconds."""
    command = [str(each) for each in (script, *arguments)]
    with _outputs() as files, reserved_port() as port:
        running = []
        try:
            for rank in range(number or 1):
                world: dict[str, object] = {}
                if number:
                    world |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number}
                    world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                process = (_anew if gpu else _forked).Process(target=_run, args=(command, world, files))
                # The first one starts the process of which it and all later ones are forks.
                with mock.patch.dict(os.environ, {} if gpu else {"CUDA_VISIBLE_DEVICES": ""}):
                    process.start()
                running.append(process)
            code = _first_failure(running, limit)
            if code is None:
                raise _too_long(command, limit, files)
        finally:
            _end([each.pid for each in running])
            for each in running:
                each.join()
        return subprocess.CompletedProcess(command, code, *map(_read, files))


def _first_failure(running: list, limit: float) -> int | None:
    """The first exit code that is not 0; 0 where all are, None where `limit` seconds are over before."""
    deadline = time.monotonic() + limit
    while True:
        codes = [each.exitcode for each in running]  # once: a process may end at any time
        at_work = [each.sentinel for each, code in zip(running, codes, strict=True) if code is None]
        failed = next((code for code in codes if code), None)
        if failed is not None or not at_work:
            return failed or 0
        left = deadline - time.monotonic()
        if left <= 0:
            return None
        wait(at_work, left)


def results_of(driver: Path, *arguments: object) -> dict:
    """What a driver prints as RESULT, from two processes."""
    done = run_script(2, driver, *arguments)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, ends(done.stdout, done.stderr)
    return json.loads(lines[0].removeprefix("RESULT "))


def ends(stdout: str, stderr: str) -> str:
    return f"stdout ends in:\n{stdout[-SHOWN:]}\nstderr ends in:\n{stderr[-SHOWN:]}"


@contextlib.contextmanager
def _outputs() -> Iterator[list[str]]:
    """Files and not pipes, which a process that outlives its parent would keep open."""
    with tempfile.TemporaryDirectory() as folder:
        files = [os.path.join(folder, name) for name in ("stdout", "stderr")]
        for file in files:
            Path(file).touch()
        yield files


def _read(file: str) -> str:
    return Path(file).read_text(encoding="utf-8", errors="replace")


def _too_long(command: list[str], limit: float, files: list[str]) -> TimeoutError:
    return TimeoutError(f"{' '.join(command)} did not end within {limit:g} s; {ends(*map(_read, files))}")


def _end(leaders: list[int]) -> None:
    """Kills these processes, each of which leads a session, those of their sessions, and all descendants."""
    while members := _members(leaders):
        for member in members:
            with contextlib.suppress(ProcessLookupError):
                os.kill(member, signal.SIGKILL)
        time.sleep(0.01)


def _members(leaders: list[int]) -> set[int]:
    family, parents = set(leaders), {}
    alive = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            # pid (name) state parent group session ...; a name may hold anything, so that the last ) counts.
            state, parent, _, session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
        except OSError:  # it ended meanwhile
            continue
        pid = int(folder.name)
        parents[pid] = int(parent)
        if state not in "ZX":
            alive.add(pid)
        if int(session) in leaders:
            family.add(pid)
    while children := {pid for pid, parent in parents.items() if parent in family and pid not in family}:
        family |= children
    return family & alive


def _end_with(parent) -> None:
    """The parent is the worker, not the process that this one is a fork of."""
    wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGKILL)


def _run(command: list[str], world: dict[str, object], outputs: list[str]) -> None:
    os.setsid()
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()
    for stream, file in zip((sys.stdout, sys.stderr), outputs, strict=True):
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, stream.fileno())
    os.environ.update({name: str(value) for name, value in world.items()})
    os.chdir("/")
    rank = [f"--local_rank={world['LOCAL_RANK']}"] if world else []
    sys.argv = [command[0], *rank, *command[1:]]
    sys.path.insert(0, str(Path(command[0]).parent))
    try:
        runpy.run_path(command[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # which a fork leaves out
        sys.stdout.flush()
