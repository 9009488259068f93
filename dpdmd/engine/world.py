"""The processes of a run: their ranks, how they meet, and how they exchange objects.

A launcher starts them and sets rank and size in the environment: deepspeed and torchrun (RANK), srun (SLURM_PROCID), mpirun
(OMPI_COMM_WORLD_RANK, PMI_RANK). They meet at a store held by process 0, which on one machine listens on 127.0.0.1 only.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import importlib
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dpdmd import command
from dpdmd.config import ConfigError, EngineConfig

MEETING_SECONDS = 300.0  # the longest wait for the other processes at the start
_COLLECTIVE = timedelta(minutes=30)  # the longest wait for them later
_DEFAULT_PORT = 29500
_SILENT_SECONDS = 10.0  # a longer wait is reported
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Launch:
    """This process, as the launcher's variables describe it.

    address: process 0's; on one machine LOOPBACK, whatever MASTER_ADDR says. by: the variables' names, for messages.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    address: str
    port: int
    by: str


# Other launchers' variables: rank, size, rank and size on this machine. If several agree, the first is used.
_LAUNCHERS = (
    ("SLURM_PROCID", ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"), "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
    ("OMPI_COMM_WORLD_RANK", ("OMPI_COMM_WORLD_SIZE",), "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("MV2_COMM_WORLD_RANK", ("MV2_COMM_WORLD_SIZE",), "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
    ("PALS_RANKID", ("PALS_SIZE", "PMI_SIZE"), "PALS_LOCAL_RANKID", "PALS_LOCAL_SIZE"),
    ("PMI_RANK", ("PMI_SIZE",), "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    ("PMIX_RANK", ("PMIX_SIZE", "PMI_SIZE"), "PMIX_LOCAL_RANK", "PMIX_LOCAL_SIZE"),
)


def launched(environment: Mapping[str, str]) -> Launch:
    """Reads the launcher's variables; without any, a single process. Raises ConfigError for impossible numbers, and if the
    address of process 0 is needed and not given."""
    port, host = _DEFAULT_PORT, LOOPBACK
    if "RANK" in environment or "WORLD_SIZE" in environment:  # deepspeed's and torchrun's
        rank_name, size_name, local_rank_name = "RANK", "WORLD_SIZE", "LOCAL_RANK"
        if absent := [name for name in (rank_name, size_name) if name not in environment]:
            other = "the other of RANK and WORLD_SIZE"
            raise ConfigError(f"{absent[0]} is not set, and {other} is: a launcher sets both, or unset both")
        rank, size = _rank_and_size(environment, rank_name, size_name)
        # deepspeed's, torchrun's; if neither is set, all processes are on this machine.
        local_size_name = "LOCAL_SIZE" if environment.get("LOCAL_SIZE") else "LOCAL_WORLD_SIZE"
        local_size = _number(environment, local_size_name, default=size)
    else:
        found = _started_by(environment)
        if found is None:
            return Launch(0, 1, 0, 1, LOOPBACK, 0, "no launcher")
        (rank_name, _, local_rank_name, local_size_name), size_name = found
        rank, size = _rank_and_size(environment, rank_name, size_name)
        local_size = _number(_of_this_machine(environment, local_size_name), local_size_name, default=0)
        if not local_size:
            names = ("SLURM_STEP_NUM_NODES", "SLURM_NNODES", "SLURM_JOB_NUM_NODES")
            machines = max(1, next((_number(environment, name) for name in names if environment.get(name)), 1))
            local_size = max(1, size // machines)
        host = _first_host(environment)
        if "SLURM_JOB_ID" in environment:  # two jobs may share a machine
            port = 20000 + _number(environment, "SLURM_JOB_ID") % 20000
    by = f"{rank_name} and {size_name}"
    local_rank = _number(environment, local_rank_name, default=rank % max(1, local_size))
    if not (1 <= local_size <= size and 0 <= local_rank < local_size):
        raise ConfigError(
            f"{local_rank_name} and {local_size_name} say that this is process {local_rank} of {local_size} on this machine, "
            f"counted from 0, and there are {size} in all: a machine needs 1 to {size}, and each of them a number below that"
        )
    address = LOOPBACK if local_size == size else environment.get("MASTER_ADDR") or host
    if address is None:
        raise ConfigError(
            f"{by} say that this is process {rank} of {size} on several machines: set MASTER_ADDR, for all of them, to "
            "the name of the machine of process 0 (and MASTER_PORT to a free port there)"
        )
    port = _number(environment, "MASTER_PORT", port)
    if not 1 <= port <= 65535:
        raise ConfigError(f"MASTER_PORT = {port} in the environment: ports go from 1 to 65535")
    return Launch(rank, size, local_rank, local_size, address, port, by)


def _started_by(environment: Mapping[str, str]) -> tuple[tuple, str] | None:
    """The launcher to believe, and the name of its variable for the size; None for a single process.

    Under srun or in a job's script mpirun's processes have SLURM's variables too, which are not about them if they differ.
    """
    said: dict[tuple[int, int], tuple[tuple, str]] = {}  # by rank and size
    for launcher in _LAUNCHERS:
        rank_name, size_names, *_ = launcher
        if rank_name not in environment:
            continue
        size_name = next((name for name in size_names if name in environment), None)
        if size_name is None:
            of_a_step = bool({"SLURM_STEP_ID", "SLURM_STEPID"} & environment.keys())
            if rank_name == "SLURM_PROCID" and environment[rank_name] == "0" and not of_a_step:
                continue  # the job's script itself
            if said:  # srun sets PMIx's rank without its size
                continue
            raise ConfigError(
                f"{rank_name} = {environment[rank_name]!r} is set, and none of {', '.join(size_names)}: this process cannot "
                "tell how many there are; start it with deepspeed, torchrun, srun or mpirun, or unset that variable"
            )
        said.setdefault(_rank_and_size(environment, rank_name, size_name), (launcher, size_name))
    several = [each for (_, size), each in said.items() if size > 1]
    others = [each for each in several if each[0][0] != "SLURM_PROCID"]
    return next(iter(others or several), None)


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environment.get(name, "")
    if not text and default is not None:
        return default
    if not re.fullmatch("[0-9]{1,9}", text):
        raise ConfigError(f"{name} = {text[:40]!r} in the environment: a whole number is needed")
    return int(text)


def _of_this_machine(environment: Mapping[str, str], name: str) -> dict[str, str]:
    """The variable's value for this machine. SLURM's lists all machines: 2(x3),1 for 2, 2, 2, 1."""
    text = environment.get(name, "")
    parts = [re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part) for part in text.split(",")]
    numbers = [part[1] for part in parts if part for _ in range(min(int(part[2] or 1), 10**6))]
    if None in parts or not numbers:
        return {name: text}
    machine = _number(environment, "SLURM_NODEID", default=0)
    return {name: numbers[machine if machine < len(numbers) else 0]}


def _rank_and_size(environment: Mapping[str, str], rank_name: str, size_name: str) -> tuple[int, int]:
    rank, size = _number(environment, rank_name), _number(environment, size_name)
    if not 0 <= rank < size:
        by = f"{rank_name} and {size_name}"
        raise ConfigError(f"{by} say that this is process {rank} of {size}: ranks go from 0 to {size - 1}")
    return rank, size


def _first_host(environment: Mapping[str, str]) -> str | None:
    """The first machine of SLURM's list, such as node[03-05,9],other."""
    hosts = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST") or ""
    match = re.match(r"([^\[,]+)(?:\[([^\],-]+)[^\]]*\]([^,]*))?", hosts)
    return None if match is None else "".join(part or "" for part in match.groups())


@dataclass(frozen=True)
class World:
    """This process's rank and device, and the number of processes. background: the process group of the threads that write
    checkpoints; None with one process."""

    rank: int
    size: int
    device: torch.device
    background: Any = None

    @property
    def main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier(device_ids=[self.device.index] if self.device.type == "cuda" else None)

    def on_main(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Calls the function on the main process; every process returns its result or raises its ConfigError."""
        outcome, problem = None, None
        if self.main:
            try:
                outcome = function(*args, **kwargs)
            except ConfigError as error:
                problem = str(error)
        outcome, problem = self.gather((outcome, problem))[0]
        if problem is not None:
            raise ConfigError(problem)
        return outcome

    def gather(self, value: Any, group: Any = None) -> list[Any]:
        """A Python object of every process, in order of rank, on every process."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value, group=group)
        return values

    def gather_in_background(self, value: Any) -> list[Any]:
        """`gather` for a second thread of every process."""
        return self.gather(value, self.background)

    def mean(self, values: Tensor) -> Tensor:
        """Means over the processes of (n,) numbers, on the device."""
        values = values.double()
        if self.size > 1:
            dist.all_reduce(values)
        return values / self.size


def resolve_device(name: str) -> str:
    """'auto' is 'cuda' if there is one, else 'cpu'. Raises ConfigError for cuda without a device."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("engine.device = cuda: torch sees no CUDA device here; engine.device=cpu or auto would run")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def join(config: EngineConfig, run: str = "") -> World:
    """Joins the processes that a launcher started; without a launcher this process is alone.

    run: the run's name, which tells processes of different runs at one port apart.
    Raises ConfigError for a launcher's impossible variables, a port in use, and processes that do not come in time.
    """
    device = resolve_device(config.device)
    launch = launched(os.environ)
    if device == "cuda" and launch.local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"{launch.by} say that this is process {launch.local_rank} on this machine, counted from 0, and torch sees "
            f"{torch.cuda.device_count()} GPUs: start one process a GPU, or set engine.device=cpu"
        )
    os.environ.update(
        RANK=str(launch.rank),
        WORLD_SIZE=str(launch.size),
        LOCAL_RANK=str(launch.local_rank),
        LOCAL_WORLD_SIZE=str(launch.local_size),
        MASTER_ADDR=launch.address,
        MASTER_PORT=str(launch.port),
    )
    if "OMPI_COMM_WORLD_LOCAL_RANK" in os.environ:  # DeepSpeed requires it to agree; a torchrun under mpirun differs
        os.environ["OMPI_COMM_WORLD_LOCAL_RANK"] = str(launch.local_rank)
    end_with_launcher()
    if device == "cuda":
        torch.cuda.set_device(launch.local_rank)
    if (device == "cpu" or config.offload != "none") and not _threads_given(os.environ):
        # Processes that share cores slow one another down if each starts a thread for every core.
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // launch.local_size))
    backend = "nccl" if device == "cuda" else "gloo"
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun holds the store itself
        dist.init_process_group(backend, init_method="env://", timeout=_COLLECTIVE)
    else:
        store = meet(launch, run)
        command.met(lambda text: store.add(f"said/{hashlib.sha256(text.encode()).hexdigest()}", 1) == 1)
        dist.init_process_group(backend, store=store, rank=launch.rank, world_size=launch.size, timeout=_COLLECTIVE)
    _join_deepspeed(backend)
    background = dist.new_group(backend="gloo", timeout=_COLLECTIVE) if launch.size > 1 else None
    place = torch.device(device, launch.local_rank) if device == "cuda" else torch.device(device)
    return World(launch.rank, launch.size, place, background)


def _threads_given(environment: Mapping[str, str]) -> bool:
    """Whether the user has set the number of threads. torchrun sets 1 if the user does not."""
    threads = environment.get("OMP_NUM_THREADS")
    return bool(threads) and not (threads == "1" and "TORCHELASTIC_RUN_ID" in environment)


def meet(launch: Launch, run: str, seconds: float | None = None) -> dist.Store:
    """The store at which all processes of the run have met. seconds: the longest wait, by default MEETING_SECONDS."""
    seconds = MEETING_SECONDS if seconds is None else seconds
    limit = timedelta(seconds=seconds)
    where = f"{launch.address}:{launch.port}"
    if launch.rank == 0:
        listener = _listen(launch)
        store = dist.TCPStore(
            LOOPBACK,
            listener.getsockname()[1],
            launch.size,
            True,
            limit,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),  # the store closes it
        )
        store.set("run", run)
    else:
        try:
            _wait_for_listener(launch, seconds)
            store = dist.TCPStore(launch.address, launch.port, launch.size, False, limit, wait_for_workers=False)
            found = store.get("run").decode()
        except (OSError, RuntimeError) as error:  # torch raises RuntimeError
            raise ConfigError(
                f"process {launch.rank} of {launch.size} ({launch.by}) found no process 0 at {where} within {seconds:.0f} s: "
                f"it has ended, or was not started ({_first_line(error)})"
            ) from error
        if found != run:
            raise ConfigError(
                f"process {launch.rank} of {launch.size} found another run at {where} ({found or 'without a name'}): give "
                "this one a port of its own, with deepspeed --master_port or MASTER_PORT"
            )
    if store.add(f"here/{launch.rank}", 1) > 1:
        raise ConfigError(
            f"process {launch.rank} of {launch.size} found an earlier start of this run at {where}, which has not ended: wait "
            "until it has (a run that was asked to end saves a checkpoint first), or take another run.output_dir and port"
        )
    _wait_for_all(store, launch, where, seconds)
    store.set_timeout(_COLLECTIVE)
    return dist.PrefixStore("dpdmd", store)


def _listen(launch: Launch) -> socket.socket:
    """The store's socket: on one machine it listens on LOOPBACK only."""
    host = LOOPBACK if launch.local_size == launch.size else ""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, launch.port))
        listener.listen(4096)
    except OSError as error:
        listener.close()
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            problem = "is in use" if error.errno == errno.EADDRINUSE else "may not be used"
            raise ConfigError(
                f"port {launch.port} of this machine {problem}, perhaps by another run: give this one another with deepspeed "
                f"--master_port {launch.port + 1} (or MASTER_PORT in the environment)"
            ) from error
        raise
    return listener


def _wait_for_listener(launch: Launch, seconds: float) -> None:
    """Waits until something listens at process 0's address; torch's own wait would print pages about failed attempts."""
    began, told = time.monotonic(), False
    while True:
        try:
            socket.create_connection((launch.address, launch.port), timeout=10).close()
            return
        except OSError as error:  # also for a name that is not known yet, when machines start together
            waited = time.monotonic() - began
            if waited > seconds:
                raise
            if waited > _SILENT_SECONDS and not told:
                _say_waiting(launch, f"{launch.address}:{launch.port}", f"process 0 ({_first_line(error)})")
                told = True
        time.sleep(0.1)


def _wait_for_all(store: dist.Store, launch: Launch, where: str, seconds: float) -> None:
    began, told = time.monotonic(), False
    while absent := [rank for rank in range(launch.size) if not store.check([f"here/{rank}"])]:
        waited = time.monotonic() - began
        which = f"process{'es' * (len(absent) > 1)} {', '.join(map(str, absent[:8]))}{', ...' * (len(absent) > 8)}"
        if waited > seconds:
            raise ConfigError(
                f"process {launch.rank} of {launch.size} ({launch.by}) waited {seconds:.0f} s at {where} for {which}: all "
                f"{launch.size} must be started, with the same settings"
            )
        if waited > _SILENT_SECONDS and launch.rank == min(set(range(launch.size)) - set(absent)) and not told:
            _say_waiting(launch, where, which)
            told = True
        time.sleep(0.05)


def _say_waiting(launch: Launch, where: str, which: str) -> None:
    process = f"process {launch.rank} of {launch.size} ({launch.by})"
    print(f"{process} is waiting at {where} for {which}", file=sys.stderr, flush=True)


def _join_deepspeed(backend: str) -> None:
    """Gives DeepSpeed the process group. Its library for the CPU, which serves only tensor-parallel inference, is not
    compiled: that takes a minute and a compiler, and leaves 69 MB a process in shared memory."""
    import deepspeed

    # Not the attribute deepspeed.comm.torch, which is torch itself.
    vars(importlib.import_module("deepspeed.comm.torch"))["build_shm_op"] = lambda: None
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def end_with_launcher() -> None:
    """Under deepspeed and torchrun: has the kernel send SIGTERM to this process when the launcher dies. Otherwise a run whose
    launcher was killed would go on unseen, and keep its GPUs."""
    if _is_deepspeeds(os.getppid()) or "TORCHELASTIC_RUN_ID" in os.environ:
        with contextlib.suppress(OSError, AttributeError):  # not Linux
            ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


class Launcher:
    """deepspeed's two processes above this one: `deepspeed` itself, which may be killed without a signal to this process, and
    the one that it started on this machine."""

    def __init__(self):
        self._parent = os.getppid()
        self._command = _parent_of(self._parent) if _is_deepspeeds(self._parent) else None

    @property
    def gone(self) -> bool:
        return self._command is not None and _parent_of(self._parent) != self._command


def _is_deepspeeds(process: int) -> bool:
    try:
        return b"deepspeed.launcher.launch" in Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return False


def _parent_of(process: int) -> int | None:
    try:
        # The process's name before it, in brackets, may contain spaces.
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return None
