"""Starts scripts in several processes that find each other, as the deepspeed launcher does, without waiting each time for
imports: they are forks of a process that has imported what they need."""

from __future__ import annotations

import atexit
import json
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import wait
from pathlib import Path

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
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(IMPORTED)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run_script(number: int, script: Path, *arguments: object, timeout: float = 600) -> subprocess.CompletedProcess:
    """The script with its arguments in `number` processes (0: in one, without a launcher's variables); when one fails,
    the others are ended. returncode is the first failure's, stdout and stderr are those of all of them."""
    command = [str(each) for each in (script, *arguments)]
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        outputs = [os.path.join(folder, name) for name in ("stdout", "stderr")]
        running = []
        for rank in range(number or 1):
            world: dict[str, object] = {}
            if number:
                world |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number}
                world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            process = _context.Process(target=_run, args=(command, world, outputs))
            process.start()
            running.append(process)
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline and not any(each.exitcode for each in running):
            at_work = [each.sentinel for each in running if each.exitcode is None]
            if not at_work:
                break
            wait(at_work, deadline - time.monotonic())
        failed = next((each.exitcode for each in running if each.exitcode), None)
        for each in running:
            if each.exitcode is None:
                each.kill()
            each.join()
        code = failed if failed is not None else next((each.exitcode for each in running if each.exitcode), 0)
        stdout, stderr = (Path(file).read_text() for file in outputs)
    return subprocess.CompletedProcess(command, code, stdout, stderr)


def results_of(driver: Path, *arguments: object) -> dict:
    """What a driver prints as RESULT, from two processes."""
    done = run_script(2, driver, *arguments)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(lines[0].removeprefix("RESULT "))


def _run(command: list[str], world: dict[str, object], outputs: list[str]) -> None:
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
