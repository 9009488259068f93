"""The example scripts do what they say, with stand-ins for the commands of a cluster."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest
from processes import reserved_port, run_command, running

from dpdmd import command

ROOT = Path(__file__).parents[1]

# Starts the tasks as srun does, passes SIGTERM on to them, and ends with the highest of their statuses.
SRUN = """#!{python}
import os, signal, sys
from subprocess import Popen
arguments = [each for each in sys.argv[1:] if not each.startswith(("--kill", "--cpus", "--wait"))]
arguments[0] = sys.executable
number = int(os.environ["SLURM_NTASKS"])
tasks = [
    Popen(arguments, env={{**os.environ, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}})
    for rank in range(number)
]
signal.signal(signal.SIGTERM, lambda *_: [task.send_signal(signal.SIGTERM) for task in tasks])
print("srun", os.getpid(), flush=True)
sys.exit(max(task.wait() for task in tasks))
"""
SCONTROL = '#!/bin/sh\necho "$@" >> "$REQUEUED"\n'


@pytest.fixture
def port():
    with reserved_port() as port:
        yield port


@pytest.mark.distributed
def test_a_job_that_is_pre_empted_goes_on_where_it_was(tmp_path, port):
    for name, text in (("srun", SRUN.format(python=sys.executable)), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    folder = tmp_path / "run"
    settings = [
        *("engine.device=cpu", "engine.batch_size=1", "evaluation.enabled=false", "distill.critic_updates=2"),
        *("distill.teacher_steps=6", "distill.anchor=2", "run.iterations=600", f"run.output_dir={folder}"),
    ]
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("RANK", "WORLD_SIZE", "LOCAL_"))}
    clean |= {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "REQUEUED": str(tmp_path / "requeued"),
    }
    clean |= {
        "SLURM_NTASKS": "2",
        "SLURM_JOB_ID": "4242",
        "MASTER_PORT": str(port),
        "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
    }

    def script(*more):
        return ["bash", "-c", 'cd "$0" && exec bash examples/slurm.sh "$@" 2>&1', str(ROOT), *settings, *more]

    with running(*script(), env=clean) as job:
        lines = []
        for line in job.stdout:
            lines.append(line)
            if line.startswith("srun "):
                srun = int(line.split()[1])
            if line.startswith("plan: "):
                break
        metrics = folder / "metrics.jsonl"
        while not metrics.exists() or metrics.read_text().count("\n") < 3:
            assert job.poll() is None, "".join(lines)
            time.sleep(0.05)
        os.kill(srun, signal.SIGTERM)
        lines += list(job.stdout)
        status = job.wait()
    printed = "".join(lines)
    assert status == command.ENDED, printed
    assert "starting at iteration 0: --resume found no checkpoint" in printed and "Traceback" not in printed
    assert (tmp_path / "requeued").read_text() == "requeue 4242\n"
    (saved,) = (folder / "checkpoints").iterdir()
    iteration = int(saved.name.removeprefix("step_"))
    assert 3 <= iteration < 600

    done = run_command(script(f"run.iterations={iteration + 3}"), env=clean)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"going on from iteration {iteration} " in done.stdout and (folder / "student" / "dpdmd.json").exists()
    assert (tmp_path / "requeued").read_text() == "requeue 4242\n"
