"""How processes find each other: every launcher's variables, a store that others cannot reach, and no silent waiting."""

from __future__ import annotations

import os
import re
import socket
import sys
import threading
from pathlib import Path

import pytest
from processes import LIMIT, reserved_port, run_command, running

from dpdmd.config import ConfigError
from dpdmd.engine import world
from dpdmd.engine.world import Launch, launched, meet

BATCH = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "77", "SLURM_TASKS_PER_NODE": "1"}
MPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"} | {
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({}, (0, 1, 0, 1, "127.0.0.1", 0)),
        # deepspeed, torchrun
        (
            {
                "RANK": "3",
                "WORLD_SIZE": "4",
                "LOCAL_RANK": "1",
                "LOCAL_SIZE": "2",
                "MASTER_ADDR": "a",
                "MASTER_PORT": "7",
            },
            (3, 4, 1, 2, "a", 7),
        ),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, (3, 4, 1, 2, "127.0.0.1", 29500)),
        # They come before what a job's environment holds besides.
        ({"RANK": "0", "WORLD_SIZE": "1", "SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, (0, 1, 0, 1, "127.0.0.1", 29500)),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, (1, 2, 1, 2, "127.0.0.1", 29500)),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_NNODES": "0"}, (1, 2, 1, 2, "127.0.0.1", 29500)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, (0, 1, 0, 1, "127.0.0.1", 0)),
        (
            {
                **{"SLURM_PROCID": "5", "SLURM_NTASKS": "9", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1"},
                **{"SLURM_STEP_TASKS_PER_NODE": "4(x2)", "SLURM_NNODES": "2", "SLURM_STEP_NODELIST": "gpu[03-04,7],b"},
                **{"SLURM_JOB_ID": "1234567"},
            },
            (5, 8, 1, 4, "gpu03", 20000 + 1234567 % 20000),
        ),
        (
            {"SLURM_PROCID": "6", "SLURM_NTASKS": "7", "SLURM_LOCALID": "2", "SLURM_STEP_TASKS_PER_NODE": "2(x2),3"}
            | {"SLURM_NODEID": "2", "MASTER_ADDR": "a"},
            (6, 7, 2, 3, "a", 29500),
        ),
        # The machine's name may be that of an address at which a run on it alone does not listen.
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "here"}, (1, 2, 1, 2, "127.0.0.1", 29500)),
        (
            {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "one,two"},
            (5, 8, 1, 4, "one", 29500),
        ),
        (
            {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
            | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2", "PMIX_RANK": "1"},
            (1, 2, 1, 2, "127.0.0.1", 29500),
        ),
        (
            {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
            | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1", "MASTER_ADDR": "first", "MASTER_PORT": "5"},
            (1, 2, 0, 1, "first", 5),
        ),
        ({"PMI_RANK": "2", "PMI_SIZE": "3"}, (2, 3, 2, 3, "127.0.0.1", 29500)),
        # mpirun in a job's script, in a step of one task, and beside what srun says of the same processes.
        (BATCH | {"SLURM_NTASKS": "2"} | MPI, (1, 2, 1, 2, "127.0.0.1", 20077)),
        (BATCH | {"SLURM_NTASKS": "1"} | MPI, (1, 2, 1, 2, "127.0.0.1", 20077)),
        (BATCH | MPI, (1, 2, 1, 2, "127.0.0.1", 20077)),
        (
            {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0", "SLURM_STEP_TASKS_PER_NODE": "3,1"}
            | {"SLURM_NODEID": "1", "PMI_RANK": "3", "PMI_SIZE": "4", "PMIX_RANK": "3", "MASTER_ADDR": "a"},
            (3, 4, 0, 1, "a", 29500),
        ),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "PMIX_RANK": "0"}, (0, 1, 0, 1, "127.0.0.1", 0)),
        (BATCH, (0, 1, 0, 1, "127.0.0.1", 0)),  # python in a job's script
        (
            {"PMI_RANK": "2", "PMI_SIZE": "4", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2", "MASTER_ADDR": "m"},
            (2, 4, 0, 2, "m", 29500),
        ),
    ],
)
def test_launchers(environment, expected):
    found = launched(environment)
    assert (found.rank, found.size, found.local_rank, found.local_size, found.address, found.port) == expected


@pytest.mark.parametrize(
    "environment, message",
    [
        ({"RANK": "1"}, "WORLD_SIZE is not set"),
        ({"WORLD_SIZE": "2"}, "RANK is not set"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "process 2 of 2: ranks go from 0 to 1"),
        ({"RANK": "first", "WORLD_SIZE": "2"}, "RANK = 'first' in the environment: a whole number is needed"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "99999"}, "MASTER_PORT = 99999 .* from 1 to 65535"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "0"}, "MASTER_PORT = 0 .* from 1 to 65535"),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "0"},
            "LOCAL_RANK and LOCAL_WORLD_SIZE say .* process 0 of 0",
        ),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_SIZE": "3"}, "process 0 of 3 on this machine, .* there are 2 in all"),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "2"}, "process 2 of 2 on this machine"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK = '-1' in the environment"),
        ({"RANK": "1" * 5000, "WORLD_SIZE": "2"}, "RANK = '1{40}' in the environment"),
        (
            {"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2(x0)"},
            "SLURM_STEP_TASKS_PER_NODE = '2.x0.' in the environment",
        ),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "5"}, "SLURM_LOCALID and .* process 5 of 2"),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "4(x"}, "SLURM_NTASKS = '4.x' in the environment"),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "1"}, "SLURM_PROCID and SLURM_NTASKS say that this is process 1 of 1"),
        ({"SLURM_PROCID": "0", "SLURM_STEP_ID": "0"}, "SLURM_PROCID = '0' is set, and none of SLURM_STEP_NUM_TASKS"),
        ({"PMIX_RANK": "1"}, "PMIX_RANK = '1' is set, and none of PMIX_SIZE, PMI_SIZE"),
        ({"SLURM_PROCID": "3", "SLURM_NTASKS": "2"}, "SLURM_PROCID and SLURM_NTASKS say that this is process 3 of 2"),
        (
            {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"},
            "process 1 of 2 on several machines: set MASTER_ADDR",
        ),
    ],
)
def test_launchers_that_make_no_sense(environment, message):
    with pytest.raises(ConfigError, match=message):
        launched(environment)


def here(rank: int, size: int, port: int) -> Launch:
    return Launch(rank, size, rank, size, "127.0.0.1", port, "RANK and WORLD_SIZE")


@pytest.fixture
def port():
    with reserved_port() as reserved:
        yield reserved


def listening(port: int) -> list[str]:
    """Addresses, as the kernel writes them, at which something listens."""
    lines = [
        line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]
    ]
    return [
        fields[1].split(":")[0] for fields in lines if fields[3] == "0A" and int(fields[1].split(":")[1], 16) == port
    ]


def test_the_store_listens_on_this_machine_alone(port):
    stores = {}
    others = threading.Thread(target=lambda: stores.update({1: meet(here(1, 2, port), "run", LIMIT)}))
    others.start()
    stores[0] = meet(here(0, 2, port), "run", LIMIT)
    others.join()
    assert listening(port) == ["0100007F"]  # 127.0.0.1
    stores[0].set("key", "value")
    assert stores[1].get("key") == b"value"


def test_a_port_that_is_taken():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} .* is in use, .* deepspeed --master_port {port + 1}"):
            meet(here(0, 2, port), "run", 5)


def test_processes_that_do_not_come(port):
    with pytest.raises(ConfigError, match=r"process 0 of 2 .* waited 1 s at 127.0.0.1:\d+ for process 1: all 2 must"):
        meet(here(0, 2, port), "run", 1)
    with pytest.raises(ConfigError, match=r"process 1 of 2 .* found no process 0 at 127.0.0.1:\d+ within 1 s"):
        meet(here(1, 2, port), "run", 1)


def test_what_is_waited_for_is_said(port, monkeypatch, capsys):
    monkeypatch.setattr(world, "_SILENT_SECONDS", 0.1)
    for launch, words in (
        (here(0, 2, port), f"process 0 of 2 (RANK and WORLD_SIZE) is waiting at 127.0.0.1:{port} for process 1\n"),
        (here(1, 2, port), f"process 1 of 2 (RANK and WORLD_SIZE) is waiting at 127.0.0.1:{port} for process 0 ("),
        (Launch(1, 2, 0, 1, "unknown.invalid", port, "RANK"), f"is waiting at unknown.invalid:{port} for process 0 ("),
    ):
        with pytest.raises(ConfigError):
            meet(launch, "run", 1)
        assert capsys.readouterr().err.count(words) == 1


@pytest.mark.parametrize(
    "environment, given",
    [
        ({}, False),
        ({"OMP_NUM_THREADS": "1"}, True),
        ({"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "none"}, False),
        ({"OMP_NUM_THREADS": "4", "TORCHELASTIC_RUN_ID": "none"}, True),
    ],
)
def test_threads_that_are_given_stand(environment, given):
    assert world._threads_given(environment) == given


def test_a_process_does_not_join_an_earlier_start_of_its_run():
    """Whose process 0 holds the port still, as it saves a checkpoint."""
    with reserved_port() as port:
        others = threading.Thread(target=lambda: meet(here(1, 2, port), "run", 60))
        others.start()
        earlier = meet(here(0, 2, port), "run", 60)
        others.join()
        with pytest.raises(
            ConfigError, match=r"process 1 of 2 found an earlier start of this run at .* which has not ended"
        ):
            meet(here(1, 2, port), "run", 60)
        assert earlier.num_keys() > 0


def test_another_run_at_the_same_port(port):
    problems = []

    def first():
        try:
            meet(here(0, 2, port), "one run", 30)  # time enough for the other to find it
        except ConfigError as error:
            problems.append(str(error))

    waiting = threading.Thread(target=first)
    waiting.start()
    with pytest.raises(ConfigError, match=f"found another run at 127.0.0.1:{port} .one run.: .* --master_port"):
        meet(here(1, 2, port), "another run", LIMIT)
    waiting.join()
    assert "for process 1" in problems[0]


@pytest.mark.distributed
def test_a_task_of_srun_is_one_of_several(tmp_path):
    """Not a run of its own in the same folder."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("RANK", "WORLD_SIZE", "LOCAL_"))}
    script = (
        "import sys; from dpdmd import train; from dpdmd.engine import world\n"
        "world.MEETING_SECONDS = 2; sys.exit(train.main(sys.argv[1:]))"
    )
    done = run_command(
        [sys.executable, "-c", script, "engine.device=cpu", f"run.output_dir={tmp_path / 'run'}"],
        env=clean | {"SLURM_PROCID": "1", "SLURM_NTASKS": "2"},
    )
    assert done.returncode == 2 and not (tmp_path / "run").exists()
    assert "process 1 of 2 (SLURM_PROCID and SLURM_NTASKS) found no process 0" in done.stderr, done.stderr[-3000:]


def test_a_process_ends_with_torchrun(tmp_path):
    child = "import signal, time; from dpdmd.engine import world\n" + (
        "signal.signal(signal.SIGTERM, lambda *_: (print('asked to end', flush=True), exit()))\n"
        "world.end_with_launcher(); print('ready', flush=True)\nwhile True: time.sleep(1)\n"
    )
    parent = "import os, sys\nos.fork() and os.wait()\nos.execv(sys.executable, [sys.executable, '-c', sys.argv[1]])\n"
    with running("env", "TORCHELASTIC_RUN_ID=x", sys.executable, "-c", parent, child) as launcher:
        assert launcher.stdout.readline() == "ready\n"
        launcher.kill()
        assert launcher.stdout.readline() == "asked to end\n"


def test_a_launcher_that_is_gone(monkeypatch):
    parents = {10: 5, 5: 1}
    monkeypatch.setattr(world.os, "getppid", lambda: 10)
    monkeypatch.setattr(world, "_is_deepspeeds", lambda process: process == 10)
    monkeypatch.setattr(world, "_parent_of", parents.get)
    launcher = world.Launcher()
    assert not launcher.gone
    parents[10] = 1
    assert launcher.gone
    monkeypatch.setattr(world, "_is_deepspeeds", lambda process: False)
    assert not world.Launcher().gone  # started by hand


def test_parents_are_read():
    assert world._parent_of(os.getpid()) == os.getppid() and world._parent_of(2**30) is None
    assert not world._is_deepspeeds(os.getpid())


@pytest.mark.distributed
def test_nothing_is_compiled_and_nothing_stays_in_shared_memory(tmp_path):
    """DeepSpeed's library for the CPU took a minute at first, and a killed run left a lock that held up all others."""
    before = {path.name for path in Path("/dev/shm").iterdir()}
    script = (
        "from dpdmd.config import EngineConfig; from dpdmd.engine.start import start; import deepspeed.comm as comm\n"
        "world = start(EngineConfig(device='cpu')); print(comm.get_world_size(), flush=True)"
    )
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")}
    done = run_command([sys.executable, "-c", script], env=environment)
    assert done.stdout.split()[-1:] == ["1"], done.stderr[-3000:]
    assert not list(tmp_path.rglob("*.cpp")) and not list(tmp_path.rglob("lock"))
    left = {path.name for path in Path("/dev/shm").iterdir()} - before
    assert not [name for name in left if re.search("deepspeed|allreduce", name)]
