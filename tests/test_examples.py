"""The example scripts do what they say; that of a cluster with stand-ins for its commands."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest
from processes import ends, reserved_port, run_command, running

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


def run(name: str, *arguments: object) -> str:
    """What an example prints, as a user starts it."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    answer = run_command([sys.executable, ROOT / "examples" / name, *arguments], env=env)
    assert answer.returncode == 0, ends(answer.stdout, answer.stderr)
    return answer.stdout


def test_one_step_learns_what_the_teacher_does_in_many():
    table = dict(re.findall(r"^(\w+, \d+ steps?) +(\d.*)$", run("dmd2_loop.py"), re.MULTILINE))
    rows = {name: [float(each) for each in text.split()] for name, text in table.items()}
    (many, _), (one, _) = rows["teacher, 20 steps"], rows["teacher, 1 step"]
    distance, rarer = rows["student, 1 step"]
    assert many < 0.2 and one > 0.6 and distance < 0.45
    assert rarer > 0.3  # both of a class's clusters


def test_a_lora_of_a_fused_transformer_is_one_of_diffusers(tmp_path):
    printed = run("sd3_lora.py", "--output", tmp_path / "lora")
    assert "SD3Transformer2DModel: fused 3 JointTransformerBlock" in printed
    before, after = map(float, re.search(r"loss ([\d.]+) before, ([\d.]+) after", printed).groups())
    assert after < before / 2
    assert {path.name for path in (tmp_path / "lora").iterdir()} == {"picture.png", "pytorch_lora_weights.safetensors"}


def test_a_lora_learns_from_pictures_with_captions(tmp_path):
    from PIL import Image

    for name, colour in (("one", "red"), ("two", "blue")):
        Image.new("RGB", (40, 40), colour).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(f"{colour}\n")
    printed = run("sd3_lora.py", "--pictures", tmp_path, "--steps", 1, "--output", tmp_path / "lora")
    assert "picture of 'red' with it" in printed
