"""The processes of a run: who they are, how they meet, and what they tell one another.

A launcher starts them and says in the environment which of how many each one is: deepspeed and torchrun (RANK), srun
(SLURM_PROCID), mpirun (OMPI_COMM_WORLD_RANK, PMI_RANK). They meet at a store that the first of them holds: on one machine it
listens on 127.0.0.1 alone. No library is compiled for it.
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

MEETING_SECONDS = 300.0  # that a process waits for the others at the start
_COLLECTIVE = timedelta(minutes=30)  # that a process waits for the others later on
_DEFAULT_PORT = 29500
_SILENT_SECONDS = 10.0  # that a process waits before it says so
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Launch:
    """What the launcher says of this process.

    address: where process 0 is met; on one machine LOOPBACK, whatever MASTER_ADDR says. by: the launcher's variables, for
    messages.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    address: str
    port: int
    by: str

    @property
    def one_machine(self) -> bool:
        return self.local_size == self.size


# Launchers that have variables of their own: rank, size, rank and size on this machine. Where several
# say the same, the first counts.
_LAUNCHERS = (
    ("SLURM_PROCID", ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"), "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
    ("OMPI_COMM_WORLD_RANK", ("OMPI_COMM_WORLD_SIZE",), "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("MV2_COMM_WORLD_RANK", ("MV2_COMM_WORLD_SIZE",), "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
    ("PALS_RANKID", ("PALS_SIZE", "PMI_SIZE"), "PALS_LOCAL_RANKID", "PALS_LOCAL_SIZE"),
    ("PMI_RANK", ("PMI_SIZE",), "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    ("PMIX_RANK", ("PMIX_SIZE", "PMI_SIZE"), "PMIX_LOCAL_RANK", "PMIX_LOCAL_SIZE"),
)


def launched(environment: Mapping[str, str]) -> Launch:
    """Reads the launcher's variables; one process on its own where there are none.

    Raises ConfigError for numbers that cannot be, and for a launcher that does not say where the processes are to meet.
    """
    if "RANK" in environment or "WORLD_SIZE" in environment:
        return _by_rank(environment)
    found = _started_by(environment)
    if found is None:
        return Launch(0, 1, 0, 1, LOOPBACK, 0, "no launcher")
    (rank_name, _, local_rank_name, local_size_name), size_name = found
    rank, size = _number(environment, rank_name), _number(environment, size_name)
    by = f"{rank_name} and {size_name}"
    local_size = _number(_of_this_machine(environment, local_size_name), local_size_name, default=0)
    machines = _machines(environment)
    if not local_size:
        local_size = size if machines == 1 else max(1, size // machines)
    local_rank = _number(environment, local_rank_name, default=rank % local_size)
    _check_local(local_rank, local_size, size, f"{local_rank_name} and {local_size_name}")
    address = LOOPBACK if local_size == size else environment.get("MASTER_ADDR") or _first_host(environment)
    if address is None:
        raise ConfigError(
            f"{by} say that this is process {rank} of {size} on several machines: set MASTER_ADDR, for all of them, to "
            "the name of the machine of process 0 (and MASTER_PORT to a free port there)"
        )
    default = _DEFAULT_PORT
    if "SLURM_JOB_ID" in environment:  # two jobs may share a machine
        default = 20000 + _number(environment, "SLURM_JOB_ID") % 20000
    port = _port(environment, default)
    return Launch(rank, size, local_rank, local_size, address, port, by)


def _started_by(environment: Mapping[str, str]) -> tuple[tuple, str] | None:
    """The launcher of several processes whose variables count, and the one that holds their number. None where this process
    is alone.

    mpirun may have been started by srun, or in a job's script, which have SLURM's variables too: where they say something
    else they are not about this process.
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
                continue  # a job's script itself
            if said:  # srun tells PMIx's rank and leaves out its number
                continue
            raise ConfigError(
                f"{rank_name} = {environment[rank_name]!r} is set, and none of {', '.join(size_names)}: this process cannot "
                "tell how many there are; start it with deepspeed, torchrun, srun or mpirun, or unset that variable"
            )
        rank, size = _number(environment, rank_name), _number(environment, size_name)
        _check_rank(rank, size, f"{rank_name} and {size_name}")
        said.setdefault((rank, size), (launcher, size_name))
    several = [each for (_, size), each in said.items() if size > 1]
    others = [each for each in several if each[0][0] != "SLURM_PROCID"]
    return next(iter(others or several), None)


def _by_rank(environment: Mapping[str, str]) -> Launch:
    """The variables of deepspeed and torchrun."""
    by = "RANK and WORLD_SIZE"
    if absent := [name for name in ("RANK", "WORLD_SIZE") if name not in environment]:
        raise ConfigError(f"{absent[0]} is not set, and the other of {by} is: a launcher sets both, or unset both")
    rank, size = _number(environment, "RANK"), _number(environment, "WORLD_SIZE")
    _check_rank(rank, size, by)
    # deepspeed's, torchrun's; where neither is set, all are on this machine.
    size_name = next((name for name in ("LOCAL_SIZE", "LOCAL_WORLD_SIZE") if environment.get(name)), "LOCAL_WORLD_SIZE")
    local_size = _number(environment, size_name, default=size)
    local_rank = _number(environment, "LOCAL_RANK", default=rank % max(1, local_size))
    _check_local(local_rank, local_size, size, f"LOCAL_RANK and {size_name}")
    address = LOOPBACK if local_size == size else environment.get("MASTER_ADDR") or LOOPBACK
    return Launch(rank, size, local_rank, local_size, address, _port(environment, _DEFAULT_PORT), by)


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environment.get(name, "")
    if not text and default is not None:
        return default
    if not re.fullmatch("[0-9]{1,9}", text):
        raise ConfigError(f"{name} = {text[:40]!r} in the environment: a whole number is needed")
    return int(text)


def _of_this_machine(environment: Mapping[str, str], name: str) -> dict[str, str]:
    """The variable alone. SLURM's has the numbers of all machines in it: 2(x3),1 for 2, 2, 2, 1."""
    text = environment.get(name, "")
    numbers = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            return {name: text}
        numbers += [match[1]] * min(int(match[2] or 1), 10**6)
    if not numbers:
        return {name: text}
    machine = _number(environment, "SLURM_NODEID", default=0)
    return {name: numbers[machine if machine < len(numbers) else 0]}


def _port(environment: Mapping[str, str], default: int) -> int:
    port = _number(environment, "MASTER_PORT", default)
    if not 1 <= port <= 65535:
        raise ConfigError(f"MASTER_PORT = {port} in the environment: ports go from 1 to 65535")
    return port


def _check_rank(rank: int, size: int, by: str) -> None:
    if not 0 <= rank < size:
        raise ConfigError(f"{by} say that this is process {rank} of {size}: ranks go from 0 to {size - 1}")


def _check_local(rank: int, size: int, of_all: int, by: str) -> None:
    if not (1 <= size <= of_all and 0 <= rank < size):
        raise ConfigError(
            f"{by} say that this is process {rank} of {size} on this machine, counted from 0, and there are {of_all} in "
            f"all: ranks go from 0 to the number on the machine less one, and that is 1 to {of_all}"
        )


def _machines(environment: Mapping[str, str]) -> int:
    names = ("SLURM_STEP_NUM_NODES", "SLURM_NNODES", "SLURM_JOB_NUM_NODES")
    return max(1, next((_number(environment, name) for name in names if environment.get(name)), 1))


def _first_host(environment: Mapping[str, str]) -> str | None:
    """Of SLURM's list of machines, such as node[03-05,9],other."""
    hosts = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST") or ""
    match = re.match(r"([^\[,]+)(?:\[([^\],-]+)[^\]]*\]([^,]*))?", hosts)
    return None if match is None else "".join(part or "" for part in match.groups())


@dataclass(frozen=True)
class World:
    """The processes of this run: rank and size, and the device of this one.

    background: a group of their own for the threads that write checkpoints; None with one process.
    """

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
        """Calls the function on the main process. Its result, or the ConfigError that it raised, is every process's."""
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

    def gather(self, value: Any) -> list[Any]:
        """A Python object of every process, in order of rank, on every process."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def gather_in_background(self, value: Any) -> list[Any]:
        """`gather` for a thread beside the training's; the threads of all processes call."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value, group=self.background)
        return values

    def mean(self, values: Tensor) -> Tensor:
        """The mean over the processes of each of (n,) numbers, on the device."""
        values = values.double()
        if self.size > 1:
            dist.all_reduce(values)
        return values / self.size


def resolve_device(name: str) -> str:
    """'auto' to 'cuda' where there is one, else 'cpu'. Raises ConfigError for CUDA that is not there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("engine.device = cuda: torch sees no CUDA device here; engine.device=cpu or auto would run")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def join(config: EngineConfig, run: str = "") -> World:
    """Joins the processes that a launcher started, or stands alone when there was none.

    run: names what is run. Processes of different runs that meet by mistake, at one port, are told apart by it.
    Raises ConfigError for a launcher's variables that cannot be, a port that is taken, and processes that do not come.
    """
    device = resolve_device(config.device)
    launch = launched(os.environ)
    if device == "cpu":
        # DeepSpeed asks the environment, not us, which accelerator to work on.
        os.environ["DS_ACCELERATOR"] = "cpu"
    elif launch.local_rank >= torch.cuda.device_count():
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
    if "OMPI_COMM_WORLD_LOCAL_RANK" in os.environ:  # mpirun's, of a torchrun; DeepSpeed wants it to be the same
        os.environ["OMPI_COMM_WORLD_LOCAL_RANK"] = str(launch.local_rank)
    end_with_launcher()
    if device == "cuda":
        torch.cuda.set_device(launch.local_rank)
    if (device == "cpu" or config.offload != "none") and not _threads_given(os.environ):
        # Processes that share cores stall one another when each starts a thread for every core.
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // launch.local_size))
    backend = "nccl" if device == "cuda" else "gloo"
    _join(launch, backend, run)
    _join_deepspeed(backend)
    background = dist.new_group(backend="gloo", timeout=_COLLECTIVE) if launch.size > 1 else None
    place = torch.device(device, launch.local_rank) if device == "cuda" else torch.device(device)
    return World(launch.rank, launch.size, place, background)


def _threads_given(environment: Mapping[str, str]) -> bool:
    """Whether the user has said how many threads a process is to have. torchrun says 1 where the user says nothing."""
    threads = environment.get("OMP_NUM_THREADS")
    return bool(threads) and not (threads == "1" and "TORCHELASTIC_RUN_ID" in environment)


def _join(launch: Launch, backend: str, run: str) -> None:
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun holds the store itself
        dist.init_process_group(backend, init_method="env://", timeout=_COLLECTIVE)
        return
    store = meet(launch, run)
    command.met(lambda text: store.add(f"said/{hashlib.sha256(text.encode()).hexdigest()}", 1) == 1)
    dist.init_process_group(backend, store=store, rank=launch.rank, world_size=launch.size, timeout=_COLLECTIVE)


def meet(launch: Launch, run: str, seconds: float | None = None) -> dist.Store:
    """The store at which all processes of the run have met. seconds: to wait for them, MEETING_SECONDS by default."""
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
            master_listen_fd=listener.detach(),  # the store's from now on
        )
        store.set("run", run)
    else:
        try:
            _wait_for_listener(launch, seconds)
            store = dist.TCPStore(launch.address, launch.port, launch.size, False, limit, wait_for_workers=False)
            found = store.get("run").decode()
        except (OSError, RuntimeError) as error:  # torch's are RuntimeErrors
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
    """Where the store is to listen: on one machine nowhere but there."""
    host = LOOPBACK if launch.one_machine else ""
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
    """Returns when something listens where process 0 is to be: torch, which would wait as well, fills pages with how its
    attempts failed."""
    began, told = time.monotonic(), False
    while True:
        try:
            socket.create_connection((launch.address, launch.port), timeout=10).close()
            return
        except OSError as error:  # also of a name that is not known yet, as where machines start together
            waited = time.monotonic() - began
            if waited > seconds:
                raise
            if waited > _SILENT_SECONDS and not told:
                where = f"{launch.address}:{launch.port}"
                _say_waiting(launch, where, f"process 0 ({_first_line(error)})")
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
    print(
        f"process {launch.rank} of {launch.size} ({launch.by}) is waiting at {where} for {which}",
        file=sys.stderr,
        flush=True,
    )


def _join_deepspeed(backend: str) -> None:
    """DeepSpeed takes over the processes that have met. Its own library for the CPU, which serves tensor-parallel
    inference alone, is not compiled: that takes a minute and a compiler, and leaves 69 MB a process in shared memory."""
    import deepspeed

    # Not deepspeed.comm.torch: as an attribute that is torch itself.
    vars(importlib.import_module("deepspeed.comm.torch"))["build_shm_op"] = lambda: None
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


# Launchers that die


def end_with_launcher() -> None:
    """Under the launchers of deepspeed and torch: SIGTERM for this process when the launcher dies. Otherwise a run whose
    launcher was killed would train on unseen, and keep its GPUs."""
    if _is_deepspeeds(os.getppid()) or "TORCHELASTIC_RUN_ID" in os.environ:
        with contextlib.suppress(OSError, AttributeError):  # not Linux
            ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


class Launcher:
    """deepspeed's two processes above this one: `deepspeed` itself, which leaves when it is killed without a word, and the
    one that it started on this machine."""

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
        # The name before it, in brackets, may hold spaces.
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return None
